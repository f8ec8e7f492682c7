"""The run folder: configuration, log, checkpoints, result; the warnings of a stalled run."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.files import (WHOLE_HASH, InputError, Tracker, adapter_hash, base_hash, atomic_write,
                           chat_hash, combined_hash, content_hash, environment, fetch, file_hash,
                           printable, read_json, recorded_hash, seed_of, write_json, write_text)
from support.hub import tensor_files
from support.progress import outlook
from support.registry import EMBEDDERS

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither: no lock on a folder, no peak memory of a CPU run
    fcntl = None
    resource = None


def peak_bytes(device):
    """Peak memory of this process: the GPU allocator's, or resident memory; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def left_over(path):
    """Whether a killed process leaves files of this name. safetensors writes to .tmpXXXXXX first.
    """
    return bool(re.fullmatch(r"\.lock|.*\.partial|\.tmp\w{6}", path.name))


def start_folder(start):
    """The adapter folder of a run, or `start` itself where it is an adapter folder."""
    inside = Path(start) / "adapter"
    return inside if inside.is_dir() else Path(start)


# ---- Inputs: what a run reads beyond its flags and posts -----------------------------------------

class Input(NamedTuple):
    """Something that a run reads and whose contents may change under the same name."""
    hash: Callable       # the run's flags -> a hash of all its bytes
    about: str           # what it is, for messages
    flag: str            # the flag that names it


INPUTS = {}              # name -> Input; a run records the hash of each that it reads as NAME_hash


def input_hash(name, about, flag):
    """A decorator that enters a function (args) -> hash into INPUTS."""
    def register(function):
        INPUTS[name] = Input(function, about, flag)
        return function
    return register


def model_hash(path, revision):
    """The hash of a checkpoint's weights: config.json and every byte of its tensor files. Each file
    is read once a process (about 0.8 s a GB). For its tokenizer and template see chat_hash."""
    folder = fetch(path, revision)
    files = [(file.name, content_hash(file)) for file in tensor_files(folder)]
    return combined_hash(content_hash(folder / "config.json"), files)


def checkpoint_hash(path, revision=None):
    """One hash of a checkpoint's weights, tokenizer and chat template."""
    return combined_hash(model_hash(path, revision), chat_hash(path, revision))


def embedder_hash(path):
    """checkpoint_hash; of an embedder that has no weights, the hash of its other files; of a name
    of no files, such as char-ngrams, the name's."""
    if path == "base" or any(row.claims and row.claims(path) for row in EMBEDDERS.values()):
        parts = path.split("+")
        return combined_hash(path, *map(embedder_hash, parts if len(parts) > 1 else ()))
    folder = fetch(path)
    if any(folder.glob("*.safetensors")):
        return checkpoint_hash(path)
    return combined_hash(content_hash(folder / "config.json"), chat_hash(path))


@input_hash("model", "base", "model")
def hash_of_base(args):
    """The hash of the base model's weights."""
    return model_hash(args.model, args.revision)


@input_hash("model_chat", "tokenizer or chat template", "model")
def hash_of_chat(args):
    """The hash of the base model's tokenizer and chat template."""
    return chat_hash(args.model, args.revision)


@input_hash("start", "starting adapter", "start")
def hash_of_start(args):
    """The hash of the adapter that training starts from."""
    return adapter_hash(start_folder(args.start))


@input_hash("embedder", "embedder", "embedder")
def hash_of_embedder(args):
    """The hash of the embedder's weights, tokenizer and chat template."""
    return embedder_hash(args.embedder)


# ---- The run folder ------------------------------------------------------------------------------

# The settings that may differ between a run and its resumption, each with the reason. Every other
# setting of config.json must match: flags are compared by value, data_hash and INPUTS by contents.
MAY_DIFFER = {
    "out": "the folder may be moved or renamed",
    "resume": "it only allows going on with an unfinished run",
    "command": "it names the subcommand; the phases already differ in their other settings",
    "run": "it is the subcommand's function, not a setting",
    "save_every": "how often checkpoints are written does not change the training",
    "micro_tokens": "the loss has one denominator a step, however the step is cut into passes",
    "max_rows": "seeds belong to completions, however many are sampled at a time",
    "checkpointing": "activations are recomputed instead of kept",
    "shard": "weights are spread over ranks, and each pass computes the same",
    "device": "a run may go on where there is a free device",
    "no_graphs": "sampling computes the same with and without CUDA graphs",
    "data": "the file may be moved; data_hash compares its contents",
    "split": "it tells how the posts were split; data_hash compares the result",
    "readers": "older folders lack it; check_same_split compares it where it is recorded",
    "environment": "other versions only cause a note",
    "allow_code_execution": "it is a permission of this launch",
    "track": "the numbers are sent somewhere in addition to metrics.jsonl",
    "argv": "the command as it was typed; its flags are compared one by one",
}

# Settings that older folders lack, with the value that they then stand for. A run at this value
# does not record the setting, so that older folders stay valid.
ADDED_LATER = {"diversity_schedule": "constant", "start": None, "tis": 0.0}

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_BEFORE = "checkpoint.before.safetensors"
LOG = "metrics.jsonl"


class RunFolder:
    """The folder of one run, which has one configuration:

    config.json              the settings, and a hash of each input that the run reads
    metrics.jsonl            the log, one line a step
    checkpoint.safetensors   what resumption starts from, and the checkpoint before it
    adapter/ or model/       the result
    done.json                the summary, written last

    A finished run is kept, and an unfinished one resumed, only for equal settings (see MAY_DIFFER)
    and equal inputs: the posts, the base, its tokenizer and chat template, the starting adapter and
    whatever else is in INPUTS. So a chain never mixes an old stage with a new one. On CPUs a
    resumed run ends with the same bits as an undisturbed one; on GPUs it is equal up to
    rounding."""

    def __init__(self, args, ranks):
        self.args = args
        self.ranks = ranks
        self.folder = Path(args.out)
        self.lock = None
        self.tracker = None
        self.config = configuration(args)
        self.done = (self.folder / "done.json").exists()
        if (self.folder / "config.json").exists():
            self.check_same_run(read_json(self.folder / "config.json"))
            if not (self.done or args.resume or ranks.restarts):
                raise InputError(f"{self.folder} holds an unfinished run: add --resume to go on, "
                                 "or choose another --out")
        elif self.folder.exists() and not all(map(left_over, self.folder.iterdir())):
            raise InputError(f"{self.folder} exists and holds no run of this program: choose "
                             "another --out")

    # ---- Is this the run that the folder holds? ----

    def check_same_run(self, old):
        """Raise InputError if the folder's configuration `old` or its inputs are other ones; print
        a note if only package versions differ."""
        self.check_same_settings(old)
        self.check_same_split(old)
        self.check_same_inputs(old)
        self.note_other_versions(old.get("environment") or {})

    def check_same_settings(self, old):
        """Raise InputError for a setting that differs and is not in MAY_DIFFER."""
        hashes = {f"{name}_hash" for name in INPUTS}     # compared by check_same_inputs
        for key in sorted((old.keys() | self.config.keys()) - hashes):
            default = ADDED_LATER.get(key, False)
            before = old.get(key, default)
            now = self.config.get(key, default)
            if key in MAY_DIFFER or before == now:
                continue
            if key == "data_hash":
                raise InputError(f"{self.folder} holds a run on other posts: the contents of "
                                 f"{self.config['data']} have changed: choose another --out")
            raise InputError(f"{self.folder} holds a run with {key} = {before!r}, but {now!r} is "
                             "asked for: choose another --out, or delete that folder"
                             + self.longer_run_hint(key))

    def longer_run_hint(self, key):
        """How to train a finished adapter for more steps; "" where that was not asked for."""
        phase = self.config.get("command", "grpo")
        if self.done and key in ("steps", "epochs") and phase in ("sft", "grpo"):
            return f"; to train its adapter further start from it: --start {self.folder}"
        return ""

    def check_same_split(self, old):
        """Raise InputError if the posts come from another split, with other styles or users."""
        if old.get("readers", self.config["readers"]) != self.config["readers"]:
            raise InputError(f"{self.folder} holds a run on posts of another split (see "
                             f"domain.json next to {self.config['data']}): choose another --out")

    def check_same_inputs(self, old):
        """Raise InputError if an input that the folder's run has read has changed since."""
        recorded = [name for name in INPUTS if f"{name}_hash" in old]
        incomplete = []                      # hashes that cover only a part of the input
        for name in recorded:
            if not str(old[f"{name}_hash"]).startswith(WHOLE_HASH):
                incomplete.append(name)
        if incomplete and not self.done:
            raise InputError(f"{self.folder} was begun by an older version, which did not record "
                             "all that a run is made from: choose another --out, or delete that "
                             "folder")
        if incomplete and self.ranks.main:
            print(f"{self.folder} was made by an older version: whether its "
                  f"{INPUTS[incomplete[0]].about} is still the same cannot be checked", flush=True)
        for name in recorded:
            if name not in incomplete:
                self.check_input(name, old[f"{name}_hash"], INPUTS[name].hash(self.args))

    def check_input(self, name, before, now):
        """Raise InputError if the hash of the input `name` has changed."""
        if before == now:
            return
        changed = INPUTS[name]
        raise InputError(f"{self.folder} holds a run on another {changed.about}: the contents of "
                         f"{self.config[changed.flag]} have changed: choose another --out, or "
                         "delete that folder")

    def note_other_versions(self, before):
        """Print which versions an unfinished run was begun under, where they differ from now."""
        if self.done or not self.ranks.main:
            return
        changed = []
        for name, version in self.config["environment"].items():
            if before.get(name) != version:
                changed.append(f"{name} {before.get(name)} -> {version}")
        if changed:
            print(f"{self.folder} was begun under other versions: "
                  f"{printable(', '.join(changed))}", flush=True)

    def made_from(self, *names):
        """Record the hashes of these INPUTS, which the run reads; raise InputError if the folder's
        run has read others."""
        path = self.folder / "config.json"
        old = read_json(path) if path.exists() else {}
        for name in names:
            now = INPUTS[name].hash(self.args)
            before = old.get(f"{name}_hash", now)
            if str(before).startswith(WHOLE_HASH):
                self.check_input(name, before, now)
            self.config[f"{name}_hash"] = now

    # ---- Opening and closing ----

    def __enter__(self):
        """Lock the folder and write the configuration. This comes after everything was read and
        checked, so that a wrong command leaves no folder behind."""
        self.ranks.barrier()  # all ranks have looked at the folder before one writes
        if self.ranks.main:
            self.take_lock()
            self.remove_left_overs()
            write_json(self.folder / "config.json", self.config)
            if self.config.get("track"):
                self.tracker = Tracker(self.config["track"], self.folder, self.config)
        return self

    def take_lock(self):
        """Make the folder and lock it; raise InputError if another process has it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")
            if fcntl is not None:  # the system drops the lock however the process ends
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder} is in use by another process: wait for it, or stop "
                             "it") from None
        except OSError as e:
            raise InputError(f"{self.folder} cannot be written ({e}): choose another "
                             "--out") from None
        if not self.done and (self.folder / "done.json").exists():
            raise InputError(f"another process has just finished {self.folder}: start again")

    def remove_left_overs(self):
        """Delete the partly written files of a killed process."""
        for path in self.folder.rglob("*.*"):
            if left_over(path) and path.name != ".lock":
                path.unlink(missing_ok=True)

    def __exit__(self, error, *details):
        if error is not None and self.lock is not None:
            self.lock.close()

    def finish(self, summary):
        """Write done.json, the last file of a run, and delete what only resumption needs."""
        self.ranks.barrier()
        if self.ranks.main:
            write_json(self.folder / "done.json", summary)
            self.tidy()
            self.lock.close()
            print(printable(outlook(self.folder, summary.get("stage"))), flush=True)

    def tidy(self):
        """Delete what a finished run does not need. A later start repeats it, in case a kill came
        between done.json and here."""
        for name in (CHECKPOINT, CHECKPOINT_BEFORE, ".lock"):
            (self.folder / name).unlink(missing_ok=True)

    # ---- The log and the checkpoints ----

    def log(self, line):
        """Append a line to the log; the first rank only."""
        if not self.ranks.main:
            return
        try:
            with open(self.folder / LOG, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as e:
            raise InputError(f"{self.folder}/{LOG} cannot be written ({e}): free some disk space, "
                             "then go on with --resume") from None
        if self.tracker:
            self.tracker.log(line)

    def name(self):
        """A short name of this configuration: a checkpoint of another one is never used."""
        fixed = {}
        for key, value in self.config.items():
            if key not in MAY_DIFFER and value:
                fixed[key] = value
        return f"{seed_of(json.dumps(fixed, sort_keys=True)):x}"

    def save(self, step, params, optimizer):
        """Write the parameters and AdamW's state, with a checksum; keep the checkpoint before it.
        """
        if not self.ranks.main:
            return
        tensors, updates = training_state(params, optimizer)
        about = {"step": str(step), "updates": str(updates), "run": self.name()}
        path = self.folder / CHECKPOINT
        log = self.folder / LOG
        if log.exists():                     # its lines must be on disk before the checkpoint is
            with open(log, "rb") as file:
                os.fsync(file.fileno())
        with atomic_write(path) as new:
            save_file(tensors, new, metadata=about | {"checksum": checksum(tensors, about)})
            if path.exists():
                os.replace(path, self.folder / CHECKPOINT_BEFORE)

    def restore(self, params, optimizer):
        """The step to go on from, after loading the newest intact checkpoint; 0 without one. Log
        lines of later steps are dropped."""
        found = self.read_checkpoint(self.folder / CHECKPOINT)
        if found is None:
            found = self.read_checkpoint(self.folder / CHECKPOINT_BEFORE)
        log = self.folder / LOG
        if found is None:
            self.ranks.barrier()  # all ranks have looked before one deletes
            if self.ranks.main:
                log.unlink(missing_ok=True)
            return 0
        tensors, step, updates = found
        self.load_state(params, optimizer, tensors, updates)
        if self.ranks.main and log.exists():  # one line a step; a kill may have cut a later one
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(log, "".join(lines[:step]))
        return step

    def load_state(self, params, optimizer, tensors, updates):
        """Copy a checkpoint's tensors into the parameters and AdamW's state."""
        for i, p in enumerate(params):
            value = tensors.get(f"{i}.value")
            if value is None or value.shape != p.shape:
                raise InputError(f"the checkpoint in {self.folder} is of another model: "
                                 "delete that folder, or choose another --out")
            p.data.copy_(value)
            if f"{i}.exp_avg" not in tensors:
                continue
            counter_device = p.device if optimizer.defaults["fused"] else "cpu"
            optimizer.state[p] = {"step": torch.tensor(float(updates), device=counter_device),
                                  "exp_avg": tensors[f"{i}.exp_avg"].to(p.device),
                                  "exp_avg_sq": tensors[f"{i}.exp_avg_sq"].to(p.device)}

    def read_checkpoint(self, path):
        """(tensors, step, updates) of a checkpoint; None where it is missing, or damaged, which is
        printed."""
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as f:
                about = f.metadata() or {}
                tensors = {name: f.get_tensor(name) for name in f.keys()}
            recorded = about.pop("checksum", "")
            intact = recorded == checksum(tensors, about)
            reason = "its checksum is wrong"
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
            intact = False
            reason = str(e)
        if not intact:
            if self.ranks.main:
                print(f"{path} is damaged ({reason}): an older checkpoint is used, or the run "
                      "starts again", flush=True)
            return None
        if about.get("run", self.name()) != self.name():
            raise InputError(f"{path} is of another run: delete it, or choose another --out")
        return tensors, int(about["step"]), int(about["updates"])


def configuration(args):
    """What config.json records before any input is read: flags, posts, versions."""
    config = {}
    for name, value in vars(args).items():
        unchanged = name in ADDED_LATER and value == ADDED_LATER[name]
        if not callable(value) and not unchanged:
            config[name] = value
    config["version"] = 2
    config["data_hash"] = file_hash(args.data)
    for key, name in (("split", "split.json"), ("readers", "domain.json")):
        path = Path(args.data).parent / name
        config[key] = read_json(path) if path.exists() else None
    config["environment"] = environment()
    config["argv"] = list(sys.argv)          # for the model card (support/card.py)
    return config


def training_state(params, optimizer):
    """({name: tensor} of the parameters and AdamW's moments, AdamW's number of updates)."""
    tensors = {}
    updates = 0
    for i, p in enumerate(params):
        tensors[f"{i}.value"] = p.detach().cpu().contiguous()
        state = optimizer.state.get(p)
        if state:
            updates = int(state["step"])
            for name in ("exp_avg", "exp_avg_sq"):
                tensors[f"{i}.{name}"] = state[name].cpu().contiguous()
    return tensors, updates


def checksum(tensors, about):
    """sha256 over names, shapes, bytes and the text metadata: safetensors has none of its own."""
    total = hashlib.sha256(repr(sorted(about.items())).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


# ---- Warnings of a run that has stalled ----------------------------------------------------------

class Stall(NamedTuple):
    """A number of the log that carries no information while it is from `low` to `high`."""
    name: str
    low: float
    high: float
    meaning: str         # what that means, and what to do about it

    def holds(self, numbers):
        """Whether the number is in these numbers, and in the range."""
        return self.name in numbers and self.low <= numbers[self.name] <= self.high

    def value(self):
        """The range, for a message."""
        if self.low == self.high:
            return f"{self.low:g}"
        return f"{self.low:g} or more" if self.high == 1 else f"{self.high:g} or less"


NEARLY_ALL = 0.9         # of the completions: the few others hardly change what is learnt


# Causes first: what is wrong with the completions, then what follows from it.
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
    Stall("D", 0.0, 0.0, "all completions of a post are equal for D"),
    Stall("gated_D", 0.0, 0.0, "the gate lets no diversity through"),
    Stall("quality", 0.0, 0.0, "the gate gives every completion quality 0"),
    Stall("quality", 1.0, 1.0,
          "the gate finds every completion perfect, and separates none from another"),
    Stall("D_share", 0.0, 0.0, "D has no part in the gradient"),
    Stall("reward", 0.0, 0.0, "every reward is 0"),
    Stall("reward_std", 0.0, 0.0, "rewards of a post are all equal"),
    Stall("advantage", 0.0, 0.0, "every advantage is 0"),
    Stall("zero_variance", 1.0, 1.0, "every group's rewards are all equal"))


def stalled(numbers):
    """The warnings that the means of a whole measurement give cause for."""
    return [f"{stall.name} is {numbers[stall.name]:.3g}: {stall.meaning}" for stall in STALLS
            if stall.holds(numbers)]


class StallWarnings:
    """Warns when a training signal (D, gate, reward, ..) has been constant for five steps, once a
    run. After a resume, reading the log again restores the counts (see replay)."""

    def __init__(self, steps=5):
        self.steps = steps
        self.count = {}      # Stall -> the steps in a row for which it has held
        self.said = []       # every warning so far

    def warnings_of(self, line):
        """The new warnings that this line of the log gives cause for."""
        fresh = []
        for stall in STALLS:
            if stall.name not in line:
                continue
            in_a_row = self.count.get(stall, 0)
            self.count[stall] = in_a_row + 1 if stall.holds(line) else 0
            text = f"{stall.name} was {stall.value()} for {self.steps} steps: {stall.meaning}"
            if self.count[stall] == self.steps and text not in self.said:
                fresh.append(text)
                self.said.append(text)
        return fresh


# ---- What the training loop asks of a run --------------------------------------------------------

def replay(run):
    """(StallWarnings, number of skipped steps) after the lines of the run's log so far: a resumed
    run goes on from both."""
    warnings = StallWarnings()
    skipped = 0
    log = run.folder / LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else ()
    for text in lines:
        line = json.loads(text)
        warnings.warnings_of(line)
        if line.get("grad_norm", 0) is None:
            skipped += 1
    return warnings, skipped


def learnt_enough(run, until, steps=20):
    """Whether the mean cross-entropy of the log's last `steps` lines is at most `until`. Every rank
    reads it from the log, so that ranks agree and a resumed run ends at the same step."""
    if until is None:
        return False
    run.ranks.barrier()                      # the first rank has written its line
    lines = (run.folder / LOG).read_text(encoding="utf-8").splitlines()
    losses = []
    for text in lines[-steps - 1:]:          # the line that ends a log has no loss
        line = json.loads(text)
        if "ce" in line:
            losses.append(line["ce"])
    losses = losses[-steps:]
    return len(losses) == steps and sum(losses) / steps <= until


def leave(session, bar, step, number):
    """End a run that a signal asked to stop, once its checkpoint is written; exits with 128 + the
    signal's number, as a shell reports it."""
    bar.close()
    session.say(f"{session.run.folder}: stopped after step {step}; --resume goes on from there")
    session.ranks.barrier()
    session.ranks.close()
    sys.exit(128 + number)


def same_base(run, args):
    """Raise InputError if the run's adapter was trained on another base than args.model. An adapter
    can be put on any base of its shape, and writes nonsense there. Warn for another tokenizer or
    chat template."""
    trained_on = base_hash(run)
    if trained_on is not None and trained_on != model_hash(args.model, args.revision):
        raise InputError(f"the adapter of {run} was trained on another base than {args.model}: "
                         "name that base by --model, and measure runs on different bases in "
                         "separate calls")
    chat = recorded_hash(run, "model_chat")
    if chat is not None and chat != chat_hash(args.model, args.revision):
        print(f"warning: {run} was trained with another tokenizer or chat template than "
              f"{args.model} has now", file=sys.stderr)
