"""Merging: a checkpoint whose weights contain an adapter's update, written one tensor at a time.

The base's files are read tensor by tensor, and the merged ones written tensor by tensor, so that
memory depends on the largest tensor and not on the size of the model."""

import math
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from support.files import InputError, read_json, short, write_json
from support.hub import check_finite, opened, shape_of, tensor_files, write_tensors
from support.peft_files import (PREFIX, check_fit, kind_of, module_names, read_adapter,
                                read_adapter_config)
from support.registry import ADAPTERS

try:
    import fcntl
except ImportError:  # Windows: no lock on a folder
    fcntl = None


# ---- Tensors, each made when it is asked for -----------------------------------------------------

class Stored:
    """The tensors of a checkpoint's files: stored(name) reads one, in fp32. `prefix` is put before
    each name. `files`: {path: the names in it, in its order}; `shapes`: {name: shape}."""

    def __init__(self, folder, file="model.safetensors", prefix=""):
        self.prefix = prefix
        self.files = {}
        self.shapes = {}
        self.path = {}
        for path in tensor_files(folder, file):
            found = opened([path], shape_of)
            self.files[path] = [name.removeprefix(prefix) for name in found]
            for name, shape in found.items():
                self.shapes[name.removeprefix(prefix)] = shape
                self.path[name.removeprefix(prefix)] = path

    def __call__(self, name):
        """A tensor in fp32. Its file is opened for this alone: one that stays open keeps all of it
        that was read in memory."""
        wanted = self.prefix + name

        def read(file, found):
            tensor = file.get_tensor(found).float()
            check_finite(found, tensor)
            return tensor
        def only_it(other):
            return name if other == wanted else ""
        return opened([self.path[name]], read, rename=only_it)[name]


class LowRankUpdate:
    """An adapter of low-rank layers: layer(name, linear) is the linear layer with the adapter on
    it, weight(name, W) the merged weight, both in fp32."""

    def __init__(self, folder, model):
        self.folder = folder
        self.file = read_adapter(folder, module_names(model))
        self.kind = self.file.kind
        self.parts = {name: {} for name in self.file.layers}
        for full in sorted(self.file.tensors):
            name = full.rpartition(".lora_")[0]
            if name not in self.parts:
                raise InputError(f"the adapter in {folder} does not fit this model: it has "
                                 f"{short(full)}, which the model lacks: it was trained on another "
                                 "model, or on other layers")
            self.parts[name][full] = self.file.tensors[full]
        self.refuse_unmergeable(model)

    def refuse_unmergeable(self, model):
        """Raise InputError, before anything is written, for a kind that has no merged weight."""
        if self.file.lacks_start:            # its start would be computed from W, which takes long
            return
        first = self.file.layers[0]
        linear = model.get_submodule(first)
        self.weight(f"{first}.weight", torch.zeros(linear.out_features, linear.in_features))

    def names(self):
        """The names of the tensors that the adapter changes."""
        return {f"{name}.weight" for name in self.parts}

    @torch.no_grad()
    def layer(self, name, linear):
        shape = self.file.shape
        row = ADAPTERS[self.kind]
        layer = row.layer(linear, shape["rank"], shape["alpha"], 0.0, shape["width"])
        tensors = self.parts[name]
        if self.file.lacks_start:
            layer.start(torch.Generator().manual_seed(0))
            tensors = row.complete({name: layer}, tensors)
        own = layer.stored()
        check_fit(self.folder, {f"{name}.{part}": tensor for part, tensor in own.items()}, tensors)
        layer.take({part: tensors[f"{name}.{part}"] for part in own})
        return layer.eval()

    @torch.no_grad()
    def weight(self, name, weight):
        out_features, in_features = weight.shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return self.layer(name.removesuffix(".weight"), linear).merged_weight()


class FullUpdate:
    """All weights, trained: those in the adapter's file take the base's place."""
    kind = "full"

    def __init__(self, folder, model):
        self.stored = Stored(folder, "adapter_model.safetensors", PREFIX)
        found = {}
        for name, shape in self.stored.shapes.items():
            found[name] = torch.empty(shape, device="meta")
        check_fit(folder, dict(model.named_parameters()), found)

    def names(self):
        return set(self.stored.shapes)

    def weight(self, name, weight):
        return self.stored(name)


def read_update(folder, model):
    """The update that the adapter in `folder` makes to a model, which may be on meta. InputError if
    it does not fit, or cannot be merged."""
    config = read_adapter_config(folder)
    if ADAPTERS[kind_of(config)].layer is None:
        return FullUpdate(folder, model)
    return LowRankUpdate(folder, model)


# ---- The merged checkpoint -----------------------------------------------------------------------

# What stands beside the weights and is copied as it is, where the base has it.
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
          "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json", "LICENSE")


def write_merged(base, stored, update, out, dtype, tied):
    """Writes base + adapter into the folder `out`, in the base's own shards, with the base's
    configuration, tokenizer, chat template and generation settings. stored: the base's Stored;
    tied: leave out a stored copy of the tied head, which would be of the base's embedding."""
    changed = update.names()

    def merged(name):
        weight = stored(name)
        return update.weight(name, weight) if name in changed else weight
    total = 0
    places = {}
    for path, names in stored.files.items():
        kept = [name for name in names if not (tied and name == "lm_head.weight")]
        shapes = {name: stored.shapes[name] for name in kept}
        if kept:
            write_tensors(out / path.name, shapes, dtype, merged)
        places |= dict.fromkeys(kept, path.name)
        total += sum(map(math.prod, shapes.values())) * dtype.itemsize
    if len(stored.files) > 1:
        write_json(out / "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": places})
    config = read_json(base / "config.json")
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
    write_json(out / "config.json", config | dict.fromkeys(keys, str(dtype)[6:]))
    copy_beside(base, out)


def copy_beside(base, out):
    """Copy what stands beside the weights in `base` into the folder `out`."""
    for name in COPIED:
        if (base / name).exists():
            shutil.copyfile(base / name, out / name)


@contextmanager
def atomic_folder(out):
    """Yields OUT.partial, a new folder, which is renamed to `out` if all went well, and removed
    otherwise. What a killed process left there is removed first. InputError if `out` exists, or
    another process is writing it."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists, and would be written over: choose another --out")
    new = out.with_name(f"{out.name}.partial")
    new.mkdir(parents=True, exist_ok=True)
    with open(new / ".lock", "w") as lock:
        try:
            if fcntl is not None:            # the system drops the lock however the process ends
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out} is being written by another process: wait for it, or stop "
                             "it") from None
        for old in new.iterdir():
            if old.name != ".lock":
                old.unlink()
        try:
            yield new
            (new / ".lock").unlink()
            os.replace(new, out)
        finally:
            shutil.rmtree(new, ignore_errors=True)
