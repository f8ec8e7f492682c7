"""Runs lists of commands side by side: one program of a list at a time, several lists at once."""
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.files import InputError


def device_count():
    import torch                  # slow to import, and only needed here
    return torch.cuda.device_count()


def default_jobs(lists, gpus):
    """How many lists at once: one a GPU, else one a core; three on two cores all at once."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    places = max(1, (gpus or os.cpu_count() or 1) // ranks)
    if not gpus and ranks == 1 and places < lists < 2 * places:
        return lists
    return min(places, lists)


def shown(words):
    """A command as it can be pasted into a shell."""
    return shlex.join(["python", *map(str, words)])


def say(text):
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


class Job:
    """One list of commands, each [word, ..] with an optional file that says it is done already."""

    def __init__(self, name, commands, env):
        self.name, self.commands, self.env = name, commands, env
        self.count, self.process = 0, None

    def running(self):
        """Starts the next command when the last one has ended. False when all are done; InputError
        when one failed."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return True
            if code:
                rank = os.environ.get("RANK", "0")
                words, _ = self.commands[self.count - 1]
                raise InputError(f"rank {rank}: a command ended with exit code {code}; "
                                 f"to repeat it alone: {shown(words)}")
        self.process = None
        while self.count < len(self.commands):
            words, done = self.commands[self.count]
            self.count += 1       # counts done ones too: every rank must number a command alike
            if done is None or not Path(done).exists():
                self.start(words)
                return True
        return False

    def start(self, words):
        # Ranks of a launch meet in one store, where every command needs a name of its own.
        env = self.env | {"STUDY_STAGE": f"{self.name}-{self.count}-"}
        say(shown(words))
        self.process = subprocess.Popen([sys.executable, *words], env=env)


def run_side_by_side(lists, jobs, gpus):
    """Runs {name: commands}, `jobs` lists at a time. The first that fails ends the others."""
    waiting = []
    for number, (name, commands) in enumerate(lists.items()):
        waiting.append(Job(name, commands, environment(number, gpus)))
    running = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
            running = [job for job in running if job.running()]
            time.sleep(0.1)
    finally:
        end(running)


def end(jobs):
    """Ends what still runs; a program saves before it ends."""
    processes = [job.process for job in jobs if job.process is not None]
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.wait()


def environment(number, gpus):
    """Of the list `number`: one thread where processes share cores, else a GPU of its own."""
    env = dict(os.environ)
    if not gpus:
        env.setdefault("OMP_NUM_THREADS", "1")
    elif env.get("WORLD_SIZE", "1") == "1":
        cards = env.get("CUDA_VISIBLE_DEVICES") or ",".join(str(card) for card in range(gpus))
        cards = cards.split(",")
        env["CUDA_VISIBLE_DEVICES"] = cards[number % len(cards)]
    env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return env


def dry_run(words):
    """Prints what the command would cost; returns its seconds."""
    ran = subprocess.run([sys.executable, *words, "--dry-run"], stdout=subprocess.PIPE, text=True)
    print(ran.stdout, end="", flush=True)
    seconds = re.search(r"^plan .* about ([\d.]+) s$", ran.stdout, re.MULTILINE)
    if ran.returncode or not seconds:
        raise InputError(f"no plan of this command: {shown(words)}")
    return float(seconds[1])
