"""The prompt of `evaluate.py drafts`: type posts, pick drafts; the picks are kept in a file."""

import json

from support.files import InputError, printable
from support.posts import normalise
from support.words import near_duplicates


def converse(write, run, place, lines, say=print, domain=None):
    """Type a post, see its drafts, pick one by number: until the lines end, or an empty post.

    write(post) -> drafts. Each pick is a line appended to the JSONL at `place`, see kept_pick."""
    lines = iter(lines)
    while True:
        say("post (empty: end):")
        post = next(lines, "").strip()
        if not post:
            return
        if not normalise(post):              # no post file holds such a one
            say("that post has no letter or digit")
            continue
        completions = write(post)
        show_numbered(completions, say)
        chosen = ask_number(len(completions), lines, say)
        if chosen is None:
            continue
        if not completions[chosen].strip():
            say("that draft is empty: not kept")
            continue
        append_line(place, kept_pick(post, completions, chosen, run, domain))
        say(f"kept in {place}")


def show_numbered(completions, say):
    """Say each draft with its number from 1, and which earlier one it nearly repeats."""
    repeats = near_duplicates(completions)
    for number, text in enumerate(completions, 1):
        earlier = repeats[number - 1]
        note = "" if earlier is None else f"   (like {earlier + 1})"
        say(f"{number}. {printable(text)}{note}")


def ask_number(count, lines, say):
    """The index of the draft that is picked, from 0; None for an empty line."""
    say(f"pick 1 to {count} (empty: none):")
    while True:
        pick = next(lines, "").strip()
        if not pick:
            return None
        if pick.isdecimal() and 1 <= int(pick) <= count:
            return int(pick) - 1
        say(f"{printable(pick)[:20]!r} is no number from 1 to {count}:")


def kept_pick(post, completions, chosen, run, domain):
    """A line of the file of picks: {"post", "reply": the picked draft, "drafts", "pick": its index
    from 0, "run", "domain": the run's, which says how the post was put to it}. The file is a post
    file as it stands, with pairs (picked, passed over) for a reward model."""
    line = {"post": post, "reply": completions[chosen], "drafts": completions, "pick": chosen,
            "run": str(run)}
    if domain:
        line["domain"] = domain
    return line


def append_line(place, value):
    """Append a value to a JSONL file; InputError where it cannot be written."""
    try:
        with open(place, "a", encoding="utf-8") as file:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{place} cannot be written ({error}): choose another place with "
                         "--picks") from None
