"""Can a file do harm? Mutants of the six kinds of files that are read from others: each must be
taken or refused in one sentence. A traceback, a hang of more than 20 seconds or an allocation of
more than 2 GB is a fault.

    python tests/hostile.py                    # 2,000 of each kind, some minutes
    python tests/hostile.py --count 100 --only posts config.json

Each kind's mutants are worked through by a child process under a limit of its memory; a child that
dies is started again behind the mutant that ended it. Not for Windows.
"""

import argparse
import copy
import gzip
import json
import math
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch
from safetensors.torch import save_file

import data
from methods import pocket
from support import files
from support import posts as support_posts
from lora import drop_lora, load_adapter
from support.files import InputError
from model import Qwen3
from helpers import tiny_adapter, tiny_config, tiny_weights, write_adapter
from methods.small_base import train_tokenizer

SECONDS, MEMORY = 20, 2 * 2 ** 30
NUMBERS = (0, -1, 1, 2, 3, 7, 0.5, 1.5, -0.0, 1e30, 1e308, float("nan"), float("inf"),
           10 ** 9, 2 ** 31, 2 ** 32, 2 ** 63, 2 ** 64, 10 ** 40)
WORDS = ("", "x", " ", "\0", "\ud83d", "\u202e", "<|im_end|>", "1e+30", "torch.float32",
         "../../etc/passwd", "(a+)+$", "a" * 5000, "\u0130", "None", "🙂" * 50)
WHOLE = (None, True, False, [], {}, [[]], {"a": 1}, [None], [1, 2, 3], {"": {}}, [[[[[[]]]]]],
         list(range(300)))
TYPES = ("BPE", "WordPiece", "WordLevel", "Unigram", "ByteLevel", "Whitespace", "Metaspace",
         "Split", "Sequence", "NFC", "NFKC", "Lowercase", "Replace", "Prepend", "Strip",
         "TemplateProcessing", "BertProcessing", "RobertaProcessing", "Precompiled", "Digits",
         "Punctuation", "Fuse", "ByteFallback", "CTC", "F64", "F32", "I8", "U64", "BOOL",
         "F8_E5M2", "bfloat16", "float16", "LORA")
SPLINTERS = (b"\0", b"\xff\xfe", b"{", b"[" * 200_000, b"]", b'"', b"\\u", b"9" * 6000, b"\r\n",
             b"-", b"e9")


def odd(rng):
    """A copy: put into itself, a list would have no end, and each mutant would depend on those
    before it."""
    return copy.deepcopy(rng.choice((NUMBERS, WORDS, WHOLE, TYPES)[rng.randrange(4)]))


def places(value, found, parent=None, key=None, depth=0):
    """Every (container, key) of a JSON value, but of long lists and dicts only some."""
    if parent is not None:
        found.append((parent, key))
    if isinstance(value, (dict, list)) and depth < 8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for k in keys if len(keys) < 40 else random.Random(len(keys)).sample(keys, 40):
            places(value[k], found, value, k, depth + 1)


def mutate_value(value, rng):
    """A JSON value with one to three things changed in it, anywhere."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = []
        places(value, found)
        if not found:
            return odd(rng)
        where, key = rng.choice(found)
        kind = rng.randrange(8)
        if kind == 0:
            del where[key]
        elif kind == 1 and isinstance(where, dict):
            where[str(odd(rng))] = where.pop(key)
        elif kind == 2 and isinstance(where, list):
            where.insert(rng.randrange(len(where) + 1), odd(rng))
        elif kind == 3 and isinstance(where[key], (int, float)):
            where[key] = where[key] * rng.choice((-1, 2, 1000, 0.5)) + rng.choice((0, 1, -1))
        elif kind == 4 and isinstance(where[key], (list, dict)):
            where[key] = type(where[key])()
        elif kind == 5 and isinstance(where[key], str):
            text = where[key]
            longer = text + rng.choice(WORDS)
            where[key] = rng.choice((text[1:], text + text, text[::-1], text.upper(), longer))
        else:
            where[key] = odd(rng)
    return value


def dumped(value):
    """JSON bytes; half characters stay as escapes, NaN as Python writes it."""
    return json.dumps(value).encode()


def mutate_bytes(content, rng, head=None):
    """Some bytes changed, cut, doubled or put in; with `head`, mostly among the first that many."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        size = len(content) if head is None or rng.random() < 0.2 else min(head, len(content))
        at, kind = rng.randrange(size) if size else 0, rng.randrange(9)
        if kind == 0:
            del content[at:]
        elif kind == 1:
            del content[at:at + rng.randrange(1, 40)]
        elif kind == 2:
            content[at:at] = rng.choice(SPLINTERS)
        elif kind == 3:
            content[at:at] = content[at:at + rng.randrange(1, 200)]
        elif content:
            content[at] = rng.randrange(256) if kind % 2 else content[at] ^ 1 << rng.randrange(8)
    return bytes(content)


def mutate_json(value, rng):
    if rng.random() < 0.75:
        return dumped(mutate_value(value, rng))
    return mutate_bytes(dumped(value), rng)


def mutate_header(head, rng):
    """A header that is sound in itself and says something else: another dtype of the same width, a
    shape of the same size, tensors exchanged or called otherwise."""
    tensors = sorted((n, t) for n, t in head.items() if n != "__metadata__")
    (one, a), (two, b) = rng.sample(tensors, 2)
    kind = rng.randrange(5)
    if kind == 0:
        a["dtype"] = rng.choice(("I32", "U32"))
    elif kind == 1:
        shape = a["shape"]
        a["shape"] = rng.choice((shape[::-1], [1, *shape], [*shape, 1], [math.prod(shape)]))
    elif kind == 2:
        head[one], head[two] = b, a
    elif kind == 3:
        other = rng.choice((one.replace(".0.", ".7."), one + ".x", one.removeprefix("model."),
                            one * 200, "\n" + one))
        head[other] = head.pop(one)
    else:
        head["__metadata__"] = {"format": rng.choice(WORDS[5:])}
    return head


def mutate_tensors(content, rng):
    """A safetensors file: its header as JSON, the length in front of it, or bytes anywhere."""
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.6:
        head = json.loads(content[8:8 + size])
        head = dumped(mutate_value(head, rng) if rng.random() < 0.5 else mutate_header(head, rng))
        return struct.pack("<Q", len(head)) + head + content[8 + size:]
    if rng.random() < 0.1:
        other = rng.choice((2 ** 63, 2 ** 32, 0, 10 ** 9, size - 1, size + 1))
        return other.to_bytes(8, "little") + content[8:]
    return mutate_bytes(content, rng, head=8 + size)


class World:
    """Good files in a folder, and for each kind what is read from a mutant of it."""

    def __init__(self, folder):
        self.folder = folder
        posts = pocket.pocket_posts(12)
        self.tokenizer = train_tokenizer([t for p in posts for t in (p.post, *p.replies)], 400)
        config = tiny_config(True, vocab_size=420, hidden_size=24, intermediate_size=32,
                             num_hidden_layers=2, num_attention_heads=4, head_dim=8)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_bytes(dumped(config))
        save_file(tiny_weights(config, 3), folder / "model.safetensors")
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_adapter(folder, tiny_adapter(config, 4, 5), 4, 8)
        lines = [{"id": p.id, "post": p.post, "replies": dict(zip(p.styles, p.replies)),
                  "intent": p.intent} for p in posts[:6]]
        lines += [{"post": p.post, "replies": list(p.replies)} for p in posts[6:9]]
        lines += [{"tweet_id": i, "tweet": p.post, "reply": p.replies[0]}
                  for i, p in enumerate(posts[9:])]
        self.lines = lines
        self.model = Qwen3.from_pretrained(folder)
        self.good = {n: (folder / n).read_bytes() for n in KINDS if n != "posts"}

    def mutant(self, kind, rng):
        if kind == "posts":
            some = self.lines[:6]
            if rng.random() < 0.7:
                some = rng.sample(self.lines, rng.randrange(1, 5))
            rows = [dumped(line) if rng.random() < 0.5 else mutate_json(line, rng) for line in some]
            content = b"\n".join(rows)
            return mutate_bytes(content, rng) if rng.random() < 0.2 else content
        content = self.good[kind]
        if kind.endswith("safetensors"):
            return mutate_tensors(content, rng)
        return mutate_json(json.loads(content), rng)

    def read(self, kind, content, rng):
        """What a program does with such a file."""
        if kind == "posts":
            return self.read_posts(content, rng)
        (self.folder / kind).write_bytes(content)
        try:
            if kind == "tokenizer.json":
                self.read_tokenizer()
            elif kind.startswith("adapter"):
                load_adapter(self.model, self.folder)(torch.arange(6)[None])
            else:
                with suppress(InputError):             # read first, and the model says more
                    data.load_tokenizer(self.folder)
                Qwen3.from_pretrained(self.folder)(torch.arange(6)[None])
        finally:
            drop_lora(self.model)
            (self.folder / kind).write_bytes(self.good[kind])

    def read_tokenizer(self):
        tokenizer = data.load_tokenizer(self.folder)
        data.check_chat(tokenizer, self.folder)
        for text in ("Rain again <|im_end|>", "\u4e16\u754c 👋\n\n", "a" * 3000, ""):
            ids = data.encode_prompt(tokenizer, [{"role": "user", "content": text}])
            ids += data.encode_reply(tokenizer, text)
            data.decode(tokenizer, ids)
            self.model(torch.tensor([ids[:64]]))
        data.stop_ids(tokenizer)

    def read_posts(self, content, rng):
        packed = rng.random() < 0.2
        path = self.folder / ("posts.jsonl.gz" if packed else "posts.jsonl")
        content = gzip.compress(content, 1) if packed else content
        path.write_bytes(mutate_bytes(content, rng) if packed and rng.random() < 0.3 else content)
        posts = data.load_posts(path, skip_bad_lines=rng.random() < 0.6)
        domain = data.load_domain(path, "auto", posts)
        for post in data.split_posts(posts, [len(posts)], 1)[0]:
            data.encode_prompt(self.tokenizer, domain.messages(post))
            draw = random.Random(post.key)
            reply = domain.reply(post, domain.author(post, draw), draw)
            data.encode_reply(self.tokenizer, reply)
            files.printable(reply)
            if domain.styles:
                domain.styles_of(post, reply)
        support_posts.save_posts(posts, self.folder / "again.jsonl")
        again = data.load_posts(self.folder / "again.jsonl")
        assert [p.post for p in again] == [p.post for p in posts]


class Hang(BaseException):
    pass


def late(*_):
    raise Hang


def outcome(world, kind, number, seed):
    """taken, or refused; anything else is described."""
    rng = random.Random(f"{seed} {kind} {number}")
    content = world.mutant(kind, rng)
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        world.read(kind, content, rng)
        return "taken"
    except InputError as e:
        said = str(e)
        if "\n" not in said and len(said) < 600:
            return "refused"
        return f"a message of {len(said)} characters: {said[:300]!r}"
    except BaseException as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        return f"{type(e).__name__}: {str(e)[:200]} at {Path(where.filename).name}:{where.lineno}"
    finally:
        signal.alarm(0)


def limit_memory():
    """2 GB beyond what the process has in its address space now."""
    sizes = Path("/proc/self/statm")
    pages = int(sizes.read_text().split()[0]) if sizes.exists() else 2 ** 20
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def work(folder, kind, first, count, seed, out):
    """In a child: a line of `out` before and after each mutant."""
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)                    # panics and counted lines are written there
    world = World(folder)
    posts = b"\n".join(map(dumped, world.lines[:6]))
    world.read(kind, posts if kind == "posts" else world.good[kind], random.Random(0))
    limit_memory()
    for number in range(first, count):
        for word in ("begun", None):
            began = time.monotonic()
            said = word or outcome(world, kind, number, seed)
            out.write(json.dumps([number, said, time.monotonic() - began]) + "\n")
            out.flush()


def try_kind(root, kind, count, seed):
    """{"taken": n, "refused": n, "slowest": seconds, "faults": [..]} of `count` mutants of a
    kind."""
    first, log = 0, root / f"{kind}.log"
    while first < count:
        with open(log, "a") as out:
            child = os.fork()
            if child == 0:
                try:
                    work(root / f"{kind}-files", kind, first, count, seed, out)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc(file=sys.stdout)
                    os._exit(70)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 70:
            raise SystemExit(f"{kind}: the harness itself failed")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        first = lines[-1][0] + 1
        if lines[-1][1] == "begun":
            with open(log, "a") as out:
                out.write(json.dumps([first - 1, f"ended the process with {code}", 0]) + "\n")
    done = [line for line in map(json.loads, log.read_text().splitlines()) if line[1] != "begun"]
    said = [line[1] for line in done]
    return {"taken": said.count("taken"), "refused": said.count("refused"),
            "slowest": max(line[2] for line in done),
            "faults": [line[:2] for line in done if line[1] not in ("taken", "refused")]}


KINDS = ("posts", "config.json", "model.safetensors", "tokenizer.json", "adapter_config.json",
         "adapter_model.safetensors")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--count", type=int, default=2000, help="mutants of each kind")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", nargs="+", default=KINDS, choices=KINDS)
    args, faults = p.parse_args(), 0
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.only:
            tried = try_kind(Path(folder), kind, args.count, args.seed)
            faults += len(tried["faults"])
            print(f"{kind}: {args.count} mutants, {tried['taken']} taken, "
                  f"{tried['refused']} refused, slowest {tried['slowest']:.2f} s, "
                  f"{len(tried['faults'])} faults", flush=True)
            for number, said in tried["faults"][:20]:
                print(f"    {number}: {said}", flush=True)
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
