"""Tests of support/progress.py: what a phase shows while it runs, and what it ends with."""

import json
import sys
import types

import pytest

import data
import evaluate
import grpo
import polylora
import trainer
from helpers import grpo_args, lines, places, refusal, sft_args
from support.files import Tracker
from support.progress import MATTERS, begin_and_end, numbers_of, outlook
from support.steplog import GRPO_LOGGED, SFT_LOGGED


def test_the_numbers_that_matter_are_logged_and_shown():
    """SFT with D showed cross-entropy alone: the first four names have no D."""
    line = {"step": 3, "ce": 1.25, "loss": 2.0, "D": 0.5, "reward": 0.125, "entropy": 3.0}
    assert numbers_of("sft", line, SFT_LOGGED) == {"ce": "1.250", "loss": "2.000", "D": "0.500"}
    assert list(numbers_of("grpo", line, GRPO_LOGGED)) == ["reward", "D", "entropy"]
    assert numbers_of("other", line, ["loss", "D", "x", "ce"]) == {"loss": "2.000", "D": "0.500"}
    assert {name for name, _ in MATTERS["sft"]} <= set(SFT_LOGGED)
    assert {name for name, _ in MATTERS["grpo"]} <= set(GRPO_LOGGED)


def test_a_phase_ends_with_its_numbers_of_the_first_and_last_tenth(tmp_path):
    log = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "reward": i / 10, "D": None if i else 0.5} for i in range(20)]
    rows.append({"event": "end", "step": 20, "reward": 99})
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert begin_and_end(log, "reward") == pytest.approx((0.05, 1.85))
    assert begin_and_end(log, "D") is None and begin_and_end(log, "ce") is None
    assert outlook(tmp_path, "grpo") == (f"{tmp_path}: done; it worked if reward rises (here 0.050 "
                                         f"to 1.850): look at {log}")
    assert outlook(tmp_path / "none", "grpo") == f"{tmp_path / 'none'}: done"


@pytest.mark.slow
def test_each_command_ends_with_what_to_look_at(root, capsys, monkeypatch):
    w = places(root)
    bars = []

    class Bar(trainer.tqdm):
        def set_postfix(self, shown, **more):
            bars.append(list(shown))
            super().set_postfix(shown, **more)
    monkeypatch.setattr(trainer, "tqdm", Bar)

    def last(main, *words):
        capsys.readouterr()
        assert main(list(words)) == 0
        return capsys.readouterr().out.splitlines()[-1]
    said = last(polylora.main, *sft_args(w, "lora", "--lambda", "0.3"))
    log = root / "lora" / "metrics.jsonl"
    ces = [line["ce"] for line in lines(root / "lora") if "ce" in line]
    assert said.startswith(f"{root / 'lora'}: done; it worked if ce falls (here {ces[0]:.3f} to "
                           f"{ces[-1]:.3f}), D does not fall to 0 (here ")
    assert said.endswith(f"look at {log}") and bars[0] == ["ce", "D"]
    said = last(grpo.main, *grpo_args(w, "rl"))
    assert "it worked if reward rises" in said and "entropy does not fall" in said
    assert said.endswith(f"look at {root / 'rl' / 'metrics.jsonl'}")
    said = last(evaluate.main, "measure", str(root / "rl"), "--data", w["eval"], "--n", "10",
                "--max-new-tokens", "5")
    assert said.startswith(f"Look at evaluation.json in {root / 'rl'}: ")
    assert said.endswith(f"python evaluate.py report {root / 'rl'} --out report")
    said = last(evaluate.main, "report", str(root / "rl"), "--out", str(root / "report"))
    assert said.startswith(f"Next: python evaluate.py drafts {root / 'rl'}")
    said = last(data.main, "check", w["sft"])
    command = f"python data.py split --data {w['sft']}"
    assert said.startswith(f"Next, if these posts look right: {command}")
    words = said.split(": ", 1)[1].split()[2:-1]
    assert "domain.json" in last(data.main, *words, str(root / "parts"))


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_phase_sends_its_numbers_to_a_tracker_that_is_imported_only_then(root, monkeypatch,
                                                                           capsys, kind):
    w = places(root)
    sent = []
    fake = types.ModuleType(kind)
    fake.SummaryWriter = lambda place: types.SimpleNamespace(
        add_scalar=lambda name, value, step: sent.append((step, name, value)), flush=lambda: None)
    fake.init = lambda **about: types.SimpleNamespace(
        log=lambda numbers, step: sent.extend((step, *pair) for pair in numbers.items()))
    package = Tracker.PACKAGES[kind]
    monkeypatch.setitem(sys.modules, package, None)
    said = refusal(capsys, polylora.main, *sft_args(w, "no", "--track", kind))
    assert f"pip install {kind}" in said and not (root / "no").exists()
    monkeypatch.setitem(sys.modules, package, fake)
    assert polylora.main(sft_args(w, "lora", "--track", kind)) == 0
    logged = [(line["step"], "ce", line["ce"]) for line in lines(root / "lora") if "ce" in line]
    assert [found for found in sent if found[1] == "ce"] == logged and len(logged) == 2
