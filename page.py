"""What a report shows: its pictures, plain SVG, and one HTML page that asks nobody for anything,
with tables, pictures, drafts side by side.

Every text that a model or a file gave is escaped, and its control and direction marks are made
harmless. The stand-alone pictures are drawn for white ground; inside the page a style sheet
gives their few colours other values in dark mode. The script only pages through the posts:
without it all of them are shown."""

import base64
import hashlib
import math
import re
import textwrap
from html import escape

from data import printable
from metrics import near_duplicates

# ---- Pictures: plain SVG, 720 x 440, so that the report needs no plotting package ----------------

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito
LEFT, TOP = 64, 62  # the plotting area, in pixels
BOTTOM, WIDE, NARROW = 384, 720, 440         # NARROW: for phones, on the page alone
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


def scale(values, first, last):
    """-> (function from a value to its pixel, grid [(pixel, label), ...] on round numbers)."""
    low, high = min(values), max(max(values), min(values) + 0.02)
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= (high - low) / 5)
    ticks = [round(i * step, 9) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]

    def pixel(value):
        return first + (last - first) * (value - ticks[0]) / (ticks[-1] - ticks[0])
    return pixel, [(pixel(tick), f"{tick:g}") for tick in ticks]


def svg_text(x, y, words, style=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(printable(words))}</text>'


def svg_line(points, colour, style=""):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline fill="none" stroke="{colour}" {style} points="{path}"/>'


def svg_marker(i, x, y):
    """Arm i: one of 7 colours and 3 shapes (circle, square, diamond), so 21 arms can be
    told apart."""
    turn = f"rotate({i % 3 // 2 * 45} {x:.1f} {y:.1f})"
    box = f'x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" rx="{(4.5, 1, 1)[i % 3]}"'
    return f'<rect {box} fill="{COLOURS[i % 7]}" stroke="#fff" transform="{turn}"/>'


def svg_seeds(places, colour):
    dot = '<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="{}" opacity="0.35"/>'
    return [dot.format(x, y, colour) for x, y in places]


def svg_cross(x, y, across, up, colour):
    """The intervals of a point, in pixels: (left, right) and (low, high)."""
    left, right = across
    low, high = up
    return [svg_line([(left, y), (right, y)], colour, 'opacity="0.5"'),
            svg_line([(x, low), (x, high)], colour, 'opacity="0.5"')]


def svg_page(title, note, x_label, y_label, x_grid, y_grid, right, marks, wide=WIDE):
    """The whole picture: white ground, titles, grid, then the marks. Titles that are too long for
    the width are set in lines, and the picture grows upwards by these."""
    middle, left = 'text-anchor="middle"', LEFT if wide == WIDE else 12
    said = [(words, 'font-size="16"', 21) for words in textwrap.wrap(title, (wide - left) // 9)]
    said += [(words, 'fill="#666"', 19) for words in textwrap.wrap(note, (wide - left) // 7)]
    over = sum(height for *_, height in said) - 40
    head = []
    for words, style, height in reversed(said):
        head.append(svg_text(left, 45 - sum(said[-1 - n][2] for n in range(len(head))), words,
                             style))
    top, tall = -max(over, 0), 440 + max(over, 0)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {wide} {tall}" '
           f'width="{wide}" height="{tall}"',
           ' font-family="sans-serif" font-size="12" fill="#333" role="img">',
           f'<title>{escape(title)}</title>',
           f'<rect y="{top}" width="{wide}" height="{tall}" rx="6" fill="#fff"/>', *head,
           svg_text((LEFT + right) / 2, 427, x_label, middle),
           svg_text(0, 0, y_label, f'{middle} transform="translate(18 223) rotate(-90)"')]
    for x, label in x_grid:
        out += [svg_line([(x, TOP), (x, BOTTOM)], "#eee"), svg_text(x, 403, label, middle)]
    for y, label in y_grid:
        out += [svg_line([(LEFT, y), (right, y)], "#eee"),
                svg_text(LEFT - 8, y + 4, label, 'text-anchor="end"')]
    return "\n".join([*out, *marks, "</svg>"]) + "\n"


def within(row, most=1.0):
    """The interval as it is drawn: no further than the metric can go, from 0 to `most`."""
    return max(row["low"], 0.0), min(row["high"], most)


def svg_band(xs, lows, highs, colour, opacity):
    edge = [*zip(xs, highs), *reversed([*zip(xs, lows)])]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
    return f'<polygon fill="{colour}" opacity="{opacity:.2f}" points="{path}"/>'


def draw_pass_at_k(summary, wide=WIDE):
    """summary -> SVG of Pass@k against k (log), a line an arm, its band the interval, names at the
    ends; of an arm with one k alone a point with whiskers."""
    ks, right = summary["ks"], wide - 180
    limits = summary["limits"]
    if summary["refused"]:
        return svg_page("Pass@k", summary["refused"], "", "", [], [], right, [], wide)
    lines = {}                               # arm -> [(k, row)]: a joint decoder has one k alone
    for arm, a in summary["arms"].items():
        line = [(k, a["metrics"][f"pass@{k}"]) for k in ks]
        line = [(k, row) for k, row in line if row["mean"] is not None]
        lines |= {arm: line} if line else {}
    if not lines:
        return svg_page("Pass@k", "No arm has it.", "", "", [], [], right, [], wide)
    ends = [end for line in lines.values() for _, row in line for end in within(row)]
    ends += [limits[str(k)][kind] for k in ks if limits for kind in ("independent", "joint")]
    at_y, y_grid = scale(ends, BOTTOM, TOP)
    widest = math.log(max(ks[-1], 2))
    at_x = {k: LEFT + 24 + (right - LEFT - 48) * math.log(k) / widest for k in ks}
    heights = {arm: at_y(line[-1][1]["mean"]) for arm, line in lines.items()}
    tops = {kind: [(at_x[k], at_y(limits[str(k)][kind])) for k in ks]
            for kind in ("independent", "joint") if limits}
    places, marks = name_places(heights | {(k,): line[-1][1] for k, line in tops.items()}), []
    for kind, line in tops.items():
        dashed = f'stroke-width="1.5" stroke-dasharray="{"2 4" if kind == "joint" else "6 4"}"'
        y = places[kind,]
        marks += [svg_line(line, "#666", dashed), svg_text(right + 32, y + 4, f"limit, {kind}"),
                  svg_line([(right + 4, y), (right + 28, y)], "#666", dashed)]
    fill = min(0.16, 0.8 / len(lines))
    for i, (arm, line) in enumerate(lines.items()):
        points = [(at_x[k], at_y(row["mean"])) for k, row in line]
        xs, lows, highs = zip(*((at_x[k], *map(at_y, within(row))) for k, row in line))
        colour, end = COLOURS[i % 7], points[-1][1]
        if len(line) > 1:
            marks.append(svg_band(xs, lows, highs, colour, fill))
        else:
            marks.append(svg_line([(xs[0], lows[0]), (xs[0], highs[0])], colour))
        lead = [(points[-1][0] + 7, end), (right + 2, end), (right + 16, places[arm])]
        marks += [svg_line(points, colour, 'stroke-width="2"'),
                  *(svg_marker(i, *point) for point in points),
                  svg_line(lead, colour, 'stroke-width="0.8"'),
                  svg_marker(i, right + 22, places[arm]),
                  svg_text(right + 32, places[arm] + 4, arm if len(arm) < 23 else arm[:21] + "…")]
    note = f"mean over {summary['posts']} posts and all seeds; bands: 95% interval over both"
    note += "; dashed: the best that drafts can reach" * bool(limits)
    x_grid = [(x, str(k)) for k, x in at_x.items()]
    return svg_page("Pass@k: did any of k drafts please?", note, "k, drafts shown (log scale)",
                    "Pass@k", x_grid, y_grid, right, marks, wide)


def name_places(heights):
    """{name: y of its line's end} -> {name: y of the name}, in the order of the ends and a line
    apart: pushed down, then back up into the frame."""
    order = sorted(heights, key=heights.get)
    gap, places = min(17, (BOTTOM - TOP) / len(order)), {}
    for i, name in enumerate(order):
        places[name] = max(heights[name], places[order[i - 1]] + gap if i else TOP)
    for i, name in enumerate(reversed(order)):
        places[name] = min(places[name], BOTTOM - i * gap)
    return places


def named(centres, wide, look, names):
    """Markers at {arm: (x, y)} and the names of some, {arm: name}, each at the nearest place inside
    the frame that is free."""
    # Boxes that no name may cover.
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in centres.values()]
    offsets = sorted(((dx, dy) for dy in range(-120, 121, 6) for dx in (10, -10)),
                     key=lambda offset: abs(offset[1] + 9) - offset[0] / 5)
    marks = [svg_marker(look[arm], *place) for arm, place in centres.items()]
    for arm, name in names.items():
        (x, y), name = centres[arm], name if len(name) < 31 else name[:29] + "…"
        for dx, dy in offsets:
            left = x + dx - (7 * len(name) if dx < 0 else 0)
            box = (left, y + dy - 7, left + 7 * len(name), y + dy + 7)
            inside = LEFT < box[0] and box[2] < wide - 8 and TOP < box[1] and box[3] < BOTTOM
            if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3]
                                  and t[1] < box[3] for t in taken):
                break
        taken.append(box)
        if abs(dy) > 15:
            marks.append(svg_line([(x, y), (x + dx, y + dy)], "#999", 'stroke-width="0.8"'))
        anchor = "end" if dx < 0 else "start"
        halo = f'stroke="#fff" stroke-width="3" paint-order="stroke" text-anchor="{anchor}"'
        marks.append(svg_text(x + dx, y + dy + 4, name, halo))
    return marks


def draw_pass1_passk(summary, k, limit, wide=WIDE):
    """summary -> SVG of Pass@1 against Pass@k under the limit's front: arms with intervals, faint
    dots their seeds, dotted up to the limit at their own share of valid drafts; arms named
    BASE@KNOB are joined to a curve, a method over its own knob."""
    rows = {arm: (a["metrics"]["pass@1"], a["metrics"][f"pass@{k}"])
            for arm, a in summary["arms"].items()}
    rows = {arm: both for arm, both in rows.items() if None not in [x["mean"] for x in both]}
    own = {arm: summary["arms"][arm]["limits"][str(k)] for arm in rows}
    xs, ys = ([value for both in rows.values() for value in (
        *within(both[axis]), *both[axis]["per_seed"])] for axis in (0, 1))
    at_x, x_grid = scale(xs + [x for x, _ in limit], LEFT, wide - 20)
    at_y, y_grid = scale([*ys, *own.values(), *(y for _, y in limit)], BOTTOM, TOP)
    line = [(at_x(x), at_y(y)) for x, y in limit]
    marks = [svg_line(line, "#666", 'stroke-width="1.5" stroke-dasharray="6 4"')]
    centres, look = {}, looks(summary)
    for arm, (x, y) in rows.items():
        u, v = centres[arm] = at_x(x["mean"]), at_y(y["mean"])
        colour = COLOURS[look[arm] % 7]
        marks += svg_cross(u, v, map(at_x, within(x)), map(at_y, within(y)), colour)
        top = at_y(own[arm])
        marks += [svg_line([(u, v), (u, top)], colour, 'stroke-dasharray="1 4"'),
                  svg_line([(u - 4, top), (u + 4, top)], colour)] if len(rows) <= MANY else []
        marks += svg_seeds(zip(map(at_x, x["per_seed"]), map(at_y, y["per_seed"])), colour)
    note = ("bars: 95% interval; faint: seeds; joined: one method's knob; dashed: the limit of "
            "independent, always valid drafts")
    if len(rows) <= MANY:
        note += "; dotted: up to the limit at the arm's own share of valid drafts"
    title = {5: "One draft against five", 10: "One draft against ten"}[k]
    return svg_page(title, note, "Pass@1 for the readers", f"Pass@{k} for the readers", x_grid,
                    y_grid, wide - 20, marks + svg_arms(summary, centres, look, wide), wide)


def draw_quality_diversity(summary, wide=WIDE):
    """summary -> SVG of valid share against semantic diversity: arms, intervals, seeds,
    Pareto front."""
    rows = {arm: (a["metrics"]["semantic"], a["metrics"]["valid"])
            for arm, a in summary["arms"].items()}
    across, up = zip(*rows.values())         # a cosine distance may pass 1
    xs = [value for row in across for value in (*within(row, 2.0), *row["per_seed"])]
    ys = [value for row in up for value in (*within(row), *row["per_seed"])]
    (at_x, x_grid), (at_y, y_grid) = scale(xs, LEFT, wide - 20), scale(ys, BOTTOM, TOP)
    centres = {arm: (at_x(x["mean"]), at_y(y["mean"])) for arm, (x, y) in rows.items()}
    front, edge = [], LEFT
    # More diversity, less quality: steps.
    for x, y in sorted(centres[arm] for arm in summary["pareto"]):
        front, edge = front + [(edge, y), (x, y)], x
    dashed = 'stroke-width="1.5" stroke-dasharray="5 4"'
    marks, look = [svg_line([*front, (edge, BOTTOM)], "#999", dashed)], looks(summary)
    for arm, (x, y) in rows.items():
        bars, colour = (map(at_x, within(x, 2.0)), map(at_y, within(y))), COLOURS[look[arm] % 7]
        marks += svg_cross(*centres[arm], *bars, colour)
        marks += svg_seeds(zip(map(at_x, x["per_seed"]), map(at_y, y["per_seed"])), colour)
    marks += svg_arms(summary, centres, look, wide)
    note = "bars: 95% interval; faint: seeds; dashed: Pareto front; joined: one method's knob"
    return svg_page("Quality against diversity", note, "semantic diversity of a post's drafts",
                    "share of valid drafts", x_grid, y_grid, wide - 20, marks, wide)


def knobs(summary):
    """{arm: (METHOD, place)} of arms named METHOD@KNOB: the place is the number in KNOB, METHOD
    itself stands first, or at its own steps where KNOB is the others' steps; where temperatures
    differ, that is the place of all."""
    arms, out, heats, stopped = summary["arms"], {}, {}, {}
    for arm in arms:
        method = arm if any(a.rpartition("@")[0] == arm for a in arms) else arm.rpartition("@")[0]
        number = re.search(r"-?\d+\.?\d*(e-?\d+)?", arm[len(method):]) if method else None
        method = method if number or method == arm else arm  # lora@beams: no point of a curve
        out[arm] = method, float(number[0]) if number else -math.inf
        heats.setdefault(out[arm][0], set()).add(arms[arm].get("temperature"))
        if arm != method:
            stopped[method] = stopped.get(method, True) and out[arm][1] == arms[arm].get("steps")
    for method in (m for m, yes in stopped.items() if yes and arms.get(m, {}).get("steps")):
        out[method] = method, arms[method]["steps"]
    return {arm: (method, arms[arm]["temperature"] if len(heats[method]) > 1 else place)
            for arm, (method, place) in out.items()}


def curves_of(points, summary):
    """{arm: point} -> {METHOD: its arms' points, in the order of their knob}, of two or more."""
    joined, places = {}, knobs(summary)
    for arm, point in points.items():
        joined.setdefault(places[arm][0], []).append((places[arm][1], point))
    return {name: [point for _, point in sorted(line)]
            for name, line in joined.items() if len(line) > 1}


def looks(summary):
    """{arm: number of its colour and mark}: the points of one method share them."""
    methods = {arm: method for arm, (method, _) in knobs(summary).items()}
    order = list(dict.fromkeys(methods.values()))
    return {arm: order.index(method) for arm, method in methods.items()}


def svg_arms(summary, centres, look, wide):
    """The arms at {arm: (x, y)}: a line through the points of one method in the order of its knob,
    marks, and names; where there are many arms one name a method."""
    places = knobs(summary)
    last = {places[arm][0]: arm for arm in centres}  # of each method
    marks = [svg_line(line, COLOURS[look[last[method]] % 7], 'stroke-width="1"')
             for method, line in curves_of(centres, summary).items()]
    names = {arm: arm for arm in centres}
    if len(centres) > MANY:
        names = {method if method in centres else arm: method for method, arm in last.items()}
    return marks + named(centres, wide, look, names)


def curve_file(curve):
    return f"curve_{curve['stage']}_{curve['name']}.svg"


def curve_title(curve):
    stage = "GRPO" if curve["stage"] == "grpo" else "training before GRPO"
    return f"{stage}: {CURVES[curve['name']]}"


def draw_curve(curve, order, wide=WIDE):
    """One entry of summary["curves"] -> SVG over steps: a line an arm, its band the range of seeds;
    colours and marks by the arm's place in `order`."""
    lines, right = curve["arms"], wide - 180
    steps = [step for line in lines.values() for step in line["steps"]]
    ends = [v for line in lines.values() for v in (*line["low"], *line["high"])]
    (at_x, x_grid), (at_y, y_grid) = scale([0, *steps], LEFT, right), scale(ends, BOTTOM, TOP)
    marks = []
    gap, fill = min(17, (BOTTOM - TOP) / len(lines)), min(0.15, 0.3 / len(lines))
    for row, (arm, line) in enumerate(lines.items()):
        i, y = order.index(arm), TOP + 8 + row * gap
        xs = [at_x(step) for step in line["steps"]]
        band = map(at_y, line["low"]), map(at_y, line["high"])
        marks += [svg_band(xs, *band, COLOURS[i % 7], fill),
                  svg_line([*zip(xs, map(at_y, line["mean"]))], COLOURS[i % 7],
                           'stroke-width="1.8"'),
                  svg_marker(i, xs[-1], at_y(line["mean"][-1])), svg_marker(i, right + 22, y),
                  svg_text(right + 32, y + 4, arm if len(arm) < 23 else arm[:21] + "…")]
    note = "mean over seeds, averaged over neighbouring steps; bands: the range of seeds"
    return svg_page(curve_title(curve), note, "step", CURVES[curve["name"]], x_grid, y_grid, right,
                    marks, wide)


def draw_all(summary, wide):
    """{file name: SVG} of every picture that the summary has, in the page's order."""
    out = {"pass_at_k.svg": draw_pass_at_k(summary, wide),
           "quality_diversity.svg": draw_quality_diversity(summary, wide)}
    for name, (k, key) in FRONTS.items():
        if key in summary:
            out[name] = draw_pass1_passk(summary, k, summary[key], wide)
    order = list(summary["arms"])
    return out | {curve_file(curve): draw_curve(curve, order, wide) for curve in summary["curves"]}


# ---- The page ------------------------------------------------------------------------------------

STYLE = """
:root{--paper:#fff;--ink:#1d2228;--soft:#5a636d;--grid:#e4e7ea;--card:#f6f7f8;--good:#00714f}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e6e8ea;--soft:#a3abb3;
--grid:#333a41;--card:#1e2328;--good:#4cc79b}}
:root{color-scheme:light dark}*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:16px;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2}h2{font-size:1.2rem;margin-top:2.2em}
.question{font-size:1.15rem;max-width:46em}small,.soft{color:var(--soft)}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 8px;text-align:right;border-bottom:1px solid var(--grid);vertical-align:top}
th:first-child,td:first-child{text-align:left;font-weight:600}
.scroll{overflow-x:auto}.scroll th,.scroll td{overflow-wrap:normal}
figure{margin:1em 0;border:1px solid var(--grid);border-radius:8px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:12px}
.figures figure{margin:0}
svg{display:block;width:100%;height:auto;max-width:860px;margin:auto;fill:var(--ink)}
svg [fill="#fff"]{fill:var(--paper)}svg [stroke="#fff"]{stroke:var(--paper)}
svg [fill="#666"]{fill:var(--soft)}svg [stroke="#666"],svg [stroke="#999"]{stroke:var(--soft)}
svg [stroke="#eee"]{stroke:var(--grid)}
svg [fill="#000000"]{fill:var(--ink)}svg [stroke="#000000"]{stroke:var(--ink)}
.post blockquote{margin:.4em 0 1em;padding:.6em .9em;background:var(--card);border-radius:8px;
font-weight:600}
.sets{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr));gap:12px}
.set{border:1px solid var(--grid);border-radius:8px;padding:8px 12px}
.set h4{margin:0 0 4px}.set ol{margin:0;padding-left:1.5em}.set li{margin:3px 0}
.set li.right::marker{color:var(--good);font-weight:700}
.near{color:var(--soft)}.near bdi{text-decoration:underline dotted}
.tag{font-size:.75rem;white-space:nowrap;color:var(--soft)}.right .tag.ok{color:var(--good)}
nav{display:flex;gap:10px;align-items:center;margin:.6em 0}
button{font:inherit;padding:6px 16px;min-height:40px;border:1px solid var(--soft);
border-radius:8px;background:var(--card);color:var(--ink)}[hidden]{display:none!important}
.narrow{display:none}
@media(max-width:640px){.wide{display:none}.narrow{display:block}
table,tbody,tr,td{display:block}thead{display:none}
tr{border:1px solid var(--grid);border-radius:8px;margin:8px 0;padding:4px 0}
td{display:flex;justify-content:space-between;gap:12px;border:0;padding:2px 10px}
td::before{content:attr(data-name);color:var(--soft);font-weight:400;text-align:left;flex:none}
td:first-child::before{content:none}}
@media print{:root{--paper:#fff;--ink:#000;--soft:#444;--grid:#ccc;--card:#fff;--good:#00714f}
@page{size:A4 landscape;margin:12mm}
body{max-width:none;padding:0;font-size:10pt}nav{display:none}
.post[hidden]{display:block!important}figure,.set,tr{break-inside:avoid}
h2,h4,blockquote{break-after:avoid}h2{margin-top:1.4em}table{font-size:7.5pt}th,td{padding:2px 4px}
.scroll{overflow:visible}.figures,.sets{gap:8px}.figures{grid-template-columns:1fr 1fr}
.sets{grid-template-columns:repeat(4,1fr);font-size:8pt}.post blockquote{margin:.2em 0 .5em}}
"""
SCRIPT = """
const posts=[...document.querySelectorAll('.post')],nav=document.querySelector('nav');let at=0;
function show(i){at=(i+posts.length)%posts.length;posts.forEach((p,n)=>p.hidden=n!==at);
nav.querySelector('span').textContent=`${at+1} of ${posts.length}`}
if(nav&&posts.length){nav.hidden=false;const[back,on]=nav.querySelectorAll('button');
back.onclick=()=>show(at-1);on.onclick=()=>show(at+1);show(0)}
"""
QUESTION = ("Does training that rewards diverse drafts make it likelier that one of the k drafts "
            "shown pleases the reader, without making the single draft worse?")


def plain(text):
    """A text for HTML, in content and in quoted attributes alike: nothing in it is markup."""
    return escape(printable(str(text)), quote=True)


def measured_as(summary):
    """How the drafts were written and scored: settings that are off or not there are not named."""
    told = {name: value for name, value in summary["measured"].items()
            if value is not None and value is not False and not isinstance(value, (dict, list))}
    said = ", ".join(f"{name} {str(value).removeprefix('torch.')}" for name, value in told.items())
    return f"Measured on {summary['posts']} posts: {said}"


def html_page(summary, tables, notes, pictures, samples):
    """The whole page as a text. tables: [(title, header, rows)]; pictures: [(SVG, the same
    for phones), ..], drawn by this program;
    samples: [{"seed", "post", "sets": {arm: [(draft, is it right), ..]}}]."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
              "base-uri 'none'; form-action 'none'")
    head = ['<!DOCTYPE html>', '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Polychromic LoRA: report</title><style>{STYLE}</style></head><body><main>"]
    body = ["<h1>Drafts that differ: the report</h1>", f'<p class="question">{QUESTION}</p>',
            f'<p class="soft">{plain(measured_as(summary))}.</p>']
    tables = [html_table(*table) for table in tables]
    body += [tables[0], '<h2>Pictures</h2><div class="figures">',
             *(f'<figure><div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>'
               for wide, narrow in pictures), "</div>"]
    body += tables[1:]
    body += ["<h2>Notes</h2><ul>", *(f"<li>{plain(note)}</li>" for note in notes), "</ul>"]
    body += ["<h2>The runs</h2><ul>"]
    for arm, a in summary["arms"].items():
        runs = ", ".join(f"{run} (seed {seed})" for run, seed in zip(a["runs"], a["seeds"]))
        body.append(f"<li><b><bdi>{plain(arm)}</bdi></b>: <bdi>{plain(runs)}</bdi></li>")
    body += ["</ul>", *drafts_part(samples)]
    return "\n".join([*head, *body, f"</main><script>{SCRIPT}</script></body></html>"]) + "\n"


def html_table(title, header, rows):
    names = [plain(name) for name in header]
    out = [f'<h2>{plain(title)}</h2><div class="scroll"><table><thead><tr>',
           *(f'<th scope="col">{name}</th>' for name in names), "</tr></thead><tbody>"]
    for row in rows:
        row = [word.replace(" p ", " p\xa0") for word in row]                   # one line
        cells = (f'<td data-name="{name}"><bdi>{plain(word)}</bdi></td>'
                 for name, word in zip(names, row))
        out.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*out, "</tbody></table></div>"])


def drafts_part(samples):
    """The drafts of each run for the same posts, a section a post."""
    if not samples:
        return []
    out = ["<h2>Drafts side by side</h2>",
           '<p class="soft">The first drafts of each run for the first posts by their id, nothing '
           "chosen by hand. &#10003;: right, or passing. &#8776; n: shares nearly all its words "
           "with draft n of the same set.</p>",
           '<nav hidden><button type="button">Back</button><button type="button">Next</button> '
           "<span></span></nav>"]
    for sample in samples:
        out += [f'<section class="post"><small>seed {sample["seed"]}</small>',
                f'<blockquote dir="auto">{plain(sample["post"])}</blockquote><div class="sets">']
        for arm, drafts in sample["sets"].items():
            out.append(f'<div class="set"><h4><bdi>{plain(arm)}</bdi></h4><ol>')
            near = near_duplicates([text for text, _ in drafts])
            out += [draft_item(text, good, same) for (text, good), same in zip(drafts, near)]
            out.append("</ol></div>")
        out.append("</div></section>")
    return out


def draft_item(text, good, same):
    kind = " ".join(["right"] * good + ["near"] * (same is not None))
    tags = ' <span class="tag ok">&#10003;</span>' * good
    if same is not None:
        tags += f' <span class="tag">&#8776; {same + 1}</span>'
    shown = plain(text) if re.search(r"\S", text) else "<i>(empty)</i>"
    return f'<li class="{kind}"><bdi dir="auto">{shown}</bdi>{tags}</li>'
