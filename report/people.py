"""What people pick: blind sets of drafts to choose among, and their picks counted.

    python evaluate.py ask runs/lora-1 runs/poly-1 --out picks.csv     # a copy to each person
    python evaluate.py picks anna.csv ben.csv --key picks.key.json
    python evaluate.py ask runs/lora-1 runs/poly-1 --serve             # a page instead

The page is in report/picking.py. Of a sheet, a person sees, for each post, one set of k drafts from
each run, side by side and without names, and marks the set that they would rather have been shown.
Sets and not single drafts are chosen because a set is what the app shows: a run whose best draft is
good but whose five are one draft five times loses here, as it would in the app, while picking the
best draft of all would hide that. One choice a post is quick, needs no scale that raters read
differently, and gives rates that add up to 1, with 1/runs as what chance gives. Few runs (2 to 4)
keep it readable."""

import csv
import io
import json
import random
from pathlib import Path

import numpy as np

from report.blind import check_numbers, common_posts, names_of, records_of, some_drafts
from report.pick_page import serve
from report.picking import is_of_page, read_raters
from report.runs import read_run
from report.stats import interval
from report.tables import csv_cell
from support.files import InputError, printable, read_object, write_text


MARK = "pick"                                # the column that people fill


# ---- Asking --------------------------------------------------------------------------------------

def ask(args):
    """Write the sheet: a row a post and run, {item, set, post, draft 1 .. draft k, pick}, posts and
    sets shuffled, and next to it the key, which set is of which run. With --serve: a page."""
    if args.serve:
        serve(args)
        return
    if not args.out:
        raise InputError("give --out, the sheet to write, or --serve for a page")
    if len(args.runs) < 2:
        raise InputError("give two runs or more: people choose between their drafts")
    runs = [read_run(folder) for folder in args.runs]
    records = [records_of(folder) for folder in args.runs]
    names = names_of(runs)
    ids = common_posts(runs)
    check_numbers(args, records, ids)
    draw = random.Random(f"ask {args.seed}")
    ids = draw.sample(ids, min(args.posts or len(ids), len(ids)))
    sheet = [["item", "set", "post", *(f"draft {n + 1}" for n in range(args.k)), MARK]]
    key = {"version": 1, "runs": names, "k": args.k, "seed": args.seed, "items": {}}
    for item, i in enumerate(ids, 1):
        sets = {}
        for number, which in enumerate(draw.sample(range(len(runs)), len(runs))):
            label = letter(number)
            sets[label] = names[which]
            some = some_drafts(records[which][i], args.k, draw)
            sheet.append([str(item), label, runs[0]["posts"][i], *some, ""])
        cluster = records[0][i].get("intent") or i
        key["items"][str(item)] = {"id": i, "cluster": cluster, "sets": sets}
    lines = [",".join(map(csv_cell, row)) for row in sheet]
    # The mark at the start lets spreadsheets read UTF-8.
    write_text(args.out, "\ufeff" + "\r\n".join(lines) + "\r\n")
    write_text(key_of(args.out), json.dumps(key, indent=1, ensure_ascii=False) + "\n")
    print(f"{args.out}: {len(ids)} posts, {len(runs)} sets of {args.k} drafts each: give people "
          f"copies, who put an x under '{MARK}' in one row of each post; keep "
          f"{key_of(args.out)} from them")


def letter(number):
    """0 -> A, 25 -> Z, 26 -> A2."""
    first = chr(65 + number % 26)
    return first if number < 26 else f"{first}{number // 26 + 1}"


def key_of(sheet):
    return str(Path(sheet).with_suffix("")) + ".key.json"


# ---- Counting ------------------------------------------------------------------------------------

def read_picks(path, key):
    """A filled sheet -> {item: the run picked}; items without a mark are left out."""
    text = read_sheet(path)
    first = text.partition("\n")[0]
    comma = max(",;\t", key=first.count)     # spreadsheets of some countries write semicolons
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=comma)
    try:
        columns = rows.fieldnames or ()
        lacking = [name for name in ("item", "set", MARK) if name not in columns]
        filled = [] if lacking else list(enumerate(rows, 2))
    except csv.Error as error:               # a cell of more than 100,000 characters, say
        raise InputError(f"{path}, line {rows.line_num + 1}: {error}; fill a copy of the sheet "
                         "that `ask` wrote") from None
    if lacking:
        raise InputError(f"{path} has no column {lacking[0]!r}; fill a copy of the sheet that "
                         "`ask` wrote")
    out = {}
    for number, row in filled:
        if not (row[MARK] or "").strip():
            continue
        item = (row["item"] or "").strip()
        run = key["items"].get(item, {"sets": {}})["sets"].get((row["set"] or "").strip())
        if run is None:
            raise InputError(f"{path}, line {number}: there is no such item and set in the key; "
                             "was the sheet made by another `ask`?")
        if item in out:
            raise InputError(f"{path}, line {number}: two sets of item {item} are marked; "
                             "leave one")
        out[item] = run
    return out


def read_sheet(path):
    """The text of a filled sheet; InputError says what the file is where it is none."""
    try:
        packed = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: give the filled copies of the sheet that `ask` "
                         "wrote") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: give the filled sheets in it, one by one") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions and its "
                         "disk") from None
    if packed.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise InputError(f"{path} is a workbook of a spreadsheet program; save it as CSV UTF-8")
    try:
        text = packed.decode("utf-8-sig")
    except ValueError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); save it as CSV UTF-8") from None
    if text.lstrip()[:1] in ("{", "["):
        raise InputError(f"{path} is JSON, no sheet: picks that `drafts` has kept are for "
                         "rewards.py train and polylora.py sft, --data FILE")
    return text


def fleiss_kappa(counts):
    """Agreement beyond chance of (items, categories) counts of ratings, each item by two raters
    or more, not all by as many: Fleiss (1971) with each item's own number; 1 is perfect, 0 chance.
    None where it is not defined: no item has two ratings, or all picked one category."""
    counts = np.asarray([row for row in counts if sum(row) > 1], dtype=float)
    if not len(counts):
        return None
    n = counts.sum(1)
    pairs = (counts * (counts - 1)).sum(1)
    agreed = (pairs / (n * (n - 1))).mean()
    shares = counts.sum(0) / counts.sum()
    chance = float((shares ** 2).sum())
    return None if chance == 1 else float((agreed - chance) / (1 - chance))


def count_picks(raters, key):
    """[{item: names of the runs whose draft or set was picked, () for none}, one a rater] -> what
    picks.json holds. A run's rate on a post is the share of its raters who picked it; a pick of
    what several runs wrote counts for each in equal parts. The mean is over posts, the interval
    (95%) over their clusters; raters are taken as given, so it speaks of these people and other
    posts. Agreement counts a pick of several runs, and none, as choices of their own."""
    names = key["runs"]
    items = [i for i in key["items"] if any(i in rater for rater in raters)]
    if len(items) < 2:
        raise InputError("fewer than 2 posts have a pick, too few for an interval")
    choices = sorted({chosen for rater in raters for chosen in rater.values()})
    counts = np.zeros((len(items), len(choices)), dtype=int)
    for row, i in enumerate(items):
        for column, chosen in enumerate(choices):
            counts[row, column] = sum(rater.get(i) == chosen for rater in raters)
    credit = np.zeros((len(choices), len(names)))
    for row, chosen in enumerate(choices):
        for name in chosen:
            credit[row, names.index(name)] = 1 / len(chosen)
    shares = counts / counts.sum(1, keepdims=True) @ credit                    # (items, runs)
    clusters = [key["items"][i]["cluster"] for i in items]
    rates = {}
    for name, values in zip(names, shares.T):
        rates[name] = rate_of(values, clusters)
    none = rate_of(1 - shares.sum(1), clusters)
    picked = sum(bool(chosen) for rater in raters for chosen in rater.values())
    return {"version": 1, "raters": len(raters), "posts": len(items), "k": key["k"],
            "picks": picked, "none": int(counts.sum()) - picked, "none_rate": none,
            "left_out": len(key["items"]) - len(items),
            "chance": (1 - none["rate"]) / len(names), "runs": rates,
            "fleiss_kappa": fleiss_kappa(counts)}


def rate_of(values, clusters):
    """{"rate", "low", "high"} of shares (posts,) with their clusters."""
    mean, low, high = interval([values], [clusters], True)
    return {"rate": mean, "low": max(0.0, low), "high": min(1.0, high)}


def picks(args):
    """Count filled sheets, or files of the page, one a rater: a table on the screen and in
    PREFIX.txt, the numbers in PREFIX.json."""
    of_page = {is_of_page(path) for path in args.sheets}
    if of_page == {True}:
        key, raters = read_raters(args.sheets)
    elif of_page == {False}:
        key = read_key(args.key or key_of(args.sheets[0]))
        raters = []
        for path in args.sheets:
            filled = read_picks(path, key)
            raters.append({item: (run,) for item, run in filled.items()})
    else:
        raise InputError("a sheet has picks of sets, and a .jsonl file of the page picks of single "
                         "drafts: count them apart")
    result = count_picks(raters, key)
    prefix = args.out or str(Path(args.sheets[0]).with_suffix("")) + ".result"
    text = picks_text(result, of_page == {True})
    write_text(prefix + ".json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_text(prefix + ".txt", text)
    print(text, end="")


def read_key(place):
    """The key that `ask` wrote beside its sheet."""
    if not Path(place).is_file():
        raise InputError(f"there is no key {place}: name with --key the one that `ask` wrote")
    key = read_object(place)
    if key.get("version") != 1 or not isinstance(key.get("items"), dict):
        raise InputError(f"{place} is no key of `ask`; name the right one with --key")
    return key


def picks_text(result, of_page):
    """What count_picks found, as a table and two sentences."""
    rows = sorted(result["runs"].items(), key=lambda pair: -pair[1]["rate"])
    if of_page:
        rows.append(("none of them", result["none_rate"]))
    wide = max(len(name) for name, _ in [("run", None), *rows])
    lines = [f"{'run':{wide}}  pick rate  95% interval"]
    for name, row in rows:
        lines.append(f"{printable(name):{wide}}  {row['rate']:9.3f}  "
                     f"[{row['low']:.3f}, {row['high']:.3f}]")
    of_raters = f"by {result['raters']} raters on {result['posts']} posts"
    chance = f"; chance: {result['chance']:.3f}" if len(result["runs"]) > 1 else ""
    if of_page:
        total = result["picks"] + result["none"]
        lines.append(f"{total} answers (picks: {result['picks']}, none: {result['none']}) "
                     f"{of_raters}{chance}")
    else:
        lines.append(f"{result['picks']} picks {of_raters}, {result['left_out']} without a pick "
                     f"left out{chance}")
    kappa = result["fleiss_kappa"]
    if kappa is None:
        shown = "not defined (two raters of a post are needed, and more than one choice)"
    else:
        shown = f"{kappa:.3f}"
    lines.append(f"Agreement, Fleiss' kappa: {shown}")
    return "\n".join(lines) + "\n"


def commands(sub, form):
    """The commands ask and picks, for evaluate.py's parser."""
    p = sub.add_parser("ask", help="ask people: a blind sheet of drafts, or with --serve a page",
                       **form)
    p.add_argument("runs", nargs="+", metavar="RUN", help="measured runs, on the same posts")
    p.add_argument("--out", metavar="FILE",
                   help="the sheet, a CSV, whose key is written next to it; with --serve the JSON "
                        "lines that picks are appended to (then by default picks.jsonl)")
    p.add_argument("--k", type=int, default=5, help="drafts of each run")
    p.add_argument("--posts", type=int, default=30, help="posts to ask about; 0: all")
    p.add_argument("--seed", type=int, default=1, help="of what is drawn and of the order")
    p.add_argument("--serve", action="store_true",
                   help="open a page on this machine, on which a person picks single drafts, and "
                        "may stop and go on later")
    p.add_argument("--port", type=int, default=0, help="of that page; 0: any that is free")
    p.add_argument("--no-browser", action="store_true",
                   help="print the page's address only, and do not open it")
    p.set_defaults(run=ask)
    p = sub.add_parser("picks", help="count the filled sheets: pick rates, agreement", **form)
    p.add_argument("sheets", nargs="+", metavar="FILE",
                   help="filled copies of a sheet, or files that the page wrote, one a rater")
    p.add_argument("--key", help="the sheet's key; default: next to the first sheet, by its name")
    p.add_argument("--out", metavar="PREFIX",
                   help="where .json and .txt go; default: the first file's name and .result")
    p.set_defaults(run=picks)
