"""Runs compared: averages with intervals, paired differences, limits; what report.json holds."""

import itertools
import math
import re
from collections import Counter

import numpy as np

from metrics import KS
from report.limits import front, mean_limit
from report.stats import holm, interval, least_p, pareto_front, sign_flip
from support.files import InputError


COMPARED = ("pass@1", "pass@5", "pass@10", "coverage@10", "valid", "stances")

BY_PASSING = ("pass@", "longest@", "pick_")  # what counts completions that pass, of k


# ---- One metric, over seeds and posts ------------------------------------------------------------

def over_seeds(runs, values):
    """interval's arguments for `values`, arrays over posts, one a run: posts that lack the metric
    in any seed that shares them are left out. -> (values, clusters, shared, number left out)."""
    shared = all(run["posts"] == runs[0]["posts"] for run in runs)
    finite = [np.isfinite(v) for v in values]
    if shared:
        everywhere = np.logical_and.reduce(finite)
        finite = [everywhere] * len(values)
        left_out = int((~everywhere).sum())
    else:
        left_out = int(sum((~kept).sum() for kept in finite))
    clusters = []
    chosen = []
    for run, run_values, kept in zip(runs, values, finite):
        clusters.append(list(itertools.compress(run["clusters"], kept)))
        chosen.append(run_values[kept])
    return chosen, clusters, shared, left_out


def metric_row(runs, name):
    """A metric's mean, interval and seeds; the mean is None where it cannot be computed."""
    values = []
    for run in runs:
        lacking = run["values"]["valid"] * math.nan
        values.append(run["values"].get(name, lacking))
    values, clusters, shared, left_out = over_seeds(runs, values)
    row = {"mean": None, "posts_left_out": left_out}
    if min(map(len, values)) < 2:
        return row
    mean, low, high = interval(values, clusters, shared)
    seeds = [float(v.mean()) for v in values]
    deviation = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None
    return row | {"mean": mean, "low": low, "high": high, "per_seed": seeds,
                  "sd_over_seeds": deviation}


def paired(runs, others, name):
    """The difference `runs` - `others` in a metric, paired by seed and post: mean, interval, p, and
    `least`, the smallest p that so many seeds (of one seed: intents) can give; None without two
    seeds or posts in common."""
    by_seed = {run["seed"]: run for run in others}
    ours = [run for run in runs if run["seed"] in by_seed]
    if not ours:
        return None
    values = []
    for run in ours:
        other = by_seed[run["seed"]]
        if name not in run["values"] or name not in other["values"]:
            return None
        values.append(run["values"][name] - other["values"][name])
    values, clusters, shared, _ = over_seeds(ours, values)
    if min(map(len, values)) < 2:
        return None
    mean, low, high = interval(values, clusters, shared)
    if len(ours) > 1:
        flipped = [v.mean() for v in values]
    else:
        _, where = np.unique(clusters[0], return_inverse=True)
        flipped = np.bincount(where, values[0])
    p = sign_flip(flipped)
    least = least_p(len(flipped))
    return {"mean": mean, "low": low, "high": high, "p": p, "smallest": (high - low) / 2,
            "seeds": len(ours), "least": least}


# ---- The summary ---------------------------------------------------------------------------------

def summarise(arms, against=None, ks=KS):
    """{arm: runs} -> what report.json holds: means, intervals, limits, differences, stages,
    front."""
    if against is not None and against not in arms:
        raise InputError(f"--against {against}: no such arm; the arms are {', '.join(arms)}")
    every = list(itertools.chain(*arms.values()))
    first = every[0]
    names = {}
    for run in every:
        names |= dict.fromkeys(run["values"])
    ks = sorted(int(name[5:]) for name in names if re.fullmatch(r"pass@\d+", name))  # sets' too
    shared = all(run["posts"] == first["posts"] for run in every)
    out = {"version": 2, "measured": first["shared"], "posts": len(first["posts"]), "ks": ks,
           "same_posts_for_all_seeds": shared, "against": against, "arms": {}, "differences": {},
           "stages": [], "limits": {}, "scale": first["scale"], "refused": None, "notes": [],
           "can_reject": False}
    for arm, runs in arms.items():
        out["arms"][arm] = arm_row(runs, names)
        out["stages"] += stage_rows(arm, runs)
        out["notes"] += sorted({f"{arm}: {w}" for run in runs for w in run["warnings"]})
        out["notes"] += joint_note(arm, runs[0]["shared"].get("decoding"))
    out["notes"] += equal_adapters(every)
    users = sum((run["readers"] for run in every), Counter())
    if users:
        add_limits(out, users)
    else:
        refuse_saturated(out)
    if against:
        add_differences(out, arms, against, names)
    places = []
    for row in out["arms"].values():
        metrics = row["metrics"]
        places.append([metrics["valid"]["mean"], metrics["semantic"]["mean"]])
    out["pareto"] = [list(arms)[i] for i in pareto_front(places)]
    out["curves"] = arm_curves(arms)
    return out


def arm_row(runs, names):
    """What report.json holds of one arm."""
    steps = None                             # of the last stage that has steps
    for end in runs[0]["ends"]:
        steps = end.get("step", steps)
    return {"seeds": [run["seed"] for run in runs],
            "runs": [run["folder"] for run in runs],
            "trained_by": runs[0]["trained_by"],
            "temperature": runs[0]["shared"].get("temperature"),
            "steps": steps,
            "metrics": {name: metric_row(runs, name) for name in names}}


def add_differences(out, arms, against, names):
    """Each arm's paired differences from `against`, with p after Holm over all of them; and whether
    any of these could be below 0.05: else they are not shown."""
    tests = {}
    least = []
    for arm in arms:
        if arm == against:
            continue
        rows = out["differences"][arm] = {}
        for name in COMPARED:
            refused = out["refused"] and name.startswith(BY_PASSING)
            if name not in names or refused:
                continue
            row = paired(arms[arm], arms[against], name)
            if row:
                rows[name] = row
                tests[arm, name] = row["p"]
                least.append(row["least"])
    out["can_reject"] = bool(least) and len(least) * min(least) <= 0.05
    for (arm, name), p in holm(tests).items():
        out["differences"][arm][name]["p_holm"] = p


def joint_note(arm, decoding):
    """A sentence on an arm whose completions are sampled jointly, if they are."""
    if not decoding or decoding["independent"]:
        return []
    k = decoding["set_size"]
    return [f"{arm}: drafts are written in joint sets of {k}: Pass@{k} is of whole sets and may "
            "pass the limit of independent drafts, other k are left out, and its diversity is "
            "within a set."]


def stage_rows(arm, runs):
    """Cost of each stage of an arm: means over seeds, the largest peak."""
    ends = []                                # of each run: {stage: its last end}
    stages = {}
    for run in runs:
        last = {event.get("stage", "run"): event for event in run["ends"]}
        ends.append(last)
        stages |= dict.fromkeys(last)
    combined = {"seconds": np.mean, "tokens_per_second": np.mean, "peak_bytes": max}
    rows = []
    for stage in stages:
        row = {"arm": arm, "stage": stage}
        for key, combine in combined.items():
            values = [last[stage].get(key) for last in ends if stage in last]
            values = [value for value in values if value is not None]
            row[key] = float(combine(values)) if values else None
        rows.append(row)
    return rows


def equal_adapters(runs):
    """A sentence for each group of runs whose adapters are the same, bit for bit."""
    by_hash = {}
    for run in runs:
        if run["adapter"]:
            arms = by_hash.setdefault(run["adapter"], {})
            arms.setdefault(run["of"] or run["arm"], f"{run['arm']} (seed {run['seed']})")
    notes = []
    for arms in by_hash.values():
        if len(arms) > 1:
            notes.append(f"The adapters of {', '.join(arms.values())} are equal, bit for bit: "
                         "something trained nothing.")
    return notes


def add_limits(out, users):
    """The best attainable Pass@k, for everybody and for each arm at its own validity."""
    ks = out["ks"]
    for k in ks:
        joint = sum(sum(shares[:k]) * n for shares, n in users.items()) / users.total()
        out["limits"][str(k)] = {"independent": mean_limit(users, k), "joint": joint}
    for arm in out["arms"].values():
        valid = max(arm["metrics"]["valid"]["mean"], 1e-6)
        arm["limits"] = {str(k): mean_limit(users, k, valid) for k in ks}
    if 1 in ks and 5 in ks:
        out["front"] = front(users)
    if 1 in ks and 10 in ks:
        out["front10"] = front(users, 10)


def refuse_saturated(out):
    """Without a verifier passing must be hard to do: else the column is refused, with a reason."""
    scale = out["scale"]
    base = out["arms"].get("base", {"metrics": {}})["metrics"].get("pass@10", {}).get("mean")
    if scale and scale["shuffled"] is not None and scale["shuffled"] > 0.2:
        out["refused"] = (f"Pass@k is not shown: a reply to another post passes "
                          f"{scale['shuffled']:.0%} of the time: passing means nothing here.")
    elif base is not None and base > 0.95:
        out["refused"] = (f"Pass@k is not shown: the base's Pass@10 is {base:.2f} already, which "
                          "leaves nothing for a method to improve.")
    if out["refused"]:
        for arm in out["arms"].values():
            for name in list(arm["metrics"]):
                if name.startswith(BY_PASSING):
                    arm["metrics"][name] = {"mean": None, "posts_left_out": 0}


def arm_curves(arms):
    """{arm: runs} -> [{"stage", "name", "arms": {arm: {"steps", "mean", "low", "high"}}}]: mean
    and range over the seeds that have the same steps as the first."""
    keys = set()
    for run in itertools.chain(*arms.values()):
        keys |= set(run["curves"])
    out = []
    for stage, name in sorted(keys):
        lines = {}
        for arm, runs in arms.items():
            curves = [run["curves"][stage, name] for run in runs if (stage, name) in run["curves"]]
            if curves and len(curves[0][0]) > 1:
                lines[arm] = mean_curve(curves)
        if lines:
            out.append({"stage": stage, "name": name, "arms": lines})
    return out


def mean_curve(curves):
    """Mean and range of [(steps, values), ..] that have the same steps as the first."""
    first_steps, _ = curves[0]
    same = np.array([values for steps, values in curves if steps == first_steps])
    return {"steps": first_steps, "mean": same.mean(0).tolist(), "low": same.min(0).tolist(),
            "high": same.max(0).tolist()}


# ---- The primary endpoint ------------------------------------------------------------------------

def primary(arms, arm, against, margin=0.02):
    """The primary endpoint, in order, each step only if the one before held: Pass@5 superior,
    Pass@1 not inferior by more than `margin`, Pass@10 superior. -> sentences that claim what the
    intervals show."""
    for name in (arm, against):
        if name not in arms:
            raise InputError(f"--primary {name}: no such arm; the arms are {', '.join(arms)}")
    out = []
    for metric, floor, claim in (("pass@5", 0.0, "superior"), ("pass@1", -margin, "not inferior"),
                                 ("pass@10", 0.0, "superior")):
        for run in (*arms[arm], *arms[against]):
            if metric not in run["values"]:
                raise InputError(f"--primary needs {metric}, which --ks or too few drafts leave "
                                 "out")
        row = paired(arms[arm], arms[against], metric)
        if row is None:
            raise InputError(f"--primary {arm} {against}: no seed or post in common for {metric}")
        held = row["low"] > floor
        verdict = claim if held else f"not shown to be {claim}"
        note = f", margin {margin}" if floor else ""
        seeds = "1 seed" if row["seeds"] == 1 else f"{row['seeds']} seeds"
        out.append(f"{metric}: {arm} is {verdict} to {against}: {row['mean']:+.3f} "
                   f"[{row['low']:+.3f}, {row['high']:+.3f}] over {seeds}{note}")
        if not held:
            if metric != "pass@10":
                out[-1] += ", and what follows is not tested"
            break
    return out
