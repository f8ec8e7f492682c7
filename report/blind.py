"""What people are shown of measured runs: the posts that all runs have, drafts drawn from each."""

from pathlib import Path

from support.files import InputError, read_object


def records_of(folder):
    """{post id: its record} of a measured run."""
    records = read_object(Path(folder) / "evaluation.json")["records"]
    return {record["id"]: record for record in records}


def names_of(runs):
    """A name for each run: its arm, with the seed where several runs are of that arm."""
    arms = [run["arm"] for run in runs]
    names = []
    for run in runs:
        alone = arms.count(run["arm"]) == 1
        names.append(run["arm"] if alone else f"{run['arm']} (seed {run['seed']})")
    if len(set(names)) < len(names):
        raise InputError("two of the runs are the same arm and seed: give each once")
    return names


def common_posts(runs):
    """The ids of the posts that all runs have."""
    ids = []
    for i, text in runs[0]["posts"].items():
        if all(run["posts"].get(i) == text for run in runs):
            ids.append(i)
    if len(ids) < 2:
        raise InputError("the runs have fewer than 2 posts in common; measure them on the same")
    return ids


def check_numbers(args, records, ids):
    """InputError for a number of posts or completions that the runs cannot give."""
    shortest = min(len(found[i]["drafts"]) for found in records for i in ids)
    if args.posts < 0:
        raise InputError(f"--posts {args.posts}: how many posts to ask about, or 0 for all")
    if not 1 <= args.k <= shortest:
        raise InputError(f"--k {args.k}: a set needs 1 to {shortest} drafts, as many as were "
                         "measured")


def some_drafts(record, k, rng):
    """k of a record's drafts, drawn. A joint decoder's first k are a set: it stays whole."""
    if "set" in record:
        return record["drafts"][:k]
    return rng.sample(record["drafts"], k)
