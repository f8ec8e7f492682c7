"""QuasiMoTTo: k completions that are each exactly sampled and together cover more (arXiv
2607.01179).

    python evaluate.py measure RUN --data eval.jsonl --decoder quasi --set-size 5

A completion is a point u in [0, 1): at each token u falls into the token's part of the cumulative
distribution, and its place in that part is the next token's u. Independent points would give
independent completions; here the points of a set are spread evenly, so that two completions of a
set seldom begin alike."""

import torch

from generate import SAMPLING, plain_loop, kept_probabilities
from methods.decoders import by_post
from support.draws import inverse, uniforms
from support.files import InputError
from support.registry import DECODERS
from trainer import sampling_of


def even_points(noise):
    """(n,) points in [0, 1), one in each interval [i/n, (i + 1)/n), in a random order: each is
    uniform by itself. noise: (n, 2) uniform numbers."""
    n = len(noise)
    interval = noise[:, 0].argsort().double()
    return (interval + noise[:, 1]) / n


GRAIN = 2.0 ** -52               # of float64 numbers in [0, 1)


def token_at(p, u, fresh):
    """The tokens (R,) in whose part of the cumulative distribution the points u (R,) fall, and the
    points' places in these parts (R,), in [0, 1). p (R, V): weights of any sum.

    A point has 52 bits, and a token of probability p uses -log2 p of them: fresh uniform numbers
    (R,) fill up what is lost below GRAIN / p, so that long completions are exactly sampled too."""
    mass = p.double().cumsum(-1)
    total = mass[:, -1:]
    token = inverse(mass, u[:, None] * total)                                  # (R, 1)
    own = p.double().gather(1, token)
    lower = mass.gather(1, token) - own
    place = (u[:, None] * total - lower) / own
    known = (GRAIN * total / own).clamp(max=1)
    place = place.clamp(0, 1) * (1 - known) + fresh[:, None] * known
    return token[:, 0], place[:, 0].clamp(0, 1 - GRAIN)


@torch.no_grad()
def quasi_completions(model, prompt, size, noise, *, max_new_tokens, stop_ids=(), temperature=1.0,
                      **sampling):
    """Completions of one prompt, in sets of `size` whose points are spread evenly -> (tokens,
    logprobs, finished). noise: (rows, max_new_tokens + 2) of `uniforms`; size divides rows."""
    rows = len(noise)
    noise = noise.to(model.device)
    u = torch.cat([even_points(some) for some in noise[:, :2].split(size)])
    done = torch.zeros(rows, dtype=torch.bool, device=model.device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=model.device)
    logprobs = [[] for _ in range(rows)]

    def choose(logits, step):
        nonlocal u, done
        p = kept_probabilities(logits, temperature, **sampling)
        token, u = token_at(p, u, noise[:, 2 + step])
        chances = (p.gather(1, token[:, None])[:, 0] / p.sum(1)).log().tolist()
        ended = done.tolist()
        for row in range(rows):
            if not ended[row]:
                logprobs[row].append(chances[row])
        shown = token.masked_fill(done, -1)
        done = done | torch.isin(token, stops)
        return shown, None

    written = plain_loop(model, prompt, rows, max_new_tokens, choose)
    return written, logprobs, done.tolist()


def write_quasi(session, visit, prompt, k, helper):
    args = session.args
    rows = k // args.set_size * args.set_size
    seed = session.seed_for(session.stage, 0, visit)
    noise, = uniforms([seed], rows, args.max_new_tokens + 2)
    return quasi_completions(session.model, prompt, args.set_size, noise,
                             max_new_tokens=args.max_new_tokens, stop_ids=session.stops,
                             **{"temperature": 1.0} | sampling_of(args))


def check_quasi(args, k):
    if args.decoder == "quasi" and args.temperature <= 0:
        raise InputError("--decoder quasi samples: give --temperature above 0")


DECODERS.add("quasi", "sets that are spread evenly, each completion exactly sampled: QuasiMoTTo",
             paper="arXiv 2607.01179", knobs=(*SAMPLING, "set_size"), joint=True,
             check=check_quasi)(by_post(write_quasi))
