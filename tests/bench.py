"""Speed and memory beside transformers, PEFT and TRL: same weights, same process, pairs in turn.

    python tests/bench.py                 # CPU: Qwen3-0.6B's shape, random weights, no download
    python tests/bench.py --device cuda   # all layers in bf16, and the 8B shape: decode-8b, sft-8b
    python tests/bench.py --quick         # tiny shapes in seconds: does everything run?

A case whose peer is not installed is timed alone. The limit is the time that the work must take at
this machine's memory bandwidth and matrix-product rate, both measured first. It leaves attention,
norms, LoRA and sampling out: a share (limit / ours) of 100% is out of reach. MB are the growth of
memory during a first step, in a process of its own, and its peak, weights and (on a CPU) libraries
included. tokens/s counts written tokens, in SFT all. A missed equality check: exit code 1.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
               "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")     # with more, TRL spreads its batch over them
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from grpo import group_advantages, policy_loss
from engine import FusedBlocks, generate
from model import (Config, Qwen3, SelectedLogprobs, full_attention, pack, selected_logprobs,
                   token_logprobs)
from methods.nf4 import quantise
from support.peft_files import LINEARS
from lora import adapter, adapter_state, add_lora, frozen_copy

# The first fields of Config.
SHAPES = {"0.6b": (151936, 1024, 3072, 28, 16, 8, 128), "8b": (151936, 4096, 12288, 36, 32, 8, 128),
          "pocket": (1024, 192, 576, 2, 6, 3, 32), "tiny": (512, 64, 128, 2, 4, 2, 16)}
RANK, BETA, LR, PEERS = 16, 0.04, 1e-5, ("transformers", "peft", "trl")
FOUND = {p: version(p) for p in PEERS if find_spec(p)}


class Meter:
    """Seconds and growth of memory in bytes within `with`: a GPU's, or what is resident (on Linux
    only)."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def __enter__(self):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            # The peak, VmHWM, starts again at what is resident.
            Path("/proc/self/clear_refs").write_text("5")
        self.before, self.began = self.peak(), time.perf_counter()

    def __exit__(self, *_):
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds, self.most = time.perf_counter() - self.began, self.peak()
        self.growth = self.before and self.most - self.before

    def peak(self):
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        if sys.platform == "linux":
            return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def machine_limits(a):
    """Best of eight: bytes/s of matrix times vector or of a copy, operations/s of a square matrix
    product."""
    meter, new, gpu = Meter(a.device), dict(device=a.device, dtype=a.dtype), a.device.type == "cuda"
    big = torch.randn(4096 if a.quick else 2 ** 19 if gpu else 2 ** 17, 1024, **new)
    square, copy = torch.randn(*[512 if a.quick else 8192 if gpu else 2048] * 2, **new), big.clone()
    best = []
    for work in (lambda: big @ big[0], lambda: copy.copy_(big), lambda: square @ square):
        times = []
        for _ in range(8):
            with meter:
                work()
            times.append(meter.seconds)
        best.append(min(times))
    return {"bytes_per_second": big.nbytes * max(1 / best[0], 2 / best[1]),
            "operations_per_second": 2 * len(square) ** 3 / best[2]}


def limit_of(a, case):
    """Seconds. Each piece of work takes the longer of its operations' time and of its reading's."""
    c, (posts, prompt, k, new) = case.config, case.sizes
    work = []                              # (operations, elements read)
    attention = 2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    layers = c.num_hidden_layers * c.hidden_size * (attention + 3 * c.intermediate_size)
    head = c.hidden_size * c.vocab_size
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    # Sampling: 2 operations per weight and row; weights and cache are read once a step.
    if case.make is not sft:
        work = [(2 * posts * (layers * prompt + head), layers + head)]
        work += [(2 * posts * k * (layers + head), layers + head + cache * posts * (prompt + k * t))
                 for t in range(1, new)]
    # Training: 2 forward, 2 back to the inputs: frozen weights have no gradient.
    if case.make is not generation:
        passes = 4 + 2 * (case.make is grpo)                                   # the reference
        again = 2 * case.checkpointing                                         # not of the head
        tokens = posts * (prompt + k * (new - 1))
        replies = posts * k * new                                              # all the head sees
        work.append(((passes + again) * layers * tokens + passes * head * replies, 0))
    # Weights of a few MB stay in the processor's cache: then memory is no limit.
    in_cache = (layers + head) * a.dtype.itemsize <= 32e6
    slow = 0 if in_cache else a.dtype.itemsize / a.limits["bytes_per_second"]
    return sum(max(o / a.limits["operations_per_second"], moved * slow) for o, moved in work)


# Models on shared weights

def make_config(shape, layers=None, tied=False):
    c = Config(*SHAPES[shape], tie_word_embeddings=tied)
    c.num_hidden_layers = min(layers or c.num_hidden_layers, c.num_hidden_layers)
    return c


def make_weights(c, device, dtype=torch.float32, deviation=0.1):
    """name -> tensor: norms 1, the rest normal."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in Qwen3(c).state_dict().items()}
    ones = {n: torch.ones(s, device=device, dtype=dtype) for n, s in shapes.items()}
    return {n: t if t.dim() == 1 else t.normal_(0, deviation) for n, t in ones.items()}


def make_model(side, c, weights, lora=False, nf4=False):
    """Ours, or transformers' on the very same tensors; with LoRA (PEFT's) on all linears; ours over
    NF4."""
    if side == "peer":
        from transformers import Qwen3Config, Qwen3ForCausalLM
        config = Qwen3Config.from_dict(c.to_dict() | {"attn_implementation": "sdpa"})
    with torch.device("meta"):
        model = Qwen3(c) if side == "ours" else Qwen3ForCausalLM(config)
    model.load_state_dict(weights, assign=True, strict=side == "ours")
    model.requires_grad_(False).eval()
    if side == "ours":
        model = quantise(model, weights["model.norm.weight"].device) if nf4 else model
        return add_lora(model, RANK, RANK) if lora else model
    model.tie_weights()
    # The frequencies are no weights: after meta they are made again.
    rope = model.model.rotary_emb
    model.model.rotary_emb = type(rope)(config=config).to(weights["model.norm.weight"].device)
    if lora:
        from peft import LoraConfig, get_peft_model
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LINEARS),
                          task_type="CAUSAL_LM")
        model = get_peft_model(model, lora).train()
    return model


def texts(count, length, c):
    rng = random.Random(length)
    return [[rng.randrange(2, c.vocab_size) for _ in range(length)] for _ in range(count)]


def optimizer_of(model):
    """The product's optimizer, as a function that clips and steps."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)

    def update():
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return update


# Cases: (side, case, weights, device) -> step(meter), which works once within the meter

def generation(side, case, weights, device):
    model, (posts, prompt, k, new) = make_model(side, case.config, weights), case.sizes
    tokens = torch.tensor(texts(posts, prompt, case.config), device=device)

    def step(meter):
        with meter:
            if side == "ours":
                groups = generate(model, tokens.tolist(), k=k, max_new_tokens=new).tokens
                completions = [completion for group in groups for completion in group]
            else:
                completions = model.generate(
                    tokens, attention_mask=torch.ones_like(tokens), num_return_sequences=k,
                    do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new,
                    min_new_tokens=new, pad_token_id=0)[:, prompt:].tolist()
        assert sum(map(len, completions)) == posts * k * new
    return step


def sft(side, case, weights, device):
    model = make_model(side, case.config, weights, lora=True, nf4=case.nf4)
    posts, prompt, _, new = case.sizes
    tokens = torch.tensor(texts(posts, prompt + new, case.config), device=device)
    labels = torch.where(torch.arange(prompt + new, device=device) < prompt, -100, tokens)
    pairs, update = [(t[:prompt], [t[prompt:]]) for t in tokens.tolist()], optimizer_of(model)
    if side == "ours":
        model.checkpointing = case.checkpointing
    elif case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def step(meter):
        with meter:
            if side == "ours":
                rows, = pack(pairs, 16384, device)
                loss = -token_logprobs(model, rows)[0].mean()
            else:
                loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
            loss.backward()
            update()
    return step


def grpo(side, case, weights, device):
    if side == "peer":
        return trl_grpo(case, weights, device)
    model, (_, prompt, k, new) = make_model(side, case.config, weights, lora=True), case.sizes
    (post,), update, start = texts(1, prompt, case.config), optimizer_of(model), frozen_copy(model)

    def step(meter):
        with meter:
            seed = random.getrandbits(32)
            completions = generate(model, [post], k=k, max_new_tokens=new, seed=seed).tokens[0]
            advantages = group_advantages(torch.rand(1, k)).flatten().to(device)
            rows, = pack([(post, completions)], 16384, device)
            with torch.no_grad(), adapter(model, start):
                reference = token_logprobs(model, rows)[0]
            logp = token_logprobs(model, rows)[0]
            loss, *_ = policy_loss(logp, logp.detach(), advantages[rows.completion],
                                   denominator=k * new, reference=reference, beta=BETA)
            loss.backward()
            update()
    return step


def trl_grpo(case, weights, device):
    """TRL's trainer, without vLLM. A step is a train() of one step whose callbacks work the meter,
    from the rollout to the optimizer: its own set-up is not counted. On a CPU TRL 1.16 projects all
    positions onto the vocabulary, with Triton reply tokens alone: the CPU's ratio says little about
    a GPU's."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    c, (_, prompt, k, new) = case.config, case.sizes
    clock, cpu = TrainerCallback(), device.type == "cpu"
    # <7>, not w7: special tokens are looked for inside words too, and w1 stands in w12.
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(c.vocab_size)}, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    clock.on_step_begin = lambda *_, **__: clock.meter.__enter__()
    clock.on_step_end = lambda *_, **__: clock.meter.__exit__()
    args = GRPOConfig(
        output_dir=os.path.join(tempfile.gettempdir(), "bench"), max_steps=1,
        per_device_train_batch_size=k, num_generations=k, max_completion_length=new,
        generation_kwargs={"min_new_tokens": new}, beta=BETA, temperature=1.0, loss_type="dapo",
        learning_rate=LR, lr_scheduler_type="constant", save_strategy="no",
        gradient_checkpointing=False, use_cpu=cpu, dataloader_pin_memory=not cpu, report_to="none",
        bf16=weights["model.norm.weight"].dtype == torch.bfloat16, disable_tqdm=True,
        logging_strategy="no")
    prompts = [" ".join(f"<{i}>" for i in texts(1, prompt, c)[0])] * 8
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", eos_token="<1>")
    trainer = GRPOTrainer(
        make_model("peer", c, weights, lora=True),
        lambda prompts, **_: [random.random() for _ in prompts], args,
        Dataset.from_dict({"prompt": prompts}), callbacks=[clock], processing_class=tokenizer)
    assert len(trainer.processing_class(prompts[0])["input_ids"]) == prompt
    trainer.remove_callback(PrinterCallback)

    def step(meter):
        clock.meter = meter
        trainer.train()
    return step


def make_cases(a):
    cases, gpu = {}, a.device.type == "cuda"
    # name, what is timed, shape, layers, (posts, tokens of a post, k, new tokens)
    every = [("generate", generation, "0.6b", 28, (1, 256, 8, 32)),
             ("grpo", grpo, "0.6b", 8, (1, 256, 8, 32)),
             ("sft", sft, "0.6b", 28 if gpu else 8, (4, 192, 1, 64)),
             ("pocket", generation, "pocket", 2, (1, 24, 8, 16)),
             ("pocket-16", generation, "pocket", 2, (16, 24, 8, 16))]
    if gpu:
        every += [("decode-8b", generation, "8b", 36, (8, 256, 8, 64)),
                  ("sft-8b", sft, "8b", 36, (8, 384, 1, 128)),
                  ("sft-8b-nf4", sft, "8b", 36, (8, 384, 1, 128))]
    needs = {generation: {"transformers"}, sft: {"transformers", "peft"}, grpo: set(PEERS)}
    for name, make, shape, layers, sizes in every:
        if a.quick:
            shape, sizes = "tiny", (min(sizes[0], 2), 12, min(sizes[2], 4), 4)
        cases[name] = SimpleNamespace(
            make=make, needs=needs[make], sizes=sizes, nf4="nf4" in name,
            config=make_config(shape, a.layers or layers, shape != "8b"),
            checkpointing=name.startswith("sft-8b"))
    return cases


# Equality, in fp32 and small

def greedy(device, shape):
    """Share of greedy ids that differ. Untied: tied random weights would only repeat the last
    token."""
    c = make_config(shape)
    weights, tokens = make_weights(c, device), torch.tensor(texts(4, 16, c), device=device)
    ours = generate(make_model("ours", c, weights), tokens.tolist(), max_new_tokens=12,
                    temperature=0).tokens
    theirs = make_model("peer", c, weights).generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12,
        pad_token_id=0)
    return float((torch.tensor(ours)[:, 0] != theirs[:, 16:].cpu()).float().mean())


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def shared_post(device):
    c, gradients = make_config("tiny"), []
    model, (post,) = make_model("ours", c, make_weights(c, device), lora=True), texts(1, 20, c)
    params = list(adapter_state(model).values())
    completions = [texts(1, n, c)[0] for n in (9, 4, 7, 1)]
    worth = torch.randn(4, device=device)
    for p in params:
        torch.nn.init.normal_(p, 0, 0.1)       # B too: while it is zero A has no gradient
    for groups in ([(post, completions)], [(post, [d]) for d in completions]):
        rows, = pack(groups, 16384, device)
        value = token_logprobs(model, rows)[0] @ worth[rows.completion]
        gradients.append(torch.autograd.grad(value, params))
    return max(map(relative, *gradients))


def chunked(device):
    hidden, weight, worth = (torch.randn(s, 16, device=device) for s in (300, 2 ** 24 // 100, 300))
    target, hidden = torch.arange(300, device=device), hidden.requires_grad_()
    gradients = []
    for score in (SelectedLogprobs.apply, selected_logprobs):
        value = score(hidden, weight, target, 0.9)[0] @ worth[:, 0]
        gradients += torch.autograd.grad(value, hidden)
    return relative(*gradients)


def joined_products(device):
    c = make_config("pocket")
    model = make_model("ours", c, make_weights(c, device), lora=True)
    tokens = torch.tensor(texts(4, 16, c), device=device)
    for p in adapter_state(model).values():
        torch.nn.init.normal_(p, 0, 0.1)
    with torch.no_grad():
        positions = torch.arange(16, device=device)[None]
        x = model.model.embed_tokens(tokens)
        x = FusedBlocks(model, 16)(x, positions, full_attention())
        return relative(model.model.norm(x), model.hidden(tokens))


def decoding(device, **way):
    """Share of sampled ids that differ from plain decoding's, in batches that shrink and are
    refilled."""
    c, sides = make_config("tiny"), []
    for settings in ({"graphs": False}, way):
        model = make_model("ours", c, make_weights(c, device), lora=True)
        vars(model).update(settings)
        completions = []
        for seed in (1, 2):
            samples = generate(model, texts(6, 12, c), k=4, max_new_tokens=16,
                               stop_ids=range(60), max_rows=12, seed=seed)
            completions += [completion for group in samples.tokens for completion in group]
        sides.append(completions)
    return sum(x != y for x, y in zip(*sides, strict=True)) / len(completions)


def equality(device):
    checks = [("LoRA gradients: shared post == a row per draft", shared_post, 1e-4),
              ("gradients: chunked loss == full logits", chunked, 1e-4),
              ("hidden states: joined products == blocks", joined_products, 1e-4)]
    if device.type == "cuda":
        checks += [("sampled ids: CUDA graphs == plain steps",
                    lambda d: decoding(d, graphs=True), 0.0)]
    if "transformers" in FOUND:
        checks += [("greedy ids == transformers', tiny shape", lambda d: greedy(d, "tiny"), 0.0),
                   ("greedy ids == transformers', pocket shape",
                    lambda d: greedy(d, "pocket"), 0.0)]
    results = []
    for name, check, tolerance in checks:
        torch.manual_seed(0)
        figure = check(device)
        passed = figure <= tolerance                       # False for nan
        results.append({"check": name, "figure": figure, "tolerance": tolerance, "passed": passed})
        print(f"{name:<48}{figure:.1e}, at most {tolerance:.0e}: {'ok' if passed else 'MISSED'}")
    return results


# Running

def build(a, name, side, weights=None):
    case = a.cases[name]
    weights = weights or make_weights(case.config, a.device, a.dtype, 0.02)
    return case.make(side, case, weights, a.device)


def first_step(a, name, side):
    """Growth of memory in a fresh process: what one side has cached would hide the other's need."""
    command = [sys.executable, __file__, *a.argv, "--first-step", name, side]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return json.loads(out.stdout.split()[-1]) if out.returncode == 0 else (None, None)


def run_case(a, name):
    case, meter = a.cases[name], Meter(a.device)
    sides = ["ours", "peer"] if case.needs <= FOUND.keys() and not case.nf4 else ["ours"]
    memory = {"ours": (None, None), "peer": (None, None)}
    if name == "sft" or not a.quick and "pocket" not in name:
        memory |= {side: first_step(a, name, side) for side in sides}
    (ours_mb, ours_peak), (peer_mb, peer_peak) = memory["ours"], memory["peer"]
    weights, seconds = make_weights(case.config, a.device, a.dtype, 0.02), {s: [] for s in sides}
    steps = {s: build(a, name, s, weights) for s in sides}
    for i in range(a.repeats + 1):                         # the first pair warms up
        for side in sides[::(-1) ** i]:
            steps[side](meter)
            seconds[side].append(meter.seconds)
    ours, peer = (median(seconds[s][1:]) if s in sides else None for s in ("ours", "peer"))
    (posts, prompt, k, new), limit = case.sizes, limit_of(a, case)
    return {"case": name, "ours s": ours, "peer s": peer, "peer/ours": peer and peer / ours,
            "tokens/s": posts * (k * new + prompt * (case.make is sft)) / ours, "limit s": limit,
            "share": limit / ours, "ours MB": ours_mb, "peer MB": peer_mb,
            "ours peak MB": ours_peak, "peer peak MB": peer_peak, "seconds": seconds,
            "layers": case.config.num_hidden_layers, "sizes": case.sizes}


def table(results):
    form = {"case": "", "peer/ours": ".2f", "tokens/s": ".0f", "share": ".1%"}

    def cell(name, x):
        if x is None:
            return "-"
        return f"{x / 1e6:.1f}" if "MB" in name else format(x, form.get(name, ".4f"))
    names = [n for n in results[0] if n not in ("seconds", "layers", "sizes")]
    rows = [names] + [[cell(n, r[n]) for n in names] for r in results]
    return "\n".join(f"{r[0]:<19}" + "".join(f"{x:>13}" for x in r[1:]) for r in rows)


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--dtype", choices=("float32", "bfloat16"),
        help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--threads", type=int, default=2, help="of the CPU")
    add("--layers", type=int, help="layers of every shape, to cut it")
    add("--repeats", type=int, default=5,
        help="timed pairs after one uncounted; medians are printed")
    add("--only", help="cases, comma-separated: generate, grpo, sft, pocket, pocket-16; on a GPU "
                       "decode-8b, sft-8b, sft-8b-nf4 too")
    add("--json", help="file for the settings, every single time, and the checks")
    add("--quick", action="store_true",
        help="tiny shapes, one pair, one thread: the figures mean nothing")
    add("--first-step", nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.device == "cuda" and not torch.cuda.is_available():
        p.exit(2, "error: --device cuda: torch finds no CUDA device\n")
    a.argv, a.device = list(argv), torch.device(a.device)
    a.dtype = getattr(torch, a.dtype or ("bfloat16" if a.device.type == "cuda" else "float32"))
    a.threads, a.repeats = (1, 1) if a.quick else (a.threads, a.repeats)
    a.cases = make_cases(a)
    a.only = a.only.split(",") if a.only else list(a.cases)
    if min(a.threads, a.repeats, 1 if a.layers is None else a.layers) < 1:
        p.error("--threads, --layers and --repeats are 1 or more")
    if not set(a.only) <= set(a.cases):
        p.error(f"--only: the cases here are {', '.join(a.cases)}")
    return a


def main(argv):
    a = parse(argv)
    torch.set_num_threads(a.threads)
    if a.first_step:
        meter = Meter(a.device)
        build(a, *a.first_step)(meter)
        print("\n" + json.dumps([meter.growth, meter.most], separators=(",", ":")))
        return 0
    if len(FOUND) < len(PEERS):
        absent = ", ".join(p for p in PEERS if p not in FOUND)
        print(f"not installed: {absent}. Cases that need them run without a peer")
    checks, a.limits, cases = equality(a.device), machine_limits(a), []
    print("limits:", ", ".join(f"{value:.2e} {name}" for name, value in a.limits.items()))
    settings = {n: getattr(a, n) for n in ("threads", "layers", "repeats", "quick", "only")}
    report = {"device": torch.cuda.get_device_name() if a.device.type == "cuda" else "cpu",
              "peers": FOUND, "dtype": str(a.dtype), "torch": torch.__version__,
              "limits": a.limits, "checks": checks, "cases": cases, "settings": settings}
    for name in a.only:
        gc.collect()
        if a.device.type == "cuda":
            torch.cuda.empty_cache()
        cases.append(run_case(a, name))
        print(table(cases[-1:]), flush=True)
        if a.json:                         # after each case: a later one may not fit into memory
            Path(a.json).write_text(json.dumps(report, indent=2) + "\n")
    print("\n" + table(cases))
    return 0 if all(c["passed"] for c in checks) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
