"""`python -m report RUNS --live`: the page of a study while it runs."""

import json
import time
from pathlib import Path

from report.page import html_page, waiting_page
from report.pictures import curve_file, draw_all, draw_curve
from report.report import report, samples_of
from report.runs import group_runs, log_curves
from report.summary import arm_curves, summarise
from report.svg import NARROW, WIDE
from report.tables import notes_of, tables
from support.files import InputError, duration, write_text
from support.progress import numbers_of


# ---- The state of a run --------------------------------------------------------------------------

class State:
    """What a run's folder shows: `what` it does, `left` the seconds to its end if they are known,
    `numbers` of its last step that matter, `curves` of its log so far."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.config = read_or_nothing(self.folder / "config.json")
        self.arm = self.config.get("arm") or self.folder.name
        self.measured = (self.folder / "evaluation.json").exists()
        self.numbers = {}
        self.left = None
        lines = log_lines(self.folder / "metrics.jsonl")
        self.curves = log_curves(lines)
        steps = [line for line in lines if type(line.get("step")) is int and "event" not in line]
        if self.measured:
            self.what = "measured"
        elif (self.folder / "done.json").exists():
            self.what = "trained, not measured yet"
        elif steps:
            self.what = self.at_step(steps)
        else:
            self.what = "begun" if self.config else "waiting"
        if steps:
            stage = self.config.get("command") or "grpo"
            self.numbers = numbers_of(stage, finite(steps[-1]), ())

    def at_step(self, steps):
        """At which step the run is, and how fast."""
        step = steps[-1]["step"]
        times = [line["seconds"] for line in steps[-10:]
                 if type(line.get("seconds")) in (int, float)]
        pace = sum(times) / len(times) if times else None
        total = self.config.get("steps") or None
        what = f"step {step}" + (f" of {total}" if total else "")
        if pace:
            what += f", {pace:.2g} s a step"
            if total:
                self.left = pace * (total - step)
        silent = time.time() - (self.folder / "metrics.jsonl").stat().st_mtime
        if silent > max(300, 20 * (pace or 0)):
            what += f", silent for {duration(silent)}"
        return what

    def row(self):
        """The cells of the run's row in the page's table."""
        numbers = ", ".join(f"{name} {value}" for name, value in self.numbers.items())
        left = "-" if self.left is None else duration(self.left)
        return [str(self.folder), self.what, left, numbers or "-"]


def read_or_nothing(path):
    """The object in a JSON file; {} where there is none, or where it is just being written."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def log_lines(log):
    """The objects of a log's whole lines: the last may be just being written."""
    lines = []
    try:
        texts = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return lines
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def finite(line):
    return {name: value for name, value in line.items() if type(value) in (int, float)}


# ---- The runs ------------------------------------------------------------------------------------

def find_runs(given):
    """(folders of runs, whether there may be more). A folder that is no run stands for the runs
    below it, in the order in which they began, and is complete once it holds a report."""
    folders = []
    more = False
    for name in map(Path, given):
        below = [] if (name / "config.json").exists() else runs_below(name)
        if not below:
            folders.append(name)
            continue
        folders += below
        more = more or not any(name.glob("report*/report.json"))
    return folders, more


def runs_below(folder):
    """The runs below a study's folder but the bases' own, which are not measured."""
    found = []
    for depth in ("*", "*/*", "*/*/*"):
        for path in folder.glob(f"{depth}/config.json"):
            if read_or_nothing(path).get("command") != "base" and path.parent.name != "model":
                found.append((path.stat().st_mtime, path.parent))
    return [folder for _, folder in sorted(found)]


# ---- The page ------------------------------------------------------------------------------------

def live(given, out, against, ks, endpoint, every):
    """Rebuild out/report.html every `every` seconds until all runs are measured, then write the
    whole report; Ctrl-C ends it earlier, with the page as it stands."""
    if not every > 0:
        raise InputError(f"--every {every:g}: give a number of seconds above 0")
    page = Path(out) / "report.html"
    study = Study(against, ks)
    print(f"Look at {page}: it is rebuilt every {every:g} s until every run is measured (Ctrl-C "
          "ends it)", flush=True)
    try:
        while True:
            folders, more = find_runs(given)
            states = [State(folder) for folder in folders]
            if all(state.measured for state in states) and not more:
                break
            write_text(page, study.page(states, every))
            time.sleep(every)
    except KeyboardInterrupt:
        write_text(page, study.page(states, 0))
        print(f"stopped: {page} is as the runs were; the same command goes on")
        return
    report(folders, out, against, ks, endpoint)


class Study:
    """The page of the runs so far. What is measured is summarised again only when it changes."""

    def __init__(self, against, ks):
        self.against = against
        self.ks = ks
        self.known = None                    # of which evaluations `summary` is
        self.summary = None
        self.samples = []
        self.trouble = []                    # why the measured runs cannot be compared

    def page(self, states, refresh):
        """The page as a text."""
        done = sum(state.measured for state in states)
        title = f"{done} of {len(states)} runs are measured"
        status = (title, ["run", "state", "left", "last numbers"], [s.row() for s in states])
        self.summarise([state for state in states if state.measured])
        arms = {}
        for state in states:
            arms.setdefault(state.arm, []).append({"curves": state.curves})
        curves = arm_curves(arms)
        if self.summary is None:
            order = list(arms)
            pictures = [(draw_curve(curve, order, WIDE), draw_curve(curve, order, NARROW))
                        for curve in curves]
            return waiting_page(status, self.trouble, pictures, refresh)
        order = list(dict.fromkeys([*self.summary["arms"], *arms]))      # of the colours
        drawn = []
        for wide in (WIDE, NARROW):
            some = draw_all(self.summary | {"curves": []}, wide)
            some |= {curve_file(curve): draw_curve(curve, order, wide) for curve in curves}
            drawn.append(some.values())
        return html_page(self.summary, tables(self.summary), notes_of(self.summary) + self.trouble,
                         list(zip(*drawn)), self.samples, status, refresh)

    def summarise(self, states):
        """Compare the measured runs, unless that was done already."""
        key = [(state.folder, (state.folder / "evaluation.json").stat().st_mtime_ns)
               for state in states]
        if not states or key == self.known:
            return
        try:
            arms = group_runs([state.folder for state in states], self.ks)
            against = self.against if self.against in arms else None
            self.summary = summarise(arms, against, self.ks) | {"primary": [], "primary_arm": None}
            self.samples = samples_of(arms)
            self.trouble = []
            self.known = key
        except InputError as e:
            self.trouble = [str(e)]
