"""--d-gradient straight-through: D's gradient by the straight-through Gumbel softmax. It is biased,
and serves as an ablation of the score function's gradient."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from lora import base
from model import predicting_states
from polylora import measure_diversity
from support.files import InputError, seed_of
from support.registry import D_GRADIENTS


def straight_through_loss(logp, target, noise, gradient, heat):
    """-D (N,) by the straight-through Gumbel estimator (arXiv 1611.01144): BIASED, an ablation.

    gradient (N, V): D's gradient at the one-hot vectors of the tokens `target` (N,). With uniform
    noise (N, V), log p + g are Gumbel scores whose largest is the target's; their softmax at
    temperature `heat`, with g held fixed, stands for the one-hot vector."""
    own = target[:, None]
    # The scores' exp(-score), given that the target's is the smallest of them.
    exponentials = -noise.clamp(min=1e-20).log()
    smallest = exponentials.gather(1, own)
    others = exponentials / logp.exp() + smallest
    scores = -others.scatter(1, own, smallest).log()
    gumbel = (scores - logp).detach()
    soft = ((logp + gumbel) / heat).softmax(-1)
    return -(soft * gradient).sum(-1)


def token_gradients(session, rows, gradients):
    """(N, V): D's gradient at the one-hot vectors of the tokens. `gradients` (completions,
    dim), D's gradient at the completions' embeddings, is passed back through the frozen base, which
    reads mixtures of its token vectors as it reads tokens."""
    order = rows.completion.unique_consecutive()
    stops = torch.tensor(sorted(session.stops), device=rows.target.device)
    with base(session.model):
        table = session.model.model.embed_tokens.weight.detach()[:session.model.vocab]
        x = table[rows.target].requires_grad_()                                # (N, hidden)
        words = ~torch.isin(rows.target, stops)
        vectors = []
        lengths = []
        for completion in order:
            own = rows.completion == completion
            vectors.append(x[own])
            lengths.append(words[own].sum())
        padded = nn.utils.rnn.pad_sequence(vectors, batch_first=True)
        pooled = session.embedder.pool(padded, torch.stack(lengths).clamp(min=1))
        grad_x, = torch.autograd.grad((pooled * gradients[order]).sum(), x)
    return grad_x.float() @ table.float().t()


def embedding_gradients(session, completions, posts):
    """(P, k, dim): the gradient of D, a mean over `posts`, at the completions' embeddings before
    these are brought to unit length."""
    args = session.args
    texts = []
    for group in completions.texts:
        texts.extend(group)
    vectors = session.embedder.vectors(texts) - session.embedder.centre
    vectors = vectors.cpu().unflatten(0, (-1, args.k)).requires_grad_()
    features = dataclasses.replace(completions, embeddings=F.normalize(vectors, dim=-1))
    measured = measure_diversity(args.diversity, features)
    gradients, = torch.autograd.grad(measured.value.sum() / posts, vectors)
    return gradients


def check_straight_through(args):
    """Raise InputError for flags that the estimator does not work with."""
    if (args.diversity != "cosine" or args.embedder != "base" or args.shard
            or args.gumbel_heat <= 0):
        raise InputError(f"--d-gradient {args.d_gradient} is for --diversity cosine with "
                         "--embedder base, without --shard, at a --gumbel-heat above 0")


def heat_flag(p):
    """Add --gumbel-heat."""
    p.add_argument("--gumbel-heat", type=float, default=1.0,
                   help="temperature of straight-through's softmax: lower, less biased and noisier")


@D_GRADIENTS.add("straight-through",
                 "straight-through Gumbel softmax, BIASED, an ablation (arXiv 1611.01144)",
                 check=check_straight_through, flags=heat_flag)
def add_straight_through(session, seeds, completions, pairs, posts):
    """Add the gradient of -D, a mean over `posts`, by straight_through_loss. In addition to that
    estimator's bias, a token's effect on the probabilities of later ones is left out."""
    args = session.args
    device = session.ranks.device
    gradients = embedding_gradients(session, completions, posts).flatten(0, 1).to(device)
    for rows in session.micro_batches(pairs):
        gradient = token_gradients(session, rows, gradients)
        states = predicting_states(session.model, rows)
        logits = F.linear(states, session.model.head_weight())
        noise = gumbel_noise(rows.completion.tolist(), seeds, args.k, logits.shape[1]).to(device)
        logp = (logits.float() / args.temperature).log_softmax(-1)
        loss = straight_through_loss(logp, rows.target, noise, gradient, args.gumbel_heat)
        loss.sum().backward()


def gumbel_noise(completions, seeds, k, vocab):
    """Uniform noise (N, vocab) of tokens, `completions` telling the completion of each: by the seed
    of its prompt and its number among the k."""
    generators = {}
    noise = []
    for completion in completions:
        if completion not in generators:
            prompt, number = divmod(completion, k)
            generator = torch.Generator().manual_seed(seed_of(seeds[prompt], number))
            generators[completion] = generator
        noise.append(torch.rand(vocab, generator=generators[completion]))
    return torch.stack(noise)
