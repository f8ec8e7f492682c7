"""Tests of methods/small_base.py."""

import pytest

import data
import polylora
from helpers import lines, metrics


# ---- The command line ----------------------------------------------------------------------------

WRONG_BASE = ["--heads 0", "--heads 1", "--heads 5", "--hidden 30", "--hidden 0", "--layers 0",
              "--vocab 0"]


@pytest.mark.parametrize("flags", WRONG_BASE)
def test_a_shape_that_is_no_qwen3_is_one_sentence_and_exit_code_2(files, tmp_path, capsys, flags):
    """Half as many key/value heads as heads, and an even head_dim, or nothing fits."""
    small = "--steps 1 --batch 2 --hidden 32 --layers 1 --heads 4 --vocab 300"
    code = polylora.main(["base", *files[2:], "--out", str(tmp_path / "run"), *small.split(),
                          *flags.split()])
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code == 2 and len(said) == 1 and not (tmp_path / "run").exists()


# ---- What a run survives -------------------------------------------------------------------------

@pytest.mark.slow
def test_base_training_ends_at_until_or_fails(tmp_path, capsys):
    """Of three seeds one base of 250 steps had not yet learnt what a scene is: every arm built
    on it measured nothing."""
    assert data.main(["split", "--data", "pocket", "--sizes", "base=40",
                      "--out", str(tmp_path)]) == 0
    run = lambda out, *more: polylora.main(["base", "--data", str(tmp_path / "base.jsonl"),
                                            "--out", str(tmp_path / out),
                                            "--batch", "4", "--hidden", "16", "--layers", "1",
                                            "--heads", "2",
                                            "--vocab", "270", "--steps", "24", "--lr", "0.01",
                                            "--schedule", "constant", *more])
    assert run("whole") == 0
    losses = [line["ce"] for line in metrics(tmp_path / "whole") if "ce" in line]
    means = [sum(losses[i - 20:i]) / 20 for i in range(20, 25)]
    assert run("some", "--until", str((means[1] + means[2]) / 2)) == 0
    *steps, end = metrics(tmp_path / "some")
    assert (end["step"] == len(steps) == 22
            and (tmp_path / "some" / "model" / "config.json").exists())
    assert run("none", "--until", "0.01") == 2 and "give it more --steps" in capsys.readouterr().err
    assert not (tmp_path / "none" / "done.json").exists()


# ---- Objectives and losses -----------------------------------------------------------------------

def test_a_base_can_be_made_by_epochs(tmp_path):
    """`--steps 0`, which the help offers, was an UnboundLocalError."""
    assert data.main(["split", "--data", "pocket", "--sizes", "a=24", "--out", str(tmp_path)]) == 0
    assert polylora.main(["base", "--data", str(tmp_path / "a.jsonl"),
                          "--out", str(tmp_path / "base"), "--steps", "0",
                          "--epochs", "1", "--batch", "8", "--hidden", "16", "--layers", "1",
                          "--heads", "2"]) == 0
    assert [x["step"] for x in lines(tmp_path / "base") if "event" not in x] == [1, 2, 3]
