"""Tests of methods/merge.py and support/merge.py: `lora.py merge`."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import lora
from helpers import (
    PEFT_KINDS, ROOT, STOP, gap, logits_of, peer, refusal, sequence,
    shake_all, tiny_adapter, tiny_config, tiny_weights, write_adapter, write_checkpoint,
    write_model,
)
from lora import add_adapter, load_adapter, save_adapter
from methods import merge
from methods.nf4 import quantise
from model import Qwen3
from support.merge import Stored, atomic_folder
from support.registry import ADAPTERS

KINDS = ("lora", "rslora", "dora", "pissa", "adalora", "multilora", "lori", "full")
POST = [{"role": "user", "content": "Just adopted a kitten!"}]


def small(folder, shards=1, **changes):
    """A checkpoint of the tiny shape with a tokenizer."""
    model = write_model(folder)                  # for its tokenizer
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    (model / "model.safetensors").unlink()
    config = tiny_config(True, vocab_size=rows, **changes)
    return write_checkpoint(model, config, tiny_weights(config, 7), shards)


def trained(base, kind, folder, nf4=False):
    """A model with a random adapter of that kind, saved in `folder`: what training leaves."""
    model = Qwen3.from_pretrained(base)
    if nf4:
        quantise(model)
    shake_all(add_adapter(model, kind, 3, 6.0, members=2), 0.1)
    save_adapter(model, folder, base)
    return model


def largest_gap(base, one, other):
    """Of two models' logits on the prompts that the command compares them on."""
    tokenizer = data.load_tokenizer(base)
    found = []
    for post in merge.POSTS:
        tokens = data.encode_prompt(tokenizer, [{"role": "user", "content": post}])
        found.append(gap(logits_of(one, tokens), logits_of(other, tokens)))
    return max(found)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small(tmp_path_factory.mktemp("base") / "model", shards=2)


def merged(base, adapter, out, *flags):
    assert lora.main(["merge", str(adapter), "--model", str(base), "--out", str(out), *flags]) == 0
    return out


# ---- Logits --------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_folder_is_base_and_adapter(base, tmp_path, capsys, kind):
    tokens = sequence(3, 40, 137)
    want = logits_of(trained(base, kind, tmp_path / "a"), tokens)
    bare = logits_of(Qwen3.from_pretrained(base), tokens)
    folder = merged(base, tmp_path / "a", tmp_path / "m")
    assert gap(bare, want) > 0.1                                    # the adapter does something
    assert gap(logits_of(Qwen3.from_pretrained(folder), tokens), want) < 1e-4
    assert f"({kind}) in its weights, float32" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "nf4"])
def test_biases_are_merged_as_they_are(tmp_path, capsys, kind):
    """Over attention_bias, whose biases no adapter but `full` changes; and what is printed of a run
    in NF4 is measured with them."""
    base = small(tmp_path / "base", attention_bias=True)
    tokens = sequence(3, 40, 137)
    run = tmp_path / "run"
    model = trained(base, "lora" if kind == "nf4" else kind, run / "adapter", nf4=kind == "nf4")
    (run / "config.json").write_text(json.dumps({"model": str(base), "nf4": kind == "nf4"}))
    folder = merged(base, run, tmp_path / "m")
    got = Qwen3.from_pretrained(folder)
    if kind == "nf4":
        printed = float(capsys.readouterr().out.split("by up to ")[1].split(";")[0])
        want = largest_gap(base, got, model)
        assert 0.01 < want and abs(printed - want) <= 0.05 * want
    else:
        assert gap(logits_of(got, tokens), logits_of(model, tokens)) < 1e-4
    before = Qwen3.from_pretrained(base).state_dict()
    biases = [n for n in before if n.endswith("bias")]
    same = [torch.equal(before[n], got.state_dict()[n]) for n in biases]
    assert len(biases) == 12 and (not any(same) if kind == "full" else all(same))


def test_a_run_in_nf4_is_merged_onto_the_full_base(base, tmp_path, capsys):
    """What is merged is full base + adapter; how far that is from what was trained is printed."""
    tokens = sequence(3, 40, 137)
    quantised = trained(base, "lora", tmp_path / "run" / "adapter", nf4=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": str(base), "nf4": True}))
    run = tmp_path / "run" / "adapter"                   # or the run itself
    assert lora.main(["merge", str(run), "--out", str(tmp_path / "m")]) == 0
    full = load_adapter(Qwen3.from_pretrained(base), tmp_path / "run" / "adapter")
    got = logits_of(Qwen3.from_pretrained(tmp_path / "m"), tokens)
    assert gap(got, logits_of(full, tokens)) < 1e-4
    assert gap(got, logits_of(quantised, tokens)) > 0.05
    said = capsys.readouterr().out
    assert "in 4 bits" in said and float(said.split("by up to ")[1].split(";")[0]) > 0.05


def test_the_printed_difference_is_the_logits_own(base, tmp_path, capsys):
    """bfloat16 rounds an update away in part: what is printed is measured, in whole models."""
    model = trained(base, "dora", tmp_path / "a")
    folder = merged(base, tmp_path / "a", tmp_path / "m", "--dtype", "bfloat16")
    said = capsys.readouterr().out
    rounded = Qwen3.from_pretrained(folder)
    assert rounded.dtype == torch.bfloat16
    want = largest_gap(base, rounded.float(), model)
    printed = float(said.split("adapter: ")[1].split(",")[0])
    assert 0.001 < want and abs(printed - want) <= 0.05 * want


def test_peft_s_pissa_file_is_merged_onto_its_own_start(base, tmp_path):
    """A and B alone, to be added to a residue of W: the start is computed again from W."""
    config = tiny_config(True)
    tensors = tiny_adapter(config, 4, 8)
    write_adapter(tmp_path / "a", tensors, 4, 6, **PEFT_KINDS["pissa"])
    tokens = sequence(3, 20, 137)
    want = logits_of(load_adapter(Qwen3.from_pretrained(base), tmp_path / "a"), tokens)
    folder = merged(base, tmp_path / "a", tmp_path / "m")
    assert gap(logits_of(Qwen3.from_pretrained(folder), tokens), want) < 1e-4


# ---- Files ---------------------------------------------------------------------------------------

def test_the_base_s_files_come_along(base, tmp_path):
    """Shards as the base has them, its settings untouched but for the dtype, and what is copied."""
    trained(base, "lora", tmp_path / "a")
    folder = merged(base, tmp_path / "a", tmp_path / "m", "--dtype", "bfloat16")
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, folder))
    assert after == before | {"torch_dtype": "bfloat16"}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for name in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / name)
    assert tensors.keys() == index["weight_map"].keys() == Stored(base).shapes.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not [p.name for p in folder.iterdir() if p.suffix in (".partial", ".lock")]


def test_what_the_base_lacks_is_written(base, tmp_path):
    """No chat template: ours, which data.chat_format recognises. Replies end at <|im_end|>, at
    which a base model's own settings do not stop."""
    trained(base, "lora", tmp_path / "a")
    folder = merged(base, tmp_path / "a", tmp_path / "m")
    assert data.chat_format(folder) == data.ChatFormat()
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    stops = data.stop_ids(data.load_tokenizer(base))
    assert set(stops) | {STOP, 0} == set(ends) and len(ends) == len(set(ends))
    kept = json.loads((base / "generation_config.json").read_text())
    written = json.loads((folder / "generation_config.json").read_text())
    assert written["top_k"] == kept["top_k"] == 20


def test_a_stored_copy_of_the_tied_head_is_left_out(base, tmp_path):
    """It would be the base's, beside a trained embedding."""
    copied = small(tmp_path / "copied")
    tensors = load_file(copied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copied / "model.safetensors")
    model = trained(copied, "full", tmp_path / "a")
    folder = merged(copied, tmp_path / "a", tmp_path / "m")
    assert "lm_head.weight" not in Stored(folder).shapes
    tokens = sequence(3, 20, 137)
    assert gap(logits_of(Qwen3.from_pretrained(folder), tokens), logits_of(model, tokens)) < 1e-4


def test_nothing_half_written_has_the_final_name(base, tmp_path, monkeypatch):
    trained(base, "lora", tmp_path / "a")

    def full_disk(*args):
        assert (tmp_path / "m.partial").exists() and not (tmp_path / "m").exists()
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(merge, "fill_in", full_disk)
    args = ["merge", str(tmp_path / "a"), "--model", str(base), "--out", str(tmp_path / "m")]
    assert lora.main(args) == 2
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()
    monkeypatch.undo()
    (tmp_path / "m.partial").mkdir()                       # of a process that was killed
    (tmp_path / "m.partial" / "model-9.safetensors").write_text("half")
    assert lora.main(args) == 0
    assert not (tmp_path / "m" / "model-9.safetensors").exists()


def test_two_processes_do_not_write_one_folder(tmp_path):
    with atomic_folder(tmp_path / "m") as new:
        (new / "file").write_text("first")
        with pytest.raises(ValueError, match="another process"), atomic_folder(tmp_path / "m"):
            pass
        assert (new / "file").exists()
    assert (tmp_path / "m" / "file").read_text() == "first"


# ---- What is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["moa", "ensemble"])
def test_an_adapter_that_is_no_one_weight_is_refused(base, tmp_path, capsys, kind):
    assert set(KINDS) | {"moa", "ensemble"} == set(ADAPTERS)
    trained(base, kind, tmp_path / "a")
    said = refusal(capsys, lora.main, "merge", str(tmp_path / "a"), "--model", str(base), "--out",
                   str(tmp_path / "m"))
    assert "cannot be merged" in said
    assert {p.name for p in tmp_path.iterdir()} == {"a"}


def test_what_does_not_fit_is_refused(world, base, tmp_path, capsys):
    """Another base, an adapter of another model, a folder that is there, and one without."""
    def refused(run, *more):
        said = refusal(capsys, lora.main, "merge", str(run), "--out", str(tmp_path / "m"), *more)
        assert not (tmp_path / "m.partial").exists()
        return said
    spoilt = write_model(tmp_path / "spoilt")
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, spoilt / "model.safetensors")
    assert "another base" in refused(world["lora"], "--model", str(spoilt))
    assert "does not fit" in refused(world["lora"] + "/adapter", "--model", str(base))
    assert "adapter_config.json is missing" in refused(tmp_path / "nothing")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("x")
    assert "choose another --out" in refused(world["lora"])
    assert (tmp_path / "m" / "mine").read_text() == "x"


# ---- Memory --------------------------------------------------------------------------------------

# The first merge loads what torch imports late; the second is measured. 5 resets the peak.
MEASURE = """
import sys
import lora
def status(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) << 10
adapter, base, small_adapter, small_base, out = sys.argv[1:]
assert lora.main(["merge", small_adapter, "--model", small_base, "--out", out + "-small"]) == 0
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
assert lora.main(["merge", adapter, "--model", base, "--out", out]) == 0
print("PEAK", status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's /proc")
def test_peak_memory_is_below_two_shards(base, tmp_path):
    """What a process that merges four shards takes, the files that it maps included: below two
    shards, without the gigabyte that one may have beside them."""
    big = small(tmp_path / "model", shards=4, hidden_size=256, intermediate_size=1024,
                num_hidden_layers=12, num_attention_heads=8, head_dim=64)
    trained(big, "lora", tmp_path / "a")
    trained(base, "lora", tmp_path / "b")
    shards = sorted(path.stat().st_size for path in big.glob("*.safetensors"))
    assert len(shards) == 4 and shards[0] > 10e6
    folders = [tmp_path / "a", big, tmp_path / "b", base, tmp_path / "m"]
    ran = subprocess.run([sys.executable, "-c", MEASURE, *map(str, folders)], cwd=ROOT,
                         capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    peak = int(ran.stdout.split("PEAK ")[1])
    assert 0 < peak < shards[-1] + shards[-2], peak


# ---- transformers --------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa", "nf4"])
def test_live_transformers_reads_the_merged_folder(base, tmp_path, kind):
    tokens = sequence(3, 40, 137)
    model = trained(base, "lora" if kind == "nf4" else kind, tmp_path / "a", nf4=kind == "nf4")
    if kind == "nf4":
        model = load_adapter(Qwen3.from_pretrained(base), tmp_path / "a")
    folder = merged(base, tmp_path / "a", tmp_path / "m")
    theirs = peer("Qwen3ForCausalLM", folder)
    with torch.no_grad():
        got = theirs(torch.tensor([tokens])).logits[0]
    assert theirs.dtype == torch.float32 and gap(got, logits_of(model, tokens)) < 1e-4


@pytest.mark.peers
def test_live_their_tokenizer_and_template_write_our_prompts(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    trained(base, "lora", tmp_path / "a")
    folder = merged(base, tmp_path / "a", tmp_path / "m")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(POST, add_generation_prompt=True, return_dict=False)
    assert ids == data.encode_prompt(data.load_tokenizer(base), POST)
    assert theirs.eos_token == "<|im_end|>"
