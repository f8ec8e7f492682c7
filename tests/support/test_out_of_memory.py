"""Tests of support/out_of_memory.py: too little memory is one sentence that says what to lower."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import evaluate
import grpo
import polylora
from helpers import ROOT, grpo_args, sft_args
from support import hub
from support.files import InputError
from support.out_of_memory import advice, is_out_of_memory

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.9 GiB."


def fails(*_, **__):
    raise torch.OutOfMemoryError(SAID)


def one_line(capsys):
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1 and not any("Traceback" in line for line in said)
    return errors[0]


def test_a_step_without_memory_says_what_to_lower_and_in_which_order(world, tmp_path, capsys,
                                                                     monkeypatch):
    monkeypatch.setattr(polylora, "sft_step", fails)
    args = sft_args(world, "x", "--out", str(tmp_path / "run"), "--no-checkpointing", "--k", "3",
                    "--micro-tokens", "512", "--max-rows", "64")
    assert polylora.main(args) == 2
    assert one_line(capsys) == (
        "error: out of memory (CUDA out of memory): add --checkpointing; then lower --micro-tokens "
        "(now 512), then --max-rows (now 64), then --k (now 3); then add --nf4, or --shard on "
        "several GPUs")


def test_flags_that_are_in_use_or_that_a_command_lacks_are_not_named(world, tmp_path, capsys,
                                                                     monkeypatch):
    monkeypatch.setattr(grpo, "grpo_step", fails)
    args = grpo_args(world, "x", "--out", str(tmp_path / "rl"), "--checkpointing", "--nf4")
    assert grpo.main(args) == 2
    said = one_line(capsys)
    assert "checkpointing" not in said and "--nf4" not in said and "--shard" in said
    monkeypatch.setattr(evaluate, "decode", fails)
    assert evaluate.main(["measure", world["lora"], "--data", world["eval"], "--n", "10"]) == 2
    said = one_line(capsys)
    assert "--max-rows (now 256), then --n (now 10)" in said and "--micro-tokens" not in said
    assert advice(MemoryError(), SimpleNamespace()) == (
        "out of memory (MemoryError): take a smaller model or fewer posts")


def test_every_kind_of_missing_memory_is_recognised_and_nothing_else():
    for error in (torch.OutOfMemoryError(SAID), MemoryError(),
                  RuntimeError("CUDA error: out of memory"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
                  RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")):
        assert is_out_of_memory(error), error
    for error in (RuntimeError("shapes do not fit"), InputError("out of memory"), ValueError()):
        assert not is_out_of_memory(error), error


def test_another_error_is_no_advice(world, tmp_path, monkeypatch):
    def breaks(*_):
        raise RuntimeError("a defect")
    monkeypatch.setattr(polylora, "sft_step", breaks)
    with pytest.raises(RuntimeError, match="a defect"):
        polylora.main(sft_args(world, "x", "--out", str(tmp_path / "run")))


def test_weights_that_do_not_fit_are_not_a_damaged_file(world, capsys, monkeypatch):
    """It said: download it again."""
    monkeypatch.setattr(hub, "check_finite", fails)
    with pytest.raises(InputError, match="do not fit into the memory of cpu: add --nf4, or --sh"):
        hub.read_tensors(world["model"])


RANKS = """
import argparse, sys, time
import torch
from support.files import command
from support.ranks import Ranks
def run(args):
    ranks = Ranks("memory", "cpu")
    with ranks.together():
        if ranks.rank == 1:
            print("began", time.time(), flush=True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        ranks.barrier()
parser = argparse.ArgumentParser()
parser.add_argument("--k", type=int, default=8)
parser.set_defaults(run=run)
sys.exit(command(parser, []))
"""


@pytest.mark.slow
@pytest.mark.multirank
def test_the_rank_without_memory_says_so_at_once_and_the_other_names_it():
    """Under torchrun the traceback came ten seconds late, as a lost peer."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
                        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    two = [subprocess.Popen([sys.executable, "-c", RANKS], cwd=ROOT, text=True,
                            env=env | {"RANK": r, "LOCAL_RANK": r}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE) for r in "01"]
    try:
        first = two[1].stderr.readline()
        while "error:" not in first:         # warnings of gloo
            first = two[1].stderr.readline()
            assert first
        seconds = time.time() - float(two[1].stdout.readline().split()[1])
        said = [p.communicate(timeout=120) for p in two]
    finally:
        [p.kill() for p in two]
    assert first == "error: out of memory (CUDA out of memory): lower --k (now 8) (rank 1)\n"
    assert seconds < 5 and two[1].returncode == 2
    assert "rank 1 has ended before its time" in said[0][1] and two[0].returncode == 1
    assert "Traceback" not in said[0][1] + said[1][1]
