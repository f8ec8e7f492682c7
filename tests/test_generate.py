"""Tests of generate.py."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import engine as engine_module
import generate as generate_module
from engine import DecodeBatch, FusedBlocks, generate
from generate import Embedder, DecodingState, plain_loop, sample
from helpers import (
    PROMPTS, QWEN3_GOLDEN, STOP, STOPS, TIED, build, build_model, gap, golden, load_tiny,
    logits_of, next_logits, peer, right_padded, sequence, sft, shake, surprise,
)
from model import Qwen3
from support.draws import draw, inverse, uniforms
from support import embedders
from support.files import InputError


# ---- Generation ----------------------------------------------------------------------------------

def test_top_p_ends_with_the_token_that_reaches_it():
    """The smallest set of at least top_p: where a token reaches it exactly, the next one is
    outside."""
    uniform = torch.arange(64, dtype=torch.float64) / 64
    for top_p, number in ((0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3)):
        token, logp = sample(torch.zeros(64, 4), uniform, 1.0, top_p=top_p)
        assert len(set(token.tolist())) == number
        assert torch.allclose(logp, torch.full((64,), -math.log(number)))


def test_a_token_of_probability_zero_is_never_drawn():
    """Inverting the cumulative distribution at its very ends hits ids of no mass when done
    carelessly."""
    last = 1 - 2.0 ** -53  # the largest number a generator returns
    zero = -math.inf
    logits = torch.tensor([[zero, zero, 1.0, zero, 0.5, 2.0, zero],
                           [zero, -300.0, 0.0, -300.0, zero, zero, -300.0],
                           [0.0, zero, zero, zero, zero, zero, 0.0]])
    for u, want in ((0.0, [2, 2, 0]), (last, [5, 2, 6])):
        uniform = torch.full((3,), u, dtype=torch.float64)
        token, logp = sample(logits, uniform, 1.0)
        assert token.tolist() == want and logp.isfinite().all()
    # 1.4e-11, lost in fp32 sums
    rare = torch.tensor([[0.0, -25.0]])
    assert sample(rare, torch.tensor([last], dtype=torch.float64), 1.0)[0].tolist() == [1]
    mass = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    # Careless
    assert torch.searchsorted(mass,
                              torch.zeros(3, 1, dtype=torch.float64)).flatten().tolist() == [0, 0,
                                                                                             0]
    uniform = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    token, _ = sample(torch.randn(1, 500).mul(8).expand(2000, -1), uniform, 1.0, top_k=3)
    assert len(set(token.tolist())) == 3


@pytest.mark.parametrize("rows, vocab", [(5, 300), (3, 40_003), (2, 256 * 128), (700, 100),
                                         (9, 8000)])
def test_sampling_inverts_the_cumulative_distribution(rows, vocab):
    """One random number a token, small vocabularies at once, large ones in two steps: the share
    of [0, 1) that draws an id is its probability, also at the borders of blocks and in the
    last, shorter one."""
    p = torch.rand(rows, vocab) ** 8 * (torch.rand(rows, vocab) < 0.1)
    p[0, : vocab // 2], p[-1, vocab // 2:] = 0, 0
    mass = p.double().cumsum(-1)
    for uniform in (torch.rand(20, rows, dtype=torch.float64),
                    torch.tensor([[0.0], [1 - 2.0 ** -53]]).double().expand(2, rows)):
        for u in uniform:
            token, total = draw(p, u)
            assert ((p.gather(1, token) > 0).all() and (total - mass[:, -1:]).abs().max()
                    < 1e-5 * total.max())
            upper, share = mass.gather(1, token) / total, u[:, None]
            lower = upper - p.gather(1, token) / total
            assert (lower < share + 1e-6).all() and (share < upper + 1e-6).all()
    # the middle of every id's share draws that id
    edges = mass / mass[:, -1:]
    for i in p[0].nonzero()[::7].flatten().tolist():
        if p[0, i] / p[0].sum() > 1e-5:
            u = edges[:, i] - 0.5 * p[:, i] / p.sum(-1)
            assert draw(p, u)[0][0] == i


def test_rounding_never_samples_an_id_of_probability_zero():
    """In the second step what is left of the random number may be a rounding below 0 or above
    the block's sum."""
    mass = torch.tensor([[0.0, 0.0, 0.3, 0.3, 0.7, 0.7, 0.7]], dtype=torch.float64)
    for target, index in ((-1e-9, 2), (0.0, 2), (0.3, 4), (0.7, 4), (0.7 + 1e-9, 4)):
        assert inverse(mass, torch.tensor([[target]], dtype=torch.float64)).tolist() == [[index]]


@pytest.mark.parametrize("vocab", [100, 2 ** 16 + 128, 2 ** 16 + 130])
def test_a_model_that_gives_nan_draws_real_ids(vocab):
    """An id beyond the table would end a GPU's process; nan goes on as a nan log-prob, which the
    training loop refuses."""
    token, logp = sample(torch.full((2, vocab), math.nan), torch.rand(2, dtype=torch.float64), 1.0)
    assert 0 <= token.min() and token.max() < vocab and logp.isnan().all()


# ---- The fast path of decoding against the plain one ---------------------------------------------

def test_random_numbers_are_those_of_splitmix64():
    """Another constant is another stream, with which no run could be repeated: by Python's whole
    numbers."""
    def mix(z):
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % 2 ** 64
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2 ** 64
        return z ^ z >> 31
    golden, seed = 0x9E3779B97F4A7C15, (-3, 11)
    start = 0
    for part in seed:
        start = mix((start + golden) % 2 ** 64 ^ part % 2 ** 64)
    want = []
    for completion in range(2):
        source = mix((start + golden) % 2 ** 64 ^ completion)
        want.append([(mix((source + golden * t) % 2 ** 64) >> 11) / 2 ** 53 for t in range(1, 5)])
    assert uniforms([seed], 2, 4)[0].tolist() == want


def test_random_numbers_of_seeds_are_uniform_and_independent():
    u = uniforms([(8, p) for p in range(300)], 6, 40)
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * u.numel())
    counts = (u.flatten() * 64).long().bincount(minlength=64).double()
    assert surprise(counts,
                    torch.full((64,), 1 / 64, dtype=torch.float64))[0] < 63 + 5 * math.sqrt(126)
    noise = 5 / math.sqrt(299)
    # over time, drafts, posts
    for table in (u[:, 0], u[:, :, 0], torch.cat((u[:-1, 0, :4], u[1:, 0, :4]), 1)):
        assert (torch.corrcoef(table.T) - torch.eye(table.shape[1])).abs().max() < noise
    assert torch.equal(uniforms([5, -3], 2, 3),
                       torch.cat((uniforms([(5,)], 4, 9)[:, :2, :3], uniforms([-3], 2, 3))))
    assert len({float(uniforms([s], 1, 1)) for s in (0, 1, 2 ** 63, -1, (0, 0), (0, 1),
                                                     (1, 0))}) == 7


# ---- The plain loop against the fast engine ------------------------------------------------------

def test_rows_of_the_plain_loop_can_go_on_from_one_another():
    """Beams: the two likeliest continuations of all rows, each with its parent's cache; against
    scoring every sequence by a full forward."""
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


# ---- Generation and log-probabilities ------------------------------------------------------------

def cut(ids, stops):
    return next((ids[:i + 1] for i, t in enumerate(ids) if t in stops), ids)


@TIED
def test_greedy_ids_of_ragged_prompts_in_one_batch(tmp_path, tied):
    model, want = load_tiny(tmp_path, tied), golden(tied)["greedy"]
    got = generate(model, want["prompts"], k=2, max_new_tokens=12, temperature=0.0)
    assert got.tokens == [[c, c] for c in want["continuations"]]
    assert got.finished == [[False, False]] * 3
    backwards = generate(model, want["prompts"][::-1], max_new_tokens=12, temperature=0.0)
    assert [d[0] for d in backwards.tokens] == want["continuations"][::-1]


@TIED
def test_greedy_stops_at_stop_ids_of_the_completion_not_of_the_prompt(tmp_path, tied):
    model, want = load_tiny(tmp_path, tied), golden(tied)["greedy"]
    stops = {want["continuations"][0][4], want["prompts"][1][2]}
    got = generate(model, want["prompts"], max_new_tokens=12, temperature=0.0, stop_ids=stops)
    expected = [cut(c, stops) for c in want["continuations"]]
    assert len(expected[0]) <= 5 < len(expected[1])
    assert [d[0] for d in got.tokens] == expected
    assert [f[0] for f in got.finished] == [c[-1] in stops for c in expected]


@pytest.mark.slow
@TIED
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_samples_are_those_of_a_full_forward(tmp_path, tied, temperature):
    model, prompts = load_tiny(tmp_path, tied), golden(tied)["greedy"]["prompts"]
    # many: drafts end at different times and rows are dropped
    stops = range(STOP, STOP + 20)
    got = generate(model, prompts, k=4, max_new_tokens=12, temperature=temperature, stop_ids=stops,
                   seed=3)
    assert len({len(d) for completions in got.tokens for d in completions}) > 3
    elsewhere = []
    groups = zip(prompts, got.tokens, got.logprobs, got.finished)
    for prompt, completions, logprobs, finished in groups:
        assert len(set(map(tuple, completions))) > 1
        assert (finished == [d[-1] in stops for d in completions]
                and all(d == cut(d, stops) for d in completions))
        for completion, logprob in zip(completions, logprobs):
            logits = logits_of(model, prompt + completion)[len(prompt) - 1:-1]
            at = torch.arange(len(completion)), torch.tensor(completion)
            assert gap((logits / temperature).log_softmax(-1)[at], logprob) < 1e-3
            elsewhere.append(gap((logits / (1.7 - temperature)).log_softmax(-1)[at], logprob))
    # scored at another temperature
    assert max(elsewhere) > 0.1


@pytest.mark.peers
def test_live_logprobs_of_truncated_samples(tmp_path):
    """Our top-k, top-p and min-p keep the tokens that transformers' do, in its order."""
    warp = pytest.importorskip("transformers.generation.logits_process")
    model, prompts = load_tiny(tmp_path, False), golden(False)["greedy"]["prompts"]
    got = generate(model, prompts, k=4, max_new_tokens=12, temperature=1.5, top_k=30, top_p=0.9,
                   min_p=0.05,
                   seed=3)
    steps = [warp.TemperatureLogitsWarper(1.5), warp.TopKLogitsWarper(30),
             warp.TopPLogitsWarper(0.9),
             warp.MinPLogitsWarper(0.05)]
    for prompt, completions, logprobs in zip(prompts, got.tokens, got.logprobs):
        for completion, logprob in zip(completions, logprobs):
            scores = logits_of(model, prompt + completion)[len(prompt) - 1:-1]
            for step in steps:
                scores = step(None, scores)
            at = torch.arange(len(completion)), torch.tensor(completion)
            assert gap(scores.log_softmax(-1)[at], logprob) < 1e-3


@pytest.mark.parametrize("write", [generate, generate_module.generate_plain])
def test_a_list_of_seeds_has_one_seed_a_prompt(write):
    """Of another length it would leave prompts without a seed, or seeds without a prompt."""
    for seeds in ([5], [5, 6, 7]):
        with pytest.raises(ValueError, match=f"{len(seeds)} seeds for 2 prompts"):
            write(build(), [[1, 2], [3]], k=2, max_new_tokens=2, seed=seeds)


# ---- Embeddings and scores -----------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["", "model."])
@TIED
def test_embeddings(tmp_path, tied, prefix):
    want = QWEN3_GOLDEN["heads"]  # an untied embedder has no head either
    model = load_tiny(tmp_path, tied, prefix=prefix, head=None if prefix == ""
                      or tied else "lm_head")
    tokens, lengths = right_padded(want["sequences"], pad=STOP)
    hidden = F.normalize(torch.tensor(want["last_hidden"]), dim=-1)
    with torch.no_grad():
        got, short = model.embed(tokens, lengths), model.embed(tokens, lengths - 1)
    assert got.dtype == torch.float32 and got.shape == (2, 48)
    assert gap(got.norm(dim=-1), torch.ones(2)) < 1e-5
    assert gap(got, hidden) < 1e-4
    assert gap(short, hidden) > 0.05                                           # one token early


# ---- transformers itself -------------------------------------------------------------------------

@pytest.mark.peers
def test_live_embedder_and_reward_model(tmp_path):
    """Both ways: their files in our model, our files in theirs."""
    # theirs goes by the pad's id
    tokens, lengths = right_padded([sequence(4, 6), sequence(5, 13)], pad=0)
    classes = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    for name, settings in (("Qwen3Model", {"prefix": "", "head": None}),
                           ("Qwen3ForSequenceClassification", {"head": "score"} | classes)):
        ours = load_tiny(tmp_path / name / "a", True, **settings)
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


# ---- The SFT step, on a real session around a tiny model -----------------------------------------

@pytest.mark.slow
def test_the_embedder_is_frozen_centred_and_independent_of_padding(parts):
    """Raw hidden states all point one way, pads poison a mean, and an embedder that trains along
    rewards itself."""
    s, texts = sft(parts), [["We got a kitten!", "no", ""],
                            ["So sorry to hear of the stew.", "a b c", "no"]]
    e = s.embedder(texts)
    assert (e.shape[:2] == (2, 3) and not e.requires_grad and gap(e.norm(dim=-1), torch.ones(2, 3))
            < 1e-5)
    assert gap(e[0, 1], e[1, 2]) < 1e-5  # the same text, padded otherwise
    alone = Embedder(s.model, s.tokenizer, corpus=[r for p in s.posts for r in p.replies], batch=1)
    assert gap(alone(texts), e) < 1e-4
    shake(s.model, 3.0)
    assert gap(s.embedder(texts), e) < 1e-6  # of the base, whatever the adapter became
    raw = F.normalize(s.embedder.vectors([r for p in s.posts for r in p.replies]), dim=-1)
    centred = s.embedder([[r for p in s.posts for r in p.replies]])[0]
    assert float((raw @ raw.t()).mean()) > 0.2 and abs(float((centred @ centred.t()).mean())) < 0.01
    with pytest.raises(InputError, match="centre"):
        Embedder(s.model, s.tokenizer)


@pytest.mark.slow
def test_passes_of_the_embedder_are_bounded_in_padded_tokens(parts, monkeypatch):
    """256 texts a pass took 12.9 GB of an 8B model's activations where they had 512 tokens each;
    vectors are those of one pass."""
    s = sft(parts)
    texts = [" ".join(["a long reply"] * n) for n in (1, 40, 2, 3, 60, 4, 5, 90, 6)] + [""]
    want = s.embedder.vectors(texts)
    sizes = []
    pooled = s.embedder.pooled
    monkeypatch.setattr(s.embedder, "pooled", lambda ids: sizes.append(
        [len(row) for row in ids]) or pooled(ids))
    s.embedder.vectors(texts)
    assert len(sizes) == 1                       # short ones: as many as ever at a time
    longest = max(sizes.pop())
    monkeypatch.setattr(embedders, "TOKENS_A_PASS", longest - 1)
    assert gap(s.embedder.vectors(texts), want) < 1e-5
    assert sum(map(len, sizes)) == len(texts) and 2 < len(sizes) < len(texts)
    padded = [len(lengths) * max(lengths) for lengths in sizes]
    assert padded.pop() == longest and max(padded) < longest     # a longer text has its own pass
    s.embedder.batch = 2
    sizes.clear()
    assert gap(s.embedder.vectors(texts), want) < 1e-5 and max(map(len, sizes)) == 2


# ---- Drafts and embeddings -----------------------------------------------------------------------

def test_positions_count_from_zero_and_continue_in_completions(monkeypatch):
    """G1: an offset common to prompt and drafts changes nothing that the others compare, and
    everything for a model with other attention than full rotary."""
    model, seen = build_model(), []
    call = FusedBlocks.__call__
    monkeypatch.setattr(FusedBlocks, "__call__",
                        lambda self, x, positions, attend: (seen.append(positions.clone()),
                                                            call(self, x, positions, attend))[1])
    prompt = [3, 1, 4, 1, 5]
    engine_module.generate(model, [prompt], k=2, max_new_tokens=4, stop_ids=[], seed=1)
    first, *later = seen
    assert first.flatten().tolist() == [0, 1, 2, 3, 4]
    assert ([set(p.flatten().tolist()) for p in later] == [{5 + i} for i in range(len(later))]
            and len(later) >= 3)


def test_an_embedding_model_reads_its_last_token_and_the_base_is_averaged_in_fp32(
    parts):  # noqa: F811
    """E4: Qwen3-Embedding pools the end token that is put behind each text, padded or alone;
    means of bf16 states are taken in fp32."""
    _, tokenizer, model = parts
    end, texts = tokenizer.token_to_id("<|endoftext|>"), ["the bus is late", "oh", ""]
    got = Embedder(model, tokenizer, pooling="last")([texts])[0]
    for vector, text in zip(got, texts):
        ids = torch.tensor([[*tokenizer.encode(text, add_special_tokens=False).ids, end]])
        want = torch.nn.functional.normalize(model.hidden(ids)[0, -1].float(), dim=0)
        assert torch.allclose(vector, want, atol=1e-5)
    low = copy.deepcopy(model).to(torch.bfloat16)
    long = "my bus is late again this morning and " * 12
    vector, = Embedder(low, tokenizer, corpus=["a b"]).vectors([long])
    ids = torch.tensor([tokenizer.encode(long, add_special_tokens=False).ids])
    exact = low.hidden(ids)[0].double().mean(0)
    assert (vector.dtype == torch.float32 and float((vector.double() - exact).abs().max())
            < 1e-5 * float(exact.abs().max()))


def test_caches_hold_the_key_heads_alone():
    """Repeated for every query head, keys and values would take twice the memory here and four
    times on Qwen3-8B."""
    model = build()
    heads, shared = model.config.num_attention_heads, model.config.num_key_value_heads
    assert heads == 2 * shared
    batch = DecodeBatch(model, 3, 4, 9, 6, {"temperature": 1.0}, [0])
    number = 2 * model.config.num_hidden_layers * shared * model.config.head_dim * 3 * (9 + 4 * 6)
    assert batch.prompt_cache.numel() + batch.own_cache.numel() == number
    with torch.no_grad():
        state = DecodingState(model, PROMPTS[2], 5)
        state.read(torch.arange(5))
    assert all(x.shape == (5, 10, shared, model.config.head_dim) for kv in state.cache.values()
               for x in kv)


def test_tokens_are_sampled_in_fp32_for_any_weight_dtype(monkeypatch):
    """The log-softmax of bf16 logits is off by 0.02: more than a third of all ratios would be
    off by 2%."""
    seen, draw = set(), generate_module.sample
    monkeypatch.setattr(engine_module, "sample",
                        lambda logits, *a, **more: (seen.add(logits.dtype),
                                                    draw(logits, *a, **more))[1])
    model = build().to(torch.bfloat16)
    generate(model, PROMPTS[:2], k=2, max_new_tokens=3, stop_ids=STOPS)
    assert seen == {torch.float32}
