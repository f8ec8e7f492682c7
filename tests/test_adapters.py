"""The family of adapters: what each is at first, what its first step moves, its files, its drafts, its base.

PEFT's own layers are run beside ours where peft is installed; tests/golden/adapters.json holds what it computed
otherwise."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import grpo
import polylora
from adapters import (ADAPTERS, Budget, adapter, adapter_state, add_adapter, base, drop_lora, frozen_copy,
                      interpolate_adapters, load_adapter, lora_layers, merge_lora, save_adapter, trained)
from data import InputError
from generate import generate, generate_plain
from model import Config, Qwen3, pack, quantise, token_logprobs
from tiny import (PEFT_KINDS, command, sequence, tiny_adapter, tiny_config, tiny_weights, whole_and_cut, write_adapter,
                  write_checkpoint)
from trainer import Tally, Visit, add_cross_entropy, train_tokenizer

TOKENS = torch.tensor([[3, 9, 4, 17, 30, 2, 8]])
KINDS = list(ADAPTERS)
LOW_RANK = [kind for kind in KINDS if kind != "full"]
ALIKE = [kind for kind in LOW_RANK if kind not in ("moa", "ensemble")]         # one weight for all tokens
PROMPTS = [[3, 9, 4], [11, 12, 13, 14, 15], [7, 8]]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(dtype=torch.float32, **changes):
    small = dict(vocab_size=41, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    config = tiny_config(True, **small | changes)
    model = Qwen3(Config.from_dict(config))
    model.load_state_dict(tiny_weights(config, 3))
    return model.to(dtype).requires_grad_(False).eval()


def with_adapter(kind, model=None, **options):
    return add_adapter(build() if model is None else model, kind, 4, 6, **dict(seed=1, members=3) | options)


@torch.no_grad()
def shake(model, size=0.3, seed=1):
    """All that trains moved at random: an adapter that has been trained."""
    draw = torch.Generator().manual_seed(seed)
    for p in adapter_state(model).values():
        p.add_(size * torch.randn(p.shape, generator=draw))
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS)


def gap(a, b):
    return (a.double() - b.double()).abs().max().item()


# ---- At first, and after one step ------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_at_first_every_adapter_is_the_base_bit_for_bit(kind):
    """PiSSA's and DoRA's too: both are written so that nothing is left but zeros and ones."""
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(logits(with_adapter(kind, build(dtype))), logits(build(dtype)))
    assert gap(logits(shake(with_adapter(kind))), logits(build())) > 0.02


# What the first step moves: all the rest has no gradient yet, since a factor beside it is zero.
FIRST = {"lora": ["lora_B"], "rslora": ["lora_B"], "dora": ["lora_B", "magnitude"], "pissa": ["lora_A", "lora_B"],
         "adalora": ["lora_E"], "lori": ["lora_B"], "multilora": ["lora_gates"], "moa": ["lora_B"], "ensemble": ["lora_B"]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_moves_what_it_should_and_nothing_else(kind):
    model = with_adapter(kind)
    everything = lambda: {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    before, own = everything(), adapter_state(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(own)
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        for member in range(3) if model.deal else [None]:
            if model.deal:
                model.deal.of = member
            model(TOKENS).log_softmax(-1)[0, :, 5].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {n for n, t in everything().items() if not torch.equal(t, before[n])}
        if step == 0 and kind in FIRST:
            assert moved == {n for n in own if any(part in n for part in FIRST[kind])}
    assert moved == set(own)                                                   # after three steps all, and no frozen tensor


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_the_original_and_copies_can_be_exchanged(kind):
    plain, model = logits(build()), with_adapter(kind)
    start = frozen_copy(model)
    trained = logits(shake(model))
    for _ in range(2):
        with base(model):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), trained)
    with adapter(model, start):
        assert torch.equal(logits(model), plain)
        with base(model):
            assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), trained)
    assert torch.equal(logits(drop_lora(copy.deepcopy(model))), plain)         # taken off, the base is back
    dropped = drop_lora(model)
    assert not adapter_state(dropped) and not any(p.requires_grad for p in dropped.parameters())


@pytest.mark.parametrize("kind", [*ALIKE, "full"])
def test_merged_it_says_the_same(kind):
    model = shake(with_adapter(kind))
    want = logits(model)
    assert gap(logits(merge_lora(model)), want) < 2e-5
    assert model.state_dict().keys() == build().state_dict().keys()


def test_what_has_a_weight_a_token_or_a_member_is_not_merged():
    for kind in ("moa", "ensemble"):
        with pytest.raises(InputError, match="cannot be merged"):
            merge_lora(with_adapter(kind))


# ---- The formulas ----------------------------------------------------------------------------------------

def layer_of(kind, rank=3, alpha=6.0, members=2, size=0.5):
    """One layer (7 -> 5), all its adapter's numbers moved."""
    linear = torch.nn.Linear(7, 5, bias=False).requires_grad_(False)
    make = ADAPTERS[kind].layer
    layer = make(linear, rank, alpha, 0.0, make.width_of(rank, members))
    with torch.no_grad():
        layer.start(torch.Generator().manual_seed(2))
        for path in layer.trains:
            layer.get_parameter(path).add_(size * torch.randn(layer.get_parameter(path).shape))
    return layer, linear.weight, layer.lora_A.weight, layer.lora_B.weight


def test_the_formulas_of_the_low_rank_ones():
    x = torch.randn(4, 7)
    for kind in ALIKE:
        layer, W, A, B = layer_of(kind)
        if kind == "lora":
            V = W + 2 * B @ A
        elif kind == "rslora":
            V = W + 6 / 3 ** 0.5 * B @ A
        elif kind == "dora":
            V = W + 2 * B @ A
            V = torch.stack([m * row / row.norm() for m, row in zip(layer.lora_magnitude_vector, V)])
        elif kind == "pissa":
            u, s, v = torch.linalg.svd(W)
            V = W - (u[:, :3] * s[:3]) @ v[:3] + 2 * B @ A
        elif kind == "adalora":
            assert A.shape == (5, 7)                                           # 1.5 times 3, rounded up
            V = W + 6 / 5 * B @ torch.diag(layer.lora_E.squeeze(1)) @ A
        elif kind == "lori":
            layer.lora_mask[1:3] = 0
            V = W + 2 * torch.cat((B[:1], 0 * B[1:3], B[3:])) @ A
        else:
            g = layer.lora_gates
            assert g.shape == (2, 5)                                           # a number for each output
            V = W + 2 * (torch.diag(g[0]) @ B[:, :3] @ A[:3] + torch.diag(g[1]) @ B[:, 3:] @ A[3:])
        assert gap(layer(x), x @ V.t()) < 1e-5 and gap(layer.merged_weight(), V) < 1e-5, kind
        assert gap(layer(x[None, :, None])[0, :, 0], x @ V.t()) < 1e-5


def test_a_mixture_weighs_its_adapters_for_each_token():
    layer, W, A, B = layer_of("moa")
    x = torch.randn(2, 4, 7)
    g = (x @ layer.lora_router.t()).softmax(-1)
    parts = [g[..., i:i + 1] * (x @ A[3 * i:3 * i + 3].t() @ B[:, 3 * i:3 * i + 3].t()) for i in range(2)]
    assert gap(layer(x), x @ W.t() + 2 * sum(parts)) < 1e-5


def test_dora_s_norm_passes_no_gradient():
    """Through the norm, B's gradient would lose its part along V: PEFT and the paper detach it."""
    layer, W, A, B = layer_of("dora")
    x, out = torch.randn(4, 7), torch.randn(4, 5)
    (layer(x) * out).sum().backward()
    norms = (W + 2 * B @ A).norm(dim=1).detach()
    want, = torch.autograd.grad(((x @ (W + 2 * B @ A).t()) * (layer.lora_magnitude_vector / norms) * out).sum(), B)
    assert gap(B.grad, want) < 1e-5


def test_pissa_starts_at_the_largest_singular_directions():
    layer, W, A, B = layer_of("pissa", size=0)
    s = torch.linalg.svdvals(W)
    assert gap(torch.linalg.svdvals(layer.scale * B @ A)[:3], s[:3]) < 1e-5
    assert gap(torch.linalg.matrix_norm(W - layer.scale * B @ A, 2), s[3]) < 1e-5


# ---- Drafts ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, nf4", [*((kind, False) for kind in KINDS), *((kind, True) for kind in LOW_RANK)])
def test_what_is_drafted_with_is_what_is_trained(kind, nf4):
    """The fast engine, the plain loop and the scoring pass: the same drafts, the same log-probabilities."""
    model = build()
    model = shake(with_adapter(kind, quantise(model) if nf4 else model))
    settings = dict(k=4, max_new_tokens=5, seed=5)
    fast, plain = (write(model, PROMPTS, **settings) for write in (generate, generate_plain))
    assert fast.tokens == plain.tokens and fast.finished == plain.finished
    flat = lambda nested: torch.tensor([p for drafts in nested for draft in drafts for p in draft])
    assert gap(flat(fast.logprobs), flat(plain.logprobs)) < 1e-4
    for rows in pack(list(zip(PROMPTS, fast.tokens)), 60, members=model.members):
        drafts = rows.draft.unique_consecutive().tolist()
        written = torch.tensor([p for d in drafts for p in fast.logprobs[d // 4][d % 4]])
        with torch.no_grad():
            assert gap(token_logprobs(model, rows)[0], written) < 1e-4
    with_base = drop_lora(copy.deepcopy(model))
    assert generate(with_base, PROMPTS, **settings).tokens != fast.tokens


def test_members_of_an_ensemble_write_draft_d_mod_m():
    """Each draft's log-probabilities are its member's own, by a model that holds that member alone."""
    model = shake(with_adapter("ensemble"), 1.0)
    samples = generate(model, PROMPTS, k=5, max_new_tokens=4, seed=2)
    for member in range(3):
        alone = with_adapter("lora", seed=0)
        for name, layer in lora_layers(alone).items():
            A, B = (lora_layers(model)[name].get_parameter(path) for path in layer.trains)
            layer.lora_A.weight.data, layer.lora_B.weight.data = A[4 * member:4 * member + 4], B[:, 4 * member:4 * member + 4]
        for p, prompt in enumerate(PROMPTS):
            for d in range(5):
                rows, = pack([(prompt, [samples.tokens[p][d]])], 100)
                with torch.no_grad():
                    off = gap(token_logprobs(alone, rows)[0], torch.tensor(samples.logprobs[p][d]))
                assert (off < 1e-4) == (d % 3 == member), (member, d, off)


def test_every_member_learns_from_every_reply():
    """The step's gradient on a member is its own LoRA's over M, and on no row another member's."""
    groups = [([1, 2, 3], [[4, 5, 6]]), ([7, 8], [[9, 10]])]

    def gradient(model):
        replies = iter(drafts[0] for _, drafts in groups)
        session = SimpleNamespace(
            model=model, ranks=SimpleNamespace(rank=0, world=1), tokenizer=None, prompt=lambda i: groups[i][0],
            micro_batches=lambda pairs: pack(pairs, 60, members=model.members))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "encode_reply", lambda tokenizer, reply: reply)
            add_cross_entropy(session, [Visit(0, 0), Visit(1, 0)], lambda visit: next(replies), tally := Tally())
        return {n: p.grad for n, p in adapter_state(model).items()}, tally
    ensemble = shake(with_adapter("ensemble"))
    grads, tally = gradient(ensemble)
    assert tally.sums["ce"][1] == 3 * 5                                        # the mean is over all members' tokens
    for member in range(3):
        alone = with_adapter("lora", seed=0)
        for name, layer in lora_layers(alone).items():
            A, B = (lora_layers(ensemble)[name].get_parameter(path).detach() for path in layer.trains)
            layer.lora_A.weight.data, layer.lora_B.weight.data = A[4 * member:4 * member + 4], B[:, 4 * member:4 * member + 4]
        for name, grad in gradient(alone)[0].items():
            own = grads[name][4 * member:4 * member + 4] if "lora_A" in name else grads[name][:, 4 * member:4 * member + 4]
            assert gap(3 * own, grad) < 1e-4 * max(1, float(grad.abs().max()))


def test_rows_of_an_ensemble_hold_one_member_each():
    groups = [([1, 2], [[3], [4, 5], [6], [7, 8, 9]]), ([1], [[2, 3]])]
    rows = pack(groups, 100, members=3)
    assert sorted(d for r in rows for d in r.draft.unique().tolist()) == [0, 1, 2, 3, 4]
    for r in rows:
        for b in range(len(r.tokens)):
            of_row = r.draft[(r.predict // r.tokens.shape[1]) == b].unique().tolist()
            assert {(0, 1, 2, 0, 0)[d] for d in of_row} == {int(r.member[b])}
    assert pack(groups, 100)[0].member is None


# ---- AdaLoRA's budget, LoRI's mask -----------------------------------------------------------------------

def stepped(kind, steps, upto, lr=0.05):
    """A model after `upto` of `steps` steps of Adam on a toy loss, as trainer.train makes them."""
    model = with_adapter(kind)
    budget, own = Budget(model, steps), list(adapter_state(model).values())
    optimizer = torch.optim.Adam(own, lr=lr)
    for step in range(upto):
        optimizer.zero_grad()
        model(TOKENS).log_softmax(-1)[0, :, 5].sum().backward()
        budget.before()
        optimizer.step()
        budget.after(step)
    return model, budget


def kept(model):
    return sum(int((layer.lora_E != 0).sum()) for layer in lora_layers(model).values())


def test_adalora_cuts_triplets_by_its_schedule_to_the_rank_that_was_asked_for():
    model, budget = stepped("adalora", 20, 0)
    counts, layers = [budget.triplets(step) for step in range(20)], 14
    assert counts[:2] == [6 * layers] * 2 and counts[-6:] == [4 * layers] * 6  # width 6, rank 4
    assert counts == sorted(counts, reverse=True) and counts[7] == round(layers * (4 + 2 * 0.5 ** 3))
    assert Budget(model, 1).triplets(0) == 4 * layers                          # a run of one step ends there too
    model, _ = stepped("adalora", 20, 20)
    ranks = [int((layer.lora_E != 0).sum()) for layer in lora_layers(model).values()]
    assert sum(ranks) == 4 * layers and len(set(ranks)) > 1                    # dealt out unevenly
    budget, before = Budget(model), kept(model)                                # a second phase goes on with the same ones
    for layer in lora_layers(model).values():
        layer.lora_E.data.add_(1)
    budget.after(0)
    assert kept(model) == before


def test_adalora_starts_small_and_at_nothing():
    layer, W, A, B = layer_of("adalora", rank=40, size=0.0)
    assert 0.017 < float(A.detach().std()) < 0.023 and 0.017 < float(B.detach().std()) < 0.023 and not layer.lora_E.any()


def test_adalora_s_importance_is_the_papers():
    layer, W, A, B = layer_of("adalora")
    E = layer.lora_E
    averages = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in (A, B, E)}
    for step in range(3):
        for p in averages:
            p.grad = torch.randn(p.shape)
        with torch.no_grad():
            got = layer.importance()
            for p, (mean, spread) in averages.items():
                now = (p * p.grad).abs()
                mean = 0.85 * mean + 0.15 * now
                averages[p] = mean, 0.85 * spread + 0.15 * (now - mean).abs()
    s = {p: mean * spread for p, (mean, spread) in averages.items()}
    assert gap(got, torch.stack([s[E][i, 0] + s[A][i].mean() + s[B][:, i].mean() for i in range(5)])) < 1e-6


def test_the_regulariser_is_added_once_whatever_the_ranks_and_is_zero_where_p_and_q_are_orthogonal():
    """It comes after the sum over ranks: the gradient of a step is the loss's plus its own, on each rank."""
    model = with_adapter("adalora")
    layers = lora_layers(model).values()
    Budget(model, 10).before()
    want = {n: p.grad.clone() for n, p in adapter_state(model).items() if p.grad is not None}
    total = 0
    for layer in layers:
        for M in (layer.lora_A.weight @ layer.lora_A.weight.t(), layer.lora_B.weight.t() @ layer.lora_B.weight):
            total = total + ((M - torch.eye(6)) ** 2).sum()
    names = [n for n in adapter_state(model) if "lora_E" not in n]
    grads = torch.autograd.grad(0.5 * total / 28, [adapter_state(model)[n] for n in names])
    assert want.keys() == set(names) and all(gap(want[n], g) < 1e-6 for n, g in zip(names, grads))
    layer, *_ = layer_of("adalora", rank=2)
    layer.lora_A.weight.data, layer.lora_B.weight.data = torch.eye(7)[:3], torch.eye(5)[:, :3]
    assert layer.orthogonality().item() == 0
    model = with_adapter("lora")
    Budget(model, 10).before()
    assert all(p.grad is None for p in adapter_state(model).values())


def test_lori_s_mask_is_the_largest_tenth_and_the_rest_of_b_stays_zero():
    before, _ = stepped("lori", 30, 2)
    sizes = torch.cat([layer.lora_B.weight.detach().abs().flatten() for layer in lora_layers(before).values()])
    model, _ = stepped("lori", 30, 3)
    layers = lora_layers(model).values()
    masks = torch.cat([layer.lora_mask.flatten() for layer in layers])
    assert set(masks.tolist()) == {0, 1}
    masks = masks.bool()
    assert int(masks.sum()) == int(0.1 * len(masks)) and all(not layer.lora_B.weight.any() for layer in layers)
    assert float(sizes[masks].mean()) > 1.02 * float(sizes.mean())             # Adam's first steps are nearly equal
    model, _ = stepped("lori", 30, 6)
    assert torch.equal(torch.cat([layer.lora_mask.flatten() for layer in lora_layers(model).values()]).bool(), masks)
    moved = torch.cat([layer.lora_B.weight.flatten() != 0 for layer in lora_layers(model).values()])
    assert torch.equal(moved, masks)


def test_lori_s_mask_is_set_once_also_after_a_skipped_step_and_a_resume():
    """train leaves `after` out at a step that is skipped: with the third went the mask."""
    model, budget = stepped("lori", 30, 2)
    count = lambda: sum(int(layer.lora_mask.sum()) for layer in lora_layers(model).values())
    whole = count()
    budget.after(4)
    assert count() == int(0.1 * whole)
    kept_b = [layer.lora_B.weight.data.copy_(layer.lora_mask) for layer in lora_layers(model).values()]
    for again in (budget, Budget(model, 30)):
        again.after(5)
        assert count() == int(0.1 * whole) and all(bool((b == layer.lora_mask).all()) for b, layer in
                                                   zip(kept_b, lora_layers(model).values()))


def test_lori_keeps_one_entry_at_least(monkeypatch):
    monkeypatch.setattr(Budget, "KEPT", 1e-9)
    model, _ = stepped("lori", 30, 3)
    assert sum(float(layer.lora_mask.sum()) for layer in lora_layers(model).values()) == 1


# ---- Files -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_bit_for_bit_and_is_checked(kind, tmp_path):
    model = shake(with_adapter(kind))
    save_adapter(model, tmp_path, "some/base")
    fresh = load_adapter(build(), tmp_path)
    assert torch.equal(logits(fresh), logits(model)) and gap(logits(fresh), logits(build())) > 0.02
    assert all(torch.equal(p, adapter_state(model)[n]) and p.requires_grad for n, p in adapter_state(fresh).items())
    into = with_adapter(kind)
    assert torch.equal(logits(load_adapter(into, tmp_path)), logits(model))
    save_adapter(fresh, tmp_path / "again", "some/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    with pytest.raises(InputError, match="does not fit this model|rank"):
        load_adapter(build(hidden_size=32), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(max(n for n in tensors if "norm" not in n))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=str(tmp_path)):
        load_adapter(build(), tmp_path)


@pytest.mark.parametrize("kind, change", [
    ("moa", {"members": None}), ("moa", {"members": 0}), ("ensemble", {"members": 2}), ("adalora", {"init_r": 5}),
    ("adalora", {"target_r": "4"}), ("pissa", {"pissa_rank": 3}), ("dora", {"use_rslora": True}),
    ("lori", {"peft_type": "LORA"}), ("lora", {"peft_type": "MOA", "members": 1}), ("full", {"peft_type": "LORA"})], ids=str)
def test_a_configuration_that_does_not_fit_its_tensors_is_refused(kind, change, tmp_path):
    save_adapter(with_adapter(kind), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config = {k: v for k, v in (config | change).items() if v is not None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=str(tmp_path)):
        load_adapter(build(), tmp_path)


def test_adapters_do_not_load_into_another_kind_nor_full_over_four_bits(tmp_path):
    save_adapter(with_adapter("lora"), tmp_path)
    with pytest.raises(InputError, match="another's layers"):
        load_adapter(with_adapter("rslora"), tmp_path)
    with pytest.raises(InputError, match="4 bits"):
        with_adapter("full", quantise(build()))
    with pytest.raises(InputError, match="already"):
        with_adapter("lora", with_adapter("full"))
    with pytest.raises(InputError, match="float32"):
        trained(with_adapter("full", build(torch.bfloat16)))
    assert trained(with_adapter("lora", build(torch.bfloat16)))


def test_between_two_adapters_lies_the_weighted_sum_of_their_updates(tmp_path):
    models = [shake(with_adapter("pissa"), seed=1), shake(with_adapter("rslora"), seed=2)]
    for model, name in zip(models, "ab"):
        save_adapter(model, tmp_path / name)
    updates = [{n: layer.merged_weight() - layer.weight for n, layer in lora_layers(model).items()} for model in models]
    for weight, scale in ((0.25, 1), (0, 1), (1, 0.5)):
        interpolate_adapters(tmp_path / "a", tmp_path / "b", weight, tmp_path / "c", scale)
        between = load_adapter(build(), tmp_path / "c")
        for n, layer in lora_layers(between).items():
            want = scale * ((1 - weight) * updates[0][n] + weight * updates[1][n])
            assert layer.kind == "lora" and layer.rank == 12 and gap(layer.merged_weight() - layer.weight, want) < 1e-5
            assert layer.dropout == 0
    save_adapter(with_adapter("dora"), tmp_path / "d")
    with pytest.raises(InputError, match="cannot be interpolated"):
        interpolate_adapters(tmp_path / "a", tmp_path / "d", 0.5, tmp_path / "e", 1)
    save_adapter(with_adapter("rslora", targets=("q_proj",)), tmp_path / "f")
    with pytest.raises(InputError, match="on the same layers"):
        interpolate_adapters(tmp_path / "b", tmp_path / "f", 0.5, tmp_path / "e", 1)


# ---- PEFT ------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden" / "adapters.json"


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_adapters_of_peft_s_kinds_have_its_logits(kind, tmp_path):
    want, config = json.loads(GOLDEN.read_text()), tiny_config(True)
    tensors = tiny_adapter(config, want["rank"], want["seed"], kind)
    write_adapter(tmp_path / "a", tensors, want["rank"], want["alpha"], **PEFT_KINDS[kind])
    model = Qwen3.from_pretrained(write_checkpoint(tmp_path / "base", config, tiny_weights(config, 7)))
    score = lambda: model(torch.tensor([want["tokens"]]))[0, -2:].detach()
    plain = gap(score(), torch.tensor(want["last_two"][kind]))
    load_adapter(model, tmp_path / "a")
    assert gap(score(), torch.tensor(want["last_two"][kind])) < 1e-4 < 0.1 < plain
    assert {layer.kind for layer in lora_layers(model).values()} == {kind}


@pytest.mark.parametrize("kind", ["lora", *PEFT_KINDS])
def test_live_ours_read_by_peft_and_peft_s_by_us(kind, tmp_path, recwarn):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config, tokens = tiny_config(True), torch.tensor([sequence(2, 20)])
    write_checkpoint(tmp_path / "base", config, tiny_weights(config, 7))
    theirs = lambda: transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ours = lambda: Qwen3.from_pretrained(tmp_path / "base")
    model = shake(with_adapter(kind, ours()), 0.1)
    save_adapter(model, tmp_path / "ours")
    recwarn.clear()
    read = peft.PeftModel.from_pretrained(theirs(), tmp_path / "ours").eval()
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]        # a missing key is only a warning
    with torch.no_grad():
        assert gap(read(tokens).logits, model(tokens)) < 1e-4 and gap(model(tokens), ours()(tokens)) > 0.1
    common = dict(lora_alpha=5, task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj", "down_proj"])
    settings = peft.LoraConfig(r=3, **common, **PEFT_KINDS.get(kind, {})) if kind != "adalora" else \
        peft.AdaLoraConfig(init_r=6, target_r=4, total_step=100, tinit=1, tfinal=1, **common)
    written = peft.get_peft_model(theirs(), settings).eval()
    with torch.no_grad():
        for name, p in written.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn(p.shape))
        written.save_pretrained(tmp_path / "theirs")
        model = load_adapter(ours(), tmp_path / "theirs")
        assert gap(written(tokens).logits, model(tokens)) < 1e-4 and gap(model(tokens), ours()(tokens)) > 0.1


# ---- The command line ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    posts = data.pocket_posts(12, seed=1)
    tokenizer = train_tokenizer([t for p in posts for t in (p.post, *p.replies)], 330)
    build(vocab_size=tokenizer.get_vocab_size() + 3).save_pretrained(folder / "model")
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    data.save_posts(posts, folder / "posts.jsonl")
    return ["--model", str(folder / "model"), "--data", str(folder / "posts.jsonl")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_20_steps_resumes_bit_for_bit_and_grpo_goes_on_from_it(kind, files, tmp_path):
    small = f"--adapter {kind} --members 2 --steps 20 --batch 2 --rank 2 --save-every 7 --lambda 0.5 --k 3 " \
            "--draft-every 10 --draft-posts 2 --max-new-tokens 4 --lr 0.01".split()
    whole = whole_and_cut(command(polylora.main, tmp_path, "sft", *files, *small), polylora, "sft_step", 16)["adapter"]
    again = ["--start", str(tmp_path / "whole"), *files, "--out", str(tmp_path / "grpo"), "--steps", "2", "--batch", "2",
             "--k", "4", "--max-new-tokens", "4", "--reward", "agreement", "--beta", "0.1", "--lr", "0.01"]
    assert grpo.main(again) == 0
    last = load_file(tmp_path / "grpo" / "adapter" / "adapter_model.safetensors")
    lines = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert last.keys() == whole.keys() and lines[0]["mismatch"] < 1e-4         # drafted with what is trained


def test_wise_makes_a_run_to_measure(files, tmp_path, capsys):
    few = "--steps 2 --batch 2 --rank 2 --lr 0.01".split()
    for name, seed in (("a", "1"), ("b", "2")):
        assert polylora.main(["sft", *files, "--out", str(tmp_path / name), "--seed", seed, *few]) == 0
    wise = ["wise", str(tmp_path / "a"), str(tmp_path / "b"), "--weight", "0.3", "--out", str(tmp_path / "c")]
    assert polylora.main(wise) == 0 and polylora.main(wise) == 2               # never over another
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["weight"] == 0.3 and config["seed"] == 2 and (tmp_path / "c" / "done.json").exists()
    assert load_adapter(Qwen3.from_pretrained(files[1]), tmp_path / "c" / "adapter")
    assert polylora.main([*wise[:4], "2", "--out", str(tmp_path / "d")]) == 2
    whole = (tmp_path / "c" / "adapter" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "c" / "done.json").unlink()                                    # killed before its end
    (tmp_path / "c" / "x.partial").write_text("half")
    assert polylora.main(wise) == 0 and (tmp_path / "c" / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    (tmp_path / "c" / "done.json").unlink()
    (tmp_path / "c" / "metrics.jsonl").write_text("")                          # a run that trains, or was stopped
    assert polylora.main(wise) == 2 and "choose another --out" in capsys.readouterr().err


def test_of_several_ranks_the_first_makes_what_lies_between(files, tmp_path):
    """Each wrote it: the second found the folder of the first and ended the launch."""
    few = "--steps 1 --batch 2 --rank 2 --lr 0.01".split()
    for name in "ab":
        assert polylora.main(["sft", *files, "--out", str(tmp_path / name), *few]) == 0
    wise = [sys.executable, "polylora.py", "wise", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")]
    ranks = [subprocess.Popen(wise, cwd=Path(polylora.__file__).parent, env=os.environ | {"RANK": rank, "WORLD_SIZE": "2"}) for rank in "10"]
    assert [rank.wait(timeout=600) for rank in ranks] == [0, 0] and (tmp_path / "c" / "done.json").exists()
