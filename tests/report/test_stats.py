"""Tests of report/stats.py."""

import math

import numpy as np
import pytest

from report.stats import crossed_spread, holm, interval, sign_flip
from support.student_t import t_quantile


# Intervals
def test_the_quantiles_of_t():
    """Against the tables, to three decimals."""
    for df, want in ((1, 12.706), (2, 4.303), (4, 2.776), (11, 2.201), (69, 1.995), (1000, 1.962)):
        assert t_quantile(df) == pytest.approx(want, abs=1e-3)
    assert t_quantile(5, 0.9) == pytest.approx(2.015, abs=1e-3)


def simulated(seeds, clusters, shared, spread, rng, trials):
    """How often the interval holds the truth, 0.3: seeds, clusters of 1 to 5 posts and posts all
    vary."""
    hits = 0
    for _ in range(trials):
        sizes = rng.integers(1, 6, clusters)
        label = np.repeat(np.arange(clusters), sizes)

        def posts():
            return rng.normal(0, spread["cluster"],
                              clusters)[label] + rng.normal(0, 0.1, len(label))
        common = posts()
        values = [0.3 + rng.normal(0, spread["seed"]) + (common if shared else posts())
                  + rng.normal(0, spread["both"], clusters)[label] for _ in range(seeds)]
        _, low, high = interval(values, [label.tolist()] * seeds, shared)
        hits += low < 0.3 < high
    return hits / trials


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("seeds, shared",
                         [(3, True), (5, True), (12, True), (3, False), (12, False)])
def test_intervals_over_seeds_and_posts_cover_what_they_say(seeds, shared):
    """Known truth: 95% intervals hold it 94 to 95 times of 100 over three spreads (seeds, clusters
    or both matter), here within 2 of 95 in 1,200 trials and within 5.5 in each 400. The posts
    alone, as before, would hold it far less often where seeds differ."""
    rng = np.random.default_rng(7)
    every = []
    for spread in (dict(seed=0.05, cluster=0.02, both=0.02), dict(seed=0.02, cluster=0.3, both=0.1),
                   dict(seed=0.04, cluster=0.3, both=0.05)):
        every.append(simulated(seeds, 70, shared, spread, rng, 400))
    assert 0.93 <= np.mean(every) <= 0.97 and min(every) > 0.895 and max(every) < 0.99, every


def test_an_interval_of_one_seed_is_over_clusters():
    """88 intents with one reply set each: 200 posts are not 200 independent numbers."""
    rng = np.random.default_rng(1)
    label = np.repeat(np.arange(20), 10)
    values = rng.normal(0, 1, 20)[label]
    mean, low, high = interval([values], [label.tolist()], True)
    apart = interval([values], [list(range(200))], True)
    assert mean == pytest.approx(values.mean()) and high - low > 2.5 * (apart[2] - apart[1])
    for wrong in ([[1.0]], [[]], [[1.0, math.nan]], [[[1.0, 2.0]]]):
        with pytest.raises(ValueError):
            interval(wrong, [["a", "b"]], True)


def test_the_variance_of_seeds_crossed_with_clusters_by_hand():
    """A + B - I of the docstring in plain loops, the spread of clusters with its C / (C - 1): on
    70 clusters neither that factor nor the interaction shows in how often the truth is
    covered."""
    rng = np.random.default_rng(4)
    label, seeds, inside = [0, 0, 0, 1, 2, 2], 3, 0
    for of_seeds, of_posts in ((0, 0), (3, 0.1), (0.1, 8), (2, 2), (2, 2), (2, 2), (1, 1)):
        table = (
            rng.normal(0, 1, (seeds, 6))
            + of_posts * rng.normal(0, 1, 6)
            + of_seeds * rng.normal(0, 1, (seeds, 1))
        )
        cells = [[np.mean([x for x, c in zip(row, label) if c == cluster]) for cluster in range(3)]
                 for row in table]
        share = [label.count(cluster) / 6 for cluster in range(3)]
        m = [sum(w * x for w, x in zip(share, row)) for row in cells]
        g = [sum(row[c] for row in cells) / seeds for c in range(3)]
        mean = sum(m) / seeds
        runs = sum((x - mean) ** 2 for x in m) / (seeds - 1) / seeds
        posts = 3 / 2 * sum(w * w * (x - mean) ** 2 for w, x in zip(share, g))
        both = sum(share[c] ** 2 * (cells[s][c] - m[s] - g[c] + mean) ** 2 for s in range(seeds)
                   for c in range(3))
        both /= seeds * (seeds - 1)
        spread = max(runs + posts - both, runs, posts)
        # where every part of it shows
        inside += max(runs, posts) < 0.9 * spread and both > 0.05 * spread
        df = spread ** 2 / (runs ** 2 / (seeds - 1) + posts ** 2 / 2)
        got = crossed_spread(table, label)
        assert got == pytest.approx((spread, max(1.0, df)), rel=1e-9)
    assert inside
    alone = crossed_spread(table[:1], label)
    m = sum(w * x for w, x in zip(share, cells[0]))
    assert alone == pytest.approx((3 / 2 * sum(w * w * (x - m) ** 2
                                               for w, x in zip(share, cells[0])), 2))
    # one cluster: posts stand for themselves
    apart = crossed_spread(table[:1], [5] * 6)
    assert apart == pytest.approx((table[0].var(ddof=1) / 6, 5))


def test_sign_flips_and_holm_by_hand():
    assert sign_flip([1, 2, 3]) == 2 / 8 and sign_flip([1, 1, 1, 1, 1]) == 2 / 32
    assert sign_flip([1, -1]) == 1 and sign_flip([0.0, 0.0]) == 1
    assert sign_flip(np.full(20, 0.3)) < 1e-3
    # by chance alone no p is 0
    assert sign_flip(np.full(60, 0.3)) == 1 / 20_001
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06,
                                                                     "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
