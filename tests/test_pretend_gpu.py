"""The commands on a pretended GPU (pretend_gpu.py), each in a process of its own: no mixed devices,
legal graphs, few waits of the host, no slow attention, few kernels. Planted defects are found."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import engine
import model as model_file
from engine import generate
from helpers import ROOT, build, grpo_args, lines, sft_args
from lora import add_lora, adapter_state
from model import pack, token_logprobs
from support.files import InputError

# Kernels of one decoded token with LoRA on all layers; the goal is 25 a layer.
KERNELS_A_LAYER = 25
KERNELS_BESIDE_LAYERS = 50                   # masks, embedding, head, sampling
TOKENS_A_WAIT = 6                            # the engine looks for finished samples this seldom
WAITS_A_ROLLOUT = 20                         # prefill, capture and reading the samples
LENGTH = 64                                  # new tokens
SHORT = 32


def child(*words):
    """A process with the repository and this folder on its path; its standard output."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    ran = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=env, text=True,
                         capture_output=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def pretended(folder, program, *words):
    """The counters of one command on the pretended GPU, which must exit with 0."""
    file = folder / "counts.json"
    child("tests/pretend_gpu.py", "--json", file, program, *words)
    return json.loads(file.read_text())


def check(counts, rollouts):
    assert counts["graphs"] >= 1 and counts["replays"] > LENGTH // 2
    tokens = counts["replays"] + counts["graphs"]
    allowed = tokens / TOKENS_A_WAIT + WAITS_A_ROLLOUT * rollouts + 1
    assert counts["waits_in_engine"] <= allowed, counts["places"]
    assert counts["attention"] and not counts["slow_attention"]


@pytest.mark.slow
def test_sft_with_diversity(world, tmp_path):
    words = sft_args(world, "on-gpu", "--lambda", "0.3", "--max-new-tokens", LENGTH)
    check(pretended(tmp_path, "polylora", *words), rollouts=2)
    assert all(line["D"] > 0 for line in lines(world["root"] / "on-gpu") if "ce" in line)


@pytest.mark.slow
def test_grpo_with_diversity_and_kl(world, tmp_path):
    words = grpo_args(world, "grpo-on-gpu", "--diversity-weight", "1", "--beta", "0.04",
                      "--max-new-tokens", LENGTH)
    check(pretended(tmp_path, "grpo", *words), rollouts=2)
    steps = [line for line in lines(world["root"] / "grpo-on-gpu") if "kl" in line]
    assert len(steps) == 2 and steps[1]["kl"] > 0


@pytest.mark.slow
def test_measure(world, tmp_path):
    bare = tmp_path / "bare"
    counts = pretended(tmp_path, "evaluate", "measure", "--model", world["model"], "--bare", bare,
                       "--data", world["eval"], "--n", 10, "--max-new-tokens", LENGTH)
    check(counts, rollouts=1)
    assert len(json.loads((bare / "evaluation.json").read_text())["records"]) == 6


@pytest.fixture(scope="module")
def found():
    """What `probe` found in a child process."""
    return json.loads(child("-c", "import pretend_gpu as p; gpu = p.install(); import json; import "
                            "test_pretend_gpu as t; print(json.dumps(t.probe(gpu)))"))


@pytest.mark.slow
def test_the_pretended_device_behaves_like_one(found):
    assert all(found["device"].values()), found["device"]


@pytest.mark.slow
def test_kernels_of_a_decoded_token(found):
    """Layer by layer the same number, from graphs of models with two and with three layers."""
    two, three = found["kernels"]
    assert 0 < three - two <= KERNELS_A_LAYER
    assert 0 < two - 2 * (three - two) <= KERNELS_BESIDE_LAYERS


@pytest.mark.slow
def test_waits_do_not_grow_faster_than_the_tokens_allow(found):
    short, long = found["waits"]
    assert long - short <= (LENGTH - SHORT) / TOKENS_A_WAIT


@pytest.mark.slow
@pytest.mark.parametrize("fault, message", [
    (None, "none"),
    ("a number is read in the step", "not permitted when stream is capturing"),
    ("the step takes numbers from the host", "not permitted when stream is capturing"),
    ("the mask stays on the host", "on the same device"),
    ("numpy without cpu", "to numpy"),
    ("a generator of the host", "device type for generator"),
    ("a gradient of the host for NCCL", "No backend type associated with device type cpu"),
    ("a look at every token", "waits"),
    ("attention with a mask and few k and v heads", "math kernel"),
    ("adapters from before they trained", "graphs differ from plain steps"),
    ("the step makes a tensor anew", "graphs differ from plain steps"),
])
def test_planted_defects_are_found(found, fault, message):
    assert message in found["faults"][str(fault)]


# ---- In the child process ------------------------------------------------------------------------

def probe(gpu):
    model = on_device()
    completions(model, LENGTH)               # captures the graph
    return {"device": behaviour(gpu), "kernels": [graph_kernels(gpu, n) for n in (2, 3)],
            "waits": [waits_of(gpu, model, n) for n in (SHORT, LENGTH)],
            "faults": {str(fault): consequence(gpu, fault) for fault in (None, *FAULTS)}}


def error_of(work):
    try:
        work()
    except (RuntimeError, TypeError, InputError) as e:
        return str(e)
    return ""


def behaviour(gpu):
    """{what a GPU does: does the pretended one?}"""
    a = torch.zeros(3, device="cuda")
    b = torch.ones(3)
    x = torch.randn(2, 4).cuda().requires_grad_()
    weight = torch.nn.Parameter(torch.randn(4, 4, device="cuda"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    run = torch.utils.checkpoint.checkpoint
    (x @ weight).relu().sum().backward()
    optimizer.step()
    counter = torch.zeros(2, device="cuda")
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        counter.add_(1)
    captured = counter.tolist()
    recorded.replay()
    recorded.replay()

    def in_a_graph(work):
        def capture():
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                work()
        return "capturing" in error_of(capture)
    with torch.inference_mode():
        wide = torch.bmm(x[None].bfloat16(), weight[None].bfloat16(), out_dtype=torch.float32)
    live = gpu.live_bytes
    large = torch.empty(1000, device="cuda")
    grown = gpu.live_bytes - live
    del large
    return {
        "tensors know where they are": a.is_cuda and not b.is_cuda and b.device.type == "cpu",
        "views and results too": (a[1:] * 2).is_cuda and torch.zeros_like(a).is_cuda,
        "mixing is refused": "same device" in error_of(lambda: a + b),
        "in cat": "same device" in error_of(lambda: torch.cat((a, b))),
        "in products": "same device" in error_of(lambda: a @ b),
        "but not numbers and indices": not error_of(lambda: a + b.sum() + a[torch.tensor([0])]),
        "nor after a copy": not error_of(lambda: (b.to("cuda") + a, a.cpu() + b, a.copy_(b))),
        "numpy is refused": "numpy" in error_of(lambda: a.numpy()),
        "gradients lie with their weights": weight.grad.is_cuda,
        "the optimizer's state too": optimizer.state[weight]["step"].is_cuda,
        "checkpoints recompute there": run(lambda z: z @ weight, x, use_reentrant=False).is_cuda,
        "a capture runs nothing": captured == [0, 0] and counter.tolist() == [2, 2],
        "it refuses to wait": in_a_graph(lambda: counter.sum().item()),
        "and masks": in_a_graph(lambda: counter[counter > 0]),
        "and numbers of the host": in_a_graph(lambda: torch.tensor([1.0], device="cuda")),
        "products have fp32 results": wide.dtype == torch.float32 and wide.is_cuda,
        "memory is counted": grown == 4000 and gpu.live_bytes == live}


def on_device(layers=2, dtype=torch.bfloat16):
    """A random Qwen3 with LoRA that is not zero, on the GPU. It never samples the stop id, 40."""
    model = build(num_hidden_layers=layers).to("cuda", dtype)
    model.vocab = 40
    add_lora(model, 4, 4)
    change_adapters(model)
    return model


@torch.no_grad()
def change_adapters(model):
    for tensor in adapter_state(model).values():
        tensor.add_(torch.randn_like(tensor), alpha=0.2)


def completions(model, length=SHORT):
    prompts = [[3, 9, 4], [7, 1], [1, 2, 3, 4, 5, 6]]
    return generate(model, prompts, k=2, max_new_tokens=length, stop_ids=[40],
                    **OPTIONS["settings"]).tokens


def graph_kernels(gpu, layers):
    completions(on_device(layers), length=4)
    return gpu.graph_kernels[-1]


def waits_of(gpu, model, length):
    """Waits of the host in a rollout of that many tokens."""
    before = sum(gpu.waits.values())
    completions(model, length)
    return sum(gpu.waits.values()) - before


def consequence(gpu, fault):
    """What is seen when the work below is done with this fault: an error's text, or what its
    counters show; "none" if nothing is."""
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            FAULTS[fault](patch)
        return error_of(lambda: work(gpu)) or "none"


def work(gpu):
    """Sample, train, sample again; raises RuntimeError for what is wrong."""
    gpu.slow_attention.clear()
    model = on_device()
    samples = completions(model)
    rows, = pack([([3, 9, 4], samples[0])], 4096, "cuda")
    (-token_logprobs(model, rows)[0].mean()).backward()
    gradient = torch.cat([p.grad.flatten() for p in adapter_state(model).values()])
    OPTIONS["reduce"](gradient)
    if waits_of(gpu, model, SHORT) > SHORT / TOKENS_A_WAIT + WAITS_A_ROLLOUT:
        raise RuntimeError("the host waits for the device too often")
    if gpu.slow_attention:
        raise RuntimeError("attention takes the math kernel")
    model = on_device(dtype=torch.float32)   # equal up to rounding, which bf16 samples show
    completions(model, 6)
    change_adapters(model)
    graphs = completions(model, 6)
    model.graphs = False
    if graphs != completions(model, 6):
        raise RuntimeError("graphs differ from plain steps")


OPTIONS = {"reduce": lambda gradient: gradient, "settings": {}}  # what some faults change
FAULTS = {}


def fault(name):
    def add(function):
        FAULTS[name] = function
        return function
    return add


@fault("a number is read in the step")
def read_a_number(patch):
    whole = engine.sample

    def checked(logits, *args, **settings):
        assert float(logits.max()) < 1e9
        return whole(logits, *args, **settings)
    patch.setattr(engine, "sample", checked)


@fault("the step takes numbers from the host")
def take_numbers(patch):
    whole = engine.sample

    def shifted(logits, *args, **settings):
        return whole(logits + torch.tensor([0.0], device="cuda"), *args, **settings)
    patch.setattr(engine, "sample", shifted)


@fault("the mask stays on the host")
def leave_the_mask(patch):
    whole = model_file.Rows.mask
    patch.setattr(model_file.Rows, "mask", lambda rows: whole(rows).cpu())


@fault("numpy without cpu")
def forget_cpu(patch):
    whole = engine.Scheduler.samples

    def samples(scheduler, stop_ids):
        scheduler.batch.tokens.numpy()
        return whole(scheduler, stop_ids)
    patch.setattr(engine.Scheduler, "samples", samples)


@fault("a generator of the host")
def use_a_generator_of_the_host(patch):
    def noise(seeds, k, length):
        return torch.rand(len(seeds), k, length, device="cuda", generator=torch.Generator())
    patch.setattr(engine, "uniforms", noise)


@fault("a gradient of the host for NCCL")
def reduce_on_the_host(patch):
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    patch.setitem(OPTIONS, "reduce", lambda gradient: dist.all_reduce(gradient.cpu()))


@fault("a look at every token")
def look_always(patch):
    patch.setitem(OPTIONS, "settings", {"look_every": 1})


@fault("attention with a mask and few k and v heads")
def keep_few_heads(patch):
    def attention(mask=None):
        def attend(layer, q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            return out.transpose(1, 2)
        return attend
    patch.setattr(model_file, "full_attention", attention)


@fault("adapters from before they trained")
def keep_old_adapters(patch):
    patch.setattr(engine.FusedBlocks, "tensors", lambda blocks: [])


@fault("the step makes a tensor anew")
def make_a_tensor_anew(patch):
    whole = engine.DecodeBatch.step

    def step(batch):
        batch.newest = batch.newest.clone()
        whole(batch)
    patch.setattr(engine.DecodeBatch, "step", step)
