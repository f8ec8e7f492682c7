"""Tests of engine.py."""

import gc
import inspect
import math
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import engine
import generate as generate_module
import support.products
from engine import DecodeBatch, FusedBlocks, FusedLinear, Scheduler, generate, joined
from generate import generate_plain, sample
from helpers import (
    PROMPTS, STOPS, build, build_model, next_logits, shake_all, surprise, with_adapter,
)
from lora import Parts, adapter_state, add_lora, base, lora_layers
from support.layouts import ROWS_PER_TOKEN, Layout, evenly, first_layout, smaller
from methods.nf4 import quantise
from model import Qwen3, full_attention, pack, token_logprobs
from support.files import InputError, read_json
from support.registry import ADAPTERS


def flat(nested):
    return [x for inner in nested for x in inner]


def same(a, b):
    """Two Samples: the same ids and flags, and log-probs up to the rounding of a batch of
    another shape."""
    assert a.tokens == b.tokens and a.finished == b.finished
    a, b = flat(flat(a.logprobs)), flat(flat(b.logprobs))
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4


# ---- Generation ----------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [True, False])
def test_cached_greedy_decoding_equals_a_full_forward(tied):
    """The cache, its masks and positions, for prompts of unequal length in one batch: the
    uncached loop says the same ids."""
    model = build(tied)
    got = generate(model, PROMPTS, k=2, max_new_tokens=7, temperature=0.0)
    for prompt, completions in zip(PROMPTS, got.tokens):
        text = list(prompt)
        for _ in range(7):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        assert completions == [text[len(prompt):]] * 2
    # no constant text that is always right
    assert len({tuple(d[0]) for d in got.tokens}) == len(PROMPTS)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_tokens_of_k_completions_follow_the_softmax(temperature):
    """One prefill serves k drafts, but each draws its own first token: sampled once and copied,
    all k would be equal."""
    model, k = build(), 4000
    samples = generate(model, PROMPTS[:1], k=k, max_new_tokens=1, temperature=temperature, seed=5)
    completions = flat(samples.tokens)
    counts = torch.tensor(flat(completions)).bincount(minlength=model.vocab).double()
    logits = next_logits(model, PROMPTS[0], [0])[0].double()
    value, freedom = surprise(counts, (logits / temperature).softmax(-1))
    assert freedom > 8 and value < freedom + 5 * math.sqrt(2 * freedom)
    value, freedom = surprise(counts, (logits / (1.7 - temperature)).softmax(-1))
    assert value > freedom + 20 * math.sqrt(2 * freedom)  # the other temperature is ruled out


@pytest.fixture(scope="module")
def drafts_of_12():
    model = build()
    want = generate(model, PROMPTS, k=3, max_new_tokens=6, stop_ids=STOPS, seed=13)
    # early, late and never
    assert {len(d) for d in flat(want.tokens)} == set(range(1, 7))
    assert len(set(map(tuple, flat(want.tokens)))) > 30
    return model, want


@pytest.mark.parametrize("rows, look", [(1, 1), (3, 1), (6, 5), (9, 1), (15, 1), (24, 2), (24, 5),
                                        (99, 1)])
def test_a_completion_does_not_depend_on_its_batch(drafts_of_12, monkeypatch, rows, look):
    """A draft is a function of (seed, draft): however many rows there are, whatever place it
    takes, whenever finished rows are looked for, though places are refilled, the batch
    shrinks and the ring of the cache wraps."""
    model, want = drafts_of_12
    seen = dict(wraps=0, refills=0, shrinks=0)

    def watch(cls, name, mark):
        whole = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, *a: (mark(self), whole(self, *a))[1])
    watch(DecodeBatch, "step", lambda c: seen.update(wraps=c.steps // c.ring))
    watch(DecodeBatch, "shrink", lambda c: seen.update(shrinks=seen["shrinks"] + 1))
    watch(Scheduler, "refill", lambda d: seen.update(refills=seen["refills"] + 1))
    same(generate(model, PROMPTS, k=3, max_new_tokens=6, stop_ids=STOPS, seed=13, max_rows=rows,
                  look_every=look), want)
    places = max(1, min(12, rows // 3))
    # The first prompts take up to three pages of a place, of which only one is written at a time.
    assert seen["refills"] >= (12 / places - 2) / 2 and (seen["wraps"] >= 2 or places >= 4)
    assert seen["shrinks"] >= 1 or look > 1 or places == 1


@pytest.mark.parametrize("look", [1, 4, 16])
def test_new_prompts_finish_after_all_others_end_at_once(look):
    """Without stop ids all places fall idle together, the last posts take them: not the end yet."""
    model = build()
    got = generate(model, PROMPTS[:4], k=2, max_new_tokens=3, seed=13, max_rows=4, look_every=look)
    same(got, generate(model, PROMPTS[:4], k=2, max_new_tokens=3, seed=13))


def test_an_idle_slot_keeps_its_position(monkeypatch):
    """It goes on with the others, to positions that no draft is written at: a table of angles
    ends before, and on a GPU to read behind it ends the process."""
    model, prompts, position, whole = build(), [[p] for p in range(1, 21)], [], DecodeBatch.step
    monkeypatch.setattr(DecodeBatch, "step",
                        lambda d: (position.append(int((d.lengths + d.age).max())), whole(d))[1])
    settings = dict(max_new_tokens=6, stop_ids=STOPS, seed=0)
    same(generate(model, prompts, **settings, max_rows=8), generate(model, prompts, **settings))
    assert max(position) > len(prompts[0]) + 6


def test_a_completion_depends_on_its_seed_and_number_alone(drafts_of_12):
    """Same posts in another order, alone, or with fewer drafts: seeds tied to the place in the
    batch would show."""
    model, want = drafts_of_12

    def write(which, k):
        return generate(model, [PROMPTS[i] for i in which], k=k, max_new_tokens=6, stop_ids=STOPS,
                        seed=[(13, i) for i in which], max_rows=8)
    order = [5, 11, 0, 2, 8, 1, 10, 3, 9, 4, 7, 6]
    for which, k in ((order, 3), ([4], 3), (order[:5], 1), ([9, 2], 2)):
        got = write(which, k)
        assert got.tokens == [want.tokens[i][:k] for i in which]
        assert got.finished == [want.finished[i][:k] for i in which]
    again = generate(model, [PROMPTS[0]] * 2, k=3, max_new_tokens=6, seed=13)
    assert again.tokens[0] != again.tokens[1]  # an int seed: the post's place counts
    assert again.tokens != generate(model, [PROMPTS[0]] * 2, k=3, max_new_tokens=6, seed=9).tokens


def kept(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Log-probabilities (V,) after temperature, top-k, top-p and min-p in that order, from their
    definitions."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    if top_k:
        order = order[:top_k]
    inside, mass, whole = [], 0.0, float(p[order].sum())
    for i in order:
        if mass / whole < top_p:
            inside.append(i)
        mass += float(p[i])
    inside = [i for i in inside if p[i] >= min_p * p[inside].max()]
    out = torch.full_like(p, -math.inf)
    out[inside] = (p[inside] / p[inside].sum()).log()
    return out


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("rule", [{}, dict(temperature=0.7), dict(top_k=4), dict(top_p=0.6),
                                  dict(min_p=0.15),
                                  dict(temperature=1.4, top_k=9, top_p=0.9, min_p=0.08)], ids=str)
def test_logprobs_are_those_of_the_distribution_sampled_from(rule):
    """Scoring what was truncated under the whole softmax makes every ratio wrong; nothing
    outside the kept set is drawn."""
    model, rule = build(), {"temperature": 1.0} | rule
    got = generate(model, PROMPTS[:6], k=12, max_new_tokens=5, stop_ids=STOPS, seed=2, max_rows=30,
                   **rule)
    differs, choices = [], set()
    for prompt, completions, logprobs in zip(PROMPTS, got.tokens, got.logprobs):
        for completion, logprob in zip(completions, logprobs):
            logits = next_logits(model, prompt, completion)
            for row, token, value in zip(logits, completion, logprob, strict=True):
                truth = kept(row, **rule)
                assert truth[token] > -math.inf and abs(float(truth[token]) - value) < 1e-4
                differs.append(abs(float(row.log_softmax(-1)[token]) - value))
                choices.add(int(truth.isfinite().sum()))
    if rule != {"temperature": 1.0}:
        assert max(differs) > 0.2  # the untruncated softmax at T = 1 is not it
    if len(rule) > 1:
        assert max(choices) < model.vocab


def test_the_stop_id_is_kept_and_unfinished_completions_are_flagged(drafts_of_12):
    """The stop token is part of the draft, or its probability is never trained; a cut draft must
    be known as one."""
    _, got = drafts_of_12
    samples = zip(flat(got.tokens), flat(got.logprobs), flat(got.finished))
    for completion, logprob, finished in samples:
        assert len(completion) == len(logprob) <= 6
        assert not set(completion[:-1]) & set(STOPS) and finished == (completion[-1] in STOPS)
        assert finished or len(completion) == 6
    # A stop as the very last token
    assert {len(d) for d, f in zip(flat(got.tokens), flat(got.finished)) if f} >= {1, 6}


def test_a_stop_id_in_the_prompt_does_not_finish_the_completion():
    """Chat prompts hold <|im_end|>: only what is generated is looked at."""
    model = build()
    stops, prompt = [24], [24, 3, 24]
    got = generate(model, [prompt, [3]], k=4, max_new_tokens=6, stop_ids=stops, seed=1)
    free = generate(model, [prompt, [3]], k=4, max_new_tokens=6, seed=1)
    assert max(map(len, got.tokens[0])) == 6
    for cut, whole in zip(flat(got.tokens), flat(free.tokens)):
        assert cut == whole[:whole.index(24) + 1] if 24 in whole else cut == whole
    assert not any(flat(free.finished))  # no stop ids: nothing ever finishes


def test_one_new_token():
    """max_new_tokens=1 never reaches the decoding loop's second half: the prefill's sample is
    all there is."""
    model = build()
    one = generate(model, PROMPTS, k=3, max_new_tokens=1, stop_ids=STOPS, seed=13, max_rows=7)
    longer = generate(model, PROMPTS, k=3, max_new_tokens=6, stop_ids=STOPS, seed=13)
    assert one.tokens == [[d[:1] for d in completions] for completions in longer.tokens]
    assert one.finished == [[d[0] in STOPS for d in completions] for completions in one.tokens]
    assert {True, False} == set(flat(one.finished))


def test_temperature_zero_is_argmax_and_its_logprob_the_model_s():
    """A division by a small temperature overflows or leaves ties to chance; zero takes the
    largest logit."""
    logits = torch.tensor([[1.0, 3.0, 2.9999998, -math.inf], [5e30, 0.0, -1.0, 4e30]])
    for u in (0.0, 0.999999):
        token, logp = sample(logits, torch.full((2,), u, dtype=torch.float64), 0)
        assert token.tolist() == [1, 0]
        assert torch.equal(logp, logits.log_softmax(-1)[[0, 1], [1, 0]])
    a, b = (generate(build(), PROMPTS, k=2, max_new_tokens=5, temperature=0, seed=s)
            for s in (1, 2))
    assert a.tokens == b.tokens and all(x == y for x, y in a.tokens)


def test_ids_above_the_tokenizer_are_never_written_nor_scored():
    """Qwen3's matrix has more rows than its tokenizer has tokens: here the padding rows are by
    far the likeliest."""
    model = build(tied=False)
    model.lm_head.weight[30:] *= 12
    prompts = [p for p in PROMPTS if max(p) < 30]
    whole = generate(model, prompts, k=4, max_new_tokens=5, seed=1)
    assert max(flat(flat(whole.tokens))) >= 30
    model.vocab = 30
    for temperature in (0, 1.0):
        got = generate(model, prompts, k=4, max_new_tokens=5, temperature=temperature, seed=1)
        assert max(flat(flat(got.tokens))) < 30
    rows, = pack([(prompts[0], [[t] for t in range(30)])], 1000)
    with torch.no_grad():
        logp, _ = token_logprobs(model, rows)
    # the mass of the real tokens alone is 1
    assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("wrong", [
    dict(k=0), dict(max_new_tokens=0), dict(temperature=-0.1), dict(temperature=math.nan),
    dict(top_p=0.0),
    dict(top_p=1.1), dict(top_k=-1), dict(min_p=1.0), dict(min_p=-0.1), dict(prompts=[[1], []]),
    dict(prompts=[[1, 41]])], ids=str)
def test_what_cannot_be_generated_is_refused(wrong):
    """One clear sentence, not a crash inside a kernel or a silent default."""
    with pytest.raises(InputError, match="generate: "):
        generate(build(), **dict(prompts=[[1]], max_new_tokens=2) | wrong)


def test_no_prompts_and_progress():
    model, told = build(), []
    assert generate(model, [], k=2, max_new_tokens=3).tokens == []
    generate(model, PROMPTS, k=2, max_new_tokens=3, stop_ids=STOPS, max_rows=6,
             progress=told.append)
    assert sum(told) == len(PROMPTS) and len(told) > 1


def test_generation_leaves_its_inputs_alone():
    model = build()
    prompts, seeds, logits = [list(p) for p in PROMPTS], [(1, i)
                                                          for i in range(12)], torch.randn(3, 9)
    before = logits.clone()
    generate(model, prompts, k=2, max_new_tokens=4, stop_ids=STOPS, seed=seeds, max_rows=4)
    sample(logits, torch.rand(3, dtype=torch.float64), 0.8, top_k=4, top_p=0.7, min_p=0.1)
    assert (prompts == PROMPTS and seeds == [(1, i) for i in range(12)]
            and torch.equal(logits, before))


# ---- The fast path of decoding against the plain one ---------------------------------------------

def with_lora(dtype=torch.float32, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
              nf4=False, **changes):
    """Some layers with LoRA and some without, B not zero."""
    model = build(**changes).to(dtype)
    model = add_lora(quantise(model) if nf4 else model, 4, 6, targets=targets)
    for p in adapter_state(model).values():
        torch.nn.init.normal_(p, 0, 0.3)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_fused_products_equal_the_separate_layers(dtype, tolerance, extend, bias):
    """q, k, v in one product, gate and up in one, LoRA beside or A behind the weights: what is
    decoded is what is trained. A block-diagonal B laid wrong gives q's update to v."""
    model, tokens = with_lora(dtype, attention_bias=bias), torch.randint(0, 41, (3, 9))
    for on in (True, False):
        for layer in lora_layers(model).values():
            layer.enabled = on
        with torch.no_grad():
            want = model.hidden(tokens)
            fused = FusedBlocks(model, 16, extend)
            x = fused(model.model.embed_tokens(tokens), torch.arange(9)[None], full_attention())
            got = model.model.norm(x)
        assert (got - want).abs().max() < tolerance
        assert any(p.tensors for block in fused.blocks for p in block.products()) == (on or bias)
        if on:
            adapted = want
    assert (want - adapted).abs().max() > 10 * tolerance  # the adapter does matter


@pytest.mark.parametrize("kind", ADAPTERS)
def test_biases_beside_an_adapter_behind_the_weights(kind):
    """The rows of A get no bias, and a gain is for W and B A alone. After training the kept tensors
    are replaced by new ones: a bias of --adapter full is among them."""
    model = shake_all(with_adapter(kind, build(attention_bias=True)))
    attention, x = model.model.layers[0].self_attn, torch.randn(3, 2, 24)
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)

    def both():
        product = FusedLinear(layers, torch.float32, extend=True)
        with torch.no_grad():
            want = torch.cat([layer(x) for layer in layers], -1)
            assert (product(x) - want).abs().max() < 1e-5
        return product, want
    old, before = both()
    shake_all(model, seed=2)
    new, after = both()
    assert (after - before).abs().max() > 0.1 and old.key() == new.key()
    for kept, fresh in zip(old.tensors, new.tensors):
        kept.copy_(fresh)
    assert torch.equal(old(x), new(x))
    with base(model):
        both()


def test_fused_weights_are_stored_once_and_shared_with_the_model(tmp_path):
    """The layers' weights become views of one tensor: the same values, trainable, saved as ever."""
    model = build()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    generate(model, PROMPTS[:2], max_new_tokens=2)
    monkey = FusedBlocks(model, 16)
    a = model.model.layers[0].self_attn
    whole = monkey.blocks[0].qkv.weight
    assert (
        a.k_proj.weight.untyped_storage().data_ptr()
        == whole.untyped_storage().data_ptr()
        == a.q_proj.weight.data_ptr()
    )
    assert torch.equal(whole,
                       torch.cat([before[f"model.layers.0.self_attn.{n}_proj.weight"]
                                  for n in "qkv"]))
    again = FusedBlocks(model, 16).blocks[0].qkv.weight
    assert again.data_ptr() == whole.data_ptr()  # joined once
    with torch.no_grad():
        a.k_proj.weight.mul_(2)
    assert torch.equal(whole[32:48], 2 * before["model.layers.0.self_attn.k_proj.weight"])
    model.save_pretrained(tmp_path, shard_bytes=3000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 10
    kept = Qwen3.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(t, kept[n]) for n, t in model.state_dict().items())
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert (index["metadata"]["total_size"] == sum(t.nbytes for t in kept.values())
            and index["weight_map"].keys() == kept.keys())
    model.double()  # moved: the views are apart again, and are joined anew
    whole = FusedBlocks(model, 16).blocks[0].qkv.weight
    assert (whole.dtype == torch.float64
            and torch.equal(whole[32:48].float(),
                            2 * before["model.layers.0.self_attn.k_proj.weight"]))
    model.requires_grad_(True)
    model(torch.tensor([PROMPTS[0]])).sum().backward()
    assert a.k_proj.weight.grad.shape == (16, 24)


def test_rows_for_an_adapter_behind_the_weights_are_nobody_else_s():
    """In a checkpoint's storage the next layer's weight lies there: written over, the model would
    be spoilt without a word."""
    file = torch.arange(60.0).view(10, 6)    # three weights, one behind the other
    first, second, third = (torch.nn.Parameter(t) for t in (file[:4], file[4:7], file[7:]))
    joined([first, second], spare=2)[-2:] = -1
    assert torch.equal(third, file[7:]) and torch.equal(file, torch.arange(60.0).view(10, 6))
    whole = joined([first, second], spare=2)
    assert whole.shape == (9, 6) and torch.equal(whole[:7], file[:7])
    assert float(whole[-1, 0]) == -1         # the same memory again
    assert joined([first, second]).data_ptr() == whole.data_ptr()
    assert joined([first, second], spare=3).data_ptr() != whole.data_ptr()


class Kernels(TorchDispatchMode):
    """Counts operations that would be kernels on a GPU; what Triton joins counts as one."""
    free = ("empty", "view", "detach", "alias", "slice", "select", "unsqueeze", "squeeze", "expand",
            "transpose", "permute", "split", "chunk", "unbind", "as_strided", "unflatten", "t",
            "_unsafe_view", "flatten", "_reshape_alias", "view_as", "expand_as", "narrow",
            "split_with_sizes", "new_empty", "empty_like")

    def __init__(self):
        super().__init__()
        self.count = 0
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.count += name not in self.free and not self.paused
        return func(*args, **kwargs or {})

    def one(self, function, device):
        """A stand-in for one_kernel."""
        def run(*args):
            self.count += 1
            self.paused = True
            try:
                return function(*args)
            finally:
                self.paused = False
        return run


def kernels_of_a_step(monkeypatch, layers):
    model = build(num_hidden_layers=layers).to(torch.bfloat16)
    model = add_lora(model, 4, 6)
    counts = []
    mode = Kernels()
    monkeypatch.setattr(engine, "one_kernel", mode.one)
    step = DecodeBatch.step

    def counted(batch):
        with mode:
            before = mode.count
            step(batch)
            counts.append(mode.count - before)
    with monkeypatch.context() as patch:
        patch.setattr(DecodeBatch, "step", counted)
        make = FusedBlocks.__init__
        patch.setattr(FusedBlocks, "__init__", lambda self, m, n: make(self, m, n, extend=True))
        generate(model, PROMPTS, k=3, max_new_tokens=6, stop_ids=STOPS, max_rows=12)
    return counts[0]


def test_a_decoded_token_of_36_layers_takes_at_most_900_kernels(monkeypatch):
    """LoRA on all layers, slots that are refilled. A kernel takes microseconds to start: 1,700 of
    them were half of a token's time."""
    two, three = (kernels_of_a_step(monkeypatch, layers) for layers in (2, 3))
    assert 15 < three - two <= 23            # more than the products and the cache alone
    assert two + 34 * (three - two) <= 900


@pytest.mark.parametrize("half", [False, True])
def test_scores_and_logits_are_not_rounded_where_the_device_can(monkeypatch, half):
    """bf16 scores and logits double the gap between sampled and scored log-probabilities. CUDA's
    products with an fp32 result stand in: of bf16 factors, they are exact in fp32."""
    dtype = torch.bfloat16 if half else torch.float32
    made = []

    def product(plain):
        def run(a, b, *, out_dtype=None, **more):
            if out_dtype is None:
                return plain(a, b, **more)
            made.append(plain.__name__)
            return plain(a.float(), b.float())
        return run
    support.products.fp32_results.cache_clear()
    before = support.products.fp32_results(torch.device("cpu"), torch.bfloat16)
    for name in ("mm", "bmm"):
        monkeypatch.setattr(torch, name, product(getattr(torch, name)))
    support.products.fp32_results.cache_clear()
    try:
        q, k = torch.randn(2, 3, 4, 8).to(dtype) * 9, torch.randn(2, 3, 5, 8).to(dtype)
        exact = q.double() @ k.double().transpose(-1, -2)
        scores = support.products.scores_of(q, k)
        assert scores.dtype == torch.float32 and float((scores - exact).abs().max()) < 1e-4
        logits = support.products.logits_of(q[0, 0], k[0, 0])
        assert float((logits - exact[0, 0]).abs().max()) < 1e-4
        made.clear()
        model = build().to(dtype)
        settings = dict(k=2, max_new_tokens=4, seed=[1, 2, 3])
        drafts = generate(model, PROMPTS[:3], **settings)
        assert {"mm", "bmm"} <= set(made) if half else not made
        scored = [token_logprobs(model, row)[0].tolist() for row in
                  pack(list(zip(PROMPTS[:3], drafts.tokens)), 60)]
        assert torch.tensor(flat(scored)).isfinite().all()
    finally:
        support.products.fp32_results.cache_clear()
    assert not before                        # a CPU has none: nothing changes there


class Tape(TorchDispatchMode):
    """A CUDA graph for the CPU: notes operations without doing them, and does them again on the
    same tensors. Numbers and shapes of Python stay as they were noted, as on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            self.undo += [(args[i], args[i].clone()) for i, a in enumerate(func._schema.arguments)
                          if a.alias_info and a.alias_info.is_write]
        out = func(*args, **kwargs or {})
        assert (
            func is not torch.ops.aten._local_scalar_dense.default
        ), "the step waits for the device"
        assert (
            func is not torch.ops.aten.lift_fresh.default
        ), "the step brings numbers from the host"
        self.notes.append((func, args, kwargs or {}, out))
        return out

    def pool(self):
        return "pool"

    def __enter__(self):
        self.notes, self.undo = [], []
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self.undo):
            tensor.copy_(before)

    def replay(self):
        now = {}
        new = lambda x: now.get(id(x), x) if isinstance(x, torch.Tensor) else x
        for func, args, kwargs, out in self.notes:
            again = func(*tree_map(new, args), **tree_map(new, kwargs))
            now |= {id(old): fresh for old, fresh in zip(tree_flatten(out)[0],
                                                         tree_flatten(again)[0])}


@pytest.mark.slow
@pytest.mark.parametrize("nf4, bias", [(False, False), (True, False), (False, True), (True, True)])
def test_a_captured_graph_equals_the_eager_step(monkeypatch, nf4, bias):
    """A CUDA graph repeats kernels at fixed addresses: a step that reads a number or a list of
    the host, or an adapter that was copied before it trained, would go on with old values.
    Over refills, smaller batches and a second rollout after training."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    whole, replays = Tape.replay, []
    monkeypatch.setattr(Tape, "replay", lambda self: (replays.append(1), whole(self)))
    eager, graphs = (with_lora(nf4=nf4, attention_bias=bias) for _ in range(2))
    graphs.load_state_dict(eager.state_dict())
    graphs.graphs = True
    generate(graphs, PROMPTS, k=3, max_new_tokens=6, stop_ids=STOPS, max_rows=9)
    first = graphs.kept_batch
    for round in range(3):
        for seed, rows in ((8, 9), (9, 9), (9, 36)):
            settings = dict(k=3, max_new_tokens=6, stop_ids=STOPS, seed=seed + round, max_rows=rows)
            same(generate(graphs, PROMPTS, **settings), generate(eager, PROMPTS, **settings))
            # joining the weights has moved them
            assert graphs.kept_batch is first or round or rows > 9
        kept = graphs.kept_batch
        for model in (eager, graphs):
            torch.manual_seed(round)
            for p in adapter_state(model).values():
                p.data += 0.1 * torch.randn_like(p)
    assert len(replays) > 40 and len(kept.captured) >= 2
    state, settings = graphs.kept_batch, dict(k=3, max_new_tokens=6, stop_ids=STOPS, max_rows=36)
    for model in (eager, graphs):
        for layer in lora_layers(model).values():
            # an adapter of another alpha
            layer.scale *= 1.5
    same(generate(graphs, PROMPTS, **settings), generate(eager, PROMPTS, **settings))
    assert graphs.kept_batch is not state
    state = graphs.kept_batch
    generate(graphs, PROMPTS, k=3, max_new_tokens=6, stop_ids=STOPS, max_rows=36)
    assert graphs.kept_batch is state                                              # taken again
    for settings in (dict(max_new_tokens=5), dict(max_rows=9), dict(max_new_tokens=6)):
        settings = dict(k=3, max_new_tokens=6, stop_ids=STOPS, max_rows=36) | settings
        same(generate(graphs, PROMPTS, **settings), generate(eager, PROMPTS, **settings))
        assert graphs.kept_batch is state                                      # large enough serves
    generate(graphs, PROMPTS, k=3, max_new_tokens=7, stop_ids=STOPS, max_rows=36)
    assert graphs.kept_batch is not state                                      # too small
    state = graphs.kept_batch
    generate(graphs, PROMPTS, k=3, max_new_tokens=7, stop_ids=(), max_rows=36)
    assert graphs.kept_batch is not state                                      # another rule


def test_a_batch_is_freed_with_its_last_completion(monkeypatch):
    """Its keys and values are the largest thing after the weights: a reference to itself would
    keep them until Python looks for cycles."""
    batches, whole = [], DecodeBatch.__init__
    monkeypatch.setattr(DecodeBatch, "__init__",
                        lambda d, *a, **k: (whole(d, *a, **k), batches.append(weakref.ref(d)))[0])
    gc.disable()
    try:
        generate(build(), PROMPTS, k=2, max_new_tokens=5, stop_ids=STOPS)
        assert [b() for b in batches] == [None]
    finally:
        gc.enable()


# ---- The plain loop against the fast engine ------------------------------------------------------

@pytest.mark.slow_after(2)
@pytest.mark.parametrize("rule", [dict(), dict(temperature=0.7), dict(top_k=5), dict(top_p=0.8),
                                  dict(min_p=0.1), dict(temperature=0)], ids=str)
def test_the_engine_equals_the_plain_loop(rule):
    """The page to read is the oracle: same streams, same drafts, token for token."""
    model = with_lora()
    settings = dict(k=3, max_new_tokens=6, stop_ids=STOPS, seed=5, **rule)
    same(generate_plain(model, PROMPTS, **settings),
         generate(model, PROMPTS, max_rows=9, **settings))


# ---- What a layer offers for decoding ------------------------------------------------------------

class Odd(torch.nn.Module):
    """A layer of somebody's own: with a gain, or not to be taken apart."""

    def __init__(self, linear, gain):
        super().__init__()
        self.weight, self.gain = linear.weight, gain

    def forward(self, x):
        y = torch.nn.functional.linear(x, self.weight)
        return y * self.gain if self.gain is not None else y.tanh()

    def decoding_parts(self, dtype):
        return None if self.gain is None else Parts(self.weight, gain=self.gain)


def test_a_layer_samples_with_the_function_it_trains():
    """What cannot be joined is called as it is; a gain is part of the product. generate.py knows no
    class of adapter."""
    for gain in (torch.linspace(0.5, 2, 16), None):
        model = with_lora()
        block = model.model.layers[0]
        block.self_attn.k_proj = Odd(block.self_attn.k_proj, gain)
        product = FusedLinear([block.self_attn.q_proj, block.self_attn.k_proj], torch.float32)
        x = torch.randn(3, 2, 24)
        with torch.no_grad():
            want = torch.cat([block.self_attn.q_proj(x), block.self_attn.k_proj(x)], -1)
            assert (product(x) - want).abs().max() < 1e-5
        assert product.whole == (gain is None)
        settings = dict(k=2, max_new_tokens=5, stop_ids=STOPS, seed=3)
        same(generate(model, PROMPTS, **settings), generate_plain(model, PROMPTS, **settings))


@pytest.mark.slow
def test_a_kept_batch_is_reused_for_all_that_fit(monkeypatch):
    """60 rollouts of 2 posts with prompts of 20 to 120 tokens built it 21 times and captured 118
    graphs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    built, captured = [], []
    whole, capture = DecodeBatch.__init__, DecodeBatch.capture
    monkeypatch.setattr(DecodeBatch, "__init__",
                        lambda b, *a, **k: (built.append(1), whole(b, *a, **k))[0])
    monkeypatch.setattr(DecodeBatch, "capture", lambda b: (captured.append(1), capture(b))[1])
    model = build()
    model.graphs, draws = True, torch.Generator().manual_seed(0)
    for rollout in range(60):
        lengths = torch.randint(20, 121, (2,), generator=draws).tolist()
        generate(model, [[1 + i % 19 for i in range(n)] for n in lengths], k=2, max_new_tokens=8,
                 stop_ids=STOPS, seed=rollout)
    assert len(built) <= 3 and len(captured) <= 12


# ---- What is computed for nothing ----------------------------------------------------------------

def rows_a_token(monkeypatch, prompts, k, look):
    """Rows computed for one token that is needed, and whether the lengths came out: the whole
    scheduler without a network, lengths of 40 +- 20 tokens (log-normal), at most 128."""
    draws = np.random.default_rng(0)
    spread = math.log(1.25)                  # the logarithm's variance
    lengths = draws.lognormal(math.log(40) - spread / 2, spread ** 0.5, (prompts, k))
    lengths = lengths.clip(1, 127).astype(int)
    rows = []
    step = DecodeBatch.step

    def noise(seeds, k, length):
        out = torch.zeros(len(seeds), k, length, dtype=torch.float64)
        for i, (_, post) in enumerate(seeds):
            for draft in range(k):
                out[i, draft, lengths[post, draft] - 1] = 1
        return out
    monkeypatch.setattr(engine, "uniforms", noise)
    monkeypatch.setattr(engine, "sample", lambda logits, uniform, **_: (
        uniform.long(), torch.zeros(len(uniform))))
    monkeypatch.setattr(DecodeBatch, "hidden", lambda batch, tokens, positions, attend: torch.zeros(
        *tokens.shape, 4))
    monkeypatch.setattr(DecodeBatch, "logits", lambda batch, hidden: torch.zeros(len(hidden), 2))
    monkeypatch.setattr(DecodeBatch, "step",
                        lambda batch: (rows.append(batch.slot.numel()), step(batch))[1])
    model = build(num_hidden_layers=1, head_dim=2)
    out = generate(model, [[1] * (60 - i % 9) for i in range(prompts)], k=k, max_new_tokens=128,
                   stop_ids=[1], look_every=look)
    assert [[len(ids) for ids in group] for group in out.tokens] == lengths.tolist()
    return sum(rows) / (lengths.sum() - prompts * k)  # first tokens come from the prefill


@pytest.mark.slow
@pytest.mark.parametrize("prompts, k, look", [(100, 20, 1), (100, 20, 16), (16, 8, 1), (16, 8, 6)])
def test_at_most_15_percent_of_rows_are_computed_for_nothing(monkeypatch, prompts, k, look):
    """Refilled when all of a prompt's completions had ended, and halved, it was 2.3 rows a token
    for the first and 1.5 for the second."""
    if look > 1:                             # as on a GPU
        monkeypatch.setitem(engine.WORTH, "cpu", engine.WORTH["cuda"])
        monkeypatch.setattr(engine, "smaller", lambda *a, fixed: smaller(*a, fixed=True))
    assert 1 <= rows_a_token(monkeypatch, prompts, k, look) <= 1.15


def test_layouts_by_hand():
    """Sizes, pages and the smaller batch of known cases."""
    assert first_layout(16, 8, 256, 30) == Layout(16, 8)
    assert first_layout(100, 20, 256, 30) == Layout(12, 20, 3)
    assert first_layout(100, 20, 256, 5000).pages == 2  # three would attend to 15,000 columns
    assert first_layout(13, 20, 256, 30) == Layout(13, 19)  # 12 places would leave one prompt over
    assert first_layout(1, 30, 20, 30) == Layout(1, 20)
    assert first_layout(5, 30, 20, 30) == Layout(1, 20, 3)
    assert list(ROWS_PER_TOKEN.values()) == sorted(ROWS_PER_TOKEN.values(), reverse=True)
    groups = evenly({0: [1] * 5, 1: [1] * 4, 2: [1] * 3, 3: [1]}, 2, False)
    assert groups == [[0, 3], [1, 2]]
    assert len(evenly({i: [1] for i in range(6)}, 2, True)) == 4
    writing = np.array([[True, False, True, True], [False, True, False, False],
                        [False, False, False, False]])
    page = np.zeros((3, 4), int)
    small = smaller(Layout(3, 4), writing, page, 8, 3, 0.75, fixed=False)
    assert small.layout == Layout(1, 4, 2)   # two prompts share a place
    assert small.slots.tolist() == [[0, 2, 3, 5]] and small.pages.tolist() == [[0, 1]]
    assert small.page.tolist() == [[0, 0, 0, 1]]
    assert smaller(Layout(3, 4), writing, page, 8, 1, 0.75, fixed=False) is None  # memory for one
    assert smaller(Layout(1, 4), writing[:1], page[:1], 8, 3, 0.7, fixed=False) is None  # 3 of 4


@pytest.mark.slow
def test_few_free_bytes_make_a_smaller_batch_of_the_same_completions(monkeypatch, capfd):
    """One post of 5,000 tokens made the cache 28 GB, and nobody had asked for the memory."""
    model = build()
    settings = dict(k=3, max_new_tokens=6, stop_ids=STOPS, seed=13)
    want = generate(model, PROMPTS, **settings)
    rows = []
    make = DecodeBatch.__init__
    monkeypatch.setattr(DecodeBatch, "__init__", lambda b, *a, **more: (
        make(b, *a, **more), rows.append((b.slot.numel(), b.own_cache.nbytes
                                          + b.prompt_cache.nbytes)))[0])
    c = model.config
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 4
    whole = 12 * token * (max(map(len, PROMPTS)) + 3 * 6)
    for free in (10 ** 9, whole, whole // 12, 1):
        monkeypatch.setattr(engine, "free_bytes", lambda device, free=free: free)
        same(generate(model, PROMPTS, **settings), want)
        said = capfd.readouterr().err
        taken = rows[-1]
        assert taken[1] <= free / 2 or taken[0] == 1  # one is the least
        assert ("completions at a time" in said) == (free < 10 ** 9)
    assert [r for r, _ in rows] == [36, 18, 1, 1]


@pytest.mark.slow
def test_graphs_have_few_sizes_and_a_batch_too_long_is_let_go(monkeypatch):
    """76 graphs were captured, 25 of them replayed fewer than 16 times; one long prompt made every
    later step attend to its columns."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    shapes = []
    capture = DecodeBatch.capture
    monkeypatch.setattr(DecodeBatch, "capture",
                        lambda b: (shapes.append((b.layout, b.width)), capture(b))[1])
    model = build()
    model.graphs = True
    settings = dict(k=6, max_new_tokens=24, stop_ids=STOPS[:1])
    for seed in range(3):
        generate(model, PROMPTS, **settings, seed=seed)
    sizes = {layout.rows for layout, _ in shapes}
    assert len(sizes) > 1 and sizes <= {1, 2, 4, *range(8, 73, 8)}
    assert {layout.places for layout, _ in shapes} <= {12, 1, 2, 4, 8}  # 12 prompts begin
    assert {width for _, width in shapes} == {64}
    short = model.kept_batch
    generate(model, [[1 + i % 19 for i in range(150)]], **settings, seed=1)
    assert model.kept_batch is not short
    long = model.kept_batch
    generate(model, [[1 + i % 19 for i in range(100)]], **settings, seed=1)
    assert model.kept_batch is long and long.width == 128  # of its 192 columns
    generate(model, PROMPTS, **settings, seed=1)
    assert model.kept_batch.prompt_length == 64


def test_the_longest_prompts_come_first_and_columns_go_with_them(monkeypatch):
    """Memory that is too small shows at once, and later steps attend to fewer columns."""
    widths = []
    step = DecodeBatch.step
    monkeypatch.setattr(DecodeBatch, "step", lambda b: (widths.append(b.width), step(b))[1])
    prompts = [[1 + i % 19 for i in range(n)] for n in (3, 30, 9, 4, 12, 3, 3, 3)]
    model = build()
    got = generate(model, prompts, k=2, max_new_tokens=6, stop_ids=STOPS, seed=4, max_rows=2)
    assert widths[0] == 30 and widths[-1] < 12 and widths == sorted(widths, reverse=True)
    same(got, generate_plain(model, prompts, k=2, max_new_tokens=6, stop_ids=STOPS, seed=4))


# ---- Numbers that are not finite -----------------------------------------------------------------

def spoiled(value=math.nan):
    """A model whose last norm holds one number that is not finite, and that number's place."""
    model = build()
    model.model.norm.weight.data[3] = value
    return model


SETTINGS = [dict(), dict(temperature=0), dict(top_p=0.9), dict(top_k=3), dict(min_p=0.1)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("write", [generate, generate_plain])
def test_logits_that_are_not_finite_stop_with_a_sentence(write, settings):
    """They were drawn from: the last id, or 0, written until the end and measured."""
    for value in (math.nan, math.inf):
        with pytest.raises(InputError, match="logits are not finite"):
            write(spoiled(value), PROMPTS[:3], k=2, max_new_tokens=4, stop_ids=STOPS,
                  **{"seed": [1, 2, 3]} | settings)


def test_a_first_token_alone_that_is_not_finite_stops():
    """One new token: the prefill's logits are the only ones."""
    with pytest.raises(InputError, match="logits are not finite"):
        generate(spoiled(), [[1, 2]], k=1, max_new_tokens=1)


def test_looking_for_numbers_that_are_not_finite_waits_for_no_device(monkeypatch):
    """The fast engine looks where it reads finished samples anyway, not at every token."""
    waits = []
    for name in ("isnan", "isfinite"):
        whole = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name,
                            lambda t, whole=whole: (waits.append(1), whole(t))[1])
        whole_function = getattr(torch, name)
        monkeypatch.setattr(torch, name,
                            lambda t, whole=whole_function: (waits.append(1), whole(t))[1])
    generate(build(), PROMPTS[:2], k=2, max_new_tokens=40, stop_ids=(), seed=1)
    assert 1 <= len(waits) <= 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_kept_batch_is_cleared_after_a_failed_rollout(value, monkeypatch):
    """A masked column weighs 0, but 0 * nan is nan: one broken adapter spoilt all later runs of
    one `measure`."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    model, settings = build(), dict(k=2, max_new_tokens=6, stop_ids=STOPS, seed=[5, 6, 7])
    model.graphs = True
    want = generate(model, PROMPTS[:3], **settings)
    weight = model.model.layers[0].self_attn.v_proj.weight
    good = weight[0, 0].item()
    weight[0, 0] = value                     # its keys and values go into the cache
    with pytest.raises(InputError, match="logits are not finite"):
        generate(model, PROMPTS[:3], **settings | {"max_new_tokens": 8, "seed": [1, 2, 3]})
    weight[0, 0] = good
    for cache in (model.kept_batch.prompt_cache, model.kept_batch.own_cache,
                  model.kept_batch.logprobs):
        cache.fill_(value)                   # every column, the masked ones too
    again = generate(model, PROMPTS[:3], **settings)
    same(again, want)


# ---- Drafts and embeddings -----------------------------------------------------------------------

def test_the_fast_engine_s_angles_are_right_far_out_in_bf16():
    """M4: positions in bf16 are whole numbers up to 256 alone."""
    model = build_model(dtype=torch.bfloat16)
    c, at = model.config, 4095
    angles = at * c.rope_theta ** -(torch.arange(0, c.head_dim, 2,
                                                 dtype=torch.float64) / c.head_dim)
    cos, sin = (table[at].flatten().double()
                for table in (FusedBlocks(model, 4096).cos, FusedBlocks(model, 4096).sin))
    half = c.head_dim // 2
    assert (float((cos[:half] - angles.cos()).abs().max()) < 0.01
            and float((sin[half:] - angles.sin()).abs().max()) < 0.01)


def test_sampling_does_not_wait_for_other_ranks():
    """Ranks finish writing at different times; a collective in that loop hangs. Only spread
    weights need one."""
    assert not {"ranks", "dist", "Ranks"} & set(vars(generate_module))
    assert ("all_reduce" not in inspect.getsource(generate_module)
            and "barrier" not in inspect.getsource(generate_module))
