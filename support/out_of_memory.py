"""Running out of memory, as one sentence that says what to lower, and in which order."""

import sys


LOWERED = ("micro_tokens", "max_rows", "k", "n")  # flags, by what each costs: the cheapest first


def is_out_of_memory(error):
    """Whether it says that memory could not be had: of a GPU by its allocator or by a library, or
    of the host."""
    torch = sys.modules.get("torch")         # not loaded: the error is not torch's
    if isinstance(error, MemoryError) or torch and isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)                        # errors of libraries have no type of their own
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))


def advice(error, args):
    """One sentence: what failed, then the flags of this command to change, in order."""
    steps = []
    if getattr(args, "checkpointing", True) is False:
        steps.append("add --checkpointing")
    lower = []
    for name in LOWERED:
        value = getattr(args, name, None)
        if value is not None:
            lower.append(f"--{name.replace('_', '-')} (now {value})")
    if lower:
        steps.append("lower " + ", then ".join(lower))
    larger = []
    if not getattr(args, "nf4", True):
        larger.append("--nf4")
    if not getattr(args, "shard", True):
        larger.append("--shard on several GPUs")
    if larger:
        steps.append("add " + ", or ".join(larger))
    what = " ".join(str(error).split()).split(". ")[0].rstrip(".")[:120]
    how = "; then ".join(steps) or "take a smaller model or fewer posts"
    return f"out of memory ({what or type(error).__name__}): {how}"
