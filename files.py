"""What every room needs: an error for the user, reading files, and writing them in one piece."""

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
