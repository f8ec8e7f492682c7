"""Phase one: LoRA fine-tuning with a diversity term, L = L_quality - lambda * D(completions).

    python polylora.py sft --model Qwen/Qwen3-8B --data sft.jsonl --out runs/poly --lambda 0.3
    torchrun --nproc-per-node=8 polylora.py sft ...              # the same step on 8 GPUs

L_quality is the mean cross-entropy over reply tokens. D is the diversity of k completions sampled
from the model being trained: the mean pairwise cosine distance of their embeddings, or DPP.
Sampling has no derivative, so D's gradient is the score function's: each completion's
log-probability is pushed by how much the completion adds to D (`pair_advantages`).

Reading order: D and its advantages, the gate, the step (`sft_step`), the command. Other losses,
diversities and adapters are in methods/, LoRA itself in lora.py."""

import argparse
import math
import random
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from lora import add_adapter, base, load_adapter, trained
from model import token_logprobs
from support import registry
from support.checks import check_loaded_start, check_replies, check_sft, check_targets
from support.draws import with_label_noise
from support.files import InputError, command, seed_of, short
from support.flags import (adapter_flags, common_flags, diversity_flags, flag_groups, lambda_flags,
                           name_flag, rival_sft_flags, sft_start_flags)
from support.plan import announce
from support.ranks import set_gradient
from support.registry import (D_GRADIENTS, DIVERSITIES, SFT_LOSSES, add_commands,
                              add_features)
from support.shaping import shaping_of
from support.steplog import SFT_LOGGED, Tally, tally_completions
from trainer import (Session, add_cross_entropy, batch_visits, finish_adapter, load_embedder,
                     train)


# ---- Diversity -----------------------------------------------------------------------------------

def gated(delta, quality, floor):
    """Distances delta (P, k, k) without their diagonal; with quality (floor + delta_ij) q_i q_j."""
    if quality is not None:
        q = quality.float()
        delta = (floor + delta) * q[..., None] * q[..., None, :]
    return delta - torch.diag_embed(delta.diagonal(dim1=-2, dim2=-1))


def pair_distances(embeddings, quality=None, floor=0.0):
    """delta_ij = 1 - e_i . e_j, when gated (floor + delta_ij) q_i q_j; zero on the diagonal.
    (P, k, dim) -> (P, k, k) in fp32."""
    e = embeddings.float()
    return gated(1 - e @ e.transpose(-1, -2), quality, floor)


def pair_mean(pairs):
    """D (P,) of distances (P, k, k): their mean, 2/(k(k-1)) sum_{i<j} delta_ij."""
    k = pairs.shape[-1]
    if k < 2:
        raise InputError("diversity needs at least two completions (k >= 2)")
    return pairs.sum((-1, -2)) / (k * (k - 1))


def diversity(embeddings, quality=None, floor=0.0):
    """D (P,) of unit embeddings (P, k, dim): the mean pairwise cosine distance.

    With quality (P, k) in [0, 1] each pair counts (floor + delta_ij) q_i q_j: wrong completions
    earn nothing by being different, and with a floor two right ones earn something even when they
    are equal."""
    return pair_mean(pair_distances(embeddings, quality, floor))


def pair_advantages(pairs):
    """a_i = D - D_without_i (P, k): what completion i adds to D. With it,
    E[sum_i a_i grad log pi(y_i)] = grad E[D].

    D_without_i does not depend on y_i, so subtracting it leaves the score-function gradient
    unbiased. With k = 2 there is no D without i; the baseline is then 0: unbiased too, but
    noisier."""
    k = pairs.shape[-1]
    total = pair_mean(pairs)
    if k == 2:
        return total[:, None].expand(-1, 2)
    others = pairs.sum((-1, -2))[:, None] - 2 * pairs.sum(-1)                  # (P, k)
    return total[:, None] - others / ((k - 1) * (k - 2))


def leave_one_out(score, *parts):
    """score(*parts) (P,), and its advantages a_i = D - D_without_i (P, k): pair_advantages for any
    D, with the baseline 0 for k = 2 too. Each part is (P, k, ..) or None."""
    k = [part for part in parts if part is not None][0].shape[1]
    total = score(*parts)
    if k == 2:
        return total, total[:, None].expand(-1, 2)
    without = []
    for i in range(k):
        others = [j for j in range(k) if j != i]
        rest = [None if part is None else part[:, others] for part in parts]
        without.append(score(*rest))
    return total, total[:, None] - torch.stack(without, 1)


@DIVERSITIES.add("cosine", "mean pairwise cosine distance of embeddings", into="pairs")
def cosine_distances(features):
    return pair_distances(features.embeddings)


@DIVERSITIES.add("dpp", "log-determinant of the embeddings' kernel (arXiv 2509.04784)", into="of")
def log_det(embeddings, quality=None, classes=None):
    """log det(I + L) (P,), L_ij = q_i q_j e_i . e_j: how much the completions span (DQO, arXiv
    2509.04784, with the I that keeps it finite). m equal completions of quality 1 have log(1 + m),
    so that it pays for quality, too."""
    e = embeddings.float()
    if quality is not None:
        e = e * quality.float()[..., None]
    return torch.logdet(e @ e.mT + torch.eye(e.shape[1], device=e.device))


class Measured(NamedTuple):
    """D of k completions for each of P prompts."""
    value: torch.Tensor                       # (P,) gated, where there is a gate: what is trained
    advantages: torch.Tensor                  # (P, k) of `value`
    plain: torch.Tensor                       # (P,) without the gate: what the log calls D


def measure_diversity(name, features):
    """Measured, by a name in DIVERSITIES. features: a Features."""
    row, quality = DIVERSITIES[name], features.quality
    if row.pairs is not None:
        distances = row.pairs(features)
        pairs = gated(distances, quality, features.floor)
        value, advantages = pair_mean(pairs), pair_advantages(pairs)
        plain = value if quality is None else pair_mean(gated(distances, None, 0.0))
        return Measured(value, advantages, plain)
    value, advantages = leave_one_out(row.of, features.embeddings, quality, features.classes)
    plain = value
    if quality is not None:
        plain = row.of(features.embeddings, None, features.classes)
    return Measured(value, advantages, plain)


@dataclass
class Features:
    """What objectives and diversities may look at: k completions for each of P prompts. A step
    computes the fields of FEATURES that its objective and its diversity need; the others of these
    stay None."""
    rewards: torch.Tensor | None = None       # (P, k)
    embeddings: torch.Tensor | None = None    # (P, k, dim), unit length
    quality: torch.Tensor | None = None       # (P, k) in [0, 1], of the gate
    right: torch.Tensor | None = None         # (P, k, S) in 0, 1: verdicts by style, noise included
    valid: torch.Tensor | None = None         # (P, k) in 0, 1: right in any style
    shares: torch.Tensor | None = None        # (P, S): the popularity of the styles
    classes: torch.Tensor | None = None       # (P, k): see answer_classes
    logprobs: torch.Tensor | None = None      # (P, k) of whole completions, as sampled
    lengths: torch.Tensor | None = None       # (P, k) in tokens, stop token included
    seeds: torch.Tensor | None = None         # (P,): for an objective's own random choices
    reference: torch.Tensor | None = None     # (P, k): log-probability by the starting adapter
    values: torch.Tensor | None = None        # (P,): values of prompts (methods/spo.py)
    texts: list | None = None                 # P lists of k
    set_size: int = 4
    floor: float = 0.0                        # --gate-floor
    beta: float = 0.0


# ---- Quality, which gates D ----------------------------------------------------------------------

def held_out(post):
    """(the post without its first reply, that reply): how people's own replies are scored by what
    compares a completion with them. A post with one reply keeps it."""
    if not post.replies:
        raise InputError(f"the post {short(post.id)} has no reply to set a scale by: use a "
                         "gate that needs none (--gate none)")
    rest = replace(post, replies=post.replies[1:] or post.replies, styles=())
    return rest, post.replies[0]


class Gate:
    """The quality q in [0, 1] of completions that D is multiplied with, on a scale set by people: 0
    is what a reply to another post scores, 1 what people's own replies score, measured on the run's
    posts. Distances are multiplied with q_i q_j, embeddings of DPP with q_i.

    verifier    1 where the domain finds the completion right, which is on that scale already
    likelihood  mean log-probability per token under the frozen base
    reward      the run's reward (phase two); a verifier's is divided by its largest
    auto        verifier where replies have styles, else reward, or likelihood in phase one
    """

    def __init__(self, session, name, sample=256):
        if name == "auto":
            scored = "likelihood" if session.stage == "sft" else "reward"
            name = "verifier" if session.domain.styles else scored
        self.session = session
        self.name = name
        best = getattr(session.reward, "best", None) if name == "reward" else None
        self.low = 0.0
        self.high = best or 1.0
        if name == "verifier" and not session.domain.styles:
            raise InputError("--gate verifier needs a domain with a verifier: use --gate "
                             "likelihood for real posts")
        if name == "likelihood" or name == "reward" and not best:
            self.measure(session.posts[:sample])

    def measure(self, posts):
        """Set the scale: `low` by replies to other posts, `high` by the posts' own."""
        if len(posts) < 2:
            raise InputError(f"--gate {self.name} needs two posts or more to set its scale")
        asked = []
        own = []
        for post in posts:
            rest, reply = held_out(post)
            asked.append(rest)
            own.append([reply])
        half = len(posts) // 2
        others = own[half:] + own[:half]
        self.high = float(self.score(asked, own).mean())
        self.low = float(self.score(asked, others).mean())
        if not self.low < self.high:
            raise InputError(f"--gate {self.name} cannot tell people's replies to a post "
                             f"({self.high:.3g} on average) from replies to another "
                             f"({self.low:.3g}): use another gate")
        self.session.say(f"gate by {self.name}: 0 at {self.low:.3g} (replies to another post), 1 "
                         f"at {self.high:.3g} (people's own), over {len(posts)} posts")

    def score(self, posts, replies):
        """The raw score (P, k) of people's replies, P lists of k."""
        session = self.session
        if self.name == "reward":
            return torch.tensor(session.reward(posts, replies, range(len(posts))))
        ids = [[session.encode_reply(text) for text in group] for group in replies]
        return mean_logprobs(session, posts, ids)

    def __call__(self, features, posts, samples):
        """q (P, k) on the CPU, of the completions whose Features (valid, or rewards) these are."""
        if self.name == "verifier":
            rate = getattr(self.session.args, "flip", 0.0)
            return with_label_noise(features.valid, rate, features.seeds.tolist(), "gate")
        score = features.rewards
        if self.name == "likelihood":
            score = mean_logprobs(self.session, posts, samples.tokens)
        return ((score - self.low) / (self.high - self.low)).clamp(0, 1)


def make_gate(session, name):
    """The Gate that --gate names; None for "none"."""
    return None if name == "none" else Gate(session, name)


@torch.no_grad()
def mean_logprobs(session, posts, completions):
    """Mean log-probability per token (P, k) under the base; completions: P lists of k lists of
    ids."""
    pairs = [(session.prompt_of(post), group) for post, group in zip(posts, completions)]
    count = sum(map(len, completions))
    total = torch.zeros(count)
    tokens = torch.zeros(count)
    with base(session.model):
        for rows in session.micro_batches(pairs):
            logp, _ = token_logprobs(session.model, rows, session.args.temperature)
            total.index_add_(0, rows.completion.cpu(), logp.cpu())
            tokens.index_add_(0, rows.completion.cpu(), torch.ones(len(logp)))
    return (total / tokens).view(len(posts), -1)


# ---- The step ------------------------------------------------------------------------------------

def sft_step(session, step):
    """One step of L = L_quality - lambda * D, lambda in nats per token for one unit of D. The two
    gradients are kept apart, so that the ratio of their norms can be logged, or held
    (--lambda-share)."""
    args = session.args
    tally = Tally()
    visits = session.visits = batch_visits(len(session.posts), args.batch, step, args.seed)
    loss = SFT_LOSSES[args.loss]
    session.model.train()
    if loss.replies:
        replies = [draw_reply(session, step, visit) for visit in visits]
        add_cross_entropy(session, visits, replies, tally, loss.losses)
    session.model.eval()  # completions are sampled and scored without dropout
    if loss.completions:
        options = {} if args.loss_value is None else {loss.knob: args.loss_value}
        loss.completions(session, session.ranks.share(visits), step, tally, **options)
    if not (args.lam or args.lambda_share) or step % args.draft_every:
        session.ranks.sum_gradients(session.params)
        return tally
    of_losses = session.ranks.take_gradient(session.params)
    add_diversity(session, visits[:args.draft_posts], step, tally)
    of_minus_D = session.ranks.take_gradient(session.params)
    # Only every draft_every-th step has D's gradient: times draft_every, its average weight is
    # lambda.
    weight = args.lam * args.draft_every
    ratio = float(of_minus_D.norm()) / max(float(of_losses.norm()), 1e-30)
    if args.lambda_share and ratio:
        weight = args.lambda_share / ratio
    set_gradient(session.params, of_losses + weight * of_minus_D)
    if session.ranks.main:  # equal on all ranks: logged by one
        tally.add("D_share", weight * ratio)
        tally.add("lambda", weight)
    return tally


def draw_reply(session, step, visit):
    """The reply that is learnt from in this step, of an author drawn by the domain."""
    post = session.posts[visit.index]
    rng = random.Random(session.seed_for("reply", step, visit))
    return session.domain.reply(post, session.domain.author(post, rng), rng)


def add_diversity(session, visits, step, tally):
    """Add the gradient of -D, D the mean over these visits of k fresh completions' diversity."""
    args = session.args
    mine = visits[session.ranks.rank::session.ranks.world]
    if not mine:
        return
    prompts, samples, texts = session.sample_completions(mine, step, args.k)
    posts = [session.posts[visit.index] for visit in mine]
    seeds = [session.seed_for("gate", step, visit) for visit in mine]
    features = Features(texts=texts, seeds=torch.tensor(seeds), floor=args.gate_floor)
    add_features(features, DIVERSITIES[args.diversity].needs, session, posts, samples, seeds)
    measured = measure_diversity(args.diversity, features)
    pairs = list(zip(prompts, samples.tokens))
    other_gradient = D_GRADIENTS[args.d_gradient].function
    if other_gradient is not None:
        seeds = [session.seed_for("gumbel", step, visit) for visit in mine]
        other_gradient(session, seeds, features, pairs, len(visits))
    else:
        advantages = measured.advantages.flatten().to(session.ranks.device)    # one a completion
        for rows in session.micro_batches(pairs):
            logp, _ = token_logprobs(session.model, rows, args.temperature)
            diversity_loss(logp, rows.completion, advantages, len(visits)).backward()
            tally.add("tokens", rows.tokens.numel() + len(logp))
    tally.add("D", measured.plain.sum(), len(mine))
    if features.quality is not None:
        tally.add("gated_D", measured.value.sum(), len(mine))
        tally.add("quality", features.quality.sum(), features.quality.numel())
    tally_completions(tally, samples.finished, texts)


def diversity_loss(logp, completion, advantages, posts):
    """The diversity term without its lambda: -(1 / posts) sum over completions of a_i log pi(y_i),
    log pi summed over the completion's tokens, stop token included. logp (N,); completion (N,):
    the one that each token belongs to; advantages: flat, one a completion."""
    return -(advantages.detach()[completion] * logp).sum() / posts


# ---- The command ---------------------------------------------------------------------------------

def run_sft(args):
    """The SFT phase: a LoRA adapter, new or that of --start trained further, in OUT/adapter."""
    start = check_sft(args)
    session = Session(args, "sft")
    if not session.open_run():
        return
    session.load()
    check_replies(session.posts)
    if SFT_LOSSES[args.loss].prepare is not None:
        SFT_LOSSES[args.loss].prepare(session)
    if start:
        check_loaded_start(session)
        load_adapter(session.model, start, dropout=args.dropout)
    else:
        check_targets(session)
        add_adapter(session.model, args.adapter, args.rank, args.alpha, dropout=args.dropout,
                    targets=args.targets.split(","), seed=seed_of(args.seed, "lora"),
                    members=args.members)
    session.shard_model()
    if args.lam or args.lambda_share:
        prepare_diversity(session)
    args.steps = args.steps or math.ceil(len(session.posts) * args.epochs / args.batch)
    session.params = trained(session.model)

    def step_fn(step):
        return sft_step(session, step)
    announce(session, step_fn)
    shaping = shaping_of(session.model, None if start else args.steps)
    finish_adapter(session, train(session, session.params, step_fn, SFT_LOGGED, shaping))


def prepare_diversity(session):
    args, world = session.args, session.ranks.world
    if args.shard and min(args.draft_posts, args.batch) < world:
        raise InputError(f"--shard needs a post to sample for on each of the {world} ranks: raise "
                         "--draft-posts and --batch")
    if "embeddings" in DIVERSITIES[args.diversity].needs:
        load_embedder(session)
    session.gate = make_gate(session, args.gate)


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sub = p.add_subparsers(dest="command", required=True)
    f = sub.add_parser("sft", help="phase one: LoRA fine-tuning, with --lambda > 0 for diversity")
    groups = flag_groups(f)
    sft_start_flags(groups)
    adapter_flags(groups)
    name_flag(groups.method, "--loss", SFT_LOSSES, "ce", "of the reply's tokens")
    lambda_flags(groups)
    rival_sft_flags(groups)
    diversity_flags(groups, 4)
    common_flags(groups, lr=2e-4, steps=0, batch=16)
    f.set_defaults(run=run_sft)
    add_commands("polylora", sub)
    return p


def main(argv=None):
    registry.load()
    return command(parser(), argv)


D_GRADIENTS.add("score", "the score function's, unbiased")(None)
SFT_LOSSES.add("ce", "cross-entropy")(None)


if __name__ == "__main__":
    # Files in methods/ import this one by its name: run that copy, not a second one.
    from polylora import main
    sys.exit(main())
