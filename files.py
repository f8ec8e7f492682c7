"""What every room needs: an error for the user, texts that do no harm, reading files, and writing
them in one piece."""

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
    write_any_character()
    args, rank = parser.parse_args(argv), os.environ.get("RANK") or "0"
    try:
        args.run(args)
        if sys.stdout:
            sys.stdout.flush()               # here, where a failure is still a sentence
        return 0
    except (InputError, OSError) as e:       # the second: the disk is full, or access is denied
        if isinstance(e, OSError) and e.errno in (errno.EPIPE, errno.EINVAL) and reader_left():
            give_up_stdout()
            return CLOSED_PIPE
        hint = "" if isinstance(e, InputError) else hint_for(e)
        said = printable(f"error: {e}{hint}")  # of which a hostile file may have given a part
        print(said + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr)
        give_up_stdout()                     # a full disk must not be told of twice
        return 2
    except KeyboardInterrupt:  # before or after the steps; these are finished first
        print("stopped", file=sys.stderr)
        return 130


CLOSED_PIPE = 141                # a shell's code of a program whose reader, such as head, has left


def write_any_character():
    """Let what the terminal's or file's encoding lacks, such as an emoji in cp1252, be replaced by
    a question mark in what is printed."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    ascii_only = ("ascii", "us-ascii", "ansi_x3.4-1968")
    if hasattr(sys.stdin, "reconfigure") and sys.stdin.encoding.lower() in ascii_only:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # typed posts may have emoji


def reader_left():
    """Has the program behind the pipe that stdout is ended?"""
    try:
        place = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # none, or a test's
        return False
    if not hasattr(select, "poll"):          # Windows
        return True
    poll = select.poll()
    poll.register(place, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def give_up_stdout():
    """Where stdout cannot be written to, drop what it still holds: Python would try again at its
    end, and print a second error."""
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


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def hint_for(error):
    """What to do about an error of the system, by its number."""
    if error.errno in FULL:
        return ": make room there, or choose another place"
    if error.errno in DENIED:
        return ": change its permissions, or choose another place"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return ": check the path"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ": too many files are open; raise the limit (ulimit -n)"
    return ""


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


def first_rank():
    """Whether this process does what one rank does for all: it is alone, or rank 0. RANK without
    WORLD_SIZE was left behind by another launch."""
    alone = (os.environ.get("WORLD_SIZE") or "1") == "1"
    return alone or (os.environ.get("RANK") or "0") == "0"


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
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", "")
    if not isinstance(template, (str, type(None))) or template == "":
        raise InputError(f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor "
                         "a list with one that is named default: put the template in "
                         "chat_template.jinja")
    return template


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


def recorded_hash(run, name="model"):
    """The hash of the input `name` that a run recorded, or the run whose adapter folder this is;
    None where none is recorded, or only an older version's, which cannot be compared."""
    path = Path(run) / "config.json"
    if not path.exists():                    # RUN/adapter
        path = Path(run).resolve().parent / "config.json"
    found = read_json(path).get(f"{name}_hash") if path.exists() else None
    return found if str(found).startswith(WHOLE_HASH) else None


def base_hash(run):
    """The recorded hash of the base that a run was trained on; None where it is not known."""
    return recorded_hash(run, "model")


WHOLE_HASH = "sha256:"  # begins a hash over all of an input's bytes; older versions hashed a part of them


@functools.lru_cache(maxsize=1024)
def hash_unless_changed(path, size, changed):
    """file_hash of a large file, computed once a process as long as size and time stay."""
    return file_hash(path)


def content_hash(path):
    """The sha256 of a file, kept for as long as the file is not written to; None for no file."""
    if not os.path.isfile(path):
        return None
    found = os.stat(path)
    return hash_unless_changed(os.path.realpath(path), found.st_size, found.st_mtime_ns)


def combined_hash(*parts):
    """One hash of an input that has several parts: texts, numbers, hashes, None."""
    return WHOLE_HASH + hashlib.sha256(repr(parts).encode()).hexdigest()


def chat_hash(path, revision=None):
    """The hash of what turns posts into tokens: a checkpoint's tokenizer and chat template."""
    folder = fetch(path, revision)
    return combined_hash(content_hash(folder / "tokenizer.json"), read_template(folder))


def adapter_hash(folder):
    """The hash of an adapter: its tensors and its configuration, without the name of the base,
    which has a hash of its own. None where there is no adapter."""
    folder = Path(folder)
    tensors = content_hash(folder / "adapter_model.safetensors")
    if tensors is None:
        return None
    config = read_json(folder / "adapter_config.json")
    names = ("base_model_name_or_path", "revision")
    config = {k: v for k, v in config.items() if k not in names}
    if isinstance(config.get("target_modules"), list):  # PEFT writes a set, in any order
        config["target_modules"] = sorted(map(str, config["target_modules"]))
    return combined_hash(tensors, json.dumps(config, sort_keys=True))


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
