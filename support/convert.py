"""`data.py convert`: a file in a format that people have becomes a file of posts.

What is left out is counted by reason: rows of another format, empty answers, later turns of a chat,
lines that a file of posts would not take. The formats are in convert_formats.py, the kinds of files
in convert_files.py."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

from support.convert_files import found, how_to_convert, open_rows
from support.convert_formats import FORMATS, IDS, columns, format_of, given, prompt_of
from support.files import InputError, atomic_write, first_rank, printable
from support.formats import shown
from support.posts import PostFile, post_of


MAX_CHARS = 20_000               # of a text, as data.load_posts reads them

SHOWN_REASONS = 12

NOT_UTF_8 = re.compile("[\udc80-\udcff]")            # what open_text makes of such bytes


def convert_flags(parser):
    """Flags of `convert`."""
    add = parser.add_argument
    add("data", help="JSON lines, a JSON array, CSV, TSV (each .gz too) or Parquet")
    add("--out", required=True, metavar="FILE", help="the file of posts to be written")
    add("--turns", default="first", choices=("first", "all"),
        help="of a chat or thread: its first exchange, or every answer, with all turns before it "
             "in its prompt")
    add("--format", default="auto", choices=("auto", *FORMATS),
        help="of the rows; auto: the one that most of the first rows have")
    add("--post-column", metavar="NAME", help="the column, or field, of the post")
    add("--reply-column", metavar="NAME", help="the column, or field, of its reply")
    add("--reply-to", metavar="NAME",
        help="of rows that are posts and replies at once: the column with the id of the row that "
             "this one answers, as in_response_to_tweet_id; its text is in --post-column")
    add("--id-column", metavar="NAME", help=f"with --reply-to: the rows' own id (default: "
                                            f"whichever there is of {', '.join(IDS)})")
    add("--as", default="auto", dest="put_as", choices=("auto", "post", "prompt"),
        help="post: introduced by \"Write a short reply to this post\"; prompt: put to the model "
             "as it is; auto: by the format")


def convert(args):
    """Write --out, a file of posts, from a file in another format, and print what became of its
    rows. Nothing is written on an InputError."""
    if not first_rank():
        return
    out = Path(args.out)
    if out.exists():
        raise InputError(f"{out} exists, and would be written over: choose another --out")
    check_columns(args)
    rows = open_rows(args.data, table=bool(args.post_column))
    count = Count()
    lines = thread_lines(rows, args, count) if args.reply_to else row_lines(rows, args, count)
    with atomic_write(out) as new:
        with open(new, "w", encoding="utf-8") as file:
            for line in lines:
                if checked(line, count):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if not count.lines:
            raise InputError(f"{args.data} gave no posts, of {count.rows} rows: "
                             f"{reasons(count.lost, 3)}")
        posts = PostFile(new, max_chars=MAX_CHARS) if count.lines > count.disliked else ()
    report(args, rows, count, posts)


class Count:
    """What became of a file's rows."""

    def __init__(self):
        self.rows = 0
        self.lines = 0           # that were written
        self.disliked = 0        # of these, completions whose label is false
        self.lost = Counter()    # {reason: how many}
        self.unread = Counter()  # {field that is not read: rows}


def check_columns(args):
    """Raise InputError for flags of columns that do not go together."""
    if args.reply_to and args.reply_column:
        raise InputError("--reply-to finds the replies of a thread: leave --reply-column out")
    if args.reply_to and not args.post_column:
        raise InputError("--reply-to needs --post-column, the column of the text")
    if bool(args.post_column) != bool(args.reply_column or args.reply_to):
        raise InputError("--post-column needs --reply-column, or for threads --reply-to, and each "
                         "of these needs it")


def check_names(rows, names):
    """Raise InputError if no row has a field of one of these names."""
    known = {}
    for row in rows.head:
        known |= dict.fromkeys(row)
    for name in names:
        if name not in known:
            raise InputError(f"{rows.path} has no column {shown([name])}: its columns are "
                             f"{shown(list(known)[:12]) or 'none'}")


# ---- Rows of one format --------------------------------------------------------------------------

def chosen_format(rows, args):
    """The Format of a file's rows: what the flags say, else what most of the first rows have."""
    if args.post_column:
        check_names(rows, (args.post_column, args.reply_column))
        return columns(args.post_column, args.reply_column)
    form = format_of(rows.head) if args.format == "auto" else FORMATS[args.format]
    if form is None and rows.head:
        raise InputError(f"{rows.path} is {found(rows)}, in no format that is known: "
                         f"{how_to_convert(rows)}")
    return form or FORMATS["posts"]


def row_lines(rows, args, count):
    """The lines of posts of a file's rows, one after the other."""
    form = chosen_format(rows, args)
    for row in rows:
        count.rows += 1
        try:
            if isinstance(row, ValueError):
                raise row
            if not form.fields(row):
                names = shown(list(row)[:4]) or "no fields"
                raise ValueError(f"no {form.name} row, but one with {names}")
            lines = form.lines(row, args.turns == "all", count.lost)
        except ValueError as e:
            count.lost[str(e)] += 1
            continue
        count.unread.update(set(given(row, *row)) - {*form.fields(row), *form.reads, *IDS})
        for line in lines:
            yield put_as(line, args.put_as)


def put_as(line, kind):
    """The line with its text as a post or as a prompt."""
    other = {"post": "prompt", "prompt": "post"}.get(kind)
    if other in line and kind not in line:
        line[kind] = line.pop(other)
    return line


def checked(line, count):
    """Whether a file of posts takes this line; else its reason is counted."""
    try:
        post_of(line, count.lines + 1, MAX_CHARS)
        texts = line.get("drafts", ())
        if isinstance(texts, list) and any(len(str(text)) > MAX_CHARS for text in texts):
            raise ValueError(f"a text of more than {MAX_CHARS:,} characters")
        json.dumps(line, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        reason = "half a character (an escape like \\ud83d without its pair)"
    except (RecursionError, TypeError):      # fields that are kept as they are
        reason = "a field that is no JSON"
    except ValueError as e:
        reason = str(e)
    else:
        count.lines += 1
        count.disliked += line.get("label") is False
        return True
    if NOT_UTF_8.search("".join(map(str, line.values()))):
        reason = "bytes that are not UTF-8: save the file as UTF-8"
    count.lost[reason] += 1
    return False


# ---- Threads: rows that answer other rows --------------------------------------------------------

def thread_lines(rows, args, count):
    """A line for each row that answers another one: {"post": what it answers, "reply"}. With
    --turns first only for answers to the beginning of a thread; with all, all turns before it are
    its post. The file's texts are held in memory."""
    own = args.id_column or next((name for name in IDS if any(name in r for r in rows.head)), None)
    if own is None:
        raise InputError(f"{rows.path} has no column of ids: name it by --id-column")
    check_names(rows, (args.post_column, args.reply_to, own))
    texts, parents, order = {}, {}, []
    for row in rows:
        count.rows += 1
        if isinstance(row, ValueError):
            count.lost[str(row)] += 1
            continue
        name = id_of(row.get(own))
        text = row.get(args.post_column)
        if not name:
            count.lost["no id"] += 1
        elif not isinstance(text, str) or not text.strip():
            count.lost["no text"] += 1
        elif name in texts:
            count.lost["an id that an earlier row has"] += 1
        else:
            texts[name] = text.strip()
            parents[name] = id_of(row.get(args.reply_to))
            order.append(name)
        count.unread.update(set(given(row, *row)) - {own, args.post_column, args.reply_to})
    ask = "prompt" if args.put_as == "prompt" else "post"
    answered = set(parents.values())
    for name in order:
        try:
            before = thread(name, parents, texts)
        except ValueError as e:
            count.lost[str(e)] += 1
            continue
        if args.turns == "first" and len(before) > 1:
            count.lost["answers deeper in a thread (--turns all takes each, with the turns before "
                       "it)"] += 1
        elif before:
            turns = [("ab"[i % 2], text) for i, text in enumerate(before)]
            yield {"id": name, ask: prompt_of(turns), "reply": texts[name]}
        elif name not in answered:
            count.lost["a beginning that nobody answers"] += 1


def id_of(value):
    """An id as a text, "" for none: without the ".0" of a table that pandas wrote, and the kind
    that Reddit puts in front."""
    if type(value) in (int, float) and value == value:
        value = str(value)
    if not isinstance(value, str) or value.strip().lower() in ("", "nan", "none", "null"):
        return ""
    return re.sub(r"^t[13]_(?=\w)|(?<=\d)\.0$", "", value.strip())


def thread(name, parents, texts):
    """The texts that a row answers, from the first of its thread on; [] for one that answers
    none."""
    before = []
    seen = {name}
    parent = parents[name]
    while parent:
        if parent in seen:
            raise ValueError("an answer in a thread that leads back to itself")
        if parent not in texts:
            raise ValueError("an answer in a thread whose beginning is not in the file")
        seen.add(parent)
        before.append(texts[parent])
        parent = parents[parent]
    return before[::-1]


# ---- What is printed -----------------------------------------------------------------------------

def reasons(lost, most=SHOWN_REASONS):
    """Counts by reason as a text, the largest first."""
    parts = [f"{number} x {reason}" for reason, number in lost.most_common(most)]
    rest = len(lost) - len(parts)
    return "; ".join(parts + [f"and {rest} other reasons"] * bool(rest)) or "it holds none"


def report(args, rows, count, posts):
    """Print what a file was, what was written, what was merged and what was left out."""
    what = found(rows)
    if args.post_column:
        names = [args.post_column, args.reply_column or args.reply_to]
        what = f"{rows.kind}, columns {shown(names)}"
    say(f"{args.data} is {what}: {count.rows:,} rows")
    replies = sum(len(post.replies) for post in posts)
    say(f"{args.out}: {count.lines:,} lines, {len(posts):,} posts with {replies:,} replies")
    if posts and posts.merged:
        line, earlier = posts.merged_first
        repeated = posts.replies_read - replies
        say(f"{posts.merged:,} lines repeat the post of an earlier line and are merged with it "
            f"when the file is read (first: line {line} with line {earlier}); {repeated:,} replies "
            "are repeated, too, and count once")
    if posts and posts.dropped:
        say(f"{posts.dropped:,} lines repeat a post with replies by style, and are not read")
    if count.lost:
        say(f"Left out: {reasons(count.lost)}")
    names = sorted(map(str, count.unread))
    if names:
        more = ", .." if len(names) > 12 else ""
        say(f"Fields that are not read: {shown(names[:12])}{more}")
    say(f"Look at it: python {sys.argv[0] if sys.argv[0].endswith('data.py') else 'data.py'} check "
        f"{args.out}")


def say(text):
    print(printable(text))
