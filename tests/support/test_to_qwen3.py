"""Tests of support/to_qwen3.py."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import generate
from helpers import (
    GOLDEN_FOLDER, OTHERS, TIED, fingerprint, gap, logits_of, other_checkpoint, peer, sequence,
    shake,
)
from lora import add_adapter, add_lora, lora_layers
from model import Qwen3, rms_norm
from support.checks import check_targets
from support.files import InputError, command, read_json
from support.to_qwen3 import SMALLEST_EPSILON, convert, parser, scales_of

GOLDEN = json.loads((GOLDEN_FOLDER / "to_qwen3.json").read_text())["cases"]
CLASS = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


# ---- Equal logits --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", OTHERS)
def test_logits_and_greedy_text_are_the_other_architecture_s(tmp_path, name):
    kind, tied, changes = OTHERS[name]
    want = GOLDEN[name]
    convert(other_checkpoint(tmp_path / "a", kind, tied, **changes), tmp_path / "b")
    model = Qwen3.from_pretrained(tmp_path / "b")
    got = logits_of(model, want["logits"]["tokens"])
    assert gap(got[-2:], want["logits"]["last_two"]) < 1e-4
    assert gap(fingerprint(got), want["logits"]["fingerprints"]) < 1e-3
    samples = generate(model, want["greedy"]["prompts"], k=1, max_new_tokens=12, temperature=0)
    assert [drafts[0] for drafts in samples.tokens] == want["greedy"]["continuations"]
    weights = load_file(tmp_path / "b" / "model.safetensors")
    biases = {bool(t.any()) for n, t in weights.items() if n.endswith("o_proj.bias")}
    assert biases == {"qwen2": {False}, "llama": set(), "llama with biases": {True}}[name]


@pytest.mark.peers
@pytest.mark.parametrize("kind, changes", [
    ("qwen2", {}), ("llama", {}), ("llama", {"attention_bias": True}),
    ("qwen2", {"num_key_value_heads": 6, "hidden_size": 96})], ids=str)
@TIED
def test_live_logits_and_gradients(tmp_path, kind, changes, tied):
    """The gradient too, of a matrix that is not scaled: a stream of 1e9 underflows nowhere."""
    tokens = torch.tensor([sequence(3, 130)])
    convert(other_checkpoint(tmp_path / "a", kind, tied, **changes), tmp_path / "b")
    grads = []
    for model in (peer(CLASS[kind], tmp_path / "a").requires_grad_(True),
                  Qwen3.from_pretrained(tmp_path / "b").requires_grad_(True)):
        out = model(tokens)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        logits.log_softmax(-1)[0, :, 7].mean().backward()
        name = "model.layers.1.mlp.up_proj.weight"
        grads.append((logits[0].detach(), model.get_parameter(name).grad))
    (theirs, their_grad), (ours, our_grad) = grads
    assert gap(theirs, ours) < 1e-4
    assert gap(their_grad, our_grad) < 1e-3 * float(their_grad.abs().max())


@pytest.mark.peers
@pytest.mark.parametrize("kind", CLASS)
def test_live_bf16_is_about_as_near_as_theirs(tmp_path, kind):
    """In bf16 a norm per head rounds queries and keys twice more; no weight is rounded."""
    tokens = sequence(3, 130)
    convert(other_checkpoint(tmp_path / "a", kind, True, torch.bfloat16), tmp_path / "b")

    def theirs(dtype):
        with torch.no_grad():
            return peer(CLASS[kind], tmp_path / "a", dtype=dtype)(torch.tensor([tokens])).logits[0]
    exact = theirs(torch.float32)
    ours = Qwen3.from_pretrained(tmp_path / "b")
    assert ours.dtype == torch.bfloat16
    noise = (theirs(torch.bfloat16).float() - exact).pow(2).mean().sqrt()
    assert (logits_of(ours, tokens).float() - exact).pow(2).mean().sqrt() < 1.3 * noise
    in_full = Qwen3.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert gap(logits_of(in_full, tokens), exact) < 1e-4


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_head_is_the_identity_and_s_a_power_of_two(eps, dtype):
    """Up to queries of 180 in root mean square; with an epsilon of 1e6 it is seen to be none."""
    s, root = scales_of(eps, dtype)
    assert torch.tensor(s).frexp().mantissa == 0.5 and root ** 2 >= 0.99 * SMALLEST_EPSILON
    assert scales_of(eps / 4, dtype)[0] == 2 * s                   # the smallest that will do
    rounding = {torch.float32: 1e-6, torch.bfloat16: 0.01}[dtype]
    assert root ** 2 / s ** 2 == pytest.approx(eps, rel=rounding)
    q = 180 * torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    got = rms_norm(q, torch.full((64,), root), root ** 2)
    assert float(((got - q) / q).abs().max()) < 5e-7
    worse = rms_norm(q, torch.full((64,), 1e3), 1e6)
    assert float(((worse - q) / q).abs().max()) > 1e-3


def test_lora_on_what_writes_to_the_stream_wants_alpha_times_the_scale(tmp_path):
    """As the last line printed says: o_proj and down_proj with alpha s move as in the original, and
    with alpha not at all; the others as ever."""
    tokens = sequence(3, 30)
    source = other_checkpoint(tmp_path / "a", "llama", False)
    s = convert(source, tmp_path / "b")[-1]
    model = shake(add_lora(Qwen3.from_pretrained(tmp_path / "b"), 4, 8))
    weights = {}
    for file in source.glob("*.safetensors"):
        weights |= load_file(file)
    (tmp_path / "a" / "model.safetensors.index.json").unlink()
    for name, layer in lora_layers(model).items():
        A, B = layer.factors()
        weights[f"{name}.weight"] += 2 * (B @ A).detach()
    save_file(weights, tmp_path / "a" / "model.safetensors")
    convert(source, tmp_path / "c")
    want = logits_of(Qwen3.from_pretrained(tmp_path / "c"), tokens)
    assert gap(logits_of(model, tokens), want) > 0.1
    for name, layer in lora_layers(model).items():
        if name.endswith(("o_proj", "down_proj")):
            layer.set_alpha(8 * s)
    assert gap(logits_of(model, tokens), want) < 1e-4


def test_an_adapter_on_what_hardly_moves_is_warned_of():
    said = []
    for targets, extra in (("q_proj,o_proj,down_proj", {"residual_scale": 2.0 ** 28}),
                           ("q_proj,v_proj", {"residual_scale": 2.0 ** 28}), ("o_proj", {})):
        check_targets(SimpleNamespace(
            args=SimpleNamespace(targets=targets), say=said.append,
            model=SimpleNamespace(config=SimpleNamespace(extra=extra))))
    assert len(said) == 1 and said[0].startswith("warning: o_proj and down_proj of this checkpoint")


def test_all_weights_are_not_trained_together(tmp_path):
    """A step of 1e-5 would be thousands of times the last norm's weight."""
    convert(other_checkpoint(tmp_path / "a", "llama", True), tmp_path / "b")
    model = Qwen3.from_pretrained(tmp_path / "b")
    assert float(model.model.norm.weight.abs().max()) < 1e-8
    with pytest.raises(InputError, match="residual_scale"):
        add_adapter(model, "full", 4, 8)


# ---- Files ---------------------------------------------------------------------------------------

def test_the_command_writes_a_folder_with_tokenizer_and_template(tmp_path, capsys):
    source = other_checkpoint(tmp_path / "a", "qwen2", True, bos_token_id=None)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_text(f"{name} as it was")
    assert command(parser(), [str(source), str(tmp_path / "b")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    config = read_json(tmp_path / "b" / "config.json")
    assert config["residual_scale"] == 2 ** 28 and "268435456 (2^28) times" in last
    assert "o_proj and down_proj" in last and "--targets q_proj,k_proj,v_proj" in last
    assert (config["model_type"], config["attention_bias"], config["rope_theta"],
            config["torch_dtype"]) == ("qwen3", True, 10000.0, "float32")
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
             "chat_template.jinja", "generation_config.json"}
    assert {p.name for p in (tmp_path / "b").iterdir()} == names
    for name in names - {"config.json", "model.safetensors"}:
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes()
    model = Qwen3.from_pretrained(tmp_path / "b")
    model.save_pretrained(tmp_path / "c")                # and kept when it is saved again
    assert read_json(tmp_path / "c" / "config.json")["residual_scale"] == 2 ** 28
    assert command(parser(), [str(source), str(tmp_path / "b")]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("stored, flag, want", [
    (torch.bfloat16, None, "bfloat16"), (torch.float16, None, "float32"),
    (torch.float32, "bfloat16", "bfloat16"), (torch.bfloat16, "float32", "float32")], ids=str)
def test_dtypes(tmp_path, stored, flag, want):
    source = other_checkpoint(tmp_path / "a", "llama", True, stored)
    flags = ["--dtype", flag] if flag else []
    assert command(parser(), [str(source), str(tmp_path / "b"), *flags]) == 0
    model = Qwen3.from_pretrained(tmp_path / "b")
    assert str(model.dtype) == f"torch.{want}" == f"torch.{model.config.dtype}"
    assert logits_of(model, [7, 8, 9]).isfinite().all()
    root = model.model.layers[0].self_attn.k_norm.weight.double()
    assert bool((root ** 2 == model.config.rms_norm_eps).all())    # exactly, as it is stored


def test_fields_that_are_left_out_mean_what_transformers_takes(tmp_path):
    source = other_checkpoint(tmp_path / "a", "llama", True, head_dim=8)
    convert(source, tmp_path / "b")
    config = read_json(source / "config.json")
    for key in ("head_dim", "rope_theta", "rope_scaling", "attention_bias", "torch_dtype"):
        config.pop(key)                                  # 48 / 6 is 8
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    for rope in (config["rope_parameters"], None):
        (source / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
        out = tmp_path / f"rope {rope is None}"
        convert(source, out)
        assert read_json(out / "config.json") == read_json(tmp_path / "b" / "config.json")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("change, word", [
    ({"model_type": "mistral"}, "'mistral'"), ({"model_type": "qwen3"}, "'qwen3'"),
    ({"rope_scaling": LLAMA3}, "llama3"), ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    ({"mlp_bias": True}, "mlp_bias"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"use_sliding_window": True}, "use_sliding_window"), ({"layer_types": 3}, "layer_types"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary"), ({"hidden_size": None}, "hidden_size"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"head_dim": 24}, "shape"),
    ({"num_hidden_layers": 10 ** 6}, "num_hidden_layers"), ({"num_hidden_layers": 2}, "unknown"),
    ({"attention_bias": True}, "lacks tensor 'model.layers.0.self_attn.k_proj.bias'"),
    ({"attention_bias": "x"}, "attention_bias"), ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"tie_word_embeddings": False}, "lacks tensor 'lm_head.weight'")], ids=str)
def test_what_has_no_counterpart_is_refused_in_a_sentence(tmp_path, capsys, change, word):
    source = other_checkpoint(tmp_path / "a", "llama", True)
    config = read_json(source / "config.json") | change
    (source / "config.json").write_text(json.dumps(config))
    assert command(parser(), [str(source), str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1 and not (tmp_path / "b").exists()


def test_a_missing_bias_is_named(tmp_path):
    source = other_checkpoint(tmp_path / "a", "qwen2", True)
    for file in source.glob("*.safetensors"):
        weights = load_file(file)
        weights.pop("model.layers.2.self_attn.v_proj.bias", None)
        save_file(weights, file)
    with pytest.raises(InputError, match="lacks tensor 'model.layers.2.self_attn.v_proj.bias'"):
        convert(source, tmp_path / "b")


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "python -m support.to_qwen3" in said and "--dtype" in said
