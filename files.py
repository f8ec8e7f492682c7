"""What every room needs: an error for the user, texts that do no harm, reading files, and writing
them in one piece."""

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import time
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import numpy as np
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


CONTROL = re.compile(r"<(?:\|\w+\||/?(?:think|tool_call|tool_response))>")


@functools.lru_cache(maxsize=8)
def control_of(tokenizer):
    """The control strings of a tokenizer: all that look like Qwen3's, and its own special tokens,
    such as SmolLM2's <file_sep>."""
    own = (t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special)
    own = sorted((text for text in own if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join([CONTROL.pattern, *map(re.escape, own)]))


def harmless(text, control=CONTROL):
    """A person's text with its control strings broken: who types <|im_end|> must not end a turn."""
    return control.sub(lambda found: f"{found[0][0]}\u200b{found[0][1:]}", text)


def without_control(text, control=CONTROL):
    """A reply to learn from, its control strings taken out: broken by a mark, the mark would be
    learnt. What is left may hold new ones, put together by the taking."""
    while control.search(text):
        text = control.sub("", text)
    return text


def command(parser, argv=None):
    """Run a program's command: 0 when it worked; 2, with one sentence on stderr, when the input
    was wrong; 130 after Ctrl-C."""
    args, rank = parser.parse_args(argv), os.environ.get("RANK", "0")
    try:
        args.run(args)
        return 0
    except (InputError, OSError) as e:       # the second: the disk is full, or access is denied
        hint = "" if isinstance(e, InputError) else ": make room there, or choose another place"
        said = printable(f"error: {e}{hint}")  # of which a hostile file may have given a part
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


def begin(folder, names, last):
    """Say in a folder that files of these names are being made there, and then `last` -> the mark,
    to be removed at the end. InputError where one is there already that no such call left, killed
    since or at work beside this one."""
    mark = folder / "made.partial"
    there = [name for name in names if (folder / name).exists()]
    if there and not mark.exists() and not (folder / last).exists():
        raise InputError(f"{folder / there[0]} exists, and would be written over: choose another "
                         "--out")
    write_text(mark, "")
    return mark


LARGEST_TEXT = 2 ** 26           # bytes: parsed, brackets alone take twenty times as much


def read_text(path):
    """The text of a file of somebody else's; InputError where it is missing, no UTF-8, or larger
    than any of its kind."""
    try:
        if Path(path).exists() and not os.path.isfile(path):  # a link to a device has no end
            raise InputError(f"{path} is no file")
        if os.path.getsize(path) > LARGEST_TEXT:
            raise InputError(f"{path} holds more than {LARGEST_TEXT >> 20} MiB: no such file does")
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read ({str(e)[:100]})") from None


def await_file(path, right=lambda: True, seconds=600):
    """Until the first rank has written a file that is `right`."""
    end = time.monotonic() + seconds
    while not (path.exists() and right()):
        if time.monotonic() > end:
            raise InputError(f"{path}, which the first rank writes, did not appear: is the folder "
                             "shared by all machines?")
        time.sleep(0.2)


def read_json(path):
    """The value in a JSON file; InputError where it is missing or no JSON."""
    try:
        return json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as e:  # nested thousands deep, too
        raise InputError(f"{path} is not valid JSON ({str(e)[:100]})") from None


def read_template(folder):
    """The text of a folder's chat template; None where it has none."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    if not (folder / "tokenizer_config.json").exists():
        return None
    config = read_json(folder / "tokenizer_config.json")
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):  # several, by name
        named = (t for t in template if isinstance(t, dict) and t.get("name") == "default")
        template = next(named, {}).get("template")
    return template if isinstance(template, str) else None


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


def base_hash(run):
    """The hash of the base that a run was trained on, or the run whose adapter folder this is; None
    where nothing says it."""
    path = Path(run) / "config.json"
    if not path.exists():                    # RUN/adapter
        path = Path(run).resolve().parent / "config.json"
    return read_json(path).get("model_hash") if path.exists() else None


def file_hash(path):
    """sha256 of a file's bytes; None for what is no file (a name such as `pocket`, a hub name)."""
    if not os.path.isfile(path):
        return None
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2 ** 20):
            total.update(part)
    return total.hexdigest()


def hashed(text, size):
    """The first `size` bytes of a text's sha256."""
    return hashlib.sha256(text.encode()).digest()[:size]


def groups(keys):
    """Equal rows of keys (n, 2) have equal numbers (n,), 0, 1, .. in the order of first rows."""
    joined = np.ascontiguousarray(keys).view("u8,u8")[:, 0]
    _, first, group = np.unique(joined, return_index=True, return_inverse=True)
    return first.argsort().argsort()[group]


def duration(seconds):
    """Seconds in words: '40 s', '12 min', '3.5 h', '2.1 days'."""
    for unit, size in (("days", 86400), ("h", 3600)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def environment():
    """What a result may depend on beside its configuration: versions, and this code's commit."""
    here = Path(__file__).resolve().parent

    def git(*words):
        try:
            ran = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
        except OSError:  # no git on this machine
            return None
        return ran.stdout.strip() if ran.returncode == 0 else None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    packages = ("torch", "safetensors", "tokenizers", "huggingface-hub", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"python": sys.version.split()[0], **versions, "commit": commit,
            "clean": None if changes is None else not changes}


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
