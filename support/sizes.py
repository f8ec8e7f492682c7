"""The table of docs/PERFORMANCE.md: which flags fit which model on which GPU, by the plan.

    python -m support.sizes            prints it

Data sheets give a card's memory, bf16 products and bandwidth. No GPU has run any of it."""

from types import SimpleNamespace
from typing import NamedTuple

from support import cost
from support.embedders import TOKENS_A_PASS
from support.files import duration
from support.plan import MARGIN, load_for


class Machine(NamedTuple):
    """GPUs of one kind."""
    title: str
    count: int
    gib: float                   # memory of each that a program can take
    products: float              # FLOP/s of dense bf16 products, by the data sheet
    bandwidth: float             # bytes/s of its memory, by the data sheet

    def card(self):
        """The cost.Card: a share of these is attained."""
        return cost.Card(self.title, self.gib, cost.ATTAINED * self.products,
                         cost.ATTAINED * self.bandwidth, cost.LINK)


CONTEXT = 0.7                    # GiB that CUDA and its libraries take before any tensor

MACHINES = (Machine("16 GB (RTX 4080)", 1, 15.6, 97.5e12, 717e9),
            Machine("24 GB (RTX 4090)", 1, 23.5, 165e12, 1008e9),
            Machine("80 GB (H100)", 1, 79.1, 989e12, 3350e9),
            Machine("8 x 80 GB (H100)", 8, 79.1, 989e12, 3350e9))

# What is assumed of the posts; the flags are train.sh's.
PROMPT = 128                     # tokens
REPLY = 32
STEPS = 157                      # of each phase: 2,500 posts, 16 a step

FLAGS = {"batch": 16, "draft_posts": 8, "k": 8, "max_new_tokens": 100, "micro_tokens": 16384,
         "max_rows": 256, "rank": 16, "nf4": False, "shard": False}

# Tried in this order of groups; of those that fit, the fastest is shown.
CHANGES = [{"nf4": nf4, "shard": shard, "micro_tokens": tokens, "max_rows": rows}
           for nf4, shard in ((False, False), (False, True), (True, False))
           for tokens in (16384, 4096, 1024)
           for rows in (256, 64, 16)]


class Fit(NamedTuple):
    """A way to run both phases."""
    flags: str
    gib: float                   # the larger phase's
    seconds: float               # of both phases, plain SFT's steps not counted


def loads_of(c, changes, count, checkpointing):
    """The cost.Loads of an SFT step with D and of a GRPO step."""
    args = SimpleNamespace(**(FLAGS | changes), lam=0, lambda_share=0.3)
    loads = []
    for stage in ("sft", "grpo"):
        load = load_for(stage, args, count, PROMPT, REPLY, checkpointing=checkpointing,
                        adapter=cost.adapter_numbers(c, args.rank), graphs=not args.shard,
                        shards=count if args.shard else 1)
        loads.append(load.embedding(TOKENS_A_PASS))
    return loads


def fits(c, machine):
    """Every Fit of a model on a machine."""
    found = []
    for changes in CHANGES:
        if changes["shard"] and machine.count == 1:
            continue
        for checkpointing in (False, True):
            loads = loads_of(c, changes, machine.count, checkpointing)
            needed = max(cost.memory(c, load).total for load in loads) / cost.GIB
            if MARGIN * needed + CONTEXT > machine.gib:
                continue
            seconds = sum(STEPS * cost.step_seconds(c, load, machine.card()) for load in loads)
            found.append(Fit(flags_text(changes, checkpointing), needed, seconds))
            break                            # without it where it fits
    return found


def flags_text(changes, checkpointing):
    """The flags that differ from the defaults; (checkpointing) is the plan's own choice."""
    words = []
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value != FLAGS[name]:
            words.append(f"{flag} {value}")
    text = f"`{' '.join(words)}`" if words else "none"
    return f"{text} (checkpointing)" if checkpointing else text


def best(c, machine):
    """The fastest Fit, of equally fast ones the first; None if nothing fits."""
    return min(fits(c, machine), key=lambda fit: round(fit.seconds, -1), default=None)


def table():
    """The lines of the Markdown table."""
    titles = [machine.title for machine in MACHINES]
    lines = ["| model | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name in cost.QWEN3:
        cells = [name]
        for machine in MACHINES:
            fit = best(cost.shape_of(name), machine)
            cells.append("does not fit" if fit is None else
                         f"{fit.flags}: {fit.gib:.1f} GiB, {duration(fit.seconds)}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
