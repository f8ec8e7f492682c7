"""Tests of support/checkpoint.py."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import evaluate
import grpo
import polylora
import trainer
from generate import Samples
from helpers import (
    SHORT, Stop, adapter_of, finish_toy_run, grpo_args, lines, measured, metrics, places,
    refusal, sft_args, toy_args, toy_run, write_model,
)
from methods import pocket
from model import Qwen3
from support import checkpoint
from support.checkpoint import STALLS, RunFolder, StallWarnings, stalled
from support import checks
from support import evaluations
from support import files
from support.files import InputError
from support.ranks import Ranks
from support import steplog
from support.steplog import Tally
from trainer import Session, learning_rate, train


# ---- The run folder and the loop -----------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 3, 7, 9])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, stop_at):
    """Optimizer state, step, schedule and noise all come back; steps after the last checkpoint
    are redone, not logged twice."""
    whole = finish_toy_run(*toy_run(toy_args(tmp_path / "whole")))
    broken = toy_run(toy_args(tmp_path / "cut"), stop_at)
    with pytest.raises(Stop):
        finish_toy_run(*broken)
    assert not (tmp_path / "cut" / "done.json").exists()
    resumed = finish_toy_run(*toy_run(toy_args(tmp_path / "cut", resume=True, save_every=2,
                                               micro_tokens=3)))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))
    one, two = metrics(tmp_path / "whole"), metrics(tmp_path / "cut")
    assert [x["step"] for x in two] == [*range(1, 11), 10] and two[-1]["event"] == "end"
    same = ("step", "lr", "loss", "grad_norm", "tokens")
    assert [[x.get(n) for n in same] for x in one] == [[x.get(n) for n in same] for x in two]
    assert [x["lr"] for x in one[:-1]] == [learning_rate(i, 10, 0.1, 3, "cosine")
                                           for i in range(10)]
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {"config.json", "metrics.jsonl",
                                                              "done.json"}


def test_a_run_folder_is_one_configuration(tmp_path, capsys):
    """Going on with other settings, or over another run, would give a result that no command
    describes."""
    out, ranks = tmp_path / "run", Ranks("toy", "cpu")
    with pytest.raises(Stop):
        finish_toy_run(*toy_run(toy_args(out), 5))
    with pytest.raises(InputError, match="--resume"):
        RunFolder(toy_args(out), ranks)
    # may change when memory runs out
    RunFolder(toy_args(out, resume=True, checkpointing=True), ranks)
    # the folder is older than the flag
    RunFolder(toy_args(out, resume=True, diversity_schedule="constant"), ranks)
    for change in (dict(lr=0.2), dict(seed=2), dict(extra=1), dict(diversity_schedule="held")):
        with pytest.raises(InputError, match=f"{next(iter(change))} = "):
            RunFolder(toy_args(out, resume=True, **change), ranks)
    # memory settings may change
    finish_toy_run(*toy_run(toy_args(out, resume=True, micro_tokens=99)))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for resume in (False, True):
        s = Session.__new__(Session)
        s.args, s.ranks = toy_args(out, resume=resume), ranks
        assert s.open_run() is False and "done" in capsys.readouterr().out     # nothing is redone
    with pytest.raises(InputError, match="lr = "):
        RunFolder(toy_args(out, lr=0.2), ranks)  # nor a result of other settings returned
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="holds no run"):
        RunFolder(toy_args(tmp_path / "photos"), ranks)
    (tmp_path / "empty").mkdir()
    assert not RunFolder(toy_args(tmp_path / "empty"), ranks).done


# ---- What a run survives -------------------------------------------------------------------------

TOY = """
import sys
sys.path.insert(0, "tests")
import helpers as t
from support.files import InputError
args = t.toy_args(sys.argv[1], steps=int(sys.argv[2]), resume=True, save_every=2)
try:
    s, params, step = t.toy_run(args)
    def by_hand(number):
        print("step", number, flush=True)
        if number == int(sys.argv[3]):
            sys.stdin.readline()
        return step(number)
    t.finish_toy_run(s, params, by_hand)
    print("values", [p.tolist() for p in params])
except InputError as e:
    print("error:", e, file=sys.stderr)
    sys.exit(2)
"""

# s, after which a process hangs: nothing is as slow as that, however busy the machine
HANG = 600


def start_toy(folder, steps=10, wait_at=-1, **more):
    """The toy run as a process of its own; at step `wait_at` it waits for a line on its stdin."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", TOY, str(folder), str(steps), str(wait_at)],
                            text=True,
                            cwd=Path(trainer.__file__).parent, env=env, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def reaches(process, step):
    """Returns when the process has begun that step."""
    while (line := process.stdout.readline()) != f"step {step}\n":
        assert line, process.stderr.read()


def values_of(said):
    return next(line for line in said.splitlines() if line.startswith("values"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the toy run ends with when nobody disturbs it."""
    process = start_toy(tmp_path_factory.mktemp("toy") / "run")
    return values_of(process.communicate(timeout=HANG)[0])


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_and_resume_goes_on(tmp_path, undisturbed, number, code):
    """The night's work is not lost to a scheduler: the step is finished, saved, and said in one
    line. The step waits for the signal, so that the run cannot end before it."""
    process = start_toy(tmp_path / "run", wait_at=3)
    reaches(process, 3)
    process.send_signal(number)
    said, wrong = process.communicate("\n", timeout=HANG)
    assert process.returncode == code and "stopped after step" in said and "Traceback" not in wrong
    assert len(metrics(tmp_path / "run")) == 4
    resumed = start_toy(tmp_path / "run").communicate(timeout=HANG)[0]
    assert values_of(resumed) == undisturbed and resumed.splitlines()[0] == "step 4"


@pytest.mark.slow
def test_a_folder_has_one_writer_and_its_lock_dies_with_it(tmp_path, undisturbed):
    """Two resumes of one folder both ended with 0, and 555 log lines for 400 steps."""
    first = start_toy(tmp_path / "run", wait_at=0)
    reaches(first, 0)
    second = start_toy(tmp_path / "run")
    said = second.communicate(timeout=HANG)[1].strip().splitlines()[-1]
    assert second.returncode == 2 and "is in use by another process" in said
    first.kill()
    first.communicate(timeout=HANG)
    resumed = start_toy(tmp_path / "run").communicate(timeout=HANG)[0]
    assert values_of(resumed) == undisturbed and len(metrics(tmp_path / "run")) == 11


TWICE = """
import signal, sys
sys.path.insert(0, "tests")
from types import SimpleNamespace
from support import ranks
import helpers as t
now = [0.0]
ranks.time = SimpleNamespace(monotonic=lambda: now[0])
s, params, step = t.toy_run(t.toy_args(sys.argv[1]))

def interrupted(number):
    third = float(sys.argv[2])
    for at, sent in ((0.0, signal.SIGINT), (0.9, signal.SIGTERM), (third, signal.SIGINT)):
        now[0] = at
        signal.raise_signal(sent)
        print("goes on at", at, flush=True)
    return step(number)
t.finish_toy_run(s, params, interrupted)
"""


@pytest.mark.slow
@pytest.mark.parametrize("at, left", [("1.0", False), ("1.1", True), ("60", True)])
def test_a_second_ctrl_c_leaves_at_once(tmp_path, at, left):
    """Whoever presses it twice does not wait for the end of a step of minutes; a launcher and a
    shell that both pass the same one on, within a second, are not two. The process sends
    itself the signals, by a clock of its own."""
    process = subprocess.run([sys.executable, "-c", TWICE, str(tmp_path / "run"), at], text=True,
                             timeout=HANG,
                             cwd=Path(trainer.__file__).parent,
                             env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert process.returncode == 130 and "Traceback" not in process.stderr
    assert process.stdout.count("goes on at") == (2 if left else 3)
    assert ("stopped after step 1" in process.stdout) is not left


def broken_off(folder, stop_at):
    with pytest.raises(Stop):
        finish_toy_run(*toy_run(toy_args(folder, save_every=2), stop_at))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_never_used(tmp_path, capsys):
    """A changed byte anywhere in the file, header or numbers: the one before it is used, or the
    start; the end is the uninterrupted run's."""
    whole = finish_toy_run(*toy_run(toy_args(tmp_path / "whole")))
    broken_off(tmp_path / "cut", 9)
    files = {p.name: p.read_bytes() for p in (tmp_path / "cut").iterdir() if p.is_file()}
    good, rng = files["checkpoint.safetensors"], random.Random(0)
    for place in sorted(rng.sample(range(len(good)), 200)):
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        s, params, _ = toy_run(toy_args(tmp_path / "cut", resume=True))
        (tmp_path / "cut" / "checkpoint.safetensors").write_bytes(bad)
        optimizer = torch.optim.AdamW(params, lr=0.1, fused=True)
        assert s.run.restore(params, optimizer) == 6, place
        assert "is damaged" in capsys.readouterr().out
    for bad in (good[:100], good[:-1], b""):
        (tmp_path / "cut" / "metrics.jsonl").write_bytes(files["metrics.jsonl"])
        (tmp_path / "cut" / "checkpoint.safetensors").write_bytes(bad)
        resumed = toy_run(toy_args(tmp_path / "cut", resume=True), 8)
        with pytest.raises(Stop):
            finish_toy_run(*resumed)
        (tmp_path / "cut" / "checkpoint.safetensors").write_bytes(bad)
    resumed = finish_toy_run(*toy_run(toy_args(tmp_path / "cut", resume=True)))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))


@pytest.mark.slow
@pytest.mark.skipif(checkpoint.resource is None, reason="no limits on this system")
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, undisturbed):
    broken_off(tmp_path / "run", 5)
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()

    def small():  # no file may grow beyond this: metrics still can, a checkpoint cannot
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        checkpoint.resource.setrlimit(checkpoint.resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)
    full = start_toy(tmp_path / "run", preexec_fn=small)
    said = full.communicate(timeout=HANG)[1]
    assert full.returncode == 2 and said.count("error:") == 1 and "free some disk space" in said
    files = [p.read_bytes() for p in (tmp_path / "run").glob("checkpoint*.safetensors")]
    assert before in files
    assert not list((tmp_path / "run").glob("*.partial"))


def test_stall_warnings_appear_once_and_after_a_resume():
    """Gate, reward or D at zero trained nothing, four equal rows in a report and no word about
    it."""
    dead, said = StallWarnings(), []
    for step in range(12):
        row = {"reward": 0.0, "D": 0.5, "zero_variance": 1.0, "gated_D": 0.0 if step > 3 else 0.1}
        said += [(step, text) for text in dead.warnings_of(row)]
    assert [(step, text.split()[0]) for step, text in said] == [(4, "reward"), (4, "zero_variance"),
                                                                (8, "gated_D")]
    assert [text for _, text in said] == dead.said
    alive = StallWarnings()
    assert not any(alive.warnings_of({"reward": float(step % 5 == 4)}) for step in range(50))
    assert not any(alive.warnings_of({"quality": float(step % 2)}) for step in range(50))
    open_gate = [text for _ in range(9) for text in alive.warnings_of({"quality": 1.0})]
    assert len(open_gate) == 1 and "perfect" in open_gate[0]


@pytest.mark.parametrize("name, dead", [("D", 0.0), ("gated_D", 0.0), ("quality", 0.0),
                                        ("quality", 1.0), ("D_share", 0.0),
                                        ("reward", 0.0), ("reward_std", 0.0), ("advantage", 0.0),
                                        ("zero_variance", 1.0)])
def test_each_signal_stalls_at_its_own_value(name, dead):
    signals = StallWarnings()
    for value in (0.0, 0.25, 0.5, 1.0, 2.5):
        said = [text for _ in range(5) for text in signals.warnings_of({name: value})]
        known = value == dead or name == "quality" and value in (0.0, 1.0)
        assert [text.startswith(f"{name} was {value:g} for 5 steps")
                for text in said] == [True] * known


def test_a_log_read_again_after_a_resume_goes_on_counting(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "reward": 0.0}) + "\n"
                                                    for i in range(1, 5)))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "metrics.jsonl").write_text('{"step": 1, "grad_norm": null}\n{"step": 2, '
                                                    '"grad_norm": 1.0}\n')
    assert checkpoint.replay(SimpleNamespace(folder=tmp_path / "two"))[1] == 1
    dead, skipped = checkpoint.replay(SimpleNamespace(folder=tmp_path))
    assert skipped == 0
    assert dead.said == [] and len(dead.warnings_of({"reward": 0.0})) == 1


def test_changed_posts_are_not_resumed(tmp_path):
    """A data file of the same name and other contents went on without a word."""
    file = tmp_path / "posts.jsonl"
    file.write_text("one")
    args = dict(data=str(file))
    with pytest.raises(Stop):
        finish_toy_run(*toy_run(toy_args(tmp_path / "run", **args), 5))
    moved = file.rename(tmp_path / "moved.jsonl")              # only its place changed
    RunFolder(toy_args(tmp_path / "run", resume=True, data=str(moved)), Ranks("toy", "cpu"))
    file.write_text("two")
    with pytest.raises(InputError, match="contents of .*posts.jsonl have changed"):
        RunFolder(toy_args(tmp_path / "run", resume=True, **args), Ranks("toy", "cpu"))


def test_other_package_versions_are_reported(tmp_path, capsys):
    with pytest.raises(Stop):
        finish_toy_run(*toy_run(toy_args(tmp_path / "run"), 5))
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    assert config["environment"]["torch"] == torch.__version__ and "commit" in config["environment"]
    config["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(config))
    RunFolder(toy_args(tmp_path / "run", resume=True), Ranks("toy", "cpu"))
    assert "torch 1.0 ->" in capsys.readouterr().out


@pytest.mark.slow
def test_windows_has_neither_locks_nor_peak_memory():
    """`import resource` fails there: the programs must start all the same."""
    code = ("import sys; sys.modules['resource'] = sys.modules['fcntl'] = None\n"
            "import torch, trainer; print(trainer.peak_bytes(torch.device('cpu')))")
    ran = subprocess.run([sys.executable, "-c", code], cwd=Path(trainer.__file__).parent, text=True,
                         capture_output=True, timeout=HANG)
    assert ran.stdout.strip() == "None", ran.stderr


def test_a_run_that_was_killed_at_its_very_start_can_begin_again(tmp_path):
    """Between making the folder and writing config.json: it "held no run of this program" for
    ever after."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".lock", "config.json.host-1-2.partial", "checkpoint.safetensors.host-1-2.partial",
                 ".tmpMknFAs"):
        (folder / name).write_text("{")
    assert len(finish_toy_run(*toy_run(toy_args(folder)))) == 2
    assert {p.name for p in folder.iterdir()} == {"config.json", "metrics.jsonl", "done.json"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no run of this program"):
        toy_run(toy_args(tmp_path / "other"))


def test_a_run_that_was_killed_at_its_very_end_leaves_nothing_behind(tmp_path):
    """Between done.json and the end of its checkpoints, which stayed for ever."""
    args = toy_args(tmp_path / "run")
    broken_off(tmp_path / "run", 5)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("checkpoint*")}
    finish_toy_run(*toy_run(toy_args(tmp_path / "run", resume=True, save_every=2)))
    for name, content in kept.items():
        (tmp_path / "run" / name).write_bytes(content)
    session = Session.__new__(Session)
    session.args, session.ranks = args, Ranks("toy", "cpu")
    assert len(kept) == 2 and not session.open_run()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl",
                                                              "done.json"}


@pytest.mark.skipif(sys.platform != "linux", reason="tells files by their descriptors")
def test_log_and_checkpoint_are_on_the_disk_before_the_checkpoint_is_in_its_place(tmp_path,
                                                                                  monkeypatch):
    """After a power cut a checkpoint was there whose lines of the log were not, or the name
    without the numbers."""
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync",
                        lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name),
                                    sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"to {Path(b).name}"),
                                                     replace(a, b)))
    broken_off(tmp_path / "run", 3)
    log, half, moved = done[-3:]
    assert ((log, moved) == ("metrics.jsonl", "to checkpoint.safetensors")
            and half.startswith("checkpoint.safetensors."))


def test_a_run_that_another_process_has_finished_meanwhile_is_left_alone(tmp_path):
    """Found unfinished, loaded for a minute, and then begun again over the finished one."""
    broken_off(tmp_path / "run", 5)
    late = toy_run(toy_args(tmp_path / "run", resume=True))
    finish_toy_run(*toy_run(toy_args(tmp_path / "run", resume=True)))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="has just finished"):
        finish_toy_run(*late)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Of the same shape: it went on from there without a word. Of fewer tensors: a KeyError."""
    broken_off(tmp_path / "one", 5)
    with pytest.raises(Stop):
        finish_toy_run(*toy_run(toy_args(tmp_path / "two", seed=2, save_every=2), 5))
    other = (tmp_path / "two" / "checkpoint.safetensors").read_bytes()
    (tmp_path / "one" / "checkpoint.safetensors").write_bytes(other)
    with pytest.raises(InputError, match="is of another run"):
        finish_toy_run(*toy_run(toy_args(tmp_path / "one", resume=True)))
    s, params, step_fn = toy_run(toy_args(tmp_path / "two", seed=2, resume=True))
    with pytest.raises(InputError, match="is of another model"):
        train(s, [*params, torch.nn.Parameter(torch.zeros(1))], step_fn, [])


@pytest.mark.slow
def test_two_damaged_checkpoints_mean_the_start_and_a_torn_log_is_no_matter(tmp_path, undisturbed):
    whole = finish_toy_run(*toy_run(toy_args(tmp_path / "whole")))
    broken_off(tmp_path / "cut", 7)
    log = tmp_path / "cut" / "metrics.jsonl"
    for name in ("checkpoint.safetensors", "checkpoint.before.safetensors"):
        path = tmp_path / "cut" / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        log.write_text(log.read_text() + '{"step": 9, "lo')
        broken_off_again = toy_run(toy_args(tmp_path / "cut", resume=True, save_every=100), 7)
        with pytest.raises(Stop):
            finish_toy_run(*broken_off_again)
        assert [x["step"] for x in metrics(tmp_path / "cut")] == list(range(1, 8))
    assert all(torch.equal(a, b)
               for a, b in zip(whole,
                               finish_toy_run(*toy_run(toy_args(tmp_path / "cut", resume=True)))))


def test_ranks_that_see_different_folders_do_not_go_on(tmp_path):
    """A folder that machines do not share: one began at step 6, the other at 0, and their
    gradients were added up."""
    broken_off(tmp_path / "run", 7)
    s, params, step_fn = toy_run(toy_args(tmp_path / "run", resume=True))
    s.ranks.gather = lambda items: [*items, 0]
    with pytest.raises(InputError, match="different checkpoints"):
        train(s, params, step_fn, [])


def test_the_run_folder_keeps_the_split_and_refuses_other_users(tmp_path):
    posts = tmp_path / "sft.jsonl"
    posts.write_text("one")
    (tmp_path / "split.json").write_text(json.dumps({"seed": 4, "sizes": {"sft": 1}}))
    (tmp_path / "domain.json").write_text(json.dumps({"popularity": 1.5}))
    args = toy_args(tmp_path / "run", data=str(posts), save_every=2)
    with pytest.raises(Stop):
        finish_toy_run(*toy_run(args, 5))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["split"]["seed"] == 4 and config["seed"] == 1
            and config["readers"] == {"popularity": 1.5})
    assert {"commit", "clean", "torch", "python"} <= config["environment"].keys()
    (tmp_path / "domain.json").write_text(json.dumps({"popularity": 2}))
    with pytest.raises(InputError, match="posts of another split"):
        toy_run(toy_args(tmp_path / "run", data=str(posts), resume=True))


def test_a_signal_waits_for_the_last_update_of_a_rollout(tmp_path):
    """Drafts are no part of a checkpoint: a run that was stopped after the first of two updates
    could not go on."""
    whole = finish_toy_run(*toy_run(toy_args(tmp_path / "whole", updates=2, save_every=2)))
    session, params, step_fn = toy_run(toy_args(tmp_path / "run", updates=2, save_every=2))

    def interrupted(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_fn(step)
    with pytest.raises(SystemExit) as stopped:
        finish_toy_run(session, params, interrupted)
    # steps 5 and 6, which share drafts
    assert stopped.value.code == 143 and len(metrics(tmp_path / "run")) == 6
    again = finish_toy_run(*toy_run(toy_args(tmp_path / "run", updates=2, save_every=2,
                                             resume=True)))
    assert all(torch.equal(a, b) for a, b in zip(whole, again))


@pytest.mark.slow
def test_lambda_and_seed_change_the_adapter_and_resume_does_not(world):
    """D reaches the weights (lambda 0 and 0.5 differ), the same command gives the same bits,
    another seed does not."""
    same, other, again = "t-lam", "t-lam2", "t-plain"
    assert polylora.main(sft_args(world, same, "--lambda", "0.5")) == 0
    assert polylora.main(sft_args(world, other, "--lambda", "0.5", "--seed", "2")) == 0
    assert polylora.main(sft_args(world, again)) == 0
    plain, lam, lam2, lora = (adapter_of(Path(world["root"]) / r)
                              for r in (again, same, other, "lora"))
    assert all(torch.equal(plain[n], lora[n]) for n in plain)
    assert any(not torch.equal(plain[n], lam[n]) for n in plain)
    assert any(not torch.equal(lam2[n], lam[n]) for n in lam)


def test_a_stage_refuses_posts_of_another_domain_than_its_start_was_trained_for(world, tmp_path,
                                                                                capsys):
    """Inferred anew from each file, GRPO and evaluation ran as another domain than SFT, with
    exit 0."""
    assert data.main(["split", "--data", "pocket", "--sizes", "grpo=6",
                      "--out", str(tmp_path)]) == 0
    other = str(tmp_path / "grpo.jsonl")
    assert grpo.main(grpo_args(world, "never", "--data", other)) == 2
    assert "was trained for the domain 'replies'" in capsys.readouterr().err
    assert evaluate.main(["measure", world["lora"], "--data", other, "--n", "10"]) == 2
    assert "was trained for the domain 'replies'" in capsys.readouterr().err
    assert not (Path(world["root"]) / "never").exists()


def test_a_stage_refuses_the_same_styles_with_other_users(tmp_path):
    """Voices in another order, or another popularity, are other readers: what was rewarded and
    what is judged would differ."""
    posts = pocket.pocket_posts(4)
    trained = data.make_domain("auto", posts)
    files.write_json(tmp_path / "done.json", {"domain": trained.record()})
    checks.same_domain(tmp_path, data.make_domain("auto", posts))
    # says nothing of a domain
    checks.same_domain(tmp_path / "somebody's adapter", trained)
    for other in (pocket.Pocket(posts, styles=trained.styles[::-1]),
                  pocket.Pocket(posts, popularity=0.7),
                  pocket.Pocket(posts, permute=True), pocket.Pocket(posts, writers=3.0),
                  data.Domain(posts)):
        with pytest.raises(files.InputError, match="was trained for the domain 'pocket'"):
            checks.same_domain(tmp_path, other)
    # an older version's
    files.write_json(tmp_path / "done.json", {"domain": "pocket"})
    with pytest.raises(files.InputError, match="with styles none"):
        checks.same_domain(tmp_path, trained)


def test_the_base_s_revision_is_kept_with_the_adapter(world, tmp_path):
    """Trained on one revision, GRPO and measuring took the newest."""
    run = tmp_path / "run"
    assert polylora.main(sft_args(world, "x", "--out", str(run), "--revision", "abc123")) == 0
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["revision"] == "abc123"
    args = grpo.parser().parse_args(["--start", str(run), "--data", "-", "--out", "-"])
    checks.check_grpo(args)
    assert (args.model, args.revision) == (world["model"], "abc123")
    for command in (["measure", str(run), "--data", "-"], ["drafts", str(run), "a post"]):
        args = evaluate.parser().parse_args(command)
        evaluations.name_model(args, run)
        assert (args.model, args.revision) == (world["model"], "abc123")


def test_an_adapter_on_another_base_is_refused(world, tmp_path, capsys):
    """It went onto any base of its shape: drafts of nonsense, and no word about it."""
    model = write_model(tmp_path / "model")
    other = Qwen3.from_pretrained(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    other.save_pretrained(model)
    few = ["--model", str(model), "--data", world["eval"], "--out", str(tmp_path / "x"),
           "--max-new-tokens", "4"]
    assert evaluate.main(["measure", world["lora"], *few[:4], "--n", "10",
                          "--max-new-tokens", "4"]) == 2
    assert "was trained on another base" in capsys.readouterr().err
    assert grpo.main(["--start", world["lora"], "--steps", "1", "--k", "2", *few]) == 2
    assert ("was trained on another base" in capsys.readouterr().err
            and not (tmp_path / "x").exists())
    run = ["sft", "--model", str(model), "--data", world["sft"], "--out", str(tmp_path / "run"),
           "--steps", "1"]
    assert polylora.main(run) == 0
    (tmp_path / "run" / "done.json").unlink()                                  # as if killed
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    other.save_pretrained(model)
    assert (polylora.main([*run, "--resume"]) == 2
            and "a run on another base" in capsys.readouterr().err)


# ---- What is replaced under its name -------------------------------------------------------------

def test_every_command_refuses_a_replaced_base(root, capsys):
    """`drafts` wrote nonsense, GRPO from A/adapter trained on it, `interpolate` mixed adapters
    of two bases."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    torch.manual_seed(5)
    model = Qwen3.from_pretrained(w["model"])
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(w["model"])
    assert "another base" in refusal(capsys, evaluate.main, "drafts", w["lora"], "hello", *SHORT)
    for start in (w["lora"], w["lora"] + "/adapter"):
        assert "another base" in refusal(capsys, grpo.main,
                                         *grpo_args(w, "never", "--start", start))
    assert polylora.main(sft_args(w, "later")) == 0
    for a, b in ((w["lora"], root / "later"), (root / "later/adapter", w["lora"])):
        assert "different base" in refusal(capsys, polylora.main, "interpolate", a, b,
                                           "--out", root / "never")
    assert not (root / "never").exists()


def test_a_setting_that_a_resumption_drops_is_named_with_its_default(root, capsys):
    """"diversity_schedule = 'rising', now False is asked for"."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    weighed = grpo_args(w, "run", "--diversity-weight", "1")
    assert grpo.main([*weighed, "--diversity-schedule", "rising"]) == 0
    assert "but 'constant' is asked for" in refusal(capsys, grpo.main, *weighed)


PLAIN = ("{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' "
         "}}{%- endfor %}"
         "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")


def change_tensor(path, at=0.5):
    """Add to one number in the middle of a file of tensors; its size, header and end stay."""
    tensors = load_file(path)
    name = sorted(tensors)[int(at * len(tensors))]
    tensors[name].view(-1)[0] += 0.25
    save_file(tensors, path, metadata={"format": "pt"})


def change_base(w):
    change_tensor(Path(w["model"]) / "model.safetensors")


def change_template(w):
    (Path(w["model"]) / "chat_template.jinja").write_text(PLAIN)


def change_tokenizer(w):
    path = Path(w["model"]) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer))


def change_start(w):
    change_tensor(Path(w["lora"]) / "adapter" / "adapter_model.safetensors")


def change_start_scale(w):
    path = Path(w["lora"]) / "adapter" / "adapter_config.json"
    files.write_json(path, files.read_json(path) | {"lora_alpha": 3.5})


def change_posts(w):
    with open(w["grpo"], "a") as file:
        file.write('{"post": "one more post", "reply": "and one more reply", "intent": "more"}\n')


def change_embedder(w):
    change_tensor(Path(w["embedder"]) / "model.safetensors")


# ---- Training ------------------------------------------------------------------------------------

@pytest.fixture
def chain(root):  # noqa: F811
    """A base, an embedder of its own, an SFT run and the command of a GRPO run from it."""
    w = places(root)
    w["embedder"] = str(root / "embedder")
    shutil.copytree(w["model"], w["embedder"])
    assert polylora.main(sft_args(w, "lora")) == 0
    w["command"] = grpo_args(w, "rl", "--embedder", w["embedder"], "--diversity-weight", "0.1",
                             "--reward", "relevance")
    return w


CHANGES = [(change_base, "another base"), (change_template, "another tokenizer or chat template"),
           (change_tokenizer, "another tokenizer or chat template"),
           (change_start, "another starting adapter"),
           (change_start_scale, "another starting adapter"), (change_posts, "on other posts"),
           (change_embedder, "another embedder")]


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("change, said", CHANGES)
def test_a_run_made_from_other_inputs_is_neither_kept_nor_resumed(chain, capsys, change, said):
    """The old result stayed as "done already"; an unfinished run went on from another start."""
    assert grpo.main(chain["command"]) == 0
    run = chain["root"] / "rl"
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert grpo.main(chain["command"]) == 0 and "done already" in capsys.readouterr().out
    change(chain)
    assert said in refusal(capsys, grpo.main, *chain["command"])
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    (run / "done.json").unlink()
    assert said in refusal(capsys, grpo.main, *chain["command"], "--resume")


@pytest.mark.slow
def test_sft_trained_again_otherwise_ends_the_chain(chain, capsys):
    """The reported case: another learning rate in phase one, then the same command of phase two."""
    assert grpo.main(chain["command"]) == 0
    shutil.rmtree(chain["lora"])
    # trained again, all the same
    assert polylora.main(sft_args(chain, "lora")) == 0
    assert grpo.main([*chain["command"], "--resume"]) == 0
    assert "done already" in capsys.readouterr().out
    shutil.rmtree(chain["lora"])
    assert polylora.main(sft_args(chain, "lora", "--lr", "0.02")) == 0
    assert "another starting adapter" in refusal(capsys, grpo.main, *chain["command"], "--resume")


def test_a_file_that_is_only_moved_or_touched_is_the_same_input(chain, capsys):
    """Identity is of contents: no time stamps, no order of names in an adapter's configuration."""
    assert grpo.main(chain["command"]) == 0
    path = Path(chain["lora"]) / "adapter" / "adapter_config.json"
    config = files.read_json(path)
    names = config["target_modules"][::-1]
    files.write_json(path,
                     {"target_modules": names,
                      **{k: v for k, v in config.items() if k != "target_modules"}})
    weights = Path(chain["model"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert grpo.main(chain["command"]) == 0 and "done already" in capsys.readouterr().out


@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 0.99])
def test_the_hash_of_a_base_is_of_every_number(root, at):  # noqa: F811
    """Only headers and the last 64 KiB of each file counted."""
    before = checkpoint.model_hash(root / "model", None)
    assert checkpoint.model_hash(root / "model", None) == before
    change_tensor(root / "model" / "model.safetensors", at)
    assert checkpoint.model_hash(root / "model", None) != before


def test_what_a_folder_of_an_older_version_cannot_tell_is_said(chain, capsys):
    """Its hash was of a part of the base: a finished run is kept with a note, an unfinished one
    is not gone on with, and neither is called one on another base."""
    assert grpo.main(chain["command"]) == 0
    path = chain["root"] / "rl" / "config.json"
    config = files.read_json(path) | {"model_hash": "0123abcd"}
    del config["model_chat_hash"], config["start_hash"]
    files.write_json(path, config)
    assert files.base_hash(chain["root"] / "rl") is None
    capsys.readouterr()
    assert grpo.main(chain["command"]) == 0
    said = capsys.readouterr().out
    assert "older version" in said and "done already" in said
    (chain["root"] / "rl" / "done.json").unlink()
    assert "older version" in refusal(capsys, grpo.main, *chain["command"], "--resume")


@pytest.mark.slow
def test_measuring_under_another_template_says_so(chain, capsys):
    """The adapter is measured anew, in a chat format that it was not trained in."""
    command = ["measure", chain["lora"], "--data", chain["eval"], "--n", "10",
               "--max-new-tokens", "5"]
    assert evaluate.main(command) == 0 and "trained with another" not in capsys.readouterr().err
    change_template(chain)
    assert evaluate.main(command) == 0
    assert "trained with another tokenizer or chat template" in capsys.readouterr().err


# ---- Evaluations ---------------------------------------------------------------------------------

def intents(w):
    write_rows(w, lambda row: row | {"intent": f"about {row['post'][-1]}"})


def written_anew(w):
    write_rows(w, lambda row: row | {"intent": ""})


def write_rows(w, change):
    rows = [json.loads(line) for line in Path(w["eval"]).read_text().splitlines()]
    Path(w["eval"]).write_text("".join(json.dumps(change(row)) + "\n" for row in rows))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("change, again",
                         [(change_base, True), (change_template, True), (change_tokenizer, True),
                          (intents, True), (written_anew, False), (change_start, True),
                          (change_start_scale, True), (change_embedder, True)])
def test_an_evaluation_is_kept_only_for_equal_inputs(chain, capsys, change, again):
    """A changed template, tokenizer or intent left the old evaluation in its place: Pass@1 .108,
    anew .000. Writing the posts anew without a change of what they say is no reason to
    measure again."""
    shutil.copytree(chain["lora"], chain["root"] / "mine")
    # of no base: changes are not refused
    (chain["root"] / "mine" / "config.json").write_text(json.dumps({"seed": 1}))
    chain["lora"] = str(chain["root"] / "mine")
    command = [chain["lora"], "--data", chain["eval"], "--model", chain["model"],
               "--embedder", chain["embedder"],
               "--reward", "relevance"]
    assert (measured(capsys, *command) == "1 of 1 runs" and measured(capsys, *command)
            == "0 of 1 runs")
    before = files.read_json(Path(chain["lora"]) / "evaluation.json")["records"]
    change(chain)
    assert measured(capsys, *command) == ("1 of 1 runs" if again else "0 of 1 runs")
    after = files.read_json(Path(chain["lora"]) / "evaluation.json")["records"]
    assert (before == after) is not again
    assert measured(capsys, *command) == "0 of 1 runs"


# ---- SFT from an adapter -------------------------------------------------------------------------

def tensors(run):
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa", "adalora", "lori", "multilora",
                                  "moa", "ensemble", "full"])
def test_sft_goes_on_from_a_finished_adapter(root, capsys, kind):  # noqa: F811
    """A usual wish had no way: a larger --steps was refused and sft had no start."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora", "--adapter", kind, "--members", "2", "--lr", "0.01",
                                  "--alpha", "4")) == 0
    before = tensors(w["lora"])
    few = ["--data", w["sft"], "--steps", "2", "--batch", "4", "--lr", "0.01"]
    more = ["sft", "--start", w["lora"], *few, "--seed", "2", "--out", str(root / "more")]
    assert polylora.main(more) == 0
    after, config = tensors(root / "more"), files.read_json(root / "more" / "config.json")
    assert (after.keys() == before.keys() and {n: t.shape for n, t in after.items()}
            == {n: t.shape for n, t in before.items()})
    assert any(not torch.equal(after[n], before[n]) for n in after)
    assert (config["adapter"], config["model"]) == (kind, w["model"])
    written = [files.read_json(f / "adapter" / "adapter_config.json")
               for f in (Path(w["lora"]), root / "more")]
    assert written[0] == written[1]
    assert polylora.main(more) == 0 and "done already" in capsys.readouterr().out
    still = ["sft", "--start", w["lora"], *few, "--lr", "0", "--out", str(root / "still")]
    # it starts where that one ended
    assert polylora.main(still) == 0
    same = tensors(root / "still")
    assert all(torch.allclose(same[n], before[n], atol=1e-6) for n in same)


@pytest.mark.slow
def test_sft_s_first_step_from_an_adapter_has_the_loss_of_that_adapter(root):  # noqa: F811
    """Not the base's, and not that of an adapter set up anew."""
    w = places(root)
    long = sft_args(w, "long", "--lr", "0.02", "--warmup", "0", "--schedule", "constant",
                    "--epochs", "1", "--steps", "12")
    assert polylora.main(long) == 0
    same = ["--seed", "1", "--lr", "0", "--steps", "1"]
    assert polylora.main(["sft", "--start", str(root / "long"), "--data", w["sft"], "--batch", "4",
                          *same,
                          "--out", str(root / "more")]) == 0
    assert polylora.main(sft_args(w, "new", *same)) == 0
    trained_on, new = lines(root / "more")[0]["ce"], lines(root / "new")[0]["ce"]
    assert trained_on < lines(root / "long")[0]["ce"] == new


@pytest.mark.slow
@pytest.mark.parametrize("flags, said",
                         [(["--rank", "3"], "--rank 3"), (["--alpha", "5"], "--alpha 5"),
                          (["--adapter", "dora"], "--adapter dora"),
                          (["--targets", "q_proj"], "--targets q_proj")])
def test_flags_that_an_adapter_at_start_contradicts_are_refused(root, capsys, flags,
                                                                said):  # noqa: F811
    w = places(root)
    assert polylora.main(sft_args(w, "lora", "--alpha", "4")) == 0
    go = ["sft", "--start", w["lora"], "--data", w["sft"], "--out", root / "more", "--steps", "1"]
    assert said in refusal(capsys, polylora.main, *go, *flags)
    assert not (root / "more").exists()
    assert polylora.main([*map(str, go), "--rank", "2", "--alpha", "4", "--batch", "4"]) == 0
    assert "no adapter there" in refusal(capsys, polylora.main, *go[:2], root / "model", *go[3:])
    assert "--model" in refusal(capsys, polylora.main, "sft", *go[3:])


def test_a_finished_run_with_more_steps_is_told_the_way(root, capsys):  # noqa: F811
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    assert f"--start {w['lora']}" in refusal(capsys, polylora.main, *sft_args(w, "lora"),
                                             "--steps", "4")
    assert "--start" not in refusal(capsys, polylora.main, *sft_args(w, "lora"), "--lr", "0.5")


def test_sft_from_a_start_that_was_trained_otherwise_is_not_kept(root, capsys):  # noqa: F811
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    go = ["sft", "--start", w["lora"], "--data", w["sft"], "--out", str(root / "more"),
          "--steps", "1", "--batch", "4"]
    assert polylora.main(go) == 0
    change_start(w)
    assert "another starting adapter" in refusal(capsys, polylora.main, *go)


@pytest.mark.slow
def test_an_sft_run_from_a_start_resumes_bit_for_bit(root):  # noqa: F811
    w = places(root)
    assert polylora.main(sft_args(w, "lora", "--lr", "0.01")) == 0
    go = lambda out, *more: polylora.main(["sft", "--start", w["lora"], "--data", w["sft"],
                                           "--out", str(root / out), "--steps", "4",
                                           "--batch", "4", "--lr", "0.01", "--save-every", "2",
                                           *more])
    assert go("whole") == 0
    step, calls = polylora.sft_step, []

    def broken(session, number):
        calls.append(number)
        if number == 3:
            raise KeyboardInterrupt
        return step(session, number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polylora, "sft_step", broken)
        assert go("cut") == 130
    assert go("cut", "--resume") == 0
    one, two = tensors(root / "whole"), tensors(root / "cut")
    assert all(torch.equal(one[n], two[n]) for n in one) and calls == [0, 1, 2, 3]


def test_every_stall_is_said_once_and_in_training_after_five_steps_in_a_row():
    for stall in STALLS:
        said = [text for _ in range(9)
                for text in StallWarnings().warnings_of({stall.name: stall.high})]
        assert said == []                                                      # one line is no row
        dead = StallWarnings()
        said = [(step, text) for step in range(9)
                for text in dead.warnings_of({stall.name: stall.high})
                if text.endswith(stall.meaning)]
        assert [step for step, _ in said] == [4] and stall.meaning in said[0][1]
        assert any(stall.meaning in text for text in stalled({stall.name: stall.low}))
    assert stalled({"truncated": 0.89, "empty": 0.5, "identical": 0.99, "valid": 0.01,
                    "passed": 0.01}) == []


def test_a_few_completions_that_end_do_not_hide_that_the_others_are_cut_off():
    """With --max-new-tokens 1 some completion is the stop token alone: the share was 1 in most
    steps, not in five in a row."""
    shares = [1.0, 1.0, 0.94, 1.0, 0.97]
    dead = StallWarnings()
    said = [text for x in shares for text in dead.warnings_of({"truncated": x})]
    assert len(said) == 1 and "--max-new-tokens" in said[0] and "0.9 or more" in said[0]
    dead = StallWarnings()
    assert [text for x in (1.0, 1.0, 0.5, 1.0, 1.0, 1.0)
            for text in dead.warnings_of({"truncated": x})] == []


def test_shares_of_completions_by_hand():
    tally = Tally()
    steplog.tally_completions(tally, [[True, False], [False, False]], [["yes", "Yes!"], ["", " "]])
    steplog.tally_completions(tally, [[True]], [["alone"]])
    means = {name: total / count for name, (total, count) in tally.sums.items()}
    assert means == pytest.approx({"truncated": 3 / 5, "empty": 2 / 5, "identical": 1.0})


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("main, flags", [
    (grpo.main, ["--reward", "relevance"]),
    (grpo.main, ["--reward", "agreement", "--diversity-weight", "0.1"]),
    (polylora.main, ["--lambda", "0.1"]), (polylora.main, ["--loss", "unlikelihood-sequence"]),
    (polylora.main, ["--loss", "bonbon"])])
def test_training_names_completions_that_are_all_cut_off(root, capsys, main, flags):  # noqa: F811
    """Only what follows from it was named, or nothing: a reward that is not zero had no warning
    at all."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    capsys.readouterr()
    made = sft_args(w, "run", *flags) if main is polylora.main else grpo_args(w, "run", *flags)
    assert main([*made, "--steps", "6", "--max-new-tokens", "1"]) == 0
    assert (
        "completions are cut off before their end: raise --max-new-tokens"
        in capsys.readouterr().out
    )
    assert any("cut off" in text for text in lines(root / "run")[-1]["warnings"])


def writes(tokens_of):
    """A generate() that writes tokens_of(stops) for every completion of every prompt."""
    def write(model, prompts, *, k=1, stop_ids=(), progress=None, **settings):
        completions = [[list(tokens_of(stop_ids, p, d)) for d in range(k)]
                       for p in range(len(prompts))]
        logprobs = [[[-1.0] * len(ids) for ids in group] for group in completions]
        ended = [[ids[-1] in stop_ids for ids in group] for group in completions]
        return Samples(completions, logprobs, ended)
    return write


WRITERS = {
    "empty": (lambda stops, p, d: [stops[0]],
              "completions are empty: check that the chat template"),
    "truncated": (lambda stops, p, d: [9 + p, 10 + d, 11], "completions are cut off"),
    "identical": (lambda stops, p, d: [40 + p, 41, stops[0]],
                  "all completions of a post are one text"),
    "passed": (lambda stops, p, d: [40 + p, 41 + d, stops[0]], "no completion passes")}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", WRITERS)
def test_measuring_warns_of_completions_that_say_nothing(root, capsys, monkeypatch,
                                                         name):  # noqa: F811
    """Pass@k was 0 without a word when a wrong chat template made every completion empty."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    tokens, said = WRITERS[name]
    monkeypatch.setattr(trainer, "generate", writes(tokens))
    command = ["measure", w["lora"], "--data", w["eval"], "--n", "10", "--max-new-tokens", "5",
               "--reward", "relevance"]
    monkeypatch.setattr(evaluate, "passing",
                        lambda session, reward: (0.99 if name == "passed" else -2.0, None))
    assert evaluate.main(command) == 0
    out = capsys.readouterr().out
    warned = [line for line in out.splitlines() if line.startswith("warning: lora: ")]
    assert any(said in line for line in warned)
    assert [line.split()[2] for line in warned if line.split()[2]
            == "passed"] == ["passed"] * (name == "passed")
    end = lines(w["lora"])[-1]
    assert (end["stage"] == "measure" and [f"warning: lora: {text}" for text in end["warnings"]]
            == warned)


def test_measuring_warns_where_no_completion_is_right_in_any_style():
    records = [{"finished": [True] * 2, "drafts": ["a", "b"], "voices": [[], []]}] * 3
    assert [text.split(":")[0] for text in stalled(evaluate.shares_of(records))] == ["valid is 0"]
    right = [*records, {"finished": [True] * 2, "drafts": ["a", "b"], "voices": [["plain"], []]}]
    assert stalled(evaluate.shares_of(right)) == []


def test_a_sound_measurement_is_not_warned_of(root, capsys, monkeypatch):  # noqa: F811
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    monkeypatch.setattr(trainer, "generate", writes(lambda stops, p, d: [40 + p, 41 + d, stops[0]]))
    monkeypatch.setattr(evaluate, "passing", lambda session, reward: (-2.0, None))
    assert evaluate.main(["measure", w["lora"], "--data", w["eval"], "--n", "10",
                          "--reward", "relevance"]) == 0
    assert "warning" not in capsys.readouterr().out and lines(w["lora"])[-1]["warnings"] == []


@pytest.mark.slow
def test_a_report_shows_the_warnings_of_the_latest_measurement_alone(root, capsys,
                                                                     monkeypatch):  # noqa: F811
    """A mistake that was corrected is no longer a note of the report."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    command = ["measure", w["lora"], "--data", w["eval"], "--n", "10", "--reward", "relevance"]
    monkeypatch.setattr(evaluate, "passing", lambda session, reward: (-2.0, None))

    def notes(*more):
        assert evaluate.main([*command, *more]) == 0
        assert evaluate.main(["report", w["lora"], "--out", str(root / "report")]) == 0
        return " ".join(files.read_json(root / "report" / "report.json")["notes"])
    monkeypatch.setattr(trainer, "generate", writes(WRITERS["empty"][0]))
    assert "completions are empty" in notes()
    monkeypatch.setattr(trainer, "generate", writes(lambda stops, p, d: [40 + p, 41 + d, stops[0]]))
    assert "completions are empty" not in notes("--max-new-tokens", "9")
