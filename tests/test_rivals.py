"""Objectives with a reference or a memory, Clip-Cov and KL-Cov, losses of drafts, and what every method must keep:
two ranks take one rank's step, and a step is a function of the trained tensors and of the files of the run alone.
"""

import copy
import json
import math
import threading
import types

import pytest
import torch
import torch.nn.functional as F

import data
import grpo
import polylora
import ranks as ranks_room
import rewards
from adapters import ADAPTERS, Budget, add_adapter
from data import InputError
from grpo import OBJECTIVES, Group, group_advantages, policy_loss
from polylora import DIVERSITIES, SFT_LOSSES
from rewards import SCHEDULES
from test_methods import (RIGHT, grpo_session, packed, rewards_by_length, rewards_of, sft_session, slope, tokens,
                          voices_by_length)
from test_polylora import (OUTCOMES, Share, adapter_state, all_tuples, exact_gradient, expected_estimate, files, gap,
                           gradient, in_double, nearly, parts, policy, save_adapter, shake)
from tiny import command, whole_and_cut
from trainer import Ranks, Visit, batch_visits, seed_of

REFERENCE = torch.tensor([0.5, 0.1, 0.3, 0.1]).double()                        # of four outcomes


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- Objectives ------------------------------------------------------------------------------------------

def test_ucpo_deals_the_right_drafts_share_anew():
    """Mean log-probabilities -1, -2 and -1.5 of the three right ones: 1/q is e^1, e^2 and e^1.5 over their sum."""
    r, logp = rewards_of([1, 0, 1, 1.0], [0, 0, 0, 0]), torch.tensor([[-4.0, -9, -2, -3], [-1, -2, -3, -4]]).double()
    lengths = torch.tensor([[4, 3, 1, 2], [1, 1, 1, 1]])
    odds = [math.exp(1), math.exp(2), math.exp(1.5)]
    plain = group_advantages(r)[0].tolist()
    for tau in (0.2, 1.0):
        share = [1 - tau + tau * 3 * x / sum(odds) for x in odds]
        want = [plain[0] * share[0], plain[1], plain[2] * share[1], plain[3] * share[2]]
        got = grpo.ucpo_advantages(r, logp, lengths, tau)
        assert got[0].tolist() == pytest.approx(want) and float(got[1].abs().max()) == 0
        assert float(got[0].sum()) == pytest.approx(sum(plain), abs=1e-6)
    assert torch.equal(grpo.ucpo_advantages(r, logp, lengths), grpo.ucpo_advantages(r, logp, lengths, 0.2))


def test_mara_makes_the_even_policy_over_good_drafts_the_best():
    """With every outcome in the group: ref exp(R/beta), the optimum under the KL, is the same for all good ones;
    and where the anchor is in every group the gradient there is zero."""
    beta, r, ref = 0.7, torch.tensor([[1.0, 0.0, 1.0, 0.3]]).double(), REFERENCE.log()[None]
    a = grpo.mara_advantages(r, ref, beta)[0]
    shaped = [1.0, 0.0, 1 + beta * math.log(0.5 / 0.3), 0.3]
    mean = sum(shaped) / 4
    assert a.tolist() == pytest.approx([4 / 3 * (x - mean) for x in shaped])
    target = REFERENCE * (torch.tensor(shaped).double() / beta).exp()
    assert target[0].item() == pytest.approx(target[2].item())
    low = grpo.mara_advantages(torch.tensor([[0.2, 0.5, 0.4]]).double(), ref[:, :3], beta, threshold=0.4)[0]
    lifted = [0.2, 0.4 + beta * math.log(0.3 / 0.1), 0.4]                      # the anchor is the third
    assert low.tolist() == pytest.approx([1.5 * (x - sum(lifted) / 3) for x in lifted])
    none = grpo.mara_advantages(torch.tensor([[0.2, 0.0]]).double(), ref[:, :2], beta)[0]
    assert none.tolist() == pytest.approx([0.2, -0.2])


def test_the_soft_objective_s_gradient_is_that_of_reward_less_kl(monkeypatch):
    in_double(monkeypatch)
    theta, drawn = policy(4, seed=3), all_tuples(4, 3)
    logp, beta = theta.log_softmax(0), 0.6
    want, = torch.autograd.grad((logp.exp() * (RIGHT - beta * (logp - REFERENCE.log()))).sum(), theta,
                                retain_graph=True)
    got = grpo.soft_advantages(RIGHT[drawn], logp.detach()[drawn], REFERENCE.log()[drawn], beta)
    assert gap(expected_estimate(theta, drawn, got), 2 * want) < 1e-12 and float(want.abs().max()) > 0.01
    assert OBJECTIVES["soft-spo"].weight(Group(RIGHT[drawn])) == 2


def test_single_stream_spo_is_the_reward_less_the_value(monkeypatch):
    in_double(monkeypatch)
    theta, drawn = policy(4, seed=3), all_tuples(4, 3)
    got = grpo.stream_advantages(RIGHT[drawn], torch.full((len(drawn),), 0.4))
    assert got[5].tolist() == pytest.approx((RIGHT[drawn][5] - 0.4).tolist())
    want = exact_gradient(theta, drawn, RIGHT[drawn].mean(1))
    weight = OBJECTIVES["single-stream-spo"].weight(Group(RIGHT[drawn]))
    assert weight == 3 and gap(expected_estimate(theta, drawn, got), weight * want) < 1e-7


# ---- Single-stream SPO's values --------------------------------------------------------------------------

def test_what_is_kept_halves_with_every_half():
    """2^(-kl / 0.06), from 7/8 to 0.96."""
    assert rewards.kept_share(0.06 * math.log2(1 / 0.9)) == pytest.approx(0.9)
    assert rewards.kept_share(0.03, low=0.5) == pytest.approx(2 ** -0.5)
    assert rewards.kept_share(9.0) == 0.875 and rewards.kept_share(0.0) == rewards.kept_share(-1.0) == 0.96


def spo_session(parts, *flags, ranks=None, folder=None):
    s = grpo_session(parts, "--advantage", "single-stream-spo", *flags)
    s.ranks = ranks or s.ranks
    s.reward = rewards_by_length
    s.run = folder and types.SimpleNamespace(folder=folder)
    return s


def test_values_by_hand(parts, tmp_path):
    """First 8 drafts of the policy as it is; then rho times the count and the visit's rewards; rho by the drift of
    the last drafts, which a change of the policy makes."""
    s = spo_session(parts, "--beta", "0", folder=tmp_path)
    values, visits = rewards.Values(s, 0), [Visit(2, 0), Visit(5, 0)]
    first = values(visits, 0)
    _, samples, texts = s.sample_drafts([Visit(2, -1), Visit(5, -1)], 0, 8)
    assert first.tolist() == pytest.approx([sum(r) / 8 for r in rewards_by_length(None, texts)])
    assert torch.equal(values(visits, 3), first)                               # known by now
    assert values.drift(visits) == pytest.approx([0, 0], abs=1e-5)
    _, samples, _ = s.sample_drafts(visits, 0, 2)
    before = {k: dict(v) for k, v in values.known.items()}
    values.learn(visits, torch.tensor([[1.0, 0.25], [0.0, 0.0]]), samples, 0)
    for visit, right, wrong in ((visits[0], 1.25, 0.75), (visits[1], 0.0, 2.0)):
        old, new = (known[s.posts[visit.index].key] for known in (before, values.known))
        assert new["right"] == pytest.approx(0.96 * old["right"] + right)
        assert new["wrong"] == pytest.approx(0.96 * old["wrong"] + wrong)
    for p in s.params:
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    with torch.no_grad():
        rows = packed([(s.prompt(5), samples.tokens[1])])
        now = grpo.token_logprobs(s.model, rows, s.args.temperature)[0]
    then = [p for draft in samples.logprobs[1] for p in draft]
    drift = values.drift(visits)
    assert drift[1] == pytest.approx(sum(then) / len(then) - now.mean().item(), abs=1e-4) and abs(drift[1]) > 1e-3
    old = dict(values.known[s.posts[5].key])
    values.learn(visits, torch.tensor([[1.0, 1.0], [1.0, 1.0]]), samples, 1)
    kept = rewards.kept_share(drift[1])
    assert values.known[s.posts[5].key]["right"] == pytest.approx(kept * old["right"] + 2)
    with pytest.raises(InputError, match="from 0 to 1"):
        values.learn(visits, torch.tensor([[1.5, 0.0], [0.0, 0.0]]), samples, 2)
    # The file alone gives the same values at every step; a torn line is no line.
    with open(tmp_path / "values.jsonl", "a") as file:
        file.write('\n{"step": 1, "posts": {"to')
    assert rewards.Values(s, 2).known == values.known
    assert rewards.Values(s, 1).known[s.posts[5].key] == old and rewards.Values(s, 0).known == {}


def test_a_visit_s_value_does_not_hold_its_own_rewards(parts):
    """A baseline that has seen the rewards is not independent of the drafts that it is a baseline of."""
    s, visits = spo_session(parts, "--k", "3"), [Visit(2, 0), Visit(5, 0)]
    first = grpo.draw(s, visits, 0).group
    assert torch.equal(first.values, rewards.Values(s, 0)(visits, 0))          # of the first 8 drafts alone
    counts = [s.values.known[s.posts[v.index].key] for v in visits]
    before = [each["right"] / (each["right"] + each["wrong"]) for each in counts]
    assert gap(torch.tensor(before), first.values) > 1e-3                      # the visit has been learnt from by now
    second = grpo.draw(s, visits, 1).group
    assert second.values.tolist() == pytest.approx(before)
    after = [s.values.known[s.posts[v.index].key]["right"] for v in visits]
    assert after == pytest.approx([rewards.kept_share(0.0) * each["right"] + float(r.sum())
                                   for each, r in zip(counts, second.rewards)])


def test_the_first_drafts_of_a_post_have_readers_of_their_own(parts):
    s, asked = spo_session(parts), []
    s.reward = lambda posts, texts, streams: (asked.append(list(streams)), rewards_by_length(posts, texts))[1]
    rewards.Values(s, 0)([Visit(2, 4), Visit(5, 0)], 3)
    assert asked == [[seed_of(4, "reader", 3, s.posts[i].key, -1) for i in (2, 5)]]


def test_a_single_draft_is_a_stream_and_no_group(parts, tmp_path):
    s = spo_session(parts, "--k", "1", "--beta", "0.1", folder=tmp_path)
    tally = grpo.grpo_step(s, 0)
    assert max(float(p.grad.abs().max()) for p in s.params) > 0
    means = tally.means(s.ranks, grpo.LOGGED)
    assert "zero_variance" not in means and "D" not in means and means["advantage"] > 0
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    data.write_json(tmp_path / "adapter_config.json", config)
    check = lambda flags: grpo.check_grpo(grpo.parser().parse_args(
        ["--start", str(tmp_path), "--model", "-", "--data", "-", "--out", "-", *flags.split()]))
    check("--k 1 --advantage single-stream-spo")
    for flags in ("--k 1", "--k 1 --advantage single-stream-spo --diversity-weight 1",
                  "--k 1 --advantage single-stream-spo --entropy-weight 1", "--k 0 --advantage single-stream-spo"):
        with pytest.raises(InputError, match="at least 2 drafts"):
            check(flags)
    for name in ("mara", "soft-spo"):
        check(f"--advantage {name} --beta 0.1")
        with pytest.raises(InputError, match="--beta"):
            check(f"--advantage {name}")
    with pytest.raises(InputError, match="--shard"):
        check("--advantage single-stream-spo --shard")


def test_the_reference_of_whole_drafts_reaches_the_objective(parts):
    s = grpo_session(parts, "--advantage", "soft-spo", "--beta", "0.4", "--micro-tokens", "60")
    s.reward = rewards_by_length
    s.start = {n: 0.5 * p for n, p in s.start.items()}
    seen = {}
    objective = OBJECTIVES["soft-spo"]

    def spy(rewards, logprobs, reference, beta):
        seen.update(reference=reference, beta=beta)
        return objective.function(rewards, logprobs, reference, beta)
    grpo.OBJECTIVES["soft-spo"] = objective._replace(function=spy)
    try:
        grpo.grpo_step(s, 0)
    finally:
        grpo.OBJECTIVES["soft-spo"] = objective
    drawn = grpo.draw(s, batch_visits(len(s.posts), 3, 0, s.args.seed), 0)
    rows = packed(list(zip(drawn.prompts, drawn.samples.tokens)))
    with torch.no_grad(), polylora.adapter(s.model, s.start):
        logp = grpo.token_logprobs(s.model, rows, s.args.temperature)[0]
    want = torch.zeros(12).index_add_(0, rows.draft, logp).view(3, 4)
    assert seen["beta"] == 0.4 and gap(seen["reference"], want) < 1e-4


# ---- Tokens ----------------------------------------------------------------------------------------------

def test_covariances_and_who_is_chosen_by_them():
    logp, a = torch.tensor([-1.0, -2, -3, -6]), torch.tensor([2.0, -2, 1, 3])
    cov = grpo.token_covariances(logp, a)
    assert cov.tolist() == pytest.approx([(x + 3) * (y - 1) for x, y in zip(logp.tolist(), a.tolist())])
    many = torch.arange(1000) / 100.0                                          # 0, 0.01, .. 9.99
    assert grpo.kl_cov(many, share=0.01).nonzero().flatten().tolist() == list(range(990, 1000))
    assert grpo.kl_cov(many).sum() == 1 and grpo.kl_cov(many)[999]
    for seed in range(5):
        chosen = grpo.clip_cov(many, seed, share=0.05)
        assert chosen.sum() == 50 and bool(((many[chosen] > 1) & (many[chosen] < 5)).all())
        assert torch.equal(chosen, grpo.clip_cov(many, seed, share=0.05))
    assert not torch.equal(chosen, grpo.clip_cov(many, 9, share=0.05)) and grpo.clip_cov(many, 0).sum() == 1
    assert grpo.clip_cov(many, 0, share=0.9).sum() == 399                       # no more than there are
    assert grpo.clip_cov(many, 0, 0.9, low=2.0, high=2.025).nonzero().flatten().tolist() == [201, 202]
    assert grpo.clip_cov(torch.zeros(5), 0).sum() == 0
    together = sum(grpo.clip_cov(many, seed, share=0.05).float() for seed in range(200))
    assert together[101:500].min() > 5 and together[101:500].max() < 60        # evenly


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_what_the_chosen_tokens_lose_and_pay(advantage):
    """Ratios e^0.5 and e^-0.5 are both beyond the clip of 0.2."""
    logp, old, a = torch.tensor([-1.0, -2.0, -1.0, -2.0]), torch.tensor([-1.5, -1.5, -1.5, -1.5]), torch.full((4,), advantage)
    chosen = torch.tensor([True, True, False, False])

    def loss_and_slope(tokens):
        x = logp.clone().requires_grad_()
        loss, _, _ = policy_loss(x, old, a, denominator=1, tokens=tokens, chosen=chosen)
        loss.backward()
        return loss.item(), x.grad.tolist()
    plain, asked = (policy_loss(logp, old, a, denominator=1, reference=ref)[0] for ref in (None, old - 1))
    assert plain == asked                                                      # no beta was given: no penalty
    up, down = math.exp(0.5), math.exp(-0.5)
    clipped = [max(-advantage * r, -advantage * min(max(r, 0.8), 1.2)) for r in (up, down)]
    assert loss_and_slope("clip-cov")[0] == pytest.approx(sum(clipped), rel=1e-5)
    assert loss_and_slope("clip-cov")[1][:2] == [0, 0]
    loss, slopes = loss_and_slope("kl-cov")                                    # nothing is clipped
    assert loss == pytest.approx(-2 * advantage * (up + down) + 1.0, rel=1e-5)
    assert slopes == pytest.approx([-advantage * up + 1, -advantage * down - 1, -advantage * up, -advantage * down])


@pytest.mark.parametrize("name", ["clip-cov", "kl-cov"])
def test_tokens_are_chosen_from_the_whole_step(parts, name):
    """However they are packed, at the places of the largest covariances as the drafts were written."""
    flags = ("--tokens", name, "--token-share", "0.2", "--updates", "2")
    for budget in ("100000", "40"):
        s = grpo_session(parts, *flags, "--micro-tokens", budget)
        s.reward = rewards_by_length
        batches, count = grpo.rollout(s, 0, grpo.Tally())
        s.batches, s.token_count = batches, count
        logp, a, chosen, draft = (torch.cat([getattr(b, n) if n != "draft" else b.rows.draft for b in batches])
                                  for n in ("sampled", "advantages", "chosen", "draft"))
        cov = grpo.token_covariances(logp, a)
        assert len(logp) == count and 0 < chosen.sum() <= max(1, int(0.2 * count))
        if name == "kl-cov":
            assert chosen.sum() == max(1, int(0.2 * count)) and cov[chosen].min() >= cov[~chosen].max() - 1e-6
        else:
            assert bool(((cov[chosen] > 1) & (cov[chosen] < 5)).all())
        assert torch.isfinite(sum(p.abs().sum() for p in gradient(s, lambda t: grpo.grpo_step(s, 1))[0].values()))


# ---- SFT losses ------------------------------------------------------------------------------------------

def test_sed_pulls_to_a_half_where_the_model_is_unsure():
    """Over four tokens: two hold 0.97 of the first row's mass and 0.7 of the second's."""
    p = torch.tensor([[0.6, 0.37, 0.02, 0.01], [0.4, 0.3, 0.2, 0.1]]).double()
    z, y = p.log().requires_grad_(), torch.tensor([1, 0])
    ce = F.cross_entropy(z, y, reduction="none")
    assert gap(polylora.sed_loss(z, y, top=2), ce + torch.tensor([0, 0.2 * 0.01])) < 1e-8
    assert gap(polylora.sed_loss(z, y, 3.0, top=2, mass=0.99), ce + 3 * (torch.tensor([0.37, 0.4]) - 0.5) ** 2) < 1e-6
    assert torch.equal(polylora.sed_loss(z, y), ce)                            # ten are more than there are
    z, y = tokens(6, 30, seed=8)
    z = (0.2 * z).detach().requires_grad_()                                    # flat: all unsure
    own = z.softmax(-1)[torch.arange(6), y]
    want = slope(F.cross_entropy(z, y, reduction="none") + 0.2 * (own - 0.5) ** 2, z)
    assert gap(slope(polylora.sed_loss(z, y), z), want) < 1e-12
    top = torch.full((1, 30), 1e-9).double()
    top[0, :10], top[0, 10] = 0.096, 0.04                                      # ten hold 0.96, nine 0.864
    loss = polylora.sed_loss(top.log(), torch.tensor([0]))
    assert loss.item() == pytest.approx(-math.log(0.096), abs=1e-6)
    top[0, :10], top[0, 10] = 0.094, 0.06                                      # 0.94
    assert polylora.sed_loss(top.log(), torch.tensor([0])).item() == pytest.approx(
        -math.log(0.094) + 0.2 * (0.094 - 0.5) ** 2, abs=1e-6)


def test_ba_lora_on_states_by_torch():
    """Covariance and singular values as torch has them, each reply by itself; one of one token has neither."""
    draft = torch.tensor([0] * 7 + [1, 1, 0, 1, 2])
    h = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).float().requires_grad_()

    def plain(weight, leading):
        out = torch.zeros(12)
        for i in (0, 1):
            z = h[draft == i]
            c, s = torch.cov(z.T), torch.linalg.svdvals(z)
            off = (c ** 2).sum() - (c.diagonal() ** 2).sum()
            out = torch.where(draft == i, weight * 0.03 * (off / 5 - s[:leading].sum() / s.sum()), out)
        return torch.where(draft == 2, -weight * 0.03, out)                    # its one singular value is all
    for weight, leading in ((1.0, 2), (2.0, 1)):
        got, want = polylora.covariance_penalty(h, draft, weight, leading), plain(weight, leading)
        assert gap(got, want) < 1e-6 and gap(slope(got[:11], h), slope(want[:11], h)) < 2e-4
    assert torch.equal(polylora.covariance_penalty(h, draft), polylora.covariance_penalty(h, draft, 1.0, 5))
    z, y = tokens(5, 9, seed=6)
    head, hidden = torch.randn(9, 4).double(), torch.randn(5, 4).double()
    teacher = F.linear(hidden, head)
    for heat in (2.0, 3.0):
        kl = heat ** 2 * F.kl_div((z / heat).log_softmax(-1), (teacher / heat).log_softmax(-1), log_target=True,
                                  reduction="none").sum(-1)
        got = polylora.ba_lora_nlu_loss(z, y, hidden, None, head, 2.0, heat)
        assert gap(got, F.cross_entropy(z, y, reduction="none") + 2 * 0.15 * kl) < 1e-5
    assert torch.equal(polylora.ba_lora_nlu_loss(z, y, hidden, None, head),
                       polylora.ba_lora_nlu_loss(z, y, hidden, None, head, 1.0, 2.0))


def test_repeated_tokens_are_those_of_n_grams_seen_before():
    ids = [1, 2, 3, 4, 9, 1, 2, 3, 4, 5, 2, 3, 4, 5]
    flags = [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    assert polylora.repeated_tokens(ids) == [bool(f) for f in flags]
    assert polylora.repeated_tokens([7, 7, 7], 2) == [False, True, True] and polylora.repeated_tokens([1, 2]) == [0, 0]
    assert polylora.repeated_tokens([1, 1, 2, 2, 1], 1) == [False, True, False, True, True]


def fixed_drafts(s, tokens_of):
    """The session writes the drafts tokens_of(visit), whatever it has learnt."""
    def write(visits, step, k):
        prompts, drafts = [s.prompt(v.index) for v in visits], [tokens_of(v) for v in visits]
        texts = [[" ".join(map(str, d)) for d in ds] for ds in drafts]
        return prompts, types.SimpleNamespace(tokens=drafts, logprobs=None, finished=None), texts
    s.sample_drafts = write


def whole(s, prompt, draft):
    """log pi(draft) by a plain forward, with its gradient."""
    logp = s.model(torch.tensor([prompt + draft]))[0, len(prompt) - 1:-1, :s.model.vocab] / s.args.temperature
    return logp.log_softmax(-1)[torch.arange(len(draft)), torch.tensor(draft)]


@pytest.mark.parametrize("budget", ["100000", "40"])
def test_unlikelihood_of_drafts_by_hand(parts, budget):
    drafts = [[9, 8, 7, 6, 9, 8, 7, 6, 5], [5, 6, 5, 6, 7]]
    s = sft_session(parts, "--loss", "unlikelihood-sequence", "--temperature", "0.8", "--micro-tokens", budget)
    fixed_drafts(s, lambda v: drafts[:1 + v.index % 2])
    visits = [Visit(1, 0), Visit(2, 0)]
    got, tally = gradient(s, lambda t: polylora.add_unlikely(s, visits, 0, t, 3.0))
    want, _ = gradient(s, lambda t: (3.0 * sum(-(1 - whole(s, s.prompt(v.index), drafts[0])[4:8].exp()).log().sum()
                                               for v in visits) / (9 + 5 + 9)).backward())
    nearly(got, want)
    plain, _ = gradient(s, lambda t: polylora.add_unlikely(s, visits, 0, t))
    nearly({name: 3 * g for name, g in plain.items()}, want)                   # weight 1 where none is given
    assert tally.sums["unlikely"][1] == 23
    rows = s.micro_batches([(s.prompt(v.index), drafts[:1 + v.index % 2]) for v in visits])
    assert tally.sums["tokens"][0] == sum(r.tokens.numel() for r in rows) + 23


@pytest.mark.parametrize("budget", ["100000", "40"])
def test_bonbon_by_hand(parts, budget):
    """Three drafts of two posts: the best and the worst by the reward; a post whose drafts all earn alike adds
    nothing. n = 3: (n - 1) H_{n-1} = 2 (1 + 1/2) = 3; n = 8: 18.15, the constant of the paper's code."""
    drafts = [[9, 8, 7], [6, 6], [5, 9, 9, 4]]
    s = sft_session(parts, "--loss", "bonbon", "--k", "3", "--micro-tokens", budget, "--temperature", "0.9")
    fixed_drafts(s, lambda v: drafts)
    s.reward = lambda posts, texts, streams: [[0.3, 0.9, 0.1], [0.5, 0.5, 0.5], [0.7, 0.1, 0.4]]
    visits, pairs = [Visit(1, 0), Visit(2, 0), Visit(3, 0)], {1: (drafts[1], drafts[2]), 3: (drafts[0], drafts[1])}
    got, tally = gradient(s, lambda t: polylora.add_bonbon(s, visits, 0, t, 0.2))

    def plain(t):
        total = 0
        for i, (best, worst) in pairs.items():
            with torch.no_grad(), polylora.base(s.model):
                first = whole(s, s.prompt(i), best).sum() - whole(s, s.prompt(i), worst).sum()
            a, b = whole(s, s.prompt(i), best).sum(), whole(s, s.prompt(i), worst).sum()
            total = total + (0.2 * -a + 0.8 * (a - b - first - 3.0) ** 2) / 2
        t.add("loss", total.detach() * 2, 2)
        total.backward()
    want, by_hand = gradient(s, plain)
    nearly(got, want, 1e-3)
    assert tally.sums["loss"] == pytest.approx(by_hand.sums["loss"], rel=1e-4)
    rows = s.micro_batches([(s.prompt(i), pair) for i, pair in pairs.items()])
    assert tally.sums["tokens"][0] == 3 * sum(r.tokens.numel() for r in rows)     # twice forward, once the base
    zero = torch.zeros(1)
    assert polylora.bonbon_loss(zero, zero, zero, zero, 8, 0.0).item() == pytest.approx((1 / (2 * 0.0275482094)) ** 2, rel=1e-6)
    assert polylora.bonbon_loss(zero - 2, zero, zero, zero, 8, 1.0).item() == 2
    assert polylora.bonbon_loss(zero - 2, zero, zero, zero, 3).item() == pytest.approx(0.005 * 2 + 0.995 * 25)


@pytest.mark.parametrize("budget", ["100000", "40"])
@pytest.mark.parametrize("members", [2, 3, 4])
def test_bonbon_teaches_every_member_of_an_ensemble_as_it_would_alone(parts, members, budget):
    """Best and worst were shared out over the members by their place: of four members two learnt, one from the best alone
    and one from the worst alone."""
    drafts = [[9, 8, 7], [6, 6], [5, 9, 9, 4]]
    s = sft_session(parts, "--loss", "bonbon", "--k", "3", "--micro-tokens", budget)
    s.model = shake(polylora.add_lora(copy.deepcopy(parts[2]), 3, 6, seed=2, kind="ensemble", members=members), 0.1)
    s.model.vocab = s.tokenizer.get_vocab_size()
    fixed_drafts(s, lambda v: drafts)
    s.reward = lambda posts, texts, streams: [[0.3, 0.9, 0.1], [0.5, 0.5, 0.5], [0.7, 0.1, 0.4]]
    pairs = {1: (drafts[1], drafts[2]), 3: (drafts[0], drafts[1])}
    got, tally = gradient(s, lambda t: polylora.add_bonbon(s, [Visit(1, 0), Visit(2, 0), Visit(3, 0)], 0, t, 0.2))

    def alone(t):
        for member in range(members):
            for i, (best, worst) in pairs.items():
                with torch.no_grad(), polylora.base(s.model):
                    first = whole(s, s.prompt(i), best).sum() - whole(s, s.prompt(i), worst).sum()
                s.model.deal.of = member
                a, b = whole(s, s.prompt(i), best).sum(), whole(s, s.prompt(i), worst).sum()
                loss = 0.2 * -a + 0.8 * (a - b - first - 3.0) ** 2
                t.add("loss", loss.detach())
                (loss / (2 * members)).backward()
        s.model.deal.of = 0
    want, by_hand = gradient(s, alone)
    nearly(got, want, 1e-3)
    assert tally.sums["loss"] == pytest.approx(by_hand.sums["loss"], rel=1e-4)
    for name, slope in got.items():
        if name.endswith("lora_B.weight"):                                     # (out, members rank)
            assert (slope.unflatten(1, (members, -1)).abs().amax((0, 2)) > 0).all(), name


def test_bonbon_s_drafts_are_the_base_s(parts):
    s = sft_session(parts, "--loss", "bonbon", "--k", "3")
    seen, write = [], s.sample_drafts
    s.sample_drafts = lambda *a: (seen.append((a, write(*a))), seen[-1][1])[1]
    polylora.add_bonbon(s, [Visit(1, 0), Visit(2, 0)], 0, polylora.Tally())
    (args, (prompts, samples, _)), = seen
    rows = packed(list(zip(prompts, samples.tokens)))
    with torch.no_grad(), polylora.base(s.model):
        logp = polylora.token_logprobs(s.model, rows, s.args.temperature)[0]
    said = torch.tensor([p for ds in samples.logprobs for d in ds for p in d])
    order = torch.argsort(rows.draft, stable=True)
    assert gap(logp[order], said) < 1e-4
    nothing = sft_session(parts, "--loss", "bonbon", "--k", "3")
    nothing.reward = lambda posts, texts, streams: [[0.5] * len(ts) for ts in texts]
    polylora.sft_step(nothing, 0)
    assert all(p.grad is None or float(p.grad.abs().max()) == 0 for p in nothing.params)


@pytest.mark.parametrize("flags, word", [("--loss bonbon --k 1", "--k 2"), ("--loss bonbon --temperature 0", "sampled"),
                                         ("--loss unlikelihood-sequence --temperature 0", "sampled")])
def test_drafts_that_say_nothing_are_refused(flags, word):
    args = polylora.parser().parse_args(["sft", "--model", "-", "--data", "-", "--out", "-", *flags.split()])
    with pytest.raises(InputError, match=word):
        polylora.check_sft(args)


# ---- Ranks and resumption --------------------------------------------------------------------------------

def on_two_ranks(work):
    """work(ranks) of two ranks in two threads, by ranks.Ranks' own code over a torch.distributed that adds and gathers
    between them; what they returned."""
    board, barrier, out, wrong, here = [None, None], threading.Barrier(2), [None, None], [], threading.local()

    def swap(mine):
        board[here.rank] = mine
        barrier.wait(600)
        both = list(board)
        barrier.wait(600)
        return both

    class Wire:
        @staticmethod
        def all_reduce(x):
            x.copy_(sum(swap(x.clone())))

        @staticmethod
        def all_gather_object(parts, items):
            parts[:] = swap(items)

    def run(rank):
        here.rank, each = rank, Ranks.__new__(Ranks)
        each.rank, each.world, each.main, each.device = rank, 2, rank == 0, torch.device("cpu")
        each.restarts, each.watch = 0, None
        try:
            out[rank] = work(each)
        except BaseException as e:
            wrong.append(e)
            barrier.abort()
    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks_room, "dist", Wire)
        [t.start() for t in threads]
        [t.join() for t in threads]
    if wrong:
        raise next((e for e in wrong if not isinstance(e, threading.BrokenBarrierError)), wrong[0])
    return out


def both_take(go, want):
    """Two ranks, go(ranks) each, end with the gradient of one."""
    for got in on_two_ranks(go):
        nearly(got, want)


def grads_of(s, step):
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in adapter_state(s.model).items()}
    s.model.zero_grad()
    return grads


def rl_step(parts, ranks, *flags, steps=1):
    s = grpo_session(parts, *flags)
    s.ranks, s.reward, s.domain.voices_of = ranks, rewards_by_length, voices_by_length(s.domain)
    s.start = {n: 0.5 * p for n, p in s.start.items()}
    grads = {}
    for step in range(steps):
        grpo.grpo_step(s, step)
        grads |= {f"{step} {n}": g for n, g in grads_of(s, step).items()}
    return grads


@pytest.mark.parametrize("flags", ["--advantage single-stream-spo --beta 0.1", "--advantage mara --beta 0.3",
                                   "--advantage soft-spo --beta 0.3", "--advantage passk-bootstrap", "--advantage ucpo",
                                   "--advantage evol", "--tokens clip-cov --token-share 0.3",
                                   "--tokens kl-cov --token-share 0.3 --updates 2", "--advantage darling --overlong 4",
                                   "--advantage passk-full --ratio sequence --updates 2 --entropy-weight 0.1",
                                   "--diversity-share 0.5 --diversity ngram --gate verifier", "--batch 5"])
def test_two_ranks_take_the_step_of_one(parts, flags):
    """Two steps without an optimizer."""
    go = lambda ranks: rl_step(parts, ranks, *flags.split(), steps=2)
    both_take(go, go(Share()))


@pytest.mark.parametrize("useful", [4, 12])
def test_two_ranks_resample_as_one(parts, useful):
    """Posts of equal rewards are replaced by others; every twelfth post is useful, so that a rank ends with none."""
    def go(ranks):
        s = grpo_session(parts, "--resample", "5", "--beta", "0.1", "--diversity-weight", "0.2")
        places = {post.key: i for i, post in enumerate(s.posts)}
        s.ranks, s.start = ranks, {n: 0.5 * p for n, p in s.start.items()}
        s.reward = lambda posts, drafts, streams: [[float(i % 3 == 0 and places[p.key] % useful == 0) for i in range(len(ds))]
                                                   for p, ds in zip(posts, drafts)]
        tally = grpo.grpo_step(s, 0)
        empty.append(not s.batches)
        assert tally.sums["zero_variance"][0] > 0
        return grads_of(s, 0)
    empty = []
    both_take(go, go(Share()))
    assert any(empty) == (useful == 12)


@pytest.mark.parametrize("useful", [(0, 2, 3, 4), (0, 2)])
def test_ranks_that_keep_more_posts_than_others_mark_their_own_tokens(parts, useful):
    """After --resample rank 0 has three of four posts, or both of two: dealt out anew by turns the marks were another
    rank's, and a rank without any post left the others waiting."""
    flags = "--resample 1 --tokens kl-cov --token-share 0.3 --updates 2 --diversity-weight 0".split()

    def go(ranks):
        s = grpo_session(parts, *flags, "--batch", "6")
        first = [s.posts[v.index].key for v in batch_visits(len(s.posts), 6, 0, s.args.seed)]
        good = {first[i] for i in useful}
        s.ranks, s.domain.voices_of = ranks, voices_by_length(s.domain)

        def reward(posts, drafts, streams):                                    # of the second attempt none is useful
            rows = [[float(i) * (p.key in good) for i in range(len(ts))] for p, ts in zip(posts, drafts)]
            good.clear()
            return rows
        s.reward = reward
        batches, count = grpo.rollout(s, 0, grpo.Tally())
        s.batches, s.token_count = batches, count
        grpo.grpo_step(s, 1)
        marked = [(int(t), bool(c)) for b in batches for t, c in zip(b.rows.target, b.chosen)]
        return grads_of(s, 0), count, marked
    want, count, marked = go(Share())
    one, two = on_two_ranks(go)
    assert one[1] == two[1] == count > 0 and sorted(one[2] + two[2]) == sorted(marked)
    assert (not two[2]) == (useful == (0, 2)) and sum(c for _, c in marked) > 1
    nearly(one[0], want)
    nearly(two[0], want)


@pytest.mark.parametrize("name", ["unlikelihood-sequence", "bonbon", "ba-lora-nlu", "sed"])
def test_two_ranks_take_the_sft_step_of_one(parts, name):
    def go(ranks):
        s = sft_session(parts, "--loss", name, "--max-new-tokens", "7", ranks=ranks)
        if name == "unlikelihood-sequence":                                    # a random model repeats nothing
            fixed_drafts(s, lambda visit: [[9, 8, 7, 6, 9, 8, 7, 6, 5], [5, 6, 5, 6, 7]][:1 + visit.index % 2])
        polylora.sft_step(s, 0)
        return grads_of(s, 0)
    both_take(go, go(Share()))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_two_ranks_take_the_step_of_one_with_every_adapter(parts, kind):
    """Both phases: replies and drafts of five posts, what the kind adds beside the gradient (Budget) once."""
    def session(make, *flags, ranks):
        s = make(parts, *flags, "--batch", "5", "--max-new-tokens", "4")
        draw = torch.Generator().manual_seed(3)
        s.ranks, s.model = ranks, add_adapter(polylora.drop_lora(s.model), kind, 2, 4, **{} if kind == "full" else {"members": 2})
        s.params = polylora.trained(s.model)
        for p in s.params:
            p.data.add_(0.05 * torch.randn(p.shape, generator=draw))
        return s

    def go(ranks):
        s = session(sft_session, "--lambda", "1", "--k", "3", "--draft-posts", "3", ranks=ranks)
        polylora.sft_step(s, 0)
        Budget(s.model, 10).before()
        first = grads_of(s, 0)
        s = session(grpo_session, "--beta", "0.2", "--diversity-weight", "0.5", ranks=ranks)
        s.reward, s.start = rewards_by_length, {n: 0.9 * p.detach() for n, p in adapter_state(s.model).items()}
        grpo.grpo_step(s, 0)
        return first | {f"grpo {n}": g for n, g in grads_of(s, 0).items()}
    both_take(go, go(Share()))


def after(s, step_fn, tmp_path, steps=20, cut=17):
    """The adapter after `steps`, which have moved all of it and nothing else; its state at `cut` is kept, with the
    optimizer's."""
    optimizer = torch.optim.AdamW(s.params, lr=3e-3)
    own = {id(p) for p in s.params}
    others = [(p, p.clone()) for p in (*s.model.parameters(), *s.model.buffers()) if id(p) not in own]
    first = [p.detach().clone() for p in s.params]
    for step in range(steps):
        if step == cut:
            torch.save(([p.detach().clone() for p in s.params], optimizer.state_dict()), tmp_path / "kept.pt")
        step_fn(s, step)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(p).all() and not torch.equal(p, was) for p, was in zip(s.params, first))
    assert others and all(torch.equal(p, was) for p, was in others)
    return [p.detach().clone() for p in s.params]


def resumed(s, step_fn, tmp_path, steps=20, cut=17):
    """The last steps by a session that knows nothing but the tensors and the run's files."""
    params, state = torch.load(tmp_path / "kept.pt")
    optimizer = torch.optim.AdamW(s.params, lr=3e-3)
    optimizer.load_state_dict(state)
    for p, kept in zip(s.params, params):
        p.data.copy_(kept)
    for step in range(cut, steps):
        step_fn(s, step)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in s.params]


def logged_step(s, step):
    """A step of GRPO whose line is in the run's log, as train writes it."""
    tally = grpo.grpo_step(s, step)
    with open(s.run.folder / "metrics.jsonl", "w" if not step else "a") as log:
        log.write(json.dumps({"step": step + 1} | tally.means(s.ranks, ["D"])) + "\n")


@pytest.mark.parametrize("name", [*OBJECTIVES, *(name for name in grpo.TOKENS if name != "all"), *SCHEDULES])
def test_20_grpo_steps_move_the_adapter_alone_and_are_a_function_of_tensors_and_files(parts, tmp_path, name):
    def make():
        flags = ("--advantage", name, "--beta", "0.1") if name in OBJECTIVES else ("--tokens", name)
        if name in SCHEDULES:
            flags = ("--diversity-share", "1", "--diversity-schedule", name, "--steps", "20")
        s = grpo_session(parts, *flags, "--batch", "2", "--max-new-tokens", "3")
        s.reward, s.domain.voices_of = rewards_by_length, voices_by_length(s.domain)
        s.run, s.posts = types.SimpleNamespace(folder=tmp_path), s.posts[:4]   # posts come again
        return s
    whole_run = after(make(), logged_step, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole_run, resumed(make(), logged_step, tmp_path)))


@pytest.mark.parametrize("name", [*SFT_LOSSES, *DIVERSITIES, "straight-through"])
def test_20_sft_steps_move_the_adapter_alone_and_are_a_function_of_tensors_and_files(parts, tmp_path, name):
    def make():
        flags = ("--loss", name) if name in SFT_LOSSES else ("--lambda", "1", "--draft-posts", "2", "--draft-every", "2",
                                                             *(("--diversity", name) if name in DIVERSITIES else
                                                               ("--d-gradient", name)))
        s = sft_session(parts, *flags, "--k", "3", "--batch", "2", "--max-new-tokens", "3")
        s.domain.voices_of = voices_by_length(s.domain)
        return s
    whole_run = after(make(), polylora.sft_step, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole_run, resumed(make(), polylora.sft_step, tmp_path)))


def test_a_run_with_values_resumes_bit_for_bit(parts, files, tmp_path, monkeypatch):
    """Broken off in its fourth step and resumed from the second: values.jsonl then holds lines of steps that are
    made again."""
    start = polylora.add_lora(polylora.load_model(files[1], types.SimpleNamespace(dtype="auto"), torch.device("cpu")), 2, 4)
    save_adapter(start, tmp_path / "start", files[1])
    flags = ["--start", str(tmp_path / "start"), *files[2:], "--reward", "valid", "--advantage", "single-stream-spo",
             "--steps", "5", "--batch", "8", "--k", "2", "--max-new-tokens", "5", "--save-every", "2", "--lr", "1e-2",
             "--device", "cpu"]
    monkeypatch.setattr(rewards.VerifierReward, "__call__", lambda self, *a: rewards_by_length(*a))
    whole = whole_and_cut(command(grpo.main, tmp_path, *flags), grpo, "grpo_step", 3, before=False)["adapter"]
    assert any(float(x.abs().max()) > 0 for x in whole.values())
    lines = [json.loads(x) for x in (tmp_path / "cut" / "values.jsonl").read_text().split("\n") if x]
    assert [x["step"] for x in lines] == [0, 1, 2, 3, 2, 3, 4] and lines[2] == lines[4]


# ---- D's gradient, straight through ----------------------------------------------------------------------

def straight_through_mean(theta, drawn, heat, draws=1500):
    """The estimate's expectation, over all tuples and, by many draws, over its noise."""
    vectors = OUTCOMES[drawn].clone().requires_grad_()
    slope, = torch.autograd.grad(polylora.diversity(F.normalize(vectors, dim=-1)).sum(), vectors)
    slope = (slope @ OUTCOMES.T).flatten(0, 1)                                 # at the one-hot vectors
    logp, tokens = theta.log_softmax(0), drawn.flatten()
    chance = logp.detach()[drawn].sum(1).exp().repeat_interleave(drawn.shape[1])
    noise = torch.rand(draws, len(tokens), 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    loss = polylora.straight_through_loss(logp.expand(draws * len(tokens), 4), tokens.repeat(draws),
                                          noise.flatten(0, 1), slope.repeat(draws, 1), heat)
    return -torch.autograd.grad((loss * chance.repeat(draws)).sum() / draws, theta, retain_graph=True)[0]


def test_straight_through_is_biased_and_points_nearly_where_the_gradient_of_d_does(monkeypatch):
    """Two drafts of a token each, by enumeration: the score function's estimate is the exact gradient; this one is a
    quarter as long at heat 1 and not half as long at 0.2, and turned, though lower heat helps."""
    in_double(monkeypatch)
    theta, drawn = policy(4, seed=2), all_tuples(4, 2)
    exact = exact_gradient(theta, drawn, polylora.diversity(OUTCOMES[drawn]))
    assert gap(expected_estimate(theta, drawn, polylora.diversity_advantages(OUTCOMES[drawn])), exact) < 1e-6
    found = [straight_through_mean(theta, drawn, heat) for heat in (1.0, 0.5, 0.2)]
    lengths = [float(g.norm() / exact.norm()) for g in found]
    turns = [float(F.cosine_similarity(g, exact, dim=0)) for g in found]
    assert lengths == pytest.approx([0.26, 0.36, 0.45], abs=0.03)
    assert turns == pytest.approx([0.956, 0.981, 0.992], abs=0.005)


def test_the_scores_are_gumbel_s_given_the_largest():
    """Noise drawn for a token drawn by p: unconditionally the scores are log p + Gumbel, each by itself: so is their
    softmax on average, and their largest is the token's."""
    p, draw = torch.tensor([0.5, 0.3, 0.2]).double(), torch.Generator().manual_seed(1)
    n, logp = 60_000, p.log().expand(60_000, 3)
    token = torch.multinomial(p, n, True, generator=draw)
    noise = torch.rand(n, 3, generator=draw, dtype=torch.float64)
    soft = lambda heat: torch.stack([-polylora.straight_through_loss(logp, token, noise, torch.eye(3).double()[[v]], heat)
                                     for v in range(3)], 1)
    assert gap(soft(1e-4), F.one_hot(token, 3)) < 0.5 and torch.equal(soft(0.7).argmax(1), token)
    free = p.log() - (-torch.rand(n, 3, generator=draw, dtype=torch.float64).log()).log()
    for heat in (0.5, 2.0):
        for power in (1, 2):
            assert gap(soft(heat).pow(power).mean(0), (free / heat).softmax(-1).pow(power).mean(0)) < 0.006
    x = logp[:50].clone().requires_grad_()                                     # g is held: the slope of a softmax of x + g
    weight = torch.tensor([[1.0, -2.0, 0.5]]).double()
    got, = torch.autograd.grad(polylora.straight_through_loss(x, token[:50], noise[:50], weight, 0.7).sum(), x)
    q = soft(0.7)[:50]
    assert gap(got, -q * (weight - (q * weight).sum(-1, keepdim=True)) / 0.7) < 1e-9


def straight_session(parts, *flags, ranks=None):
    flags = ("--lambda", "1", "--d-gradient", "straight-through", "--draft-posts", "4", "--k", "3", "--temperature", "0.8", *flags)
    return sft_session(parts, *flags, ranks=ranks)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_straight_through_is_the_gradient_of_d_of_relaxed_drafts(parts, kind):
    """Written out in one graph: one-hot vectors with a softmax's slope, read by the frozen base, pooled, centred, D."""
    s, frozen = straight_session(parts, "--gumbel-heat", "0.6"), copy.deepcopy(parts[2])
    if kind == "full":
        add_adapter(polylora.drop_lora(s.model), "full", 0, 0)
        for p in s.model.parameters():
            p.data.add_(0.01 * torch.randn(p.shape))
    visits = batch_visits(len(s.posts), 2, 0, 4)
    got, tally = gradient(s, lambda t: polylora.add_diversity(s, visits, 0, t))

    def plain(_):
        prompts, samples, texts = s.sample_drafts(visits, 0, 3)
        table, total = frozen.model.embed_tokens.weight[:s.model.vocab], 0
        for visit, prompt, drafts, words in zip(visits, prompts, samples.tokens, texts):
            vectors = []
            for d, draft in enumerate(drafts):
                draw = torch.Generator().manual_seed(polylora.seed_of(s.stream("gumbel", 0, visit), d))
                logits = s.model(torch.tensor([prompt + draft]))[0, len(prompt) - 1:-1, :s.model.vocab]
                logp, noise = (logits / 0.8).log_softmax(-1), torch.rand(len(draft), s.model.vocab, generator=draw)
                hard = F.one_hot(torch.tensor(draft), s.model.vocab).float()
                first = -(hard * noise).sum(-1, keepdim=True).log()
                scores = -torch.where(hard > 0, first, -noise.log() / logp.exp() + first).log()
                soft = ((logp + (scores - logp).detach()) / 0.6).softmax(-1)
                x = (hard + soft - soft.detach()) @ table
                kept = max(1, sum(t not in s.stops for t in draft))
                mine, text = frozen.hidden(x[None])[0, :kept].mean(0), s.embedder.vectors([words[d]])[0]
                vectors.append(text - s.embedder.centre + mine - mine.detach())
            total = total + polylora.diversity(F.normalize(torch.stack(vectors), dim=-1)[None])[0] / 2
        (-total).backward()
    want, _ = gradient(s, plain)
    nearly(got, want, 1e-3)
    assert tally.means(s.ranks, ["D"])["D"] > 0


def test_straight_through_moves_the_adapter_elsewhere_however_it_is_packed_or_dealt(parts):
    def go(*flags, ranks=None):
        s = straight_session(parts, *flags, ranks=ranks)
        polylora.sft_step(s, 0)
        return grads_of(s, 0)
    want, score = go(), go("--d-gradient", "score")
    nearly(go("--micro-tokens", "40"), want)
    both_take(lambda ranks: go(ranks=ranks), want)
    size = max(float(g.abs().max()) for g in score.values())
    assert max(gap(want[n], score[n]) for n in want) > 0.05 * size
    with pytest.raises(AssertionError):
        nearly(go("--gumbel-heat", "0.3"), want, 1e-3)


@pytest.mark.parametrize("flags", ["--diversity vendi", "--embedder x", "--shard", "--gumbel-heat 0"])
def test_straight_through_is_for_the_plain_d(flags):
    args = polylora.parser().parse_args(["sft", "--model", "-", "--data", "-", "--out", "-", "--lambda", "1", "--d-gradient",
                                         "straight-through", *flags.split()])
    with pytest.raises(InputError, match="--d-gradient straight-through is for"):
        polylora.check_sft(args)
