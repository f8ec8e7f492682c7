"""Fixtures, and the path: the programs live in the repository's root, wherever pytest is
started."""

import shutil
import sys
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import pytest
import torch

import data
import polylora
from helpers import NAMES, build_model, sft_args, write_model, write_run, write_tweets
from methods import pocket
from methods.small_base import train_tokenizer
from support import posts as support_posts

pytest_plugins = ["side_by_side"]   # --jobs

torch.set_num_threads(1)  # the models are tiny: a second thread only spins


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def parts():
    """(posts of the pocket world, a tokenizer for them, a random Qwen3 with a few rows more than
    the tokenizer has)."""
    posts = pocket.pocket_posts(12, seed=1)
    tokenizer = train_tokenizer([t for p in posts for t in (p.post, *p.replies)], 330)
    return posts, tokenizer, build_model(vocab_size=tokenizer.get_vocab_size() + 3)


@pytest.fixture(scope="module")
def files(parts, tmp_path_factory):
    """--model and --data flags of a tiny checkpoint and a file of posts."""
    folder = tmp_path_factory.mktemp("files")
    posts, tokenizer, model = parts
    model.save_pretrained(folder / "model")
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    support_posts.save_posts(posts, folder / "posts.jsonl")
    return ["--model", str(folder / "model"), "--data", str(folder / "posts.jsonl")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([t for p in pocket.pocket_posts(300) for t in (p.post, *p.replies)], 500)


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / "a0", 0, "lora-grpo", lambda i: 2 + i % 2),
            write_run(tmp_path / "b0", 0, "poly <&> |", lambda i: 6, semantic=0.5),
            write_run(tmp_path / "a1", 1, "lora-grpo", lambda i: 4 + i % 2),
            write_run(tmp_path / "base", 0, None, lambda i: 1 + i, end=False, semantic=0,
                      drafts=["a"] * 12)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """{"model", "sft", "grpo", "eval", "lora": a finished SFT run}: what most tests start from."""
    root = tmp_path_factory.mktemp("world")
    write_tweets(root / "tweets.jsonl")
    assert data.main(["split", "--data", str(root / "tweets.jsonl"),
                      "--sizes", "sft=12,grpo=10,eval=6", "--out", str(root)]) == 0
    paths = {name: str(root / f"{name}.jsonl") for name in ("sft", "grpo", "eval")}
    paths |= {"model": str(write_model(root / "model")), "lora": str(root / "lora"), "root": root}
    assert polylora.main(sft_args(paths, "lora")) == 0
    return paths


@pytest.fixture
def root(world, tmp_path):  # noqa: F811
    """A folder with a world of its own: its base, posts and SFT run may be spoilt."""
    for name in ("model", "sft.jsonl", "grpo.jsonl", "eval.jsonl"):
        of = world["root"] / name
        (shutil.copytree if of.is_dir() else shutil.copy)(of, tmp_path / name)
    return tmp_path


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """slow_after(n): of a test's parametrisations the first n stay quick, the others are slow."""
    seen = Counter()
    for item in items:
        mark = item.get_closest_marker("slow_after")
        if mark is not None:
            test = item.nodeid.split("[")[0]
            seen[test] += 1
            if seen[test] > mark.args[0]:
                item.add_marker("slow")
