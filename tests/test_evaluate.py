"""Tests of evaluate.py's metrics, intervals and report: by hand, by enumeration over subsets, against nltk.

`python tests/test_evaluate.py` (with nltk installed) writes golden/self_bleu.json again.
"""

import csv
import dataclasses
import itertools
import json
import math
import random
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import evaluate  # noqa: E402
import grpo  # noqa: E402
import metrics  # noqa: E402
import page  # noqa: E402
import report  # noqa: E402
from adapters import drop_lora  # noqa: E402
from data import Post  # noqa: E402
from decoders import draft_scores  # noqa: E402
from evaluate import InputError  # noqa: E402
from metrics import (  # noqa: E402
    attainable, best_shares, distinct_n, duplicate_rate, expectation_adjusted_distinct, front, holm,
    below_limit, interval, max_at_k, mean_limit, pareto_front, pass_at_k, pick_at_k, pleased, post_metrics, reader_shares,
    self_bleu, separation, sign_flip, t_quantile, vendi_score, words)
from report import csv_cell  # noqa: E402
from rewards import RelevanceReward  # noqa: E402
from test_polylora import parts, session  # noqa: E402, F401  (parts: a fixture)
from trainer import Visit  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "self_bleu.json"
DRAFTS = {
    "replies": ["That is great news, well done!", "Well done, that is great.", "Oh no, not again...",
                "that IS great news", "Great news! Great news! Great news!"],
    "identical": ["see you at the park tomorrow"] * 4,
    "nothing shared": ["alpha beta gamma", "delta epsilon zeta", "eta theta iota"],
    "one word": ["yes", "yes", "no"],
    "an empty draft": ["", "thanks a lot for asking", "thanks for asking"],
    "repeats are clipped": ["the the the the the", "the cat sat", "the the end"],
    "short beside long": ["good luck", "good luck with the new job and the long way", "good luck, friend"],
    "two lengths equally near": ["a b c d e", "a b c d", "a b c d e f"],
}


def nltk_self_bleu(texts, max_n=4):
    """The direct form: nltk's sentence BLEU of each draft with all the others as references."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    drafts, smooth = [words(text) for text in texts], SmoothingFunction(epsilon=0.1).method1
    return sum(sentence_bleu(drafts[:i] + drafts[i + 1:], draft, (1 / max_n,) * max_n, smooth)
               for i, draft in enumerate(drafts)) / len(drafts)


def slow_self_bleu(texts, max_n=4):
    """The definition, with every reference's n-grams counted again for every draft."""
    drafts, scores = [words(text) for text in texts], []
    for i, draft in enumerate(drafts):
        others, product = drafts[:i] + drafts[i + 1:], 1.0
        for n in range(1, max_n + 1):
            grams = Counter(tuple(draft[j:j + n]) for j in range(len(draft) - n + 1))
            hits = sum(min(times, max(sum(tuple(other[j:j + n]) == gram for j in range(len(other) - n + 1))
                                      for other in others)) for gram, times in grams.items())
            if n == 1 and hits == 0:
                product = 0.0
                break
            product *= ((hits or 0.1) / max(1, sum(grams.values()))) ** (1 / max_n)
        closest = min((len(other) for other in others), key=lambda length: (abs(length - len(draft)), length))
        scores.append(product and product * min(1.0, math.exp(1 - closest / len(draft))))
    return sum(scores) / len(scores)


def random_drafts(seed):
    rng, tokens = random.Random(seed), "a b c d e f , !".split()
    return [" ".join(rng.choice(tokens) for _ in range(rng.randint(0, 9))) for _ in range(6)] + ["a b"]


# Pass@k and max@k

def test_pass_at_k_table():
    assert [pass_at_k(10, c, 5) for c in (0, 10, 6, 1)] == [0.0, 1.0, 1.0, 0.5]
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3, abs=1e-15)
    assert pass_at_k(16, 1, 8) == 0.5
    assert pass_at_k(10, 2, 5) == pytest.approx(7 / 9, abs=1e-15)
    assert pass_at_k(2000, 1, 1000) == 0.5  # no overflow, no loss


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            drafts = [True] * c + [False] * (n - c)
            subsets = [any(subset) for subset in itertools.combinations(drafts, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased_and_the_plug_in_form_is_not():
    p, n, k = 0.2, 10, 5
    chance = [math.comb(n, c) * p ** c * (1 - p) ** (n - c) for c in range(n + 1)]
    ours = sum(w * pass_at_k(n, c, k) for c, w in enumerate(chance))
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(chance))
    assert ours == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert plug_in < ours - 0.05


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2), (0, 0, 1)])
def test_pass_at_k_refuses_what_it_cannot_estimate(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_max_at_k_is_the_mean_maximum_over_all_subsets():
    rewards = [0.3, -1.0, 2.5, 0.3, 0.0, 1.25]
    for k in range(1, 7):
        best = [max(subset) for subset in itertools.combinations(rewards, k)]
        assert max_at_k(rewards, k) == pytest.approx(sum(best) / len(best), abs=1e-12)
    for c in range(7):
        assert max_at_k([0.0] * (6 - c) + [1.0] * c, 3) == pytest.approx(pass_at_k(6, c, 3), abs=1e-12)
    for wrong in (([1.0, 2.0], 3), ([1.0], 0), ([1.0, math.nan], 1)):
        with pytest.raises(ValueError):
            max_at_k(*wrong)


def test_a_pick_is_the_mean_over_subsets_and_over_ties():
    """The best of each subset by score; among equals every one in turn."""
    passed, scores = [1.0, 0.0, 0.5, 0.0, 1.0], [2.0, 3.0, 2.0, -1.0, 2.0]
    for k in range(1, 6):
        worth = []
        for subset in itertools.combinations(range(5), k):
            top = [i for i in subset if scores[i] == max(scores[j] for j in subset)]
            worth.append(sum(passed[i] for i in top) / len(top))
        assert pick_at_k(passed, scores, k) == pytest.approx(sum(worth) / len(worth), abs=1e-12)
        assert pick_at_k(passed, [0.0] * 5, k) == pytest.approx(sum(passed) / 5)
        binary = [float(p == 1) for p in passed]
        assert pick_at_k(binary, binary, k) == pytest.approx(pass_at_k(5, 2, k))               # an oracle
    for wrong in (([1.0], [1.0], 2), ([1.0], [math.nan], 1), ([1.0, 0.0], [1.0], 1), ([1.0], [1.0], 0)):
        with pytest.raises(ValueError):
            pick_at_k(*wrong)


# Diversity

def test_words():
    assert words("Don't STOP, it’s 5pm!! 🎉") == ["don't", "stop", ",", "it’s", "5pm", "!", "!", "🎉"]
    assert words("  \n") == []


def test_distinct_n_by_hand():
    texts = ["the cat sat", "The cat ran", ""]  # bigrams: the cat, cat sat, the cat, cat ran
    assert distinct_n(texts, 1) == 4 / 6
    assert distinct_n(texts, 2) == 3 / 4
    assert distinct_n(["a b", "c"], 2) == 1.0  # no bigram across two drafts
    with pytest.raises(ValueError, match="distinct-4"):
        distinct_n(texts, 4)


@pytest.mark.parametrize("name", DRAFTS)
def test_self_bleu_golden(name):
    assert self_bleu(DRAFTS[name]) == pytest.approx(json.loads(GOLDEN.read_text())[name], abs=1e-12)


def test_self_bleu_is_the_definition():
    for texts in [*DRAFTS.values(), *map(random_drafts, range(40))]:
        for max_n in (2, 4):
            assert self_bleu(texts, max_n) == pytest.approx(slow_self_bleu(texts, max_n), abs=1e-12)


def test_self_bleu_is_nltks():
    pytest.importorskip("nltk")
    for texts in [*DRAFTS.values(), *map(random_drafts, range(40))]:
        for max_n in (3, 4):
            assert self_bleu(texts, max_n) == pytest.approx(nltk_self_bleu(texts, max_n), abs=1e-12)


def test_self_bleu_limits_and_errors():
    assert self_bleu(["one two three four five"] * 3) == pytest.approx(1.0, abs=1e-12)
    assert self_bleu(["a b", "c d"]) == 0.0
    for texts in (["alone"], ["", " "]):
        with pytest.raises(ValueError):
            self_bleu(texts)


def test_separation_is_how_often_pairs_in_two_voices_are_the_farther_apart():
    """D that does not see voices cannot make them; ties count half, and a kind that is missing is no number."""
    rng = np.random.default_rng(3)
    distances, answers = rng.integers(0, 4, (9, 9)) / 4, list("aabbbcaca")
    pairs = {True: [], False: []}
    for i, j in itertools.combinations(range(9), 2):
        pairs[answers[i] == answers[j]].append(distances[i, j])
    won = [(far > near) + (far == near) / 2 for far in pairs[False] for near in pairs[True]]
    assert separation(distances, answers) == pytest.approx(sum(won) / len(won), abs=1e-12)
    assert separation(distances, list("aaaaaaaaa")) is separation(distances, list("abcdefghi")) is None
    assert separation(np.zeros((0, 0)), []) is None
    line = np.abs(np.subtract.outer([0, 1, 9, 10], [0, 1, 9, 10]))
    assert (separation(line, list("aabb")), separation(line, list("abab"))) == (1, 0.25)


def test_vendi_refuses_rows_that_are_not_unit_vectors():
    """A kernel without ones on its diagonal has another trace than 1, and the score would mean nothing."""
    for length in (0.99, 1.01, 1.2, 0.0):
        with pytest.raises(ValueError, match="unit length"):
            vendi_score(np.eye(3) * np.array([[1.0], [1.0], [length]]))
    assert vendi_score(np.eye(3) * (1 - 1e-4)) == pytest.approx(3, abs=1e-2)  # bf16 rounding is none
    for wrong in (np.ones(3), np.ones((0, 3)), np.ones((1, 1, 1))):
        with pytest.raises(ValueError, match="unit length"):
            vendi_score(wrong)


def test_vendi_score():
    assert vendi_score(np.tile([0.6, 0.8], (5, 1))) == pytest.approx(1, abs=1e-9)
    assert vendi_score(np.eye(5)) == pytest.approx(5, abs=1e-9)
    pairs = [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert vendi_score(pairs) == pytest.approx(2, abs=1e-9)
    assert vendi_score([[1, 0], [1, 0], [1, 0], [0, 1]]) == pytest.approx(4 / 3 ** 0.75, abs=1e-9)
    for wrong in ([[2.0, 0.0], [1.0, 0.0]], [1.0, 0.0], np.zeros((0, 3))):
        with pytest.raises(ValueError):
            vendi_score(wrong)


def test_pareto_front():
    points = [(1, 5), (2, 4), (2, 4), (2, 3), (5, 1), (0, 5), (3, 1)]
    assert pareto_front(points) == [0, 1, 2, 4]
    with pytest.raises(ValueError):
        pareto_front([(1, math.nan)])


# Intervals

def test_the_quantiles_of_t():
    """Against the tables, to three decimals."""
    for df, want in ((1, 12.706), (2, 4.303), (4, 2.776), (11, 2.201), (69, 1.995), (1000, 1.962)):
        assert t_quantile(df) == pytest.approx(want, abs=1e-3)
    assert t_quantile(5, 0.9) == pytest.approx(2.015, abs=1e-3)


def simulated(seeds, clusters, shared, spread, rng, trials):
    """How often the interval holds the truth, 0.3: seeds, clusters of 1 to 5 posts and posts all vary."""
    hits = 0
    for _ in range(trials):
        sizes = rng.integers(1, 6, clusters)
        label = np.repeat(np.arange(clusters), sizes)

        def posts():
            return rng.normal(0, spread["cluster"], clusters)[label] + rng.normal(0, 0.1, len(label))
        common = posts()
        values = [0.3 + rng.normal(0, spread["seed"]) + (common if shared else posts())
                  + rng.normal(0, spread["both"], clusters)[label] for _ in range(seeds)]
        _, low, high = interval(values, [label.tolist()] * seeds, shared)
        hits += low < 0.3 < high
    return hits / trials


@pytest.mark.parametrize("seeds, shared", [(3, True), (5, True), (12, True), (3, False), (12, False)])
def test_intervals_over_seeds_and_posts_cover_what_they_say(seeds, shared):
    """Known truth: 95% intervals hold it 93 to 97 times of 100 when seeds, when clusters and when both
    matter. The posts alone, as before, would hold it far less often where seeds differ."""
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
    """A + B - I of the docstring in plain loops, the spread of clusters with its C / (C - 1): on 70 clusters neither
    that factor nor the interaction shows in how often the truth is covered."""
    rng = np.random.default_rng(4)
    label, seeds, inside = [0, 0, 0, 1, 2, 2], 3, 0
    for of_seeds, of_posts in ((0, 0), (3, 0.1), (0.1, 8), (2, 2), (2, 2), (2, 2), (1, 1)):
        table = rng.normal(0, 1, (seeds, 6)) + of_posts * rng.normal(0, 1, 6) + of_seeds * rng.normal(0, 1, (seeds, 1))
        cells = [[np.mean([x for x, c in zip(row, label) if c == cluster]) for cluster in range(3)] for row in table]
        share = [label.count(cluster) / 6 for cluster in range(3)]
        m = [sum(w * x for w, x in zip(share, row)) for row in cells]
        g = [sum(row[c] for row in cells) / seeds for c in range(3)]
        mean = sum(m) / seeds
        runs = sum((x - mean) ** 2 for x in m) / (seeds - 1) / seeds
        posts = 3 / 2 * sum(w * w * (x - mean) ** 2 for w, x in zip(share, g))
        both = sum(share[c] ** 2 * (cells[s][c] - m[s] - g[c] + mean) ** 2 for s in range(seeds) for c in range(3))
        both /= seeds * (seeds - 1)
        spread = max(runs + posts - both, runs, posts)
        inside += max(runs, posts) < 0.9 * spread and both > 0.05 * spread     # where every part of it shows
        df = spread ** 2 / (runs ** 2 / (seeds - 1) + posts ** 2 / 2)
        got = metrics.crossed_spread(table, label)
        assert got == pytest.approx((spread, max(1.0, df)), rel=1e-9)
    assert inside
    alone = metrics.crossed_spread(table[:1], label)
    m = sum(w * x for w, x in zip(share, cells[0]))
    assert alone == pytest.approx((3 / 2 * sum(w * w * (x - m) ** 2 for w, x in zip(share, cells[0])), 2))
    apart = metrics.crossed_spread(table[:1], [5] * 6)                         # one cluster: posts stand for themselves
    assert apart == pytest.approx((table[0].var(ddof=1) / 6, 5))


def test_sign_flips_and_holm_by_hand():
    assert sign_flip([1, 2, 3]) == 2 / 8 and sign_flip([1, 1, 1, 1, 1]) == 2 / 32
    assert sign_flip([1, -1]) == 1 and sign_flip([0.0, 0.0]) == 1
    assert sign_flip(np.full(20, 0.3)) < 1e-3
    assert sign_flip(np.full(60, 0.3)) == 1 / 20_001                           # by chance alone no p is 0
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


# The limit

def grid(voices, steps):
    for cut in itertools.combinations(range(steps + voices - 1), voices - 1):
        cut = (-1, *cut, steps + voices - 1)
        yield np.array([b - a - 1 for a, b in zip(cut, cut[1:])]) / steps


@pytest.mark.parametrize("readers", [(0.6, 0.3, 0.1), (0.4, 0.4, 0.2), (0.547, 0.193, 0.26), (1.0, 0, 0)])
@pytest.mark.parametrize("valid", [1.0, 0.6])
def test_the_limit_is_the_best_of_all_shares(readers, valid):
    """Against brute force over a grid of shares: none is better, and the best of them is as good."""
    for k in (1, 2, 3, 5, 10):
        best = max(pleased(readers, q, k, valid) for q in grid(3, 60))
        assert best - 1e-9 <= attainable(readers, k, valid) <= best + 2e-3
        q = best_shares(readers, k, valid)
        assert q.sum() == pytest.approx(1) and q.min() > -1e-9
    for w in (0.0, 0.3, 0.7, 0.95, 1.0):
        value = lambda q: w * pleased(readers, q, 1, valid) + (1 - w) * pleased(readers, q, 5, valid)
        best = max(value(q) for q in grid(3, 60))
        assert best - 1e-6 <= value(best_shares(readers, 5, valid, w)) <= best + 2e-3


def test_the_limit_of_the_published_shares():
    """Six voices with popularity as rank^-1.5: .767 at k = 5, .741 at validity .9, .638 at .6; and one
    voice alone is the best of one draft."""
    weights = [(i + 1) ** -1.5 for i in range(6)]
    readers = tuple(w / sum(weights) for w in weights)
    for valid, want in ((1.0, 0.767), (0.9, 0.741), (0.6, 0.638)):
        assert attainable(readers, 5, valid) == pytest.approx(want, abs=2e-3)
    assert attainable(readers, 1, 0.905) == pytest.approx(0.495, abs=1e-3)
    line = front(Counter({readers: 3}), 5)
    assert line[-1][0] == pytest.approx(readers[0], abs=1e-6)
    assert line[0][1] == pytest.approx(attainable(readers, 5), abs=1e-6)
    assert all(b[0] >= a[0] - 1e-9 and b[1] <= a[1] + 1e-9 for a, b in zip(line, line[1:]))


def test_no_policy_of_independent_drafts_passes_the_limit():
    """Random policies with n drafts a post, judged as runs are: within their interval of the limit, and
    the best one reaches it. Voices that share a reply are one to the limit."""
    rng, readers = np.random.default_rng(3), {"a": 0.5, "b": 0.3, "c": 0.2}
    shares = Counter({reader_shares({"readers": readers}): 1})
    top = mean_limit(shares, 5)
    for q in (best_shares((0.5, 0.3, 0.2), 5), [1 / 3] * 3, [0.8, 0.1, 0.1]):
        values = []
        for _ in range(300):
            picks = rng.choice(list(readers), 20, p=q)
            values.append(post_metrics(record([[v] for v in picks], n=20, readers=readers), (5,))["pass@5"])
        mean, low, high = interval([np.array(values)], [list(range(300))], True)
        assert low <= top
    alike = {"readers": readers, "alike": [["a", "c"]]}
    assert reader_shares(alike) == (0.7, 0.3) and attainable((0.7, 0.3), 2) > attainable((0.5, 0.3, 0.2), 2)


# One post

READERS = {"warm": 0.5, "dry": 0.3, "terse": 0.2}


def record(voices=None, *, name="p0", n=4, **changed):
    voices = [["warm"], [], ["warm", "dry"], []] if voices is None else voices
    return {"id": name, "post": f"text of {name}", "drafts": [f"draft {i} of many" for i in range(n)],
            "voices": voices, "rewards": [float(bool(right)) for right in voices],
            "finished": [True] * (n - 1) + [False], "semantic": 0.25, "vendi": 2.0,
            "readers": READERS, "intent": ""} | changed


def test_a_pick_of_one_is_no_pick():
    got = post_metrics(record([["warm"], [], ["dry"], []], scores={"judge": [0.1, 0.2, 0.3, 0.4]}), ks=(1, 2))
    picks = {name for name in got if name.startswith(("longest@", "pick_"))}
    assert picks == {"longest@2", "pick_reward@2", "pick_random@2", "pick_judge@2"}


def test_post_metrics_with_voices_by_enumeration():
    voices = [["warm"], [], ["warm", "dry"], [], ["dry", "dry"], []]  # a voice named twice is still one draft
    got = post_metrics(record(voices, n=6, rewards=[1, 0, 2.5, 0, 1, 0]), ks=(1, 2, 5))
    for k in (1, 2, 5):
        subsets = list(itertools.combinations(voices, k))
        pleased = sum(share * sum(any(voice in right for right in subset) for subset in subsets)
                      for voice, share in READERS.items())
        covered = sum(sum(any(voice in right for right in subset) for subset in subsets)
                      for voice in READERS) / 3
        assert got[f"pass@{k}"] == pytest.approx(pleased / len(subsets), abs=1e-12)
        assert got[f"coverage@{k}"] == pytest.approx(covered / len(subsets), abs=1e-12)
        if k > 1:                            # all drafts are equally long: the first of a subset is picked
            longest = sum(sum(READERS[v] for v in set(subset[0])) for subset in subsets)
            assert got[f"longest@{k}"] == pytest.approx(longest / len(subsets), abs=1e-12)
    assert (got["valid"], got["stances"], got["reward"]) == (0.5, 2.0, 0.75)
    assert got["max@5"] == pytest.approx((5 * 2.5 + 1) / 6)
    assert (got["truncated"], got["words"], got["semantic"], got["vendi"]) == (1 / 6, 4.0, 0.25, 2.0)
    assert got["distinct-1"] == 9 / 24 and "self-bleu" in got and "distinct-2" in got


def test_post_metrics_without_voices():
    plain = record(passed=[True, False, False, False], rewards=[0.9, 0.1, 0.2, 0.4])
    del plain["voices"]
    del plain["readers"]
    got = post_metrics(plain, ks=(1, 3))
    assert got["pass@1"] == 0.25 and got["pass@3"] == 0.75 and got["valid"] == 0.25 and "stances" not in got


def test_post_metrics_leaves_out_what_no_draft_can_show():
    empty = post_metrics(record(drafts=["", "", " ", ""]), ks=(1,))
    assert not {"distinct-1", "distinct-2", "self-bleu", "ead"} & set(empty) and empty["words"] == 0
    short = post_metrics(record(drafts=["yes", "no", "", "yes"]), ks=(1,))
    assert short["distinct-1"] == 2 / 3 and "distinct-2" not in short


@pytest.mark.parametrize("changed, ks", [
    ({}, (5,)), ({"readers": None}, (1,)), ({"readers": {"warm": 1.0}}, (1,)),
    ({"readers": READERS | {"dry": 0.9}}, (1,)), ({"rewards": [1.0]}, (1,)), ({"semantic": None}, (1,)),
    ({"finished": []}, (1,)), ({"rewards": [math.inf, 0, 0, 0]}, (1,)), ({"vendi": math.nan}, (1,))])
def test_post_metrics_refuses(changed, ks):
    with pytest.raises(ValueError):
        post_metrics(record(**changed), ks)


def test_words_of_scripts_without_spaces_are_characters():
    """A Thai or Chinese reply would be one word, and every two of them wholly different."""
    assert words("don't PANIC, 42!") == ["don't", "panic", ",", "42", "!"]
    assert words("今天很好") == list("今天很好") and len(words("สวัสดี")) > 3
    assert words("👍 ok 👍") == ["👍", "ok", "👍"] and words("مرحبا بك") == ["مرحبا", "بك"]
    assert words("") == words(" \n") == []


def test_ead_and_duplicates_by_hand():
    """Of three different words in four draws from ten, 10 (1 - .9^4) = 3.439 were to be expected."""
    assert expectation_adjusted_distinct(["a b", "a c"], 10) == pytest.approx(3 / 3.439)
    assert expectation_adjusted_distinct(["a"] * 50, 10) < expectation_adjusted_distinct(["a"] * 2, 10)
    with pytest.raises(ValueError):
        expectation_adjusted_distinct(["", " "], 10)
    assert duplicate_rate(["Yes!", "yes", "no", "yes?"]) == 0.5 and duplicate_rate(["a", "b"]) == 0
    assert duplicate_rate(["", ""]) == 0.5


ODD = {"empty": ["", "", ""], "one word": ["yes", "no", "yes"], "all equal": ["well done, you"] * 3,
       "emoji": ["🎉🎉 👍", "👍", "👩‍👩‍👧 🎉"], "right to left": ["مرحبا بك", "שלום לך", "مرحبا"],
       "no spaces": ["今天很好", "今天不好", "สวัสดี"], "one draft": ["hello there"],
       "a very long word": ["x" * 5000, "y" * 5000]}


@pytest.mark.parametrize("name", ODD)
def test_every_metric_of_odd_drafts_is_brute_force_or_absent(name):
    """Never 0 for what has no value: each n-gram counted again here, self-BLEU by its definition."""
    drafts = ODD[name]
    n, tokens = len(drafts), [words(d) for d in drafts]
    got = post_metrics(record([["warm"]] * n, n=n, drafts=drafts, logprobs=[-1.0] * n), ks=(1,))
    for size in (1, 2):
        grams = [tuple(t[i:i + size]) for t in tokens for i in range(len(t) - size + 1)]
        assert got.get(f"distinct-{size}") == (len(set(grams)) / len(grams) if grams else None)
    if n > 1 and any(tokens):
        assert got["self-bleu"] == pytest.approx(slow_self_bleu(drafts), abs=1e-12)
    else:
        assert "self-bleu" not in got
    assert ("ead" in got) == any(tokens)
    assert got["words"] == sum(map(len, tokens)) / n and got["pass@1"] == got["valid"] * 0.5 == 0.5
    assert got["duplicates"] == pytest.approx(
        {"empty": 2 / 3, "one word": 1 / 3, "all equal": 2 / 3}.get(name, 0))


def test_recall_is_the_share_of_people_s_replies_that_some_of_k_drafts_agrees_with():
    agrees = [[0], [], [0, 2], [1, 1]]
    got = post_metrics(record(agrees=agrees, people=4), ks=(1, 2, 4))
    for k in (1, 2, 4):
        shares = [len({r for some in subset for r in some}) / 4 for subset in itertools.combinations(agrees, k)]
        assert got[f"recall@{k}"] == pytest.approx(sum(shares) / len(shares), abs=1e-12)


def test_likelihoods_picks_and_verdicts_by_hand():
    n, voices = 5, [["warm"], [], ["dry"], [], ["warm"]]
    changed = dict(logprobs=[-4, -2, -6, -8, -10], entropies=[2, 2, 2, 2, 2], base_logprobs=[-8, -4, -6, -12, -10],
                   tokens=[2, 1, 3, 4, 10], scores={"model": [0, 0, 9, 0, 0]},
                   judge={"relevance": [0.25, 0.75], "pairs": [[0.9, 0.8], [0.9, 0.2], [0.1, 0.3], [0.5, 0.5]]})
    got = post_metrics(record(voices, n=n, **changed), ks=(1, 5))
    assert (got["entropy"], got["logprob"], got["perplexity"]) == pytest.approx((0.5, -1.5, math.exp(2)))
    assert got["pick_likelihood@5"] == 0 and got["pick_model@5"] == 0.3
    assert got["pick_random@5"] == pytest.approx(got["pass@1"]) and got["pick_reward@5"] == pytest.approx(1.3 / 3)
    assert (got["judge-relevance"], got["judge-wins"], got["judge-ties"]) == (0.5, 0.5, 0.5)
    for k in (2, 3, 4):                      # every k, and each selector by brute force
        made = post_metrics(record(voices, n=n, **changed), ks=(k,))
        worth = [sum(READERS[v] for v in set(right)) for right in voices]
        for name, scores in (("likelihood", changed["logprobs"]), ("model", changed["scores"]["model"]), ("random", [0] * n)):
            taken = []
            for subset in itertools.combinations(range(n), k):
                top = [i for i in subset if scores[i] == max(scores[j] for j in subset)]
                taken.append(np.mean([worth[i] for i in top]))
            assert made[f"pick_{name}@{k}"] == pytest.approx(np.mean(taken)), (name, k)
    assert not {"pick_likelihood@5", "entropy", "judge-wins"} & set(post_metrics(record(n=4), ks=(1,)))
    for wrong in (dict(logprobs=[0.0]), dict(scores={"model": [1.0]}), dict(tokens=[])):
        with pytest.raises(ValueError, match="entries"):
            post_metrics(record(voices, n=n, **changed | wrong), ks=(1,))


def test_joint_drafts_are_judged_by_whole_sets():
    """Two sets of three: Pass@3 is the mean of two yes or no; over all subsets of the six it would be
    another number, and other k have none. Diversity is within a set."""
    voices = [["warm"], [], ["warm"], [], [], ["dry"]]
    drafts = ["a b", "c d", "e f", "a b", "a b", "a b"]
    joint = record(voices, n=6, drafts=drafts, **{"set": 3})
    got, apart = post_metrics(joint, ks=(1, 3, 5)), post_metrics(record(voices, n=6, drafts=drafts), ks=(3,))
    assert got["pass@3"] == pytest.approx((0.5 + 0.3) / 2) != pytest.approx(apart["pass@3"])
    assert not {"pass@1", "pass@5", "coverage@1", "longest@5"} & set(got)
    assert got["coverage@3"] == pytest.approx(1 / 3) and got["stances"] == 1.0 and got["valid"] == 0.5
    assert got["distinct-1"] == pytest.approx((1 + 1 / 3) / 2)
    assert (got["duplicates"], got["truncated"]) == pytest.approx(((0 + 2 / 3) / 2, 1 / 6))
    for size in (4, 0, 2.0, None):
        with pytest.raises(ValueError, match="sets of"):
            post_metrics(joint | {"set": size}, ks=(3,))


def test_many_drafts_are_measured_quickly():
    """1,000 drafts of 12 words, 20 posts of 50: a tenth of what must take less than a minute."""
    rng, vocabulary = random.Random(0), [f"word{i}" for i in range(300)]
    texts = [[" ".join(rng.choices(vocabulary, k=12)) for _ in range(50)] for _ in range(20)]
    vectors = np.random.default_rng(0).normal(size=(20, 50, 64))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    began = time.process_time()
    for drafts, rows in zip(texts, vectors):
        post_metrics(record([["warm"]] * 50, n=50, drafts=drafts, vendi=vendi_score(rows)))
    assert time.process_time() - began < 6


# The report

def test_a_joint_arm_stands_beside_the_others(runs, tmp_path):
    """Its Pass@3 alone; everything else of Pass@k is a dash, and a note says why."""
    decoding = {"name": "list", "independent": False, "set_size": 3}
    joint = write_run(tmp_path / "x0", 0, "poly <&> |@list", lambda i: 6, of="poly <&> |", settings={"decoding": decoding, "adapter": "x"},
                      **{"set": 3})
    path = tmp_path / "b0" / "evaluation.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"settings": data["settings"] | {"adapter": "x"}}))
    summary = evaluate.report([*runs, joint], tmp_path / "out", "lora-grpo")
    arm = summary["arms"]["poly <&> |@list"]["metrics"]
    assert arm["pass@3"]["mean"] == pytest.approx(0.25) and arm["pass@5"]["mean"] is None
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "joint sets of 3: Pass@3 is of whole sets" in text and "equal, bit for bit" not in text
    assert "pass@5 in" not in text
    for name in ("pass_at_k.svg", "pass1_pass5.svg"):
        ElementTree.parse(tmp_path / "out" / name)
    assert evaluate.main(["report", *runs, "--out", str(tmp_path / "few"), "--ks", "10,2"]) == 0
    assert json.loads((tmp_path / "few" / "report.json").read_text())["ks"] == [2, 10]
    assert not (tmp_path / "few" / "pass1_pass5.svg").exists()
    with pytest.raises(SystemExit):
        evaluate.main(["report", *runs, "--out", str(tmp_path / "few"), "--ks", "0,2"])


def write_run(folder, seed, arm, right, *, posts=6, end=True, settings=None, of=None, steps=3, **changed):
    """A run of 12 drafts a post in which right(post number) of them please the warm reader; `of`: the arm that was
    trained, of one measured once more."""
    folder.mkdir(parents=True)
    records = [record([["warm"]] * right(i) + [[]] * (12 - right(i)), name=f"p{i}", n=12, **changed)
               for i in range(posts)]
    config = {"seed": seed} | ({"arm": arm} if arm else {}) | ({"measured_of": of} if of else {})
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"n": 12, "temperature": 1.0, "split": "test"} | (settings or {})
    (folder / "evaluation.json").write_text(json.dumps(
        {"version": 2, "domain": "pocket", "settings": settings, "records": records}))
    lines = [{"event": "step", "loss": math.nan}]
    if end:
        lines.append({"event": "end", "stage": "sft", "step": steps, "seconds": 10.0 + seed, "tokens_per_second": 100,
                      "peak_bytes": (seed + 1) * 2 ** 30})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / "a0", 0, "lora-grpo", lambda i: 2 + i % 2),
            write_run(tmp_path / "b0", 0, "poly <&> |", lambda i: 6, semantic=0.5),
            write_run(tmp_path / "a1", 1, "lora-grpo", lambda i: 4 + i % 2),
            write_run(tmp_path / "base", 0, None, lambda i: 1 + i, end=False, semantic=0, drafts=["a"] * 12)]


def test_report_writes_what_was_measured(runs, tmp_path, capsys):
    out = tmp_path / "out" / "deep"
    assert evaluate.main(["report", *runs, "--out", str(out), "--against", "lora-grpo"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "report.json", "report.md", "report.txt", "report.csv", "pass_at_k.svg", "pass1_pass5.svg",
        "pass1_pass10.svg", "quality_diversity.svg", "report.html"}
    data = json.loads((out / "report.json").read_text())
    assert list(data["arms"]) == ["lora-grpo", "poly <&> |", "base"] and data["posts"] == 6
    lora, base = data["arms"]["lora-grpo"], data["arms"]["base"]
    valid = lora["metrics"]["valid"]
    assert lora["seeds"] == [0, 1] and valid["mean"] == pytest.approx(3.5 / 12)
    assert valid["per_seed"] == pytest.approx([2.5 / 12, 4.5 / 12])
    assert valid["sd_over_seeds"] == pytest.approx(2 / 12 / 2 ** 0.5)
    assert valid["low"] < valid["mean"] < valid["high"]
    want = interval([np.array([(2 + 2 * s + i % 2) / 12 for i in range(6)]) for s in (0, 1)],
                    [[f"p{i}" for i in range(6)]] * 2, True)
    assert (valid["low"], valid["high"]) == pytest.approx(want[1:], abs=1e-12)
    assert lora["metrics"]["pass@10"]["mean"] == pytest.approx(
        0.5 * np.mean([pass_at_k(12, c, 10) for c in (2, 3, 4, 5)]), abs=1e-12)
    assert base["metrics"]["distinct-2"] == {"mean": None, "posts_left_out": 6}
    assert base["metrics"]["valid"]["sd_over_seeds"] is None
    difference = data["differences"]["poly <&> |"]["valid"]
    assert difference["mean"] == pytest.approx(3.5 / 12) and difference["low"] > 0  # of seed 0 alone
    assert difference["seeds"] == 1 and difference["p_holm"] >= difference["p"]
    assert "lora-grpo" not in data["differences"]
    assert data["pareto"] == ["poly <&> |"]
    assert data["stages"][0] == {"arm": "lora-grpo", "stage": "sft", "seconds": 10.5,
                                 "tokens_per_second": 100.0, "peak_bytes": 2.0 * 2 ** 30}
    text = (out / "report.txt").read_text()
    assert capsys.readouterr().out == text and "distinct-2 in 6 posts of base" in text and "0.292 ±" in text
    assert "poly <&> \\|" in (out / "report.md").read_text()
    assert {"limit, independent", "limit, joint"} <= set(re.findall(
        "limit, [a-z]+", (out / "pass_at_k.svg").read_text()))
    for name in ("pass_at_k.svg", "pass1_pass5.svg", "pass1_pass10.svg", "quality_diversity.svg"):
        page = (out / name).read_text()
        words_in = [element.text for element in ElementTree.fromstring(page).iter() if element.text]
        assert {"lora-grpo", "poly <&> |", "base"} <= set(words_in)
        assert "href" not in page and page.count("http") == 1  # the namespace alone: nothing is fetched
        assert "nan" not in page


def polygons(page):
    """[[(x, y), ..] of each band] of a picture."""
    return [[tuple(map(float, point.split(","))) for point in element.get("points").split()]
            for element in ElementTree.fromstring(page).iter() if element.tag.endswith("polygon")]


def test_bands_and_bars_stay_where_a_metric_can_be(tmp_path):
    """Two posts and two seeds give intervals far below 0 and above 1: they are drawn to the edge, no further, and
    the numbers stay. Each arm has a band along its k; one with a single k has whiskers."""
    runs = [write_run(tmp_path / f"{arm}{seed}", seed, arm, lambda i: (some + 6 * seed) * (i % 2), posts=2)
            for arm, some in (("few", 1), ("many", 6)) for seed in (0, 1)]
    summary = evaluate.report(runs, tmp_path / "out")
    rows = [row for arm in summary["arms"].values() for name, row in arm["metrics"].items() if name in ("pass@5", "valid")]
    assert min(row["low"] for row in rows) < -0.5 and max(row["high"] for row in rows) > 1.5
    for name in ("pass_at_k.svg", "pass1_pass5.svg", "quality_diversity.svg"):
        page = (tmp_path / "out" / name).read_text()
        labels = [float(e.text) for e in ElementTree.fromstring(page).iter()
                  if e.get("text-anchor") == "end" and e.text.replace(".", "").replace("-", "").isdecimal()]
        assert min(labels) == 0 and max(labels) == 1, (name, labels)
    bands = polygons((tmp_path / "out" / "pass_at_k.svg").read_text())
    assert [len(band) for band in bands] == [2 * len(summary["ks"])] * 2
    joint = write_run(tmp_path / "joint", 0, "few@list", lambda i: 3, of="few", posts=2, **{"set": 3},
                      settings={"decoding": {"name": "list", "independent": False, "set_size": 3}})
    evaluate.report([*runs, joint], tmp_path / "out")
    assert len(polygons((tmp_path / "out" / "pass_at_k.svg").read_text())) == 2


def test_arms_of_one_knob_are_joined_in_its_order(tmp_path):
    """poly@0.1, @1 and @10 and poly itself, first: in both pictures, however they lie and however they are given."""
    runs = [write_run(tmp_path / f"r{n}", 0, arm, lambda i: right, semantic=spread)
            for n, (arm, right, spread) in enumerate([("poly@10", 2, 0.1), ("poly", 3, 0.6), ("other", 5, 0.5),
                                                      ("poly@0.1", 6, 0.2), ("poly@1", 4, 0.4)])]
    evaluate.report(runs, tmp_path / "out")
    for name in ("pass1_pass5.svg", "quality_diversity.svg"):
        root = ElementTree.parse(tmp_path / "out" / name).getroot()
        line, = [e.get("points").split() for e in root.iter() if e.tag.endswith("polyline")
                 and e.get("stroke") == page.COLOURS[0] and e.get("stroke-width") == "1"]
        heights = [float(point.split(",")[1]) for point in line]
        assert len(line) == 4 and sorted(range(4), key=lambda i: heights[i]) == [1, 2, 0, 3], (name, heights)


def test_a_method_is_placed_by_its_temperature_and_its_name_may_hold_an_at(tmp_path):
    """x@1 at T = 1 lay before x@1@0.5 and x@1@1.6, all three at 1; so did its curve's colours and names."""
    runs = [write_run(tmp_path / f"r{n}", 0, arm, lambda i: right, settings={"temperature": heat},
                      of="x@1" if arm.startswith("x@1@") else None)
            for n, (arm, right, heat) in enumerate([("x@1", 4, 1.0), ("x@1@1.6", 2, 1.6), ("x@1@0.5", 6, 0.5), ("y@beams", 3, 1.0),
                                                    ("z@0.3", 2, 1.0), ("z@3", 5, 1.0)])]
    summary = evaluate.report(runs, tmp_path / "out")
    assert page.knobs(summary) == {"x@1": ("x@1", 1.0), "x@1@1.6": ("x@1", 1.6), "x@1@0.5": ("x@1", 0.5),
                                   "y@beams": ("y@beams", -math.inf), "z@0.3": ("z", 0.3), "z@3": ("z", 3.0)}
    assert page.curves_of({arm: arm for arm in summary["arms"]}, summary) == {"x@1": ["x@1@0.5", "x@1", "x@1@1.6"],
                                                                             "z": ["z@0.3", "z@3"]}
    assert page.looks(summary) == {"x@1": 0, "x@1@1.6": 0, "x@1@0.5": 0, "y@beams": 1, "z@0.3": 2, "z@3": 2}


def test_many_arms_are_named_by_their_methods(tmp_path):
    arms = ["base", *(f"x@{n}" for n in range(12)), "z", *(f"z@{n}" for n in range(12))]
    runs = [write_run(tmp_path / f"r{n}", 0, arm, lambda i: 1 + n % 6) for n, arm in enumerate(arms)]
    evaluate.report(runs, tmp_path / "out")
    for name in ("pass1_pass5.svg", "quality_diversity.svg"):
        root = ElementTree.parse(tmp_path / "out" / name).getroot()
        said = [e.text for e in root.iter() if "paint-order" in e.attrib]
        assert sorted(said) == ["base", "x", "z"] and "1 4" not in {e.get("stroke-dasharray") for e in root.iter()}


def test_the_area_between_a_curve_and_the_limit_by_hand(tmp_path):
    """The front falls from (.2, .9) to (.6, .5); the curve, from (.1, .4) to (.5, .4), lies .5 under its flat
    part, then .5 to .2: (.1 * .5 + .3 * .35) / .4. Order does not matter."""
    limit = [(0.2, 0.9), (0.6, 0.5)]
    assert below_limit([(0.5, 0.4), (0.1, 0.4)], limit[::-1]) == pytest.approx(0.3875, abs=1e-3)
    assert below_limit([(0.5, 0.4), (0.3, 0.8), (0.1, 0.4)], limit) < 0.3 and below_limit(limit, limit) == 0
    runs = [write_run(tmp_path / f"r{n}", 0, arm, lambda i: right) for n, (arm, right) in enumerate(
        [("poly", 3), ("poly@1", 5), ("alone", 4)])]
    evaluate.report(runs, tmp_path / "out")
    note, = [x for x in (tmp_path / "out" / "report.md").read_text().splitlines() if "Mean height of the limit" in x]
    said = [float(x) for x in re.findall(r"\d\.\d+", note)]
    summary = json.loads((tmp_path / "out" / "report.json").read_text())
    curve = [[summary["arms"][arm]["metrics"][f"pass@{k}"]["mean"] for k in (1, 5)] for arm in ("poly", "poly@1")]
    assert said == pytest.approx([below_limit(curve, summary["front"]), curve[0][0], curve[1][0]], abs=1e-3)
    assert "alone" not in note and said[0] > 0.05


def test_settings_that_are_off_are_not_named(runs, tmp_path):
    for run in runs:
        path = Path(run) / "evaluation.json"
        whole = json.loads(path.read_text())
        whole["settings"] |= {"reward_model": None, "nf4": False, "dtype": "torch.float32", "top_p": 1.0}
        path.write_text(json.dumps(whole))
    evaluate.report(runs, tmp_path / "out")
    for name in ("report.txt", "report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "dtype float32, top_p 1.0" in text, name
        assert not any(word in text for word in ("None", "reward_model", "nf4", "torch.")), name


def test_report_of_one_run_and_few_drafts_leaves_out_what_n_cannot_show(tmp_path):
    folder = write_run(tmp_path / "few", 0, None, lambda i: 4)
    path = tmp_path / "few" / "evaluation.json"
    data = json.loads(path.read_text())
    data["records"] = [record(name=f"p{i}") for i in range(3)]
    path.write_text(json.dumps(data))
    assert evaluate.report([folder], tmp_path / "out")["ks"] == [1, 2, 3]
    data["records"] = [record([["warm"]], name=f"p{i}", n=1) for i in range(3)]
    path.write_text(json.dumps(data))
    summary = evaluate.report([folder], tmp_path / "out")
    assert summary["ks"] == [1] and summary["arms"]["few"]["metrics"]["pass@1"]["mean"] == 0.5


def refused(capsys, out, *arguments):
    """The one line of stderr of a report that must exit with 2 and write nothing."""
    assert evaluate.main(["report", *arguments, "--out", str(out)]) == 2
    message = capsys.readouterr()
    assert not out.exists() and message.out == ""
    assert message.err.startswith("error: ") and message.err.count("\n") == 1
    return message.err


def test_report_compares_like_with_like(runs, tmp_path, capsys):
    out = tmp_path / "out"
    fewer = write_run(tmp_path / "fewer", 0, "other", lambda i: 2, posts=5)
    message = refused(capsys, out, *runs, fewer)
    assert runs[0] in message and fewer in message and "the posts" in message
    changed = write_run(tmp_path / "changed", 0, "other", lambda i: 2, post="other text, same id")
    assert "the posts" in refused(capsys, out, *runs, changed)
    hotter = write_run(tmp_path / "hotter", 2, "lora-grpo", lambda i: 2, settings={"temperature": 0.7})
    message = refused(capsys, out, *runs, hotter)
    assert runs[0] in message and hotter in message and "temperature (1.0 and 0.7)" in message
    assert "same arm and seed" in refused(capsys, out, *runs, runs[0])
    assert "lora-grpo, poly" in refused(capsys, out, *runs, "--against", "nobody")
    alone = write_run(tmp_path / "alone", 2, "lora-grpo", lambda i: 2, posts=1)
    assert "fewer than 2" in refused(capsys, out, alone)


EVALUATION = '{"version": 2, "domain": "d", "settings": {}, "records": %s}'


@pytest.mark.parametrize("name, content, said", [
    ("config.json", "{}", "seed"),
    ("config.json", '{"seed": true}', "seed"), ("config.json", "[1]", "a JSON"),
    ("config.json", '{"seed": 1, "arm": "a\\u0000b"}', "arm"), ("evaluation.json", "{", "JSON"),
    ("evaluation.json", '{"version": 1}', "version"), ("metrics.jsonl", '{"event": "end"}\noops', "line 2"),
    ("evaluation.json", None, "missing"),
    ("evaluation.json", EVALUATION % "[]", "fewer than 2"),
    ("evaluation.json", EVALUATION % "[{}]", "record 1"),
    ("evaluation.json", EVALUATION % "3", "records")])
def test_report_names_the_broken_file(runs, tmp_path, capsys, name, content, said):
    path = Path(runs[1]) / name
    path.unlink() if content is None else path.write_text(content)
    message = refused(capsys, tmp_path / "out", runs[1])
    assert said in message and (str(path) in message or "fewer" in said)


def test_report_keeps_an_earlier_report_when_it_fails(runs, tmp_path, capsys):
    out = tmp_path / "out"
    evaluate.report(runs, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert evaluate.main(["report", *runs, "nowhere", "--out", str(out)]) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(InputError):
        evaluate.report(runs, Path(runs[0]) / "config.json")


def test_seeds_may_have_posts_of_their_own(tmp_path):
    """Fresh posts for each seed: a t-interval over the seeds' means, and differences paired by seed."""
    runs = []
    for seed in (0, 1, 2):
        for arm in ("lora", "poly"):
            text = f"asked of seed {seed}"
            right = lambda i: (2 + i % 2 + seed) if arm == "lora" else 12 - seed
            runs.append(write_run(tmp_path / f"{arm}{seed}", seed, arm, right, post=text))
    summary = evaluate.report(runs, tmp_path / "out", "lora")
    assert not summary["same_posts_for_all_seeds"]
    row = summary["arms"]["lora"]["metrics"]["valid"]
    half = t_quantile(2) * (1 / 12) / 3 ** 0.5
    assert row["mean"] == pytest.approx(3.5 / 12) and row["high"] - row["mean"] == pytest.approx(half)
    gain = summary["differences"]["poly"]["valid"]
    gains = np.array([12 - s - (2.5 + s) for s in (0, 1, 2)]) / 12
    half = t_quantile(2) * gains.std(ddof=1) / 3 ** 0.5
    assert (gain["mean"], gain["p"]) == pytest.approx((gains.mean(), 2 / 8))
    assert gain["high"] - gain["mean"] == pytest.approx(half)
    said = evaluate.report(runs, tmp_path / "out", "lora", endpoint=("poly", "lora"))["notes"]
    assert said[0].startswith("pass@5: poly is") and 2 <= len(said) <= 3
    assert "the smallest possible p is 0.25, before Holm" in (tmp_path / "out" / "report.txt").read_text()
    said = evaluate.report(runs, tmp_path / "out", "lora", endpoint=("lora", "poly"))["notes"]
    assert "not shown to be superior" in said[0] and len(said) == 2
    with pytest.raises(InputError, match="nobody"):
        evaluate.report(runs, tmp_path / "out", "lora", endpoint=("nobody", "poly"))
    with pytest.raises(InputError, match="rival"):
        evaluate.report(runs, tmp_path / "out", "lora", endpoint=("poly",))
    both = evaluate.report(runs, tmp_path / "out", "lora", endpoint=("poly", "lora", "poly"))["notes"]
    assert [note.split(":")[1].split()[-1] for note in both if note.startswith("pass@5")] == ["lora", "poly"]


def test_the_limit_stands_beside_the_arms(runs, tmp_path):
    summary = evaluate.report(runs, tmp_path / "out", "lora-grpo")
    limit = summary["limits"]["5"]
    assert limit["independent"] == pytest.approx(attainable((0.5, 0.3, 0.2), 5))
    assert limit["independent"] < limit["joint"] == pytest.approx(1)
    for arm in summary["arms"].values():
        valid = arm["metrics"]["valid"]["mean"]
        assert arm["limits"]["5"] == pytest.approx(attainable((0.5, 0.3, 0.2), 5, valid))
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "share of limit(1) @5" in text and "Coverage" in text
    for k in (5, 10):                        # each arm's dotted line ends at the limit at its own validity, above the arm
        page = (tmp_path / "out" / f"pass1_pass{k}.svg").read_text()
        lines = re.findall(r'stroke-dasharray="1 4" points="[\d.]+,([\d.]+) [\d.]+,([\d.]+)"', page)
        grid = re.findall(r'x="56.0" y="([\d.]+)"[^>]*>([\d.]+)<', page)
        (y0, v0), (y1, v1) = [(float(y) - 4, float(v)) for y, v in (grid[0], grid[-1])]
        value = lambda y: v0 + (float(y) - y0) * (v1 - v0) / (y1 - y0)
        assert len(lines) == len(summary["arms"])
        for (low, high), arm in zip(lines, summary["arms"].values()):
            assert value(low) == pytest.approx(arm["metrics"][f"pass@{k}"]["mean"], abs=0.002)
            assert value(high) == pytest.approx(arm["limits"][str(k)], abs=0.002)


def test_a_report_links_the_pictures_that_it_has(runs, tmp_path):
    for ks in ((1, 2, 3, 5, 10), (1, 5), (2, 3)):
        out = tmp_path / str(len(ks)) / str(ks[0])
        evaluate.report(runs, out, ks=ks)
        linked = set(re.findall(r"\]\(([\w.]+)\)", (out / "report.md").read_text()))
        assert linked == {path.name for path in out.glob("*.svg")} and "pass_at_k.svg" in linked


def plain_run(folder, seed, arm, passed, scale):
    """A run in a domain without voices."""
    run = Path(write_run(folder, seed, arm, lambda i: 1))
    path = run / "evaluation.json"
    value = json.loads(path.read_text())
    for r in value["records"]:
        del r["voices"], r["readers"]
        r["passed"] = [True] * passed + [False] * (12 - passed)
    path.write_text(json.dumps(value | {"scale": scale}))
    return str(run)


def test_a_pass_that_is_no_feat_is_refused(tmp_path, capsys):
    """A LoRA of 3 steps had Pass@10 1.00: passing must be rare for a reply to another post, and the base
    must leave room."""
    good = {"people": 0.6, "shuffled": 0.05, "truncated": 0.3, "threshold": 0.4, "interval": [0.37, 0.4567]}
    runs = [plain_run(tmp_path / "base", 0, "base", 1, good), plain_run(tmp_path / "b", 0, "poly", 3, good)]
    summary = evaluate.report(runs, tmp_path / "out", "base")
    text = (tmp_path / "out" / "report.txt").read_text()
    assert summary["refused"] is None and "pass@5" in text and "a shuffled one 5%" in text
    assert "the bar is a reward of 0.400, 95% interval by intents 0.370 to 0.457" in text
    assert "a held-out human one 60%" in text and "Drafts that pass" in text and "readers" not in text
    assert "(of replies, this share passes" in (tmp_path / "out" / "report.md").read_text().partition("| arm")[0]
    for name, scale, passed in (("easy", good | {"shuffled": 0.4}, 1), ("full", good, 9)):
        runs = [plain_run(tmp_path / f"{name}0", 0, "base", passed, scale),
                plain_run(tmp_path / f"{name}1", 0, "poly", 10, scale)]
        summary = evaluate.report(runs, tmp_path / name, "base", endpoint=("poly", "base"))
        text = (tmp_path / name / "report.txt").read_text()
        assert summary["refused"] in text and "pass@5" not in text.replace("Pass@", "")
        assert list(summary["differences"]["poly"]) == ["valid"] and "could see" not in text
        assert all(row["mean"] is None for n, row in summary["arms"]["poly"]["metrics"].items()
                   if n.partition("@")[0] in ("pass", "longest", "pick_random", "pick_reward"))
        assert summary["arms"]["poly"]["metrics"]["pass@5"]["mean"] is None
        ElementTree.parse(tmp_path / name / "pass_at_k.svg")
        summary = evaluate.report(runs, tmp_path / name, "base", endpoint=("poly", "base"))
        assert set(summary["differences"]["poly"]) == {"valid"}                # nor by the back door
        assert not any("pass@" in note for note in summary["notes"])
        picks = [n for n in summary["arms"]["poly"]["metrics"] if n.startswith("pick_")]
        assert picks and all(summary["arms"]["poly"]["metrics"][n]["mean"] is None for n in picks)


def test_equal_adapters_and_warnings_are_named(tmp_path):
    """The polychromic and the GRPO arm once ended with LoRA's own adapter, and no word about it."""
    runs = [write_run(tmp_path / arm, 0, arm, lambda i: 3, settings={"adapter": "same"})
            for arm in ("lora", "poly")]
    log = tmp_path / "poly" / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"event": "end", "warnings": ["gated_D was 0"]}) + "\n")
    evaluate.report(runs, tmp_path / "out")
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "lora (seed 0), poly (seed 0) are equal, bit for bit" in text and "poly: gated_D was 0" in text


def test_a_knob_without_effect_is_named_and_only_what_was_measured_again_may_differ(tmp_path):
    """poly@0.1 and poly@3 with one adapter between them were taken for one run at two temperatures, and so was an
    arm trained as x@1 but measured at another temperature than the rest."""
    run = lambda arm, heat=1.0, of=None, **own: write_run(
        tmp_path / f"{arm}-{heat}", 0, arm, lambda i: 3, of=of, settings={"temperature": heat} | own)
    again = run("poly@0.1@0.5", 0.5, of="poly@0.1", adapter="same")
    one = run("poly@0.1", adapter="same")
    evaluate.report([one, again], tmp_path / "out")
    assert "equal, bit for bit" not in (tmp_path / "out" / "report.txt").read_text()
    evaluate.report([one, again, run("poly@3", adapter="same")], tmp_path / "other")
    assert "poly@0.1 (seed 0), poly@3 (seed 0) are equal, bit for bit" in (tmp_path / "other" / "report.txt").read_text()
    for pair in ([one, run("x@1", 0.5)], [run("x@2", 0.5), run("y", 1.0)]):
        with pytest.raises(evaluate.InputError, match="differ in temperature"):
            evaluate.report(pair, tmp_path / "no")


def test_arms_are_paired_by_seed_whatever_their_order(tmp_path):
    """Paired by place, arms whose seeds differ or stand in another order would be compared across posts and seeds."""
    right = {3: 2, 5: 8, 7: 5}
    runs = [write_run(tmp_path / f"a{seed}", seed, "a", lambda i, seed=seed: right[seed] + 1) for seed in (5, 3)]
    runs += [write_run(tmp_path / f"b{seed}", seed, "b", lambda i, seed=seed: right[seed]) for seed in (3, 7, 5)]
    arms = report.group_runs(runs, (1, 5))
    for one in (arms["a"], arms["a"][::-1]):
        for other in (arms["b"], arms["b"][::-1]):
            row = report.paired(one, other, "valid")
            assert row["seeds"] == 2 and row["mean"] == pytest.approx(1 / 12)
            assert row["low"] == pytest.approx(row["high"])                    # every seed and post differs by one draft
    assert report.paired(arms["a"], [run for run in arms["b"] if run["seed"] == 7], "valid") is None


def test_the_primary_endpoint_needs_the_interval_not_the_mean(tmp_path):
    """An arm whose mean is above the other's by chance alone is not shown to be superior."""
    def compared(name, rights):
        runs = []
        for arm, of in rights.items():
            runs += [write_run(tmp_path / f"{name}-{arm}{seed}", seed, arm, lambda i, c=c: c) for seed, c in enumerate(of)]
        arms = report.group_runs(runs, (1, 5, 10))
        return report.primary(arms, "a", "b"), {k: report.paired(arms["a"], arms["b"], f"pass@{k}") for k in (1, 5, 10)}
    notes, rows = compared("chance", {"a": (1, 6, 3), "b": (3, 2, 1)})
    assert rows[5]["mean"] > 0.03 and rows[5]["low"] < 0
    assert len(notes) == 2 and notes[0].startswith("pass@5: a is not shown to be superior to b") and "not tested" in notes[1]
    notes, rows = compared("clear", {"a": (3, 4, 3), "b": (1, 1, 1)})
    assert all(row["low"] > 0 for row in rows.values()) and "not shown" not in " ".join(notes)
    assert [note.split(":")[0] for note in notes] == ["pass@5", "pass@1", "pass@10"]
    assert "a is not inferior to b" in notes[1] and "margin 0.02" in notes[1]


def test_a_path_through_training_ends_with_the_whole_run(tmp_path):
    """grpo itself, of 120 steps, was drawn before its stops at 20 and 80; a weight's zero does stand first."""
    arms = [("grpo", 120), ("grpo@80", 80), ("grpo@20", 20), ("poly", 40), ("poly@1", 40)]
    summary = evaluate.report([write_run(tmp_path / arm, 0, arm, lambda i: 3, steps=n) for arm, n in arms], tmp_path / "out")
    assert page.curves_of({arm: arm for arm in summary["arms"]}, summary) == {
        "grpo": ["grpo@20", "grpo@80", "grpo"], "poly": ["poly", "poly@1"]}


def test_a_sheet_holds_no_formulas(tmp_path):
    run = write_run(tmp_path / "x", 0, "=cmd|' /C calc'!A0", lambda i: 3)
    evaluate.report([run], tmp_path / "out")
    sheet = (tmp_path / "out" / "report.csv").read_text().splitlines()
    assert len(sheet) > 10 and all(line.startswith('"\'=cmd') for line in sheet[1:])
    risky = ["=1", "+1", "-1", "@a", " =1", "\t=1", "\r\n=1", "\u3000=1", "\uff1d1", "=\"\"", "\u202e=1"]
    cells = [csv_cell(text) for text in risky]
    assert all(c[1] in "'\ufffd" for c in cells) and csv_cell('a "b", =c') == '"a ""b"", =c"'


def test_names_in_a_record_forge_no_cell_no_line_and_no_direction(tmp_path, capsys):
    """Scores and settings are named by the file: a name with a line end began a row of the sheet, with a formula."""
    nasty = "a\n=cmd|x,\u202e\x1b[31m<u>|\u2067"
    for i, arm in enumerate(("one", "two")):
        write_run(tmp_path / arm, 0, arm, lambda post: 3 + i, settings={"embedder": nasty, nasty: 1}, rewards=[0.5] * 12,
                  scores={nasty: [0.1] * 12, ",=1": [0.2] * 12})
    assert evaluate.main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "out")]) == 0
    rows = list(csv.reader((tmp_path / "out" / "report.csv").read_text().splitlines()))
    assert {len(row) for row in rows} == {6} and any("=cmd" in row[1] for row in rows)
    assert not any(cell.startswith(("=", "+", "@")) for row in rows for cell in row)
    shown = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir() if path.suffix != ".json"}
    assert len(shown) > 5 and "<u>" not in shown["report.html"]
    for name, text in (shown | {"the screen": capsys.readouterr().out}).items():
        assert not set("\u202e\x1b\u2067") & set(text), name


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    golden = {name: nltk_self_bleu(texts) for name, texts in DRAFTS.items()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


def likeness_of_words(seed):
    """A reward: how near a text is to the nearest of a post's replies, drawn once for each pair of texts, and larger
    where both begin with the same word."""
    rng, known = random.Random(seed), {}

    def one(text, reply):
        return known.setdefault((text, reply), rng.random() + (text.split()[0] == reply.split()[0]))

    def reward(posts, drafts, streams):
        return [[max(one(text, reply) for reply in post.replies) for text in texts] for post, texts in zip(posts, drafts)]
    return reward


def value(reward, post, text, replies=None):
    """What one text earns as a draft to a post, perhaps to the post with other replies; as it is kept, in fp32."""
    post = dataclasses.replace(post, replies=tuple(replies or post.replies))
    return float(np.float32(reward([post], [[text]], [0])[0][0]))


def test_a_draft_passes_above_19_of_20_replies_to_another_post():
    """The bar is the 95% quantile over all pairs of a post and a reply to another one, each compared with all replies
    of the post: of one random pairing of first replies it moved by .04 and more with the pairing."""
    posts = [Post(f"{i}", f"post {i}", (f"{i} first", f"{i} second", f"{i} third")) for i in range(20)]
    reward = likeness_of_words(3)
    threshold, scale = evaluate.passing(SimpleNamespace(posts=posts, args=SimpleNamespace(reward="auto")), reward)
    pairs = sorted(value(reward, post, text) for post in posts for other in posts if other is not post
                   for text in other.replies)
    assert scale["pairs"] == len(pairs) == 20 * 19 * 3
    assert threshold == scale["threshold"] == pairs[math.ceil(0.95 * (len(pairs) - 1))]
    assert scale["interval"][0] <= threshold <= scale["interval"][1] != scale["interval"][0]


def test_a_draft_at_the_bar_does_not_pass(parts):
    """The bar is a reply's own reward: the replies that set it are not above it, nor is a draft that says the same."""
    s = session(parts, grpo.parser(), ["--start", "-", "--k", "4", "--temperature", "1"], stage="measure")
    s.args.decoder, s.agreement, s.judge, s.selector = "sampling", None, None, None
    s.domain, s.threshold = data.Replies(s.posts), 0.5
    s.reward = lambda posts, drafts, streams: [[0.25, 0.5, np.nextafter(0.5, 1), 1.0] for _ in posts]
    _, samples, texts = s.sample_drafts([Visit(i, 0) for i in (0, 1)], 0, 4)
    for one in evaluate.make_records(s, [0, 1], samples, texts):
        assert one["passed"] == [False, False, True, True] and one["rewards"][1] == 0.5


def test_the_base_s_likelihood_is_the_base_s(parts):
    s = session(parts, grpo.parser(), ["--start", "-", "--k", "3", "--temperature", "1"], stage="measure")
    s.args.decoder, s.agreement, s.judge, s.selector = "sampling", None, None, None
    visits = [Visit(i, 0) for i in (0, 4)]
    prompts, samples, texts = s.sample_drafts(visits, 0, 3)
    records = evaluate.make_records(s, [0, 4], samples, texts)
    own, _ = draft_scores(s, list(zip(prompts, samples.tokens)))
    drop_lora(s.model)
    bare, _ = draft_scores(s, list(zip(prompts, samples.tokens)))
    for one, policy, base in zip(records, own, bare):
        assert one["logprobs"] == pytest.approx(policy, abs=1e-3) and one["base_logprobs"] == pytest.approx(base, abs=1e-3)
        assert max(abs(a - b) for a, b in zip(policy, base)) > 0.1


def test_every_reply_is_held_out_once():
    """The first replies alone said that people pass 71% of the time where all five places together say 52%."""
    posts = [Post(f"{i}", f"post {i}", (f"{i} first", f"{i} second of it", f"x{i} third")) for i in range(30)]
    reward = likeness_of_words(4)
    threshold, scale = evaluate.passing(SimpleNamespace(posts=posts, args=SimpleNamespace(reward="auto")), reward)
    held, cut = [], []
    for post in posts:
        for text in post.replies:
            rest = [reply for reply in post.replies if reply != text]
            held.append(value(reward, post, text, rest) > threshold)
            cut.append(value(reward, post, " ".join(text.split()[:(len(text.split()) + 1) // 2]), rest) > threshold)
    assert scale["people"] == sum(held) / 90 and scale["truncated"] == sum(cut) / 90
    assert 0.5 < scale["people"] < 0.8 and sum(held[::3]) / 30 > 0.9           # the first replies alone say otherwise


def test_a_shuffled_reply_is_judged_by_a_bar_that_it_did_not_set():
    posts = [Post(f"{i}", f"post {i}", (f"{i} first", f"{i} second")) for i in range(12)]
    reward = likeness_of_words(5)
    session = SimpleNamespace(posts=posts, args=SimpleNamespace(reward="auto"))
    scale = evaluate.passing(session, reward)[1]
    halves = [[value(reward, post, text) for post in posts[half::2] for other in posts[half::2] if other is not post
               for text in other.replies] for half in (0, 1)]
    bars = [np.quantile(half, 0.95, method="higher") for half in halves]
    assert scale["shuffled"] == pytest.approx(((np.array(halves[0]) > bars[1]).mean()
                                               + (np.array(halves[1]) > bars[0]).mean()) / 2)
    assert scale["shuffled"] != (np.array(halves[0]) > bars[0]).mean()
    session.posts = posts[:3]                                                  # too few for a half without the other
    assert evaluate.passing(session, reward)[1]["shuffled"] is None
    session.posts = posts[:1]
    with pytest.raises(InputError, match="one post with replies"):
        evaluate.passing(session, reward)


def test_a_stranger_s_reply_is_to_another_scene():
    """Posts of one scene share their replies: drawn from there, a reply to another post passes, and the bar rises."""
    posts = [Post(f"{i}", f"post {i}", (f"first of {i % 3}", f"second of {i % 3}"), intent=str(i % 3)) for i in range(12)]
    seen = []

    def reward(posts, drafts, streams):
        seen.extend((post.intent, text.split()[-1]) for post, texts in zip(posts, drafts) for text in texts)
        return [[1.0 for _ in texts] for texts in drafts]
    session = SimpleNamespace(posts=posts, args=SimpleNamespace(reward="auto"))
    assert evaluate.passing(session, reward)[1]["pairs"] == 12 * 8 * 2
    assert all(a != b for a, b in seen[:192]) and all(b in (a, "of") for a, b in seen[192:]) and len(seen) == 192 + 48
    session.posts = [dataclasses.replace(post, intent="0") for post in posts]  # one scene: another post's, as it may be
    assert evaluate.passing(session, reward)[1]["pairs"] == 12 * 11 * 2
    session.posts = [dataclasses.replace(post, intent="" if i % 2 else "even") for i, post in enumerate(posts)]
    assert evaluate.passing(session, reward)[1]["pairs"] == 6 * 6 * 2 + 6 * 11 * 2


def test_of_too_many_pairs_every_post_meets_as_many(monkeypatch):
    posts = [Post(f"{i}", f"post {i}", (f"{i} first", f"{i} second"), intent=str(i % 4)) for i in range(12)]
    met = []

    def reward(posts, drafts, streams):
        met.append((posts[0].id, tuple(drafts[0])))
        return [[1.0 for _ in texts] for texts in drafts]
    monkeypatch.setattr(evaluate, "MOST_ASKED", 60)
    values, first, second = evaluate.stranger_pairs(posts, reward)
    assert len(values) == 60 and (np.bincount(first) == 15).all() and (first != second).all()
    for name, texts in met:
        assert len(set(texts)) == 5 and all(int(text.split()[0]) % 4 != int(name) % 4 for text in texts)
    assert len({texts for _, texts in met}) == 12                              # not the same five for all


def test_rows_of_a_reward_are_what_its_calls_say():
    """All pairs at once, each text embedded once, must earn what a call would give them."""
    posts = [Post(f"{i}", f"a post of {i} things", tuple(f"{i} reply {j}" for j in range(2 + i % 2))) for i in range(5)]
    texts = ["one reply", "two things", "a post of 3 things", "3 reply 1", ""]
    vectors = {}

    def embed(groups):
        found = [[vectors.setdefault(t, torch.nn.functional.normalize(torch.randn(7), dim=0)) for t in group] for group in groups]
        return torch.stack([torch.stack(group) for group in found])
    for reward in (evaluate.AgreementReward(embed), RelevanceReward(embed, data.Replies(posts))):
        called = reward(posts[:1], [texts])[0], reward(posts[3:4], [texts])[0]
        rows = list(reward.rows(posts, texts))
        assert len(rows) == 5 and len(set(called[0])) == 5 and all(row.shape == (5,) for row in rows)
        assert rows[0].tolist() == pytest.approx(called[0], abs=1e-6)
        assert rows[3].tolist() == pytest.approx(called[1], abs=1e-6)


def test_the_error_of_a_share_of_pairs_is_the_jackknife_s():
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 7, 200), rng.integers(0, 7, 200)           # pairs within a cluster, too
    values = rng.random(200)
    means = [values[(first != c) & (second != c)].mean() for c in range(7)]
    want = math.sqrt(6 / 7 * sum((m - np.mean(means)) ** 2 for m in means))
    assert metrics.share_error(values, first, second) == pytest.approx(want, rel=1e-12)
    keep = (first != 3) & (second != 3)                                        # a number that no cluster has
    means.pop(3)
    without = [values[keep & (first != c) & (second != c)].mean() for c in range(7) if c != 3]
    want = math.sqrt(5 / 6 * sum((m - np.mean(without)) ** 2 for m in without))
    assert metrics.share_error(values[keep], first[keep], second[keep]) == pytest.approx(want, rel=1e-12)
    assert metrics.share_error(np.ones(4), np.array([0, 1, 0, 1]), np.array([1, 0, 1, 0])) is None


def test_the_interval_of_the_bar_holds_the_true_quantile():
    """Of 300 draws of 30 posts whose replies differ in how near they are to any post: a nominal 95%."""
    rng, covered = np.random.default_rng(2), 0
    first, second = (~np.eye(30, dtype=bool)).nonzero()
    for _ in range(300):
        values = 0.6 * rng.standard_normal(30)[first] + 0.6 * rng.standard_normal(30)[second]
        values += math.sqrt(1 - 2 * 0.36) * rng.standard_normal(len(first))    # together of variance 1
        q, (low, high) = metrics.pair_quantile(values, first, second)
        assert low <= q <= high and q in values
        covered += low <= 1.6448536 <= high
    assert 0.9 <= covered / 300 <= 0.99, covered
    assert metrics.pair_quantile(np.arange(3.0), np.array([0, 0, 1]), np.array([1, 1, 0])) == (2.0, None)


def test_a_reply_that_is_compared_with_itself_is_no_measure_of_people():
    """With one reply a post agreement finds it in itself: 100% of people would pass, and nothing would be said by it."""
    posts = [Post(f"{i}", f"post {i}", (f"{i} only",)) for i in range(12)]
    session = SimpleNamespace(posts=posts, args=SimpleNamespace(reward="agreement"))
    draw = torch.Generator().manual_seed(1)
    known = {}
    vector = lambda text: known.setdefault(text, torch.nn.functional.normalize(torch.randn(9, generator=draw), dim=0))
    embed = lambda groups: torch.stack([torch.stack([vector(t) for t in texts]) for texts in groups])
    threshold, scale = evaluate.passing(session, evaluate.AgreementReward(embed))
    assert scale["people"] is None and scale["truncated"] is None and 0 <= scale["shuffled"] < 0.5
    relevance = lambda posts, drafts, streams: [[float(p.id == t.split()[0]) for t in ts] for p, ts in zip(posts, drafts)]
    assert evaluate.passing(session, relevance)[1]["people"] == 1              # compared with the post, which is another text
