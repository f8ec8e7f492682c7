"""Tests of support/card.py: the model card beside every finished adapter."""

import json
import re
from pathlib import Path

import pytest

import grpo
import polylora
from helpers import grpo_args, sft_args
from support.card import MARK, command_of, last_name, prompt_of, write_card

CONFIG = {"model": "Qwen/Qwen3-8B", "out": "/home/ann/runs/poly", "data": "/home/ann/posts.jsonl",
          "lam": 0.3, "diversity": "dpp", "temperature": 0.9, "k": 4, "data_hash": "ab" * 32,
          "argv": ["/home/ann/polylora.py", "sft", "--data", "/home/ann/posts.jsonl",
                   "--out=/home/ann/runs/poly", "--model", "Qwen/Qwen3-8B", "--lambda", "0.3"],
          "environment": {"commit": "c0ffee", "clean": True, "torch": "2.13.0"}}
SUMMARY = {"stage": "sft", "step": 12, "domain": {"domain": "replies"}}


def card(tmp_path, config=None, adapter=None, **more):
    """The text of a card in a folder with an adapter's configuration."""
    settings = {"peft_type": "LORA"} | (adapter or {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    messages = [{"role": "user", "content": "Reply: {post}"}]
    write_card(tmp_path, CONFIG | (config or {}), SUMMARY, messages, **more)
    return (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_both_phases_write_a_card(world, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["polylora.py", *sft_args(world, "x")])
    out = ["--out", str(tmp_path / "sft"), "--lambda", "0.5"]
    assert polylora.main(sft_args(world, "x", *out)) == 0
    text = (tmp_path / "sft" / "adapter" / "README.md").read_text()
    assert "supervised fine-tuning with the diversity term D (cosine), weight 0.5" in text
    assert "python polylora.py sft --model model --data sft.jsonl" in text
    assert "Write a short reply to this post:\\n\\n{post}" in text
    monkeypatch.setattr("sys.argv", ["grpo.py"])
    args = grpo_args(world | {"lora": str(tmp_path / "sft")}, "x", "--out", str(tmp_path / "grpo"))
    assert grpo.main(args) == 0
    text = (tmp_path / "grpo" / "adapter" / "README.md").read_text()
    assert "GRPO (objective: group), without a diversity term, from the adapter sft" in text
    assert str(Path(world["model"]).parent) not in text
    assert "| learning rate |" in text and "| diversity D |" not in text


def test_a_card_says_what_was_trained(tmp_path):
    text = card(tmp_path)
    for part in ('base_model: "Qwen/Qwen3-8B"', "library_name: peft", 'license: "apache-2.0"',
                 "diversity term D (dpp), weight 0.3", "| lambda, the weight of D | 0.3 |",
                 "| steps | 12 |", "domain replies", "commit c0ffee", "temperature 0.9",
                 "Not measured yet", "Reply: {post}", "enable_thinking=False",
                 "## Intended use and limits", "## Licence"):
        assert part in text, part
    compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "README.md", "exec")
    header = text.split("---")[1]
    assert all(": " in line for line in header.strip().splitlines())


def test_a_card_tells_no_path_of_the_machine(tmp_path):
    text = card(tmp_path)
    assert "/home/ann" not in text
    assert ("python polylora.py sft --data posts.jsonl --out=poly --model Qwen/Qwen3-8B "
            "--lambda 0.3") in text
    assert last_name(str(tmp_path)) == tmp_path.name and last_name("~/x/y") == "y"
    text = card(tmp_path, {"model": str(tmp_path)})
    assert str(tmp_path) not in text and "base_model" not in text and '"other"' in text


def test_a_command_that_is_not_ours_is_not_shown(tmp_path):
    for argv in (None, [], ["/usr/bin/pytest", "-q"]):
        assert command_of({"argv": argv}) is None
        assert "Command:" not in card(tmp_path, {"argv": argv})


def test_the_table_has_the_evaluation_s_intervals(tmp_path):
    text = card(tmp_path, table=[("Pass@5", 0.5518, 0.52, 0.5849)])
    assert "| Pass@5 | 0.552 | [0.520, 0.585] |" in text and "Not measured yet" not in text


def test_peft_s_lines_are_for_adapters_that_peft_reads(tmp_path):
    assert "PeftModel" in card(tmp_path, adapter={"peft_type": "ADALORA"})
    text = card(tmp_path, adapter={"peft_type": "MOA"})
    assert "PeftModel" not in text and "library_name" not in text and "lora.py merge" in text


def test_a_card_that_was_edited_is_kept(tmp_path):
    text = card(tmp_path)
    (tmp_path / "README.md").write_text(text.replace("Short replies", "Jokes"))
    assert "Jokes" not in card(tmp_path)                 # the mark is there: written again
    (tmp_path / "README.md").write_text(text.replace(MARK, "").replace("Short replies", "Jokes"))
    assert "Jokes" in card(tmp_path)


def test_a_run_is_not_lost_for_its_card():
    class Odd:
        def messages(self, post):
            return [{"role": "user", "content": str(int(post.post))}]
    assert prompt_of(Odd()) == []


@pytest.mark.parametrize("hostile", ["a\n---\nlicense: mit", "a`b|c\u202e"])
def test_a_hostile_name_stays_text(tmp_path, hostile):
    text = card(tmp_path, {"out": f"/x/{hostile}", "model": hostile, "embedder": hostile})
    assert text.count("\n---\n") == 1 and "\u202e" not in text
