"""Tests of support/plan.py."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import grpo
import polylora
from helpers import grpo_args, lines, rl, sft_args
from support import hub
from support import plan
from support import posts


# ---- The step, on a real session around a tiny model ---------------------------------------------

def test_a_plan_needs_no_replies(parts):
    """Phase two learns from prompts alone: its first line crashed where no post had a reply."""
    s = rl(parts)
    s.args.steps, s.run = 2, None
    said = plan.plan_text(s)
    s.posts = [posts.Post(p.id, p.post, ()) for p in s.posts]
    assert plan.plan_text(s) == said and "12 posts, 2 steps of 6" in said


@pytest.mark.slow
def test_a_dry_run_writes_nothing_and_its_figures_are_those_of_the_run(world, tmp_path, capsys):
    """Posts, steps, tokens and memory before the first step, and a time; of five arms of days
    nothing was said."""
    args = sft_args(world, "x", "--out", str(tmp_path / "run"), "--lambda", "0.5", "--steps", "5",
                    "--draft-every", "2")
    with pytest.raises(SystemExit) as stop:
        polylora.main([*args, "--dry-run"])
    planned, time_said = capsys.readouterr().out.strip().splitlines()[-2:]
    assert stop.value.code == 0 and not (tmp_path / "run").exists()
    assert polylora.main(args) == 0 and planned in capsys.readouterr().out
    steps, end = lines(tmp_path / "run")[:-1], lines(tmp_path / "run")[-1]
    assert planned.startswith(f"run: 12 posts, {len(steps)} steps of 4")
    tokens = int(re.search(r"some ([\d,]+) tokens", planned)[1].replace(",", ""))
    assert tokens / 2 < sum(x["tokens"] for x in steps) < 1.2 * tokens
    seconds = int(re.fullmatch(r"plan run: 5 steps, about (\d+) s", time_said)[1])
    # a machine may be busy
    assert seconds < 5 * end["seconds"] + 2 and end["seconds"] < 5 * seconds + 2
    later = grpo_args(world, "x", "--start", str(tmp_path / "none"), "--model", world["model"],
                      "--out", str(tmp_path / "rl"))
    with pytest.raises(SystemExit):
        grpo.main([*later, "--dry-run"])     # before its start exists
    # of 64 posts or more the first, alone, ended it
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps((x := json.loads(line))
                                       | {"id": f"{i}-{copy}", "post": f"{x['post']} {copy}"})
                            + "\n" for copy in range(12)
                            for i, line in enumerate(Path(world["eval"]).read_text().splitlines())))
    shutil.copy(Path(world["eval"]).parent / "domain.json", tmp_path / "domain.json")
    assert evaluate.main(["measure", world["lora"], "--data", str(many), "--n", "10",
                          "--max-new-tokens", "5",
                          "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "plan rl: 2 steps" in said and "plan measure: 72 posts with 10 drafts" in said
    assert not (tmp_path / "rl").exists() and not (Path(world["lora"]) / "evaluation.json").exists()


def test_a_dry_run_s_time_adds_sampling_and_plain_steps(monkeypatch):
    """Every third step drafts and takes ten times as long: timing only one kind is wrong by a
    factor. By a clock of its own."""
    now, moved = [0.0], torch.zeros(1, requires_grad=True)
    monkeypatch.setattr(plan.time, "perf_counter", lambda: now[0])

    def step(number):
        # the first one warms up
        now[0] += 30 if number == 0 else 0.3 if number % 3 == 0 else 0.03
        moved.grad = torch.ones(1)
    session = SimpleNamespace(args=SimpleNamespace(steps=300, draft_every=3), params=[moved])
    assert (plan.time_steps(session, step) == pytest.approx(100 * (0.3 + 2 * 0.03))
            and moved.grad is None)


# ---- Whether activations are recomputed ----------------------------------------------------------

def with_free(monkeypatch, session, free, flag=None):
    """session.args.checkpointing by the plan, where so many bytes are free."""
    monkeypatch.setattr(plan, "free_bytes", lambda device: free)
    session.args.checkpointing = flag
    plan.decide_checkpointing(session)
    assert session.model.checkpointing is session.args.checkpointing
    return session.args.checkpointing


def test_activations_are_recomputed_where_they_would_not_fit(parts, monkeypatch):
    """python grpo.py took 101 GB on one GPU; train.sh recomputed on eight with memory to spare."""
    s = rl(parts)
    s.args.steps, s.run = 2, None
    memory = plan.memory_of(s, checkpointing=False)
    recomputed = plan.memory_of(s, checkpointing=True)
    assert recomputed.work < memory.work and recomputed[:3] == memory[:3]
    enough = plan.MARGIN * (memory.total - memory.weights)
    assert with_free(monkeypatch, s, enough + 1) is False
    assert "checkpointing" not in plan.plan_text(s)
    assert with_free(monkeypatch, s, enough - 1) is True
    assert "with --checkpointing" in plan.plan_text(s)
    assert with_free(monkeypatch, s, None) is False              # the system does not tell
    # A flag forces it.
    assert with_free(monkeypatch, s, 1, flag=False) is False
    assert with_free(monkeypatch, s, enough + 1, flag=True) is True
    s.stage = "reward"                                           # has no such code
    assert with_free(monkeypatch, s, 1) is False


def test_all_ranks_recompute_where_one_has_to(parts, monkeypatch):
    s = rl(parts)
    monkeypatch.setattr(s.ranks, "sum", lambda values: [values[0] + 1])      # of another rank
    assert with_free(monkeypatch, s, 2 ** 50) is True


def test_flags_of_checkpointing():
    words = ["sft", "--data", "-", "--out", "-"]
    for more, value in ([], None), (["--checkpointing"], True), (["--no-checkpointing"], False):
        assert polylora.parser().parse_args([*words, *more]).checkpointing is value


def test_free_memory_is_the_gpu_s_with_what_its_allocator_holds_back(monkeypatch):
    for name, value in (("mem_get_info", (100, 1000)), ("memory_reserved", 50),
                        ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert plan.free_bytes(torch.device("cuda", 0)) == 130
    whole = plan.free_bytes(torch.device("cpu"))
    if whole is not None:                    # Linux: ranks of a machine share it
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert plan.free_bytes(torch.device("cpu")) == pytest.approx(whole / 4, rel=0.3)


# ---- A dry run of a model that is not there ------------------------------------------------------

def dry_run(main, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--dry-run"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def without_weights(world, folder):
    """A folder with the config.json of the world's model alone."""
    folder.mkdir()
    shutil.copy(Path(world["model"]) / "config.json", folder)
    return str(folder)


def test_a_folder_without_weights_is_planned_from_its_config(world, tmp_path, capsys):
    """It was an error, and a hub name a download of 16 GB."""
    model = without_weights(world, tmp_path / "model")
    places = world | {"model": model}
    out = tmp_path / "run"
    said = dry_run(polylora.main, sft_args(places, "x", "--out", str(out), "--lambda", "0.5",
                                           "--steps", "5"), capsys)
    assert "by " + model in said and "run: 12 posts, 5 steps of 4; memory about" in said
    assert re.search(r"^plan run: 5 steps, about \d+ s$", said, re.MULTILINE)
    said = dry_run(grpo.main, grpo_args(places, "x", "--start", str(tmp_path / "none"), "--model",
                                        model, "--out", str(out)), capsys)
    assert re.search(r"^plan run: 2 steps, about \d+ s$", said, re.MULTILINE)
    said = dry_run(evaluate.main, ["measure", "--model", model, "--data", world["eval"], "--n",
                                   "10", "--bare", str(tmp_path / "bare")], capsys)
    assert re.search(r"^plan measure: 6 posts with 10 drafts, a run: about \d+ s$", said,
                     re.MULTILINE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert polylora.main(sft_args(places, "x", "--out", str(out))) == 2      # not a dry run


def test_of_a_hub_name_config_json_alone_is_fetched_and_removed(world, tmp_path, capsys,
                                                                monkeypatch):
    fetched = []

    def download(name, file, *, revision, local_dir):
        fetched.append((name, file, Path(local_dir)))
        return shutil.copy(Path(world["model"]) / file, local_dir)

    def nothing_cached(name, *, revision, local_files_only):
        assert local_files_only
        raise FileNotFoundError(name)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "snapshot_download", nothing_cached)
    args = sft_args(world | {"model": "some/model"}, "x", "--out", str(tmp_path / "run"))
    said = dry_run(polylora.main, args, capsys)
    assert "by some/model's config.json alone" in said and "plan run: " in said
    (name, file, folder), = fetched
    assert (name, file) == ("some/model", "config.json") and not folder.exists()
    assert not list(tmp_path.iterdir())

    def offline(*_, **__):
        raise OSError("no connection")
    monkeypatch.setattr(hub, "hf_hub_download", offline)
    assert polylora.main([*args, "--dry-run"]) == 2
    assert "config.json of 'some/model' could not be fetched" in capsys.readouterr().err


def test_a_plan_without_weights_says_what_the_run_itself_would_say(world, tmp_path, capsys,
                                                                   monkeypatch):
    """Up to guessed lengths of texts: by the tokenizer's, the memory is the same."""
    args = sft_args(world, "x", "--out", str(tmp_path / "run"), "--lambda", "0.5")
    seen = []
    memory = plan.cost.memory
    monkeypatch.setattr(plan.cost, "memory", lambda config, load, *weights: seen.append(
        load) or memory(config, load, *weights))
    dry_run(polylora.main, args, capsys)
    places = world | {"model": without_weights(world, tmp_path / "model")}
    dry_run(polylora.main, sft_args(places, "x", "--out", str(tmp_path / "run"), "--lambda",
                                    "0.5"), capsys)
    real, guessed = seen[0], seen[-1]
    for name in ("prompts", "places", "k", "new_tokens", "adapter", "itemsize", "copies", "rank"):
        assert getattr(real, name) == getattr(guessed, name), name
    assert guessed.pass_tokens == pytest.approx(real.pass_tokens, rel=0.7)
