"""What both phases share: random streams, the run folder, the training loop, the session.

A phase is a function `step(number)` that leaves the step's gradient on the parameters; `train` is
the loop around it. What a run must survive stands here too: a checkpoint is checksummed and the
one before it kept, a signal ends a run after its step, a folder has one writer. Random numbers
need no saving: each is a function of (seed, stage, step, post, draft), whatever rank or batch it
is drawn in; dropout's alone hang on the step, the rank and its micro-batches."""

import argparse
import functools
import hashlib
import json
import math
import os
import random
import re
import signal
import sys
import time
from array import array
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

import data
from data import InputError, base_hash, beside, fetch, read_json, write_json, write_text
from files import (
    WHOLE_HASH, Tracker, adapter_hash, chat_hash, combined_hash, content_hash, duration, environment,
    file_hash, recorded_hash)
from generate import generate, sampling_of
from hub import tensor_files
from model import Config, Qwen3, chat_format, pack, token_logprobs
from ranks import Ranks, Signals, shard

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither: no lock on a folder, no peak memory of a CPU run
    fcntl = resource = None


# ---- Random streams and batches ------------------------------------------------------------------

def seed_of(*parts):
    """A 63-bit seed from anything printable: the same on every machine and Python,
    unlike hash()."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Visit(NamedTuple):
    """Post `index` in its `epoch`-th pass over the file. A small file is passed more than once
    within a step; a random stream that hangs on the visit, not on the post, never repeats."""
    index: int
    epoch: int


@functools.lru_cache(maxsize=4)
def epoch_order(count, seed, epoch):
    """The places 0 .. count - 1 as the epoch visits them. Kept: a million take a second."""
    order = array("L", range(count))
    random.Random(seed_of(seed, "epoch", epoch)).shuffle(order)
    return order


def batch_visits(count, size, step, seed):
    """The `size` visits of step `step`; each epoch goes over all `count` posts in its order."""
    epochs = (divmod(draw, count) for draw in range(step * size, (step + 1) * size))
    return [Visit(epoch_order(count, seed, epoch)[place], epoch) for epoch, place in epochs]


# ---- The run folder ------------------------------------------------------------------------------

class Tally:
    """Sums and counts of named numbers over micro-batches; `means` adds all ranks' and divides
    once. `visits`: the step's, over all ranks, for a message that names them."""

    def __init__(self, visits=()):
        self.sums, self.visits = {}, visits

    def add(self, name, total, count=1):
        old = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (old[0] + float(total), old[1] + float(count))

    def means(self, ranks, names):
        """The global means of `names`; one that nothing was added to on any rank is left out."""
        flat = ranks.sum([x for n in names for x in self.sums.get(n, (0.0, 0.0))])
        return {n: flat[2 * i] / flat[2 * i + 1] for i, n in enumerate(names) if flat[2 * i + 1]}


def peak_bytes(device):
    """Peak memory of this process, of the GPU's allocator or resident; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def left_over(path):
    """Is this what a process that was killed leaves? safetensors writes to .tmpXXXXXX first."""
    return bool(re.fullmatch(r"\.lock|.*\.partial|\.tmp\w{6}", path.name))


def model_hash(path, revision):
    """The hash of a checkpoint's weights: config.json and every byte of its tensor files, read once
    a process (some 0.8 s a GB, 12 s of an 8B model). Its tokenizer and template: chat_hash."""
    folder = fetch(path, revision)
    files = [(file.name, content_hash(file)) for file in tensor_files(folder)]
    return combined_hash(content_hash(folder / "config.json"), files)


def start_folder(start):
    """The adapter's folder of a run, or the folder itself where it holds an adapter."""
    inside = Path(start) / "adapter"
    return inside if inside.is_dir() else Path(start)


class Input(NamedTuple):
    """Something that a run is made from beside its flags and posts, and that may change under the
    same name."""
    hash: Callable       # the run's flags -> a hash of all its bytes
    about: str           # what it is, in a message
    flag: str            # the flag that names it


INPUTS = {  # name -> Input; a run records the hash of each that it reads as NAME_hash
    "model": Input(lambda args: model_hash(args.model, args.revision), "base", "model"),
    "model_chat": Input(lambda args: chat_hash(args.model, args.revision),
                        "tokenizer or chat template", "model"),
    "start": Input(lambda args: adapter_hash(start_folder(args.start)), "starting adapter",
                   "start"),
    "embedder": Input(lambda args: checkpoint_hash(args.embedder), "embedder", "embedder"),
}


def checkpoint_hash(path, revision=None):
    """One hash of a checkpoint's weights, tokenizer and chat template."""
    return combined_hash(model_hash(path, revision), chat_hash(path, revision))


class Run:
    """A run folder, which is one configuration: config.json (what was asked for, and a hash of all
    that the run is made from), metrics.jsonl (a line a step), checkpoint.safetensors and the one
    before it (to go on from), the result (adapter/ or a model), done.json (written last).

    A folder is finished, or can be gone on with, only for the same flags and the same inputs: the
    posts, the base, its tokenizer and chat template, the starting adapter and whatever else is in
    INPUTS. So a chain is never mixed from an old stage and a new one."""

    # What may differ between a run and its resumption: the result is the same.
    VOLATILE = ("out", "resume", "save_every", "micro_tokens", "max_rows", "command", "run",
                "device", "no_graphs", "shard", "checkpointing", "data", "environment", "split",
                "readers", "allow_code_execution", "track")
    # Later flags, left out where they are as it always was: older folders stay valid.
    LATER = {"diversity_schedule": "constant", "start": None}

    def __init__(self, args, ranks):
        self.args, self.folder, self.ranks = args, Path(args.out), ranks
        self.lock = self.tracker = None
        self.config = {k: v for k, v in vars(args).items()
                       if not callable(v) and (k, v) not in self.LATER.items()}
        beside_data = (Path(args.data).parent / f"{name}.json" for name in ("split", "domain"))
        split, readers = (read_json(p) if p.exists() else None for p in beside_data)
        self.config |= {"version": 2, "data_hash": file_hash(args.data), "split": split,
                        "readers": readers, "environment": environment()}
        self.done = (self.folder / "done.json").exists()
        if (self.folder / "config.json").exists():
            self.compare(read_json(self.folder / "config.json"))
            if not (self.done or args.resume or ranks.restarts):
                raise InputError(f"{self.folder} holds an unfinished run: add --resume to go on, "
                                 "or choose another --out")
        elif self.folder.exists() and not all(map(left_over, self.folder.iterdir())):
            raise InputError(f"{self.folder} exists and holds no run of this program: choose "
                             "another --out")

    def compare(self, old):
        """InputError when the folder's configuration or inputs are others; a note when only
        versions are."""
        hashes = {f"{name}_hash" for name in INPUTS}
        for key in sorted((old.keys() | self.config.keys()) - hashes):
            before, now = (c.get(key, self.LATER.get(key, False)) for c in (old, self.config))
            if key in self.VOLATILE or before == now:
                continue
            if key == "data_hash":
                raise InputError(f"{self.folder} holds a run on other posts: the contents of "
                                 f"{self.config['data']} have changed: choose another --out")
            phase = self.config.get("command", "grpo")
            longer = self.done and key in ("steps", "epochs") and phase in ("sft", "grpo")
            hint = f"; to train its adapter further start from it: --start {self.folder}"
            raise InputError(f"{self.folder} holds a run with {key} = {before!r}, now {now!r} is "
                             "asked for: choose another --out, or delete that folder"
                             + (hint if longer else ""))
        if old.get("readers", self.config["readers"]) != self.config["readers"]:
            raise InputError(f"{self.folder} holds a run on posts of another split (see "
                             f"domain.json beside {self.config['data']}): choose another --out")
        self.compare_inputs(old)
        before, now = old.get("environment") or {}, self.config["environment"]
        changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
        if changed and not self.done and self.ranks.main:
            said = data.printable(", ".join(changed))
            print(f"{self.folder} was begun under other versions: {said}", flush=True)

    def compare_inputs(self, old):
        """InputError when an input that the folder's run has read is another one by now."""
        recorded = [name for name in INPUTS if f"{name}_hash" in old]
        older = [name for name in recorded if not str(old[f"{name}_hash"]).startswith(WHOLE_HASH)]
        if older and not self.done:
            raise InputError(f"{self.folder} was begun by an older version, which did not record "
                             "all that a run is made from: choose another --out, or delete that "
                             "folder")
        if older and self.ranks.main:
            print(f"{self.folder} is of an older version: whether its {INPUTS[older[0]].about} is "
                  "still the same cannot be checked", flush=True)
        for name in recorded:
            if name not in older:
                self.compare_input(name, old[f"{name}_hash"], INPUTS[name].hash(self.args))

    def compare_input(self, name, before, now):
        if before != now:
            of = INPUTS[name]
            raise InputError(f"{self.folder} holds a run on another {of.about}: the contents of "
                             f"{self.config[of.flag]} have changed: choose another --out, or "
                             "delete that folder")

    def made_from(self, *names):
        """Record the hashes of INPUTS that this run reads; InputError where the run was begun with
        others."""
        path = self.folder / "config.json"
        old = read_json(path) if path.exists() else {}
        for name in names:
            now = INPUTS[name].hash(self.args)
            before = old.get(f"{name}_hash", now)
            if str(before).startswith(WHOLE_HASH):
                self.compare_input(name, before, now)
            self.config[f"{name}_hash"] = now

    def __enter__(self):
        """Take the folder and write the configuration: once everything was read and found right, so
        that a mistake leaves nothing behind."""
        self.ranks.barrier()  # all have looked before one writes
        if self.ranks.main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = open(self.folder / ".lock", "w")
                if fcntl is not None:  # the lock dies with its process, however that ends
                    fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process works in {self.folder}: wait for it, or stop "
                                 "it") from None
            except OSError as e:
                raise InputError(f"{self.folder} cannot be written ({e}): choose another "
                                 "--out") from None
            if not self.done and (self.folder / "done.json").exists():
                raise InputError(f"another process has just finished {self.folder}: start again")
            for half in filter(left_over, self.folder.rglob("*.*")):
                if half.name != ".lock":
                    half.unlink(missing_ok=True)
            write_json(self.folder / "config.json", self.config)
            if self.config.get("track"):
                self.tracker = Tracker(self.config["track"], self.folder, self.config)
        return self

    def __exit__(self, error, *details):
        if error is not None and self.lock is not None:
            self.lock.close()

    def log(self, line):
        if self.ranks.main:
            try:
                with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
                    f.write(json.dumps(line) + "\n")
            except OSError as e:
                raise InputError(f"{self.folder}/metrics.jsonl cannot be written ({e}): make room, "
                                 "then go on with --resume") from None
            if self.tracker:
                self.tracker.log(line)

    def name(self):
        """What tells this configuration from others: a checkpoint of another is never used."""
        fixed = {k: v for k, v in self.config.items() if k not in self.VOLATILE and v}
        return f"{seed_of(json.dumps(fixed, sort_keys=True)):x}"

    def save(self, step, params, optimizer):
        """The parameters and AdamW's state, with a checksum; the checkpoint before it is kept."""
        if not self.ranks.main:
            return
        tensors, updates = {}, 0
        for i, p in enumerate(params):
            state = optimizer.state.get(p)
            tensors[f"{i}.value"] = p.detach().cpu().contiguous()
            if state:
                updates = int(state["step"])
                for name in ("exp_avg", "exp_avg_sq"):
                    tensors[f"{i}.{name}"] = state[name].cpu().contiguous()
        about = {"step": str(step), "updates": str(updates), "run": self.name()}
        path, log = self.folder / "checkpoint.safetensors", self.folder / "metrics.jsonl"
        if log.exists():                     # its lines up to this step go with the checkpoint
            with open(log, "rb") as file:
                os.fsync(file.fileno())
        with beside(path) as new:
            save_file(tensors, new, metadata=about | {"checksum": checksum(tensors, about)})
            if path.exists():
                os.replace(path, self.folder / "checkpoint.before.safetensors")

    def restore(self, params, optimizer):
        """Load the newest checkpoint that is whole; returns the step to go on from. Later metrics
        lines are dropped."""
        found = None
        for name in ("checkpoint.safetensors", "checkpoint.before.safetensors"):
            found = found or self.read_checkpoint(self.folder / name)
        log = self.folder / "metrics.jsonl"
        if found is None:
            self.ranks.barrier()  # all have looked before one deletes
            if self.ranks.main:
                log.unlink(missing_ok=True)
            return 0
        tensors, step, updates = found
        for i, p in enumerate(params):
            value = tensors.get(f"{i}.value")
            if value is None or value.shape != p.shape:
                raise InputError(f"the checkpoint in {self.folder} is of another model: delete "
                                 f"that folder")
            p.data.copy_(value)
            if f"{i}.exp_avg" in tensors:
                counter = p.device if optimizer.defaults["fused"] else "cpu"
                optimizer.state[p] = {"step": torch.tensor(float(updates), device=counter),
                                      **{n: tensors[f"{i}.{n}"].to(p.device)
                                         for n in ("exp_avg", "exp_avg_sq")}}
        if self.ranks.main and log.exists():  # a line a step; a kill may have torn a later one
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(log, "".join(lines[:step]))
        return step

    def read_checkpoint(self, path):
        """(tensors, step, updates) of a checkpoint; None, with a word, where it is not whole."""
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as f:
                about, tensors = f.metadata() or {}, {n: f.get_tensor(n) for n in f.keys()}
            said = about.pop("checksum", "")
            whole = said == checksum(tensors, about)
            reason = "its checksum is wrong"
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
            whole, reason = False, str(e)
        if whole and about.get("run", self.name()) != self.name():
            raise InputError(f"{path} is of another run: delete it, or choose another --out")
        if whole:
            return tensors, int(about["step"]), int(about["updates"])
        if self.ranks.main:
            print(f"{path} is damaged ({reason}): an older checkpoint is used, or the start",
                  flush=True)
        return None

    def finish(self, summary):
        self.ranks.barrier()
        if self.ranks.main:
            write_json(self.folder / "done.json", summary)
            self.tidy()
            self.lock.close()

    def tidy(self):
        """Take away what a finished run needs no more; again, where a kill came between."""
        for name in ("checkpoint.safetensors", "checkpoint.before.safetensors", ".lock"):
            (self.folder / name).unlink(missing_ok=True)


def checksum(tensors, about):
    """sha256 over names, shapes, bytes and the text metadata: safetensors has none of its own."""
    total = hashlib.sha256(repr(sorted(about.items())).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


# ---- The loop ------------------------------------------------------------------------------------

def learning_rate(step, steps, peak, warmup, schedule):
    """Linear warm-up over `warmup` steps, then a cosine to zero, or constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak if schedule == "constant" else peak * 0.5 * (1 + math.cos(math.pi * done))


class Stall(NamedTuple):
    """A number of a log that has stopped telling anything: it is from `low` to `high`."""
    name: str
    low: float
    high: float
    meaning: str         # what that means, and what to do about it

    def holds(self, numbers):
        return self.name in numbers and self.low <= numbers[self.name] <= self.high

    def value(self):
        if self.low == self.high:
            return f"{self.low:g}"
        return f"{self.low:g} or more" if self.high == 1 else f"{self.high:g} or less"


NEARLY_ALL = 0.9         # of the completions: the few others teach and show next to nothing
# Causes first: what stops the completions, then what follows from it.
STALLS = (
    Stall("truncated", NEARLY_ALL, 1.0,
          "completions are cut off before their end: raise --max-new-tokens"),
    Stall("empty", NEARLY_ALL, 1.0,
          "completions are empty: check that the chat template and the tokenizer are the model's"),
    Stall("identical", 1.0, 1.0,
          "all completions of a post are one text: raise --temperature, or train less"),
    Stall("valid", 0.0, 0.0,
          "no completion is right: check the posts, their verifier and the chat template"),
    Stall("passed", 0.0, 0.0,
          "no completion passes: check the reward, its bar and the chat template"),
    Stall("D", 0.0, 0.0, "all drafts of a post are alike"),
    Stall("gated_D", 0.0, 0.0, "the gate lets no diversity through"),
    Stall("quality", 0.0, 0.0, "the gate finds every draft worthless"),
    Stall("quality", 1.0, 1.0, "the gate finds every draft perfect, and tells none from another"),
    Stall("D_share", 0.0, 0.0, "D has no part in the gradient"),
    Stall("reward", 0.0, 0.0, "every reward is 0"),
    Stall("reward_std", 0.0, 0.0, "rewards of a post are all equal"),
    Stall("advantage", 0.0, 0.0, "every advantage is 0"),
    Stall("zero_variance", 1.0, 1.0, "every group's rewards are all equal"))


def stalled(numbers):
    """The warnings that the means of a whole measurement give cause to."""
    return [f"{stall.name} is {numbers[stall.name]:.3g}: {stall.meaning}" for stall in STALLS
            if stall.holds(numbers)]


class DeadSignals:
    """Warns when a number of STALLS has stood still for five steps. Reading the log again after a
    resume restores it."""

    def __init__(self, steps=5):
        self.steps, self.count = steps, {}
        self.said = []

    def warnings_of(self, line):
        """The sentences that this line of the log gives cause to say, each once a run."""
        fresh = []
        for stall in STALLS:
            if stall.name in line:
                self.count[stall] = self.count.get(stall, 0) + 1 if stall.holds(line) else 0
                text = (f"{stall.name} was {stall.value()} for {self.steps} steps: "
                        f"{stall.meaning}")
                if self.count[stall] == self.steps and text not in self.said:
                    fresh.append(text)
                    self.said.append(text)
        return fresh


def tally_completions(tally, finished, texts):
    """Add the shares of completions that were cut off and that are empty, and of posts whose
    completions are all one text. finished, texts: P lists of k."""
    every = [done for group in finished for done in group]
    flat = [text for group in texts for text in group]
    tally.add("truncated", every.count(False), len(every))
    tally.add("empty", sum(not text.strip() for text in flat), len(flat))
    several = [group for group in texts if len(group) > 1]
    identical = sum(len(set(map(data.normalise, group))) == 1 for group in several)
    tally.add("identical", identical, len(several))


def train(session, params, step_fn, names, shaping=None):
    """The loop of every phase. step_fn(step) leaves the whole step's gradient, summed over ranks,
    on `params` and returns a Tally; `names` are the means to log. A step whose gradient or loss is
    not finite is skipped and counted; five in a row stop the run. A base ends earlier, once it has
    learnt as much as --until asks (learnt_enough). `shaping`: what an adapter asks for before and
    after each update (adapters.Budget). Returns the line that ends the log."""
    args, ranks = session.args, session.ranks
    run = session.run
    kept = [*params, *(shaping.kept if shaping else ())]
    with run, Signals() as signals, ranks.together():
        optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, args.beta2),
                                      weight_decay=args.weight_decay, fused=True)
        first, began = run.restore(kept, optimizer), time.perf_counter()
        if set(ranks.gather([first])) != {first}:
            raise InputError(f"the ranks find different checkpoints in {run.folder}: it must be "
                             "one folder that all machines share")
        (dead_signals, skipped), tokens = replay(run), 0
        in_a_row = 0
        bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc=run.folder.name,
                   unit="step", disable=not ranks.main,
                   mininterval=0.5 if sys.stderr.isatty() else 15)
        for step in bar:
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup, args.schedule)
            torch.manual_seed(seed_of(args.seed, "dropout", step, ranks.rank))
            tally = step_fn(step)
            if shaping:
                shaping.before()
            norm = float(torch.nn.utils.clip_grad_norm_(params, args.clip))
            means = tally.means(ranks, names)  # all ranks', so that all skip a step or none
            losses = [means[n] for n in ("loss", "ce") if n in means]
            finite = all(map(math.isfinite, (norm, *losses)))
            if finite:
                optimizer.step()
                if shaping:
                    shaping.after(step)
            optimizer.zero_grad(set_to_none=True)
            in_a_row, skipped = (0, skipped) if finite else (in_a_row + 1, skipped + 1)
            worked, stop = ranks.sum([tally.sums.get("tokens", (0, 0))[0], signals.seen])
            tokens += worked
            line = {"step": step + 1, "lr": optimizer.param_groups[0]["lr"],
                    "grad_norm": norm if finite else None,
                    **{n: x for n, x in means.items() if math.isfinite(x)},
                    "seconds": time.perf_counter() - start, "tokens": worked,
                    "peak_bytes": peak_bytes(ranks.device)}
            run.log(line)
            for warning in dead_signals.warnings_of(line):
                session.say(f"warning: {run.folder.name}, step {step + 1}: {warning}")
            bar.set_postfix({n: f"{line[n]:.3f}" for n in names[:4] if n in line}, refresh=False)
            if in_a_row == 5:
                ids = (session.posts[v.index].id[:40] for v in tally.visits[:20])
                posts = ", ".join(map(data.printable, ids))
                raise InputError(f"step {step + 1} of {run.folder}: gradient or loss not finite "
                                 f"five times in a row (posts {posts}): lower --lr, or "
                                 "use --dtype float32")
            last = step + 1 == args.steps or learnt_enough(run, getattr(args, "until", None))
            # Drafts are no part of a checkpoint: none is written while some are still to be used.
            stop = stop and (step + 1) % getattr(args, "updates", 1) == 0
            if not last and (stop or (step + 1) % args.save_every == 0):
                run.save(step + 1, kept, optimizer)
            if stop and not last:
                leave(session, bar, step + 1, signals.seen or signal.SIGTERM)
            if step - first == 2 and not last:
                pace = (time.perf_counter() - began) / 3
                session.say(f"{run.folder.name}: {pace:.2g} s a step, about "
                            f"{duration(pace * (args.steps - step - 1))} to the end")
            if last:
                break
    seconds = time.perf_counter() - began
    summary = {"event": "end", "stage": session.stage, "step": step + 1, "seconds": seconds,
               "peak_bytes": peak_bytes(ranks.device), "skipped": skipped,
               "tokens_per_second": tokens / seconds if tokens else None, "ranks": ranks.world,
               "device": str(ranks.device.type), "warnings": dead_signals.said}
    run.log(summary)
    return summary


def announce(session, step_fn):
    """Before the first step: what the run is about to do. With --dry-run that is all: a few steps
    are timed, which change nothing, and the command ends."""
    session.say(plan(session))
    if session.args.dry_run:
        seconds = rehearse(session, step_fn)
        session.say(f"plan {Path(session.args.out).name}: {session.args.steps} steps, about "
                    f"{seconds:.0f} s")
        session.ranks.close()
        raise SystemExit(0)


def plan(session):
    """A run in a line: posts, steps, tokens and memory. Lengths are those of the first 64
    posts; a draft may be as long as --max-new-tokens."""
    args, model = session.args, session.model
    some = range(min(64, len(session.posts)))
    prompt = sum(len(session.prompt(i)) for i in some) / len(some)
    reply = drafts = 0
    if session.stage == "grpo":              # whose posts may be prompts without any reply
        drafts = args.batch / args.updates
    else:
        replies = (data.encode_reply(session.tokenizer, session.posts[i].replies[0]) for i in some)
        reply = sum(map(len, replies)) / len(some)
        if getattr(args, "lam", 0) or getattr(args, "lambda_share", 0):
            drafts = min(args.draft_posts, args.batch) / args.draft_every
    longest = getattr(args, "k", 0) * getattr(args, "max_new_tokens", 0)
    # A draft's tokens count twice, as in the log: they are written, then scored.
    tokens = args.batch * (prompt + reply) * bool(reply) + drafts * (prompt + 2 * longest)
    c, size = model.config, model.dtype.itemsize
    # Kept for the backward pass, a token: a block's inputs, or all that its products read.
    width = c.hidden_size if model.checkpointing else 10 * c.hidden_size + 4 * c.intermediate_size
    passing = min(args.micro_tokens, tokens) * c.num_hidden_layers * width * size
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size
    if drafts:
        rows = min(args.max_rows, args.batch * args.k)
        passing = max(passing, cache * rows * args.max_new_tokens)
    held = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    trained = 12 * sum(p.numel() for p in session.params)  # a gradient and Adam's two, in fp32
    mib = 2 ** 20
    big = lambda x: f"{x / mib / 1024:.1f} GiB" if x > 512 * mib else f"{x / mib:.0f} MiB"
    return (f"{Path(args.out).name}: {len(session.posts)} posts, {args.steps} steps of "
            f"{args.batch}, up to some {tokens * args.steps:,.0f} tokens; memory: weights "
            f"{big(held)}, training {big(trained)}, passes and drafts about {big(passing)}")


def rehearse(session, step_fn):
    """The seconds that the whole run would take, from a few steps. The first is not counted; steps
    that draft come in as often as they will."""
    args = session.args
    cycle = max(getattr(args, "draft_every", 1), getattr(args, "updates", 1))
    count = cycle * math.ceil(2 / cycle)
    for step in range(count + 1):
        if step == 1:
            began = time.perf_counter()
        step_fn(step)
        for p in session.params:
            p.grad = None
    return (time.perf_counter() - began) / count * args.steps


def replay(run):
    """The DeadSignals of a log as it stands, and its number of skipped steps: after a resume both
    go on."""
    dead, log = DeadSignals(), run.folder / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else ()
    lines = [json.loads(line) for line in lines]
    for line in lines:
        dead.warnings_of(line)
    return dead, sum(line.get("grad_norm", 0) is None for line in lines)


def learnt_enough(run, until, steps=20):
    """Is the mean cross-entropy of the log's last `steps` lines at most `until`? Read from the log
    by every rank, so that ranks agree and a resumed run ends at the same step."""
    if until is None:
        return False
    run.ranks.barrier()                      # the first rank has written its line
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-steps - 1:]
    losses = [line["ce"] for line in map(json.loads, lines) if "ce" in line][-steps:]
    return len(losses) == steps and sum(losses) / steps <= until


def leave(session, bar, step, number):
    """End a run that was asked to stop: its checkpoint is written."""
    bar.close()
    session.say(f"{session.run.folder}: stopped after step {step}; --resume goes on from there")
    session.ranks.barrier()
    session.ranks.close()
    sys.exit(128 + number)


# ---- The session ---------------------------------------------------------------------------------

class Session:
    """What a phase works with."""

    def __init__(self, args, stage):
        self.args = args              # the command's flags
        self.stage = stage            # "base", "sft", "grpo", "measure": part of random streams
        self.ranks = Ranks(f"{stage}:{args.out}", args.device)
        self.run = None               # the run folder, of a phase that has one
        self.posts = None             # list of data.Post
        self.domain = None            # how posts are put to the model and drafts are judged
        self.tokenizer = None
        self.chat = None              # the checkpoint's chat format
        self.model = None             # the policy: frozen base and adapter
        self.stops = None             # token ids that end a draft
        self.embedder = None          # texts -> unit vectors, for D and for rewards
        self.gate = None              # drafts -> quality in [0, 1], which D is multiplied with
        self.reward = None            # (posts, drafts, streams) -> what each draft earns
        self.batches = None           # of the drafts that phase two is at
        self.token_count = None       # their reply tokens, over all ranks
        self.params = None            # list of the tensors that train

    def open_run(self):
        """Make or reopen the run folder; False, with a word, when it is finished already. A dry
        run has none."""
        if getattr(self.args, "dry_run", False):
            return True
        self.run = Run(self.args, self.ranks)
        if self.run.done:
            self.say(f"{self.run.folder}: done already")
            if self.ranks.main:
                self.run.tidy()
            self.ranks.close()
        return not self.run.done

    def say(self, text):
        if self.ranks.main:
            print(text, flush=True)

    def load(self):
        """The data, then the frozen model: a bad line is found before gigabytes are read."""
        self.load_posts()
        self.load_model()

    def load_posts(self):
        args = self.args
        self.posts = data.load_posts(args.data, skip_bad_lines=args.skip_bad_lines)
        self.domain = data.load_domain(args.data, args.domain, self.posts)
        if self.stage != "base":
            self.domain.permit(args.allow_code_execution)

    def load_model(self):
        args = self.args
        self.tokenizer, self.chat = load_chat(args.model, args.revision)
        if args.shard and (self.ranks.world == 1 or args.nf4):
            raise InputError("--shard spreads the weights over several ranks, without --nf4: start "
                             "it by torchrun --nproc-per-node=N")
        if self.run:
            self.run.made_from("model", "model_chat")
        self.model = load_model(args.model, args, self.ranks.device, args.revision, args.nf4,
                                args.shard)
        real = data.vocabulary(self.tokenizer)  # the matrix's rows above are padding
        self.model.vocab = min(self.model.vocab, real)
        self.stops = data.stop_ids(self.tokenizer)

    def shard_model(self):
        """With --shard, once the adapter is on the model: spread it over the ranks."""
        if self.args.shard:
            shard(self.model, self.ranks)

    def passes(self, batches):
        """The batches, for a pass through the model each; then, with --shard, wait for ranks that
        have more."""
        yield from batches
        if self.model.lockstep:
            self.model.lockstep.wait()

    def micro_batches(self, pairs):
        """(prompt ids, [draft ids, ..]) pairs as Rows of at most --micro-tokens each."""
        size, members = self.args.micro_tokens, self.model.members
        return self.passes(pack(pairs, size, self.ranks.device, members))

    def deal(self, items):
        """This rank's share. Each rank needs at least one, since all take part in every step."""
        if len(items) < self.ranks.world:
            raise InputError(f"{len(items)} posts cannot be dealt to {self.ranks.world} ranks: "
                             "start fewer, or give more (in training by --batch)")
        return items[self.ranks.rank::self.ranks.world]

    def prompt(self, index):
        messages = self.domain.messages(self.posts[index])
        return data.encode_prompt(self.tokenizer, messages, self.chat)

    def stream(self, purpose, step, visit):
        """The seed of a visit's random numbers for one purpose, however posts are dealt."""
        return seed_of(self.args.seed, purpose, step, self.posts[visit.index].key, visit.epoch)

    def sample_drafts(self, visits, step, k, progress=None):
        """k drafts for each visit -> (prompts, Samples, texts): P lists of ids, of k
        drafts each."""
        args, prompts = self.args, [self.prompt(v.index) for v in visits]
        seeds = [self.stream(self.stage, step, v) for v in visits]
        samples = generate(self.model, prompts, k=k, max_new_tokens=args.max_new_tokens,
                           stop_ids=self.stops, seed=seeds, max_rows=args.max_rows,
                           progress=progress, **sampling_of(args))
        texts = [[data.decode(self.tokenizer, d) for d in drafts] for drafts in samples.tokens]
        return prompts, samples, texts


def load_model(path, args, device, revision=None, nf4=False, shard=False):
    """The Qwen3 at `path` as the flags want it; one to be spread over ranks is read into the
    host's memory."""
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32,
             "float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    where = "cpu" if shard else device
    model = Qwen3.from_pretrained(path, revision=revision, device=where, dtype=dtype, nf4=nf4)
    model.checkpointing = getattr(args, "checkpointing", False)
    model.graphs = False if getattr(args, "no_graphs", False) else None
    return model


def same_base(run, args):
    """InputError when a run says that its adapter was trained on another base than args.model: an
    adapter goes onto any base of its shape, and writes nonsense there."""
    trained_on = base_hash(run)
    if trained_on is not None and trained_on != model_hash(args.model, args.revision):
        raise InputError(f"the adapter of {run} was trained on another base than {args.model}: "
                         "name that one by --model, and measure runs on different bases in calls "
                         "of their own")
    chat = recorded_hash(run, "model_chat")
    if chat is not None and chat != chat_hash(args.model, args.revision):
        print(f"warning: {run} was trained with another tokenizer or chat template than "
              f"{args.model} has now", file=sys.stderr)


def load_chat(path, revision=None):
    """(tokenizer, ChatFormat) of the checkpoint at `path`, both checked."""
    tokenizer = data.load_tokenizer(path, revision=revision)
    data.check_chat(tokenizer, path)
    return tokenizer, chat_format(data.fetch(path, revision))


# ---- Flags ---------------------------------------------------------------------------------------

def common_flags(p, *, lr, steps, batch, schedule="cosine"):
    """Flags that every phase has. Names are the config's keys; units and defaults are in
    the help."""
    p.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = p.add_argument
    add("--data", required=True, help="posts of this phase, JSON lines (.gz too); make disjoint "
                                      "ones with `python data.py split`")
    add("--domain", default="auto",
        help=f"how drafts are asked for and scored: auto, {', '.join(data.DOMAINS)}")
    allow_code_flag(p)
    add("--out", required=True, help="run folder to make")
    add("--resume", action="store_true", help="go on with an unfinished run in --out")
    add("--dry-run", action="store_true",
        help="time a few steps, say how long the run would take, and write nothing")
    add("--seed", type=int, default=1, help="of everything random in this run")
    add("--steps", type=int, default=steps,
        help="optimizer steps; 0: as many as --epochs passes over the posts take")
    add("--epochs", type=float, default=1, help="passes over the posts when --steps is 0")
    add("--batch", type=int, default=batch, help="posts a step, over all ranks")
    add("--lr", type=float, default=lr, help="peak learning rate of AdamW")
    add("--beta2", type=float, default=0.999, help="AdamW's second moment decay")
    add("--weight-decay", type=float, default=0.0, help="AdamW's decoupled weight decay")
    add("--warmup", type=int, default=10, help="steps of linear warm-up; fewer never reach --lr")
    add("--schedule", default=schedule, choices=("cosine", "constant"),
        help="learning rate after the warm-up")
    add("--clip", type=float, default=1.0,
        help="largest gradient norm, over all trained parameters and ranks")
    add("--save-every", type=int, default=100, help="steps between checkpoints to resume from")
    add("--micro-tokens", type=int, default=16384,
        help="tokens in one forward and backward pass: lower it to save memory")
    add("--checkpointing", action="store_true",
        help="recompute activations in the backward pass: less memory, a third more time")
    add("--skip-bad-lines", action="store_true",
        help="skip, count and report unreadable lines of --data instead of stopping")
    add("--track", choices=list(Tracker.PACKAGES),
        help="send the log's numbers there too; the package must be installed")
    model_flags(p)


def allow_code_flag(p):
    p.add_argument(
        "--allow-code-execution", nargs="?", const="yes", default=False, choices=("yes", "as-root"),
        help="let drafts of code be run, in a sandbox, to judge them; as-root: even if root asks")


def model_flags(p):
    """Flags of how the model is held and how it writes."""
    add = p.add_argument
    add("--device", default=None,
        help="cuda, cuda:1, cpu; default: this rank's GPU if there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="of the frozen weights; auto: bfloat16 on a GPU")
    add("--nf4", action="store_true",
        help="the frozen base in 4 bits (QLoRA): a third of the memory, slower")
    add("--shard", action="store_true", help="spread the frozen base over the ranks (FSDP2), for "
                                             "models larger than a GPU: slower")
    add("--revision", default=None, help="commit, tag or branch of the model on the hub")
    add("--max-rows", type=int, default=256,
        help="drafts written at a time on each rank: lower it to save memory")
    add("--no-graphs", action="store_true",
        help="write drafts without CUDA graphs: slower, a way around a driver that fails on them")


# flag -> (lowest, is that itself allowed, below what)
FROM_ZERO, FROM_ONE = (0, True, math.inf), (1, True, math.inf)
POSITIVE = (0, False, math.inf)
SHARE = (0, True, 1)
RANGES = {
    **dict.fromkeys(("batch", "save_every", "micro_tokens", "max_rows", "rank", "max_new_tokens",
                     "draft_every", "draft_posts", "updates", "members"), FROM_ONE),
    **dict.fromkeys(("steps", "warmup", "lr", "weight_decay", "lam", "lambda_share", "temperature",
                     "gate_floor", "beta", "diversity_weight", "diversity_share", "clip_high",
                     "resample", "overlong", "valid_weight", "entropy_weight",
                     "member_spread", "spread_penalty"), FROM_ZERO),
    **dict.fromkeys(("clip", "alpha", "loss_value", "until"), POSITIVE),
    **dict.fromkeys(("beta2", "dropout", "noise", "clip_low", "flip", "token_share"), SHARE)}


def check_common(args):
    """Numbers that no phase can work with; NaN is in no range."""
    if getattr(args, "track", None):
        Tracker.package(args.track)
    ranges = RANGES | {"epochs": (0, bool(args.steps), math.inf)}
    for name, (low, closed, high) in ranges.items():
        value = getattr(args, name, None)
        if value is not None and not (low <= value < high if closed else low < value < high):
            flag = "--lambda" if name == "lam" else f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is {value:g}: it must be "
                             + (f"{low} or more" if closed else f"above {low}")
                             + (f" and below {high}" if high < math.inf else " and finite"))


# ---- The simplest phase: a base from nothing, for the pocket study -------------------------------

def train_tokenizer(texts, vocab_size):
    """A small byte-level BPE with Qwen3's special tokens, so that the same chat format
    works. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

    def words():
        count = 0
        for count, text in enumerate(texts, 1):
            yield text
        for frame in repeat(("user\n", "assistant\n", "\n\n"), count):  # a token each
            yield from frame
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(words(), trainers.BpeTrainer(
        vocab_size=vocab_size - 2, special_tokens=special, initial_alphabet=alphabet,
        show_progress=False))
    # not special, as in Qwen3
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    return tokenizer


def add_cross_entropy(session, visits, reply, tally, losses=None):
    """Adds the gradient of the mean token cross-entropy of the step's replies, or of another loss,
    losses(session, rows) -> (N,); `reply(visit)` gives the text.

    Every rank works out the whole batch's token count, which is the one denominator of all ranks'
    and micro-batches' sums."""
    replies = [data.encode_reply(session.tokenizer, reply(v)) for v in visits]
    each = session.model.members  # all members of an ensemble learn from every reply
    pairs = [(session.prompt(v.index), [ids] * each) for v, ids in zip(visits, replies)]
    count = each * sum(map(len, replies))
    for rows in session.micro_batches(pairs[session.ranks.rank::session.ranks.world]):
        loss = losses(session, rows) if losses else -token_logprobs(session.model, rows)[0]
        (loss.sum() / count).backward()
        tally.add("loss" if losses else "ce", loss.sum().detach(), len(loss))
        tally.add("tokens", rows.tokens.numel())


def base_step(session, step):
    """One step of making the pocket base: cross-entropy on noisy, evenly spread replies,
    all parameters."""
    args = session.args
    visits = batch_visits(len(session.posts), args.batch, step, args.seed)
    tally = Tally(visits)

    def reply(visit):
        rng = random.Random(session.stream("noisy", step, visit))
        post = session.posts[visit.index]
        return session.domain.noisy_reply(post, session.posts, rng, args.noise)
    add_cross_entropy(session, visits, reply, tally)
    session.ranks.sum_gradients(session.params)
    return tally


def run_base(args):
    """A Qwen3 of a million parameters and its tokenizer, from nothing: a Hugging Face folder
    in OUT."""
    check_base(args)
    session = Session(args, "base")
    if not session.open_run():
        return
    session.load_posts()
    if not session.domain.voices:
        raise InputError(f"{args.data}: a base is made from posts with replies by voice; for posts "
                         "like these give --model a Qwen3 checkpoint")
    texts = (t for p in session.posts for t in (p.post, *p.replies))
    session.tokenizer, session.chat = train_tokenizer(texts, args.vocab), data.ChatFormat()
    torch.manual_seed(seed_of(args.seed, "weights"))
    config = Config(session.tokenizer.get_vocab_size(), args.hidden, 3 * args.hidden, args.layers,
                    args.heads, args.heads // 2, args.hidden // args.heads,
                    tie_word_embeddings=True)
    session.model = Qwen3(config).to(session.ranks.device)
    for name, p in session.model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)
    session.model.checkpointing = args.checkpointing
    session.params = list(session.model.parameters())
    args.steps = args.steps or math.ceil(len(session.posts) * args.epochs / args.batch)
    step_fn = lambda step: base_step(session, step)
    announce(session, step_fn)
    summary = train(session, session.params, step_fn, ["ce"])
    if args.until and not learnt_enough(session.run, args.until):
        raise InputError(f"{session.run.folder}: {args.steps} steps did not bring the base's "
                         f"cross-entropy down to --until {args.until:g}: give it more --steps")
    if session.ranks.main:
        folder = session.run.folder / "model"
        session.model.save_pretrained(folder)
        session.tokenizer.save(str(folder / "tokenizer.json"))
    session.run.finish(summary | {"domain": session.domain.record()})
    session.ranks.close()


def base_command(sub):
    """`base` among the commands of polylora.py."""
    b = sub.add_parser("base", help="make a small Qwen3 from nothing, for the pocket study")
    common_flags(b, lr=3e-3, steps=500, batch=64)
    add = b.add_argument
    add("--noise", type=float, default=0.3,
        help="share of pretraining replies that belong to another post")
    add("--until", type=float, default=None,
        help="end once the mean cross-entropy of 20 steps is this low, and fail when --steps did "
             "not bring it there: bases of different seeds then know about as much")
    add("--vocab", type=int, default=1024, help="tokens of the BPE vocabulary")
    add("--hidden", type=int, default=128, help="width of the model")
    add("--layers", type=int, default=4, help="blocks of the model")
    add("--heads", type=int, default=4, help="query heads; half as many key/value heads")
    b.set_defaults(run=run_base)


def check_base(args):
    """The shape of a model made from nothing."""
    check_common(args)
    if args.nf4 or args.shard or args.dtype == "bfloat16":
        raise InputError("--nf4, --shard, bfloat16 are for a frozen base: one is made in float32")
    uneven = args.heads < 2 or args.heads % 2 or args.hidden % (2 * max(args.heads, 1))
    if args.layers < 1 or args.hidden < 1 or uneven:
        raise InputError(f"--layers {args.layers}, --heads {args.heads}, --hidden {args.hidden}: a "
                         "model has at least one layer, an even number of heads, and a width that "
                         "is a multiple of twice that number")
    if args.vocab < 261:
        raise InputError(f"--vocab {args.vocab}: the 256 bytes and 5 chat tokens need at least 261")
