"""Tests of metrics.py: by hand, by enumeration over subsets, against nltk.

`PYTHONPATH=.:tests python tests/test_metrics.py` (with nltk) writes golden/self_bleu.json again.
"""

import itertools
import json
import math
import random
from collections import Counter

import numpy as np
import pytest

from helpers import READERS, ROOT, record
from methods.metrics import separation
from metrics import distinct_n, pass_at_k, post_metrics, self_bleu, vendi_score
from report.stats import pareto_front
from support.words import words


GOLDEN = ROOT / "tests" / "golden" / "self_bleu.json"

DRAFTS = {
    "replies": ["That is great news, well done!", "Well done, that is great.",
                "Oh no, not again...",
                "that IS great news", "Great news! Great news! Great news!"],
    "identical": ["see you at the park tomorrow"] * 4,
    "nothing shared": ["alpha beta gamma", "delta epsilon zeta", "eta theta iota"],
    "one word": ["yes", "yes", "no"],
    "an empty draft": ["", "thanks a lot for asking", "thanks for asking"],
    "repeats are clipped": ["the the the the the", "the cat sat", "the the end"],
    "short beside long": ["good luck", "good luck with the new job and the long way",
                          "good luck, friend"],
    "two lengths equally near": ["a b c d e", "a b c d", "a b c d e f"],
}


def nltk_self_bleu(texts, max_n=4):
    """The direct form: nltk's sentence BLEU of each draft with all the others as references."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    completions, smooth = [words(text) for text in texts], SmoothingFunction(epsilon=0.1).method1
    scores = []
    for i, completion in enumerate(completions):
        others = completions[:i] + completions[i + 1:]
        scores.append(sentence_bleu(others, completion, (1 / max_n,) * max_n, smooth))
    return sum(scores) / len(scores)


def slow_self_bleu(texts, max_n=4):
    """The definition, with every reference's n-grams counted again for every draft."""
    completions, scores = [words(text) for text in texts], []
    for i, completion in enumerate(completions):
        others, product = completions[:i] + completions[i + 1:], 1.0
        for n in range(1, max_n + 1):
            grams = Counter(tuple(completion[j:j + n]) for j in range(len(completion) - n + 1))
            hits = sum(min(times,
                           max(sum(tuple(other[j:j + n]) == gram for j in range(len(other) - n + 1))
                               for other in others)) for gram, times in grams.items())
            if n == 1 and hits == 0:
                product = 0.0
                break
            product *= ((hits or 0.1) / max(1, sum(grams.values()))) ** (1 / max_n)
        closest = min((len(other) for other in others),
                      key=lambda length: (abs(length - len(completion)), length))
        scores.append(product and product * min(1.0, math.exp(1 - closest / len(completion))))
    return sum(scores) / len(scores)


def random_drafts(seed):
    rng, tokens = random.Random(seed), "a b c d e f , !".split()
    return [" ".join(rng.choice(tokens) for _ in range(rng.randint(0, 9)))
            for _ in range(6)] + ["a b"]


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
            completions = [True] * c + [False] * (n - c)
            subsets = [any(subset) for subset in itertools.combinations(completions, k)]
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


@pytest.mark.peers
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


def test_separation_is_the_share_of_cross_style_pairs_farther_apart():
    """D that does not see voices cannot make them; ties count half, and a kind that is missing
    is no number."""
    rng = np.random.default_rng(3)
    distances, answers = rng.integers(0, 4, (9, 9)) / 4, list("aabbbcaca")
    pairs = {True: [], False: []}
    for i, j in itertools.combinations(range(9), 2):
        pairs[answers[i] == answers[j]].append(distances[i, j])
    won = [(far > near) + (far == near) / 2 for far in pairs[False] for near in pairs[True]]
    assert separation(distances, answers) == pytest.approx(sum(won) / len(won), abs=1e-12)
    assert separation(distances, list("aaaaaaaaa")) is separation(distances,
                                                                  list("abcdefghi")) is None
    assert separation(np.zeros((0, 0)), []) is None
    line = np.abs(np.subtract.outer([0, 1, 9, 10], [0, 1, 9, 10]))
    assert (separation(line, list("aabb")), separation(line, list("abab"))) == (1, 0.25)


def test_vendi_refuses_rows_that_are_not_unit_vectors():
    """A kernel without ones on its diagonal has another trace than 1, and the score would mean
    nothing."""
    for length in (0.99, 1.01, 1.2, 0.0):
        with pytest.raises(ValueError, match="unit length"):
            vendi_score(np.eye(3) * np.array([[1.0], [1.0], [length]]))
    # bf16 rounding is none
    assert vendi_score(np.eye(3) * (1 - 1e-4)) == pytest.approx(3, abs=1e-2)
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


def test_post_metrics_with_styles_by_enumeration():
    # a voice named twice is still one draft
    styles = [["warm"], [], ["warm", "dry"], [], ["dry", "dry"], []]
    got = post_metrics(record(styles, n=6, rewards=[1, 0, 2.5, 0, 1, 0]), ks=(1, 2, 5))
    for k in (1, 2, 5):
        subsets = list(itertools.combinations(styles, k))
        pleased = sum(share * sum(any(style in right for right in subset) for subset in subsets)
                      for style, share in READERS.items())
        covered = sum(sum(any(style in right for right in subset) for subset in subsets)
                      for style in READERS) / 3
        assert got[f"pass@{k}"] == pytest.approx(pleased / len(subsets), abs=1e-12)
        assert got[f"coverage@{k}"] == pytest.approx(covered / len(subsets), abs=1e-12)
        # all drafts are equally long: the first of a subset is picked
        if k > 1:
            longest = sum(sum(READERS[v] for v in set(subset[0])) for subset in subsets)
            assert got[f"longest@{k}"] == pytest.approx(longest / len(subsets), abs=1e-12)
    assert (got["valid"], got["stances"], got["reward"]) == (0.5, 2.0, 0.75)
    assert got["max@5"] == pytest.approx((5 * 2.5 + 1) / 6)
    assert (got["truncated"], got["words"], got["semantic"],
            got["vendi"]) == (1 / 6, 4.0, 0.25, 2.0)
    assert got["distinct-1"] == 9 / 24 and "self-bleu" in got and "distinct-2" in got


def test_post_metrics_without_styles():
    plain = record(passed=[True, False, False, False], rewards=[0.9, 0.1, 0.2, 0.4])
    del plain["voices"]
    del plain["readers"]
    got = post_metrics(plain, ks=(1, 3))
    assert (got["pass@1"] == 0.25 and got["pass@3"] == 0.75 and got["valid"] == 0.25
            and "stances" not in got)


def test_post_metrics_omits_what_the_completions_cannot_show():
    empty = post_metrics(record(drafts=["", "", " ", ""]), ks=(1,))
    assert not {"distinct-1", "distinct-2", "self-bleu", "ead"} & set(empty) and empty["words"] == 0
    short = post_metrics(record(drafts=["yes", "no", "", "yes"]), ks=(1,))
    assert short["distinct-1"] == 2 / 3 and "distinct-2" not in short


@pytest.mark.parametrize("changed, ks", [
    ({}, (5,)), ({"readers": None}, (1,)), ({"readers": {"warm": 1.0}}, (1,)),
    ({"readers": READERS | {"dry": 0.9}}, (1,)), ({"rewards": [1.0]}, (1,)),
    ({"semantic": None}, (1,)),
    ({"finished": []}, (1,)), ({"rewards": [math.inf, 0, 0, 0]}, (1,)),
    ({"vendi": math.nan}, (1,))])
def test_post_metrics_refuses(changed, ks):
    with pytest.raises(ValueError):
        post_metrics(record(**changed), ks)


def test_words_of_scripts_without_spaces_are_characters():
    """A Thai or Chinese reply would be one word, and every two of them wholly different."""
    assert words("don't PANIC, 42!") == ["don't", "panic", ",", "42", "!"]
    assert words("今天很好") == list("今天很好") and len(words("สวัสดี")) > 3
    assert words("👍 ok 👍") == ["👍", "ok", "👍"] and words("مرحبا بك") == ["مرحبا", "بك"]
    assert words("") == words(" \n") == []


ODD = {"empty": ["", "", ""], "one word": ["yes", "no", "yes"], "all equal": ["well done, you"] * 3,
       "emoji": ["🎉🎉 👍", "👍", "👩‍👩‍👧 🎉"], "right to left": ["مرحبا بك", "שלום לך", "مرحبا"],
       "no spaces": ["今天很好", "今天不好", "สวัสดี"], "one draft": ["hello there"],
       "a very long word": ["x" * 5000, "y" * 5000]}


@pytest.mark.parametrize("name", ODD)
def test_metrics_of_odd_completions_equal_brute_force_or_are_absent(name):
    """Never 0 for what has no value: each n-gram counted again here, self-BLEU by its
    definition."""
    completions = ODD[name]
    n, tokens = len(completions), [words(d) for d in completions]
    row = record([["warm"]] * n, n=n, drafts=completions, logprobs=[-1.0] * n)
    got = post_metrics(row, ks=(1,))
    for size in (1, 2):
        grams = [tuple(t[i:i + size]) for t in tokens for i in range(len(t) - size + 1)]
        assert got.get(f"distinct-{size}") == (len(set(grams)) / len(grams) if grams else None)
    if n > 1 and any(tokens):
        assert got["self-bleu"] == pytest.approx(slow_self_bleu(completions), abs=1e-12)
    else:
        assert "self-bleu" not in got
    assert ("ead" in got) == any(tokens)
    assert got["words"] == sum(map(len, tokens)) / n and got["pass@1"] == got["valid"] * 0.5 == 0.5
    assert got["duplicates"] == pytest.approx(
        {"empty": 2 / 3, "one word": 1 / 3, "all equal": 2 / 3}.get(name, 0))


def test_recall_is_the_share_of_human_replies_matched_by_some_completion():
    agrees = [[0], [], [0, 2], [1, 1]]
    got = post_metrics(record(agrees=agrees, people=4), ks=(1, 2, 4))
    for k in (1, 2, 4):
        shares = [len({r for some in subset for r in some}) / 4
                  for subset in itertools.combinations(agrees, k)]
        assert got[f"recall@{k}"] == pytest.approx(sum(shares) / len(shares), abs=1e-12)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    golden = {name: nltk_self_bleu(texts) for name, texts in DRAFTS.items()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
