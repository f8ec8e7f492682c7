"""LoRA, the diversity D and its gradient, its gate, the SFT step.

D's gradient is checked by enumeration: a softmax policy over four outcomes, where the exact gradient of E[D]
and the exact expectation of the estimator can both be summed over all k-tuples. A D that no gradient passes
through is the failure that must not come back.
"""

import copy
import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import polylora
import rewards
from data import InputError
from generate import generate
from model import NF4, Config, Qwen3, quantise
from polylora import (Embedder, Gate, LoRALinear, adapter, adapter_state, add_cross_entropy, add_diversity,
                      add_lora, base, diversity, diversity_advantages, drop_lora, frozen_copy,
                      load_adapter, load_embedder, lora_layers, merge_lora, pair_distances,
                      save_adapter, sft_step)
from tiny import command, tiny_config, tiny_weights, whole_and_cut
from trainer import Ranks, Session, Tally, Visit, batch_visits, train_tokenizer

TOKENS = torch.tensor([[3, 9, 4, 17, 30, 2, 8]])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(dtype=torch.float32, seed=3, **changes):
    """A random Qwen3 of two layers, frozen."""
    small = dict(vocab_size=41, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                 num_attention_heads=4, head_dim=8)
    config = tiny_config(True, **small | changes)
    model = Qwen3(Config.from_dict(config))
    model.load_state_dict(tiny_weights(config, seed))
    return model.to(dtype).requires_grad_(False).eval()


def shake(model, size=0.2, seed=1):
    """Random B: an adapter that has been trained. Returns the model."""
    draw = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.copy_(size * torch.randn(layer.lora_B.weight.shape, generator=draw))
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS)


def gap(a, b):
    return (a.double() - b.double()).abs().max().item()


# ---- LoRA ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_is_the_base_bit_for_bit(dtype):
    """B is zero: the first forward is the base's, in every bit, and with any other B it is not."""
    base = build(dtype)
    model = add_lora(build(dtype), 4, 8)
    assert torch.equal(logits(model), logits(base))
    assert gap(logits(shake(model)), logits(base)) > 0.05


def test_the_first_step_moves_b_and_leaves_a():
    """With B zero the gradient of A is zero: weight decay or a bug would move it."""
    model = add_lora(build(), 4, 8, seed=1)
    before, params = frozen_copy(model), adapter_state(model)
    optimizer = torch.optim.AdamW(params.values(), lr=1e-2, weight_decay=0.0)
    for step in range(2):
        model(TOKENS).log_softmax(-1)[0, :, 5].sum().backward()
        optimizer.step()
        moved = {n for n, p in params.items() if not torch.equal(p, before[n])}
        assert moved == {n for n in params if step or "lora_B" in n}           # A follows in the second step
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
    """Every rank draws A for itself: it must not depend on the global generator or on what was drawn
    before."""
    torch.manual_seed(0)
    draw = lambda seed: adapter_state(add_lora(build(), 4, 8, seed=seed))
    one = draw(7)
    torch.randn(11)
    two, other = draw(7), draw(8)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one if "lora_A" in n)
    shapes = {n: p.shape for n, p in one.items() if "lora_A" in n}
    bound = {n: shape[1] ** -0.5 for n, shape in shapes.items()}  # as PEFT draws: U(-1/sqrt(in), 1/sqrt(in))
    assert all(0.8 * bound[n] < one[n].abs().max().item() <= bound[n] for n in bound)


def test_adapters_are_fp32_over_a_bf16_base_and_the_base_gets_no_gradient():
    """A bf16 A loses most Adam steps to rounding; a base that trains along is no LoRA."""
    model = shake(add_lora(build(torch.bfloat16).requires_grad_(True), 4, 8))
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
    """The layer adds in place to save memory: its gradients must be those of y = W x + s B A x in plain
    autograd."""
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
    model = add_lora(build(), 2, 2, targets=("q_proj", "down_proj"))
    names = [n.rpartition(".")[2] for n in lora_layers(model)]
    assert names == ["q_proj", "down_proj"] * 2
    assert len(lora_layers(add_lora(build(), 2, 2))) == 7 * 2
    for targets in (("lm_head",), ("embed_tokens",), ("q_proj", "k_prj"), ()):
        with pytest.raises(InputError, match="target"):
            add_lora(build(), 2, 2, targets=targets)
    with pytest.raises(InputError, match="rank"):
        add_lora(build(), 0, 2)
    with pytest.raises(InputError, match="already"):
        add_lora(model, 2, 2)


def test_a_saved_adapter_loads_into_a_fresh_model_and_changes_its_output(tmp_path):
    """Loading that silently matches no tensor leaves the base: the output must be the trained one, not the
    base's."""
    model = shake(add_lora(build(), 4, 6, targets=("q_proj", "v_proj", "up_proj"), dropout=0.1)).eval()
    save_adapter(model, tmp_path, "some/base")
    fresh = load_adapter(build(), tmp_path).eval()
    assert torch.equal(logits(fresh), logits(model)) and gap(logits(fresh), logits(build())) > 0.05
    assert all(torch.equal(p, adapter_state(model)[n]) for n, p in adapter_state(fresh).items())
    assert all(layer.dropout == 0.1 and layer.scale == 1.5 for layer in lora_layers(fresh).values())
    into = add_lora(build(), 4, 99, targets=("q_proj", "v_proj", "up_proj"))
    load_adapter(into, tmp_path, dropout=0.0)
    assert torch.equal(logits(into), logits(model))  # the file's alpha, not the model's
    assert all(layer.dropout == 0.0 for layer in lora_layers(into).values())


@pytest.mark.parametrize("change", [dict(hidden_size=32), dict(num_hidden_layers=3),
                                    dict(num_hidden_layers=1)], ids=str)
def test_an_adapter_of_another_model_is_refused_by_name(tmp_path, change):
    """Loaded loosely, an adapter of another model changes nothing, or half the layers."""
    save_adapter(add_lora(build(), 4, 8), tmp_path)
    with pytest.raises(InputError, match="does not fit this model.*lora_"):
        load_adapter(build(**change), tmp_path)


@pytest.mark.parametrize("key, value", [
    ("init_lora_weights", "olora"), ("init_lora_weights", "pissa_niter_4"), ("modules_to_save", ["lm_head"]),
    ("rank_pattern", {"q_proj": 8}), ("bias", "all"), ("peft_type", "IA3")])
def test_an_adapter_that_asks_for_more_than_lora_is_refused(tmp_path, key, value):
    """Read as plain LoRA, such an adapter gives another model's output without a word."""
    save_adapter(add_lora(build(), 4, 8), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match="LoRA"):
        load_adapter(build(), tmp_path)


def damage(tmp_path, what):
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    if what == "no weights":
        file.unlink()
    elif what == "cut weights":
        file.write_bytes(file.read_bytes()[:100])
    elif what == "no config":
        config.unlink()
    elif what == "no rank":
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "r"}))
    elif what == "a tensor too few":
        tensors = load_file(file)
        tensors.pop(min(tensors))
        save_file(tensors, file)


@pytest.mark.parametrize("what", ["no weights", "cut weights", "no config", "no rank", "a tensor too few"])
def test_a_damaged_adapter_is_an_input_error(tmp_path, what):
    """A copy that broke off is the user's everyday mistake: one sentence that names the folder, not a
    traceback."""
    save_adapter(add_lora(build(), 4, 8), tmp_path)
    damage(tmp_path, what)
    with pytest.raises(InputError, match=str(tmp_path)):
        load_adapter(build(), tmp_path)


def test_merging_adds_the_update_in_fp32_and_touches_nothing_else():
    """The merged model says what the unmerged one says; merged in bf16, most of a small update would be
    rounded away."""
    model = shake(add_lora(build(), 4, 8))
    want, plain = logits(model), copy.deepcopy(model)
    kept = {n: (layer.weight, layer.weight.clone()) for n, layer in lora_layers(model).items()}
    assert gap(logits(merge_lora(model)), want) < 1e-5
    assert all(torch.equal(w, was) for w, was in kept.values())  # merged beside the frozen weights
    assert not lora_layers(model) and model.state_dict().keys() == build().state_dict().keys()
    assert torch.equal(logits(drop_lora(plain)), logits(build()))              # and dropped, the base is back

    small = shake(add_lora(build(torch.bfloat16), 4, 8), size=1e-4)
    layer = small.model.layers[0].self_attn.q_proj
    frozen, update = layer.weight, layer.merged_weight() - layer.weight.float()
    weight = merge_lora(small).model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == small.dtype == torch.float32 and frozen.dtype == torch.bfloat16
    assert gap(weight - frozen.float(), update) < 1e-7
    assert float((weight != frozen.float()).float().mean()) > 0.9
    assert float((weight.bfloat16() != frozen).float().mean()) < 0.5           # what bf16 would have kept


def test_the_adapter_can_be_switched_off_and_exchanged_and_comes_back():
    """A reference pass that leaves the policy switched off, or a copy that follows the training, ruins all
    that follows."""
    plain, model = build(), shake(add_lora(build(), 4, 8))
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
    assert ids == {n: p.data_ptr() for n, p in adapter_state(model).items()}   # the optimizer's own tensors


def test_dropout_acts_in_training_alone():
    """Drafts and their scores must come from one and the same network."""
    model = shake(add_lora(build(), 4, 8, dropout=0.5)).train()
    assert not torch.equal(logits(model), logits(model)) and torch.equal(logits(model.eval()), logits(model))
    with base(model.train()):
        assert torch.equal(logits(model), logits(build()))


def test_lora_layers_take_the_mode_of_the_layer_they_replace(tmp_path):
    """A new module is in training mode: an adapter with dropout, loaded on a loaded model, would answer
    noisily."""
    save_adapter(shake(add_lora(build(), 4, 8, dropout=0.5)), tmp_path)
    model = load_adapter(build(), tmp_path)
    assert not any(m.training for m in model.modules()) and torch.equal(logits(model), logits(model))
    assert all(m.training for m in add_lora(build().train(), 4, 8).modules())


# ---- LoRA over NF4 ---------------------------------------------------------------------------------------

def four_bits():
    """A model in NF4, and one with the same weights in full."""
    model = quantise(build())
    full = build()
    for name, layer in model.named_modules():
        if isinstance(layer, NF4):
            full.get_submodule(name).weight.data = layer.dense()
    assert sum(isinstance(m, NF4) for m in model.modules()) == 14
    return model, full


def test_an_nf4_base_is_its_dense_weights_and_so_are_lora_s_gradients():
    """The backward pass makes the weight dense again: another one, or none, and the gradient is wrong. LoRA that
    is fp32 over it gets all of the gradient, and generation says the same."""
    grads = []
    for model in four_bits():
        shake(add_lora(model, 4, 8, seed=1, targets=("q_proj", "v_proj", "down_proj")))
        model(TOKENS).log_softmax(-1)[0, :, 3].sum().backward()
        grads.append((logits(model), generate(model, TOKENS.tolist(), k=3, max_new_tokens=5),
                      *(p.grad for p in adapter_state(model).values())))
    (a, drafts, *ours), (b, others, *wants) = grads
    assert gap(a, b) < 1e-5 and gap(a, logits(build())) > 0.01 and drafts.tokens == others.tokens
    assert all(gap(x, y) < 1e-5 for x, y in zip(ours, wants, strict=True)) and max(w.abs().max() for w in wants) > 0.1


def test_no_dense_weight_is_kept_for_the_backward_pass():
    model, kept = shake(add_lora(quantise(build(hidden_size=128, intermediate_size=256)), 2, 4)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        model.hidden(TOKENS).sum().backward()
    assert kept and max(kept) < 128 * 64                                       # the smallest weight is k's, (16, 128) x 2 heads


def test_an_nf4_model_is_loaded_layer_by_layer_moved_and_not_saved(tmp_path):
    build().save_pretrained(tmp_path / "model")
    model = Qwen3.from_pretrained(tmp_path / "model", nf4=True)
    assert torch.equal(logits(model), logits(quantise(build())))
    layer = model.model.layers[0].mlp.up_proj
    before = layer.dense(torch.bfloat16)
    assert torch.equal(model.bfloat16().model.layers[0].mlp.up_proj.dense(torch.bfloat16), before)
    assert layer.codes.numel() == 24 * 32 // 2 and not list(layer.parameters())
    with pytest.raises(InputError, match="NF4 cannot be saved"):
        model.save_pretrained(tmp_path / "again")
    add_lora(model, 2, 4)
    assert drop_lora(model).model.layers[0].mlp.up_proj is layer
    assert merge_lora(shake(add_lora(model, 2, 4))).model.layers[0].mlp.up_proj.weight.shape == (32, 24)


def test_zeros_and_odd_sizes_are_quantised_too():
    assert torch.equal(NF4(torch.zeros(3, 50)).dense(), torch.zeros(3, 50))
    weight = torch.randn(7, 13)
    assert gap(NF4(weight).dense(), weight) < 0.2 * weight.abs().max() and NF4(weight).dense().shape == (7, 13)


# ---- Diversity -------------------------------------------------------------------------------------------

OUTCOMES = F.normalize(torch.tensor(
    [[1.0, 0.2, 0.0], [0.9, 0.5, 0.1], [-0.3, 1.0, 0.4], [0.1, -0.2, -1.0]]).double(), dim=-1)
QUALITY = torch.tensor([0.9, 0.3, 0.7, 0.05]).double()


def in_double(monkeypatch):
    """The product takes D in fp32, by .float(): read as double here, so that equations can be seen to hold to
    1e-12."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def policy(outcomes, seed=0):
    """Logits of a softmax policy over a handful of outcomes, to differentiate by."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(outcomes, dtype=torch.float64, generator=draw).requires_grad_()


def all_tuples(outcomes, k):
    return torch.tensor(list(itertools.product(range(outcomes), repeat=k)))    # (outcomes ** k, k)


def exact_gradient(theta, drawn, value):
    """grad of E[value], by autograd through the chance of every tuple in `drawn`; value (tuples,)."""
    chance = theta.log_softmax(-1)[drawn].sum(-1).exp()
    return torch.autograd.grad((chance * value).sum(), theta)[0]


def expected_estimate(theta, drawn, advantages):
    """E[sum_i A_i grad log pi(y_i)] over every tuple in `drawn`; advantages (tuples, k) are constants."""
    logp = theta.log_softmax(-1)[drawn]
    chance = logp.sum(-1).exp().detach()
    return torch.autograd.grad((chance * (advantages.detach() * logp).sum(-1)).sum(), theta)[0]


def test_d_by_hand():
    """The mean over pairs, without the diagonal: three of four cosines are 0, -1, 0."""
    e = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [[0.6, 0.8], [0.6, 0.8], [0.6, 0.8]]])
    assert diversity(e).tolist() == pytest.approx([(1 + 2 + 1) / 3, 0], abs=1e-6)
    q = torch.tensor([[1.0, 0.5, 0.2], [1, 1, 1]])
    assert diversity(e, q).tolist() == pytest.approx([(1 * 0.5 + 2 * 0.2 + 1 * 0.1) / 3, 0], abs=1e-6)
    assert diversity(e[:1, :2]).tolist() == [1.0]
    assert pair_distances(e)[0].tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    assert float(diversity_advantages(e)[1].abs().max()) < 1e-6                # duplicates earn nothing
    for k in (0, 1):
        with pytest.raises(InputError, match="two drafts"):
            diversity(e[:, :k])


def test_an_advantage_is_what_the_draft_adds_to_d():
    e, q = F.normalize(torch.randn(3, 5, 4), dim=-1), torch.rand(3, 5)
    for gate in (None, q):
        got = diversity_advantages(e, gate)
        for i in range(5):
            rest = [j for j in range(5) if j != i]
            without = diversity(e[:, rest], None if gate is None else gate[:, rest])
            assert gap(got[:, i], diversity(e, gate) - without) < 1e-6


@pytest.mark.parametrize("gated, floor", [(False, 0.0), (True, 0.0), (True, 1.0)])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_score_function_gradient_of_d_is_exact(monkeypatch, k, gated, floor):
    """The estimator's expectation over all k-tuples is grad E[D], with no constant between them, gate or no
    gate, floor or no floor."""
    in_double(monkeypatch)
    theta, drawn = policy(4), all_tuples(4, k)
    q = QUALITY[drawn] if gated else None
    want = exact_gradient(theta, drawn, diversity(OUTCOMES[drawn], q, floor))
    got = expected_estimate(theta, drawn, diversity_advantages(OUTCOMES[drawn], q, floor))
    assert float(want.abs().max()) > 0.01 and gap(got, want) < 1e-12
    if not gated:  # "novelty as a reward, less the group's mean" has another constant, zero at k = 2
        pairs = pair_distances(OUTCOMES[drawn]).sum(-1) / (k - 1)
        novelty = expected_estimate(theta, drawn, pairs - pairs.mean(-1, keepdim=True))
        assert gap(novelty, (k / 2 - 1) * want) < 1e-12


def test_a_floor_pays_right_drafts_that_are_alike_and_no_wrong_one():
    """(floor + delta) q q by hand: two equal right drafts and a wrong one; without a gate there is no floor."""
    e, q = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert diversity(e, q).item() == 0 and diversity(e, q, 0.6).item() == pytest.approx(0.2)
    assert diversity(e, None, 0.6).item() == diversity(e).item() == pytest.approx(2 / 3)
    right, _, wrong = diversity_advantages(e, q, 0.6)[0].tolist()
    assert right > 0 > wrong


def test_many_draws_approach_the_gradient_of_d():
    """The same through sampling, in the fp32 that training uses: the mean of 60,000 estimates is grad
    E[D]."""
    theta, k, n = policy(4, seed=1), 4, 60_000
    drawn = torch.multinomial(theta.detach().softmax(-1), n * k, True).view(n, k)
    every = all_tuples(4, k)
    want = exact_gradient(theta, every, diversity(OUTCOMES[every]).double())
    a, logp = diversity_advantages(OUTCOMES[drawn]).double(), theta.log_softmax(-1)
    got, = torch.autograd.grad((a * logp[drawn]).sum() / n, theta)
    assert gap(got, want) < 0.05 * float(want.abs().max())


def test_a_detached_d_has_no_gradient_and_ours_does():
    """The failure that must not come back: D as a number computed from sampled text leaves every gradient
    unchanged."""
    theta, drawn = policy(4), torch.tensor([[0, 1, 3], [2, 2, 0]])
    quality_loss = -theta.log_softmax(-1)[1]
    plain, = torch.autograd.grad(quality_loss, theta, retain_graph=True)
    number = diversity(OUTCOMES[drawn]).mean().item()
    detached, = torch.autograd.grad(quality_loss - 3.0 * number, theta, retain_graph=True)
    assert torch.equal(detached, plain)
    ours = polylora.diversity_loss(theta.log_softmax(-1)[drawn].flatten(), torch.arange(6),
                                   diversity_advantages(OUTCOMES[drawn]).flatten(), 2)
    moved, = torch.autograd.grad(quality_loss + 3.0 * ours, theta)
    assert gap(moved, plain) > 0.1


# ---- The SFT step, on a real session around a tiny model -------------------------------------------------

class Share:
    """Rank `rank` of `world`, simulated: a sum over ranks is `total` where that is given, else this rank's
    own."""

    def __init__(self, rank=0, world=1, total=None):
        self.rank, self.world, self.total, self.summed = rank, world, total, []
        self.main, self.device = rank == 0, torch.device("cpu")
        self.restarts = 0

    def sum(self, values):
        self.summed.append(list(values))
        return list(values) if self.total is None else list(self.total)

    def sum_gradients(self, params):
        """Nothing: the gradient stays this rank's share."""

    def gather(self, items):
        return items

    take_gradient = Ranks.take_gradient


@pytest.fixture(scope="module")
def parts():
    """(posts of the pocket world, a tokenizer for them, a random Qwen3 with a few rows more than the
    tokenizer has)."""
    posts = data.pocket_posts(12, seed=1)
    tokenizer = train_tokenizer([t for p in posts for t in (p.post, *p.replies)], 330)
    return posts, tokenizer, build(vocab_size=tokenizer.get_vocab_size() + 3)


def session(parts, parser, flags, stage="sft", ranks=None):
    """A Session as a phase makes it, without its files: LoRA that has moved, drafts of 7 tokens."""
    s = Session.__new__(Session)
    s.args = parser.parse_args([*flags, "--data", "-", "--out", "-", "--max-new-tokens", "7", "--seed", "4"])
    s.posts, s.tokenizer, model = parts
    s.stage, s.ranks, s.domain = stage, ranks or Share(), data.make_domain("auto", s.posts)
    s.model = shake(add_lora(copy.deepcopy(model), 3, 6, seed=2), 0.1)
    s.model.vocab, s.stops = s.tokenizer.get_vocab_size(), data.stop_ids(s.tokenizer)
    s.chat, s.params, s.reward = data.ChatFormat(), list(adapter_state(s.model).values()), None
    load_embedder(s)
    s.gate = Gate(s, s.args.gate)
    return s


def sft(parts, *flags, ranks=None):
    default = "sft --model - --batch 6 --draft-posts 4 --k 3 --temperature 0.8"
    return session(parts, polylora.parser(), [*default.split(), *flags], ranks=ranks)


def gradient(s, work):
    """What work(tally) leaves on the adapter: name -> tensor; and the tally."""
    tally = Tally()
    work(tally)
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
             for n, p in adapter_state(s.model).items()}
    s.model.zero_grad()
    return grads, tally


def nearly(a, b, tolerance=1e-4):
    """Two gradients agree up to rounding, measured by the largest entry of all."""
    scale = max(float(x.abs().max()) for x in b.values())
    assert scale > 0 and max(gap(a[n], b[n]) for n in b) < tolerance * scale


def visits(indices):
    return [Visit(i, 0) for i in indices]


def ce_work(s, indices):
    reply = lambda v: s.posts[v.index].replies[v.index % len(s.posts[v.index].replies)]
    return lambda tally: add_cross_entropy(s, visits(indices), reply, tally)


def d_work(s, indices):
    return lambda tally: add_diversity(s, visits(indices), 0, tally)


def logprob_sum(s, prompt, draft, temperature):
    """log pi(draft | prompt) at a temperature by a plain full forward over the real tokens, with its
    gradient."""
    out = s.model(torch.tensor([prompt + draft]))[0, len(prompt) - 1:-1, :s.model.vocab] / temperature
    return out.log_softmax(-1)[torch.arange(len(draft)), torch.tensor(draft)].sum()


def test_cross_entropy_is_the_mean_over_all_reply_tokens(parts):
    """One denominator for the step: a mean of micro-batch means weighs the tokens of long replies less."""
    s, indices = sft(parts, "--micro-tokens", "40"), [0, 1, 2, 3, 4]
    got, tally = gradient(s, ce_work(s, indices))
    replies = [(s.prompt(i), data.encode_reply(s.tokenizer, s.posts[i].replies[i % len(s.posts[i].replies)]))
               for i in indices]
    count = sum(len(r) for _, r in replies)

    def plain(_):
        (-sum(logprob_sum(s, p, r, 1.0) for p, r in replies) / count).backward()

    def means(_):
        (-sum(logprob_sum(s, p, r, 1.0) / len(r) for p, r in replies) / len(replies)).backward()
    want = gradient(s, plain)[0]
    nearly(got, want)
    with pytest.raises(AssertionError):
        nearly(gradient(s, means)[0], want, 1e-2)
    value = -sum(logprob_sum(s, p, r, 1.0).item() for p, r in replies) / count
    assert tally.means(s.ranks, ["ce"])["ce"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("gate", ["none", "likelihood"])
def test_lambda_moves_the_adapter_where_the_formula_says(parts, gate):
    """The step with lambda less the step without it is -lambda times grad of (1/P) sum_i a_i log pi(y_i):
    written out with plain forwards, log pi summed over the draft's tokens with its stop token, at the
    temperature of sampling."""
    lam = 0.7
    with_d, s = sft(parts, "--lambda", str(lam), "--gate", gate), sft(parts)
    got, plain = (gradient(x, lambda tally: sft_step(x, 0))[0] for x in (with_d, s))
    mine = batch_visits(len(s.posts), 6, 0, 4)[:4]
    prompts, samples, texts = s.sample_drafts(mine, 0, 3)
    e = s.embedder(texts)
    q = with_d.gate(mine, samples, texts)
    q = torch.ones(4, 3) if q is None else q

    def term(_):
        for p in range(4):
            delta = [[float((1 - e[p, i] @ e[p, j]) * q[p, i] * q[p, j]) for j in range(3)] for i in range(3)]
            total = (delta[0][1] + delta[0][2] + delta[1][2]) / 3
            for i, (j, l) in enumerate(((1, 2), (0, 2), (0, 1))):
                a = total - delta[j][l]                                        # D less the D of the other two
                (-lam * a * logprob_sum(s, prompts[p], samples.tokens[p][i], 0.8) / 4).backward()
    want = gradient(s, term)[0]
    nearly({n: got[n] - plain[n] for n in got}, want, 1e-3)
    if gate == "none":
        with pytest.raises(AssertionError):  # nor does D vanish beside L_quality
            nearly(got, plain, 1e-2)


def test_drafting_every_second_step_keeps_d_s_share(parts):
    """lambda means the same at every --draft-every: a drafting step counts for those without drafts."""
    def d_part(step, *flags):
        on, off = (sft(parts, *x) for x in (("--lambda", "0.5", *flags), flags))
        on, off = (gradient(x, lambda tally: sft_step(x, step))[0] for x in (on, off))
        return {n: on[n] - off[n] for n in on}
    each, second = d_part(0), d_part(0, "--draft-every", "2")
    nearly(second, {n: 2 * g for n, g in each.items()}, 1e-3)
    assert all(float(g.abs().max()) == 0 for g in d_part(1, "--draft-every", "2").values())


@pytest.mark.parametrize("budget", [1, 60, 120, 100_000])
def test_the_gradient_does_not_depend_on_the_micro_batches(parts, budget):
    """1 x 8, 2 x 4, 4 x 2: --micro-tokens saves memory and changes nothing else."""
    for k, work in ((1, ce_work), (3, d_work)):
        runs = [sft(parts, "--lambda", "1", "--micro-tokens", str(b)) for b in (100_000, budget)]
        whole, cut = (gradient(s, work(s, list(range(8))))[0] for s in runs)
        nearly(cut, whole)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_shares_of_two_ranks_add_up_to_the_whole_gradient(parts, count):
    """Each rank divides by the step's count, not its own, and draws the drafts that one process would have
    drawn."""
    for work in (ce_work, d_work):
        runs = [sft(parts, "--lambda", "1", ranks=r) for r in (Share(), Share(0, 2), Share(1, 2))]
        whole, one, two = (gradient(s, work(s, list(range(count)))) for s in runs)
        nearly({n: one[0][n] + two[0][n] for n in whole[0]}, whole[0])
        for name, (total, number) in whole[1].sums.items():
            if name != "tokens":                                               # padding differs with the cut
                parts_ = [t.sums.get(name, (0, 0)) for _, t in (one, two)]
                assert [sum(x) for x in zip(*parts_)] == pytest.approx([total, number], rel=1e-4), name


def test_drafts_are_written_without_dropout(parts):
    """Dropout in the cross-entropy passes only: drafts sampled under one mask and scored under another are
    off policy."""
    s = sft(parts, "--lambda", "1")
    for layer in lora_layers(s.model).values():
        layer.dropout = 0.5
    modes, write, ce = [], s.sample_drafts, polylora.token_logprobs
    s.sample_drafts = lambda *a: (modes.append(s.model.training), write(*a))[1]
    sft_step(s, 0)
    assert modes == [False] and not s.model.training and ce is polylora.token_logprobs


def test_the_embedder_is_frozen_centred_and_blind_to_padding_and_batch(parts):
    """Raw hidden states all point one way, pads poison a mean, and an embedder that trains along rewards
    itself."""
    s, texts = sft(parts), [["We got a kitten!", "no", ""], ["So sorry to hear of the stew.", "a b c", "no"]]
    e = s.embedder(texts)
    assert e.shape[:2] == (2, 3) and not e.requires_grad and gap(e.norm(dim=-1), torch.ones(2, 3)) < 1e-5
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


def test_the_likelihood_gate_is_the_base_s_mean_log_probability_on_people_s_scale(parts):
    """Of the base, or a policy that drifts to gibberish passes its own gate; and between what replies to
    another post score, 0, and what people's own score, 1: raw, it made D a thousandth of itself."""
    s = sft(parts)
    prompts, samples, texts = s.sample_drafts(visits([0, 5]), 0, 3)
    gate = Gate.__new__(Gate)
    gate.session, gate.name, gate.low, gate.high = s, "likelihood", -6.0, 1.0
    got = gate(visits([0, 5]), samples, texts)
    with torch.no_grad(), base(s.model):
        want = [[(float(logprob_sum(s, p, d, 0.8)) / len(d) + 6) / 7 for d in drafts]
                for p, drafts in zip(prompts, samples.tokens)]
    assert gap(got, torch.tensor(want).clamp(0, 1)) < 1e-5 and 0 < float(got.min()) < 1
    assert Gate(s, "none")(visits([0]), samples, texts) is None
    right = [[s.posts[0].replies[0], "nonsense"], ["?", s.posts[5].replies[2].upper()]]
    assert Gate(s, "verifier")(visits([0, 5]), samples, right).tolist() == [[1, 0], [0, 1]]


def test_the_gate_s_scale_is_people_s(parts):
    """0 and 1 are what the session's own replies and exchanged ones score, measured, not assumed. A
    scale that is wrong by a factor of 1,000 would leave q near 0, or near 1, for both."""
    s = sft(parts)
    s.reward = lambda posts, drafts, streams: [[
        0.002 * (t in s.posts[[p.post for p in s.posts].index(p_.post)].replies) + 0.001
        for t in ts] for p_, ts in zip(posts, drafts)]
    gate = Gate(s, "reward")
    assert (gate.low, gate.high) == (pytest.approx(0.001), pytest.approx(0.003))
    own = [[s.posts[i].replies[1], s.posts[(i + 5) % 12].replies[1]] for i in range(12)]
    q = gate(visits(range(12)), None, own)
    assert gap(q, torch.tensor([[1.0, 0.0]] * 12)) < 1e-4
    e = s.embedder(own)
    right = s.embedder([[p.replies[0], p.replies[1], p.replies[2]] for p in s.posts])
    gated = diversity(right, gate(visits(range(12)), None, [list(p.replies[:3]) for p in s.posts]))
    assert gap(gated, diversity(right)) < 1e-3 and float(diversity(e, q).max()) < 1e-3
    s.reward = lambda posts, drafts, streams: [[0.5] * len(ts) for ts in drafts]
    with pytest.raises(InputError, match="cannot tell people's replies"):
        Gate(s, "reward")


def test_a_verifier_s_reward_is_on_people_s_scale_already(parts):
    """Its scale was measured on posts whose replies were held out, where an exact verifier finds nothing right: phase
    two of train.sh --model ended there, after hours, on every file of replies by voice."""
    s = sft(parts)
    s.posts = [dataclasses.replace(post, replies=post.replies[:1], voices=post.voices[:1]) for post in s.posts]
    s.domain = data.Domain(s.posts)
    s.reward = rewards.VerifierReward(s.domain, any_voice=True)
    own = [[s.posts[i].replies[0], "nonsense"] for i in (0, 5)]
    for name in ("reward", "verifier", "auto"):
        assert Gate(s, name)(visits([0, 5]), None, own, [1, 2]).tolist() == [[1, 0], [1, 0]]
    assert Gate(s, "auto").name == "verifier"
    s.reward = rewards.VerifierReward(s.domain, any_voice=True, valid_weight=0.5)
    assert Gate(s, "reward")(visits([0, 5]), None, own, [1, 2]).tolist() == [[1, 0], [1, 0]]
    s.domain, s.stage = data.Replies([]), "grpo"
    s.reward = lambda posts, drafts, streams: [[float(t == p.replies[0]) for t in ts] for p, ts in zip(posts, drafts)]
    assert Gate(s, "auto").name == "reward"
    s.stage = "sft"
    assert Gate(s, "auto").name == "likelihood"


def test_lambda_share_holds_d_s_part_of_the_gradient(parts):
    """At every drafting step |D's part| is that share of |cross-entropy's|, and it is logged; so is the
    share that a fixed lambda happens to have."""
    flat = lambda grads: torch.cat([g.flatten() for g in grads.values()])
    for share in (0.3, 2.0):
        s, without = sft(parts, "--lambda-share", str(share)), sft(parts)
        tallies = []
        whole = flat(gradient(s, lambda _: tallies.append(sft_step(s, 0)))[0])
        plain = flat(gradient(without, lambda _: sft_step(without, 0))[0])
        assert float((whole - plain).norm() / plain.norm()) == pytest.approx(share, rel=1e-3)
        assert tallies[0].sums["D_share"][0] == pytest.approx(share, rel=1e-5)
    s, tallies = sft(parts, "--lambda", "0.7"), []
    whole = flat(gradient(s, lambda _: tallies.append(sft_step(s, 0)))[0])
    got = float((whole - plain).norm() / plain.norm())
    assert tallies[0].sums["D_share"][0] == pytest.approx(got, rel=1e-3)


def test_copies_of_a_post_within_a_step_have_streams_of_their_own(parts):
    """10 posts and a batch of 16: six groups of drafts used to be equal, draft for draft."""
    posts, tokenizer, model = parts
    s = sft((posts[:5], tokenizer, model), "--batch", "12", "--temperature", "2")
    batch = batch_visits(5, 12, 0, 4)
    assert len(set(batch)) == 12 and len({v.index for v in batch}) == 5
    _, samples, _ = s.sample_drafts(batch, 0, 3)
    assert len({str(d) for d in samples.tokens}) == 12
    assert len({s.stream("reply", 0, v) for v in batch}) == 12


def test_random_streams_hang_on_the_post_not_on_its_id(parts):
    """Four posts called 'None' had one stream of drafts and one reader; and an id that a joined file changes
    must change nothing."""
    posts, tokenizer, model = parts
    batch, drafts = visits(range(4)), []
    for name in (lambda p: "None", lambda p: p.id, lambda p: f"copy-{p.id}"):
        named = [dataclasses.replace(p, id=name(p)) for p in posts[:4]]
        s = sft((named, tokenizer, model))
        for purpose in ("reader", "reply", "sft"):
            assert len({s.stream(purpose, 0, v) for v in batch}) == 4
        drafts.append(s.sample_drafts(batch, 0, 3)[1].tokens)
    assert drafts[0] == drafts[1] == drafts[2]


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# ---- The command line ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(parts, tmp_path_factory):
    """--model and --data flags of a tiny checkpoint and a file of posts."""
    folder = tmp_path_factory.mktemp("files")
    posts, tokenizer, model = parts
    model.save_pretrained(folder / "model")
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    data.save_posts(posts, folder / "posts.jsonl")
    return ["--model", str(folder / "model"), "--data", str(folder / "posts.jsonl")]


def test_an_sft_run_from_the_command_line_resumes_bit_for_bit(files, tmp_path):
    """The whole phase, broken off in its fifth step and resumed: the adapter is the uninterrupted run's in
    every bit."""
    small = ("--steps 6 --batch 4 --lambda 0.5 --k 3 --draft-posts 2 --max-new-tokens 5 --rank 2 "
             "--dropout 0.2 --save-every 2 --max-rows 4").split()
    whole = whole_and_cut(command(polylora.main, tmp_path, "sft", *files, *small), polylora, "sft_step", 4)["adapter"]
    assert all(float(x.abs().max()) > 0 for x in whole.values())
    assert [x["step"] for x in metrics(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6, 6]


WRONG = ["--model nowhere/at/all", "--lambda 0.3 --k 1", "--lambda -1", "--lambda 1 --temperature 0",
         "--lambda 1 --draft-every 0", "--lambda 1 --draft-posts 0", "--lambda 1 --max-new-tokens 0",
         "--rank -2", "--batch 0", "--batch -4", "--steps -3", "--steps 0 --epochs -1", "--save-every 0",
         "--lr -0.1", "--beta2 2", "--dropout 2", "--lr nan", "--lr inf", "--clip nan", "--clip 0",
         "--lambda nan", "--lambda 1 --temperature nan", "--steps 0 --epochs nan", "--device nowhere"]
WRONG_BASE = ["--heads 0", "--heads 1", "--heads 5", "--hidden 30", "--hidden 0", "--layers 0", "--vocab 0"]


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_flag_is_one_sentence_and_exit_code_2(files, tmp_path, capsys, flags):
    """A traceback after minutes of loading, or a run of nothing that calls itself done, is not an answer."""
    out = ["--out", str(tmp_path / "run"), "--steps", "2", "--batch", "2"]
    code = polylora.main(["sft", *files, *out, *flags.split()])
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code == 2 and len(said) == 1 and said[0].startswith("error: ")
    assert not (tmp_path / "run").exists()  # found before anything is written


@pytest.mark.parametrize("flags", WRONG_BASE)
def test_a_shape_that_is_no_qwen3_is_one_sentence_and_exit_code_2(files, tmp_path, capsys, flags):
    """Half as many key/value heads as heads, and an even head_dim, or nothing fits."""
    small = "--steps 1 --batch 2 --hidden 32 --layers 1 --heads 4 --vocab 300"
    code = polylora.main(["base", *files[2:], "--out", str(tmp_path / "run"), *small.split(), *flags.split()])
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code == 2 and len(said) == 1 and not (tmp_path / "run").exists()


def test_a_held_out_reply_is_the_first_and_the_post_keeps_the_others():
    post = data.Post("a", "post", ("one", "two", "three"), ("x", "y", "z"), "intent")
    rest, reply = polylora.held_out(post)
    assert (rest.replies, reply, rest.voices, rest.intent) == (("two", "three"), "one", (), "intent")
    alone, reply = polylora.held_out(data.Post("a", "post", ("one",)))
    assert alone.replies == ("one",) and reply == "one"                        # a single reply is kept
    with pytest.raises(data.InputError, match="no reply"):
        polylora.held_out(data.Post("a", "post", ()))
