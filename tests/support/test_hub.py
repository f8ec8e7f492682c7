"""Tests of support/hub.py."""

import hashlib
import json
import random
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import file_download
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import data
import model
import polylora
from helpers import (
    TOKENS, load_tiny, loads_or_says_why, places, refusal, sft_args, tiny_bert, tiny_config,
    tiny_qwen, tiny_weights, write_checkpoint, write_json, written,
)
from methods.bert import Bert
from model import Config, Qwen3
from support.files import InputError
from support import hub


# ---- Hostile files -------------------------------------------------------------------------------

def test_mutated_weights_give_one_sentence_errors(tmp_path):
    """Bytes changed in the header, lengths that lie, a file that broke off."""
    written(tmp_path)
    path, rng = tmp_path / "model.safetensors", random.Random(1)
    good = path.read_bytes()
    head = 8 + int.from_bytes(good[:8], "little")
    refused = 0
    for number in range(100):
        bad = bytearray(good)
        for _ in range(rng.choice((1, 3))):
            bad[rng.randrange(head)] = rng.randrange(256)
        if number % 10 == 0:
            bad = bad[:rng.randrange(len(bad))]
        path.write_bytes(bad)
        refused += loads_or_says_why(tmp_path) is not None
    assert refused > 80


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float8_e5m2,
                                   torch.complex64])
def test_weights_are_numbers_with_a_fraction(tmp_path, dtype):
    """Whole numbers of the right shape would be read as weights, without a word; refused from
    the header, in an adapter as well."""
    config = written(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = tiny_weights(config, 3)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = torch.zeros(tensors[name].shape, dtype=dtype)
    save_file(tensors, path)
    for read in (hub.tensor_shapes, hub.read_tensors):
        with pytest.raises(InputError, match="up_proj.weight' is stored as"):
            read(tmp_path)
    assert "is stored as" in loads_or_says_why(tmp_path)


def test_an_index_names_no_file_elsewhere(tmp_path):
    """A checkpoint could have read any file of the user's."""
    written(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "/etc/passwd",
                 ".."):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert "same folder" in loads_or_says_why(tmp_path / "model")
    (tmp_path / "model" / "link.safetensors").symlink_to("../outside.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "link.safetensors"}}))
    assert "link to another folder" in loads_or_says_why(tmp_path / "model")
    for value in ([], {"weight_map": []}, {"weight_map": {}}, {}):
        index.write_text(json.dumps(value))
        assert "weight_map" in loads_or_says_why(tmp_path / "model")


def test_no_pickle_and_no_code_of_others_is_ever_loaded():
    root = Path(model.__file__).parent
    paths = sorted(p for p in root.rglob("*.py")
                   if p.relative_to(root).parts[0] in (p.name, "methods", "report", "support"))
    assert len(paths) > 12
    for path in paths:
        source = path.read_text(encoding="utf-8").replace(".eval(", "").replace("no pickle", "")
        if path.name == "sandbox.py":        # whose work it is, behind its walls
            source = source.replace("exec(compile(", "").replace("__import__(name)", "")
        for word in ("torch.load", "pickle", "trust_remote_code", "eval(", "exec(", "marshal",
                     "shelve", "__import__",
                     "os.system", "shell=True"):
            assert word not in source, (path, word)


# ---- Configuration and files ---------------------------------------------------------------------

LAYER = "model.layers.1.self_attn."

TENSORS = {"missing norm": (LAYER + "q_norm.weight", None),
           "wrong norm": (LAYER + "k_norm.weight", (48,)),
           "missing head": ("lm_head.weight", None),
           "missing embedding": ("model.embed_tokens.weight", None),
           "unknown bias": (LAYER + "q_proj.bias", (96,)),
           "transposed": (LAYER + "o_proj.weight", (96, 48)),
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
        load_tiny(tmp_path, False, change=change, shards=shards)


def test_a_missing_or_broken_shard_is_named(tmp_path):
    load_tiny(tmp_path, False, shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=shard.name):
        Qwen3.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        Qwen3.from_pretrained(tmp_path)


# ---- Large and hostile files ---------------------------------------------------------------------

def test_a_tokenizer_is_checked_before_it_is_used(tmp_path, tokenizer):
    """Ids beyond the model's rows were an index error in the first step, a missing mark a None
    among ids; padding of 10^9 is memory, and cutting drops the end of a post without a word."""
    def written(change, rows=None):
        value = json.loads(tokenizer.to_str())
        change(value)
        (tmp_path / "tokenizer.json").write_text(json.dumps(value))
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": rows
                                                          or tokenizer.get_vocab_size()}))
        found = data.load_tokenizer(tmp_path)
        data.check_chat(found, tmp_path)
        return found
    written(lambda v: None)
    (tmp_path / "config.json").write_text("[1]")
    # the model says what is wrong there
    assert data.load_tokenizer(tmp_path).get_vocab_size() == tokenizer.get_vocab_size()
    with pytest.raises(InputError, match="of different checkpoints"):
        written(lambda v: None, rows=tokenizer.get_vocab_size() - 1)
    with pytest.raises(InputError, match="of different checkpoints"):
        written(lambda v: v["model"]["vocab"].update(zzz=2 ** 31))
    with pytest.raises(InputError, match="no token <.im_end.>"):
        written(lambda v: v["added_tokens"].__setitem__(2,
                                                        v["added_tokens"][2]
                                                        | {"content": "<|end|>"}), rows=999)
    with pytest.raises(InputError, match="does not give a text back"):
        written(lambda v: v.update(normalizer={"type": "Lowercase"}))
    cut = written(lambda v: v.update(truncation={"direction": "Right", "max_length": 3,
                                                 "strategy": "LongestFirst", "stride": 0},
                                     padding={"strategy": {"Fixed": 9}, "direction": "Right",
                                              "pad_to_multiple_of": None,
                                              "pad_id": 0, "pad_type_id": 0,
                                              "pad_token": "<|endoftext|>"}))
    assert cut.encode("a much longer text than that").ids == tokenizer.encode("a much longer text "
                                                                              "than that").ids
    assert len(cut.encode("a").ids) == 1


# ---- Files that stand in the way -----------------------------------------------------------------

def test_a_checkpoint_written_over_a_sharded_one_is_the_one_that_is_read(tmp_path):
    """The old index stayed, and with it the old weights."""
    model = tiny_qwen(tie=True)
    model.save_pretrained(tmp_path, shard_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    (tmp_path / "tokenizer.json").write_text("{}")
    with torch.no_grad():
        model.model.norm.weight.fill_(3)
    model.save_pretrained(tmp_path)
    assert torch.equal(Qwen3.from_pretrained(tmp_path).model.norm.weight, model.model.norm.weight)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors",
                                                    "tokenizer.json"}


def test_a_tokenizer_whose_stop_is_no_special_token_is_refused(root, capsys):
    """<|im_end|> stood in every draft's text: nothing was right, all rewards were 0."""
    w = places(root)
    path = root / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for token in tokenizer["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<|im_end|>"
    path.write_text(json.dumps(tokenizer))
    assert ("<|im_end|>" in (said := refusal(capsys, polylora.main, *sft_args(w, "never")))
            and "special" in said)


SMALL = dict(vocab_size=41, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
             num_attention_heads=4, head_dim=8)


def small_config(**changes):
    return tiny_config(True, **SMALL | changes)


def checkpoint(folder, shards=1, seed=3, **changes):
    config = small_config(**changes)
    return write_checkpoint(folder, config, tiny_weights(config, seed), shards)


def logits(folder):
    with torch.no_grad():
        return Qwen3.from_pretrained(folder)(TOKENS)


# ---- The hub's cache -----------------------------------------------------------------------------

def shared_store():
    """The hub client's own function that moves a blob into the store of the whole cache."""
    store = pytest.importorskip("huggingface_hub.utils._shared_blobs",
                                reason="this hub client has no shared store")
    return store.publish_blob_to_shared_store


def hub_cache(cache, name, source, shared):
    """A snapshot in a cache as the installed client leaves it, by the functions that it
    downloads with. Returns the snapshot's folder."""
    commit = hashlib.sha1(name.encode()).hexdigest()
    repo = cache / file_download.repo_folder_name(repo_id=name, repo_type="model")
    snapshot = repo / "snapshots" / commit
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for file in source.iterdir():
        etag = hashlib.sha256(file.read_bytes()).hexdigest()
        blob = repo / "blobs" / etag
        shutil.copy(file, blob)
        file_download._create_symlink(str(blob), str(snapshot / file.name), new_blob=True)
        if shared and file.suffix == ".safetensors":
            assert shared_store()(blob_path=str(blob), xet_hash=etag[::-1], cache_dir=cache,
                                  expected_size=file.stat().st_size)
            assert blob.is_symlink() and blob.resolve().is_relative_to(cache / "blobs")
    return snapshot


@pytest.mark.parametrize("shared", [False, True],
                         ids=["blobs of the model", "blobs of the whole cache"])
def test_a_sharded_checkpoint_in_the_hub_s_cache_loads(shared, tmp_path, monkeypatch):
    source = checkpoint(tmp_path / "source", shards=3)
    cache = tmp_path / "cache" / "hub"
    snapshot = hub_cache(cache, "acme/sharded", source, shared)
    want = logits(source)
    assert torch.equal(logits(snapshot), want)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits("acme/sharded"), want)


def test_a_cache_whose_blobs_lie_on_another_disk_loads(tmp_path):
    """A person moved the folder of blobs and left a link in its place."""
    source = checkpoint(tmp_path / "source", shards=3)
    snapshot = hub_cache(tmp_path / "cache" / "hub", "acme/sharded", source, False)
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "disk")
    blobs.symlink_to(tmp_path / "disk")
    assert torch.equal(logits(snapshot), logits(source))


@pytest.mark.parametrize("layout", ["plain folder", "snapshot"])
def test_links_that_leave_a_folder_or_the_cache_are_refused(layout, tmp_path):
    source = checkpoint(tmp_path / "source", shards=3)
    folder = (source if layout == "plain folder"
              else hub_cache(tmp_path / "cache" / "hub", "acme/sharded", source, False))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shutil.copy(shard.resolve(), tmp_path / "outside.safetensors")
    shard.unlink()
    shard.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(InputError, match="link to another folder"):
        Qwen3.from_pretrained(folder)


def test_a_broken_link_is_called_an_unfinished_download(tmp_path):
    snapshot = hub_cache(tmp_path / "hub", "acme/one", checkpoint(tmp_path / "source"), False)
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(InputError, match="not there: the download did not finish"):
        Qwen3.from_pretrained(snapshot)


# ---- Which files ---------------------------------------------------------------------------------

def test_a_single_file_comes_before_an_index_of_other_shards(tmp_path):
    """As transformers reads such a folder, whichever is older."""
    folder = checkpoint(tmp_path / "both", shards=3, seed=3)
    other = checkpoint(tmp_path / "single", seed=4)
    shutil.copy(other / "model.safetensors", folder)
    assert torch.equal(logits(folder), logits(other))


def test_shards_saved_over_a_single_file_replace_it(tmp_path):
    model = Qwen3.from_pretrained(checkpoint(tmp_path / "a", seed=4))
    folder = checkpoint(tmp_path / "b", seed=3)
    model.save_pretrained(folder, shard_bytes=5000)
    assert (not (folder / "model.safetensors").exists()
            and torch.equal(logits(folder), logits(tmp_path / "a")))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
                                  "model.pth"])
def test_weights_in_a_format_that_can_run_code_are_named(name, tmp_path):
    folder = checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(InputError, match=f"{name}.*only safetensors.*save_pretrained"):
        Qwen3.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.gguf", "model.fp16.safetensors"])
def test_a_missing_file_names_what_is_there_instead(name, tmp_path):
    folder = checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(InputError, match=f"model.safetensors is missing.*{name}"):
        Qwen3.from_pretrained(folder)


def test_a_shard_that_is_missing_is_named(tmp_path):
    folder = checkpoint(tmp_path, shards=3)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(InputError,
                       match="model-00002-of-00003.safetensors is missing.*index.*download"):
        Qwen3.from_pretrained(folder)


def test_a_quantised_checkpoint_is_called_that(tmp_path):
    """Not "cannot be read: fetch it again", which brings the same file."""
    with pytest.raises(InputError, match="quantization_config.*bfloat16"):
        Qwen3.from_pretrained(checkpoint(tmp_path / "a",
                                         quantization_config={"quant_method": "fp8"}))
    folder = checkpoint(tmp_path / "b")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="stored as F8_E4M3.*not quantised") as error:
        Qwen3.from_pretrained(folder)
    assert "again" not in str(error.value)


def test_an_adapter_given_as_a_model_is_called_that(tmp_path):
    """TRL saves the tokenizer beside the adapter."""
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(InputError, match="adapter.*base model"):
        data.load_tokenizer(tmp_path)
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="adapter.*base model"):
        data.load_tokenizer(tmp_path)


def test_a_checkpoint_without_tokenizer_json_says_what_to_convert(tmp_path):
    folder = checkpoint(tmp_path)
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match="vocab.json.*older format.*AutoTokenizer"):
        data.load_tokenizer(folder)


# ---- Numbers that are not finite -----------------------------------------------------------------

NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_base_with_a_number_that_is_not_finite_is_refused_by_the_tensor_s_name(value, dtype,
                                                                                 tmp_path):
    config = small_config(torch_dtype=str(dtype).removeprefix("torch."))
    weights = {n: t.to(dtype) for n, t in tiny_weights(config, 3).items()}
    write_checkpoint(tmp_path / "good", config, weights, shards=2)
    assert logits(tmp_path / "good").isfinite().all()
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    write_checkpoint(tmp_path / "bad", config, weights, shards=2)
    for nf4 in (False, True):
        with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight.*not finite"):
            Qwen3.from_pretrained(tmp_path / "bad", nf4=nf4)


def test_a_number_that_overflows_in_the_dtype_asked_for_is_refused(tmp_path):
    config = small_config()
    weights = tiny_weights(config, 3)
    weights["model.norm.weight"][2] = 1e6    # finite in fp32 and bf16, infinite in fp16
    write_checkpoint(tmp_path, config, weights)
    assert Qwen3.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="model.norm.weight.*not finite.*float16"):
        Qwen3.from_pretrained(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_an_embedder_with_a_number_that_is_not_finite_is_refused(value, tmp_path):
    config, weights = tiny_bert()
    weights["encoder.layer.1.output.dense.bias"][3] = value
    with pytest.raises(InputError, match="output.dense.bias.*not finite"):
        Bert.from_pretrained(write_checkpoint(tmp_path, config, weights))


# ---- Rotary settings of config.json --------------------------------------------------------------

def rope_theta(**changes):
    """rope_theta as read of a configuration whose own fields are replaced; None removes one."""
    config = {k: v for k, v in (small_config() | changes).items() if v is not None}
    return Config.from_dict(config).rope_theta


@pytest.mark.parametrize("value", [
    None, {}, {"rope_type": "default"}, {"type": "default"}, {"rope_type": None},
    {"rope_type": "default", "factor": None},
    {"rope_type": "default", "rope_theta": 1000000}, {"rope_type": "linear", "factor": 1.0},
    {"type": "linear", "factor": 1},
    {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 32768}], ids=str)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_settings_that_scale_nothing_are_read(key, value):
    assert rope_theta(**{key: value}) == 1e6


@pytest.mark.parametrize("value", [
    {"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2},
    {"rope_type": "dynamic", "factor": 1.0},
    {"rope_type": "longrope"}, {"rope_type": "linear"},
    {"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.5},
    {"rope_type": "mrope"}, {"rope_type": ["default"]}, "default", [1]], ids=str)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_settings_that_scale_the_angles_are_refused_by_their_kind(key, value):
    kind = value.get("rope_type") or value.get("type") if isinstance(value, dict) else key
    with pytest.raises(InputError, match="rotary angles|JSON object") as error:
        rope_theta(**{key: value})
    assert str(kind) in str(error.value).replace("\\", "")


def test_rope_theta_is_read_where_it_stands_and_two_that_differ_are_refused():
    for key in ("rope_scaling", "rope_parameters"):
        nested = {"rope_type": "default", "rope_theta": 5000000}
        assert rope_theta(rope_theta=None, **{key: nested}) == 5e6
        with pytest.raises(InputError, match="make them equal"):
            rope_theta(**{key: nested})
    with pytest.raises(InputError, match="lacks 'rope_theta'"):
        rope_theta(rope_theta=None)


def test_rotary_angles_are_transformers_to_the_last_bit():
    """1 / theta ** x; theta ** -x differs in the last bit of 24 of 64 frequencies, and bf16
    logits show it."""
    for head_dim, theta in ((128, 1e6), (128, 5e6), (64, 1e4), (16, 1e6)):
        positions = torch.arange(0, 40_000, 7)[None]
        inverse = 1.0 / (theta ** (torch.arange(0, head_dim, 2,
                                                dtype=torch.int64).float() / head_dim))
        angles = positions[..., None].float() * inverse
        cos, sin = model.rotary(positions, head_dim, theta, torch.float32)
        assert (torch.equal(cos, angles.cos().unsqueeze(-2))
                and torch.equal(sin, angles.sin().unsqueeze(-2)))


@pytest.mark.peers
def test_bf16_logits_are_transformers_own_in_every_bit(tmp_path):
    """To position 2,000. Both run plain eager attention in the same order of operations."""
    transformers = pytest.importorskip("transformers")
    config = small_config(torch_dtype="bfloat16")
    write_checkpoint(tmp_path, config,
                     {n: t.bfloat16() for n, t in tiny_weights(config, 3).items()})
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16,
                                                           attn_implementation="sdpa").eval()
    tokens = torch.arange(2000)[None] % 41
    with torch.no_grad():
        ours, want = Qwen3.from_pretrained(tmp_path)(tokens), theirs(tokens).logits
    same = (ours == want).float().mean()
    assert (
        same > 0.99
    ), f"{same:.1%} of the logits are equal, the largest difference is {(ours - want).abs().max()}"


# ---- Chat templates ------------------------------------------------------------------------------

TURN = "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' }}"

ANSWER = (
    "{%- if m['role'] == 'assistant' %}{% generation %}{{- m['content'] + '<|im_end|>' }}{%"
    " endgeneration %}{{- '\\n' }}"
)

END = "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"

MARKED = TURN + ANSWER + "{%- else %}{{- m['content'] + '<|im_end|>\\n' }}" + END + "{%- endif %}"

KEEPING = MARKED.replace("{{- m['content'] + '<|im_end|>' }}",
                         "{{- '<think>\\n\\n</think>\\n\\n' + m['content'] + '<|im_end|>' }}") \
                .replace("assistant\\n' }}{%- endif",
                         "assistant\\n<think>\\n\\n</think>\\n\\n' }}{%- endif")

LOOPING = MARKED.replace("{%- if m['role'] == 'ass",
                         "{%- for i in [1, 2] %}{%- if i == 2 %}{% break %}{%- endif %}{%- endfor "
                         "%}"
                         "{%- if m['role'] == 'ass")

NAMED = MARKED.replace("'<|im_end|>'", "eos_token").replace("'<|im_end|>\\n'", "eos_token + '\\n'")


def chat_of(folder, template, **config):
    folder.mkdir(exist_ok=True)
    write_json(folder / "tokenizer_config.json", config)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return data.chat_format(folder)


@pytest.mark.slow
def test_templates_that_mark_what_the_assistant_says_are_read(tmp_path):
    """{% generation %} marks text and writes none; {% break %} and special tokens by name are
    transformers', too."""
    plain = data.ChatFormat(think_block=False)
    assert chat_of(tmp_path / "a", MARKED) == plain
    assert chat_of(tmp_path / "b", LOOPING) == plain
    assert chat_of(tmp_path / "c", NAMED, eos_token="<|im_end|>") == plain
    assert chat_of(tmp_path / "d", NAMED,
                   eos_token={"content": "<|im_end|>", "lstrip": False}) == plain


def test_a_training_template_that_keeps_every_think_block_is_written_as_it_is(tmp_path):
    """TRL's training template of Qwen3 puts a think block into earlier answers as well."""
    chat = chat_of(tmp_path, KEEPING)
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"}]
    want = (
        "<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\ntwo<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert data.render_chat(said, add_generation_prompt=True, chat=chat) == want
    assert data.render_chat(said,
                            add_generation_prompt=True) == want.replace(
                                "<think>\n\n</think>\n\ntwo", "two")


@pytest.mark.slow
@pytest.mark.parametrize("template, match", [
    ("{{ '[INST] ' + messages[0]['content'] }}", "other tokens than <.im_start.> and <.im_end.>"),
    (MARKED.replace("['content'] + '<|im_end|>\\n'", "['content'] + '!<|im_end|>\\n'"),
     "as ChatML does, but after .*zero"),
    ("{{ raise_exception('no system role here') }}", "no system role here"),
    (MARKED + "{{ strftime_now('%Y') }}", "date"),
    ("{% generation %}", "fails on a chat")], ids=["turns", "sign", "raises", "date", "unclosed"])
def test_templates_that_cannot_be_used_are_refused_by_a_true_reason(template, match, tmp_path):
    with pytest.raises(InputError, match=match):
        chat_of(tmp_path, template)


def test_several_templates_without_a_default_are_refused(tmp_path):
    """They were passed over, and Qwen3's own format taken."""
    named = [{"name": "tool_use", "template": MARKED}]
    with pytest.raises(InputError, match="chat_template.*default"):
        chat_of(tmp_path, None, chat_template=named)
    assert chat_of(tmp_path, None,
                   chat_template=[*named,
                                  {"name": "default", "template": MARKED}]) == data.ChatFormat(
                                      False)


def test_a_tokenizer_that_changes_text_is_refused_by_what_became_of_it(tmp_path):
    words = {w: i for i, w in enumerate(["<|im_start|>", "<|im_end|>", "[UNK]", "Ab,"])}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    with pytest.raises(InputError, match="does not give a text back as it was.*became"):
        data.check_chat(tokenizer, tmp_path)
    plain = Tokenizer(models.BPE(json.loads('{"<|im_start|>": 0, "<|im_end|>": 1}'), []))
    plain.add_tokens(["<|im_start|>", "<|im_end|>"])
    with pytest.raises(InputError, match="special"):
        data.check_chat(plain, tmp_path)
