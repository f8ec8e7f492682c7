"""What both phases share: random streams, batches, ranks, the run folder, checkpoints, the loop."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

import data
import polylora
import trainer
from data import InputError
from test_polylora import Share, metrics
from trainer import (DeadSignals, Ranks, Run, Session, Tally, Visit, batch_visits, learning_rate,
                     seed_of, train)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Stop(Exception):
    pass


# ---- What both phases share ------------------------------------------------------------------------------

def test_batches_visit_every_post_once_an_epoch_in_a_new_order():
    """Sampling with replacement leaves a third of the posts out of an epoch; a batch may straddle two
    epochs."""
    every = [v for step in range(9) for v in batch_visits(10, 4, step, seed=3)]
    seen = [v.index for v in every]
    epochs = [seen[i:i + 10] for i in range(0, 30, 10)]
    assert [v.epoch for v in every] == [i // 10 for i in range(36)] and len(set(every)) == 36
    indices = lambda *a: [v.index for v in batch_visits(*a)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and len(set(map(tuple, epochs))) == 3
    assert indices(10, 4, 2, 3) == seen[8:12] != indices(10, 4, 2, 4)
    assert sorted(indices(3, 7, 0, 0)) == sorted([0, 1, 2] * 2 + [indices(3, 1, 6, 0)[0]])


def test_learning_rate_table():
    """Warm-up must not begin at zero, which wastes a step, and the cosine must end near zero, not at its
    peak."""
    got = [learning_rate(s, 12, 2.0, 2, "cosine") for s in range(12)]
    want = [1.0, 2.0] + [1 + math.cos(math.pi * i / 10) for i in range(10)]
    assert got == pytest.approx(want) and got[2] == 2.0 and 0 < got[-1] < 0.1
    assert [learning_rate(s, 12, 2.0, 4, "constant") for s in (0, 3, 4, 11)] == [0.5, 2, 2, 2]
    assert learning_rate(0, 1, 2.0, 0, "cosine") == 2.0 and learning_rate(0, 5, 2.0, 10, "cosine") == 0.2


def test_a_seed_is_the_same_number_on_every_machine():
    """hash() differs from process to process: the ranks would disagree about everything."""
    assert seed_of(1, "sft", 0, "post-7") == 2399848287674112590
    assert len({seed_of(*x) for x in ((1,), (2,), ("1",), (1, 1), (11,), ("a", "b"), ("ab",))}) == 7


def test_means_are_of_sums_not_of_means():
    """Micro-batches of 1 and 3 tokens with means 2 and 0.2: the mean over tokens is 0.65, that of the means
    is 1.1."""
    tally = Tally()
    tally.add("loss", torch.tensor(2.0), 1)
    tally.add("loss", 0.6, 3)
    assert tally.means(Share(), ["loss", "never"]) == pytest.approx({"loss": 0.65})
    assert tally.means(Share(total=[2.6 + 1.4, 4 + 4]), ["loss"]) == pytest.approx({"loss": 0.5})


TWO_RANKS ="""
import json, sys
import torch
from trainer import Ranks, Tally
ranks = Ranks(sys.argv[1], "cpu")
a, b = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 3))
a.grad = torch.tensor([1.0, 2.0]) * (ranks.rank + 1)
if ranks.rank == 0:
    b.grad = torch.ones(3)
ranks.sum_gradients([a, b])
tally = Tally()
tally.add("loss", 2.0 if ranks.rank == 0 else 0.6, 1 if ranks.rank == 0 else 3)
means, gathered = tally.means(ranks, ["loss"]), ranks.gather(list(range(5))[ranks.rank::ranks.world])
print(json.dumps([a.grad.tolist(), b.grad.tolist(), means, gathered, ranks.sum([1, 2])]))
ranks.barrier()
ranks.close()
"""


def test_two_processes_add_their_gradients_and_a_second_stage_can_follow():
    """Gradients are summed, not averaged; a rank without one counts as zero; and a second group in the same
    launch must not read the first one's keys from the launcher's store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                        "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    pipes = dict(cwd=Path(trainer.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                 text=True)
    for stage in ("sft:a", "grpo:b"):                                          # new processes, as in train.sh
        ranks = [subprocess.Popen([sys.executable, "-c", TWO_RANKS, stage], **pipes,
                                  env=env | {"RANK": r, "LOCAL_RANK": r}) for r in "01"]
        try:
            said = [p.communicate(timeout=600) for p in ranks]
        finally:
            [p.kill() for p in ranks]
        assert [p.returncode for p in ranks] == [0, 0], said
        for out, _ in said:                                                    # the same sums on both ranks
            a, b, means, gathered, total = json.loads(out.splitlines()[-1])
            assert (a, b, gathered, total) == ([3, 6], [1, 1, 1], [0, 1, 2, 3, 4], [2, 4])
            assert means == pytest.approx({"loss": 0.65})


def test_alone_too_a_parameter_without_a_gradient_counts_as_zero():
    """AdamW leaves out what has none: after a step that teaches nothing, one rank would differ from two."""
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    a.grad = torch.tensor([1.0, 2.0])
    Ranks("x", "cpu").sum_gradients([a, b])
    assert a.grad.tolist() == [1, 2] and b.grad.tolist() == [0, 0]


def test_a_device_without_an_index_is_this_rank_s(monkeypatch):
    """torch.cuda.set_device takes no bare `cuda`; and all ranks of a machine would share GPU 0."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device(device).index))
    monkeypatch.setenv("LOCAL_RANK", "1")
    devices = [Ranks("x", d).device for d in (None, "cuda", "cuda:3")]
    assert devices == [torch.device("cuda", i) for i in (1, 1, 3)]
    assert chosen == [1, 1, 3] and Ranks("x", "cpu").device.type == "cpu"


# ---- The run folder and the loop -------------------------------------------------------------------------

def run_args(folder, **changes):
    settings = dict(out=str(folder), resume=False, seed=1, steps=10, lr=0.1, beta2=0.99, weight_decay=0.01,
                    warmup=3, schedule="cosine", clip=1.0, save_every=3, micro_tokens=7, device="cpu",
                    data="none")
    return SimpleNamespace(**settings | changes)


def toy(args, stop_at=None):
    """A session whose step fits two tensors to targets of their own, with noise from the loop's generator."""
    s = SimpleNamespace(args=args, ranks=Ranks("toy", "cpu"), stage="toy", say=print,
                        posts=[SimpleNamespace(id=f"post-{i}") for i in range(3)])
    s.run = Run(args, s.ranks)
    params = [torch.nn.Parameter(torch.tensor([2.0, -1.0])), torch.nn.Parameter(torch.full((3, 2), 0.5))]

    def step_fn(step):
        if step == stop_at:
            raise Stop
        loss = sum(((p - step + torch.randn_like(p)) ** 2).sum() for p in params)
        loss.backward()
        tally = Tally()
        tally.add("loss", loss.item())
        tally.add("tokens", 8)
        return tally
    return s, params, step_fn


def finish(s, params, step_fn):
    s.run.finish(train(s, params, step_fn, ["loss"]))
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("stop_at", [1, 3, 7, 9])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, stop_at):
    """Optimizer state, step, schedule and noise all come back; steps after the last checkpoint are redone,
    not logged twice."""
    whole = finish(*toy(run_args(tmp_path / "whole")))
    broken = toy(run_args(tmp_path / "cut"), stop_at)
    with pytest.raises(Stop):
        finish(*broken)
    assert not (tmp_path / "cut" / "done.json").exists()
    resumed = finish(*toy(run_args(tmp_path / "cut", resume=True, save_every=2, micro_tokens=3)))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))
    one, two = metrics(tmp_path / "whole"), metrics(tmp_path / "cut")
    assert [x["step"] for x in two] == [*range(1, 11), 10] and two[-1]["event"] == "end"
    same = ("step", "lr", "loss", "grad_norm", "tokens")
    assert [[x.get(n) for n in same] for x in one] == [[x.get(n) for n in same] for x in two]
    assert [x["lr"] for x in one[:-1]] == [learning_rate(i, 10, 0.1, 3, "cosine") for i in range(10)]
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {"config.json", "metrics.jsonl",
                                                              "done.json"}


def test_the_gradient_is_clipped_and_broken_ones_are_skipped_and_stop_the_run(tmp_path, monkeypatch):
    """A single NaN step would poison every weight after it; the logged norm is the one before clipping."""
    args = run_args(tmp_path / "a", steps=1, clip=0.5)
    s, params, step_fn = toy(args)
    seen, step = [], torch.optim.AdamW.step
    norm = lambda: torch.cat([p.grad.flatten() for p in params]).norm()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (seen.append(norm()), step(self, *a))[1])
    train(s, params, step_fn, ["loss"])
    assert float(seen[0]) == pytest.approx(0.5, rel=1e-4) and metrics(tmp_path / "a")[0]["grad_norm"] > 2

    s, params, good = toy(run_args(tmp_path / "b"))
    broken_steps = {2, 3, 5}

    def sometimes(step):
        tally = good(step)
        if step in broken_steps:
            params[1].grad[0, 0] = math.nan
        return tally
    before = []
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda self, **k: (
        before.append([p.detach().clone() for p in params]),
        [setattr(p, "grad", None) for p in params])[1])
    summary = train(s, params, sometimes, ["loss"])
    assert summary["skipped"] == 3 and len(before) == 10
    for step in range(1, 10):
        moved = not all(torch.equal(a, b) for a, b in zip(before[step], before[step - 1]))
        assert moved == (step not in broken_steps)
    assert [x["grad_norm"] is None for x in metrics(tmp_path / "b")[:-1]] == [
        step in broken_steps for step in range(10)]

    s, params, good = toy(run_args(tmp_path / "loss"))
    start = [p.detach().clone() for p in params]

    def endless(step):
        tally = good(step)                   # a gradient that looks sound
        tally.add("loss", math.inf if step % 2 else math.nan)
        return tally
    with pytest.raises(InputError, match="not finite five times"):
        train(s, params, endless, ["loss"])
    assert all(torch.equal(p, b) for p, b in zip(params, start))
    assert [x["grad_norm"] for x in metrics(tmp_path / "loss")] == [None] * 5 and "NaN" not in (
        tmp_path / "loss" / "metrics.jsonl").read_text()

    s, params, good = toy(run_args(tmp_path / "c"))

    def broken(step):
        (params[0].sum() + params[1].sum() * math.nan).backward()
        return Tally([Visit(1, 0), Visit(2, 0)])
    start = [p.detach().clone() for p in params]
    with pytest.raises(InputError, match="step 5 .*not finite five times .*post-1, post-2"):
        train(s, params, broken, [])
    assert all(torch.equal(p, b) for p, b in zip(params, start))


def test_a_run_folder_is_one_configuration(tmp_path, capsys):
    """Going on with other settings, or over another run, would give a result that no command describes."""
    out, ranks = tmp_path / "run", Ranks("toy", "cpu")
    with pytest.raises(Stop):
        finish(*toy(run_args(out), 5))
    with pytest.raises(InputError, match="--resume"):
        Run(run_args(out), ranks)
    Run(run_args(out, resume=True, checkpointing=True), ranks)  # may change when memory runs out
    Run(run_args(out, resume=True, diversity_schedule="constant"), ranks)      # the folder is older than the flag
    for change in (dict(lr=0.2), dict(seed=2), dict(extra=1), dict(diversity_schedule="held")):
        with pytest.raises(InputError, match=f"{next(iter(change))} = "):
            Run(run_args(out, resume=True, **change), ranks)
    finish(*toy(run_args(out, resume=True, micro_tokens=99)))                  # memory settings may change
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for resume in (False, True):
        s = Session.__new__(Session)
        s.args, s.ranks = run_args(out, resume=resume), ranks
        assert s.open_run() is False and "done" in capsys.readouterr().out     # nothing is redone
    with pytest.raises(InputError, match="lr = "):
        Run(run_args(out, lr=0.2), ranks)  # nor a result of other settings returned
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="holds no run"):
        Run(run_args(tmp_path / "photos"), ranks)
    (tmp_path / "empty").mkdir()
    assert not Run(run_args(tmp_path / "empty"), ranks).done




# ---- What a run survives -------------------------------------------------------------------------

TOY = """
import sys
sys.path.insert(0, "tests")
import test_trainer as t
from data import InputError
args = t.run_args(sys.argv[1], steps=int(sys.argv[2]), resume=True, save_every=2)
try:
    s, params, step = t.toy(args)
    def by_hand(number):
        print("step", number, flush=True)
        if number == int(sys.argv[3]):
            sys.stdin.readline()
        return step(number)
    t.finish(s, params, by_hand)
    print("values", [p.tolist() for p in params])
except InputError as e:
    print("error:", e, file=sys.stderr)
    sys.exit(2)
"""


HANG = 600               # s, after which a process hangs: nothing is as slow as that, however busy the machine


def start_toy(folder, steps=10, wait_at=-1, **more):
    """The toy run as a process of its own; at step `wait_at` it waits for a line on its stdin."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", TOY, str(folder), str(steps), str(wait_at)], text=True,
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


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_and_resume_goes_on(tmp_path, undisturbed, number, code):
    """The night's work is not lost to a scheduler: the step is finished, saved, and said in one line. The step waits for
    the signal, so that the run cannot end before it."""
    process = start_toy(tmp_path / "run", wait_at=3)
    reaches(process, 3)
    process.send_signal(number)
    said, wrong = process.communicate("\n", timeout=HANG)
    assert process.returncode == code and "stopped after step" in said and "Traceback" not in wrong
    assert len(metrics(tmp_path / "run")) == 4
    resumed = start_toy(tmp_path / "run").communicate(timeout=HANG)[0]
    assert values_of(resumed) == undisturbed and resumed.splitlines()[0] == "step 4"


def test_a_folder_has_one_writer_and_its_lock_dies_with_it(tmp_path, undisturbed):
    """Two resumes of one folder both ended with 0, and 555 log lines for 400 steps."""
    first = start_toy(tmp_path / "run", wait_at=0)
    reaches(first, 0)
    second = start_toy(tmp_path / "run")
    said = second.communicate(timeout=HANG)[1].strip().splitlines()[-1]
    assert second.returncode == 2 and "another process works in" in said
    first.kill()
    first.communicate(timeout=HANG)
    resumed = start_toy(tmp_path / "run").communicate(timeout=HANG)[0]
    assert values_of(resumed) == undisturbed and len(metrics(tmp_path / "run")) == 11


TWICE = """
import signal, sys
sys.path.insert(0, "tests")
from types import SimpleNamespace
import ranks
import test_trainer as t
now = [0.0]
ranks.time = SimpleNamespace(monotonic=lambda: now[0])
s, params, step = t.toy(t.run_args(sys.argv[1]))

def interrupted(number):
    for at, sent in ((0.0, signal.SIGINT), (0.9, signal.SIGTERM), (float(sys.argv[2]), signal.SIGINT)):
        now[0] = at
        signal.raise_signal(sent)
        print("goes on at", at, flush=True)
    return step(number)
t.finish(s, params, interrupted)
"""


@pytest.mark.parametrize("at, left", [("1.0", False), ("1.1", True), ("60", True)])
def test_a_second_ctrl_c_leaves_at_once(tmp_path, at, left):
    """Whoever presses it twice does not wait for the end of a step of minutes; a launcher and a shell that both pass the
    same one on, within a second, are not two. The process sends itself the signals, by a clock of its own."""
    process = subprocess.run([sys.executable, "-c", TWICE, str(tmp_path / "run"), at], text=True, timeout=HANG,
                             cwd=Path(trainer.__file__).parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert process.returncode == 130 and "Traceback" not in process.stderr
    assert process.stdout.count("goes on at") == (2 if left else 3)
    assert ("stopped after step 1" in process.stdout) is not left


def broken_off(folder, stop_at):
    with pytest.raises(Stop):
        finish(*toy(run_args(folder, save_every=2), stop_at))


def test_a_damaged_checkpoint_is_never_used(tmp_path, capsys):
    """A changed byte anywhere in the file, header or numbers: the one before it is used, or the start;
    the end is the uninterrupted run's."""
    whole = finish(*toy(run_args(tmp_path / "whole")))
    broken_off(tmp_path / "cut", 9)
    files = {p.name: p.read_bytes() for p in (tmp_path / "cut").iterdir() if p.is_file()}
    good, rng = files["checkpoint.safetensors"], random.Random(0)
    for place in sorted(rng.sample(range(len(good)), 200)):
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        s, params, _ = toy(run_args(tmp_path / "cut", resume=True))
        (tmp_path / "cut" / "checkpoint.safetensors").write_bytes(bad)
        optimizer = torch.optim.AdamW(params, lr=0.1, fused=True)
        assert s.run.restore(params, optimizer) == 6, place
        assert "is damaged" in capsys.readouterr().out
    for bad in (good[:100], good[:-1], b""):
        (tmp_path / "cut" / "metrics.jsonl").write_bytes(files["metrics.jsonl"])
        (tmp_path / "cut" / "checkpoint.safetensors").write_bytes(bad)
        resumed = toy(run_args(tmp_path / "cut", resume=True), 8)
        with pytest.raises(Stop):
            finish(*resumed)
        (tmp_path / "cut" / "checkpoint.safetensors").write_bytes(bad)
    assert all(torch.equal(a, b) for a, b in zip(whole, finish(*toy(run_args(tmp_path / "cut",
                                                                           resume=True)))))


@pytest.mark.skipif(trainer.resource is None, reason="no limits on this system")
def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint_whole(tmp_path, undisturbed):
    broken_off(tmp_path / "run", 5)
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()

    def small():  # no file may grow beyond this: metrics still can, a checkpoint cannot
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        trainer.resource.setrlimit(trainer.resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)
    full = start_toy(tmp_path / "run", preexec_fn=small)
    said = full.communicate(timeout=HANG)[1]
    assert full.returncode == 2 and said.count("error:") == 1 and "make room" in said
    files = [p.read_bytes() for p in (tmp_path / "run").glob("checkpoint*.safetensors")]
    assert before in files
    assert not list((tmp_path / "run").glob("*.partial"))


def test_dead_signals_speak_once_at_once_and_after_a_resume():
    """Gate, reward or D at zero trained nothing, four equal rows in a report and no word about it."""
    dead, said = DeadSignals(), []
    for step in range(12):
        said += [(step, text) for text in dead.warnings_of({"reward": 0.0, "D": 0.5, "zero_variance": 1.0,
                                                     "gated_D": 0.0 if step > 3 else 0.1})]
    assert [(step, text.split()[0]) for step, text in said] == [(4, "reward"), (4, "zero_variance"),
                                                                (8, "gated_D")]
    assert [text for _, text in said] == dead.said
    alive = DeadSignals()
    assert not any(alive.warnings_of({"reward": float(step % 5 == 4)}) for step in range(50))
    assert not any(alive.warnings_of({"quality": float(step % 2)}) for step in range(50))
    open_gate = [text for _ in range(9) for text in alive.warnings_of({"quality": 1.0})]
    assert len(open_gate) == 1 and "perfect" in open_gate[0]


@pytest.mark.parametrize("name, dead", [("D", 0.0), ("gated_D", 0.0), ("quality", 0.0), ("quality", 1.0), ("D_share", 0.0),
                                        ("reward", 0.0), ("reward_std", 0.0), ("advantage", 0.0), ("zero_variance", 1.0)])
def test_every_signal_is_dead_at_its_own_value_alone(name, dead):
    signals = DeadSignals()
    for value in (0.0, 0.25, 0.5, 1.0, 2.5):
        said = [text for _ in range(5) for text in signals.warnings_of({name: value})]
        known = value == dead or name == "quality" and value in (0.0, 1.0)
        assert [text.startswith(f"{name} was {value:g} for 5 steps") for text in said] == [True] * known


def test_posts_are_dealt_to_as_many_ranks_as_there_are():
    session = Session.__new__(Session)
    for world in (1, 2, 3):
        shares = []
        for rank in range(world):
            session.ranks = SimpleNamespace(rank=rank, world=world)
            shares.append(session.deal(["a", "b", "c"]))
        assert all(shares) and sorted(sum(shares, [])) == ["a", "b", "c"]
    session.ranks = SimpleNamespace(rank=0, world=4)
    with pytest.raises(InputError, match="3 posts cannot be dealt to 4 ranks"):
        session.deal(["a", "b", "c"])


def test_a_log_read_again_after_a_resume_goes_on_counting(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "reward": 0.0}) + "\n"
                                                    for i in range(1, 5)))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "metrics.jsonl").write_text('{"step": 1, "grad_norm": null}\n{"step": 2, "grad_norm": 1.0}\n')
    assert trainer.replay(SimpleNamespace(folder=tmp_path / "two"))[1] == 1
    dead, skipped = trainer.replay(SimpleNamespace(folder=tmp_path))
    assert skipped == 0
    assert dead.said == [] and len(dead.warnings_of({"reward": 0.0})) == 1


def test_changed_posts_are_not_resumed(tmp_path):
    """A data file of the same name and other contents went on without a word."""
    file = tmp_path / "posts.jsonl"
    file.write_text("one")
    args = dict(data=str(file))
    with pytest.raises(Stop):
        finish(*toy(run_args(tmp_path / "run", **args), 5))
    file.rename(tmp_path / "moved.jsonl")
    Run(run_args(tmp_path / "run", resume=True, data=str(tmp_path / "moved.jsonl")),
        Ranks("toy", "cpu"))                                                   # only its place changed
    file.write_text("two")
    with pytest.raises(InputError, match="contents of .*posts.jsonl have changed"):
        Run(run_args(tmp_path / "run", resume=True, **args), Ranks("toy", "cpu"))


def test_other_versions_are_said(tmp_path, capsys):
    with pytest.raises(Stop):
        finish(*toy(run_args(tmp_path / "run"), 5))
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    assert config["environment"]["torch"] == torch.__version__ and "commit" in config["environment"]
    config["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(config))
    Run(run_args(tmp_path / "run", resume=True), Ranks("toy", "cpu"))
    assert "torch 1.0 ->" in capsys.readouterr().out


def test_windows_has_neither_locks_nor_peak_memory():
    """`import resource` fails there: the programs must start all the same."""
    code = ("import sys; sys.modules['resource'] = sys.modules['fcntl'] = None\n"
            "import torch, trainer; print(trainer.peak_bytes(torch.device('cpu')))")
    ran = subprocess.run([sys.executable, "-c", code], cwd=Path(trainer.__file__).parent, text=True,
                         capture_output=True, timeout=HANG)
    assert ran.stdout.strip() == "None", ran.stderr


def test_a_base_ends_when_it_has_learnt_enough_and_is_refused_when_it_has_not(tmp_path, capsys):
    """Of three seeds one base of 250 steps had not yet learnt what a scene is: every arm built on it measured
    nothing."""
    assert data.main(["split", "--data", "pocket", "--sizes", "base=40", "--out", str(tmp_path)]) == 0
    run = lambda out, *more: polylora.main(["base", "--data", str(tmp_path / "base.jsonl"), "--out", str(tmp_path / out),
                                            "--batch", "4", "--hidden", "16", "--layers", "1", "--heads", "2",
                                            "--vocab", "270", "--steps", "24", "--lr", "0.01",
                                            "--schedule", "constant", *more])
    assert run("whole") == 0
    losses = [line["ce"] for line in metrics(tmp_path / "whole") if "ce" in line]
    means = [sum(losses[i - 20:i]) / 20 for i in range(20, 25)]
    assert run("some", "--until", str((means[1] + means[2]) / 2)) == 0
    *steps, end = metrics(tmp_path / "some")
    assert end["step"] == len(steps) == 22 and (tmp_path / "some" / "model" / "config.json").exists()
    assert run("none", "--until", "0.01") == 2 and "give it more --steps" in capsys.readouterr().err
    assert not (tmp_path / "none" / "done.json").exists()


def test_a_run_that_was_killed_at_its_very_start_can_begin_again(tmp_path):
    """Between making the folder and writing config.json: it "held no run of this program" for ever after."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".lock", "config.json.host-1-2.partial", "checkpoint.safetensors.host-1-2.partial", ".tmpMknFAs"):
        (folder / name).write_text("{")
    assert len(finish(*toy(run_args(folder)))) == 2
    assert {p.name for p in folder.iterdir()} == {"config.json", "metrics.jsonl", "done.json"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no run of this program"):
        toy(run_args(tmp_path / "other"))


def test_a_run_that_was_killed_at_its_very_end_leaves_nothing_behind(tmp_path):
    """Between done.json and the end of its checkpoints, which stayed for ever."""
    args = run_args(tmp_path / "run")
    broken_off(tmp_path / "run", 5)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("checkpoint*")}
    finish(*toy(run_args(tmp_path / "run", resume=True, save_every=2)))
    for name, content in kept.items():
        (tmp_path / "run" / name).write_bytes(content)
    session = Session.__new__(Session)
    session.args, session.ranks = args, Ranks("toy", "cpu")
    assert len(kept) == 2 and not session.open_run()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl", "done.json"}


@pytest.mark.skipif(sys.platform != "linux", reason="tells files by their descriptors")
def test_log_and_checkpoint_are_on_the_disk_before_the_checkpoint_is_in_its_place(tmp_path, monkeypatch):
    """After a power cut a checkpoint was there whose lines of the log were not, or the name without the numbers."""
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"to {Path(b).name}"), replace(a, b)))
    broken_off(tmp_path / "run", 3)
    log, half, moved = done[-3:]
    assert (log, moved) == ("metrics.jsonl", "to checkpoint.safetensors") and half.startswith("checkpoint.safetensors.")


def test_a_run_that_another_process_has_finished_meanwhile_is_left_alone(tmp_path):
    """Found unfinished, loaded for a minute, and then begun again over the finished one."""
    broken_off(tmp_path / "run", 5)
    late = toy(run_args(tmp_path / "run", resume=True))
    finish(*toy(run_args(tmp_path / "run", resume=True)))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="has just finished"):
        finish(*late)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Of the same shape: it went on from there without a word. Of fewer tensors: a KeyError."""
    broken_off(tmp_path / "one", 5)
    with pytest.raises(Stop):
        finish(*toy(run_args(tmp_path / "two", seed=2, save_every=2), 5))
    other = (tmp_path / "two" / "checkpoint.safetensors").read_bytes()
    (tmp_path / "one" / "checkpoint.safetensors").write_bytes(other)
    with pytest.raises(InputError, match="is of another run"):
        finish(*toy(run_args(tmp_path / "one", resume=True)))
    s, params, step_fn = toy(run_args(tmp_path / "two", seed=2, resume=True))
    with pytest.raises(InputError, match="is of another model"):
        train(s, [*params, torch.nn.Parameter(torch.zeros(1))], step_fn, [])


def test_two_damaged_checkpoints_mean_the_start_and_a_torn_log_is_no_matter(tmp_path, undisturbed):
    whole = finish(*toy(run_args(tmp_path / "whole")))
    broken_off(tmp_path / "cut", 7)
    log = tmp_path / "cut" / "metrics.jsonl"
    for name in ("checkpoint.safetensors", "checkpoint.before.safetensors"):
        path = tmp_path / "cut" / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        log.write_text(log.read_text() + '{"step": 9, "lo')
        broken_off_again = toy(run_args(tmp_path / "cut", resume=True, save_every=100), 7)
        with pytest.raises(Stop):
            finish(*broken_off_again)
        assert [x["step"] for x in metrics(tmp_path / "cut")] == list(range(1, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole, finish(*toy(run_args(tmp_path / "cut", resume=True)))))


def test_ranks_that_see_different_folders_do_not_go_on(tmp_path):
    """A folder that machines do not share: one began at step 6, the other at 0, and their gradients were
    added up."""
    broken_off(tmp_path / "run", 7)
    s, params, step_fn = toy(run_args(tmp_path / "run", resume=True))
    s.ranks.gather = lambda items: [*items, 0]
    with pytest.raises(InputError, match="different checkpoints"):
        train(s, params, step_fn, [])


def test_the_run_folder_holds_the_split_and_other_readers_are_refused(tmp_path):
    posts = tmp_path / "sft.jsonl"
    posts.write_text("one")
    (tmp_path / "split.json").write_text(json.dumps({"seed": 4, "sizes": {"sft": 1}}))
    (tmp_path / "domain.json").write_text(json.dumps({"popularity": 1.5}))
    args = run_args(tmp_path / "run", data=str(posts), save_every=2)
    with pytest.raises(Stop):
        finish(*toy(args, 5))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["split"]["seed"] == 4 and config["seed"] == 1 and config["readers"] == {"popularity": 1.5}
    assert {"commit", "clean", "torch", "python"} <= config["environment"].keys()
    (tmp_path / "domain.json").write_text(json.dumps({"popularity": 2}))
    with pytest.raises(InputError, match="posts of another split"):
        toy(run_args(tmp_path / "run", data=str(posts), resume=True))


def test_a_full_disk_under_safetensors_is_a_sentence(tmp_path):
    """Its error is no OSError."""
    with pytest.raises(InputError, match="make room"), data.beside(tmp_path / "x"):
        raise SafetensorError("No space left on device")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        (disk / "x").write_text("whole")
        with pytest.raises(InputError, match="make room"), data.beside(disk / "x") as new:
            save_file({"a": torch.zeros(100_000)}, new)
        assert [p.name for p in disk.iterdir()] == ["x"] and (disk / "x").read_text() == "whole"
    finally:
        subprocess.run(["umount", disk])


def test_an_error_forges_nothing(capsys):
    """Parts of a message come from the file that it is about."""
    def wrong(args):
        raise InputError("unknown variant `\x1b[31m\u202e`")
    assert data.command(SimpleNamespace(parse_args=lambda argv: SimpleNamespace(run=wrong))) == 2
    assert capsys.readouterr().err == "error: unknown variant `\ufffd[31m\ufffd`\n"


def test_what_the_system_refuses_is_a_sentence(capsys):
    """A full disk under a log of evaluate.py, a folder that may not be read: tracebacks."""
    def wrong(args):
        raise OSError(28, "No space left on device", "runs/a/metrics.jsonl")
    assert data.command(SimpleNamespace(parse_args=lambda argv: SimpleNamespace(run=wrong))) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: [Errno 28] No space left on device: 'runs/a/metrics.jsonl': make room") and said.count("\n") == 1


def test_ctrl_c_before_the_first_step_is_a_word_and_130(capsys):
    def interrupted(args):
        raise KeyboardInterrupt
    parser = SimpleNamespace(parse_args=lambda argv: SimpleNamespace(run=interrupted))
    assert data.command(parser) == 130 and capsys.readouterr().err == "stopped\n"


def test_a_signal_between_two_updates_on_the_same_drafts_waits_for_the_last(tmp_path):
    """Drafts are no part of a checkpoint: a run that was stopped after the first of two updates could not go on."""
    whole = finish(*toy(run_args(tmp_path / "whole", updates=2, save_every=2)))
    session, params, step_fn = toy(run_args(tmp_path / "run", updates=2, save_every=2))

    def interrupted(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_fn(step)
    with pytest.raises(SystemExit) as stopped:
        finish(session, params, interrupted)
    assert stopped.value.code == 143 and len(metrics(tmp_path / "run")) == 6      # steps 5 and 6, which share drafts
    again = finish(*toy(run_args(tmp_path / "run", updates=2, save_every=2, resume=True)))
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
