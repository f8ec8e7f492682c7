"""Posts and replies: files, splits, the chat format, batches, the domains and the pocket world.

    python data.py check posts.jsonl                       # read your file, show what is in it
    python data.py split --data pocket --sizes base=5000,sft=1000,grpo=1000,eval=200 --out runs/data

A domain says how a post is put to the model and how a draft is judged. Two have an exact
verifier: `voices` (a right reply in each of several voices) and `pocket` (a small world whose words
are in pocket.py); for `replies`, posts with one or more human replies, there are rewards."""

import argparse
import dataclasses
import functools
import gzip
import hashlib
import json
import random
import re
import sys
import tempfile
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count as counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import formats
from files import (  # noqa: F401  (by the door through which most rooms look for them)
    CONTROL, InputError, await_file, base_hash, begin, beside, command, control_of, fetch,
    file_hash, first_rank, groups, harmless, hashed, printable, read_json, read_text, short, without_control,
    write_json, write_text)
from formats import same_text
from pocket import (
    POCKET, SHAPES, SUMS, TALES, TASK, expand, parse, polish, scene_maker, shape_of, write_sum)
from sandbox import NotAllowed, allowance, checked_tests, program_of, run_program
from solutions import failing_solutions

# ---- Files of posts ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Post:
    """A post and the replies people gave, or the right replies, one a voice: `voices` is parallel
    to `replies` or empty. `intent` groups posts that ask for the same. `tests`, of a task of code:
    JSON of what Code runs."""
    id: str
    post: str
    replies: tuple[str, ...]
    voices: tuple[str, ...] = ()
    intent: str = ""
    tests: str = ""
    prompt: bool = False         # put to the model as it stands

    @property
    def key(self):
        """Key for per-post seeds: a hash of the text, because ids are user-supplied and may
        collide. Posts of prose that differ in their signs alone share one; tasks of code do not."""
        text = self.same if self.tests else normalise(self.post)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def same(self):
        """The form of the text in which posts are compared."""
        return same_text(self.post, code=bool(self.tests))


NO_LETTERS = bytes(c for c in range(128) if not chr(c).isalnum())


def normalise(text):
    """Lower-cased letters, marks and digits, nothing else: the form in which replies are compared
    (posts: same_text). Two are the same when they differ in letter case, punctuation, spacing and
    in the way of writing a character (NFKC) alone. Marks stay: without them Hindi and Thai words
    that differ become equal."""
    if text.isascii():  # the same, fifty times faster
        return text.encode().lower().translate(None, NO_LETTERS).decode()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LMN")


def load_posts(path, *, skip_bad_lines=False, max_chars=20_000):
    """Posts from JSON lines, plain or .gz. A line: {"id", "post", "replies": [..] or {voice: ..}},
    or "reply": "..", or the fields tweet_id, tweet, reply; or {"prompt"} and, of a reply,
    "completion", "response" or "chosen"; or a task of HumanEval or MBPP. Other fields are left
    alone and counted in `.unread`. Lines of the same post (same_text) are merged, their replies
    kept in order, but of a post with replies by voice the first line alone counts; an id that
    another post has already gets a number.

    A bad line (not UTF-8, not JSON, no post, no reply, a wrong type, a field twice, over
    `max_chars` characters) raises InputError with file, line and reason; with skip_bad_lines it is
    left out and counted on stderr. Returns a sequence that reads a post when it is asked for.
    """
    return PostFile(path, skip_bad_lines, max_chars)


class PostFile(Sequence):
    """The posts of a file. Kept of each is where its lines stand, some thirty bytes a line, so a
    million posts fit anywhere; a post is read again when it is asked for. `kinds`: see kinds_of."""
    unique = True                # no two posts are the same text

    def __init__(self, path, skip_bad_lines=False, max_chars=20_000):
        self.path, self.max_chars = path, max_chars
        self.recent, self.names = {}, {}     # {place: Post}, lately asked for; {place: its new id}
        number, bad, reason = 0, [], ""
        # Of each line: 16 bytes of its post's hash and 8 of its id's; its number and offset; its
        # kind's number.
        marks, lines = array("Q"), array("Q")
        kinds = array("Q")
        self.kinds, self.unread = {}, Counter()
        try:
            for number, line, place in self.read_lines():
                try:
                    d = read_line(line)
                    post = post_of(d, number, max_chars)
                except ValueError as e:
                    if not skip_bad_lines:
                        raise InputError(bad_line(path, number, e, not lines)) from None
                    bad.append(number)
                    reason = reason or str(e)
                    continue
                marks.frombytes(hashed(post.same, 16) + hashed(post.id, 8))
                kinds.append(self.kinds.setdefault(kind_of(post), len(self.kinds)))
                lines.extend((number, self.keep(line, place)))
                self.unread.update(d.keys() - formats.READ)
        except FileNotFoundError:
            raise InputError(f"there is no file {path}: give --data a file of posts") from None
        except (OSError, EOFError, zlib.error) as e:
            raise InputError(cannot_be_read(path, number, e)) from None
        if bad and lines:
            print(f"{path}: {len(bad)} bad lines left out (first: line {bad[0]})", file=sys.stderr)
        if bad and not lines:
            raise InputError(bad_line(path, bad[0], reason, True, every=True))
        if not lines:
            raise InputError(f"{path} holds no posts: it is empty")
        self.index(*(np.frombuffer(x, np.uint64) for x in (marks, kinds, lines)))

    def read_lines(self):
        """(number, line, offset) of each line that is not blank; of one that is far too long, its
        beginning. What is packed, or a pipe, cannot be read from the middle: its lines go to a file
        without a name."""
        packed = str(self.path).endswith(".gz")
        source = (gzip.open if packed else open)(self.path, "rb")
        self.copied = packed or not source.seekable()
        self.file = tempfile.TemporaryFile() if self.copied else source
        for number in counter(1):
            place = 0 if self.copied else source.tell()
            line = rest = source.readline(LONGEST_LINE)
            while len(rest) == LONGEST_LINE:
                rest = source.readline(LONGEST_LINE)
            if not line:
                return
            if line.strip():
                yield number, line, place

    def keep(self, line, place):
        """Where the line can be read again."""
        if self.copied:
            place = self.file.tell()
            self.file.write(line.rstrip(b"\n") + b"\n")
        return place

    def index(self, marks, kinds, lines):
        """Lines of equal posts together, posts in the order of their first lines, ids told apart:
        files joined into one repeat theirs."""
        marks, lines = marks.reshape(-1, 3), lines.reshape(-1, 2)
        post = groups(marks[:, :2])                                 # of each line
        order = post.argsort(kind="stable")
        self.ends = np.bincount(post).cumsum()
        first = order[np.append(0, self.ends[:-1])]                 # each post's first line
        self.lines = lines[order]
        names = list(self.kinds)
        voiced = np.array([bool(voices) for voices, *_ in names])[kinds]
        later = np.ones(len(post), bool)
        later[first] = False
        dropped = later & (voiced | voiced[first][post])                    # see merge
        self.dropped = int(dropped.sum())
        merged = np.flatnonzero(later & ~dropped)
        self.merged = len(merged)
        if self.merged:          # the numbers of the first such line and of the line it went to
            self.merged_first = [int(lines[i, 0]) for i in (merged[0], first[post[merged[0]]])]
        seen, places = np.unique(kinds[first], return_index=True)
        self.kinds = {names[i]: place for i, place in zip(seen.tolist(), places.tolist())}
        given, origin, at = np.unique(marks[first, 2], return_index=True, return_inverse=True)
        made, counts = set(), {}
        for place in np.flatnonzero(origin[at] != np.arange(len(first))).tolist():
            name = self[place].id
            for n in counts.setdefault(name, counter(2)):
                new = f"{name}-{n}"
                mark = np.frombuffer(hashed(new, 8), np.uint64)
                if new not in made and np.searchsorted(given, mark) == np.searchsorted(
                        given, mark, "right"):
                    break
            made.add(new)
            self.names[place] = new
        self.recent.clear()

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        if place not in self.recent:
            if len(self.recent) >= 256:
                self.recent.clear()
            self.recent[place] = self.read(place)
        return self.recent[place]

    def read(self, place):
        posts = {}
        try:
            for number, offset in self.lines[self.ends[place - 1] if place else 0:self.ends[place]]:
                self.file.seek(offset)
                merge(posts, parse_line(self.file.readline(), number, self.max_chars))
            post, = posts.values()
        except (OSError, ValueError):
            raise InputError(f"{self.path} was changed while it was in use: start again") from None
        name = self.names.get(place)
        return dataclasses.replace(post, id=name) if name else post

    def __eq__(self, other):
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))


class Chosen(Sequence):
    """Some of the posts, by their places."""

    def __init__(self, posts, places):
        self.posts, self.places = posts, places
        self.unique = getattr(posts, "unique", False)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self.posts[i] for i in self.places[place]]
        return self.posts[self.places[place]]

    __eq__ = PostFile.__eq__


LONGEST_LINE = 2 ** 24           # bytes: more would take gigabytes to parse


def kind_of(post):
    """What decides on a post's domain: its voices; which domain knows it for its own, if any; and
    whether it has no reply to learn from."""
    claim = next((name for name, domain in DOMAINS.items() if domain.claims(post)), "")
    return frozenset(post.voices), claim, not post.replies


def kinds_of(posts):
    """{kind: place of the first post of that kind}."""
    if isinstance(posts, PostFile):
        return posts.kinds
    kinds = {}
    for place, post in enumerate(posts):
        kinds.setdefault(kind_of(post), place)
    return kinds


def bad_line(path, number, reason, first, every=False):
    """What to say of a bad line. first: no line before it was good, so that the file may be of
    another format altogether. every: no line is good."""
    other = formats.other_format(path) if first else None
    if other:
        return f"{path} {other}"
    if every:
        return f"{path} holds no posts: every line is bad, the first, line {number}: {reason}"
    return f"{path}, line {number}: {reason} (--skip-bad-lines leaves such lines out)"


def cannot_be_read(path, number, error):
    """What to say of a file that ends in an error of the system or of gzip."""
    if os.path.isdir(path):
        return f"{path} is a folder: give a file of posts"
    if isinstance(error, PermissionError):
        return f"{path} may not be read by this user: change its permissions"
    if isinstance(error, gzip.BadGzipFile) and not number:
        return f"{path} is not packed with gzip: give it a name that does not end in .gz"
    return f"{path} cannot be read after line {number} ({error}): is it whole?"


def read_line(line):
    """One line of bytes -> its JSON object; ValueError says what is wrong with it."""
    if len(line) == LONGEST_LINE:
        raise ValueError(f"a line of more than {LONGEST_LINE:,} bytes")
    return formats.read_object(line)


def parse_line(line, number, max_chars):
    """One JSON line -> Post; ValueError says what is wrong with it."""
    return post_of(read_line(line), number, max_chars)


def post_of(d, number, max_chars):
    """The Post of a line's JSON object; ValueError says what is wrong with it."""
    d = formats.fields_of(d)
    tests, post, replies = "", d["post"], d["replies"]
    if not isinstance(post, str) or not post.strip():
        raise ValueError('no "post" (or "tweet", or "prompt") text: it is empty, or no text')
    voices = tuple(replies) if isinstance(replies, dict) else ()
    replies = list(replies.values()) if voices else replies
    replies = [replies] if isinstance(replies, str) else replies
    replies = [] if replies is None and d["prompt"] else replies   # to be answered freely
    if d["tests"] is not None:
        tests = json.dumps(checked_tests(d["tests"]), ensure_ascii=False)
    if not isinstance(replies, list) or not replies and not d["prompt"]:
        raise ValueError('no "replies" (or "reply")')
    if not all(isinstance(r, str) and r.strip() for r in replies):
        raise ValueError("a reply is not a text, or is empty")
    if not normalise(post):
        raise ValueError("the post has no letter or digit")
    if voices and not all(map(normalise, replies)):  # an empty draft would be right in that voice
        raise ValueError("a reply in a voice has no letter or digit")
    name = f"line-{number}" if d["id"] is None else str(d["id"])
    intent = str("" if d["intent"] is None else d["intent"])
    if max(map(len, (post, name, intent, *replies, *voices))) > max_chars:
        raise ValueError(f"a text of more than {max_chars:,} characters")
    try:
        "".join((name, post, intent, *replies, *voices)).encode("utf-8")
    except UnicodeEncodeError:  # neither a file nor the tokenizer takes it
        raise ValueError("half a character (an escape like \\ud83d without its pair)") from None
    replies = tuple(r.strip() for r in replies)
    return Post(name, post.strip(), replies, voices, intent, tests, d["prompt"])


def merge(posts, post):
    """Add a post to {form of its text: Post}; the same text again brings only its new replies, and
    nothing where either has replies by voice: one text, one right reply in each voice."""
    old = posts.get(post.same)
    if old is None:
        posts[post.same] = post
    elif not old.voices and not post.voices:
        replies = old.replies + tuple(r for r in post.replies if r not in old.replies)
        posts[post.same] = dataclasses.replace(old, replies=replies)


def save_posts(posts, path):
    """The same layout, one post a line."""
    with beside(path) as new, open(new, "w", encoding="utf-8") as file:
        for p in posts:
            replies = dict(zip(p.voices, p.replies)) if p.voices else list(p.replies)
            line = {"id": p.id, "post": p.post, "replies": replies}
            line |= {"intent": p.intent} if p.intent else {}
            line |= {"tests": json.loads(p.tests)} if p.tests else {}
            line |= {"prompt": p.post} if p.prompt else {}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def split_posts(posts, sizes, seed):
    """Disjoint random sequences of posts of the given sizes: disjoint by text, not by line."""
    unique = range(len(posts))
    if not getattr(posts, "unique", False):
        unique = {p.same: i for i, p in enumerate(posts)}.values()
    places = array("Q", unique)
    if sum(sizes) > len(places):
        raise InputError(f"{sum(sizes)} posts are asked for ({' + '.join(map(str, sizes))}) and "
                         f"there are {len(places)} different ones: ask for fewer")
    random.Random(f"split {seed}").shuffle(places)
    ends = np.cumsum([0, *sizes])
    return [Chosen(posts, places[a:b]) for a, b in zip(ends, ends[1:])]


def split_by_intent(posts, sizes, seed, scenes=40):
    """{name: posts} as split_posts, but parts whose names begin with `eval` hold intents that no
    other part has: what is measured there was never seen, not only put otherwise."""
    outside = [n for n in sizes if n.startswith("eval")]
    numbers = Counter(p.intent for p in posts)
    if "" in numbers or len(numbers) < 2 or not outside:
        raise InputError('--by intent needs posts with an "intent" each, and a part called eval')
    intents = sorted(numbers)
    held, found = set(), 0
    random.Random(f"intents {seed}").shuffle(intents)
    # As many intents as bring the eval parts' share of posts, and no fewer than needed; but 200
    # posts of five scenes say less than 200 of forty: more, while the other parts find enough.
    wanted = sum(sizes[n] for n in outside)
    room = len(posts) - sum(sizes.values()) + wanted
    wanted = max(wanted, len(posts) * wanted / sum(sizes.values()))
    for intent in intents:
        if found + numbers[intent] <= room and (found < wanted or len(held) < scenes):
            held.add(intent)
            found += numbers[intent]
    parts = {}
    for names in ([n for n in sizes if n not in outside], outside):
        inside = (i for i, p in enumerate(posts) if (p.intent in held) == (names is outside))
        some = Chosen(posts, array("Q", inside))
        parts |= zip(names, split_posts(some, [sizes[n] for n in names], seed))
    return {name: parts[name] for name in sizes}


# ---- The chat format and tokens ------------------------------------------------------------------

@dataclass(frozen=True)
class ChatFormat:
    """How a checkpoint's chat is written: ChatML, with an empty think block in front of an answer
    that is not thought about (Qwen3's hybrid models) or none (Qwen3-Instruct-2507, SmolLM2), and
    the system turn that its template puts in where a chat has none. think_history: every earlier
    answer keeps its think block, too (TRL's training template of Qwen3)."""
    think_block: bool = True
    system: str = ""
    think_history: bool = False


def render_chat(messages, *, add_generation_prompt, thinking=False, chat=ChatFormat()):
    """ChatML for system, user and assistant turns, character for character as the checkpoint's
    own template.

    With a think block, and without thinking, an empty one opens the answer, in the prompt; and a
    final assistant turn always has one, its own or an empty one, so that what is trained and what
    is prompted agree. Earlier assistant turns lose theirs, unless chat.think_history."""
    if chat.system and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": chat.system}, *messages]
    out, last_user = [], max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, m in enumerate(messages):
        content = m["content"]
        if m["role"] == "assistant" and chat.think_block:
            thought, mark, rest = content.rpartition("</think>")
            if m.get("reasoning_content") is not None:
                thought = m["reasoning_content"].strip("\n")
            elif mark:
                thought, content = thought.rpartition("<think>")[2].strip("\n"), rest.lstrip("\n")
            last = i > last_user and (i == len(messages) - 1 or thought)
            if last or chat.think_history:
                content = f"<think>\n{thought}\n</think>\n\n" + content.lstrip("\n")
        out.append(f"<|im_start|>{m['role']}\n{content}<|im_end|>\n")
    if add_generation_prompt:
        empty = "<think>\n\n</think>\n\n" if chat.think_block and not thinking else ""
        out.append("<|im_start|>assistant\n" + empty)
    return "".join(out)


def load_tokenizer(path, *, revision=None):
    """tokenizer.json of a folder or of a name on the hub -> tokenizers.Tokenizer, which neither
    pads nor cuts. InputError where its ids go beyond the rows that config.json gives the model."""
    file = fetch(path, revision) / "tokenizer.json"
    if not file.exists():
        raise InputError(f"{file} is missing: {other_tokenizer(file.parent)}")
    with tokenizer_errors(file):
        tokenizer = Tokenizer.from_str(read_text(file))
        tokenizer.no_padding()               # a file may ask for 128 tokens, whatever the text
        tokenizer.no_truncation()
        ids = vocabulary(tokenizer)
    config = file.with_name("config.json")
    if not config.exists() and file.with_name("adapter_config.json").exists():
        raise InputError(f"{config} is missing: {other_tokenizer(file.parent)}")
    config = read_json(config) if config.exists() else {}
    rows = config.get("vocab_size") if isinstance(config, dict) else None
    if isinstance(rows, int) and not 0 < ids <= rows:  # what else is wrong there the model says
        raise InputError(f"{file} has ids up to {ids - 1}, and config.json beside it rows for "
                         f"{rows} tokens: they are of different checkpoints, or tokens were added "
                         "without resize_token_embeddings")
    return tokenizer


def other_tokenizer(folder):
    """Says what a checkpoint's folder without tokenizer.json lacks."""
    if (folder / "adapter_config.json").exists():
        return "the folder is an adapter's: give its base model here, and the adapter as a run"
    slow = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
            if (folder / name).exists()]
    if slow:
        return (f"the folder has {slow[0]}, a tokenizer in an older format: convert it once with "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")
    return "copy the tokenizer of the model's source next to the weights"


def vocabulary(tokenizer):
    """One more than the largest id."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


@contextmanager
def tokenizer_errors(file):
    """InputError for what tokenizers raises: plain Exceptions, and panics, which are none."""
    try:
        yield
    except InputError:
        raise
    except BaseException as e:
        if isinstance(e, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise InputError(f"{file} is not a tokenizer that can be worked with "
                         f"({' '.join(str(e).split())[:100]}): fetch it again") from None


def check_chat(tokenizer, path):
    """InputError for a tokenizer that lacks the chat's marks, or that loses text."""
    text, file = "Ab, 12 \u00e9 \u4e16\u754c \U0001f44b ok", Path(path) / "tokenizer.json"
    with tokenizer_errors(file):
        for mark in ("<|im_start|>", "<|im_end|>"):
            ids = tokenizer.encode(mark, add_special_tokens=False).ids
            if ids != [tokenizer.token_to_id(mark)]:
                raise InputError(f"{file} has no token {mark}: give a checkpoint with Qwen3's chat "
                                 "format")
        ids = encode_reply(tokenizer, text) + stop_ids(tokenizer)
        back = decode(tokenizer, ids)
        if "<|im_end|>" in back or "<|endoftext|>" in back:
            raise InputError(f"{file} does not mark <|im_end|> or <|endoftext|> as special tokens, "
                             "so they would be part of every reply: set \"special\": true there")
        if back != text:
            raise InputError(f"{file} does not give a text back as it was ({text!r} became "
                             f"{back[:40]!r}): it is not a byte-level tokenizer such as Qwen3's")


def stop_ids(tokenizer):
    """Ids that end a reply: <|im_end|> in a chat, <|endoftext|> from a base model."""
    return [i for i in map(tokenizer.token_to_id, ("<|im_end|>", "<|endoftext|>")) if i is not None]


def encode_chat(tokenizer, messages, *, add_generation_prompt=True, chat=ChatFormat()):
    """Token ids of a chat of people's texts, whose only control tokens are the format's own."""
    control = control_of(tokenizer)
    messages = [m | {"content": harmless(m["content"], control)} for m in messages]
    text = render_chat(messages, add_generation_prompt=add_generation_prompt, chat=chat)
    return tokenizer.encode(text, add_special_tokens=False).ids


def encode_prompt(tokenizer, messages, chat=ChatFormat()):
    """Token ids of the chat up to the point where the reply starts."""
    return encode_chat(tokenizer, messages, chat=chat)


def encode_reply(tokenizer, reply):
    """Token ids of a reply and the <|im_end|> that ends it: just what the loss is taken over."""
    reply = without_control(reply, control_of(tokenizer))
    ids = tokenizer.encode(reply, add_special_tokens=False).ids
    return ids + [tokenizer.token_to_id("<|im_end|>")]


def decode(tokenizer, ids):
    """The text of a draft, without its stop token."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


# ---- Domains -------------------------------------------------------------------------------------

STEEPEST = 50                    # of long tails: beyond it shares are 0, or no numbers


def long_tail(voices, exponent):
    """{voice: share}, falling as (rank + 1) ** -exponent."""
    weights = [(rank + 1) ** -exponent for rank in range(len(voices))]
    return {v: w / sum(weights) for v, w in zip(voices, weights)}


class Domain:
    """Posts with a right reply in each of several voices. Readers differ: each likes one voice.

    A draft is right in a voice when it is the post's reply in that voice, letter case, punctuation
    and spacing aside (normalise). Readers are long-tailed over the voices: GRPO rewards and the
    evaluation draw them by popularity_of(post). SFT pairs come from writers, who are the readers
    unless they were given a long tail of their own. With `permute` each scene (a post's intent,
    less what follows its last /) has an order of voices of its own, for readers alone."""
    name = "voices"

    def __init__(self, posts, voices=None, popularity=1.5, writers=None, permute=False):
        self.voices = tuple(voices or (posts[0].voices if posts else ()))
        self.exponent, self.permute = popularity, permute
        self.writers_exponent = writers
        for name, x in (("popularity", popularity), ("writers", 0 if writers is None else writers)):
            if not -STEEPEST <= x <= STEEPEST:
                raise InputError(f"{name} is {x:g}: give a number from -{STEEPEST} to {STEEPEST}")

    @staticmethod
    def claims(post):
        """Is it a post that only this domain can judge?"""
        return False

    def permit(self, given):
        """What the user said of --allow-code-execution, for domains that run drafts."""

    def record(self):
        """What is fixed at the split and must be the same in every later stage, as JSON."""
        return {"domain": self.name, "voices": list(self.voices), "popularity": self.exponent,
                "writers": self.writers_exponent, "permute": self.permute}

    def messages(self, post):
        return [{"role": "user", "content": post.post}]

    def popularity_of(self, post):
        """{voice: share of this post's readers who like it}; {} in a domain without voices."""
        order = list(self.voices)
        if self.permute:
            scene = post.intent.rpartition("/")[0] or post.intent
            random.Random(f"readers of {scene}").shuffle(order)
        shares = long_tail(order, self.exponent)
        return {v: shares[v] for v in self.voices}

    @staticmethod
    def draw(shares, rng):
        return rng.choices(list(shares), list(shares.values()))[0] if shares else None

    def reader(self, post, rng):
        """The voice that this post's reader likes, drawn by popularity; None without voices."""
        return self.draw(self.popularity_of(post), rng)

    def writer(self, post, rng):
        """The voice of the person whose reply is learnt from."""
        if self.writers_exponent is None:
            return self.reader(post, rng)
        return self.draw(long_tail(self.voices, self.writers_exponent), rng)

    def reply(self, post, voice, rng):
        """A right reply to the post in that voice."""
        return post.replies[post.voices.index(voice)]

    def voices_of(self, post, draft):
        """The verifier: the voices in which the draft is right, () when it is wrong."""
        said = normalise(draft)
        return tuple(v for v, r in zip(post.voices, post.replies) if said and normalise(r) == said)

    def noisy_reply(self, post, others, rng, noise):
        """What an unreliable base is taught: with probability `noise` a reply to another post, else
        a right one, in a voice drawn evenly."""
        about = rng.choice(others) if rng.random() < noise else post
        return self.reply(about, rng.choice(self.voices), rng)

    def form(self, said, draft):
        """Is a draft shaped like a reply to the text `said`, in [0, 1]: the product of three shares
        that are 1 for an ordinary one. Length (3 to 60 words), words not copied (1 - share of the
        draft's word trigrams that stand in the post), no repetition (share of distinct bigrams)."""
        words = draft.lower().split()
        if not words:
            return 0.0
        grams = lambda w, n: [tuple(w[i:i + n]) for i in range(len(w) - n + 1)]
        length = min(1.0, len(words) / 3, 60 / len(words))
        trigrams, bigrams = grams(words, 3), grams(words, 2)
        theirs = set(grams(said.lower().split(), 3))
        copied = sum(g in theirs for g in trigrams) / max(len(trigrams), 1)
        return length * (1 - copied) * len(set(bigrams)) / max(len(bigrams), 1)


class Replies(Domain):
    """Real posts with people's replies and no verifier: judged by a reward (grpo.py)."""
    name = "replies"

    def __init__(self, posts, **ignored):
        super().__init__(())

    def messages(self, post):
        return [{"role": "user", "content": f"Write a short reply to this post:\n\n{post.post}"}]

    def reply(self, post, voice, rng):
        if not post.replies:
            raise InputError(f"the post {short(post.id)} has no reply to learn from: give posts "
                             "with replies (grpo.py needs none)")
        return rng.choice(post.replies)

    def voices_of(self, post, draft):
        raise InputError(f"posts of the domain {self.name} have no verifier: use a reward")


class Stories(Replies):
    """Prompts for stories and the like, with or without people's answers, put to the model as they
    stand: judged by a reward model or a judge, and by their diversity."""
    name = "stories"

    @staticmethod
    def claims(post):
        return post.prompt and not post.voices

    messages = Domain.messages


class Code(Domain):
    """Tasks of code: a draft is right, in the one voice `right`, when its program passes the task's
    tests in the sandbox (sandbox.py). Run only after permit."""
    name = "code"

    def __init__(self, posts, **readers):
        super().__init__(posts, **readers)
        self.posts, self.permitted, self.verdicts = posts, False, {}

    @staticmethod
    def claims(post):
        return bool(post.tests)

    def permit(self, given):
        """Let drafts be run, once every task's known solution has passed its own tests: where it
        fails, every draft would, without a word."""
        try:
            self.permitted = allowance(given)
        except NotAllowed as e:
            raise InputError(str(e)) from None
        if os.environ.get("RANK", "0") == "0":
            self.refuse(self.failing())

    def refuse(self, failing):
        """InputError where known solutions fail: how many, which, and why."""
        if failing:
            some = "; ".join(f"{short(self.posts[i].id)}: {why[:200]}"
                             for i, why in list(failing.items())[:3])
            more = "; .." if len(failing) > 3 else ""
            raise InputError(
                f"the known solution of {len(failing)} of {len(self.posts)} tasks does not pass "
                f"its own tests, so that no draft could ({some}{more}): correct these tasks, or "
                "leave them out by data.py split --allow-code-execution --skip-bad-lines")

    def failing(self):
        """{place of a task: why its known solution fails}."""
        try:
            return failing_solutions(self.posts, self.permitted)
        except NotAllowed as e:
            raise InputError(str(e)) from None

    def voices_of(self, post, draft):
        key = post.tests, draft
        if key not in self.verdicts:         # reward, gate and classes all ask
            if len(self.verdicts) >= 10_000:
                self.verdicts.clear()
            tests = json.loads(post.tests)
            program = program_of(draft, tests.pop("head"), tests["names"])
            try:
                self.verdicts[key] = run_program(program, allowed=self.permitted, **tests).passed
            except NotAllowed as e:
                raise InputError(str(e)) from None
        return ("right",) if self.verdicts[key] else ()


def make_domain(name, posts, **readers):
    """The domain called `name` for these posts; auto: pocket, voices or replies, by what the posts
    hold. A file in which some posts have voices and others none, or other ones, is refused: which
    domain it is of is the user's to say. readers: popularity, writers, permute of Domain."""
    voices, kinds = posts[0].voices if len(posts) else (), kinds_of(posts)
    odd = min((place for (other, *_), place in kinds.items() if other != set(voices)), default=None)
    voiced = bool(voices) and odd is None                                      # in any order
    claims = {claim for _, claim, _ in kinds}
    own = claims.pop() if odd is None and len(claims) == 1 else ""
    if name == "auto":
        if odd is not None:
            raise InputError(f"the posts {short(posts[0].id)} and {short(posts[odd].id)} have "
                             "replies in different voices, or one in none: mend the file, or give "
                             "--domain replies")
        name = own or ("voices" if voiced else "replies")
    if name not in DOMAINS:
        raise InputError(f"there is no domain {name!r}: choose auto, {', '.join(DOMAINS)}")
    made = f", written by data.py split --data {name}" if name in WORLDS else ""
    if (made or name == "code") and own != name or name == "voices" and not voiced:
        wanted = (f"replies in the same voices{made}" if name != "code" else
                  "tests and a known solution, as in HumanEval's and MBPP's formats")
        raise InputError(f"--domain {name} needs posts that all have {wanted}: use --domain "
                         "replies or auto")
    return DOMAINS[name](posts, **readers)


def load_domain(path, name, posts):
    """The domain of a file of posts. domain.json beside it, written at the split, decides: the
    first post of each part must not. Without one, what the posts hold."""
    place = Path(path).parent / "domain.json"
    if not place.exists():
        return make_domain(name, posts)
    record, number = read_json(place), (int, float)
    fields = {"domain": str, "voices": list, "permute": bool, "popularity": number,
              "writers": (*number, type(None))}
    good = isinstance(record, dict) and all(
        k in record and isinstance(record[k], kind) for k, kind in fields.items())
    if not (good and record["domain"] in DOMAINS
            and all(isinstance(v, str) for v in record["voices"])):
        raise InputError(f"{place} is not what data.py split writes: split again")
    if name not in ("auto", record["domain"]):
        raise InputError(f"--domain {name}: these posts were split as {record['domain']!r} (see "
                         f"{place}): leave --domain out, or split again")
    free = record["domain"] in ("replies", "stories")
    special = record["domain"] in WORLDS or record["domain"] == "code"
    for (voices, claim, _), first in kinds_of(posts).items():
        if not free and (not voices or voices != set(record["voices"])
                         or special and claim != record["domain"]):
            raise InputError(f"{path}: the post {short(posts[first].id)} has not the voices that "
                             f"its split was made with (see {place}): split again")
    readers = {name: record[name] for name in ("popularity", "writers", "permute")}
    return DOMAINS[record["domain"]](posts, voices=record["voices"], **readers)


# ---- The pocket world: its words are in pocket.py ------------------------------------------------

def pattern(parts):
    """The regular expression of all normalised texts of a parsed template; [n] is left in."""
    return "".join("[n]".join(map(normalise, p.split("[n]"))) if isinstance(p, str) else
                   "(?:" + "|".join(map(pattern, p)) + ")" for p in parts)


@functools.lru_cache(maxsize=4096)
def right_replies(template, thing):
    return re.compile(pattern(parse(template)).replace("[n]", normalise(thing)))


def pocket_posts(count, seed=0, name="pocket"):
    """`count` distinct posts of a pocket world, each with one right reply per voice written out.
    InputError when the world is too small for `count`."""
    rng, posts = random.Random(f"{name} {seed}"), {}
    misses = 0
    while len(posts) < count:
        text, intent, replies = WORLDS[name](rng)
        key = normalise(text)
        misses = misses + 1 if key in posts else 0
        if misses > 1000:
            raise InputError(f"the pocket world has no {count} different posts: ask for fewer")
        made = f"{name}-{seed}-{len(posts)}"
        posts.setdefault(key, Post(made, text, tuple(replies.values()), tuple(replies), intent))
    return list(posts.values())


class Pocket(Domain):
    """The pocket world: a draft is right in a voice when that voice's grammar for the post's event
    and thing parses it."""
    name, world = "pocket", POCKET

    @classmethod
    def claims(cls, post):
        theme, event, thing = (post.intent.split("/") + ["", "", ""])[:3]
        return (post.voices != () and set(post.voices) == set(cls.world.voices)
                and event in cls.world.openers and thing in cls.world.things.get(theme, "").split())

    def reply(self, post, voice, rng):
        _, event, thing = post.intent.split("/")
        return polish(expand(parse(self.world.voices[voice][event]), rng), thing)

    def voices_of(self, post, draft):
        _, event, thing = post.intent.split("/")
        said = normalise(draft)
        return tuple(v for v, events in self.world.voices.items()
                     if right_replies(events[event], thing).fullmatch(said))


class PocketStories(Pocket):
    """The same with stories: the voices are their themes."""
    name, world = "pocket-stories", TALES


class PocketCode(Domain):
    """Expressions in x that are n; the voices are the shapes of expressions."""
    name = "pocket-code"

    @staticmethod
    def make(rng):
        n, x = rng.choice(SUMS)
        text = expand(TASK, rng).replace("[n]", str(n)).replace("[x]", str(x))
        return text, f"sum/{n}/{x}", {s: write_sum(s, n, x, rng) for s in SHAPES}

    @staticmethod
    def numbers(post):
        kind, n, x = (post.intent.split("/") + ["", "", ""])[:3]
        return (int(n), int(x)) if kind == "sum" and (n + x).isdecimal() and n and x else None

    @classmethod
    def claims(cls, post):
        return cls.numbers(post) in SUMS and set(post.voices) == set(SHAPES)

    def reply(self, post, voice, rng):
        return write_sum(voice, *self.numbers(post), rng)

    def voices_of(self, post, draft):
        shape = shape_of(draft, *self.numbers(post))
        return (shape,) if shape else ()


# What data.py split --data NAME makes: name -> maker(rng) -> (post, intent, {voice: right reply}).
WORLDS = {"pocket": scene_maker(POCKET), "pocket-code": PocketCode.make,
          "pocket-stories": scene_maker(TALES)}
DOMAINS = {d.name: d for d in (
    Pocket, Domain, Replies, Code, Stories, PocketCode, PocketStories)}


# ---- Commands ------------------------------------------------------------------------------------

DROPPED = "lines left out: their post stands in an earlier line, one has replies by voice"


def say_what_was_read(posts):
    """Print how many lines were merged or dropped, and which fields are not read."""
    if dropped := getattr(posts, "dropped", 0):
        print(f"{dropped} {DROPPED}")
    if merged := getattr(posts, "merged", 0):
        line, earlier = posts.merged_first
        print(f"{merged} lines merged with an earlier line of the same post (first: line {line} "
              f"with line {earlier}): same but for letter case, spacing, full stops and the like")
    unread = getattr(posts, "unread", {})
    if "rejected" in unread:
        print(f"{unread['rejected']} lines have a \"rejected\" reply: rewards.py train learns from "
              "it in this file; as posts, and after a split, the chosen reply alone is kept")
    names = sorted(unread.keys() - {"rejected"})
    if names:
        print(printable(f"Fields that are not read: {formats.shown(names[:12])}"
                        + (", .." if len(names) > 12 else "")))


def known_solutions(posts, domain, args):
    """The posts, or with --skip-bad-lines those whose known solution passes. Known solutions are
    run where --allow-code-execution is given."""
    if domain.name != "code":
        return posts
    if not args.allow_code_execution:
        print(f"{len(posts)} tasks of code, whose known solutions were not run: give "
              "--allow-code-execution to run them, in a sandbox")
        return posts
    try:
        domain.permitted = allowance(args.allow_code_execution)
    except NotAllowed as e:
        raise InputError(str(e)) from None
    failing = domain.failing()
    if not args.skip_bad_lines or len(failing) == len(posts):
        domain.refuse(failing)
    for place, why in list(failing.items())[:5]:
        print(printable(f"{args.data}: {short(posts[place].id)}: its known solution fails: "
                        f"{why[:200]}"), file=sys.stderr)
    print(f"{len(posts) - len(failing)} of {len(posts)} known solutions pass their tests"
          + (f"; {len(failing)} tasks left out" if failing else ""))
    return Chosen(posts, [i for i in range(len(posts)) if i not in failing]) if failing else posts


def check(args):
    """Read a file as the phases will, and say what is in it."""
    posts = load_posts(args.data, skip_bad_lines=args.skip_bad_lines)
    domain = load_domain(args.data, args.domain, posts)
    marks, broken = array("Q"), 0
    for reply in (r for p in posts for r in p.replies):
        marks.frombytes(hashed(normalise(reply) or reply, 8))
        broken += bool(CONTROL.search(reply))
    different = len(np.unique(np.frombuffer(marks, np.uint64)))
    voices = f", voices {printable(', '.join(domain.voices))}" if domain.voices else ""
    print(f"{args.data}: {len(posts)} posts, {len(marks)} replies ({different} different), "
          f"domain {domain.name}{voices}")
    say_what_was_read(posts)
    known_solutions(posts, domain, args)
    if broken:
        print(f"{broken} replies hold control strings such as <|im_end|>, which are left out")
    for p in random.Random(0).sample(posts, min(max(args.show, 0), len(posts))):
        print(f"\n{printable(p.post)}")
        for i, r in enumerate(p.replies):
            print(printable(f"    {p.voices[i] + ': ' if p.voices else ''}{r}"))


def made(out, wanted):
    """Is the split in a folder the wanted one? An older one does not say what its file held."""
    return {"contents": wanted["contents"]} | read_json(out / "split.json") == wanted


def split(args):
    """Write NAME.jsonl for each NAME=N of --sizes into --out, disjoint by post, and domain.json:
    what later stages take them for. A split made already is kept. Of several ranks one writes."""
    names = re.findall(r"(\w+)=", args.sizes)
    if (not re.fullmatch(r"\w+=0*[1-9]\d*(,\w+=0*[1-9]\d*)*", args.sizes)
            or len(set(names)) < len(names)):
        raise InputError(f"--sizes {args.sizes}: write NAME=N,NAME=N, each name once, N at least 1")
    sizes = {n: int(c) for n, c in (part.split("=") for part in args.sizes.split(","))}
    out = Path(args.out)
    wanted = {name: getattr(args, name) for name in (
        "data", "seed", "by", "domain", "popularity", "writers", "permute")}
    wanted |= {"sizes": sizes, "contents": file_hash(args.data)}
    if not first_rank():
        await_file(out / "split.json", lambda: made(out, wanted))
        return
    if (out / "split.json").exists():
        if not made(out, wanted):
            raise InputError(f"{out} holds another split (see its split.json): choose another "
                             "--out, or delete that folder")
        return
    if args.data in WORLDS:
        # By intent, chance decides how many posts the held-out scenes have: a few more.
        number = sum(sizes.values()) * (6 if args.by == "intent" else 5) // 5
        posts = pocket_posts(number, args.seed, args.data)
    else:
        posts = load_posts(args.data, skip_bad_lines=args.skip_bad_lines)
    domain = make_domain(args.domain, posts, popularity=args.popularity, writers=args.writers,
                         permute=args.permute)
    read, posts = posts, known_solutions(posts, domain, args)
    if args.permute and not all(p.intent for p in posts):
        raise InputError(f'--permute: {args.data} has posts without an "intent"')
    if args.by == "intent":
        parts = split_by_intent(posts, sizes, args.seed)
    else:
        parts = dict(zip(sizes, split_posts(posts, list(sizes.values()), args.seed)))
    mark = begin(out, [*(f"{name}.jsonl" for name in sizes), "domain.json"], "split.json")
    for name, part in parts.items():
        save_posts(part, out / f"{name}.jsonl")
    write_json(out / "domain.json", domain.record())
    write_json(out / "split.json", wanted)
    mark.unlink(missing_ok=True)
    print(f"{out}: " + ", ".join(f"{n} {c}" for n, c in sizes.items()) + " posts")
    say_what_was_read(read)


def parser():
    p = argparse.ArgumentParser(description="Posts and replies: look at a file, split it.")
    sub = p.add_subparsers(dest="command", required=True)
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    c = sub.add_parser("check", help="read a file of posts and say what is in it", **form)
    c.add_argument("data", help="JSON lines (.gz too)")
    c.add_argument("--show", type=int, default=3, help="posts to print")
    c.set_defaults(run=check)
    s = sub.add_parser("split", help="write disjoint parts of a file, or of the pocket's", **form)
    add = s.add_argument
    add("--data", required=True,
        help=f"JSON lines (.gz too), or a small world: {', '.join(WORLDS)}")
    add("--sizes", required=True, help="posts in each part: sft=2500,grpo=2500,eval=500")
    add("--out", required=True, help="folder for NAME.jsonl, domain.json and split.json")
    add("--seed", type=int, default=0, help="of the shuffle, and of the pocket world")
    add("--by", default="post", choices=("post", "intent"),
        help="what no two parts share: post; or intent, so that parts called eval.. hold intents "
             "that no other part has")
    add("--popularity", type=float, default=1.5,
        help="how steeply readers' taste falls over the voices: shares go as rank to minus this")
    add("--writers", type=float, default=None,
        help="the same for the writers of SFT pairs; default: they are the readers")
    add("--permute", action="store_true",
        help="readers of each scene (intent without its last /part) rank the voices in an order "
             "of its own")
    s.set_defaults(run=split)
    for q in (c, s):
        q.add_argument("--domain", default="auto", help=f"auto, {', '.join(DOMAINS)}")
        q.add_argument("--skip-bad-lines", action="store_true",
                       help="leave unreadable lines, and tasks whose known solution fails, out "
                            "and count them, instead of stopping")
        q.add_argument("--allow-code-execution", nargs="?", const="yes", default=False,
                       choices=("yes", "as-root"),
                       help="let the known solutions of tasks of code be run, in a sandbox; "
                            "as-root: even if root asks")
    return p


def main(argv=None):
    return command(parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
