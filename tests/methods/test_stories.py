"""Tests of methods/stories.py."""

import json

import pytest

import data
import evaluate
import grpo
import polylora
from helpers import TOPICS, grpo_args, lines, sft_args
from support.files import InputError
from support import posts as support_posts


@pytest.mark.slow
def test_prompts_for_stories_from_file_to_report(world, tmp_path, capsys):
    """Prompts alone can be measured and trained on by GRPO, not by SFT; a judge passes above a
    half, or above what the user says."""
    asked = [{"id": i, "prompt": f"Tell a story about the {TOPICS[i % 6]}, number {i}"}
             for i in range(6)]
    told = [line | {"prompt": f"Please: {line['prompt']}",
                    "reply": f"Poor {TOPICS[i % 6]}, I feel you"}
            for i, line in enumerate(asked)]
    for name, rows, size in (("bare", asked, "eval=6"), ("told", told, "sft=6")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        domain = ["--domain", "stories"] * (name == "told")
        assert data.main(["split", "--data", str(tmp_path / f"{name}.jsonl"), "--sizes", size,
                          "--out", str(tmp_path / name), *domain]) == 0
    posts, run = str(tmp_path / "bare" / "eval.jsonl"), str(tmp_path / "poly")
    sft = lambda file, out: sft_args(world, out, "--data", str(file), "--out", str(tmp_path / out),
                                     "--lambda", "0.3", "--gate", "none")
    assert (polylora.main(sft(posts, "none")) == 2
            and "no reply to learn from" in capsys.readouterr().err)
    assert polylora.main(sft(tmp_path / "told" / "sft.jsonl", "poly")) == 0
    judge = ["--reward", "judge", "--reward-model", world["model"]]
    assert grpo.main(grpo_args(world, "ours", "--start", run, "--data", posts,
                               "--out", str(tmp_path / "grpo"), *judge)) == 0
    assert all(0 < line["different"] <= 1 for line in lines(tmp_path / "grpo") if "reward" in line)
    measure = ["measure", run, str(tmp_path / "grpo"), "--data", posts, "--n", "10",
               "--max-new-tokens", "5"]
    assert evaluate.main(measure) == 2 and "--pass-above" in capsys.readouterr().err
    assert evaluate.main([*measure, *judge, "--judge", world["model"], "--judge-drafts", "2"]) == 0
    records = json.loads((tmp_path / "poly" / "evaluation.json").read_text())["records"]
    assert all(r["passed"] == [x > 0.5 for x in r["rewards"]] and "pairs" not in r["judge"]
               for r in records)
    assert evaluate.main([*measure, *judge, "--pass-above", "0.9"]) == 0
    again = json.loads((tmp_path / "poly" / "evaluation.json").read_text())
    assert ([r["drafts"] for r in again["records"]] == [r["drafts"] for r in records]
            and again["settings"]["pass_above"] == 0.9)
    assert all(r["passed"] == [x > 0.9 for x in r["rewards"]] for r in again["records"])
    assert evaluate.main(["report", run, str(tmp_path / "grpo"), "--out", str(tmp_path / "report"),
                          "--against", "poly"]) == 0
    arm = json.loads((tmp_path / "report" / "report.json").read_text())["arms"]["poly"]["metrics"]
    assert {"valid", "max@10", "semantic", "ead"} <= set(arm)


def test_prompts_without_replies_are_stories(tmp_path):
    lines = [{"id": f"s{i}", "prompt": f"Tell a story about {w}."}
             for i, w in enumerate(("rain", "a boat", "ants"))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    posts = data.load_posts(tmp_path / "prompts.jsonl")
    domain = data.load_domain(tmp_path / "prompts.jsonl", "auto", posts)
    assert (domain.name == "stories" and not domain.styles
            and posts[1].post == "Tell a story about a boat.")
    assert domain.messages(posts[0]) == [{"role": "user", "content": "Tell a story about rain."}]
    support_posts.save_posts(posts, tmp_path / "again.jsonl")
    assert data.load_posts(tmp_path / "again.jsonl") == posts
    with pytest.raises(InputError, match="no verifier"):
        domain.styles_of(posts[0], "x")
    with pytest.raises(InputError, match="no reply to learn from"):
        domain.reply(posts[0], None, None)
