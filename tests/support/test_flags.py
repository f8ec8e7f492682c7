"""Tests of support/flags.py."""

import pytest

import evaluate
import grpo
import polylora
from support.peft_files import LINEARS


# ---- A session -----------------------------------------------------------------------------------

def test_default_flags_are_those_of_the_card():
    """L2, L13, R9: no weight decay, no dropout, all seven linears, no KL."""
    sft_, rl_ = (p.parse_args([*flags, "--data", "-", "--out", "-"]) for p, flags in (
        (polylora.parser(), ["sft", "--model", "-"]), (grpo.parser(), ["--start", "-"])))
    assert (sft_.weight_decay, sft_.dropout, rl_.weight_decay, rl_.beta) == (0, 0, 0, 0)
    assert sft_.targets == ",".join(LINEARS) and len(LINEARS) == 7


# ---- Help ----------------------------------------------------------------------------------------

def command_of(parser, name):
    return parser._subparsers._group_actions[0].choices[name]


def test_the_help_of_phase_two_fits_on_two_screens(monkeypatch):
    """Of 80 columns: flags in groups; those of rivals and rarely needed ones by --help-all alone.
    """
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["grpo.py", "--help"])
    short = grpo.parser().format_help()
    assert len(short.splitlines()) <= 100 and short.startswith("usage: grpo.py --start START ")
    headings = [line for line in short.splitlines() if line[:1].isalpha() and line.endswith(":")]
    assert headings == ["options:", "method:", "data:", "sampling:", "run:"]
    monkeypatch.setattr("sys.argv", ["grpo.py", "--help-all"])
    whole = grpo.parser().format_help()
    assert "\nrivals:\n" in whole and "\nrarely needed:\n" in whole
    hidden = ("--label-noise", "--entropy-weight", "--ratio", "--beta2", "--revision", "--tokens")
    for flag in hidden:
        assert flag in whole and flag not in short, flag
    assert "--clip-low X" in short and "(default: 0.2)" in short


@pytest.mark.parametrize("parser, old, new, value", [
    (lambda: grpo.parser(), "--flip", "--label-noise", "0.25"),
    (lambda: command_of(polylora.parser(), "sft"), "--flip", "--label-noise", "0.25"),
    (lambda: command_of(evaluate.parser(), "measure"), "--bare", "--base-out", "runs/base")])
def test_former_names_of_flags_are_taken_and_not_shown(monkeypatch, parser, old, new, value):
    monkeypatch.setattr("sys.argv", ["program.py", "--help-all"])
    shown = parser().format_help()
    assert f"{new} " in shown and f"{old} " not in shown
    needed = ["--start", "-", "--data", "-", "--out", "-"]
    if new == "--base-out":
        needed = ["--data", "-"]
    by_new, by_old = (vars(parser().parse_args([*needed, flag, value])) for flag in (new, old))
    assert by_new == by_old and by_new != vars(parser().parse_args(needed))
    assert {"flip", "bare"} & by_new.keys()            # the keys of a run's config.json stay
