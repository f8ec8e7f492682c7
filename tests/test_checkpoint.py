"""A run's identity, resuming, and going on from a finished adapter.

A run is finished, or can be resumed, only while everything that it was made from is the same: flags, posts, base,
tokenizer, chat template, starting adapter, embedder. Each input is changed here under its own name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import evaluate
import files
import grpo
import polylora
import trainer
from test_combinations import measured, places, refused, root  # noqa: F401  (root: a fixture)
from test_study import grpo_args, lines, sft_args, world  # noqa: F401  (world: a fixture)

PLAIN = ("{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
         "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")


def change_tensor(path, at=0.5):
    """Add to one number in the middle of a file of tensors; its size, header and end stay."""
    tensors = load_file(path)
    name = sorted(tensors)[int(at * len(tensors))]
    tensors[name].view(-1)[0] += 0.25
    save_file(tensors, path, metadata={"format": "pt"})


def change_base(w):
    change_tensor(Path(w["model"]) / "model.safetensors")


def change_template(w):
    (Path(w["model"]) / "chat_template.jinja").write_text(PLAIN)


def change_tokenizer(w):
    path = Path(w["model"]) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer))


def change_start(w):
    change_tensor(Path(w["lora"]) / "adapter" / "adapter_model.safetensors")


def change_start_scale(w):
    path = Path(w["lora"]) / "adapter" / "adapter_config.json"
    data.write_json(path, data.read_json(path) | {"lora_alpha": 3.5})


def change_posts(w):
    with open(w["grpo"], "a") as file:
        file.write('{"post": "one more post", "reply": "and one more reply", "intent": "more"}\n')


def change_embedder(w):
    change_tensor(Path(w["embedder"]) / "model.safetensors")


# ---- Training ----------------------------------------------------------------------------------------------

@pytest.fixture
def chain(root):  # noqa: F811
    """A base, an embedder of its own, an SFT run and the command of a GRPO run from it."""
    w = places(root)
    w["embedder"] = str(root / "embedder")
    shutil.copytree(w["model"], w["embedder"])
    assert polylora.main(sft_args(w, "lora")) == 0
    w["command"] = grpo_args(w, "rl", "--embedder", w["embedder"], "--diversity-weight", "0.1", "--reward", "relevance")
    return w


CHANGES = [(change_base, "another base"), (change_template, "another tokenizer or chat template"),
           (change_tokenizer, "another tokenizer or chat template"), (change_start, "another starting adapter"),
           (change_start_scale, "another starting adapter"), (change_posts, "on other posts"),
           (change_embedder, "another embedder")]


@pytest.mark.parametrize("change, said", CHANGES)
def test_a_run_made_from_other_inputs_is_neither_kept_nor_resumed(chain, capsys, change, said):
    """The old result stayed as "done already"; an unfinished run went on from another start."""
    assert grpo.main(chain["command"]) == 0
    run = chain["root"] / "rl"
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert grpo.main(chain["command"]) == 0 and "done already" in capsys.readouterr().out
    change(chain)
    assert said in refused(capsys, grpo.main, *chain["command"])
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    (run / "done.json").unlink()
    assert said in refused(capsys, grpo.main, *chain["command"], "--resume")


def test_sft_trained_again_otherwise_ends_the_chain(chain, capsys):
    """The reported case: another learning rate in phase one, then the same command of phase two."""
    assert grpo.main(chain["command"]) == 0
    shutil.rmtree(chain["lora"])
    assert polylora.main(sft_args(chain, "lora")) == 0                         # trained again, all the same
    assert grpo.main([*chain["command"], "--resume"]) == 0
    assert "done already" in capsys.readouterr().out
    shutil.rmtree(chain["lora"])
    assert polylora.main(sft_args(chain, "lora", "--lr", "0.02")) == 0
    assert "another starting adapter" in refused(capsys, grpo.main, *chain["command"], "--resume")


def test_a_file_that_is_only_moved_or_touched_is_the_same_input(chain, capsys):
    """Identity is of contents: no time stamps, no order of names in an adapter's configuration."""
    assert grpo.main(chain["command"]) == 0
    path = Path(chain["lora"]) / "adapter" / "adapter_config.json"
    config = data.read_json(path)
    names = config["target_modules"][::-1]
    data.write_json(path, {"target_modules": names, **{k: v for k, v in config.items() if k != "target_modules"}})
    weights = Path(chain["model"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert grpo.main(chain["command"]) == 0 and "done already" in capsys.readouterr().out


@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 0.99])
def test_the_hash_of_a_base_is_of_every_number(root, at):  # noqa: F811
    """Only headers and the last 64 KiB of each file counted."""
    before = trainer.model_hash(root / "model", None)
    assert trainer.model_hash(root / "model", None) == before
    change_tensor(root / "model" / "model.safetensors", at)
    assert trainer.model_hash(root / "model", None) != before


def test_what_a_folder_of_an_older_version_cannot_tell_is_said(chain, capsys):
    """Its hash was of a part of the base: a finished run is kept with a note, an unfinished one is not gone on with, and
    neither is called one on another base."""
    assert grpo.main(chain["command"]) == 0
    path = chain["root"] / "rl" / "config.json"
    config = data.read_json(path) | {"model_hash": "0123abcd"}
    del config["model_chat_hash"], config["start_hash"]
    data.write_json(path, config)
    assert files.base_hash(chain["root"] / "rl") is None
    capsys.readouterr()
    assert grpo.main(chain["command"]) == 0
    said = capsys.readouterr().out
    assert "older version" in said and "done already" in said
    (chain["root"] / "rl" / "done.json").unlink()
    assert "older version" in refused(capsys, grpo.main, *chain["command"], "--resume")


def test_measuring_under_another_template_says_so(chain, capsys):
    """The adapter is measured anew, in a chat format that it was not trained in."""
    command = ["measure", chain["lora"], "--data", chain["eval"], "--n", "10", "--max-new-tokens", "5"]
    assert evaluate.main(command) == 0 and "trained with another" not in capsys.readouterr().err
    change_template(chain)
    assert evaluate.main(command) == 0
    assert "trained with another tokenizer or chat template" in capsys.readouterr().err


# ---- Evaluations -------------------------------------------------------------------------------------------

def intents(w):
    write_rows(w, lambda row: row | {"intent": f"about {row['post'][-1]}"})


def written_anew(w):
    write_rows(w, lambda row: row | {"intent": ""})


def write_rows(w, change):
    rows = [json.loads(line) for line in Path(w["eval"]).read_text().splitlines()]
    Path(w["eval"]).write_text("".join(json.dumps(change(row)) + "\n" for row in rows))


@pytest.mark.parametrize("change, again", [(change_base, True), (change_template, True), (change_tokenizer, True),
                                           (intents, True), (written_anew, False), (change_start, True),
                                           (change_start_scale, True), (change_embedder, True)])
def test_an_evaluation_is_kept_only_for_equal_inputs(chain, capsys, change, again):
    """A changed template, tokenizer or intent left the old evaluation in its place: Pass@1 .108, anew .000. Writing the
    posts anew without a change of what they say is no reason to measure again."""
    shutil.copytree(chain["lora"], chain["root"] / "mine")
    (chain["root"] / "mine" / "config.json").write_text(json.dumps({"seed": 1}))     # of no base: changes are not refused
    chain["lora"] = str(chain["root"] / "mine")
    command = [chain["lora"], "--data", chain["eval"], "--model", chain["model"], "--embedder", chain["embedder"],
               "--reward", "relevance"]
    assert measured(capsys, *command) == "1 of 1 runs" and measured(capsys, *command) == "0 of 1 runs"
    before = data.read_json(Path(chain["lora"]) / "evaluation.json")["records"]
    change(chain)
    assert measured(capsys, *command) == ("1 of 1 runs" if again else "0 of 1 runs")
    after = data.read_json(Path(chain["lora"]) / "evaluation.json")["records"]
    assert (before == after) is not again
    assert measured(capsys, *command) == "0 of 1 runs"


# ---- SFT from an adapter -----------------------------------------------------------------------------------

def tensors(run):
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa", "adalora", "lori", "multilora", "moa", "ensemble", "full"])
def test_sft_goes_on_from_a_finished_adapter(root, capsys, kind):  # noqa: F811
    """A usual wish had no way: a larger --steps was refused and sft had no start."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora", "--adapter", kind, "--members", "2", "--lr", "0.01", "--alpha", "4")) == 0
    before = tensors(w["lora"])
    few = ["--data", w["sft"], "--steps", "2", "--batch", "4", "--lr", "0.01"]
    more = ["sft", "--start", w["lora"], *few, "--seed", "2", "--out", str(root / "more")]
    assert polylora.main(more) == 0
    after, config = tensors(root / "more"), data.read_json(root / "more" / "config.json")
    assert after.keys() == before.keys() and {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    assert any(not torch.equal(after[n], before[n]) for n in after)
    assert (config["adapter"], config["model"]) == (kind, w["model"])
    written = [data.read_json(f / "adapter" / "adapter_config.json") for f in (Path(w["lora"]), root / "more")]
    assert written[0] == written[1]
    assert polylora.main(more) == 0 and "done already" in capsys.readouterr().out
    still = ["sft", "--start", w["lora"], *few, "--lr", "0", "--out", str(root / "still")]
    assert polylora.main(still) == 0                                           # it starts where that one ended
    same = tensors(root / "still")
    assert all(torch.allclose(same[n], before[n], atol=1e-6) for n in same)


def test_sft_s_first_step_from_an_adapter_has_the_loss_of_that_adapter(root):  # noqa: F811
    """Not the base's, and not that of an adapter set up anew."""
    w = places(root)
    long = sft_args(w, "long", "--lr", "0.02", "--warmup", "0", "--schedule", "constant", "--epochs", "1", "--steps", "12")
    assert polylora.main(long) == 0
    same = ["--seed", "1", "--lr", "0", "--steps", "1"]
    assert polylora.main(["sft", "--start", str(root / "long"), "--data", w["sft"], "--batch", "4", *same,
                          "--out", str(root / "more")]) == 0
    assert polylora.main(sft_args(w, "new", *same)) == 0
    trained_on, new = lines(root / "more")[0]["ce"], lines(root / "new")[0]["ce"]
    assert trained_on < lines(root / "long")[0]["ce"] == new


@pytest.mark.parametrize("flags, said", [(["--rank", "3"], "--rank 3"), (["--alpha", "5"], "--alpha 5"),
                                         (["--adapter", "dora"], "--adapter dora"),
                                         (["--targets", "q_proj"], "--targets q_proj")])
def test_flags_that_an_adapter_at_start_contradicts_are_refused(root, capsys, flags, said):  # noqa: F811
    w = places(root)
    assert polylora.main(sft_args(w, "lora", "--alpha", "4")) == 0
    go = ["sft", "--start", w["lora"], "--data", w["sft"], "--out", root / "more", "--steps", "1"]
    assert said in refused(capsys, polylora.main, *go, *flags)
    assert not (root / "more").exists()
    assert polylora.main([*map(str, go), "--rank", "2", "--alpha", "4", "--batch", "4"]) == 0
    assert "no adapter there" in refused(capsys, polylora.main, *go[:2], root / "model", *go[3:])
    assert "--model" in refused(capsys, polylora.main, "sft", *go[3:])


def test_a_finished_run_with_more_steps_is_told_the_way(root, capsys):  # noqa: F811
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    assert f"--start {w['lora']}" in refused(capsys, polylora.main, *sft_args(w, "lora"), "--steps", "4")
    assert "--start" not in refused(capsys, polylora.main, *sft_args(w, "lora"), "--lr", "0.5")


def test_sft_from_a_start_that_was_trained_otherwise_is_not_kept(root, capsys):  # noqa: F811
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    go = ["sft", "--start", w["lora"], "--data", w["sft"], "--out", str(root / "more"), "--steps", "1", "--batch", "4"]
    assert polylora.main(go) == 0
    change_start(w)
    assert "another starting adapter" in refused(capsys, polylora.main, *go)


def test_an_sft_run_from_a_start_resumes_bit_for_bit(root):  # noqa: F811
    w = places(root)
    assert polylora.main(sft_args(w, "lora", "--lr", "0.01")) == 0
    go = lambda out, *more: polylora.main(["sft", "--start", w["lora"], "--data", w["sft"], "--out", str(root / out), "--steps", "4",
                                           "--batch", "4", "--lr", "0.01", "--save-every", "2", *more])
    assert go("whole") == 0
    step, calls = polylora.sft_step, []

    def broken(session, number):
        calls.append(number)
        if number == 3:
            raise KeyboardInterrupt
        return step(session, number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polylora, "sft_step", broken)
        assert go("cut") == 130
    assert go("cut", "--resume") == 0
    one, two = tensors(root / "whole"), tensors(root / "cut")
    assert all(torch.equal(one[n], two[n]) for n in one) and calls == [0, 1, 2, 3]
