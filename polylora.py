"""Phase one: LoRA fine-tuning with a diversity term, L = L_quality - lambda * D(generations).

    python polylora.py base --data base.jsonl --out runs/base              # a small Qwen3 from nothing (pocket study)
    python polylora.py sft --model Qwen/Qwen3-8B --data sft.jsonl --out runs/poly --lambda 0.3
    torchrun --nproc-per-node=8 polylora.py sft ...                        # the same step, spread over 8 GPUs

L_quality is the mean cross-entropy over reply tokens. D is the mean pairwise cosine distance between the
embeddings of k drafts sampled from the model being trained. Sampling has no derivative, so D's gradient is
the score function's: each draft's log-probability is pushed by how much the draft adds to D
(diversity_advantages). In order: LoRA layers and adapter files, D, what both phases share (ranks, run folder,
training loop), the SFT step, the commands.
"""

import argparse
import hashlib
import json
import math
import os
import random
import resource
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import data
from model import NF4, Config, InputError, Qwen3, fetch, generate, read_json, read_tensors, token_logprobs

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- LoRA ------------------------------------------------------------------------------------------------------
#
# x ──> W (frozen, any dtype) ─────────────> + ──> y          A (r, in): random, B (out, r): zero, so that the
# └──> A ──> (.., r) ──> B ──> * alpha/r ────┘                first forward is the base model's, bit for bit

class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x. W, a tensor or an NF4, keeps its name and dtype; A and B are fp32 (Adam's steps on a bf16 A
    round to nothing at small learning rates) and are cast to the input's dtype for the product."""

    def __init__(self, linear, rank, alpha, dropout=0.0):
        super().__init__()
        self.weight, self.scale, self.dropout, self.enabled = linear.weight, alpha / rank, dropout, True
        self.in_features, self.out_features = linear.in_features, linear.out_features
        make = dict(bias=False, dtype=torch.float32, device=linear.weight.device)
        self.lora_A = nn.Linear(linear.in_features, rank, **make)
        self.lora_B = nn.Linear(rank, linear.out_features, **make)

    def forward(self, x):
        y = self.weight(x) if isinstance(self.weight, NF4) else F.linear(x, self.weight)
        if not self.enabled:
            return y
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.weight.to(x.dtype))
        # In place: the frozen product needs nothing of y for its backward, so the sum takes no second (..,
        # out) tensor.
        y.flatten(0, -2).addmm_(low.flatten(0, -2), self.lora_B.weight.t().to(x.dtype), alpha=self.scale)
        return y

    def merged_weight(self):
        """W + (alpha / r) B A in fp32. Rounded to bf16 most of a small update would be lost."""
        weight = self.weight.dense() if isinstance(self.weight, NF4) else self.weight.float()
        return torch.addmm(weight, self.lora_B.weight, self.lora_A.weight, alpha=self.scale)


def lora_layers(model):
    """name -> LoRALinear, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, rank, alpha, *, dropout=0.0, targets=LINEARS, seed=0):
    """Put LoRA on every linear layer whose last name is in `targets`; the rest of the model is frozen.
    Returns model.

    A is drawn as PEFT draws it (Kaiming uniform, a = sqrt(5)) from a generator of its own on the CPU: the
    same on every rank and device. The token head and the embedding are never wrapped: tied, one would corrupt
    the other.
    """
    unknown = set(targets) - set(LINEARS)
    if unknown or not targets:
        raise InputError(f"LoRA target {min(unknown, default='')!r} is no linear layer of Qwen3: choose from {', '.join(LINEARS)}")
    if rank < 1:
        raise InputError(f"the LoRA rank is {rank}: it must be at least 1")
    if lora_layers(model):
        raise InputError("the model has LoRA layers already: merge them or load into them")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in targets]:
        layer = LoRALinear(linear, rank, alpha, dropout)
        bound = 1 / math.sqrt(linear.in_features)
        start = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            layer.lora_A.weight.copy_(start)
            layer.lora_B.weight.zero_()
        layer.train(linear.training)  # a new module trains: dropout would then make answers noisy
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def adapter_state(model):
    """name -> parameter of A and B, named as in the model: model.layers.0.self_attn.q_proj.lora_A.weight,
    ..."""
    return {f"{name}.{part}.weight": getattr(layer, part).weight for name, layer in lora_layers(model).items()
            for part in ("lora_A", "lora_B")}


@contextmanager
def adapter(model, state):
    """Within: the model with the adapter tensors `state` (as from frozen_copy), or with none (None): the base
    model."""
    layers, own = lora_layers(model).values(), {n: p.data for n, p in adapter_state(model).items()}
    was = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = state is not None
        for name, p in adapter_state(model).items() if state else ():
            p.data = state[name]
        yield model
    finally:
        for layer, enabled in zip(layers, was):
            layer.enabled = enabled
        for name, p in adapter_state(model).items():
            p.data = own[name]


def frozen_copy(model):
    return {name: p.detach().clone() for name, p in adapter_state(model).items()}


PREFIX = "base_model.model."  # PEFT's, before the model's own names


def save_adapter(model, folder, base=""):
    """adapter_config.json and adapter_model.safetensors, as PEFT writes and reads them."""
    layers = lora_layers(model)
    if not layers:
        raise InputError("save_adapter: the model has no LoRA layers")
    first, folder = next(iter(layers.values())), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rank = first.lora_A.out_features
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank,
              "lora_alpha": first.scale * rank, "lora_dropout": first.dropout, "bias": "none", "fan_in_fan_out": False,
              "target_modules": sorted({name.rpartition(".")[2] for name in layers}), "modules_to_save": None,
              "use_rslora": False, "use_dora": False, "init_lora_weights": True, "inference_mode": True}
    tensors = {PREFIX + n: p.detach().cpu().contiguous() for n, p in adapter_state(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)


def load_adapter(model, folder, *, dropout=None):
    """Put the adapter in `folder` (PEFT's layout) on the model, or into the LoRA layers that it has. Returns
    model.

    Raises InputError when the files are missing, ask for what this code lacks, or fit another model.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if config.get(key):
            raise InputError(f"{folder}/adapter_config.json sets {key}: only plain LoRA is implemented")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise InputError(f"{folder}/adapter_config.json is not a plain LoRA adapter's")
    if not {"r", "lora_alpha", "target_modules"} <= config.keys():
        raise InputError(f"{folder}/adapter_config.json lacks r, lora_alpha or target_modules: the adapter is incomplete")
    stored = {n.removeprefix(PREFIX): t for n, t in read_tensors(folder, file="adapter_model.safetensors").items()}
    if not lora_layers(model):
        add_lora(model, config["r"], config["lora_alpha"], targets=tuple(config["target_modules"]))
    own = adapter_state(model)
    odd = sorted(own.keys() ^ stored.keys()) or sorted(n for n in own if own[n].shape != stored[n].shape)
    if odd:
        raise InputError(f"the adapter in {folder} does not fit this model (first difference: {odd[0]!r}): it was trained "
                         "on another one, or on other layers")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(stored[name])
    for layer in lora_layers(model).values():
        layer.scale = config["lora_alpha"] / config["r"]
        layer.dropout = config.get("lora_dropout", 0.0) if dropout is None else dropout
    return model


def drop_lora(model, weight_of=lambda layer: layer.weight):
    """Replace every LoRA layer by a plain linear: with its frozen weight, so the base model is back. Returns
    model."""
    for name, layer in lora_layers(model).items():
        linear, weight = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta"), weight_of(layer)
        if isinstance(weight, NF4):
            linear = weight
        else:
            linear.weight = nn.Parameter(weight, requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model


def merge_lora(model, dtype=torch.float32):
    """Replace every LoRA layer by a plain linear with W + (alpha / r) B A, added in fp32. Returns the model
    in `dtype`: fp32 by default, since rounding the sum to bf16 drops most of a small update."""
    return drop_lora(model, LoRALinear.merged_weight).to(dtype)


# ---- Diversity -------------------------------------------------------------------------------------------------

def pair_distances(embeddings, quality=None, floor=0.0):
    """delta_ij = 1 - e_i . e_j, when gated (floor + delta_ij) q_i q_j; zero on the diagonal. (P, k, dim) ->
    (P, k, k) in fp32."""
    e = embeddings.float()
    delta = 1 - e @ e.transpose(-1, -2)
    if quality is not None:
        delta = (floor + delta) * quality.float()[..., None] * quality.float()[..., None, :]
    return delta - torch.diag_embed(delta.diagonal(dim1=-2, dim2=-1))


def diversity(embeddings, quality=None, floor=0.0):
    """D (P,) of unit embeddings (P, k, dim): the mean pairwise cosine distance, 2/(k(k-1)) sum_{i<j}
    delta_ij.

    With quality (P, k) in [0, 1] each pair counts (floor + delta_ij) q_i q_j: drafts that are wrong earn
    nothing by being different, and with a floor two right ones are worth something even when alike.
    """
    k = embeddings.shape[-2]
    if k < 2:
        raise InputError("diversity needs at least two drafts (k >= 2)")
    return pair_distances(embeddings, quality, floor).sum((-1, -2)) / (k * (k - 1))


def diversity_advantages(embeddings, quality=None, floor=0.0):
    """a_i = D - D_without_i (P, k): what draft i adds to D. With it, E[sum_i a_i grad log pi(y_i)] = grad
    E[D].

    D_without_i does not depend on y_i, so subtracting it leaves the score-function gradient unbiased. With k
    = 2 there is no D without i; the baseline is then 0: unbiased too, but noisier.
    """
    k, total = embeddings.shape[-2], diversity(embeddings, quality, floor)
    pairs = pair_distances(embeddings, quality, floor)
    if k == 2:
        return total[:, None].expand(-1, 2)
    without = (pairs.sum((-1, -2))[:, None] - 2 * pairs.sum(-1)) / ((k - 1) * (k - 2))
    return total[:, None] - without


class Embedder:
    """Texts -> unit vectors by a FROZEN Qwen3: an embedding model (its last token), or the base model of the
    run (mean of the final hidden states over the text, its adapter switched off).

    Hidden states of a language model all point one way (cosines near 1), so the mean is centred on `corpus`,
    the replies of the run's data. Only the reply is embedded, never its prompt; an empty reply is the
    end-of-text token alone.
    """

    def __init__(self, model, tokenizer, *, pooling="mean", corpus=(), batch=256):
        self.model, self.tokenizer, self.pooling, self.batch, self.centre = model, tokenizer, pooling, batch, None
        self.end = tokenizer.token_to_id("<|endoftext|>")
        if pooling == "mean":
            if not corpus:
                raise InputError("the embedder needs reply texts to centre on: the data file has none")
            self.centre = self.vectors(list(corpus)[:2048]).mean(0)

    @torch.no_grad()
    def vectors(self, texts):
        """(texts, dim) in fp32, neither centred nor normed."""
        ids = [e.ids for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        ids = [i + [self.end] for i in ids] if self.pooling == "last" else [i or [self.end] for i in ids]
        order, out = sorted(range(len(ids)), key=lambda i: len(ids[i])), [None] * len(ids)
        with adapter(self.model, None):
            for some in (order[i:i + self.batch] for i in range(0, len(ids), self.batch)):
                lengths = torch.tensor([len(ids[i]) for i in some])
                tokens = torch.zeros(len(some), int(lengths.max()), dtype=torch.long)
                for row, i in zip(tokens, some):
                    row[:len(ids[i])] = torch.tensor(ids[i])
                tokens, lengths = tokens.to(self.model.device), lengths.to(self.model.device)
                if self.pooling == "last":
                    pooled = self.model.last_hidden(tokens, lengths).float()
                else:
                    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
                    pooled = (self.model.hidden(tokens).float() * mask[..., None]).sum(1) / lengths[:, None]
                for i, vector in zip(some, pooled):
                    out[i] = vector
        if self.model.lockstep:
            self.model.lockstep.wait()
        return torch.stack(out)

    def __call__(self, drafts):
        """Unit embeddings (P, k, dim) of texts given as P lists of k."""
        flat = self.vectors([t for texts in drafts for t in texts])
        if self.centre is not None:
            flat = flat - self.centre
        return F.normalize(flat, dim=-1).view(len(drafts), -1, flat.shape[-1])


# ---- What both phases share: ranks, the run folder, the loop ---------------------------------------------------

class Ranks:
    """This process among those of the launch; alone when not under torchrun. The only place that reads RANK
    and so on.

    Every stage of train.sh makes its own group on the launcher's store. Keys of an earlier stage are still
    there, and a group that reads them hangs or calls a dead port, so each stage gets a prefix of its own.
    """

    def __init__(self, stage, device=None):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.main = self.rank == 0
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if not (device == "cpu" or device.partition(":")[0] == "cuda" and torch.cuda.is_available()):
            raise InputError(f"--device {device}: there is no such device here")
        self.device = torch.device(f"cuda:{local}" if device == "cuda" else device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), self.world,
                                  is_master=self.main and not agent)
            store = dist.PrefixStore(f"{stage}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=store, rank=self.rank,
                                    world_size=self.world)

    def sum(self, values):
        """Sums of a list of floats over all ranks, on all ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, params):
        """Gradients summed over ranks in one flat all-reduce. Losses are already divided by the global count,
        so the sum is the gradient of the whole step; a parameter without a gradient on this rank counts as
        zero."""
        if self.world == 1:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
        dist.all_reduce(flat)
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad = g.view_as(p)

    def gather(self, items):
        """Every rank's list, on every rank, in the order in which `items[rank::world]` dealt them."""
        if self.world == 1:
            return items
        parts = [None] * self.world
        dist.all_gather_object(parts, items)
        return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def close(self):
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
            # FSDP keeps the group: a thread of gloo that frees its last tensors while Python ends would abort the process
            time.sleep(0.1)


class Lockstep:
    """With weights that are spread over ranks, each pass through the model is made by all of them together. A rank
    that has no more to do makes the others' passes with them, on nothing."""

    def __init__(self, model, ranks):
        self.model, self.waiting, self.nothing = model, False, torch.zeros(1, 1, dtype=torch.long, device=ranks.device)

    def agree(self, kind):
        """The largest of all ranks' numbers."""
        kind = torch.tensor([kind], device=self.nothing.device)
        dist.all_reduce(kind, dist.ReduceOp.MAX)
        return int(kind)

    def __call__(self):
        """Before each pass: 1 says that it is without gradient, 2 with."""
        if not self.waiting:
            self.agree(1 + torch.is_grad_enabled())

    def wait(self):
        """Returns when all ranks wait: at the end of each piece of work whose number of passes may differ."""
        self.waiting = True
        while kind := self.agree(0):
            with torch.set_grad_enabled(kind == 2):
                nothing = 0 * self.model.hidden(self.nothing).sum()
            if kind == 2:
                nothing.backward()
        self.waiting = False


def shard(model, ranks):
    """Spread the blocks' frozen weights over the ranks by FSDP2: each holds its part, and a block comes together
    while it runs. The adapter, embedding and head stay whole on every rank: gradients are summed as ever."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    whole = {p for n, p in model.named_parameters() if ".layers." not in n or "lora_" in n}
    for p in whole:
        p.data = p.data.to(ranks.device)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, ignored_params=whole & set(module.parameters()))
    register_fsdp_forward_method(model, "hidden")
    model.lockstep = Lockstep(model, ranks)


class Tally:
    """Sums and counts of named numbers over micro-batches; `means` adds all ranks' and divides once."""

    def __init__(self):
        self.sums = {}

    def add(self, name, total, count=1):
        old = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (old[0] + float(total), old[1] + float(count))

    def means(self, ranks, names):
        """The global means of `names`; one that nothing was added to on any rank is left out."""
        flat = ranks.sum([x for n in names for x in self.sums.get(n, (0.0, 0.0))])
        return {n: flat[2 * i] / flat[2 * i + 1] for i, n in enumerate(names) if flat[2 * i + 1]}


def write_json(path, value):
    """Written beside and moved into place: a reader never sees half a file."""
    path, beside = Path(path), Path(f"{path}.partial")
    beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def peak_bytes(device):
    """Peak memory of this process: of the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Run:
    """A run folder: config.json (what was asked for), metrics.jsonl (a line a step), checkpoint.safetensors
    (to go on from), the result (adapter/ or a model), done.json (written last). One folder is one
    configuration."""

    # same result
    VOLATILE = ("out", "resume", "save_every", "micro_tokens", "max_rows", "command", "run", "device", "compile", "no_graphs", "shard")

    def __init__(self, args, ranks):
        self.folder, self.ranks = Path(args.out), ranks
        self.config = {k: v for k, v in vars(args).items() if not callable(v)} | {"version": 1}
        self.done = (self.folder / "done.json").exists()
        if (self.folder / "config.json").exists():
            old = read_json(self.folder / "config.json")
            for key in sorted(old.keys() | self.config.keys()):
                if key not in self.VOLATILE and old.get(key, False) != self.config.get(key, False):
                    raise InputError(f"{self.folder} holds a run with {key} = {old.get(key)!r}, now {self.config.get(key)!r} "
                                     "is asked for: choose another --out, or delete that folder")
            if not (self.done or args.resume):
                raise InputError(f"{self.folder} holds an unfinished run: add --resume to go on, or choose another --out")
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(f"{self.folder} exists and holds no run of this program: choose another --out")

    def begin(self):
        """Write the configuration: once everything was read and found right, so that a mistake leaves nothing
        behind."""
        self.ranks.barrier()  # all have looked before one writes
        if self.ranks.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "config.json", self.config)

    def log(self, line):
        if self.ranks.main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")

    def save(self, step, params, optimizer):
        """Everything the loop mutates. Random numbers need no saving: each is a function of (seed, step,
        post, draft)."""
        if not self.ranks.main:
            return
        tensors = {}
        for i, p in enumerate(params):
            state = optimizer.state[p]
            tensors |= {f"{i}.value": p.detach(), f"{i}.exp_avg": state["exp_avg"], f"{i}.exp_avg_sq": state["exp_avg_sq"]}
        path = self.folder / "checkpoint.safetensors"
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, f"{path}.partial", metadata={"step": str(step)})
        os.replace(f"{path}.partial", path)

    def restore(self, params, optimizer):
        """Load the checkpoint if there is one; returns the step to go on from. Later metrics lines are
        dropped."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            return 0
        with safe_open(path, "pt") as f:
            step = int(f.metadata()["step"])
            for i, p in enumerate(params):
                p.data.copy_(f.get_tensor(f"{i}.value"))
                optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device if optimizer.defaults["fused"] else "cpu"),
                                      **{n: f.get_tensor(f"{i}.{n}").to(p.device) for n in ("exp_avg", "exp_avg_sq")}}
        log = self.folder / "metrics.jsonl"
        if self.ranks.main and log.exists():  # every step logged one line; a kill may have torn a later one
            log.write_text("".join(log.read_text().splitlines(keepends=True)[:step]))
        return step

    def finish(self, summary):
        self.ranks.barrier()
        if self.ranks.main:
            write_json(self.folder / "done.json", summary)
            (self.folder / "checkpoint.safetensors").unlink(missing_ok=True)


def learning_rate(step, steps, peak, warmup, schedule):
    """Linear warm-up over `warmup` steps, then a cosine to zero, or constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak if schedule == "constant" else peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(s, params, step_fn, names):
    """The loop of every phase. step_fn(step) leaves this rank's share of the gradients on `params` and
    returns a Tally; `names` are the means to log. Clipping comes after the sum over ranks; a gradient that is
    not finite stops the run."""
    a, ranks, run = s.args, s.ranks, s.run
    run.begin()
    optimizer = torch.optim.AdamW(params, lr=a.lr, betas=(0.9, a.beta2), weight_decay=a.weight_decay, fused=True)
    first, began, tokens = run.restore(params, optimizer), time.perf_counter(), 0
    bar = tqdm(range(first, a.steps), initial=first, total=a.steps, desc=run.folder.name, unit="step", disable=not ranks.main,
               mininterval=0.5 if sys.stderr.isatty() else 15)
    for step in bar:
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, a.steps, a.lr, a.warmup, a.schedule)
        torch.manual_seed(seed_of(a.seed, "dropout", step, ranks.rank))
        tally = step_fn(step)
        ranks.sum_gradients(params)
        norm = float(torch.nn.utils.clip_grad_norm_(params, a.clip))
        if not math.isfinite(norm):
            raise InputError(f"step {step + 1} of {run.folder}: the gradient is not finite: lower --lr, or use --dtype float32")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        worked, = ranks.sum([tally.sums.get("tokens", (0, 0))[0]])
        tokens += worked
        line = {"step": step + 1, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, **tally.means(ranks, names),
                "seconds": time.perf_counter() - start, "tokens": worked, "peak_bytes": peak_bytes(ranks.device)}
        run.log(line)
        bar.set_postfix({n: f"{line[n]:.3f}" for n in names[:4] if n in line}, refresh=False)
        if (step + 1) % a.save_every == 0 and step + 1 < a.steps:
            run.save(step + 1, params, optimizer)
    seconds = time.perf_counter() - began
    summary = {"event": "end", "stage": s.stage, "step": a.steps, "seconds": seconds, "peak_bytes": peak_bytes(ranks.device),
               "tokens_per_second": tokens / seconds if tokens else None, "ranks": ranks.world, "device": str(ranks.device.type)}
    run.log(summary)
    return summary


def seed_of(*parts):
    """A 63-bit seed from anything printable: the same on every machine and Python, unlike hash()."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def batch_indices(count, size, step, seed):
    """Which posts step `step` uses: each epoch visits all `count` posts in an order of its own."""
    places, orders = range(step * size, (step + 1) * size), {}
    for epoch in {p // count for p in places}:
        orders[epoch] = list(range(count))
        random.Random(seed_of(seed, "epoch", epoch)).shuffle(orders[epoch])
    return [orders[p // count][p % count] for p in places]


# ---- Drafts and their quality, for both phases -----------------------------------------------------------------

class Session:
    """What a phase works with: args, ranks, run, stage, model, tokenizer, posts, domain, embedder."""

    def __init__(self, args, stage):
        self.args, self.stage, self.embedder = args, stage, None
        self.ranks = Ranks(f"{stage}:{args.out}", args.device)

    def open_run(self):
        """Make or reopen the run folder; False, with a word about it, when the run is finished already."""
        self.run = Run(self.args, self.ranks)
        if self.run.done:
            self.say(f"{self.run.folder}: done already")
            self.ranks.close()
        return not self.run.done

    def say(self, text):
        if self.ranks.main:
            print(text, flush=True)

    def load(self):
        """The data, then the frozen model: a bad line is found before gigabytes are read."""
        a = self.args
        self.posts = data.load_posts(a.data, skip_bad_lines=a.skip_bad_lines)
        self.domain = data.make_domain(a.domain, self.posts)
        self.load_model()

    def load_model(self):
        a = self.args
        self.tokenizer = data.load_tokenizer(a.model, revision=a.revision)
        if a.shard and (self.ranks.world == 1 or a.nf4):
            raise InputError("--shard spreads the weights over several ranks, without --nf4: start it by torchrun --nproc-per-node=N")
        self.model = load_model(a.model, a, self.ranks.device, a.revision, a.nf4, a.shard)
        self.model.vocab = min(self.model.vocab, self.tokenizer.get_vocab_size())    # rows above are padding
        self.stops = data.stop_ids(self.tokenizer)

    def place(self):
        """With --shard, once the adapter is on the model: spread it over the ranks."""
        if self.args.shard:
            shard(self.model, self.ranks)

    def passes(self, batches):
        """The batches, for a pass through the model each; then, with --shard, wait for ranks that have more."""
        yield from batches
        if self.model.lockstep:
            self.model.lockstep.wait()

    def rows(self, pairs):
        """(prompt, drafts) pairs in micro-batches."""
        return self.passes(data.pack(pairs, self.args.micro_tokens, self.ranks.device))

    def deal(self, items):
        """This rank's share. Each rank needs at least one, since all take part in every step."""
        if len(items) < self.ranks.world:
            raise InputError(f"{len(items)} posts cannot be dealt to {self.ranks.world} ranks: raise --batch, or start fewer ranks")
        return items[self.ranks.rank::self.ranks.world]

    def prompt(self, index):
        return data.encode_prompt(self.tokenizer, self.domain.messages(self.posts[index]))

    def load_embedder(self):
        a = self.args
        corpus = [r for p in self.posts for r in p.replies]
        if a.embedder == "base":
            self.embedder = Embedder(self.model, self.tokenizer, corpus=corpus)
        else:
            self.embedder = Embedder(load_model(a.embedder, a, self.ranks.device), data.load_tokenizer(a.embedder), pooling="last")

    def write(self, indices, step, k, progress=None):
        """k drafts for each of the posts `indices` -> (prompts, Samples, texts). Each draft's random numbers
        are a function of (seed, stage, step, post, draft), so they are the same however posts are dealt to
        ranks."""
        a, prompts = self.args, [self.prompt(i) for i in indices]
        seeds = [seed_of(a.seed, self.stage, step, self.posts[i].id) for i in indices]
        samples = generate(self.model, prompts, k=k, max_new_tokens=a.max_new_tokens, temperature=a.temperature,
                           top_p=getattr(a, "top_p", 1.0), stop_ids=self.stops, seed=seeds, max_rows=a.max_rows,
                           progress=progress)
        texts = [[data.decode(self.tokenizer, d) for d in drafts] for drafts in samples.tokens]
        return prompts, samples, texts

    def quality(self, gate, indices, prompts, samples, texts):
        """q (P, k) in [0, 1] for the gate of D: None (ungated), 1 where the verifier finds the draft right,
        or the draft's likelihood per token under the frozen base (its geometric mean probability)."""
        if gate == "none":
            return None
        if gate == "verifier":
            return torch.tensor([[float(bool(self.domain.voices_of(self.posts[i], t))) for t in ts] for i, ts in zip(indices, texts)])
        total, count = torch.zeros(2, sum(map(len, samples.tokens)))
        with torch.no_grad(), adapter(self.model, None):
            for rows in self.rows(list(zip(prompts, samples.tokens))):
                logp, _ = token_logprobs(self.model, rows, self.args.temperature)
                total.index_add_(0, rows.draft.cpu(), logp.cpu())
                count.index_add_(0, rows.draft.cpu(), torch.ones(len(logp)))
        return (total / count).exp().view(len(indices), -1)


def load_model(path, args, device, revision=None, nf4=False, shard=False):
    """The Qwen3 at `path` as the flags want it; one to be spread over ranks is read into the host's memory."""
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32, "float32": torch.float32,
             "bfloat16": torch.bfloat16}[args.dtype]
    model = Qwen3.from_pretrained(path, revision=revision, device="cpu" if shard else device, dtype=dtype, nf4=nf4)
    model.checkpointing, model.compiled = getattr(args, "checkpointing", False), getattr(args, "compile", False)
    model.graphs = False if getattr(args, "no_graphs", False) else None
    return model


# ---- Phase one -------------------------------------------------------------------------------------------------

def cross_entropy(s, step, indices, reply, tally):
    """Adds the gradient of the mean token cross-entropy of the step's replies. `reply(index)` gives the
    reply's text.

    Every rank works out the whole batch's token count, which is the one denominator of all ranks' and
    micro-batches' sums.
    """
    pairs = [(s.prompt(i), [data.encode_reply(s.tokenizer, reply(i))]) for i in indices]
    count = sum(len(r) for _, (r,) in pairs)
    for rows in s.rows(pairs[s.ranks.rank::s.ranks.world]):
        logp, _ = token_logprobs(s.model, rows)
        (-logp.sum() / count).backward()
        tally.add("ce", -logp.sum().detach(), len(logp))
        tally.add("tokens", rows.tokens.numel())


def diversity_loss(logp, draft, advantages, posts):
    """-lambda-free diversity term: -(1 / posts) sum over drafts of a_i log pi(y_i), log pi summed over the
    draft's tokens, stop token included. logp (N,) and draft (N,): which draft each token is of; advantages:
    flat, one a draft."""
    return -(advantages.detach()[draft] * logp).sum() / posts


def diversity_step(s, step, indices, tally):
    """Adds the gradient of -lambda * D, D the mean over the step's drafting posts of the diversity of k fresh
    drafts."""
    a, mine = s.args, indices[s.ranks.rank::s.ranks.world]
    if not mine:
        return
    prompts, samples, texts = s.write(mine, step, a.k)
    embeddings = s.embedder(texts)
    quality = s.quality(a.gate, mine, prompts, samples, texts)
    quality = quality if quality is None else quality.to(embeddings.device)
    advantages = a.lam * a.draft_every * diversity_advantages(embeddings, quality, a.gate_floor).flatten()
    for rows in s.rows(list(zip(prompts, samples.tokens))):
        logp, _ = token_logprobs(s.model, rows, a.temperature)
        diversity_loss(logp, rows.draft, advantages, len(indices)).backward()
        tally.add("tokens", rows.tokens.numel() + len(logp))
    tally.add("D", diversity(embeddings).sum(), len(mine))
    if quality is not None:
        tally.add("gated_D", diversity(embeddings, quality, a.gate_floor).sum(), len(mine))
        tally.add("quality", quality.sum(), quality.numel())
    tally.add("truncated", sum(not f for fs in samples.finished for f in fs), len(mine) * a.k)


def sft_step(s, step):
    """One step of L = L_quality - lambda * D, lambda in nats per token for one unit of D. Steps without
    drafts in between (--draft-every E) leave D's share unchanged on average: it then counts E times."""
    a, tally = s.args, Tally()
    indices = batch_indices(len(s.posts), a.batch, step, a.seed)

    def reply(i):
        rng = random.Random(seed_of(a.seed, "reply", step, s.posts[i].id))
        return s.domain.reply(s.posts[i], s.domain.reader(s.posts[i], rng), rng)
    s.model.train()
    cross_entropy(s, step, indices, reply, tally)
    s.model.eval()  # drafts are written and scored without dropout
    if a.lam and step % a.draft_every == 0:
        diversity_step(s, step, indices[:a.draft_posts], tally)
    return tally


def run_sft(args):
    """The SFT phase: a LoRA adapter in OUT/adapter."""
    check_sft(args)
    s = Session(args, "sft")
    if not s.open_run():
        return
    s.load()
    if args.gate == "verifier" and args.lam and not s.domain.voices:
        raise InputError("--gate verifier needs a domain with a verifier: use --gate likelihood for real posts")
    add_lora(s.model, args.rank, args.alpha, dropout=args.dropout, targets=args.targets.split(","), seed=seed_of(args.seed, "lora"))
    s.place()
    if args.lam:
        if args.shard and min(args.draft_posts, args.batch) < s.ranks.world:
            raise InputError(f"--shard needs a drafting post for each of the {s.ranks.world} ranks: raise --draft-posts and --batch")
        s.load_embedder()
    args.steps = args.steps or math.ceil(len(s.posts) * args.epochs / args.batch)
    params = list(adapter_state(s.model).values())
    summary = train(s, params, lambda step: sft_step(s, step), ["ce", "D", "gated_D", "quality", "truncated"])
    if s.ranks.main:
        save_adapter(s.model, s.run.folder / "adapter", args.model)
    s.run.finish(summary | {"domain": s.domain.name})
    s.ranks.close()


def base_step(s, step):
    """One step of making the pocket base: cross-entropy on noisy, evenly spread replies, all parameters."""
    a, tally = s.args, Tally()

    def reply(i):
        rng = random.Random(seed_of(a.seed, "noisy", step, s.posts[i].id))
        return s.domain.noisy_reply(s.posts[i], s.posts, rng, a.noise)
    cross_entropy(s, step, batch_indices(len(s.posts), a.batch, step, a.seed), reply, tally)
    return tally


def run_base(args):
    """A Qwen3 of a million parameters and its tokenizer, from nothing: a Hugging Face folder in OUT."""
    check_base(args)
    s = Session(args, "base")
    if not s.open_run():
        return
    s.posts = data.load_posts(args.data, skip_bad_lines=args.skip_bad_lines)
    s.domain = data.make_domain(args.domain, s.posts)
    if not s.domain.voices:
        raise InputError(f"{args.data}: a base is made from posts with replies by voice; for posts like these give --model a "
                         "Qwen3 checkpoint")
    texts = [t for p in s.posts for t in (p.post, *p.replies)]
    s.tokenizer = data.train_tokenizer(texts, args.vocab)
    torch.manual_seed(seed_of(args.seed, "weights"))
    s.model = Qwen3(Config(s.tokenizer.get_vocab_size(), args.hidden, 3 * args.hidden, args.layers, args.heads, args.heads // 2,
                           args.hidden // args.heads, tie_word_embeddings=True)).to(s.ranks.device)
    for name, p in s.model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)
    s.model.checkpointing = getattr(args, "checkpointing", False)
    summary = train(s, list(s.model.parameters()), lambda step: base_step(s, step), ["ce"])
    if s.ranks.main:
        s.model.save_pretrained(s.run.folder / "model")
        s.tokenizer.save(str(s.run.folder / "model" / "tokenizer.json"))
    s.run.finish(summary | {"domain": s.domain.name})
    s.ranks.close()


# ---- Commands --------------------------------------------------------------------------------------------------

def draft_flags(p, k):
    """Flags of the drafts a phase samples and of the diversity among them."""
    add = p.add_argument
    add("--k", type=int, default=k, help="drafts for each post")
    add("--max-new-tokens", type=int, default=100, help="longest draft, in tokens, stop token included")
    add("--temperature", type=float, default=1.0, help="of sampling, and of the distribution whose log-probabilities are trained")
    add("--gate", default="none", choices=("none", "verifier", "likelihood"),
        help="quality that D is multiplied with: none (plain D), the domain's verifier, or likelihood under the frozen base")
    add("--gate-floor", type=float, default=0.0, help="what a gated pair of drafts is worth even when alike, added to its distance: "
                                                      "more weight on quality beside diversity")
    add("--embedder", default="base", help="what embeds drafts: base (the frozen model itself, mean of its hidden states, centred) "
                                           "or a Qwen3-Embedding folder or hub name")


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sub = p.add_subparsers(dest="command", required=True)
    b = sub.add_parser("base", help="make a small Qwen3 from nothing, for the pocket study")
    data.common_flags(b, lr=3e-3, steps=500, batch=64)
    b.add_argument("--noise", type=float, default=0.3, help="share of pretraining replies that belong to another post")
    b.add_argument("--vocab", type=int, default=1024, help="tokens of the BPE vocabulary")
    b.add_argument("--hidden", type=int, default=128, help="width of the model")
    b.add_argument("--layers", type=int, default=4, help="blocks of the model")
    b.add_argument("--heads", type=int, default=4, help="query heads; half as many key/value heads")
    b.set_defaults(run=run_base)
    f = sub.add_parser("sft", help="phase one: LoRA fine-tuning, with --lambda > 0 for diversity")
    f.add_argument("--model", required=True, help="Qwen3 checkpoint: folder or hub name")
    data.common_flags(f, lr=2e-4, steps=0, batch=16)
    f.add_argument("--rank", type=int, default=16, help="LoRA rank r")
    f.add_argument("--alpha", type=float, default=16, help="LoRA alpha: the update is scaled by alpha / r")
    f.add_argument("--dropout", type=float, default=0.0, help="LoRA dropout in the cross-entropy passes")
    f.add_argument("--targets", default=",".join(LINEARS), help="linear layers with LoRA, comma-separated")
    f.add_argument("--lambda", dest="lam", type=float, default=0.0, help="weight of D, in nats per token for one unit of D")
    draft_flags(f, 4)
    f.add_argument("--draft-every", type=int, default=1, help="steps between those that sample drafts")
    f.add_argument("--draft-posts", type=int, default=8, help="posts of such a step that get k drafts, over all ranks")
    f.set_defaults(run=run_sft)
    return p


def check_base(a):
    """The shape of a model made from nothing."""
    data.check_common(a)
    if a.nf4 or a.shard:
        raise InputError("--nf4 and --shard are for a frozen base: a base is made in full")
    if a.layers < 1 or a.heads < 2 or a.heads % 2 or a.hidden < 1 or a.hidden % (2 * a.heads):
        raise InputError(f"--layers {a.layers}, --heads {a.heads}, --hidden {a.hidden}: a model has at least one layer, an even number "
                         "of heads, and a width that is a multiple of twice that number")
    if a.vocab < 261:
        raise InputError(f"--vocab {a.vocab}: the 256 bytes and 5 chat tokens need at least 261")


def check_sft(a):
    data.check_common(a)
    if a.lam and a.k < 2:
        raise InputError(f"--lambda {a.lam:g} needs drafts to compare: give --k 2 or more (k is {a.k})")
    if a.lam and a.temperature <= 0:
        raise InputError("--temperature must be above 0: the gradient of D needs drafts that are sampled")


def main(argv=None):
    return data.command(parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
