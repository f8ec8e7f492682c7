"""Further objectives of phase two: each turns rewards (P, k), and what else it needs of the P
prompts' k completions (polylora.Features), into advantages (P, k).

In order: baselines without sets; sets of completions; diversity within the group; transforms of the
reward; objectives that know the policy's and the reference's log-probabilities."""

import math

import torch
import torch.nn.functional as F

from grpo import group_advantages, passk_advantages, set_advantages, subsets
from methods.diversities import alike, distinct_answers
from polylora import leave_one_out, log_det, pair_distances
from support.checks import check_binary, check_size
from support.files import InputError
from support.registry import OBJECTIVES, group_scale, set_scale


# ---- The scale of each objective's gradient, see registry.Objective ------------------------------

def sample_scale(features):
    """The gradient_scale of objectives whose baseline leaves the completion itself out: k."""
    return features.rewards.shape[1]


def full_scale(features):
    """The gradient_scale of passk-full, which has floor(k / n) groups."""
    return features.rewards.shape[1] // features.set_size - 1


def bootstrap_scale(features):
    """The gradient_scale of passk-bootstrap."""
    return (features.rewards.shape[1] - 1) * (1 - features.set_size / features.rewards.shape[1])


def wreinforce_scale(features):
    """The gradient_scale of W-REINFORCE: right completions weigh 0.1, wrong ones 1."""
    return 1.1 * features.rewards.shape[1]


def mixed_scale(features):
    """The gradient_scale of passk-mixed, (P, 1)."""
    right = features.rewards.mean(1, keepdim=True)
    return right * set_scale(features) + (1 - right) * group_scale(features)


def half_of_group(k):
    """The largest --set-size of passk-full, which needs two groups."""
    return k // 2


# ---- Baselines without sets ----------------------------------------------------------------------

@OBJECTIVES.add("drgrpo", "Dr. GRPO, without the std (arXiv 2503.20783)")
def drgrpo_advantages(rewards):
    """Dr. GRPO (arXiv 2503.20783): A_i = r_i - mean."""
    return group_advantages(rewards, normalise=False)


@OBJECTIVES.add("rloo", "RLOO (arXiv 2402.14740)", gradient_scale=sample_scale)
def rloo_advantages(rewards):
    """RLOO (arXiv 2402.14740): A_i = r_i - mean of the others' rewards = k/(k - 1) (r_i - mean)."""
    k = rewards.shape[-1]
    return k / (k - 1) * group_advantages(rewards, normalise=False)


# ---- Sets of completions -------------------------------------------------------------------------

@OBJECTIVES.add("polychromic", "reward times D of a set (arXiv 2509.25424, 2604.17654)",
                needs=("rewards", "embeddings", "set_size", "quality", "floor"),
                gradient_scale=set_scale, least=2)
def polychromic_advantages(rewards, embeddings, n, quality=None, floor=0.0):
    """The polychromic set objective (arXiv 2509.25424, eq. 7; for language models arXiv
    2604.17654): set_advantages of f = mean reward of the set * its D (gated by quality, if given).

    rewards (P, N); embeddings (P, N, dim); quality (P, N) or None; 2 <= n < N."""
    total = rewards.shape[-1]
    check_size(n, total, 2)
    sets, member = subsets(total, n)                                           # member (sets, N)
    member = member.to(rewards)
    pairs = pair_distances(embeddings, quality, floor).to(rewards)             # (P, N, N)
    within = torch.einsum("si,pij,sj->ps", member, pairs, member)
    diversity = within / (n * (n - 1))  # the mean over ordered pairs; the diagonal is zero
    return set_advantages(rewards[:, sets].mean(-1) * diversity, member)


@OBJECTIVES.add("polyepo", "the same with distinct answers for D (arXiv 2604.17654)",
                needs=("rewards", "classes", "set_size"), gradient_scale=set_scale, least=2)
def polyepo_advantages(rewards, classes, n):
    """Poly-EPO as published (arXiv 2604.17654; N = 8, n = 4): set_advantages of f = mean reward of
    the set * its number of distinct answers / n, and 0 for a set of one answer.

    classes (P, N): see features.answer_classes."""
    total = rewards.shape[1]
    check_size(n, total, 2)
    sets, member = subsets(total, n)
    distinct = distinct_answers(None, None, classes[:, sets]).to(rewards)      # (P, sets), over n
    several = distinct > 1.5 / n
    values = rewards[:, sets].mean(-1) * distinct * several
    return set_advantages(values, member.to(rewards))


@OBJECTIVES.add("passk-full", "Pass@k training in disjoint groups (arXiv 2508.10751)",
                needs=("rewards", "set_size"),
                gradient_scale=full_scale, largest=half_of_group)
def passk_full_advantages(rewards, k):
    """Pass@k training by full sampling (arXiv 2508.10751, eq. 4): the N completions are cut into
    floor(N/k) groups of k in order; each member gets the GRPO advantage of its group's best reward
    among the groups' best. The completions that are left over get 0."""
    total = rewards.shape[1]
    check_size(k, total, largest=total // 2)
    whole = total // k * k
    best = rewards[:, :whole].unflatten(1, (-1, k)).amax(2)                    # (P, groups)
    shared = group_advantages(best).repeat_interleave(k, 1)
    return F.pad(shared, (0, total - whole))


def random_sets(seeds, n, size):
    """n random sets of `size` of the n completions of each prompt, by the prompt's seed:
    (P, n, size)."""
    sets = []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        sets.append(torch.rand(n, n, generator=generator).argsort(1)[:, :size])
    return torch.stack(sets)


def passk_bootstrap_advantages(rewards, sets):
    """Pass@k training by bootstrap (arXiv 2508.10751, eq. 6): A_i = sum, over the random sets (P,
    groups, k) that contain i, of the GRPO advantage of the set's best reward."""
    best = rewards[:, None].expand(-1, sets.shape[1], -1).gather(2, sets).amax(2)
    shared = group_advantages(best)[..., None].expand(sets.shape).flatten(1)
    return torch.zeros_like(rewards).scatter_add_(1, sets.flatten(1), shared)


@OBJECTIVES.add("passk-bootstrap", "Pass@k training in k random groups (arXiv 2508.10751)",
                needs=("rewards", "seeds", "set_size"),
                gradient_scale=bootstrap_scale)
def bootstrap_of_group(rewards, seeds, size):
    """passk_bootstrap_advantages with k random sets, as many as there are completions."""
    k = rewards.shape[1]
    return passk_bootstrap_advantages(rewards, random_sets(seeds, k, size))


@OBJECTIVES.add("passk-mixed", "Pass@k and GRPO by share of right (arXiv 2508.10751)",
                needs=("rewards", "set_size"), gradient_scale=mixed_scale)
def passk_mixed_advantages(rewards, k):
    """s A_passk + (1 - s) A_group, s the fraction of right completions (arXiv 2508.10751, eq. 18).
    """
    right = rewards.mean(1, keepdim=True)
    return right * passk_advantages(rewards, k) + (1 - right) * group_advantages(rewards)


@OBJECTIVES.add("bon", "BoN-RLB, best of n (arXiv 2412.15287)", needs=("rewards", "set_size"))
def bon_advantages(rewards, n, fail=None):
    """BoN-RLB (arXiv 2412.15287): A = n f^(n-1) (r - mean), the gradient of 1 - f^n, where f is the
    probability of failing: the group's fraction of wrong completions unless given.

    The paper weighs right completions of the best-of-n policy by n f^(n-1)/(1 - f^n) and wrong ones
    by n f/(1 - f). For completions of the policy itself that is this, up to a baseline."""
    check_binary(rewards)
    if fail is None:
        fail = 1 - rewards.mean(1, keepdim=True)
    return n * fail ** (n - 1) * group_advantages(rewards, normalise=False)


# ---- Diversity within the group ------------------------------------------------------------------

@OBJECTIVES.add("darling", "reward times distinctness (arXiv 2509.02534)",
                needs=("rewards", "classes"))
def darling_advantages(rewards, classes):
    """DARLING (arXiv 2509.02534): Dr. GRPO on r_i max(0.1, (c - f_i)/(c - 1)), where f_i of the c
    compared completions give the answer of i.

    Compared are the right completions where rewards are 0 or 1, as in its code, else all. Negative
    rewards are first raised to zero; a single compared completion is fully distinct."""
    lowest = rewards.amin(1, keepdim=True)
    rewards = rewards - lowest.clamp(max=0)
    real_valued = ((rewards != 0) & (rewards != 1)).any(1, keepdim=True)
    compared = (rewards > 0) | real_valued                                     # (P, k)
    count = compared.sum(1, keepdim=True)
    same = (alike(classes) & compared[:, None]).sum(2)
    distinctness = (count - same) / (count - 1).clamp(min=1)
    distinctness = torch.where(count > 1, distinctness, 1.0)
    return group_advantages(rewards * distinctness.clamp(min=0.1), normalise=False)


@OBJECTIVES.add("dra", "DRA-GRPO (arXiv 2505.09655)", needs=("rewards", "embeddings"))
def dra_advantages(rewards, embeddings):
    """DRA-GRPO (arXiv 2505.09655): GRPO on r_i / (1 + sum_{j != i} s_ij), s the cosine. Negative
    cosines, which centred embeddings have, count as 0."""
    e = embeddings.to(rewards)
    similarity = (e @ e.mT).clamp(min=0).sum(-1)  # with the diagonal, which is the 1
    return group_advantages(rewards / similarity)


@OBJECTIVES.add("dqo", "DQO, with DPPs (arXiv 2509.04784)", needs=("rewards", "embeddings"))
def dqo_advantages(rewards, embeddings, alpha=1.0):
    """DQO (arXiv 2509.04784), the gradient of E[sum_i r_i + alpha log det(I + L)] times (k - 1)/k:
    A_i = (r_i - mean) + alpha (k - 1)/k log(det(I + L) / det(I + L without i))."""
    k = rewards.shape[1]
    _, volume = leave_one_out(log_det, embeddings)
    return group_advantages(rewards, normalise=False) + alpha * (k - 1) / k * volume.to(rewards)


@OBJECTIVES.add("uniqueness", "advantage over the answer's frequency (arXiv 2601.08763)",
                needs=("rewards", "classes"))
def uniqueness_advantages(rewards, classes, alpha=1.0):
    """Uniqueness-aware RL (arXiv 2601.08763): GRPO's A_i / f_i^alpha, f_i the number of completions
    that give the answer of i."""
    return group_advantages(rewards) / alike(classes).sum(-1) ** alpha


@OBJECTIVES.add("unlikeliness", "less for the likelier right completions (arXiv 2506.02355)",
                needs=("rewards", "logprobs", "lengths"))
def unlikeliness_advantages(rewards, logprobs, lengths):
    """Unlikeliness reward (arXiv 2506.02355): GRPO on r_i (1 - rank_i/(4k)), rank 0 for the
    completion with the lowest mean log-probability per token."""
    mean_logprob = logprobs / lengths
    rank = mean_logprob.argsort(dim=1, stable=True).argsort(1)
    return group_advantages(rewards * (1 - 0.25 * rank / rewards.shape[1]))


@OBJECTIVES.add("evol", "EVOL-RL, majority and novelty without a verifier (arXiv 2509.15194)",
                needs=("classes", "embeddings"))
def evol_advantages(classes, embeddings):
    """EVOL-RL (arXiv 2509.15194): GRPO on evol_rewards."""
    return group_advantages(evol_rewards(classes, embeddings))


def evol_rewards(classes, embeddings):
    """EVOL-RL's rewards (P, k), as the authors' code has them: 1/2 + u/2 for the most frequent
    answer, -1 + u/2 for others, -1 for no answer, and -1 for all if fewer than two completions
    answer. u in [0, 1] is the completion's novelty, see `novelty_in_party`.

    Where replies have styles, an answer is what the verifier finds right (answer_classes), so this
    objective does learn which completions are right."""
    answered = classes >= 0                                                    # (P, k)
    most_frequent = (alike(classes).sum(-1) * answered).argmax(1, keepdim=True)
    majority = answered & (classes == classes.gather(1, most_frequent))
    both = answered[:, None] & answered[..., None]                             # (P, k, k)
    party = (majority[:, None] == majority[..., None]) & both
    u = novelty_in_party(embeddings, party, both)
    counted = answered & (answered.sum(1, keepdim=True) > 1)
    return torch.where(counted, torch.where(majority, 0.5, -1.0) + u / 2, -1.0)


def novelty_in_party(embeddings, party, both):
    """EVOL-RL's u (P, k): minus (mean cosine to its own party + largest cosine to any answer),
    scaled to [0, 1] within the party. party (P, k, k): whether two completions both give the
    majority's answer, or both another; both (P, k, k): whether both answer.

    A completion alone in its party has u = 1. If a party's completions are all equally novel, u =
    1/2. Novelties closer than 1e-6 count as equal: embeddings of one text differ by rounding."""
    self = torch.eye(party.shape[1], dtype=torch.bool)
    others = (party & ~self).sum(-1)                                           # (P, k)
    e = embeddings.float()
    cosines = (e @ e.mT).clamp(0, 1).masked_fill(self | ~both, 0)
    likeness = (cosines * party).sum(-1) / others.clamp(min=1) + cosines.amax(-1)
    each = likeness[:, None].expand_as(cosines)                                # of j, for every i
    low = each.masked_fill(~party, math.inf).amin(-1)
    high = each.masked_fill(~party, -math.inf).amax(-1)
    u = torch.where(high - low > 1e-6, (high - likeness) / (high - low), 0.5)
    return torch.where(others == 0, 1.0, u)


# ---- Transforms of the reward --------------------------------------------------------------------

@OBJECTIVES.add("maxrl", "MaxRL (arXiv 2602.02710)", gradient_scale=sample_scale)
def maxrl_advantages(rewards):
    """MaxRL (arXiv 2602.02710): A_i = (r_i - mean)/mean, 0 where the mean is 0. For rewards of 0 or
    1 it is the gradient of k sum_{j<k} Pass@j / j, the first terms of log P(right)."""
    if bool((rewards < 0).any()):
        raise InputError("--advantage maxrl needs rewards of 0 or more: use tailrl")
    mean = rewards.mean(1, keepdim=True)
    return torch.where(mean > 0, group_advantages(rewards, normalise=False) / mean, 0.0)


@OBJECTIVES.add("tailrl", "MaxRL for real rewards (arXiv 2609.02987)",
                gradient_scale=sample_scale)
def tailrl_advantages(rewards):
    """TailRL (arXiv 2609.02987): with rewards in ascending order, w_i = w_{i-1} + k (r_i - r_{i-1})
    / (k - i + 1); A_i = w_i - mean of w. That is MaxRL at every threshold of the reward, the
    gradient of k sum_{j<k} E[max of j] / j."""
    k = rewards.shape[1]
    ascending, index = rewards.sort(1)
    steps = ascending.diff(dim=1) * k / torch.arange(k - 1, 0, -1).to(rewards)
    w = F.pad(steps.cumsum(1), (1, 0))
    return torch.zeros_like(w).scatter_(1, index, w - w.mean(1, keepdim=True))


@OBJECTIVES.add("wreinforce", "W-REINFORCE (arXiv 2506.01347)",
                gradient_scale=wreinforce_scale)
def wreinforce_advantages(rewards, positive=0.1):
    """W-REINFORCE (arXiv 2506.01347): A = `positive` for right completions and -1 for wrong ones,
    without a baseline."""
    check_binary(rewards)
    return (positive + 1) * rewards - 1


@OBJECTIVES.add("focal", "F-GRPO (arXiv 2602.06717)")
def focal_advantages(rewards, gamma=1.0):
    """F-GRPO (arXiv 2602.06717): GRPO's advantage * (1 - fraction of right completions)^gamma."""
    check_binary(rewards)
    return group_advantages(rewards) * (1 - rewards.mean(1, keepdim=True)) ** gamma


# ---- Log-probabilities of the policy and the reference -------------------------------------------

@OBJECTIVES.add("ucpo", "more for the rarer right completions (UCPO, arXiv 2605.00365)",
                needs=("rewards", "logprobs", "lengths"))
def ucpo_advantages(rewards, logprobs, lengths, tau=0.2):
    """UCPO (arXiv 2605.00365, as its code has it): redistributes GRPO's advantage among the right
    completions: 1 - tau evenly, tau in proportion to 1/q, q = exp(mean log-probability per token).
    Its sum stays; wrong completions keep theirs."""
    check_binary(rewards)
    right = rewards == 1
    rareness = (-logprobs / lengths).masked_fill(~right, -math.inf).softmax(1)  # 1/q over its sum
    factor = 1 - tau + tau * right.sum(1, keepdim=True) * rareness
    return group_advantages(rewards) * torch.where(right, factor, 1.0)


@OBJECTIVES.add("mara", "MARA, with --beta (arXiv 2510.20817)",
                needs=("rewards", "reference", "beta"), gradient_scale=sample_scale)
def mara_advantages(rewards, reference, beta, threshold=1.0):
    """MARA (arXiv 2510.20817, algorithm 1): RLOO on shaped rewards. Among completions y of reward
    `threshold` or more, z is the likeliest under the reference; each y earns r(z) + beta (log
    ref(z) - log ref(y)). Other completions earn their reward.

    Under the loss's KL of weight beta the best policy is then uniform over all good completions.
    RLOO's k/(k - 1) fits, because the KL's gradient has the weight k."""
    good = rewards >= threshold
    anchor = reference.masked_fill(~good, -math.inf).argmax(1, keepdim=True)
    lift = beta * (reference.gather(1, anchor) - reference)
    shaped = torch.where(good, rewards.gather(1, anchor) + lift.to(rewards), rewards)
    return rloo_advantages(shaped)


@OBJECTIVES.add("soft-spo",
                "Soft Policy Optimization as we read it, with --beta (arXiv 2503.05453)",
                needs=("rewards", "logprobs", "reference", "beta"), own_kl=True)
def soft_advantages(rewards, logprobs, reference, beta):
    """Soft Policy Optimization (arXiv 2503.05453) as we read it, on policy: Dr. GRPO on
    r - beta log(pi(y) / ref(y)). Its gradient is that of E[r] - beta KL(pi || ref) of whole
    completions, so the loss has no KL of its own."""
    soft = rewards - beta * (logprobs - reference).to(rewards)
    return group_advantages(soft, normalise=False)
