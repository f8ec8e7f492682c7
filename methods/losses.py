"""Further losses of phase one: on the logits of reply tokens, on hidden states, and on sampled
completions.

In order: any function of logits in chunks (token_losses) and --loss by it (reply_losses); the
losses on logits; BA-LoRA; the losses on sampled completions."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lora import base
from model import chunk_size, chunks, predicting_states, token_logprobs
from rewards import make_reward
from support.files import InputError
from support.registry import SFT_LOSSES
from support.steplog import tally_completions


# ---- Losses on logits, chunk by chunk ------------------------------------------------------------

class TokenLosses(torch.autograd.Function):
    """fn's losses (N,) of tokens under a frozen head W, in chunks. A token's loss depends only on
    the hidden states of its chunk, so the gradient of the sum is one vector a token. It is taken by
    autograd while the chunk's logits exist: (N, hidden) is kept for the backward pass, not (N, V).
    """

    @staticmethod
    def forward(ctx, fn, hidden, weight, target, temperature, cuts, *extra):
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        for some in cuts:
            with torch.enable_grad():
                states = hidden[some].detach().requires_grad_()
                logits = F.linear(states, weight).float() / temperature        # (chunk, V)
                more = [x[some] for x in extra]
                loss = fn(logits, target[some], *more)
                grad_hidden[some], = torch.autograd.grad(loss.sum(), states)
            losses[some] = loss.detach()
        ctx.save_for_backward(grad_hidden)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_hidden, = ctx.saved_tensors
        of_hidden = (grad_hidden * grad[:, None]).to(grad_hidden.dtype)
        unused = len(ctx.needs_input_grad) - 2
        return None, of_hidden, *[None] * unused


def in_chunks(fn, hidden, weight, target, temperature, cuts, *extra):
    """fn(logits (n, V) fp32, target (n,), *extra) -> (n,), over all N tokens, chunk by chunk; the
    backward pass computes logits again. For a W that itself trains."""
    def of_chunk(states, weight, target, *extra):
        return fn(F.linear(states, weight).float() / temperature, target, *extra)
    losses = []
    for some in cuts:
        cut = [x[some] for x in extra]
        losses.append(checkpoint(of_chunk, hidden[some], weight, target[some], *cut,
                                 use_reentrant=False))
    return torch.cat(losses)


def whole_chunks(completion, vocab):
    """Slices of tokens of about chunk_size that cut no completion; completion (N,): that of each
    token, in order."""
    size = chunk_size(vocab, completion.device)
    ends = (completion.diff().nonzero().flatten() + 1).tolist() + [len(completion)]
    out = []
    start = 0
    for i, end in enumerate(ends):
        last = end == len(completion)
        if last or ends[i + 1] - start > size:
            out.append(slice(start, end))
            start = end
    return out


def token_losses(model, rows, fn, temperature=1.0, extra=(), whole=False, hidden=None):
    """Losses (N,) fp32, with gradient, of the N reply tokens in `rows`, by any function of their
    logits: fn(logits (n, V) fp32, target (n,), *extra) -> (n,), called chunk by chunk.

    extra: tensors with N rows, which are cut into the same chunks, such as the base's states.
    whole: fn needs a reply's tokens in one chunk; the gradients of their losses must be equal.
    hidden: predicting_states(model, rows), if computed already."""
    if hidden is None:
        hidden = predicting_states(model, rows)
    weight = model.head_weight()
    if whole:
        cuts = whole_chunks(rows.completion, len(weight))
    else:
        cuts = chunks(len(hidden), len(weight), hidden.device)
    if weight.requires_grad or not hidden.requires_grad:
        return in_chunks(fn, hidden, weight, rows.target, temperature, cuts, *extra)
    return TokenLosses.apply(fn, hidden, weight, rows.target, temperature, cuts, *extra)


def reply_losses(session, rows):
    """The losses (N,) of --loss, with their gradient."""
    args = session.args
    loss = SFT_LOSSES[args.loss]
    options = {} if args.loss_value is None else {loss.knob: args.loss_value}
    if loss.base_head:
        with base(session.model):            # where all weights train, the base's own head
            options["head"] = session.model.head_weight().detach()
    extra = loss.extra(session, rows) if loss.extra else ()
    hidden = predicting_states(session.model, rows)
    function = partial(loss.function, **options)
    losses = token_losses(session.model, rows, function, extra=extra, whole=loss.whole,
                          hidden=hidden)
    if loss.states:
        value = 1.0 if args.loss_value is None else args.loss_value
        losses = losses + loss.states(hidden, rows.completion, value)
    return losses


# ---- Losses on logits: fp32 (N, V) of reply tokens, and their targets (N,) -> (N,) ---------------

@SFT_LOSSES.add("gem", "GEM, linear; value: beta, 0.7 (arXiv 2408.16673)", knob="beta",
                losses=reply_losses)
def gem_loss(logits, target, beta=0.7, logsigmoid=False):
    """GEM (arXiv 2408.16673): -sum_v q_v w_v (log p_y - log p_v), with q = softmax(z / beta) and w
    held fixed; w is 1 (linear) or sigmoid((z_v - z_y) / 100).

    The linear form has exactly the gradient of beta CE(z / beta), so compare it with cross-entropy
    that is sampled at a higher temperature."""
    logp = logits.log_softmax(-1)
    own = target[:, None]
    weight = (logits / beta).softmax(-1)
    if logsigmoid:
        advance = logits - logits.gather(-1, own)
        weight = weight * (0.01 * advance).sigmoid()
    difference = logp - logp.gather(-1, own)
    return (weight.detach() * difference).sum(-1)


@SFT_LOSSES.add("gem-logsigmoid", "GEM's default form; value: beta, 0.7 (arXiv 2408.16673)",
                knob="beta", losses=reply_losses)
def gem_logsigmoid_loss(logits, target, beta=0.7):
    """GEM with w = sigmoid((z_v - z_y) / 100), see gem_loss."""
    return gem_loss(logits, target, beta, logsigmoid=True)


@SFT_LOSSES.add("entropy", "less the entropy; value: its weight, 0.1 (arXiv 1701.06548)",
                knob="weight", losses=reply_losses)
def entropy_loss(logits, target, weight=0.1):
    """Cross-entropy minus weight times the entropy of the token's distribution (the confidence
    penalty, arXiv 1701.06548)."""
    logp = logits.log_softmax(-1)
    cross_entropy = F.nll_loss(logp, target, reduction="none")
    negative_entropy = (logp.exp() * logp).sum(-1)
    return cross_entropy + weight * negative_entropy


@SFT_LOSSES.add("sed", "SED-SFT; value: its weight, 0.2 (arXiv 2602.07464)", knob="weight",
                losses=reply_losses)
def sed_loss(logits, target, weight=0.2, top=10, mass=0.95):
    """SED-SFT (arXiv 2602.07464): cross-entropy plus weight (p_y - 1/2)^2 where the `top` likeliest
    tokens hold less than `mass`: there the target need not have all of it.

    The authors' code sets the mass from the base's sums of 10 tokens, and trains on sums of 2 by
    default; here both sums are of 10, and the mass is fixed."""
    p = logits.softmax(-1)
    largest = p.topk(min(top, p.shape[-1])).values
    unsure = largest.sum(-1) < mass
    own = p.gather(-1, target[:, None])[:, 0]
    cross_entropy = F.cross_entropy(logits, target, reduction="none")
    return cross_entropy + weight * (own - 0.5) ** 2 * unsure


def earlier_tokens(session, rows):
    """For each reply token the different tokens before it in the reply, except itself: (N, C),
    padded with -1."""
    seen = {}                                # reply -> its tokens so far, in order
    lists = []
    for reply, token in zip(rows.completion.tolist(), rows.target.tolist()):
        before = seen.setdefault(reply, {})
        others = [earlier for earlier in before if earlier != token]
        lists.append(torch.tensor(others, dtype=torch.long))
        before[token] = None
    padded = nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1)
    return (padded.to(rows.target.device),)


@SFT_LOSSES.add("unlikelihood", "against repeated tokens; value: weight, 1 (arXiv 1908.04319)",
                knob="weight", extra=earlier_tokens, losses=reply_losses)
def unlikelihood_loss(logits, target, earlier, weight=1.0):
    """Cross-entropy minus weight times the sum of log(1 - p_c) over the reply's earlier tokens c
    (N, C), padded with -1 (arXiv 1908.04319, eq. 5)."""
    logp = logits.log_softmax(-1)
    logp_earlier = logp.gather(-1, earlier.clamp(min=0))
    p_earlier = logp_earlier.exp().clamp(max=1 - 1e-6)
    log_others = torch.log1p(-p_earlier)
    penalty = log_others.masked_fill(earlier < 0, 0.0).sum(-1)
    return F.nll_loss(logp, target, reduction="none") - weight * penalty


# ---- BA-LoRA -------------------------------------------------------------------------------------

def base_states(session, rows):
    """The base's final hidden states (N, hidden), and the reply that each token belongs to (N,)."""
    with torch.no_grad(), base(session.model):
        return predicting_states(session.model, rows), rows.completion


def ba_lora_regularizer(logits, base_logits, completion, heat=2.0, top=20, leading=10):
    """BA-LoRA's three terms (arXiv 2408.04556, v6), weighed 0.025, 0.005 and 0.005: heat^2 KL(base
    || model) at temperature `heat`; minus the entropy of the renormalised `top` largest logits;
    minus the sum of the `leading` singular values over the Frobenius norm.

    The last is of each reply's own logits (its tokens, V), completion (N,) telling the reply, where
    the paper's code takes the batch's: so the gradient does not depend on how replies are packed.
    The first weight stays fixed, where its code lets it fall to a tenth."""
    drift = temperature_kl(logits, base_logits, heat)
    largest = logits.topk(min(top, logits.shape[-1])).values
    best = largest.log_softmax(-1)
    focus = (best.exp() * best).sum(-1)
    rank = torch.zeros_like(focus)
    for i in completion.unique().tolist():
        z = logits[completion == i]
        squares = torch.linalg.eigvalsh(z @ z.mT).clamp(min=1e-12)  # of the singular values
        norm = squares.sum().sqrt()
        fraction = squares[-leading:].sqrt().sum() / norm
        rank = torch.where(completion == i, -fraction, rank)
    return 0.025 * drift + 0.005 * focus + 0.005 * rank


def temperature_kl(logits, base_logits, heat):
    """heat^2 KL(base || model) (N,) of the distributions at temperature `heat`."""
    model = (logits / heat).log_softmax(-1)
    teacher = (base_logits / heat).log_softmax(-1)
    kl = (teacher.exp() * (teacher - model)).sum(-1)
    return heat ** 2 * kl


@SFT_LOSSES.add("ba-lora", "three regularizers; value: times their weights, 1 (arXiv 2408.04556)",
                knob="weight", extra=base_states, base_head=True, whole=True, losses=reply_losses)
def ba_lora_loss(logits, target, base_hidden, completion, head, weight=1.0):
    """Cross-entropy plus weight times ba_lora_regularizer."""
    base_logits = F.linear(base_hidden, head).float()
    regularizer = ba_lora_regularizer(logits, base_logits, completion)
    return F.cross_entropy(logits, target, reduction="none") + weight * regularizer


def covariance_penalty(hidden, completion, weight=1.0, leading=5):
    """Two terms (N,) of BA-LoRA's form for understanding (arXiv 2408.04556), of each reply's own
    hidden states Z (n, D), at each of its tokens: 0.03 (1/D) sum_{i != j} C_ij^2, C the covariance,
    and -0.03 times the `leading` singular values' fraction of the sum of all.

    hidden (N, D), completion (N,) the reply of each token; one of one token has covariance 0."""
    out = torch.zeros(len(hidden), device=hidden.device)
    for i in completion.unique().tolist():
        z = hidden[completion == i].float()
        n = len(z)
        centred = z - z.mean(0)
        # |C|^2 of all entries by the (n, n) products, which are far fewer than C's D^2 entries.
        all_entries = (centred @ centred.mT).square().sum()
        diagonal = centred.square().sum(0).square().sum()
        off_diagonal = all_entries - diagonal
        values = torch.linalg.eigvalsh(z @ z.mT).clamp(min=1e-12).sqrt()  # the singular values
        fraction = values[-leading:].sum() / values.sum()
        covariance = off_diagonal / max(n - 1, 1) ** 2 / z.shape[1]
        out = torch.where(completion == i, weight * 0.03 * (covariance - fraction), out)
    return out


@SFT_LOSSES.add("ba-lora-nlu",
                "its form for understanding, on hidden states; value: as ba-lora (arXiv "
                "2408.04556)",
                knob="weight", extra=base_states, base_head=True, states=covariance_penalty,
                losses=reply_losses)
def ba_lora_nlu_loss(logits, target, base_hidden, completion, head, weight=1.0, heat=2.0):
    """Cross-entropy and the first term of BA-LoRA's form for understanding, 0.15 heat^2 KL(base ||
    model). Its other two are of hidden states: covariance_penalty."""
    base_logits = F.linear(base_hidden, head).float()
    drift = temperature_kl(logits, base_logits, heat)
    return F.cross_entropy(logits, target, reduction="none") + weight * 0.15 * drift


# ---- Losses on sampled completions ---------------------------------------------------------------

def repeated_tokens(ids, n=4):
    """For each token id: whether it lies in an n-gram that occurred earlier in the list."""
    seen = set()
    flags = [False] * len(ids)
    for start in range(len(ids) - n + 1):
        gram = tuple(ids[start:start + n])
        if gram in seen:
            flags[start:start + n] = [True] * n
        seen.add(gram)
    return flags


def ended(tokens, stops):
    """Whether each completion of tokens, P lists of k, ends with a stop token: P lists of k."""
    return [[ids[-1] in stops for ids in group] for group in tokens]


@SFT_LOSSES.add("unlikelihood-sequence",
                "against 4-grams that k completions repeat; value: weight, 1 (arXiv 1908.04319)",
                knob="weight", into="completions")
def add_unlikely(session, visits, step, tally, weight=1.0):
    """Add the gradient of sequence-level unlikelihood (arXiv 1908.04319, eq. 7-8): weight times the
    sum of -log(1 - p) over those tokens of k completions that repeat an earlier 4-gram, over the
    number of all their tokens. The completions are sampled, where the paper decodes greedily."""
    prompts, samples, texts = session.sample_completions(visits, step, session.args.k)
    tally_completions(tally, ended(samples.tokens, session.stops), texts)
    completions = []
    for group in samples.tokens:
        completions.extend(group)
    count, = session.ranks.sum([sum(map(len, completions))])
    flags = list(map(repeated_tokens, completions))
    for rows in session.micro_batches(list(zip(prompts, samples.tokens))):
        logp, _ = token_logprobs(session.model, rows, session.args.temperature)
        repeats = rows.by_token(flags).to(logp)
        p = logp.exp().clamp(max=1 - 1e-6)
        unlikely = -torch.log1p(-p) * repeats
        (weight * unlikely.sum() / count).backward()
        tally.add("unlikely", unlikely.sum().detach(), len(logp))
        tally.add("tokens", rows.tokens.numel() + len(logp))


def bonbon_loss(best, worst, base_best, base_worst, n, alpha=0.005):
    """BoNBoN (arXiv 2406.00832): alpha (-log pi(best)) + (1 - alpha) (h - (n - 1) H_{n-1})^2, where
    h = log [pi(best) pi_0(worst) / (pi(worst) pi_0(best))] and H is the harmonic number: the target
    is the mean of h under the best-of-n policy itself. All (P, ..): log-probabilities of whole
    completions."""
    h = (best - base_best) - (worst - base_worst)
    harmonic = sum(1 / i for i in range(1, n))
    target = (n - 1) * harmonic
    return alpha * -best + (1 - alpha) * (h - target) ** 2


def prepare_bonbon(session):
    """Load the reward by which BoNBoN ranks completions."""
    session.reward = make_reward("valid" if session.domain.styles else "agreement", session)


def check_bonbon(args):
    """Raise InputError if there is only one completion a post."""
    if args.k < 2:
        raise InputError(f"--loss bonbon compares completions: give --k 2 or more (k is {args.k})")


@SFT_LOSSES.add("bonbon",
                "BoNBoN, best and worst of k completions of the base; value: alpha, 0.005 (arXiv "
                "2406.00832)", knob="alpha", replies=False, into="completions",
                prepare=prepare_bonbon, check=check_bonbon)
def add_bonbon(session, visits, step, tally, alpha=0.005):
    """Add the gradient of BoNBoN's loss, a mean over posts: k completions of the base are ranked by
    the reward, best and worst trained on. Posts whose completions all earn the same have neither.
    Every member of an ensemble learns from both, by its own probability ratio."""
    args = session.args
    members = session.model.members
    pairs = best_and_worst(session, visits, step, tally)
    count, = session.ranks.sum([len(pairs)])
    with base(session.model):
        of_base = whole_logprobs(session, pairs)
    # The loss couples two completions that may lie in two micro-batches: first its gradient with
    # respect to their log-probabilities, then theirs.
    now = whole_logprobs(session, pairs).requires_grad_()
    losses = bonbon_loss(*now.unbind(1), *of_base.unbind(1), args.k, alpha)
    grad_logp, = torch.autograd.grad(losses.sum() / (max(count, 1) * members), now)
    for rows in session.micro_batches(pairs):
        logp, _ = token_logprobs(session.model, rows, args.temperature)
        (grad_logp.flatten()[rows.completion] * logp).sum().backward()
        tally.add("tokens", 3 * rows.tokens.numel())
    tally.add("loss", losses.sum().detach(), losses.numel())


def best_and_worst(session, visits, step, tally):
    """[(prompt ids, completions)] of the base: for each post that has them, M copies of the best
    completion, then M of the worst. Completion d of a prompt is scored by member d mod M."""
    args = session.args
    posts = [session.posts[visit.index] for visit in visits]
    with base(session.model):
        prompts, samples, texts = session.sample_completions(visits, step, args.k)
    tally_completions(tally, ended(samples.tokens, session.stops), texts)
    seeds = [session.seed_for("reader", step, visit) for visit in visits]
    rewards = torch.tensor(session.reward(posts, texts, seeds))
    tally.add("reward", rewards.sum(), rewards.numel())
    useful = (rewards.amax(1) > rewards.amin(1)).tolist()
    best = rewards.argmax(1).tolist()
    worst = rewards.argmin(1).tolist()
    members = session.model.members
    pairs = []
    for i, group in enumerate(samples.tokens):
        if useful[i]:
            copies = [group[best[i]]] * members + [group[worst[i]]] * members
            pairs.append((prompts[i], copies))
    return pairs


@torch.no_grad()
def whole_logprobs(session, pairs):
    """(P, 2, M): log-probabilities of the best and worst completions of best_and_worst, by each of
    the M members."""
    members = session.model.members
    total = torch.zeros(2 * members * len(pairs), device=session.ranks.device)
    for rows in session.micro_batches(pairs):
        logp, _ = token_logprobs(session.model, rows, session.args.temperature)
        total.index_add_(0, rows.completion, logp)
    return total.view(-1, 2, members)
