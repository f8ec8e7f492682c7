"""Tests of methods/ensemble.py."""

from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
import polylora
from engine import generate
from helpers import SHORT, THREE_PROMPTS, gap, places, refusal, sft_args, shake_all, with_adapter
from lora import adapter_state, lora_layers
from model import pack, token_logprobs
from support import registry
from support.steplog import Tally
from trainer import Visit, add_cross_entropy


# ---- Drafts --------------------------------------------------------------------------------------

def test_ensemble_member_i_mod_m_writes_completion_i():
    """Each draft's log-probabilities are its member's own, by a model that holds that member
    alone."""
    model = shake_all(with_adapter("ensemble"), 1.0)
    samples = generate(model, THREE_PROMPTS, k=5, max_new_tokens=4, seed=2)
    for member in range(3):
        alone = with_adapter("lora", seed=0)
        for name, layer in lora_layers(alone).items():
            A, B = (lora_layers(model)[name].get_parameter(path) for path in layer.trains)
            layer.lora_A.weight.data, layer.lora_B.weight.data = A[4 * member:4 * member
                                                                   + 4], B[:,
                                                                           4 * member:4 * member
                                                                           + 4]
        for p, prompt in enumerate(THREE_PROMPTS):
            for d in range(5):
                rows, = pack([(prompt, [samples.tokens[p][d]])], 100)
                with torch.no_grad():
                    off = gap(token_logprobs(alone, rows)[0], torch.tensor(samples.logprobs[p][d]))
                assert (off < 1e-4) == (d % 3 == member), (member, d, off)


def test_every_member_learns_from_every_reply():
    """The step's gradient on a member is its own LoRA's over M, and on no row another member's."""
    groups = [([1, 2, 3], [[4, 5, 6]]), ([7, 8], [[9, 10]])]

    def gradient(model):
        replies = [completions[0] for _, completions in groups]
        session = SimpleNamespace(
            model=model, ranks=SimpleNamespace(rank=0, world=1), tokenizer=None,
            prompt=lambda i: groups[i][0],
            micro_batches=lambda pairs: pack(pairs, 60, members=model.members))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "encode_reply", lambda tokenizer, reply: reply)
            add_cross_entropy(session, [Visit(0, 0), Visit(1, 0)], replies, tally := Tally())
        return {n: p.grad for n, p in adapter_state(model).items()}, tally
    ensemble = shake_all(with_adapter("ensemble"))
    grads, tally = gradient(ensemble)
    # the mean is over all members' tokens
    assert tally.sums["ce"][1] == 3 * 5
    for member in range(3):
        alone = with_adapter("lora", seed=0)
        for name, layer in lora_layers(alone).items():
            A, B = (lora_layers(ensemble)[name].get_parameter(path).detach()
                    for path in layer.trains)
            layer.lora_A.weight.data, layer.lora_B.weight.data = A[4 * member:4 * member
                                                                   + 4], B[:,
                                                                           4 * member:4 * member
                                                                           + 4]
        for name, grad in gradient(alone)[0].items():
            own = (grads[name][4 * member:4 * member + 4] if "lora_A" in name
                   else grads[name][:, 4 * member:4 * member + 4])
            assert gap(3 * own, grad) < 1e-4 * max(1, float(grad.abs().max()))


def test_rows_of_an_ensemble_hold_one_member_each():
    groups = [([1, 2], [[3], [4, 5], [6], [7, 8, 9]]), ([1], [[2, 3]])]
    rows = pack(groups, 100, members=3)
    assert sorted(d for r in rows for d in r.completion.unique().tolist()) == [0, 1, 2, 3, 4]
    for r in rows:
        for b in range(len(r.tokens)):
            of_row = r.completion[(r.predict // r.tokens.shape[1]) == b].unique().tolist()
            assert {(0, 1, 2, 0, 0)[d] for d in of_row} == {int(r.member[b])}
    assert pack(groups, 100)[0].member is None


# ---- Drafts chosen by a reward -------------------------------------------------------------------

@pytest.mark.slow
def test_an_ensemble_is_for_plain_sampling(root, capsys):
    """Other decoders' drafts were of one member and scored by another (by .9 in a
    log-probability)."""
    w = places(root)
    assert polylora.main(sft_args(w, "many", "--adapter", "ensemble", "--members", "2")) == 0
    for name in set(registry.DECODERS) - {"sampling"}:
        assert "ensemble" in refusal(capsys, evaluate.main, "drafts", root / "many", "hello",
                                     "--decoder", name), name
    assert "ensemble" in refusal(capsys, evaluate.main, "measure", root / "many",
                                 "--data", w["eval"], "--n", "10",
                                 "--decoder", "mmi", *SHORT)
