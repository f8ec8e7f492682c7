"""Every line of the registers: objectives, diversities, SFT losses.

An objective that says what it maximises is checked by enumeration: over all tuples of a softmax policy with four
outcomes its expected policy gradient is its stated weight times autograd's gradient of that. The others are
compared with values worked out by hand, or with the paper's text in plain loops.
"""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import grpo
import model as model_py
import polylora
import rewards
from data import InputError
from decoders import DECODERS
from grpo import OBJECTIVES, Group, advantages_of, group_advantages
from model import pack, predicting_states
from polylora import DIVERSITIES, Drafts, measure
from test_polylora import (OUTCOMES, QUALITY, all_tuples, exact_gradient, expected_estimate, gap, gradient,
                           in_double, parts, policy, session)
from trainer import Ranks

RIGHT = torch.tensor([1.0, 0.0, 1.0, 0.0]).double()                            # of the four outcomes
REWARDS = torch.tensor([0.2, 1.0, -0.4, 0.7]).double()
CLASSES = torch.tensor([0, 1, 1, -1])
TEXTS = ["Well done, you!", "well done", "How did it go?", ""]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def group_of(drawn, rewards=RIGHT, quality=None, size=2):
    """The Group of tuples of outcomes (tuples, k)."""
    texts = [[TEXTS[i] for i in row] for row in drawn.tolist()]
    return Group(rewards[drawn], OUTCOMES[drawn], None if quality is None else quality[drawn],
                 classes=CLASSES[drawn], texts=texts, set_size=size)


def centred(rewards, *, normalise=True):
    """group_advantages without its quotient, which has no expected gradient in closed form."""
    return rewards - rewards.mean(-1, keepdim=True)


# ---- Expected gradients ----------------------------------------------------------------------------------

def best_of(rewards, n):
    return lambda drawn: torch.stack([rewards[drawn[:, list(c)]].amax(1) for c in
                                      itertools.combinations(range(drawn.shape[1]), n)]).mean(0)


def epo_value(drawn, n):
    """Mean over the n-subsets of mean reward times the share of distinct answers, in loops."""
    values = []
    for row in drawn.tolist():
        each = []
        for chosen in itertools.combinations(row, n):
            found = {int(CLASSES[i]) for i in chosen} - {-1}
            share = len(found) / n if len(found) > 1 else 0.0
            each.append(sum(float(RIGHT[i]) for i in chosen) / n * share)
        values.append(sum(each) / len(each))
    return torch.tensor(values, dtype=torch.float64)


def volume(drawn):
    e = OUTCOMES[drawn]
    return torch.linalg.det(e @ e.mT + torch.eye(drawn.shape[1]).double()).log()


def upto(rewards):
    """sum_{j<k} E[max of j] / j."""
    return lambda drawn: sum(best_of(rewards, j)(drawn) / j for j in range(1, drawn.shape[1]))


MAXIMISED = {  # name -> (rewards of the outcomes, what a tuple of k drafts is worth)
    "drgrpo": (REWARDS, lambda drawn: REWARDS[drawn].mean(1)),
    "group": (REWARDS, lambda drawn: REWARDS[drawn].mean(1)),
    "rloo": (REWARDS, lambda drawn: REWARDS[drawn].mean(1)),
    "passk-full": (RIGHT, best_of(RIGHT, 2)),
    "maxk": (REWARDS, best_of(REWARDS, 2)),
    "polyepo": (RIGHT, lambda drawn: epo_value(drawn, 2)),
    "dqo": (REWARDS, lambda drawn: REWARDS[drawn].mean(1) + volume(drawn) / drawn.shape[1]),
    "maxrl": (RIGHT, upto(RIGHT)),
    "tailrl": (REWARDS, upto(REWARDS)),
    "wreinforce": (RIGHT, lambda drawn: RIGHT[drawn].mean(1))}


@pytest.mark.parametrize("k", [4, 5])
@pytest.mark.parametrize("name", MAXIMISED)
def test_the_expected_gradient_is_the_weight_times_that_of_what_is_maximised(monkeypatch, name, k):
    """With D beside it: weight times grad (J + w D), for every k, so that w means the same everywhere."""
    in_double(monkeypatch)
    monkeypatch.setattr(grpo, "group_advantages", centred)
    objective = OBJECTIVES[name]
    objective = objective._replace(function=centred) if name in ("group", "drgrpo") else objective
    rewards, value = MAXIMISED[name]
    theta, drawn = policy(4, seed=k), all_tuples(4, k)
    group, worth = group_of(drawn, rewards), value(drawn)
    want = objective.weight(group) * exact_gradient(theta, drawn, worth)
    got = expected_estimate(theta, drawn, objective.advantages(group))
    assert float(want.abs().max()) > 0.01 and gap(got, want) < 1e-12
    both = expected_estimate(theta, drawn, advantages_of(objective, group, 0.7))
    spread = exact_gradient(theta, drawn, polylora.diversity(group.embeddings))
    assert gap(both, want + 0.7 * objective.weight(group) * spread) < 1e-12 and gap(both, got) > 0.01


def test_the_expected_gradient_of_bootstrap_over_all_choices_of_sets(monkeypatch):
    """Its sum over random sets, averaged over every way to draw them: (N - 1)(1 - k/N) grad E[best of k]."""
    in_double(monkeypatch)
    monkeypatch.setattr(grpo, "group_advantages", centred)
    theta, drawn, total = policy(4), all_tuples(4, 3), 0
    choices = list(itertools.product(itertools.combinations(range(3), 2), repeat=3))
    for sets in choices:
        sets = torch.tensor(sets).expand(len(drawn), -1, -1)
        total = total + grpo.passk_bootstrap_advantages(RIGHT[drawn], sets) / len(choices)
    weight = OBJECTIVES["passk-bootstrap"].weight(Group(RIGHT[drawn], set_size=2))
    assert weight == pytest.approx(2 / 3)
    want = weight * exact_gradient(theta, drawn, best_of(RIGHT, 2)(drawn))
    assert gap(expected_estimate(theta, drawn, total), want) < 1e-12


@pytest.mark.parametrize("name", ["drgrpo", "maxk", "tailrl"])
def test_the_entropy_of_drafts_has_its_own_gradient(monkeypatch, name):
    """Beside any objective it weighs the same: weight times grad (J + w H), H of the policy exactly."""
    theta, drawn = policy(4, seed=2), all_tuples(4, 4)
    rewards, value = MAXIMISED[name]
    group = group_of(drawn, rewards)
    group.logprobs = theta.log_softmax(0)[drawn].detach()
    entropy = -(theta.softmax(0) * theta.log_softmax(0)).sum()
    want, = torch.autograd.grad(entropy, theta, retain_graph=True)
    want = exact_gradient(theta, drawn, value(drawn)) + 0.4 * want
    got = advantages_of(OBJECTIVES[name], group, entropy_weight=0.4)
    assert gap(expected_estimate(theta, drawn, got), OBJECTIVES[name].weight(group) * want) < 1e-12


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_expected_gradient_of_best_of_n_at_the_true_chance_to_fail(monkeypatch, n):
    in_double(monkeypatch)
    theta, drawn = policy(4), all_tuples(4, 3)
    fail = (theta.softmax(0) * (1 - RIGHT)).sum()
    want, = torch.autograd.grad(1 - fail ** n, theta, retain_graph=True)
    got = grpo.bon_advantages(RIGHT[drawn], n, fail.detach())
    assert gap(expected_estimate(theta, drawn, got), 2 * want) < 1e-12
    by_hand = grpo.bon_advantages(torch.tensor([[1.0, 0, 0, 0]]), n)[0]        # f = 3/4
    assert by_hand.tolist() == pytest.approx([x * n * 0.75 ** (n - 1) for x in (0.75, -0.25, -0.25, -0.25)])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("name", DIVERSITIES)
def test_every_diversity_has_its_own_gradient(monkeypatch, name, k, gated):
    """E[sum_i a_i grad log pi(y_i)] = grad E[D], exactly, whatever D is."""
    in_double(monkeypatch)
    theta, drawn = policy(4, seed=k), all_tuples(4, k)
    value, advantages = measure(name, group_of(drawn, quality=QUALITY if gated else None))
    want = exact_gradient(theta, drawn, value)
    flat = name == "floor" and not gated                                       # without a gate it is 1 for any drafts
    assert (float(want.abs().max()) > 0.005) != flat
    assert gap(expected_estimate(theta, drawn, advantages), want) < 1e-7       # words are counted in fp32
    if k > 2:  # less than without the baseline: what a draft adds is not the whole D
        assert float(advantages.abs().sum()) < float(value.abs().sum() * k)


# ---- Diversities by hand ---------------------------------------------------------------------------------

def drafts_of(embeddings=None, quality=None, classes=None, texts=None, floor=0.0):
    put = lambda x: None if x is None else torch.tensor([x])
    return Drafts(texts and [texts], put(embeddings), put(quality), put(classes), floor)


SPAN = {"one": [[1.0, 0, 0]] * 3, "three": torch.eye(3).tolist(), "two": [[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]}


def test_two_drafts_in_a_space_of_three():
    """The number of drafts, not the dimension, is what counts."""
    two = drafts_of([[1.0, 0, 0], [0, 1, 0]])
    assert measure("vendi", two)[0].item() == pytest.approx(2, abs=1e-5)
    assert measure("dpp", two)[0].item() == pytest.approx(2 * math.log(2), abs=1e-5)


@pytest.mark.parametrize("name, span, value, gated", [
    ("dpp", "one", math.log(4), math.log(1 + 0.25 + 0.04 + 1)),
    ("dpp", "three", 3 * math.log(2), math.log(1.25 * 1.04 * 2)),
    ("dpp", "two", math.log(3 * 2), math.log((1 + 0.25 + 0.04) * 2)),
    ("vendi", "one", 1, 1.7 / 3), ("vendi", "three", 3, 1.7),
    ("vendi", "two", 3 / 2 ** (2 / 3), 3 / 2 ** (2 / 3) * 1.7 / 3),
    ("cosine", "two", 2 / 3, (0.5 + 0.2) / 3)])
def test_diversities_of_embeddings_by_hand(name, span, value, gated):
    """Three drafts that are one, two or three directions; qualities 1/2, 1/5 and 1."""
    assert measure(name, drafts_of(SPAN[span]))[0].item() == pytest.approx(value, abs=1e-5)
    q = [0.5, 0.2, 1.0]
    assert measure(name, drafts_of(SPAN[span], q))[0].item() == pytest.approx(gated, abs=1e-5)


def test_distinct_answers_by_hand():
    """Two answers among five drafts, one of them without: 2/5. Gated, an answer counts by its drafts' mean."""
    classes = [0, 1, 0, -1, 0]
    value, a = measure("distinct", drafts_of(classes=classes))
    assert value.item() == pytest.approx(2 / 5)
    assert a[0].tolist() == pytest.approx([2 / 5 - 2 / 4, 2 / 5 - 1 / 4, -0.1, -0.1, -0.1])
    q = [0.9, 0.4, 0.3, 1.0, 0.6]
    assert measure("distinct", drafts_of(quality=q, classes=classes))[0].item() == pytest.approx((0.6 + 0.4) / 5)


def test_the_floor_alone_pays_pairs_for_being_good_whatever_they_say():
    """(q0 q1 + q0 q2 + q1 q2) / 3 less the pair without each draft; ungated nothing is to be gained."""
    value, a = measure("floor", drafts_of(quality=[0.5, 1.0, 0.2], classes=[0, 0, -1]))
    assert value.item() == pytest.approx((0.5 + 0.1 + 0.2) / 3)
    assert a[0].tolist() == pytest.approx([0.8 / 3 - 0.2, 0.8 / 3 - 0.1, 0.8 / 3 - 0.5])
    value, a = measure("floor", drafts_of(classes=[0, 1, 2]))
    assert value.item() == 1 and a.abs().max() < 1e-6


@pytest.mark.parametrize("a, b, edits, shared, union", [
    ("the cat sat", "the cat sat", 0, 5, 5), ("the cat sat", "the dog sat", 1, 2, 8), ("a b", "b a", 2, 2, 4),
    ("a", "a b c", 2, 1, 5), ("", "x y", 2, 0, 3), ("", "", 0, 0, 0), ("a", "", 1, 0, 1), ("a b c d", "b c d a", 2, 6, 8)])
def test_distances_of_words_by_hand(a, b, edits, shared, union):
    """Edits of whole words over the longer text; words and word pairs that both have, over all."""
    longest = max(len(a.split()), len(b.split()), 1)
    for x, y in ((a, b), (b, a)):
        assert polylora.edit_distance(x.split(), y.split()) == edits / longest
        assert polylora.ngram_distance(x.split(), y.split()) == pytest.approx(1 - shared / union if union else 0)
    for name, value in (("levenshtein", edits / longest), ("ngram", 1 - shared / union if union else 0)):
        drafts = drafts_of(texts=[f"{a.upper()}!", b])                         # case and marks are no difference
        assert measure(name, drafts)[0].item() == pytest.approx(value)


def test_a_gate_and_a_floor_hold_for_distances_of_words():
    drafts = drafts_of(quality=[1.0, 0.5, 0.0], texts=["a", "b", "c"], floor=0.2)
    for name in ("levenshtein", "ngram"):
        assert measure(name, drafts)[0].item() == pytest.approx(1.2 * 0.5 / 3)


def test_answers_are_voices_or_texts():
    class Domain:
        voices = ("warm", "dry")
        voices_of = staticmethod(lambda post, text: set(text.split()) & {"warm", "dry"})
    texts = [["warm", "dry", "neither", "dry warm", "so warm"], ["dry", "dry", "x", "y", "warm"]]
    assert polylora.answer_classes(Domain, [None] * 2, texts).tolist() == [[0, 1, -1, 2, 0], [0, 0, -1, -1, 1]]
    Domain.voices = ()
    Domain.voices_of = staticmethod(lambda post, text: None)
    texts = [["Yes!", "yes", "no", "?!", "yes yes"]]
    assert polylora.answer_classes(Domain, [None], texts).tolist() == [[0, 0, 1, -1, 2]]


# ---- Objectives by hand, and the papers' text in loops -----------------------------------------------------

def rewards_of(*rows):
    return torch.tensor(rows).double()


def standardised(values):
    """A list's GRPO advantages, in plain Python."""
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [0.0 if max(values) == min(values) else (v - mean) / (std + 1e-4) for v in values]


def test_full_sampling_gives_a_group_s_advantage_to_all_its_members():
    r = rewards_of([0, 1, 0, 0, 0, 0, 1.0], [0] * 7, [1] * 7)
    a, b, c = standardised([1, 0, 0])
    got = grpo.passk_full_advantages(r, 2)
    assert got[0].tolist() == pytest.approx([a, a, b, b, c, c, 0]) and float(got[1:].abs().max()) == 0
    by_three = [0.9998] * 3 + [-0.9998] * 3 + [0]
    assert grpo.passk_full_advantages(r, 3)[0].tolist() == pytest.approx(by_three, abs=1e-6)
    for k in (0, 4, 7):
        with pytest.raises(InputError, match="from 1 to 3"):
            grpo.passk_full_advantages(r, k)


def test_bootstrap_sums_over_the_sets_that_hold_a_draft():
    for seed in range(20):
        seeds = torch.tensor([seed, 1000 + seed])
        rewards = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed)).double().round()
        sets = grpo.random_sets(seeds, 6, 3)
        got = grpo.passk_bootstrap_advantages(rewards, sets)
        for p in range(2):
            chosen = sets[p].tolist()
            assert len(chosen) == 6 and all(len(set(s)) == 3 and set(s) <= set(range(6)) for s in chosen)
            scores = standardised([max(rewards[p][s].tolist()) for s in chosen])
            want = [sum(v for v, s in zip(scores, chosen) if i in s) for i in range(6)]
            assert got[p].tolist() == pytest.approx(want, abs=1e-9)
        group = Group(rewards, seeds=seeds, set_size=3)
        assert torch.equal(OBJECTIVES["passk-bootstrap"].advantages(group), got)


def test_random_sets_hang_on_the_post_s_seed_and_are_even():
    both = grpo.random_sets(torch.tensor([5, 9]), 6, 3)
    assert torch.equal(both[1:], grpo.random_sets(torch.tensor([9]), 6, 3)) and not torch.equal(both[0], both[1])
    many = grpo.random_sets(torch.arange(3000), 4, 2).sort(-1).values.flatten(0, 1)
    counts = [int((many == torch.tensor(s)).all(1).sum()) for s in itertools.combinations(range(4), 2)]
    assert sum(counts) == 12000 and max(counts) < 1.1 * min(counts)


def test_the_mixture_leans_to_pass_at_k_as_a_post_is_learnt():
    for right in range(1, 6):
        r = rewards_of([1.0] * right + [0.0] * (6 - right))
        share, group = right / 6, Group(r, set_size=2)
        want = share * grpo.passk_advantages(r, 2) + (1 - share) * group_advantages(r)
        assert gap(grpo.passk_mixed_advantages(r, 2), want) < 1e-12
        assert float(OBJECTIVES["passk-mixed"].weight(group)) == pytest.approx(share * 2 + (1 - share) * 5)


def test_poly_epo_counts_answers_and_wants_two():
    """A set of one answer is worth nothing; a draft without an answer is no answer."""
    drawn = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [0, 2, 3, 3]])
    assert epo_value(drawn, 3).tolist() == pytest.approx([0, (4 + 2 + 4 + 0) / 9 / 4, (4 + 4 + 0 + 0) / 9 / 4])
    assert float(grpo.polyepo_advantages(RIGHT[drawn], CLASSES[drawn], 3)[0].abs().max()) == 0
    for n in (1, 4):
        with pytest.raises(InputError, match="set size"):
            grpo.polyepo_advantages(RIGHT[drawn], CLASSES[drawn], n)


@pytest.mark.parametrize("rewards, classes, novelty", [
    ([1, 1, 1, 1, 0], [0, 0, 1, 2, -1], [2 / 3, 2 / 3, 1, 1, 0]),              # of the right ones
    ([1, 1, 1, 0, 0], [0, 0, 0, 1, 2], [0.1, 0.1, 0.1, 0, 0]),                 # the floor
    ([1, 0, 0, 0, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0]),                       # one alone
    ([1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [1, 1, 0, 0, 0]), ([1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0.1, 0.1, 0, 0, 0]),
    ([0.5, 0.2, 0.0, 0.9, 0.4], [0, 0, 1, 1, 1], [0.75, 0.75, 0.5, 0.5, 0.5]),  # real ones: of all
    ([0.5, 0.2, 0.3, 0.9, 0.4], [0, 0, 1, 1, 1], [0.75, 0.75, 0.5, 0.5, 0.5]),  # none is lowered
    ([-1.0, 0.5, 0.5, 0.5, 0.5], [0, 0, 1, 2, 3], [0.75, 0.75, 1, 1, 1])])     # raised to zero
def test_darling_by_hand(rewards, classes, novelty):
    lowest = min(0, *rewards)
    shaped = [(r - lowest) * n for r, n in zip(rewards, novelty)]
    want = [s - sum(shaped) / 5 for s in shaped]
    got = grpo.darling_advantages(rewards_of([float(r) for r in rewards]), torch.tensor([classes]))
    assert got[0].tolist() == pytest.approx(want, abs=1e-6)


def test_dra_divides_by_likeness_to_the_others():
    e = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [-0.6, 0.8]]])
    got = grpo.dra_advantages(rewards_of([1.0, 1, 1, 1]), e)
    assert got[0].tolist() == pytest.approx(standardised([1 / 2, 1 / 2, 1 / 1.8, 1 / 1.8]), abs=1e-5)


def test_dqo_by_hand():
    """alpha weighs the volume that a draft adds: of three, the third is a direction of its own."""
    e = torch.tensor([SPAN["two"]]).double()
    adds = [math.log(6 / 4), math.log(6 / 4), math.log(6 / 3)]
    got = grpo.dqo_advantages(rewards_of([1.0, 0, 0]), e, alpha=0.5)[0].tolist()
    assert got == pytest.approx([r + 0.5 * 2 / 3 * a for r, a in zip((2 / 3, -1 / 3, -1 / 3), adds)], abs=1e-6)


def test_uniqueness_divides_by_the_answer_s_frequency():
    r, classes = rewards_of([1, 1, 1, 0, 0, 0.0]), torch.tensor([[0, 0, 1, -1, -1, 2]])
    for alpha in (1.0, 0.5):
        got = grpo.uniqueness_advantages(r, classes, alpha)[0].tolist()
        frequency = (2, 2, 1, 1, 1, 1)
        assert got == pytest.approx([x / f ** alpha for x, f in zip(standardised([1, 1, 1, 0, 0, 0]), frequency)])
    assert torch.equal(grpo.uniqueness_advantages(r, classes), grpo.uniqueness_advantages(r, classes, 1.0))


def test_unlikeliness_pays_the_likelier_right_draft_less():
    """Ranks by mean log-probability: -3 is the least likely, rank 0."""
    logprobs, lengths = torch.tensor([[-4.0, -2.0, -3.0, -5]]), torch.tensor([[4, 1, 1, 10]])
    got = grpo.unlikeliness_advantages(rewards_of([1, 0, 1, 1.0]), logprobs, lengths)[0].tolist()
    assert got == pytest.approx(standardised([1 - 0.25 * 2 / 4, 0, 1, 1 - 0.25 * 3 / 4]))


def evol_by_the_book(classes, cosines):
    """EVOL-RL's rewards of one post, in loops, by the rules of the authors' code: those who give no answer are left out
    of every comparison, alone in its party a completion counts as most novel, equals get the middle."""
    k, answered = len(classes), [i for i, c in enumerate(classes) if c >= 0]
    if len(answered) < 2:
        return [-1.0] * k
    count = [classes.count(classes[i]) for i in answered]
    majority = classes[answered[count.index(max(count))]]
    out = [-1.0] * k
    for right in (True, False):
        party, novelty = [i for i in answered if (classes[i] == majority) == right], {}
        for i in party:
            own = [cosines[i][j] for j in party if j != i]
            mean = sum(own) / len(own) if own else 0.0                         # alone: its novelty is not looked at
            novelty[i] = 1 - (mean + max(cosines[i][j] for j in answered if j != i)) / 2
        for i in party:
            low, high = min(novelty.values()), max(novelty.values())
            u = 1.0 if len(party) == 1 else (novelty[i] - low) / (high - low) if high > low else 0.5
            out[i] = (0.5 if right else -1.0) + u / 2
    return out


def test_evol_rl_against_the_book():
    draw = random.Random(3)
    for _ in range(60):
        classes = [draw.choice((-1, 0, 0, 1, 2)) for _ in range(6)]
        e = F.normalize(torch.randn(1, 6, 3).double(), dim=-1)
        cosines = (e[0] @ e[0].T).clamp(0, 1).tolist()
        want = standardised(evol_by_the_book(classes, cosines))
        assert grpo.evol_advantages(torch.tensor([classes]), e)[0].tolist() == pytest.approx(want, abs=2e-4)
    e = torch.eye(4)[None, [0, 0, 1, 2]]
    rewards = evol_by_the_book([0, 0, 0, 1], (e[0] @ e[0].T).tolist())         # likeness: 3/4, 3/4, 0; one is alone
    assert rewards == [0.5, 0.5, 1.0, -0.5]
    got = grpo.evol_advantages(torch.tensor([[0, 0, 0, 1]]), e)
    assert got[0].tolist() == pytest.approx(standardised(rewards), abs=1e-4)


@pytest.mark.parametrize("classes, places, rewards", [
    ([0, 0, 0, 1], [0, 0, 1, 2], [0.5, 0.5, 1.0, -0.5]),                       # one lone minority answer
    ([0, 0, 0, 1], [0, 0, 0, 1], [0.75, 0.75, 0.75, -0.5]),                    # the majority is one text
    ([0, 0, 1, 2], [0, 1, 2, 2], [0.75, 0.75, -0.75, -0.75]),                  # so is the minority
    ([0, 1, -1, -1], [0, 1, 2, 3], [1.0, -0.5, -1.0, -1.0]),                   # each alone in its party
    ([0, -1, -1, -1], [0, 1, 2, 3], [-1.0] * 4),                               # one answer cannot be compared
    ([0, 0, 0, -1], [0, 1, 2, 2], [0.75, 0.75, 0.75, -1.0])])                  # likeness to no answer does not count
def test_evol_rl_gives_the_rewards_of_the_authors_code(classes, places, rewards):
    """A lone minority answer got -1 and a majority of one text .5; equal texts whose embeddings differ by rounding count
    as equal."""
    for noise in (0.0, 1e-7):
        e = (torch.eye(4)[None, places].double() + noise * torch.randn(1, 4, 4).double()).float()
        e = F.normalize(e, dim=-1)
        got = grpo.evol_rewards(torch.tensor([classes]), e)
        assert got[0].tolist() == pytest.approx(rewards, abs=1e-5)
        assert grpo.evol_advantages(torch.tensor([classes]), e)[0].tolist() == pytest.approx(standardised(rewards), abs=1e-3)


def test_maxrl_and_tailrl_agree_on_right_and_wrong():
    """(N - K)/K and -1; where none or all are right, nothing. TailRL's real rewards by its recursion."""
    for right in range(7):
        r = rewards_of([1.0] * right + [0.0] * (6 - right))
        want = [(6 - right) / right] * right + [-1.0] * (6 - right) if 0 < right < 6 else [0.0] * 6
        for got in (grpo.maxrl_advantages(r), grpo.tailrl_advantages(r)):
            assert got[0].tolist() == pytest.approx(want, abs=1e-9)
    values = [0.3, -0.2, 0.9, 0.3, 0.5]
    w, before = {}, 0.0
    ordered = sorted(range(5), key=lambda i: values[i])
    for n, i in enumerate(ordered, 1):
        before += 5 * (values[i] - (values[ordered[n - 2]] if n > 1 else 0.0)) / (5 - n + 1)
        w[i] = before
    want = [w[i] - sum(w.values()) / 5 for i in range(5)]
    assert grpo.tailrl_advantages(rewards_of(values))[0].tolist() == pytest.approx(want)
    with pytest.raises(InputError, match="tailrl"):
        grpo.maxrl_advantages(rewards_of(values))


def test_w_reinforce_and_f_grpo_by_hand():
    r = rewards_of([1, 0, 0, 1.0], [0, 0, 0, 0])
    assert gap(grpo.wreinforce_advantages(r), rewards_of([0.1, -1, -1, 0.1], [-1] * 4)) < 1e-6
    assert gap(grpo.focal_advantages(r, 2.0), 0.25 * group_advantages(r)) < 1e-12
    assert gap(grpo.focal_advantages(r), 0.5 * group_advantages(r)) < 1e-12


@pytest.mark.parametrize("name", ["passk", "passk-mixed", "bon", "wreinforce", "focal"])
def test_what_is_made_for_right_and_wrong_refuses_real_rewards(name):
    for value in (0.5, -1.0, math.nan):
        with pytest.raises(InputError, match="0 or 1"):
            OBJECTIVES[name].advantages(Group(rewards_of([1, 0, value, 0]), set_size=2))


def test_soft_overlong_punishment_by_hand():
    """Of at most 10 tokens, the last 4 cost up to 1."""
    got = grpo.overlong_penalty(torch.tensor([1, 6, 7, 9, 10, 13]), 10, 4)
    assert got.tolist() == [0, 0, -0.25, -0.75, -1, -1]


def test_an_objective_s_every_field_is_one_of_the_group_s():
    group = group_of(torch.tensor([[0, 1, 2, 3, 0]]))
    assert all(hasattr(group, name) or name == "sets" for o in OBJECTIVES.values() for name in o.takes.split())
    assert all(o.about and "arXiv" in o.about or name == "coverage" for name, o in OBJECTIVES.items())


# ---- Every line of the registers takes steps -------------------------------------------------------------

def grpo_session(parts, *flags):
    flags = ["--start", "-", "--reward", "valid", "--batch", "3", "--k", "4", "--set-size", "2", *flags]
    s = session(parts, grpo.parser(), flags, stage="grpo", ranks=Ranks("methods", "cpu"))
    s.reward, s.gate = grpo.make_reward("valid", s), polylora.Gate(s, s.args.gate)
    s.start = polylora.frozen_copy(s.model)
    s.params = list(polylora.adapter_state(s.model).values())
    return s


def rewards_by_length(posts, drafts, streams=None):
    """Rewards of 0 and 1 that a model of random weights gets both of."""
    return [[float(len(t) % 3 == 0) for t in texts] for texts in drafts]


def voices_by_length(domain):
    """A verifier that finds one draft in four right in none of three voices."""
    return lambda post, text: {(*domain.voices[:3], None)[len(text) % 4]} - {None}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_takes_two_steps_and_moves_the_adapter(parts, name):
    s = grpo_session(parts, "--advantage", name, "--beta", "0.1")
    s.reward, s.domain.voices_of = rewards_by_length, voices_by_length(s.domain)
    others = [p for p in s.model.parameters() if not any(p is q for q in s.params)]
    frozen = [p.clone() for p in others]
    before, optimizer = polylora.frozen_copy(s.model), torch.optim.AdamW(s.params, lr=1e-3)
    for step in range(2):
        tally = grpo.grpo_step(s, step)
        optimizer.step()
        optimizer.zero_grad()
    means = tally.means(s.ranks, grpo.LOGGED)
    assert all(math.isfinite(x) for x in means.values())
    assert means["advantage"] > 0 and means["kl"] > 0 and means["k2"] > 0
    assert all(not torch.equal(p, before[n]) for n, p in polylora.adapter_state(s.model).items())
    assert all(torch.equal(p, q) for p, q in zip(others, frozen))              # and nothing else


@pytest.mark.parametrize("name", DIVERSITIES)
def test_every_diversity_pushes_both_phases(parts, name):
    """Its part of the gradient alone: not zero, and another one for another D."""
    s = session(parts, polylora.parser(), ["sft", "--model", "-", "--batch", "4", "--draft-posts", "4", "--k", "3",
                                           "--lambda", "1", "--diversity", name])
    s.domain.voices_of = voices_by_length(s.domain)
    s.gate = polylora.Gate(s, "none")
    if name == "floor":                                                        # which is the quality's alone
        s.gate = lambda mine, samples, texts, streams: torch.tensor([[1 / (1 + len(t)) for t in ts] for ts in texts])
    s.embedder = s.embedder if DIVERSITIES[name].embeds else None              # words need none
    assert DIVERSITIES[name].embeds == (name in ("cosine", "dpp", "vendi"))
    visits = [polylora.batch_visits(len(s.posts), 4, 0, 1)[i] for i in range(4)]
    s.model.eval()
    grads, tally = gradient(s, lambda tally: polylora.add_diversity(s, visits, 0, tally))
    assert max(float(g.abs().max()) for g in grads.values()) > 0 and tally.means(s.ranks, ["D"])["D"] > 0


def test_kl_estimates_are_k1_k2_k3(parts):
    """Measured on policy: k1 is log p - log q, k2 half its square, k3 q/p - 1 - log q/p."""
    s = grpo_session(parts, "--beta", "0.1", "--micro-tokens", "100000")
    for p in s.params:
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    tally = grpo.grpo_step(s, 0)
    batch, = s.batches
    with torch.no_grad():
        gap = grpo.token_logprobs(s.model, batch.rows, s.args.temperature)[0] - batch.reference
    means = tally.means(s.ranks, grpo.LOGGED)
    want = {"k1": gap.mean(), "k2": gap.square().mean() / 2, "kl": ((-gap).exp() - 1 + gap).mean()}
    assert {n: means[n] for n in want} == pytest.approx({n: float(v) for n, v in want.items()}, rel=1e-4, abs=1e-7)
    assert abs(means["k1"]) > 1e-3 and means["kl"] > 0


def test_the_overlong_punishment_reaches_the_reward(parts):
    s, plain = (grpo_session(parts, "--overlong", tokens) for tokens in ("4", "0"))
    with_it, without = (grpo.draw(x, polylora.batch_visits(len(x.posts), 3, 0, 1), 0) for x in (s, plain))
    lengths = torch.tensor([list(map(len, drafts)) for drafts in with_it.samples.tokens])
    assert gap(with_it.group.rewards - without.group.rewards, grpo.overlong_penalty(lengths, 7, 4)) < 1e-6
    assert float((with_it.group.rewards - without.group.rewards).min()) == -1


def test_a_noisy_verifier_is_noisy_for_all_who_ask_it(parts):
    """Of 15% of verdicts turned round, D's gate and the coverage objective saw none: in a study of noise the arms with D
    were told more than their rivals."""
    s, clean = (grpo_session(parts, "--gate", "verifier", "--flip", share) for share in ("0.3", "0"))
    visits = polylora.batch_visits(len(s.posts), 6, 0, 1)
    for x in (s, clean):
        x.domain.voices_of = lambda post, text: x.domain.voices[len(text) % 2:1]
        x.gate = polylora.Gate(x, "verifier")
    got, want, again = (grpo.draw(x, visits, 0).group for x in (s, clean, s))
    assert torch.equal(got.quality, again.quality) and torch.equal(got.right, again.right)
    assert torch.equal(got.valid, want.valid) and torch.equal(want.right.amax(-1), want.valid)
    assert torch.equal(want.quality, want.valid) and 0 < (got.quality != want.quality).float().mean() < 0.7
    assert 0.15 < (got.right != want.right).float().mean() < 0.45
    many = polylora.turned(torch.ones(50, 40), 0.15, range(50), "x")
    assert many.mean() == pytest.approx(0.85, abs=0.03)
    assert not torch.equal(many, polylora.turned(torch.ones(50, 40), 0.15, range(50), "y"))
    both = rewards.VerifierReward(data.make_domain("auto", s.posts), any_voice=True, valid_weight=4.0, flip=0.3)
    earned = [r for row in both(s.posts, [["?"] * 60 for _ in s.posts], range(12)) for r in row]
    assert sum(r >= 4 for r in earned) / 720 == pytest.approx(0.3, abs=0.06)


def test_a_noisy_gate_in_phase_one_too(parts):
    flags = ("--lambda", "1", "--gate", "verifier", "--flip", "0.4")
    s, seen = sft_session(parts, *flags), []
    s.domain.voices_of = lambda post, text: s.domain.voices[:1]
    s.gate = polylora.Gate(s, "verifier")
    ask = s.gate
    s.gate = lambda *a: (seen.append(ask(*a)), seen[-1])[1]
    for step in (0, 0, 1):
        polylora.sft_step(s, step)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2]) and 0 < float(seen[0].mean()) < 1


def test_the_entropy_weight_reaches_the_advantages(parts):
    s, plain = (grpo_session(parts, "--entropy-weight", weight) for weight in ("0.3", "0"))
    batches = [grpo.rollout(x, 0, grpo.Tally())[0] for x in (s, plain)]
    one, other = (torch.cat([b.advantages for b in some]) for some in batches)
    assert torch.equal(batches[0][0].rows.tokens, batches[1][0].rows.tokens) and gap(one, other) > 0.01


def test_what_a_group_holds_of_its_drafts(parts):
    s = grpo_session(parts)
    drawn = grpo.draw(s, polylora.batch_visits(len(s.posts), 3, 0, 1), 0)
    group, logprobs = drawn.group, drawn.samples.logprobs
    assert group.texts == drawn.texts and group.classes.shape == (3, 4) and len(set(group.seeds.tolist())) == 3
    assert group.logprobs[1, 2].item() == pytest.approx(sum(logprobs[1][2]), rel=1e-5)
    assert group.lengths[1, 2] == len(logprobs[1][2]) == len(drawn.samples.tokens[1][2])
    again = grpo.joined([drawn.take([2, 0]), drawn.take([1])])
    assert again.texts == [drawn.texts[i] for i in (2, 0, 1)]
    assert again.visits == [drawn.visits[i] for i in (2, 0, 1)]
    assert torch.equal(again.group.logprobs, group.logprobs[[2, 0, 1]]) and again.group.set_size == 2
    assert again.samples.tokens == [drawn.samples.tokens[i] for i in (2, 0, 1)]
    assert torch.equal(again.group.embeddings, group.embeddings[[2, 0, 1]])


# ---- SFT losses ------------------------------------------------------------------------------------------

def tokens(n=5, vocab=9, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, vocab, generator=draw, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(0, vocab, (n,), generator=draw)


def slope(loss, logits):
    return torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]


@pytest.mark.parametrize("beta", [0.7, 1.0, 0.3])
def test_linear_gem_has_the_gradient_of_cross_entropy_at_another_temperature(beta):
    """beta CE(z / beta), exactly; at beta = 1 plain cross-entropy. Its value is that of the sum over v."""
    z, y = tokens()
    loss = polylora.gem_loss(z, y, beta)
    want = slope(beta * F.cross_entropy(z / beta, y, reduction="none"), z)
    assert gap(slope(loss, z), want) < 1e-15
    logp, q = z.log_softmax(-1), (z / beta).softmax(-1)
    by_hand = [-sum(q[n, v] * (logp[n, y[n]] - logp[n, v]) for v in range(9)) for n in range(5)]
    assert gap(loss, torch.stack(by_hand)) < 1e-14


def test_logsigmoid_gem_is_nearly_half_of_the_linear():
    """Each v is weighed by sigmoid((z_v - z_y)/100), held fixed like q."""
    z, y = tokens(seed=1)
    loss = polylora.gem_loss(z, y, 0.7, logsigmoid=True)
    w = (((z - z.gather(1, y[:, None])) / 100).sigmoid() * (z / 0.7).softmax(-1)).detach()
    logp = z.log_softmax(-1)
    want = -(w * (logp.gather(1, y[:, None]) - logp)).sum(-1)
    assert gap(loss, want) < 1e-14 and gap(slope(loss, z), slope(want, z)) < 1e-14
    linear = slope(polylora.gem_loss(z, y, 0.7), z)
    assert 1e-4 < gap(slope(loss, z), linear / 2) < 0.02 * float(linear.abs().max())
    assert torch.equal(polylora.gem_loss(z, y), polylora.gem_loss(z, y, 0.7, logsigmoid=False))
    assert torch.equal(polylora.SFT_LOSSES["gem-logsigmoid"].function(z, y), loss)


def test_the_entropy_loss_by_its_distribution():
    z, y = tokens(seed=2)
    entropy = torch.distributions.Categorical(logits=z).entropy()
    ce = F.cross_entropy(z, y, reduction="none")
    assert gap(polylora.entropy_loss(z, y), ce - 0.1 * entropy) < 1e-14
    assert gap(slope(polylora.entropy_loss(z, y, 2.0), z), slope(ce - 2.0 * entropy, z)) < 1e-14


def rows_of(*replies):
    return packed([([1, 2], [list(r) for r in replies])])


def packed(groups):
    return pack(groups, 10 ** 6)[0]


def test_unlikelihood_counts_the_reply_s_earlier_tokens():
    """Each once, never the target, never another reply's."""
    rows = rows_of([4, 0, 4, 4, 6], [7, 0])
    earlier, = polylora.earlier_tokens(None, rows)
    assert [sorted(t for t in row if t >= 0) for row in earlier.tolist()] == [[], [4], [0], [0], [0, 4], [], [7]]
    z, y = tokens(7, seed=3)[0] * 3, rows.target                               # some chances near 1
    p, ce = z.softmax(-1), F.cross_entropy(z, y, reduction="none")
    want = [ce[n] - 0.5 * sum((1 - p[n, c]).log() for c in row if c >= 0) for n, row in enumerate(earlier.tolist())]
    got = polylora.unlikelihood_loss(z, y, earlier, 0.5)
    assert gap(got, torch.stack(want)) < 1e-12 and gap(slope(got, z), slope(torch.stack(want), z)) < 1e-12
    assert gap(polylora.unlikelihood_loss(z, y, earlier), ce + 2 * (got - ce)) < 1e-12
    likely = torch.tensor([[0.9, 0.1]]).log()
    got = polylora.unlikelihood_loss(likely, torch.tensor([1]), torch.tensor([[0]])).item()
    assert got == pytest.approx(-2 * math.log(0.1), rel=1e-5)
    sure = torch.tensor([[100.0, 0.0]], requires_grad=True)                    # 1 - p rounds to 0
    loss = polylora.unlikelihood_loss(sure, torch.tensor([1]), torch.tensor([[0]]))
    assert torch.isfinite(slope(loss, sure)).all()


def ba_lora_by_torch(z, base, draft, heat, top, leading):
    """KL, entropy and singular values as torch has them, with the paper's weights."""
    student, teacher = (z / heat).log_softmax(-1), (base / heat).log_softmax(-1)
    kl = heat ** 2 * F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    entropy = torch.distributions.Categorical(logits=z.topk(top).values).entropy()
    spectra = {i: torch.linalg.svdvals(z[draft == i]) for i in draft.tolist()}
    rank = [spectra[i][:leading].sum() / spectra[i].norm() for i in draft.tolist()]
    return 0.025 * kl - 0.005 * entropy - 0.005 * torch.stack(rank)


def test_ba_lora_s_three_terms():
    """Each reply by itself: one of 13 tokens, so that ten singular values are not all, and one of 3."""
    draft = torch.tensor([0] * 12 + [1, 1, 0, 1])
    z, y = tokens(16, 40, seed=4)
    base = tokens(16, 40, seed=5)[0].detach()
    for scale in (1, 1e-2):  # small logits too
        for options in ({}, {"heat": 3.0}, {"top": 5}, {"leading": 2}):
            want = ba_lora_by_torch(scale * z, base, draft, **dict(heat=2.0, top=20, leading=10) | options)
            got = polylora.ba_lora_regularizer(scale * z, base, draft, **options)
            assert gap(got, want) < 1e-9 and gap(slope(got, z), slope(want, z)) < 1e-8
    head = torch.randn(40, 6).double()
    hidden = torch.linalg.lstsq(head, base.T).solution.T                       # some states, and their logits
    near = polylora.ba_lora_regularizer(z, F.linear(hidden, head).float(), draft)
    loss = polylora.ba_lora_loss(z, y, hidden, draft, head, weight=3.0)
    assert gap(loss, F.cross_entropy(z, y, reduction="none") + 3 * near) < 1e-12
    assert torch.equal(polylora.ba_lora_loss(z, y, hidden, draft, head),
                       polylora.ba_lora_loss(z, y, hidden, draft, head, weight=1.0))
    assert polylora.ba_lora_regularizer(z[:, :4], base[:, :4], draft).shape == (16,)   # a vocabulary below 20


def sft_session(parts, *flags, ranks=None):
    flags = ["sft", "--model", "-", "--batch", "4", *flags]
    s = session(parts, polylora.parser(), flags, ranks=ranks or Ranks("methods", "cpu"))
    s.reward = rewards_by_length
    return s


@pytest.mark.parametrize("name", polylora.SFT_LOSSES)
def test_every_sft_loss_takes_two_steps_and_moves_the_adapter(parts, name):
    s = sft_session(parts, "--loss", name)
    s.params = list(polylora.adapter_state(s.model).values())
    before, optimizer, lines = polylora.frozen_copy(s.model), torch.optim.AdamW(s.params, lr=1e-3), []
    for step in range(2):
        lines.append(polylora.sft_step(s, step).means(s.ranks, polylora.SFT_LOGGED))
        optimizer.step()
        optimizer.zero_grad()
    shares = {"truncated", "empty", "identical"}                               # of the completions it samples
    logged = {"ce": {"ce"}, "unlikelihood-sequence": {"ce", "unlikely"} | shares, "bonbon": {"loss", "reward"} | shares}
    assert all(set(line) == logged.get(name, {"loss"}) for line in lines)
    assert all(math.isfinite(x) for line in lines for x in line.values())
    assert all(not torch.equal(p, before[n]) for n, p in polylora.adapter_state(s.model).items())


@pytest.mark.parametrize("name", [n for n, loss in polylora.SFT_LOSSES.items() if loss.function])
def test_the_loss_by_chunks_is_that_of_whole_logits(parts, name):
    """BA-LoRA's third term couples a reply's tokens, so that it must see them all."""
    s, kind = sft_session(parts, "--loss", name), polylora.SFT_LOSSES[name]
    groups = [(s.prompt(i), [data.encode_reply(s.tokenizer, s.posts[i].replies[0])]) for i in range(4)]
    rows = packed(groups)
    got, _ = gradient(s, lambda tally: polylora.reply_losses(s, rows).sum().backward())
    options = {"head": s.model.head_weight()} if name.startswith("ba-lora") else {}
    extra = kind.extra(s, rows) if kind.extra else ()

    def plain(tally):
        logits = F.linear(predicting_states(s.model, rows), s.model.head_weight())
        loss = kind.function(logits, rows.target, *extra, **options).sum()
        if kind.states:
            loss = loss + kind.states(predicting_states(s.model, rows), rows.draft).sum()
        loss.backward()
    want, _ = gradient(s, plain)
    scale = max(float(g.abs().max()) for g in want.values())
    assert scale > 0 and max(gap(got[n], g) for n, g in want.items()) < 1e-4 * scale


@pytest.mark.parametrize("name", polylora.SFT_LOSSES)
def test_every_sft_loss_has_one_denominator_however_rows_are_packed(parts, name, monkeypatch):
    """And however the chunks fall that logits are made in: one of BA-LoRA's terms is of a whole reply."""
    grads = []
    for size, chunk in (("100000", 10_000), ("40", 3)):
        monkeypatch.setattr(model_py, "chunk_size", lambda vocab, device: chunk)
        s = sft_session(parts, "--loss", name, "--micro-tokens", size)
        s.params = list(polylora.adapter_state(s.model).values())
        grads.append(gradient(s, lambda tally: polylora.sft_step(s, 0))[0])
    scale = max(float(g.abs().max()) for g in grads[0].values())
    assert scale > 0 and max(gap(grads[1][n], g) for n, g in grads[0].items()) < 1e-4 * scale


def test_states_and_logits_of_a_loss_come_of_one_pass(parts, monkeypatch):
    """With --shard a second pass of its own crossed the other ranks', which hung."""
    passes, way = [], polylora.predicting_states
    monkeypatch.setattr(polylora, "predicting_states", lambda *a: (passes.append(torch.is_grad_enabled()), way(*a))[1])
    monkeypatch.setattr(model_py, "predicting_states", None)
    s = sft_session(parts, "--loss", "ba-lora-nlu")
    rows = packed([(s.prompt(0), [[5, 6, 7]])])
    polylora.reply_losses(s, rows)
    assert passes == [False, True]                                             # the base's states, and these


def test_the_loss_s_value_reaches_it(parts):
    """gem at beta 1 is cross-entropy; ba-lora without its terms too; at the defaults they differ."""
    def grads(*flags):
        s = sft_session(parts, *flags)
        s.params = list(polylora.adapter_state(s.model).values())
        return torch.cat([g.flatten() for g in gradient(s, lambda tally: polylora.sft_step(s, 0))[0].values()])
    plain = grads("--loss", "ce")
    for name, value in (("gem", "1"), ("entropy", "0"), ("unlikelihood", "0"), ("ba-lora", "0"),
                        ("ba-lora-nlu", "0"), ("sed", "0")):
        assert gap(grads("--loss", name, "--loss-value", value), plain) < 1e-5 * float(plain.abs().max())
        assert gap(grads("--loss", name), plain) > 1e-3 * float(plain.abs().max())


def test_ba_lora_s_teacher_is_the_base(parts):
    s = sft_session(parts, "--loss", "ba-lora")
    rows = packed([(s.prompt(i), [[5, 6, 7]]) for i in range(3)])
    hidden, draft = polylora.base_states(s, rows)
    with polylora.base(s.model):
        want, _ = polylora.token_logprobs(s.model, rows)
    logits = F.linear(hidden, s.model.head_weight())
    got = logits.log_softmax(-1).gather(1, rows.target[:, None])[:, 0]
    assert gap(got, want) < 1e-4 and not hidden.requires_grad and draft is rows.draft
    assert gap(got, polylora.token_logprobs(s.model, rows)[0]) > 1e-3


@pytest.mark.parametrize("flags, word", [
    ("--loss ce --loss-value 1", "no meaning"), ("--loss gem --loss-value 0", "above 0"),
    ("--loss gem --loss-value nan", "above 0"), ("--lambda 1 --diversity vendi --gate-floor 1", "gate-floor"),
    ("--lambda 1 --diversity floor", "--gate")])
def test_flags_that_say_nothing_are_refused(flags, word):
    args = polylora.parser().parse_args(["sft", "--model", "-", "--data", "-", "--out", "-", *flags.split()])
    with pytest.raises(InputError, match=word):
        polylora.check_sft(args)


OWN = {"coverage", "ce", "cosine", "distinct", "floor", "ngram", "levenshtein", "all", "score", "full", *grpo.REWARDS}  # no paper's


def test_help_lists_every_line_of_the_registers_with_its_paper():
    command = lambda room, name: room.parser()._subparsers._group_actions[0].choices[name]
    decoders = {name: (f"{way.about} ({way.paper})",) for name, way in DECODERS.items()}
    tables = (polylora.SFT_LOSSES, polylora.ADAPTERS, polylora.D_GRADIENTS, DIVERSITIES)
    for parser, tables in ((grpo.parser(), (OBJECTIVES, DIVERSITIES, grpo.TOKENS, grpo.REWARDS)),
                           (command(polylora, "sft"), tables), (command(evaluate, "measure"), (decoders,))):
        plain = lambda text: " ".join(text.split()).replace("- ", "-")         # lines break at hyphens
        said = plain(parser.format_help())
        for name, row in (pair for table in tables for pair in table.items()):
            line = getattr(row, "about", row[-1])
            assert plain(f"{name}: {line}") in said, name
            assert name in OWN or "arXiv" in line or "same paper" in line, name


def test_a_post_s_advantages_do_not_hang_on_the_posts_beside_it():
    """Whatever rank a post is dealt to; rewards of 0 and 1, since not all take others."""
    draw = torch.Generator().manual_seed(9)
    shape = dict(generator=draw)
    group = Group(torch.rand(6, 6, **shape).round(), F.normalize(torch.randn(6, 6, 4, **shape), dim=-1),
                  quality=torch.rand(6, 6, **shape), right=torch.rand(6, 6, 3, **shape).round(),
                  shares=torch.rand(6, 3, **shape), classes=torch.randint(-1, 3, (6, 6), **shape),
                  logprobs=torch.randn(6, 6, **shape), lengths=torch.randint(1, 9, (6, 6), **shape),
                  reference=torch.randn(6, 6, **shape), values=torch.rand(6, **shape), beta=0.3,
                  seeds=torch.arange(6), texts=[["a b", "b", "a", "", "c d a", "b b"]] * 6, set_size=3)
    for name, objective in OBJECTIVES.items():
        for diversity in DIVERSITIES:
            whole = advantages_of(objective, group, 0.5, diversity, 0.1)
            alone = [advantages_of(objective, grpo.mapped(lambda x: x[i:i + 1], group), 0.5, diversity, 0.1)
                     for i in range(6)]
            assert gap(whole, torch.cat(alone)) < 1e-5, (name, diversity)
    real = torch.cat((group.rewards[:3], torch.rand(3, 6, **shape)))
    whole = grpo.darling_advantages(real, group.classes)
    alone = [grpo.darling_advantages(real[i:i + 1], group.classes[i:i + 1]) for i in range(6)]
    assert gap(whole, torch.cat(alone)) < 1e-6


@pytest.mark.parametrize("name, size, right", [
    ("passk-full", 3, False), ("passk-full", 2, True), ("polyepo", 1, False), ("passk-bootstrap", 5, False),
    ("bon", 4, True), ("darling", 9, True)])
def test_set_sizes_are_checked_before_anything_is_loaded(tmp_path, name, size, right):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    data.write_json(tmp_path / "adapter_config.json", config)
    flags = f"--model - --data - --out - --k 5 --advantage {name} --set-size {size}"
    args = grpo.parser().parse_args(["--start", str(tmp_path), *flags.split()])
    if right:
        assert grpo.check_grpo(args) == tmp_path
    else:
        with pytest.raises(InputError, match=r"the set size \(--set-size\) is"):
            grpo.check_grpo(args)


def test_means_over_drafts_of_one_token_and_of_none():
    """Draft 1 is in another micro-batch."""
    got = grpo.draft_means(torch.tensor([2.0, 4, 6]), torch.tensor([0, 2, 2]))
    assert got.tolist() == [2, 5, 5]
