"""Which completions share a row of tokens, and which rows a batch: plain lists, see model.pack."""

from dataclasses import dataclass, field


@dataclass
class PlannedRow:
    """A row before it is a tensor: a prompt, some of its completions with their numbers, and the
    row's length. A completion's last token is only predicted, so it is not part of the row."""
    prompt: list
    length: int
    member: int = 0
    indices: list = field(default_factory=list)
    completions: list = field(default_factory=list)

    def add(self, index, completion):
        self.indices.append(index)
        self.completions.append(completion)
        self.length += len(completion) - 1


def rounded_up(n, unit):
    """n rounded up to a multiple of `unit`."""
    return -(-n // unit) * unit


def plan_batches(groups, tokens_per_batch, members=1, unit=1):
    """Groups (prompt ids, [completion ids, ...]) -> lists of PlannedRows: the rows of one batch
    of at most `tokens_per_batch` padded tokens, the longest row first. A batch is as wide as its
    longest row, rounded up to a multiple of `unit`.

    Rows are sorted by length, so that those of a batch are of similar length."""
    rows = []
    first = 0                # the number of the prompt's first completion
    for prompt, completions in groups:
        for member in range(min(members, len(completions))):
            rows += split_group(prompt, completions, first, member, members, tokens_per_batch)
        first += len(completions)
    rows.sort(key=lambda row: -row.length)
    batches = []
    start = 0
    while start < len(rows):
        width = rounded_up(rows[start].length, unit)
        count = max(1, tokens_per_batch // width)
        batches.append(rows[start:start + count])
        start += count
    return batches


def split_group(prompt, completions, first, member, members, budget):
    """The planned rows of one member's completions of one prompt: one row, or several where it
    would be too long for the budget (each reads the prompt again)."""
    rows = [PlannedRow(prompt, len(prompt), member)]
    for i in range(member, len(completions), members):
        if rows[-1].completions and rows[-1].length + len(completions[i]) - 1 > budget:
            rows.append(PlannedRow(prompt, len(prompt), member))
        rows[-1].add(first + i, completions[i])
    return rows
