"""One script for the day a GPU is at hand: does everything run there, and how fast?

    python tests/gpu_check.py                 # at most 9 minutes on one H200
    python tests/gpu_check.py --quick         # at most 4 minutes
    python tests/gpu_check.py --tiny          # tiny sizes, on the CPU and on the pretended device;
                                              # also what happens where there is no GPU

Nothing is fetched: models have random weights in Qwen3's shapes, posts and tokenizer are made here.
Each part is a process of its own with a time limit, and writes OUT/DEVICE/PART.json after every
result, so that a run that is cut off still tells what it has found. At the end: two Markdown
tables for docs/PERFORMANCE.md, also in OUT/table.md. Exit code 1 if a part or a check failed.

`--only decode-8b,nf4` runs some parts; `--list` shows all."""

import argparse
import contextlib
import gc
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

BANDWIDTH = 4.8e12               # bytes/s of an H200's memory, on paper
OPERATIONS = 790e12              # bf16 operations/s that large products reach on an H100 or H200
REAL_VOCABULARY = 151669         # of Qwen3's tokenizer; the matrix has 151,936 rows

# vocabulary, hidden, intermediate, layers, heads, k/v heads, head_dim, tied
SHAPES = {"0.6b": (151936, 1024, 3072, 28, 16, 8, 128, True),
          "8b": (151936, 4096, 12288, 36, 32, 8, 128, False),
          "small": (2048, 256, 512, 3, 8, 4, 64, True),
          "tiny": (900, 32, 64, 2, 4, 2, 16, True)}


@dataclass
class Sizes:
    """How much work a part does."""
    large: str                   # the shape that stands for 8B
    small: str                   # the shape that stands for 0.6B
    steps: int                   # of training
    batch: int
    post: int                    # words of a post
    reply: int                   # words of a reply
    k: int
    new: int                     # tokens of a completion
    rows: tuple                  # completions that are decoded at a time
    prompt: int                  # tokens of their prompts
    measured: int                # posts that are measured
    minutes: float               # all parts together


FULL = Sizes("8b", "0.6b", 5, 8, 300, 80, 8, 128, (1, 8, 64, 256), 256, 32, 9)
QUICK = Sizes("8b", "0.6b", 3, 8, 300, 80, 8, 64, (1, 64, 256), 256, 8, 4)
TINY = Sizes("tiny", "tiny", 2, 2, 8, 4, 3, 4, (1, 4), 12, 3, 30)
CPU = "cpu"
GPU = "cuda"
PRETENDED = "pretended"          # tests/pretend_gpu.py: CPU tensors that say they are on cuda:0


# ---- What a part writes down ---------------------------------------------------------------------

class Record:
    """The figures and checks of one part, written to its file after each."""

    def __init__(self, path, device):
        self.path = path
        self.device = device
        self.content = {"figures": [], "checks": [], "notes": [], "finished": False}
        self.write()

    def write(self):
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=2) + "\n")
        os.replace(new, self.path)

    def figure(self, what, value, unit=""):
        self.content["figures"].append({"what": what, "value": value, "unit": unit})
        print(f"  {what}: {shown(value)} {unit}", flush=True)
        self.write()

    def check(self, what, passed, value=None):
        self.content["checks"].append({"what": what, "passed": bool(passed), "value": value})
        print(f"  {'ok' if passed else 'FAILED'}: {what} ({shown(value)})", flush=True)
        self.write()

    def note(self, text):
        self.content["notes"].append(text)
        self.write()

    def finish(self):
        self.content["finished"] = True
        self.write()


def shown(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass
class Context:
    """What a part works with."""
    sizes: Sizes
    device: str                  # cpu, cuda, or pretended
    out: Path                    # a folder for all parts of this device
    record: Record

    @property
    def on_gpu(self):
        """A real one."""
        return self.device == GPU

    @property
    def torch_device(self):
        return torch.device("cpu" if self.device == CPU else "cuda")

    @property
    def dtype(self):
        return torch.float32 if self.device == CPU else torch.bfloat16

    def seconds(self, work):
        """The time of work(), the device's included."""
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self):
        if self.device != CPU:
            torch.cuda.synchronize()

    def peak(self):
        """Peak bytes of the device since `reset_peak`, or the process's memory on a CPU."""
        from support.checkpoint import peak_bytes
        return peak_bytes(self.torch_device)

    def reset_peak(self):
        gc.collect()
        if self.device != CPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


# ---- Models, posts, commands ---------------------------------------------------------------------

def config_of(shape):
    from model import Config
    *fields, tied = SHAPES[shape]
    return Config(*fields, tie_word_embeddings=tied)


@torch.no_grad()
def random_model(config, device, dtype, seed=1):
    """A Qwen3 with random weights made on the device. Attention and final logits have a deviation
    of about 6 and 3: with plain noise both are flat, and rounding errors do not show."""
    from model import Qwen3
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = Qwen3(config).to(dtype)
    model = model.to_empty(device=device)
    for name, p in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            p.fill_(2.5)
        elif name == "model.norm.weight":
            p.fill_(3)
        elif p.dim() == 1:
            p.fill_(1)
        else:
            p.normal_(0, p.shape[1] ** -0.5)
    return model.requires_grad_(False).eval()


def with_adapter(model, rank=16):
    """LoRA on all linear layers, B not zero. Returns the model."""
    from lora import adapter_state, add_lora
    add_lora(model, rank, rank)
    with torch.no_grad():
        for p in adapter_state(model).values():
            p.normal_(0, 0.02)
    return model


def texts(count, words, seed):
    """`count` different texts of about that many words, from the toy task's posts."""
    from methods.pocket import pocket_posts
    pool = " ".join(post.post for post in pocket_posts(60, seed=seed)).split()
    made = []
    for i in range(count):
        start = 7 * i % len(pool)
        made.append(f"{i}: " + " ".join((pool[start:] + pool * (1 + words // len(pool)))[:words]))
    return made


def tokenizer_of(size):
    """A BPE for the texts, filled up with tokens that no text has to `size` of them."""
    from methods.small_base import train_tokenizer
    from tokenizers import Tokenizer
    small = train_tokenizer(texts(40, 60, seed=1), min(800, size))
    content = json.loads(small.to_str())
    vocabulary = content["model"]["vocab"]
    for i in range(small.get_vocab_size(), size):
        vocabulary[f"<filler {i}>"] = i
    return Tokenizer.from_str(json.dumps(content))


def posts_file(path, count, sizes, seed):
    posts = texts(count, sizes.post, seed)
    replies = texts(2 * count, sizes.reply, seed + 1)
    with open(path, "w", encoding="utf-8") as file:
        for i, post in enumerate(posts):
            line = {"id": f"{seed}-{i}", "post": post, "replies": replies[2 * i:2 * i + 2]}
            file.write(json.dumps(line) + "\n")
    return path


def model_folder(c, shape, weights=True):
    """A checkpoint's folder of that shape. Without weights: its model is made by `made_on_device`,
    and the file of weights holds one number."""
    from safetensors.torch import save_file
    folder = c.out / f"model-{shape}{'' if weights else '-made'}"
    if (folder / "tokenizer.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(shape)
    if weights:
        random_model(config, c.torch_device, torch.bfloat16).save_pretrained(folder)
    else:
        content = config.to_dict() | {"torch_dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(content))
        save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors")
    size = min(REAL_VOCABULARY, config.vocab_size - 5)
    tokenizer_of(size).save(str(folder / "tokenizer.json"))
    return folder


@contextlib.contextmanager
def made_on_device(c, shape):
    """Within it, loading a checkpoint makes random weights of this shape instead."""
    from model import Qwen3
    from support.registry import FORMATS
    loaded = Qwen3.__dict__["from_pretrained"]

    def from_pretrained(cls, path, *, device=None, dtype=None, nf4=False, **_):
        model = random_model(config_of(shape), device, dtype or torch.bfloat16)
        return FORMATS["nf4"].function(model, device) if nf4 else model
    Qwen3.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        Qwen3.from_pretrained = loaded


class Ran:
    """A command that has run: its log and what it printed."""

    def __init__(self, text, folder):
        self.text = text
        self.lines = []
        log = folder / "metrics.jsonl"
        for line in log.read_text().splitlines() if log.exists() else ():
            self.lines.append(json.loads(line))
        self.steps = [line for line in self.lines if "lr" in line]

    def mean(self, name):
        """The mean of a logged number over the steps after the first, which warms up."""
        values = [line[name] for line in self.steps[1:] if name in line]
        if not values:
            raise RuntimeError(f"no step has logged {name}")
        return sum(values) / len(values)

    def peak(self):
        return max(line["peak_bytes"] for line in self.lines if line.get("peak_bytes"))

    def planned(self):
        """Bytes of memory in the command's plan: the sum that it names ("memory about 3 GiB: .."),
        or that of its parts; None without a plan."""
        size = r"([\d.,]+) (MiB|GiB)"
        plan = re.search(rf"memory about {size}", self.text)
        parts = re.search(r"memory: (.*)", self.text)
        if plan is None and parts is None:
            return None
        units = {"MiB": 2 ** 20, "GiB": 2 ** 30}
        named = [plan.groups()] if plan else re.findall(size, parts[1])
        return sum(float(number.replace(",", "")) * units[unit] for number, unit in named)


def command(c, main, out, *words):
    """Run a program's main with --out (or --bare) `out`; a Ran. RuntimeError with what it said if
    it fails."""
    folder = c.out / out
    shutil.rmtree(folder, ignore_errors=True)
    flag = "--bare" if "measure" in words else "--out"
    said = io.StringIO()
    c.reset_peak()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([*map(str, words), flag, str(folder)])
    if code:
        raise RuntimeError(f"{out}: exit code {code}: {said.getvalue()[-2000:]}")
    return Ran(said.getvalue(), folder)


def memory_figures(c, name, ran):
    """Peak memory beside the plan's."""
    peak = ran.peak()
    c.record.figure(f"{name}: peak memory", peak / 1e9, "GB")
    planned = ran.planned()
    if planned is None:
        c.record.note(f"{name}: the command printed no plan of its memory")
        return
    c.record.figure(f"{name}: memory planned", planned / 1e9, "GB")
    if c.on_gpu:
        c.record.check(f"{name}: the plan is within 20% of the peak",
                       abs(planned / peak - 1) <= 0.2, planned / peak)


PARTS = {}                       # name -> (function, seconds at most, seconds with --quick)


def part(name, limit, quick):
    def add(function):
        PARTS[name] = function, limit, quick
        return function
    return add


# ---- Is it right? --------------------------------------------------------------------------------

@part("environment", 40, 30)
def environment(c):
    """Versions, the card, its measured bandwidth and rate of products."""
    import platform
    facts = {"python": platform.python_version(), "torch": torch.__version__,
             "CUDA": torch.version.cuda, "CPU cores": os.cpu_count(), "device": c.device,
             "commit": said_by("git", "-C", ROOT, "rev-parse", "--short", "HEAD")}
    if c.device != CPU:
        free, total = torch.cuda.mem_get_info()
        facts |= {"card": torch.cuda.get_device_name(),
                  "capability": list(torch.cuda.get_device_capability()),
                  "memory GB": total / 1e9, "free GB": free / 1e9}
    if c.on_gpu:
        from torch.utils._triton import has_triton
        facts |= {"cuDNN": torch.backends.cudnn.version(), "triton": has_triton(),
                  "driver": said_by("nvidia-smi", "--query-gpu=driver_version",
                                    "--format=csv,noheader")}
    for name, value in facts.items():
        c.record.figure(name, value)
    numbers = 2 ** 30 if c.on_gpu else 2 ** 16
    side = 8192 if c.on_gpu else 128
    source = torch.zeros(numbers, dtype=c.dtype, device=c.torch_device)
    target = torch.empty_like(source)
    square = torch.randn(side, side, dtype=c.dtype, device=c.torch_device)
    copy = min(c.seconds(lambda: target.copy_(source)) for _ in range(5))
    product = min(c.seconds(lambda: square @ square) for _ in range(5))
    c.record.figure("bandwidth of a copy", 2 * source.nbytes / copy / 1e12, "TB/s")
    c.record.figure(f"products {side} x {side}", 2 * side ** 3 / product / 1e12, "TFLOP/s")


def said_by(*words):
    """The first line of a program's output; None if it cannot be run."""
    try:
        ran = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip().split("\n")[0] or None


def relative(got, want):
    """The largest difference over the largest value."""
    want = want.detach().float().cpu()
    return float((got.detach().float().cpu() - want).abs().max() / want.abs().max())


@part("parity", 60, 40)
def parity(c):
    """Logits, log-probabilities and LoRA's gradient of a small model, against the CPU's."""
    shape = "small" if c.on_gpu else "tiny"
    exact = random_model(config_of(shape), "cpu", torch.bfloat16).float()
    state = with_adapter(exact, 4).state_dict()
    found = {}
    for place in {"cpu", c.torch_device.type}:
        for dtype in (torch.float32, torch.bfloat16):
            model = with_adapter(random_model(config_of(shape), place, dtype), 4)
            model.load_state_dict(state)
            found[place, dtype] = passes_of(model)
    for name, want in found["cpu", torch.float32].items():
        off = relative(found[c.torch_device.type, torch.float32][name], want)
        c.record.check(f"float32 {name} as on the CPU", off <= 2e-4, off)
        # Both round to bf16, each in its own order: the device must not be much worse.
        cpu = relative(found["cpu", torch.bfloat16][name], want)
        off = relative(found[c.torch_device.type, torch.bfloat16][name], want)
        c.record.check(f"bfloat16 {name}: the error is at most twice the CPU's", off <= 2 * cpu,
                       f"{off:.2g} and {cpu:.2g}")


def passes_of(model):
    """{name: tensor}: logits of a prompt, and what training computes for packed samples."""
    from model import pack, token_logprobs
    prompts = [list(range(2, 30)), list(range(40, 52))]
    groups = [(p, [[5 + i, 9, 60 + i, 3] for i in range(3)]) for p in prompts]
    rows, = pack(groups, 4096, model.device)
    logp, entropy = token_logprobs(model, rows)
    params = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(logp.sum(), params)
    return {"logits": model(torch.tensor(prompts[:1], device=model.device)),
            "log-probabilities": logp, "entropies": entropy,
            "gradients": torch.cat([g.flatten() for g in gradients])}


@part("graphs", 60, 40)
def graphs(c):
    """Samples by CUDA graphs against plain steps and against the plain loop, over refills, smaller
    batches and a second adapter."""
    from engine import generate
    from generate import generate_plain
    from lora import adapter_state
    shape = "small" if c.on_gpu else "tiny"
    settings = {"k": 4, "max_new_tokens": 24 if c.on_gpu else 10, "stop_ids": range(40, 60)}
    prompts = [[3 + i] * (4 + 5 * i % 7) for i in range(7 if c.on_gpu else 4)]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        ways = {"graphs": [], "plain steps": [], "the plain loop": []}
        model = with_adapter(random_model(config_of(shape), c.torch_device, dtype), 4)
        for seed in range(2):
            for use in (True, False) if c.device != CPU else (False,):
                model.graphs = use
                out = generate(model, prompts, max_rows=8, seed=seed, **settings)
                ways["graphs" if use else "plain steps"] += sum(out.tokens, [])
            if dtype == torch.float32:
                out = generate_plain(model, prompts, seed=seed, **settings)
                ways["the plain loop"] += sum(out.tokens, [])
            with torch.no_grad():
                for p in adapter_state(model).values():
                    p.add_(0.05)
        for way in ("graphs", "the plain loop"):
            if not ways[way]:                # no graphs on a CPU
                continue
            different = sum(a != b for a, b in zip(ways[way], ways["plain steps"], strict=True))
            share = different / len(ways[way])
            if dtype == torch.bfloat16:      # the batches' widths differ, and so does rounding
                c.record.figure(f"{name}: samples by {way} that differ from plain steps'", share)
            else:
                c.record.check(f"{name}: samples by {way} as by plain steps (at most 5% differ)",
                               share <= 0.05, share)


@part("resume", 90, 50)
def resume(c):
    """A run that is killed by SIGKILL and resumed ends with the adapter of an undisturbed one."""
    from safetensors.torch import load_file
    shape = "small" if c.on_gpu else "tiny"
    folder = model_folder(c, shape)
    data = posts_file(c.out / "resume.jsonl", 12, TINY, seed=5)
    program = "tests/pretend_gpu.py polylora" if c.device == PRETENDED else "polylora.py"
    words = [sys.executable, *program.split(), "sft", "--model", folder, "--data", data,
             "--steps", 30 if c.on_gpu else 8, "--batch", 4, "--k", 3, "--lambda", 0.3,
             "--draft-posts", 2, "--max-new-tokens", 6, "--rank", 4, "--save-every", 2, "--resume",
             "--dtype", "float32", "--device", "cpu" if c.device == CPU else "cuda"]
    whole, cut = c.out / "resume-whole", c.out / "resume-cut"
    for out in (whole, cut):
        shutil.rmtree(out, ignore_errors=True)
    run([*words, "--out", whole])
    killed = kill_after(cut, 5, [*words, "--out", cut])
    c.record.check("killed after a checkpoint, before the end", killed)
    run([*words, "--out", cut])
    adapters = []
    for out in (whole, cut):
        adapters.append(load_file(out / "adapter" / "adapter_model.safetensors"))
    whole, cut = (torch.cat([t.flatten() for _, t in sorted(a.items())]) for a in adapters)
    off = float((cut - whole).norm() / whole.norm())
    # A GPU adds in any order, so that runs agree up to rounding alone.
    c.record.check("resumed as undisturbed: relative distance of the adapters",
                   off <= (0.05 if c.on_gpu else 0), off)


def run(words):
    ran = subprocess.run([*map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"exit code {ran.returncode}: {(ran.stdout + ran.stderr)[-2000:]}")


def kill_after(out, steps, words):
    """Start a command and kill it once its log has that many steps; False if it ended before."""
    log = out / "metrics.jsonl"
    with open(out.with_suffix(".said"), "w") as said:
        started = subprocess.Popen([*map(str, words)], cwd=ROOT, stdout=said, stderr=said)
    while started.poll() is None:
        if log.exists() and log.read_text().count('"lr"') >= steps:
            started.kill()
            started.wait()
            return not (out / "done.json").exists()
        time.sleep(0.005)
    return False


# ---- The commands on 0.6B ------------------------------------------------------------------------

def training_words(c, shape, seed):
    sizes = c.sizes
    data = posts_file(c.out / f"posts-{seed}.jsonl", sizes.batch * (sizes.steps + 1), sizes, seed)
    words = ["--data", data, "--steps", sizes.steps, "--batch", sizes.batch, "--k", sizes.k,
             "--max-new-tokens", sizes.new, "--warmup", 1]
    return words + (["--device", "cpu"] if c.device == CPU else [])


@part("sft", 75, 50)
def sft(c):
    """Phase one with D on 0.6B, its weights read from a file."""
    import polylora
    folder = model_folder(c, c.sizes.small)
    words = training_words(c, c.sizes.small, seed=11)
    ran = command(c, polylora.main, "sft", "sft", "--model", folder, *words, "--lambda", 0.3,
                  "--draft-posts", min(4, c.sizes.batch), "--gate", "none")
    c.record.figure("SFT with D, 0.6B: a step", ran.mean("seconds"), "s")
    c.record.check("SFT with D, 0.6B: D is above 0", ran.mean("D") > 0, ran.mean("D"))
    memory_figures(c, "SFT with D, 0.6B", ran)


@part("grpo", 75, 50)
def grpo(c):
    """Phase two with D and KL on 0.6B."""
    import grpo as program
    import polylora
    folder = model_folder(c, c.sizes.small)
    words = training_words(c, c.sizes.small, seed=12)
    start = c.out / "sft"
    if not (start / "done.json").exists():
        start = c.out / "start"
        command(c, polylora.main, "start", "sft", "--model", folder, *words, "--steps", 1)
    ran = command(c, program.main, "grpo", "--start", start, *words, "--beta", 0.04,
                  "--diversity-weight", 1, "--gate", "none", "--lr", 1e-4)
    c.record.figure("GRPO with D and KL, 0.6B: a step", ran.mean("seconds"), "s")
    mismatch = ran.mean("mismatch")
    c.record.check("mismatch of sampled and scored log-probabilities (0.2 in bf16, 1e-4 in fp32)",
                   mismatch < (1e-4 if c.device == CPU else 0.2), mismatch)
    c.record.figure("tokens whose two log-probabilities are 0.1 apart", ran.mean("far_off"))
    memory_figures(c, "GRPO, 0.6B", ran)


@part("measure", 60, 35)
def measure(c):
    """evaluate.py measure on 0.6B."""
    import evaluate
    sizes = c.sizes
    folder = model_folder(c, sizes.small)
    data = posts_file(c.out / "eval.jsonl", sizes.measured, sizes, seed=13)
    words = ["--device", "cpu"] if c.device == CPU else []
    ran = command(c, evaluate.main, "measured", "measure", "--model", folder, "--data", data,
                  "--n", 10, "--max-new-tokens", sizes.new, *words)
    end = ran.lines[-1]
    c.record.figure("measure, 0.6B", end["tokens_per_second"], "tokens/s")
    c.record.figure("measure, 0.6B: peak memory", end["peak_bytes"] / 1e9, "GB")


# ---- Decoding ------------------------------------------------------------------------------------

def prompts_of(config, count, length):
    vocab = min(config.vocab_size, REAL_VOCABULARY) - 10
    return [[5 + (7919 * (length * i + j)) % vocab for j in range(length)] for i in range(count)]


def decode(c, model, rows, new):
    """Seconds of a decoded token of `rows` completions, 8 of a prompt: from two rollouts of
    different length, the graphs captured before."""
    from engine import generate
    k = min(8, rows)
    prompts = prompts_of(model.config, rows // k, c.sizes.prompt)

    def rollout(length):
        generate(model, prompts, k=k, max_new_tokens=length, max_rows=rows, seed=1)
    rollout(new)
    short = min(c.seconds(lambda: rollout(new // 2)) for _ in range(2))
    long = min(c.seconds(lambda: rollout(new)) for _ in range(2))
    return (long - short) / (new - new // 2)


def bytes_of_a_token(c, model, rows, new):
    """Bytes read for one decoded token of all rows: blocks, head, and the keys and values, those
    of the prompts once, the completions' own at three quarters of their length."""
    from support.peft_files import LINEARS
    config = model.config
    weights = 0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(linear in name for linear in LINEARS):
            weights += tensor.nbytes
    head = model.head_weight().nbytes
    k = min(8, rows)
    columns = rows // k * c.sizes.prompt + rows * 0.75 * new
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return weights + head + columns * cache * model.dtype.itemsize


def decoding_figures(c, model, name, rows_list):
    new = c.sizes.new
    for rows in rows_list:
        c.reset_peak()
        seconds = decode(c, model, rows, new)
        if not c.on_gpu:                     # a difference of two short times is noise
            seconds = max(seconds, 1e-9)
        needed = bytes_of_a_token(c, model, rows, new) / BANDWIDTH
        c.record.figure(f"{name}, {rows} rows: a token", 1000 * seconds, "ms")
        c.record.figure(f"{name}, {rows} rows: of the bandwidth bound", needed / seconds)
        c.record.figure(f"{name}, {rows} rows: written", rows / seconds, "tokens/s")
        c.record.figure(f"{name}, {rows} rows: peak memory", c.peak() / 1e9, "GB")
        model.kept_batch = None


@part("decode-8b", 100, 60)
def decode_8b(c):
    """Decoding 8B with LoRA, at several numbers of rows."""
    config = config_of(c.sizes.large)
    model = with_adapter(random_model(config, c.torch_device, c.dtype))
    name = str(c.dtype).removeprefix("torch.")
    decoding_figures(c, model, f"decoding 8B, {name}", c.sizes.rows)


@part("kernels", 60, 35)
def kernels(c):
    """Kernels and time of one decoded token of 0.6B; by graphs and by plain steps."""
    config = config_of(c.sizes.small)
    model = with_adapter(random_model(config, c.torch_device, c.dtype))
    rows = c.sizes.rows[-2]
    for use in (True, False) if c.device != CPU else (False,):
        model.graphs = use
        way = "graphs" if use else "plain steps"
        c.record.figure(f"decoding 0.6B, {rows} rows, {way}: a token",
                        1000 * max(decode(c, model, rows, c.sizes.new), 1e-9), "ms")
    counted = count_kernels(c, model, rows)
    if counted is not None:
        c.record.figure("decoding 0.6B: kernels a token", counted)
        c.record.figure("decoding 0.6B: kernels a token and layer",
                        counted / config.num_hidden_layers)


def count_kernels(c, model, rows):
    """Kernels of one decoded token: of a graph on the pretended device, by torch's profiler on a
    GPU, as the difference of two rollouts; None on a CPU."""
    if c.device == CPU:
        return None
    if c.device == PRETENDED:
        from pretend_gpu import device
        return device.graph_kernels[-1]
    from engine import generate
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    prompts = prompts_of(model.config, 1, 16)
    counts = []
    for length in (4, 12):
        generate(model, prompts, k=8, max_new_tokens=length, max_rows=rows)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            generate(model, prompts, k=8, max_new_tokens=length, max_rows=rows)
        counts.append(sum(event.device_type == DeviceType.CUDA for event in seen.events()))
    return (counts[1] - counts[0]) / 8


# ---- Training at 8B's shape ----------------------------------------------------------------------

def operations_of_a_token(config, checkpointing):
    """Operations of a training token in the blocks: forward, gradient of the inputs (the weights
    are frozen) and, with checkpointing, forward again; attention and LoRA left out."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    return (4 + 2 * checkpointing) * config.num_hidden_layers * layer


@part("sft-8b", 120, 60)
def sft_8b(c):
    """Phase one at 8B's shape: plain, as a share of the card's rate, and with D."""
    import polylora
    shape = c.sizes.large
    config = config_of(shape)
    folder = model_folder(c, shape, weights=False)
    words = [*training_words(c, shape, seed=14), "--checkpointing"]
    with made_on_device(c, shape):
        ran = command(c, polylora.main, "sft-8b", "sft", "--model", folder, *words)
        rate = ran.mean("tokens") / ran.mean("seconds")
        c.record.figure("SFT, 8B, with checkpointing", rate, "tokens/s")
        c.record.figure("SFT, 8B: of 790 TFLOP/s",
                        rate * operations_of_a_token(config, True) / OPERATIONS)
        memory_figures(c, "SFT, 8B", ran)
        ran = command(c, polylora.main, "sft-8b-d", "sft", "--model", folder, *words, "--lambda",
                      0.3, "--draft-posts", c.sizes.batch, "--gate", "none")
        c.record.figure("SFT with D, 8B: a step", ran.mean("seconds"), "s")
        c.record.figure("SFT with D, 8B",
                        ran.mean("tokens") / ran.mean("seconds"), "tokens/s")
        memory_figures(c, "SFT with D, 8B", ran)


@part("nf4", 90, 45)
def nf4(c):
    """Four bits a weight, at 8B's shape: making it, decoding, a training step."""
    from model import pack, token_logprobs
    from support import registry
    registry.load()
    config = config_of(c.sizes.large)
    model = random_model(config, c.torch_device, c.dtype)
    c.record.figure("NF4, 8B: made in", c.seconds(
        lambda: registry.FORMATS["nf4"].function(model, c.torch_device)), "s")
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    c.record.figure("NF4, 8B: weights", held / 1e9, "GB")
    with_adapter(model)
    decoding_figures(c, model, "decoding 8B, NF4", c.sizes.rows[:2])
    model.checkpointing = True
    prompts = prompts_of(config, c.sizes.batch, c.sizes.prompt)
    pairs = [(prompt, [prompt[:c.sizes.new]]) for prompt in prompts]

    def step():
        for rows in pack(pairs, 16384, c.torch_device):
            (-token_logprobs(model, rows)[0].mean()).backward()
    step()
    c.record.figure("NF4, 8B: an SFT step", c.seconds(step), "s")
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    c.record.check("NF4, 8B: gradients are finite and not zero",
                   all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in gradients))


@part("attention", 60, 35)
def attention(c):
    """Attention of training with cuDNN's kernel and without, in widths that change with every
    step: a plan for each new width costs more than the step."""
    from model import full_attention
    config = config_of(c.sizes.large)
    widths = [8 * (i + 9) for i in range(12)] if c.on_gpu else [16, 24]
    new = {"device": c.torch_device, "dtype": c.dtype}
    before = torch.backends.cuda.cudnn_sdp_enabled()
    heads = config.num_attention_heads, config.num_key_value_heads

    def step(width, masked):
        q = torch.randn(8, width, heads[0], config.head_dim, **new, requires_grad=True)
        k = torch.randn(8, width, heads[1], config.head_dim, **new)
        mask = torch.ones(8, 1, width, width, dtype=torch.bool, device=c.torch_device)
        attend = full_attention(mask.tril() if masked else None)
        attend(0, q, k, k).float().sum().backward()
    for masked in (False, True):
        for cudnn in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            step(8, masked)                  # loads kernels
            times = []
            for width in widths:
                work = partial(step, width, masked)
                times.append((c.seconds(work), c.seconds(work)))
            name = (f"attention{' with a mask' if masked else ''}, cuDNN "
                    f"{'on' if cudnn else 'off'}")
            first, second = (1000 * sum(column) / len(times) for column in zip(*times))
            c.record.figure(f"{name}: first step of a width", first, "ms")
            c.record.figure(f"{name}: second", second, "ms")
    torch.backends.cuda.enable_cudnn_sdp(before)


# ---- Running the parts ---------------------------------------------------------------------------

ORDER = ("environment", "parity", "graphs", "decode-8b", "sft-8b", "sft", "grpo", "measure",
         "kernels", "attention", "nf4", "resume")


def run_part(args):
    """One part, in this process."""
    function, _, _ = PARTS[args.part]
    if args.limit and hasattr(signal, "alarm"):
        signal.alarm(args.limit + 5)         # ends this process, should its parent be gone
    torch.set_num_threads(1 if args.device != GPU else min(8, os.cpu_count()))
    if args.device == PRETENDED:
        import pretend_gpu
        pretend_gpu.install()
    folder = args.out / args.device
    record = Record(folder / f"{args.part}.json", args.device)
    function(Context(sizes_of(args), args.device, folder / "work", record))
    record.finish()


def sizes_of(args):
    return TINY if args.tiny else QUICK if args.quick else FULL


def run_parts(args, device, names, deadline, records):
    """All parts on one device, each in a process of its own: {part: its record} in `records`."""
    folder = args.out / device
    (folder / "work").mkdir(parents=True, exist_ok=True)
    for name in names:
        _, limit, quick = PARTS[name]
        limit = 300 if args.tiny else quick if args.quick else limit
        limit = min(limit, deadline - time.monotonic())
        file = folder / f"{name}.json"
        file.unlink(missing_ok=True)
        began = time.monotonic()
        status = "not run: no time was left"
        if limit > 5:
            print(f"{device}: {name}", flush=True)
            status = supervised(args, device, name, limit)
        record = json.loads(file.read_text()) if file.exists() else {"figures": [], "checks": []}
        records[name] = record | {"status": status, "seconds": time.monotonic() - began}
        file.write_text(json.dumps(records[name], indent=2) + "\n")
        print(f"{device}: {name}: {status}, {records[name]['seconds']:.0f} s", flush=True)


def supervised(args, device, name, limit):
    """Run a part in a process group of its own, for `limit` seconds at most; its status."""
    words = [sys.executable, __file__, "--part", name, "--device", device, "--out", args.out,
             "--limit", math.ceil(limit)]
    words += ["--tiny"] if args.tiny else ["--quick"] if args.quick else []
    log = args.out / device / f"{name}.log"
    with open(log, "w") as errors:
        child = subprocess.Popen([*map(str, words)], stderr=errors, start_new_session=True)
    code = None
    try:
        code = child.wait(limit)
    except subprocess.TimeoutExpired:
        pass
    finally:                                 # also when this process is stopped
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if code is None:
        return f"cut off after {limit:.0f} s"
    if code:
        last = (log.read_text().strip().splitlines() or ["no message"])[-1]
        return f"failed ({code}): {last[:300]}"
    return "done"


def tables(records):
    """Two Markdown tables: checks, and figures."""
    checks = ["| check | passed | value |", "|---|---|---|"]
    figures = ["| figure | value |", "|---|---|"]
    for name, record in records.items():
        if record["status"] != "done":
            checks.append(f"| part {name} | **no** | {record['status'].replace('|', '/')} |")
        for check in record["checks"]:
            passed = "yes" if check["passed"] else "**no**"
            checks.append(f"| {check['what']} | {passed} | {shown(check['value'])} |")
        for figure in record["figures"]:
            figures.append(f"| {figure['what']} | {shown(figure['value'])} {figure['unit']} |")
    filled = [table for table in (checks, figures) if len(table) > 2]
    return "\n\n".join("\n".join(table) for table in filled) + "\n"


def passed(record):
    return record["status"] == "done" and all(check["passed"] for check in record["checks"])


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="fewer steps: at most 4 minutes")
    p.add_argument("--tiny", action="store_true", help="tiny sizes, without a GPU")
    p.add_argument("--out", type=Path, default=None,
                   help="folder for results; default: gpu_check-TIME in the system's folder for "
                        "temporary files")
    p.add_argument("--only", default=",".join(ORDER), help="parts, comma-separated")
    p.add_argument("--list", action="store_true", help="show the parts")
    p.add_argument("--device", choices=(CPU, GPU, PRETENDED), default=None,
                   help="default: the GPU; with --tiny the CPU, then the pretended device")
    p.add_argument("--part", choices=ORDER, help=argparse.SUPPRESS)
    p.add_argument("--limit", type=int, help=argparse.SUPPRESS)  # seconds of --part
    args = p.parse_args(argv)
    unknown = set(args.only.split(",")) - set(ORDER)
    if unknown:
        p.error(f"no part {', '.join(sorted(unknown))}: the parts are {', '.join(ORDER)}")
    return args


def main(argv=None):
    args = parse(argv)
    if args.list:
        for name in ORDER:
            print(f"{name:12} {' '.join(PARTS[name][0].__doc__.split())}")
        return 0
    if args.part:
        run_part(args)
        return 0
    if not args.tiny and not torch.cuda.is_available():
        print("no GPU here: tiny sizes on the CPU and on the pretended device", flush=True)
        args.tiny = True
    stamp = time.strftime("%Y%m%d-%H%M%S")
    args.out = (args.out or Path(tempfile.gettempdir()) / f"gpu_check-{stamp}").resolve()
    devices = [args.device] if args.device else [CPU, PRETENDED] if args.tiny else [GPU]
    deadline = time.monotonic() + 60 * sizes_of(args).minutes
    names = [name for name in ORDER if name in args.only.split(",")]
    found = {device: {} for device in devices}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for device in devices:
            run_parts(args, device, names, deadline, found[device])
            shutil.rmtree(args.out / device / "work", ignore_errors=True)
    finally:
        signal.signal(signal.SIGTERM, before)
        note = " (tiny sizes: the figures say only that it runs)" if args.tiny else ""
        text = "\n".join(f"## {device}{note}\n\n{tables(found[device])}" for device in devices)
        (args.out / "table.md").write_text(text)
        print(f"{text}\nresults: {args.out}", flush=True)
    return 0 if all(passed(r) for records in found.values() for r in records.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
