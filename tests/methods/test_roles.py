"""Tests of methods/roles.py."""

import json
import shutil
from types import SimpleNamespace

import torch

import evaluate
from data import decode
from helpers import sft_session, visits
from methods.roles import in_roles, role_prompt


def test_the_i_th_of_a_set_is_asked_for_in_role_i_and_scored_by_it(parts):
    s = sft_session(parts)
    s.args = SimpleNamespace(**vars(s.args) | {"set_size": 3})
    some = visits([0, 4])
    samples, texts = in_roles(s, some, 7)
    assert [len(group) for group in texts] == [6, 6]                      # two whole sets
    assert len({tuple(ids) for ids in samples.tokens[0]}) > 1
    for visit, group, logprobs in zip(some, samples.tokens, samples.logprobs):
        for place, (ids, logp) in enumerate(zip(group, logprobs)):
            prompt = role_prompt(s, visit, place % 3 + 1)
            assert f"You are role {place % 3 + 1}." in decode(s.tokenizer, prompt)
            logits = s.model(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1:-1]
            logits = logits[:, :s.model.vocab] / s.args.temperature
            want = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(logp), want, atol=1e-3)


def test_its_sets_are_joint(world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world["lora"], run)
    assert evaluate.main(["measure", str(run), "--data", world["eval"], "--n", "11",
                          "--max-new-tokens", "4", "--decoder", "roles"]) == 0
    written = json.loads((tmp_path / "run@roles" / "evaluation.json").read_text())
    assert written["settings"]["decoding"]["independent"] is False
    assert all(len(r["drafts"]) == 10 and r["set"] == 5 for r in written["records"])
