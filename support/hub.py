"""Checkpoint files: which files hold a folder's tensors; loading and saving a whole model.

A folder may come from anybody: only safetensors files are read, links are followed inside the
folder or inside the hub client's own cache alone, headers are checked before memory is taken."""

import json
import math
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import (hf_hub_download, snapshot_download,
                             split_torch_state_dict_into_shards)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.files import InputError, atomic_write, read_json, short, write_json


OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt")   # opening one can run code

SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")

SAVED_NAME = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")  # of save_model

FLOATS = ("F64", "F32", "F16", "BF16")

SAVED_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def tensor_files(folder, file="model.safetensors"):
    """The paths that hold a checkpoint's tensors: `file` where it exists, as transformers reads it
    (an index next to it is older or belongs to other shards); else every shard that its index
    names."""
    folder = Path(folder)
    index = folder / f"{file}.index.json"
    if (folder / file).exists() or not index.exists():
        paths = [folder / file]
    else:
        paths = [folder / name for name in shard_names(index)]
        check_links(folder, paths)
    for path in paths:
        if not path.exists():
            raise InputError(missing_message(folder, path))
    return paths


def shard_names(index):
    """The file names in an index, sorted; each is a plain name in the index's folder."""
    value = read_json(index)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map: download the checkpoint again")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if not SHARD_NAME.fullmatch(name):
            raise InputError(f"{index} names {short(name)}: a shard is a .safetensors file in the "
                             "same folder")
    return names


def check_links(folder, paths):
    """Raises if a shard is a link that leaves the folder, or, for a snapshot in the hub client's
    cache, that leaves this cache."""
    places = trusted_places(folder)
    for path in paths:
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in places):
            raise InputError(f"{path} is a link to another folder ({target}): copy the file itself "
                             "into the checkpoint's folder")


def trusted_places(folder):
    """The folders that links of a checkpoint may lead to. The hub client makes the links of its
    cache itself: CACHE/models--owner--name/snapshots/commit/file leads to blobs of the model, and
    these may lead to CACHE/blobs, which all models share (huggingface_hub 2)."""
    folder = folder.resolve()
    model = folder.parent.parent
    if folder.parent.name != "snapshots" or "--" not in model.name:
        return [folder]
    cache = model.parent
    # Either folder of blobs may be a link of the user's own, to a larger disk.
    return [cache, (model / "blobs").resolve(), (cache / "blobs").resolve()]


def config_without_weights(path, revision=None):
    """config.json (a dict) of a checkpoint whose weights are not on this machine; None if they are,
    or if `path` names no checkpoint. Of a hub name config.json alone is fetched, into a folder that
    is removed again."""
    if os.path.isdir(path):
        folder = Path(path)
        if has_weights(folder) or not (folder / "config.json").exists():
            return None
        return read_json(folder / "config.json")
    name = str(path)
    if os.path.exists(path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return None
    try:
        if has_weights(Path(snapshot_download(name, revision=revision, local_files_only=True))):
            return None
    except (OSError, ValueError):
        pass                                 # the hub client's cache has nothing of it
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = hf_hub_download(name, "config.json", revision=revision, local_dir=folder)
        except Exception as e:  # the hub client has many kinds: offline, no such name, no access
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise InputError(f"config.json of {name!r} could not be fetched from the hub "
                             f"({reason}): check the name, the revision and the connection"
                             ) from None
        return read_json(file)


def has_weights(folder):
    """Whether every file that holds a checkpoint's tensors is there."""
    try:
        return bool(tensor_files(folder))
    except InputError:
        return False


def missing_message(folder, path):
    """Says why a checkpoint's file is not there, as far as the folder shows it."""
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in names if name.endswith(OTHER_FORMATS) and "model" in name]
    weights = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if path.is_symlink():
        return (f"{path} is a link to a file that is not there: the download did not finish, or "
                "the cache was moved: download the checkpoint again")
    if others:
        how = "load it with transformers and call save_pretrained"
        if "adapter" in path.name:
            how = "PeftModel.from_pretrained(base, folder).save_pretrained(folder)"
        return (f"{folder} holds {others[0]} and no {path.name}: only safetensors files are read, "
                f"since the other formats can run code: convert it once ({how})")
    if f"{path.name}.index.json" not in names and any(n.endswith(".index.json") for n in names):
        return (f"{path} is missing, and the folder's index names it: the checkpoint is "
                "incomplete: download it again")
    held = f" (the folder holds {short(weights[0])})" if weights else ""
    return (f"{path} is missing{held}: the checkpoint is incomplete, or its weights are in "
            "another format than safetensors: download it again, or convert it")


def opened(paths, read, device="cpu", rename=str):
    """{rename(name): read(file, name)} over the tensors of safetensors files, except those that
    `rename` gives no name; raises if a file is damaged."""
    out = {}
    for path in paths:
        try:
            with safe_open(path, "pt", device=str(device)) as f:
                for name in filter(rename, f.keys()):
                    out[rename(name)] = read(f, name)
        except InputError as e:
            raise InputError(f"{path}: {e}") from None
        except torch.OutOfMemoryError:
            raise InputError(f"the weights in {path.parent} do not fit into the memory of {device}:"
                             " add --nf4, or --shard on several GPUs, or give a smaller model"
                             ) from None
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as e:
            raise InputError(f"{path} cannot be read as safetensors ({str(e)[:100]}): download it "
                             "again") from None
    return out


def shape_of(file, name):
    """A tensor's shape, from the header; weights are floating-point numbers."""
    part = file.get_slice(name)
    if part.get_dtype() not in FLOATS:
        raise InputError(f"{name[:200]!r} is stored as {part.get_dtype()}, and only weights in "
                         f"{', '.join(FLOATS)} are read: give the checkpoint that is not quantised "
                         "(--nf4 quantises it when it is loaded)")
    return tuple(part.get_shape())


def tensor_shapes(folder, rename=str):
    """name -> shape, from the files' headers alone."""
    return opened(tensor_files(folder), shape_of, rename=rename)


def read_tensors(folder, device="cpu", dtype=None, file="model.safetensors", rename=str):
    """name -> tensor from `file`, or from every shard its index names; every number is finite."""
    def read(f, name):
        shape_of(f, name)
        tensor = f.get_tensor(name).to(dtype)
        check_finite(name, tensor)
        return tensor
    return opened(tensor_files(folder, file), read, device, rename)


def write_tensors(path, shapes, dtype, tensor_of):
    """Writes a safetensors file of the tensors {name: shape}, all of `dtype`, one by one as
    tensor_of(name) makes them: no two are in memory at a time, as they would be for save_file."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAVED_DTYPES[dtype], "shape": list(shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)          # the numbers begin at a multiple of 8 bytes
    with atomic_write(path) as new, open(new, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = tensor_of(name).to(dtype).contiguous()
            if tensor.shape != torch.Size(shape):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
            check_finite(name, tensor)
            file.write(tensor.flatten().view(torch.uint8).numpy())


def check_finite(name, tensor):
    """Raises if a tensor holds NaN or infinity: the smallest or the largest number is then one."""
    if tensor.numel() == 0:
        return
    low, high = tensor.aminmax()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise InputError(f"tensor {name[:200]!r} holds numbers that are not finite (NaN or "
                         f"infinity) as {str(tensor.dtype).removeprefix('torch.')}: training "
                         "diverged before it was saved, or the file is damaged: use an earlier "
                         "checkpoint")


@contextmanager
def tokenizer_errors(file):
    """InputError for what tokenizers raises: plain Exceptions, and panics, which are none."""
    try:
        yield
    except InputError:
        raise
    except BaseException as e:
        if isinstance(e, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise InputError(f"{file} is not a tokenizer that can be worked with "
                         f"({' '.join(str(e).split())[:100]}): fetch it again") from None


# ---- A whole model -------------------------------------------------------------------------------

def load_model(model_class, config, folder, device=None, dtype=None):
    """The frozen model in a folder, loaded strictly, in `dtype` or as stored. It is built on meta,
    so that no weight is held twice. Raises InputError for a tensor that is missing, unknown or of
    another shape. Names without `model.`, as Qwen3-Embedding's, are read too."""
    shapes = tensor_shapes(folder)
    # An embedder's names lack `model.`, and it has no head.
    prefix = "model." if "embed_tokens.weight" in shapes else ""
    shapes = with_prefix(prefix, shapes)
    model = empty_model(model_class, config, folder, shapes, embedder=bool(prefix))
    tensors = read_tensors(folder, device or "cpu", dtype or getattr(torch, config.dtype))
    tensors = with_prefix(prefix, tensors)
    if config.tie_word_embeddings:
        copy = tensors.pop("lm_head.weight", None)
        if copy is not None and not torch.equal(copy, tensors["model.embed_tokens.weight"]):
            raise InputError(f"the checkpoint in {folder} has an lm_head.weight of its own, and "
                             "its config.json sets tie_word_embeddings: set that to false")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()  # frozen: a phase says what it trains


def with_prefix(prefix, values):
    return {prefix + name: value for name, value in values.items()}


def empty_model(model_class, config, folder, shapes, embedder):
    """The model on meta, with the heads that the {name: shape} of its files show. The headers are
    compared with config.json before memory is taken; InputError names the first difference."""
    score = "score.weight" in shapes
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)   # some writers store the tied copy too
    if config.num_hidden_layers > len(shapes):  # before as many are built
        raise InputError(f"the checkpoint in {folder} has {len(shapes)} tensors, its config.json "
                         f"says num_hidden_layers = {config.num_hidden_layers}: it lacks tensors")
    with torch.device("meta"):
        model = model_class(config, lm_head=not (embedder or score), score_head=score)
    same_layout(folder, model_shapes(model), shapes)
    return model


def model_shapes(model):
    """{name: shape} of a model's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def same_layout(folder, wanted, shapes):
    """InputError with the first difference between the {name: shape} that config.json asks for and
    those of the files."""
    for problem, names in (("lacks", wanted.keys() - shapes.keys()),
                           ("has an unknown", shapes.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"the checkpoint in {folder} {problem} tensor {short(min(names))}"
                             f"{more}: its config.json describes another network")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise InputError(f"tensor {name!r} in {folder} has shape {shapes[name]}, config.json "
                             f"asks for {shape}")


def save_model(model, folder, shard_bytes):
    """Writes config.json and model.safetensors, or shards and their index, in the hub's layout.
    Files of an earlier save that no longer belong to it are deleted: an old index would have its
    shards read again."""
    folder = Path(folder)
    if any(getattr(module, "quantised", False) for module in model.modules()):
        raise InputError("a model in NF4 cannot be saved: save its adapter, and load the "
                         "checkpoint in full to merge")
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    tensors = dict(model.state_dict())
    if not model.has_logits and not model.has_score:  # an embedder: its names lack `model.`
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    # The hub's function keeps tensors together that share memory.
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        part = {name: tensors[name].contiguous() for name in names}
        with atomic_write(folder / file) as path:
            save_file(part, path, metadata={"format": "pt"})
    kept = set(plan.filename_to_tensors)
    if plan.is_sharded:
        index = folder / "model.safetensors.index.json"
        kept.add(index.name)
        write_json(index, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    for old in folder.iterdir():
        if SAVED_NAME.fullmatch(old.name) and old.name not in kept:
            old.unlink()
    write_json(folder / "config.json", model.config.to_dict())
