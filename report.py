"""Runs compared: what was measured of each, averages with intervals, limits, tables.

`report` is the command of evaluate.py. A run folder holds config.json ("seed", perhaps "arm"),
evaluation.json (one record a post, written by evaluate.py measure) and metrics.jsonl (the training
log). A record is {"id", "post", "intent", "drafts": n texts, "rewards": n floats, "finished": n
bools, "semantic", "vendi"}, of a joint decoder with "set", how many of the drafts, one after the
other, make a set; with "voices": n lists (the voices in which that draft is right, [] =
wrong) and "readers": {voice: share of this post's readers}, or else "passed": n bools."""

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np

from data import InputError, printable, write_text
from metrics import (KS, below_limit, front, holm, interval, mean_limit, pareto_front, post_metrics,
                     reader_shares, sign_flip)
from page import (CURVES, FRONTS, NARROW, PICTURES, WIDE, curve_file, curve_title, curves_of,
                  draw_all, html_page, measured_as)

# ---- Runs and their summary ----------------------------------------------------------------------

def read_object(path, text=None):
    """The JSON object in a file, or in one line of it; NaN reads as null, which no
    metric accepts."""
    try:
        text = Path(path).read_text(encoding="utf-8") if text is None else text
        value = json.loads(text, parse_constant=lambda word: None)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; give folders of runs that were measured") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({str(error)[:100]}); mend it or make it "
                         "again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object; mend it or make it again")
    return value


def read_run(folder, ks=KS):
    """-> a dict: folder, arm, seed, `of` (the arm that was trained, where this is RUN@NAME),
    `shared` (what all runs must agree on), `posts` {id: text}, clusters, values {metric:
    (posts,)}, `readers` (Counter of reader_shares), ends, scale, adapter, warnings.

    Values are in the order of the post ids, NaN where a post lacks the metric; ends closes each
    stage's log."""
    folder = Path(folder)
    path, log = folder / "evaluation.json", folder / "metrics.jsonl"
    metrics, found = {}, {}
    config, evaluation = read_object(folder / "config.json"), read_object(path)
    arm, seed = config.get("arm") or folder.resolve().name, config.get("seed")
    if type(seed) is not int or not isinstance(arm, str) or not arm.isprintable():
        raise InputError(f'{folder / "config.json"} needs "seed", a whole number, and "arm", if '
                         "any, a name")
    domain, settings, records = map(evaluation.get, ("domain", "settings", "records"))
    whole = isinstance(settings, dict) and isinstance(records, list)
    if evaluation.get("version") != 2 or not whole:
        raise InputError(f"{path} lacks version 2, settings or records; measure the run again")
    for number, record in enumerate(records, 1):
        try:
            n = len(records[0]["drafts"])  # k above n cannot be estimated: that column is left out
            if min(ks) > n:
                raise ValueError(f"{n} drafts a post, too few for any of --ks")
            row = post_metrics(record, [k for k in ks if k <= n])
            if record["id"] in metrics:
                raise ValueError(f"the post {record['id']!r} was there before")
            metrics[record["id"]], found[record["id"]] = row, record
            record["post"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"there is no field {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{path}, record {number}: {what}; measure the run again") from None
    order = sorted(metrics, key=str)
    names = dict.fromkeys(name for row in metrics.values() for name in row)
    values = {name: np.array([metrics[i].get(name, math.nan) for i in order]) for name in names}
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    events = [read_object(f"{log}, line {number}", line) for number, line in enumerate(lines, 1)]
    own = ("adapter", "posts", "seed", "model", "judge")  # what a run has for itself
    shared = {"domain": domain} | {k: v for k, v in settings.items() if k not in own}
    readers = Counter(reader_shares(r) for r in records if "readers" in r)
    ends = [event for event in events if event.get("event") == "end"]
    last = {event.get("stage"): event for event in ends}  # measured again, the earlier is void
    return {"folder": str(folder), "arm": arm, "seed": seed, "of": config.get("measured_of"),
            "shared": shared, "values": values,
            "posts": {i: found[i]["post"] for i in order}, "ends": ends, "readers": readers,
            "clusters": [found[i].get("intent") or i for i in order],
            "scale": evaluation.get("scale"), "adapter": settings.get("adapter"),
            "model": settings.get("model"),
            "trained_by": config.get("embedder"),
            "warnings": [w for event in last.values() for w in event.get("warnings") or ()],
            "curves": log_curves(events),
            "samples": {i: sample_of(found[i]) for i in order[:SHOWN_POSTS]}}


SHOWN_POSTS, SHOWN_DRAFTS = 24, 5            # of a run, on the page


def sample_of(record):
    """The first drafts of a record: [(text, is it right or passing), ..]."""
    good = [bool(x) for x in record["voices" if "voices" in record else "passed"]]
    return list(zip(record["drafts"], good))[:SHOWN_DRAFTS]


def log_curves(events, points=40):
    """A log's curves: {(stage, name): ([step, ..], [mean, ..])}, steps in at most `points` equal
    bins, each by its last step. A reward is logged by GRPO alone."""
    out = {}
    for event in events:
        stage = "grpo" if "reward" in event else "training"
        for name in CURVES:
            if type(event.get("step")) is int and type(event.get(name)) in (int, float):
                out.setdefault((stage, name), []).append((event["step"], event[name]))
    for key, pairs in out.items():
        bins = np.array_split(np.array(pairs, dtype=float), min(points, len(pairs)))
        out[key] = ([int(b[-1, 0]) for b in bins], [float(b[:, 1].mean()) for b in bins])
    return out


def arm_curves(arms):
    """{arm: runs} -> [{"stage", "name", "arms": {arm: {"steps", "mean", "low", "high"}}}]: mean
    and range over the seeds that have the same steps as the first."""
    keys = dict.fromkeys(key for runs in arms.values() for run in runs for key in run["curves"])
    out = []
    for stage, name in sorted(keys):
        lines = {}
        for arm, runs in arms.items():
            got = [run["curves"][stage, name] for run in runs if (stage, name) in run["curves"]]
            same = np.array([values for steps, values in got if steps == got[0][0]])
            if got and len(got[0][0]) > 1:
                lines[arm] = {"steps": got[0][0], "mean": same.mean(0).tolist(),
                              "low": same.min(0).tolist(), "high": same.max(0).tolist()}
        if lines:
            out.append({"stage": stage, "name": name, "arms": lines})
    return out


def samples_of(arms):
    """Drafts side by side: posts of each seed, in turn, with the drafts of all its runs."""
    seeds = sorted({run["seed"] for runs in arms.values() for run in runs})
    out = []
    for seed in seeds:
        runs = [run for group in arms.values() for run in group if run["seed"] == seed]
        for i in list(runs[0]["samples"])[:max(3, SHOWN_POSTS // len(seeds))]:
            out.append({"seed": seed, "post": runs[0]["posts"][i],
                        "sets": {run["arm"]: run["samples"][i] for run in runs}})
    return out


def group_runs(run_folders, ks=KS):
    """Run folders -> {arm: [run, ...]} by first appearance; InputError unless all were measured
    alike, and those of one seed on the same posts."""
    arms, first = {}, None
    by_seed = {}
    for run in (read_run(folder, ks) for folder in run_folders):
        first = first or run
        other = by_seed.setdefault(run["seed"], run)
        for name in first["shared"] | run["shared"]:
            a, b = first["shared"].get(name), run["shared"].get(name)
            free = name in ("temperature", "top_p", "decoding")
            if a != b and not (free and (run["of"] or first["of"])):
                values = "" if isinstance(a, dict) else f" ({a} and {b})"
                raise InputError(f"{first['folder']} and {run['folder']} differ in {name}{values}; "
                                 "measure both on the same posts with the same settings")
        odd = [name for name in ("posts", "model") if other[name] != run[name]]
        if odd:  # only another seed may have posts and a base of its own
            raise InputError(f"{other['folder']} and {run['folder']} differ in the {odd[0]}; "
                             "measure both on the same posts with the same settings")
        for other in arms.setdefault(run["arm"], []):
            if other["seed"] == run["seed"]:
                raise InputError(f"{other['folder']} and {run['folder']} are the same arm and seed "
                                 f"({run['arm']}, {run['seed']}); give one of them, or name their "
                                 "arms apart")
        arms[run["arm"]].append(run)
    if len(first["posts"]) < 2:
        raise InputError(f"{first['folder']} has fewer than 2 posts, too few for an interval")
    return arms


def over_seeds(runs, values):
    """interval's arguments for `values`, arrays over posts, one a run: posts that lack the metric
    in any seed that shares them are left out. -> (values, clusters, shared, number left out)."""
    shared = all(run["posts"] == runs[0]["posts"] for run in runs)
    finite = [np.isfinite(v) for v in values]
    if shared:
        finite = [np.logical_and.reduce(finite)] * len(values)
    clusters = [list(itertools.compress(run["clusters"], k)) for run, k in zip(runs, finite)]
    left_out = int((~finite[0]).sum()) if shared else int(sum((~k).sum() for k in finite))
    return [v[k] for v, k in zip(values, finite)], clusters, shared, left_out


def metric_row(runs, name):
    values = [run["values"].get(name, run["values"]["valid"] * math.nan) for run in runs]
    values, clusters, shared, left_out = over_seeds(runs, values)
    row = {"mean": None, "posts_left_out": left_out}
    if all(len(v) > 1 for v in values):
        mean, low, high = interval(values, clusters, shared)
        seeds = [float(v.mean()) for v in values]
        spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None
        row |= {"mean": mean, "low": low, "high": high, "per_seed": seeds, "sd_over_seeds": spread}
    return row


def paired(runs, others, name):
    """The difference `runs` - `others` in a metric, paired by seed and post: mean, interval, p;
    None without two seeds or posts in common."""
    by_seed = {run["seed"]: run for run in others}
    pairs = [(run, by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]
    if not pairs or any(name not in run["values"] for pair in pairs for run in pair):
        return None
    values = [a["values"][name] - b["values"][name] for a, b in pairs]
    values, clusters, shared, _ = over_seeds([a for a, _ in pairs], values)
    if not all(len(v) > 1 for v in values):
        return None
    mean, low, high = interval(values, clusters, shared)
    if len(pairs) > 1:
        p = sign_flip([v.mean() for v in values])
    else:
        labels, where = np.unique(clusters[0], return_inverse=True)
        p = sign_flip(np.bincount(where, values[0]))
    return {"mean": mean, "low": low, "high": high, "p": p, "smallest": (high - low) / 2,
            "seeds": len(pairs)}


COMPARED = ("pass@1", "pass@5", "pass@10", "coverage@10", "valid", "stances")


def summarise(arms, against=None, ks=KS):
    """{arm: runs} -> what report.json holds: means, intervals, limits, differences,
    stages, front."""
    if against is not None and against not in arms:
        raise InputError(f"--against {against}: no such arm; the arms are {', '.join(arms)}")
    every = [run for runs in arms.values() for run in runs]
    first = every[0]
    names = dict.fromkeys(name for run in every for name in run["values"])
    ks = sorted(int(name[5:]) for name in names if re.fullmatch(r"pass@\d+", name))  # sets' too
    shared = all(run["posts"] == first["posts"] for run in every)
    out = {"version": 2, "measured": first["shared"], "posts": len(first["posts"]), "ks": ks,
           "same_posts_for_all_seeds": shared, "against": against, "arms": {}, "differences": {},
           "stages": [], "limits": {}, "scale": first["scale"], "refused": None, "notes": []}
    for arm, runs in arms.items():
        out["arms"][arm] = {"seeds": [run["seed"] for run in runs],
                            "runs": [run["folder"] for run in runs],
                            "trained_by": runs[0]["trained_by"],
                            "temperature": runs[0]["shared"].get("temperature"),
                            "steps": next((end["step"] for end in runs[0]["ends"][::-1]
                                           if "step" in end), None),
                            "metrics": {name: metric_row(runs, name) for name in names}}
        out["stages"] += stage_rows(arm, runs)
        out["notes"] += sorted({f"{arm}: {w}" for run in runs for w in run["warnings"]})
        out["notes"] += joint_note(arm, runs[0]["shared"].get("decoding"))
    out["notes"] += equal_adapters(every)
    readers = sum((run["readers"] for run in every), Counter())
    if readers:
        add_limits(out, readers)
    else:
        refuse_saturated(out)
    for arm in arms if against else ():
        if arm != against:
            compared = [name for name in COMPARED if name in names
                        and not (out["refused"] and name.startswith(BY_PASSING))]
            rows = {name: paired(arms[arm], arms[against], name) for name in compared}
            rows = {name: row for name, row in rows.items() if row}
            out["differences"][arm] = rows
    adjusted = holm({(arm, name): row["p"] for arm, rows in out["differences"].items()
                     for name, row in rows.items()})
    for (arm, name), p in adjusted.items():
        out["differences"][arm][name]["p_holm"] = p
    places = [[a["metrics"][name]["mean"] for name in ("valid", "semantic")]
              for a in out["arms"].values()]
    return out | {"pareto": [list(arms)[i] for i in pareto_front(places)],
                  "curves": arm_curves(arms)}


def joint_note(arm, decoding):
    """A sentence on an arm whose drafts hang together, if they do."""
    if not decoding or decoding["independent"]:
        return []
    k = decoding["set_size"]
    return [f"{arm}: drafts are written in joint sets of {k}: Pass@{k} is of whole sets and may "
            "pass the limit of independent drafts, other k are left out, and its diversity is "
            "within a set."]


def stage_rows(arm, runs):
    """Cost of each stage of an arm: means over seeds, the largest peak."""
    # A stage's last line counts.
    ends = [{event.get("stage", "run"): event for event in run["ends"]} for run in runs]
    out = []
    for stage in dict.fromkeys(stage for run in ends for stage in run):
        row = {"arm": arm, "stage": stage}
        for key, combine in (("seconds", np.mean), ("tokens_per_second", np.mean),
                             ("peak_bytes", max)):
            got = [run[stage][key] for run in ends if run.get(stage, {}).get(key) is not None]
            row[key] = float(combine(got)) if got else None
        out.append(row)
    return out


def equal_adapters(runs):
    """A sentence for each group of runs whose adapters are the same, bit for bit."""
    by_hash = {}
    for run in runs:
        if run["adapter"]:
            arms = by_hash.setdefault(run["adapter"], {})
            arms.setdefault(run["of"] or run["arm"], f"{run['arm']} (seed {run['seed']})")
    return [f"The adapters of {', '.join(arms.values())} are equal, bit for bit: something trained "
            "nothing." for arms in by_hash.values() if len(arms) > 1]


def add_limits(out, readers):
    """The best attainable Pass@k, for everybody and for each arm at its own validity."""
    for k in out["ks"]:
        joint = sum(sum(s[:k]) * n for s, n in readers.items()) / readers.total()
        out["limits"][str(k)] = {"independent": mean_limit(readers, k), "joint": joint}
    for arm in out["arms"].values():
        valid = arm["metrics"]["valid"]["mean"]
        arm["limits"] = {str(k): mean_limit(readers, k, max(valid, 1e-6)) for k in out["ks"]}
    if {1, 5} <= set(out["ks"]):
        out["front"] = front(readers)
    if {1, 10} <= set(out["ks"]):
        out["front10"] = front(readers, 10)


BY_PASSING = ("pass@", "longest@", "pick_")  # what counts drafts that pass, of k


def refuse_saturated(out):
    """Without a verifier passing must be a feat: else the column is refused, in a sentence."""
    scale = out["scale"]
    base = out["arms"].get("base", {"metrics": {}})["metrics"].get("pass@10", {}).get("mean")
    if scale and scale["shuffled"] is not None and scale["shuffled"] > 0.2:
        out["refused"] = (f"Pass@k is not shown: a reply to another post passes "
                          f"{scale['shuffled']:.0%} of the time: passing means nothing here.")
    elif base is not None and base > 0.95:
        out["refused"] = (f"Pass@k is not shown: the base's Pass@10 is {base:.2f} already, which "
                          "leaves no room for any method to be better.")
    if out["refused"]:
        for arm in out["arms"].values():
            for name in [n for n in arm["metrics"] if n.startswith(BY_PASSING)]:
                arm["metrics"][name] = {"mean": None, "posts_left_out": 0}


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
        row = paired(arms[arm], arms[against], metric)
        if not all(metric in run["values"] for run in (*arms[arm], *arms[against])):
            raise InputError(f"--primary needs {metric}, which --ks or too few drafts leave out")
        if row is None:
            raise InputError(f"--primary {arm} {against}: no seed or post in common for {metric}")
        held = row["low"] > floor
        verdict = claim if held else f"not shown to be {claim}"
        out.append(f"{metric}: {arm} is {verdict} to {against}: {row['mean']:+.3f} "
                   f"[{row['low']:+.3f}, {row['high']:+.3f}] over {row['seeds']} seeds"
                   + (f", margin {margin}" if floor else ""))
        if not held:
            out.append("The steps after it are not tested.")
            break
    return out


# ---- Tables --------------------------------------------------------------------------------------

def cell(row, form, key="mean"):
    if not row or row.get(key) is None:
        return "-"
    half = (row["high"] - row["low"]) / 2 if "low" in row else None
    return form.format(row[key], half=half, **row)


def tables(summary):
    """summary -> [(title, header, rows of strings)]; "±" is half the width of the 95% interval."""
    arms, differences = summary["arms"], summary["differences"]
    ks = summary["ks"]
    known = next(iter(arms.values()))["metrics"]

    def by_arm(title, names, form, key="mean"):
        names = [name for name in names if name in known]
        cells = lambda runs: [cell(runs["metrics"][name], form, key) for name in names]
        rows = [[arm, str(len(runs["seeds"])), *cells(runs)] for arm, runs in arms.items()]
        return title, ["arm", "seeds", *names], rows
    passes = [] if summary["refused"] else [f"pass@{k}" for k in ks]
    title = f"{who_is_pleased(summary)}: mean, ± half the 95% interval over seeds and posts"
    out = [by_arm(title, [*passes, "valid"], "{:.3f} ±{half:.3f}")]
    if summary["limits"]:
        rows = [limit_cells(arm, a, summary) for arm, a in arms.items()]
        tops = [k for k in (5, 10) if k in ks]
        columns = ("limit(1) - limit(v)", "limit(v) - reached", "share of limit(1)")
        header = ["arm", *(f"{what} @{k}" for k in tops for what in columns)]
        out.append(("What is left up to the limit, v the arm's own validity", header, rows))
        some = [f"coverage@{k}" for k in ks if k in (1, 5, 10, 20)]
        out.append(by_arm("Coverage: readers of every voice alike", [*some, "stances"],
                          "{:.3f} ±{half:.3f}"))
    out.append(by_arm("Diversity and the rest: mean", [
        "distinct-1", "distinct-2", "ead", "self-bleu", "semantic", "vendi", "duplicates", "reward",
        f"max@{ks[-1]}", "words", "truncated", "entropy", "logprob", "perplexity"], "{:.3f}"))
    one_of = 5 if 5 in ks else ks[-1]        # all k are in report.json
    picks = [name for name in known if name.startswith(("longest@", "pick_"))
             and name.endswith(f"@{one_of}")]
    verdicts = [name for name in known if name.startswith("judge-")]
    title = f"What a reader picks of {one_of} who goes by this"
    out.append(by_arm(title + ", and a judge's mean verdicts" * bool(verdicts), [
        *picks, *verdicts, *(f"recall@{k}" for k in ks)], "{:.3f}"))
    if any(len(a["seeds"]) > 1 for a in arms.values()):
        names = [*passes, "valid", "semantic", "reward"]
        out.append(by_arm("Standard deviation over seeds", names, "{:.3f}", "sd_over_seeds"))
    if differences:
        names = [n for n in COMPARED if any(n in rows for rows in differences.values())]
        form = "{:+.3f} [{low:+.3f}, {high:+.3f}] p {p_holm:.3f}"
        rows = [[arm, *(cell(row.get(name), form) for name in names)]
                for arm, row in differences.items()]
        out.append((f"Difference from {summary['against']}, paired by seed and post, 95% interval, "
                    "p after Holm", ["arm", *names], rows))
    if summary["stages"]:
        header = ["arm", "stage", "seconds", "tokens/s", "peak GiB"]
        columns = (("seconds", "{:,.1f}", 1), ("tokens_per_second", "{:,.0f}", 1),
                   ("peak_bytes", "{:,.2f}", 2**30))
        written = lambda value, form, unit: "-" if value is None else form.format(value / unit)
        rows = [[row["arm"], str(row["stage"]),
                 *(written(row[key], form, unit) for key, form, unit in columns)]
                for row in summary["stages"]]
        out.append(("Training: mean over seeds, largest peak", header, rows))
    return out


def who_is_pleased(summary):
    """What Pass@k counts: a reader's taste, or a bar, with how often people's replies pass it."""
    if summary["limits"]:
        return "For the readers of the reward"
    return "Drafts that pass" + (f" ({scale_words(summary['scale'])})" if summary["scale"] else "")


def scale_words(scale):
    said = [f"a {name} one {scale[key]:.0%}" for name, key in
            (("held-out human", "people"), ("shuffled", "shuffled"), ("truncated", "truncated"))
            if scale.get(key) is not None]
    words = f"of replies, this share passes by the same measure: {', '.join(said)}"
    if scale.get("interval"):
        low, high = scale["interval"]
        words += (f"; the bar is a reward of {scale['threshold']:.3f}, 95% interval by intents "
                  f"{low:.3f} to {high:.3f}")
    return words


def limit_cells(arm, row, summary):
    out = [arm]
    for k in (k for k in (5, 10) if k in summary["ks"]):
        top, own = summary["limits"][str(k)]["independent"], row["limits"][str(k)]
        reached = row["metrics"][f"pass@{k}"]["mean"]
        if reached is None:                  # a joint decoder's other k
            out += ["-"] * 3
            continue
        out += [f"{top - own:.3f}", f"{own - reached:+.3f}", f"{reached / top:.2f}"]
    return out


def notes_of(summary):
    """Sentences beside the tables."""
    seeds = sorted({len(a["seeds"]) for a in summary["arms"].values()})
    how = ("one seed: intervals are over posts (by intent) alone, training again is not in them"
           if seeds[-1] == 1 else
           "seeds crossed with posts (by intent), Satterthwaite's degrees of freedom"
           if summary["same_posts_for_all_seeds"] else
           "posts of their own for each seed: t over seeds")
    single = [arm for arm, a in summary["arms"].items() if len(a["seeds"]) < 2]
    if single and seeds[-1] > 1:
        how += f"; of one seed, and so over posts alone: {', '.join(single)}"
    out = ["Numbers are counted within a post, then averaged over posts. Lower self-bleu is more "
           "diverse.",
           f"Intervals: {how}."]
    if summary["limits"]:
        limits = ", ".join(f"@{k} {v['independent']:.3f} ({v['joint']:.3f} for joint policies)"
                           for k, v in summary["limits"].items())
        out.append(f"The best attainable Pass@k of independent, always valid drafts: {limits}.")
    if summary["scale"]:
        out.append(f"{scale_words(summary['scale']).capitalize()}.")
    trained_by = sorted({a["trained_by"] for a in summary["arms"].values() if a["trained_by"]})
    judged_by = summary["measured"].get("embedder")
    if judged_by:
        out.append(f"Semantic diversity is by the embedder {judged_by}; D was trained by "
                   f"{', '.join(trained_by) or 'none'}.")
    told = [row["mean"] for a in summary["arms"].values()
            if (row := a["metrics"].get("separation")) and row["mean"] is not None]
    if told:
        out.append("By it two right drafts in different voices are farther apart than two in one "
                   f"voice with an AUC of {min(told):.2f} to {max(told):.2f}, an arm's mean.")
    out += [summary["refused"]] if summary["refused"] else []
    best = ", ".join(summary["pareto"])
    out.append(f"On the Pareto front of valid drafts and semantic diversity: {best}.")
    out += knob_notes(summary)
    smallest = [row["smallest"] for rows in summary["differences"].values()
                for name, row in rows.items() if name == "pass@5"]
    if smallest:
        out.append("The smallest difference in Pass@5 that this study could see: "
                   f"{max(smallest):.3f}.")
        least = 2 / 2 ** min((row["seeds"] for rows in summary["differences"].values()
                              for row in rows.values() if row["seeds"] > 1), default=9)
        if least > 0.05:
            out.append(f"So few seeds cannot reject anything by flipping signs: the smallest "
                       f"possible p is {least:.3g}, before Holm.")
    short = [f"{name} in {row['posts_left_out']} posts of {arm}"
             for arm, a in summary["arms"].items() for name, row in a["metrics"].items()
             if row["posts_left_out"] and "@" not in name and name != "separation"]
    if short:
        out.append("Left out, because no draft of the post is long enough or it was not measured: "
                   f"{', '.join(short)}.")
    return out + summary["notes"]


def knob_notes(summary):
    """What lies between the limit and each curve BASE@KNOB, a method over its own knob."""
    points, limit = {}, summary.get("front")
    for arm, a in summary["arms"].items():
        point = [(a["metrics"].get(name) or {}).get("mean") for name in ("pass@1", "pass@5")]
        if limit and None not in point:
            points[arm] = point
    told = [f"{name} {below_limit(curve, limit):.3f} ({min(curve)[0]:.3f} to {max(curve)[0]:.3f})"
            for name, curve in curves_of(points, summary).items()]
    return ["Mean height of the limit of Pass@5 above a method's curve over its own knob (over the "
            f"curve's span of Pass@1): {', '.join(told)}."] if told else []


def write_tables(summary):
    """summary -> (report.txt with aligned columns, report.md, report.csv)."""
    about = measured_as(summary)
    text, page = [about, ""], ["# Report", "", about, ""]
    sheet = []
    for title, header, rows in tables(summary):
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        text.append(title)
        for row in (header, *rows):
            text.append("  ".join(word.rjust(w) if i else word.ljust(w)
                                  for i, (word, w) in enumerate(zip(row, widths))))
        text.append("")
        page += [f"## {title}", ""]
        for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows):
            page.append("| " + " | ".join(word.replace("|", "\\|") for word in row) + " |")
        page.append("")
    for arm, a in summary["arms"].items():
        for name, row in a["metrics"].items():
            numbers = [row.get(key) for key in ("mean", "low", "high", "sd_over_seeds")]
            name = name if re.fullmatch(r"[\w@-]+", name) else csv_cell(name)  # a record's own
            sheet.append([csv_cell(arm), name, *("" if x is None else repr(x) for x in numbers)])
    shown = {name: title for name, title in PICTURES.items()
             if name not in FRONTS or FRONTS[name][1] in summary}
    notes = notes_of(summary)
    shown |= {curve_file(curve): curve_title(curve) for curve in summary["curves"]}
    page += [line for name, title in shown.items() for line in (f"![{title}]({name})", "")]
    header = "arm,metric,mean,low,high,sd_over_seeds"
    page += [f"- {note}" for note in notes]
    sheet = [header, *map(",".join, sheet)]
    lines = lambda some: "\n".join(map(printable, some)) + "\n"
    return lines(text + notes), lines(page), lines(sheet)


def csv_cell(text):
    """A text that no spreadsheet takes for a formula, quoted."""
    text = printable(text)
    risky = text.lstrip().startswith(tuple("=+-@\uff1d\uff0b\uff0d\uff20"))  # full width, too
    guarded = "'" + text if risky else text
    return '"' + guarded.replace('"', '""') + '"'


# ---- The report ----------------------------------------------------------------------------------

def report(run_folders, out_folder, against=None, ks=KS, endpoint=None):
    """Compare measured runs: report.json, .html, .md, .txt, .csv and SVGs in
    out_folder. -> report.json's dict.

    Runs of one arm are its seeds. `against` names the arm from which paired differences are taken,
    endpoint an arm and its rivals in the primary comparison. Writes nothing on an InputError.
    """
    arms = group_runs(run_folders, ks)
    summary = summarise(arms, against, ks)
    if endpoint and not summary["refused"]:
        arm, *rivals = endpoint
        if not rivals:
            raise InputError(f"--primary {arm} names no rival: give the arms to compare it with")
        summary["notes"] += [note for rival in rivals for note in primary(arms, arm, rival)]
    text, page, sheet = write_tables(summary)
    files = {"report.json": json.dumps(summary, indent=1, ensure_ascii=False) + "\n",
             "report.md": page, "report.txt": text, "report.csv": sheet}
    pictures = draw_all(summary, WIDE)
    pairs = list(zip(pictures.values(), draw_all(summary, NARROW).values()))
    html = html_page(summary, tables(summary), notes_of(summary), pairs, samples_of(arms))
    files |= pictures | {"report.html": html}
    for name, content in files.items():
        write_text(Path(out_folder) / name, content)
    print(text, end="")
    return summary
