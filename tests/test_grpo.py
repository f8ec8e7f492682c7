"""Tests of grpo.py."""

import itertools
import json
import math
import random
import shutil
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import generate
import grpo
import lora
import model
import rewards
import trainer
from grpo import (
    coverage_advantages, group_advantages, maxk_advantages, passk_advantages, policy_loss,
    set_advantages, subsets,
)
from helpers import (
    OUTCOMES, QUALITY, REWARDS, WHAT_IS_MAXIMISED, Share, advantages_of, after, all_tuples,
    both_take, build_model, by_subsets, centred, diversity_advantages, exact_gradient,
    expected_estimate, features_of, gap, gradient, grads_of, grpo_args, grpo_session, in_double,
    lines, nearly, on_two_ranks, policy, resumed, rewards_by_length, rl, set_features,
    step_gradient, styles_by_length,
)
from lora import adapter_state, add_lora, frozen_copy, lora_layers, save_adapter
from methods.objectives import polychromic_advantages
from methods import resample
from model import token_logprobs
from polylora import Features, diversity, pair_distances
from support import checks
from support import files
from support.files import InputError
from support import posts as support_posts
from support import registry
from support.registry import OBJECTIVES, SCHEDULES
from support import steplog
from support.steplog import Tally
from trainer import batch_visits


# ---- Group advantages ----------------------------------------------------------------------------

def test_group_advantages_by_hand():
    """Within each post's own group, population deviation, and the 1e-4 inside the quotient."""
    r = torch.tensor([[1.0, 0, 0, 0], [3, 3, 5, 5], [-2, 0, 2, 0]]).double()
    s = math.sqrt(3) / 4
    want = torch.tensor([[0.75 / (s + 1e-4)] + [-0.25 / (s + 1e-4)] * 3,
                         [-1 / 1.0001] * 2 + [1 / 1.0001] * 2,
                         [-2 / (2 ** 0.5 + 1e-4), 0, 2 / (2 ** 0.5 + 1e-4), 0]],
                        dtype=torch.float64)
    got = group_advantages(r)
    assert gap(got, want) < 1e-12 and gap(got.sum(-1), torch.zeros(3)) < 1e-12
    # other groups do not matter
    assert gap(group_advantages(r[1:2]), got[1:2]) < 1e-12
    assert torch.equal(group_advantages(r, normalise=False), r - r.mean(-1, keepdim=True))
    sample = (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-4)
    batch = (r - r.mean()) / (r.std(correction=0) + 1e-4)
    outside = (r - r.mean(-1, keepdim=True)) / r.std(-1, keepdim=True, correction=0) + 1e-4
    assert min(gap(got, x) for x in (sample, batch)) > 0.1 and gap(got, outside) > 1e-4


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 0.7, 1e-9, 1e6 / 3])
def test_equal_rewards_have_advantage_exactly_zero(value):
    """The mean of equal numbers is off by a rounding, and the rounding divided by itself is a large
    advantage."""
    for g in range(2, 17):
        for normalise in (True, False):
            got = group_advantages(torch.full((2, g), value), normalise=normalise)
            assert torch.equal(got, torch.zeros(2, g))
    rows = [torch.full((g,), 0.1) for g in range(2, 17)]
    careless = [float(((r - r.mean()) / (r.std(correction=0) + 1e-8)).abs().max()) for r in rows]
    assert max(careless) > 0.3


# ---- Objectives on sets --------------------------------------------------------------------------

def standardised(values):
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / std for v in values]


@pytest.mark.parametrize("n", [6, 7, 8])
def test_passk_advantages_are_the_mean_over_all_subsets(n):
    """The closed form against its definition: every count of right drafts, every k, right ones
    anywhere in the group."""
    for k in range(1, n):
        for right in range(n + 1):
            rewards = [1.0] * right + [0.0] * (n - right)
            random.Random(n * k + right).shuffle(rewards)
            got = passk_advantages(torch.tensor([rewards, rewards[::-1]]).double(), k)
            if right == 0 or n - right < k:  # no subset or every subset passes
                assert torch.equal(got, torch.zeros(2, n))
                continue
            best = lambda sets: [max(rewards[i] for i in s) for s in sets]
            want = by_subsets(rewards, k, lambda sets: standardised(best(sets)))
            assert (gap(got[0], torch.tensor(want)) < 1e-6 and gap(got[1], torch.tensor(want[::-1]))
                    < 1e-6)


def test_maxk_advantages_are_the_mean_over_all_subsets_and_passk_s_up_to_sigma():
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(3, 7, generator=draw).double()
    for k in range(1, 7):
        for row, got in zip(rewards.tolist(), maxk_advantages(rewards, k)):
            want = by_subsets(row, k, lambda sets: centred([max(row[i] for i in s) for s in sets]))
            assert gap(got, torch.tensor(want).to(got)) < 1e-6 and abs(float(got.sum())) < 1e-12
    for right, k in itertools.product(range(1, 7), range(1, 7)):
        binary = torch.tensor([[1.0] * right + [0.0] * (7 - right)]).double()
        rate = 1 - math.comb(7 - right, k) / math.comb(7, k)
        want = passk_advantages(binary, k) * math.sqrt(rate * (1 - rate))
        assert gap(maxk_advantages(binary, k), want) < 1e-6


def test_sets_that_cannot_be_formed_are_refused():
    """With n = N every subset is the whole group and the gradient is zero: a run that trains
    nothing."""
    r, e = torch.tensor([[1.0, 0, 0, 1]]), F.normalize(torch.randn(1, 4, 3), dim=-1)
    for k in (0, 4, 5):
        for wrong in (passk_advantages, maxk_advantages):
            with pytest.raises(InputError, match="below the number of completions"):
                wrong(r, k)
    for n in (0, 1, 4, 5):
        with pytest.raises(InputError, match="set size"):
            polychromic_advantages(r, e, n)
    for value in (0.5, -1.0, 2.0, math.nan):
        with pytest.raises(InputError, match="0 or 1"):
            passk_advantages(torch.tensor([[1.0, 0, value, 0]]), 2)


def test_the_gradient_of_d_is_the_set_objective_of_pairs(monkeypatch):
    """One equation: with f = D on pairs, A_i = d_i - D, which is (k/2 - 1) times
    diversity_advantages, gate or no gate."""
    in_double(monkeypatch)
    drawn = all_tuples(4, 5)[::7]
    for q in (None, QUALITY[drawn]):
        delta = pair_distances(OUTCOMES[drawn], q)
        sets, member = subsets(5, 2)
        values = torch.stack([delta[:, i, j] for i, j in sets.tolist()], 1)
        got = set_advantages(values, member.double())
        assert gap(got, delta.sum(-1) / 4 - diversity(OUTCOMES[drawn], q)[:, None]) < 1e-12
        assert gap(got, (5 / 2 - 1) * diversity_advantages(OUTCOMES[drawn], q)) < 1e-12


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_weight_of_d_does_not_depend_on_k(monkeypatch, k, gated):
    """Reward and D enter with one constant: the expected gradient is (k - 1) grad(E r + w E D).
    D as a per-draft reward would weigh (k - 2)/(2(k - 1)) of that, nothing at k = 2."""
    in_double(monkeypatch)
    theta, drawn, w = policy(4, seed=k), all_tuples(4, k), 0.8
    q = QUALITY[drawn] if gated else None
    a = advantages_of(OBJECTIVES["drgrpo"], set_features(drawn, quality=q), w)
    got = expected_estimate(theta, drawn, a)
    value = REWARDS[drawn].mean(-1) + w * diversity(OUTCOMES[drawn], q)
    want = (k - 1) * exact_gradient(theta, drawn, value)
    assert gap(got, want) < 1e-12
    plain = expected_estimate(theta, drawn,
                              advantages_of(OBJECTIVES["drgrpo"], set_features(drawn)))
    assert gap(plain, (k - 1) * exact_gradient(theta, drawn, REWARDS[drawn].mean(-1))) < 1e-12
    assert gap(got, plain) > 0.01


def test_coverage_advantages_are_the_mean_over_all_subsets():
    """f = the readers' share of the voices that some draft of the set is right in."""
    draw = torch.Generator().manual_seed(2)
    right = (torch.rand(2, 6, 3, generator=draw) < 0.3).double()
    shares = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]]).double()
    for n in range(1, 6):
        got = coverage_advantages(right, shares, n)
        for p in range(2):
            covered = lambda s: sum(float(shares[p, v]) for v in range(3)
                                    if right[p, list(s), v].any())
            want = by_subsets([0] * 6, n, lambda sets: centred([covered(s) for s in sets]))
            assert gap(got[p], torch.tensor(want)) < 1e-6
    for n in (0, 6):
        with pytest.raises(InputError, match="set size"):
            coverage_advantages(right, shares, n)


# ---- The loss ------------------------------------------------------------------------------------

def loss_and_slope(ratio, advantage, **options):
    """Of one token: loss, its derivative by logp, and whether the clip was active."""
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, clipped, _ = policy_loss(logp, torch.zeros(1), torch.tensor([advantage]), denominator=1,
                                   **options)
    loss.backward()
    return loss.item(), logp.grad.item(), clipped.item()


@pytest.mark.parametrize("advantage, ratio, loss, slope, clipped", [
    # A > 0, below: the pessimistic minimum is the unclipped one, and it pulls back
    (2.0, 0.5, -1.0, -1.0, 0),
    (2.0, 1.0, -2.0, -2.0, 0),
    (2.0, 1.5, -2.4, 0.0, 1),          # A > 0, above: far enough
    (-2.0, 0.5, 1.6, 0.0, 1),          # A < 0, below: far enough
    (-2.0, 1.0, 2.0, 2.0, 0),
    (-2.0, 1.5, 3.0, 3.0, 0)])         # A < 0, above: unbounded, and it must pull back
def test_clipping_has_the_right_sign_in_all_six_cases(advantage, ratio, loss, slope, clipped):
    """A minimum taken for the wrong sign clips just the tokens that should come back."""
    assert loss_and_slope(ratio, advantage) == pytest.approx((loss, slope, clipped), abs=1e-5)


def test_the_upper_clip_can_be_higher_than_the_lower():
    """DAPO's clip-higher: 1.25 is outside 0.2 and inside 0.28, for positive advantages alone."""
    assert loss_and_slope(1.25, 1.0)[1:] == (0, 1)
    assert loss_and_slope(1.25, 1.0, clip_high=0.28)[1:] == pytest.approx((-1.25, 0), abs=1e-5)
    assert loss_and_slope(1.3, 1.0, clip_high=0.28)[0] == pytest.approx(-1.28, abs=1e-5)
    assert loss_and_slope(0.75, -1.0, clip_high=0.28)[1:] == (0, 1)
    assert loss_and_slope(0.75, -1.0, clip_low=0.3)[1:] == pytest.approx((0.75, 0), abs=1e-5)


def test_on_policy_the_ratio_is_one_and_the_gradient_is_not_zero():
    """The value of the loss is about zero, as it should be: its gradient is -A / denominator. A
    ratio that is a constant 1 trains nothing."""
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    a = torch.tensor([1.0, -0.25, -0.75])
    loss, clipped, kl = policy_loss(logp, logp.detach(), a, denominator=10)
    loss.backward()
    assert abs(loss.item()) < 1e-7 and clipped == kl == 0 and gap(logp.grad, -a / 10) < 1e-7


def test_no_gradient_goes_through_the_old_policy_or_the_reference():
    logp, old, reference = (torch.tensor([-1.0, -2.0], requires_grad=True) for _ in range(3))
    before = [x.detach().clone() for x in (logp, old, reference)]
    a = torch.tensor([0.5, 0.0])
    loss, _, _ = policy_loss(logp, old, a, denominator=2, reference=reference - 0.3, beta=0.1)
    loss.backward()
    # A = 0: the KL still acts
    assert old.grad is None and reference.grad is None and float(logp.grad[1]) != 0
    assert (all(torch.equal(x, y) for x, y in zip((logp, old, reference), before))
            and a.tolist() == [0.5, 0.0])


def test_the_kl_s_expected_gradient_is_the_kl_s(monkeypatch):
    """ratio * k3 on policy is exact over all outcomes; k1 in the loss has gradient zero, k3
    alone points elsewhere."""
    theta, reference = policy(5), policy(5, seed=9).detach().log_softmax(-1)
    logp = theta.log_softmax(-1)
    p = logp.exp().detach()
    want, = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), theta, retain_graph=True)
    one = lambda y: policy_loss(logp[y:y + 1], logp[y:y + 1].detach(), torch.zeros(1).double(),
                                denominator=1,
                                reference=reference[y:y + 1], beta=0.5)
    got, = torch.autograd.grad(sum(p[y] * one(y)[0] for y in range(5)), theta, retain_graph=True)
    assert float(want.abs().max()) > 0.1 and gap(got, 0.5 * want) < 1e-12
    k1, = torch.autograd.grad((p * (logp - reference)).sum(), theta, retain_graph=True)
    k3 = (reference - logp).exp() - 1 - (reference - logp)
    k3, = torch.autograd.grad((p * k3).sum(), theta, retain_graph=True)
    assert float(k1.abs().max()) < 1e-12 and gap(k3, want) > 0.1
    assert gap(sum(p[y] * one(y)[2] for y in range(5)), (p * (logp - reference)).sum()) < 1e-12


def test_beta_zero_needs_no_reference_and_k3_is_never_negative():
    """k1 has the same mean and is negative at every other token: its estimates scatter far more."""
    logp, a = torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0])
    loss, _, kl = policy_loss(logp, logp, a, denominator=3)
    assert float(loss) == -1 and float(kl) == 0
    for gap_ in (0.5, -0.5):
        kl = policy_loss(logp, logp, a, denominator=3, reference=logp + gap_, beta=1.0)[2]
        assert (float(kl) == pytest.approx(2 * (math.exp(gap_) - 1 - gap_), abs=1e-6)
                and float(kl) > 0)


def test_a_sequence_ratio_is_the_geometric_mean_of_its_tokens(monkeypatch):
    """GSPO-token by hand: drafts of 2 and 1 tokens; ratios e^0.2 and e^-0.3 in value at every
    token, the token's own gradient; clipping by the draft, not by the token."""
    old, completion = torch.tensor([-1.0, -2.0, -1.5]), torch.tensor([0, 0, 1])
    logp = (old + torch.tensor([0.5, -0.1, -0.3])).requires_grad_()
    a = torch.tensor([1.0, 1.0, -1.0])
    loss, clipped, _ = policy_loss(logp, old, a, denominator=3, completion=completion,
                                   sequence_ratio=True, clip_low=0.3, clip_high=0.3)
    loss.backward()
    one, two = math.exp(0.2), math.exp(-0.3)
    assert loss.item() == pytest.approx((-one - one + two) / 3, abs=1e-6) and clipped == 0
    assert gap(logp.grad, torch.tensor([-one, -one, two]) / 3) < 1e-6
    plain = policy_loss(logp, old, a, denominator=3, clip_low=0.3, clip_high=0.3)
    # e^0.5 alone is outside
    assert plain[1] == 1
    narrow = policy_loss(logp, old, a, denominator=3, completion=completion, sequence_ratio=True,
                         clip_high=0.1,
                         clip_low=0.3)
    assert narrow[1] == 2 and narrow[0].item() == pytest.approx((-2.2 + two) / 3, abs=1e-6)


# ---- The step, on a real session around a tiny model ---------------------------------------------

@pytest.mark.slow_after(1)
@pytest.mark.parametrize("budget", [1, 60, 150])
def test_the_gradient_does_not_depend_on_the_micro_batches(parts, budget):
    """One denominator for the whole step: 1 x 8, 2 x 4 and 4 x 2 are the same step."""
    whole, tally = step_gradient(rl(parts))
    cut, other = step_gradient(rl(parts, "--micro-tokens", str(budget)))
    nearly(cut, whole)
    names = [n for n in steplog.GRPO_LOGGED if n in tally.sums]
    assert tally.means(Share(), names) == pytest.approx(other.means(Share(), names), rel=1e-3,
                                                        abs=1e-5)
    means = tally.means(Share(), names)
    assert means["mismatch"] < 1e-4 and means["clipped"] == 0
    assert means["kl"] > 1e-3 and means["zero_variance"] < 0.5


@pytest.mark.slow
def test_the_gradients_of_two_ranks_add_up_to_the_whole(parts):
    """Divided by its own tokens, a rank with short drafts would weigh more; drafts must not
    depend on the rank."""
    whole = rl(parts)
    want, _ = step_gradient(whole)
    total, = whole.ranks.summed[0]
    ranks = [Share(r, 2, totals=whole.ranks.summed) for r in (0, 1)]
    one, two = (step_gradient(rl(parts, ranks=r))[0] for r in ranks)
    nearly({n: one[n] + two[n] for n in want}, want)
    counts = [r.summed[0][0] for r in ranks]
    assert sum(counts) == total and len(set(counts)) == 2
    # Each by its own count: another gradient
    own = [step_gradient(rl(parts, ranks=Share(r, 2)))[0] for r in (0, 1)]
    with pytest.raises(AssertionError):
        nearly({n: sum(g[n] for g in own) / 2 for n in want}, want, 1e-3)


def test_the_step_is_the_policy_gradient_of_its_advantages(parts):
    """-(1/tokens) sum over tokens of A grad log pi, A of the draft's own group: against plain
    forwards, draft by draft."""
    s = rl(parts, "--beta", "0", "--temperature", "0.8", "--micro-tokens", "100")
    got, tally = step_gradient(s)
    mine = batch_visits(len(s.posts), 6, 0, 4)
    prompts, samples, texts = s.sample_completions(mine, 0, 4)
    group = Features(torch.tensor(s.reward(None, texts, 0)), s.embedder(texts))
    a = advantages_of(OBJECTIVES["group"], group, s.args.diversity_weight)
    own = advantages_of(OBJECTIVES["group"], group)
    assert tally.sums["D_share"][0] == pytest.approx(float((a - own).norm() / own.norm()), rel=1e-4)
    count = sum(len(d) for completions in samples.tokens for d in completions)
    reward = sum(map(sum, s.reward(None, texts, 0)))
    assert (tally.sums["reward"] == pytest.approx((reward, 24)) and tally.sums["length"]
            == (count, 24))

    def plain(_):
        for p, (prompt, completions) in enumerate(zip(prompts, samples.tokens)):
            for i, d in enumerate(completions):
                out = s.model(torch.tensor([prompt + d]))[0, len(prompt) - 1:-1,
                                                          :s.model.vocab] / 0.8
                logp = out.log_softmax(-1)[torch.arange(len(d)), torch.tensor(d)]
                (-a[p, i] * logp.sum() / count).backward()
    nearly(got, gradient(s, plain)[0], 1e-3)


def test_d_has_the_share_that_was_asked_for_on_any_number_of_ranks(parts, monkeypatch):
    """--diversity-share: |D's part| = share |the objective's|, both over the whole step; where
    no reward differs there is nothing to have a share of."""
    monkeypatch.setattr(grpo, "log_rollout",
                        lambda tally, features, samples, a: setattr(tally, "advantages", a))

    def step(ranks=None):
        s, tally = rl(parts, "--diversity-weight", "0", "--diversity-share", "0.6",
                      ranks=ranks), Tally()
        grpo.rollout(s, 0, tally)
        return s, tally.advantages, tally
    s, got, tally = step()
    _, samples, texts = s.sample_completions(batch_visits(len(s.posts), 6, 0, 4), 0, 4)
    group = Features(torch.tensor(s.reward(None, texts, 0)), s.embedder(texts))
    own, unit = (advantages_of(OBJECTIVES["group"], group, w) for w in (0, 1))
    weight = 0.6 * own.norm() / (unit - own).norm()
    assert gap(got, own + weight * (unit - own)) < 1e-4
    assert (tally.sums["D_share"][0] == pytest.approx(0.6) and tally.sums["D_weight"][0]
            == pytest.approx(float(weight), rel=1e-4))
    halves = on_two_ranks(lambda ranks: step(ranks)[1])
    # posts are assigned in turn
    assert gap(torch.stack(halves, 1).view(6, 4), got) < 1e-4
    tally = Tally()
    assert rewards.diversity_weight(s.args, 0.0, 1.0, 1.0, tally) == 0 and not tally.sums
    with pytest.raises(InputError, match="both"):
        checks.check_grpo(grpo.parser().parse_args([
            "--start", "-", "--data", "-", "--out", "-", "--model", "-", "--dry-run",
            "--diversity-weight", "1", "--diversity-share", "1"]))


def test_several_updates_reuse_the_completions_and_their_first_log_probs(parts):
    """The second update is off policy: its ratios are against the log-probs of the rollout,
    taken by the training path."""
    s = rl(parts, "--updates", "2", "--lr", "1")
    completions, write = [], s.sample_completions
    s.sample_completions = lambda *a: (completions.append(a), write(*a))[1]
    first, tally = step_gradient(s, 0)
    same, _ = step_gradient(s, 1)
    # an error names the posts of a step that reuses completions, too
    assert s.visits == batch_visits(len(s.posts), s.args.batch, 0, s.args.seed)
    # nothing has moved yet
    nearly(same, first)
    assert tally.sums["clipped"][0] == 0 and "mismatch" in tally.sums
    with torch.no_grad():
        for n, p in adapter_state(s.model).items():
            p -= 0.3 * first[n] / first[n].abs().max().clamp_min(1e-9)
    _, tally = step_gradient(s, 1)
    assert len(completions) == 1 and tally.sums["clipped"][0] > 0 and "reward" not in tally.sums
    assert "mismatch" not in tally.sums                                        # left out, never 0
    step_gradient(s, 2)
    assert len(completions) == 2 and completions[1][1] == 2


def test_a_batch_is_kept_until_its_updates_are_done(parts):
    """Posts advance once a rollout: advancing at every update would leave out the posts between
    two rollouts."""
    for updates, step, number in ((1, 3, 3), (2, 0, 0), (2, 2, 1), (3, 6, 2)):
        s = rl(parts, "--updates", str(updates), "--batch", "4")
        grpo.rollout(s, step, Tally())
        drawn = s.visits
        assert drawn == batch_visits(12, 4, number, s.args.seed)


def test_the_log_has_d_of_two_completions_and_the_tokens_of_a_step(parts):
    """Of each pass the row's tokens and the predicted ones, without which tokens a second would
    be another number."""
    s = rl(parts, "--k", "2")
    _, tally = step_gradient(s)
    group = grpo.collect(s, s.visits, 0).features
    assert tally.sums["D"] == pytest.approx((float(diversity(group.embeddings).sum()), 6))
    want = sum(batch.rows.tokens.numel() + len(batch.advantages) for batch in s.batches)
    assert tally.sums["tokens"][0] == want
    s = rl(parts, "--k", "1", "--advantage", "single-stream-spo", "--diversity-weight", "0")
    s.run = None
    assert "D" not in step_gradient(s)[1].sums


def test_a_completion_near_the_length_limit_loses_reward(parts):
    """The penalty is at most 0: with its sign turned the longest drafts would earn the most."""
    s = rl(parts, "--overlong", "5")
    visits = batch_visits(12, 6, 0, 4)
    group = grpo.collect(s, visits, 0).features
    earned = torch.tensor(s.reward(None, group.texts, None))
    want = [[min(0.0, (7 - 5 - length) / 5) for length in lengths]
            for lengths in group.lengths.tolist()]
    assert gap(group.rewards, earned + torch.tensor(want)) < 1e-6
    assert float((group.rewards - earned).min()) == -1 and len({x for row in want for x in row}) > 1


def test_the_reference_is_the_starting_adapter_not_the_base(parts):
    """Of a policy that begins at an SFT adapter, the KL to itself is zero at the first step; to
    the bare base it is not."""
    s = rl(parts)
    s.start = frozen_copy(s.model)
    _, tally = step_gradient(s)
    assert abs(tally.sums["kl"][0]) < 1e-6
    s.start = {n: torch.zeros_like(p) for n, p in adapter_state(s.model).items()}
    _, tally = step_gradient(s)
    assert tally.sums["kl"][0] > 1


def test_equal_rewards_leave_only_the_kl(parts):
    """A batch of zero-variance groups: no policy gradient at all, and without KL nothing but
    exact zeros."""
    s = rl(parts, "--diversity-weight", "0")
    s.reward = lambda posts, completions, seeds: [[0.1] * len(ts) for ts in completions]
    grads, tally = step_gradient(s)
    assert (tally.sums["zero_variance"] == (6, 6)
            and any(float(g.abs().max()) > 0 for g in grads.values()))
    s.args.beta = 0.0
    grads, _ = step_gradient(s)
    assert all(float(g.abs().max()) == 0 for g in grads.values())


def test_the_reference_lies_where_the_model_does(parts, tmp_path, monkeypatch):
    """With --shard the model is read on the host and moved when it is spread: a copy taken
    before stayed behind, and the KL crashed on a GPU. `meta` stands for the GPU here."""
    posts, tokenizer, model = parts
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    support_posts.save_posts(posts, tmp_path / "posts.jsonl")
    start = add_lora(build_model(vocab_size=model.config.vocab_size), 3, 6)
    save_adapter(start, tmp_path / "start", tmp_path / "model")
    seen = []

    def spread(session):
        for layer in lora_layers(session.model).values():
            for part in (layer.lora_A, layer.lora_B):
                part.weight = torch.nn.Parameter(part.weight.to("meta"))

    def stop(session, params, step, names, *more):
        seen.extend(t.device.type for t in session.start.values())
        raise InputError("enough")
    monkeypatch.setattr(trainer.Session, "shard_model", spread)
    monkeypatch.setattr(trainer.Session, "load_posts", lambda s: (
        setattr(s, "posts", posts), setattr(s, "domain", data.make_domain("auto", posts)),
        setattr(s.ranks, "device", torch.device("meta")))[0])
    monkeypatch.setattr(trainer.Session, "load_model", lambda s: (
        setattr(s, "tokenizer", tokenizer), setattr(s, "chat", data.ChatFormat()),
        setattr(s, "model", build_model(vocab_size=model.config.vocab_size)))[0])
    monkeypatch.setattr(grpo, "train", stop)
    assert grpo.main(["--start", str(tmp_path / "start"), "--data", str(tmp_path / "posts.jsonl"),
                      "--out", str(tmp_path / "run"), "--beta", "0.1", "--device", "cpu"]) == 2
    assert seen and set(seen) == {"meta"}


# ---- Expected gradients --------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["drgrpo", "maxk", "tailrl"])
def test_the_entropy_term_has_the_gradient_of_entropy(monkeypatch, name):
    """Beside any objective it weighs the same: weight times grad (J + w H), H of the policy
    exactly."""
    theta, drawn = policy(4, seed=2), all_tuples(4, 4)
    rewards, value = WHAT_IS_MAXIMISED[name]
    group = features_of(drawn, rewards)
    group.logprobs = theta.log_softmax(0)[drawn].detach()
    entropy = -(theta.softmax(0) * theta.log_softmax(0)).sum()
    want, = torch.autograd.grad(entropy, theta, retain_graph=True)
    want = exact_gradient(theta, drawn, value(drawn)) + 0.4 * want
    got = advantages_of(OBJECTIVES[name], group, entropy_weight=0.4)
    assert gap(expected_estimate(theta, drawn, got),
               OBJECTIVES[name].gradient_scale(group) * want) < 1e-12


# ---- Objectives by hand, and the papers' text in loops -------------------------------------------

def test_soft_overlong_punishment_by_hand():
    """Of at most 10 tokens, the last 4 cost up to 1."""
    got = rewards.overlong_penalty(torch.tensor([1, 6, 7, 9, 10, 13]), 10, 4)
    assert got.tolist() == [0, 0, -0.25, -0.75, -1, -1]


# ---- Every line of the registers takes steps -----------------------------------------------------

def test_kl_estimates_are_k1_k2_k3(parts):
    """Measured on policy: k1 is log p - log q, k2 half its square, k3 q/p - 1 - log q/p."""
    s = grpo_session(parts, "--beta", "0.1", "--micro-tokens", "100000")
    for p in s.params:
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    tally = grpo.grpo_step(s, 0)
    batch, = s.batches
    with torch.no_grad():
        gap = model.token_logprobs(s.model, batch.rows, s.args.temperature)[0] - batch.reference
    means = tally.means(s.ranks, steplog.GRPO_LOGGED)
    want = {"k1": gap.mean(), "k2": gap.square().mean() / 2, "kl": ((-gap).exp() - 1 + gap).mean()}
    assert {n: means[n] for n in want} == pytest.approx({n: float(v) for n, v in want.items()},
                                                        rel=1e-4, abs=1e-7)
    assert abs(means["k1"]) > 1e-3 and means["kl"] > 0


def test_the_overlong_punishment_reaches_the_reward(parts):
    s, plain = (grpo_session(parts, "--overlong", tokens) for tokens in ("4", "0"))
    with_it, without = (grpo.collect(x, trainer.batch_visits(len(x.posts), 3, 0, 1), 0)
                        for x in (s, plain))
    lengths = torch.tensor([list(map(len, completions)) for completions in with_it.samples.tokens])
    assert gap(with_it.features.rewards - without.features.rewards,
               rewards.overlong_penalty(lengths, 7, 4)) < 1e-6
    assert float((with_it.features.rewards - without.features.rewards).min()) == -1


def test_the_entropy_weight_reaches_the_advantages(parts):
    s, plain = (grpo_session(parts, "--entropy-weight", weight) for weight in ("0.3", "0"))
    batches = [grpo.rollout(x, 0, Tally())[0] for x in (s, plain)]
    one, other = (torch.cat([b.advantages for b in some]) for some in batches)
    assert (torch.equal(batches[0][0].rows.tokens, batches[1][0].rows.tokens)
            and gap(one, other) > 0.01)


def test_the_features_of_a_group(parts):
    s = grpo_session(parts, "--advantage", "darling")
    drawn = grpo.collect(s, trainer.batch_visits(len(s.posts), 3, 0, 1), 0)
    group, logprobs = drawn.features, drawn.samples.logprobs
    assert (len(group.texts) == 3 and group.classes.shape == (3, 4)
            and len(set(group.seeds.tolist())) == 3)
    assert group.logprobs[1, 2].item() == pytest.approx(sum(logprobs[1][2]), rel=1e-5)
    assert group.lengths[1, 2] == len(logprobs[1][2]) == len(drawn.samples.tokens[1][2])
    again = resample.joined([resample.take(drawn, [2, 0]), resample.take(drawn, [1])])
    assert again.features.texts == [group.texts[i] for i in (2, 0, 1)]
    assert again.visits == [drawn.visits[i] for i in (2, 0, 1)]
    assert (torch.equal(again.features.logprobs, group.logprobs[[2, 0, 1]])
            and again.features.set_size == 2)
    assert again.samples.tokens == [drawn.samples.tokens[i] for i in (2, 0, 1)]
    assert torch.equal(again.features.embeddings, group.embeddings[[2, 0, 1]])


# ---- SFT losses ----------------------------------------------------------------------------------

def test_completion_means_with_one_token_and_with_none():
    """Draft 1 is in another micro-batch."""
    got = grpo.completion_means(torch.tensor([2.0, 4, 6]), torch.tensor([0, 2, 2]))
    assert got.tolist() == [2, 5, 5]


# ---- Ranks and resumption ------------------------------------------------------------------------

def rl_step(parts, ranks, *flags, steps=1):
    s = grpo_session(parts, *flags)
    s.ranks, s.reward, s.domain.styles_of = ranks, rewards_by_length, styles_by_length(s.domain)
    s.start = {n: 0.5 * p for n, p in s.start.items()}
    grads = {}
    for step in range(steps):
        grpo.grpo_step(s, step)
        grads |= {f"{step} {n}": g for n, g in grads_of(s, step).items()}
    return grads


@pytest.mark.slow_after(3)
@pytest.mark.parametrize(
    "flags",
    [
        "--advantage single-stream-spo --beta 0.1",
        "--advantage mara --beta 0.3",
        "--advantage soft-spo --beta 0.3",
        "--advantage passk-bootstrap",
        "--advantage ucpo",
        "--advantage evol",
        "--tokens clip-cov --token-share 0.3",
        "--tokens kl-cov --token-share 0.3 --updates 2",
        "--advantage darling --overlong 4",
        "--advantage passk-full --ratio sequence --updates 2 --entropy-weight 0.1",
        "--diversity-share 0.5 --diversity ngram --gate verifier",
        "--batch 5",
    ],
)
def test_two_ranks_take_the_step_of_one(parts, flags):
    """Two steps without an optimizer."""
    go = lambda ranks: rl_step(parts, ranks, *flags.split(), steps=2)
    both_take(go, go(Share()))


def logged_step(s, step):
    """A step of GRPO whose line is in the run's log, as train writes it."""
    tally = grpo.grpo_step(s, step)
    with open(s.run.folder / "metrics.jsonl", "w" if not step else "a") as log:
        log.write(json.dumps({"step": step + 1} | tally.means(s.ranks, ["D"])) + "\n")


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", [*OBJECTIVES, *(name for name in registry.TOKENS if name != "all"),
                                  *SCHEDULES])
def test_20_grpo_steps_move_the_adapter_alone_and_are_a_function_of_tensors_and_files(parts,
                                                                                      tmp_path,
                                                                                      name):
    def make():
        flags = ("--advantage", name, "--beta", "0.1") if name in OBJECTIVES else ("--tokens", name)
        if name in SCHEDULES:
            flags = ("--diversity-share", "1", "--diversity-schedule", name, "--steps", "20")
        s = grpo_session(parts, *flags, "--batch", "2", "--max-new-tokens", "3")
        s.reward, s.domain.styles_of = rewards_by_length, styles_by_length(s.domain)
        s.run, s.posts = types.SimpleNamespace(folder=tmp_path), s.posts[:4]   # posts come again
        return s
    whole_run = after(make(), logged_step, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole_run, resumed(make(), logged_step, tmp_path)))


def test_a_run_with_all_zero_rewards_warns(world, tmp_path, monkeypatch, capsys):
    """At once, and in its end line: such an arm ended with LoRA's own adapter, and no word about
    it."""
    nothing = lambda posts, completions, seeds=None: [[0.0] * len(texts) for texts in completions]
    monkeypatch.setattr(grpo, "make_reward", lambda name, session: nothing)
    assert grpo.main(grpo_args(world, "x", "--out", str(tmp_path / "dead"), "--steps", "6",
                               "--k", "2")) == 0
    assert "warning: dead, step 5: reward was 0 for 5 steps" in capsys.readouterr().out
    assert any("reward was 0" in w for w in lines(tmp_path / "dead")[-1]["warnings"])


# ---- The GRPO step -------------------------------------------------------------------------------

def test_phase_two_starts_from_the_given_adapter_without_dropout(world, tmp_path):  # noqa: F811
    """L6, L7: a reference of zeros, the bare base, makes a KL at the first step; the start
    adapter's dropout makes what is scored another policy than what was sampled."""
    start = tmp_path / "start"
    shutil.copytree(Path(world["lora"]) / "adapter", start)
    tensors = load_file(start / "adapter_model.safetensors")
    torch.manual_seed(1)
    save_file({n: t + 0.2 * torch.randn_like(t) for n, t in tensors.items()},
              start / "adapter_model.safetensors")
    config = files.read_json(start / "adapter_config.json")
    files.write_json(start / "adapter_config.json", config | {"lora_dropout": 0.5})
    assert grpo.main(grpo_args(world, "x", "--start", str(start), "--out", str(tmp_path / "run"),
                               "--beta", "0.1")) == 0
    assert files.read_json(tmp_path / "run" / "adapter" / "adapter_config.json")[
        "lora_dropout"] == 0
    first = lines(tmp_path / "run")[0]
    assert abs(first["kl"]) < 1e-6 and first["mismatch"] < 1e-4 and first["far_off"] == 0


def batches(s):
    tally = Tally()
    made, _ = grpo.rollout(s, 0, tally)
    return made, tally


def test_old_and_reference_are_scored_at_the_sampling_temperature(parts):  # noqa: F811
    """R2: at T = 1 beside drafts of T = .7 every ratio is wrong."""
    s = rl(parts, "--temperature", "0.7", "--updates", "2", "--beta", "0.3")
    for batch in batches(s)[0]:
        with torch.no_grad():
            old = token_logprobs(s.model, batch.rows, 0.7)[0]
            with lora.adapter(s.model, s.start):
                reference = token_logprobs(s.model, batch.rows, 0.7)[0]
        assert torch.equal(batch.old, old) and torch.equal(batch.reference, reference)
        assert float((old - token_logprobs(s.model, batch.rows, 1.0)[0]).abs().max()) > 0.05


def test_old_log_probs_come_from_the_training_path(parts):  # noqa: F811
    """R13: the sampler's log-probabilities must not stand in for those of training."""
    s = rl(parts, "--updates", "2")
    plain, _ = batches(s)
    write = s.sample_completions

    def shifted(*a):
        prompts, samples, texts = write(*a)
        moved = [[[p + 1 for p in completion] for completion in some] for some in samples.logprobs]
        return prompts, generate.Samples(samples.tokens, moved, samples.finished), texts
    s.sample_completions = shifted
    moved, tally = batches(s)
    assert all(torch.equal(a.old, b.old) for a, b in zip(plain, moved))
    means = tally.means(Share(), ["mismatch", "far_off"])
    assert means["mismatch"] == pytest.approx(1, abs=1e-4) and means["far_off"] == 1


def test_tis_makes_the_sampler_s_expectation_that_of_training():
    """By enumeration over five tokens drawn from q and scored by p: without a cap the weighted
    gradient is p's own, exactly; without weights it is another."""
    torch.manual_seed(3)
    scores = torch.randn(5, dtype=torch.float64, requires_grad=True)
    q = torch.randn(5, dtype=torch.float64).softmax(-1)
    rewards = torch.randn(5, dtype=torch.float64)
    logp = scores.log_softmax(-1)
    want, = torch.autograd.grad((logp.exp() * rewards).sum(), scores, retain_graph=True)
    gradients = {}
    for cap in (0, 1.2, 1e9):
        tally = Tally()
        weight = grpo.truncated_weights(logp, q.log(), cap, tally) if cap else 1.0
        loss, *_ = policy_loss(logp, logp, q * weight * rewards, denominator=1)
        gradients[cap], = torch.autograd.grad(-loss, scores, retain_graph=True)
        ratio = (logp.detach().exp() / q)
        if cap:
            assert tally.sums["tis"][0] == pytest.approx(float(ratio.clamp(max=cap).sum()))
            assert tally.sums["tis_capped"][0] == int((ratio > cap).sum()) == (2 if cap < 2 else 0)
    assert float((gradients[1e9] - want).abs().max()) < 1e-12
    assert float((gradients[0] - want).abs().max()) > 0.01
    assert not torch.allclose(gradients[1.2], gradients[1e9])


def test_tis_is_part_of_a_step_and_logged(parts):  # noqa: F811
    """Drafts that the sampler calls three times less likely than training does count twice, the
    cap."""
    gradients = {}
    for flags in ((), ("--tis", "2"), ("--tis", "9")):
        s = rl(parts, "--beta", "0", *flags)
        write = s.sample_completions

        def shifted(*a):
            prompts, samples, texts = write(*a)
            moved = [[[p - math.log(3) for p in one] for one in some] for some in samples.logprobs]
            return prompts, generate.Samples(samples.tokens, moved, samples.finished), texts
        s.sample_completions = shifted
        gradient, tally = step_gradient(s)
        gradients[flags] = torch.cat([g.flatten() for g in gradient.values()])
        means = tally.means(Share(), ["tis", "tis_capped"])
        assert means == ({} if not flags else pytest.approx(
            {"tis": min(3, float(flags[1])), "tis_capped": float(flags[1] == "2")}, abs=1e-3))
    plain, twice, thrice = gradients.values()
    assert float(plain.abs().max()) > 0
    assert torch.allclose(twice, 2 * plain, rtol=1e-4, atol=1e-7)
    assert torch.allclose(thrice, 3 * plain, rtol=1e-3, atol=1e-6)


def test_the_logged_entropy_and_reward_deviation_are_those_of_the_step(parts):  # noqa: F811
    """R14: a name in the log with 0 for its value says as little as no name."""
    s = rl(parts, "--beta", "0")
    _, tally = step_gradient(s)
    entropies, off = [], []
    for batch in s.batches:
        logp, entropy = token_logprobs(s.model, batch.rows, 1.0)
        entropies += entropy.tolist()
        off += (logp - batch.sampled).abs().tolist()
    rewards = grpo.collect(s, s.visits, 0).features.rewards
    means = tally.means(Share(), ["entropy", "mismatch", "reward_std", "reward"])
    assert (means["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
            and means["entropy"] > 0.5)
    assert (means["mismatch"] == pytest.approx(sum(off) / len(off), rel=0.5, abs=1e-7)
            and means["mismatch"] > 0)
    assert (means["reward_std"] == pytest.approx(float(rewards.std(1, correction=0).mean()),
                                                 rel=1e-5) and means["reward_std"] > 0.05)
    assert means["reward"] == pytest.approx(float(rewards.mean()), rel=1e-5)
