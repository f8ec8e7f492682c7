"""The pictures of a report: Pass@k, Pass@1 against Pass@k, quality against diversity, training."""

import math
import re

from report.svg import (BOTTOM, LEFT, TOP, WIDE, colour_of, name_places, named, scale, shortened,
                        svg_band, svg_cross, svg_line, svg_marker, svg_page, svg_seeds, svg_text,
                        within)


MANY = 20  # arms, from which on a picture names methods alone

PICTURES = {"pass_at_k.svg": "Pass@k", "pass1_pass5.svg": "Pass@1 against Pass@5",
            "pass1_pass10.svg": "Pass@1 against Pass@10",
            "quality_diversity.svg": "Quality and diversity"}

# What a training log has a line of for each step.
CURVES = {"ce": "cross-entropy of people's replies", "D": "diversity D of a post's drafts",
          "different": "share of a post's drafts that differ",
          "entropy": "entropy of the policy, nats a token", "reward": "reward of drafts",
          "valid": "share of valid drafts"}

FRONTS = {"pass1_pass5.svg": (5, "front"), "pass1_pass10.svg": (10, "front10")}


def draw_all(summary, wide):
    """{file name: SVG} of every picture that the summary has, in the page's order."""
    out = {"pass_at_k.svg": draw_pass_at_k(summary, wide),
           "quality_diversity.svg": draw_quality_diversity(summary, wide)}
    for name, (k, key) in FRONTS.items():
        if key in summary:
            out[name] = draw_pass1_passk(summary, k, summary[key], wide)
    order = list(summary["arms"])
    for curve in summary["curves"]:
        out[curve_file(curve)] = draw_curve(curve, order, wide)
    return out


# ---- Pass@k against k ----------------------------------------------------------------------------

def draw_pass_at_k(summary, wide=WIDE):
    """summary -> SVG of Pass@k against k (log), a line an arm, its band the interval, names at the
    ends; of an arm with one k alone a point with whiskers."""
    ks = summary["ks"]
    right = wide - 180
    limits = summary["limits"]
    if summary["refused"]:
        return svg_page("Pass@k", summary["refused"], "", "", [], [], right, [], wide)
    lines = pass_lines(summary)
    if not lines:
        return svg_page("Pass@k", "No arm has it.", "", "", [], [], right, [], wide)
    ends = []
    for line in lines.values():
        for _, row in line:
            ends += within(row)
    if limits:
        for k in ks:
            ends += limits[str(k)].values()
    at_y, y_grid = scale(ends, BOTTOM, TOP)
    widest = math.log(max(ks[-1], 2))
    at_x = {k: LEFT + 24 + (right - LEFT - 48) * math.log(k) / widest for k in ks}
    limit_lines = {}
    if limits:
        for kind in ("independent", "joint"):
            limit_lines[kind] = [(at_x[k], at_y(limits[str(k)][kind])) for k in ks]
    heights = {}                             # of the lines' right ends
    for arm, line in lines.items():
        _, last = line[-1]
        heights[arm] = at_y(last["mean"])
    for kind, points in limit_lines.items():
        heights[kind,] = points[-1][1]
    places = name_places(heights)
    marks = []
    for kind, points in limit_lines.items():
        marks += limit_marks(kind, points, right, places[kind,])
    opacity = min(0.16, 0.8 / len(lines))
    for i, (arm, line) in enumerate(lines.items()):
        marks += pass_marks(i, arm, line, at_x, at_y, right, places[arm], opacity)
    note = f"mean over {summary['posts']} posts and all seeds; bands: 95% interval over both"
    if limits:
        note += "; dashed: the best that drafts can reach"
    x_grid = [(x, str(k)) for k, x in at_x.items()]
    return svg_page("Pass@k: did any of k drafts please?", note, "k, drafts shown (log scale)",
                    "Pass@k", x_grid, y_grid, right, marks, wide)


def pass_lines(summary):
    """{arm: [(k, row), ..]} of the k that it has: a joint decoder has one k alone."""
    lines = {}
    for arm, entry in summary["arms"].items():
        line = []
        for k in summary["ks"]:
            row = entry["metrics"][f"pass@{k}"]
            if row["mean"] is not None:
                line.append((k, row))
        if line:
            lines[arm] = line
    return lines


def limit_marks(kind, points, right, y):
    """A limit's dashed line, and its name at height y."""
    dashes = "2 4" if kind == "joint" else "6 4"
    style = f'stroke-width="1.5" stroke-dasharray="{dashes}"'
    return [svg_line(points, "#666", style), svg_text(right + 32, y + 4, f"limit, {kind}"),
            svg_line([(right + 4, y), (right + 28, y)], "#666", style)]


def pass_marks(i, arm, line, at_x, at_y, right, y, opacity):
    """Arm i's band, line and points, and its name at height y."""
    colour = colour_of(i)
    xs = []
    lows = []
    highs = []
    points = []
    for k, row in line:
        low, high = within(row)
        xs.append(at_x[k])
        lows.append(at_y(low))
        highs.append(at_y(high))
        points.append((at_x[k], at_y(row["mean"])))
    if len(line) > 1:
        band = svg_band(xs, lows, highs, colour, opacity)
    else:
        band = svg_line([(xs[0], lows[0]), (xs[0], highs[0])], colour)
    x, end = points[-1]
    lead = [(x + 7, end), (right + 2, end), (right + 16, y)]
    return [band, svg_line(points, colour, 'stroke-width="2"'),
            *(svg_marker(i, *point) for point in points),
            svg_line(lead, colour, 'stroke-width="0.8"'),
            svg_marker(i, right + 22, y), svg_text(right + 32, y + 4, shortened(arm, 23))]


# ---- One number against another ------------------------------------------------------------------

def draw_pass1_passk(summary, k, limit, wide=WIDE):
    """summary -> SVG of Pass@1 against Pass@k under the limit's front: arms with intervals, faint
    dots their seeds, dotted up to the limit at their own share of valid drafts; arms named
    BASE@KNOB are joined to a curve, a method over its own knob."""
    rows = {}                                # arm -> (row of Pass@1, row of Pass@k)
    own_limits = {}
    for arm, entry in summary["arms"].items():
        both = entry["metrics"]["pass@1"], entry["metrics"][f"pass@{k}"]
        if both[0]["mean"] is not None and both[1]["mean"] is not None:
            rows[arm] = both
            own_limits[arm] = entry["limits"][str(k)]
    xs = [x for x, _ in limit]
    ys = [y for _, y in limit]
    ys += own_limits.values()
    for x, y in rows.values():
        xs += [*within(x), *x["per_seed"]]
        ys += [*within(y), *y["per_seed"]]
    at_x, x_grid = scale(xs, LEFT, wide - 20)
    at_y, y_grid = scale(ys, BOTTOM, TOP)
    line = [(at_x(x), at_y(y)) for x, y in limit]
    marks = [svg_line(line, "#666", 'stroke-width="1.5" stroke-dasharray="6 4"')]
    look = looks(summary)
    centres = {}
    for arm, (x, y) in rows.items():
        colour = colour_of(look[arm])
        centres[arm] = at_x(x["mean"]), at_y(y["mean"])
        u, v = centres[arm]
        marks += svg_cross(u, v, map(at_x, within(x)), map(at_y, within(y)), colour)
        if len(rows) <= MANY:
            top = at_y(own_limits[arm])
            marks.append(svg_line([(u, v), (u, top)], colour, 'stroke-dasharray="1 4"'))
            marks.append(svg_line([(u - 4, top), (u + 4, top)], colour))
        marks += svg_seeds(map(at_x, x["per_seed"]), map(at_y, y["per_seed"]), colour)
    marks += svg_arms(summary, centres, look, wide)
    note = ("bars: 95% interval; faint: seeds; joined: one method's knob; dashed: the limit of "
            "independent, always valid drafts")
    if len(rows) <= MANY:
        note += "; dotted: up to the limit at the arm's own share of valid drafts"
    title = {5: "One draft against five", 10: "One draft against ten"}[k]
    return svg_page(title, note, "Pass@1 for the users", f"Pass@{k} for the users", x_grid,
                    y_grid, wide - 20, marks, wide)


def draw_quality_diversity(summary, wide=WIDE):
    """summary -> SVG of valid share against semantic diversity: arms, intervals, seeds, Pareto
    front."""
    rows = {}                                # arm -> (row of diversity, row of valid)
    xs = []
    ys = []
    for arm, entry in summary["arms"].items():
        x = entry["metrics"]["semantic"]
        y = entry["metrics"]["valid"]
        rows[arm] = x, y
        xs += [*within(x, 2.0), *x["per_seed"]]                # a cosine distance may pass 1
        ys += [*within(y), *y["per_seed"]]
    at_x, x_grid = scale(xs, LEFT, wide - 20)
    at_y, y_grid = scale(ys, BOTTOM, TOP)
    look = looks(summary)
    centres = {}
    crosses = []
    for arm, (x, y) in rows.items():
        colour = colour_of(look[arm])
        centres[arm] = at_x(x["mean"]), at_y(y["mean"])
        u, v = centres[arm]
        crosses += svg_cross(u, v, map(at_x, within(x, 2.0)), map(at_y, within(y)), colour)
        crosses += svg_seeds(map(at_x, x["per_seed"]), map(at_y, y["per_seed"]), colour)
    marks = [pareto_line(summary, centres), *crosses, *svg_arms(summary, centres, look, wide)]
    note = "bars: 95% interval; faint: seeds; dashed: Pareto front; joined: one method's knob"
    return svg_page("Quality against diversity", note, "semantic diversity of a post's drafts",
                    "share of valid drafts", x_grid, y_grid, wide - 20, marks, wide)


def pareto_line(summary, centres):
    """The Pareto front in steps: more diversity, less quality."""
    front = []
    edge = LEFT
    for x, y in sorted(centres[arm] for arm in summary["pareto"]):
        front += [(edge, y), (x, y)]
        edge = x
    return svg_line([*front, (edge, BOTTOM)], "#999", 'stroke-width="1.5" stroke-dasharray="5 4"')


def svg_arms(summary, centres, look, wide):
    """The arms at {arm: (x, y)}: a line through the points of one method in the order of its knob,
    marks, and names; where there are many arms one name a method."""
    methods = {}                             # of each method the last arm
    places = knobs(summary)
    for arm in centres:
        method, _ = places[arm]
        methods[method] = arm
    marks = []
    for method, line in curves_of(centres, summary).items():
        marks.append(svg_line(line, colour_of(look[methods[method]]), 'stroke-width="1"'))
    names = {arm: arm for arm in centres}
    if len(centres) > MANY:
        names = {}
        for method, arm in methods.items():
            names[method if method in centres else arm] = method
    return marks + named(centres, wide, look, names)


# ---- One method over its own knob ----------------------------------------------------------------

def knobs(summary):
    """{arm: (METHOD, place)} of arms named METHOD@KNOB: the place is the number in KNOB, METHOD
    itself stands first, or at its own steps where KNOB is the others' steps; where temperatures
    differ, that is the place of all."""
    arms = summary["arms"]
    found = {}
    temperatures = {}                        # method -> those of its arms
    by_steps = {}                            # method -> is KNOB the steps, in all its arms?
    for arm, entry in arms.items():
        method, place = method_and_knob(arm, arms)
        found[arm] = method, place
        temperatures.setdefault(method, set()).add(entry.get("temperature"))
        if arm != method:
            by_steps[method] = by_steps.get(method, True) and place == entry.get("steps")
    for method, yes in by_steps.items():
        own_steps = arms.get(method, {}).get("steps")
        if yes and own_steps:
            found[method] = method, own_steps
    for arm, (method, place) in found.items():
        if len(temperatures[method]) > 1:
            found[arm] = method, arms[arm]["temperature"]
    return found


def method_and_knob(arm, arms):
    """(METHOD, the number in KNOB) of an arm METHOD@KNOB; (arm, -inf) of any other."""
    if any(other.rpartition("@")[0] == arm for other in arms):
        return arm, -math.inf                # others are points of its curve
    method = arm.rpartition("@")[0]
    number = re.search(r"-?\d+\.?\d*(e-?\d+)?", arm[len(method):]) if method else None
    if number is None:                       # lora@beams: no point of a curve
        return arm, -math.inf
    return method, float(number[0])


def curves_of(points, summary):
    """{arm: point} -> {METHOD: its arms' points, in the order of their knob}, of two or more."""
    joined = {}
    places = knobs(summary)
    for arm, point in points.items():
        method, place = places[arm]
        joined.setdefault(method, []).append((place, point))
    curves = {}
    for method, line in joined.items():
        if len(line) > 1:
            curves[method] = [point for _, point in sorted(line)]
    return curves


def looks(summary):
    """{arm: number of its colour and mark}: the points of one method share them."""
    numbers = {}
    look = {}
    for arm, (method, _) in knobs(summary).items():
        look[arm] = numbers.setdefault(method, len(numbers))
    return look


# ---- Training ------------------------------------------------------------------------------------

def curve_file(curve):
    return f"curve_{curve['stage']}_{curve['name']}.svg"


def curve_title(curve):
    stage = "GRPO" if curve["stage"] == "grpo" else "training before GRPO"
    return f"{stage}: {CURVES[curve['name']]}"


def draw_curve(curve, order, wide=WIDE):
    """One entry of summary["curves"] -> SVG over steps: a line an arm, its band the range of seeds;
    colours and marks by the arm's place in `order`."""
    lines = curve["arms"]
    right = wide - 180
    steps = [0]
    ends = []
    for line in lines.values():
        steps += line["steps"]
        ends += line["low"] + line["high"]
    at_x, x_grid = scale(steps, LEFT, right)
    at_y, y_grid = scale(ends, BOTTOM, TOP)
    gap = min(17, (BOTTOM - TOP) / len(lines))
    opacity = min(0.15, 0.3 / len(lines))
    marks = []
    for row, (arm, line) in enumerate(lines.items()):
        i = order.index(arm)
        y = TOP + 8 + row * gap
        xs = list(map(at_x, line["steps"]))
        means = list(map(at_y, line["mean"]))
        lows = map(at_y, line["low"])
        highs = map(at_y, line["high"])
        marks += [svg_band(xs, lows, highs, colour_of(i), opacity),
                  svg_line(zip(xs, means), colour_of(i), 'stroke-width="1.8"'),
                  svg_marker(i, xs[-1], means[-1]), svg_marker(i, right + 22, y),
                  svg_text(right + 32, y + 4, shortened(arm, 23))]
    note = "mean over seeds, averaged over neighbouring steps; bands: the range of seeds"
    return svg_page(curve_title(curve), note, "step", CURVES[curve["name"]], x_grid, y_grid, right,
                    marks, wide)
