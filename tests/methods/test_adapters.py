"""Tests of methods/adapters.py."""

import copy
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import grpo
import lora
import polylora
from engine import generate
from generate import generate_plain
from helpers import (
    THREE_PROMPTS, TOKENS, Share, both_take, build_model, command, gap, grads_of, grpo_session,
    layer_of, logits, rewards_by_length, sft_session, shake_all, whole_and_cut, with_adapter,
)
from lora import (
    adapter, adapter_state, add_adapter, base, drop_lora, frozen_copy, load_adapter, merge_lora,
    save_adapter,
)
from methods.nf4 import quantise
from methods.pruned import Budget
from model import pack, token_logprobs
from support.files import InputError
from support.registry import ADAPTERS


KINDS = list(ADAPTERS)

LOW_RANK = [kind for kind in KINDS if kind != "full"]

# one weight for all tokens
ALIKE = [kind for kind in LOW_RANK if kind not in ("moa", "ensemble")]


# ---- At first, and after one step ----------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_at_first_every_adapter_is_the_base_bit_for_bit(kind):
    """PiSSA's and DoRA's too: both are written so that nothing is left but zeros and ones."""
    for dtype, bias in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        plain = build_model(dtype, attention_bias=bias)
        want = logits(plain)
        assert torch.equal(logits(with_adapter(kind, plain)), want)
    assert gap(logits(shake_all(with_adapter(kind))), logits(build_model())) > 0.02


# What the first step moves: all the rest has no gradient yet, since a factor beside it is zero.
FIRST = {"lora": ["lora_B"], "rslora": ["lora_B"], "dora": ["lora_B", "magnitude"],
         "pissa": ["lora_A", "lora_B"],
         "adalora": ["lora_E"], "lori": ["lora_B"], "multilora": ["lora_gates"], "moa": ["lora_B"],
         "ensemble": ["lora_B"]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_moves_what_it_should_and_nothing_else(kind):
    model = with_adapter(kind)
    everything = lambda: {n: t.clone() for n, t in (*model.named_parameters(),
                                                    *model.named_buffers())}
    before, own = everything(), adapter_state(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(own)
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        for member in range(3) if model.ensemble else [None]:
            if model.ensemble:
                model.ensemble.of = member
            model(TOKENS).log_softmax(-1)[0, :, 5].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {n for n, t in everything().items() if not torch.equal(t, before[n])}
        if step == 0 and kind in FIRST:
            assert moved == {n for n in own if any(part in n for part in FIRST[kind])}
    # after three steps all, and no frozen tensor
    assert moved == set(own)


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_trains_over_biases_and_leaves_them_as_they_are(kind):
    """Two steps over attention_bias: the base, the merged weights and the model without the adapter
    have the biases that were there."""
    fresh = build_model(attention_bias=True)
    biases = {n: p.clone() for n, p in fresh.named_parameters() if n.endswith("bias")}
    assert len(biases) == 8 and min(float(b.abs().max()) for b in biases.values()) > 0.1
    plain = logits(fresh)
    model = with_adapter(kind, fresh)
    own = adapter_state(model)
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        model(TOKENS).log_softmax(-1)[0, :, 5].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
    moved = [not torch.equal(p, biases[n]) for n, p in after.items()]
    assert after.keys() == biases.keys() and all(p == (kind == "full") for p in moved)
    trained = logits(model)
    assert gap(trained, plain) > 1e-3
    with base(model):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(drop_lora(copy.deepcopy(model))), plain)
    if kind in ALIKE or kind == "full":
        assert gap(logits(merge_lora(model)), trained) < 2e-5
        assert model.state_dict().keys() == build_model(attention_bias=True).state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_the_original_and_copies_can_be_exchanged(kind):
    plain, model = logits(build_model()), with_adapter(kind)
    start = frozen_copy(model)
    trained = logits(shake_all(model))
    for _ in range(2):
        with base(model):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), trained)
    with adapter(model, start):
        assert torch.equal(logits(model), plain)
        with base(model):
            assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), trained)
    # taken off, the base is back
    assert torch.equal(logits(drop_lora(copy.deepcopy(model))), plain)
    dropped = drop_lora(model)
    assert not adapter_state(dropped) and not any(p.requires_grad for p in dropped.parameters())


@pytest.mark.parametrize("kind", [*ALIKE, "full"])
def test_merging_keeps_the_logits(kind):
    model = shake_all(with_adapter(kind))
    want = logits(model)
    assert gap(logits(merge_lora(model)), want) < 2e-5
    assert model.state_dict().keys() == build_model().state_dict().keys()


def test_moa_and_ensembles_cannot_be_merged():
    for kind in ("moa", "ensemble"):
        with pytest.raises(InputError, match="cannot be merged"):
            merge_lora(with_adapter(kind))


# ---- The formulas --------------------------------------------------------------------------------

def test_low_rank_adapters_compute_their_formulas():
    x = torch.randn(4, 7)
    for kind in ALIKE:
        layer, W, A, B = layer_of(kind)
        if kind == "lora":
            V = W + 2 * B @ A
        elif kind == "rslora":
            V = W + 6 / 3 ** 0.5 * B @ A
        elif kind == "dora":
            V = W + 2 * B @ A
            V = torch.stack([m * row / row.norm()
                             for m, row in zip(layer.lora_magnitude_vector, V)])
        elif kind == "pissa":
            u, s, v = torch.linalg.svd(W)
            V = W - (u[:, :3] * s[:3]) @ v[:3] + 2 * B @ A
        elif kind == "adalora":
            # 1.5 times 3, rounded up
            assert A.shape == (5, 7)
            V = W + 6 / 5 * B @ torch.diag(layer.lora_E.squeeze(1)) @ A
        elif kind == "lori":
            layer.lora_mask[1:3] = 0
            V = W + 2 * torch.cat((B[:1], 0 * B[1:3], B[3:])) @ A
        else:
            g = layer.lora_gates
            # a number for each output
            assert g.shape == (2, 5)
            V = W + 2 * (torch.diag(g[0]) @ B[:, :3] @ A[:3] + torch.diag(g[1]) @ B[:, 3:] @ A[3:])
        assert gap(layer(x), x @ V.t()) < 1e-5 and gap(layer.merged_weight(), V) < 1e-5, kind
        assert gap(layer(x[None, :, None])[0, :, 0], x @ V.t()) < 1e-5


def test_a_mixture_weighs_its_adapters_for_each_token():
    layer, W, A, B = layer_of("moa")
    x = torch.randn(2, 4, 7)
    g = (x @ layer.lora_router.t()).softmax(-1)
    parts = [g[..., i:i + 1] * (x @ A[3 * i:3 * i + 3].t() @ B[:, 3 * i:3 * i + 3].t())
             for i in range(2)]
    assert gap(layer(x), x @ W.t() + 2 * sum(parts)) < 1e-5


def test_dora_s_norm_passes_no_gradient():
    """Through the norm, B's gradient would lose its part along V: PEFT and the paper detach it."""
    layer, W, A, B = layer_of("dora")
    x, out = torch.randn(4, 7), torch.randn(4, 5)
    (layer(x) * out).sum().backward()
    norms = (W + 2 * B @ A).norm(dim=1).detach()
    want, = torch.autograd.grad(
        ((x @ (W + 2 * B @ A).t()) * (layer.lora_magnitude_vector / norms) * out).sum(), B)
    assert gap(B.grad, want) < 1e-5


def test_pissa_starts_at_the_largest_singular_directions():
    layer, W, A, B = layer_of("pissa", size=0)
    s = torch.linalg.svdvals(W)
    assert gap(torch.linalg.svdvals(layer.scale * B @ A)[:3], s[:3]) < 1e-5
    assert gap(torch.linalg.matrix_norm(W - layer.scale * B @ A, 2), s[3]) < 1e-5


# ---- Drafts --------------------------------------------------------------------------------------

@pytest.mark.slow_after(3)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind, nf4",
                         [*((kind, False) for kind in KINDS), *((kind, True) for kind in LOW_RANK)])
def test_sampling_and_training_use_the_same_function(kind, nf4, bias):
    """The fast engine, the plain loop and the scoring pass: the same drafts, the same
    log-probabilities."""
    model = build_model(attention_bias=bias)
    model = shake_all(with_adapter(kind, quantise(model) if nf4 else model))
    settings = dict(k=4, max_new_tokens=5, seed=5)
    fast, plain = (write(model, THREE_PROMPTS, **settings) for write in (generate, generate_plain))
    assert fast.tokens == plain.tokens and fast.finished == plain.finished
    flat = lambda groups: torch.tensor([p for group in groups for each in group for p in each])
    assert gap(flat(fast.logprobs), flat(plain.logprobs)) < 1e-4
    for rows in pack(list(zip(THREE_PROMPTS, fast.tokens)), 60, members=model.members):
        completions = rows.completion.unique_consecutive().tolist()
        written = torch.tensor([p for d in completions for p in fast.logprobs[d // 4][d % 4]])
        with torch.no_grad():
            assert gap(token_logprobs(model, rows)[0], written) < 1e-4
    with_base = drop_lora(copy.deepcopy(model))
    assert generate(with_base, THREE_PROMPTS, **settings).tokens != fast.tokens


# ---- Files ---------------------------------------------------------------------------------------

@pytest.mark.slow_after(4)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_bit_for_bit_and_is_checked(kind, tmp_path):
    model = shake_all(with_adapter(kind))
    save_adapter(model, tmp_path, "some/base")
    fresh = load_adapter(build_model(), tmp_path)
    assert (torch.equal(logits(fresh), logits(model)) and gap(logits(fresh), logits(build_model()))
            > 0.02)
    assert all(torch.equal(p, adapter_state(model)[n]) and p.requires_grad
               for n, p in adapter_state(fresh).items())
    into = with_adapter(kind)
    assert torch.equal(logits(load_adapter(into, tmp_path)), logits(model))
    save_adapter(fresh, tmp_path / "again", "some/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    with pytest.raises(InputError, match="does not fit this model|rank"):
        load_adapter(build_model(hidden_size=32), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(max(n for n in tensors if "norm" not in n))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=str(tmp_path)):
        load_adapter(build_model(), tmp_path)


# ---- The command line ----------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_20_steps_resumes_bit_for_bit_and_grpo_goes_on_from_it(kind, files, tmp_path):
    small = (
        f"--adapter {kind} --members 2 --steps 20 --batch 2 --rank 2 --save-every 7 --lambda 0.5"
        " --k 3 --draft-every 10 --draft-posts 2 --max-new-tokens 4 --lr 0.01".split()
    )
    whole = whole_and_cut(command(polylora.main, tmp_path, "sft", *files, *small), polylora,
                          "sft_step", 16)["adapter"]
    again = ["--start", str(tmp_path / "whole"), *files, "--out", str(tmp_path / "grpo"),
             "--steps", "2", "--batch", "2",
             "--k", "4", "--max-new-tokens", "4", "--reward", "agreement", "--beta", "0.1",
             "--lr", "0.01"]
    assert grpo.main(again) == 0
    last = load_file(tmp_path / "grpo" / "adapter" / "adapter_model.safetensors")
    lines = [json.loads(line)
             for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    # drafted with what is trained
    assert last.keys() == whole.keys() and lines[0]["mismatch"] < 1e-4


# ---- Ranks and resumption ------------------------------------------------------------------------

@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_two_ranks_take_the_step_of_one_with_every_adapter(parts, kind):
    """Both phases: replies and drafts of five posts, what the kind adds beside the gradient
    (Budget) once."""
    def session(make, *flags, ranks):
        s = make(parts, *flags, "--batch", "5", "--max-new-tokens", "4")
        draw = torch.Generator().manual_seed(5)   # 3: a PiSSA token within 1e-6 of a tie
        s.ranks, s.model = ranks, add_adapter(lora.drop_lora(s.model), kind, 2, 4,
                                              **{} if kind == "full" else {"members": 2})
        s.params = lora.trained(s.model)
        for p in s.params:
            p.data.add_(0.05 * torch.randn(p.shape, generator=draw))
        return s

    def go(ranks):
        s = session(sft_session, "--lambda", "1", "--k", "3", "--draft-posts", "3", ranks=ranks)
        polylora.sft_step(s, 0)
        Budget(s.model, 10).before()
        first = grads_of(s, 0)
        s = session(grpo_session, "--beta", "0.2", "--diversity-weight", "0.5", ranks=ranks)
        s.reward, s.start = rewards_by_length, {n: 0.9 * p.detach()
                                                for n, p in adapter_state(s.model).items()}
        grpo.grpo_step(s, 0)
        return first | {f"grpo {n}": g for n, g in grads_of(s, 0).items()}
    both_take(go, go(Share()))
