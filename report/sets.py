"""The metrics of a post's record, its completions being independent or sampled jointly in sets."""

import math

from metrics import ALWAYS, KS, SOMETIMES, check_record, post_metrics


def record_metrics(record, ks=KS, vocabulary=10_000):
    """post_metrics of a record. Of one with "set", whose completions are sampled jointly in sets of
    that size, each metric is the mean over the sets that have it, and k is that size only: a set is
    a record of its own. ValueError says which field is wrong."""
    if "set" not in record:
        return post_metrics(record, ks, vocabulary)
    check_record(record)
    n = len(record["drafts"])
    size = record["set"]
    if type(size) is not int or size < 1 or n % size:
        raise ValueError(f'{n} completions are not made of sets of {size!r} ("set")')
    found = {}
    for start in range(0, n, size):
        part = record_of_set(record, slice(start, start + size))
        if start:                            # the judge reads a post's first completions only
            part.pop("judge", None)
        for name, value in post_metrics(part, (size,), vocabulary).items():
            found.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def record_of_set(record, chosen):
    """A record of some of the completions (a slice)."""
    part = dict(record)
    del part["set"]
    for name in (*ALWAYS, *SOMETIMES, "drafts", "voices", "passed"):
        if name in record:
            part[name] = record[name][chosen]
    if "scores" in record:
        part["scores"] = {name: values[chosen] for name, values in record["scores"].items()}
    return part
