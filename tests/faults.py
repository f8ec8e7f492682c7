"""Does a run survive being killed? SIGKILL at random instants of both phases of a small run, then
--resume: the final adapter must be the undisturbed run's in every bit.

    python tests/faults.py                     # 50 instants, some minutes
    python tests/faults.py --trials 5 --seed 3

Every second trial has a slow disk: a checkpoint is written in two halves with a pause between them,
and files are moved after a pause, so that many of its kills fall into the writing of a checkpoint.
A third of the trials are killed again while they go on. Linux and macOS: a trial is a forked child,
which saves importing torch.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch
from safetensors.torch import save

import grpo
import polylora
from support import checkpoint
from helpers import write_model, write_tweets

SMALL = "--steps 4 --k 3 --max-new-tokens 4 --save-every 1 --resume --device cpu"
SFT = f"sft {SMALL} --batch 4 --lambda 0.3 --draft-posts 2 --rank 2 --dropout 0.1"
GRPO = f"{SMALL} --batch 2 --updates 2 --save-every 2 --diversity-weight 1"
PHASES = {"sft": (polylora.main, SFT.split()), "grpo": (grpo.main, GRPO.split())}


def slow_disk(pause):
    """Writing a checkpoint and moving a file take their time: only ever called in a child."""
    replace = os.replace

    def slowly(tensors, path, metadata=None):
        content, half = save(tensors, metadata), Path(path).with_name(".tmpA1b2C3")
        with open(half, "wb") as file:                     # as safetensors does it
            for part in (content[:len(content) // 2], content[len(content) // 2:]):
                file.write(part)
                file.flush()
                time.sleep(pause)
        replace(half, path)

    def move(*paths):
        time.sleep(pause)
        replace(*paths)
    checkpoint.save_file, os.replace = slowly, move


def start(work):
    """A child that does `work` and ends with its result; its process id."""
    child = os.fork()
    if child == 0:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        code = 70
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return child


def phase(root, name, out, slow):
    """What a child does: one phase, into `out`."""
    def work():
        torch.set_num_threads(1)
        if slow:
            slow_disk(0.02)
        main, flags = PHASES[name]
        files = ["--model", str(root / "model"), "--data", str(root / f"{name}.jsonl"),
                 "--out", str(out)]
        files += ["--start", str(root / "whole-sft")] if name == "grpo" else []
        return main([*flags, *files])
    return work


def finished(child):
    """Seconds, the code with which it ended being 0."""
    began = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0:
        raise SystemExit(f"a run that nobody killed ended with {code}")
    return time.monotonic() - began


def killed(child, after):
    """Kill it after that many seconds; False when it had ended before."""
    end = time.monotonic() + after
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def result(out):
    """All of a run that must not depend on what happened to it."""
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "peak_bytes", "tokens_per_second")
    return ((out / "adapter" / "adapter_model.safetensors").read_bytes(),
            {p.name for p in out.rglob("*")},
            [{k: v for k, v in line.items() if k not in timed} for line in log[:-1]])


def make_world(root):
    write_tweets(root / "sft.jsonl", 12)
    write_tweets(root / "grpo.jsonl", 10)
    write_model(root / "model")


def trials(root, count, seed):
    """Prints a line a trial; the number of those that ended as the undisturbed run did."""
    finished(start(lambda: make_world(root)))
    whole, seconds, good = {}, {}, 0
    for name in PHASES:
        whole[name] = root / f"whole-{name}"
        seconds[name] = finished(start(phase(root, name, whole[name], False)))
    rng, writing = random.Random(seed), 0
    for number in range(count):
        name, slow = list(PHASES)[number // 2 % 2], number % 2 == 0
        out, kills = root / "trial", 0
        for wanted in range(1, 2 + (number % 3 == 0)):
            while kills < wanted:
                after = rng.uniform(0, (1.3 if slow else 1.0) * seconds[name])
                if killed(start(phase(root, name, out, slow)), after):
                    kills += 1
                    writing += any(map(checkpoint.left_over, out.glob("[.c]*[!k]")))
                else:                                      # it had ended: from the start
                    shutil.rmtree(out)
        finished(start(phase(root, name, out, slow)))
        same = result(out) == result(whole[name])
        good += same
        print(f"{number + 1}: {name}{', slow disk' if slow else ''}, killed {kills} times, "
              f"last after {after:.2f} s: {'the same' if same else 'ANOTHER RESULT'}", flush=True)
        shutil.rmtree(out)
    print(f"{good} of {count} ended as the undisturbed run; "
          f"{writing} kills fell into the writing of a file")
    return good


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--trials", type=int, default=50)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(trials(Path(folder), args.trials, args.seed) != args.trials)


if __name__ == "__main__":
    main()
