"""Tests of methods/publish.py: `lora.py push`, against a hub that is not there."""

import json
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load

import evaluate
import lora
from helpers import refusal
from methods import publish
from support.peft_files import read_adapter_config


class Hub:
    """What push asks of a huggingface_hub.HfApi: it keeps what it was told."""

    def __init__(self, public=False, error=None):
        self.public = public
        self.error = error
        self.calls = []

    def create_repo(self, name, *, private, exist_ok):
        if self.error:
            raise self.error
        self.calls.append(("create", name, private, exist_ok))

    def repo_info(self, name):
        return SimpleNamespace(private=not self.public)

    def create_commit(self, name, operations, *, commit_message):
        self.files = {op.path_in_repo: op.path_or_fileobj for op in operations}
        self.calls.append(("commit", name, sorted(self.files)))
        return SimpleNamespace(commit_url=f"https://hub.example/{name}/commit/1")


@pytest.fixture
def run(world, tmp_path):
    """A finished SFT run of its own."""
    return shutil.copytree(world["lora"], tmp_path / "run")


def push(monkeypatch, hub, run, *more):
    monkeypatch.setattr(publish, "HfApi", lambda: hub)
    return lora.main(["push", str(run), "ann/kitten", "--base", "Qwen/Qwen3-8B", *more])


def test_the_adapter_and_its_card_are_pushed(run, monkeypatch, capsys, tmp_path):
    hub = Hub()
    assert push(monkeypatch, hub, run, "--private", "--license", "cc-by-4.0") == 0
    assert hub.calls == [("create", "ann/kitten", True, True),
                         ("commit", "ann/kitten", ["README.md", "adapter_config.json",
                                                   "adapter_model.safetensors"])]
    assert "https://hub.example/ann/kitten/commit/1" in capsys.readouterr().out
    own = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert load(hub.files["adapter_model.safetensors"]).keys() and \
        hub.files["adapter_model.safetensors"] == own
    config = json.loads(hub.files["adapter_config.json"])
    before = read_adapter_config(run / "adapter")
    assert config == before | {"base_model_name_or_path": "Qwen/Qwen3-8B"}
    text = hub.files["README.md"].decode()
    assert 'license: "cc-by-4.0"' in text and 'base_model: "Qwen/Qwen3-8B"' in text
    for content in hub.files.values():                   # no path of this machine
        assert str(tmp_path).encode() not in content


def test_the_card_has_the_evaluation(run, world, monkeypatch, capsys):
    assert evaluate.main(["measure", str(run), "--data", world["eval"], "--n", "12",
                          "--max-new-tokens", "5"]) == 0
    hub = Hub()
    assert push(monkeypatch, hub, run) == 0
    text = hub.files["README.md"].decode()
    assert "95% interval" in text and "| diversity D (cosine) | 0." in text
    (arm,) = publish.summarise(publish.group_runs([run]))["arms"].values()
    row = arm["metrics"]["semantic"]
    assert f"| {row['mean']:.3f} | [{row['low']:.3f}, {row['high']:.3f}] |" in text


def test_a_dry_run_sends_nothing(run, monkeypatch, capsys):
    hub = Hub()
    assert push(monkeypatch, hub, run, "--dry-run") == 0
    said = capsys.readouterr().out
    assert hub.calls == [] and "nothing was sent" in said and "## Intended use" in said


def test_private_never_means_public(run, monkeypatch, capsys):
    """create_repo leaves a public repository public."""
    hub = Hub(public=True)
    assert push(monkeypatch, hub, run, "--private") == 2
    assert "exists and is public" in capsys.readouterr().err
    assert [call[0] for call in hub.calls] == ["create"]
    assert push(monkeypatch, hub, run) == 0


def test_what_the_hub_refuses_is_a_sentence(run, monkeypatch, capsys):
    assert push(monkeypatch, Hub(error=RuntimeError("401 Unauthorized\nmore")), run) == 2
    said = capsys.readouterr().err
    assert "401 Unauthorized" in said and "hf auth login" in said and "more" not in said


def test_what_cannot_be_pushed_is_refused(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(publish, "HfApi", None)          # nothing is asked of it
    refused = lambda *args: refusal(capsys, lora.main, "push", *map(str, args))
    assert "--base owner/name" in refused(run, "ann/kitten")
    for name in ("kitten", "a/b/c", "ann/..", "ann/kit ten"):
        assert "owner/name" in refused(run, name, "--base", "Qwen/Qwen3-8B")
    (run / "done.json").unlink()
    assert "not finished" in refused(run, "ann/kitten", "--base", "Qwen/Qwen3-8B")
    assert "is missing" in refused(tmp_path / "nothing", "ann/kitten")
    shutil.copytree(run / "adapter", tmp_path / "alone")
    (tmp_path / "alone" / "README.md").unlink(missing_ok=True)
    assert "model card" in refused(tmp_path / "alone", "ann/kitten", "--base", "Qwen/Qwen3-8B")
