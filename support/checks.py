"""Checks of flags before anything is loaded: each raises InputError that says what to do."""

import math
from pathlib import Path
from typing import NamedTuple

from support.checkpoint import same_base, start_folder
from support.files import InputError, Tracker, read_json, short
from support.peft_files import LINEARS, kind_of, read_adapter_config, shape_of
from support.posts import kinds_of
from support.registry import (ADAPTERS, DECODERS, DIVERSITIES, DOMAINS, D_GRADIENTS, MEASURES,
                              OBJECTIVES, SFT_LOSSES)


class Range(NamedTuple):
    """The values that a flag can have; NaN is in no range."""
    low: float = 0
    low_allowed: bool = True
    below: float = math.inf

    def holds(self, value):
        """Whether the value is in the range."""
        enough = self.low <= value if self.low_allowed else self.low < value
        return enough and value < self.below

    def text(self):
        """What a value must be, for a message."""
        low = f"{self.low} or more" if self.low_allowed else f"above {self.low}"
        return f"{low} and finite" if self.below == math.inf else f"{low} and below {self.below}"


ONE_OR_MORE = Range(low=1)
ZERO_OR_MORE = Range()
POSITIVE = Range(low_allowed=False)
FRACTION = Range(below=1)

RANGES = {
    **dict.fromkeys(("batch", "save_every", "micro_tokens", "max_rows", "rank", "max_new_tokens",
                     "draft_every", "draft_posts", "updates", "members"), ONE_OR_MORE),
    **dict.fromkeys(("steps", "warmup", "lr", "weight_decay", "lam", "lambda_share", "temperature",
                     "gate_floor", "beta", "diversity_weight", "diversity_share", "clip_high",
                     "resample", "overlong", "valid_weight", "entropy_weight", "tis",
                     "member_spread", "spread_penalty"), ZERO_OR_MORE),
    **dict.fromkeys(("clip", "alpha", "loss_value", "until"), POSITIVE),
    **dict.fromkeys(("beta2", "dropout", "noise", "clip_low", "flip", "token_share"), FRACTION)}


def check_common(args):
    """Raise InputError for numbers that no phase can work with."""
    if getattr(args, "track", None):
        Tracker.package(args.track)
    # --epochs 0 is fine where --steps says how long the run is.
    ranges = RANGES | {"epochs": ZERO_OR_MORE if args.steps else POSITIVE}
    for name, allowed in ranges.items():
        value = getattr(args, name, None)    # None: this command has no such flag, or it is unset
        if value is not None and not allowed.holds(value):
            flag = "--lambda" if name == "lam" else f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is {value:g}: it must be {allowed.text()}")


def trained_domain(run):
    """The record of the domain that a finished run was trained for; None if none was written."""
    done = Path(run) / "done.json"
    if not done.exists():
        return None
    record = read_json(done).get("domain")
    if isinstance(record, str):  # written before styles and users were fixed at the split
        record = {"domain": record}
    if record is not None and record.get("domain") not in DOMAINS:
        raise InputError(f"{done}: there is no domain {short(record.get('domain'))}: train "
                         "that run again")
    return record


def same_domain(run, domain):
    """Raise InputError if a finished run was trained for another domain than `domain`."""
    record = trained_domain(run)
    if record is None or record == domain.record():
        return
    trained_styles = ", ".join(record.get("voices", [])) or "none"
    styles = ", ".join(domain.styles) or "none"
    raise InputError(f"{run} was trained for the domain {record.get('domain')!r} with styles "
                     f"{trained_styles}; these posts are of {domain.name!r} with {styles}, or "
                     "with other users: use the parts of one split")


# ---- An adapter to start from --------------------------------------------------------------------

def check_start(args):
    """The folder of the adapter at --start. Sets args.model to its base where --model is not given.
    """
    start = start_folder(args.start)
    if not (start / "adapter_config.json").exists():
        raise InputError(f"--start {args.start}: there is no adapter there: give a finished run of "
                         "polylora.py sft, or a folder with adapter_config.json")
    config = read_adapter_config(start)
    if not args.model:
        args.model = config.get("base_model_name_or_path")
        args.revision = args.revision or config.get("revision")
    if not args.model:
        raise InputError(f"{start}/adapter_config.json does not name its base model: give --model")
    return start


# What an adapter at --start decides; the values that a new adapter has by default.
NEW_ADAPTER = {"adapter": "lora", "rank": 16, "alpha": 16, "members": 4, "targets": LINEARS}


def shape_from_start(args, start):
    """Set the flags that describe the adapter to those of the adapter in `start`; raise InputError
    for one that asks for something else."""
    for name, value in described_by(read_adapter_config(start)).items():
        asked = getattr(args, name)
        default = NEW_ADAPTER[name]
        if name == "targets":                # in any order
            asked = ",".join(sorted(asked.split(",")))
            default = ",".join(sorted(default))
        if asked not in (default, value):
            raise InputError(f"--{name} {asked}: the adapter at --start has {value}: leave that "
                             "flag out, or train a new adapter without --start")
        setattr(args, name, value)


def described_by(config):
    """{name of a flag: value} of an adapter's configuration."""
    flags = {"adapter": kind_of(config)}
    if ADAPTERS[flags["adapter"]].layer is not None:
        shape, _ = shape_of(config)
        flags["rank"] = shape["rank"]
        flags["alpha"] = shape["alpha"]
        flags["targets"] = ",".join(sorted(config["target_modules"]))
    if "members" in config:
        flags["members"] = config["members"]
    return flags


def check_loaded_start(session):
    """Compare the adapter at --start with the loaded base and posts: raise InputError for another
    base, warn of another domain, and record the adapter as an input of the run."""
    args = session.args
    same_base(args.start, args)
    record = trained_domain(args.start)
    if record is not None and record["domain"] != session.domain.name:
        session.say(f"warning: {args.start} was trained for the domain {record['domain']!r}; these "
                    f"posts are put to it as {session.domain.name!r} does")
    if session.run:
        session.run.made_from("start")


# ---- Phase one -----------------------------------------------------------------------------------

def check_diversity(args):
    """Raise InputError for flags that do not fit --diversity."""
    row = DIVERSITIES[args.diversity]
    if row.check is not None:
        row.check(args)
    if args.gate_floor and row.of:
        raise InputError(f"--gate-floor is for distances of pairs, and --diversity "
                         f"{args.diversity} has none: leave --gate-floor out")


def check_sft(args):
    """The folder of --start's adapter, None for a new adapter. Raises InputError for wrong flags of
    phase one."""
    check_common(args)
    if not (args.model or args.start):
        raise InputError("give --model, a Qwen3 checkpoint, or --start, an adapter to train "
                         "further")
    check_sft_losses(args)
    if not args.start:
        return None
    start = check_start(args)
    shape_from_start(args, start)
    return start


def check_sft_losses(args):
    """Raise InputError for flags of D and of the loss that do not go together."""
    loss = SFT_LOSSES[args.loss]
    d_gradient = D_GRADIENTS[args.d_gradient]
    samples = args.lam or args.lambda_share
    if args.lam and args.lambda_share:
        raise InputError("--lambda and --lambda-share both set the weight of D: give one of them")
    if samples and args.k < 2:
        raise InputError(f"--lambda {args.lam:g} needs completions to compare: give --k 2 or more "
                         f"(k is {args.k})")
    if samples and args.temperature <= 0:
        raise InputError("--temperature must be above 0: the gradient of D needs sampled "
                         "completions")
    check_diversity(args)
    if loss.function and args.loss != "ce" and not (loss.losses or loss.completions):
        raise InputError(f"--loss {args.loss} has no way to be computed: register it with losses= "
                         "(methods/losses.py has reply_losses)")
    if d_gradient.check is not None:
        d_gradient.check(args)
    if args.loss_value is not None and not loss.knob:
        raise InputError(f"--loss-value has no meaning for --loss {args.loss}: leave it out")
    if loss.check is not None:
        loss.check(args)
    if loss.completions and args.temperature <= 0:
        raise InputError(f"--loss {args.loss} needs sampled completions: --temperature must be "
                         "above 0")
    if args.gate == "reward":
        raise InputError("--gate reward is for phase two, which has a reward: use likelihood or "
                         "verifier")


def check_targets(session):
    """Warn of layers that an adapter would hardly move: those that write to the residual stream of
    a checkpoint that support.to_qwen3 has written."""
    still = [name for name in session.args.targets.split(",") if name in ("o_proj", "down_proj")]
    if still and "residual_scale" in session.model.config.extra:
        session.say(f"warning: {' and '.join(still)} of this checkpoint, written by "
                    "support.to_qwen3, hardly move under an adapter: leave them out of --targets")


def check_replies(posts):
    """Raise InputError for posts that have no reply to learn from."""
    for (*_, empty), place in kinds_of(posts).items():
        if empty:
            raise InputError(f"the post {short(posts[place].id)} has no reply to learn from: give "
                             "posts with replies (grpo.py and evaluate.py need none)")


# ---- Phase two -----------------------------------------------------------------------------------

def check_grpo(args):
    """The folder of --start's adapter; None in a dry run before there is one. Raises InputError for
    wrong flags of phase two, and sets args.model where it is not given."""
    check_common(args)
    start = None
    exists = (start_folder(args.start) / "adapter_config.json").exists()
    if exists or not (args.dry_run and args.model):
        start = check_start(args)
    check_group_size(args)
    check_weights(args)
    check_objective(args)
    if args.temperature <= 0:
        raise InputError("--temperature must be above 0: GRPO needs sampled completions")
    return start


def check_group_size(args):
    """Raise InputError if --k is too small for what compares completions of a prompt."""
    compares = args.diversity_weight or args.diversity_share or args.entropy_weight or args.resample
    lowest = 1 if OBJECTIVES[args.advantage].alone and not compares else 2
    if args.k < lowest:
        raise InputError(f"--k {args.k}: a group needs at least 2 completions")


def check_weights(args):
    """Raise InputError for weights of D that contradict each other or have no effect."""
    if args.diversity_weight and args.diversity_share:
        raise InputError("--diversity-weight and --diversity-share both set the weight of D: give "
                         "one of them")
    weighs_D = args.diversity_weight or args.diversity_share
    if args.diversity_schedule != "constant" and not weighs_D:
        raise InputError(f"--diversity-schedule {args.diversity_schedule} has no effect without "
                         "--diversity-weight or --diversity-share: give one of them")
    if args.gate_floor and not weighs_D and "floor" not in OBJECTIVES[args.advantage].needs:
        raise InputError("--gate-floor has no effect without D: give --diversity-weight or "
                         "--diversity-share, or leave it out")
    check_diversity(args)


def check_objective(args):
    """Raise InputError for flags that do not fit --advantage."""
    row = OBJECTIVES[args.advantage]
    if "beta" in row.needs and not args.beta:
        raise InputError(f"--advantage {args.advantage} weighs the likelihood under the starting "
                         "adapter by --beta: give one above 0")
    if args.overlong and "rewards" not in row.needs:
        raise InputError(f"--overlong lowers rewards, which --advantage {args.advantage} does not "
                         "use: leave --overlong out")
    if args.shard and not row.shards:
        raise InputError(f"--advantage {args.advantage} does not run with --shard: leave --shard "
                         "out")
    if "set_size" in row.needs:
        largest = row.largest(args.k) if row.largest else None
        check_size(args.set_size, args.k, row.least, largest)


def check_size(size, completions, lowest=1, largest=None):
    """Raise InputError unless the set size is from `lowest` to `largest`; None: one below the
    number of completions."""
    largest = completions - 1 if largest is None else largest
    if not lowest <= size <= largest:
        raise InputError(f"the set size (--set-size) is {size}: it must be from {lowest} to "
                         f"{largest}, below the number of completions ({completions})")


def check_binary(rewards):
    """Raise InputError for rewards other than 0 and 1."""
    if not bool(((rewards == 0) | (rewards == 1)).all()):
        raise InputError("this objective needs rewards of 0 or 1: use --advantage maxk or tailrl "
                         "for real-valued ones")


# ---- Measuring -----------------------------------------------------------------------------------

def check_decoder(args, k):
    """InputError where the flags of --decoder do not fit together or to k completions a post. A
    flag of another decoder is checked too."""
    if DECODERS[args.decoder].joint and not 1 <= args.set_size <= k:
        raise InputError(f"--set-size {args.set_size}: 1 to the {k} drafts of a post")
    for row in DECODERS.values():
        if row.check is not None:
            row.check(args, k)


def alone(model, decoder):
    """InputError for an ensemble under a decoder that is not plain sampling: completion d is member
    d's, and what others choose or search for would be of one member and scored by another."""
    if model.ensemble is not None and decoder != "sampling":
        raise InputError(f"--decoder {decoder}: an ensemble shares its drafts out over its members "
                         "by plain sampling alone")


def check_measure(args):
    """InputError for flags that do not fit together."""
    if args.n < 10:
        raise InputError(f"--n {args.n}: Pass@10 needs at least 10 drafts a post (twice as many "
                         "are better)")
    if args.temperature == 0 and args.decoder == "sampling":
        raise InputError("--temperature 0 writes one draft n times: give one above 0 to measure")
    for row in MEASURES.values():
        if row.check is not None:
            row.check(args)
    check_decoder(args, args.n)
