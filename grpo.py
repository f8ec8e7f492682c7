"""Phase two: GRPO with group advantages and a diversity term, from an SFT adapter.

    python grpo.py --start runs/poly --data grpo.jsonl --out runs/poly-grpo --diversity-weight 1
    torchrun --nproc-per-node=8 grpo.py --start runs/poly ...      # the same step on 8 GPUs

One step samples k completions for each prompt, scores them with a reward, turns rewards into
advantages inside each prompt's group, adds D's own advantages, and takes one clipped
policy-gradient step.

It departs from the first GRPO (arXiv 2402.03300): the loss is one mean over all tokens of the step,
as in DAPO; beta, the weight of the KL, is 0 by default, and its reference is the adapter that the
phase starts from; the KL is estimated by ratio * k3, whose gradient is the KL's on policy.

Reading order: advantages, the loss, the step (`grpo_step` first), the command.
Other objectives (Dr. GRPO, RLOO, Poly-EPO, DARLING, ...) are in methods/objectives.py."""

import argparse
import math
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from generate import Samples
from lora import adapter, add_lora, frozen_copy, load_adapter, trained
from model import Rows, token_logprobs
from polylora import Features, make_gate, measure_diversity
from rewards import diversity_weight, make_reward, overlong_penalty
from support import registry
from support.checkpoint import same_base
from support.checks import check_binary, check_grpo, check_size, same_domain
from support.files import command
from support.flags import (common_flags, diversity_flags, flag_groups, name_flag, policy_flags,
                           reward_flags, start_flags)
from support.plan import announce
from support.registry import (DIVERSITIES, OBJECTIVES, ROLLOUTS, SCHEDULES, TOKENS, add_features,
                              add_flags, has_features, prepare_features, set_scale)
from support.shaping import shaping_of
from support.steplog import GRPO_LOGGED, Tally, add_mismatch, log_rollout, log_update
from trainer import Session, batch_visits, finish_adapter, load_embedder, train


# ---- Advantages. Rewards (P, N) -> advantages (P, N), each prompt's group on its own. ------------
# N is the size of a group (--k), k that of a set drawn from it (--set-size).


@OBJECTIVES.add("group", "GRPO: (r - mean) / std of the group (arXiv 2402.03300)")
def group_advantages(rewards, *, normalise=True):
    """GRPO (arXiv 2402.03300): A_i = (r_i - mean) / (std + 1e-4), population std.

    normalise=False is Dr. GRPO (arXiv 2503.20783): r_i - mean. A group of equal rewards gets
    exactly 0. It is recognised by max == min: rounding in the mean of equal numbers, divided by a
    tiny std, would give advantages of order one."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    if normalise:
        centred = centred / (rewards.std(-1, keepdim=True, correction=0) + 1e-4)
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    return torch.where(equal, 0.0, centred)


@OBJECTIVES.add("passk", "Pass@k training, analytic form (arXiv 2508.10751)",
                needs=("rewards", "set_size"), gradient_scale=set_scale)
def passk_advantages(rewards, k):
    """Pass@k training (arXiv 2508.10751, eq. 11-15): rewards 0 or 1, N = rewards.shape[1] > k.

    With `wrong` wrong completions among N: R = 1 - C(wrong, k) / C(N, k), s = sqrt(R (1 - R)),
    A_right = (1 - R) / s, A_wrong = (1 - R - C(wrong - 1, k - 1) / C(N - 1, k - 1)) / s.
    This is each completion's mean, over the k-subsets that contain it, of the standardised reward
    of the subset. Zero where s is zero (all pass or none)."""
    n = rewards.shape[-1]
    check_size(k, n)
    check_binary(rewards)
    advantages = torch.zeros_like(rewards)
    for i, row in enumerate(rewards.tolist()):
        wrong = row.count(0.0)
        rate = 1 - math.comb(wrong, k) / math.comb(n, k)
        if not 0 < rate < 1:
            continue
        sigma = math.sqrt(rate * (1 - rate))
        all_others_wrong = math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1)
        of_right = (1 - rate) / sigma
        of_wrong = (1 - rate - all_others_wrong) / sigma
        advantages[i] = torch.where(rewards[i] == 0, of_wrong, of_right)
    return advantages


def subsets(n, size):
    """All sets of `size` out of n indices: (sets, size), and their membership (sets, n) in 0, 1."""
    sets = torch.tensor(list(combinations(range(n), size)))
    member = torch.zeros(len(sets), n).scatter_(1, sets, 1.0)
    return sets, member


def set_advantages(values, member):
    """The one equation of every set objective. values (P, sets): a score f of each k-subset of N
    completions; member (sets, N).

    A_i = mean of f over the subsets that contain i, minus its mean over all subsets. Then
    E[sum_i A_i grad log pi(y_i)] = (N/k - 1) grad E[f], exactly; k = N gives no gradient
    (Poly-EPO, arXiv 2604.17654, Prop. 3.1, in its mean form)."""
    return values @ member / member.sum(0) - values.mean(-1, keepdim=True)


@OBJECTIVES.add("maxk", "best of k for real rewards (PKPO, arXiv 2505.15201)",
                needs=("rewards", "set_size"), gradient_scale=set_scale)
def maxk_advantages(rewards, k):
    """Max@k: f = the largest reward of the subset, for real rewards (P, N), N > k.

    On rewards of 0 and 1 it is passk_advantages times its sigma. Up to N/k - 1 it has the gradient
    of PKPO's leave-one-out estimators (arXiv 2505.15201)."""
    n = rewards.shape[-1]
    check_size(k, n)
    sets, member = subsets(n, k)
    return set_advantages(rewards[:, sets].amax(-1), member.to(rewards))


@OBJECTIVES.add("coverage", "users pleased by a set of completions",
                needs=("right", "shares", "set_size"), gradient_scale=set_scale)
def coverage_advantages(right, shares, k):
    """Max@k averaged over users: f = the popularity of the styles in which some
    completion of the set is right. right (P, N, S) in 0, 1; shares (P, S); 1 <= k < N. It is
    E_w[max w . r] of VPO (arXiv 2605.22817) for users w who like one style each.

    It knows every style's verdict and popularity, Pass@k training one user's verdict. Without
    styles it covers people's replies (methods/people.py)."""
    n = right.shape[1]
    check_size(k, n)
    sets, member = subsets(n, k)
    covered = right[:, sets].amax(2)                                   # (P, sets, S)
    pleased = (covered * shares[:, None]).sum(-1)                  # (P, sets)
    return set_advantages(pleased, member.to(right))


# ---- The loss ------------------------------------------------------------------------------------

def completion_means(values, completion):
    """The mean of values (N,) over the tokens of each completion, at every token: (N,)."""
    size = int(completion.max()) + 1
    total = values.new_zeros(size).index_add_(0, completion, values)
    count = values.new_zeros(size).index_add_(0, completion, torch.ones_like(values))
    return (total / count.clamp(min=1))[completion]


def policy_loss(logp, old_logp, advantages, *, denominator, completion=None, sequence_ratio=False,
                clip_low=0.2, clip_high=0.2, reference=None, beta=0.0, tokens="all", chosen=None):
    """GRPO's clipped loss: (loss, number of clipped tokens, KL summed over tokens).

    loss = sum over tokens of -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + beta ratio k3, over
    `denominator`: the completion tokens of the whole step, all ranks and micro-batches.
    All tensors (N,) fp32, one entry a token; only `logp` has a gradient. completion (N,): which
    completion the token belongs to.

    ratio = exp(logp - old_logp). With sequence_ratio it is the completion's geometric mean with
    each token's own gradient (GSPO-token, arXiv 2507.18071, eq. 13-14).
    k3 = exp(ref - logp) - 1 - (ref - logp). Times the ratio, its expected gradient on policy is
    that of each token's KL(policy || reference) given the tokens before it; k1's is zero and plain
    k3's is another.
    tokens, chosen: a name in TOKENS and the tokens (N,) that it chose."""
    gap = logp - old_logp.detach()
    ratio = gap.exp()
    kl = torch.zeros_like(logp)
    penalty = torch.zeros_like(logp)
    if reference is not None:
        to_reference = reference.detach() - logp
        kl = to_reference.exp() - 1 - to_reference
        penalty = beta * ratio * kl
    if sequence_ratio:
        mean = completion_means(gap.detach(), completion)
        ratio = (mean + gap - gap.detach()).exp()
    rule = TOKENS[tokens]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) if rule.clips else ratio
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if rule.change is not None:
        loss = rule.change(loss, gap, chosen)
    loss = loss + penalty
    outside = (clipped * advantages < ratio * advantages).float().sum()
    return loss.sum() / denominator, outside, kl.detach().sum()


def truncated_weights(old, sampled, cap, tally):
    """min(exp(old - sampled), cap) (N,), logged: what was drawn by sampling's probabilities then
    counts as drawn by training's, `old`, of the same weights (truncated importance sampling: Yao et
    al. 2025, On the Rollout-Training Mismatch in Modern RL Systems)."""
    ratio = (old.detach() - sampled).exp()
    weight = ratio.clamp(max=cap)
    tally.add("tis", weight.sum(), len(weight))
    tally.add("tis_capped", (ratio > cap).sum(), len(weight))
    return weight


# ---- The step ------------------------------------------------------------------------------------

@dataclass
class Rollout:
    """Completions of P prompts on this rank, k each, with what was found out about them."""
    visits: list                              # P Visits
    prompts: list                             # P lists of ids
    samples: Samples
    features: Features


@dataclass
class Batch:
    """A micro-batch of a rollout; tensors flat over its N completion tokens."""
    rows: Rows
    sampled: torch.Tensor                     # (N,) log-probabilities at sampling
    old: torch.Tensor | None = None           # (N,) by the training path; None: on policy
    reference: torch.Tensor | None = None     # (N,) by the starting adapter, for the KL
    advantages: torch.Tensor | None = None    # (N,) of the token's completion
    chosen: torch.Tensor | None = None        # (N,) bool, by --tokens


def grpo_step(session, step):
    """One update. With --updates U, every U-th step samples and the next U - 1 reuse its
    completions."""
    args = session.args
    tally = Tally()
    if step % args.updates == 0:
        session.batches, session.token_count = rollout(session, step, tally)
    objective = OBJECTIVES[args.advantage]
    for batch in session.passes(session.batches):
        logp, entropy = token_logprobs(session.model, batch.rows, args.temperature)
        # One update a rollout is on policy: the ratio is 1 in value, and exp(logp - logp.detach())
        # keeps its gradient.
        old = logp.detach() if batch.old is None else batch.old
        advantages = batch.advantages
        if args.tis:
            advantages = advantages * truncated_weights(old, batch.sampled, args.tis, tally)
        loss, clipped, kl = policy_loss(
            logp, old, advantages, denominator=session.token_count,
            completion=batch.rows.completion, sequence_ratio=args.ratio == "sequence",
            clip_low=args.clip_low, clip_high=args.clip_high, reference=batch.reference,
            beta=0.0 if objective.own_kl else args.beta, tokens=args.tokens, chosen=batch.chosen)
        loss.backward()
        log_update(tally, batch, logp.detach(), entropy, clipped, kl)
    session.ranks.sum_gradients(session.params)
    return tally


def rollout(session, step, tally):
    """Sample, score and weigh completions of this rank's prompts: a list of Batch, and the step's
    token count over all ranks."""
    args = session.args
    resampling = [row.function for row in ROLLOUTS.values() if row.wanted(args)]
    if resampling:
        drawn = resampling[0](session, step, tally)
    else:
        number = step // args.updates
        session.visits = batch_visits(len(session.posts), args.batch, number, args.seed)
        drawn = collect(session, session.ranks.share(session.visits), step)
    features = drawn.features
    sampled = [logprobs for group in drawn.samples.logprobs for logprobs in group]
    count, = session.ranks.sum([sum(map(len, sampled))])

    batches = []
    for rows in session.micro_batches(list(zip(drawn.prompts, drawn.samples.tokens))):
        batches.append(Batch(rows, rows.by_token(sampled)))
        if args.updates > 1 or args.beta:
            add_older_logprobs(session, batches[-1], tally)
    if "reference" in OBJECTIVES[args.advantage].needs:
        features.reference = reference_sums(batches, features)

    advantages = weigh(session, features, step, tally)
    flat = advantages.flatten().to(session.ranks.device)         # (P k,), as rows.completion counts
    choose = TOKENS[args.tokens].chosen
    chosen = choose(session, advantages, drawn.samples.logprobs, step) if choose else None
    for batch in batches:
        batch.advantages = flat[batch.rows.completion]
        batch.chosen = batch.rows.by_token(chosen) if choose else None
    if drawn.visits:  # --resample may have kept none of this rank's prompts
        log_rollout(tally, features, drawn.samples, advantages)
    return batches, count


def collect(session, visits, step):
    """Sample k completions for each of these visits: a Rollout with the Features that the step
    needs, each computed once."""
    args = session.args
    prompts, samples, texts = session.sample_completions(visits, step, args.k)
    posts = [session.posts[visit.index] for visit in visits]
    seeds = [session.seed_for("reader", step, visit) for visit in visits]
    objective = OBJECTIVES[args.advantage]
    features = Features(texts=texts, seeds=torch.tensor(seeds), set_size=args.set_size,
                        floor=args.gate_floor, beta=args.beta)
    features.rewards = torch.tensor(session.reward(posts, texts, seeds), dtype=torch.float32)
    features.logprobs = torch.tensor([[sum(p) for p in group] for group in samples.logprobs])
    features.lengths = torch.tensor([[len(ids) for ids in group] for group in samples.tokens])
    needs = (*objective.needs, *DIVERSITIES[args.diversity].needs)
    add_features(features, needs, session, posts, samples, seeds)
    if args.overlong:
        features.rewards += overlong_penalty(features.lengths, args.max_new_tokens, args.overlong)
    if objective.observe is not None:
        objective.observe(session, visits, features, samples, step)
    return Rollout(visits, prompts, samples, features)


@torch.no_grad()
def add_older_logprobs(session, batch, tally):
    """Set what the loss compares a batch's log-probabilities with, where it does: `old`, by the
    policy that sampled, and `reference`, by the starting adapter."""
    args = session.args
    if args.updates > 1:
        batch.old, _ = token_logprobs(session.model, batch.rows, args.temperature)
        add_mismatch(tally, batch.old, batch.sampled)
    if args.beta:
        with adapter(session.model, session.start):
            batch.reference, _ = token_logprobs(session.model, batch.rows, args.temperature)


def reference_sums(batches, features):
    """(P, k): log-probabilities of whole completions by the starting adapter."""
    total = torch.zeros(features.rewards.numel())
    for batch in batches:
        total.index_add_(0, batch.rows.completion.cpu(), batch.reference.cpu())
    return total.view_as(features.rewards)


def weigh(session, features, step, tally):
    """Advantages (P, k) of the step:
    objective + diversity weight * D's + entropy weight * the entropy's."""
    args = session.args
    own = features.rewards
    of_D = torch.zeros_like(own)
    scale = 1.0
    if len(features.rewards):  # a rank without prompts still takes part in the sums over ranks
        objective = OBJECTIVES[args.advantage]
        own = objective.advantages(features)
        scale = objective.gradient_scale(features)
        if args.k > 1 and has_features(features, DIVERSITIES[args.diversity].needs):
            of_D = diversity_advantages(args.diversity, features, tally)
    weight = 0.0
    if args.diversity_weight or args.diversity_share:
        squares = [float(part.double().square().sum()) for part in (own, scale * of_D)]
        sums = [*squares, *tally.sums.get("D", (0.0, 0.0))]
        own_square, D_square, total_D, prompts = session.ranks.sum(sums)
        schedule = SCHEDULES[args.diversity_schedule].function
        factor = schedule(session, step, total_D / max(prompts, 1)) if schedule else 1.0
        weight = diversity_weight(args, own_square, D_square, factor, tally)
    if not weight and not args.entropy_weight:
        return own
    return combine(own, scale, features, weight, of_D, args.entropy_weight)


def diversity_advantages(name, features, tally):
    """The advantages (P, k) of D, by a name in DIVERSITIES; D is logged."""
    measured = measure_diversity(name, features)
    tally.add("D", measured.plain.sum(), len(features.rewards))
    if features.quality is not None:
        tally.add("gated_D", measured.value.sum(), len(features.rewards))
    return measured.advantages


def combine(own, scale, features, weight=0.0, of_D=None, entropy_weight=0.0):
    """own + weight * the gradient of D + entropy_weight * that of the entropy of whole completions,
    H = E[-log pi(y)]: advantages (P, k).

    E[sum_i a_i grad log pi(y_i)] is a known multiple of a gradient:
    - D's a_i: 1 times grad E[D];
    - a_i = mean of log pi - log pi(y_i): k - 1 times grad H;
    - the objective's: `scale` times that of what it maximises (divided by a group's std, nearly).
    D's and the entropy's are brought to `scale`, so that a weight means the same under every
    objective."""
    advantages = own
    if weight:
        advantages = advantages + weight * scale * of_D
    if entropy_weight:
        surprise = group_advantages(-features.logprobs, normalise=False)
        advantages = advantages + entropy_weight * scale * surprise / (own.shape[1] - 1)
    return advantages


# ---- The command ---------------------------------------------------------------------------------

def run_grpo(args):
    """The GRPO phase: the start run's adapter, trained on; in OUT/adapter."""
    start = check_grpo(args)
    session = Session(args, "grpo")
    if not session.open_run():
        return
    session.load()
    same_domain(Path(args.start), session.domain)
    same_base(args.start, args)
    objective = OBJECTIVES[args.advantage]
    if start is None:                        # a dry run may come before its start
        add_lora(session.model, 16, 16)
    else:
        if session.run:
            session.run.made_from("start")
        load_adapter(session.model, start, dropout=0.0)  # dropout would make ratios differ from 1
    session.start = frozen_copy(session.model)
    session.shard_model()
    session.start = {n: t.to(session.ranks.device) for n, t in session.start.items()}
    weighs_D = args.diversity_weight or args.diversity_share
    D_needs = DIVERSITIES[args.diversity].needs if weighs_D else ()
    if "embeddings" in (*D_needs, *objective.needs):
        load_embedder(session)
    prepare_features(session, (*objective.needs, *D_needs))
    session.reward = make_reward(args.reward, session)
    session.gate = make_gate(session, args.gate)
    rollouts = math.ceil(len(session.posts) * args.epochs / args.batch)
    args.steps = args.steps or rollouts * args.updates
    args.save_every = math.ceil(args.save_every / args.updates) * args.updates  # between rollouts
    session.params = trained(session.model)

    def step_fn(number):
        return grpo_step(session, number)
    announce(session, step_fn)
    summary = train(session, session.params, step_fn, GRPO_LOGGED, shaping_of(session.model))
    finish_adapter(session, summary)


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    groups = flag_groups(p)
    start_flags(groups)
    name_flag(groups.method, "--advantage", OBJECTIVES, "group", "what a step maximises")
    policy_flags(groups)
    diversity_flags(groups, 8)
    reward_flags(groups)
    name_flag(groups.rivals, "--diversity-schedule", SCHEDULES, "constant",
              "factor of D's weight over the steps")
    name_flag(groups.rivals, "--tokens", TOKENS, "all", "how a step's tokens are treated")
    add_flags(TOKENS, groups.rivals)
    add_flags(ROLLOUTS, groups.rivals)
    common_flags(groups, lr=1e-5, steps=0, batch=16, schedule="constant")
    p.set_defaults(run=run_grpo)
    return p


def main(argv=None):
    registry.load()
    return command(parser(), argv)


SCHEDULES.add("constant", "1")(None)
TOKENS.add("all", "all alike")(None)


if __name__ == "__main__":
    # Files in methods/ import this one by its name: run that copy, not a second one.
    from grpo import main
    sys.exit(main())
