"""What meets and what changes: flags together, folders whose contents are replaced under their name, files with
gaps. Each of these ended in a traceback or, worse, in a wrong result without a word."""

import json
import shutil
import types
from pathlib import Path

import pytest
import torch

import adapters
import data
import decoders
import evaluate
import grpo
import polylora
import rewards
import trainer
from model import Qwen3
from test_study import asked, grpo_args, lines, sft_args, world  # noqa: F401  (world: a fixture)

SHORT = ["--max-new-tokens", "5"]


@pytest.fixture
def root(world, tmp_path):  # noqa: F811
    """A folder with a world of its own: its base, posts and SFT run may be spoilt."""
    for name in ("model", "sft.jsonl", "grpo.jsonl", "eval.jsonl"):
        of = world["root"] / name
        (shutil.copytree if of.is_dir() else shutil.copy)(of, tmp_path / name)
    return tmp_path


def places(root):
    return {"model": str(root / "model"), "lora": str(root / "lora"), "root": root} | {
        name: str(root / f"{name}.jsonl") for name in ("sft", "grpo", "eval")}


def refused(capsys, main, *args):
    """The one sentence with which `main` refuses."""
    capsys.readouterr()
    assert main(list(map(str, args))) == 2
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(said) == 1
    return said[0]


def measured(capsys, *args):
    """"1 of 2 runs", as `measure` says how many it has to measure."""
    assert evaluate.main(["measure", *map(str, args), "--n", "10", *SHORT]) == 0
    out = capsys.readouterr().out
    return next(x for x in out.splitlines() if " of " in x and x.endswith("runs")).split(", ")[-1]


# ---- What is replaced under its name -----------------------------------------------------------------------

def test_a_base_that_was_made_anew_is_refused_by_every_door(root, capsys):
    """`drafts` wrote nonsense, GRPO from A/adapter trained on it, `wise` mixed adapters of two bases."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    torch.manual_seed(5)
    model = Qwen3.from_pretrained(w["model"])
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(w["model"])
    assert "another base" in refused(capsys, evaluate.main, "drafts", w["lora"], "hello", *SHORT)
    for start in (w["lora"], w["lora"] + "/adapter"):
        assert "another base" in refused(capsys, grpo.main, *grpo_args(w, "never", "--start", start))
    assert polylora.main(sft_args(w, "later")) == 0
    for a, b in ((w["lora"], root / "later"), (root / "later/adapter", w["lora"])):
        assert "different base" in refused(capsys, polylora.main, "wise", a, b, "--out", root / "never")
    assert not (root / "never").exists()


def train_heads(w, seed, members="1"):
    folder = w["root"] / "heads"
    shutil.rmtree(folder, ignore_errors=True)
    assert rewards.main(["train", "--model", w["model"], "--data", w["sft"], "--out", str(folder), "--steps", "2",
                         "--batch", "2", "--rank", "2", "--members", members, "--seed", str(seed), "--lr", "1e-2"]) == 0
    return str(folder)


def test_a_reward_model_that_was_trained_anew_is_another_one(root, capsys):
    """Old scores stayed, and a resumed run went on with other rewards."""
    w = places(root)
    by = ["--reward", "model", "--reward-model", train_heads(w, 1)]
    bare = ["--bare", root / "bare", "--model", w["model"], "--data", w["eval"], *by]
    assert measured(capsys, *bare) == "1 of 1 runs" and measured(capsys, *bare) == "0 of 1 runs"
    assert polylora.main(sft_args(w, "lora")) == 0
    chosen = ["--decoder", "best-of-n", "--best-by", "model", *by[2:], w["lora"], "--data", w["eval"]]
    assert measured(capsys, *chosen) == "1 of 1 runs" and measured(capsys, *chosen) == "0 of 1 runs"
    assert measured(capsys, *chosen, "--spread-penalty", "5") == "1 of 1 runs"
    assert grpo.main(grpo_args(w, "run", *by)) == 0
    (root / "run" / "done.json").unlink()
    train_heads(w, 2)
    assert measured(capsys, *bare) == "1 of 1 runs"
    assert "another reward model" in refused(capsys, grpo.main, *grpo_args(w, "run", *by, "--resume"))
    assert rewards.reward_model_hash(w["model"]) == trainer.model_hash(w["model"], None)


def test_a_setting_that_a_resumption_drops_is_named_with_its_default(root, capsys):
    """"diversity_schedule = 'rising', now False is asked for"."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    weighed = grpo_args(w, "run", "--diversity-weight", "1")
    assert grpo.main([*weighed, "--diversity-schedule", "rising"]) == 0
    assert "now 'constant' is asked for" in refused(capsys, grpo.main, *weighed)


# ---- Drafts chosen by a reward -------------------------------------------------------------------------------

def test_the_best_of_n_for_one_post_needs_a_reward_that_tells_drafts_apart(root, capsys):
    """The base's states were centred on the post itself: cosines of rounding noise chose the draft; and a reward
    model, the way that the prompt's picks lead to, ended in a traceback."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    best = ["drafts", w["lora"], "hello", "--decoder", "best-of-n", "--k", "2", "--pool", "2", *SHORT]
    assert "embedding model" in refused(capsys, evaluate.main, *best)
    assert "no reply that a draft could agree with" in refused(capsys, evaluate.main, *best, "--best-by", "agreement")
    assert evaluate.main([*best, "--best-by", "model", "--reward-model", train_heads(w, 1, members="2")]) == 0
    assert "at least 1" in refused(capsys, evaluate.main, "drafts", w["lora"], "hello", "--k", "0")


def test_agreement_with_a_post_that_has_no_reply_is_refused_before_the_first_step(root, capsys):
    """It ended in a traceback at the first such post."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    rows = [{"post": f"number {i} broke", "replies": ["Oh no", "Poor you"]} for i in range(6)]
    Path(w["grpo"]).write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "a tale of kettles"}]))
    assert "has no reply" in refused(capsys, grpo.main, *grpo_args(w, "never", "--domain", "replies"))
    assert not (root / "never").exists()


def test_an_ensemble_is_for_plain_sampling(root, capsys):
    """Other decoders' drafts were of one member and scored by another (by .9 in a log-probability)."""
    w = places(root)
    assert polylora.main(sft_args(w, "many", "--adapter", "ensemble", "--members", "2")) == 0
    for name in set(decoders.DECODERS) - {"sampling"}:
        assert "ensemble" in refused(capsys, evaluate.main, "drafts", root / "many", "hello", "--decoder", name), name
    assert "ensemble" in refused(capsys, evaluate.main, "measure", root / "many", "--data", w["eval"], "--n", "10",
                                 "--decoder", "mmi", *SHORT)


# ---- Objectives and losses -----------------------------------------------------------------------------------

def test_ba_lora_s_teacher_keeps_its_own_head_when_all_weights_train(world, monkeypatch):  # noqa: F811
    """Its logits were the base's states by the trained head: the term that should pull back was none."""
    model = evaluate.load_model(world["model"], types.SimpleNamespace(dtype="float32"), torch.device("cpu"))
    before = model.head_weight().detach().clone()
    adapters.add_adapter(model, "full", 2, 4)
    with torch.no_grad():
        model.head_weight().add_(torch.randn_like(before))
    seen = {}
    monkeypatch.setattr(polylora, "predicting_states", lambda model, rows: None)
    monkeypatch.setattr(polylora, "token_losses",
                        lambda model, rows, function, **_: seen.update(function.keywords) or torch.zeros(1))
    session = types.SimpleNamespace(args=types.SimpleNamespace(loss="ba-lora", loss_value=None), model=model)
    polylora.reply_losses(session, types.SimpleNamespace(draft=None))
    assert torch.equal(seen["head"], before) and not seen["head"].requires_grad
    assert not torch.equal(model.head_weight(), before)


def test_d_held_knows_the_first_d_though_the_first_step_had_no_draft(tmp_path):
    """A first step whose posts were all left out (--resample) ended the run, or its resumption, in a traceback."""
    args = types.SimpleNamespace(diversity_schedule="held", steps=10)
    new = lambda: types.SimpleNamespace(args=args, run=types.SimpleNamespace(folder=tmp_path))
    session = new()
    assert rewards.scheduled(session, 1, 0.5) == 0 and rewards.scheduled(session, 2, 0.45) == pytest.approx(1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "D": 0.5}\n{"step": 3, "D": 0.1}\n')
    assert rewards.scheduled(new(), 3, 0.45) == pytest.approx(1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert rewards.scheduled(new(), 1, 0.45) == 0
    args.diversity_schedule = "rising"
    assert rewards.scheduled(new(), 9, 0.45) == 2


@pytest.mark.parametrize("flags, word", [("--diversity-schedule rising", "--diversity-weight"),
                                         ("--advantage single-stream-spo --k 1 --resample 2", "--k 1")])
def test_flags_that_would_do_nothing_together_are_refused(world, capsys, flags, word):  # noqa: F811
    """A schedule of no weight; and with one draft a post all rewards of a post are equal, so that every step had none."""
    assert word in refused(capsys, grpo.main, *grpo_args(world, "never", *flags.split()))


def test_a_base_can_be_made_by_epochs(tmp_path):
    """`--steps 0`, which the help offers, was an UnboundLocalError."""
    assert data.main(["split", "--data", "pocket", "--sizes", "a=24", "--out", str(tmp_path)]) == 0
    assert polylora.main(["base", "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "base"), "--steps", "0",
                          "--epochs", "1", "--batch", "8", "--hidden", "16", "--layers", "1", "--heads", "2"]) == 0
    assert [x["step"] for x in lines(tmp_path / "base") if "event" not in x] == [1, 2, 3]


# ---- Files with gaps -----------------------------------------------------------------------------------------

def test_no_intent_and_intent_null_are_the_same():
    """null was the intent "None": a scene of its own to split by, one cluster in an interval."""
    row = {"post": "Hi", "reply": "Yo"}
    intents = [data.parse_line(json.dumps(row | more).encode(), 1, 99).intent
               for more in ({}, {"intent": None}, {"intent": 0})]
    assert intents == ["", "", "0"]


def test_a_pick_is_better_than_what_says_something_else(tmp_path):
    """The prompt keeps empty drafts beside a pick, which ended the training of a reward model; and drafts that say
    what the pick says were called worse than it."""
    path = tmp_path / "picks.jsonl"
    path.write_text('{"post": "Hi", "drafts": ["", "Yo!", "yo", "Hello", " "], "pick": 1}\n'
                    '{"post": "Hi", "drafts": ["Yo", "yo"], "pick": 0}\n')
    found = rewards.load_preferences(path)
    assert [(p.post.replies, p.likes) for p in found] == [(("Yo!", "Hello"), [1, 0]), (("Yo",), [1])]
    assert rewards.usable(found, "auto", path) == ("likes", found[:1])


def test_a_report_shows_sets_of_a_size_that_nobody_asked_for(root, capsys):
    """Pass@4 of beams in sets of 4 was in no table, and alone it was an IndexError."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    measured(capsys, w["lora"], "--data", w["eval"], "--decoder", "beams", "--set-size", "4", "--n", "12")
    assert evaluate.main(["report", w["lora"] + "@beams", "--out", str(root / "report")]) == 0
    assert json.loads((root / "report/report.json").read_text())["ks"] == [4]
    measured(capsys, w["lora"], "--data", w["eval"])
    assert "10 drafts a post, too few for any of --ks" in refused(
        capsys, evaluate.main, "report", w["lora"], "--ks", "50", "--out", root / "never")


def test_small_slips_are_sentences(root, capsys, monkeypatch):
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    monkeypatch.chdir(w["lora"])
    assert measured(capsys, ".", "--data", w["eval"], "--name", "again") == "1 of 1 runs"
    assert (root / "lora@again" / "evaluation.json").exists()
    measured(capsys, ".", "--data", w["eval"])
    assert "--judge-drafts 0" in refused(capsys, evaluate.main, "measure", ".", "--data", w["eval"], "--judge-drafts", "0")
    assert "--posts -1" in refused(capsys, evaluate.main, "ask", w["lora"], root / "lora@again", "--posts", "-1", "--out", root / "sheet.csv")
    (root / "anna.csv").write_text("item,set,pick\n")
    assert "no key" in refused(capsys, evaluate.main, "picks", root / "anna.csv")
    foreign = root / "foreign"                                                 # an adapter of PEFT's, in FOLDER/adapter
    shutil.copytree(root / "lora" / "adapter", foreign / "adapter")
    assert polylora.main(["wise", w["lora"], str(foreign), "--out", str(root / "between")]) == 0
    assert measured(capsys, root / "between", "--data", w["eval"]) == "1 of 1 runs"
    assert "exists" in refused(capsys, polylora.main, "wise", w["lora"], foreign, "--out", root / "between")


# ---- train.sh ------------------------------------------------------------------------------------------------

def test_a_study_with_other_arms_or_temperatures_is_reported(tmp_path):
    """After all the training the report failed: the study's endpoint named an arm that was not asked; `fresh` measured
    at its own temperature whatever the user wrote."""
    def report_of(*flags):
        *_, (_, *words) = asked(tmp_path, "--seeds", "23", *flags)
        return evaluate.parser().parse_args(words)
    assert report_of("--study", "cover", "--arms", "lora lora-cover").primary is None
    report = report_of("--study", "fresh", "--temperatures", "0.5")
    runs = {Path(run).name for run in report.runs}
    assert "dpp-cover@1@0.5" in runs and "dpp-cover@1@0.75" not in runs
    assert report.primary == ["dpp-cover@1", "lora-cover", "lora-passk"] and set(report.primary) <= runs
