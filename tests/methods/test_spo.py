"""Tests of methods/spo.py."""

import json
import math
import types

import pytest
import torch

import grpo
import lora
import model
import rewards
import trainer
from helpers import (
    RIGHT, all_tuples, command, exact_gradient, expected_estimate, gap, grpo_session, in_double,
    packed, policy, rewards_by_length, whole_and_cut,
)
from lora import save_adapter
from methods import spo
from polylora import Features
from support import checks
from support import files as support_files
from support.files import InputError, seed_of
from support.registry import OBJECTIVES
from support import steplog
from trainer import Visit


# ---- Objectives ----------------------------------------------------------------------------------

def test_spo_is_the_reward_minus_the_value(monkeypatch):
    in_double(monkeypatch)
    theta, drawn = policy(4, seed=3), all_tuples(4, 3)
    got = spo.stream_advantages(RIGHT[drawn], torch.full((len(drawn),), 0.4))
    assert got[5].tolist() == pytest.approx((RIGHT[drawn][5] - 0.4).tolist())
    want = exact_gradient(theta, drawn, RIGHT[drawn].mean(1))
    weight = OBJECTIVES["single-stream-spo"].gradient_scale(Features(RIGHT[drawn]))
    assert weight == 3 and gap(expected_estimate(theta, drawn, got), weight * want) < 1e-7


# ---- Single-stream SPO's values ------------------------------------------------------------------

def test_spo_forgets_half_per_half_life():
    """2^(-kl / 0.06), from 7/8 to 0.96."""
    assert spo.kept_share(0.06 * math.log2(1 / 0.9)) == pytest.approx(0.9)
    assert spo.kept_share(0.03, low=0.5) == pytest.approx(2 ** -0.5)
    assert spo.kept_share(9.0) == 0.875 and spo.kept_share(0.0) == spo.kept_share(-1.0) == 0.96


def spo_session(parts, *flags, ranks=None, folder=None):
    s = grpo_session(parts, "--advantage", "single-stream-spo", *flags)
    s.ranks = ranks or s.ranks
    s.reward = rewards_by_length
    s.run = folder and types.SimpleNamespace(folder=folder)
    return s


def test_values_by_hand(parts, tmp_path):
    """First 8 drafts of the policy as it is; then rho times the count and the visit's rewards;
    rho by the drift of the last drafts, which a change of the policy makes."""
    s = spo_session(parts, "--beta", "0", folder=tmp_path)
    values, visits = spo.Values(s, 0), [Visit(2, 0), Visit(5, 0)]
    first = values(visits, 0)
    _, samples, texts = s.sample_completions([Visit(2, -1), Visit(5, -1)], 0, 8)
    assert first.tolist() == pytest.approx([sum(r) / 8 for r in rewards_by_length(None, texts)])
    assert torch.equal(values(visits, 3), first)                               # known by now
    assert values.drift(visits) == pytest.approx([0, 0], abs=1e-5)
    _, samples, _ = s.sample_completions(visits, 0, 2)
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
        now = model.token_logprobs(s.model, rows, s.args.temperature)[0]
    then = [p for completion in samples.logprobs[1] for p in completion]
    drift = values.drift(visits)
    assert (drift[1] == pytest.approx(sum(then) / len(then) - now.mean().item(), abs=1e-4)
            and abs(drift[1]) > 1e-3)
    old = dict(values.known[s.posts[5].key])
    values.learn(visits, torch.tensor([[1.0, 1.0], [1.0, 1.0]]), samples, 1)
    kept = spo.kept_share(drift[1])
    assert values.known[s.posts[5].key]["right"] == pytest.approx(kept * old["right"] + 2)
    with pytest.raises(InputError, match="from 0 to 1"):
        values.learn(visits, torch.tensor([[1.5, 0.0], [0.0, 0.0]]), samples, 2)
    # The file alone gives the same values at every step; a torn line is no line.
    with open(tmp_path / "values.jsonl", "a") as file:
        file.write('\n{"step": 1, "posts": {"to')
    assert spo.Values(s, 2).known == values.known
    assert spo.Values(s, 1).known[s.posts[5].key] == old and spo.Values(s, 0).known == {}


def test_a_post_that_is_in_a_step_twice_is_counted_twice(parts):
    """At the end of an epoch and at the start of the next: the second rewards replaced the first.
    """
    s = spo_session(parts)
    values, twice = spo.Values(s, 0), [Visit(2, 0), Visit(2, 1)]
    values(twice, 0)
    old = dict(values.known[s.posts[2].key])
    _, samples, _ = s.sample_completions(twice, 0, 2)
    values.learn(twice, torch.tensor([[1.0, 0.25], [0.0, 1.0]]), samples, 0)
    new = values.known[s.posts[2].key]
    assert new["right"] == pytest.approx(0.96 * old["right"] + 2.25)
    assert new["wrong"] == pytest.approx(0.96 * old["wrong"] + 1.75)
    assert new["tokens"] == [*samples.tokens[0], *samples.tokens[1]]


def test_a_prompt_s_value_excludes_its_own_rewards(parts):
    """A baseline that has seen the rewards is not independent of the drafts that it is a
    baseline of."""
    s, visits = spo_session(parts, "--k", "3"), [Visit(2, 0), Visit(5, 0)]
    first = grpo.collect(s, visits, 0).features
    # of the first 8 drafts alone
    assert torch.equal(first.values, spo.Values(s, 0)(visits, 0))
    counts = [s.values.known[s.posts[v.index].key] for v in visits]
    before = [each["right"] / (each["right"] + each["wrong"]) for each in counts]
    # the visit has been learnt from by now
    assert gap(torch.tensor(before), first.values) > 1e-3
    second = grpo.collect(s, visits, 1).features
    assert second.values.tolist() == pytest.approx(before)
    after = [s.values.known[s.posts[v.index].key]["right"] for v in visits]
    assert after == pytest.approx([spo.kept_share(0.0) * each["right"] + float(r.sum())
                                   for each, r in zip(counts, second.rewards)])


def test_the_first_completions_of_a_post_have_their_own_users(parts):
    s, asked = spo_session(parts), []
    s.reward = lambda posts, texts, seeds: (asked.append(list(seeds)),
                                            rewards_by_length(posts, texts))[1]
    spo.Values(s, 0)([Visit(2, 4), Visit(5, 0)], 3)
    assert asked == [[seed_of(4, "reader", 3, s.posts[i].key, -1) for i in (2, 5)]]


def test_spo_takes_a_single_completion(parts, tmp_path):
    s = spo_session(parts, "--k", "1", "--beta", "0.1", folder=tmp_path)
    tally = grpo.grpo_step(s, 0)
    assert max(float(p.grad.abs().max()) for p in s.params) > 0
    means = tally.means(s.ranks, steplog.GRPO_LOGGED)
    assert "zero_variance" not in means and "D" not in means and means["advantage"] > 0
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    support_files.write_json(tmp_path / "adapter_config.json", config)
    check = lambda flags: checks.check_grpo(grpo.parser().parse_args(
        ["--start", str(tmp_path), "--model", "-", "--data", "-", "--out", "-", *flags.split()]))
    check("--k 1 --advantage single-stream-spo")
    for flags in ("--k 1", "--k 1 --advantage single-stream-spo --diversity-weight 1",
                  "--k 1 --advantage single-stream-spo --entropy-weight 1",
                  "--k 0 --advantage single-stream-spo"):
        with pytest.raises(InputError, match="at least 2 completions"):
            check(flags)
    for name in ("mara", "soft-spo"):
        check(f"--advantage {name} --beta 0.1")
        with pytest.raises(InputError, match="--beta"):
            check(f"--advantage {name}")
    with pytest.raises(InputError, match="--shard"):
        check("--advantage single-stream-spo --shard")


# ---- Ranks and resumption ------------------------------------------------------------------------

@pytest.mark.slow
def test_a_run_with_values_resumes_bit_for_bit(parts, files, tmp_path, monkeypatch):
    """Broken off in its fourth step and resumed from the second: values.jsonl then holds lines
    of steps that are made again."""
    start = lora.add_lora(trainer.load_model(files[1], types.SimpleNamespace(dtype="auto"),
                                             torch.device("cpu")), 2, 4)
    save_adapter(start, tmp_path / "start", files[1])
    flags = ["--start", str(tmp_path / "start"), *files[2:], "--reward", "valid",
             "--advantage", "single-stream-spo",
             "--steps", "5", "--batch", "8", "--k", "2", "--max-new-tokens", "5",
             "--save-every", "2", "--lr", "1e-2",
             "--device", "cpu"]
    monkeypatch.setattr(rewards.VerifierReward, "__call__", lambda self, *a: rewards_by_length(*a))
    whole = whole_and_cut(command(grpo.main, tmp_path, *flags), grpo, "grpo_step", 3,
                          before=False)["adapter"]
    assert any(float(x.abs().max()) > 0 for x in whole.values())
    lines = [json.loads(x) for x in (tmp_path / "cut" / "values.jsonl").read_text().split("\n")
             if x]
    assert [x["step"] for x in lines] == [0, 1, 2, 3, 2, 3, 4] and lines[2] == lines[4]
