"""Formats of data: when two posts are the same text, which fields of a line are read, and what to
do with a file in another format."""

import csv
import gzip
import json
import os
import re
import shlex
import unicodedata

from support.registry import DOMAINS


# ---- When two posts are the same text ------------------------------------------------------------

# Invisible characters: soft hyphen, zero-width space, marks of the reading direction, the byte
# order mark, and the two that choose between a black and a coloured emoji.
UNSEEN = re.compile("[\u00ad\u200b\u200e\u200f\u2060\ufeff\ufe0e\ufe0f]")

ALIKE = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"',
    "\u2010": "-", "\u2011": "-", "\u2013": "-", "\u2014": "-", "\u2212": "-",
    "\u3002": ".", "\u0964": ".", "\u06d4": ".", "\u060c": ",", "\u061b": ";", "\u061f": "?"})


# NFKC also makes "x2" of x squared, and "1" of a 1 in a circle, but these signs have a meaning.
KEPT_FORMS = ("<super>", "<sub>", "<fraction>", "<circle>")

MARKS = ".,!;:?"                 # punctuation of sentences


def same_text(text, code=False):
    """The form in which posts are compared: two posts are the same text if their forms are equal.

    Letter case, spacing, the encoding of a character, and the full stops, commas, colons and
    exclamation marks behind words do not count. Every other sign does, and so do spaces between
    words: "C++" is not "C", "5.5" is not "55", "late :(" is not "late :)". Code, and a text with a
    block of code in it, is compared as it is except for blanks at the ends of lines."""
    if code or "```" in text:
        lines = unicodedata.normalize("NFC", text.strip()).split("\n")
        return "\n".join(line.rstrip() for line in lines)
    if not text.isascii():
        text = UNSEEN.sub("", text).translate(ALIKE)
        text = re.sub(r"[^\x00-\x7f]", usual_form, text)
        text = unicodedata.normalize("NFC", text)
    words = []
    for word in text.lower().split():
        if not word.isalnum():
            word = without_marks(word)
        if word == "?" and words:            # "what ?" as "what?"
            words[-1] = words[-1].rstrip("?") + word
        elif word:
            words.append(word)
    if words and words[-1][-2:-1].isdigit():  # "5!" is not 5, but at the very end of a text it is
        words[-1] = words[-1].removesuffix("!")
    return " ".join(words)


def without_marks(word):
    """A word without the punctuation of its sentence. A question mark stays, and so does a "!"
    behind a number, which may be a factorial."""
    word = re.sub(r"^(?:[\u00bf\u00a1]+|\.{2,})(?=\w)", "", word)
    core = word.rstrip(MARKS)
    marks = word[len(core):]
    if "?" in marks:
        return core + "?"
    return core + "!" if "!" in marks and core[-1:].isdigit() else core


def usual_form(found):
    """The usual form of a matched character such as a full-width letter or a ligature."""
    character = found[0]
    if unicodedata.decomposition(character).startswith(KEPT_FORMS):
        return character
    return unicodedata.normalize("NFKC", character)


# ---- A line --------------------------------------------------------------------------------------

REPLIES = ("replies", "reply", "completion", "response", "chosen")

READ = {"id", "post", "tweet_id", "tweet", "prompt", "intent", "tests", "label", *REPLIES,
        # of tasks of code
        "task_id", "entry_point", "canonical_solution", "test", "text", "code", "test_list",
        "test_imports", "test_setup_code"}


# Fields that hold a reply in formats that are not read: a line's prompt would lose its reply.
OTHER_REPLIES = ("rejected", "output", "answer", "target", "completions", "responses", "solution",
                 "generation", "generated_text", "assistant", "answers", "outputs", "story", "text",
                 "code", "canonical_solution", "reference", "references", "ideal", "expected",
                 "summary", "label")

PAIR = 'write {"prompt": .., "completion": ..}, one a line'


# Formats known by their fields: a line is of the first whose fields it all has.
OTHER_FORMATS = [
    (("messages",), f'chat messages: {PAIR}, of a user\'s turn and the answer to it'),
    (("conversations",), f'ShareGPT conversations: {PAIR}, of a human turn and the answer to it'),
    (("conversation",), f'a conversation: {PAIR}, of a user\'s turn and the answer to it'),
    (("instruction", "output"), f"Alpaca's format: {PAIR}, of instruction, with input, and output"),
    (("chosen", "rejected"), 'preferences without a prompt: write {"prompt": .., "chosen": .., '
                             '"rejected": ..}, each a text, one a line'),
    (("question", "answer"), f"questions and answers: {PAIR}"),
    (("input", "output"), f"inputs and outputs: {PAIR}"),
    (("instruction", "response"), f"instructions and responses: {PAIR}"),
    (("query", "response"), f"queries and responses: {PAIR}"),
    (("text",), 'plain texts: write {"post": .., "reply": ..}, one a line')]


def read_object(line):
    """The JSON object in a line of bytes. ValueError says why there is none, or that a field is
    repeated, of which Python's own reader silently keeps the last."""
    try:
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=without_repeats)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON ({e.msg}, character {e.pos + 1})") from None
    except RecursionError:
        raise ValueError("not JSON (brackets nested too deeply)") from None
    except ValueError as e:
        if isinstance(e, RepeatedName):
            raise
        raise ValueError("not JSON (a number of thousands of digits)") from None
    if not isinstance(value, dict):
        raise ValueError('not a JSON object, {"post": .., "reply": ..}')
    return value


class RepeatedName(ValueError):
    """A JSON object has two fields of one name."""


def without_repeats(pairs):
    """A dict of (name, value) pairs; RepeatedName if a name occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(n for n in names if names.count(n) > 1)
        raise RepeatedName(f"the field {shown([name])} stands twice, and one would be lost: write "
                           'several replies as "replies": [.., ..]')
    return found


def shown(names):
    """Names of fields for a message."""
    return ", ".join(json.dumps(name, ensure_ascii=False)[:40] for name in names)


def fields_of(d):
    """{"id", "post", "replies", "prompt", "tests", "intent"} of a line in any format that is read;
    ValueError names the fields of another one. prompt: the text is put to the model as it is.
    Types are not checked."""
    task = task_fields(d)
    d = d | task
    post = d.get("post")
    if post is None:
        post = d.get("tweet")
    is_prompt = post is None or d.get("prompt") == post
    if post is None:
        post = d.get("prompt")
    if post is None:
        raise ValueError(no_post(d))
    given = [name for name in REPLIES if d.get(name) is not None]
    if task:
        is_prompt = False
        given = ["replies"]
    check_reply_fields(d, given, is_prompt)
    return {"id": d.get("tweet_id") if d.get("id") is None else d["id"],
            "post": post,
            "replies": d[given[0]] if given else None,
            "prompt": is_prompt,
            "tests": d.get("tests"),
            "intent": d.get("intent")}


def task_fields(d):
    """The fields of a post that a domain (code) makes of a line in a format of its own."""
    task = {}
    if d.get("post") is None and d.get("tweet") is None:
        for row in DOMAINS.values():
            if row.fields is not None:
                task |= row.fields(d)
    return task


def check_reply_fields(d, given, is_prompt):
    """Raise ValueError if replies would be lost, or are none to learn from. given: the fields with
    a reply."""
    if len(given) > 1:
        raise ValueError(f"it has {shown(given)}, and one of them is read: leave one, or write "
                         '"replies": [.., ..]')
    chats = [name for name in ("prompt", *given) if is_chat(d.get(name))]
    if chats:
        raise ValueError(f"{shown(chats)} is a list of chat messages: write its text alone")
    if d.get("label") is False and given == ["completion"]:
        raise ValueError('"label" is false: a completion that people did not like is nothing to '
                         "learn from")
    if given or not is_prompt:
        return
    lost = [name for name in OTHER_REPLIES if d.get(name)]
    if lost:
        raise ValueError(f'a "prompt" whose {shown(lost)} would be lost: call a reply '
                         '"completion", or leave the field out')


def is_chat(value):
    return isinstance(value, list) and any(isinstance(x, dict) for x in value)


def no_post(d):
    """Why a line has no post, and what to write if its format is known."""
    problem = 'no "post" (or "tweet", or "prompt") text'
    for names, advice in OTHER_FORMATS:
        if all(d.get(name) is not None for name in names):
            return f"{problem}; it has {shown(names)}, as {advice}"
    fields = shown(list(d)[:8]) or "none"
    return f'{problem}; its fields are {fields}: write {{"post": .., "reply": ..}}'


# ---- A file --------------------------------------------------------------------------------------

UTF_16 = "is UTF-16: save it as UTF-8"

STARTS = [
    (b"PAR1", "is a Parquet file", "pandas"),
    (b"ARROW1", "is an Arrow file", "arrow"), (b"\xff\xff\xff\xff", "is an Arrow file", "arrow"),
    (b"PK\x03\x04", "is a zip archive or an Excel workbook: unpack it, or save it as CSV UTF-8",
     ""),
    (b"\x1f\x8b", "is packed with gzip: give it a name that ends in .gz", ""),
    (b"BZh", "is packed with bzip2: unpack it", ""),
    (b"\xfd7zXZ", "is packed with xz: unpack it", ""),
    (b"\x28\xb5\x2f\xfd", "is packed with zstd: unpack it", ""),
    (b"SQLite format 3", "is an SQLite database", ""),
    (b"\xff\xfe", UTF_16, ""), (b"\xfe\xff", UTF_16, ""),
    (b"version https://git-lfs", "is a Git LFS pointer in place of the file: run git lfs pull", ""),
    (b"<!doctype html", "is a web page: download the file itself", ""),
    (b"<html", "is a web page: download the file itself", "")]

MAKE = "one JSON object a line is wanted; to make them: python -c "

RECIPES = {
    "pandas": "import pandas; pandas.read_parquet({0!r}).to_json('posts.jsonl', orient='records', "
              "lines=True)",
    "array": "import json; [print(json.dumps(x)) for x in json.load(open({0!r}, "
             "encoding='utf-8-sig'))]",
    "table": "import csv, json; [print(json.dumps(x)) for x in csv.DictReader(open({0!r}, "
             "encoding='utf-8-sig', newline=''), delimiter={1!r})]"}

LARGEST_WHOLE = 2 ** 26          # bytes of a file that is parsed as one JSON value


def other_format(path):
    """What a file without JSON lines is, and what to do about it; None if it may be JSON lines that
    are damaged."""
    if not os.path.isfile(path):             # a pipe cannot be read again
        return None
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            head = file.read(LARGEST_WHOLE)
    except (OSError, EOFError):
        return None
    for start, what, recipe in STARTS:
        if head[:40].lstrip().lower().startswith(start.lower()):
            if recipe == "arrow":
                return f"{what}: one JSON object a line is wanted (datasets: to_json)"
            return f"{what}: {recipe_for(recipe, path)}" if recipe else what
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if text[:1] in ("[", "{"):
        return one_value(text, path)
    first = text.partition("\n")[0]
    mark = max(",\t;", key=first.count)
    names = [name.strip() for name in next(csv.reader([first], delimiter=mark), [])]
    if len(names) > 1 and all(re.fullmatch(r"[\w .-]{1,40}", name) for name in names):
        kind = "TSV" if mark == "\t" else "CSV"
        return (f"is a table ({kind}) with the columns {shown(names[:8])}: "
                f"{recipe_for('table', path, mark)} > posts.jsonl, with the columns \"post\" and "
                '"reply"')
    return None


def one_value(text, path):
    """other_format's answer for a file that begins as JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if text.startswith("[") and re.match(r"\[\s*(\{|$)", text):
            return f"begins as a JSON array, [..]: {recipe_for('array', path)} > posts.jsonl"
        return several_lines(text, path)
    if isinstance(value, list):
        return f"is a JSON array, [..]: {recipe_for('array', path)} > posts.jsonl"
    if "\n" not in text.strip():             # a line like others, and bad for another reason
        return None
    held = [name for name, x in value.items() if isinstance(x, list)]
    inside = f" (its objects may be in {shown(held[:3])})" if held else ""
    return f"is one JSON object over several lines{inside}: one JSON object a line is wanted"


def several_lines(text, path):
    """one_value's answer for a file that begins with an object over several lines; else None."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if "\n" not in text[:end]:
        return None
    return ("has JSON objects over several lines: one object a line is wanted; to make them: "
            f"jq -c . {shlex.quote(str(path))} > posts.jsonl")


def recipe_for(name, path, *more):
    return MAKE + shlex.quote(RECIPES[name].format(str(path), *more))
