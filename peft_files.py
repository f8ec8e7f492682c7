"""adapter_config.json as PEFT writes it: what each of its settings means here.

A setting that changes what an adapter computes and is not implemented is refused by its name. The
rule is an allow-list: what this file does not know must be switched off, so that a setting that
PEFT adds tomorrow is refused and not ignored."""

import math
import re
from pathlib import Path

from files import InputError, read_json, short

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

def adapted_layers(path, config, names, stored):
    """The linear layers among a model's module `names` that the adapter is on, in the model's
    order: by PEFT's rules where target_modules and exclude_modules are lists. Regular expressions
    of a file are not run (one can take for ever): the layers are then those that its tensors
    name."""
    targets, excluded = config["target_modules"], config.get("exclude_modules")
    held = {name.rpartition(".lora_")[0] for name in stored}
    if isinstance(targets, str) or isinstance(excluded, str):
        found = [name for name in names if name in held]
    else:
        found = [name for name in names if matches(name, targets)
                 and not matches(name, excluded or ()) and in_layers(path, config, name)]
    for name in found:
        if name.rpartition(".")[2] not in LINEARS:
            raise InputError(f"{path} has target_modules that include {short(name)}: LoRA is "
                             f"implemented on {', '.join(LINEARS)} alone")
    if not found:
        raise InputError(f"{path} has target_modules = {short(targets)}, which are no linear "
                         f"layers of Qwen3 ({', '.join(LINEARS)})")
    return found


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
    targets, excluded = config["target_modules"], config.get("exclude_modules")
    for key, value in (("target_modules", targets), ("exclude_modules", excluded or [])):
        texts = isinstance(value, list) and all(isinstance(t, str) and t for t in value)
        if not texts and not (isinstance(value, str) and value):
            raise InputError(f"{path}: {key} must be a list of names, or a regular expression")
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if any(type(n) is not int or n < 0 for n in numbers):
        raise InputError(f"{path}: layers_to_transform must be a list of layer numbers")


# ---- AdaLoRA: triplets that were cut -------------------------------------------------------------

def adalora_masks(path, config):
    """layer -> list of booleans, which of its init_r triplets the file holds, from rank_pattern;
    {} before the budget has cut any."""
    pattern, masks = config.get("rank_pattern") or {}, {}
    if not isinstance(pattern, dict):
        raise InputError(f"{path}: rank_pattern must be a JSON object")
    for key, kept in pattern.items():
        name = key.partition(".lora_E")[0].removeprefix("base_model.model.")
        flat = isinstance(kept, list) and all(isinstance(k, bool) for k in kept)
        if not flat or len(kept) != config["init_r"]:
            raise InputError(f"{path}: rank_pattern of {short(name)} must be a list of "
                             f"{config['init_r']} booleans (init_r)")
        masks[name] = kept
    return masks


def fill_cut_triplets(folder, stored, masks):
    """The tensors of an AdaLoRA file with zeros in the place of the triplets that were cut: PEFT
    leaves their rows of A and E and their columns of B out."""
    whole = dict(stored)
    for layer, kept in masks.items():
        places = [i for i, k in enumerate(kept) if k]
        for part, axis in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            name = f"{layer}.{part}"
            tensor = stored.get(name)
            if tensor is None or tensor.dim() != 2:
                raise InputError(f"{folder}: the adapter's file lacks {short(name)}, which its "
                                 "rank_pattern names")
            if tensor.shape[axis] == len(kept):   # saved with the cut triplets
                if part == "lora_E":
                    whole[name] = tensor * tensor.new_tensor(kept)[:, None]
                continue
            if tensor.shape[axis] != len(places):
                raise InputError(f"{folder}: {short(name)} has {tensor.shape[axis]} triplets, "
                                 f"rank_pattern keeps {len(places)}")
            shape = list(tensor.shape)
            shape[axis] = len(kept)
            full = tensor.new_zeros(shape)
            if axis == 0:
                full[places] = tensor
            else:
                full[:, places] = tensor
            whole[name] = full
    return whole


def is_number(x):
    """Whether a JSON value is a finite number."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
