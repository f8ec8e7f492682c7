"""The report of measured runs: report.json, .html, .md, .txt, .csv and pictures.

`report` is the command of evaluate.py. Runs are read in runs.py, compared in summary.py, and shown
in tables.py, pictures.py and page.py."""

import json
from pathlib import Path

from metrics import KS
from report.ending import ending
from report.page import html_page
from report.pictures import draw_all
from report.runs import SHOWN_POSTS, group_runs
from report.summary import primary, summarise
from report.svg import NARROW, WIDE
from report.tables import notes_of, tables, write_tables
from support.files import InputError, write_text


def report(run_folders, out_folder, against=None, ks=KS, endpoint=None):
    """Compare measured runs: report.json, .html, .md, .txt, .csv and SVGs in out_folder; print the
    ending (ending.py). -> report.json's dict.

    Runs of one arm are its seeds. `against` names the arm from which paired differences are taken,
    endpoint an arm and its rivals in the primary comparison. Writes nothing on an InputError."""
    arms = group_runs(run_folders, ks)
    summary = summarise(arms, against, ks)
    results = []
    if endpoint and not summary["refused"]:
        arm, *rivals = endpoint
        if not rivals:
            raise InputError(f"--primary {arm} names no rival: give the arms to compare it with")
        results = [primary(arms, arm, rival) for rival in rivals]
    summary["primary"] = [sentence for result in results for sentence in result]
    summary["primary_arm"] = endpoint[0] if results else None
    text, page, sheet = write_tables(summary)
    files = {"report.json": json.dumps(summary, indent=1, ensure_ascii=False) + "\n",
             "report.md": page, "report.txt": text, "report.csv": sheet}
    pictures = draw_all(summary, WIDE)
    pairs = list(zip(pictures.values(), draw_all(summary, NARROW).values()))
    files |= pictures
    files["report.html"] = html_page(summary, tables(summary), notes_of(summary), pairs,
                                     samples_of(arms))
    for name, content in files.items():
        write_text(Path(out_folder) / name, content)
    print("\n".join(ending(summary, out_folder)))
    return summary


def samples_of(arms):
    """Completions side by side: posts of each seed, in turn, with the completions of all its
    runs."""
    by_seed = {}
    for runs in arms.values():
        for run in runs:
            by_seed.setdefault(run["seed"], []).append(run)
    out = []
    for seed in sorted(by_seed):
        runs = by_seed[seed]
        some = list(runs[0]["samples"])[:max(3, SHOWN_POSTS // len(by_seed))]
        for i in some:
            sets = {run["arm"]: run["samples"][i] for run in runs}
            out.append({"seed": seed, "post": runs[0]["posts"][i], "sets": sets})
    return out
