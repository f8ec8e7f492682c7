"""Tests of methods/schedules.py."""

import types
from types import SimpleNamespace

import pytest

import grpo
import rewards
from helpers import on_two_ranks, rl, scheduled
from support import registry
from support.steplog import Tally


# ---- The step, on a real session around a tiny model ---------------------------------------------

def test_a_schedule_is_a_factor_on_d_s_weight(parts, monkeypatch, tmp_path):
    """Over 11 steps, D .8 at the first: held is 1 when a tenth of it is lost, whichever sign D
    has."""
    args = SimpleNamespace(steps=11, diversity_weight=3.0, diversity_share=0.0)
    for name, want in {"constant": (1, 1, 1), "rising": (0, 0.6, 2), "falling": (2, 1.4, 0),
                       "held": (0, 1, 0)}.items():
        args.diversity_schedule = name
        s = SimpleNamespace(args=args, run=SimpleNamespace(folder=tmp_path), first_diversity=None)
        got = [scheduled(s, step, d) for step, d in ((0, 0.8), (3, 0.72), (10, 0.9))]
        assert got == pytest.approx(want)
    assert scheduled(s, 5, 0.1) == 4
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "D": -2.0}\n{"step": 2, "D": 7}\n')
    # after a resume
    again = SimpleNamespace(args=args, run=s.run, first_diversity=None)
    assert scheduled(again, 5, -2.1) == pytest.approx(0.5)
    args.steps, args.diversity_schedule, tally = 1, "rising", Tally()
    assert scheduled(again, 0, 1.0) == 0                               # a run of one step
    args.steps = 2
    assert scheduled(again, 1, 1.0) == 2
    # of no D nothing can be lost
    args.diversity_schedule, again.first_diversity = "held", 0.0
    assert scheduled(again, 1, 0.5) == 0
    args.diversity_schedule = "rising"
    assert (rewards.diversity_weight(args, 4.0, 1.0, 0.5, tally) == 1.5 and tally.sums["D_share"][0]
            == 0.75)
    args.diversity_weight, args.diversity_share = 0.0, 3.0
    assert rewards.diversity_weight(args, 4.0, 1.0, 0.5, tally) == 3.0
    # In a step: the mean D over all ranks' drafts, whatever their quality
    seen = []
    seeing = registry.SCHEDULES["constant"]._replace(
        function=lambda session, step, spread: seen.append(spread) or 1.0)
    monkeypatch.setitem(registry.SCHEDULES.rows, "constant", seeing)

    def step(ranks=None):
        s, tally = rl(parts, "--diversity-weight", "1", ranks=ranks), Tally()
        grpo.rollout(s, 0, tally)
        return tally
    d, count = step().sums["D"]
    on_two_ranks(step)
    assert seen == pytest.approx([d / count] * 3)


# ---- Objectives and losses -----------------------------------------------------------------------

def test_d_held_knows_the_first_d_though_the_first_step_had_no_draft(tmp_path):
    """A first step whose posts were all left out (--resample) ended the run, or its resumption,
    in a traceback."""
    args = types.SimpleNamespace(diversity_schedule="held", steps=10)
    new = lambda: types.SimpleNamespace(args=args, run=types.SimpleNamespace(folder=tmp_path),
                                        first_diversity=None)
    session = new()
    assert scheduled(session, 1, 0.5) == 0 and scheduled(session, 2, 0.45) == pytest.approx(1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "D": 0.5}\n{"step": 3, "D": '
                                            '0.1}\n')
    assert scheduled(new(), 3, 0.45) == pytest.approx(1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert scheduled(new(), 1, 0.45) == 0
    args.diversity_schedule = "rising"
    assert scheduled(new(), 9, 0.45) == 2
