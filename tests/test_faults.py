"""What a launch of several ranks survives: ranks that are killed, signals to torchrun, restarts; and the fault
harness of one rank (tests/faults.py) in its short form."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import ranks

ROOT = Path(__file__).resolve().parent.parent
TOY = """
import os, sys, time
from types import SimpleNamespace
import torch
torch.set_num_threads(1)
from data import InputError
from trainer import Ranks, Run, Tally, train

def toy(folder, dies="never", resume=False, pause=0.0):
    '''Six steps of one tensor, whatever the number of ranks; rank, step and restart of "1 3 0" end by SIGKILL.'''
    args = SimpleNamespace(out=str(folder), resume=resume, seed=1, steps=6, lr=0.1, beta2=0.99, weight_decay=0.0, warmup=3,
                           schedule="cosine", clip=100.0, save_every=2, device="cpu", data="none")
    s = SimpleNamespace(args=args, ranks=Ranks("toy", "cpu"), stage="toy", say=lambda text: s.ranks.main and print(text, flush=True))
    s.run, p, done = Run(args, s.ranks), torch.nn.Parameter(torch.tensor([2.0, -1.0])), []

    def step(number):
        if dies == f"{s.ranks.rank} {number} {s.ranks.restarts}":
            os.kill(os.getpid(), 9)
        time.sleep(pause)
        noise = torch.randn(2, generator=torch.Generator().manual_seed(number))
        (((p - noise) ** 2).sum() / s.ranks.world).backward()
        s.ranks.sum_gradients([p])
        done.append(number)
        s.say(f"step {number}")
        return Tally()
    try:
        s.run.finish(train(s, [p], step, []))
        s.ranks.close()
    except InputError as e:
        sys.exit(f"error: {e}")
    return p.tolist(), done
"""
ROOM = {}
exec(TOY, ROOM)
toy = ROOM["toy"]


def script(tmp_path, dies):
    return f"{TOY}\nprint(*toy({str(tmp_path / 'run')!r}, {dies!r}, pause=0.1))"


def by_hand(tmp_path, dies):
    """Two ranks of the toy, started without torchrun, which would end the second one itself."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return store, [subprocess.Popen([sys.executable, "-c", script(tmp_path, dies)], cwd=ROOT, text=True,
                                    env=env | {"RANK": r, "LOCAL_RANK": r}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                   for r in "01"]


def by_torchrun(tmp_path, dies, *options):
    (tmp_path / "toy.py").write_text(script(tmp_path, dies))
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options,
                             str(tmp_path / "toy.py")], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return toy(tmp_path_factory.mktemp("toy") / "run")[0]


@pytest.mark.parametrize("first", [0, 1])
def test_whoever_says_farewell_first_nobody_is_mourned_and_whoever_does_not_is(monkeypatch, first):
    """A rank that had left first took the other's silence for its death, and ended a stage that came after."""
    ended, store = [], {}
    monkeypatch.setattr(ranks, "GRACE", 0.05)
    monkeypatch.setattr(ranks.Watch, "end", lambda watch, rank: (ended.append((watch.ranks.rank, rank)), setattr(watch, "leaving", True)))
    place = SimpleNamespace(set=lambda k, v: store.update({k: v.encode()}), get=store.get)
    pair = lambda: [ranks.Watch(SimpleNamespace(main=r == 0, rank=r, world=2), place, "127.0.0.1") for r in (0, 1)]
    both = pair()
    both[first].farewell()
    time.sleep(0.3)
    both[1 - first].farewell()
    [w.join(5) for w in both]
    assert ended == [] and not any(w.is_alive() for w in both)
    both = pair()
    while not both[0].peers:
        time.sleep(0.01)
    list(both[first].peers)[0].send_bytes(b"bye")                              # of one, and the other breaks off
    time.sleep(0.1)
    connection = list(both[1 - first].peers)[0]
    os.dup2(os.open(os.devnull, os.O_RDONLY), connection.fileno())             # as the system closes it
    both[first].join(5)
    assert (first, 1 - first) in ended


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_is_killed_ends_the_other_which_names_it(tmp_path, undisturbed, dies):
    """The other rank waited for ever, or broke off with a traceback about sockets."""
    store, started = by_hand(tmp_path, f"{dies} 3 0")
    started[dies].wait(timeout=600)
    other = started[1 - dies]
    said = other.communicate(timeout=600)    # where it waits for ever this ends it
    assert started[dies].returncode == -signal.SIGKILL and other.returncode == 1
    assert f"error: rank {dies} has ended before its time" in said[1] and "Traceback" not in said[1]
    assert toy(tmp_path / "run", resume=True) == (undisturbed, [2, 3, 4, 5])


def test_torchrun_restarts_and_resumes_by_itself_and_names_the_rank(tmp_path, undisturbed):
    launch = by_torchrun(tmp_path, "1 3 0", "--max-restarts=1")
    said = launch.communicate(timeout=600)
    assert launch.returncode == 0, said[1][-3000:]
    assert said[0].count(f"{undisturbed} [2, 3, 4, 5]") == 2 and "rank 1 has ended before its time" in said[1]


def test_sigterm_to_torchrun_loses_nothing_but_the_step(tmp_path, undisturbed):
    launch = by_torchrun(tmp_path, "never")
    while not (line := launch.stdout.readline()).startswith("step 2"):
        assert line, launch.stderr.read()[-3000:]
    launch.send_signal(signal.SIGTERM)
    said = launch.communicate(timeout=600)
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert launch.returncode != 0 and f"stopped after step {done};" in said[0] and 3 <= done < 6
    assert toy(tmp_path / "run", resume=True) == (undisturbed, list(range(done, 6)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="trials are forked")
def test_five_kills_at_random_instants_change_no_adapter():
    """The short form of tests/faults.py."""
    ran = subprocess.run([sys.executable, "tests/faults.py", "--trials", "5", "--seed", "1"], cwd=ROOT, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=600)
    assert ran.returncode == 0 and "5 of 5" in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of the address space")
def test_hostile_files_do_no_harm():
    """A hundred mutants of each of six kinds: the short form of tests/hostile.py."""
    ran = subprocess.run([sys.executable, "tests/hostile.py", "--count", "100", "--seed", "1"], cwd=ROOT, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=600)
    assert ran.returncode == 0 and ran.stdout.count(" 0 faults") == 6, ran.stdout + ran.stderr
