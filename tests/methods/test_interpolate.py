"""Tests of methods/interpolate.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import polylora
from helpers import build_model, gap, shake_all, with_adapter
from lora import load_adapter, lora_layers, save_adapter
from methods.interpolate import interpolate_adapters
from model import Qwen3
from support.files import InputError


# ---- Files ---------------------------------------------------------------------------------------

def test_interpolation_is_the_weighted_sum_of_two_updates(tmp_path):
    models = [shake_all(with_adapter("pissa"), seed=1), shake_all(with_adapter("rslora"), seed=2)]
    for model, name in zip(models, "ab"):
        save_adapter(model, tmp_path / name)
    updates = [{n: layer.merged_weight() - layer.weight for n, layer in lora_layers(model).items()}
               for model in models]
    for weight, scale in ((0.25, 1), (0, 1), (1, 0.5)):
        interpolate_adapters(tmp_path / "a", tmp_path / "b", weight, tmp_path / "c", scale)
        between = load_adapter(build_model(), tmp_path / "c")
        for n, layer in lora_layers(between).items():
            want = scale * ((1 - weight) * updates[0][n] + weight * updates[1][n])
            assert (layer.kind == "lora" and layer.rank == 12
                    and gap(layer.merged_weight() - layer.weight, want) < 1e-5)
            assert layer.dropout == 0
    save_adapter(with_adapter("dora"), tmp_path / "d")
    with pytest.raises(InputError, match="cannot be interpolated"):
        interpolate_adapters(tmp_path / "a", tmp_path / "d", 0.5, tmp_path / "e", 1)
    save_adapter(with_adapter("rslora", targets=("q_proj",)), tmp_path / "f")
    with pytest.raises(InputError, match="on the same layers"):
        interpolate_adapters(tmp_path / "b", tmp_path / "f", 0.5, tmp_path / "e", 1)


# ---- The command line ----------------------------------------------------------------------------

def test_the_command_s_former_name_is_taken_and_not_shown(capsys):
    said = []
    for words in (["wise", "--help"], ["interpolate", "--help"], ["--help"]):
        with pytest.raises(SystemExit) as stop:
            polylora.main(words)
        assert stop.value.code == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "--weight" in said[0]
    assert "interpolate" in said[2] and "wise" not in said[2]


def test_interpolate_makes_a_run_that_can_be_measured(files, tmp_path, capsys):
    few = "--steps 2 --batch 2 --rank 2 --lr 0.01".split()
    for name, seed in (("a", "1"), ("b", "2")):
        assert polylora.main(["sft", *files, "--out", str(tmp_path / name), "--seed", seed,
                              *few]) == 0
    between = ["interpolate", str(tmp_path / "a"), str(tmp_path / "b"), "--weight", "0.3",
            "--out", str(tmp_path / "c")]
    assert polylora.main(between) == 0 and polylora.main(between) == 2     # never over another
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (config["weight"] == 0.3 and config["seed"] == 2
            and (tmp_path / "c" / "done.json").exists())
    assert load_adapter(Qwen3.from_pretrained(files[1]), tmp_path / "c" / "adapter")
    assert polylora.main([*between[:4], "2", "--out", str(tmp_path / "d")]) == 2
    whole = (tmp_path / "c" / "adapter" / "adapter_model.safetensors").read_bytes()
    # killed before its end
    (tmp_path / "c" / "done.json").unlink()
    (tmp_path / "c" / "x.partial").write_text("half")
    assert (polylora.main(between) == 0
            and (tmp_path / "c" / "adapter" / "adapter_model.safetensors").read_bytes() == whole)
    (tmp_path / "c" / "done.json").unlink()
    # a run that trains, or was stopped
    (tmp_path / "c" / "metrics.jsonl").write_text("")
    assert polylora.main(between) == 2 and "choose another --out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.multirank
def test_only_the_first_rank_interpolates(files, tmp_path):
    """Each wrote it: the second found the folder of the first and ended the launch."""
    few = "--steps 1 --batch 2 --rank 2 --lr 0.01".split()
    for name in "ab":
        assert polylora.main(["sft", *files, "--out", str(tmp_path / name), *few]) == 0
    between = [sys.executable, "polylora.py", "interpolate", str(tmp_path / "a"),
               str(tmp_path / "b"), "--out", str(tmp_path / "c")]
    ranks = [subprocess.Popen(between, cwd=Path(polylora.__file__).parent,
                              env=os.environ | {"RANK": rank, "WORLD_SIZE": "2"}) for rank in "10"]
    assert ([rank.wait(timeout=600) for rank in ranks] == [0, 0]
            and (tmp_path / "c" / "done.json").exists())
