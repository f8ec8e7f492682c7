"""Which domain a file of posts is of, and whether it is still the one of the file's split."""

from typing import NamedTuple

from support.files import InputError, read_json, short
from support.posts import kinds_of
from support.registry import DOMAINS, WORLDS


class Shared(NamedTuple):
    """What all posts of a file have in common."""
    styled: bool                 # all have replies in the same styles
    claim: str                   # the domain that claims all of them, "" if there is none
    odd: int | None              # the place of the first post with other styles than the first post


def shared_kind(posts):
    """The Shared of a sequence of posts."""
    first_styles = set(posts[0].styles) if len(posts) else set()
    odd = None
    claims = set()
    for (styles, claim, _), place in kinds_of(posts).items():
        claims.add(claim)
        if styles != first_styles and (odd is None or place < odd):
            odd = place
    if odd is not None:
        return Shared(False, "", odd)
    return Shared(bool(first_styles), claims.pop() if len(claims) == 1 else "", None)


def domain_name(name, posts):
    """`name` if these posts can be of that domain; for auto the domain that they are of."""
    shared = shared_kind(posts)
    if name == "auto":
        if shared.odd is not None:
            raise InputError(f"the posts {short(posts[0].id)} and {short(posts[shared.odd].id)} "
                             "have replies in different styles, or one in none: correct the file, "
                             "or give --domain replies")
        name = shared.claim or ("voices" if shared.styled else "replies")
    if name not in DOMAINS:
        raise InputError(f"there is no domain {name!r}: choose auto, {', '.join(DOMAINS)}")
    not_claimed = DOMAINS[name].function.exclusive and shared.claim != name
    not_styled = name == "voices" and not shared.styled
    if not_claimed or not_styled:
        raise InputError(f"--domain {name} needs posts that all have {posts_of(name)}: use "
                         "--domain replies or auto")
    return name


def posts_of(name):
    """What every post of a domain has, for a message."""
    if name == "code":
        return "tests and a known solution, as in HumanEval's and MBPP's formats"
    made = f", written by data.py split --data {name}" if name in WORLDS else ""
    return f"replies in the same styles{made}"


STEEPEST = 50                    # a larger exponent makes shares 0 or infinite


def check_exponent(name, exponent):
    """Raise InputError for an exponent of a long tail that is too steep; None: there is none."""
    if exponent is not None and not -STEEPEST <= exponent <= STEEPEST:
        raise InputError(f"{name} is {exponent:g}: give a number from -{STEEPEST} to {STEEPEST}")


# ---- domain.json ---------------------------------------------------------------------------------

NUMBER = (int, float)

FIELDS = {"domain": str, "voices": list, "permute": bool, "popularity": NUMBER,
          "writers": (*NUMBER, type(None))}


def read_record(file, name):
    """The record of a split's domain; InputError if data.py did not write the file, or if --domain
    asks for another one."""
    record = read_json(file)
    if not is_record(record):
        raise InputError(f"{file} is not what data.py split writes: split again")
    if name not in ("auto", record["domain"]):
        raise InputError(f"--domain {name}: these posts were split as {record['domain']!r} (see "
                         f"{file}): leave --domain out, or split again")
    return record


def is_record(record):
    """Does a JSON value have the fields of Domain.record()?"""
    if not isinstance(record, dict):
        return False
    for name, kind in FIELDS.items():
        if name not in record or not isinstance(record[name], kind):
            return False
    texts = all(isinstance(style, str) for style in record["voices"])
    return texts and record["domain"] in DOMAINS


def check_styles(path, posts, record, file):
    """Raise InputError if posts of `path` have other styles than their split's record, `file`."""
    exclusive = DOMAINS[record["domain"]].function.exclusive
    wanted = set(record["voices"])
    for (styles, claim, _), first in kinds_of(posts).items():
        claimed = claim == record["domain"] or not exclusive
        if not styles or styles != wanted or not claimed:
            raise InputError(f"{path}: the post {short(posts[first].id)} does not have the styles "
                             f"of its split (see {file}): split again")
