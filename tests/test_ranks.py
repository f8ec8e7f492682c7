"""What the launcher's environment says: right launches are taken, leftovers of another launch end in a sentence."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import ranks
from data import InputError
from ranks import Ranks

ROOT = Path(ranks.__file__).parent
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variables", [{}, {"RANK": "", "WORLD_SIZE": ""}, {"RANK": "0"}, {"WORLD_SIZE": "1"}, {"RANK": " 0 ", "WORLD_SIZE": "1"},
                                       {"LOCAL_RANK": "", "TORCHELASTIC_RESTART_COUNT": ""}, {"LOCAL_RANK": "3"}], ids=str)
def test_a_process_alone_is_the_first_of_one(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    alone = Ranks("stage", "cpu")
    assert (alone.rank, alone.world, alone.main) == (0, 1, True)


@pytest.mark.parametrize("variables, match", [
    ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 and no MASTER_ADDR.*torchrun.*unset"),
    ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}, "no MASTER_PORT"),
    ({"RANK": "3"}, "RANK=3 and WORLD_SIZE=1"), ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"), ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
    ({"RANK": "0.0"}, "RANK is '0.0'"), ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT is 'x'"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"}, "MASTER_PORT is 'http'")], ids=str)
def test_leftovers_of_another_launch_are_a_sentence(variables, match, monkeypatch):
    """A rank other than 0 that is alone would train and write nothing."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=match):
        Ranks("stage", "cpu")


def test_ranks_that_never_come_are_a_sentence(monkeypatch):
    """A container of a cluster sets all four variables, and nobody starts the others."""
    with socket.socket() as taken:           # a port that is in use: the store cannot be made
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(taken.getsockname()[1]))):
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match="did not meet.*torchrun.*unset WORLD_SIZE"):
            Ranks("stage", "cpu")


def test_more_ranks_than_gpus_are_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="LOCAL_RANK is 2.*2 GPUs"):
        Ranks("stage", "cuda")


@pytest.mark.parametrize("variables", [{"RANK": "3"}, {"RANK": ""}, {"RANK": "", "WORLD_SIZE": ""}], ids=str)
def test_a_split_does_not_wait_for_a_first_rank_that_nobody_starts(variables, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(data, "await_file", lambda *a, **k: pytest.fail("waits for another rank"))
    assert data.main(["split", "--data", "pocket", "--sizes", "a=4,b=3", "--out", str(tmp_path / "s")]) == 0
    assert (tmp_path / "s" / "a.jsonl").exists()


def test_a_command_ends_with_a_sentence_and_names_no_empty_rank(tmp_path):
    for leftover in ({"WORLD_SIZE": "2", "RANK": "0"}, {"RANK": "", "WORLD_SIZE": "x"}):
        env = {k: v for k, v in os.environ.items() if k not in NAMES} | leftover
        posts = tmp_path / "posts.jsonl"
        posts.write_text('{"id": "1", "post": "my bus is late", "reply": "mine too"}\n')
        ran = subprocess.run([sys.executable, "polylora.py", "base", "--data", str(posts), "--out", str(tmp_path / "o"), "--steps", "1"],
                             cwd=ROOT, env=env, capture_output=True, text=True)
        assert ran.returncode == 2 and "Traceback" not in ran.stderr and "unset" in ran.stderr and "(rank" not in ran.stderr
