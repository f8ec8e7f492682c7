"""Tests of methods/nf4.py."""

import base64
import json

import pytest
import torch

import evaluate
import grpo
import methods.nf4
import polylora
from engine import generate
from helpers import (
    GOLDEN_FOLDER, TOKENS, adapter_of, build_model, gap, grpo_args, logits, nf4_weight,
    sft_args, shake, shake_all, with_adapter,
)
from lora import adapter_state, add_lora, drop_lora, merge_lora
from methods.nf4 import NF4, NF4_VALUES, quantise
from model import Qwen3
from support.files import InputError


# ---- NF4 against bitsandbytes --------------------------------------------------------------------

def test_nf4_is_bitsandbytes_bit_for_bit():
    """Codes, 8-bit scales, their scales, and the weight that comes back, in both dtypes."""
    want, ours = json.loads((GOLDEN_FOLDER / "nf4.json").read_text()), NF4(nf4_weight())
    unpack = lambda text: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    assert torch.equal(ours.codes.flatten(), unpack(want["codes"]))
    assert torch.equal(ours.scales, unpack(want["scales"])) and len(ours.scales) == 625
    assert ours.outer.view(torch.float32).tolist() == [*want["outer"], want["mean"]]
    for dtype in (torch.float32, torch.bfloat16):
        dense = ours.dense(dtype)
        assert (dense.dtype == dtype and dense.flatten()[::997].tolist()
                == want["dense"][str(dtype)[6:]])


def test_the_nf4_values_are_quantiles_of_a_normal_distribution():
    """QLoRA, appendix E: 7 quantiles below zero, 8 above, and zero itself; the table agrees to
    four digits."""
    positive, negative = (torch.special.ndtri(torch.linspace(0.9677083, 0.5, n,
                                                             dtype=torch.float64)[:-1])
                          for n in (9, 8))
    values = torch.cat((-negative, torch.zeros(1), positive)).sort().values / positive.max()
    assert gap(values, NF4_VALUES) < 1e-4


@pytest.mark.peers
def test_live_nf4_against_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(256, 768, generator=torch.Generator().manual_seed(1)).to(dtype) * 0.02
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4",
                                                compress_statistics=True)
        ours = NF4(weight)
        assert torch.equal(ours.codes.flatten(), codes.flatten())
        # its CPU code is not always at the nearest of the 256 values; ours is
        assert (ours.scales != state.absmax).float().mean() < 0.01
        assert gap(ours.dense(),
                   functional.dequantize_4bit(codes,
                                              state).float()) < 0.01 * float(weight.abs().max())


# ---- LoRA over NF4 -------------------------------------------------------------------------------

def four_bits():
    """A model in NF4, and one with the same weights in full."""
    model = quantise(build_model())
    full = build_model()
    for name, layer in model.named_modules():
        if isinstance(layer, NF4):
            full.get_submodule(name).weight.data = layer.dense()
    assert sum(isinstance(m, NF4) for m in model.modules()) == 14
    return model, full


def test_an_nf4_base_is_its_dense_weights_and_so_are_lora_s_gradients():
    """The backward pass makes the weight dense again: another one, or none, and the gradient is
    wrong. LoRA that is fp32 over it gets all of the gradient, and generation says the same."""
    grads = []
    for model in four_bits():
        shake(add_lora(model, 4, 8, seed=1, targets=("q_proj", "v_proj", "down_proj")))
        model(TOKENS).log_softmax(-1)[0, :, 3].sum().backward()
        grads.append((logits(model), generate(model, TOKENS.tolist(), k=3, max_new_tokens=5),
                      *(p.grad for p in adapter_state(model).values())))
    (a, completions, *ours), (b, others, *wants) = grads
    assert (gap(a, b) < 1e-5 and gap(a, logits(build_model())) > 0.01
            and completions.tokens == others.tokens)
    assert (all(gap(x, y) < 1e-5 for x, y in zip(ours, wants, strict=True))
            and max(w.abs().max() for w in wants) > 0.1)


def test_no_dense_weight_is_kept_for_the_backward_pass():
    model, kept = shake(add_lora(quantise(build_model(hidden_size=128, intermediate_size=256)), 2,
                                 4)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1],
                                                  lambda t: t):
        model.hidden(TOKENS).sum().backward()
    # the smallest weight is k's, (16, 128) x 2 heads
    assert kept and max(kept) < 128 * 64


def test_an_nf4_model_is_loaded_layer_by_layer_moved_and_not_saved(tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    model = Qwen3.from_pretrained(tmp_path / "model", nf4=True)
    assert torch.equal(logits(model), logits(quantise(build_model())))
    layer = model.model.layers[0].mlp.up_proj
    before = layer.dense(torch.bfloat16)
    assert torch.equal(model.bfloat16().model.layers[0].mlp.up_proj.dense(torch.bfloat16), before)
    assert layer.codes.numel() == 24 * 32 // 2 and not list(layer.parameters())
    with pytest.raises(InputError, match="NF4 cannot be saved"):
        model.save_pretrained(tmp_path / "again")
    add_lora(model, 2, 4)
    assert drop_lora(model).model.layers[0].mlp.up_proj is layer
    assert merge_lora(shake(add_lora(model, 2, 4))).model.layers[0].mlp.up_proj.weight.shape == (32,
                                                                                                 24)


def test_biases_stay_in_full_precision():
    """Alone, under LoRA and under DoRA, whose gain is not for them: q, k, v and o of NF4 are their
    dense weights and the bias that was there."""
    full = build_model(attention_bias=True)
    want = {n: p.clone() for n, p in full.named_parameters() if n.endswith("bias")}
    model = quantise(build_model(attention_bias=True))
    for name, layer in model.named_modules():
        if isinstance(layer, NF4):
            full.get_submodule(name).weight.data = layer.dense()
    got = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
    assert got.keys() == want.keys() and all(torch.equal(p, want[n]) for n, p in got.items())
    assert gap(logits(model), logits(full)) < 1e-5
    for kind in ("lora", "dora"):
        pair = [shake_all(with_adapter(kind, m)) for m in (model, full)]
        assert gap(*map(logits, pair)) < 1e-4
        drop_lora(pair[0]), drop_lora(pair[1])
    assert gap(logits(merge_lora(shake(add_lora(model, 2, 4)))),
               logits(merge_lora(shake(add_lora(full, 2, 4))))) < 1e-5


def test_zeros_and_odd_sizes_are_quantised_too():
    assert torch.equal(NF4(torch.zeros(3, 50)).dense(), torch.zeros(3, 50))
    weight = torch.randn(7, 13)
    assert (gap(NF4(weight).dense(), weight) < 0.2 * weight.abs().max()
            and NF4(weight).dense().shape == (7, 13))


@pytest.mark.slow
@pytest.mark.multirank
def test_a_study_over_a_base_in_four_bits(world, tmp_path, capsys):
    """--nf4 through SFT, GRPO, measuring and drafts: another base than in full, and adapters as
    usual."""
    run, full = str(tmp_path / "nf4"), str(tmp_path / "full")
    for out, flags in ((run, ["--nf4"]), (full, [])):
        assert polylora.main(sft_args(world, "x", "--lambda", "0.3", "--out", out, *flags)) == 0
    assert any(not torch.equal(a, b) for a, b in zip(adapter_of(run).values(),
                                                     adapter_of(full).values()))
    assert grpo.main(grpo_args(world, "x", "--start", run, "--out", str(tmp_path / "g"), "--nf4",
                               "--beta", "0.1")) == 0
    assert evaluate.main(["measure", run, "--data", world["eval"], "--n", "10",
                          "--max-new-tokens", "5", "--nf4"]) == 0
    assert evaluate.main(["drafts", run, "My kettle sings", "--max-new-tokens", "5", "--nf4"]) == 0
    capsys.readouterr()
    for flags, word in ((["--shard"], "torchrun"), (["--shard", "--nf4"], "--nf4")):
        assert polylora.main(sft_args(world, "x", "--out", str(tmp_path / "no"), *flags)) == 2
        assert word in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert polylora.main(["base", "--data", "pocket", "--out", str(tmp_path / "no"), "--nf4"]) == 2


def test_a_dense_weight_moves_at_most_four_bytes_a_weight_where_it_is_compiled(monkeypatch):
    """Codes widened to int32 and values in fp32, written and read again, were 23 bytes a weight:
    ten times the reading of the codes. One kernel reads the codes and writes the result."""
    moved = []

    def kernel(function, device):            # stands in for support.compiled.one_kernel
        def run(*args):
            out = function(*args)
            moved.append(sum(t.nbytes for t in (*args, out) if isinstance(t, torch.Tensor)))
            return out
        return run
    layer = NF4(torch.randn(256, 512))
    want = layer.dense(torch.bfloat16)
    assert layer.codes.dtype == layer.scales.dtype == torch.uint8
    monkeypatch.setattr(methods.nf4, "one_kernel", kernel)
    for grad in (False, True):
        moved.clear()
        with torch.set_grad_enabled(grad):
            layer(torch.randn(3, 512).bfloat16())
        assert len(moved) == 1 and 2.5 <= moved[0] / (256 * 512) <= 4
    assert torch.equal(layer.dense(torch.bfloat16), want)
