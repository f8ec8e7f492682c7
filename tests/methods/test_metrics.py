"""Tests of methods/metrics.py."""

import itertools
import math

import numpy as np
import pytest

from helpers import READERS, record
from methods.metrics import max_at_k, pick_at_k
from metrics import expectation_adjusted_distinct
from methods import reward_model
from metrics import duplicate_rate, pass_at_k, post_metrics


def test_max_at_k_is_the_mean_maximum_over_all_subsets():
    rewards = [0.3, -1.0, 2.5, 0.3, 0.0, 1.25]
    for k in range(1, 7):
        best = [max(subset) for subset in itertools.combinations(rewards, k)]
        assert max_at_k(rewards, k) == pytest.approx(sum(best) / len(best), abs=1e-12)
    for c in range(7):
        assert max_at_k([0.0] * (6 - c) + [1.0] * c,
                        3) == pytest.approx(pass_at_k(6, c, 3), abs=1e-12)
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
        # an oracle
        assert pick_at_k(binary, binary, k) == pytest.approx(pass_at_k(5, 2, k))
    for wrong in (([1.0], [1.0], 2), ([1.0], [math.nan], 1), ([1.0, 0.0], [1.0], 1),
                  ([1.0], [1.0], 0)):
        with pytest.raises(ValueError):
            pick_at_k(*wrong)


def test_a_pick_of_one_is_no_pick():
    got = post_metrics(record([["warm"], [], ["dry"], []], scores={"judge": [0.1, 0.2, 0.3, 0.4]}),
                       ks=(1, 2))
    picks = {name for name in got if name.startswith(("longest@", "pick_"))}
    assert picks == {"longest@2", "pick_reward@2", "pick_random@2", "pick_judge@2"}


def test_ead_and_duplicates_by_hand():
    """Of three different words in four draws from ten, 10 (1 - .9^4) = 3.439 were to be
    expected."""
    assert expectation_adjusted_distinct(["a b", "a c"], 10) == pytest.approx(3 / 3.439)
    assert expectation_adjusted_distinct(["a"] * 50,
                                         10) < expectation_adjusted_distinct(["a"] * 2, 10)
    with pytest.raises(ValueError):
        expectation_adjusted_distinct(["", " "], 10)
    assert duplicate_rate(["Yes!", "yes", "no", "yes?"]) == 0.5 and duplicate_rate(["a", "b"]) == 0
    assert duplicate_rate(["", ""]) == 0.5


def test_likelihoods_picks_and_verdicts_by_hand():
    n, styles = 5, [["warm"], [], ["dry"], [], ["warm"]]
    changed = dict(logprobs=[-4, -2, -6, -8, -10], entropies=[2, 2, 2, 2, 2],
                   base_logprobs=[-8, -4, -6, -12, -10],
                   tokens=[2, 1, 3, 4, 10], scores={"model": [0, 0, 9, 0, 0]},
                   judge={"relevance": [0.25, 0.75],
                          "pairs": [[0.9, 0.8], [0.9, 0.2], [0.1, 0.3], [0.5, 0.5]]})
    got = post_metrics(record(styles, n=n, **changed), ks=(1, 5))
    assert (got["entropy"], got["logprob"],
            got["perplexity"]) == pytest.approx((0.5, -1.5, math.exp(2)))
    assert got["pick_likelihood@5"] == 0 and got["pick_model@5"] == 0.3
    assert (got["pick_random@5"] == pytest.approx(got["pass@1"]) and got["pick_reward@5"]
            == pytest.approx(1.3 / 3))
    assert (got["judge-relevance"], got["judge-wins"], got["judge-ties"]) == (0.5, 0.5, 0.5)
    for k in (2, 3, 4):                      # every k, and each selector by brute force
        made = post_metrics(record(styles, n=n, **changed), ks=(k,))
        worth = [sum(READERS[v] for v in set(right)) for right in styles]
        for name, scores in (("likelihood", changed["logprobs"]),
                             ("model", changed["scores"]["model"]), ("random", [0] * n)):
            taken = []
            for subset in itertools.combinations(range(n), k):
                top = [i for i in subset if scores[i] == max(scores[j] for j in subset)]
                taken.append(np.mean([worth[i] for i in top]))
            assert made[f"pick_{name}@{k}"] == pytest.approx(np.mean(taken)), (name, k)
    assert not {"pick_likelihood@5", "entropy",
                "judge-wins"} & set(post_metrics(record(n=4), ks=(1,)))
    for wrong in (dict(logprobs=[0.0]), dict(scores={"model": [1.0]}), dict(tokens=[])):
        with pytest.raises(ValueError, match="entries"):
            post_metrics(record(styles, n=n, **changed | wrong), ks=(1,))


# ---- Files with gaps -----------------------------------------------------------------------------

def test_a_pick_is_better_than_what_says_something_else(tmp_path):
    """The prompt keeps empty drafts beside a pick, which ended the training of a reward model;
    and drafts that say what the pick says were called worse than it."""
    path = tmp_path / "picks.jsonl"
    path.write_text('{"post": "Hi", "drafts": ["", "Yo!", "yo", "Hello", " "], "pick": 1}\n'
                    '{"post": "Hi", "drafts": ["Yo", "yo"], "pick": 0}\n')
    found = reward_model.load_preferences(path)
    assert [(p.post.replies, p.likes) for p in found] == [(("Yo!", "Hello"), [1, 0]),
                                                          (("Yo",), [1])]
    assert reward_model.usable(found, "auto", path) == ("likes", found[:1])
