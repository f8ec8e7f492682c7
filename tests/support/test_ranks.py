"""Tests of support/ranks.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import data
import trainer
from helpers import NAMES, ROOT, Share, adapter_of
from support.files import InputError
from support import ranks
from support.ranks import Ranks
from support import splits


# ---- What both phases share ----------------------------------------------------------------------

TWO_RANKS = """
import json, sys
import torch
from support.ranks import Ranks
from support.steplog import Tally
ranks = Ranks(sys.argv[1], "cpu")
a, b = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 3))
a.grad = torch.tensor([1.0, 2.0]) * (ranks.rank + 1)
if ranks.rank == 0:
    b.grad = torch.ones(3)
ranks.sum_gradients([a, b])
tally = Tally()
tally.add("loss", 2.0 if ranks.rank == 0 else 0.6, 1 if ranks.rank == 0 else 3)
means = tally.means(ranks, ["loss"])
gathered = ranks.gather(list(range(5))[ranks.rank::ranks.world])
print(json.dumps([a.grad.tolist(), b.grad.tolist(), means, gathered, ranks.sum([1, 2])]))
ranks.barrier()
ranks.close()
"""


@pytest.mark.slow
@pytest.mark.multirank
def test_two_processes_add_their_gradients_and_a_second_stage_can_follow():
    """Gradients are summed, not averaged; a rank without one counts as zero; and a second group
    in the same launch must not read the first one's keys from the launcher's store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(store.port),
                        "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    pipes = dict(cwd=Path(trainer.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                 text=True)
    # new processes, as in train.sh
    for stage in ("sft:a", "grpo:b"):
        ranks = [subprocess.Popen([sys.executable, "-c", TWO_RANKS, stage], **pipes,
                                  env=env | {"RANK": r, "LOCAL_RANK": r}) for r in "01"]
        try:
            said = [p.communicate(timeout=600) for p in ranks]
        finally:
            [p.kill() for p in ranks]
        assert [p.returncode for p in ranks] == [0, 0], said
        # the same sums on both ranks
        for out, _ in said:
            a, b, means, gathered, total = json.loads(out.splitlines()[-1])
            assert (a, b, gathered, total) == ([3, 6], [1, 1, 1], [0, 1, 2, 3, 4], [2, 4])
            assert means == pytest.approx({"loss": 0.65})


def test_alone_too_a_parameter_without_a_gradient_counts_as_zero():
    """AdamW leaves out what has none: after a step that teaches nothing, one rank would differ
    from two."""
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    a.grad = torch.tensor([1.0, 2.0])
    Ranks("x", "cpu").sum_gradients([a, b])
    assert a.grad.tolist() == [1, 2] and b.grad.tolist() == [0, 0]


def test_a_device_without_an_index_is_this_rank_s(monkeypatch):
    """torch.cuda.set_device takes no bare `cuda`; and all ranks of a machine would share GPU 0."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device",
                        lambda device: chosen.append(torch.device(device).index))
    monkeypatch.setenv("LOCAL_RANK", "1")
    devices = [Ranks("x", d).device for d in (None, "cuda", "cuda:3")]
    assert devices == [torch.device("cuda", i) for i in (1, 1, 3)]
    assert chosen == [1, 1, 3] and Ranks("x", "cpu").device.type == "cpu"


# ---- What a run survives -------------------------------------------------------------------------

def test_posts_are_shared_among_all_ranks():
    for world in (1, 2, 3):
        shares = []
        for rank in range(world):
            shares.append(Share(rank, world).share(["a", "b", "c"]))
        assert all(shares) and sorted(sum(shares, [])) == ["a", "b", "c"]
    with pytest.raises(InputError, match="3 posts are too few for 4 ranks"):
        Share(0, 4).share(["a", "b", "c"])


TOY = """
import os, sys, time
from types import SimpleNamespace
import torch
torch.set_num_threads(1)
from support.files import InputError
from support.ranks import Ranks
from support.checkpoint import RunFolder
from support.steplog import Tally
from trainer import train

def toy(folder, dies="never", resume=False, pause=0.0):
    '''Six steps of one tensor, whatever the number of ranks. dies="1 3 0": rank 1 is killed at
    step 3 of its first start.'''
    args = SimpleNamespace(out=str(folder), resume=resume, seed=1, steps=6, lr=0.1, beta2=0.99,
                           weight_decay=0.0, warmup=3, schedule="cosine", clip=100.0,
                           save_every=2, device="cpu", data="none")
    s = SimpleNamespace(args=args, ranks=Ranks("toy", "cpu"), stage="toy")
    s.say = lambda text: s.ranks.main and print(text, flush=True)
    s.run, p, done = RunFolder(args, s.ranks), torch.nn.Parameter(torch.tensor([2.0, -1.0])), []

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
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return store, [subprocess.Popen([sys.executable, "-c", script(tmp_path, dies)], cwd=ROOT,
                                    text=True,
                                    env=env | {"RANK": r, "LOCAL_RANK": r}, stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE)
                   for r in "01"]


def by_torchrun(tmp_path, dies, *options):
    (tmp_path / "toy.py").write_text(script(tmp_path, dies))
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                             "--nproc-per-node=2", *options,
                             str(tmp_path / "toy.py")], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1",
                                              "PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return toy(tmp_path_factory.mktemp("toy") / "run")[0]


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_ends_cleanly_is_not_reported_and_others_are(monkeypatch, first):
    """A rank that had left first took the other's silence for its death, and ended a stage that
    came after."""
    ended, store = [], {}
    monkeypatch.setattr(ranks, "GRACE", 0.05)
    monkeypatch.setattr(ranks.PeerMonitor, "stop_process",
                        lambda watch, rank: (ended.append((watch.ranks.rank, rank)),
                                             setattr(watch, "leaving", True)))
    place = SimpleNamespace(set=lambda k, v: store.update({k: v.encode()}), get=store.get)
    pair = lambda: [ranks.PeerMonitor(SimpleNamespace(main=r == 0, rank=r, world=2), place,
                                      "127.0.0.1") for r in (0, 1)]
    both = pair()
    both[first].announce_exit()
    time.sleep(0.3)
    both[1 - first].announce_exit()
    [w.join(5) for w in both]
    assert ended == [] and not any(w.is_alive() for w in both)
    both = pair()
    while not both[0].peers:
        time.sleep(0.01)
    # of one, and the other breaks off
    list(both[first].peers)[0].send_bytes(b"bye")
    time.sleep(0.1)
    connection = list(both[1 - first].peers)[0]
    # as the system closes it
    os.dup2(os.open(os.devnull, os.O_RDONLY), connection.fileno())
    both[first].join(5)
    assert (first, 1 - first) in ended


@pytest.mark.slow
@pytest.mark.multirank
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


@pytest.mark.slow
@pytest.mark.multirank
def test_torchrun_restarts_and_resumes_by_itself_and_names_the_rank(tmp_path, undisturbed):
    launch = by_torchrun(tmp_path, "1 3 0", "--max-restarts=1")
    said = launch.communicate(timeout=600)
    assert launch.returncode == 0, said[1][-3000:]
    assert (said[0].count(f"{undisturbed} [2, 3, 4, 5]") == 2
            and "rank 1 has ended before its time" in said[1])


@pytest.mark.slow
@pytest.mark.multirank
def test_sigterm_to_torchrun_loses_nothing_but_the_step(tmp_path, undisturbed):
    launch = by_torchrun(tmp_path, "never")
    while not (line := launch.stdout.readline()).startswith("step 2"):
        assert line, launch.stderr.read()[-3000:]
    launch.send_signal(signal.SIGTERM)
    said = launch.communicate(timeout=600)
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert launch.returncode != 0 and f"stopped after step {done};" in said[0] and 3 <= done < 6
    assert toy(tmp_path / "run", resume=True) == (undisturbed, list(range(done, 6)))


SHARDED = """
import json, os, sys
import torch, torch.distributed as dist
import engine
import evaluate
import grpo
import polylora
from support import ranks as support_ranks
import trainer
torch.set_num_threads(1)
world, root = json.loads(sys.argv[1]), sys.argv[2]
spread = []
def shard(model, ranks):
    support_ranks.shard(model, ranks)
    spread.append([p.to_local().numel() / p.numel() for n, p in model.named_parameters()
                   if n.endswith("q_proj.weight")])
trainer.shard = shard
generate = engine.generate
def together(model, *a, **k):
    samples, ranks = generate(model, *a, **k), torch.ones(1)
    dist.all_reduce(ranks)                       # whatever is done in common next
    assert ranks == 2
    return samples
trainer.generate = together
for how in ([], ["--shard", "--checkpointing"]):
    name = "sharded" if how else "whole"
    sft, out = f"{root}/{name}-sft", f"{root}/{name}-grpo"
    few = ["--micro-tokens", "40", "--max-rows", "4", "--max-new-tokens", "5", "--steps", "2",
           "--gate", "likelihood", "--warmup", "0", "--lr", "0.01", *how]
    assert polylora.main(["sft", "--model", world["model"], "--data", world["sft"], "--out", sft,
                          "--batch", "5", "--k", "3", "--draft-posts", "3", "--rank", "2",
                          "--lambda", "0.3", *few]) == 0
    assert grpo.main(["--start", sft, "--data", world["grpo"], "--out", out, "--batch", "3",
                      "--k", "4", "--updates", "2", "--beta", "0.04",
                      "--diversity-weight", "1", *few]) == 0
    assert evaluate.main(["measure", sft, out, "--data", world["eval"], "--n", "10",
                          "--max-new-tokens", "5", *how[:1]]) == 0
assert len(spread) == 5 and all(0.4 < x < 0.6 for parts in spread for x in parts), spread
"""


@pytest.mark.slow
@pytest.mark.multirank
def test_sharded_weights_give_the_same_results(world, tmp_path):
    """FSDP2 over two ranks that have unequal numbers of micro-batches, of decoding steps, of
    posts: nobody waits for ever, and adapters and drafts are those of whole weights."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}
    job = [sys.executable, "-c", SHARDED, json.dumps({n: str(p) for n, p in world.items()}),
           str(tmp_path)]
    ranks = [subprocess.Popen(job, cwd=ROOT, env=env | {"RANK": r, "LOCAL_RANK": r},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True) for r in "01"]
    try:
        said = [p.communicate(timeout=600)[0] for p in ranks]
    finally:
        [p.kill() for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], said[0][-3000:] + said[1][-3000:]
    for stage in ("sft", "grpo"):
        whole, sharded = (adapter_of(tmp_path / f"{how}-{stage}") for how in ("whole", "sharded"))
        assert max(float((whole[n] - sharded[n]).abs().max()) for n in whole) < 2e-4
        assert max(float(t.abs().max()) for n, t in whole.items() if "lora_B" in n) > 0.01
        texts = []
        for how in ("whole", "sharded"):
            written = json.loads((tmp_path / f"{how}-{stage}" / "evaluation.json").read_text())
            texts.append([record["drafts"] for record in written["records"]])
        assert texts[0] == texts[1]


@pytest.mark.multirank
@pytest.mark.parametrize("variables", [{}, {"RANK": "", "WORLD_SIZE": ""}, {"RANK": "0"},
                                       {"WORLD_SIZE": "1"}, {"RANK": " 0 ", "WORLD_SIZE": "1"},
                                       {"LOCAL_RANK": "", "TORCHELASTIC_RESTART_COUNT": ""},
                                       {"LOCAL_RANK": "3"}], ids=str)
def test_a_process_alone_is_the_first_of_one(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    alone = Ranks("stage", "cpu")
    assert (alone.rank, alone.world, alone.main) == (0, 1, True)


@pytest.mark.multirank
@pytest.mark.parametrize("variables, match", [
    ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 and no MASTER_ADDR.*torchrun.*unset"),
    ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}, "no MASTER_PORT"),
    ({"RANK": "3"}, "RANK=3 and WORLD_SIZE=1"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
    ({"RANK": "0.0"}, "RANK is '0.0'"),
    ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT is 'x'"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
     "MASTER_PORT is 'http'")], ids=str)
def test_leftovers_of_another_launch_are_a_sentence(variables, match, monkeypatch):
    """A rank other than 0 that is alone would train and write nothing."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=match):
        Ranks("stage", "cpu")


@pytest.mark.multirank
def test_ranks_that_never_come_are_a_sentence(monkeypatch):
    """A container of a cluster sets all four variables, and nobody starts the others."""
    with socket.socket() as taken:           # a port that is in use: the store cannot be made
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"),
                            ("MASTER_PORT", str(taken.getsockname()[1]))):
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match="did not meet.*torchrun.*unset WORLD_SIZE"):
            Ranks("stage", "cpu")


def test_more_ranks_than_gpus_are_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="LOCAL_RANK is 2.*2 GPUs"):
        Ranks("stage", "cuda")


@pytest.mark.parametrize("name, match", [
    ("cuda", "4 ranks were started on this machine, which has 2 GPUs.*--nproc-per-node=2"),
    (None, "4 ranks were started"), ("cuda:0", "all 4 ranks of this machine on one GPU")])
def test_every_rank_says_that_there_are_more_ranks_than_gpus(monkeypatch, name, match):
    """Ranks that have a GPU waited five minutes for those that have none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(InputError, match=match):
        ranks.choose_device(name)
    assert ranks.choose_device("cpu").type == "cpu"


def test_a_gpu_without_bfloat16_is_a_sentence(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for name in ("auto", "bfloat16"):
        with pytest.raises(InputError, match="Tesla T4.*7.5.*bfloat16.*--dtype float32"):
            ranks.choose_dtype(name, gpu)
    assert ranks.choose_dtype("float32", gpu) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert ranks.choose_dtype("auto", gpu) == torch.bfloat16
    cpu = torch.device("cpu")
    assert [ranks.choose_dtype(n, cpu) for n in ("auto", "bfloat16")] == [torch.float32,
                                                                         torch.bfloat16]


# ---- How ranks meet ------------------------------------------------------------------------------

LATE = """
import sys, time
from datetime import timedelta
from functools import partial
import torch.distributed as dist
from support.ranks import Ranks
dist.TCPStore = partial(dist.TCPStore, timeout=timedelta(seconds=1))     # torch's own: 300 s
ranks = Ranks("late", "cpu")
store = dist.distributed_c10d._get_default_store()
if ranks.rank == 1:
    time.sleep(2.5)                              # a download
    store.set("address", "here")
print(store.get("address").decode())             # as NCCL's first collective does
ranks.barrier()
ranks.close()
"""


@pytest.mark.slow
@pytest.mark.multirank
def test_ranks_wait_in_the_store_longer_than_its_own_limit():
    """NCCL asks the store for the other ranks' addresses: it gave up after 300 s, whatever the
    process group's timeout."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
                        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    two = [subprocess.Popen([sys.executable, "-c", LATE], cwd=ROOT, text=True,
                            env=env | {"RANK": r, "LOCAL_RANK": r}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE) for r in "01"]
    try:
        said = [p.communicate(timeout=120) for p in two]
    finally:
        [p.kill() for p in two]
    assert [out.strip() for out, _ in said] == ["here", "here"], said[0][1][-2000:]


@pytest.mark.parametrize("device, backend", [("cuda", "nccl"), ("cpu", "gloo")])
def test_nccl_is_told_its_gpu_and_connects_at_once(monkeypatch, device, backend):
    told = {}
    for name in ("is_available", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: True)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"),
                        ("MASTER_ADDR", "here"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    store = SimpleNamespace(set_timeout=lambda limit: told.update(limit=limit))
    monkeypatch.setattr(dist, "TCPStore", lambda *a, **k: None)
    monkeypatch.setattr(dist, "PrefixStore", lambda *a: store)
    monkeypatch.setattr(ranks, "PeerMonitor", lambda *a: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: told.update(k, backend=a[0]))
    Ranks("stage", device)
    gpu = torch.device("cuda", 1) if device == "cuda" else None
    assert (told["backend"], told["device_id"]) == (backend, gpu)
    assert told["limit"] == told["timeout"] and told["timeout"].days == 1


def test_a_rank_without_memory_does_not_wait_for_a_lost_peer(monkeypatch):
    """Its own failure is not a peer's: it was said ten seconds late."""
    waited = []
    monkeypatch.setattr(ranks.time, "sleep", waited.append)
    alone = Ranks("stage", "cpu")
    alone.monitor = object()
    for error, seconds in ((torch.OutOfMemoryError, []), (RuntimeError, [5 * ranks.GRACE])):
        with pytest.raises(error), alone.together():
            raise error("CUDA out of memory")
        assert waited == seconds


@pytest.mark.multirank
@pytest.mark.parametrize("variables", [{"RANK": "3"}, {"RANK": ""}, {"RANK": "", "WORLD_SIZE": ""}],
                         ids=str)
def test_a_split_does_not_wait_for_a_first_rank_that_nobody_starts(variables, tmp_path,
                                                                   monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(splits, "await_file", lambda *a, **k: pytest.fail("waits for another rank"))
    assert data.main(["split", "--data", "pocket", "--sizes", "a=4,b=3",
                      "--out", str(tmp_path / "s")]) == 0
    assert (tmp_path / "s" / "a.jsonl").exists()


@pytest.mark.slow
@pytest.mark.multirank
def test_a_command_ends_with_a_sentence_and_names_no_empty_rank(tmp_path):
    for leftover in ({"WORLD_SIZE": "2", "RANK": "0"}, {"RANK": "", "WORLD_SIZE": "x"}):
        env = {k: v for k, v in os.environ.items() if k not in NAMES} | leftover
        posts = tmp_path / "posts.jsonl"
        posts.write_text('{"id": "1", "post": "my bus is late", "reply": "mine too"}\n')
        ran = subprocess.run([sys.executable, "polylora.py", "base", "--data", str(posts),
                              "--out", str(tmp_path / "o"), "--steps", "1"],
                             cwd=ROOT, env=env, capture_output=True, text=True)
        assert (ran.returncode == 2 and "Traceback" not in ran.stderr and "unset" in ran.stderr
                and "(rank" not in ran.stderr)
