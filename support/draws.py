"""Uniform random numbers that are a function of a seed and a place, whatever the batch, and ids
sampled by them."""

import numpy as np
import torch

from support.files import seed_of


def mix_bits(z):
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) of uint64 numbers."""
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def uniforms(seeds, k, length):
    """(prompts, k, length) float64 numbers in [0, 1): completion d of a prompt with seed s reads
    the stream of (s, d), whatever rank or batch it is in.

    SplitMix64: number t of a stream is a hash of its start + t times the golden ratio's bits, so
    that all are made at once. A seed is an int or a tuple of ints, all of one length."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    parts = [s if isinstance(s, (tuple, list)) else (s,) for s in seeds]
    start = np.zeros(len(seeds), np.uint64)                                    # (prompts,)
    for column in zip(*parts, strict=True):
        bits = np.array([int(x) % 2 ** 64 for x in column], np.uint64)
        start = mix_bits(start + golden ^ bits)
    start = mix_bits(start[:, None] + golden ^ np.arange(k, dtype=np.uint64))  # (prompts, k)
    steps = golden * np.arange(1, length + 1, dtype=np.uint64)
    bits = mix_bits(start[..., None] + steps)                                  # (.., k, length)
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0 ** -53)


def inverse(mass, target):
    """The first index (R, 1) whose cumulative weight in mass (R, N) is above target (R, 1).
    Rounding never makes it an index of weight zero, which low-precision multinomials have
    returned."""
    largest = mass[:, -1:] * (1 - 2 ** -50)
    target = target.clamp(min=0).minimum(largest)
    index = torch.searchsorted(mass, target, right=True)
    return index.clamp_(max=mass.shape[-1] - 1)                                # of nan: the last


def draw(p, uniform, size=128):
    """Ids (R, 1) sampled by weights p (R, V), and the weights' sums (R, 1): the inverse of the
    cumulative distribution, in float64, at uniform (R,) in [0, 1).

    In a large vocabulary the block of `size` ids is drawn first and then the id in it: on a CPU 30
    times faster than a cumulative sum over all."""
    vocab = p.shape[-1]
    in_blocks = p.numel() > 2 ** 16 and vocab >= size
    sums = block_sums(p, size) if in_blocks else p
    mass = sums.double().cumsum(-1)
    target = uniform[:, None] * mass[:, -1:]
    index = inverse(mass, target)
    if not in_blocks:
        return index, mass[:, -1:]
    ids = index * size + torch.arange(size, device=p.device)                   # (R, size)
    ids = ids.clamp_(max=vocab - 1)
    before = (mass - sums).gather(1, index)                                    # of earlier blocks
    inside = p.gather(1, ids).double().cumsum(-1)
    place = inverse(inside, target - before)
    return ids.gather(1, place), mass[:, -1:]


def block_sums(p, size):
    """The sums of weights p (R, V) over blocks of `size` ids; the last block may be shorter."""
    whole = p.shape[-1] // size * size
    blocks = p[:, :whole].unflatten(-1, (-1, size)).sum(-1)
    rest = p[:, whole:].sum(-1, keepdim=True)
    return torch.cat((blocks, rest), -1)


def with_label_noise(verdicts, rate, seeds, purpose):
    """Verdicts of 0 and 1 (P, k, ..), a fraction `rate` of them inverted by the prompts' seeds:
    what a study of a noisy verifier lets training see."""
    if not rate:
        return verdicts
    odds = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed_of(seed, purpose))
        odds.append(torch.rand(verdicts.shape[1:], generator=generator))
    return torch.where(torch.stack(odds) < rate, 1 - verdicts, verdicts)
