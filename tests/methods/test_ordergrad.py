"""Tests of methods/ordergrad.py."""

import itertools
import math

import pytest
import torch

from grpo import maxk_advantages, passk_advantages
from helpers import (REWARDS, all_tuples, exact_gradient, expected_estimate, gap, in_double,
                     policy)
from methods.ordergrad import order_advantages, second_best_advantages, top2_advantages
from support.files import InputError


def of_best(n):
    return [1.0] + [0.0] * (n - 1)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_all_weight_on_the_largest_is_max_at_k_and_pass_at_k(n):
    """Pass@k training's closed form is it over sigma."""
    rewards = torch.rand(3, 5, generator=torch.Generator().manual_seed(n))
    assert gap(order_advantages(rewards, of_best(n)), maxk_advantages(rewards, n)) < 1e-6
    for wrong in range(1, 5):
        binary = torch.tensor([[0.0] * wrong + [1.0] * (5 - wrong)])
        rate = 1 - math.comb(wrong, n) / math.comb(5, n)
        if 0 < rate < 1:
            got = order_advantages(binary, of_best(n))
            assert gap(got, passk_advantages(binary, n) * math.sqrt(rate * (1 - rate))) < 1e-6


@pytest.mark.parametrize("name, weights", [
    ("best", [1.0, 0.0, 0.0]), ("two best", [0.5, 0.5, 0.0]), ("second", [0.0, 1.0, 0.0]),
    ("median and worst", [0.0, 0.7, 0.3]), ("mean", [1 / 3] * 3)])
def test_the_expected_gradient_of_an_l_statistic(monkeypatch, name, weights):
    """E[sum_i A_i grad log pi(y_i)] = (N/n - 1) grad E[f], by enumeration, N = 5, n = 3."""
    in_double(monkeypatch)
    theta, drawn = policy(4, seed=3), all_tuples(4, 5)
    sets = all_tuples(4, 3)
    ordered = REWARDS[sets].sort(-1, descending=True).values
    want = exact_gradient(theta, sets, ordered @ torch.tensor(weights).double())
    got = expected_estimate(theta, drawn, order_advantages(REWARDS[drawn], weights))
    assert gap(got, want * (5 / 3 - 1)) < 1e-6 and want.abs().max() > 0.01


def test_the_second_best_is_the_chance_of_two_right_ones():
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
    sets = list(itertools.combinations(range(5), 3))
    two = [float(sum(rewards[0, i] for i in chosen) >= 2) for chosen in sets]
    mean = sum(two) / len(two)
    want = [sum(v for v, s in zip(two, sets) if i in s) / 6 - mean for i in range(5)]
    assert gap(second_best_advantages(rewards, 3)[0], torch.tensor(want)) < 1e-6
    assert gap(top2_advantages(rewards, 3),
               (maxk_advantages(rewards, 3) + second_best_advantages(rewards, 3)) / 2) < 1e-6
    with pytest.raises(InputError):
        top2_advantages(rewards, 5)
