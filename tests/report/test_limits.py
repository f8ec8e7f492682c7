"""Tests of report/limits.py."""

import itertools
from collections import Counter

import numpy as np
import pytest

from helpers import record
from metrics import post_metrics
from report.limits import attainable, best_shares, front, mean_limit, pleased, user_shares
from report.stats import interval


# The limit
def grid(styles, steps):
    for cut in itertools.combinations(range(steps + styles - 1), styles - 1):
        cut = (-1, *cut, steps + styles - 1)
        yield np.array([b - a - 1 for a, b in zip(cut, cut[1:])]) / steps


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("users", [(0.6, 0.3, 0.1), (0.4, 0.4, 0.2), (0.547, 0.193, 0.26),
                                   (1.0, 0, 0)])
@pytest.mark.parametrize("valid", [1.0, 0.6])
def test_the_limit_is_the_best_of_all_shares(users, valid):
    """Against brute force over a grid of shares: none is better, and the best of them is as
    good."""
    for k in (1, 2, 3, 5, 10):
        best = max(pleased(users, q, k, valid) for q in grid(3, 60))
        assert best - 1e-9 <= attainable(users, k, valid) <= best + 2e-3
        q = best_shares(users, k, valid)
        assert q.sum() == pytest.approx(1) and q.min() > -1e-9
    for w in (0.0, 0.3, 0.7, 0.95, 1.0):
        value = lambda q: w * pleased(users, q, 1,
                                      valid) + (1 - w) * pleased(users, q, 5, valid)
        best = max(value(q) for q in grid(3, 60))
        assert best - 1e-6 <= value(best_shares(users, 5, valid, w)) <= best + 2e-3


def test_the_limit_of_the_published_shares():
    """Six voices with popularity as rank^-1.5: .767 at k = 5, .741 at validity .9, .638 at .6;
    and one voice alone is the best of one draft."""
    weights = [(i + 1) ** -1.5 for i in range(6)]
    users = tuple(w / sum(weights) for w in weights)
    for valid, want in ((1.0, 0.767), (0.9, 0.741), (0.6, 0.638)):
        assert attainable(users, 5, valid) == pytest.approx(want, abs=2e-3)
    assert attainable(users, 1, 0.905) == pytest.approx(0.495, abs=1e-3)
    line = front(Counter({users: 3}), 5)
    assert line[-1][0] == pytest.approx(users[0], abs=1e-6)
    assert line[0][1] == pytest.approx(attainable(users, 5), abs=1e-6)
    assert all(b[0] >= a[0] - 1e-9 and b[1] <= a[1] + 1e-9 for a, b in zip(line, line[1:]))


@pytest.mark.slow
def test_no_policy_of_independent_drafts_passes_the_limit():
    """Random policies with n drafts a post, judged as runs are: within their interval of the
    limit, and the best one reaches it. Voices that share a reply are one to the limit."""
    rng, users = np.random.default_rng(3), {"a": 0.5, "b": 0.3, "c": 0.2}
    shares = Counter({user_shares({"readers": users}): 1})
    top = mean_limit(shares, 5)
    for q in (best_shares((0.5, 0.3, 0.2), 5), [1 / 3] * 3, [0.8, 0.1, 0.1]):
        values = []
        for _ in range(300):
            picks = rng.choice(list(users), 20, p=q)
            values.append(post_metrics(record([[v] for v in picks], n=20, readers=users),
                                       (5,))["pass@5"])
        mean, low, high = interval([np.array(values)], [list(range(300))], True)
        assert low <= top
    alike = {"readers": users, "alike": [["a", "c"]]}
    assert (user_shares(alike) == (0.7, 0.3) and attainable((0.7, 0.3), 2)
            > attainable((0.5, 0.3, 0.2), 2))
