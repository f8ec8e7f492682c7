"""What people pick: blind sets of drafts to choose among, picks counted, a prompt that keeps them.

    python evaluate.py ask runs/lora-1 runs/poly-1 --out picks.csv     # a copy to each person
    python evaluate.py picks anna.csv ben.csv --key picks.key.json
    python evaluate.py drafts runs/poly-1                              # type posts, pick drafts

A person sees, for each post, one set of k drafts from each run, side by side and without names,
and marks the set that they would rather have been shown. Sets and not single drafts are chosen
because a set is what the app shows: a run whose best draft is good but whose five are one draft
five times loses here, as it would in the app, while picking the best draft of all would hide
that. One choice a post is quick, needs no scale that raters read differently, and gives rates
that add up to 1, with 1/runs as what chance gives. Few runs (2 to 4) keep it readable."""

import csv
import io
import json
import random
from pathlib import Path

import numpy as np

from data import InputError, normalise, printable, write_text
from metrics import interval, near_duplicates
from report import csv_cell, read_object, read_run

MARK = "pick"                                # the column that people fill


# ---- Asking --------------------------------------------------------------------------------------

def ask(args):
    """Write the sheet: a row a post and run, {item, set, post, draft 1 .. draft k, pick}, posts and
    sets shuffled, and beside it the key, which set is of which run."""
    if len(args.runs) < 2:
        raise InputError("give two runs or more: people choose between their drafts")
    runs = [read_run(folder) for folder in args.runs]
    names = [run["arm"] if [r["arm"] for r in runs].count(run["arm"]) == 1 else
             f"{run['arm']} (seed {run['seed']})" for run in runs]
    records = [{r["id"]: r for r in read_object(Path(folder) / "evaluation.json")["records"]}
               for folder in args.runs]
    if len(set(names)) < len(names):
        raise InputError("two of the runs are the same arm and seed: give each once")
    ids = [i for i in runs[0]["posts"] if all(r["posts"].get(i) == runs[0]["posts"][i]
                                              for r in runs)]
    if len(ids) < 2:
        raise InputError("the runs have fewer than 2 posts in common; measure them on the same")
    shortest = min(len(found[i]["drafts"]) for found in records for i in ids)
    if args.posts < 0:
        raise InputError(f"--posts {args.posts}: how many posts to ask about, or 0 for all")
    if not 1 <= args.k <= shortest:
        raise InputError(f"--k {args.k}: a set needs 1 to {shortest} drafts, as many as were "
                         "measured")
    draw = random.Random(f"ask {args.seed}")
    ids = draw.sample(ids, min(args.posts or len(ids), len(ids)))
    sheet = [["item", "set", "post", *(f"draft {n + 1}" for n in range(args.k)), MARK]]
    key = {"version": 1, "runs": names, "k": args.k, "seed": args.seed, "items": {}}
    for item, i in enumerate(ids, 1):
        order = draw.sample(range(len(runs)), len(runs))
        for number, which in enumerate(order):
            # A joint decoder's sets would be torn apart: its first k drafts are its set.
            drafts, joint = records[which][i]["drafts"], "set" in records[which][i]
            some = drafts[:args.k] if joint else draw.sample(drafts, args.k)
            sheet.append([str(item), letter(number), runs[0]["posts"][i], *some, ""])
        key["items"][str(item)] = {"id": i, "cluster": records[0][i].get("intent") or i,
                                   "sets": {letter(n): names[w] for n, w in enumerate(order)}}
    lines = (",".join(map(csv_cell, row)) for row in sheet)
    # The mark at the start lets spreadsheets read UTF-8.
    write_text(args.out, "\ufeff" + "\r\n".join(lines) + "\r\n")
    write_text(key_of(args.out), json.dumps(key, indent=1, ensure_ascii=False) + "\n")
    print(f"{args.out}: {len(ids)} posts, {len(runs)} sets of {args.k} drafts each: give people "
          f"copies, who put an x under '{MARK}' in one row of each post; keep "
          f"{key_of(args.out)} from them")


def letter(number):
    """0 -> A, 25 -> Z, 26 -> A2."""
    return chr(65 + number % 26) + (str(number // 26 + 1) if number >= 26 else "")


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
        lacking = [n for n in ("item", "set", MARK) if n not in (rows.fieldnames or ())]
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
    agreed = ((counts * (counts - 1)).sum(1) / (n * (n - 1))).mean()
    chance = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return None if chance == 1 else float((agreed - chance) / (1 - chance))


def count_picks(raters, key):
    """[{item: run}, one a rater] -> what picks.json holds. A run's rate on a post is the share of
    its raters who picked it; the mean is over posts, the interval (95%) over their clusters;
    raters are taken as given, so it speaks of these people and other posts."""
    names = key["runs"]
    items = [i for i in key["items"] if any(i in rater for rater in raters)]
    if len(items) < 2:
        raise InputError("fewer than 2 posts have a pick, too few for an interval")
    counts = np.array([[sum(rater.get(i) == name for rater in raters) for name in names]
                       for i in items])
    shares = counts / counts.sum(1, keepdims=True)
    clusters = [key["items"][i]["cluster"] for i in items]
    rates = {}
    for name, values in zip(names, shares.T):
        mean, low, high = interval([values], [clusters], True)
        rates[name] = {"rate": mean, "low": max(0.0, low), "high": min(1.0, high)}
    return {"version": 1, "raters": len(raters), "posts": len(items), "k": key["k"],
            "picks": int(counts.sum()), "left_out": len(key["items"]) - len(items),
            "chance": 1 / len(names), "runs": rates, "fleiss_kappa": fleiss_kappa(counts)}


def picks(args):
    """Count filled sheets, a file a rater: a table on the screen and in PREFIX.txt, the numbers in
    PREFIX.json."""
    place = args.key or key_of(args.sheets[0])
    if not Path(place).is_file():
        raise InputError(f"there is no key {place}: name with --key the one that `ask` wrote")
    key = read_object(place)
    if key.get("version") != 1 or not isinstance(key.get("items"), dict):
        raise InputError(f"{place} is no key of `ask`; name the right one with --key")
    result = count_picks([read_picks(path, key) for path in args.sheets], key)
    wide = max(len(name) for name in [*result["runs"], "run"])
    lines = [f"{'run':{wide}}  pick rate  95% interval"]
    for name, row in sorted(result["runs"].items(), key=lambda pair: -pair[1]["rate"]):
        lines.append(f"{printable(name):{wide}}  {row['rate']:9.3f}  "
                     f"[{row['low']:.3f}, {row['high']:.3f}]")
    kappa = result["fleiss_kappa"]
    said = "not defined (two raters of a post are needed, and more than one run picked)"
    lines += [f"{result['picks']} picks by {result['raters']} raters on {result['posts']} posts, "
              f"{result['left_out']} without a pick left out; chance: {result['chance']:.3f}",
              f"Agreement, Fleiss' kappa: {said if kappa is None else f'{kappa:.3f}'}"]
    prefix = args.out or str(Path(args.sheets[0]).with_suffix("")) + ".result"
    text = "\n".join(lines) + "\n"
    write_text(prefix + ".json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_text(prefix + ".txt", text)
    print(text, end="")


# ---- A prompt ------------------------------------------------------------------------------------

def converse(write, run, place, lines, say=print, domain=None):
    """Type a post, see its drafts, pick one by number: until the lines end, or an empty post.

    write(post) -> drafts. Each pick is a line appended to the JSONL at `place`: {"post", "reply":
    the picked draft, "drafts", "pick": its index from 0, "run", "domain": the run's, which says how
    the post was put to it}: a post file as it stands, with pairs (picked, passed over) for a reward
    model, which is asked in the same format, beside it."""
    lines = iter(lines)
    while True:
        say("post (empty: end):")
        post = next(lines, "").strip()
        if not post:
            return
        if not normalise(post):              # no post file holds such a one
            say("that post has no letter or digit")
            continue
        drafts = write(post)
        for number, (text, same) in enumerate(zip(drafts, near_duplicates(drafts)), 1):
            say(f"{number}. {printable(text)}" + ("" if same is None else f"   (like {same + 1})"))
        say(f"pick 1 to {len(drafts)} (empty: none):")
        pick = next(lines, "").strip()
        while pick and not (pick.isdecimal() and 1 <= int(pick) <= len(drafts)):
            say(f"{printable(pick)[:20]!r} is no number from 1 to {len(drafts)}:")
            pick = next(lines, "").strip()
        if not pick:
            continue
        chosen = int(pick) - 1
        if not drafts[chosen].strip():
            say("that draft is empty: not kept")
            continue
        kept = {"post": post, "reply": drafts[chosen], "drafts": drafts, "pick": chosen,
                "run": str(run)} | ({"domain": domain} if domain else {})
        try:
            with open(place, "a", encoding="utf-8") as file:
                file.write(json.dumps(kept, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(f"{place} cannot be written ({error}): choose another place with "
                             "--picks") from None
        say(f"kept in {place}")


def commands(sub, form):
    """The commands ask and picks, for evaluate.py's parser."""
    p = sub.add_parser("ask", help="write a blind sheet of drafts for people to choose among",
                       **form)
    p.add_argument("runs", nargs="+", metavar="RUN", help="measured runs, on the same posts")
    p.add_argument("--out", required=True, metavar="CSV", help="the sheet; its key is put beside")
    p.add_argument("--k", type=int, default=5, help="drafts in a set")
    p.add_argument("--posts", type=int, default=30, help="posts to ask about; 0: all")
    p.add_argument("--seed", type=int, default=1, help="of what is drawn and of the order")
    p.set_defaults(run=ask)
    p = sub.add_parser("picks", help="count the filled sheets: pick rates, agreement", **form)
    p.add_argument("sheets", nargs="+", metavar="CSV", help="filled copies of a sheet, one a rater")
    p.add_argument("--key", help="the sheet's key; default: beside the first sheet, by its name")
    p.add_argument("--out", metavar="PREFIX",
                   help="where .json and .txt go; default: the first sheet's name and .result")
    p.set_defaults(run=picks)
