"""Tests of support/checks.py."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

import data
import evaluate
import grpo
import polylora
import rewards
import trainer
from grpo import rollout
from helpers import Share, grpo_args, measured, places, refusal, rl, sft_args
from model import Config, Qwen3
from support import checks
from support import files
from support.files import InputError
from support.steplog import Tally


# ---- The command line ----------------------------------------------------------------------------

WRONG = ["--model nowhere/at/all", "--lambda 0.3 --k 1", "--lambda -1",
         "--lambda 1 --temperature 0",
         "--lambda 1 --draft-every 0", "--lambda 1 --draft-posts 0",
         "--lambda 1 --max-new-tokens 0",
         "--rank -2", "--batch 0", "--batch -4", "--steps -3", "--steps 0 --epochs -1",
         "--save-every 0",
         "--lr -0.1", "--beta2 2", "--dropout 2", "--lr nan", "--lr inf", "--clip nan", "--clip 0",
         "--lambda nan", "--lambda 1 --temperature nan", "--steps 0 --epochs nan",
         "--device nowhere"]


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_flag_is_one_sentence_and_exit_code_2(files, tmp_path, capsys, flags):
    """A traceback after minutes of loading, or a run of nothing that calls itself done, is not
    an answer."""
    out = ["--out", str(tmp_path / "run"), "--steps", "2", "--batch", "2"]
    code = polylora.main(["sft", *files, *out, *flags.split()])
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code == 2 and len(said) == 1 and said[0].startswith("error: ")
    assert not (tmp_path / "run").exists()  # found before anything is written


# ---- The step, on a real session around a tiny model ---------------------------------------------

def test_more_ranks_than_posts_is_said_and_not_a_crash(parts):
    """Every rank takes part in every step: with too few posts they must all stop, with one
    sentence."""
    for rank in range(7):
        with pytest.raises(InputError, match="ranks"):
            rollout(rl(parts, ranks=Share(rank, 7)), 0, Tally())


# ---- SFT losses ----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, word", [
    ("--loss ce --loss-value 1", "no meaning"), ("--loss gem --loss-value 0", "above 0"),
    ("--loss gem --loss-value nan", "above 0"),
    ("--lambda 1 --diversity vendi --gate-floor 1", "gate-floor"),
    ("--lambda 1 --diversity floor", "--gate")])
def test_flags_without_effect_are_refused(flags, word):
    args = polylora.parser().parse_args(["sft", "--model", "-", "--data", "-", "--out", "-",
                                         *flags.split()])
    with pytest.raises(InputError, match=word):
        checks.check_sft(args)


@pytest.mark.parametrize("name, size, right", [
    ("passk-full", 3, False), ("passk-full", 2, True), ("polyepo", 1, False),
    ("passk-bootstrap", 5, False),
    ("bon", 4, True), ("darling", 9, True)])
def test_set_sizes_are_checked_before_anything_is_loaded(tmp_path, name, size, right):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    files.write_json(tmp_path / "adapter_config.json", config)
    flags = f"--model - --data - --out - --k 5 --advantage {name} --set-size {size}"
    args = grpo.parser().parse_args(["--start", str(tmp_path), *flags.split()])
    if right:
        assert checks.check_grpo(args) == tmp_path
    else:
        with pytest.raises(InputError, match=r"the set size \(--set-size\) is"):
            checks.check_grpo(args)


def digest(folder):
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def wrong_commands(w):
    """name -> (main, arguments, a word of the sentence)."""
    root, bad = w["root"], w["root"] / "bad.jsonl"
    bad.write_text('{"post": "fine", "reply": "fine"}\n{"post": "no reply"}\n')
    sft, rl = (lambda *a: (polylora.main,
                           sft_args(w, "never", *a))), (lambda *a: (grpo.main,
                                                                    grpo_args(w, "never", *a)))
    return {
        "no such model": (*sft("--model", str(root / "nothing")), "nothing"),
        "no such file": (*sft("--data", str(root / "none.jsonl")), "none.jsonl"),
        "bad line": (*sft("--data", str(bad)), "line 2"),
        "lambda with k = 1": (*sft("--lambda", "1", "--k", "1"), "--k 2"),
        "negative lambda": (*sft("--lambda", "-1"), "--lambda"),
        "unknown domain": (*sft("--domain", "poetry"), "poetry"),
        "domain that does not fit": (*sft("--domain", "pocket"), "pocket"),
        "no verifier": (*sft("--lambda", "1", "--gate", "verifier"), "verifier"),
        "unknown layer": (*sft("--targets", "lm_head"), "lm_head"),
        "rank 0": (*sft("--rank", "0"), "rank"),
        "set size above k": (*rl("--advantage", "passk", "--set-size", "4"), "--set-size"),
        "one draft": (*rl("--k", "1"), "--k 1"),
        "no start": (*rl("--start", str(root / "nothing")), "nothing"),
        "no reward model": (*rl("--reward", "judge"), "--reward-model"),
        "reader without voices": (*rl("--reward", "reader"), "reader"),
        "reward model without a head": (*rl("--reward", "model", "--reward-model", w["model"]),
                                        "score"),
        "adapter of another model": (*rl("--model", str(root / "other")), "adapter"),
        "another configuration": (polylora.main, sft_args(w, "lora", "--lr", "0.5"), "lr"),
        "a folder of something else": (polylora.main, sft_args(w, "model"), "model"),
        "k above n": (evaluate.main, ["measure", w["lora"], "--data", w["eval"], "--n", "5"],
                      "--n 5"),
        "measuring no run": (evaluate.main, ["measure", str(root / "model"), "--data", w["eval"]],
                             "adapter"),
        "drafts of no run": (evaluate.main, ["drafts", str(root / "nothing"), "hello"], "nothing"),
        "drafts for nothing": (evaluate.main, ["drafts", w["lora"], "  "], "empty"),
        "report of no run": (evaluate.main,
                             ["report", str(root / "nothing"), "--out", str(root / "never")],
                             "nothing"),
        "sizes": (data.main, ["split", "--data", w["sft"], "--sizes", "a=9,b=9",
                              "--out", str(root / "never")], "12"),
        "split without sizes": (data.main,
                                ["split", "--data", w["sft"], "--sizes", "a",
                                 "--out", str(root / "never")], "--sizes"),
    }


@pytest.fixture(scope="module")
def other_model(world):
    torch.manual_seed(0)
    tokenizer = data.load_tokenizer(world["model"])
    Qwen3(Config(tokenizer.get_vocab_size(), 48, 64, 2, 4, 2, 16,
                 tie_word_embeddings=True)).save_pretrained(world["root"] / "other")
    tokenizer.save(str(world["root"] / "other" / "tokenizer.json"))


@pytest.mark.slow
def test_wrong_input_gives_one_sentence_and_exit_code_2(world, other_model, capsys):
    """Every wrong input: exit code 2, one line that names the place, no traceback, and not a
    byte changed on disk."""
    for name, (main, args, word) in wrong_commands(world).items():
        before = digest(world["root"])
        capsys.readouterr()
        assert main(args) == 2, name
        said = capsys.readouterr().err.strip().splitlines()
        assert (said[-1].startswith("error: ") and word in said[-1]
                and "Traceback" not in " ".join(said)), (name, said)
        assert sum(x.startswith("error: ") for x in said) == 1, (name, said)
        assert digest(world["root"]) == before, name


def test_unknown_flags_and_help_exit_as_programs_do():
    for main in (polylora.main, grpo.main, evaluate.main, data.main):
        with pytest.raises(SystemExit) as stop:
            main(["--no-such-flag"])
        assert stop.value.code == 2
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
        assert stop.value.code == 0
    # `polylora.py interpolate --help` ended in a traceback
    for module in (polylora, evaluate, data, rewards):
        for command in module.parser()._subparsers._group_actions[0].choices.values():
            assert "--help" in command.format_help()


# ---- Objectives and losses -----------------------------------------------------------------------

@pytest.mark.parametrize("flags, word", [("--diversity-schedule rising", "--diversity-weight"),
                                         ("--advantage single-stream-spo --k 1 --resample 2",
                                          "--k 1"),
                                         ("--gate-floor 1", "without D"),
                                         ("--advantage evol --overlong 4", "does not use")])
def test_flags_that_would_do_nothing_together_are_refused(world, capsys, flags, word):  # noqa: F811
    """A schedule of no weight; and with one draft a post all rewards of a post are equal, so
    that every step had none."""
    assert word in refusal(capsys, grpo.main, *grpo_args(world, "never", *flags.split()))


# ---- Files with gaps -----------------------------------------------------------------------------

@pytest.mark.slow
def test_small_mistakes_give_one_sentence_errors(root, capsys, monkeypatch):
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    monkeypatch.chdir(w["lora"])
    assert measured(capsys, ".", "--data", w["eval"], "--name", "again") == "1 of 1 runs"
    assert (root / "lora@again" / "evaluation.json").exists()
    measured(capsys, ".", "--data", w["eval"])
    assert "--judge-drafts 0" in refusal(capsys, evaluate.main, "measure", ".", "--data", w["eval"],
                                         "--judge-drafts", "0")
    assert "--posts -1" in refusal(capsys, evaluate.main, "ask", w["lora"], root / "lora@again",
                                   "--posts", "-1", "--out", root / "sheet.csv")
    (root / "anna.csv").write_text("item,set,pick\n")
    assert "no key" in refusal(capsys, evaluate.main, "picks", root / "anna.csv")
    # an adapter of PEFT's, in FOLDER/adapter
    foreign = root / "foreign"
    shutil.copytree(root / "lora" / "adapter", foreign / "adapter")
    out = ["--out", str(root / "between")]
    assert polylora.main(["interpolate", w["lora"], str(foreign), *out]) == 0
    assert measured(capsys, root / "between", "--data", w["eval"]) == "1 of 1 runs"
    assert "exists" in refusal(capsys, polylora.main, "interpolate", w["lora"], foreign,
                               "--out", root / "between")


def test_training_cannot_truncate_what_it_samples():
    """Drafts cut by top-p and scored in full have a mean ratio of 0.9: no phase knows the flags."""
    for p, flags in ((grpo.parser(), ["--start", "-"]),
                     (polylora.parser(), ["sft", "--model", "-"])):
        args = p.parse_args([*flags, "--data", "-", "--out", "-"])
        assert trainer.sampling_of(args) == {"temperature": 1.0}
        with pytest.raises(SystemExit):
            p.parse_args([*flags, "--data", "-", "--out", "-", "--top-p", "0.9"])
