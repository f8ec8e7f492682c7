"""Tests of lora.py."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

import lora
import polylora
from helpers import (
    TIED, TOKENS, build_model, gap, golden, load_tiny, logits, logits_of, sft_args, shake,
    tiny_adapter, tiny_config, write_adapter,
)
from lora import (
    LoRALinear, adapter, adapter_state, add_lora, base, drop_lora, frozen_copy, load_adapter,
    lora_layers, merge_lora, save_adapter,
)
from support.files import InputError
from support import ranks as support_ranks


# ---- Adapters ------------------------------------------------------------------------------------

@TIED
def test_adapter_logits(tmp_path, tied):
    from lora import load_adapter, merge_lora
    config, want = tiny_config(tied), golden(tied)["adapter"]
    tensors = tiny_adapter(config, want["rank"], want["seed"])
    folder = write_adapter(tmp_path / "adapter", tensors, want["rank"], want["alpha"])
    model = load_adapter(load_tiny(tmp_path / "base", tied), folder)
    assert gap(logits_of(model, want["tokens"])[-2:], want["last_two"]) < 1e-4
    merged = merge_lora(model)
    assert gap(logits_of(merged, want["tokens"])[-2:], want["last_two"]) < 1e-4
    # alpha / rank = 1
    unscaled = write_adapter(tmp_path / "unscaled", tensors, want["rank"], want["rank"])
    model = load_adapter(load_tiny(tmp_path / "base", tied), unscaled)
    assert gap(logits_of(model, want["tokens"])[-2:], want["last_two"]) > 0.1


def test_a_saved_adapter_has_the_tensors_it_was_loaded_from(tmp_path):
    from lora import load_adapter, save_adapter
    from safetensors.torch import load_file
    tensors = tiny_adapter(tiny_config(True), 4, 8)
    model = load_adapter(load_tiny(tmp_path / "base", True),
                         write_adapter(tmp_path / "a", tensors, 4, 6))
    save_adapter(model, tmp_path / "b")
    again = load_file(tmp_path / "b/adapter_model.safetensors")
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert (again.keys() == tensors.keys()
            and all(torch.equal(again[n], t) for n, t in tensors.items()))
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (4, 6, 7)


# ---- LoRA ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_is_the_base_bit_for_bit(dtype):
    """B is zero: the first forward is the base's, in every bit, and with any other B it is not."""
    base = build_model(dtype)
    model = add_lora(build_model(dtype), 4, 8)
    assert torch.equal(logits(model), logits(base))
    assert gap(logits(shake(model)), logits(base)) > 0.05


def test_the_first_step_moves_b_and_leaves_a():
    """With B zero the gradient of A is zero: weight decay or a bug would move it."""
    model = add_lora(build_model(), 4, 8, seed=1)
    before, params = frozen_copy(model), adapter_state(model)
    optimizer = torch.optim.AdamW(params.values(), lr=1e-2, weight_decay=0.0)
    for step in range(2):
        model(TOKENS).log_softmax(-1)[0, :, 5].sum().backward()
        optimizer.step()
        moved = {n for n, p in params.items() if not torch.equal(p, before[n])}
        # A follows in the second step
        assert moved == {n for n in params if step or "lora_B" in n}
        optimizer.zero_grad()


def test_the_update_is_scaled_by_alpha_over_rank():
    """Forgotten or inverted, the scale still trains: doubling r at fixed alpha must halve it."""
    x, w = torch.randn(3, 6), torch.nn.Linear(6, 5, bias=False)
    for rank, alpha, scale in ((2, 6, 3.0), (4, 6, 1.5), (4, 2, 0.5)):
        layer = LoRALinear(w, rank, alpha)
        torch.nn.init.normal_(layer.lora_B.weight)
        want = x @ w.weight.t() + scale * (x @ layer.lora_A.weight.t()) @ layer.lora_B.weight.t()
        assert layer.scale == scale and gap(layer(x), want) < 1e-5
        assert gap(layer(x[None])[0], want) < 1e-5  # rows in a batch of sequences alike


def test_a_is_a_function_of_the_seed():
    """Every rank draws A for itself: it must not depend on the global generator or on what was
    drawn before."""
    torch.manual_seed(0)
    draw = lambda seed: adapter_state(add_lora(build_model(), 4, 8, seed=seed))
    one = draw(7)
    torch.randn(11)
    two, other = draw(7), draw(8)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one if "lora_A" in n)
    shapes = {n: p.shape for n, p in one.items() if "lora_A" in n}
    # as PEFT draws: U(-1/sqrt(in), 1/sqrt(in))
    bound = {n: shape[1] ** -0.5 for n, shape in shapes.items()}
    assert all(0.8 * bound[n] < one[n].abs().max().item() <= bound[n] for n in bound)


def test_adapters_are_fp32_over_a_bf16_base_and_the_base_gets_no_gradient():
    """A bf16 A loses most Adam steps to rounding; a base that trains along is no LoRA."""
    model = shake(add_lora(build_model(torch.bfloat16).requires_grad_(True), 4, 8))
    out = model(TOKENS)
    out.float().log_softmax(-1)[0, :, 5].sum().backward()
    own = {id(p) for p in adapter_state(model).values()}
    assert out.dtype == torch.bfloat16  # the sum takes the base's dtype
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None) == (id(p) in own), name
        assert p.dtype == (torch.float32 if id(p) in own else torch.bfloat16), name
    grads = [p.grad for p in adapter_state(model).values()]
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in grads)


def test_the_gradient_of_the_adapter_is_that_of_the_written_out_sum():
    """The layer adds in place to save memory: its gradients must be those of y = W x + s B A x
    in plain autograd."""
    draw = torch.Generator().manual_seed(5)
    layer = LoRALinear(torch.nn.Linear(6, 5, bias=False).requires_grad_(False), 3, 6)
    torch.nn.init.normal_(layer.lora_B.weight, generator=draw)
    grads = []
    for forward in (layer, lambda x: F.linear(x, layer.merged_weight())):
        x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(6)).requires_grad_()
        forward(x).pow(3).sum().backward()
        grads.append([x.grad, layer.lora_A.weight.grad.clone(), layer.lora_B.weight.grad.clone()])
        layer.zero_grad()
    assert all(gap(a, b) < 1e-3 * (1 + float(b.abs().max())) for a, b in zip(*grads))


def test_targets_are_respected_and_the_tied_head_is_never_wrapped():
    """LoRA on a tied embedding corrupts the head; a misspelt target silently trains nothing."""
    model = add_lora(build_model(), 2, 2, targets=("q_proj", "down_proj"))
    names = [n.rpartition(".")[2] for n in lora_layers(model)]
    assert names == ["q_proj", "down_proj"] * 2
    assert len(lora_layers(add_lora(build_model(), 2, 2))) == 7 * 2
    for targets in (("lm_head",), ("embed_tokens",), ("q_proj", "k_prj"), ()):
        with pytest.raises(InputError, match="target"):
            add_lora(build_model(), 2, 2, targets=targets)
    with pytest.raises(InputError, match="rank"):
        add_lora(build_model(), 0, 2)
    with pytest.raises(InputError, match="already"):
        add_lora(model, 2, 2)


def test_a_saved_adapter_loads_into_a_fresh_model_and_changes_its_output(tmp_path):
    """Loading that silently matches no tensor leaves the base: the output must be the trained
    one, not the base's."""
    model = shake(add_lora(build_model(), 4, 6, targets=("q_proj", "v_proj", "up_proj"),
                           dropout=0.1)).eval()
    save_adapter(model, tmp_path, "some/base")
    fresh = load_adapter(build_model(), tmp_path).eval()
    assert (torch.equal(logits(fresh), logits(model)) and gap(logits(fresh), logits(build_model()))
            > 0.05)
    assert all(torch.equal(p, adapter_state(model)[n]) for n, p in adapter_state(fresh).items())
    assert all(layer.dropout == 0.1 and layer.scale == 1.5 for layer in lora_layers(fresh).values())
    into = add_lora(build_model(), 4, 99, targets=("q_proj", "v_proj", "up_proj"))
    load_adapter(into, tmp_path, dropout=0.0)
    assert torch.equal(logits(into), logits(model))  # the file's alpha, not the model's
    assert all(layer.dropout == 0.0 for layer in lora_layers(into).values())


@pytest.mark.parametrize("change", [dict(hidden_size=32), dict(num_hidden_layers=3),
                                    dict(num_hidden_layers=1)], ids=str)
def test_an_adapter_of_another_model_is_refused_by_name(tmp_path, change):
    """Loaded loosely, an adapter of another model changes nothing, or half the layers."""
    save_adapter(add_lora(build_model(), 4, 8), tmp_path)
    with pytest.raises(InputError, match="does not fit this model.*lora_"):
        load_adapter(build_model(**change), tmp_path)


def test_merging_adds_the_update_in_fp32_and_touches_nothing_else():
    """The merged model says what the unmerged one says; merged in bf16, most of a small update
    would be rounded away."""
    model = shake(add_lora(build_model(), 4, 8))
    want, plain = logits(model), copy.deepcopy(model)
    kept = {n: (layer.weight, layer.weight.clone()) for n, layer in lora_layers(model).items()}
    assert gap(logits(merge_lora(model)), want) < 1e-5
    assert all(torch.equal(w, was) for w, was in kept.values())  # merged beside the frozen weights
    assert not lora_layers(model) and model.state_dict().keys() == build_model().state_dict().keys()
    # and dropped, the base is back
    assert torch.equal(logits(drop_lora(plain)), logits(build_model()))

    small = shake(add_lora(build_model(torch.bfloat16), 4, 8), size=1e-4)
    layer = small.model.layers[0].self_attn.q_proj
    frozen, update = layer.weight, layer.merged_weight() - layer.weight.float()
    weight = merge_lora(small).model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == small.dtype == torch.float32 and frozen.dtype == torch.bfloat16
    assert gap(weight - frozen.float(), update) < 1e-7
    assert float((weight != frozen.float()).float().mean()) > 0.9
    # what bf16 would have kept
    assert float((weight.bfloat16() != frozen).float().mean()) < 0.5


def test_the_adapter_can_be_switched_off_and_exchanged_and_comes_back():
    """A reference pass that leaves the policy switched off, or a copy that follows the training,
    ruins all that follows."""
    plain, model = build_model(), shake(add_lora(build_model(), 4, 8))
    start, trained = frozen_copy(model), logits(model)
    with torch.no_grad():
        for p in adapter_state(model).values():
            p.add_(0.1)
    later, ids = logits(model), {n: p.data_ptr() for n, p in adapter_state(model).items()}
    assert gap(later, trained) > 0.05
    with base(model):
        assert torch.equal(logits(model), logits(plain))
    with adapter(model, start), base(model):  # nested: the embedder within a reference
        assert torch.equal(logits(model), logits(plain))
    with adapter(model, start):
        assert torch.equal(logits(model), trained)
    for other in (base(model), adapter(model, start)):
        with pytest.raises(KeyError), other:
            raise KeyError
        assert torch.equal(logits(model), later)
    # the optimizer's own tensors
    assert ids == {n: p.data_ptr() for n, p in adapter_state(model).items()}


def test_dropout_acts_in_training_alone():
    """Drafts and their scores must come from one and the same network."""
    model = shake(add_lora(build_model(), 4, 8, dropout=0.5)).train()
    assert (not torch.equal(logits(model), logits(model))
            and torch.equal(logits(model.eval()), logits(model)))
    with base(model.train()):
        assert torch.equal(logits(model), logits(build_model()))


def test_lora_layers_take_the_mode_of_the_layer_they_replace(tmp_path):
    """A new module is in training mode: an adapter with dropout, loaded on a loaded model, would
    answer noisily."""
    save_adapter(shake(add_lora(build_model(), 4, 8, dropout=0.5)), tmp_path)
    model = load_adapter(build_model(), tmp_path)
    assert (not any(m.training for m in model.modules())
            and torch.equal(logits(model), logits(model)))
    assert all(m.training for m in add_lora(build_model().train(), 4, 8).modules())


# ---- A session -----------------------------------------------------------------------------------

def test_ranks_share_the_first_adapter_and_have_their_own_dropout(world, monkeypatch,
                                                                  tmp_path):  # noqa: F811
    """G8, L10: with a rank in A's seed the ranks would train different adapters; without one in
    dropout's they would drop the same entries."""
    starts, drops = [], []
    add = lora.add_adapter
    monkeypatch.setattr(polylora, "add_adapter",
                        lambda *a, seed, **k: (starts.append(seed), add(*a, seed=seed, **k))[1])
    seed = torch.manual_seed
    for rank in (0, 1):
        seen = []
        monkeypatch.setattr(torch, "manual_seed", lambda x, seen=seen: (seen.append(x), seed(x))[1])
        ranks = support_ranks.Ranks.__init__
        monkeypatch.setattr(support_ranks.Ranks, "__init__",
                            lambda self, *a, r=rank, of=ranks, **k: (of(self, *a, **k),
                                                                     vars(self).update(rank=r))[0])
        monkeypatch.setattr(support_ranks.Ranks, "main", True, raising=False)
        out = tmp_path / f"r{rank}"
        assert polylora.main(sft_args(world, "x", "--out", str(out), "--dropout", "0.1")) == 0
        monkeypatch.setattr(support_ranks.Ranks, "__init__", ranks)
        drops.append(seen)
    assert starts[0] == starts[1] and len(drops[0]) == len(drops[1]) >= 2
    assert not set(drops[0]) & set(drops[1])
