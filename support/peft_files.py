"""An adapter's files in PEFT's layout: reads, checks and writes them.

A setting that changes what an adapter computes and is not implemented is refused by its name. The
rule is an allow-list: what this file does not know must be switched off, so that a setting that
PEFT adds tomorrow is refused and not ignored."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from support.files import InputError, atomic_write, read_json, short, write_json
from support.hub import read_tensors
from support.registry import ADAPTERS


# Settings that do not change what a finished adapter computes: where it came from, and how it was
# started or trained.
DESCRIPTIVE = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "megatron_core", "runtime_config", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
    "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}


# Settings that are read: see load_adapter and the functions below.
READ = {"r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "init_r", "target_r",
        "members", "pissa_rank"}


# Starts of A and B that leave the weights under the adapter as they are; and the others.
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")

CHANGED_STARTS = ("olora", "corda", "loftq", "lora_ga", "pissa_niter_")

WHY = {
    "alora_invocation_tokens": "an aLoRA adapter acts from its invocation tokens on",
    "layer_replication": "it repeats layers of the base",
    "modules_to_save": "it replaces whole modules of the base",
    "trainable_token_indices": "it replaces rows of the embedding",
    "rank_pattern": "its layers have different ranks",
    "alpha_pattern": "its layers have different alphas",
    "fan_in_fan_out": "its matrices are transposed",
    "bias": "it trains biases",
    "lora_bias": "its B has a bias"}

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def is_off(value):
    """Whether a setting's value is the one that PEFT writes for "not used"."""
    return value is None or value is False or value in ("", "none", [], {})


def read_config_file(folder):
    """adapter_config.json as a dict; raises and says what the folder is where it is missing."""
    folder = Path(folder)
    path = folder / "adapter_config.json"
    if not path.exists() and folder.is_dir():
        inside = sorted(p.parent.name for p in folder.glob("*/adapter_config.json"))
        if inside:
            raise InputError(f"{path} is missing, but {folder / inside[0]} holds an adapter: give "
                             "that folder")
        if (folder / "config.json").exists() and list(folder.glob("model*.safetensors")):
            raise InputError(f"{folder} holds a whole model and no adapter: give it as --model")
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object: it is no adapter's configuration")
    return config


def check_settings(path, config, allowed=()):
    """Raises for the first setting that changes what the adapter computes and is not implemented.
    allowed: names that the adapter's kind reads itself."""
    known = DESCRIPTIVE | READ | set(allowed)
    for key in sorted(config):
        if key in known or is_off(config[key]):
            continue
        reason = WHY.get(key, "it may change what the adapter computes")
        raise InputError(f"{path} sets {short(key)} to {short(config[key])}, which is not "
                         f"implemented ({reason}): train the adapter without it, or merge it into "
                         "its base with PEFT (merge_and_unload)")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in (*PLAIN_STARTS, "pissa", "true", "false"):
        changes = start.lower().startswith(CHANGED_STARTS)
        reason = "changes the weights under the adapter" if changes else "is not known"
        raise InputError(f"{path} sets init_lora_weights to {short(start)}, which {reason}: save "
                         "the adapter converted to plain LoRA (PEFT's "
                         "path_initial_model_for_weight_conversion), or merge it into its base")
    if not isinstance(start, (str, bool, type(None))):
        raise InputError(f"{path} sets init_lora_weights to {short(start)}: it is a name, true or "
                         "false")


# ---- Which layers an adapter is on ---------------------------------------------------------------

def check_targets(targets):
    """Raises unless all names are those of linear layers, and there is one."""
    unknown = set(targets) - set(LINEARS)
    if unknown or not targets:
        raise InputError(f"LoRA target {min(unknown, default='')!r} is no linear layer of Qwen3: "
                         f"choose from {', '.join(LINEARS)}")


def module_names(model):
    """Names of the layers that PEFT could put LoRA on, the tied token head among them."""
    names = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in ("lora_A", "lora_B"):     # inside an adapter's layer
            continue
        adapted = hasattr(module, "lora_A") or getattr(module, "quantised", False)
        if adapted or isinstance(module, (nn.Linear, nn.Embedding)):
            names.append(name)
    return names if "lm_head" in names else [*names, "lm_head"]


def target_names(adapted, names):
    """target_modules of a configuration: the last names of the adapted layers, or, where some of
    the model's layers (`names`) that are called the same are without the adapter, their full
    names."""
    last_names = sorted({name.rpartition(".")[2] for name in adapted})
    covered = [name for name in names if name.rpartition(".")[2] in last_names]
    return last_names if covered == adapted else adapted


def adapted_layers(path, config, names, stored):
    """The linear layers among a model's module `names` that the adapter is on, in the model's
    order: by PEFT's rules where target_modules and exclude_modules are lists. Regular expressions
    of a file are not run (one can take for ever): the layers are then those that its tensors
    name."""
    targets = config["target_modules"]
    excluded = config.get("exclude_modules")
    patterns = isinstance(targets, str) or isinstance(excluded, str)
    held = layers_of(stored)
    found = []
    for name in names:
        if patterns:
            wanted = name in held
        else:
            named = matches(name, targets) and not matches(name, excluded or ())
            wanted = named and in_layers(path, config, name)
        if wanted:
            found.append(name)
    for name in found:
        if name.rpartition(".")[2] not in LINEARS:
            raise InputError(f"{path} has target_modules that include {short(name)}: LoRA is "
                             f"implemented on {', '.join(LINEARS)} alone")
    if not found:
        raise InputError(f"{path} has target_modules = {short(targets)}, which are no linear "
                         f"layers of Qwen3 ({', '.join(LINEARS)})")
    return found


def layers_of(stored):
    """The names of the layers that an adapter's tensors are of."""
    return {name.rpartition(".lora_")[0] for name in stored}


def matches(name, targets):
    """Whether a list of target modules names a module: in full, or by the end of its name."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def in_layers(path, config, name):
    """Whether layers_to_transform leaves a module of the model in: null or [] leave all in."""
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    if config.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise InputError(f"{path} has layers_pattern = {short(config['layers_pattern'])}: the "
                         "layers of a Qwen3 are in 'layers'")
    number = re.match(r"model\.layers\.(\d+)\.", name)
    wanted = wanted if isinstance(wanted, list) else [wanted]
    return number is not None and int(number[1]) in wanted


def check_layer_settings(path, config):
    """Raises for layers that are not given as PEFT gives them."""
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key)
        if key == "exclude_modules" and not value:
            continue
        texts = isinstance(value, list) and all(isinstance(t, str) and t for t in value)
        pattern = isinstance(value, str) and value
        if not texts and not pattern:
            raise InputError(f"{path}: {key} must be a list of names, or a regular expression")
    layers = config.get("layers_to_transform")
    if layers is None:
        return
    numbers = layers if isinstance(layers, list) else [layers]
    for number in numbers:
        if type(number) is not int or number < 0:
            raise InputError(f"{path}: layers_to_transform must be a list of layer numbers")


def is_number(x):
    """Whether a JSON value is a finite number."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


# ---- Files ---------------------------------------------------------------------------------------

PREFIX = "base_model.model."  # PEFT's, before the model's own names


def layer_config(layer):
    """A layer's part of adapter_config.json."""
    kind = layer.kind
    config = {"peft_type": ADAPTERS[kind].peft_type, "r": layer.rank, "lora_alpha": layer.alpha,
              "lora_dropout": layer.dropout, "bias": "none", "fan_in_fan_out": False,
              "modules_to_save": None, "use_rslora": False, "use_dora": False,
              "init_lora_weights": True, "inference_mode": True}
    own = ADAPTERS[kind].config
    return config if own is None else config | own(layer)


def marks_of(config):
    """The kinds other than plain LoRA that a configuration of PEFT's type LORA asks for."""
    return [kind for kind, row in ADAPTERS.items() if row.marked and row.marked(config)]


def kind_of(config):
    """The name in ADAPTERS of a configuration's adapter; None for one that is not here."""
    if config.get("peft_type") == ADAPTERS["lora"].peft_type:
        marks = marks_of(config)
        if len(marks) > 1:
            return None
        return marks[0] if marks else "lora"
    for kind, row in ADAPTERS.items():
        if row.peft_type == config.get("peft_type"):
            return kind
    return None


def read_adapter_config(folder):
    """adapter_config.json, checked before anything is built from it."""
    path = Path(folder) / "adapter_config.json"
    config = read_config_file(folder)
    kind = kind_of(config)
    check_settings(path, config, ADAPTERS[kind].settings if kind else ())
    if kind is None and config.get("peft_type") == "LORA":
        raise InputError(f"{path} asks for {' and '.join(marks_of(config))} together: one at a "
                         "time is implemented")
    if kind is None:
        known = sorted({row.peft_type for row in ADAPTERS.values()})
        raise InputError(f"{path} has peft_type {short(config.get('peft_type'))}: implemented are "
                         f"{', '.join(known)}")
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), (str, type(None))):
            raise InputError(f"{path}: {key} must be a text")
    if ADAPTERS[kind].layer is not None:
        check_layer_config(path, config)
    return config


def check_layer_config(path, config):
    """Raises for settings of low-rank layers that are missing, or not possible."""
    for key in ("r", "lora_alpha", "target_modules"):
        if config.get(key) is None:
            raise InputError(f"{path} lacks {key}: the adapter is incomplete")
    alpha = config["lora_alpha"]
    dropout = config.get("lora_dropout") or 0.0
    for key in ("r", "init_r", "target_r", "pissa_rank", "members"):
        if key in config and (type(config[key]) is not int or not 1 <= config[key] <= 2 ** 16):
            raise InputError(f"{path}: {key} is {short(config[key])}: a rank is a whole number "
                             "from 1 to 65,536")
    if not is_number(alpha) or not 0 < abs(alpha) < 1e9:
        raise InputError(f"{path}: lora_alpha is {short(alpha)}: it must be a number other than 0")
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise InputError(f"{path}: lora_dropout is {short(dropout)}: it is from 0 to below 1")
    check_layer_settings(path, config)
    row = ADAPTERS[kind_of(config)]
    for key in row.wants:
        if key not in config:
            raise InputError(f"{path} lacks {key}: the adapter is incomplete")
    if "pissa_rank" in config and config["r"] != 2 * config["pissa_rank"]:
        raise InputError(f"{path}: r must be twice pissa_rank")
    if row.check is not None:
        row.check(path, config)


def shape_of(config):
    """add_lora's rank, alpha and width for a checked configuration; the rows of the file's A."""
    own = ADAPTERS[kind_of(config)].shape
    if own is not None:
        return own(config)
    rank = config["r"]
    width = rank * config.get("members", 1)
    return dict(rank=rank, alpha=config["lora_alpha"], width=width), width


@dataclass
class AdapterFile:
    """An adapter that was read, and checked against its own configuration. shape: add_lora's rank,
    alpha and width; layers: the full names of those that it is on; lacks_start: it departs from a
    start that is computed from W and not stored. An adapter without low-rank layers (all weights)
    has neither shape nor layers."""
    kind: str
    tensors: dict
    shape: dict = field(default_factory=dict)
    layers: list = field(default_factory=list)
    dropout: float = 0.0
    lacks_start: bool = False


def read_adapter(folder, names):
    """The AdapterFile in `folder`, for a model with the layers `names`, see module_names."""
    folder = Path(folder)
    path = folder / "adapter_config.json"
    config = read_adapter_config(folder)
    kind = kind_of(config)
    tensors = adapter_tensors(folder)
    if ADAPTERS[kind].layer is None:
        return AdapterFile(kind, tensors)
    if ADAPTERS[kind].restore is not None:
        tensors = ADAPTERS[kind].restore(path, config, tensors)
    shape, rows = shape_of(config)
    layers = adapted_layers(path, config, names, tensors)
    check_rows(folder, config, tensors, rows, layers)
    return AdapterFile(kind, tensors, shape, layers, dropout=config.get("lora_dropout") or 0.0,
                       lacks_start=config.get("init_lora_weights") == kind)


def write_adapter(folder, config, tensors):
    """Writes adapter_config.json and adapter_model.safetensors, of {name in the model: tensor}."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with atomic_write(folder / "adapter_model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)


def adapter_tensors(folder):
    """name in the model -> tensor of an adapter's file."""
    tensors = read_tensors(folder, file="adapter_model.safetensors")
    for name in sorted(tensors):
        if not name.startswith(PREFIX):
            raise InputError(f"{folder}/adapter_model.safetensors has a tensor {short(name)}: "
                             f"PEFT's names begin with {PREFIX}")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def check_rows(folder, config, stored, rows, names):
    """A file against its configuration, before anything of that size is built."""
    a_matrices = {n: t for n, t in stored.items() if ".lora_A" in n}
    b_matrices = {n: t for n, t in stored.items() if ".lora_B" in n}
    held = layers_of(a_matrices)
    lacking = [name for name in names if name not in held]
    others = sorted(held - set(names))
    file = f"{folder}/adapter_model.safetensors"
    if lacking and others:
        raise InputError(f"{file} has matrices of {short(others[0])} and none of "
                         f"{short(lacking[0])}: it does not fit this model: its names are of "
                         "another model, or under another prefix")
    matrices = a_matrices | b_matrices
    if lacking or any(t.dim() != 2 for t in matrices.values()):
        raise InputError(f"{file} lacks matrices of {short((lacking or sorted(matrices))[0])}, "
                         "which its configuration names: it does not fit this model, or it was not "
                         "saved in full (ZeRO-3 without gathering saves empty lora_A and lora_B)")
    for matrix in a_matrices.values():
        if matrix.shape[0] != rows:
            raise InputError(f"{folder}/adapter_config.json says r = {config['r']}, its tensors "
                             "have another rank: the adapter does not fit itself")


def check_fit(folder, own, stored):
    """InputError unless both have the same names and shapes."""
    difference = first_difference(own, stored)
    if difference is not None:
        raise InputError(f"the adapter in {folder} does not fit this model: it {difference}: it "
                         "was trained on another model, or on other layers")


def first_difference(own, stored):
    """What a file's tensors `stored` lack, or have more, in words; None where they fit."""
    for name in sorted(own.keys() - stored.keys()):
        return f"lacks {short(name)}"
    for name in sorted(stored.keys() - own.keys()):
        return f"has {short(name)}, which the model lacks"
    for name in sorted(own):
        if own[name].shape != stored[name].shape:
            return (f"has {short(name)} in shape {tuple(stored[name].shape)}, the model in "
                    f"{tuple(own[name].shape)}")
    return None
