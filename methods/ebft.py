"""EBFT, energy-based fine-tuning (arXiv 2603.12248): feature matching to a person's reply in SFT.

    python polylora.py sft --loss ebft --k 4 ...

It maximises quality + lambda D in phase one, with embeddings and a policy gradient:
the nearest relative of `--lambda`. What differs: its baseline trains its diversity at (n - 2)/(n -
1) of the stated weight for n completions, zero at n = 2 (see feature_advantages), where
polylora.pair_advantages trains D at exactly its weight; it has no gate and no second phase."""

from model import token_logprobs
from polylora import draw_reply
from support.files import InputError
from support.registry import SFT_LOSSES
from support.steplog import tally_completions
from trainer import load_embedder


def feature_rewards(embeddings, reply, diversity=1.0):
    """EBFT's rewards (P, n): r_j = 2 phi_j . phi(y) - diversity 2/(n-1) sum_{i != j} phi_j . phi_i.
    embeddings (P, n, dim) of n completions, reply (P, dim) of a person's reply y, unit length."""
    e = embeddings.float()
    n = e.shape[1]
    agreement = (e @ reply.float()[..., None]).squeeze(-1)                     # (P, n)
    cosines = e @ e.mT
    others = cosines.sum(-1) - cosines.diagonal(dim1=-2, dim2=-1)
    return 2 * agreement - diversity * 2 / (n - 1) * others


def feature_advantages(embeddings, reply, diversity=1.0):
    """EBFT's advantages (P, n): r_j minus the mean of the other completions' rewards (RLOO).

    E[mean_j A_j grad log pi(y_j)] = grad E[2 phi . phi(y)] - diversity (n-2)/(n-1) grad E[phi_1 .
    phi_2]: the others' rewards contain their cosines to y_j, so the baseline depends on y_j and
    takes 1/(n-1) of the diversity's gradient away."""
    return rloo(feature_rewards(embeddings, reply, diversity))


def rloo(rewards):
    """Each of the rewards (P, n) minus the mean of the others."""
    n = rewards.shape[1]
    return n / (n - 1) * (rewards - rewards.mean(1, keepdim=True))


def check_ebft(args):
    """Raise InputError for fewer than three completions, whose diversity has no gradient."""
    if args.k < 3:
        raise InputError(f"--loss ebft trains the diversity of k completions at (k - 2)/(k - 1) of "
                         f"its weight, none at k = 2: give --k 3 or more (k is {args.k})")


def prepare_ebft(session):
    if session.embedder is None:
        load_embedder(session)


@SFT_LOSSES.add("ebft", "CE, likeness to the reply and D; value: D's weight, 1 (arXiv 2603.12248)",
                knob="diversity", into="completions", prepare=prepare_ebft, check=check_ebft)
def add_ebft(session, visits, step, tally, diversity=1.0):
    """Add the gradient of EBFT's policy term to the cross-entropy's: minus the mean over posts and
    their k completions of A_j log pi(y_j), log pi summed over tokens, so that its weights are in
    the units of --lambda: nats per token for one unit. As D's, at every --draft-every-th step and
    times that number."""
    args = session.args
    if step % args.draft_every:
        return
    prompts, samples, texts = session.sample_completions(visits, step, args.k)
    ended = [[ids[-1] in session.stops for ids in group] for group in samples.tokens]
    tally_completions(tally, ended, texts)
    replies = [[draw_reply(session, step, visit)] for visit in visits]   # as the cross-entropy
    people = session.embedder(replies)[:, 0]
    vectors = session.embedder(texts)
    rewards = feature_rewards(vectors, people, diversity)
    flat = args.draft_every * rloo(rewards).flatten().to(session.ranks.device)
    posts, = session.ranks.sum([len(visits)])
    for rows in session.micro_batches(list(zip(prompts, samples.tokens))):
        logp, _ = token_logprobs(session.model, rows, args.temperature)
        (-(flat[rows.completion] * logp).sum() / (posts * args.k)).backward()
        tally.add("tokens", rows.tokens.numel() + len(logp))
    tally.add("reward", rewards.sum(), rewards.numel())
