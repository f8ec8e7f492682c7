"""Intervals and tests over seeds and posts; the Pareto front."""

import itertools
import math

import numpy as np

from support.student_t import t_quantile


# ---- Intervals over seeds and posts --------------------------------------------------------------

def interval(values, clusters, shared, level=0.95):
    """(mean, low, high) of `values`, a list over seeds of arrays over posts, with `clusters`, the
    list of their posts' labels (intents): seeds and posts both count as drawn.

    Posts of its own for each seed (shared False): a t-interval over the seeds' means, which contain
    both. The same posts for all seeds: seeds crossed with clusters, see crossed_spread. One seed:
    clusters only (the variance of training again is then missing). Simulated coverage of a nominal
    95%, for 3, 5 and 12 seeds by 70 clusters: 94.1 to 95.0% over three spreads, of which the lowest
    is 92.1% (3 seeds that differ more than the clusters do; 1,500 trials each, by `simulated` in
    tests/report/test_stats.py). ValueError: fewer than 2 posts, or values that are not finite."""
    values = [np.asarray(v, dtype=np.float64) for v in values]
    for of_seed in values:
        if of_seed.ndim != 1 or len(of_seed) < 2 or not np.isfinite(of_seed).all():
            raise ValueError("an interval needs at least 2 finite values a seed, one a post")
    means = np.array([v.mean() for v in values])
    mean = float(means.mean())
    seeds = len(values)
    if seeds > 1 and not shared:
        variance = float(means.var(ddof=1)) / seeds
        df = seeds - 1
    else:
        variance, df = crossed_spread(np.stack(values), clusters[0])
    half = t_quantile(df, level) * math.sqrt(variance)
    return mean, mean - half, mean + half


def crossed_spread(table, clusters):
    """(variance of the mean of table (seeds, posts), its degrees of freedom): seeds crossed with
    clusters of posts.

    With m_s the seeds' means, g_c the clusters' and w_c their shares of posts, var = A + B - I:
    A = var(m_s)/S, B = C/(C-1) sum w_c^2 (g_c - g)^2, I the interaction that both contain.
    Satterthwaite's degrees of freedom."""
    labels, where = np.unique(np.asarray(clusters), return_inverse=True)
    if len(labels) < 2:                      # one cluster: each post is a cluster of its own
        where = np.arange(table.shape[1])
    sizes = np.bincount(where)
    count = len(sizes)
    share = sizes / sizes.sum()
    cells = np.stack([np.bincount(where, row) for row in table]) / sizes       # (S, C)
    by_seed = cells @ share
    by_cluster = cells.mean(0)
    mean = by_seed.mean()
    of_posts = count / (count - 1) * float((share ** 2 * (by_cluster - mean) ** 2).sum())
    if len(table) == 1:
        return of_posts, count - 1
    of_seeds = float(by_seed.var(ddof=1)) / len(table)
    residual = cells - by_seed[:, None] - by_cluster + mean
    interaction = float((share ** 2 * (residual ** 2).sum(0)).sum())
    interaction /= len(table) * (len(table) - 1)
    variance = max(of_seeds + of_posts - interaction, of_seeds, of_posts, 1e-300)
    squares = of_seeds ** 2 / (len(table) - 1) + of_posts ** 2 / (count - 1)
    df = variance ** 2 / (squares + 1e-300)
    return variance, max(1.0, df)


def sign_flip(differences):
    """The exact two-sided p of "the mean is 0", flipping the sign of each difference (2^n ways; a
    random 20,000 of them above n = 16, and the differences as they are): what n seeds can show at
    best is 2 / 2^n."""
    d = np.asarray(differences, dtype=np.float64)
    if len(d) <= 16:
        signs = np.array(list(itertools.product((1, -1), repeat=len(d))))
    else:  # without their own signs p could be 0, which no random test can show
        signs = np.random.default_rng(0).choice((1, -1), size=(20_000, len(d)))
        signs = np.vstack((np.ones(len(d)), signs))
    sums = np.abs(signs @ d)
    return float((sums >= abs(d.sum()) - 1e-12).mean())


def least_p(n):
    """The smallest p that sign_flip can give for n differences."""
    return 2 / 2 ** n if n <= 16 else 1 / 20_001


def holm(p):
    """Holm's adjustment of {name: p}: all together keep the level."""
    adjusted = {}
    largest = 0.0
    for i, name in enumerate(sorted(p, key=p.get)):
        remaining = len(p) - i
        largest = max(largest, min(1.0, remaining * p[name]))
        adjusted[name] = largest
    return adjusted


def pareto_front(points):
    """Indices of the points (quality, diversity), both better when larger, that no other point
    beats.

    A point is beaten by one at least as good in both and better in one, so equal points stay."""
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise ValueError("a Pareto front needs rows of finite numbers")
    kept = []
    for i, point in enumerate(points):
        as_good = (points >= point).all(axis=1)
        better = (points > point).any(axis=1)
        if not (as_good & better).any():
            kept.append(i)
    return kept
