"""OrderGrad: any L-statistic of a set's rewards as one objective (arXiv 2606.06096).

A set of n completions is worth a weighted sum of its rewards in order. All weight on the first is
max@k, and Pass@k for rewards of 0 and 1."""

import torch

from grpo import set_advantages, subsets
from support.checks import check_size
from support.registry import OBJECTIVES, set_scale


def order_advantages(rewards, weights):
    """set_advantages of f = sum_j weights[j] times the j-th largest reward of the set, for rewards
    (P, N) and sets of n = len(weights) < N. Its expected gradient is (N/n - 1) grad E[f]."""
    weights = torch.as_tensor(weights, dtype=rewards.dtype)
    check_size(len(weights), rewards.shape[1])
    sets, member = subsets(rewards.shape[1], len(weights))
    ordered = rewards[:, sets].sort(-1, descending=True).values                # (P, sets, n)
    return set_advantages(ordered @ weights, member.to(rewards))


@OBJECTIVES.add("top2", "the mean of a set's two best, OrderGrad (arXiv 2606.06096)",
                needs=("rewards", "set_size"), gradient_scale=set_scale, least=2)
def top2_advantages(rewards, n):
    """OrderGrad's Top2@n (arXiv 2606.06096): f = the mean of the two largest rewards of a set."""
    return order_advantages(rewards, [0.5, 0.5] + [0.0] * (n - 2))


@OBJECTIVES.add("second-best", "a set's second best: two good ones, OrderGrad (arXiv 2606.06096)",
                needs=("rewards", "set_size"), gradient_scale=set_scale, least=2)
def second_best_advantages(rewards, n):
    """OrderGrad with all weight on the second largest reward: for rewards of 0 and 1 the chance
    that at least two of n are right, so that a user has a choice."""
    return order_advantages(rewards, [0.0, 1.0] + [0.0] * (n - 2))
