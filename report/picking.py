"""Picks of single drafts: what the page of `evaluate.py ask RUN .. --serve` asks, the file of
answers, and counting it. report/pick_page.py serves the page.

Shown are k drafts of each run, all in one shuffled list without names, equal ones once; the person
picks one, or none. A pick counts for the run that wrote the draft, in equal parts for several, so
the page asks which run has the best of k; the sheet (report/people.py) asks which set of k a person
would rather be shown.

Each answer is a JSON line: {"id", "post", "reply": the picked draft, "drafts": as shown, "pick":
its index from 0, "runs": for each draft the names of those that wrote it, "k"}, "intent" and
"domain" where there is one, and "prompt" where the domain puts the post to the model as it stands.
None of the drafts is "pick": null, and no reply. The file is one of posts and of preferences as it
stands."""

import errno
import json
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

from report.blind import check_numbers, common_posts, names_of, records_of, some_drafts
from report.runs import read_run
from support.files import InputError, is_unsafe, read_object
from support.posts import Post, post_of
from support.registry import DOMAINS
from support.words import near_duplicates


# ---- What is asked -------------------------------------------------------------------------------

MOST_CHARS = 20_000              # of a text, as in any file of posts


@dataclass(frozen=True)
class Item:
    """A post, and the drafts that are shown for it."""
    line: dict                   # the fields that the lines of all answers have
    times: tuple                 # for each draft how often it was written

    def answer(self, pick):
        """The line of an answer: pick is an index of `drafts`, None for none of them."""
        if pick is None:
            return self.line | {"pick": None}
        return self.line | {"reply": self.line["drafts"][pick], "pick": pick}

    def view(self, number):
        """What the page is told: nothing about runs."""
        drafts = []
        repeats = near_duplicates(self.line["drafts"])
        for text, times, like in zip(self.line["drafts"], self.times, repeats):
            drafts.append({"text": visible(text), "times": times, "like": like,
                           "empty": not text.strip()})
        return {"number": number, "post": visible(self.line["post"]), "drafts": drafts}


def make_items(args):
    """(Items of all posts that the runs have in common, in the order in which they are asked; how
    many of them to ask). An item depends on the seed and its post only, so that more posts, or
    another person, get the same."""
    runs = [read_run(folder) for folder in args.runs]
    records = [records_of(folder) for folder in args.runs]
    names = names_of(runs)
    ids = common_posts(runs)
    check_numbers(args, records, ids)
    domains = {str(run["shared"]["domain"]) for run in runs}
    if len(domains) > 1:
        raise InputError(f"the runs were measured in the domains {', '.join(sorted(domains))}: "
                         "give runs of one domain")
    domain = domains.pop()
    random.Random(f"posts {args.seed}").shuffle(ids)
    items = []
    for i in ids:
        of_post = {name: found[i] for name, found in zip(names, records)}
        item = make_item(i, of_post, domain, args)
        if can_be_read(item.line):
            items.append(item)
    if len(items) < len(ids):
        print(f"{len(ids) - len(items)} posts left out: no file of posts could hold them")
    if not items:
        raise InputError("the runs have no post that could be asked about: measure them again")
    return items, min(args.posts or len(items), len(items))


def make_item(i, records, domain, args):
    """The Item of the post with id i; records: {name of a run: its record of the post}."""
    rng = random.Random(f"drafts {args.seed} {i}")
    writers = {}                             # text -> the names of the runs that wrote it
    for name, record in records.items():
        for text in some_drafts(record, args.k, rng):
            writers.setdefault(storable(text.strip()), []).append(name)
    texts = list(writers)
    rng.shuffle(texts)
    first, *_ = records.values()
    line = {"id": i, "post": storable(first["post"])}
    if domain in DOMAINS and DOMAINS[domain].function.claims(Post("", "a", (), prompt=True)):
        line["prompt"] = line["post"]
    line["drafts"] = texts
    line["runs"] = [sorted(set(writers[text])) for text in texts]
    line["k"] = args.k
    if first.get("intent"):
        line["intent"] = first["intent"]
    if domain in DOMAINS:
        line["domain"] = domain
    return Item(line, tuple(len(writers[text]) for text in texts))


def storable(text):
    """A text that a file of posts can hold: not too long, and without half characters."""
    return str(text)[:MOST_CHARS].encode("utf-8", "replace").decode("utf-8")


def can_be_read(line):
    """Whether a line like this one, with a reply, can be read as a post."""
    fields = {name: line[name] for name in ("id", "post", "prompt", "intent") if name in line}
    try:
        post_of(fields | {"reply": "a reply"}, 1, MOST_CHARS)
    except ValueError:
        return False
    return isinstance(line["id"], (str, int))


def visible(text):
    """A text for the page: its lines are kept, and characters that could forge its surroundings are
    replaced."""
    lines = re.sub(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]", "\n", text)
    return "".join("\ufffd" if is_unsafe(c) and c not in "\n\t" else c for c in lines)


# ---- The file ------------------------------------------------------------------------------------

class Refused(Exception):
    """A request that is not done: an HTTP status, and a sentence for the person."""

    def __init__(self, status, sentence):
        super().__init__(sentence)
        self.status = status


class Answers:
    """The answers to the first `asked` of some items, and the file that holds them.

    Only one thread at a time may call its methods. Another program that writes to the file is
    noticed by the file's size, and then nothing more is written."""

    def __init__(self, path, items, asked):
        self.path = Path(path)
        self.items = items
        self.asked = asked
        self.picks = {}                      # {number of an item: the index picked, or None}
        self.starts = {}                     # {number of an item: where its line begins in bytes}
        self.size = 0
        self.ended = False                   # is the program about to end?
        if self.path.exists():
            self.read()
        self.check_writable()

    def read(self):
        """Take up the answers that the file holds. A last line that was cut off is removed."""
        numbers = {item.line["id"]: number for number, item in enumerate(self.items)}
        *lines, rest = read_bytes(self.path).split(b"\n")
        for row, line in enumerate(lines, 1):
            self.take_up(line + b"\n", row, numbers)
        if not rest:
            return
        if is_json(rest):                    # an editor took the last line's end away
            self.take_up(rest + b"\n", len(lines) + 1, numbers)
            with open(self.path, "ab") as file:
                file.write(b"\n")
            return
        if not rest.startswith(b'{"id": '):  # no answer that was cut off: somebody's text
            raise self.other_file("the last line")
        print(f"{self.path}: the last line is incomplete and is removed; its post is asked again")
        os.truncate(self.path, self.size)

    def take_up(self, line, row, numbers):
        """Take up one line, with its end."""
        found = read_object(f"{self.path}, line {row}", line.decode("utf-8", "replace"))
        number = None
        if isinstance(found.get("id"), (str, int)):
            number = numbers.get(found["id"])
        if number is None or number in self.picks:
            raise self.other_file(f"line {row}")
        pick = found.get("pick")
        drafts = self.items[number].line["drafts"]
        if not (pick is None or type(pick) is int and 0 <= pick < len(drafts)):
            raise self.other_file(f"line {row}")
        if found != self.items[number].answer(pick):
            raise self.other_file(f"line {row}")
        self.picks[number] = pick
        self.starts[number] = self.size
        self.size += len(line)

    def other_file(self, place):
        return InputError(f"{self.path}, {place}: this is no answer to what would be asked now "
                          "(was it written for other runs, or with another --k or --seed?): give "
                          "another --out")

    def check_writable(self):
        """Make the file, and raise InputError where that fails, before a person has picked."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab"):
                pass
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error.strerror}): choose another "
                             "--out") from None

    def next(self):
        """The number of the first item without an answer; None if there is none."""
        for number in range(self.asked):
            if number not in self.picks:
                return number
        return None

    def state(self):
        """What the page shows next."""
        number = self.next()
        answered = sum(number in self.picks for number in range(self.asked))
        item = None if number is None else self.items[number].view(number)
        return {"total": self.asked, "answered": answered, "item": item,
                "undo": self.last() is not None}

    def answer(self, number, pick):
        """Append an answer, flushed to the disk. Refused for an item or a draft that there is not,
        and for an item that has one."""
        if type(number) is not int or not 0 <= number < self.asked:
            raise Refused(404, "There is no such post.")
        if number in self.picks:
            raise Refused(409, "That post was answered already, in another tab perhaps.")
        drafts = self.items[number].line["drafts"]
        if pick is not None:
            if type(pick) is not int or not 0 <= pick < len(drafts):
                raise Refused(404, "There is no such draft.")
            if not drafts[pick].strip():
                raise Refused(404, "That draft is empty: it cannot be picked.")
        line = json.dumps(self.items[number].answer(pick), ensure_ascii=False) + "\n"
        start = self.size
        with self.opened() as file:
            try:
                write_whole(file, line.encode("utf-8"))
            except OSError:                  # half a line would spoil the file
                file.truncate(start)
                raise
            self.size = file.tell()
        self.picks[number] = pick
        self.starts[number] = start

    def last(self):
        """The number of the item with the last answer in the file; None if there is none, or it is
        not one of those that are asked now."""
        number = max(self.starts, key=self.starts.get, default=None)
        return number if number is not None and number < self.asked else None

    def undo(self):
        """Take the last answer back: its line is removed from the file."""
        number = self.last()
        if number is None:
            raise Refused(409, "There is no answer to take back.")
        start = self.starts[number]
        with self.opened() as file:
            file.truncate(start)
            os.fsync(file.fileno())
        self.size = start
        del self.picks[number], self.starts[number]

    def opened(self):
        """The file, open at its end without a buffer; Refused if somebody else has changed it, or
        nothing more is to be written."""
        if self.ended:
            raise Refused(409, "The program has ended: start it again, and open the address that "
                               "it prints.")
        file = open(self.path, "r+b", buffering=0)
        if file.seek(0, os.SEEK_END) != self.size:
            file.close()
            raise Refused(409, f"{self.path} was changed by another program: end this one, and "
                               "start it again. Nothing is written until then.")
        return file

    def summary(self):
        """The sentences with which the command ends."""
        total = len(self.picks)
        none = sum(pick is None for pick in self.picks.values())
        rest = self.asked - sum(number in self.picks for number in range(self.asked))
        said = (f"{self.path} holds {total} answers (picks: {total - none}, none: {none}); posts "
                f"left: {rest}")
        return said + (" (go on by the same command)" if rest else "")


def is_json(data):
    """Whether bytes are a whole JSON value."""
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def write_whole(file, data):
    """Write bytes to an unbuffered file and flush them to the disk; OSError if they do not fit."""
    if file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(file.fileno())


def read_bytes(path):
    """The bytes of a file; InputError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: give the files that `ask` wrote") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a file that `ask` "
                         "wrote") from None


# ---- Counting ------------------------------------------------------------------------------------

def is_of_page(path):
    """Whether a file begins as JSON lines do, so that it is no sheet."""
    try:
        with open(path, "rb") as file:
            return file.read(1000).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{")
    except OSError:
        return False


def read_answers(path):
    """{post id: the line of its answer} of a file that the page wrote; InputError for another."""
    found = {}
    for number, text in enumerate(read_bytes(path).splitlines(), 1):
        if not text.strip():
            continue
        place = f"{path}, line {number}"
        line = read_object(place, text.decode("utf-8", "replace"))
        check_answer(place, line)
        if line["id"] in found:
            raise InputError(f"{place}: the post {str(line['id'])[:60]!r} has an answer in an "
                             "earlier line: leave one")
        found[line["id"]] = line
    return found


def check_answer(place, line):
    """InputError for a line that is no answer of the page."""
    if "runs" not in line:
        raise InputError(f"{place} does not say which runs wrote the drafts: picks that `drafts` "
                         "has kept are for rewards.py train and polylora.py sft, --data FILE")
    runs = line["runs"]
    pick = line.get("pick", "missing")
    whole = (isinstance(line.get("id"), (str, int)) and type(line.get("k")) is int
             and isinstance(runs, list) and all(map(is_names, runs)))
    if not whole or not (pick is None or type(pick) is int and 0 <= pick < len(runs)):
        raise InputError(f"{place} is no answer that `ask --serve` wrote: remove it, or give "
                         "another file")


def is_names(value):
    """Whether it is a list of names, and not empty."""
    return isinstance(value, list) and value and all(isinstance(name, str) for name in value)


def read_raters(files):
    """(key, raters) of count_picks, of files that the page wrote, a file a rater."""
    key = {"runs": [], "k": None, "items": {}}
    raters = []
    names = set()
    for path in files:
        rater = {}
        for i, line in read_answers(path).items():
            if key["k"] not in (None, line["k"]):
                raise InputError(f"{path} has sets of {line['k']} drafts, and an earlier line of "
                                 f"{key['k']}: count them apart")
            key["k"] = line["k"]
            key["items"][i] = {"cluster": line.get("intent") or i}
            for some in line["runs"]:
                names.update(some)
            rater[i] = () if line["pick"] is None else tuple(line["runs"][line["pick"]])
        raters.append(rater)
    key["runs"] = sorted(names)
    return key, raters
