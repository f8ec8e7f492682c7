"""Tests of trainer.py."""

import dataclasses
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import data
import grpo
from helpers import (
    Share, metrics, sft, tiny_bert, tiny_config, tiny_weights, toy_args, toy_run, visits,
    write_checkpoint, write_json,
)
from methods.bert import Bert, BertEmbedder
from model import Qwen3
from support.files import InputError
from support.steplog import Tally
from trainer import Session, Visit, batch_visits, learning_rate, load_embedder, train


# ---- The SFT step, on a real session around a tiny model -----------------------------------------

def test_copies_of_a_post_within_a_step_have_their_own_seeds(parts):
    """10 posts and a batch of 16: six groups of drafts used to be equal, draft for draft."""
    posts, tokenizer, model = parts
    s = sft((posts[:5], tokenizer, model), "--batch", "12", "--temperature", "2")
    batch = batch_visits(5, 12, 0, 4)
    assert len(set(batch)) == 12 and len({v.index for v in batch}) == 5
    _, samples, _ = s.sample_completions(batch, 0, 3)
    assert len({str(d) for d in samples.tokens}) == 12
    assert len({s.seed_for("reply", 0, v) for v in batch}) == 12


def test_seeds_depend_on_the_post_not_on_its_id(parts):
    """Four posts called 'None' had one stream of drafts and one reader; and an id that a joined
    file changes must change nothing."""
    posts, tokenizer, model = parts
    batch, completions = visits(range(4)), []
    for name in (lambda p: "None", lambda p: p.id, lambda p: f"copy-{p.id}"):
        named = [dataclasses.replace(p, id=name(p)) for p in posts[:4]]
        s = sft((named, tokenizer, model))
        for purpose in ("reader", "reply", "sft"):
            assert len({s.seed_for(purpose, 0, v) for v in batch}) == 4
        completions.append(s.sample_completions(batch, 0, 3)[1].tokens)
    assert completions[0] == completions[1] == completions[2]


# ---- What both phases share ----------------------------------------------------------------------

def test_batches_hold_every_post_once_an_epoch_in_a_new_order():
    """Sampling with replacement leaves a third of the posts out of an epoch; a batch may
    straddle two epochs."""
    every = [v for step in range(9) for v in batch_visits(10, 4, step, seed=3)]
    seen = [v.index for v in every]
    epochs = [seen[i:i + 10] for i in range(0, 30, 10)]
    assert [v.epoch for v in every] == [i // 10 for i in range(36)] and len(set(every)) == 36
    indices = lambda *a: [v.index for v in batch_visits(*a)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and len(set(map(tuple, epochs))) == 3
    assert indices(10, 4, 2, 3) == seen[8:12] != indices(10, 4, 2, 4)
    assert sorted(indices(3, 7, 0, 0)) == sorted([0, 1, 2] * 2 + [indices(3, 1, 6, 0)[0]])


def test_learning_rate_table():
    """Warm-up must not begin at zero, which wastes a step, and the cosine must end near zero,
    not at its peak."""
    got = [learning_rate(s, 12, 2.0, 2, "cosine") for s in range(12)]
    want = [1.0, 2.0] + [1 + math.cos(math.pi * i / 10) for i in range(10)]
    assert got == pytest.approx(want) and got[2] == 2.0 and 0 < got[-1] < 0.1
    assert [learning_rate(s, 12, 2.0, 4, "constant") for s in (0, 3, 4, 11)] == [0.5, 2, 2, 2]
    assert (learning_rate(0, 1, 2.0, 0, "cosine") == 2.0 and learning_rate(0, 5, 2.0, 10, "cosine")
            == 0.2)


def test_means_are_of_sums_not_of_means():
    """Micro-batches of 1 and 3 tokens with means 2 and 0.2: the mean over tokens is 0.65, that
    of the means is 1.1."""
    tally = Tally()
    tally.add("loss", torch.tensor(2.0), 1)
    tally.add("loss", 0.6, 3)
    assert tally.means(Share(), ["loss", "never"]) == pytest.approx({"loss": 0.65})
    assert tally.means(Share(totals=[[2.6 + 1.4, 4 + 4]]), ["loss"]) == pytest.approx({"loss": 0.5})


# ---- The run folder and the loop -----------------------------------------------------------------

def test_the_gradient_is_clipped_and_broken_ones_are_skipped_and_stop_the_run(tmp_path,
                                                                              monkeypatch):
    """A single NaN step would poison every weight after it; the logged norm is the one before
    clipping."""
    args = toy_args(tmp_path / "a", steps=1, clip=0.5)
    s, params, step_fn = toy_run(args)
    seen, step = [], torch.optim.AdamW.step
    norm = lambda: torch.cat([p.grad.flatten() for p in params]).norm()
    monkeypatch.setattr(torch.optim.AdamW, "step",
                        lambda self, *a: (seen.append(norm()), step(self, *a))[1])
    train(s, params, step_fn, ["loss"])
    assert (float(seen[0]) == pytest.approx(0.5, rel=1e-4)
            and metrics(tmp_path / "a")[0]["grad_norm"] > 2)

    s, params, good = toy_run(toy_args(tmp_path / "b"))
    broken_steps = {2, 3, 5}

    def sometimes(step):
        tally = good(step)
        if step in broken_steps:
            params[1].grad[0, 0] = math.nan
        return tally
    before = []
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda self, **k: (
        before.append([p.detach().clone() for p in params]),
        [setattr(p, "grad", None) for p in params])[1])
    summary = train(s, params, sometimes, ["loss"])
    assert summary["skipped"] == 3 and len(before) == 10
    for step in range(1, 10):
        moved = not all(torch.equal(a, b) for a, b in zip(before[step], before[step - 1]))
        assert moved == (step not in broken_steps)
    assert [x["grad_norm"] is None for x in metrics(tmp_path / "b")[:-1]] == [
        step in broken_steps for step in range(10)]

    s, params, good = toy_run(toy_args(tmp_path / "loss"))
    start = [p.detach().clone() for p in params]

    def endless(step):
        tally = good(step)                   # a gradient that looks sound
        tally.add("loss", math.inf if step % 2 else math.nan)
        return tally
    with pytest.raises(InputError, match="not finite five times"):
        train(s, params, endless, ["loss"])
    assert all(torch.equal(p, b) for p, b in zip(params, start))
    assert [x["grad_norm"] for x in metrics(tmp_path / "loss")] == [None] * 5 and "NaN" not in (
        tmp_path / "loss" / "metrics.jsonl").read_text()

    s, params, good = toy_run(toy_args(tmp_path / "c"))

    def broken(step):
        (params[0].sum() + params[1].sum() * math.nan).backward()
        s.visits = [Visit(1, 0), Visit(2, 0)]
        return Tally()
    start = [p.detach().clone() for p in params]
    with pytest.raises(InputError, match="step 5 .*not finite five times .*post-1, post-2"):
        train(s, params, broken, [])
    assert all(torch.equal(p, b) for p, b in zip(params, start))


TEMPLATE = ("{%- for m in messages %}{%- if loop.first and m.role != 'system' %}{{- "
            "'<|im_start|>system\nBe brief.<|im_end|>\n' }}"
            "{%- endif %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- "
            "endfor %}"
            "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")


# ---- A session -----------------------------------------------------------------------------------

def test_a_session_takes_stops_and_chat_format_from_the_model(world, tmp_path):  # noqa: F811
    """M8, F2, G5, R16: padding rows could be sampled, one stop be forgotten, the policy be asked
    in another's format."""
    folder = tmp_path / "model"
    shutil.copytree(world["model"], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    args = grpo.parser().parse_args(["--start", "-", "--model", str(folder),
                                     "--data", world["grpo"], "--out", str(tmp_path / "o")])
    s = Session(args, "grpo")
    s.load()
    assert s.model.vocab == data.vocabulary(s.tokenizer) < s.model.config.vocab_size
    assert set(s.stops) == {s.tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")}
    asked = s.tokenizer.decode(s.prompt(0), skip_special_tokens=False)
    assert (asked.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
            and "<think>" not in asked)
    s.ranks.close()


def test_stops_are_the_turn_s_end_and_the_text_s_end(parts):
    """A chat ends by <|im_end|>, a base by <|endoftext|>: with one of them the other writes on
    to the limit."""
    tokenizer = parts[1]
    assert set(data.stop_ids(tokenizer)) == {tokenizer.token_to_id("<|im_end|>"),
                                             tokenizer.token_to_id("<|endoftext|>")}
    think = tokenizer.token_to_id("<think>")
    # no special token
    assert data.decode(tokenizer, [think, *data.encode_reply(tokenizer, "yes")]) == "<think>yes"


WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh", "<|endoftext|>"]

TEXTS = ["a b c", "d", "e f g h a b c d e f g h"]

ROOT = "sentence_transformers.models."


def tokenizer():
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]",
                                                        special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return made


def dense(folder, activation="torch.nn.modules.activation.Tanh", bias=True, seed=0, width=24, out=8,
          **changes):
    """A Dense module's folder; returns its weight and bias."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    tensors = {"linear.weight": torch.randn(out, width, generator=draw)}
    if bias:
        tensors["linear.bias"] = torch.randn(out, generator=draw)
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {"in_features": width, "out_features": out, "bias": bias,
                                        "activation_function": activation} | changes)
    return tensors["linear.weight"], tensors.get("linear.bias", torch.zeros(out))


def bert(folder, modules=("Pooling",), pooling=None, **files):
    """A BERT embedder's folder with these modules behind its transformer."""
    write_checkpoint(folder, *tiny_bert())
    tokenizer().save(str(folder / "tokenizer.json"))
    entries = [{"idx": 0, "name": "0", "path": "", "type": ROOT + "Transformer"}]
    entries += [{"idx": i, "name": str(i), "path": f"{i}_{kind}", "type": ROOT + kind}
                for i, kind in enumerate(modules, 1)]
    write_json(folder / "modules.json", entries)
    for i, kind in enumerate(modules, 1):
        (folder / f"{i}_{kind}").mkdir(exist_ok=True)
        if kind == "Pooling":
            settings = {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True,
                        "pooling_mode_cls_token": False}
            write_json(folder / f"{i}_Pooling" / "config.json", settings if pooling is None
                       else pooling)
    for name, value in files.items():
        write_json(folder / f"{name}.json", value)
    return folder


def load(folder):
    """The Embedder that --embedder FOLDER makes."""
    session = SimpleNamespace(args=SimpleNamespace(embedder=str(folder), dtype="float32"), run=None,
                              ranks=SimpleNamespace(device=torch.device("cpu")))
    load_embedder(session)
    return session.embedder


def means(folder, texts):
    """The plain mean of the encoder's states, text by text."""
    model = Bert.from_pretrained(folder)
    ids = [tokenizer().encode(text).ids for text in texts]
    return torch.cat([model(torch.tensor([i]), torch.tensor([len(i)])) for i in ids])


@pytest.fixture()
def plain(tmp_path):
    return means(bert(tmp_path / "plain"), TEXTS)


def close(a, b):
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


# ---- Modules -------------------------------------------------------------------------------------

@pytest.mark.parametrize("activation, function", [
    ("torch.nn.modules.activation.Tanh", torch.tanh),
    ("torch.nn.modules.linear.Identity", lambda x: x),
    ("torch.nn.modules.activation.ReLU", F.relu), ("torch.nn.modules.activation.GELU", F.gelu)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_module_is_applied(activation, function, bias, tmp_path, plain):
    weight, offset = dense(tmp_path / "a" / "2_Dense", activation, bias)
    embedder = load(bert(tmp_path / "a", ["Pooling", "Dense"]))
    want = function(plain @ weight.T + offset)
    assert close(embedder.vectors(TEXTS), want)
    assert close(embedder([TEXTS])[0], F.normalize(want, dim=-1))


def test_modules_are_applied_in_their_order(tmp_path, plain):
    (first, a), (second, b) = dense(tmp_path / "a" / "2_Dense"), dense(tmp_path / "a" / "4_Dense",
                                                                       seed=1, width=8, out=5)
    embedder = load(bert(tmp_path / "a", ["Pooling", "Dense", "Normalize", "Dense"]))
    inner = F.normalize(torch.tanh(plain @ first.T + a), dim=-1)
    assert close(embedder.vectors(TEXTS), torch.tanh(inner @ second.T + b))


def test_a_bert_alone_knows_its_modules(tmp_path):
    """Embedder on Bert.from_pretrained, without load_embedder."""
    dense(tmp_path / "2_Dense")
    model = Bert.from_pretrained(bert(tmp_path, ["Pooling", "Dense"]))
    assert BertEmbedder(model, tokenizer()).vectors(TEXTS).shape == (3, 8)


@pytest.mark.parametrize("kind", ["Normalize", "Dropout"])
def test_modules_that_change_no_direction_are_read(kind, tmp_path, plain):
    assert close(load(bert(tmp_path / "a", ["Pooling", kind]))([TEXTS])[0],
                 F.normalize(plain, dim=-1))


@pytest.mark.parametrize("kind", ["LayerNorm", "CNN", "LSTM", "WeightedLayerPooling", "Router"])
def test_other_modules_are_refused_by_their_type(kind, tmp_path):
    with pytest.raises(InputError, match=f"module of type '{kind}'"):
        load(bert(tmp_path, ["Pooling", kind]))


@pytest.mark.parametrize("entry, match", [
    ({"type": "custom_st.Transformer", "path": ""}, "code of its own"),
    ({"type": ROOT + "Dense", "path": "../x"}, "'../x'"),
    ({"type": ROOT + "Transformer", "path": "0_Transformer"}, "begin with a Transformer"),
    ({"type": 3}, "type and path"), (3, "type and path")],
    ids=str)
def test_modules_elsewhere_or_of_others_code_are_refused(entry, match, tmp_path):
    folder = bert(tmp_path)
    write_json(folder / "modules.json", [entry])
    with pytest.raises(InputError, match=match):
        load(folder)


@pytest.mark.parametrize("changes, match", [
    ({"activation_function": "torch.nn.modules.activation.Softplus"}, "activation 'Softplus'"),
    ({"use_residual": True}, "use_residual"),
    ({"out_features": 9}, "does not fit"), ({"in_features": 9}, "does not fit"),
    ({"bias": False}, "about the bias")], ids=str)
def test_a_dense_module_that_cannot_be_applied_is_refused(changes, match, tmp_path):
    dense(tmp_path / "2_Dense")
    folder = bert(tmp_path, ["Pooling", "Dense"])
    written = {"in_features": 24, "out_features": 8, "bias": True,
               "activation_function": "torch.nn.modules.activation.Tanh"}
    write_json(folder / "2_Dense" / "config.json", written | changes)
    with pytest.raises(InputError, match=match):
        load(folder)


def test_a_dense_module_in_another_format_says_how_to_convert_it(tmp_path):
    dense(tmp_path / "2_Dense")
    (tmp_path / "2_Dense" / "model.safetensors").rename(tmp_path / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(InputError, match="only safetensors.*SentenceTransformer"):
        load(bert(tmp_path, ["Pooling", "Dense"]))


def test_a_dense_module_with_nan_is_refused(tmp_path):
    weight, offset = dense(tmp_path / "2_Dense")
    weight[0, 0] = float("nan")
    save_file({"linear.weight": weight, "linear.bias": offset},
              tmp_path / "2_Dense" / "model.safetensors")
    with pytest.raises(InputError, match="linear.weight.*not finite"):
        load(bert(tmp_path, ["Pooling", "Dense"]))


# ---- Texts ---------------------------------------------------------------------------------------

def test_a_text_is_cut_at_max_seq_length(tmp_path):
    """Its last mark stays, as tokenizers cut: all-MiniLM-L6-v2 reads 256 tokens of its 512
    positions."""
    folder = bert(tmp_path / "a",
                  sentence_bert_config={"max_seq_length": 7, "do_lower_case": False})
    cut = ["a b c", "d", "e f g h a"]        # with [CLS] and [SEP] the last has 7 tokens
    assert close(load(folder).vectors(TEXTS), means(folder, cut))


def test_without_max_seq_length_the_tokenizer_s_limit_counts(tmp_path):
    for name, config, cut in (("a", {"model_max_length": 7}, "e f g h a"),
                              ("b", {"model_max_length": int(1e30)}, TEXTS[2])):
        folder = bert(tmp_path / name, tokenizer_config=config,
                      sentence_bert_config={"max_seq_length": None})
        assert close(load(folder).vectors(TEXTS[2:]), means(folder, [cut]))
    folder = bert(tmp_path / "c", tokenizer_config={"model_max_length": 5},
                  sentence_bert_config={"max_seq_length": 7})
    assert close(load(folder).vectors(TEXTS[2:]), means(folder, ["e f g h a"]))


@pytest.mark.parametrize("length", [0, 2, -1, "7", 7.5, True])
def test_a_limit_that_is_none_is_refused(length, tmp_path):
    with pytest.raises(InputError, match="max_seq_length"):
        load(bert(tmp_path, sentence_bert_config={"max_seq_length": length}))


def test_lower_case_and_a_default_prompt_are_applied(tmp_path):
    folder = bert(tmp_path / "a",
                  sentence_bert_config={"max_seq_length": 32, "do_lower_case": True})
    assert close(load(folder).vectors(["A B c"]), means(folder, ["a b c"]))
    prompts = {"prompts": {"query": "h g ", "document": ""}, "default_prompt_name": "query"}
    folder = bert(tmp_path / "b", config_sentence_transformers=prompts)
    assert close(load(folder).vectors(["a"]), means(folder, ["h g a"]))
    folder = bert(tmp_path / "c", config_sentence_transformers=prompts
                  | {"default_prompt_name": None})
    assert close(load(folder).vectors(["a"]), means(folder, ["a"]))
    with pytest.raises(InputError, match="default prompt"):
        load(bert(tmp_path / "d", config_sentence_transformers=prompts
                  | {"default_prompt_name": "other"}))
    mean = {"pooling_mode_mean_tokens": True, "include_prompt": False}
    with pytest.raises(InputError, match="include_prompt"):
        load(bert(tmp_path / "e", pooling=mean, config_sentence_transformers=prompts))


# ---- Pooling -------------------------------------------------------------------------------------

@pytest.mark.parametrize("pooling", [{"pooling_mode_mean_tokens": True}, {"pooling_mode": "mean"},
                                     {"pooling_mode": ["mean"]},
                                     {"pooling_mode_mean_tokens": True,
                                      "pooling_mode_max_tokens": False}], ids=str)
def test_the_mean_is_read_however_it_is_written(pooling, tmp_path, plain):
    assert close(load(bert(tmp_path / "a", pooling=pooling)).vectors(TEXTS), plain)


@pytest.mark.parametrize("pooling", [
    {"pooling_mode_cls_token": True},
    {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, {"pooling_mode": "cls"},
    {"pooling_mode": ["mean", "max"]}, {"pooling_mode_weightedmean_tokens": True},
    {"pooling_mode_mean_sqrt_len_tokens": True}, {}], ids=str)
def test_other_poolings_are_refused(pooling, tmp_path):
    """Two at once are put side by side: twice the numbers."""
    with pytest.raises(InputError, match="only the mean of tokens"):
        load(bert(tmp_path, pooling=pooling))


# ---- Qwen3-Embedding -----------------------------------------------------------------------------

def qwen(folder, pooling="pooling_mode_lasttoken", modules=("Pooling",), **files):
    config = tiny_config(True, vocab_size=41, hidden_size=24, intermediate_size=32,
                         num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    write_checkpoint(folder, config, tiny_weights(config, 3, prefix="", head=None))
    tokenizer().save(str(folder / "tokenizer.json"))
    entries = [{"path": "", "type": ROOT + "Transformer"}]
    entries += [{"path": f"{i}_{kind}", "type": ROOT + kind} for i, kind in enumerate(modules, 1)]
    write_json(folder / "modules.json", entries)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", {pooling: True})
    for name, value in files.items():
        write_json(folder / f"{name}.json", value)
    return folder


def last_states(folder, texts):
    model = Qwen3.from_pretrained(folder, dtype=torch.float32)
    ids = [[*tokenizer().encode(text, add_special_tokens=False).ids, WORDS.index("<|endoftext|>")]
           for text in texts]
    return torch.cat([model.last_hidden(torch.tensor([i]), torch.tensor([len(i)])) for i in ids])


def test_a_qwen3_embedder_s_folder_is_followed_too(tmp_path):
    weight, offset = dense(tmp_path / "a" / "2_Dense")
    folder = qwen(tmp_path / "a", modules=("Pooling", "Dense"),
                  sentence_bert_config={"max_seq_length": 5})
    want = torch.tanh(last_states(folder, ["a b c", "d", "e f g h"]) @ weight.T + offset)
    assert close(load(folder).vectors(TEXTS), want)
    plain = qwen(tmp_path / "b", modules=("Pooling", "Normalize"))
    assert close(load(plain)([TEXTS])[0], F.normalize(last_states(plain, TEXTS), dim=-1))


def test_a_qwen3_embedder_pooled_otherwise_is_refused(tmp_path):
    with pytest.raises(InputError, match="only the last token"):
        load(qwen(tmp_path, pooling="pooling_mode_mean_tokens"))


def test_an_embedder_that_is_neither_is_named(tmp_path):
    folder = bert(tmp_path)
    write_json(folder / "config.json", {"model_type": "roberta"})
    with pytest.raises(InputError, match="'roberta' model.*Qwen3-Embedding"):
        load(folder)
