"""Tests of support/plan.py."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import grpo
import polylora
from helpers import grpo_args, lines, rl, sft_args
from support import plan
from support import posts


# ---- The step, on a real session around a tiny model ---------------------------------------------

def test_a_plan_needs_no_replies(parts):
    """Phase two learns from prompts alone: its first line crashed where no post had a reply."""
    s = rl(parts)
    s.args.steps, s.run = 2, None
    said = plan.plan_text(s)
    s.posts = [posts.Post(p.id, p.post, ()) for p in s.posts]
    assert plan.plan_text(s) == said and "12 posts, 2 steps of 6" in said


@pytest.mark.slow
def test_a_dry_run_writes_nothing_and_its_figures_are_those_of_the_run(world, tmp_path, capsys):
    """Posts, steps, tokens and memory before the first step, and a time; of five arms of days
    nothing was said."""
    args = sft_args(world, "x", "--out", str(tmp_path / "run"), "--lambda", "0.5", "--steps", "5",
                    "--draft-every", "2")
    with pytest.raises(SystemExit) as stop:
        polylora.main([*args, "--dry-run"])
    planned, time_said = capsys.readouterr().out.strip().splitlines()[-2:]
    assert stop.value.code == 0 and not (tmp_path / "run").exists()
    assert polylora.main(args) == 0 and planned in capsys.readouterr().out
    steps, end = lines(tmp_path / "run")[:-1], lines(tmp_path / "run")[-1]
    assert planned.startswith(f"run: 12 posts, {len(steps)} steps of 4")
    tokens = int(re.search(r"some ([\d,]+) tokens", planned)[1].replace(",", ""))
    assert tokens / 2 < sum(x["tokens"] for x in steps) < 1.2 * tokens
    seconds = int(re.fullmatch(r"plan run: 5 steps, about (\d+) s", time_said)[1])
    # a machine may be busy
    assert seconds < 5 * end["seconds"] + 2 and end["seconds"] < 5 * seconds + 2
    later = grpo_args(world, "x", "--start", str(tmp_path / "none"), "--model", world["model"],
                      "--out", str(tmp_path / "rl"))
    with pytest.raises(SystemExit):
        grpo.main([*later, "--dry-run"])     # before its start exists
    # of 64 posts or more the first, alone, ended it
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps((x := json.loads(line))
                                       | {"id": f"{i}-{copy}", "post": f"{x['post']} {copy}"})
                            + "\n" for copy in range(12)
                            for i, line in enumerate(Path(world["eval"]).read_text().splitlines())))
    shutil.copy(Path(world["eval"]).parent / "domain.json", tmp_path / "domain.json")
    assert evaluate.main(["measure", world["lora"], "--data", str(many), "--n", "10",
                          "--max-new-tokens", "5",
                          "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "plan rl: 2 steps" in said and "plan measure: 72 posts with 10 drafts" in said
    assert not (tmp_path / "rl").exists() and not (Path(world["lora"]) / "evaluation.json").exists()


def test_a_dry_run_s_time_adds_sampling_and_plain_steps(monkeypatch):
    """Every third step drafts and takes ten times as long: timing only one kind is wrong by a
    factor. By a clock of its own."""
    now, moved = [0.0], torch.zeros(1, requires_grad=True)
    monkeypatch.setattr(plan.time, "perf_counter", lambda: now[0])

    def step(number):
        # the first one warms up
        now[0] += 30 if number == 0 else 0.3 if number % 3 == 0 else 0.03
        moved.grad = torch.ones(1)
    session = SimpleNamespace(args=SimpleNamespace(steps=300, draft_every=3), params=[moved])
    assert (plan.time_steps(session, step) == pytest.approx(100 * (0.3 + 2 * 0.03))
            and moved.grad is None)
