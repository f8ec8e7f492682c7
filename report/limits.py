"""The limit: the best that any policy can do where the popularity of styles is known."""

import functools
from collections import Counter

import numpy as np


def best_shares(users, k, valid=1.0, first=0.0):
    """The shares q of styles, summing to 1, with which independent completions that are right with
    probability `valid` please users best: the maximum of first * P_1 + (1 - first) * P_k, where
    P_k = sum_j users_j (1 - (1 - valid q_j)^k). Concave, so the derivative by each used q_j is
    one number, found by bisection. users: a tuple of popularity; -> array of the same length."""
    users = np.asarray(users, dtype=np.float64)
    if k == 1 or first >= 1:
        return np.eye(len(users))[int(users.argmax())]

    def shares(derivative):
        # derivative = readers valid (first + (1 - first) k (1 - valid q)^(k-1)), solved for q
        weight = np.maximum(users, 1e-300) * valid
        rest = (derivative / weight - first) / ((1 - first) * k)
        miss = np.clip(rest, 0, 1) ** (1 / (k - 1))
        return np.clip((1 - miss) / valid, 0, 1)

    low = 0.0
    high = float(users.max() * valid * (first + (1 - first) * k))
    for _ in range(200):
        middle = (low + high) / 2
        if shares(middle).sum() > 1:
            low = middle
        else:
            high = middle
    q = shares(high)
    # Where the optimum is flat (first near 1) bisection ends next to it: the rest goes to the most
    # popular style.
    q[int(users.argmax())] += 1 - q.sum()
    return q


def pleased(users, q, k, valid):
    """P_k of best_shares."""
    miss = (1 - valid * np.asarray(q)) ** k
    return float((np.asarray(users) * (1 - miss)).sum())


@functools.lru_cache(maxsize=None)
def attainable(users, k, valid=1.0):
    """The largest Pass@k of independent completions for users of this popularity (a tuple): the
    limit that every method is drawn against. A policy that samples its k completions jointly may
    exceed it: up to the k largest shares together."""
    return pleased(users, best_shares(users, k, valid), k, valid)


def user_shares(record):
    """The popularity of a post's styles, largest first. Styles that share a string (`alike`) count
    as one: a single completion pleases both."""
    first_of = {}
    for group in record.get("alike", ()):
        for style in group:
            first_of[style] = group[0]
    sums = Counter()
    for style, share in record["readers"].items():
        sums[first_of.get(style, style)] += share
    return tuple(sorted((round(s, 12) for s in sums.values()), reverse=True))


def mean_limit(shares, k, valid=1.0):
    """attainable, averaged over posts: shares is a Counter of user_shares."""
    total = sum(attainable(s, k, valid) * n for s, n in shares.items())
    return total / shares.total()


def front(shares, k=5, valid=1.0, points=40):
    """[(Pass@1, Pass@k)] of the policies that no other beats in both: the best w P_1 + (1 - w) P_k
    for w from 0 to 1, averaged over posts."""
    out = []
    for w in 1 - np.linspace(1, 0, points) ** 2:
        mean = np.zeros(2)
        for s, n in shares.items():
            q = best_shares(s, k, valid, float(w))
            both = [pleased(s, q, 1, valid), pleased(s, q, k, valid)]
            mean += n / shares.total() * np.array(both)
        out.append(tuple(mean.tolist()))
    return out


def below_limit(curve, limit, steps=200):
    """Mean height of the front `limit` above a method's curve, both [(Pass@1, Pass@k)], over the
    curve's own range of Pass@1. 0 is the best there is."""
    xs, ys = np.array(sorted(curve)).T
    limit_xs, limit_ys = np.array(sorted(limit)).T
    grid = np.linspace(xs[0], xs[-1], steps)
    gap = np.interp(grid, limit_xs, limit_ys) - np.interp(grid, xs, ys)
    return float(gap.mean())
