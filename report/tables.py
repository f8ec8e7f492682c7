"""A summary as tables and sentences: aligned text, Markdown, CSV."""

import re

from report.limits import below_limit
from report.page import measured_as
from report.pictures import FRONTS, PICTURES, curve_file, curve_title, curves_of
from report.summary import COMPARED
from support.files import printable


DIVERSITY = ("distinct-1", "distinct-2", "ead", "self-bleu", "semantic", "vendi", "duplicates",
             "reward")

LIKELIHOODS = ("words", "truncated", "entropy", "logprob", "perplexity")

WITH_HALF = "{:.3f} ±{half:.3f}"             # half the width of the 95% interval


def cell(row, form, key="mean"):
    """A metric's row as text; "-" where it has no such number."""
    if not row or row.get(key) is None:
        return "-"
    half = (row["high"] - row["low"]) / 2 if "low" in row else None
    return form.format(row[key], half=half, **row)


def arm_table(summary, title, names, form, key="mean"):
    """(title, header, rows): a row an arm, a column for each of the metrics that are there."""
    arms = summary["arms"]
    known = metric_names(summary)
    names = [name for name in names if name in known]
    rows = []
    for arm, entry in arms.items():
        cells = [cell(entry["metrics"][name], form, key) for name in names]
        rows.append([arm, str(len(entry["seeds"])), *cells])
    return title, ["arm", "seeds", *names], rows


def metric_names(summary):
    """The metrics of a summary, in its order."""
    first, *_ = summary["arms"].values()
    return list(first["metrics"])


def tables(summary):
    """summary -> [(title, header, rows of strings)]; "±" is half the width of the 95% interval."""
    ks = summary["ks"]
    passes = [] if summary["refused"] else [f"pass@{k}" for k in ks]
    title = f"{who_is_pleased(summary)}: mean, ± half the 95% interval over seeds and posts"
    out = [arm_table(summary, title, [*passes, "valid"], WITH_HALF)]
    if summary["limits"]:
        out.append(limit_table(summary))
        coverage = [f"coverage@{k}" for k in ks if k in (1, 5, 10, 20)]
        out.append(arm_table(summary, "Coverage: users of every style counted equally",
                             [*coverage, "stances"], WITH_HALF))
    out.append(arm_table(summary, "Diversity and the rest: mean",
                         [*DIVERSITY, f"max@{ks[-1]}", *LIKELIHOODS], "{:.3f}"))
    out.append(picks_table(summary))
    if any(len(entry["seeds"]) > 1 for entry in summary["arms"].values()):
        out.append(arm_table(summary, "Standard deviation over seeds",
                             [*passes, "valid", "semantic", "reward"], "{:.3f}", "sd_over_seeds"))
    if summary["differences"]:
        out.append(difference_table(summary))
    if summary["stages"]:
        out.append(stage_table(summary))
    return out


def picks_table(summary):
    """What is picked of 5 (all k are in report.json), and a judge's verdicts."""
    ks = summary["ks"]
    one_of = 5 if 5 in ks else ks[-1]
    picks = []
    verdicts = []
    for name in metric_names(summary):
        if name.startswith(("longest@", "pick_")) and name.endswith(f"@{one_of}"):
            picks.append(name)
        if name.startswith("judge-"):
            verdicts.append(name)
    title = f"What a user picks of {one_of} who goes by this"
    if verdicts:
        title += ", and a judge's mean verdicts"
    recalls = [f"recall@{k}" for k in ks]
    return arm_table(summary, title, picks + verdicts + recalls, "{:.3f}")


def limit_table(summary):
    """How far each arm is from the limit."""
    columns = ("limit(1) - limit(v)", "limit(v) - reached", "share of limit(1)")
    header = ["arm"]
    for k in (5, 10):
        if k in summary["ks"]:
            header += [f"{column} @{k}" for column in columns]
    rows = [limit_cells(arm, entry, summary) for arm, entry in summary["arms"].items()]
    return "What is left up to the limit, v the arm's own validity", header, rows


def limit_cells(arm, row, summary):
    out = [arm]
    for k in (5, 10):
        if k not in summary["ks"]:
            continue
        top = summary["limits"][str(k)]["independent"]
        own = row["limits"][str(k)]
        reached = row["metrics"][f"pass@{k}"]["mean"]
        if reached is None:                  # a joint decoder's other k
            out += ["-"] * 3
        else:
            out += [f"{top - own:.3f}", f"{own - reached:+.3f}", f"{reached / top:.2f}"]
    return out


def difference_table(summary):
    differences = summary["differences"]
    names = []
    for name in COMPARED:
        if any(name in rows for rows in differences.values()):
            names.append(name)
    title = f"Difference from {summary['against']}, paired by seed and post, 95% interval"
    if summary["can_reject"]:
        title += ", p after Holm"
    rows = []
    for arm, row in differences.items():
        rows.append([arm, *(difference_cell(row.get(name), summary) for name in names)])
    return title, ["arm", *names], rows


def difference_cell(row, summary):
    """A difference with its interval, and with its p where so many seeds could reject at all."""
    form = "{:+.3f} [{low:+.3f}, {high:+.3f}]"
    if row and summary["can_reject"] and row["least"] <= 0.05:
        form += " p {p_holm:.3f}"
    return cell(row, form)


def stage_table(summary):
    columns = (("seconds", "{:,.1f}", 1), ("tokens_per_second", "{:,.0f}", 1),
               ("peak_bytes", "{:,.2f}", 2**30))
    rows = []
    for stage in summary["stages"]:
        cells = [stage["arm"], str(stage["stage"])]
        for key, form, unit in columns:
            value = stage[key]
            cells.append("-" if value is None else form.format(value / unit))
        rows.append(cells)
    header = ["arm", "stage", "seconds", "tokens/s", "peak GiB"]
    return "Training: mean over seeds, largest peak", header, rows


def who_is_pleased(summary):
    """What Pass@k counts: users' styles, or a bar, with how often people's replies pass it."""
    if summary["limits"]:
        return "For the users of the reward"
    if summary["scale"]:
        return f"Drafts that pass ({scale_words(summary['scale'])})"
    return "Drafts that pass"


def scale_words(scale):
    shares = []
    for name, key in (("held-out human", "people"), ("shuffled", "shuffled"),
                      ("truncated", "truncated")):
        if scale.get(key) is not None:
            shares.append(f"a {name} one {scale[key]:.0%}")
    words = f"of replies, this share passes by the same measure: {', '.join(shares)}"
    if scale.get("interval"):
        low, high = scale["interval"]
        words += (f"; the bar is a reward of {scale['threshold']:.3f}, 95% interval by intents "
                  f"{low:.3f} to {high:.3f}")
    return words


# ---- Sentences -----------------------------------------------------------------------------------

def notes_of(summary):
    """Sentences below the tables."""
    out = ["Numbers are counted within a post, then averaged over posts. Lower self-bleu is more "
           "diverse.",
           f"Intervals: {interval_words(summary)}."]
    if summary["limits"]:
        limits = []
        for k, limit in summary["limits"].items():
            limits.append(f"@{k} {limit['independent']:.3f} ({limit['joint']:.3f} for joint "
                          "policies)")
        out.append("The best attainable Pass@k of independent, always valid drafts: "
                   f"{', '.join(limits)}.")
    if summary["scale"]:
        out.append(f"{scale_words(summary['scale']).capitalize()}.")
    out += embedder_notes(summary)
    if summary["refused"]:
        out.append(summary["refused"])
    best = ", ".join(summary["pareto"])
    out.append(f"On the Pareto front of valid drafts and semantic diversity: {best}.")
    out += knob_notes(summary) + power_notes(summary) + short_notes(summary)
    return out + summary["notes"] + [f"{sentence}." for sentence in summary["primary"]]


def interval_words(summary):
    """What the intervals are over."""
    arms = summary["arms"]
    most = max(len(entry["seeds"]) for entry in arms.values())
    if most == 1:
        return "one seed: intervals are over posts (by intent) alone, training again is not in them"
    if summary["same_posts_for_all_seeds"]:
        how = "seeds crossed with posts (by intent), Satterthwaite's degrees of freedom"
    else:
        how = "posts of their own for each seed: t over seeds"
    single = [arm for arm, entry in arms.items() if len(entry["seeds"]) < 2]
    if single:
        how += f"; of one seed, and so over posts alone: {', '.join(single)}"
    return how


def embedder_notes(summary):
    """Which embedder judged, which trained, and whether it separates the styles."""
    out = []
    trained_by = set()
    separations = []
    for entry in summary["arms"].values():
        if entry["trained_by"]:
            trained_by.add(entry["trained_by"])
        row = entry["metrics"].get("separation")
        if row and row["mean"] is not None:
            separations.append(row["mean"])
    judged_by = summary["measured"].get("embedder")
    if judged_by:
        out.append(f"Semantic diversity is by the embedder {judged_by}; D was trained by "
                   f"{', '.join(sorted(trained_by)) or 'none'}.")
    if separations:
        out.append("By it two right drafts in different styles are farther apart than two in one "
                   f"style with an AUC of {min(separations):.2f} to {max(separations):.2f}, an "
                   "arm's mean.")
    return out


def knob_notes(summary):
    """What lies between the limit and each curve BASE@KNOB, a method over its own knob."""
    limit = summary.get("front")
    if not limit:
        return []
    points = {}
    for arm, entry in summary["arms"].items():
        metrics = entry["metrics"]
        point = [(metrics.get(name) or {}).get("mean") for name in ("pass@1", "pass@5")]
        if None not in point:
            points[arm] = point
    gaps = []
    for name, curve in curves_of(points, summary).items():
        first = min(curve)[0]
        last = max(curve)[0]
        gaps.append(f"{name} {below_limit(curve, limit):.3f} ({first:.3f} to {last:.3f})")
    if not gaps:
        return []
    return ["Mean height of the limit of Pass@5 above a method's curve over its own knob (over the "
            f"curve's span of Pass@1): {', '.join(gaps)}."]


def power_notes(summary):
    """What differences so few seeds and posts could show."""
    smallest = []
    least = []
    for rows in summary["differences"].values():
        for name, row in rows.items():
            if name == "pass@5":
                smallest.append(row["smallest"])
            least.append(row["least"])
    out = []
    if smallest:
        out.append("The smallest difference in Pass@5 that this study could see: "
                   f"{max(smallest):.3f}.")
    if least and not summary["can_reject"]:
        out.append(f"p values are left out: so few seeds cannot reject anything by flipping signs "
                   f"(the smallest possible p is {min(least):.3g}, before Holm's factor of "
                   f"{len(least)} for as many tests).")
    elif least and max(least) > 0.05:
        out.append("p values are left out where so few seeds cannot reject anything.")
    return out


def short_notes(summary):
    """Which metrics leave out posts."""
    short = []
    for arm, entry in summary["arms"].items():
        for name, row in entry["metrics"].items():
            if row["posts_left_out"] and "@" not in name and name != "separation":
                short.append(f"{name} in {row['posts_left_out']} posts of {arm}")
    if not short:
        return []
    return ["Left out, because no draft of the post is long enough or it was not measured: "
            f"{', '.join(short)}."]


# ---- Files ---------------------------------------------------------------------------------------

def write_tables(summary):
    """summary -> (report.txt with aligned columns, report.md, report.csv)."""
    about = measured_as(summary)
    text = [about, ""]
    page = ["# Report", "", about, ""]
    for title, header, rows in tables(summary):
        text += [title, *aligned([header, *rows]), ""]
        rule = ["---", *["---:"] * (len(header) - 1)]
        page += [f"## {title}", "", *map(markdown_row, [header, rule, *rows]), ""]
    for name, title in shown_pictures(summary).items():
        page += [f"![{title}]({name})", ""]
    notes = notes_of(summary)
    page += [f"- {note}" for note in notes]
    return joined_lines(text + notes), joined_lines(page), joined_lines(sheet_of(summary))


def joined_lines(lines):
    return "\n".join(map(printable, lines)) + "\n"


def aligned(rows):
    """Rows of strings as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        words = [first.ljust(widths[0])]
        for word, width in zip(others, widths[1:]):
            words.append(word.rjust(width))
        lines.append("  ".join(words))
    return lines


def markdown_row(row):
    words = [word.replace("|", "\\|") for word in row]
    return "| " + " | ".join(words) + " |"


def shown_pictures(summary):
    """{file name: title} of the pictures that the summary has."""
    shown = {}
    for name, title in PICTURES.items():
        if name not in FRONTS or FRONTS[name][1] in summary:
            shown[name] = title
    for curve in summary["curves"]:
        shown[curve_file(curve)] = curve_title(curve)
    return shown


def sheet_of(summary):
    """The lines of report.csv: every metric of every arm."""
    lines = ["arm,metric,mean,low,high,sd_over_seeds"]
    for arm, entry in summary["arms"].items():
        for name, row in entry["metrics"].items():
            plain = re.fullmatch(r"[\w@-]+", name)       # others come from a record
            cells = [csv_cell(arm), name if plain else csv_cell(name)]
            for key in ("mean", "low", "high", "sd_over_seeds"):
                value = row.get(key)
                cells.append("" if value is None else repr(value))
            lines.append(",".join(cells))
    return lines


def csv_cell(text):
    """A text that no spreadsheet takes for a formula, quoted."""
    text = printable(text)
    risky = text.lstrip().startswith(tuple("=+-@\uff1d\uff0b\uff0d\uff20"))  # full width, too
    guarded = "'" + text if risky else text
    return '"' + guarded.replace('"', '""') + '"'
