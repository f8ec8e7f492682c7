"""Tests of support/steplog.py."""

import sys
import types

import pytest

from helpers import Share, rl, step_gradient
from support.files import InputError, Tracker
from support import steplog


# ---- The prompt and the trackers -----------------------------------------------------------------

@pytest.mark.parametrize("kind", Tracker.PACKAGES)
def test_a_tracker_gets_the_numbers_of_each_step(kind, tmp_path, monkeypatch):
    got = []
    fake = types.ModuleType(kind)
    fake.SummaryWriter = lambda place: types.SimpleNamespace(
        add_scalar=lambda name, value, step: got.append((name, value, step)), flush=lambda: None)
    fake.init = lambda **about: types.SimpleNamespace(
        log=lambda numbers, step: got.extend((n, v, step) for n, v in numbers.items()))
    monkeypatch.setitem(sys.modules, Tracker.PACKAGES[kind], fake)
    tracker = Tracker(kind, tmp_path, {})
    tracker.log({"step": 3, "ce": 1.5, "grad_norm": None, "stage": "sft"})
    tracker.log({"event": "end", "seconds": 9.0})
    assert got == [("ce", 1.5, 3)]
    # not installed
    monkeypatch.setitem(sys.modules, Tracker.PACKAGES[kind], None)
    with pytest.raises(InputError, match=f"the package {kind} is not installed"):
        Tracker.package(kind)


def test_the_log_of_a_step_holds_its_required_fields(parts):
    """A GRPO loss near zero says nothing: reward, its spread, entropy, clipping, dead groups,
    lengths and cut drafts do."""
    s = rl(parts)
    cut, write = [], s.sample_completions

    def watched(*a):
        out = write(*a)
        cut.extend(not f for fs in out[1].finished for f in fs)
        return out
    s.sample_completions = watched
    _, tally = step_gradient(s)
    wanted = {"reward", "reward_std", "entropy", "clipped", "zero_variance", "length", "truncated",
              "mismatch", "D"}
    assert wanted <= set(tally.sums) & set(steplog.GRPO_LOGGED)
    assert tally.means(Share(), ["truncated"])["truncated"] == sum(cut) / 24 and 0 < sum(cut) < 25
