"""Tests of model.py."""

import itertools
import json
import math
import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import lora
import model
from helpers import (
    GROUPS, PROMPTS, QWEN3_GOLDEN, STOP, TIED, Largest, build, close, fingerprint, gap, golden,
    load_tiny, loads_or_says_why, logits_of, next_logits, nll, peer, right_padded, sequence, shake,
    tiny_adapter, tiny_config, tiny_weights, trainable, weights_mark, written,
)
from lora import lora_layers
from methods.losses import TokenLosses
from model import (
    Config, Qwen3, RMSNorm, SelectedLogprobs, pack, rows_tensors, selected_logprobs, token_logprobs,
)
from support.files import InputError
from support.packing import plan_batches


# ---- Scoring -------------------------------------------------------------------------------------

def scored(model, groups, budget, temperature=1.0):
    """draft -> its log-probs, and the gradients of a weighted sum of all of them, in
    micro-batches of `budget`."""
    by_draft = {}
    for rows in pack(groups, budget):
        logp, _ = token_logprobs(model, rows, temperature)
        place = torch.arange(len(logp)) - first_of(rows.completion)      # in its completion
        weight = torch.cos(1.0 + rows.completion + place)
        (logp * weight).sum().backward()
        for d, value in zip(rows.completion.tolist(), logp.tolist()):
            by_draft.setdefault(d, []).append(value)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return by_draft, grads


def test_a_row_may_be_as_long_as_the_budget_and_no_longer():
    """A post of 3 ids with drafts of 4 and 6: 3 + 3 + 5 tokens in one row, since a last token is
    only predicted."""
    group = ([1, 2, 3], [[4, 5, 6, 7], [8, 9, 10, 11, 12, 13]])
    for budget, shapes in ((11, [(1, 11)]), (10, [(1, 8), (1, 6)]), (14, [(1, 11)]),
                           (16, [(1, 11)])):
        assert [tuple(rows.tokens.shape) for rows in pack([group], budget)] == shapes
    assert [tuple(rows.tokens.shape) for rows in pack([group, group], 22)] == [(2, 11)]
    assert [tuple(rows.tokens.shape) for rows in pack([group, group], 21)] == [(1, 11), (1, 11)]


def first_of(completion):
    """(N,): where in the list each token's draft begins, so that a token's weight is a matter of
    draft and place in it."""
    starts = {}
    for i, d in enumerate(completion.tolist()):
        starts.setdefault(d, i)
    return torch.tensor([starts[d] for d in completion.tolist()])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_fused_logprobs_are_plain_autograd_s(monkeypatch, chunk, temperature):
    """The gradient is worked out in the forward pass, chunk by chunk: value, entropy and
    gradient must be autograd's."""
    monkeypatch.setattr(model, "chunk_size", lambda vocab, device: chunk)
    draw = torch.Generator().manual_seed(1)
    weight, upstream = torch.randn(29, 12, generator=draw), torch.randn(10, generator=draw)
    target, results = torch.randint(29, (10,), generator=draw), []
    start = torch.randn(10, 12, generator=draw)
    for score in (SelectedLogprobs.apply, selected_logprobs):
        hidden = start.clone().requires_grad_()
        logp, entropy = score(hidden, weight, target, temperature)
        (logp * upstream).sum().backward()
        assert logp.dtype == torch.float32 and not entropy.requires_grad
        assert torch.equal(hidden.detach(), start)
        results.append(dict(logp=logp.detach(), entropy=entropy, grad=hidden.grad))
    close(*results, tolerance=3e-6)
    p = (start @ weight.t() / temperature).softmax(-1)
    close(dict(h=results[0]["entropy"]), dict(h=-(p * p.log()).sum(-1)), tolerance=3e-6)


def test_no_tensor_of_tokens_by_vocabulary_is_ever_alive(monkeypatch):
    """At 150,000 ids that tensor is the memory bill: neither kept for the backward pass nor made in
    passing."""
    monkeypatch.setattr(model, "chunk_size", lambda vocab, device: 16)
    weight, target, n, v = torch.randn(3000, 8), torch.arange(64), 64, 3000
    sizes = {}
    for score in (SelectedLogprobs.apply, selected_logprobs):
        hidden, saved = torch.randn(n, 8, requires_grad=True), []
        note = lambda x: (saved.append(tuple(x.shape)), x)[1]
        with saved_tensors_hooks(note, lambda x: x), Largest() as watch:
            logp, _ = score(hidden, weight, target, 1.0)
            logp.sum().backward()
        sizes[score] = set(saved), watch.numel
    assert sizes[SelectedLogprobs.apply] == ({(n, 8)}, max(16 * v, v * 8))
    # What the watch would see
    assert (n, v) in sizes[selected_logprobs][0] and sizes[selected_logprobs][1] >= n * v


def test_scoring_a_batch_keeps_nothing_of_the_size_of_the_vocabulary():
    """The same through the whole model: in the loss, logits exist for reply tokens alone, and
    only in passing."""
    model, saved = build(vocab_size=3000).requires_grad_(True), []
    model.model.embed_tokens.requires_grad_(False)
    rows, = pack([(p, [[7, 8, 9], [10, 11]]) for p in PROMPTS[:6]], 1000)
    with saved_tensors_hooks(lambda x: (saved.append(tuple(x.shape)), x)[1], lambda x: x):
        token_logprobs(model, rows)[0].sum().backward()
    assert (30, 24) in saved and not any(shape[-1] == 3000 for shape in saved if shape)


@pytest.mark.parametrize("budget", [1, 17, 30, 10_000])
def test_a_shared_row_equals_k_separate_rows(budget):
    """A post and its k drafts in one row: the post's gradient comes from all drafts and no draft
    sees another, so values and gradients are those of k rows, however the rows are cut into
    micro-batches."""
    model = trainable()
    want = scored(model, [(p, [d]) for p, completions in GROUPS for d in completions], 10_000, 0.8)
    got = scored(model, GROUPS, budget, 0.8)
    close(got[0], want[0]), close(got[1], want[1])


def test_completions_that_attend_to_each_other_are_detected(monkeypatch):
    """The twin of the test above: plain causal attention over a shared row gives the second
    draft another score."""
    model = trainable()
    want, _ = scored(model, GROUPS, 10_000)
    monkeypatch.setattr("model.Rows.mask", lambda rows: None)
    got, _ = scored(model, GROUPS, 10_000)
    close({0: got[0]}, {0: want[0]})  # a row's first draft is right anyway
    assert abs(got[4][-1] - want[4][-1]) > 1e-2


def test_scoring_equals_a_plain_forward_and_the_softmax_s_temperature():
    model = build(tied=False)
    for temperature in (1.0, 0.7):
        by_draft = {}
        for rows in pack(GROUPS, 40):
            with torch.no_grad():
                logp, entropy = token_logprobs(model, rows, temperature)
            for d, value, h in zip(rows.completion.tolist(), logp.tolist(), entropy.tolist()):
                by_draft.setdefault(d, []).append((value, h))
        drafts = [(prompt, completion) for prompt, group in GROUPS for completion in group]
        for d, (prompt, completion) in enumerate(drafts):
            truth = (next_logits(model, prompt, completion) / temperature).log_softmax(-1)
            values, entropies = map(torch.tensor, zip(*by_draft[d]))
            close(dict(p=values, h=entropies),
                  dict(p=truth[torch.arange(len(completion)), torch.tensor(completion)],
                       h=-(truth.exp() * truth).sum(-1)))


def test_the_shift_on_five_tokens():
    """Token t is predicted by the state at t - 1, the reply's first by the prompt's last: the usual
    off-by-one."""
    model, tokens = build(), [4, 9, 2, 7, 30]
    rows, = pack([(tokens[:2], [tokens[2:]])], 100)
    with torch.no_grad():
        logp, _ = token_logprobs(model, rows)
        table = model(torch.tensor([tokens]))[0].log_softmax(-1)
    assert rows.tokens.tolist() == [tokens[:4]] and rows.target.tolist() == tokens[2:]
    want = torch.stack([table[1, 2], table[2, 7], table[3, 30]])
    assert float((logp - want).abs().max()) < 1e-5
    # Unshifted
    assert float((logp - torch.stack([table[2, 2], table[3, 7], table[4, 30]])).abs().min()) > 1e-2


def test_activation_checkpointing_changes_no_gradient():
    """Recomputing blocks saves memory and nothing else; with a frozen embedding the reentrant
    form loses the gradient."""
    model, calls = trainable(), []
    model.model.embed_tokens.requires_grad_(False)
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = scored(model, GROUPS, 30)
    once, model.checkpointing = len(calls), True
    again = scored(model, GROUPS, 30)
    # every block was recomputed
    assert len(calls) == 3 * once and len(plain[1]) > 20
    close(again[0], plain[0]), close(again[1], plain[1], 1e-6)
    with torch.no_grad():
        calls.clear()
        token_logprobs(model, pack(GROUPS, 10_000)[0])
    assert len(calls) == 2  # nothing to recompute without a gradient


def test_scoring_leaves_its_inputs_alone():
    """A mask or a shift written through a view of the ids corrupts the next pass over them."""
    model, (rows,) = trainable(), pack(GROUPS, 10_000)
    before = {n: x.clone() for n, x in vars(rows).items() if torch.is_tensor(x)}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    token_logprobs(model, rows, 0.7)[0].sum().backward()
    assert all(torch.equal(getattr(rows, n), x) for n, x in before.items())
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


# ---- Any loss of a token's logits, chunk by chunk ------------------------------------------------

def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_bf16_gradients_hold_where_the_model_is_confident():
    """W[target] - p W, each rounded to bf16, cancels at p near 1: an error of 0.14 at p = .98,
    1.0 above .999, where plain autograd has 0.03."""
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 64, generator=draws)
    target = torch.arange(48)
    for sharpness in (0.16, 0.2, 0.25):
        hidden = (sharpness * weight[target]).bfloat16()
        grads = {}
        for name, kind in (("truth", torch.float64), ("plain", torch.bfloat16),
                           ("ours", torch.bfloat16)):
            h = hidden.to(kind, copy=True).requires_grad_()                    # a leaf of its own
            if name == "truth":
                logp = (h @ weight.bfloat16().double().t()).log_softmax(-1).gather(1,
                                                                                   target[:, None])
            elif name == "plain":
                logp, _ = selected_logprobs(h, weight.bfloat16(), target)
            else:
                logp, _ = SelectedLogprobs.apply(h, weight.bfloat16(), target, 1.0)
            logp.sum().backward()
            grads[name] = h.grad
        p = float(logp.exp().mean())
        assert 0.9 < p < 0.999999
        ours, plain = (relative(grads[n], grads["truth"]) for n in ("ours", "plain"))
        assert ours < max(0.05, 1.5 * plain), (p, ours, plain)


def test_a_second_derivative_is_refused():
    """The gradient is worked out in the forward pass: to differentiate it again is silently
    wrong."""
    h = torch.randn(3, 8, requires_grad=True)
    for loss in (SelectedLogprobs.apply(h, torch.randn(9, 8), torch.tensor([1, 2, 3]), 1.0)[0],
                 TokenLosses.apply(nll, h, torch.randn(9, 8), torch.tensor([1, 2, 3]), 1.0,
                                   [slice(3)])):
        grad, = torch.autograd.grad(loss.pow(2).sum(), h, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.sum().backward()


# ---- Hostile files -------------------------------------------------------------------------------

ODD = [None, True, False, -1, 0, 1.5, 1e30, 10 ** 9, 10 ** 30, float("nan"), "x", "", [], [1], {},
       {"a": 1},
       "1e+30", "float8", [[[[]]]]]


@pytest.mark.slow
def test_mutated_configurations_give_one_sentence_errors(tmp_path):
    """Wrong types, negative and gigantic sizes: 10^9 layers were built until time ran out."""
    config, rng, refused = written(tmp_path), random.Random(0), 0
    for number in range(100):
        mutant = dict(config)
        for key in rng.sample(sorted(mutant), rng.choice((1, 1, 2))):
            mutant[key] = rng.choice(ODD)
        if rng.random() < 0.1:
            mutant.pop(rng.choice(sorted(mutant)))
        (tmp_path / "config.json").write_text(json.dumps(mutant))
        refused += loads_or_says_why(tmp_path) is not None
    assert refused > 40
    for text in ("[" * 50_000, "[]", "3", '{"hidden_size": ' + "9" * 5000 + "}", ""):
        (tmp_path / "config.json").write_text(text)
        assert loads_or_says_why(tmp_path)


# ---- Logits --------------------------------------------------------------------------------------

@TIED
def test_the_tiny_weights_are_those_of_the_golden_files(tied):
    config, want = tiny_config(tied), golden(tied)
    assert weights_mark(tiny_weights(config, want["seed"])) == pytest.approx(want["weights"],
                                                                             abs=1e-4)
    adapter = tiny_adapter(config, want["adapter"]["rank"], want["adapter"]["seed"])
    assert weights_mark(adapter) == pytest.approx(want["adapter"]["weights"], abs=1e-4)


@TIED
@pytest.mark.parametrize("shards", [1, 3])
def test_logits(tmp_path, tied, shards):
    model = load_tiny(tmp_path, tied, shards=shards)
    for want in golden(tied)["logits"]:  # 9 tokens, and 160 for the rotary angles
        got = logits_of(model, want["tokens"])
        assert gap(got[-2:], want["last_two"]) < 1e-4
        # a sum over 137 logits
        assert gap(fingerprint(got), want["fingerprints"]) < 1e-3


@TIED
def test_logits_with_attention_bias(tmp_path, tied):
    """q, k, v and o have a bias, as in transformers, and a missing one is an error."""
    model = load_tiny(tmp_path / "a", tied, attention_bias=True)
    want = QWEN3_GOLDEN["bias"]["logits"]["tied" if tied else "untied"]
    got = logits_of(model, want["tokens"])
    assert gap(got[-2:], want["last_two"]) < 1e-4
    assert gap(fingerprint(got), want["fingerprints"]) < 1e-3
    without = logits_of(load_tiny(tmp_path / "b", tied), want["tokens"])
    assert gap(got, without) > 0.1
    model.save_pretrained(tmp_path / "c")
    again = Qwen3.from_pretrained(tmp_path / "c")
    assert again.config == model.config and again.config.attention_bias
    assert torch.equal(logits_of(again, want["tokens"]), got)
    for names in itertools.product((0, 2), "qkvo"):
        key = "model.layers.{}.self_attn.{}_proj.bias".format(*names)
        with pytest.raises(InputError, match=f"lacks tensor '{re.escape(key)}'"):
            load_tiny(tmp_path / "d", tied, attention_bias=True,
                      change=lambda config, weights: weights.pop(key))


def test_logits_of_a_right_padded_batch(tmp_path):
    model, wants = load_tiny(tmp_path, False), golden(False)["logits"]
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
    weights.update({n: torch.ones_like(w) for n, w in weights.items() if "q_norm" in n
                    or "k_norm" in n})


def head_from_embedding(config, weights):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


@pytest.mark.parametrize("broken", [interleaved_rotary, tiled_key_heads, other_theta,
                                    no_norm_per_head,
                                    head_from_embedding], ids=lambda f: f.__name__)
def test_a_broken_variant_is_detected(tmp_path, broken):
    model, want = load_tiny(tmp_path, False, change=broken), golden(False)["logits"][1]
    # 1000 times the tolerance
    assert gap(logits_of(model, want["tokens"])[-2:], want["last_two"]) > 0.1


# ---- Generation and log-probabilities ------------------------------------------------------------

@TIED
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_a_given_continuation(tmp_path, tied, temperature):
    want = golden(tied)["logprobs"]
    prompt, continuation = want["prompt"], want["continuation"]
    logits = logits_of(load_tiny(tmp_path, tied), prompt + continuation)
    at = torch.tensor(continuation)[:, None]

    def score(shift):
        logp = (logits[len(prompt) - shift:][:len(continuation)] / temperature).log_softmax(-1)
        return logp.gather(-1, at[:len(logp)]).squeeze(-1)
    assert gap(score(1), want["at"][str(temperature)]) < 1e-4
    # unshifted: off by one
    assert gap(score(0), want["at"][str(temperature)]) > 0.1


# ---- Configuration and files ---------------------------------------------------------------------

# No value here is a default of ours: a reader that misses the key cannot be right by luck.
ODD_CONFIG = dict(rope_theta=500000.0, rms_norm_eps=1e-5, head_dim=24)


def in_new_layout(config):
    """config.json as transformers 5 writes it."""
    new = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling",
                                                        "torch_dtype")}
    return new | {"rope_parameters": {"rope_theta": config["rope_theta"], "rope_type": "default"},
                  "dtype": config["torch_dtype"]}


@TIED
def test_config_of_both_layouts(tied):
    old = tiny_config(tied, **ODD_CONFIG, torch_dtype="bfloat16")
    for layout in (old, in_new_layout(old)):
        c = Config.from_dict(layout)
        assert (c.rope_theta, c.rms_norm_eps, c.head_dim, c.dtype) == (500000, 1e-5, 24, "bfloat16")
        assert (c.num_key_value_heads, c.tie_word_embeddings, c.intermediate_size) == (2, tied, 80)
        again = Config.from_dict(c.to_dict())
        assert (again.rope_theta, again.head_dim, again.dtype) == (c.rope_theta, c.head_dim,
                                                                   c.dtype)


@pytest.mark.parametrize("change, word", [
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
    ({"model_type": "llama"}, "llama"), ({"attention_bias": 1}, "attention_bias"),
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
    model = load_tiny(tmp_path, False, head_dim=24)
    assert model.state_dict()["model.layers.0.self_attn.q_proj.weight"].shape == (6 * 24, 48)
    assert logits_of(model, sequence(1, 5)).shape == (5, 137)


def test_a_tied_checkpoint_that_stores_its_head(tmp_path):
    want = golden(True)["logits"][0]
    same = load_tiny(tmp_path / "same", True, change=head_from_embedding)
    assert gap(logits_of(same, want["tokens"])[-2:], want["last_two"]) < 1e-4

    def another_head(config, weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    # transformers then unties them and uses the stored head; dropping it in silence would be
    # another model.
    try:
        other = load_tiny(tmp_path / "other", True, change=another_head)
        assert gap(logits_of(other, want["tokens"])[-1].flip(0), want["last_two"][-1]) < 1e-4
    except InputError as e:
        assert "lm_head.weight" in str(e)


@pytest.mark.parametrize("head, prefix", [("lm_head", "model."), ("score", "model."), (None, "")],
                         ids=["tokens", "score", "embedder"])
@TIED
def test_a_saved_model_loads_again(tmp_path, tied, head, prefix):
    model = load_tiny(tmp_path / "a", tied, head=head, prefix=prefix)
    model.save_pretrained(tmp_path / "b")
    again = Qwen3.from_pretrained(tmp_path / "b")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    for key in ("rope_theta", "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(again.config, key) == getattr(model.config, key)


# ---- bfloat16 ------------------------------------------------------------------------------------

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


def test_attention_in_bf16_on_a_cpu_is_the_rounded_fp32_attention(monkeypatch):
    """Values and gradients, with and without a mask; the kernel gets fp32, in which its backward
    pass is two to four times faster."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, heads, 8, generator=draw).bfloat16() for heads in (4, 2, 2))
    lower = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    seen, kernel = [], F.scaled_dot_product_attention

    def noted(q, *rest, **named):
        seen.append(q.dtype)
        return kernel(q, *rest, **named)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    for mask in (None, lower):
        half, full = ([x.to(dtype).requires_grad_() for x in (q, k, v)]
                      for dtype in (torch.bfloat16, torch.float32))
        got, want = (model.full_attention(mask)(0, *inputs) for inputs in (half, full))
        assert got.dtype == torch.bfloat16 and seen[-2:] == [torch.float32] * 2
        assert torch.equal(got, want.bfloat16())
        for mine, theirs in zip(torch.autograd.grad(got.float().sum(), half),
                                torch.autograd.grad(want.sum(), full)):
            assert torch.equal(mine, theirs.bfloat16())


def test_rotary_angles_stay_exact_in_a_bf16_model(tmp_path):
    """Position 4095 after model.to(bfloat16): what reaches attention against float64. Rounded
    inverse frequencies (a buffer that .to() has cast) would turn the query by radians."""
    model, seen = load_tiny(tmp_path, False, head_dim=128).to(torch.bfloat16), {}
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


# ---- transformers itself -------------------------------------------------------------------------

@pytest.mark.peers
@pytest.mark.parametrize("change", [
    {}, {"num_key_value_heads": 6}, {"num_key_value_heads": 1}, {"head_dim": 32}, {"head_dim": 8},
    {"rms_norm_eps": 1e-2}, {"rope_theta": 10000.0}, {"num_hidden_layers": 1},
    {"num_attention_heads": 4},
    {"hidden_size": 40}, {"attention_bias": True}], ids=str)
@TIED
def test_live_logits_of_other_shapes(tmp_path, tied, change):
    model, tokens = load_tiny(tmp_path, tied, **change), sequence(3, 130)
    theirs = peer("Qwen3ForCausalLM", tmp_path)
    with torch.no_grad():
        assert gap(theirs(torch.tensor([tokens])).logits[0], logits_of(model, tokens)) < 1e-4


@pytest.mark.peers
@pytest.mark.parametrize("options", [{}, {"shard_bytes": 60_000}], ids=["one file", "shards"])
@TIED
def test_live_saved_by_us_read_by_transformers(tmp_path, tied, options):
    model = load_tiny(tmp_path / "a", tied, **ODD_CONFIG, attention_bias=bool(options))
    tokens = sequence(3, 30)
    model.save_pretrained(tmp_path / "b", **options)
    assert (tmp_path / "b/model.safetensors.index.json").exists() == bool(options)
    theirs = peer("Qwen3ForCausalLM", tmp_path / "b")
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        assert gap(theirs(torch.tensor([tokens])).logits[0], logits_of(model, tokens)) < 1e-4


@pytest.mark.peers
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "60KB"}], ids=["one file", "shards"])
@TIED
def test_live_saved_by_transformers_read_by_us(tmp_path, tied, options):
    model = load_tiny(tmp_path / "a", tied, **ODD_CONFIG, attention_bias=bool(options))
    tokens = sequence(3, 30)
    peer("Qwen3ForCausalLM", tmp_path / "a").save_pretrained(tmp_path / "b", **options)
    again = Qwen3.from_pretrained(tmp_path / "b")
    assert (again.config.rope_theta, again.config.dtype) == (500000, "float32")
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))


@pytest.mark.peers
def test_live_bf16_is_as_near_as_theirs(tmp_path):
    model, tokens = load_tiny(tmp_path, False, dtype=torch.bfloat16), sequence(3, 130)
    exact = logits_of(load_tiny(tmp_path, False), tokens)
    theirs = peer("Qwen3ForCausalLM", tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        want = theirs(torch.tensor([tokens])).logits[0].float()
    got = logits_of(model, tokens).float()
    noise = (want - exact).pow(2).mean().sqrt()
    assert (got - exact).pow(2).mean().sqrt() < 1.2 * noise
    assert (got - want).pow(2).mean().sqrt() < 1.2 * math.sqrt(2) * noise


@pytest.mark.peers
def test_live_the_golden_files_are_what_the_peers_say(tmp_path):
    load_tiny(tmp_path, False)
    theirs, want = peer("Qwen3ForCausalLM", tmp_path), golden(False)["logits"][1]
    with torch.no_grad():
        got = theirs(torch.tensor([want["tokens"]])).logits[0]
    assert gap(got[-2:], want["last_two"]) < 1e-4


def test_no_row_of_a_mask_is_empty():
    """Padding that may look at nothing gives NaN in some kernels, and zeros in others."""
    groups = [([1, 2, 3], [[4, 5], [6], [7, 8, 9, 10, 11]]), ([12], [[13, 14], [15]])]
    rows, = pack(groups, 1000)
    # the second row is padded
    assert rows.owner.shape[0] == 2 and int((rows.tokens[1] == 0).sum()) > 2
    assert bool(rows.mask().any(-1).all())


def test_modes_leave_the_weights_alone():
    """A merge at eval() and an unmerge at train() drift, and a checkpoint saved in between adds
    the update twice."""
    model = shake(lora.add_lora(build().to(torch.bfloat16), 4, 8))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for _ in range(20):
        model.train()
        model.eval()
    assert (lora_layers(model)
            and all(torch.equal(t, before[n]) for n, t in model.state_dict().items()))


# ---- Shapes on a GPU -----------------------------------------------------------------------------

def test_cudnn_s_attention_is_off():
    """It makes a plan for each new (batch, width), a second each on an H100: every step has new
    ones."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


def test_rows_may_be_a_multiple_of_64_wide_and_mean_the_same():
    """As on a GPU: the budget counts the padding, and the log-probabilities are those of rows that
    are as wide as they need."""
    groups = [([3, 1, 4], [[5, 6, 7], [8, 9]]), ([2] * 60, [[7, 1, 8, 2, 8]]), ([1], [[4]])]
    plans = plan_batches(groups, 300, unit=64)
    assert [[row.length for row in plan] for plan in plans] == [[64, 6, 1]]
    assert len(plan_batches([([2] * 65, [[1]])] * 4, 300, unit=64)) == 2  # two of 128
    model = build()
    wide, = (rows_tensors(plan, "cpu", 1, 128) for plan in plans)
    narrow, = pack(groups, 300)
    assert wide.tokens.shape == (3, 128) and narrow.tokens.shape == (3, 64)
    with torch.no_grad():
        a, b = (token_logprobs(model, rows)[0] for rows in (wide, narrow))
    assert len(a) == 11 and float((a - b).abs().max()) < 1e-5
