"""Phase two: GRPO on posts that phase one has not seen, from an SFT adapter.

    python grpo.py --start runs/poly --data grpo.jsonl --out runs/poly-grpo --diversity-weight 1
    torchrun --nproc-per-node=8 grpo.py --from runs/poly ...       # the same step, over 8 GPUs

One step: k drafts for each post, a reward for each draft, advantages within each post's group, one
clipped policy-gradient step. As in DAPO the loss is a mean over tokens, and unlike the first GRPO
beta (the KL weight) is 0 by default. The reference of the KL is a frozen copy of the adapter that
the phase starts from, not the bare base model.

Advantages are pure functions of a Group's fields: rewards (P, k), embeddings, answer classes and so
on; the table OBJECTIVES names them for --advantage; rewards stand in rewards.py. In order:
advantages, the loss, the step, the command. run_grpo -> trainer.train -> grpo_step, which calls
rollout (draw_batch -> draw, then advantages_of), then token_logprobs and policy_loss."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from adapters import Budget, adapter, add_lora, frozen_copy, load_adapter, trained
from data import InputError, command
from metrics import duplicate_rate
from model import Rows, add_mismatch, token_logprobs
from polylora import (DIVERSITIES, Gate, alike, answer_classes, check_diversity, check_start,
                      distinct_answers, draft_flags, finish_adapter, leave_one_out, listed,
                      load_embedder, log_det, measure, pair_distances, same_domain, turned)
from rewards import (REWARDS, SCHEDULES, Values, make_reward, overlong_penalty, scheduled,
                     spread_weight, voice_rows)
from trainer import (Session, Tally, Visit, announce, batch_visits, check_common, common_flags,
                     same_base, seed_of, start_folder, tally_completions, train)

# ---- Advantages. Rewards (P, k) -> advantages (P, k), each group on its own. ---------------------


def group_advantages(rewards, *, normalise=True):
    """GRPO (arXiv 2402.03300): (r - mean) / (std + 1e-4) in the group, population std;
    normalise=False is Dr. GRPO (arXiv 2503.20783), r - mean.

    A group of equal rewards has advantage exactly 0: found by max == min, since rounding in the
    mean of equal numbers divided by a tiny std would give advantages of order one."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    if normalise:
        centred = centred / (rewards.std(-1, keepdim=True, correction=0) + 1e-4)
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    return torch.where(equal, 0.0, centred)


def rloo_advantages(rewards):
    """RLOO (arXiv 2402.14740): r less the mean of the others' rewards, k/(k - 1) Dr. GRPO's."""
    k = rewards.shape[-1]
    return k / (k - 1) * group_advantages(rewards, normalise=False)


def check_size(size, drafts, lowest=1, largest=None):
    largest = drafts - 1 if largest is None else largest
    if not lowest <= size <= largest:
        raise InputError(f"the set size (--set-size) is {size}: it must be from {lowest} to "
                         f"{largest}, below the number of drafts ({drafts})")


def check_binary(rewards):
    if not bool(((rewards == 0) | (rewards == 1)).all()):
        raise InputError("this objective needs rewards of 0 or 1: use --advantage maxk or tailrl "
                         "for real-valued ones")


def passk_advantages(rewards, k):
    """Pass@k training (arXiv 2508.10751, eq. 11-15) for rewards 0 or 1 and N = rewards.shape[1]
    rollouts, N > k.

    R = 1 - C(neg,k)/C(N,k), s = sqrt(R(1-R)); right: (1-R)/s, wrong: (1 - R -
    C(neg-1,k-1)/C(N-1,k-1))/s. It is each draft's mean, over the k-subsets that hold it, of the
    standardised subset reward. Zero where s is (all or none pass)."""
    n = rewards.shape[-1]
    check_size(k, n)
    check_binary(rewards)
    out = torch.zeros_like(rewards)
    for i, row in enumerate(rewards.tolist()):
        neg = row.count(0.0)
        rate = 1 - math.comb(neg, k) / math.comb(n, k)
        if 0 < rate < 1:
            sigma = math.sqrt(rate * (1 - rate))
            beside = math.comb(neg - 1, k - 1) / math.comb(n - 1, k - 1)
            wrong = (1 - rate - beside) / sigma
            out[i] = torch.tensor([wrong if r == 0 else (1 - rate) / sigma for r in row])
    return out


def subsets(n, size):
    """All index sets of `size` out of n, (sets, size), and who is in them, (sets, n) float."""
    sets = torch.tensor(list(combinations(range(n), size)))
    return sets, torch.zeros(len(sets), n).scatter_(1, sets, 1.0)


def set_advantages(values, member):
    """The one equation of all set objectives. values (P, sets): f of every n-subset of N drafts;
    member (sets, N).

    A_i = mean of f over the subsets that hold i, minus its mean over all. Then E[sum_i A_i grad log
    pi(y_i)] = (N/n - 1) grad E[f], exactly: n = N gives no gradient. (Poly-EPO, arXiv 2604.17654,
    Prop. 3.1, in its mean form.)"""
    return values @ member / member.sum(0) - values.mean(-1, keepdim=True)


def maxk_advantages(rewards, k):
    """Max@k: f = the largest reward of the subset, for real rewards (P, N), N > k; sums to zero in
    the group. On 0/1 rewards it is passk_advantages times its sigma. (Same gradient, up to N/k - 1,
    as PKPO's leave-one-out forms, arXiv 2505.15201.)"""
    check_size(k, rewards.shape[-1])
    sets, member = subsets(rewards.shape[-1], k)
    return set_advantages(rewards[:, sets].amax(-1), member.to(rewards))


def polychromic_advantages(rewards, embeddings, n, quality=None, floor=0.0):
    """The polychromic set objective (arXiv 2509.25424 eq. 7; for language models arXiv 2604.17654):
    f = mean reward of the set times its diversity D (gated by quality (P, N) if given), over
    n-subsets of the N drafts, 2 <= n < N. rewards (P, N), embeddings (P, N, dim)."""
    total = rewards.shape[-1]
    check_size(n, total, 2)
    sets, member = subsets(total, n)
    member = member.to(rewards)
    pairs = pair_distances(embeddings, quality, floor).to(rewards)
    within = torch.einsum("si,pij,sj->ps", member, pairs, member)
    spread = within / (n * (n - 1))  # ordered pairs; the diagonal is zero
    return set_advantages(rewards[:, sets].mean(-1) * spread, member)


def coverage_advantages(right, shares, n):
    """Pass@k training with the reader averaged out: f = sum over voices of its readers' share where
    any draft of the set is right in that voice. right (P, N, V) 0 or 1, shares (P, V), 1 <= n < N.
    It asks the verifier for all voices and knows the readers' shares, where Pass@k training hears
    of one reader."""
    total = right.shape[1]
    check_size(n, total)
    sets, member = subsets(total, n)
    covered = right[:, sets].amax(2)                                           # (P, sets, V)
    return set_advantages((covered * shares[:, None]).sum(-1), member.to(right))


def passk_full_advantages(rewards, k):
    """Pass@k training by full sampling (arXiv 2508.10751, eq. 4): the drafts in floor(N/k) groups
    of k, as they come; all members of a group get its best reward's GRPO advantage among the
    groups. Drafts that are left over get 0."""
    check_size(k, rewards.shape[1], largest=rewards.shape[1] // 2)
    whole = rewards.shape[1] // k * k
    best = rewards[:, :whole].unflatten(1, (-1, k)).amax(2)                    # (P, groups)
    shared = group_advantages(best).repeat_interleave(k, 1)
    return F.pad(shared, (0, rewards.shape[1] - whole))


def random_sets(seeds, n, size):
    """n random sets of `size` of n drafts for each post, from the post's seed: (P, n, size)."""
    draws = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    return torch.stack([torch.rand(n, n, generator=d).argsort(1)[:, :size] for d in draws])


def passk_bootstrap_advantages(rewards, sets):
    """Pass@k training by bootstrap (arXiv 2508.10751, eq. 6): a draft's advantage is the sum, over
    those of the random sets (P, groups, k) that hold it, of the set's GRPO advantage."""
    best = rewards[:, None].expand(-1, sets.shape[1], -1).gather(2, sets).amax(2)
    shared = group_advantages(best)[..., None].expand(sets.shape).flatten(1)
    return torch.zeros_like(rewards).scatter_add_(1, sets.flatten(1), shared)


def passk_mixed_advantages(rewards, k):
    """s A_passk + (1 - s) A_group, s the share of right drafts (arXiv 2508.10751, eq. 18)."""
    share = rewards.mean(1, keepdim=True)
    return share * passk_advantages(rewards, k) + (1 - share) * group_advantages(rewards)


def bon_advantages(rewards, n, fail=None):
    """BoN-RLB (arXiv 2412.15287): n f^(n-1) (r - mean), the gradient of 1 - f^n, f the chance to
    fail (the group's share unless given). The paper's n f^(n-1)/(1 - f^n) for right and n f/(1 - f)
    for wrong drafts of the best-of-n policy are this, up to a baseline, for the policy's own."""
    check_binary(rewards)
    fail = 1 - rewards.mean(1, keepdim=True) if fail is None else fail
    return n * fail ** (n - 1) * group_advantages(rewards, normalise=False)


def polyepo_advantages(rewards, classes, n):
    """Poly-EPO as published (arXiv 2604.17654; N = 8, n = 4): f = mean reward of the set times its
    distinct answers over n, 0 for a set of one answer. classes (P, N): polylora.answer_classes."""
    check_size(n, rewards.shape[1], 2)
    sets, member = subsets(rewards.shape[1], n)
    share = distinct_answers(None, None, classes[:, sets]).to(rewards)         # (P, sets)
    f = rewards[:, sets].mean(-1) * share * (share > 1.5 / n)
    return set_advantages(f, member.to(rewards))


def darling_advantages(rewards, classes):
    """DARLING (arXiv 2509.02534): Dr. GRPO on r_i max(0.1, (c - f_i)/(c - 1)), f_i of the c drafts
    compared give i's answer: the right ones where rewards are 0 or 1, as in its code, else all.
    Negative rewards are first raised to zero; one draft alone is fully distinct."""
    rewards = rewards - rewards.amin(1, keepdim=True).clamp(max=0)
    real = ((rewards != 0) & (rewards != 1)).any(1, keepdim=True)
    compared = (rewards > 0) | real                                            # (P, k)
    count = compared.sum(1, keepdim=True)
    same = (alike(classes) & compared[:, None]).sum(2)
    novelty = torch.where(count > 1, (count - same) / (count - 1).clamp(min=1), 1.0)
    return group_advantages(rewards * novelty.clamp(min=0.1), normalise=False)


def dra_advantages(rewards, embeddings):
    """DRA-GRPO (arXiv 2505.09655): GRPO on r_i / (1 + sum_{j != i} s_ij), s the cosine; negative
    ones, which centred embeddings have, count as 0."""
    e = embeddings.to(rewards)
    return group_advantages(rewards / (e @ e.mT).clamp(min=0).sum(-1))  # the diagonal is the 1


def dqo_advantages(rewards, embeddings, alpha=1.0):
    """DQO (arXiv 2509.04784): the gradient of E[sum_i r_i + alpha log det(I + L)] times (k - 1)/k:
    (r_i - mean) + alpha (k - 1)/k log(det(I + L) / det(I + L without i))."""
    k, volume = rewards.shape[1], leave_one_out(log_det, embeddings)
    return group_advantages(rewards, normalise=False) + alpha * (k - 1) / k * volume.to(rewards)


def uniqueness_advantages(rewards, classes, alpha=1.0):
    """Uniqueness-aware RL (arXiv 2601.08763): A / f^alpha, f of the drafts give the answer."""
    return group_advantages(rewards) / alike(classes).sum(-1) ** alpha


def unlikeliness_advantages(rewards, logprobs, lengths):
    """Unlikeliness reward (arXiv 2506.02355): GRPO on r (1 - rank/(4k)), rank 0 the draft that is
    least likely by its mean log-probability a token."""
    rank = (logprobs / lengths).argsort(dim=1, stable=True).argsort(1)
    return group_advantages(rewards * (1 - 0.25 * rank / rewards.shape[1]))


def evol_advantages(classes, embeddings):
    """EVOL-RL (arXiv 2509.15194): GRPO on evol_rewards."""
    return group_advantages(evol_rewards(classes, embeddings))


def evol_rewards(classes, embeddings):
    """EVOL-RL's rewards (P, k), as the authors' code has them: 1/2 + u/2 for the commonest answer,
    -1 + u/2 for others, -1 for none, and -1 for all where fewer than two completions answer.

    u is minus (mean cosine to its own party + largest to any other answer), scaled to [0, 1] within
    the party: the majority, or the others. Alone in its party a completion has u = 1; where all of
    a party are equally novel, as one text is, u = 1/2. Two novelties closer than 1e-6 count as
    equal, since embeddings of one text differ by rounding. Where replies have styles the answers
    are the verifier's (answer_classes), so this objective does hear which completions are right."""
    answered, self = classes >= 0, torch.eye(classes.shape[1], dtype=torch.bool)
    most = (alike(classes).sum(-1) * answered).argmax(1, keepdim=True)
    major = answered & (classes == classes.gather(1, most))
    both = answered[:, None] & answered[..., None]                             # (P, k, k)
    party = (major[:, None] == major[..., None]) & both
    others = (party & ~self).sum(-1)                                           # (P, k)
    cosines = (embeddings.float() @ embeddings.float().mT).clamp(0, 1)
    cosines = cosines.masked_fill(self | ~both, 0)
    likeness = (cosines * party).sum(-1) / others.clamp(min=1) + cosines.amax(-1)
    each = likeness[:, None].expand_as(cosines)                                # of j, for every i
    low = each.masked_fill(~party, math.inf).amin(-1)
    high = each.masked_fill(~party, -math.inf).amax(-1)
    u = torch.where(high - low > 1e-6, (high - likeness) / (high - low), 0.5)
    u = torch.where(others == 0, 1.0, u)
    counted = answered & (answered.sum(1, keepdim=True) > 1)
    return torch.where(counted, torch.where(major, 0.5, -1.0) + u / 2, -1.0)


def maxrl_advantages(rewards):
    """MaxRL (arXiv 2602.02710): (r - mean)/mean, 0 where the mean is. For rewards of 0 or 1 the
    gradient of k sum_{j<k} Pass@j / j, the first terms of log P(right)."""
    mean = rewards.mean(1, keepdim=True)
    if bool((rewards < 0).any()):
        raise InputError("--advantage maxrl needs rewards of 0 or more: use tailrl")
    return torch.where(mean > 0, group_advantages(rewards, normalise=False) / mean, 0.0)


def tailrl_advantages(rewards):
    """TailRL (arXiv 2609.02987): rewards ascending, w_i = w_{i-1} + k (r_i - r_{i-1})/(k - i + 1),
    less the mean of w: MaxRL at every threshold of the reward, the gradient of k sum_{j<k}
    E[max of j] / j."""
    k = rewards.shape[1]
    ordered, index = rewards.sort(1)
    steps = ordered.diff(dim=1) * k / torch.arange(k - 1, 0, -1).to(rewards)
    w = F.pad(steps.cumsum(1), (1, 0))
    return torch.zeros_like(w).scatter_(1, index, w - w.mean(1, keepdim=True))


def wreinforce_advantages(rewards, positive=0.1):
    """W-REINFORCE (arXiv 2506.01347): r = 1 or -1, without a baseline; right drafts weigh 0.1."""
    check_binary(rewards)
    return (positive + 1) * rewards - 1


def focal_advantages(rewards, gamma=1.0):
    """F-GRPO (arXiv 2602.06717): GRPO's advantage times (1 - share of right drafts)^gamma."""
    check_binary(rewards)
    return group_advantages(rewards) * (1 - rewards.mean(1, keepdim=True)) ** gamma


def ucpo_advantages(rewards, logprobs, lengths, tau=0.2):
    """UCPO (arXiv 2605.00365, as its code has it): what GRPO gives to the right drafts is dealt
    anew among them, 1 - tau evenly, tau by 1/q, q proportional to exp(mean log-probability a
    token). Its sum stays; wrong drafts keep theirs."""
    check_binary(rewards)
    right = rewards == 1
    share = (-logprobs / lengths).masked_fill(~right, -math.inf).softmax(1)   # of 1/q
    dealt = 1 - tau + tau * right.sum(1, keepdim=True) * share
    return group_advantages(rewards) * torch.where(right, dealt, 1.0)


def mara_advantages(rewards, reference, beta, threshold=1.0):
    """MARA (arXiv 2510.20817, algorithm 1): with z the draft that the reference finds likeliest
    among those of reward `threshold` or more, each of these earns R(z) + beta (log ref(z) - log
    ref(y)), others their reward. Under the loss's KL of weight beta the best policy then is even
    over all good drafts. k/(k - 1) (r - mean): the KL's gradient has the weight k."""
    good = rewards >= threshold
    anchor = reference.masked_fill(~good, -math.inf).argmax(1, keepdim=True)
    lift = beta * (reference.gather(1, anchor) - reference)
    shaped = torch.where(good, rewards.gather(1, anchor) + lift.to(rewards), rewards)
    return rloo_advantages(shaped)


def soft_advantages(rewards, logprobs, reference, beta):
    """Soft Policy Optimization (arXiv 2503.05453) as we read it, on policy: the residual of r -
    beta log(pi(y) / ref(y)) = V, V the group's mean. Its gradient is that of E[r] - beta KL(pi ||
    ref) of whole drafts, so the KL of the loss is left out."""
    soft = rewards - beta * (logprobs - reference).to(rewards)
    return group_advantages(soft, normalise=False)


def stream_advantages(rewards, values):
    """Single-stream SPO (arXiv 2509.13232, eq. 7): r - v, v (P,) the post's tracked value (Values)
    from earlier steps. Without the paper's division by the batch's std, which would make a post's
    advantages hang on the posts beside it."""
    return rewards - values[:, None].to(rewards)


@dataclasses.dataclass
class Group:
    """What an objective or a diversity may look at: k drafts for each of P posts."""
    rewards: torch.Tensor                     # (P, k)
    embeddings: torch.Tensor | None = None    # (P, k, dim), unit length
    quality: torch.Tensor | None = None       # (P, k) in [0, 1], the gate's
    right: torch.Tensor | None = None         # (P, k, V): the verdicts by voice, after --flip
    valid: torch.Tensor | None = None         # (P, k): right in any voice, before --flip
    shares: torch.Tensor | None = None        # (P, V): the readers' shares of the voices
    classes: torch.Tensor | None = None       # (P, k): polylora.answer_classes
    logprobs: torch.Tensor | None = None      # (P, k): of the whole draft, as sampled
    lengths: torch.Tensor | None = None       # (P, k) in tokens, stop token included
    seeds: torch.Tensor | None = None         # (P,): of an objective's own random choices
    reference: torch.Tensor | None = None     # (P, k): log-probability by the starting adapter
    values: torch.Tensor | None = None        # (P,): single-stream SPO's, before this step
    texts: list | None = None                 # P lists of k
    set_size: int = 4
    floor: float = 0.0
    beta: float = 0.0

    k = property(lambda self: self.rewards.shape[1])
    sets = property(lambda self: random_sets(self.seeds, self.k, self.set_size))


def of_drafts(group):
    """The weight of rewards less the mean over k drafts."""
    return group.k - 1


def of_sets(group):
    """The weight of set_advantages."""
    return group.k / group.set_size - 1


def of_both(group):
    share = group.rewards.mean(1, keepdim=True)
    return share * of_sets(group) + (1 - share) * of_drafts(group)


class Objective(NamedTuple):
    """A line of OBJECTIVES. The expected policy gradient of its advantages is weight(group) times
    the gradient of what it maximises, quotients by a group's own std apart; D beside it is
    multiplied with that, so that --diversity-weight means the same for every objective and k."""
    function: Callable                        # -> advantages (P, k)
    takes: str                                # its arguments: names of a Group's fields
    about: str
    weight: Callable = of_drafts              # Group -> float, or (P, 1)

    def advantages(self, group):
        return self.function(*(getattr(group, name) for name in self.takes.split()))


OBJECTIVES = {
    "group": Objective(group_advantages, "rewards",
                       "GRPO, r less the group's mean over its std (arXiv 2402.03300)"),
    "drgrpo": Objective(partial(group_advantages, normalise=False), "rewards",
                        "Dr. GRPO, without the std (arXiv 2503.20783)"),
    "rloo": Objective(rloo_advantages, "rewards", "RLOO (arXiv 2402.14740)", lambda group: group.k),
    "passk": Objective(passk_advantages, "rewards set_size",
                       "Pass@k training, analytic (arXiv 2508.10751)", of_sets),
    "passk-full": Objective(passk_full_advantages, "rewards set_size",
                            "Pass@k training in disjoint groups (arXiv 2508.10751)",
                            lambda group: group.k // group.set_size - 1),
    "passk-bootstrap": Objective(passk_bootstrap_advantages, "rewards sets",
                                 "Pass@k training in k random groups (arXiv 2508.10751)",
                                 lambda group: (group.k - 1) * (1 - group.set_size / group.k)),
    "passk-mixed": Objective(passk_mixed_advantages, "rewards set_size",
                             "Pass@k and GRPO by share of right (arXiv 2508.10751)", of_both),
    "maxk": Objective(maxk_advantages, "rewards set_size",
                      "best of k for real rewards (PKPO, arXiv 2505.15201)", of_sets),
    "bon": Objective(bon_advantages, "rewards set_size", "BoN-RLB, best of n (arXiv 2412.15287)"),
    "polychromic": Objective(polychromic_advantages, "rewards embeddings set_size quality floor",
                             "reward times D of a set (arXiv 2509.25424, 2604.17654)", of_sets),
    "polyepo": Objective(polyepo_advantages, "rewards classes set_size",
                         "the same with distinct answers for D (arXiv 2604.17654)", of_sets),
    "coverage": Objective(coverage_advantages, "right shares set_size",
                          "readers pleased by a set, all voices asked of the verifier", of_sets),
    "darling": Objective(darling_advantages, "rewards classes",
                         "reward times distinctness (arXiv 2509.02534)"),
    "dra": Objective(dra_advantages, "rewards embeddings", "DRA-GRPO (arXiv 2505.09655)"),
    "dqo": Objective(dqo_advantages, "rewards embeddings", "DQO, with DPPs (arXiv 2509.04784)"),
    "uniqueness": Objective(uniqueness_advantages, "rewards classes",
                            "advantage over the answer's frequency (arXiv 2601.08763)"),
    "unlikeliness": Objective(unlikeliness_advantages, "rewards logprobs lengths",
                              "less for the likelier right drafts (arXiv 2506.02355)"),
    "evol": Objective(evol_advantages, "classes embeddings",
                      "EVOL-RL, majority and novelty without a verifier (arXiv 2509.15194)"),
    "maxrl": Objective(maxrl_advantages, "rewards", "MaxRL (arXiv 2602.02710)",
                       lambda group: group.k),
    "tailrl": Objective(tailrl_advantages, "rewards",
                        "MaxRL for real rewards (arXiv 2609.02987)", lambda group: group.k),
    "wreinforce": Objective(wreinforce_advantages, "rewards", "W-REINFORCE (arXiv 2506.01347)",
                            lambda group: 1.1 * group.k),
    "focal": Objective(focal_advantages, "rewards", "F-GRPO (arXiv 2602.06717)"),
    "ucpo": Objective(ucpo_advantages, "rewards logprobs lengths",
                      "more for the rarer right drafts (UCPO, arXiv 2605.00365)"),
    "mara": Objective(mara_advantages, "rewards reference beta",
                      "MARA, with --beta (arXiv 2510.20817)", lambda group: group.k),
    "soft-spo": Objective(soft_advantages, "rewards logprobs reference beta",
                          "Soft Policy Optimization as we read it, with --beta (arXiv 2503.05453)"),
    "single-stream-spo": Objective(stream_advantages, "rewards values",
                                   "SPO with a tracked value a post, --k 1 too (arXiv 2509.13232)",
                                   lambda group: group.k),
}


def needs(name):
    """The fields of a Group that an objective takes."""
    return OBJECTIVES[name].takes.split()


def advantages_of(objective, group, diversity_weight=0.0, diversity="cosine", entropy_weight=0.0):
    """The advantages (P, k) of an Objective, plus diversity_weight times the gradient of D, plus
    entropy_weight times that of the entropy of whole drafts, H = E[-log pi(y)].

    E[sum_i a_i grad log pi(y_i)] is grad E[D] for D's own a_i, (k - 1) grad H for a_i = mean of log
    pi - log pi(y_i), and `weight` times the gradient of what the objective maximises: so both are
    brought to that weight."""
    out, weight = objective.advantages(group), objective.weight(group)
    if diversity_weight:
        out = out + diversity_weight * weight * measure(diversity, group)[1]
    if entropy_weight:
        surprise = group_advantages(-group.logprobs, normalise=False)
        out = out + entropy_weight * weight * surprise / (group.k - 1)
    return out


# ---- The loss ------------------------------------------------------------------------------------

def draft_means(values, draft):
    """The mean of values (N,) over each draft's tokens, at every token (N,); draft (N,) says which
    draft a token is of."""
    size = int(draft.max()) + 1
    total = values.new_zeros(size).index_add_(0, draft, values)
    count = values.new_zeros(size).index_add_(0, draft, torch.ones_like(values))
    return (total / count.clamp(min=1))[draft]


def token_covariances(logp, advantages):
    """(A - mean A) (log pi - mean log pi) of tokens, all (N,): how much each one's update lowers
    the entropy (arXiv 2505.22617, eq. 10)."""
    return (advantages - advantages.mean()) * (logp - logp.mean())


def clip_cov(covariance, seed, share=2e-4, low=1.0, high=5.0):
    """Clip-Cov (arXiv 2505.22617): `share` of all tokens, at least one, drawn among those of a
    covariance between low and high -> bool (N,). They get no gradient."""
    wanted = max(1, int(share * len(covariance)))
    odds = torch.rand(len(covariance), generator=torch.Generator().manual_seed(seed))
    odds = odds.masked_fill((covariance <= low) | (covariance >= high), -1.0)
    best = odds.topk(min(wanted, len(odds)))
    chosen = torch.zeros(len(odds), dtype=torch.bool)
    chosen[best.indices[best.values >= 0]] = True
    return chosen


def kl_cov(covariance, seed=0, share=2e-4):
    """KL-Cov (arXiv 2505.22617): the `share` of tokens, at least one, of the largest covariance.
    Nothing is clipped, and these pay |log pi - log pi_old|: only felt from the second of --updates
    on."""
    chosen = torch.zeros(len(covariance), dtype=torch.bool)
    chosen[covariance.topk(max(1, int(share * len(covariance)))).indices] = True
    return chosen


TOKENS = {  # name -> (chooses tokens from all of a step's covariances and a seed, one line)
    "all": (None, "alike"),
    "clip-cov": (clip_cov, "no gradient for some of high covariance (arXiv 2505.22617)"),
    "kl-cov": (kl_cov, "a KL to the old policy for those of the highest, no clip (same paper)"),
}


def chosen_tokens(session, advantages, logprobs, step):
    """By --tokens, of this rank's drafts: P k lists of bool, from the whole step's tokens in the
    order of its posts; None for `all`. advantages (P, k); logprobs: P lists of k lists."""
    (choose, _), share = TOKENS[session.args.tokens], session.args.token_share
    if choose is None:
        return None
    ranks = session.ranks  # of which one has fewer posts than another after --resample
    mine = [(ranks.rank, [[(p, a) for p in draft] for draft, a in zip(*post)])
            for post in zip(logprobs, advantages.tolist())]
    every = ranks.gather(mine)
    if not every:
        return []
    logp, a = torch.tensor([t for _, post in every for draft in post for t in draft]).T
    seed = seed_of(session.args.seed, "tokens", step)
    flags = iter(choose(token_covariances(logp, a), seed, share).tolist())
    marked = [(rank, [[next(flags) for _ in draft] for draft in post]) for rank, post in every]
    return [draft for rank, post in marked if rank == ranks.rank for draft in post]


def policy_loss(logp, old_logp, advantages, *, denominator, draft=None, sequence_ratio=False,
                clip_low=0.2, clip_high=0.2, reference=None, beta=0.0, tokens="all", chosen=None):
    """Sum over tokens of -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + beta ratio k3, divided
    by `denominator`, the reply tokens of the whole step over all ranks and micro-batches. All
    (N,), fp32; gradient through `logp` alone; draft (N,): which draft each token is of.

    ratio = exp(logp - old_logp). With sequence_ratio it is that of the whole draft, the geometric
    mean over its tokens, with each token's own gradient (GSPO-token, arXiv 2507.18071, eq. 13-14);
    a draft weighs by its tokens, where GSPO weighs all alike.
    k3 = exp(ref - logp) - 1 - (ref - logp), and times the ratio its expected gradient is that of
    KL(policy || reference) on policy, which k1's (zero) and k3's own are not. tokens and chosen
    (N,): a name of TOKENS and what it chose. Returns (loss, the number of clipped tokens, the KL
    summed over tokens)."""
    gap = logp - old_logp.detach()
    ratio = gap.exp()
    kl = torch.zeros_like(logp)
    penalty = kl
    if reference is not None:
        beyond = reference.detach() - logp
        kl = beyond.exp() - 1 - beyond
        penalty = beta * ratio * kl
    if sequence_ratio:
        mean = draft_means(gap.detach(), draft)
        ratio = (mean + gap - gap.detach()).exp()
    clipped = ratio if tokens == "kl-cov" else ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if tokens == "clip-cov":
        loss = loss.masked_fill(chosen, 0.0)
    if tokens == "kl-cov":
        loss = loss + gap.abs() * chosen
    loss = loss + penalty
    outside = (clipped * advantages < ratio * advantages).float().sum()
    return loss.sum() / denominator, outside, kl.detach().sum()


# ---- The step ------------------------------------------------------------------------------------

@dataclasses.dataclass
class Rollout:
    """The drafts of a batch of posts, P of them on this rank, k each."""
    visits: list                              # P Visits
    prompts: list                             # P lists of ids
    samples: object                           # generate.Samples
    texts: list                               # P lists of k
    group: Group

    def take(self, chosen):
        """The posts at the places `chosen` alone."""
        return mapped(lambda x: x[chosen] if isinstance(x, torch.Tensor) else
                      [x[i] for i in chosen], self)


def mapped(work, *values):
    """`work` of the tensors and lists in dataclasses of one kind; all else is the first one's."""
    first = values[0]
    if dataclasses.is_dataclass(first):
        parts = zip(*(vars(v).values() for v in values))
        return type(first)(*(mapped(work, *each) for each in parts))
    return work(*values) if isinstance(first, (torch.Tensor, list)) else first


def joined(parts):
    """Several Rollouts as one."""
    return mapped(lambda *x: torch.cat(x) if isinstance(x[0], torch.Tensor) else sum(x, []), *parts)


@dataclasses.dataclass
class Batch:
    """A micro-batch of a rollout, tensors flat over its N reply tokens."""
    rows: Rows
    advantages: torch.Tensor                  # (N,), of the token's draft
    sampled: torch.Tensor                     # (N,) log-probabilities that generation had
    old: torch.Tensor | None                  # (N,) by the training path; None: on policy
    reference: torch.Tensor | None            # (N,) of the starting adapter, for the KL
    chosen: torch.Tensor | None = None        # (N,) bool, by --tokens


def draw(session, visits, step):
    """k drafts for each of these visits, judged -> Rollout."""
    args, domain = session.args, session.domain
    prompts, samples, texts = session.sample_drafts(visits, step, args.k)
    posts = [session.posts[v.index] for v in visits]
    streams = [session.stream("reader", step, v) for v in visits]
    group = Group(torch.tensor(session.reward(posts, texts, streams)), set_size=args.set_size,
                  floor=args.gate_floor, beta=args.beta)
    group.logprobs = torch.tensor([list(map(sum, drafts)) for drafts in samples.logprobs])
    group.lengths = torch.tensor([list(map(len, drafts)) for drafts in samples.tokens])
    if args.overlong:
        group.rewards += overlong_penalty(group.lengths, args.max_new_tokens, args.overlong)
    if "values" in needs(args.advantage):
        session.values = getattr(session, "values", None) or Values(session, step)
        group.values = session.values(visits, step)
        session.values.learn(visits, group.rewards, samples, step)
    group.texts, group.seeds = texts, torch.tensor(streams)
    group.classes = answer_classes(domain, posts, texts)
    group.quality = session.gate(visits, samples, texts, streams)
    if session.embedder is not None:
        group.embeddings = session.embedder(texts).cpu()
    if domain.voices:
        right = torch.tensor([voice_rows(domain, p, ts) for p, ts in zip(posts, texts)])
        group.valid, group.right = right.amax(-1), turned(right, args.flip, streams, "voices")
        group.shares = torch.tensor([[domain.popularity_of(p)[v] for v in domain.voices]
                                     for p in posts])
    return Rollout(visits, prompts, samples, texts, group)


def draw_batch(session, step, tally):
    """This rank's share of the step's posts, drafted. With --resample, posts whose rewards are
    all equal teach nothing and are replaced by further ones, drawn up to that many times
    (DAPO's dynamic sampling, arXiv 2503.14476): which posts are kept is the same for any number
    of ranks."""
    args, ranks = session.args, session.ranks
    parts, missing = [], session.args.batch
    for attempt in range(1 + args.resample):
        order_seed = args.seed if not attempt else seed_of(args.seed, "resample", attempt)
        visits = batch_visits(len(session.posts), args.batch, step // args.updates, order_seed)
        visits = [Visit(v.index, v.epoch + attempt * 10 ** 9) for v in visits]
        drawn = draw(session, session.deal(visits), step)
        rewards = drawn.group.rewards
        equal = rewards.amax(1) == rewards.amin(1)
        tally.visits = [*tally.visits, *visits]
        if args.k > 1:
            tally.add("zero_variance", equal.float().sum(), len(equal))
        if not args.resample:
            return drawn
        useful = ranks.gather((~equal).tolist())                          # in the order of visits
        taken = [i for i, good in enumerate(useful) if good][:missing]
        mine = [i // ranks.world for i in taken if i % ranks.world == ranks.rank]
        parts.append(drawn.take(mine))
        missing -= len(taken)
        if not missing:
            break
    return joined(parts)


def rollout(session, step, tally):
    """Drafts, rewards and advantages of this rank's share of a batch -> list of Batch, and the
    step's token count over all ranks."""
    args, device = session.args, session.ranks.device
    drawn = draw_batch(session, step, tally)
    group, samples = drawn.group, drawn.samples
    if not drawn.visits:  # --resample kept none of this rank's posts: others still wait for it
        list(session.micro_batches([]))
        count = session.ranks.sum([0] * 5)[0]
        chosen_tokens(session, group.rewards, [], step)
        return [], count
    if "reference" in needs(args.advantage):
        group.reference = torch.zeros(group.rewards.numel())
    logprobs, batches = [p for ps in samples.logprobs for p in ps], []
    for rows in session.micro_batches(list(zip(drawn.prompts, samples.tokens))):
        sampled = rows.by_token(logprobs)
        old = reference = None
        with torch.no_grad():
            if args.updates > 1:
                old = token_logprobs(session.model, rows, args.temperature)[0]
            if args.beta:
                with adapter(session.model, session.start):
                    reference = token_logprobs(session.model, rows, args.temperature)[0]
        if group.reference is not None:
            group.reference.index_add_(0, rows.draft.cpu(), reference.cpu())
        batches.append(Batch(rows, None, sampled, old, reference))
        if old is not None:
            add_mismatch(tally, old, sampled)
    if group.reference is not None:
        group.reference = group.reference.view_as(group.rewards)
    objective = OBJECTIVES[args.advantage]
    tally_spread(group, args, tally)
    squares = [0.0, 0.0]                     # of the objective's part and of D's, where D has one
    if args.diversity_weight or args.diversity_share:
        parts = (objective.advantages(group),
                 objective.weight(group) * measure(args.diversity, group)[1])
        squares = [float(part.double().square().sum()) for part in parts]
    count, *squares, spread, posts = session.ranks.sum(
        [sum(map(len, logprobs)), *squares, *tally.sums.get("D", (0.0, 0.0))])
    factor = scheduled(session, step, spread / max(posts, 1))
    weight = spread_weight(args, *squares, factor, tally)
    advantages = advantages_of(objective, group, weight, args.diversity, args.entropy_weight)
    flat = advantages.flatten().to(device)                                     # one a draft
    chosen = chosen_tokens(session, advantages, samples.logprobs, step)
    for batch in batches:
        batch.advantages = flat[batch.rows.draft]
        batch.chosen = None if chosen is None else batch.rows.by_token(chosen)
    tally_rollout(drawn, advantages, args, tally)
    return batches, count


def tally_spread(group, args, tally):
    """D of a rollout's drafts, whatever their quality, and gated by it; left out where drafts are
    not embedded that must be, or are alone."""
    if group.k > 1 and (group.embeddings is not None or not DIVERSITIES[args.diversity].embeds):
        posts, plain = len(group.rewards), dataclasses.replace(group, quality=None)
        tally.add("D", measure(args.diversity, plain)[0].sum(), posts)
        if group.quality is not None:
            tally.add("gated_D", measure(args.diversity, group)[0].sum(), posts)


def tally_rollout(drawn, advantages, args, tally):
    """What the log says of a rollout, beside D."""
    group, samples = drawn.group, drawn.samples
    posts, drafts = group.rewards.shape[0], group.rewards.numel()
    tally.add("reward", group.rewards.sum(), drafts)
    tally.add("reward_std", group.rewards.std(1, correction=0).sum(), posts)
    tally.add("advantage", advantages.abs().sum(), drafts)
    tally_completions(tally, samples.finished, drawn.texts)
    tally.add("length", sum(len(d) for ds in samples.tokens for d in ds), drafts)
    if group.valid is not None:
        tally.add("valid", group.valid.sum(), drafts)
    if group.quality is not None:
        tally.add("quality", group.quality.sum(), drafts)
    tally.add("different", sum(1 - duplicate_rate(t) for t in group.texts), posts * (group.k > 1))


def grpo_step(session, step):
    """One update. With --updates U, every U-th step rolls out and the next U - 1 reuse
    its drafts."""
    args, tally = session.args, Tally()
    if step % args.updates == 0:
        session.batches, session.token_count = rollout(session, step, tally)
    for batch in session.passes(session.batches):
        logp, entropy = token_logprobs(session.model, batch.rows, args.temperature)
        # One update per rollout is on policy: the ratio is 1 in value, and exp(logp -
        # logp.detach()) keeps its gradient.
        old = logp.detach() if batch.old is None else batch.old
        loss, clipped, kl = policy_loss(
            logp, old, batch.advantages, denominator=session.token_count, draft=batch.rows.draft,
            sequence_ratio=args.ratio == "sequence", clip_low=args.clip_low,
            clip_high=args.clip_high, reference=batch.reference,
            beta=0.0 if args.advantage == "soft-spo" else args.beta,
            tokens=args.tokens, chosen=batch.chosen)
        loss.backward()
        tally.add("entropy", entropy.sum(), len(logp))
        tally.add("clipped", clipped, len(logp))
        if batch.old is None:
            add_mismatch(tally, logp.detach(), batch.sampled)
        if args.beta:
            k1 = (logp - batch.reference).detach()
            for name, value in (("k1", k1.sum()), ("k2", (k1 ** 2).sum() / 2), ("kl", kl)):
                tally.add(name, value, len(logp))
        tally.add("tokens", batch.rows.tokens.numel() + len(logp))
    session.ranks.sum_gradients(session.params)
    return tally


LOGGED = ["reward", "valid", "D", "different", "entropy", "gated_D", "quality", "D_share",
          "D_weight", "reward_std", "advantage", "zero_variance", "clipped", "kl", "k1", "k2",
          "mismatch", "far_off", "length", "truncated", "empty", "identical"]


def run_grpo(args):
    """The GRPO phase: the start run's adapter, trained on; in OUT/adapter."""
    start = check_grpo(args)
    session = Session(args, "grpo")
    if not session.open_run():
        return
    session.load()
    same_domain(Path(args.start), session.domain)
    same_base(args.start, args)
    if "right" in needs(args.advantage) and not session.domain.voices:
        raise InputError(f"--advantage {args.advantage} needs a domain with a verifier of voices")
    if start is None:                        # a dry run may come before its start
        add_lora(session.model, 16, 16)
    else:
        if session.run:
            session.run.made_from("start")
        load_adapter(session.model, start, dropout=0.0)  # dropout would make ratios differ from 1
    session.start = frozen_copy(session.model)
    session.shard_model()
    session.start = {n: t.to(session.ranks.device) for n, t in session.start.items()}
    embeds = (args.diversity_weight or args.diversity_share) and DIVERSITIES[args.diversity].embeds
    if embeds or "embeddings" in needs(args.advantage):
        load_embedder(session)
    session.reward = make_reward(args.reward, session)
    session.gate = Gate(session, args.gate)
    posts_steps = math.ceil(len(session.posts) * args.epochs / args.batch) * args.updates
    args.steps = args.steps or posts_steps
    args.save_every = math.ceil(args.save_every / args.updates) * args.updates  # between rollouts
    session.params = trained(session.model)
    step_fn = lambda step: grpo_step(session, step)
    announce(session, step_fn)
    summary = train(session, session.params, step_fn, LOGGED, Budget(session.model))
    finish_adapter(session, summary)


def check_grpo(args):
    """Fill in the model from the start run; returns the start adapter's folder. Finds wrong flags
    before anything is loaded."""
    check_common(args)
    known = (start_folder(args.start) / "adapter_config.json").exists()
    start = None if args.dry_run and args.model and not known else check_start(args)
    alone = args.advantage == "single-stream-spo" and not (
        args.diversity_weight or args.diversity_share)
    if args.k < 2 - alone or (args.entropy_weight or args.resample) and args.k < 2:
        raise InputError(f"--k {args.k}: a group needs at least 2 drafts")
    if args.diversity_weight and args.diversity_share:
        raise InputError("--diversity-weight and --diversity-share both weigh D: give one of them")
    if args.diversity_schedule != "constant" and not args.diversity_weight + args.diversity_share:
        raise InputError(f"--diversity-schedule {args.diversity_schedule} times no weight: give "
                         "--diversity-weight or --diversity-share")
    if "beta" in needs(args.advantage) and not args.beta:
        raise InputError(f"--advantage {args.advantage} weighs the likelihood under the starting "
                         "adapter by --beta: give one above 0")
    if args.shard and "values" in needs(args.advantage):
        raise InputError(f"--advantage {args.advantage} does not run with --shard")
    check_diversity(args)
    if " set" in OBJECTIVES[args.advantage].takes:
        check_size(args.set_size, args.k, 1 + args.advantage.startswith("poly"),
                   args.k // 2 if args.advantage == "passk-full" else None)
    if args.temperature <= 0:
        raise InputError("--temperature must be above 0: GRPO needs drafts that are sampled")
    return start


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--start", "--from", required=True,
        help="finished SFT run, or an adapter folder in PEFT's layout, to start from (after "
             "torchrun write --from: it takes --start for an option of its own)")
    add("--model", default=None,
        help="Qwen3 checkpoint under the adapter; default: the one its config names")
    common_flags(p, lr=1e-5, steps=0, batch=16, schedule="constant")
    draft_flags(p, 8)
    add("--advantage", default="group", choices=list(OBJECTIVES),
        help=f"what a step maximises. {listed(OBJECTIVES)}")
    add("--set-size", type=int, default=4,
        help="drafts in a set, for objectives of sets: below --k")
    add("--diversity-weight", type=float, default=0.0,
        help="weight of D beside what --advantage maximises: in standard deviations of reward "
             "where that divides by them, else in units of reward")
    add("--diversity-share", type=float, default=0.0,
        help="instead of --diversity-weight: how large D's part of each step's advantages is "
             "beside the objective's, as a share of its norm")
    add("--diversity-schedule", default="constant", choices=list(SCHEDULES),
        help=f"times which D is so weighed. {listed(SCHEDULES)}")
    add("--entropy-weight", type=float, default=0.0,
        help="weight of the entropy of whole drafts, in nats, beside the reward")
    add("--reward", default="auto", choices=("auto", *REWARDS),
        help=f"what a draft earns. auto: reader where replies have voices, agreement where posts "
             f"have several replies, else relevance; {listed(REWARDS)}")
    add("--reward-model", default=None,
        help="for --reward model a folder of rewards.py train, or a Qwen3 with a scalar head; for "
             "judge a chat model")
    add("--spread-penalty", type=float, default=1.0,
        help="how many times their spread is taken off the mean of several reward models")
    add("--overlong", type=int, default=0,
        help="tokens before --max-new-tokens over which a draft loses up to 1 of its reward, "
             "DAPO's soft overlong punishment (arXiv 2503.14476)")
    add("--valid-weight", type=float, default=0.0,
        help="added to --reward reader for a draft that is right in any voice")
    add("--beta", type=float, default=0.0,
        help="weight of the KL to the starting adapter, per token; 0 skips that pass")
    add("--clip-low", type=float, default=0.2,
        help="lower clip: of drafts worse than their group, ratios below 1 - this get no gradient")
    add("--clip-high", type=float, default=0.2,
        help="upper clip: of better drafts, ratios above 1 + this get no gradient (DAPO: 0.28)")
    add("--ratio", default="token", choices=("token", "sequence"),
        help="what is clipped: each token's ratio, or the whole draft's (GSPO)")
    add("--tokens", default="all", choices=list(TOKENS),
        help=f"how a step's tokens are treated. {listed(TOKENS)}")
    add("--token-share", type=float, default=2e-4,
        help="share of a step's tokens that --tokens chooses, at least one")
    add("--resample", type=int, default=0,
        help="times that posts with equal rewards are replaced by others (DAPO's dynamic sampling)")
    add("--updates", type=int, default=1, help="optimizer steps on each batch of drafts")
    p.set_defaults(run=run_grpo)
    return p


def main(argv=None):
    return command(parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
