"""Shared helpers: user-facing errors, sanitising untrusted text, safe reads, atomic writes, hashes,
seeds."""

import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import select
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

from support.out_of_memory import advice, is_out_of_memory


class InputError(ValueError):
    """Wrong input from the user: one sentence that says what is wrong, where, and how to fix it.
    Commands exit with code 2."""


def short(value):
    """A value for a message, cut to 60 characters."""
    return repr(value)[:60]


def printable(text):
    """A text that cannot forge its surroundings in terminals, pictures and tables: white space
    becomes blanks, and control characters and marks that change the reading direction are replaced.
    """
    text = re.sub(r"\s", " ", text)
    return "".join("\ufffd" if is_unsafe(character) else character for character in text)


def is_unsafe(character):
    """Whether it is a control character, a surrogate, or a mark that changes the reading direction.
    """
    if unicodedata.category(character) in ("Cc", "Cs"):
        return True
    embeds = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return embeds or character in "\u200e\u200f\u061c"


# ---- Running a command ---------------------------------------------------------------------------

# Former names of commands, which work for a release; no help shows them.
OLD_COMMANDS = {"wise": "interpolate"}


def command(parser, argv=None):
    """Run a program's command; its exit code: 0 when it worked; 2, with one sentence on stderr, for
    wrong input or too little memory; 130 after Ctrl-C."""
    write_any_character()
    words = list(sys.argv[1:] if argv is None else argv)
    words[:1] = [OLD_COMMANDS.get(word, word) for word in words[:1]]
    args = parser.parse_args(words)
    rank = os.environ.get("RANK") or "0"
    try:
        args.run(args)
        if sys.stdout:
            sys.stdout.flush()               # here, where a failure is still one sentence
        return 0
    except (InputError, OSError) as e:       # OSError: the disk is full, or access is denied
        if isinstance(e, OSError) and e.errno in (errno.EPIPE, errno.EINVAL) and reader_left():
            give_up_stdout()
            return CLOSED_PIPE
        hint = "" if isinstance(e, InputError) else hint_for(e)
        message = printable(f"error: {e}{hint}")  # which may quote a hostile file
        if rank != "0":
            message += f" (rank {rank})"
        print(message, file=sys.stderr)
        give_up_stdout()                     # a full disk must not be reported twice
        return 2
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        where = "" if rank == "0" else f" (rank {rank})"
        print(printable(f"error: {advice(e, args)}{where}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:                # before or after the steps, which handle it themselves
        print("stopped", file=sys.stderr)
        return 130


CLOSED_PIPE = 141                # the exit code of a program whose pipe was closed, as by head


def write_any_character():
    """Make printing replace what the output's encoding lacks, such as an emoji in cp1252, by a
    question mark instead of failing."""
    for seed in (sys.stdout, sys.stderr):
        if hasattr(seed, "reconfigure") and seed.errors in ("strict", "surrogateescape"):
            seed.reconfigure(errors="replace")
    ascii_only = ("ascii", "us-ascii", "ansi_x3.4-1968")
    if hasattr(sys.stdin, "reconfigure") and sys.stdin.encoding.lower() in ascii_only:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # typed posts may have emoji


def reader_left():
    """Whether stdout is a pipe whose reading program has ended."""
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # no stdout, or one that a test put there
        return False
    if not hasattr(select, "poll"):          # Windows
        return True
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    for _, event in poll.poll(0):
        if event & (select.POLLERR | select.POLLHUP):
            return True
    return False


def give_up_stdout():
    """If stdout cannot be written to, drop what it still holds: Python would try again when it
    ends, and print a second error."""
    try:
        sys.stdout.flush()
        if not reader_left():
            return
    except (AttributeError, OSError, ValueError):
        pass
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):
        pass


NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def hint_for(error):
    """What to do about an error of the operating system, by its number."""
    if error.errno in NO_SPACE:
        return ": free some disk space there, or choose another place"
    if error.errno in DENIED:
        return ": change its permissions, or choose another place"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return ": check the path"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ": too many files are open; raise the limit (ulimit -n)"
    return ""


# ---- Reading files -------------------------------------------------------------------------------

def fetch(path, revision=None):
    """The local folder of a checkpoint: `path` itself, or a snapshot of the repository of that name
    on the Hugging Face hub. Only JSON, safetensors and chat templates are fetched: no pickle, no
    code."""
    if os.path.isdir(path):
        return Path(path)
    text = str(path)
    if os.path.exists(path) or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise InputError(f"no model folder at {text!r}: give a folder with config.json, or a hub "
                         "name (owner/name)")
    try:
        wanted = ["*.safetensors", "*.json", "chat_template.jinja"]
        return Path(snapshot_download(text, revision=revision, allow_patterns=wanted))
    except Exception as e:  # the hub client has many kinds: offline, no such name, no access
        reason = type(e).__name__
        if str(e).strip():
            reason = str(e).strip().splitlines()[0]
        raise InputError(f"model {text!r} is no local folder and could not be fetched from the hub "
                         f"({reason}): check the name, the revision and the connection") from None


LARGEST_TEXT = 2 ** 26           # bytes; parsed JSON can take twenty times as much memory


def read_text(path):
    """The text of an untrusted file; InputError if it is missing, not UTF-8, or larger than any
    file of its kind."""
    try:
        if Path(path).exists() and not os.path.isfile(path):  # a link to a device has no end
            raise InputError(f"{path} is no file: give a regular file")
        if os.path.getsize(path) > LARGEST_TEXT:
            raise InputError(f"{path} holds more than {LARGEST_TEXT >> 20} MiB: no such file does, "
                             "so check that it is the right one")
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read ({str(e)[:100]})") from None


def first_rank():
    """Whether this process does the work that one rank does for all: it is alone, or rank 0. A RANK
    without a WORLD_SIZE was left behind by another launch and is ignored."""
    alone = (os.environ.get("WORLD_SIZE") or "1") == "1"
    return alone or (os.environ.get("RANK") or "0") == "0"


def await_file(path, right=lambda: True, seconds=600):
    """Wait until the first rank has written the file, and right() holds; InputError after
    `seconds`."""
    end = time.monotonic() + seconds
    while not (path.exists() and right()):
        if time.monotonic() > end:
            raise InputError(f"{path}, which the first rank writes, did not appear: is the folder "
                             "shared by all machines?")
        time.sleep(0.2)


def read_json(path):
    """The value in a JSON file; InputError if it is missing or not valid JSON."""
    try:
        return json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as e:  # RecursionError: nested thousands deep
        raise InputError(f"{path} is not valid JSON ({str(e)[:100]})") from None


def read_template(folder):
    """The chat template in a checkpoint's folder; None if it has none."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    if not (folder / "tokenizer_config.json").exists():
        return None
    config = read_json(folder / "tokenizer_config.json")
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):  # several templates, each with a name
        named = {}
        for entry in template:
            if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                named[entry["name"]] = entry.get("template")
        template = named.get("default") or ""
    if not isinstance(template, (str, type(None))) or template == "":
        raise InputError(f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor "
                         "a list with one that is named default: write the template to "
                         "chat_template.jinja in that folder")
    return template


# ---- Writing files -------------------------------------------------------------------------------

@contextmanager
def atomic_write(path):
    """An atomic write: yields a temporary path in the same folder, which is flushed to disk and
    renamed to `path` if all went well, and removed otherwise. Nobody ever sees half a file."""
    # Hosts and containers that share a folder can have equal process ids: the host's name tells.
    new = Path(f"{path}.{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}.partial")
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        yield new
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except (OSError, SafetensorError) as e:  # save_file turns an OSError into the latter
        raise InputError(f"{path} cannot be written ({e}): free some disk space, or choose another "
                         "place") from None
    finally:
        if new.exists():
            new.unlink()


def write_text(path, text):
    """Write a text file atomically."""
    with atomic_write(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write a value to a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def begin(folder, names, last):
    """The path of a mark written into the folder: files of these names are being made there, and
    then `last`. The caller removes it at the end. InputError if such a file exists already and was
    not left by an earlier call, of a process that was killed or is still at work."""
    mark = folder / "made.partial"
    existing = [name for name in names if (folder / name).exists()]
    if existing and not mark.exists() and not (folder / last).exists():
        raise InputError(f"{folder / existing[0]} exists, and would be written over: choose "
                         "another --out")
    write_text(mark, "")
    return mark


# ---- Hashes, by which inputs are recognised ------------------------------------------------------

# The beginning of a hash over all of an input's bytes; older versions hashed a part of them.
WHOLE_HASH = "sha256:"


def recorded_hash(run, name="model"):
    """The hash of the input `name` that a run recorded; `run` may also be the run's adapter folder.
    None if none is recorded, or only an older version's, which cannot be compared."""
    path = Path(run) / "config.json"
    if not path.exists():                    # RUN/adapter
        path = Path(run).resolve().parent / "config.json"
    if not path.exists():
        return None
    found = read_json(path).get(f"{name}_hash")
    return found if str(found).startswith(WHOLE_HASH) else None


def base_hash(run):
    """The recorded hash of the base that a run was trained on; None if it is not known."""
    return recorded_hash(run, "model")


@functools.lru_cache(maxsize=1024)
def hash_unless_changed(path, size, changed):
    """file_hash, computed once a process for equal path, size and time of change."""
    return file_hash(path)


def content_hash(path):
    """The sha256 of a file, computed again only after the file was written to; None if there is no
    such file."""
    if not os.path.isfile(path):
        return None
    status = os.stat(path)
    return hash_unless_changed(os.path.realpath(path), status.st_size, status.st_mtime_ns)


def combined_hash(*parts):
    """One hash of several parts: texts, numbers, hashes, None."""
    return WHOLE_HASH + hashlib.sha256(repr(parts).encode()).hexdigest()


def chat_hash(path, revision=None):
    """The hash of a checkpoint's tokenizer and chat template, which turn posts into tokens."""
    folder = fetch(path, revision)
    return combined_hash(content_hash(folder / "tokenizer.json"), read_template(folder))


def adapter_hash(folder):
    """The hash of an adapter's tensors and configuration; None if there is no adapter. The name of
    the base is left out: the base has a hash of its own."""
    folder = Path(folder)
    tensors = content_hash(folder / "adapter_model.safetensors")
    if tensors is None:
        return None
    config = dict(read_json(folder / "adapter_config.json"))
    config.pop("base_model_name_or_path", None)
    config.pop("revision", None)
    if isinstance(config.get("target_modules"), list):  # PEFT writes a set, in any order
        config["target_modules"] = sorted(map(str, config["target_modules"]))
    return combined_hash(tensors, json.dumps(config, sort_keys=True))


def file_hash(path):
    """The sha256 of a file's bytes; None for a name that is no file (a toy task, a hub name)."""
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
    """Numbers (n,) of the rows of keys (n, 2): equal rows have equal numbers, 0, 1, .. in the order
    of their first occurrence."""
    pairs = np.ascontiguousarray(keys).view("u8,u8")[:, 0]
    _, first, group = np.unique(pairs, return_index=True, return_inverse=True)
    rank_of_first = first.argsort().argsort()
    return rank_of_first[group]


def duration(seconds):
    """Seconds as a text: '40 s', '12 min', '3.5 h', '2.1 days'."""
    for unit, size in (("days", 86400), ("h", 3600)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


# ---- What a run records --------------------------------------------------------------------------

def git(*words):
    """The output of a git command in this repository; None if it fails, or there is no git."""
    here = Path(__file__).resolve().parent
    try:
        ran = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def environment():
    """What a result may depend on in addition to its configuration: versions, and the commit of
    this code."""
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    packages = ("torch", "safetensors", "tokenizers", "huggingface-hub", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"python": sys.version.split()[0], **versions, "commit": commit,
            "clean": None if changes is None else not changes}


class Tracker:
    """Sends the numbers of metrics.jsonl to TensorBoard or Weights & Biases as well. The package is
    imported only if --track names it; resumption still reads metrics.jsonl."""

    PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}

    @classmethod
    def package(cls, kind):
        """The tracker's module; InputError if it is not installed."""
        try:
            return importlib.import_module(cls.PACKAGES[kind])
        except ImportError:
            raise InputError(f"--track {kind}: the package {kind} is not installed: pip install "
                             f"{kind}, or leave --track out") from None

    def __init__(self, kind, folder, config):
        package = self.package(kind)
        folder = Path(folder)
        self.writer = None
        self.run = None
        if kind == "tensorboard":
            self.writer = package.SummaryWriter(str(folder / "tensorboard"))
        else:
            self.run = package.init(project="polychromic-lora", name=folder.name, config=config,
                                    dir=str(folder))

    def log(self, line):
        """Send a line's numbers; lines without a step, such as the last one, belong to no curve.
        """
        if "step" not in line:
            return
        numbers = {}
        for name, value in line.items():
            if type(value) in (int, float) and name != "step":
                numbers[name] = value
        if self.run:
            self.run.log(numbers, step=line["step"])
            return
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()


# ---- Seeds ---------------------------------------------------------------------------------------

def seed_of(*parts):
    """A 63-bit seed from anything printable. Unlike hash(), it is the same on every machine and
    Python."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# ---- Results of runs -----------------------------------------------------------------------------

def read_object(path, text=None):
    """The JSON object in a file, or in `text`, a line of it. NaN is read as null, which no metric
    accepts."""
    try:
        text = Path(path).read_text(encoding="utf-8") if text is None else text
        value = json.loads(text, parse_constant=lambda word: None)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: give folders of runs that were measured") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({str(error)[:100]}): correct it, or make "
                         "it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object: correct it, or make it again")
    return value
