"""Qwen3's config.json: reads its fields and checks them, before anything is built from them.

It is read as the hub has it (rope_theta, torch_dtype) and as transformers 5 writes it
(rope_parameters.rope_theta, dtype). What model.py does not implement is refused by its name."""

from support.files import InputError, short


LARGEST = 2 ** 24            # no width or count of a network is above it

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "head_dim")

DTYPES = ("float32", "bfloat16", "float16", "float64")

# Settings with the only value that is implemented; a file may also leave them out.
IMPLEMENTED = {"use_sliding_window": False, "hidden_act": "silu"}

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "rope_type")

# Everything that is read; the rest of a file is kept as `extra`, and written back when saved.
READ_KEYS = {*SIZES, *ROPE_KEYS, "rms_norm_eps", "tie_word_embeddings", "attention_bias",
             "torch_dtype", "dtype", "extra"}


def config_fields(d):
    """The fields of model.Config, by name, from a config.json (a dict). Raises InputError for what
    is not implemented, and for values of a wrong type or size."""
    check_implemented(d)
    theta = read_rope(d)
    fields = {}
    for name in SIZES:
        # Nothing that shapes the network is guessed: with a wrong head_dim the model still loads,
        # and writes nonsense.
        if name not in d:
            raise InputError(f"config.json lacks {name!r}: it is not a complete Qwen3 "
                             "configuration")
        fields[name] = d[name]
    dtype = d.get("torch_dtype") or d.get("dtype") or "float32"
    fields["rms_norm_eps"] = d.get("rms_norm_eps", 1e-6)
    fields["rope_theta"] = theta
    fields["tie_word_embeddings"] = d.get("tie_word_embeddings", False)
    fields["attention_bias"] = d.get("attention_bias") or False
    fields["dtype"] = str(dtype).removeprefix("torch.")
    for name, value in fields.items():
        if not is_valid(name, value):
            refuse(name, value)
    if fields["num_attention_heads"] % fields["num_key_value_heads"]:
        refuse("num_key_value_heads", fields["num_key_value_heads"])
    if fields["head_dim"] % 2:
        refuse("head_dim", fields["head_dim"])
    fields["rope_theta"] = float(theta)
    fields["extra"] = {key: value for key, value in d.items() if key not in READ_KEYS}
    return fields


def check_implemented(d):
    """Raises unless the file describes a dense Qwen3 in full precision, without the settings that
    change what is computed."""
    if not isinstance(d, dict):
        raise InputError("config.json is not a JSON object")
    if d.get("model_type", "qwen3") != "qwen3":
        raise InputError(f"config.json describes a {short(d['model_type'])} model: give a dense "
                         "Qwen3 one (model_type qwen3)")
    if d.get("quantization_config"):
        raise InputError("config.json has a quantization_config: quantised checkpoints are not "
                         "read: give the one in bfloat16 (--nf4 quantises it when it is loaded)")
    check_values(d, IMPLEMENTED, "is implemented")


def check_values(d, allowed, says):
    """Raises where d sets a key of `allowed` to something else than its one value there."""
    for key, value in allowed.items():
        if (d.get(key) or value) != value:
            raise InputError(f"config.json sets {key} to {short(d[key])}: only {value!r} {says}")


def is_valid(name, value):
    """Whether a field has the right type and a possible size."""
    if name in SIZES:
        return type(value) is int and 1 <= value <= LARGEST
    if name in ("tie_word_embeddings", "attention_bias"):
        return isinstance(value, bool)
    if name == "dtype":
        return value in DTYPES
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < 1e18


def refuse(name, value):
    raise InputError(f"config.json has {name} = {short(value)}, which is not valid for a Qwen3")


# ---- Rotary positions ----------------------------------------------------------------------------

# Factors of 1 scale nothing in these kinds, unless one of the other settings is there.
SCALED_ROPE = ("linear", "yarn", "llama3")

ROPE_EXTRAS = ("attention_factor", "mscale", "mscale_all_dim", "short_factor", "long_factor")


def read_rope(d):
    """rope_theta of a config.json, wherever the writer put it: next to the other fields (the hub's
    files), in rope_parameters (transformers 5) or in rope_scaling, which transformers reads first.
    Raises if the angles are scaled, or if two places disagree."""
    thetas = [d["rope_theta"]] if "rope_theta" in d else []
    types = [{"rope_type": d["rope_type"]}] if d.get("rope_type") is not None else []
    for key in ("rope_scaling", "rope_parameters"):
        value = d.get(key) or {}
        if not isinstance(value, dict):
            raise InputError(f"config.json has {key} = {short(value)}: it must be a JSON object or "
                             "null")
        types.append(value)
        if value.get("rope_theta") is not None:
            thetas.append(value["rope_theta"])
    for value in types:
        check_unscaled(value)
    if not thetas:
        raise InputError("config.json lacks 'rope_theta': it is not a complete Qwen3 configuration")
    if any(theta != thetas[0] for theta in thetas):
        raise InputError(f"config.json has rope_theta = {short(thetas[0])} and, in rope_scaling or "
                         f"rope_parameters, {short(thetas[-1])}: make them equal")
    return thetas[0]


def check_unscaled(value):
    """Raises unless a rope_scaling or rope_parameters object leaves the rotary angles as they
    are."""
    kind = value.get("rope_type") or value.get("type") or "default"
    scaled = kind != "default"
    if kind in SCALED_ROPE:
        scaled = value.get("factor") != 1 or any(value.get(key) for key in ROPE_EXTRAS)
    if scaled:
        raise InputError(f"config.json scales the rotary angles ({short(kind)}): only plain angles "
                         "are implemented: remove rope_scaling to use the model at its trained "
                         "length")
