"""Files of posts: read and check JSON lines, one post at a time, and write them."""

import dataclasses
import gzip
import hashlib
import json
import os
import sys
import tempfile
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count as counter

import numpy as np

from support.convert_files import other_format
from support.files import InputError, atomic_write, groups, hashed
from support.formats import READ, fields_of, read_object, same_text
from support.registry import DOMAINS


# ---- Files of posts ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Post:
    """A post and its replies: people's, or a right one in each style."""
    id: str
    post: str
    replies: tuple[str, ...]
    styles: tuple[str, ...] = ()             # the replies' styles, or empty
    intent: str = ""                         # equal for posts that ask for the same
    tests: str = ""                          # of a task of code: JSON of what Code runs
    prompt: bool = False                     # put to the model as it is

    @property
    def key(self):
        """Key for per-post seeds: a hash of the text, because ids are user-supplied and may
        collide. Posts of prose that differ in their signs only share one; tasks of code do not."""
        text = self.same if self.tests else normalise(self.post)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def same(self):
        """The form of the text in which posts are compared."""
        return same_text(self.post, code=bool(self.tests))


NO_LETTERS = bytes(c for c in range(128) if not chr(c).isalnum())


def normalise(text):
    """The lower-cased letters, marks and digits of a text: the form in which replies are compared
    (posts: same_text). Letter case, punctuation, spacing and the encoding of a character (NFKC) do
    not count. Marks do: without them Hindi and Thai words that differ become equal."""
    if text.isascii():  # the same, fifty times faster
        return text.encode().lower().translate(None, NO_LETTERS).decode()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LMN")


def different_share(texts):
    """The share of texts that repeat no earlier one, letter case, punctuation and spacing aside (of
    texts without a letter, spacing alone)."""
    different = set()
    for text in texts:
        different.add(normalise(text) or "".join(text.split()))    # the latter: punctuation alone
    return len(different) / len(texts)


class PostFile(Sequence):
    """The posts of a file. Only the offsets of its lines are kept, some thirty bytes a line, so a
    million posts fit anywhere; a post is read again when it is asked for."""
    unique = True                # no two posts are the same text

    def __init__(self, path, skip_bad_lines=False, max_chars=20_000):
        self.path, self.max_chars = path, max_chars
        self.recent = {}                     # {place: Post} of posts asked for lately
        self.names = {}                      # {place: new id} of posts with a repeated id
        self.kinds = {}                      # see kinds_of
        self.unread = Counter()              # {field that is not read: lines}
        self.unpicked = 0                    # lines without a pick, see is_unpicked
        self.disliked = 0                    # lines left out because their "label" is false
        self.replies_read = 0                # of the lines that are kept
        table = LineTable()
        bad = []                             # numbers of bad lines
        reason = ""                          # what is wrong with the first of them
        number = 0
        try:
            for number, line, offset in self.read_lines():
                try:
                    fields = read_line(line)
                    if is_unpicked(fields):
                        self.unpicked += 1
                        continue
                    if fields.get("label") is False:       # a reply that people did not like
                        self.disliked += 1
                        continue
                    post = post_of(fields, number, max_chars)
                except ValueError as e:
                    if not skip_bad_lines:
                        raise InputError(bad_line(path, number, e, not len(table))) from None
                    bad.append(number)
                    reason = reason or str(e)
                    continue
                kind = self.kinds.setdefault(kind_of(post), len(self.kinds))
                table.add(post, kind, number, self.keep(line, offset))
                self.replies_read += len(post.replies)
                self.unread.update(fields.keys() - READ)
        except FileNotFoundError:
            raise InputError(f"there is no file {path}: give --data a file of posts") from None
        except (OSError, EOFError, zlib.error) as e:
            raise InputError(cannot_be_read(path, number, e)) from None
        if not len(table) and bad:
            raise InputError(bad_line(path, bad[0], reason, True, every=True))
        if not len(table):
            why = "it is empty"
            if self.unpicked:
                why = "none of its drafts was picked"
            if self.disliked:
                why = 'every "label" is false'
            raise InputError(f"{path} holds no posts: {why}")
        if self.disliked:
            print(f'{path}: {self.disliked} lines left out, whose "label" is false: only '
                  "rewards.py train learns from them", file=sys.stderr)
        if bad:
            print(f"{path}: {len(bad)} bad lines left out (first: line {bad[0]})", file=sys.stderr)
        self.line_count = len(table)         # that hold posts
        self.index(*table.arrays())

    def read_lines(self):
        """(number, line, offset) of each line that is not blank; of a far too long one only its
        beginning. A packed file and a pipe cannot be read from the middle: their lines are copied
        to a temporary file."""
        packed = str(self.path).endswith(".gz")
        source = (gzip.open if packed else open)(self.path, "rb")
        self.copied = packed or not source.seekable()
        self.file = tempfile.TemporaryFile() if self.copied else source
        for number in counter(1):
            offset = 0 if self.copied else source.tell()
            line = source.readline(LONGEST_LINE)
            rest = line
            while len(rest) == LONGEST_LINE:
                rest = source.readline(LONGEST_LINE)
            if not line:
                return
            if line.strip():
                yield number, line, offset

    def keep(self, line, offset):
        """The offset in self.file at which the line can be read again."""
        if self.copied:
            offset = self.file.tell()
            self.file.write(line.rstrip(b"\n") + b"\n")
        return offset

    def index(self, texts, ids, kinds, lines):
        """Group the lines of equal posts, count what is merged, number repeated ids. The arguments
        are LineTable's arrays."""
        post = groups(texts)                                # (lines,) the post of each line
        order = post.argsort(kind="stable")                 # lines, in the order of their posts
        self.lines = lines[order]
        self.ends = np.bincount(post).cumsum()              # (posts,) of each post's lines
        starts = np.append(0, self.ends[:-1])
        first = order[starts]                               # (posts,) each post's first line
        self.count_repeats(post, first, kinds, lines)
        self.find_kinds(kinds[first])
        self.number_ids(ids[first])
        self.recent.clear()

    def count_repeats(self, post, first, kinds, lines):
        """Count the lines that are merged into an earlier line of their post, and those that are
        dropped because they or that line have replies by style (see merge)."""
        by_style = np.array([bool(styles) for styles, *_ in self.kinds])[kinds]
        either = by_style | by_style[first][post]
        repeats = np.ones(len(post), bool)
        repeats[first] = False
        merged = np.flatnonzero(repeats & ~either)
        self.dropped = int((repeats & either).sum())
        self.merged = len(merged)
        if self.merged:                      # the numbers of the first such line and of its target
            line = merged[0]
            target = first[post[line]]
            self.merged_first = [int(lines[line, 0]), int(lines[target, 0])]

    def find_kinds(self, kinds):
        """Make self.kinds {kind: place of its first post} of posts of these kinds (posts,)."""
        names = list(self.kinds)
        self.kinds = {}
        numbers, places = np.unique(kinds, return_index=True)
        for number, place in zip(numbers.tolist(), places.tolist()):
            self.kinds[names[number]] = place

    def number_ids(self, ids):
        """Rename posts whose id an earlier post has to NAME-2, NAME-3, ..: files that were joined
        repeat theirs. ids (posts,): hashes of the ids in the file."""
        known, first, which = np.unique(ids, return_index=True, return_inverse=True)
        repeated = np.flatnonzero(first[which] != np.arange(len(ids)))
        given = set()
        next_number = {}
        for place in repeated.tolist():
            name = self[place].id
            number = next_number.get(name, 2)
            while f"{name}-{number}" in given or contains(known, id_hash(f"{name}-{number}")):
                number += 1
            next_number[name] = number + 1
            self.names[place] = f"{name}-{number}"
            given.add(self.names[place])

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
        """The post at a place, from its lines in the file."""
        start = self.ends[place - 1] if place else 0
        posts = {}
        try:
            for number, offset in self.lines[start:self.ends[place]]:
                self.file.seek(offset)
                merge(posts, parse_line(self.file.readline(), number, self.max_chars))
            [post] = posts.values()
        except (OSError, ValueError):
            raise InputError(f"{self.path} was changed while it was in use: start again") from None
        if place in self.names:
            return dataclasses.replace(post, id=self.names[place])
        return post

    def __eq__(self, other):
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))


class LineTable:
    """What is kept of each line: 16 bytes of a hash of its post and 8 of its id's, its kind's
    number, its own number and its offset."""

    def __init__(self):
        self.hashes = array("Q")
        self.kinds = array("Q")
        self.lines = array("Q")

    def add(self, post, kind, number, offset):
        self.hashes.frombytes(hashed(post.same, 16) + hashed(post.id, 8))
        self.kinds.append(kind)
        self.lines.extend((number, offset))

    def __len__(self):
        return len(self.kinds)

    def arrays(self):
        """Hashes of posts (lines, 2) and of ids (lines,), kinds (lines,), and the lines' numbers
        and offsets (lines, 2)."""
        hashes = np.frombuffer(self.hashes, np.uint64).reshape(-1, 3)
        kinds = np.frombuffer(self.kinds, np.uint64)
        lines = np.frombuffer(self.lines, np.uint64).reshape(-1, 2)
        return hashes[:, :2], hashes[:, 2], kinds, lines


def id_hash(name):
    return np.frombuffer(hashed(name, 8), np.uint64)[0]


def contains(ordered, value):
    """Is the value in an ordered array?"""
    place = np.searchsorted(ordered, value)
    return place < len(ordered) and ordered[place] == value


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


def places_of_unique(posts):
    """One place of each different text among the posts."""
    if getattr(posts, "unique", False):
        return range(len(posts))
    return {post.same: place for place, post in enumerate(posts)}.values()


LONGEST_LINE = 2 ** 24           # bytes: more would take gigabytes to parse


def kind_of(post):
    """What decides on a post's domain: (its styles, the domain that claims it or "", whether it
    has no reply to learn from)."""
    claim = ""
    for name, row in DOMAINS.items():
        if row.function.claims(post):
            claim = name
            break
    return frozenset(post.styles), claim, not post.replies


def kinds_of(posts):
    """{kind: place of the first post of that kind}."""
    if isinstance(posts, PostFile):
        return posts.kinds
    kinds = {}
    for place, post in enumerate(posts):
        kinds.setdefault(kind_of(post), place)
    return kinds


def bad_line(path, number, reason, first, every=False):
    """The message for a bad line. first: no line before it was good, so the whole file may be of
    another format. every: no line is good."""
    other = other_format(path) if first else None
    if other:
        return f"{path} {other}"
    if every:
        return f"{path} holds no posts: every line is bad, the first, line {number}: {reason}"
    return f"{path}, line {number}: {reason} (--skip-bad-lines skips such lines)"


def cannot_be_read(path, number, error):
    """The message for a file that ends in an error of the system or of gzip."""
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
    return read_object(line)


def is_unpicked(fields):
    """Is a line's JSON object an answer of somebody who picked none of the drafts?"""
    return "drafts" in fields and "pick" in fields and fields["pick"] is None


def parse_line(line, number, max_chars):
    """One JSON line -> Post; ValueError says what is wrong with it."""
    return post_of(read_line(line), number, max_chars)


def post_of(d, number, max_chars):
    """The Post of a line's JSON object; ValueError says what is wrong with it."""
    d = fields_of(d)
    post = d["post"]
    if not isinstance(post, str) or not post.strip():
        raise ValueError('no "post" (or "tweet", or "prompt") text: it is empty, or no text')
    styles, replies = replies_of(d["replies"], d["prompt"])
    tests = tests_of(d["tests"])
    check_replies(replies, styles, post, d["prompt"])
    name = f"line-{number}" if d["id"] is None else str(d["id"])
    intent = "" if d["intent"] is None else str(d["intent"])
    check_texts((post, name, intent, *replies, *styles), max_chars)
    replies = tuple(reply.strip() for reply in replies)
    return Post(name, post.strip(), replies, styles, intent, tests, d["prompt"])


def replies_of(replies, is_prompt):
    """(styles, replies) of a line's field, which is a text, a list, or a mapping from style to
    reply; a prompt may have none. Types are not checked."""
    if isinstance(replies, dict) and replies:
        return tuple(replies), list(replies.values())
    if isinstance(replies, str):
        return (), [replies]
    if replies is None and is_prompt:
        return (), []
    return (), replies


def tests_of(tests):
    """JSON of a task's tests, checked by the domain that runs them; "" without tests."""
    text = ""
    if tests is not None:
        for row in DOMAINS.values():
            if row.tests is not None:
                text = json.dumps(row.tests(tests), ensure_ascii=False)
    return text


def check_replies(replies, styles, post, is_prompt):
    """Raise ValueError for replies that nothing could be learnt from or compared with."""
    if not isinstance(replies, list) or not replies and not is_prompt:
        raise ValueError('no "replies" (or "reply")')
    for reply in replies:
        if not isinstance(reply, str) or not reply.strip():
            raise ValueError("a reply is not a text, or is empty")
    if not normalise(post):
        raise ValueError("the post has no letter or digit")
    if styles and not all(map(normalise, replies)):  # an empty completion would be right
        raise ValueError("a reply in a style has no letter or digit")


def check_texts(texts, max_chars):
    """Raise ValueError for texts that are too long, or that UTF-8 cannot hold."""
    if max(map(len, texts)) > max_chars:
        raise ValueError(f"a text of more than {max_chars:,} characters")
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:  # neither a file nor the tokenizer takes it
        raise ValueError("half a character (an escape like \\ud83d without its pair)") from None


def merge(posts, post):
    """Add a post to {form of its text: Post}. The same text again adds only its new replies, and
    nothing where either has replies by style: one text has one right reply in each style."""
    old = posts.get(post.same)
    if old is None:
        posts[post.same] = post
    elif not old.styles and not post.styles:
        new = tuple(reply for reply in post.replies if reply not in old.replies)
        posts[post.same] = dataclasses.replace(old, replies=old.replies + new)


def save_posts(posts, path):
    """Write posts as JSON lines that load_posts reads back as equal."""
    with atomic_write(path) as new, open(new, "w", encoding="utf-8") as file:
        for post in posts:
            file.write(json.dumps(as_line(post), ensure_ascii=False) + "\n")


def as_line(post):
    """The JSON object of a post's line."""
    replies = dict(zip(post.styles, post.replies)) if post.styles else list(post.replies)
    line = {"id": post.id, "post": post.post, "replies": replies}
    if post.intent:
        line["intent"] = post.intent
    if post.tests:
        line["tests"] = json.loads(post.tests)
    if post.prompt:
        line["prompt"] = post.post
    return line
