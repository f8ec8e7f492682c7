"""Reads what a sentence-transformers folder holds besides its transformer: pooling, the longest
text, a prompt, and further modules such as Dense. What changes the vectors is applied, or refused
by its name."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from support.files import InputError, read_json, short
from support.hub import read_tensors


POOLINGS = {"mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}

NEW_NAMES = {"mean": "mean", "last": "lasttoken"}     # of the field pooling_mode

DESCRIBED = {"mean": "the mean of tokens", "last": "the last token"}

ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU,
               "SiLU": nn.SiLU, "Sigmoid": nn.Sigmoid}

DENSE_KEYS = {"in_features", "out_features", "bias", "activation_function", "module_input_name",
              "module_output_name"}


@dataclass
class SentenceFormat:
    """How texts become vectors around an encoder: `prompt` before each text, lower case if `lower`,
    at most `longest` tokens, special ones included (None: the encoder's own limit), and `modules`,
    functions of the pooled vectors (B, dim), in order."""
    longest: int | None = None
    lower: bool = False
    prompt: str = ""
    modules: list = field(default_factory=list)

    def text(self, text):
        text = self.prompt + text
        return text.lower() if self.lower else text

    def vectors(self, pooled):
        """(B, dim) -> (B, dim of the last module)."""
        for module in self.modules:
            pooled = module(pooled)
        return pooled


TOKENS_A_PASS = 16384            # padded ones: memory grows with them, not with the texts


def passes_of(order, lengths, most):
    """Parts of `order`, places sorted by length (tokens of each text): of at most `most` texts and
    TOKENS_A_PASS padded tokens, or of a single longer text."""
    passes = []
    part = []
    for place in order:
        padded = (len(part) + 1) * lengths[place]    # the longest so far
        if part and (len(part) == most or padded > TOKENS_A_PASS):
            passes.append(part)
            part = []
        part.append(place)
    if part:
        passes.append(part)
    return passes


def sentence_format(folder, pooling, width, device="cpu"):
    """The SentenceFormat of a folder whose encoder gives vectors of `width` numbers, pooled as
    `pooling` ("mean" of all tokens, or the "last" one). A folder without modules.json is a plain
    encoder."""
    folder = Path(folder)
    form = SentenceFormat(*limits(folder))
    modules = listed_modules(folder)
    include_prompt = True
    for kind, path in modules[1:]:
        place = folder / path
        if kind == "Pooling":
            include_prompt = check_pooling(place / "config.json", pooling)
        elif kind == "Dense":
            dense, width = read_dense(place, width, device)
            form.modules.append(dense)
        elif kind == "Normalize":
            form.modules.append(unit_length)
        elif kind != "Dropout":              # which does nothing when a model is used
            raise InputError(f"{folder}/modules.json has a module of type {short(kind)}: Pooling, "
                             "Dense and Normalize are implemented")
    form.prompt = default_prompt(folder)
    if form.prompt and not include_prompt:
        raise InputError(f"{folder} leaves its prompt {short(form.prompt)} out of the pooling "
                         "(include_prompt: false), which is not implemented")
    return form


def unit_length(vectors):
    return F.normalize(vectors, dim=-1)


def optional_json(path):
    """The JSON object of a file; {} where there is none."""
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return value


def limits(folder):
    """(most tokens of a text or None, whether texts are put in lower case): max_seq_length of
    sentence_bert_config.json, else model_max_length of tokenizer_config.json."""
    path = folder / "sentence_bert_config.json"
    config = optional_json(path)
    longest = config.get("max_seq_length")
    if longest is None:
        longest = optional_json(folder / "tokenizer_config.json").get("model_max_length")
        # Tokenizers without a limit write 10^30.
        longest = longest if type(longest) is int and longest < 2 ** 24 else None
    if longest is not None and (type(longest) is not int or longest < 3):
        raise InputError(f"{path} has max_seq_length = {short(longest)}: it must be a whole number "
                         "from 3 on")
    return longest, config.get("do_lower_case") is True


def listed_modules(folder):
    """(type, folder) of each module in modules.json, the transformer first; of a plain encoder, its
    1_Pooling if there is one."""
    path = folder / "modules.json"
    if not path.exists():
        pooling = [("Pooling", "1_Pooling")] if (folder / "1_Pooling/config.json").exists() else []
        return [("Transformer", ""), *pooling]
    modules = []
    for kind, place in types_and_paths(path):
        if not kind.startswith("sentence_transformers."):
            raise InputError(f"{path} has a module of type {short(kind)}, which is code of its "
                             "own: no such code is run")
        # A plain name: no path leaves the folder.
        if not re.fullmatch(r"[\w-][\w.-]*|", place):
            raise InputError(f"{path} has a module in {short(place)}: a module is a folder of its "
                             "own next to the file")
        modules.append((kind.rpartition(".")[2], place))
    if not modules or modules[0] != ("Transformer", ""):
        raise InputError(f"{path} does not begin with a Transformer in the same folder: only such "
                         "models are read")
    return modules


def types_and_paths(path):
    """The pairs (type, path) in modules.json, which are texts."""
    value = read_json(path)
    if not isinstance(value, list):
        raise InputError(f"{path} is not a list of modules with type and path")
    pairs = []
    for entry in value:
        kind = entry.get("type") if isinstance(entry, dict) else None
        place = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or not isinstance(place, str):
            raise InputError(f"{path} is not a list of modules with type and path")
        pairs.append((kind, place))
    return pairs


def check_pooling(path, pooling):
    """Whether a prompt's tokens are pooled with the text's. Raises unless the vectors are pooled in
    the given way alone."""
    config = optional_json(path)
    modes = {key for key, value in config.items() if key.startswith("pooling_mode_") and value}
    named = config.get("pooling_mode", [])
    named = named if isinstance(named, list) else [named]
    old_form = modes == {POOLINGS[pooling]} and not named
    new_form = modes <= {POOLINGS[pooling]} and named == [NEW_NAMES[pooling]]
    if not old_form and not new_form:
        found = ", ".join(map(str, sorted(modes) or named)) or "nothing"
        raise InputError(f"{path} pools by {short(found)}: for this encoder only "
                         f"{DESCRIBED[pooling]} is implemented")
    return config.get("include_prompt", True) is not False


def default_prompt(folder):
    """The text that sentence-transformers puts before every text when no prompt is asked for."""
    path = folder / "config_sentence_transformers.json"
    config = optional_json(path)
    name = config.get("default_prompt_name")
    prompts = config.get("prompts") or {}
    if name is None:
        return ""
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        raise InputError(f"{path} names a default prompt {short(name)} that it does not have")
    return prompts[name]


def read_dense(folder, width, device):
    """(function, width of its result) of a Dense module: activation(W x + b)."""
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} does not hold a JSON object")
    odd = sorted(key for key in config.keys() - DENSE_KEYS if config[key])
    if odd:
        raise InputError(f"{path} sets {short(odd[0])}, which is not implemented")
    if not (folder / "model.safetensors").exists():
        raise InputError(f"{folder} has no model.safetensors: only safetensors files are read: "
                         "convert the embedder once (SentenceTransformer(name)"
                         ".save_pretrained(folder))")
    tensors = read_tensors(folder, device, torch.float32)
    weight = tensors.pop("linear.weight", None)
    bias = tensors.pop("linear.bias", None)
    wanted = (config.get("out_features"), config.get("in_features"))
    fits = weight is not None and tuple(weight.shape) == wanted and wanted[1] == width
    if fits and bias is not None:
        fits = bias.shape == weight.shape[:1]
    if not fits or tensors:
        raise InputError(f"{folder}/model.safetensors does not fit its config.json: linear.weight "
                         f"must have the shape {wanted}, and read vectors of {width} numbers")
    if bool(config.get("bias", True)) != (bias is not None):
        raise InputError(f"{path} and its weights disagree about the bias")
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    name = name.rpartition(".")[2].removesuffix("()")
    if name not in ACTIVATIONS:
        raise InputError(f"{path} has the activation {short(name)}: {', '.join(ACTIVATIONS)} are "
                         "implemented")
    activation = ACTIVATIONS[name]()

    def dense(vectors):                      # (B, in) -> (B, out)
        return activation(F.linear(vectors, weight, bias))
    return dense, wanted[0]
