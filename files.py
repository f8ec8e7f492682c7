"""What every room needs: an error for the user, reading files, and writing them in one piece."""

import hashlib
import importlib
import json
import os
import re
import socket
import sys
import time
import unicodedata
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError


class InputError(ValueError):
    """Wrong input from the user: one clear sentence with the place and the mend. A command's exit
    code 2."""


def short(value):
    """A value in a message: never a page of it."""
    return repr(value)[:60]


def printable(text):
    """A text that cannot forge its surroundings: control characters and marks that turn the reading
    direction become visible or spaces, for terminals, pictures and tables."""
    text = re.sub(r"\s", " ", text)
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in "\u200e\u200f\u061c"
                   or "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069" else c for c in text)


def command(parser, argv=None):
    """Run a program's command: 0 when it worked; 2, with one sentence on stderr, when the input
    was wrong; 130 after Ctrl-C."""
    args, rank = parser.parse_args(argv), os.environ.get("RANK", "0")
    try:
        args.run(args)
        return 0
    except InputError as e:
        said = printable(f"error: {e}")  # of which a hostile file may have given a part
        print(said + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before or after the steps; these are finished first
        print("stopped", file=sys.stderr)
        return 130


def fetch(path, revision=None):
    """The local folder of a checkpoint: `path` itself, or a snapshot of that name on the Hugging
    Face hub. Only JSON, safetensors and chat templates are fetched: no pickle, no code."""
    if os.path.isdir(path):
        return Path(path)
    text = str(path)
    if os.path.exists(path) or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise InputError(f"no model folder at {text!r}: give a folder with config.json, or a hub "
                         "name (owner/name)")
    try:
        wanted = ["*.safetensors", "*.json", "chat_template.jinja"]
        return Path(snapshot_download(text, revision=revision, allow_patterns=wanted))
    except Exception as e:  # the hub client's errors are many: offline, no such name, no access
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"model {text!r} is no local folder and could not be fetched from the hub "
                         f"({reason}): check the name, the revision and the connection") from None


def read_json(path):
    """The value in a JSON file; InputError where it is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as e:  # nested thousands deep, too
        raise InputError(f"{path} is not valid JSON ({str(e)[:100]})") from None


@contextmanager
def beside(path):
    """A path to write to, in the same folder: flushed to disk and moved to `path` when all went
    well, removed otherwise. A reader, or a run after a crash, never sees half a file."""
    # Hosts and containers that share a folder have equal process ids.
    new = Path(f"{path}.{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}.partial")
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        yield new
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except (OSError, SafetensorError) as e:  # the second is what save_file makes of the first
        raise InputError(f"{path} cannot be written ({e}): make room, or choose another "
                         "place") from None
    finally:
        if new.exists():
            new.unlink()


def write_text(path, text):
    with beside(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def file_hash(path):
    """sha256 of a file's bytes; None for what is no file (a name such as `pocket`, a hub name)."""
    if not os.path.isfile(path):
        return None
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2 ** 20):
            total.update(part)
    return total.hexdigest()


class Tracker:
    """The numbers of metrics.jsonl, a line a step, for TensorBoard or Weights & Biases too. The
    package is imported only when asked for; metrics.jsonl stays what resumption reads."""

    PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}

    @classmethod
    def package(cls, kind):
        """The module; InputError where it is not installed."""
        try:
            return importlib.import_module(cls.PACKAGES[kind])
        except ImportError:
            raise InputError(f"--track {kind}: the package {kind} is not installed: pip install "
                             f"{kind}, or leave --track out") from None

    def __init__(self, kind, folder, config):
        package, folder = self.package(kind), Path(folder)
        self.writer = self.run = None
        if kind == "tensorboard":
            self.writer = package.SummaryWriter(str(folder / "tensorboard"))
        else:
            self.run = package.init(project="polychromic-lora", name=folder.name, config=config,
                                    dir=str(folder))

    def log(self, line):
        """A line's numbers at its step; lines without a step are none of a curve."""
        numbers = {k: v for k, v in line.items() if type(v) in (int, float) and k != "step"}
        if "step" in line and self.run:
            self.run.log(numbers, step=line["step"])
        elif "step" in line:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, line["step"])
            self.writer.flush()
