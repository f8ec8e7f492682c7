"""Adapters that choose what they keep while they train: AdaLoRA and LoRI."""

import math

import torch
from torch import nn

from lora import LoRALinear, lora_layers
from support.files import InputError, short
from support.registry import ADAPTERS
from support.shaping import adapter_buffers


# ---- AdaLoRA: triplets that were cut -------------------------------------------------------------

def adalora_masks(path, config):
    """layer -> list of booleans, which of its init_r triplets the file holds, from rank_pattern;
    {} before the budget has cut any."""
    pattern = config.get("rank_pattern") or {}
    masks = {}
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
        for part, axis in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            name = f"{layer}.{part}"
            tensor = stored.get(name)
            if tensor is None or tensor.dim() != 2:
                raise InputError(f"{folder}: the adapter's file lacks {short(name)}, which its "
                                 "rank_pattern names")
            if tensor.shape[axis] == sum(kept) != len(kept):
                whole[name] = spread_out(tensor, kept, axis)
            elif tensor.shape[axis] != len(kept):
                raise InputError(f"{folder}: {short(name)} has {tensor.shape[axis]} triplets, "
                                 f"rank_pattern keeps {sum(kept)}")
            elif part == "lora_E":           # saved with the cut triplets
                whole[name] = tensor * tensor.new_tensor(kept)[:, None]
    return whole


def spread_out(tensor, kept, axis):
    """A tensor of the kept triplets' rows (axis 0) or columns (1) with zeros for the others."""
    shape = list(tensor.shape)
    shape[axis] = len(kept)
    places = torch.tensor(kept).nonzero().flatten()
    return tensor.new_zeros(shape).index_copy_(axis, places, tensor)


class AdaLoRALinear(LoRALinear):
    """y = W x + (alpha / width) P diag(E) Q x, P = lora_B, Q = lora_A, E zero at first: the least
    important triplets are cut, over all layers, from width = 1.5 r a layer to r (arXiv 2303.10512;
    see Budget). P and Q are kept near orthogonal (see orthogonality)."""
    kind = "adalora"
    trains = (*LoRALinear.trains, "lora_E")
    MATRICES = {"A": "lora_A.weight", "B": "lora_B.weight", "E": "lora_E"}

    def __init__(self, linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        empty = self.lora_A.weight.new_empty
        self.lora_E = nn.Parameter(empty(self.width, 1))
        # Not of the adapter's file, but of a checkpoint: which triplets are kept, and for each
        # tensor the moving averages of importance and of its uncertainty.
        self.register_buffer("lora_mask", torch.ones_like(self.lora_E), persistent=False)
        for name, path in self.MATRICES.items():
            p = self.get_parameter(path)
            for average in ("mean", "spread"):
                zero = torch.zeros(p.shape, device=p.device)
                self.register_buffer(f"lora_{average}_{name}", zero, persistent=False)

    @staticmethod
    def width_of(rank, members):
        return math.ceil(1.5 * rank)

    def set_alpha(self, alpha):
        self.alpha = float(alpha)
        self.scale = alpha / self.width

    def start(self, generator):
        for part in (self.lora_A.weight, self.lora_B.weight):
            part.copy_(0.02 * torch.randn(part.shape, generator=generator))
        self.lora_E.zero_()

    def factors(self):
        return self.lora_A.weight * self.lora_E, self.lora_B.weight

    def orthogonality(self):
        """|P^T P - I|^2 + |Q Q^T - I|^2 (equation 4)."""
        A = self.lora_A.weight
        B = self.lora_B.weight
        one = torch.eye(self.width, device=A.device)
        of_a = ((A @ A.t() - one) ** 2).sum()
        of_b = ((B.t() @ B - one) ** 2).sum()
        return of_a + of_b

    def importance(self, decay=0.85):
        """(width,), after a step: of each triplet, s(E) + mean s(P) + mean s(Q), where s is the
        moving average of I = |w dL/dw| times that of |I - its average| (equations 8 to 11)."""
        s = {}
        for name, path in self.MATRICES.items():
            p = self.get_parameter(path)
            mean = self.get_buffer(f"lora_mean_{name}")
            spread = self.get_buffer(f"lora_spread_{name}")
            now = (p * p.grad).abs()
            mean.lerp_(now, 1 - decay)
            spread.lerp_((now - mean).abs(), 1 - decay)
            s[name] = mean * spread
        return s["E"].squeeze(1) + s["A"].mean(1) + s["B"].mean(0)

    def stored(self):
        """In PEFT's names: its A, B and E are bare parameters."""
        return {n.removesuffix(".weight"): t for n, t in super().stored().items()}


class LoRILinear(LoRALinear):
    """y = W x + (alpha / r) (B * M) A x: A stays as it was drawn, and of B only the tenth trains
    that is largest, over all layers, after a calibration: a tenth of the steps, where the paper
    makes a whole run for it (arXiv 2504.07448; see Budget)."""
    kind = "lori"
    trains = ("lora_B.weight",)

    def __init__(self, linear, *args, **kwargs):
        super().__init__(linear, *args, **kwargs)
        self.lora_A.weight.requires_grad_(False)
        self.register_buffer("lora_mask", torch.ones_like(self.lora_B.weight).detach())

    def factors(self):
        return self.lora_A.weight, self.lora_B.weight * self.lora_mask


# ---- What some adapters ask for in each step -----------------------------------------------------

class Budget:
    """What AdaLoRA and LoRI do around each update (see support/shaping.py); nothing for the others.

    `steps`: of the phase that decides what is kept; None: an earlier phase has decided.
    AdaLoRA: triplets kept, over all layers: width each in the first tenth of the steps, r each in
    the last three tenths, in between r + (width - r)(1 - share)^3 (equation 12). LoRI: after a
    tenth of the steps the mask is set and B begins again at zero; Adam's averages go on."""
    KEPT = 0.1               # LoRI: of B
    ORTHOGONAL = 0.5         # AdaLoRA: weight of orthogonality, mean over the matrices P and Q

    def __init__(self, model, steps=None):
        self.layers = list(lora_layers(model).values())
        self.steps = steps
        self.kept = adapter_buffers(model)
        self.kinds = {layer.kind for layer in self.layers}
        self.chosen = False                  # has LoRI set its mask?
        if "adalora" in self.kinds and steps is None:
            for layer in self.layers:
                layer.lora_mask.copy_(layer.lora_E != 0)

    def before(self):
        """Adds the regulariser's gradient, once the step's is summed over ranks: it is the same on
        each of them."""
        if "adalora" in self.kinds:
            total = sum(layer.orthogonality() for layer in self.layers)
            (self.ORTHOGONAL * total / (2 * len(self.layers))).backward()

    @torch.no_grad()
    def after(self, step):
        """After optimizer step `step`, with its gradient still there."""
        if "adalora" in self.kinds:
            self.cut_triplets(step)
        if "lori" in self.kinds:
            # A step that was skipped does not come here: then the next one sets the mask.
            calibrated = self.steps and step + 1 >= max(1, self.steps // 10)
            if calibrated and not self.chosen:
                if not self.has_mask():      # of a run that was resumed
                    self.choose_entries()
                self.chosen = True
            for layer in self.layers:
                layer.lora_B.weight.mul_(layer.lora_mask)

    def has_mask(self):
        return not all(bool(layer.lora_mask.all()) for layer in self.layers)

    def triplets(self, step):
        """How many AdaLoRA keeps after step `step`."""
        rank = self.layers[0].rank
        width = self.layers[0].width
        first = self.steps // 10
        last = self.steps - 3 * self.steps // 10
        share = min(max((step + 1 - first) / max(1, last - first), 0), 1)
        return round(len(self.layers) * (rank + (width - rank) * (1 - share) ** 3))

    def cut_triplets(self, step):
        """Zeroes AdaLoRA's least important triplets, over all layers."""
        if self.steps:
            scores = torch.cat([layer.importance() for layer in self.layers])
            self.set_masks(scores, min(self.triplets(step), len(scores)))
        for layer in self.layers:
            layer.lora_E.mul_(layer.lora_mask)

    def choose_entries(self):
        """Sets LoRI's mask to the largest entries of B, over all layers; B begins again at zero."""
        sizes = torch.cat([layer.lora_B.weight.abs().flatten() for layer in self.layers])
        self.set_masks(sizes, max(1, int(self.KEPT * len(sizes))))
        for layer in self.layers:
            layer.lora_B.weight.zero_()

    def set_masks(self, scores, count):
        """Masks of 1 for the `count` largest scores, which are flat, layer by layer."""
        best = scores.topk(count).indices
        mask = torch.zeros_like(scores).index_fill_(0, best, 1)
        start = 0
        for layer in self.layers:
            size = layer.lora_mask.numel()
            layer.lora_mask.copy_(mask[start:start + size].view_as(layer.lora_mask))
            start += size


def adalora_config(layer):
    return {"r": layer.width, "init_r": layer.width, "target_r": layer.rank, "total_step": 1,
            "tinit": 0, "tfinal": 0}


def restore_triplets(path, config, stored):
    return fill_cut_triplets(path.parent, stored, adalora_masks(path, config))


def adalora_shape(config):
    width = config["init_r"]
    return dict(rank=config["target_r"], alpha=config["lora_alpha"], width=width), width


ADAPTERS.add("adalora", "ranks by importance, from 1.5 r to r on average (arXiv 2303.10512)",
             peft_type="ADALORA", into="layer", config=adalora_config, shape=adalora_shape,
             wants=("init_r", "target_r"), shaping=Budget, settings=("rank_pattern",),
             check=adalora_masks, restore=restore_triplets)(AdaLoRALinear)
ADAPTERS.add("lori", "A frozen, a tenth of B trains (arXiv 2504.07448)", peft_type="LORI",
             into="layer", shaping=Budget)(LoRILinear)
