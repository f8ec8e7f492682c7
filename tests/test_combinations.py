"""What meets and what changes: flags together, folders whose contents are replaced under their name, files with
gaps. Each of these ended in a traceback or, worse, in a wrong result without a word."""

import itertools
import json
import os
import re
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch

import adapters
import data
import decoders
import evaluate
import grpo
import metrics
import polylora
import rewards
import sandbox
import trainer
from model import Config, Qwen3
from test_evaluate import write_run
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


# ---- Files that stand in the way -----------------------------------------------------------------------------

def test_a_split_writes_over_nothing_that_was_there(root, capsys, monkeypatch):
    """It wrote its parts over its own source, and over a user's eval.jsonl, without a word."""
    before = {path.name: path.read_bytes() for path in root.glob("*.jsonl")}
    split = ["split", "--data", root / "sft.jsonl", "--out", root, "--sizes"]
    assert "written over" in refused(capsys, data.main, *split, "sft=5,other=3")
    assert {path.name: path.read_bytes() for path in root.glob("*.jsonl")} == before
    assert "each name once" in refused(capsys, data.main, *split, "a=3,a=4")
    out = root / "parts"
    save, split[4] = data.save_posts, out
    monkeypatch.setattr(data, "save_posts", lambda posts, path: save(posts, path) if path.name == "a.jsonl" else 1 / 0)
    with pytest.raises(ZeroDivisionError):                                     # killed between two parts
        data.main(list(map(str, [*split, "a=3,b=4"])))
    monkeypatch.setattr(data, "save_posts", save)
    assert data.main(list(map(str, [*split, "a=3,b=4"]))) == 0
    assert {p.name for p in out.iterdir()} == {"a.jsonl", "b.jsonl", "domain.json", "split.json"}
    # Another call, at work beside this one on the same folder, ends while this one reads.
    for path in out.iterdir():
        path.rename(root / f"kept-{path.name}")
    load = data.load_posts

    def slow(*args, **options):
        for path in root.glob("kept-*"):
            path.rename(out / path.name.removeprefix("kept-"))
        return load(*args, **options)
    monkeypatch.setattr(data, "load_posts", slow)
    assert data.main(list(map(str, [*split, "a=3,b=4"]))) == 0 and not list(out.glob("*.partial"))


def test_held_out_intents_leave_the_other_parts_enough():
    """The first intent drawn, of 60 posts in 100, was held out whatever was left; two of four seeds were refused."""
    posts = [data.Post(str(i), f"number {i}", ("yes",), (), "A" if i < 60 else "B") for i in range(100)]
    for seed in range(8):
        parts = data.split_by_intent(posts, {"sft": 55, "eval": 30}, seed)
        assert {p.intent for p in parts["sft"]} == {"A"} and {p.intent for p in parts["eval"]} == {"B"}


def test_the_bare_base_is_measured_into_no_run_and_no_model(root, capsys):
    """--bare wrote its config.json over a checkpoint's, and over a run's."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    for folder in (w["lora"], w["model"]):
        before = (Path(folder) / "config.json").read_bytes()
        assert "--bare" in refused(capsys, evaluate.main, "measure", "--model", w["model"], "--bare", folder, "--data",
                                   w["eval"], "--n", "10", *SHORT)
        assert (Path(folder) / "config.json").read_bytes() == before
    bare = ["--bare", root / "bare", "--model", w["model"], "--data", w["eval"]]
    assert measured(capsys, *bare, "--name", "hot") == measured(capsys, *bare) == "1 of 1 runs"
    assert measured(capsys, *bare, "--temperature", "0.9") == "1 of 1 runs"     # again, into what it wrote itself


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
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def tiny_qwen(tie, **heads):
    return Qwen3(Config(64, 16, 32, 2, 2, 1, 8, tie_word_embeddings=tie), **heads)


def test_a_tied_embedding_is_no_token_head_of_a_reward_model(tmp_path):
    """With tied embeddings a reward model passed for a judge, and could be fine-tuned as a writer."""
    for tie in (True, False):
        folder = tmp_path / str(tie)
        tiny_qwen(tie, lm_head=False, score_head=True).save_pretrained(folder)
        model = Qwen3.from_pretrained(folder)
        assert model.has_score and not model.has_logits
        tiny_qwen(tie).save_pretrained(folder)
        assert Qwen3.from_pretrained(folder).has_logits


def test_a_tokenizer_whose_stop_is_no_special_token_is_refused(root, capsys):
    """<|im_end|> stood in every draft's text: nothing was right, all rewards were 0."""
    w = places(root)
    path = root / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for token in tokenizer["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<|im_end|>"
    path.write_text(json.dumps(tokenizer))
    assert "<|im_end|>" in (said := refused(capsys, polylora.main, *sft_args(w, "never"))) and "special" in said


# ---- Texts ---------------------------------------------------------------------------------------------------

def test_marks_continue_their_word():
    """Hindi fell apart at its vowel signs, which made unlike drafts alike; and by --diversity ngram or levenshtein,
    which left them out, words that differ were equal."""
    assert metrics.words("\u0939\u093f\u0928\u094d\u0926\u0940 ok, don't") == ["\u0939\u093f\u0928\u094d\u0926\u0940", "ok", ",", "don't"]
    assert metrics.words("cafe\u0301") == metrics.words("caf\u00e9") == ["caf\u00e9"]
    assert metrics.plain_words("Don't, caf\u00e9_1") == ["don", "t", "caf\u00e9_1"]
    for a, b in itertools.combinations(("\u0915\u0940", "\u0915\u093e", "\u0915\u0947"), 2):
        assert metrics.plain_words(a) != metrics.plain_words(b)


HEAD = "def add(a, b):\n"


@pytest.mark.parametrize("draft", [
    "return a + b", "c = a + b\n    return c", "c = a + b\nreturn c", "if a:\n        return a + b\n    return b",
    "```python\r\n    return a + b\n```", "``` python\ndef add(a, b):\n    return a + b\n```", "~~~py\n    return a + b\n~~~",
    "add = lambda a, b: a + b", "```\n    return a + b\n```\nThis adds.", "def add(a, b):\n    return a + b"])
def test_a_body_that_lost_its_first_indent_is_a_body(draft):
    """HumanEval's own way of completing could never be right: drafts are stripped."""
    for head in (HEAD, '"""Sums."""\n' + HEAD + "    'Add.'\n"):
        room = {}
        exec(sandbox.program_of(draft, head, ["add"]), room)
        assert room["add"](2, 3) == 5


# ---- The report, and train.sh ------------------------------------------------------------------------------------------------

def test_notes_of_unequal_seeds_say_whose_interval_is_over_what(tmp_path, capsys):
    """An arm of one seed was said to have an interval over seeds, and took away the warning of the others."""
    runs = []
    for arm, seeds in (("a", (1, 2, 3)), ("b", (1,)), ("c", (1, 2, 3))):
        for seed in seeds:
            runs.append(write_run(tmp_path / f"{arm}{seed}", seed, arm, lambda i: i % 3 + 2 * (arm == "c") + seed % 2,
                                  post=f"of seed {seed}"))
    assert evaluate.main(["report", *runs, "--out", str(tmp_path / "r"), "--against", "a"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "of one seed, and so over posts alone: b" in out and "the smallest possible p is 0.25" in out
    assert "--primary needs pass@5" in refused(capsys, evaluate.main, "report", *runs, "--out", tmp_path / "r", "--ks", "1,3",
                                               "--primary", "c", "a")


def test_every_room_is_in_the_package():
    """sandbox.py was missing: an installed package could not be imported."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    listed = set(re.findall(r'"(\w+)"', re.search(r"py-modules = \[(.*?)\]", text, re.S)[1]))
    assert listed == {path.stem for path in Path(__file__).parents[1].glob("*.py")}


def test_a_dry_run_prints_the_commands_that_would_run(tmp_path):
    """They held --dry-run and a folder that is removed again."""
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "STUDY_PYTHON": "true"}
    ran = subprocess.run(["bash", "train.sh", "--out", str(tmp_path / "o"), "--dry-run", "--seeds", "1"],
                         cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True, timeout=600)
    said = [line for line in ran.stdout.splitlines() if line.startswith("python ")]
    assert len(said) > 6 and not any("dry-run" in line for line in said) and str(tmp_path / "o/seed1/lora") in ran.stdout


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


# ---- Picks and the reward models that learn from them ------------------------------------------------------

def styled_posts(root, count=12):
    """Posts with replies in two styles, of the domain `voices`."""
    rows = [{"id": str(i), "post": f"My {topic} let me down, part {i}", "replies": {"kind": f"Poor {topic} {i}", "terse": f"No {topic} {i}"}}
            for i in range(count) for topic in ["kettle bus lecture garden".split()[i % 4]]]
    path = root / "styled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def picked(monkeypatch, run, place, posts=("My tram sings", "Another one")):
    """Picks of two posts, as a person makes them at the prompt of `drafts`."""
    answers = [line for post in posts for line in (post, "1")]
    monkeypatch.setattr("sys.stdin", answers)
    assert evaluate.main(["drafts", str(run), "--picks", str(place), "--k", "3", *SHORT]) == 0
    rows = [json.loads(line) for line in place.read_text().splitlines()]
    for row in rows:                         # of a random model: two drafts that differ
        row["drafts"], row["pick"], row["reply"] = ["one draft", "another draft"], 0, "one draft"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_a_reward_model_learns_picks_in_the_chat_format_of_the_run_that_wrote_the_drafts(root, capsys, monkeypatch):
    """Picks from a run with styles were learnt in the format of `replies`, and asked by grpo.py in the run's own."""
    w = places(root) | {"sft": styled_posts(root)}
    assert polylora.main(sft_args(w, "lora")) == 0
    place = root / "picks.jsonl"
    rows = picked(monkeypatch, root / "lora", place)
    assert {row["domain"] for row in rows} == {"voices"}
    asked_for, encode = [], data.encode_chat
    monkeypatch.setattr(data, "encode_chat", lambda tokenizer, messages, **more: (
        asked_for.append(messages), encode(tokenizer, messages, **more))[1])
    train = ["train", "--model", w["model"], "--data", str(place), "--steps", "2", "--batch", "2", "--rank", "2", "--out"]
    assert rewards.main([*train, str(root / "heads")]) == 0
    assert {chat[0]["content"] for chat in asked_for} == {"My tram sings", "Another one"}
    asked_for.clear()
    capsys.readouterr()
    by = ["--reward", "model", "--reward-model", str(root / "heads"), "--data", w["sft"]]
    assert grpo.main(grpo_args(w, "rl", *by)) == 0
    judged = [chat[0]["content"] for chat in asked_for if chat[-1]["role"] == "assistant"]
    assert judged and all(text.startswith("My ") for text in judged)           # the post itself, as in training
    assert "judges here as" not in capsys.readouterr().out

    place.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "domain"}) + "\n" for row in rows))
    assert rewards.main([*train, str(root / "older")]) == 0                    # picks that do not say it
    assert grpo.main(grpo_args(w, "rl2", *by[:3], str(root / "older"), *by[4:])) == 0
    assert "judges here as 'voices' does" in capsys.readouterr().out


def test_picks_of_runs_of_two_domains_are_not_mixed_unawares(root, capsys, monkeypatch):
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    place = root / "picks.jsonl"
    rows = picked(monkeypatch, root / "lora", place)
    assert {row["domain"] for row in rows} == {"replies"}
    rows[1]["domain"] = "voices"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", "--model", w["model"], "--data", place, "--steps", "1", "--batch", "2", "--rank", "2", "--out", root / "heads"]
    assert "replies, voices" in refused(capsys, rewards.main, *train)
    assert rewards.main([*map(str, train), "--domain", "voices"]) == 0
    assert data.read_json(root / "heads" / "done.json")["domain"]["domain"] == "voices"
    rows[1]["domain"] = "nonsense"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "no domain 'nonsense'" in refused(capsys, rewards.main, *train[:-1], root / "other")
