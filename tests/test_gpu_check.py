"""The script for the day a GPU is at hand runs, at tiny sizes, on the CPU and on the pretended
device; what does not end in time is cut off, and what it found is kept."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import gpu_check
from helpers import ROOT

HARMLESS = {"status": "done", "figures": [], "checks": []}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{device: {part: its record}} of a run of everything on the pretended device and, beside it,
    on the CPU of all but `resume` (test_checkpoint.py), and what they printed."""
    out = tmp_path_factory.mktemp("gpu_check")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    running = {}
    parts = {gpu_check.CPU: [name for name in gpu_check.ORDER if name != "resume"],
             gpu_check.PRETENDED: gpu_check.ORDER}
    for device in parts:
        words = [sys.executable, "tests/gpu_check.py", "--tiny", "--device", device, "--out", out,
                 "--only", ",".join(parts[device])]
        running[device] = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE,
                                           stderr=subprocess.STDOUT, text=True)
    records = {}
    text = ""
    for device, process in running.items():
        printed, _ = process.communicate(timeout=1800)
        assert process.returncode == 0, printed
        records[device] = {name: json.loads((out / device / f"{name}.json").read_text())
                           for name in parts[device]}
        text += printed
    return SimpleNamespace(records=records, text=text, out=out)


@pytest.mark.slow
@pytest.mark.parametrize("device", [gpu_check.CPU, gpu_check.PRETENDED])
def test_every_part_runs(results, device):
    for name, record in results.records[device].items():
        assert record["status"] == "done" and record["finished"], (name, record)
        assert record["figures"] or record["checks"], name
        assert all(check["passed"] for check in record["checks"]), name
    assert not (results.out / device / "work").exists()


@pytest.mark.slow
def test_figures_are_what_was_done(results):
    """Graphs and kernels on the pretended device alone; the plan beside the peak; a table."""
    figures = {device: {figure["what"]: figure["value"]
                        for record in parts.values() for figure in record["figures"]}
               for device, parts in results.records.items()}
    pretended = figures[gpu_check.PRETENDED]
    layers = gpu_check.config_of("tiny").num_hidden_layers
    assert (pretended["decoding 0.6B: kernels a token"]
            == layers * pretended["decoding 0.6B: kernels a token and layer"] > 20)
    assert "decoding 0.6B: kernels a token" not in figures[gpu_check.CPU]
    for some in figures.values():
        assert some["SFT with D, 8B"] > 0 and "GRPO, 0.6B: memory planned" in some
    assert "| GRPO with D and KL, 0.6B: a step |" in results.text


def test_a_part_that_takes_too_long_is_cut_off(tmp_path):
    args = gpu_check.parse(["--tiny", "--out", str(tmp_path)])
    (tmp_path / gpu_check.CPU).mkdir()
    assert gpu_check.supervised(args, gpu_check.CPU, "nf4", 0.3) == "cut off after 0 s"


@pytest.mark.slow
def test_a_part_that_fails_says_why_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """grpo finds a folder in its place that is none; environment still runs after it."""
    monkeypatch.setattr(gpu_check, "ORDER", ("grpo", "environment"))
    (tmp_path / "cpu" / "work").mkdir(parents=True)
    (tmp_path / "cpu" / "work" / "model-tiny").write_text("no folder")
    code = gpu_check.main(["--tiny", "--device", "cpu", "--only", "grpo,environment", "--out",
                           str(tmp_path)])
    grpo, environment = (json.loads((tmp_path / "cpu" / f"{name}.json").read_text())
                         for name in gpu_check.ORDER)
    assert code == 1 and "model-tiny" in grpo["status"] and environment["status"] == "done"
    assert "| part grpo | **no** | failed" in capsys.readouterr().out


def test_results_are_in_the_file_before_a_part_ends(tmp_path):
    record = gpu_check.Record(tmp_path / "a.json", "cpu")
    record.figure("speed", 3.0, "m/s")
    record.check("sound", False, 0.5)
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["figures"][0]["value"] == 3 and not content["finished"]
    assert not gpu_check.passed(content | {"status": "done"})
    assert gpu_check.passed(HARMLESS) and not gpu_check.passed(HARMLESS | {"status": "cut off"})
    text = gpu_check.tables({"a": content | {"status": "cut off after 3 s"}})
    assert "| sound | **no** | 0.5 |" in text and "| speed | 3 m/s |" in text
    assert "| part a | **no** | cut off after 3 s |" in text


def test_no_time_left_is_said(tmp_path):
    args = gpu_check.parse(["--tiny", "--out", str(tmp_path)])
    records = {}
    gpu_check.run_parts(args, gpu_check.CPU, ["nf4"], deadline=0, records=records)
    assert records["nf4"]["status"] == "not run: no time was left"


def test_the_plan_s_sizes_are_added_up(tmp_path):
    ran = gpu_check.Ran("sft: 12 posts; memory: weights 1.5 GiB, training 512 MiB\nnext", tmp_path)
    assert ran.planned() == 2 * 2 ** 30
    ran = gpu_check.Ran("memory about 3 GiB: weights 1.5 GiB, passes 1.5 GiB", tmp_path)
    assert ran.planned() == 3 * 2 ** 30
    assert gpu_check.Ran("nothing", tmp_path).planned() is None
    with pytest.raises(RuntimeError, match="no step has logged D"):
        ran.mean("D")


def test_operations_and_bytes_at_8b_s_shape():
    """By hand: 6.95e9 weights in the blocks, of 8.19e9; 2 bytes each, and the head once."""
    config = gpu_check.config_of("8b")
    weights = gpu_check.operations_of_a_token(config, checkpointing=False) / 4
    assert weights == 36 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 12288)
    model = gpu_check.random_model(gpu_check.config_of("tiny"), torch.device("cpu"),
                                   torch.bfloat16)
    c = gpu_check.Context(gpu_check.TINY, "cpu", None, None)
    blocks = 2 * (32 * (2 * 64 + 2 * 32) + 3 * 32 * 64)
    cache = 2 * 2 * 2 * 16 * (12 + 4 * 0.75 * 8)
    assert gpu_check.bytes_of_a_token(c, model, 4, 8) == 2 * (blocks + 900 * 32 + cache)


def test_the_full_run_fits_its_minutes():
    """Limits are for each part; the expected times are well below."""
    assert set(gpu_check.ORDER) == set(gpu_check.PARTS)
    assert gpu_check.FULL.minutes == 9 and gpu_check.QUICK.minutes == 4
    for _, limit, quick in gpu_check.PARTS.values():
        assert quick <= limit <= 120
