"""Judging runs: unbiased Pass@k, diversity and quality of drafts, intervals over posts, the report.

A run is judged by n drafts for each held-out post. Everything is counted within a post, then averaged over
posts: drafts of different posts differ anyway, so pooling them would hide a model that always says the same
thing. A number that cannot be computed is an error, or is left out and counted, never a zero.

    python evaluate.py report runs/lora-0 runs/lora-1 runs/poly-0 runs/poly-1 --out results --against lora

A run folder holds config.json ("seed", perhaps "arm"), evaluation.json (one record a post) and metrics.jsonl
(the training log). A record is {"id", "post", "drafts": n texts, "rewards": n floats, "finished": n bools,
"semantic", "vendi"} with "voices": n lists (the voices in which that draft is right, [] = wrong) or else
"passed": n bools.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from tqdm import tqdm

import data
from grpo import REWARDS, make_reward
from data import InputError, read_json
from polylora import diversity, drop_lora, load_adapter, load_embedder
from trainer import Session, Visit, peak_bytes, model_flags

KS = (1, 3, 5, 10)  # the k of Pass@k in every table and picture


# ---- Metrics of one post -----------------------------------------------------------------------------------

def pass_at_k(n, c, k):
    """Chance that k of n drafts, drawn without replacement, hold one of the c right: 1 - C(n-c, k) / C(n, k).

    Unbiased for independent drafts (Chen et al. 2021, arXiv 2107.03374, eq. 1); 1 - (1 - c/n)^k is not, it
    reads low. ValueError unless n >= k >= 1 and 0 <= c <= n.
    """
    if not n >= k >= 1:
        raise ValueError(f"pass@{k} needs k between 1 and the number of drafts, and there are {n} drafts")
    if not 0 <= c <= n:
        raise ValueError(f"{c} right drafts among {n} is not a count")
    every = math.comb(n, k)  # whole numbers up to the one division, so nothing rounds for large n
    return (every - math.comb(n - c, k)) / every


def max_at_k(rewards, k):
    """Unbiased estimate of E[best of k rewards] from n >= k real rewards: the mean maximum over k-subsets.

    The i-th smallest reward is the maximum of C(i-1, k-1) subsets (PKPO, arXiv 2505.15201, max_g@k). Equals
    pass_at_k for rewards of 0 and 1. ValueError for k outside 1..n or a reward that is not finite.
    """
    n = len(rewards)
    if not n >= k >= 1 or not all(map(math.isfinite, rewards)):
        raise ValueError(f"max@{k} needs at least {k} finite rewards and k >= 1, got {list(rewards)}")
    every = math.comb(n, k)
    return math.fsum(math.comb(i, k - 1) / every * reward for i, reward in enumerate(sorted(rewards)))


def words(text):
    """Lower-cased words ("don't" is one) and single punctuation marks or emoji: what all metrics count."""
    return re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text.lower())


def ngrams(tokens, n):
    """Counter of the n-grams (tuples) of a token list; empty when the list is shorter than n."""
    return Counter(zip(*(tokens[i:] for i in range(n))))


def distinct_n(texts, n):
    """Different n-grams / all n-grams over the drafts of one post, in (0, 1]; higher is more diverse.

    The form that divides by n-grams (Li et al. 2016, arXiv 1510.03055, divide by words). It falls with
    length: read it beside the mean length. A draft shorter than n words adds nothing; ValueError when no
    draft has an n-gram.
    """
    counts = Counter()
    for text in texts:
        counts.update(ngrams(words(text), n))
    if not counts:
        raise ValueError(f"distinct-{n} needs a draft of at least {n} words")
    return len(counts) / counts.total()


def self_bleu(texts, max_n=4):
    """Mean BLEU of each draft against all the others of its post, in [0, 1]; lower is more diverse.

    Orders 1..max_n weigh the same; no match in an order counts as 0.1 (nltk's method1 smoothing); the brevity
    penalty takes the other draft closest in length, the shorter of two. A draft that shares no word with
    another scores 0, and so does an empty one, as in nltk. ValueError for fewer than 2 drafts or when all are
    empty.
    """
    drafts = [words(text) for text in texts]
    if len(drafts) < 2 or not any(drafts):
        raise ValueError("self-BLEU needs two drafts and at least one word")
    matches = []  # [order][draft] -> (clipped matches, n-grams)
    for n in range(1, max_n + 1):
        counts = [ngrams(draft, n) for draft in drafts]
        best, second, owner = {}, {}, {}  # an n-gram's two largest counts and whose the largest is:
        for i, count in enumerate(counts):  # enough to know its maximum over all drafts but one
            for gram, times in count.items():
                if times > best.get(gram, 0):
                    second[gram], best[gram], owner[gram] = best.get(gram, 0), times, i
                elif times > second[gram]:
                    second[gram] = times
        matches.append([(sum(min(times, second[gram] if owner[gram] == i else best[gram])
                             for gram, times in count.items()), max(1, count.total()))
                        for i, count in enumerate(counts)])
    scores, lengths = [], [len(draft) for draft in drafts]
    for i, length in enumerate(lengths):
        if matches[0][i][0] == 0:
            scores.append(0.0)
            continue
        _, closest = min((abs(other - length), other) for j, other in enumerate(lengths) if j != i)
        logs = [math.log((matched[i][0] or 0.1) / matched[i][1]) for matched in matches]
        scores.append(min(1.0, math.exp(1 - closest / length)) * math.exp(math.fsum(logs) / max_n))
    return math.fsum(scores) / len(scores)


def vendi_score(embeddings):
    """Effective number of different drafts, in [1, n]: exp of the entropy of the eigenvalues of E E^T / n.

    embeddings (n, dim) with unit rows (Friedman and Dieng 2023, arXiv 2210.02410); ValueError otherwise.
    """
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2 or not len(rows) or not np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3):
        raise ValueError(f"the Vendi score needs embeddings (n, dim) of unit length, got shape {rows.shape}")
    values = np.linalg.eigvalsh(rows @ rows.T / len(rows))
    values = values[values > 1e-12]  # 0 log 0 = 0; rounding leaves eigenvalues of about -1e-17
    return float(np.exp(-(values * np.log(values)).sum()))


def pareto_front(points):
    """Indices of the points (quality, diversity), both better when larger, that no other point beats.

    A point is beaten by one at least as good in both and better in one, so equal points stay together.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise ValueError("a Pareto front needs rows of finite numbers")
    return [i for i, point in enumerate(points)
            if not ((points >= point).all(axis=1) & (points > point).any(axis=1)).any()]


def post_metrics(record, tastes, ks=KS):
    """One post's record -> {metric: float}. tastes {voice: share of readers} sums to 1; None without voices.

    With voices, pass@k = sum over v of tastes[v] * pass_at_k(n, c_v, k), c_v the number of drafts right in
    voice v: the exact mean over readers drawn by taste and over k of the n drafts, so no reader is simulated.
    Otherwise c is the number of passed drafts. `valid` is the share of right drafts, `stances` the number of
    voices among them, `words` the mean length in tokens, `truncated` the share cut off. distinct-n and
    self-bleu are absent where no draft is long enough. ValueError says which field is wrong.
    """
    drafts, n, voiced = record["drafts"], len(record["drafts"]), "voices" in record
    for name in ("rewards", "finished", "voices" if voiced else "passed"):
        if len(record[name]) != n or not n:
            raise ValueError(f'"{name}" has {len(record[name])} entries for {n} drafts')
    if voiced:
        if not tastes or min(tastes.values()) < 0 or abs(math.fsum(tastes.values()) - 1) > 1e-6:
            raise ValueError("drafts judged by voice need tastes, shares of readers by voice that sum to 1")
        counts = Counter(voice for right in record["voices"] for voice in set(right))
        if set(counts) - set(tastes):
            raise ValueError(f"no taste is given for the voice {sorted(set(counts) - set(tastes))[0]!r}")
        out = {f"pass@{k}": math.fsum(tastes[v] * pass_at_k(n, counts[v], k) for v in tastes) for k in ks}
        out |= {"valid": sum(map(bool, record["voices"])) / n, "stances": float(len(counts))}
    else:
        passed = sum(map(bool, record["passed"]))
        out = {f"pass@{k}": pass_at_k(n, passed, k) for k in ks} | {"valid": passed / n}
    lengths = [len(words(draft)) for draft in drafts]
    if max(lengths) >= 1 and n > 1:  # where every draft is too short there is nothing to count
        out["self-bleu"] = self_bleu(drafts)
    out |= {f"distinct-{i}": distinct_n(drafts, i) for i in (1, 2) if max(lengths) >= i}
    out |= {"semantic": record["semantic"], "vendi": record["vendi"],
            "reward": math.fsum(record["rewards"]) / n,
            f"max@{max(ks)}": max_at_k(record["rewards"], max(ks)), "words": sum(lengths) / n,
            "truncated": sum(not done for done in record["finished"]) / n}
    for name, value in out.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, not a finite number")
    return out


# ---- Intervals over posts ----------------------------------------------------------------------------------

def bootstrap_interval(values, *, seed=0, draws=2000, level=0.95):
    """(low, high): percentile bootstrap interval of the mean of values, one a post; fixed by its seed.

    Posts are the unit drawn again, since the n drafts of a post are no independent evidence (Efron 1979).
    ValueError for fewer than 2 values or one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"an interval needs at least 2 finite values, one a post, got shape {values.shape}")
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)), dtype=np.int32)
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_interval(a, b, *, seed=0, draws=2000, level=0.95):
    """(low, high) of the mean of a - b, where a[i] and b[i] belong to the same post; ValueError as above.

    Most of the spread over posts is how hard a post is: common to both, it drops out of the difference.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values must be of the same posts, got {a.shape} and {b.shape}")
    return bootstrap_interval(a - b, seed=seed, draws=draws, level=level)


# ---- Runs and their summary --------------------------------------------------------------------------------

def read_object(path, text=None):
    """The JSON object in a file, or in one line of it; NaN reads as null, which no metric accepts."""
    try:
        text = Path(path).read_text(encoding="utf-8") if text is None else text
        value = json.loads(text, parse_constant=lambda word: None)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; give folders of runs that were measured") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); mend it or make it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object; mend it or make it again")
    return value


def read_run(folder):
    """-> {"folder", "arm", "seed", "shared": what runs must agree on, "values": {metric: (posts,)}, "ends"}.

    Values are in the order of the post ids, NaN where a post lacks the metric; ends closes each stage's log.
    """
    folder = Path(folder)
    place, log, posts, texts, ends = folder / "evaluation.json", folder / "metrics.jsonl", {}, {}, []
    config, evaluation = read_object(folder / "config.json"), read_object(place)
    arm, seed = config.get("arm") or folder.resolve().name, config.get("seed")
    if type(seed) is not int or not isinstance(arm, str) or not arm.isprintable():
        raise InputError(f'{folder / "config.json"} needs "seed", a whole number, and "arm", if any, a name')
    domain, settings, tastes, records = map(evaluation.get, ("domain", "settings", "tastes", "records"))
    if evaluation.get("version") != 1 or not isinstance(settings, dict) or not isinstance(records, list):
        raise InputError(f"{place} lacks version 1, settings or records; measure the run again")
    for number, record in enumerate(records, 1):
        try:
            n = len(records[0]["drafts"])  # k above n cannot be estimated: that column is left out
            metrics = post_metrics(record, tastes, [k for k in KS if k <= n])
            if record["id"] in posts:
                raise ValueError(f"the post {record['id']!r} was there before")
            posts[record["id"]], texts[record["id"]] = metrics, record["post"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"there is no field {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{place}, record {number}: {what}; measure the run again") from None
    values = {name: np.array([posts[i].get(name, math.nan) for i in sorted(posts, key=str)])
              for name in dict.fromkeys(name for metrics in posts.values() for name in metrics)}
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    for number, line in enumerate(lines, 1):
        event = read_object(f"{log}, line {number}", line)
        ends += [event] if event.get("event") == "end" else []
    shared = {"domain": domain} | settings | {"tastes": tastes, "the posts": texts}
    return {"folder": str(folder), "arm": arm, "seed": seed, "shared": shared, "values": values, "ends": ends}


def group_runs(run_folders):
    """Run folders -> {arm: [run, ...]} by first appearance; InputError unless all were measured alike."""
    arms, first = {}, None
    for run in map(read_run, run_folders):
        first = first or run
        for name in first["shared"] | run["shared"]:
            a, b = first["shared"].get(name), run["shared"].get(name)
            if a != b:
                values = "" if isinstance(a, dict) else f" ({a} and {b})"
                raise InputError(f"{first['folder']} and {run['folder']} differ in {name}{values}; "
                                 "measure both on the same posts with the same settings")
        for other in arms.setdefault(run["arm"], []):
            if other["seed"] == run["seed"]:
                raise InputError(f"{other['folder']} and {run['folder']} are the same arm and seed "
                                 f"({run['arm']}, {run['seed']}); give one of them, or name their arms apart")
        arms[run["arm"]].append(run)
    if len(first["shared"]["the posts"]) < 2:
        raise InputError(f"{first['folder']} has fewer than 2 posts, too few for an interval; measure more")
    return arms


def summarise(arms, against=None):
    """{arm: runs} -> what report.json holds: means, intervals, spread, differences, stages, front."""
    if against is not None and against not in arms:
        raise InputError(f"--against {against}: no such arm; the arms are {', '.join(arms)}")
    first = next(iter(arms.values()))[0]
    names = dict.fromkeys(name for runs in arms.values() for run in runs for name in run["values"])
    ks, means = [k for k in KS if f"pass@{k}" in names], {}
    out = {"version": 1, "measured": {k: v for k, v in first["shared"].items() if k != "the posts"},
           "posts": len(first["shared"]["the posts"]), "ks": ks, "against": against,
           "arms": {}, "differences": {}, "stages": []}
    for arm, runs in arms.items():
        rows = {}
        for name in names:
            table = np.array([run["values"].get(name, first["values"]["valid"] * math.nan) for run in runs])
            mean = means[arm, name] = table.mean(axis=0)  # (posts,), NaN where any seed lacks the metric
            kept = np.isfinite(mean)
            row = rows[name] = {"mean": None, "posts_left_out": int((~kept).sum())}
            if kept.sum() >= 2:
                seeds, (low, high) = table[:, kept].mean(axis=1), bootstrap_interval(mean[kept])
                row |= {"mean": float(seeds.mean()), "low": low, "high": high, "per_seed": seeds.tolist(),
                        "sd_over_seeds": float(seeds.std(ddof=1)) if len(runs) > 1 else None}
        out["arms"][arm] = {"seeds": [run["seed"] for run in runs], "runs": [run["folder"] for run in runs],
                            "metrics": rows}
        ends = [{event.get("stage", "run"): event for event in run["ends"]} for run in runs]  # a stage's last
        for stage in dict.fromkeys(stage for run in ends for stage in run):
            row = {"arm": arm, "stage": stage}
            for key, combine in (("seconds", np.mean), ("tokens_per_second", np.mean), ("peak_bytes", max)):
                got = [run[stage][key] for run in ends if run.get(stage, {}).get(key) is not None]
                row[key] = float(combine(got)) if got else None
            out["stages"].append(row)
    for arm in arms if against else ():
        for name in dict.fromkeys(("pass@1", f"pass@{ks[-1]}", "valid", "stances")):
            if arm != against and name in names:
                a, b = means[arm, name], means[against, name]
                row = dict(zip(("mean", "low", "high"), (float((a - b).mean()), *paired_interval(a, b))))
                out["differences"].setdefault(arm, {})[name] = row
    places = [[a["metrics"][name]["mean"] for name in ("valid", "semantic")] for a in out["arms"].values()]
    return out | {"pareto": [list(arms)[i] for i in pareto_front(places)]}


def tables(summary):
    """summary -> [(title, header, rows of strings)]; "±" is half the width of the 95% interval over posts."""
    def cell(row, form, key="mean"):
        half = (row["high"] - row["low"]) / 2 if "low" in row else None
        return "-" if row.get(key) is None else form.format(row[key], half=half, **row)

    def by_arm(title, names, form, key="mean"):
        names = [name for name in names if name in next(iter(arms.values()))["metrics"]]
        return title, ["arm", "seeds", *names], [[arm, str(len(a["seeds"])), *(
            cell(a["metrics"][name], form, key) for name in names)] for arm, a in arms.items()]

    arms, differences = summary["arms"], summary["differences"]
    judged = [*(f"pass@{k}" for k in summary["ks"]), "valid", "stances"]
    out = [by_arm("Quality: mean, ± half the 95% interval over posts", judged, "{:.3f} ±{half:.3f}"),
           by_arm("Diversity and the rest: mean", [
               "distinct-1", "distinct-2", "self-bleu", "semantic", "vendi", "reward",
               f"max@{summary['ks'][-1]}", "words", "truncated"], "{:.3f}")]
    if any(len(a["seeds"]) > 1 for a in arms.values()):
        names = [*judged, "semantic", "reward"]
        out.append(by_arm("Standard deviation over seeds", names, "{:.3f}", "sd_over_seeds"))
    if differences:
        names = list(next(iter(differences.values())))
        out.append((f"Difference from {summary['against']} on the same posts, 95% interval", ["arm", *names],
                    [[arm, *(cell(row[name], "{:+.3f} [{low:+.3f}, {high:+.3f}]") for name in names)]
                     for arm, row in differences.items()]))
    if summary["stages"]:
        header = ["arm", "stage", "seconds", "tokens/s", "peak GiB"]
        columns = (("seconds", "{:,.1f}", 1), ("tokens_per_second", "{:,.0f}", 1),
                   ("peak_bytes", "{:,.2f}", 2**30))
        out.append(("Training: mean over seeds, largest peak", header, [
            [row["arm"], str(row["stage"]), *("-" if row[key] is None else form.format(row[key] / unit)
                                              for key, form, unit in columns)] for row in summary["stages"]]))
    return out


def write_tables(summary):
    """summary -> (report.txt with aligned columns, report.md)."""
    about = ", ".join(f"{name} {value}" for name, value in summary["measured"].items() if name != "tastes")
    about = f"Measured on {summary['posts']} posts: {about}"
    text, page = [about, ""], ["# Report", "", about, ""]
    for title, header, rows in tables(summary):
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        text += [title, *("  ".join(word.rjust(w) if i else word.ljust(w) for i, (word, w) in enumerate(
            zip(row, widths))) for row in (header, *rows)), ""]
        page += [f"## {title}", "", *("| " + " | ".join(word.replace("|", "\\|") for word in row) + " |"
                                      for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows)), ""]
    short = [f"{name} in {row['posts_left_out']} posts of {arm}" for arm, a in summary["arms"].items()
             for name, row in a["metrics"].items() if row["posts_left_out"]]
    notes = ["Numbers are counted within a post, then averaged over posts. Lower self-bleu is more diverse.",
             "Intervals draw posts again for the same trained models; training again adds the sd over seeds.",
             f"On the Pareto front of valid drafts and semantic diversity: {', '.join(summary['pareto'])}."]
    notes += [f"Left out, because no draft of the post is long enough: {', '.join(short)}."] if short else []
    page += ["![Pass@k](pass_at_k.svg)", "", "![Quality and diversity](quality_diversity.svg)", ""]
    return "\n".join(text + notes) + "\n", "\n".join(page + [f"- {note}" for note in notes]) + "\n"


# ---- Pictures: plain SVG, 720 x 440, so that the report needs no plotting package --------------------------

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito
LEFT, TOP, BOTTOM = 64, 62, 384  # the plotting area, in pixels


def scale(values, first, last):
    """-> (function from a value to its pixel, grid [(pixel, label), ...] on round numbers)."""
    low, high = min(values), max(max(values), min(values) + 0.02)
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= (high - low) / 5)
    ticks = [round(i * step, 9) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]

    def place(value):
        return first + (last - first) * (value - ticks[0]) / (ticks[-1] - ticks[0])
    return place, [(place(tick), f"{tick:g}") for tick in ticks]


def svg_text(x, y, words, style=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def svg_line(points, colour, style=""):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline fill="none" stroke="{colour}" {style} points="{path}"/>'


def svg_marker(i, x, y):
    """Arm i: one of 7 colours and 3 shapes (circle, square, diamond), so 21 arms can be told apart."""
    return (f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" rx="{(4.5, 1, 1)[i % 3]}" '
            f'fill="{COLOURS[i % 7]}" stroke="#fff" transform="rotate({i % 3 // 2 * 45} {x:.1f} {y:.1f})"/>')


def svg_page(title, note, x_label, y_label, x_grid, y_grid, right, marks):
    """The whole picture: white ground, titles, grid, then the marks."""
    middle = 'text-anchor="middle"'
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 440" width="720" height="440"',
           f' font-family="sans-serif" font-size="12" fill="#333" role="img"><title>{escape(title)}</title>',
           '<rect width="720" height="440" rx="6" fill="#fff"/>', svg_text(LEFT, 26, title, 'font-size="16"'),
           svg_text(LEFT, 45, note, 'fill="#666"'), svg_text((LEFT + right) / 2, 427, x_label, middle),
           svg_text(0, 0, y_label, middle + f' transform="translate(18 {(TOP + BOTTOM) / 2}) rotate(-90)"')]
    for x, label in x_grid:
        out += [svg_line([(x, TOP), (x, BOTTOM)], "#eee"), svg_text(x, 403, label, middle)]
    for y, label in y_grid:
        out += [svg_line([(LEFT, y), (right, y)], "#eee"),
                svg_text(LEFT - 8, y + 4, label, 'text-anchor="end"')]
    return "\n".join([*out, *marks, "</svg>"]) + "\n"


def draw_pass_at_k(summary):
    """summary -> SVG of Pass@k against k (log), a line an arm, whiskers the interval, names at the ends."""
    ks, right = summary["ks"], 540
    lines = {arm: [a["metrics"][f"pass@{k}"] for k in ks] for arm, a in summary["arms"].items()}
    ends = [end for line in lines.values() for row in line for end in (row["low"], row["high"])]
    at_y, y_grid = scale(ends, BOTTOM, TOP)
    at_x = [LEFT + 24 + (right - LEFT - 48) * math.log(k) / math.log(max(ks[-1], 2)) for k in ks]
    order = sorted(lines, key=lambda arm: -lines[arm][-1]["mean"])
    gap, places = min(17, (BOTTOM - TOP) / len(order)), {}
    for i, arm in enumerate(order):  # names in the order of the line ends, a line apart: pushed down,
        places[arm] = max(at_y(lines[arm][-1]["mean"]), places[order[i - 1]] + gap if i else TOP)
    for i, arm in enumerate(reversed(order)):  # then back up into the frame
        places[arm] = min(places[arm], BOTTOM - i * gap)
    marks = []
    for i, (arm, line) in enumerate(lines.items()):
        colour, shift = COLOURS[i % 7], min(4, 40 / len(lines)) * (i - (len(lines) - 1) / 2)
        points = [(x + shift, at_y(row["mean"])) for x, row in zip(at_x, line)]  # shifted: whiskers abreast
        end, faint = points[-1][1], 'stroke-width="1.5" opacity="0.55"'
        marks += [svg_line([(x, at_y(row["low"])), (x, at_y(row["high"]))], colour, faint)
                  for (x, _), row in zip(points, line)]
        marks += [svg_line(points, colour, 'stroke-width="2"'), *(svg_marker(i, *point) for point in points),
                  svg_line([(points[-1][0] + 7, end), (right + 2, end), (right + 16, places[arm])], colour,
                           'stroke-width="0.8"'), svg_marker(i, right + 22, places[arm]),
                  svg_text(right + 32, places[arm] + 4, arm if len(arm) < 23 else arm[:21] + "…")]
    note = f"mean over {summary['posts']} posts and all seeds; whiskers: 95% interval over posts"
    return svg_page("Pass@k: did any of k drafts please?", note, "k, drafts shown (log scale)", "Pass@k",
                    [(x, str(k)) for x, k in zip(at_x, ks)], y_grid, right, marks)


def draw_quality_diversity(summary):
    """summary -> SVG of valid share against semantic diversity: arms, intervals, seeds, Pareto front."""
    rows = {arm: (a["metrics"]["semantic"], a["metrics"]["valid"]) for arm, a in summary["arms"].items()}
    xs, ys = ([value for row in axis for value in (row["low"], row["high"], *row["per_seed"])]
              for axis in zip(*rows.values()))
    (at_x, x_grid), (at_y, y_grid) = scale(xs, LEFT, 700), scale(ys, BOTTOM, TOP)
    centres = {arm: (at_x(x["mean"]), at_y(y["mean"])) for arm, (x, y) in rows.items()}
    front, edge = [], LEFT
    for x, y in sorted(centres[arm] for arm in summary["pareto"]):  # more diversity, less quality: steps
        front, edge = front + [(edge, y), (x, y)], x
    marks = [svg_line([*front, (edge, BOTTOM)], "#999", 'stroke-width="1.5" stroke-dasharray="5 4"')]
    for i, (arm, (x, y)) in enumerate(rows.items()):
        (u, v), colour = centres[arm], COLOURS[i % 7]
        marks += [svg_line([(at_x(x["low"]), v), (at_x(x["high"]), v)], colour, 'opacity="0.5"'),
                  svg_line([(u, at_y(y["low"])), (u, at_y(y["high"]))], colour, 'opacity="0.5"')]
        marks += [f'<circle cx="{at_x(a):.1f}" cy="{at_y(b):.1f}" r="3" fill="{colour}" opacity="0.35"/>'
                  for a, b in zip(x["per_seed"], y["per_seed"])]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in centres.values()]  # boxes that no name may cover
    offsets = sorted(((dx, dy) for dy in range(-120, 121, 6) for dx in (10, -10)),
                     key=lambda offset: abs(offset[1] + 9) - offset[0] / 5)
    for i, (arm, (x, y)) in enumerate(centres.items()):
        name = arm if len(arm) < 31 else arm[:29] + "…"
        for dx, dy in offsets:  # the nearest place inside the frame that is free
            left = x + dx - (7 * len(name) if dx < 0 else 0)
            box = (left, y + dy - 7, left + 7 * len(name), y + dy + 7)
            if LEFT < box[0] and box[2] < 712 and TOP < box[1] and box[3] < BOTTOM and not any(
                    box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                break
        taken.append(box)
        marks += [svg_line([(x, y), (x + dx, y + dy)], "#999", 'stroke-width="0.8"')] if abs(dy) > 15 else []
        anchor = "end" if dx < 0 else "start"
        halo = f'stroke="#fff" stroke-width="3" paint-order="stroke" text-anchor="{anchor}"'
        marks += [svg_marker(i, x, y), svg_text(x + dx, y + dy + 4, name, halo)]
    note = "bars: 95% interval over posts; faint: seeds; dashed: Pareto front"
    return svg_page("Quality against diversity", note, "semantic diversity of a post's drafts",
                    "share of valid drafts", x_grid, y_grid, 700, marks)


# ---- Measuring runs: n drafts for each held-out post, scored -----------------------------------------------

def measure(a):
    """Write evaluation.json into each run folder. A run measured already with the same settings is not
    measured again."""
    if a.n < max(KS):
        raise InputError(f"--n {a.n}: Pass@{max(KS)} needs at least {max(KS)} drafts a post (twice as many are better)")
    runs = [Path(r) for r in a.runs]
    for run in runs:
        if not (run / "adapter" / "adapter_config.json").exists():
            raise InputError(f"{run}: no adapter there: give finished runs of polylora.py sft or grpo.py")
    a.model = a.model or (read_json(runs[0] / "config.json").get("model") if runs else None)
    if not a.model:
        raise InputError("give runs to measure, or --model with --bare")
    a.out = str(runs[0] if runs else a.bare)
    s = Session(a, "measure")
    s.load()
    settings = {"n": a.n, "temperature": a.temperature, "max_new_tokens": a.max_new_tokens, "posts": len(s.posts),
                "reward": a.reward, "reward_model": a.reward_model, "embedder": a.embedder, "top_p": a.top_p}
    jobs = [(run, read_json(run / "config.json")["seed"]) for run in runs]
    if a.bare:
        s.ranks.barrier()
        if s.ranks.main:
            write_files(a.bare, {"config.json": json.dumps({"seed": a.seed, "arm": "base", "model": a.model}, indent=2) + "\n"})
        jobs.insert(0, (Path(a.bare), a.seed))
    jobs = [(run, seed) for run, seed in jobs if not measured(run, settings)]
    s.ranks.barrier()
    if jobs:
        s.shard_model()
        load_embedder(s)
        reward = None if s.domain.voices else make_reward(a.reward, s)
    for run, seed in jobs:
        if a.shard:  # modules of a sharded model cannot be exchanged
            s.load_model()
            s.embedder.model = s.model if a.embedder == "base" else s.embedder.model
        drop_lora(s.model)
        if run != Path(a.bare or ""):
            load_adapter(s.model, run / "adapter", dropout=0.0)
        s.shard_model()
        a.seed = seed  # a run's drafts are drawn from its own seed, the same in every arm
        measure_run(s, run, settings, reward)
    s.ranks.close()


def measured(run, settings):
    path = run / "evaluation.json"
    return path.exists() and read_object(path).get("settings") == settings


def measure_run(s, run, settings, reward):
    """evaluation.json and a line in metrics.jsonl for the model as it stands; posts are dealt to the
    ranks."""
    began, a = time.perf_counter(), s.args
    mine = s.deal(list(range(len(s.posts))))
    with tqdm(total=len(mine), desc=f"measure {run.name}", unit="post", disable=not s.ranks.main,
              mininterval=0.5 if sys.stderr.isatty() else 15) as bar:
        _, samples, texts = s.sample_drafts([Visit(i,0) for i in mine], 0, a.n, progress=bar.update)
    records = s.ranks.gather(make_records(s, [s.posts[i] for i in mine], samples, texts, reward))
    written, = s.ranks.sum([sum(len(d) for drafts in samples.tokens for d in drafts)])
    seconds = time.perf_counter() - began
    if s.ranks.main:
        result = {"version": 1, "domain": s.domain.name, "settings": settings,
                  "tastes": {v: 1 / len(s.domain.voices) for v in s.domain.voices} or None, "records": records}
        end = {"event": "end", "stage": "measure", "seconds": seconds, "tokens_per_second": written / seconds,
               "peak_bytes": peak_bytes(s.ranks.device), "ranks": s.ranks.world, "device": s.ranks.device.type}
        with open(run / "metrics.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(end) + "\n")
        write_files(run, {"evaluation.json": json.dumps(result, ensure_ascii=False) + "\n"})


def make_records(s, posts, samples, texts, reward):
    """One record a post (fields: top of this file)."""
    embeddings = s.embedder(texts)
    spread, vectors, records = diversity(embeddings).tolist(), embeddings.cpu().numpy(), []
    if not s.domain.voices:
        rewards = reward(posts, texts)
        people = reward(posts, [p.replies for p in posts])
    for i, post in enumerate(posts):
        record = {"id": post.id, "post": post.post, "drafts": texts[i], "finished": samples.finished[i],
                  "semantic": spread[i], "vendi": vendi_score(vectors[i])}
        if s.domain.voices:  # the reward is the exact mean over readers drawn by popularity
            record["voices"] = [list(s.domain.voices_of(post, t)) for t in texts[i]]
            record["rewards"] = [math.fsum(s.domain.popularity_of(post)[v] for v in right) for right in record["voices"]]
        else:  # a draft passes when it earns what people's own replies earn
            bar = float(np.mean(people[i]))
            record |= {"rewards": rewards[i], "passed": [r >= bar for r in rewards[i]]}
        records.append(record)
    return records


def show_drafts(a):
    """Print k drafts for one post, as an app would show them; drafts that say the same are shown once, with
    their number."""
    run = Path(a.folder)
    if not (run / "adapter" / "adapter_config.json").exists():
        raise InputError(f"{run}: no adapter there: give a finished run of polylora.py sft or grpo.py")
    if not a.post.strip():
        raise InputError("the post is empty: give its text in quotes")
    config = read_json(run / "config.json")
    a.model, a.out = a.model or config["model"], a.folder
    s = Session(a, "drafts")
    s.load_model()
    load_adapter(s.model, run / "adapter", dropout=0.0)
    s.shard_model()
    s.posts = [data.Post("drafts", a.post, ())]
    s.domain = data.DOMAINS[read_json(run / "done.json")["domain"]["domain"]](s.posts)
    _, samples, (texts,) = s.sample_drafts([Visit(0,0)], 0, a.k)
    for number, (text, times) in enumerate(Counter(texts).items(), 1):
        print(f"{number}. {text}" + (f"   (x{times})" if times > 1 else ""))
    s.ranks.close()


# ---- Commands ----------------------------------------------------------------------------------------------

def write_files(folder, files):
    """{name: text} into a folder, made if need be; all are written beside their places, then moved there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / f".{name}.part").write_text(text, encoding="utf-8")
        for name in files:
            os.replace(folder / f".{name}.part", folder / name)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error}); give another folder") from None


def report(run_folders, out_folder, against=None):
    """Compare measured runs: report.json, .md, .txt and two SVGs in out_folder. -> the dict of report.json.

    Runs of one arm are its seeds: values are averaged over them in each post, and intervals are over posts.
    `against` names the arm from which paired differences are taken. Writes nothing on an InputError.
    """
    summary = summarise(group_runs(run_folders), against)
    text, page = write_tables(summary)
    data = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    write_files(out_folder, {"report.json": data, "report.md": page, "report.txt": text,
                             "pass_at_k.svg": draw_pass_at_k(summary),
                             "quality_diversity.svg": draw_quality_diversity(summary)})
    print(text, end="")
    return summary


def parser():
    """Three commands; each sets `run`, what to do with its arguments."""
    p = argparse.ArgumentParser(prog="evaluate.py", description="Judge runs by Pass@k, diversity, quality.")
    sub = p.add_subparsers(required=True, dest="command", metavar="COMMAND")
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    m = sub.add_parser("measure", help="draft replies to held-out posts with each run and score them", **form)
    m.add_argument("runs", nargs="*", metavar="RUN", help="finished runs of polylora.py sft or grpo.py, all on one base model")
    m.add_argument("--data", required=True, help="held-out posts, JSON lines")
    m.add_argument("--bare", metavar="FOLDER", help="also measure the base model without adapter, as a run in this folder")
    m.add_argument("--n", "--samples", type=int, default=20, help="drafts for each post: at least 10, for Pass@10 (after torchrun write "
                                                                  "--samples: it takes --n for an option of its own)")
    m.add_argument("--seed", type=int, default=1, help="of --bare's drafts; a run's drafts use the run's own seed")
    m.add_argument("--reward", default="auto", choices=("auto", *REWARDS), help="what a draft earns, in domains without a verifier")
    m.add_argument("--reward-model", help="Qwen3 folder or hub name for --reward model or judge")
    m.set_defaults(run=measure)
    d = sub.add_parser("drafts", help="write k drafts for one post, as an app would show them", **form)
    d.add_argument("folder", metavar="RUN", help="finished run of polylora.py sft or grpo.py")
    d.add_argument("post", help="the post, in quotes")
    d.add_argument("--k", type=int, default=5, help="drafts to write")
    d.add_argument("--seed", type=int, default=1, help="of the sampling: another seed, other drafts")
    d.set_defaults(run=show_drafts)
    for q in (m, d):
        q.add_argument("--model", help="Qwen3 checkpoint under the adapters; default: the one the first run names")
        q.add_argument("--max-new-tokens", type=int, default=100, help="longest draft, in tokens, stop token included")
        q.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 is greedy, so that all drafts are equal")
        q.add_argument("--top-p", type=float, default=1.0, help="smallest share of probability to sample from")
        model_flags(q)
    m.add_argument("--domain", default="auto", help="how drafts are scored: auto, pocket, voices or replies")
    m.add_argument("--embedder", default="base", help="what embeds drafts: base, or a Qwen3-Embedding folder or hub name")
    m.add_argument("--skip-bad-lines", action="store_true", help="skip, count and report unreadable lines of --data")
    r = sub.add_parser("report", help="compare measured runs: tables (txt, md, json) and pictures (SVG)", **form)
    r.add_argument("runs", nargs="+", metavar="RUN",
                   help="folder of a measured run; runs whose config.json names the same arm are its seeds")
    r.add_argument("--out", required=True, metavar="FOLDER", help="folder for the report, made if need be")
    r.add_argument("--against", metavar="ARM", help="arm from which paired differences are taken")
    r.set_defaults(run=lambda a: report(a.runs, a.out, a.against))
    return p


def main(argv=None):
    """Command line; returns the exit code: 0, or 2 after wrong input, said in one line on stderr."""
    return data.command(parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
