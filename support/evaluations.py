"""Which runs are measured, into which folders, and the settings that their records depend on.

A run that was measured already, with equal settings, is not measured again."""

import hashlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from support.checkpoint import checkpoint_hash, embedder_hash
from support.files import InputError, adapter_hash, printable, read_object, write_text
from support.peft_files import read_adapter_config
from support.posts import normalise
from support.registry import DECODERS, MEASURES, REWARDS


@dataclass
class Job:
    """One evaluation.json to write."""
    run: Path                # the run whose adapter samples; the base model has none there
    folder: Path             # where it is written: RUN, or RUN@NAME
    settings: dict           # what its records depend on
    config: dict | None      # config.json of a folder that is not a training run's


def finished(folder):
    """A run's folder, as a Path with a name; InputError where it holds no adapter. One that was
    trained elsewhere, in PEFT's layout in FOLDER/adapter, will do."""
    run = Path(folder)
    if not (run / "adapter" / "adapter_config.json").exists():
        raise InputError(f"{folder}: no adapter there: give runs of polylora.py sft or grpo.py, or "
                         "folders with one in PEFT's layout in FOLDER/adapter")
    return run.resolve() if run.name in ("", "..") else run


def config_of(run):
    """A run's config.json; empty where the adapter was not trained here."""
    path = run / "config.json"
    return read_object(path) if path.exists() else {}


def name_model(args, run):
    """Fill in the base model and its revision from a run, where no --model was given."""
    if not args.model:
        adapter = read_adapter_config(run / "adapter")
        args.model = config_of(run).get("model") or adapter.get("base_model_name_or_path")
        args.revision = args.revision or adapter.get("revision")


def measured(folder, settings):
    """Does the folder hold an evaluation with these settings?"""
    path = folder / "evaluation.json"
    return path.exists() and read_object(path).get("settings") == settings


def write_evaluation(folder, result, config, end):
    """config.json if there is a config; a line in metrics.jsonl; last, evaluation.json."""
    if config:
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(end) + "\n")
    write_text(folder / "evaluation.json", json.dumps(result, ensure_ascii=False) + "\n")


# ---- Jobs ----------------------------------------------------------------------------------------

def jobs_of(session, runs):
    """The jobs of `runs` and, first, of the base model (--base-out). With another decoder, or
    --name, a run is measured into a folder of its own, RUN@NAME, which a report takes as another
    method."""
    args = session.args
    name = args.name or ("" if args.decoder == "sampling" else args.decoder)
    if not re.fullmatch(r"[\w.+=-]*", name):
        raise InputError(f"--name {name}: letters, digits, and . + = - _ alone")
    settings = measure_settings(session)
    folders = [Path(args.bare)] if args.bare else []
    jobs = []
    for run in folders + runs:
        job = job_of(args, settings, run, run not in runs, f"@{name}" if name else "")
        jobs.append(job)
    return jobs


def compare_words(folders):
    """The sentence that ends a measurement: where it is, and the command that shows it."""
    runs = " ".join(map(shlex.quote, map(str, folders))) if len(folders) < 4 else "RUN .."
    return (f"Look at evaluation.json in {printable(', '.join(map(str, folders[:3])))}"
            f"{' and the others' * (len(folders) > 3)}: a record a post, with its drafts; for "
            f"Pass@k: python evaluate.py report {runs} --out report")


def job_of(args, settings, run, is_base, suffix):
    """The Job of one run; suffix: what follows the run's name in the folder's."""
    config = {"arm": "base"} if is_base else config_of(run)
    arm = config.get("arm") or run.resolve().name
    seed = config.get("seed", args.seed)
    folder = run.with_name(run.name + suffix)
    if suffix and (folder / "adapter").exists():
        raise InputError(f"{folder} is a run of its own, which this would write over: "
                         "give another --name")
    if is_base:
        there = config_of(folder)
        other = there and there.get("arm") != arm + suffix
        if other or (folder / "adapter").exists():
            raise InputError(f"--base-out {folder} holds a run or a model: give another folder")
    own = settings | {"seed": seed, "adapter": adapter_hash(run / "adapter")}
    about = {"seed": seed, "arm": arm + suffix, "model": args.model}
    if suffix:
        about["measured_of"] = arm
    if "embedder" in config:
        about["embedder"] = config["embedder"]
    return Job(run, folder, own, about if suffix or "seed" not in config else None)


# ---- Settings ------------------------------------------------------------------------------------

def measure_settings(session):
    """Everything that a record depends on, but for the run's own seed and adapter. Files count by
    what is in them: posts with their intents and styles, the base with its tokenizer and chat
    template, embedder, reward model and judge."""
    args = session.args
    posts = [(p.id, p.post, p.replies, p.styles, p.intent, p.tests) for p in session.posts]
    settings = {"n": args.n, "temperature": args.temperature, "top_p": args.top_p,
                "max_new_tokens": args.max_new_tokens, "reward": args.reward,
                "reward_model": args.reward_model, "embedder": args.embedder,
                "posts": hashlib.sha256(repr(posts).encode()).hexdigest(),
                "model": checkpoint_hash(args.model, args.revision),
                "dtype": str(session.model.dtype), "nf4": args.nf4,
                "readers": session.domain.record()}
    if not session.domain.styles:        # evaluations by another bar are measured again
        settings["bar"] = "all pairs"
    return settings | optional_settings(args)


def optional_settings(args):
    """What is left out where it has its default: evaluations made before it existed stay valid."""
    decoder = DECODERS[args.decoder]
    found = {}
    if args.decoder != "sampling" or args.top_k or args.min_p:
        decoding = {"name": args.decoder, "independent": not decoder.joint}
        decoding |= {name: getattr(args, name) for name in decoder.knobs}
        if decoder.settings is not None:
            decoding |= decoder.settings(args)
        found["decoding"] = decoding
    if args.embedder != "base":
        found["embedder_hash"] = embedder_hash(args.embedder)
    rewards = {args.reward}
    if decoder.reward:
        rewards.add(getattr(args, decoder.reward))
    for name in sorted(rewards & set(REWARDS)):
        if REWARDS[name].settings is not None:
            found |= REWARDS[name].settings(args)
    if args.pass_above is not None:
        found["pass_above"] = args.pass_above
    for row in MEASURES.values():
        if row.settings is not None:
            found |= row.settings(args)
    return found


def alike(domain, post):
    """Groups of styles whose reply to the post is the same string."""
    groups = {}
    if domain.name == "voices":
        for style, reply in zip(post.styles, post.replies):
            groups.setdefault(normalise(reply), []).append(style)
    return [group for group in groups.values() if len(group) > 1]
