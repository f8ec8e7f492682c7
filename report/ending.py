"""What a report prints: one table, one sentence of verdict, where the rest is, what to do next."""

import shlex
from pathlib import Path

from report.tables import WITH_HALF, aligned, cell
from support.files import printable


def ending(summary, out_folder):
    """The lines that `evaluate.py report` ends with."""
    title, rows = short_table(summary)
    lines = ["", title, *aligned(rows), "", verdict(summary)]
    warnings = summary["notes"]
    if warnings:
        more = f" ({len(warnings) - 1} more in the report)" if len(warnings) > 1 else ""
        lines.append(f"Note: {warnings[0].rstrip('.')}{more}.")
    out = Path(out_folder)
    lines += [f"Look at {out / 'report.html'}: pictures, and drafts side by side; every table: "
              f"{out / 'report.txt'}", next_command(summary)]
    return [printable(line) for line in lines]


def short_table(summary):
    """(title, rows): each method's Pass@1, 5 and 10 with intervals, and D."""
    ks = [k for k in (1, 5, 10) if k in summary["ks"]] or summary["ks"][:3]
    names = [f"pass@{k}" for k in ks]
    what = "Pass@k"
    if summary["refused"]:
        names = ["reward"]
        what = "The mean reward"
    seeds = sorted({len(entry["seeds"]) for entry in summary["arms"].values()})
    counts = f"{' or '.join(map(str, seeds))} seed{'s' * (seeds != [1])}, {summary['posts']} posts"
    title = f"{what} ± half the 95% interval, {counts}; D: mean distance of two drafts"
    rows = [["method", *(name.replace("pass", "Pass") for name in names), "D"]]
    for arm, entry in summary["arms"].items():
        metrics = entry["metrics"]
        cells = [cell(metrics.get(name), WITH_HALF) for name in names]
        rows.append([arm, *cells, cell(metrics.get("semantic"), "{:.3f}")])
    return title, rows


# ---- The verdict ---------------------------------------------------------------------------------

def verdict(summary):
    """One sentence: the primary endpoint's result; without one the methods whose Pass@5 differs
    from --against; without that the best of Pass@k."""
    if summary["refused"]:
        return f"Verdict: {summary['refused']}"
    if summary["primary"]:
        return f"Verdict: {'; '.join(summary['primary'])}."
    if summary["differences"]:
        return differing(summary)
    return best_of(summary)


def differing(summary):
    """Which methods' Pass@5 (or another) has an interval that excludes no difference."""
    names = {}
    for rows in summary["differences"].values():
        names |= rows
    against = summary["against"]
    name = "pass@5" if "pass@5" in names else min(names, default=None)
    if name is None:
        return f"Verdict: nothing to compare with {against}: no seed in common."
    groups = {"higher": [], "lower": []}
    for arm, rows in summary["differences"].items():
        if name in rows and rows[name]["low"] > 0:
            groups["higher"].append(arm)
        elif name in rows and rows[name]["high"] < 0:
            groups["lower"].append(arm)
    parts = [f"{word} for {', '.join(arms)}" for word, arms in groups.items() if arms]
    shown = " and ".join(parts) or "not shown to differ for any method"
    return f"Verdict: {name} is {shown}, against {against} (95% intervals, paired)."


def best_of(summary):
    means = {}
    for k in summary["ks"]:
        for arm, entry in summary["arms"].items():
            row = entry["metrics"].get(f"pass@{k}")
            if row and row["mean"] is not None:
                means[k, arm] = row["mean"]
    if not means:
        return "Verdict: none: no method has a Pass@k."
    k = max(k for k, _ in means)
    highest = max(mean for (size, _), mean in means.items() if size == k)
    arms = [arm for (size, arm), mean in means.items() if size == k and mean == highest]
    has = f"{arms[0]} has" if len(arms) == 1 else f"{len(arms)} methods share"
    return (f"Verdict: {has} the highest Pass@{k}, {highest:.3f}; differences with intervals: "
            "--against ARM.")


# ---- What next -----------------------------------------------------------------------------------

def next_command(summary):
    """The command that shows drafts of the method in question, the primary one or the last."""
    arm = summary["primary_arm"]
    arms = [arm] if arm else list(summary["arms"])[::-1]
    for name in arms:
        for run in summary["arms"][name]["runs"]:
            if (Path(run) / "adapter").is_dir():
                return (f"Next: {shlex.join(['python', 'evaluate.py', 'drafts', run])}   "
                        "(type a post, pick one of its drafts)")
    return "Next: more seeds, or more methods on the same posts, make the intervals smaller."
