"""Tests of methods/diversities.py."""

import math

import pytest
import torch

import polylora
import trainer
from helpers import (
    QUALITY, SPAN, all_tuples, drafts_of, exact_gradient, expected_estimate, features_of, gap,
    gradient, in_double, policy, session, styles_by_length,
)
from methods import diversities
from polylora import measure_diversity
from support.registry import DIVERSITIES


# ---- Expected gradients --------------------------------------------------------------------------

@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("name", DIVERSITIES)
def test_each_diversity_has_its_exact_gradient(monkeypatch, name, k, gated):
    """E[sum_i a_i grad log pi(y_i)] = grad E[D], exactly, whatever D is."""
    in_double(monkeypatch)
    theta, drawn = policy(4, seed=k), all_tuples(4, k)
    value, advantages, _ = measure_diversity(name,
                                             features_of(drawn, quality=QUALITY if gated else None))
    want = exact_gradient(theta, drawn, value)
    # without a gate it is 1 for any drafts
    flat = name == "floor" and not gated
    assert (float(want.abs().max()) > 0.005) != flat
    # words are counted in fp32
    assert gap(expected_estimate(theta, drawn, advantages), want) < 1e-7
    # Less than without the baseline: what a draft adds is not the whole D. Of three drafts, two
    # may be much farther apart than each is from the third.
    if k > 2 and (name, k) != ("nearest", 3):
        assert float(advantages.abs().sum()) < float(value.abs().sum() * k)


# ---- Diversities by hand -------------------------------------------------------------------------

def test_two_completions_in_three_dimensions():
    """The number of drafts, not the dimension, is what counts."""
    two = drafts_of([[1.0, 0, 0], [0, 1, 0]])
    assert measure_diversity("vendi", two)[0].item() == pytest.approx(2, abs=1e-5)
    assert measure_diversity("dpp", two)[0].item() == pytest.approx(2 * math.log(2), abs=1e-5)


@pytest.mark.parametrize("name, span, value, gated", [
    ("dpp", "one", math.log(4), math.log(1 + 0.25 + 0.04 + 1)),
    ("dpp", "three", 3 * math.log(2), math.log(1.25 * 1.04 * 2)),
    ("dpp", "two", math.log(3 * 2), math.log((1 + 0.25 + 0.04) * 2)),
    ("vendi", "one", 1, 1.7 / 3), ("vendi", "three", 3, 1.7),
    ("vendi", "two", 3 / 2 ** (2 / 3), 3 / 2 ** (2 / 3) * 1.7 / 3),
    ("cosine", "two", 2 / 3, (0.5 + 0.2) / 3)])
def test_diversities_of_embeddings_by_hand(name, span, value, gated):
    """Three drafts that are one, two or three directions; qualities 1/2, 1/5 and 1."""
    assert measure_diversity(name,
                             drafts_of(SPAN[span]))[0].item() == pytest.approx(value, abs=1e-5)
    q = [0.5, 0.2, 1.0]
    assert measure_diversity(name,
                             drafts_of(SPAN[span], q))[0].item() == pytest.approx(gated, abs=1e-5)


def test_distinct_answers_by_hand():
    """Two answers among five drafts, one of them without: 2/5. Gated, an answer counts by its
    drafts' mean."""
    classes = [0, 1, 0, -1, 0]
    value, a, _ = measure_diversity("distinct", drafts_of(classes=classes))
    assert value.item() == pytest.approx(2 / 5)
    assert a[0].tolist() == pytest.approx([2 / 5 - 2 / 4, 2 / 5 - 1 / 4, -0.1, -0.1, -0.1])
    q = [0.9, 0.4, 0.3, 1.0, 0.6]
    assert measure_diversity("distinct",
                             drafts_of(quality=q,
                                       classes=classes))[0].item() == pytest.approx((0.6 + 0.4) / 5)


@pytest.mark.parametrize("a, b, edits, shared, union", [
    ("the cat sat", "the cat sat", 0, 5, 5), ("the cat sat", "the dog sat", 1, 2, 8),
    ("a b", "b a", 2, 2, 4),
    ("a", "a b c", 2, 1, 5), ("", "x y", 2, 0, 3), ("", "", 0, 0, 0), ("a", "", 1, 0, 1),
    ("a b c d", "b c d a", 2, 6, 8)])
def test_distances_of_words_by_hand(a, b, edits, shared, union):
    """Edits of whole words over the longer text; words and word pairs that both have, over all."""
    longest = max(len(a.split()), len(b.split()), 1)
    for x, y in ((a, b), (b, a)):
        assert diversities.edit_distance(x.split(), y.split()) == edits / longest
        assert diversities.ngram_distance(x.split(),
                                          y.split()) == pytest.approx(1 - shared / union if union
                                                                      else 0)
    for name, value in (("levenshtein", edits / longest),
                        ("ngram", 1 - shared / union if union else 0)):
        # case and marks are no difference
        completions = drafts_of(texts=[f"{a.upper()}!", b])
        assert measure_diversity(name, completions)[0].item() == pytest.approx(value)


def test_a_gate_and_a_floor_hold_for_distances_of_words():
    completions = drafts_of(quality=[1.0, 0.5, 0.0], texts=["a", "b", "c"], floor=0.2)
    for name in ("levenshtein", "ngram"):
        assert measure_diversity(name, completions)[0].item() == pytest.approx(1.2 * 0.5 / 3)


# ---- Every line of the registers takes steps -----------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", DIVERSITIES)
def test_every_diversity_pushes_both_phases(parts, name):
    """Its part of the gradient alone: not zero, and another one for another D."""
    s = session(parts, polylora.parser(),
                ["sft", "--model", "-", "--batch", "4", "--draft-posts", "4", "--k", "3",
                 "--lambda", "1", "--diversity", name])
    s.domain.styles_of = styles_by_length(s.domain)
    s.gate = None
    # which is the quality's alone
    if name == "floor":
        s.gate = lambda features, *_: torch.tensor([[1 / (1 + len(t)) for t in ts]
                                                    for ts in features.texts])
    # words need none
    s.embedder = s.embedder if "embeddings" in DIVERSITIES[name].needs else None
    assert ("embeddings" in DIVERSITIES[name].needs) == (
            name in ("cosine", "dpp", "vendi", "nearest"))
    visits = [trainer.batch_visits(len(s.posts), 4, 0, 1)[i] for i in range(4)]
    s.model.eval()
    grads, tally = gradient(s, lambda tally: polylora.add_diversity(s, visits, 0, tally))
    assert (max(float(g.abs().max()) for g in grads.values()) > 0
            and tally.means(s.ranks, ["D"])["D"] > 0)


def test_the_nearest_distance_by_hand():
    """Cosines .6, 0 and .8 of three completions: nearest at .4, .2 and .2. A wrong one is near to
    nobody."""
    e = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]])
    assert float(diversities.nearest_distance(e)) == pytest.approx((0.4 + 0.2 + 0.2) / 3)
    right = torch.tensor([[1.0, 0.0, 1.0]])
    assert float(diversities.nearest_distance(e, right)) == pytest.approx(2 / 3)
    copies = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    # a copy of each of two: the mean distance stays above 0, the nearest sees the copies
    twice = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    assert float(diversities.nearest_distance(copies)) == pytest.approx(1 / 3)
    assert float(diversities.nearest_distance(twice)) == 0
    assert float(polylora.diversity(twice)) > 0.6
