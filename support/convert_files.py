"""Files that are no JSON lines of posts: what they are, their rows, and the command that converts
them."""

import csv
import gzip
import importlib
import json
import os
import re
import shlex
import zlib
from collections import Counter
from itertools import chain, islice
from pathlib import Path

from support.convert_formats import format_of, is_chat, likely_columns
from support.files import InputError
from support.formats import fields_of, read_object, shown, task_fields


UTF_16 = "is UTF-16: save it as UTF-8"

ARROW = 'is an Arrow file: write it as JSON lines (datasets: to_json) or Parquet'

STARTS = [
    (b"ARROW1", ARROW), (b"\xff\xff\xff\xff", ARROW),
    (b"PK\x03\x04", "is a zip archive or an Excel workbook: unpack it, or save it as CSV UTF-8"),
    (b"BZh", "is packed with bzip2: unpack it"),
    (b"\xfd7zXZ", "is packed with xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "is packed with zstd: unpack it"),
    (b"SQLite format 3", "is an SQLite database: export the table as CSV"),
    (b"\xff\xfe", UTF_16), (b"\xfe\xff", UTF_16),
    (b"version https://git-lfs", "is a Git LFS pointer in place of the file: run git lfs pull"),
    (b"<!doctype html", "is a web page: download the file itself"),
    (b"<html", "is a web page: download the file itself")]

HEAD = 100                       # rows that show a file's format

LONGEST_CELL = 2 ** 24           # bytes of a cell, or of a line: more would take gigabytes to parse

BROKEN = (OSError, EOFError, zlib.error)             # while a file is read


class Rows:
    """The rows of a file, one after the other: `kind` says what the file is; `head` holds the first
    HEAD rows; iterating gives each row, a dict, or the ValueError that says why there is none."""

    def __init__(self, path, kind, rows):
        self.path = path
        self.kind = kind
        rows = iter(rows)
        first = list(islice(rows, HEAD))
        self.head = [row for row in first if isinstance(row, dict)]
        self.rows = chain(first, rows)

    def __iter__(self):
        return self.rows


def open_rows(path, table=False):
    """The Rows of a file, plain or packed with gzip: JSON lines, a JSON array, objects over several
    lines, CSV, TSV or Parquet; table: a text that is no JSON is a table, whatever its first line
    holds. InputError for any other file."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rb") as file:
            head = file.read(2 ** 16)
            if b"\n" not in head:            # a long first line
                head += file.readline(LONGEST_CELL)
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: give a file") from None
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except BROKEN as e:
        raise InputError(f"{path} cannot be read ({e}): is it whole?") from None
    for start, what in STARTS:
        if head[:40].lstrip().lower().startswith(start.lower()):
            raise InputError(f"{path} {what}")
    if head.startswith(b"PAR1"):
        return Rows(path, "a Parquet file", parquet_rows(path))
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if not text:
        raise InputError(f"{path} holds no posts: it is empty")
    if text[0] == "[":
        return Rows(path, "a JSON array", json_values(path, packed))
    if text[0] == "{" and any(map(is_object, head.splitlines()[:20])):
        return inner_rows(Rows(path, "JSON lines", json_lines(path, packed)))
    if text[0] == "{":
        return inner_rows(Rows(path, "JSON objects over several lines", json_values(path, packed)))
    first = text.partition("\n")[0]
    mark = max(",\t;", key=first.count)
    names = [name.strip() for name in next(csv.reader([first], delimiter=mark), [])]
    if not table and (len(names) < 2 or not all(map(plain_name, names))):
        raise InputError(f"{path} is no data in a form that is read: give JSON lines, a JSON "
                         "array, a table (CSV, TSV) with names of columns, or Parquet")
    kind = "TSV" if mark == "\t" else "CSV"
    return Rows(path, f"a table ({kind})", table_rows(path, packed, mark))


def plain_name(name):
    return re.fullmatch(r"[\w .-]{1,40}", name) is not None


def is_object(line):
    """Is it a line with a whole JSON object?"""
    try:
        read_object(line)
    except ValueError as e:
        return "stands twice" in str(e)
    return True


def open_text(path, packed):
    """A file as text, in which bytes that are not UTF-8 become half characters (surrogates)."""
    opened = gzip.open if packed else open
    return opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")


def broken(path, error):
    return InputError(f"{path} cannot be read to its end ({str(error)[:100]}): is it whole?")


def json_lines(path, packed):
    """The objects of JSON lines."""
    try:
        with (gzip.open if packed else open)(path, "rb") as file:
            while line := file.readline(LONGEST_CELL):
                if len(line) == LONGEST_CELL:
                    while len(file.readline(LONGEST_CELL)) == LONGEST_CELL:
                        pass
                    yield ValueError(f"a line of more than {LONGEST_CELL:,} bytes")
                elif line.strip():
                    yield row_of_line(line)
    except BROKEN as e:
        raise broken(path, e) from None


def row_of_line(line):
    try:
        return read_object(line)
    except ValueError as e:
        text = str(e)
        return ValueError("a line that is not JSON" if text.startswith("not JSON (") else text)


# ---- JSON values, one after the other ------------------------------------------------------------

BETWEEN = re.compile(r"[\s,]*")

STEP = 2 ** 16                   # characters that are read at a time, at least


class Twice(dict):
    """An object in which a field stands twice."""


def fields_once(pairs):
    found = dict(pairs)
    return found if len(found) == len(pairs) else Twice(found)


def json_values(path, packed):
    """The elements of a JSON array, or objects that follow one another, without holding the whole
    file. What follows a damaged one is not found again: that is the last row's ValueError."""
    decoder = json.JSONDecoder(object_pairs_hook=fields_once)
    try:
        with open_text(path, packed) as file:
            text = file.read(STEP)
            place = BETWEEN.match(text).end()
            if text[place:place + 1] == "[":
                place += 1
            while True:
                place = BETWEEN.match(text, place).end()
                if place == len(text) or text[place] not in '{["':
                    more = file.read(STEP)
                    if not more:
                        yield from after_values(text[place:])
                        return
                    if place < len(text):
                        yield from after_values(text[place:] + more)
                        return
                    text, place = more, 0
                    continue
                value, end = next_value(decoder, text, place)
                if end is None:
                    more = file.read(max(STEP, len(text) - place))
                    if not more:
                        yield ValueError(f"damaged JSON, and all behind it ({value})")
                        return
                    text, place = text[place:] + more, 0
                    continue
                place = end
                yield row_of_value(value)
    except BROKEN as e:
        raise broken(path, e) from None


def after_values(text):
    """What follows the values: only the end of the array, or else a row that says so."""
    if text.strip() not in ("", "]"):
        yield ValueError("JSON that is no object, and all behind it")


def next_value(decoder, text, place):
    """(value, where it ends); (reason, None) where the text does not hold a whole one."""
    try:
        return decoder.raw_decode(text, place)
    except json.JSONDecodeError as e:
        return e.msg, None
    except RecursionError:
        return "brackets nested too deeply", None
    except ValueError:
        return "a number of thousands of digits", None


def row_of_value(value):
    if isinstance(value, Twice):
        return ValueError("an object in which a field stands twice")
    if is_chat(value):                       # an array of chats, each a list of turns
        return {"messages": value}
    return value if isinstance(value, dict) else ValueError("a JSON value that is no object")


def inner_rows(rows):
    """The Rows, or where the file is one object that holds a list of objects, that list's."""
    if len(rows.head) != 1 or format_of(rows.head):
        return rows
    lists = {}
    for name, value in rows.head[0].items():
        objects = isinstance(value, list) and any(isinstance(x, dict) for x in value)
        if objects and not is_chat(value):
            lists[name] = value
    if not lists:
        return rows
    name = max(lists, key=lambda key: len(lists[key]))
    inside = (row_of_value(value) for value in lists[name])
    return Rows(rows.path, f"a JSON object with a list {shown([name])}", inside)


# ---- Tables --------------------------------------------------------------------------------------

def table_rows(path, packed, mark):
    """The rows of a CSV or TSV file as objects: {column: text}."""
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        with open_text(path, packed) as file:
            lines = csv.reader(file, delimiter=mark)
            names = [name.strip() for name in next(lines, [])]
            twice = [name for name in names if name and names.count(name) > 1]
            if twice:
                raise InputError(f"{path}: the column {shown(twice[:1])} stands twice: rename one")
            for cells in lines:
                if not cells:                # a blank line
                    continue
                if len(cells) > len(names):
                    yield ValueError(f"more cells than the {len(names)} columns")
                else:
                    yield dict(zip(names, cells))
    except csv.Error as e:
        yield ValueError(f"a damaged table, and all behind it ({e})")
    except BROKEN as e:
        raise broken(path, e) from None
    finally:
        csv.field_size_limit(limit)


def parquet_rows(path):
    """The rows of a Parquet file, which pyarrow reads."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(f"{path} is a Parquet file, which pyarrow reads: pip install pyarrow, "
                         "then the same command again") from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except Exception as e:                   # pyarrow's errors have no class in common
        raise broken(path, e) from None


# ---- What a file is, for those who want posts ----------------------------------------------------

def other_format(path):
    """What a file is that holds no JSON lines of posts, and the command that makes posts of it;
    None if it may be JSON lines of posts that are damaged."""
    if not os.path.isfile(path):             # a pipe cannot be read again
        return None
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start == b"PAR1":
            return f"is a Parquet file: {convert_command(path)}"
        if start[:2] == b"\x1f\x8b" and not str(path).endswith(".gz"):
            return "is packed with gzip: give it a name that ends in .gz"
        rows = open_rows(path)
    except InputError as e:
        told = str(e).removeprefix(f"{path} ")
        return told if told.startswith("is ") and "in a form" not in told else None
    except BROKEN:
        return None
    if not rows.head or rows.kind == "JSON lines" and not any_help(rows.head):
        return None
    return f"is {found(rows)}: {how_to_convert(rows)}"


def any_help(rows):
    """Would it help to convert JSON lines? Not where some are posts, nor where none becomes one."""
    if any(map(readable, rows)) or any(map(claimed, rows)):
        return False
    form = format_of(rows)
    if form is None:
        return bool(likely_columns(rows))
    for row in rows:
        try:
            if form.fields(row) and all(map(readable, form.lines(row, False, Counter()))):
                return True
        except ValueError:
            pass
    return False


def readable(row):
    """Is the row a line of a file of posts, apart from the types of its fields?"""
    try:
        fields_of(row)
    except ValueError:
        return False
    return True


def claimed(row):
    """Does a domain take the row for one of its tasks, right or wrong?"""
    try:
        return bool(task_fields(row))
    except ValueError:
        return True


def found(rows):
    """What a file's rows are, with the fields that show it."""
    form = format_of(rows.head)
    if form is None:
        names = "columns" if "table" in rows.kind else "fields"
        return f"{rows.kind} with the {names} {shown(list(rows.head[0])[:8])}"
    row = next(row for row in rows.head if form.fields(row))
    return f"{rows.kind} of {form.about} (fields {shown(form.fields(row))})"


def how_to_convert(rows):
    """The command that makes posts of the rows; a sentence where no two columns are likely."""
    if format_of(rows.head):
        return convert_command(rows.path)
    words = likely_columns(rows.head)
    if not words:
        return ("name the fields of the post and of its reply to data.py convert "
                "(--post-column, --reply-column)")
    what = "if these are threads" if "--reply-to" in words else "if two are post and reply"
    return f"{what}, {convert_command(rows.path, *words)}"


def convert_command(path, *words):
    """The command that converts a file, as it can be pasted into a shell."""
    program = Path(__file__).resolve().parent.parent / "data.py"
    if Path.cwd() == program.parent:
        program = "data.py"
    name = re.sub(r"(\.jsonl?|\.csv|\.tsv|\.txt|\.parquet|\.gz)+$", "", Path(path).name)
    out = f"{name}-posts.jsonl"
    number = 1
    while os.path.exists(out):
        number += 1
        out = f"{name}-posts-{number}.jsonl"
    return shlex.join(["python", str(program), "convert", str(path), *words, "--out", out])
