"""Tests of support/sizes.py."""

import runpy
import sys

import pytest

from helpers import ROOT
from support import cost, sizes
from support.plan import MARGIN


def test_the_page_holds_the_table_that_the_command_prints(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "support.sizes")
    runpy.run_module("support.sizes", run_name="__main__")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 2 + len(cost.QWEN3)
    page = (ROOT / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    assert f"\n\n{printed}\n" in page and "`python -m support.sizes`" in page
    assert "no GPU has run this" in page


def test_what_is_shown_fits_and_nothing_that_fits_is_faster():
    machine = sizes.MACHINES[2]
    for name in cost.QWEN3:
        config = cost.shape_of(name)
        found = sizes.fits(config, machine)
        best = sizes.best(config, machine)
        assert all(MARGIN * fit.gib + sizes.CONTEXT <= machine.gib for fit in found)
        assert best.seconds <= min(fit.seconds for fit in found) + 10
    assert not sizes.fits(config, sizes.MACHINES[0])             # 32B on 16 GB


def test_a_larger_gpu_or_several_never_need_longer():
    for name in cost.QWEN3:
        times = [getattr(sizes.best(cost.shape_of(name), machine), "seconds", float("inf"))
                 for machine in sizes.MACHINES]
        assert times == sorted(times, reverse=True), name


def test_flags_of_the_table_are_flags_of_the_programs():
    assert sizes.flags_text({"nf4": True, "shard": False, "micro_tokens": 4096, "max_rows": 256},
                            True) == "`--nf4 --micro-tokens 4096` (checkpointing)"
    assert sizes.flags_text({"nf4": False, "micro_tokens": 16384}, False) == "none"
    import polylora
    parsed = polylora.parser().parse_args(["sft", "--data", "-", "--out", "-"])
    for name in ("k", "max_new_tokens", "micro_tokens", "max_rows", "nf4", "shard", "rank", "batch",
                 "draft_posts"):
        default = {"k": 8}.get(name, getattr(parsed, name))      # 8 in train.sh
        assert sizes.FLAGS[name] == default, name
    assert sizes.STEPS == -(-2500 // sizes.FLAGS["batch"])


@pytest.mark.parametrize("stage", [0, 1])
def test_recomputing_or_fewer_tokens_a_pass_take_less_memory(stage):
    config = cost.shape_of("Qwen3-8B")
    base = dict(sizes.CHANGES[0])
    plain = cost.memory(config, sizes.loads_of(config, base, 1, False)[stage]).total
    for changes, checkpointing in ((base, True), (base | {"micro_tokens": 1024}, False),
                                   (base | {"nf4": True}, False)):
        load = sizes.loads_of(config, changes, 1, checkpointing)[stage]
        assert cost.memory(config, load).total < plain
    shared = sizes.loads_of(config, base | {"shard": True}, 8, False)[stage]
    assert cost.memory(config, shared).weights < cost.frozen_bytes(config) / 3
