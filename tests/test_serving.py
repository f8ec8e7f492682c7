"""Tests of docs/SERVING.md: its commands parse, its Python runs."""

import contextlib
import io
import re
import shlex

import pytest
import torch

import data
import evaluate
import lora
from engine import generate
from helpers import ROOT, write_model
from lora import add_lora, load_adapter, save_adapter
from methods import merge
from model import Qwen3
from support import registry
from support.posts import Post

PAGE = (ROOT / "docs" / "SERVING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_s_commands_parse():
    """Each command of ours on the page has flags that its program knows."""
    registry.load()
    parsers = {"lora.py": lora.parser(), "evaluate.py": evaluate.parser()}
    lines = re.findall(r"python (\w+\.py) ([^\n`]*)", PAGE)
    ours = [(program, words) for program, words in lines if program in parsers]
    assert {program for program, _ in ours} == set(parsers) and len(ours) >= 4
    for program, words in ours:
        if words.split()[0] in ("merge", "push") or "RUN" in words:
            parsers[program].parse_args(shlex.split(words))


def test_the_page_s_python_compiles_and_asks_as_training_does():
    """Temperature 1 without truncation, without thinking, in the words of training."""
    turn = data.Replies(()).messages(Post("", "Just adopted a kitten!", ()))[0]["content"]
    python = [text for language, text in BLOCKS if language == "python"]
    assert len(python) == 3
    for text in python:
        compile(text, "SERVING.md", "exec")
        assert repr(turn)[1:-1] in text
    for text in python[:2]:
        assert re.search(r"enable_thinking\W+False", text)
        assert all(part in text for part in ("temperature=1.0", "top_p=1.0", "top_k=0"))
    prompt = {}
    exec(python[2], prompt)
    assert prompt["prompt"] == data.render_chat([{"role": "user", "content": turn}],
                                                add_generation_prompt=True)


@pytest.mark.peers
def test_live_the_peft_block_writes_what_we_write(tmp_path):
    pytest.importorskip("peft")
    base = write_model(tmp_path / "base")
    merge.fill_in(base, data.load_tokenizer(base))       # what a checkpoint of the hub has
    torch.manual_seed(1)
    model = add_lora(Qwen3.from_pretrained(base), 4, 8)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.2)
    save_adapter(model, tmp_path / "run" / "adapter", base)
    block = next(text for _, text in BLOCKS if "PeftModel" in text)
    names = 'base, run = "Qwen/Qwen3-8B", "runs/posts/seed1/dpp-grpo"'
    for old, new in ((names, f"base, run = {str(base)!r}, {str(tmp_path / 'run')!r}"),
                     ("do_sample=True", "do_sample=False"),
                     ("num_return_sequences=5", "num_return_sequences=1"),
                     ("max_new_tokens=100", "max_new_tokens=20")):
        assert old in block
        block = block.replace(old, new)
    found = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(block, found)
    ours = load_adapter(Qwen3.from_pretrained(base), tmp_path / "run" / "adapter")
    tokenizer = data.load_tokenizer(base)
    prompt = data.encode_prompt(tokenizer, found["messages"])
    assert found["prompt"]["input_ids"][0].tolist() == prompt
    samples = generate(ours, [prompt], k=1, max_new_tokens=20, temperature=0,
                       stop_ids=data.stop_ids(tokenizer))
    assert found["drafts"][0, len(prompt):].tolist() == samples.tokens[0][0]
    bare = generate(Qwen3.from_pretrained(base), [prompt], k=1, max_new_tokens=20, temperature=0)
    assert bare.tokens != samples.tokens
