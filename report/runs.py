"""Measured runs, read from their folders and grouped: runs of one name are its seeds.

A run folder holds config.json ("seed", perhaps "arm"), evaluation.json (one record a post, written
by evaluate.py measure) and metrics.jsonl (the training log). A record is {"id", "post", "intent",
"drafts": n texts, "rewards": n floats, "finished": n bools, "semantic", "vendi"}; of a decoder that
samples jointly also "set", how many of the completions, one after the other, make a set; with
"voices": n lists (the styles in which that completion is right, [] = wrong) and "readers": {style:
its popularity with this post's users}, or else "passed": n bools."""

import math
from collections import Counter
from pathlib import Path

import numpy as np

from metrics import KS
from report.limits import user_shares
from report.pictures import CURVES
from report.sets import record_metrics
from support.files import InputError, read_object


SHOWN_POSTS = 24                             # of a run, on the page
SHOWN_COMPLETIONS = 5

OWN = ("adapter", "posts", "seed", "model", "judge")  # settings that a run has for itself


def read_run(folder, ks=KS):
    """A dict: folder, arm, seed, `of` (the arm that was trained, where this is RUN@NAME), `shared`
    (what all runs must agree on), `posts` {id: text}, clusters, values {metric: (posts,)},
    `readers` (Counter of user_shares), ends, scale, adapter, warnings.

    Values are in the order of the post ids, NaN where a post lacks the metric; ends closes each
    stage's log."""
    folder = Path(folder)
    path = folder / "evaluation.json"
    config = read_object(folder / "config.json")
    evaluation = read_object(path)
    arm = config.get("arm") or folder.resolve().name
    seed = config.get("seed")
    if type(seed) is not int or not isinstance(arm, str) or not arm.isprintable():
        raise InputError(f'{folder / "config.json"} needs "seed", a whole number, and "arm", if '
                         "any, a name")
    settings = evaluation.get("settings")
    records = evaluation.get("records")
    whole = isinstance(settings, dict) and isinstance(records, list)
    if evaluation.get("version") != 2 or not whole:
        raise InputError(f"{path} lacks version 2, settings or records; measure the run again")
    metrics, found = read_records(path, records, ks)
    order = sorted(metrics, key=str)
    shared = {"domain": evaluation.get("domain")}
    for name, value in settings.items():
        if name not in OWN:
            shared[name] = value
    events = read_log(folder / "metrics.jsonl")
    ends = [event for event in events if event.get("event") == "end"]
    return {"folder": str(folder), "arm": arm, "seed": seed, "of": config.get("measured_of"),
            "shared": shared, "values": values_of(metrics, order),
            "posts": {i: found[i]["post"] for i in order}, "ends": ends,
            "readers": Counter(user_shares(r) for r in records if "readers" in r),
            "clusters": [found[i].get("intent") or i for i in order],
            "scale": evaluation.get("scale"), "adapter": settings.get("adapter"),
            "model": settings.get("model"),
            "trained_by": config.get("embedder"),
            "warnings": last_warnings(ends),
            "curves": log_curves(events),
            "samples": {i: sample_of(found[i]) for i in order[:SHOWN_POSTS]}}


def read_records(path, records, ks):
    """({post id: its metrics}, {post id: its record}); InputError names the wrong record."""
    metrics = {}
    found = {}
    for number, record in enumerate(records, 1):
        try:
            n = len(records[0]["drafts"])
            if min(ks) > n:
                raise ValueError(f"{n} drafts a post, too few for any of --ks")
            known = [k for k in ks if k <= n]  # k above n cannot be estimated: it is left out
            row = record_metrics(record, known)
            if record["id"] in metrics:
                raise ValueError(f"the post {record['id']!r} was there before")
            metrics[record["id"]] = row
            found[record["id"]] = record
            record["post"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"there is no field {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{path}, record {number}: {what}; measure the run again") from None
    return metrics, found


def values_of(metrics, order):
    """{metric: (posts,) in that order, NaN where a post lacks it}."""
    names = {}
    for row in metrics.values():
        names |= dict.fromkeys(row)
    return {name: np.array([metrics[i].get(name, math.nan) for i in order]) for name in names}


def read_log(log):
    """The objects of a log's lines."""
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [read_object(f"{log}, line {number}", line) for number, line in enumerate(lines, 1)]


def last_warnings(ends):
    """The warnings of each stage's last end: where a run is measured again, the earlier is void."""
    last = {}
    for event in ends:
        last[event.get("stage")] = event
    found = []
    for event in last.values():
        found.extend(event.get("warnings") or ())
    return found


def sample_of(record):
    """The first completions of a record: [(text, is it right or passing), ..]."""
    verdicts = record["voices" if "voices" in record else "passed"]
    return list(zip(record["drafts"], map(bool, verdicts)))[:SHOWN_COMPLETIONS]


def log_curves(events, points=40):
    """A log's curves: {(stage, name): ([step, ..], [mean, ..])}, steps in at most `points` equal
    bins, each by its last step. A reward is logged by GRPO alone."""
    pairs = {}
    for event in events:
        stage = "grpo" if "reward" in event else "training"
        for name in CURVES:
            if type(event.get("step")) is int and type(event.get(name)) in (int, float):
                pairs.setdefault((stage, name), []).append((event["step"], event[name]))
    curves = {}
    for key, curve in pairs.items():
        bins = np.array_split(np.array(curve, dtype=float), min(points, len(curve)))
        steps = [int(part[-1, 0]) for part in bins]
        curves[key] = steps, [float(part[:, 1].mean()) for part in bins]
    return curves


# ---- Runs of one name are its seeds --------------------------------------------------------------

def group_runs(run_folders, ks=KS):
    """Run folders -> {arm: [run, ...]} by first appearance; InputError unless all were measured
    with equal settings, and those of one seed on the same posts."""
    arms = {}
    by_seed = {}
    first = None
    for folder in run_folders:
        run = read_run(folder, ks)
        first = first or run
        check_settings(first, run)
        check_posts(by_seed.setdefault(run["seed"], run), run)
        same_arm = arms.setdefault(run["arm"], [])
        for other in same_arm:
            if other["seed"] == run["seed"]:
                raise InputError(f"{other['folder']} and {run['folder']} are the same arm and seed "
                                 f"({run['arm']}, {run['seed']}); give one of them, or name their "
                                 "arms apart")
        same_arm.append(run)
    if len(first["posts"]) < 2:
        raise InputError(f"{first['folder']} has fewer than 2 posts, too few for an interval")
    return arms


def check_settings(first, run):
    """InputError where two runs were measured with different settings; how completions are sampled
    may differ where one of them is RUN@NAME."""
    for name in first["shared"] | run["shared"]:
        a = first["shared"].get(name)
        b = run["shared"].get(name)
        free = name in ("temperature", "top_p", "decoding") and (run["of"] or first["of"])
        if a != b and not free:
            values = "" if isinstance(a, dict) else f" ({a} and {b})"
            raise InputError(f"{first['folder']} and {run['folder']} differ in {name}{values}; "
                             "measure both on the same posts with the same settings")


def check_posts(other, run):
    """InputError where two runs of one seed have different posts or bases: only another seed may
    have its own."""
    for name in ("posts", "model"):
        if other[name] != run[name]:
            raise InputError(f"{other['folder']} and {run['folder']} differ in the {name}; "
                             "measure both on the same posts with the same settings")
