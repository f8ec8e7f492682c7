"""Generation, on random Qwen3s that are built here: each test says the trap it stands at.

The rule throughout: what was sampled, what is scored and what a plain full forward says are one distribution.
Parity with other people's implementations is in test_parity.py.
"""

import gc
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from data import InputError, read_json
from generate import (Decoder, DraftBatch, Fused, Product, draw, generate, generate_plain, inverse,
                      plain_loop, sample, uniforms)
from model import Config, Parts, Qwen3, full_attention, pack, quantise, token_logprobs
from polylora import adapter_state, add_lora, lora_layers
from tiny import tiny_config, tiny_weights

PROMPTS = [[3, 9, 4], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [12, 11], [5, 5, 5, 5], [20, 1, 19, 2, 18], [8, 30],
           [14, 3, 3], [2], [10, 11, 12, 13, 14, 15], [6, 7, 8], [23, 22, 21, 20]]
STOPS = range(20, 29)                # 9 ids of 41: drafts end all over the place


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(tied=True, seed=3, **changes):
    """A random Qwen3: 41 tokens, 2 layers, 4 heads over 2, norm weights that are not 1."""
    small = dict(vocab_size=41, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                 num_attention_heads=4, head_dim=8)
    config = tiny_config(tied, **small | changes)
    model = Qwen3(Config.from_dict(config))
    model.load_state_dict(tiny_weights(config, seed))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def next_logits(model, prompt, draft):
    """(len(draft), V): the logits from which each token of the draft was to be drawn, by one plain
    forward."""
    return model(torch.tensor([prompt + draft]))[0, len(prompt) - 1:-1, :model.vocab]


def flat(nested):
    return [x for inner in nested for x in inner]


def same(a, b):
    """Two Samples: the same ids and flags, and log-probs up to the rounding of a batch of another shape."""
    assert a.tokens == b.tokens and a.finished == b.finished
    a, b = flat(flat(a.logprobs)), flat(flat(b.logprobs))
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4


# ---- Generation ----------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [True, False])
def test_cached_greedy_text_is_that_of_a_full_forward(tied):
    """The cache, its masks and positions, for prompts of unequal length in one batch: the uncached loop says
    the same ids."""
    model = build(tied)
    got = generate(model, PROMPTS, k=2, max_new_tokens=7, temperature=0.0)
    for prompt, drafts in zip(PROMPTS, got.tokens):
        text = list(prompt)
        for _ in range(7):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        assert drafts == [text[len(prompt):]] * 2
    assert len({tuple(d[0]) for d in got.tokens}) == len(PROMPTS)  # no constant text that is always right


def surprise(counts, p):
    """Chi-square of counts against a distribution, outcomes expected less than 5 times taken together."""
    expected, rare = p * counts.sum(), p * counts.sum() < 5
    pool = lambda x: torch.cat((x[~rare], x[rare].sum()[None]))
    counts, expected = pool(counts), pool(expected).clamp_min(1e-9)
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_tokens_of_k_drafts_follow_the_softmax(temperature):
    """One prefill serves k drafts, but each draws its own first token: sampled once and copied, all k would
    be equal."""
    model, k = build(), 4000
    drafts = flat(generate(model, PROMPTS[:1], k=k, max_new_tokens=1, temperature=temperature, seed=5).tokens)
    counts = torch.tensor(flat(drafts)).bincount(minlength=model.vocab).double()
    logits = next_logits(model, PROMPTS[0], [0])[0].double()
    value, freedom = surprise(counts, (logits / temperature).softmax(-1))
    assert freedom > 8 and value < freedom + 5 * math.sqrt(2 * freedom)
    value, freedom = surprise(counts, (logits / (1.7 - temperature)).softmax(-1))
    assert value > freedom + 20 * math.sqrt(2 * freedom)  # the other temperature is ruled out


@pytest.fixture(scope="module")
def drafts_of_12():
    model = build()
    want = generate(model, PROMPTS, k=3, max_new_tokens=6, stop_ids=STOPS, seed=13)
    assert {len(d) for d in flat(want.tokens)} == set(range(1, 7))             # early, late and never
    assert len(set(map(tuple, flat(want.tokens)))) > 30
    return model, want


@pytest.mark.parametrize("rows, look", [(1, 1), (3, 1), (6, 5), (9, 1), (15, 1), (24, 2), (24, 5), (99, 1)])
def test_a_draft_does_not_depend_on_the_batch_it_is_written_in(drafts_of_12, monkeypatch, rows, look):
    """A draft is a function of (seed, draft): however many rows there are, whatever place it takes, whenever
    finished rows are looked for, though places are refilled, the batch shrinks and the ring of the cache
    wraps."""
    model, want = drafts_of_12
    seen = dict(wraps=0, refills=0, shrinks=0)

    def watch(cls, name, mark):
        whole = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, *a: (mark(self), whole(self, *a))[1])
    watch(DraftBatch, "step", lambda c: seen.update(wraps=c.steps // c.ring))
    watch(DraftBatch, "shrink", lambda c: seen.update(shrinks=seen["shrinks"] + 1))
    watch(Decoder, "refill", lambda d: seen.update(refills=seen["refills"] + 1))
    same(generate(model, PROMPTS, k=3, max_new_tokens=6, stop_ids=STOPS, seed=13, max_rows=rows,
                  look_every=look), want)
    places = max(1, min(12, rows // 3))
    assert seen["refills"] >= 12 / places and (seen["wraps"] >= 2 or places > 6)
    assert seen["shrinks"] >= 1 or look > 1 or places == 1


@pytest.mark.parametrize("look", [1, 4, 16])
def test_newcomers_are_written_to_their_end_when_everybody_else_finished_at_once(look):
    """Without stop ids all places fall idle together, the last posts take them: not the end yet."""
    model = build()
    got = generate(model, PROMPTS[:4], k=2, max_new_tokens=3, seed=13, max_rows=4, look_every=look)
    same(got, generate(model, PROMPTS[:4], k=2, max_new_tokens=3, seed=13))


def test_an_idle_place_ages_on(monkeypatch):
    """It goes on with the others, to positions that no draft is written at: a table of angles ends before, and on a GPU to
    read behind it ends the process."""
    model, prompts, position, whole = build(), [[p] for p in range(1, 21)], [], DraftBatch.step
    monkeypatch.setattr(DraftBatch, "step", lambda d: (position.append(int((d.lengths + d.age).max())), whole(d))[1])
    settings = dict(max_new_tokens=6, stop_ids=STOPS, seed=0)
    same(generate(model, prompts, **settings, max_rows=8), generate(model, prompts, **settings))
    assert max(position) > len(prompts[0]) + 6


def test_a_draft_is_known_by_its_seed_and_number_alone(drafts_of_12):
    """Same posts in another order, alone, or with fewer drafts: seeds tied to the place in the batch would
    show."""
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


@pytest.mark.parametrize("rule", [{}, dict(temperature=0.7), dict(top_k=4), dict(top_p=0.6), dict(min_p=0.15),
                                  dict(temperature=1.4, top_k=9, top_p=0.9, min_p=0.08)], ids=str)
def test_logprobs_are_those_of_the_distribution_sampled_from(rule):
    """Scoring what was truncated under the whole softmax makes every ratio wrong; nothing outside the kept
    set is drawn."""
    model, rule = build(), {"temperature": 1.0} | rule
    got = generate(model, PROMPTS[:6], k=12, max_new_tokens=5, stop_ids=STOPS, seed=2, max_rows=30, **rule)
    differs, choices = [], set()
    for prompt, drafts, logprobs in zip(PROMPTS, got.tokens, got.logprobs):
        for draft, logprob in zip(drafts, logprobs):
            logits = next_logits(model, prompt, draft)
            for row, token, value in zip(logits, draft, logprob, strict=True):
                truth = kept(row, **rule)
                assert truth[token] > -math.inf and abs(float(truth[token]) - value) < 1e-4
                differs.append(abs(float(row.log_softmax(-1)[token]) - value))
                choices.add(int(truth.isfinite().sum()))
    if rule != {"temperature": 1.0}:
        assert max(differs) > 0.2  # the untruncated softmax at T = 1 is not it
    if len(rule) > 1:
        assert max(choices) < model.vocab


def test_top_p_ends_with_the_token_that_reaches_it():
    """The smallest set of at least top_p: where a token reaches it exactly, the next one is outside."""
    uniform = torch.arange(64, dtype=torch.float64) / 64
    for top_p, number in ((0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3)):
        token, logp = sample(torch.zeros(64, 4), uniform, 1.0, top_p=top_p)
        assert len(set(token.tolist())) == number
        assert torch.allclose(logp, torch.full((64,), -math.log(number)))


def test_the_stop_id_is_kept_and_flags_say_who_was_cut_off(drafts_of_12):
    """The stop token is part of the draft, or its probability is never trained; a cut draft must be known as
    one."""
    _, got = drafts_of_12
    for draft, logprob, finished in zip(flat(got.tokens), flat(got.logprobs), flat(got.finished)):
        assert len(draft) == len(logprob) <= 6
        assert not set(draft[:-1]) & set(STOPS) and finished == (draft[-1] in STOPS)
        assert finished or len(draft) == 6
    # A stop as the very last token
    assert {len(d) for d, f in zip(flat(got.tokens), flat(got.finished)) if f} >= {1, 6}


def test_a_stop_id_in_the_prompt_does_not_finish_the_draft():
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
    """max_new_tokens=1 never reaches the decoding loop's second half: the prefill's sample is all there
    is."""
    model = build()
    one = generate(model, PROMPTS, k=3, max_new_tokens=1, stop_ids=STOPS, seed=13, max_rows=7)
    longer = generate(model, PROMPTS, k=3, max_new_tokens=6, stop_ids=STOPS, seed=13)
    assert one.tokens == [[d[:1] for d in drafts] for drafts in longer.tokens]
    assert one.finished == [[d[0] in STOPS for d in drafts] for drafts in one.tokens]
    assert {True, False} == set(flat(one.finished))


def test_temperature_zero_is_argmax_and_its_logprob_the_model_s():
    """A division by a small temperature overflows or leaves ties to chance; zero takes the largest logit."""
    logits = torch.tensor([[1.0, 3.0, 2.9999998, -math.inf], [5e30, 0.0, -1.0, 4e30]])
    for u in (0.0, 0.999999):
        token, logp = sample(logits, torch.full((2,), u, dtype=torch.float64), 0)
        assert token.tolist() == [1, 0]
        assert torch.equal(logp, logits.log_softmax(-1)[[0, 1], [1, 0]])
    a, b = (generate(build(), PROMPTS, k=2, max_new_tokens=5, temperature=0, seed=s) for s in (1, 2))
    assert a.tokens == b.tokens and all(x == y for x, y in a.tokens)


def test_ids_above_the_tokenizer_are_never_written_nor_scored():
    """Qwen3's matrix has more rows than its tokenizer has tokens: here the padding rows are by far the
    likeliest."""
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
    assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-5)  # the mass of the real tokens alone is 1


def test_a_token_of_probability_zero_is_never_drawn():
    """Inverting the cumulative distribution at its very ends hits ids of no mass when done carelessly."""
    last = 1 - 2.0 ** -53  # the largest number a generator returns
    zero = -math.inf
    logits = torch.tensor([[zero, zero, 1.0, zero, 0.5, 2.0, zero],
                           [zero, -300.0, 0.0, -300.0, zero, zero, -300.0],
                           [0.0, zero, zero, zero, zero, zero, 0.0]])
    for u, want in ((0.0, [2, 2, 0]), (last, [5, 2, 6])):
        uniform = torch.full((3,), u, dtype=torch.float64)
        token, logp = sample(logits, uniform, 1.0)
        assert token.tolist() == want and logp.isfinite().all()
    rare = torch.tensor([[0.0, -25.0]])                                        # 1.4e-11, lost in fp32 sums
    assert sample(rare, torch.tensor([last], dtype=torch.float64), 1.0)[0].tolist() == [1]
    mass = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    # Careless
    assert torch.searchsorted(mass, torch.zeros(3, 1, dtype=torch.float64)).flatten().tolist() == [0, 0, 0]
    uniform = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    token, _ = sample(torch.randn(1, 500).mul(8).expand(2000, -1), uniform, 1.0, top_k=3)
    assert len(set(token.tolist())) == 3


@pytest.mark.parametrize("rows, vocab", [(5, 300), (3, 40_003), (2, 256 * 128), (700, 100), (9, 8000)])
def test_a_draw_inverts_the_cumulative_distribution(rows, vocab):
    """One random number a token, small vocabularies at once, large ones in two steps: the share of [0, 1) that draws an
    id is its probability, also at the borders of blocks and in the last, shorter one."""
    p = torch.rand(rows, vocab) ** 8 * (torch.rand(rows, vocab) < 0.1)
    p[0, : vocab // 2], p[-1, vocab // 2:] = 0, 0
    mass = p.double().cumsum(-1)
    for uniform in (torch.rand(20, rows, dtype=torch.float64), torch.tensor([[0.0], [1 - 2.0 ** -53]]).double().expand(2, rows)):
        for u in uniform:
            token, total = draw(p, u)
            assert (p.gather(1, token) > 0).all() and (total - mass[:, -1:]).abs().max() < 1e-5 * total.max()
            upper, share = mass.gather(1, token) / total, u[:, None]
            lower = upper - p.gather(1, token) / total
            assert (lower < share + 1e-6).all() and (share < upper + 1e-6).all()
    edges = mass / mass[:, -1:]                                # the middle of every id's share draws that id
    for i in p[0].nonzero()[::7].flatten().tolist():
        if p[0, i] / p[0].sum() > 1e-5:
            u = edges[:, i] - 0.5 * p[:, i] / p.sum(-1)
            assert draw(p, u)[0][0] == i


def test_rounding_at_a_border_hits_no_id_of_weight_zero():
    """In the second step what is left of the random number may be a rounding below 0 or above the block's sum."""
    mass = torch.tensor([[0.0, 0.0, 0.3, 0.3, 0.7, 0.7, 0.7]], dtype=torch.float64)
    for target, index in ((-1e-9, 2), (0.0, 2), (0.3, 4), (0.7, 4), (0.7 + 1e-9, 4)):
        assert inverse(mass, torch.tensor([[target]], dtype=torch.float64)).tolist() == [[index]]


@pytest.mark.parametrize("vocab", [100, 2 ** 16 + 128, 2 ** 16 + 130])
def test_a_model_that_gives_nan_draws_real_ids(vocab):
    """An id beyond the table would end a GPU's process; nan goes on as a nan log-prob, which the training loop refuses."""
    token, logp = sample(torch.full((2, vocab), math.nan), torch.rand(2, dtype=torch.float64), 1.0)
    assert 0 <= token.min() and token.max() < vocab and logp.isnan().all()


@pytest.mark.parametrize("wrong", [
    dict(k=0), dict(max_new_tokens=0), dict(temperature=-0.1), dict(temperature=math.nan), dict(top_p=0.0),
    dict(top_p=1.1), dict(top_k=-1), dict(min_p=1.0), dict(min_p=-0.1), dict(prompts=[[1], []]),
    dict(prompts=[[1, 41]])], ids=str)
def test_what_cannot_be_generated_is_refused(wrong):
    """One clear sentence, not a crash inside a kernel or a silent default."""
    with pytest.raises(InputError, match="generate: "):
        generate(build(), **dict(prompts=[[1]], max_new_tokens=2) | wrong)


def test_no_prompts_and_progress():
    model, told = build(), []
    assert generate(model, [], k=2, max_new_tokens=3).tokens == []
    generate(model, PROMPTS, k=2, max_new_tokens=3, stop_ids=STOPS, max_rows=6, progress=told.append)
    assert sum(told) == len(PROMPTS) and len(told) > 1


def test_generation_leaves_its_inputs_alone():
    model = build()
    prompts, seeds, logits = [list(p) for p in PROMPTS], [(1, i) for i in range(12)], torch.randn(3, 9)
    before = logits.clone()
    generate(model, prompts, k=2, max_new_tokens=4, stop_ids=STOPS, seed=seeds, max_rows=4)
    sample(logits, torch.rand(3, dtype=torch.float64), 0.8, top_k=4, top_p=0.7, min_p=0.1)
    assert prompts == PROMPTS and seeds == [(1, i) for i in range(12)] and torch.equal(logits, before)


# ---- The fast path of decoding against the plain one ---------------------------------------------

def with_lora(dtype=torch.float32, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), nf4=False, **changes):
    """Some layers with LoRA and some without, B not zero."""
    model = build(**changes).to(dtype)
    model = add_lora(quantise(model) if nf4 else model, 4, 6, targets=targets)
    for p in adapter_state(model).values():
        torch.nn.init.normal_(p, 0, 0.3)
    return model


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_joined_products_are_the_layers_one_by_one(dtype, tolerance):
    """q, k, v in one product, gate and up in one, LoRA beside: what is decoded is what is trained. A block-diagonal
    B laid wrong gives q's update to v."""
    model, tokens = with_lora(dtype), torch.randint(0, 41, (3, 9))
    for on in (True, False):
        for layer in lora_layers(model).values():
            layer.enabled = on
        with torch.no_grad():
            want = model.hidden(tokens)
            fused = Fused(model, 16)
            x = fused(model.model.embed_tokens(tokens), torch.arange(9)[None], full_attention())
            got = model.model.norm(x)
        assert (got - want).abs().max() < tolerance
        assert any(p.tensors for block in fused.blocks for p in block[4:]) == on
        if on:
            adapted = want
    assert (want - adapted).abs().max() > 10 * tolerance  # the adapter does matter


def test_joined_weights_are_stored_once_and_stay_the_model_s(tmp_path):
    """The layers' weights become views of one tensor: the same values, trainable, saved as ever."""
    model = build()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    generate(model, PROMPTS[:2], max_new_tokens=2)
    monkey = Fused(model, 16)
    a = model.model.layers[0].self_attn
    whole = monkey.blocks[0][4].weight
    assert a.k_proj.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() == a.q_proj.weight.data_ptr()
    assert torch.equal(whole, torch.cat([before[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv"]))
    again = Fused(model, 16).blocks[0][4].weight
    assert again.data_ptr() == whole.data_ptr()  # joined once
    with torch.no_grad():
        a.k_proj.weight.mul_(2)
    assert torch.equal(whole[32:48], 2 * before["model.layers.0.self_attn.k_proj.weight"])
    model.save_pretrained(tmp_path, shard_bytes=3000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 10
    kept = Qwen3.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(t, kept[n]) for n, t in model.state_dict().items())
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in kept.values()) and index["weight_map"].keys() == kept.keys()
    model.double()  # moved: the views are apart again, and are joined anew
    whole = Fused(model, 16).blocks[0][4].weight
    assert whole.dtype == torch.float64 and torch.equal(whole[32:48].float(), 2 * before["model.layers.0.self_attn.k_proj.weight"])
    model.requires_grad_(True)
    model(torch.tensor([PROMPTS[0]])).sum().backward()
    assert a.k_proj.weight.grad.shape == (16, 24)


def test_the_numbers_of_a_stream_are_splitmix64_s():
    """Another constant is another stream, with which no run could be repeated: by Python's whole numbers."""
    def mix(z):
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % 2 ** 64
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2 ** 64
        return z ^ z >> 31
    golden, seed = 0x9E3779B97F4A7C15, (-3, 11)
    start = 0
    for part in seed:
        start = mix((start + golden) % 2 ** 64 ^ part % 2 ** 64)
    want = []
    for draft in range(2):
        stream = mix((start + golden) % 2 ** 64 ^ draft)
        want.append([(mix((stream + golden * t) % 2 ** 64) >> 11) / 2 ** 53 for t in range(1, 5)])
    assert uniforms([seed], 2, 4)[0].tolist() == want


def test_streams_of_random_numbers_are_uniform_and_unrelated():
    u = uniforms([(8, p) for p in range(300)], 6, 40)
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * u.numel())
    counts = (u.flatten() * 64).long().bincount(minlength=64).double()
    assert surprise(counts, torch.full((64,), 1 / 64, dtype=torch.float64))[0] < 63 + 5 * math.sqrt(126)
    noise = 5 / math.sqrt(299)
    for table in (u[:, 0], u[:, :, 0], torch.cat((u[:-1, 0, :4], u[1:, 0, :4]), 1)):       # over time, drafts, posts
        assert (torch.corrcoef(table.T) - torch.eye(table.shape[1])).abs().max() < noise
    assert torch.equal(uniforms([5, -3], 2, 3), torch.cat((uniforms([(5,)], 4, 9)[:, :2, :3], uniforms([-3], 2, 3))))
    assert len({float(uniforms([s], 1, 1)) for s in (0, 1, 2 ** 63, -1, (0, 0), (0, 1), (1, 0))}) == 7


class Tape(TorchDispatchMode):
    """A CUDA graph for the CPU: notes operations without doing them, and does them again on the same tensors.
    Numbers and shapes of Python stay as they were noted, as on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            self.undo += [(args[i], args[i].clone()) for i, a in enumerate(func._schema.arguments)
                          if a.alias_info and a.alias_info.is_write]
        out = func(*args, **kwargs or {})
        assert func is not torch.ops.aten._local_scalar_dense.default, "the step waits for the device"
        assert func is not torch.ops.aten.lift_fresh.default, "the step brings numbers from the host"
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
            now |= {id(old): fresh for old, fresh in zip(tree_flatten(out)[0], tree_flatten(again)[0])}


@pytest.mark.parametrize("nf4", [False, True])
def test_a_graph_of_the_step_writes_what_the_step_writes(monkeypatch, nf4):
    """A CUDA graph repeats kernels at fixed addresses: a step that reads a number or a list of the host, or
    an adapter that was copied before it trained, would go on with old values. Over refills, smaller batches
    and a second rollout after training."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    whole, replays = Tape.replay, []
    monkeypatch.setattr(Tape, "replay", lambda self: (replays.append(1), whole(self)))
    eager, graphs = with_lora(nf4=nf4), with_lora(nf4=nf4)
    graphs.load_state_dict(eager.state_dict())
    graphs.graphs = True
    generate(graphs, PROMPTS, k=3, max_new_tokens=6, stop_ids=STOPS, max_rows=9)
    first = graphs.kept_batch
    for round in range(3):
        for seed, rows in ((8, 9), (9, 9), (9, 36)):
            settings = dict(k=3, max_new_tokens=6, stop_ids=STOPS, seed=seed + round, max_rows=rows)
            same(generate(graphs, PROMPTS, **settings), generate(eager, PROMPTS, **settings))
            assert graphs.kept_batch is first or round or rows > 9                 # joining the weights has moved them
        kept = graphs.kept_batch
        for model in (eager, graphs):
            torch.manual_seed(round)
            for p in adapter_state(model).values():
                p.data += 0.1 * torch.randn_like(p)
    assert len(replays) > 40 and len(kept.captured) >= 2
    state, settings = graphs.kept_batch, dict(k=3, max_new_tokens=6, stop_ids=STOPS, max_rows=36)
    for model in (eager, graphs):
        for layer in lora_layers(model).values():
            layer.scale *= 1.5                                                 # an adapter of another alpha
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


def test_a_batch_is_freed_with_its_last_draft(monkeypatch):
    """Its keys and values are the largest thing after the weights: a reference to itself would keep them until Python looks
    for cycles."""
    batches, whole = [], DraftBatch.__init__
    monkeypatch.setattr(DraftBatch, "__init__", lambda d, *a, **k: (whole(d, *a, **k), batches.append(weakref.ref(d)))[0])
    gc.disable()
    try:
        generate(build(), PROMPTS, k=2, max_new_tokens=5, stop_ids=STOPS)
        assert [b() for b in batches] == [None]
    finally:
        gc.enable()


# ---- The plain loop against the fast engine ------------------------------------------------------

@pytest.mark.parametrize("rule", [dict(), dict(temperature=0.7), dict(top_k=5), dict(top_p=0.8),
                                  dict(min_p=0.1), dict(temperature=0)], ids=str)
def test_the_plain_loop_writes_what_the_fast_engine_writes(rule):
    """The page to read is the oracle: same streams, same drafts, token for token."""
    model = with_lora()
    settings = dict(k=3, max_new_tokens=6, stop_ids=STOPS, seed=5, **rule)
    same(generate_plain(model, PROMPTS, **settings), generate(model, PROMPTS, max_rows=9, **settings))


def test_rows_of_the_plain_loop_can_go_on_from_one_another():
    """Beams: the two likeliest continuations of all rows, each with its parent's cache; against scoring
    every sequence by a full forward."""
    model, width, steps = build(), 2, 4
    scores = [torch.tensor([0.0, -math.inf])]

    def choose(logits, step):
        total = scores[-1][:, None] + logits.log_softmax(-1)
        best, place = total.flatten().topk(width)
        scores.append(best)
        return place % logits.shape[1], place // logits.shape[1]
    got = plain_loop(model, [3, 9, 4], width, steps, choose)
    beams = [([], 0.0)]
    for _ in range(steps):
        grown = []
        for ids, score in beams:
            logp = next_logits(model, [3, 9, 4], ids + [0])[-1].log_softmax(-1)
            grown += [(ids + [t], score + float(logp[t])) for t in range(model.vocab)]
        beams = sorted(grown, key=lambda b: -b[1])[:width]
    assert got == [ids for ids, _ in beams]
    assert scores[-1].tolist() == pytest.approx([score for _, score in beams], abs=1e-4)


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


def test_a_layer_drafts_with_the_function_that_it_trains():
    """What cannot be joined is called as it is; a gain is part of the product. generate.py knows no
    class of adapter."""
    for gain in (torch.linspace(0.5, 2, 16), None):
        model = with_lora()
        block = model.model.layers[0]
        block.self_attn.k_proj = Odd(block.self_attn.k_proj, gain)
        product = Product([block.self_attn.q_proj, block.self_attn.k_proj], torch.float32)
        x = torch.randn(3, 2, 24)
        with torch.no_grad():
            want = torch.cat([block.self_attn.q_proj(x), block.self_attn.k_proj(x)], -1)
            assert (product(x) - want).abs().max() < 1e-5
        assert product.whole == (gain is None)
        settings = dict(k=2, max_new_tokens=5, stop_ids=STOPS, seed=3)
        same(generate(model, PROMPTS, **settings), generate_plain(model, PROMPTS, **settings))


def test_a_kept_batch_serves_all_that_fit_in_it(monkeypatch):
    """60 rollouts of 2 posts with prompts of 20 to 120 tokens built it 21 times and captured 118
    graphs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    built, captured = [], []
    whole, capture = DraftBatch.__init__, DraftBatch.capture
    monkeypatch.setattr(DraftBatch, "__init__", lambda b, *a, **k: (built.append(1), whole(b, *a, **k))[0])
    monkeypatch.setattr(DraftBatch, "capture", lambda b: (captured.append(1), capture(b))[1])
    model = build()
    model.graphs, draws = True, torch.Generator().manual_seed(0)
    for rollout in range(60):
        lengths = torch.randint(20, 121, (2,), generator=draws).tolist()
        generate(model, [[1 + i % 19 for i in range(n)] for n in lengths], k=2, max_new_tokens=8,
                 stop_ids=STOPS, seed=rollout)
    assert len(built) <= 3 and len(captured) <= 12


# ---- Numbers that are not finite -------------------------------------------------------------------------

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
            write(spoiled(value), PROMPTS[:3], k=2, max_new_tokens=4, stop_ids=STOPS, **{"seed": [1, 2, 3]} | settings)


def test_a_first_token_alone_that_is_not_finite_stops():
    """One new token: the prefill's logits are the only ones."""
    with pytest.raises(InputError, match="logits are not finite"):
        generate(spoiled(), [[1, 2]], k=1, max_new_tokens=1)


def test_looking_for_numbers_that_are_not_finite_waits_for_no_device(monkeypatch):
    """The fast engine looks where it reads finished samples anyway, not at every token."""
    waits = []
    for name in ("isnan", "isfinite"):
        whole = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, whole=whole: (waits.append(1), whole(t))[1])
        whole_function = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda t, whole=whole_function: (waits.append(1), whole(t))[1])
    generate(build(), PROMPTS[:2], k=2, max_new_tokens=40, stop_ids=(), seed=1)
    assert 1 <= len(waits) <= 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_kept_batch_forgets_what_a_broken_rollout_wrote(value, monkeypatch):
    """A masked column weighs 0, but 0 * nan is nan: one broken adapter spoilt all later runs of one `measure`."""
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
    for cache in (model.kept_batch.prompt_cache, model.kept_batch.own_cache, model.kept_batch.logprobs):
        cache.fill_(value)                   # every column, the masked ones too
    again = generate(model, PROMPTS[:3], **settings)
    same(again, want)
