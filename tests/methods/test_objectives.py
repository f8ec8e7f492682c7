"""Tests of methods/objectives.py."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F

import grpo
import lora
import model
import polylora
from grpo import group_advantages, maxk_advantages, set_advantages, subsets
from helpers import (
    CLASSES, OUTCOMES, QUALITY, REWARDS, RIGHT, SPAN, WHAT_IS_MAXIMISED, advantages_of,
    all_tuples, best_of, by_subsets, centred, diversity_advantages, epo_value, exact_gradient,
    expected_estimate, features_of, gap, grpo_session, in_double, packed, policy,
    rewards_by_length, set_features, styles_by_length,
)
from methods import objectives
from methods.objectives import polychromic_advantages
from methods import resample
from polylora import Features, diversity
from support.files import InputError
from support import registry
from support.registry import DIVERSITIES, OBJECTIVES
from support import steplog
from trainer import batch_visits


# ---- Objectives on sets --------------------------------------------------------------------------

@pytest.mark.parametrize("gated", [False, True])
def test_polychromic_advantages_are_the_mean_over_all_subsets(gated):
    """f = mean reward times D of the set, D over the set's own pairs and no others."""
    draw = torch.Generator().manual_seed(1)
    rewards, e = torch.rand(2, 6, generator=draw), F.normalize(torch.randn(2, 6, 4, generator=draw),
                                                               dim=-1)
    q = torch.rand(2, 6, generator=draw) if gated else None

    def score(p):
        return lambda sets: centred([float(rewards[p, list(s)].mean() * diversity(
            e[p:p + 1, list(s)], None if q is None else q[p:p + 1, list(s)])) for s in sets])
    for n in range(2, 6):
        got = polychromic_advantages(rewards, e, n, q)
        for p in range(2):
            assert gap(got[p], torch.tensor(by_subsets([0] * 6, n, score(p)))) < 1e-6


SETS = {  # f of a set, its advantages of the N drafts
    "max": (lambda s: REWARDS[s].amax(-1), lambda d, n: maxk_advantages(REWARDS[d], n)),
    "mean x D": (lambda s: REWARDS[s].mean(-1) * diversity(OUTCOMES[s]),
                 lambda d, n: polychromic_advantages(REWARDS[d], OUTCOMES[d], n)),
    "mean x gated D": (lambda s: REWARDS[s].mean(-1) * diversity(OUTCOMES[s], QUALITY[s]),
                       lambda d, n: polychromic_advantages(REWARDS[d], OUTCOMES[d], n, QUALITY[d])),
    "D": (lambda s: diversity(OUTCOMES[s]), lambda d, n: of_sets(diversity, d, n)),
    "mean + D": (lambda s: REWARDS[s].mean(-1) + 0.6 * diversity(OUTCOMES[s]),
                 lambda d, n: of_sets(lambda e: None, d, n, additive=True))}


def of_sets(f, drawn, n, additive=False):
    """The one equation, with D (or mean reward + 0.6 D) of every n-subset as f."""
    sets, member = subsets(drawn.shape[1], n)
    spread = torch.stack([diversity(OUTCOMES[drawn[:, s]]) for s in sets], 1)
    values = REWARDS[drawn][:, sets].mean(-1) + 0.6 * spread if additive else spread
    return set_advantages(values, member.double())


@pytest.mark.parametrize("name", SETS)
def test_the_expected_gradient_of_a_set_objective(monkeypatch, name):
    """E[sum_i A_i grad log pi(y_i)] = (N/n - 1) grad E[f], exactly and with that constant; zero
    when n = N."""
    in_double(monkeypatch)
    f, advantages = SETS[name]
    for total, n in ((3, 2), (4, 2), (5, 2), (4, 3), (5, 4)):
        theta, drawn = policy(4, seed=n), all_tuples(4, total)
        want = exact_gradient(theta, all_tuples(4, n), f(all_tuples(4, n)))
        got = expected_estimate(theta, drawn, advantages(drawn, n))
        assert (float(want.abs().max()) > 0.005 and gap(got, (total / n - 1) * want)
                < 1e-12), (total, n)
    sets, member = subsets(4, 4)
    assert gap(set_advantages(torch.rand(3, 1).double(), member.double()),
               torch.zeros(3, 4)) < 1e-15


MAXIMISED = {  # what an objective maximises, of the drawn tuples and its set size
    "drgrpo": lambda s: REWARDS[s].mean(-1),
    "maxk": lambda s: REWARDS[s].amax(-1),
    "polychromic": lambda s: REWARDS[s].mean(-1) * diversity(OUTCOMES[s]),
    "coverage": lambda s: ((s == 1) | (s == 3)).any(1) * 0.7 + (s == 2).any(1) * 0.3}


@pytest.mark.parametrize("k, n", [(3, 2), (4, 2), (4, 3), (5, 2)])
@pytest.mark.parametrize("name", MAXIMISED)
def test_the_diversity_weight_means_the_same_for_every_objective(monkeypatch, name, k, n):
    """D was multiplied by k - 1 beside every objective: right for groups, seven times too much
    for sets of 4 among 8, which weigh E[f] by N/n - 1. With f + w D as the aim, one constant
    for both."""
    in_double(monkeypatch)
    theta, drawn, w = policy(4, seed=k), all_tuples(4, k), 0.8
    objective, size = OBJECTIVES[name], 1 if name == "drgrpo" else n
    constant = k - 1 if name == "drgrpo" else k / n - 1
    assert objective.gradient_scale(set_features(drawn, n)) == pytest.approx(constant)
    got = expected_estimate(theta, drawn, advantages_of(objective, set_features(drawn, n), w))
    sets = all_tuples(4, size)
    want = exact_gradient(theta, sets, MAXIMISED[name](sets).double())
    want = want + w * exact_gradient(theta, drawn, diversity(OUTCOMES[drawn]))
    assert float(want.abs().max()) > 0.01 and gap(got, constant * want) < 1e-12


WEIGHTS = {  # of 8 drafts, and where sets count, of 4 among them
    "passk": 1, "passk-full": 1, "passk-bootstrap": 3.5, "maxk": 1, "polychromic": 1, "polyepo": 1,
    # half of them right
    "coverage": 1, "rloo": 8, "maxrl": 8, "tailrl": 8, "wreinforce": 8.8, "passk-mixed": 4,
    **dict.fromkeys(("group", "drgrpo", "bon", "darling", "dra", "dqo", "uniqueness",
                     "unlikeliness", "evol",
                     "focal"), 7)}


@pytest.mark.parametrize("name", WEIGHTS)
def test_d_is_scaled_like_the_objective(name):
    """Beside sets of 4 among 8 D weighed 7 as beside groups, seven times too much."""
    draws = torch.Generator().manual_seed(1)
    drawn = torch.randint(4, (1, 8), generator=draws)
    group = set_features(drawn, 4, rewards=torch.zeros(4))
    group.rewards = torch.tensor([[1.0, 0, 0, 1, 1, 0, 1, 0]])
    plain, both = (advantages_of(OBJECTIVES[name], group, w) for w in (0.0, 0.5))
    own = diversity_advantages(OUTCOMES[drawn])
    assert float(own.abs().max()) > 0.01
    assert gap((both - plain) / 0.5, WEIGHTS[name] * own) < 1e-5


def test_every_objective_states_its_constant():
    """A new line of the register that forgets it weighs D by somebody else's."""
    drawn, binary = all_tuples(4, 4)[::9], torch.tensor([0.0, 1.0, 0.0, 1.0]).double()
    group = set_features(drawn, rewards=binary)
    group.reference, group.values, group.beta = -torch.ones(drawn.shape).double(), torch.zeros(
        len(drawn)), 0.1
    for name, objective in OBJECTIVES.items():
        assert objective.advantages(group).shape == drawn.shape, name
        assert torch.as_tensor(objective.gradient_scale(group)).min() > 0
        assert "arXiv" in objective.about or name == "coverage"


def centred_rewards(rewards, *, normalise=True):
    """group_advantages without its quotient, which has no expected gradient in closed form."""
    return rewards - rewards.mean(-1, keepdim=True)


# ---- Expected gradients --------------------------------------------------------------------------

@pytest.mark.parametrize("k", [4, 5])
@pytest.mark.parametrize("name", WHAT_IS_MAXIMISED)
def test_the_expected_gradient_is_the_weight_times_that_of_what_is_maximised(monkeypatch, name, k):
    """With D beside it: weight times grad (J + w D), for every k, so that w means the same
    everywhere."""
    in_double(monkeypatch)
    monkeypatch.setattr(objectives, "group_advantages", centred_rewards)
    objective = OBJECTIVES[name]
    objective = (objective._replace(function=centred_rewards) if name in ("group", "drgrpo")
                 else objective)
    rewards, value = WHAT_IS_MAXIMISED[name]
    theta, drawn = policy(4, seed=k), all_tuples(4, k)
    group, worth = features_of(drawn, rewards), value(drawn)
    want = objective.gradient_scale(group) * exact_gradient(theta, drawn, worth)
    got = expected_estimate(theta, drawn, objective.advantages(group))
    assert float(want.abs().max()) > 0.01 and gap(got, want) < 1e-12
    both = expected_estimate(theta, drawn, advantages_of(objective, group, 0.7))
    spread = exact_gradient(theta, drawn, polylora.diversity(group.embeddings))
    assert (gap(both, want + 0.7 * objective.gradient_scale(group) * spread) < 1e-12
            and gap(both, got) > 0.01)


def test_the_expected_gradient_of_bootstrap_over_all_choices_of_sets(monkeypatch):
    """Its sum over random sets, averaged over every way to draw them: (N - 1)(1 - k/N) grad
    E[best of k]."""
    in_double(monkeypatch)
    monkeypatch.setattr(objectives, "group_advantages", centred_rewards)
    theta, drawn, total = policy(4), all_tuples(4, 3), 0
    choices = list(itertools.product(itertools.combinations(range(3), 2), repeat=3))
    for sets in choices:
        sets = torch.tensor(sets).expand(len(drawn), -1, -1)
        total = total + objectives.passk_bootstrap_advantages(RIGHT[drawn], sets) / len(choices)
    weight = OBJECTIVES["passk-bootstrap"].gradient_scale(Features(RIGHT[drawn], set_size=2))
    assert weight == pytest.approx(2 / 3)
    want = weight * exact_gradient(theta, drawn, best_of(RIGHT, 2)(drawn))
    assert gap(expected_estimate(theta, drawn, total), want) < 1e-12


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_expected_gradient_of_best_of_n_at_the_true_chance_to_fail(monkeypatch, n):
    in_double(monkeypatch)
    theta, drawn = policy(4), all_tuples(4, 3)
    fail = (theta.softmax(0) * (1 - RIGHT)).sum()
    want, = torch.autograd.grad(1 - fail ** n, theta, retain_graph=True)
    got = objectives.bon_advantages(RIGHT[drawn], n, fail.detach())
    assert gap(expected_estimate(theta, drawn, got), 2 * want) < 1e-12
    by_hand = objectives.bon_advantages(torch.tensor([[1.0, 0, 0, 0]]), n)[0]        # f = 3/4
    assert by_hand.tolist() == pytest.approx([x * n * 0.75 ** (n - 1)
                                              for x in (0.75, -0.25, -0.25, -0.25)])


# ---- Objectives by hand, and the papers' text in loops -------------------------------------------

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
    got = objectives.passk_full_advantages(r, 2)
    assert (got[0].tolist() == pytest.approx([a, a, b, b, c, c, 0]) and float(got[1:].abs().max())
            == 0)
    by_three = [0.9998] * 3 + [-0.9998] * 3 + [0]
    assert objectives.passk_full_advantages(r, 3)[0].tolist() == pytest.approx(by_three, abs=1e-6)
    for k in (0, 4, 7):
        with pytest.raises(InputError, match="from 1 to 3"):
            objectives.passk_full_advantages(r, k)


def test_bootstrap_sums_over_the_sets_that_hold_a_completion():
    for seed in range(20):
        seeds = torch.tensor([seed, 1000 + seed])
        rewards = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed)).double().round()
        sets = objectives.random_sets(seeds, 6, 3)
        got = objectives.passk_bootstrap_advantages(rewards, sets)
        for p in range(2):
            chosen = sets[p].tolist()
            assert (len(chosen) == 6
                    and all(len(set(s)) == 3 and set(s) <= set(range(6)) for s in chosen))
            scores = standardised([max(rewards[p][s].tolist()) for s in chosen])
            want = [sum(v for v, s in zip(scores, chosen) if i in s) for i in range(6)]
            assert got[p].tolist() == pytest.approx(want, abs=1e-9)
        group = Features(rewards, seeds=seeds, set_size=3)
        assert torch.equal(OBJECTIVES["passk-bootstrap"].advantages(group), got)


def test_random_sets_depend_on_the_prompt_s_seed_and_are_uniform():
    both = objectives.random_sets(torch.tensor([5, 9]), 6, 3)
    assert (torch.equal(both[1:], objectives.random_sets(torch.tensor([9]), 6, 3))
            and not torch.equal(both[0], both[1]))
    many = objectives.random_sets(torch.arange(3000), 4, 2).sort(-1).values.flatten(0, 1)
    counts = [int((many == torch.tensor(s)).all(1).sum())
              for s in itertools.combinations(range(4), 2)]
    assert sum(counts) == 12000 and max(counts) < 1.1 * min(counts)


def test_the_mixture_shifts_to_pass_at_k_as_a_post_is_learned():
    for right in range(1, 6):
        r = rewards_of([1.0] * right + [0.0] * (6 - right))
        share, group = right / 6, Features(r, set_size=2)
        want = share * grpo.passk_advantages(r, 2) + (1 - share) * group_advantages(r)
        assert gap(objectives.passk_mixed_advantages(r, 2), want) < 1e-12
        assert float(OBJECTIVES["passk-mixed"].gradient_scale(group)) == pytest.approx(
            share * 2 + (1 - share) * 5
        )


def test_poly_epo_counts_answers_and_wants_two():
    """A set of one answer is worth nothing; a draft without an answer is no answer."""
    drawn = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [0, 2, 3, 3]])
    assert epo_value(drawn, 3).tolist() == pytest.approx([0, (4 + 2 + 4 + 0) / 9 / 4,
                                                          (4 + 4 + 0 + 0) / 9 / 4])
    assert float(objectives.polyepo_advantages(RIGHT[drawn], CLASSES[drawn], 3)[0].abs().max()) == 0
    for n in (1, 4):
        with pytest.raises(InputError, match="set size"):
            objectives.polyepo_advantages(RIGHT[drawn], CLASSES[drawn], n)


@pytest.mark.parametrize("rewards, classes, novelty", [
    ([1, 1, 1, 1, 0], [0, 0, 1, 2, -1], [2 / 3, 2 / 3, 1, 1, 0]),              # of the right ones
    ([1, 1, 1, 0, 0], [0, 0, 0, 1, 2], [0.1, 0.1, 0.1, 0, 0]),                 # the floor
    ([1, 0, 0, 0, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0]),                       # one alone
    ([1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [1, 1, 0, 0, 0]),
    ([1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0.1, 0.1, 0, 0, 0]),
    ([0.5, 0.2, 0.0, 0.9, 0.4], [0, 0, 1, 1, 1], [0.75, 0.75, 0.5, 0.5, 0.5]),  # real ones: of all
    ([0.5, 0.2, 0.3, 0.9, 0.4], [0, 0, 1, 1, 1], [0.75, 0.75, 0.5, 0.5, 0.5]),  # none is lowered
    ([-1.0, 0.5, 0.5, 0.5, 0.5], [0, 0, 1, 2, 3], [0.75, 0.75, 1, 1, 1])])     # raised to zero
def test_darling_by_hand(rewards, classes, novelty):
    lowest = min(0, *rewards)
    shaped = [(r - lowest) * n for r, n in zip(rewards, novelty)]
    want = [s - sum(shaped) / 5 for s in shaped]
    got = objectives.darling_advantages(rewards_of([float(r) for r in rewards]),
                                        torch.tensor([classes]))
    assert got[0].tolist() == pytest.approx(want, abs=1e-6)


def test_dra_divides_by_likeness_to_the_others():
    e = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [-0.6, 0.8]]])
    got = objectives.dra_advantages(rewards_of([1.0, 1, 1, 1]), e)
    assert got[0].tolist() == pytest.approx(standardised([1 / 2, 1 / 2, 1 / 1.8, 1 / 1.8]),
                                            abs=1e-5)


def test_dqo_by_hand():
    """alpha weighs the volume that a draft adds: of three, the third is a direction of its own."""
    e = torch.tensor([SPAN["two"]]).double()
    adds = [math.log(6 / 4), math.log(6 / 4), math.log(6 / 3)]
    got = objectives.dqo_advantages(rewards_of([1.0, 0, 0]), e, alpha=0.5)[0].tolist()
    assert got == pytest.approx([r + 0.5 * 2 / 3 * a
                                 for r, a in zip((2 / 3, -1 / 3, -1 / 3), adds)], abs=1e-6)


def test_uniqueness_divides_by_the_answer_s_frequency():
    r, classes = rewards_of([1, 1, 1, 0, 0, 0.0]), torch.tensor([[0, 0, 1, -1, -1, 2]])
    for alpha in (1.0, 0.5):
        got = objectives.uniqueness_advantages(r, classes, alpha)[0].tolist()
        frequency = (2, 2, 1, 1, 1, 1)
        assert got == pytest.approx([x / f ** alpha
                                     for x, f in zip(standardised([1, 1, 1, 0, 0, 0]), frequency)])
    assert torch.equal(objectives.uniqueness_advantages(r, classes),
                       objectives.uniqueness_advantages(r, classes, 1.0))


def test_unlikeliness_lowers_the_reward_of_likely_correct_samples():
    """Ranks by mean log-probability: -3 is the least likely, rank 0."""
    logprobs, lengths = torch.tensor([[-4.0, -2.0, -3.0, -5]]), torch.tensor([[4, 1, 1, 10]])
    got = objectives.unlikeliness_advantages(rewards_of([1, 0, 1, 1.0]), logprobs,
                                             lengths)[0].tolist()
    assert got == pytest.approx(standardised([1 - 0.25 * 2 / 4, 0, 1, 1 - 0.25 * 3 / 4]))


def evol_by_the_book(classes, cosines):
    """EVOL-RL's rewards of one post, in loops, by the rules of the authors' code: those who give
    no answer are left out of every comparison, alone in its party a completion counts as most
    novel, equals get the middle."""
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
            # alone: its novelty is not looked at
            mean = sum(own) / len(own) if own else 0.0
            novelty[i] = 1 - (mean + max(cosines[i][j] for j in answered if j != i)) / 2
        for i in party:
            low, high = min(novelty.values()), max(novelty.values())
            u = 1.0 if len(party) == 1 else (novelty[i] - low) / (high - low) if high > low else 0.5
            out[i] = (0.5 if right else -1.0) + u / 2
    return out


def test_evol_rl_equals_the_paper_s_formula():
    draw = random.Random(3)
    for _ in range(60):
        classes = [draw.choice((-1, 0, 0, 1, 2)) for _ in range(6)]
        e = F.normalize(torch.randn(1, 6, 3).double(), dim=-1)
        cosines = (e[0] @ e[0].T).clamp(0, 1).tolist()
        want = standardised(evol_by_the_book(classes, cosines))
        assert objectives.evol_advantages(torch.tensor([classes]),
                                          e)[0].tolist() == pytest.approx(want, abs=2e-4)
    e = torch.eye(4)[None, [0, 0, 1, 2]]
    # likeness: 3/4, 3/4, 0; one is alone
    rewards = evol_by_the_book([0, 0, 0, 1], (e[0] @ e[0].T).tolist())
    assert rewards == [0.5, 0.5, 1.0, -0.5]
    got = objectives.evol_advantages(torch.tensor([[0, 0, 0, 1]]), e)
    assert got[0].tolist() == pytest.approx(standardised(rewards), abs=1e-4)


@pytest.mark.parametrize("classes, places, rewards", [
    # one lone minority answer
    ([0, 0, 0, 1], [0, 0, 1, 2], [0.5, 0.5, 1.0, -0.5]),
    # the majority is one text
    ([0, 0, 0, 1], [0, 0, 0, 1], [0.75, 0.75, 0.75, -0.5]),
    ([0, 0, 1, 2], [0, 1, 2, 2], [0.75, 0.75, -0.75, -0.75]),                  # so is the minority
    # each alone in its party
    ([0, 1, -1, -1], [0, 1, 2, 3], [1.0, -0.5, -1.0, -1.0]),
    # one answer cannot be compared
    ([0, -1, -1, -1], [0, 1, 2, 3], [-1.0] * 4),
    # likeness to no answer does not count
    ([0, 0, 0, -1], [0, 1, 2, 2], [0.75, 0.75, 0.75, -1.0])])
def test_evol_rl_gives_the_rewards_of_the_authors_code(classes, places, rewards):
    """A lone minority answer got -1 and a majority of one text .5; equal texts whose embeddings
    differ by rounding count as equal."""
    for noise in (0.0, 1e-7):
        e = (torch.eye(4)[None, places].double() + noise * torch.randn(1, 4, 4).double()).float()
        e = F.normalize(e, dim=-1)
        got = objectives.evol_rewards(torch.tensor([classes]), e)
        assert got[0].tolist() == pytest.approx(rewards, abs=1e-5)
        assert objectives.evol_advantages(torch.tensor([classes]),
                                          e)[0].tolist() == pytest.approx(standardised(rewards),
                                                                          abs=1e-3)


def test_maxrl_and_tailrl_agree_on_right_and_wrong():
    """(N - K)/K and -1; where none or all are right, nothing. TailRL's real rewards by its
    recursion."""
    for right in range(7):
        r = rewards_of([1.0] * right + [0.0] * (6 - right))
        want = [(6 - right) / right] * right + [-1.0] * (6 - right) if 0 < right < 6 else [0.0] * 6
        for got in (objectives.maxrl_advantages(r), objectives.tailrl_advantages(r)):
            assert got[0].tolist() == pytest.approx(want, abs=1e-9)
    values = [0.3, -0.2, 0.9, 0.3, 0.5]
    w, before = {}, 0.0
    ordered = sorted(range(5), key=lambda i: values[i])
    for n, i in enumerate(ordered, 1):
        before += 5 * (values[i] - (values[ordered[n - 2]] if n > 1 else 0.0)) / (5 - n + 1)
        w[i] = before
    want = [w[i] - sum(w.values()) / 5 for i in range(5)]
    assert objectives.tailrl_advantages(rewards_of(values))[0].tolist() == pytest.approx(want)
    with pytest.raises(InputError, match="tailrl"):
        objectives.maxrl_advantages(rewards_of(values))


def test_w_reinforce_and_f_grpo_by_hand():
    r = rewards_of([1, 0, 0, 1.0], [0, 0, 0, 0])
    assert gap(objectives.wreinforce_advantages(r), rewards_of([0.1, -1, -1, 0.1], [-1] * 4)) < 1e-6
    assert gap(objectives.focal_advantages(r, 2.0), 0.25 * group_advantages(r)) < 1e-12
    assert gap(objectives.focal_advantages(r), 0.5 * group_advantages(r)) < 1e-12


@pytest.mark.parametrize("name", ["passk", "passk-mixed", "bon", "wreinforce", "focal"])
def test_binary_objectives_refuse_real_valued_rewards(name):
    for value in (0.5, -1.0, math.nan):
        with pytest.raises(InputError, match="0 or 1"):
            OBJECTIVES[name].advantages(Features(rewards_of([1, 0, value, 0]), set_size=2))


def test_every_field_an_objective_needs_exists():
    group = features_of(torch.tensor([[0, 1, 2, 3, 0]]))
    assert all(hasattr(group, name) for o in OBJECTIVES.values() for name in o.needs)
    assert all(o.about and "arXiv" in o.about or name == "coverage"
               for name, o in OBJECTIVES.items())


# ---- Every line of the registers takes steps -----------------------------------------------------

@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_takes_two_steps_and_moves_the_adapter(parts, name):
    s = grpo_session(parts, "--advantage", name, "--beta", "0.1")
    s.reward, s.domain.styles_of = rewards_by_length, styles_by_length(s.domain)
    others = [p for p in s.model.parameters() if not any(p is q for q in s.params)]
    frozen = [p.clone() for p in others]
    before, optimizer = lora.frozen_copy(s.model), torch.optim.AdamW(s.params, lr=1e-3)
    for step in range(2):
        tally = grpo.grpo_step(s, step)
        optimizer.step()
        optimizer.zero_grad()
    means = tally.means(s.ranks, steplog.GRPO_LOGGED)
    assert all(math.isfinite(x) for x in means.values())
    assert means["advantage"] > 0 and means["kl"] > 0 and means["k2"] > 0
    assert all(not torch.equal(p, before[n]) for n, p in lora.adapter_state(s.model).items())
    assert all(torch.equal(p, q) for p, q in zip(others, frozen))              # and nothing else


# ---- SFT losses ----------------------------------------------------------------------------------

@pytest.mark.slow
def test_advantages_of_a_post_do_not_depend_on_other_posts():
    """Whatever rank a post is assigned to; rewards of 0 and 1, since not all take others."""
    draw = torch.Generator().manual_seed(9)
    shape = dict(generator=draw)
    group = Features(
        torch.rand(6, 6, **shape).round(), F.normalize(torch.randn(6, 6, 4, **shape), dim=-1),
        quality=torch.rand(6, 6, **shape), right=torch.rand(6, 6, 3, **shape).round(),
        shares=torch.rand(6, 3, **shape), classes=torch.randint(-1, 3, (6, 6), **shape),
        logprobs=torch.randn(6, 6, **shape), lengths=torch.randint(1, 9, (6, 6), **shape),
        reference=torch.randn(6, 6, **shape), values=torch.rand(6, **shape), beta=0.3,
        seeds=torch.arange(6), texts=[["a b", "b", "a", "", "c d a", "b b"]] * 6, set_size=3)
    for name, objective in OBJECTIVES.items():
        for diversity in DIVERSITIES:
            whole = advantages_of(objective, group, 0.5, diversity, 0.1)
            alone = [advantages_of(objective, resample.mapped(lambda x: x[i:i + 1], group), 0.5,
                                   diversity, 0.1)
                     for i in range(6)]
            assert gap(whole, torch.cat(alone)) < 1e-5, (name, diversity)
    real = torch.cat((group.rewards[:3], torch.rand(3, 6, **shape)))
    whole = objectives.darling_advantages(real, group.classes)
    alone = [objectives.darling_advantages(real[i:i + 1], group.classes[i:i + 1]) for i in range(6)]
    assert gap(whole, torch.cat(alone)) < 1e-6


REFERENCE = torch.tensor([0.5, 0.1, 0.3, 0.1]).double()                        # of four outcomes


# ---- Objectives ----------------------------------------------------------------------------------

def test_ucpo_redistributes_advantage_among_correct_samples():
    """Mean log-probabilities -1, -2 and -1.5 of the three right ones: 1/q is e^1, e^2 and e^1.5
    over their sum."""
    r, logp = rewards_of([1, 0, 1, 1.0],
                         [0, 0, 0, 0]), torch.tensor([[-4.0, -9, -2, -3],
                                                      [-1, -2, -3, -4]]).double()
    lengths = torch.tensor([[4, 3, 1, 2], [1, 1, 1, 1]])
    odds = [math.exp(1), math.exp(2), math.exp(1.5)]
    plain = group_advantages(r)[0].tolist()
    for tau in (0.2, 1.0):
        share = [1 - tau + tau * 3 * x / sum(odds) for x in odds]
        want = [plain[0] * share[0], plain[1], plain[2] * share[1], plain[3] * share[2]]
        got = objectives.ucpo_advantages(r, logp, lengths, tau)
        assert got[0].tolist() == pytest.approx(want) and float(got[1].abs().max()) == 0
        assert float(got[0].sum()) == pytest.approx(sum(plain), abs=1e-6)
    assert torch.equal(objectives.ucpo_advantages(r, logp, lengths),
                       objectives.ucpo_advantages(r, logp, lengths, 0.2))


def test_mara_makes_the_even_policy_over_good_drafts_the_best():
    """With every outcome in the group: ref exp(R/beta), the optimum under the KL, is the same
    for all good ones; and where the anchor is in every group the gradient there is zero."""
    beta, r, ref = 0.7, torch.tensor([[1.0, 0.0, 1.0, 0.3]]).double(), REFERENCE.log()[None]
    a = objectives.mara_advantages(r, ref, beta)[0]
    shaped = [1.0, 0.0, 1 + beta * math.log(0.5 / 0.3), 0.3]
    mean = sum(shaped) / 4
    assert a.tolist() == pytest.approx([4 / 3 * (x - mean) for x in shaped])
    target = REFERENCE * (torch.tensor(shaped).double() / beta).exp()
    assert target[0].item() == pytest.approx(target[2].item())
    low = objectives.mara_advantages(torch.tensor([[0.2, 0.5, 0.4]]).double(), ref[:, :3], beta,
                                     threshold=0.4)[0]
    # the anchor is the third
    lifted = [0.2, 0.4 + beta * math.log(0.3 / 0.1), 0.4]
    assert low.tolist() == pytest.approx([1.5 * (x - sum(lifted) / 3) for x in lifted])
    none = objectives.mara_advantages(torch.tensor([[0.2, 0.0]]).double(), ref[:, :2], beta)[0]
    assert none.tolist() == pytest.approx([0.2, -0.2])


def test_the_soft_objective_s_gradient_is_that_of_reward_less_kl(monkeypatch):
    in_double(monkeypatch)
    theta, drawn = policy(4, seed=3), all_tuples(4, 3)
    logp, beta = theta.log_softmax(0), 0.6
    want, = torch.autograd.grad((logp.exp() * (RIGHT - beta * (logp - REFERENCE.log()))).sum(),
                                theta,
                                retain_graph=True)
    got = objectives.soft_advantages(RIGHT[drawn], logp.detach()[drawn], REFERENCE.log()[drawn],
                                     beta)
    assert (gap(expected_estimate(theta, drawn, got), 2 * want) < 1e-12 and float(want.abs().max())
            > 0.01)
    assert OBJECTIVES["soft-spo"].gradient_scale(Features(RIGHT[drawn])) == 2


# ---- Single-stream SPO's values ------------------------------------------------------------------

def test_reference_log_probabilities_reach_the_objective(parts):
    s = grpo_session(parts, "--advantage", "soft-spo", "--beta", "0.4", "--micro-tokens", "60")
    s.reward = rewards_by_length
    s.start = {n: 0.5 * p for n, p in s.start.items()}
    seen = {}
    objective = OBJECTIVES["soft-spo"]

    def spy(rewards, logprobs, reference, beta):
        seen.update(reference=reference, beta=beta)
        return objective.function(rewards, logprobs, reference, beta)
    registry.OBJECTIVES["soft-spo"] = objective._replace(function=spy)
    try:
        grpo.grpo_step(s, 0)
    finally:
        registry.OBJECTIVES["soft-spo"] = objective
    drawn = grpo.collect(s, batch_visits(len(s.posts), 3, 0, s.args.seed), 0)
    rows = packed(list(zip(drawn.prompts, drawn.samples.tokens)))
    with torch.no_grad(), lora.adapter(s.model, s.start):
        logp = model.token_logprobs(s.model, rows, s.args.temperature)[0]
    want = torch.zeros(12).index_add_(0, rows.completion, logp).view(3, 4)
    assert seen["beta"] == 0.4 and gap(seen["reference"], want) < 1e-4
