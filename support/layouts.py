"""Shapes of a decoding batch: how large it begins, and the smaller batches that it goes on as."""

import math
import sys
from dataclasses import dataclass

import numpy as np

from support.packing import rounded_up


@dataclass
class Layout:
    """The shape of a batch: `places`, each with `slots` completions at a time and `pages` prompts
    that they belong to."""
    places: int
    slots: int
    pages: int = 1

    @property
    def rows(self):
        return self.places * self.slots

    def cost(self, width):
        """Of a step, in rows that attend to no prompt: a column of a prompt counts as a 4,000th of
        a row, about its part of an 8B's operations and reading. width: columns of a page."""
        return self.rows * (1 + self.pages * width / 4000)


# Rows computed for one needed token where a place has so many pages (100 prompts of 20 completions,
# simulated with lengths of 40 +- 20 tokens, at most 128).
ROWS_PER_TOKEN = {1: 2.3, 2: 1.3, 3: 1.1}


def first_layout(count, k, max_rows, prompt_length):
    """The Layout for `count` prompts of k completions, at most max_rows rows. Where nearly all
    prompts fit, each has a place and some of its completions wait. A place of a batch that takes
    more has several pages: the next prompt's completions take the slots that the last one's
    leave."""
    places = max(1, min(count, max_rows // k))
    if count < 2 * places:
        return Layout(count, min(k, max(1, max_rows // count)))

    slots = min(k, max_rows)

    def cost(pages):
        return ROWS_PER_TOKEN[pages] * Layout(places, slots, pages).cost(prompt_length)
    most = min(3, rounded_up(count, places) // places)
    return Layout(places, slots, min(range(1, most + 1), key=cost))


def fitting(layout, own, prompt, free):
    """The layout, or a smaller one whose keys and values take at most half of the `free` bytes; the
    other half is for training. own, prompt: bytes of a completion's and of a prompt's. Says on
    stderr that fewer rows fit."""
    budget = free // 2
    k = layout.slots
    if layout.places * (k * own + layout.pages * prompt) <= budget:
        return layout
    small = Layout(max(1, min(layout.places, budget // (k * own + prompt))), k)
    if small.places == 1:
        small.slots = max(1, min(k, (budget - prompt) // own))
    if small.rows < layout.rows:
        print(f"decoding: {small.rows} of {layout.rows} completions at a time: a prompt's keys and "
              f"values take {prompt / 2 ** 20:,.1f} MiB, a completion's {own / 2 ** 20:,.1f} MiB, "
              f"and {free / 2 ** 30:.2f} GiB of the device's memory are free (half of it is kept "
              "for training)", file=sys.stderr)
    return small


@dataclass
class Smaller:
    """A smaller batch of the layout, and where its slots (P', w') and pages (P', H') come from,
    counted over the whole old batch, -1 for an idle slot; `page` (P', w'): the slots' pages."""
    layout: Layout
    slots: np.ndarray
    pages: np.ndarray
    page: np.ndarray


def smaller(layout, writing, page, width, most_pages, worth, fixed):
    """The cheapest Smaller batch for the slots that are at work, writing (P, w) with the pages page
    (P, w); None if it costs more than `worth` times what the layout does: copying has a price, too.
    A place may take up to four prompts, so that places are evenly filled; most_pages: there is
    memory for so many. fixed: of sizes that come again, for CUDA graphs: places a power of two,
    rows one below 8, then multiples of 8."""
    if writing.sum() > worth * layout.rows:
        return None
    slots = {}                               # a page, counted over all -> its slots, likewise
    for place, slot in np.argwhere(writing).tolist():
        source = place * layout.pages + int(page[place, slot])
        slots.setdefault(source, []).append(place * layout.slots + slot)
    found = []
    for pages in range(1, min(4, len(slots)) + 1):
        groups = evenly(slots, pages, fixed)
        widest = max(sum(len(slots[p]) for p in group) for group in groups)
        if fixed:
            rows = widest * len(groups)
            widest = (2 ** math.ceil(math.log2(widest)) if rows < 8
                      else rounded_up(widest, max(1, 8 // len(groups))))
        small = Layout(len(groups), widest, pages)
        if small.places * pages <= most_pages and small.rows < layout.rows:
            found.append((small.cost(width), small, groups))
    if not found:
        return None
    cost, small, groups = min(found, key=lambda entry: entry[0])
    return arranged(small, groups, slots) if cost <= worth * layout.cost(width) else None


def evenly(slots, pages, power):
    """Pages with their slots (lists) in groups of at most `pages`, about equally many slots each:
    the page with most slots goes to the group with fewest. As few groups as can be; with `power`
    their number is a power of two."""
    count = rounded_up(len(slots), pages) // pages
    if power:
        count = 2 ** math.ceil(math.log2(count))
    groups = [[] for _ in range(count)]
    filled = [0] * count
    for page in sorted(slots, key=lambda p: -len(slots[p])):
        open_groups = [g for g in range(count) if len(groups[g]) < pages]
        least = min(open_groups, key=lambda g: filled[g])
        groups[least].append(page)
        filled[least] += len(slots[page])
    return groups


def arranged(layout, groups, slots):
    """The groups of pages with their slots as a Smaller batch."""
    out = Smaller(layout, np.full((layout.places, layout.slots), -1),
                  np.zeros((layout.places, layout.pages), np.int64),
                  np.zeros((layout.places, layout.slots), np.int64))
    for place, group in enumerate(groups):
        filled = 0
        for number, source in enumerate(group):
            own = slots[source]
            out.pages[place, number] = source
            out.slots[place, filled:filled + len(own)] = own
            out.page[place, filled:filled + len(own)] = number
            filled += len(own)
    return out
