"""The flags of data.py's commands, and what these check, print and write."""

import argparse
import random
import re
import shlex
from array import array

import numpy as np

from support.chats import CONTROL
from support.convert import convert, convert_flags
from support.files import (InputError, await_file, begin, file_hash, first_rank, hashed, printable,
                           read_json, write_json)
from support.formats import shown
from support.posts import normalise, save_posts
from support.registry import DOMAINS, WORLDS, add_flags


# ---- Flags ---------------------------------------------------------------------------------------

def data_parser(check, split):
    """The parser of data.py, whose commands call these two functions, and convert."""
    parser = argparse.ArgumentParser(
        description="Posts and replies: look at a file, split it, make one of another format.")
    commands = parser.add_subparsers(dest="command", required=True)
    check_parser = add_command(commands, "check", "read a file of posts and say what is in it")
    check_flags(check_parser)
    check_parser.set_defaults(run=check)
    about = "write disjoint parts of a file, or of a toy task"
    split_parser = add_command(commands, "split", about)
    split_flags(split_parser)
    split_parser.set_defaults(run=split)
    about = "make a file of posts of a file in another format: chats, preferences, tables, .."
    convert_parser = add_command(commands, "convert", about)
    convert_flags(convert_parser)
    convert_parser.set_defaults(run=convert)
    return parser


def add_command(commands, name, about):
    """A new command's parser, which shows defaults in its help."""
    return commands.add_parser(name, help=about,
                               formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def domain_flags(parser):
    """Flags of both commands."""
    parser.add_argument("--domain", default="auto", help=f"auto, {', '.join(DOMAINS)}")
    parser.add_argument("--skip-bad-lines", action="store_true",
                        help="skip and count unreadable lines, and tasks whose known solution "
                             "fails, instead of stopping")
    add_flags(DOMAINS, parser)


def check_flags(parser):
    """Flags of `check`."""
    parser.add_argument("data", help="JSON lines (.gz too)")
    parser.add_argument("--show", type=int, default=3, help="posts to print")
    domain_flags(parser)


def split_flags(parser):
    """Flags of `split`."""
    add = parser.add_argument
    add("--data", required=True, help=f"JSON lines (.gz too), or a toy task: {', '.join(WORLDS)}")
    add("--sizes", required=True, help="posts in each part: sft=2500,grpo=2500,eval=500")
    add("--fit", action="store_true",
        help="where there are fewer posts than --sizes asks for, make all parts smaller alike")
    add("--out", required=True, help="folder for NAME.jsonl, domain.json and split.json")
    add("--seed", type=int, default=0, help="of the shuffle, and of the toy task")
    add("--by", default="post", choices=("post", "intent"),
        help="what no two parts share: post; or intent, so that parts called eval.. hold intents "
             "that no other part has")
    add("--popularity", type=float, default=1.5,
        help="how steeply the styles' popularity falls: a style's share of users is its rank to "
             "minus this power")
    add("--writers", type=float, default=None,
        help="the same for the authors of SFT pairs; default: they are the users")
    add("--permute", action="store_true",
        help="users of each theme (intent without its last /part) rank the styles in an order of "
             "its own")
    domain_flags(parser)


# ---- A split -------------------------------------------------------------------------------------

def parse_sizes(text):
    """{name: posts} of --sizes NAME=N,NAME=N."""
    sizes = {}
    for part in text.split(","):
        found = re.fullmatch(r"(\w+)=(0*[1-9]\d*)", part)
        if found is None or found[1] in sizes:
            raise InputError(f"--sizes {text}: write NAME=N,NAME=N, each name once, N at least 1")
        sizes[found[1]] = int(found[2])
    return sizes


def fitted(sizes, count):
    """The sizes {name: posts}, or where `count` posts are too few for them, sizes of the same
    proportions that they suffice for, which is printed."""
    total = sum(sizes.values())
    if count >= total or count < len(sizes):
        return sizes
    smaller = {name: max(1, size * count // total) for name, size in sizes.items()}
    while sum(smaller.values()) > count:
        smaller[max(smaller, key=smaller.get)] -= 1
    print(f"{count} posts, fewer than the {total} asked for: all parts are smaller")
    return smaller


def split_record(args, sizes):
    """What split.json holds: all that the parts of a split depend on."""
    names = ("data", "seed", "by", "domain", "popularity", "writers", "permute")
    record = {name: getattr(args, name) for name in names}
    return record | {"sizes": sizes, "contents": file_hash(args.data)}


def is_split(out, wanted):
    """Does a folder hold the wanted split? A split.json of an older version lacks "contents"."""
    return {"contents": wanted["contents"]} | read_json(out / "split.json") == wanted


def split_exists(out, wanted):
    """Has the wanted split been made? InputError if the folder holds another one. Only the first
    rank makes one; the others wait for it."""
    if not first_rank():
        await_file(out / "split.json", lambda: is_split(out, wanted))
        return True
    if not (out / "split.json").exists():
        return False
    if not is_split(out, wanted):
        raise InputError(f"{out} holds another split (see its split.json): choose another "
                         "--out, or delete that folder")
    return True


def check_intents(args, posts):
    """Raise InputError if --permute has posts without an intent."""
    if args.permute and not all(post.intent for post in posts):
        raise InputError(f'--permute: {args.data} has posts without an "intent"')


def toy_posts(args, count):
    """Posts of the toy task --data: `count`, or with --by intent a fifth more, because intents
    differ in size."""
    if args.by == "intent":
        count = count * 6 // 5
    return WORLDS[args.data].function(count, args.seed)


def held_out_intents(counts, eval_sizes, other_sizes, seed, least_intents):
    """The intents of the eval parts, of counts {intent: posts}: in random order until they have
    the eval parts' share of all posts, and at least `least_intents`, because 200 posts of five
    intents say less than 200 of forty. The other parts must still find enough posts.
    eval_sizes, other_sizes: {part: posts}."""
    posts = sum(counts.values())
    eval_size = sum(eval_sizes.values())
    other_size = sum(other_sizes.values())
    most = posts - other_size
    wanted = max(eval_size, posts * eval_size / (eval_size + other_size))
    intents = sorted(counts)
    random.Random(f"intents {seed}").shuffle(intents)
    held_out = set()
    found = 0
    for intent in intents:
        needed = found < wanted or len(held_out) < least_intents
        if needed and found + counts[intent] <= most:
            held_out.add(intent)
            found += counts[intent]
    return held_out


def write_split(out, parts, record, wanted):
    """Write a split's parts, its domain's record and, last, split.json."""
    files = [f"{name}.jsonl" for name in parts]
    mark = begin(out, [*files, "domain.json"], "split.json")
    for name, part in parts.items():
        save_posts(part, out / f"{name}.jsonl")
    write_json(out / "domain.json", record)
    write_json(out / "split.json", wanted)
    mark.unlink(missing_ok=True)
    sizes = ", ".join(f"{name} {len(part)}" for name, part in parts.items())
    print(f"{out}: {sizes} posts; look at domain.json there, by which later stages judge replies")


# ---- What is printed -----------------------------------------------------------------------------

def report_posts(path, posts, domain):
    """Print the numbers of a file's posts and replies, its domain, and what was not read."""
    marks = array("Q")                       # a hash of each reply: their texts would not fit
    with_control = 0
    for post in posts:
        for reply in post.replies:
            marks.frombytes(hashed(normalise(reply) or reply, 8))
            with_control += bool(CONTROL.search(reply))
    different = len(np.unique(np.frombuffer(marks, np.uint64)))
    styles = f", styles {printable(', '.join(domain.styles))}" if domain.styles else ""
    lines = f"{posts.line_count} lines, " if hasattr(posts, "line_count") else ""
    print(f"{path}: {lines}{len(posts)} posts, {len(marks)} replies ({different} different), "
          f"domain {domain.name}{styles}")
    report_reading(posts)
    repeated = getattr(posts, "replies_read", 0) - len(marks)
    if repeated > 0 and not posts.dropped:
        print(f"{repeated} replies are repeated: equal ones of one post count once")
    if with_control:
        print(f"{with_control} replies have control strings such as <|im_end|>, which are left out")


def show_posts(posts, number):
    """Print a number of random posts with their replies."""
    for post in random.Random(0).sample(posts, min(max(number, 0), len(posts))):
        print(f"\n{printable(post.post)}")
        for i, reply in enumerate(post.replies):
            style = f"{post.styles[i]}: " if post.styles else ""
            print(printable(f"    {style}{reply}"))


def suggest_split(path, count):
    """Print the command that splits so many posts; they are looked at above."""
    small = max(1, count // 11)
    if count > 2:
        words = ["python", "data.py", "split", "--data", str(path), "--sizes",
                 f"sft={(count - small) // 2},grpo={(count - small) // 2},eval={small}", "--out",
                 "parts"]
        print(f"\nNext, if these posts look right: {printable(shlex.join(words))}")


def report_reading(posts):
    """Print how many lines of a file were merged or dropped, and which fields are not read.
    Nothing is printed for posts that are not from a file (a toy task)."""
    if dropped := getattr(posts, "dropped", 0):
        print(f"{dropped} lines left out: their post stands in an earlier line, and one of the two "
              "has replies by style")
    if merged := getattr(posts, "merged", 0):
        line, earlier = posts.merged_first
        print(f"{merged} lines merged with an earlier line of the same post (first: line {line} "
              f"with line {earlier}): equal but for letter case, spacing, full stops and the like")
    if unpicked := getattr(posts, "unpicked", 0):
        print(f"{unpicked} lines left out: none of their drafts was picked")
    unread = getattr(posts, "unread", {})
    if "rejected" in unread:
        print(f"{unread['rejected']} lines have a \"rejected\" reply: rewards.py train learns from "
              "it in this file; as posts, and after a split, only the chosen reply is kept")
    names = sorted(unread.keys() - {"rejected"})
    if names:
        more = ", .." if len(names) > 12 else ""
        print(printable(f"Fields that are not read: {shown(names[:12])}{more}"))
