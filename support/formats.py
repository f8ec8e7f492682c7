"""Posts and lines: when two posts are the same text, and which fields of a line are read."""

import json
import re
import unicodedata

from support.convert_formats import ANSWERS, OTHER_ANSWERS, format_of
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
    if given or not is_prompt:
        return
    lost = [name for name in (*ANSWERS, *OTHER_ANSWERS) if d.get(name)]
    if lost:
        raise ValueError(f'a "prompt" whose {shown(lost)} would be lost: call a reply '
                         '"completion", or leave the field out')


def is_chat(value):
    return isinstance(value, list) and any(isinstance(x, dict) for x in value)


def no_post(d):
    """Why a line has no post, and how to make some of it if its format is known."""
    problem = 'no "post" (or "tweet", or "prompt") text'
    form = format_of([d])
    if form:
        return (f"{problem}; it has {shown(form.fields(d))}, as {form.about}: data.py convert "
                "makes posts of these")
    fields = shown(list(d)[:8]) or "none"
    return f'{problem}; its fields are {fields}: write {{"post": .., "reply": ..}}'
