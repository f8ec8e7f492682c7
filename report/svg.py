"""Plain SVG, so that the report needs no plotting package: scales, lines, marks, names, a page."""

import math
import textwrap
from html import escape

from support.files import printable


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito

LEFT = 64                                    # the plotting area, in pixels
TOP = 62
BOTTOM = 384

WIDE = 720
NARROW = 440                                 # for phones, on the page alone

HEIGHT = 440

CENTRED = 'text-anchor="middle"'


# ---- Scales --------------------------------------------------------------------------------------

def scale(values, first, last):
    """-> (function from a value to its pixel, grid [(pixel, label), ...] on round numbers)."""
    low = min(values)
    high = max(max(values), low + 0.02)
    power = 10 ** math.floor(math.log10((high - low) / 5))
    for multiple in (1, 2, 5, 10):
        step = multiple * power
        if step >= (high - low) / 5:
            break
    start = math.floor(low / step)
    end = math.ceil(high / step)
    ticks = [round(i * step, 9) for i in range(start, end + 1)]

    def pixel(value):
        return first + (last - first) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    return pixel, [(pixel(tick), f"{tick:g}") for tick in ticks]


def within(row, most=1.0):
    """The interval as it is drawn: no further than the metric can go, from 0 to `most`."""
    return max(row["low"], 0.0), min(row["high"], most)


# ---- Marks ---------------------------------------------------------------------------------------

def svg_text(x, y, words, style=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(printable(words))}</text>'


def svg_line(points, colour, style=""):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline fill="none" stroke="{colour}" {style} points="{path}"/>'


def svg_band(xs, lows, highs, colour, opacity):
    edge = list(zip(xs, highs))
    edge += reversed(list(zip(xs, lows)))
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
    return f'<polygon fill="{colour}" opacity="{opacity:.2f}" points="{path}"/>'


def colour_of(i):
    return COLOURS[i % 7]


def svg_marker(i, x, y):
    """Arm i: one of 7 colours and 3 shapes (circle, square, diamond), so 21 arms differ."""
    shape = i % 3
    angle = 45 if shape == 2 else 0
    radius = 4.5 if shape == 0 else 1
    box = f'x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" rx="{radius}"'
    turn = f"rotate({angle} {x:.1f} {y:.1f})"
    return f'<rect {box} fill="{colour_of(i)}" stroke="#fff" transform="{turn}"/>'


def svg_seeds(xs, ys, colour):
    """Faint dots at the seeds."""
    dots = []
    for x, y in zip(xs, ys):
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}" opacity="0.35"/>')
    return dots


def svg_cross(x, y, across, up, colour):
    """The intervals of a point, in pixels: (left, right) and (low, high)."""
    left, right = across
    low, high = up
    return [svg_line([(left, y), (right, y)], colour, 'opacity="0.5"'),
            svg_line([(x, low), (x, high)], colour, 'opacity="0.5"')]


# ---- Names ---------------------------------------------------------------------------------------

def shortened(name, most):
    """A name of fewer than `most` characters."""
    return name if len(name) < most else name[:most - 2] + "…"


def name_places(heights):
    """{name: y of its line's end} -> {name: y of the name}, in the order of the ends and a line
    apart: pushed down, then back up into the frame."""
    order = sorted(heights, key=heights.get)
    gap = min(17, (BOTTOM - TOP) / len(order))
    places = {}
    lowest = TOP                             # the highest place that is free
    for name in order:
        places[name] = max(heights[name], lowest)
        lowest = places[name] + gap
    for i, name in enumerate(reversed(order)):
        places[name] = min(places[name], BOTTOM - i * gap)
    return places


def named(centres, wide, look, names):
    """Markers at {arm: (x, y)} and the names of some, {arm: name}, each at the nearest place inside
    the frame that is free."""
    taken = []                               # boxes that no name may cover
    marks = []
    for arm, (x, y) in centres.items():
        taken.append((x - 6, y - 6, x + 6, y + 6))
        marks.append(svg_marker(look[arm], x, y))
    offsets = [(dx, dy) for dy in range(-120, 121, 6) for dx in (10, -10)]
    offsets.sort(key=lambda offset: abs(offset[1] + 9) - offset[0] / 5)
    for arm, name in names.items():
        x, y = centres[arm]
        name = shortened(name, 31)
        for dx, dy in offsets:
            box = name_box(x + dx, y + dy, name, dx < 0)
            if inside(box, wide) and not any(overlap(box, other) for other in taken):
                break
        taken.append(box)
        if abs(dy) > 15:
            marks.append(svg_line([(x, y), (x + dx, y + dy)], "#999", 'stroke-width="0.8"'))
        anchor = "end" if dx < 0 else "start"
        halo = f'stroke="#fff" stroke-width="3" paint-order="stroke" text-anchor="{anchor}"'
        marks.append(svg_text(x + dx, y + dy + 4, name, halo))
    return marks


def name_box(x, y, name, to_the_left):
    """(left, top, right, bottom) of a name written at (x, y)."""
    width = 7 * len(name)
    left = x - width if to_the_left else x
    return left, y - 7, left + width, y + 7


def inside(box, wide):
    left, top, right, bottom = box
    return LEFT < left and right < wide - 8 and TOP < top and bottom < BOTTOM


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# ---- The whole picture ---------------------------------------------------------------------------

def svg_page(title, note, x_label, y_label, x_grid, y_grid, right, marks, wide=WIDE):
    """The whole picture: white ground, titles, grid, then the marks. Titles that are too long for
    the width are set in lines, and the picture grows upwards by these."""
    head, height = heading(title, note, wide)
    over = height - 40
    top = -max(over, 0)
    tall = HEIGHT + max(over, 0)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {wide} {tall}" '
           f'width="{wide}" height="{tall}"',
           ' font-family="sans-serif" font-size="12" fill="#333" role="img">',
           f'<title>{escape(title)}</title>',
           f'<rect y="{top}" width="{wide}" height="{tall}" rx="6" fill="#fff"/>', *head,
           svg_text((LEFT + right) / 2, 427, x_label, CENTRED),
           svg_text(0, 0, y_label, f'{CENTRED} transform="translate(18 223) rotate(-90)"')]
    for x, label in x_grid:
        out.append(svg_line([(x, TOP), (x, BOTTOM)], "#eee"))
        out.append(svg_text(x, 403, label, CENTRED))
    for y, label in y_grid:
        out.append(svg_line([(LEFT, y), (right, y)], "#eee"))
        out.append(svg_text(LEFT - 8, y + 4, label, 'text-anchor="end"'))
    return "\n".join([*out, *marks, "</svg>"]) + "\n"


def heading(title, note, wide):
    """(texts of title and note from the last line up, their height): the last line stands at 45."""
    left = LEFT if wide == WIDE else 12
    lines = [(words, 'font-size="16"', 21) for words in textwrap.wrap(title, (wide - left) // 9)]
    lines += [(words, 'fill="#666"', 19) for words in textwrap.wrap(note, (wide - left) // 7)]
    texts = []
    height = 0
    for words, style, own_height in reversed(lines):
        texts.append(svg_text(left, 45 - height, words, style))
        height += own_height
    return texts, height
