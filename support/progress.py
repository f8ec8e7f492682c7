"""What to look at: the two or three numbers of a phase that matter, while it runs and at its end.
"""

import json
import math
from pathlib import Path


# stage -> ((a number of the log, what it does in a run that works), ..)
MATTERS = {
    "base": (("ce", "falls"),),
    "sft": (("ce", "falls"), ("loss", "falls"), ("D", "does not fall to 0")),
    "grpo": (("reward", "rises"), ("D", "does not fall to 0"), ("entropy", "does not fall to 0")),
    "reward": (("loss", "falls"), ("accuracy", "rises"))}


def numbers_of(stage, line, names):
    """{name: number} of a log's line that the progress bar shows: those that matter in this stage,
    or of another stage the first three of `names`."""
    wanted = [name for name, _ in MATTERS.get(stage, ())] or names[:3]
    return {name: f"{line[name]:.3f}" for name in wanted if name in line}


def begin_and_end(log, name):
    """The means of a number over the first and the last tenth of a log's steps that have it; None
    where fewer than two have it."""
    values = []
    for text in Path(log).read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        value = line.get(name) if "step" in line and "event" not in line else None
        if isinstance(value, (int, float)) and math.isfinite(value):
            values.append(value)
    if len(values) < 2:
        return None
    some = max(1, len(values) // 10)
    return sum(values[:some]) / some, sum(values[-some:]) / some


def outlook(folder, stage):
    """The sentence that ends a phase: which numbers of its log show that it has worked, and what
    they did."""
    log = Path(folder) / "metrics.jsonl"
    parts = []
    for name, does in MATTERS.get(stage, ()):
        ends = begin_and_end(log, name) if log.exists() else None
        if ends:
            parts.append(f"{name} {does} (here {ends[0]:.3f} to {ends[1]:.3f})")
    if not parts:
        return f"{folder}: done"
    return f"{folder}: done; it worked if {', '.join(parts)}: look at {log}"
