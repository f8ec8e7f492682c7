"""What training and measuring warn of: completions that are cut off, empty, identical or all wrong."""

import pytest

import data
import evaluate
import grpo
import polylora
import trainer
from generate import Samples
from test_combinations import places, root  # noqa: F401  (root: a fixture)
from test_study import grpo_args, lines, sft_args, world  # noqa: F401  (world: a fixture)
from trainer import STALLS, DeadSignals, Tally, stalled


def test_every_stall_is_said_once_and_in_training_after_five_steps_in_a_row():
    for stall in STALLS:
        said = [text for _ in range(9) for text in DeadSignals().warnings_of({stall.name: stall.high})]
        assert said == []                                                      # one line is no row
        dead = DeadSignals()
        said = [(step, text) for step in range(9) for text in dead.warnings_of({stall.name: stall.high})
                if text.endswith(stall.meaning)]
        assert [step for step, _ in said] == [4] and stall.meaning in said[0][1]
        assert any(stall.meaning in text for text in stalled({stall.name: stall.low}))
    assert stalled({"truncated": 0.89, "empty": 0.5, "identical": 0.99, "valid": 0.01, "passed": 0.01}) == []


def test_a_few_completions_that_end_do_not_hide_that_the_others_are_cut_off():
    """With --max-new-tokens 1 some completion is the stop token alone: the share was 1 in most steps, not in five in a row."""
    shares = [1.0, 1.0, 0.94, 1.0, 0.97]
    dead = DeadSignals()
    said = [text for x in shares for text in dead.warnings_of({"truncated": x})]
    assert len(said) == 1 and "--max-new-tokens" in said[0] and "0.9 or more" in said[0]
    dead = DeadSignals()
    assert [text for x in (1.0, 1.0, 0.5, 1.0, 1.0, 1.0) for text in dead.warnings_of({"truncated": x})] == []


def test_shares_of_completions_by_hand():
    tally = Tally()
    trainer.tally_completions(tally, [[True, False], [False, False]], [["yes", "Yes!"], ["", " "]])
    trainer.tally_completions(tally, [[True]], [["alone"]])
    means = {name: total / count for name, (total, count) in tally.sums.items()}
    assert means == pytest.approx({"truncated": 3 / 5, "empty": 2 / 5, "identical": 1.0})


@pytest.mark.parametrize("main, flags", [
    (grpo.main, ["--reward", "relevance"]), (grpo.main, ["--reward", "agreement", "--diversity-weight", "0.1"]),
    (polylora.main, ["--lambda", "0.1"]), (polylora.main, ["--loss", "unlikelihood-sequence"]),
    (polylora.main, ["--loss", "bonbon"])])
def test_training_names_completions_that_are_all_cut_off(root, capsys, main, flags):  # noqa: F811
    """Only what follows from it was named, or nothing: a reward that is not zero had no warning at all."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    capsys.readouterr()
    made = sft_args(w, "run", *flags) if main is polylora.main else grpo_args(w, "run", *flags)
    assert main([*made, "--steps", "6", "--max-new-tokens", "1"]) == 0
    assert "completions are cut off before their end: raise --max-new-tokens" in capsys.readouterr().out
    assert any("cut off" in text for text in lines(root / "run")[-1]["warnings"])


def writes(tokens_of):
    """A generate() that writes tokens_of(stops) for every completion of every prompt."""
    def write(model, prompts, *, k=1, stop_ids=(), progress=None, **settings):
        drafts = [[list(tokens_of(stop_ids, p, d)) for d in range(k)] for p in range(len(prompts))]
        ended = [[ids[-1] in stop_ids for ids in row] for row in drafts]
        return Samples(drafts, [[[-1.0] * len(ids) for ids in row] for row in drafts], ended)
    return write


WRITERS = {
    "empty": (lambda stops, p, d: [stops[0]], "completions are empty: check that the chat template"),
    "truncated": (lambda stops, p, d: [9 + p, 10 + d, 11], "completions are cut off"),
    "identical": (lambda stops, p, d: [40 + p, 41, stops[0]], "all completions of a post are one text"),
    "passed": (lambda stops, p, d: [40 + p, 41 + d, stops[0]], "no completion passes")}


@pytest.mark.parametrize("name", WRITERS)
def test_measuring_warns_of_completions_that_say_nothing(root, capsys, monkeypatch, name):  # noqa: F811
    """Pass@k was 0 without a word when a wrong chat template made every completion empty."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    tokens, said = WRITERS[name]
    monkeypatch.setattr(trainer, "generate", writes(tokens))
    command = ["measure", w["lora"], "--data", w["eval"], "--n", "10", "--max-new-tokens", "5", "--reward", "relevance"]
    monkeypatch.setattr(evaluate, "passing", lambda session, reward: (0.99 if name == "passed" else -2.0, None))
    assert evaluate.main(command) == 0
    out = capsys.readouterr().out
    warned = [line for line in out.splitlines() if line.startswith("warning: lora: ")]
    assert any(said in line for line in warned)
    assert [line.split()[2] for line in warned if line.split()[2] == "passed"] == ["passed"] * (name == "passed")
    end = lines(w["lora"])[-1]
    assert end["stage"] == "measure" and [f"warning: lora: {text}" for text in end["warnings"]] == warned


def test_measuring_warns_where_no_completion_is_right_in_any_style():
    records = [{"finished": [True] * 2, "drafts": ["a", "b"], "voices": [[], []]}] * 3
    assert [text.split(":")[0] for text in stalled(evaluate.shares_of(records))] == ["valid is 0"]
    right = [*records, {"finished": [True] * 2, "drafts": ["a", "b"], "voices": [["plain"], []]}]
    assert stalled(evaluate.shares_of(right)) == []


def test_a_sound_measurement_is_not_warned_of(root, capsys, monkeypatch):  # noqa: F811
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    monkeypatch.setattr(trainer, "generate", writes(lambda stops, p, d: [40 + p, 41 + d, stops[0]]))
    monkeypatch.setattr(evaluate, "passing", lambda session, reward: (-2.0, None))
    assert evaluate.main(["measure", w["lora"], "--data", w["eval"], "--n", "10", "--reward", "relevance"]) == 0
    assert "warning" not in capsys.readouterr().out and lines(w["lora"])[-1]["warnings"] == []


def test_a_report_shows_the_warnings_of_the_latest_measurement_alone(root, capsys, monkeypatch):  # noqa: F811
    """A mistake that was corrected is no longer a note of the report."""
    w = places(root)
    assert polylora.main(sft_args(w, "lora")) == 0
    command = ["measure", w["lora"], "--data", w["eval"], "--n", "10", "--reward", "relevance"]
    monkeypatch.setattr(evaluate, "passing", lambda session, reward: (-2.0, None))

    def notes(*more):
        assert evaluate.main([*command, *more]) == 0
        assert evaluate.main(["report", w["lora"], "--out", str(root / "report")]) == 0
        return " ".join(data.read_json(root / "report" / "report.json")["notes"])
    monkeypatch.setattr(trainer, "generate", writes(WRITERS["empty"][0]))
    assert "completions are empty" in notes()
    monkeypatch.setattr(trainer, "generate", writes(lambda stops, p, d: [40 + p, 41 + d, stops[0]]))
    assert "completions are empty" not in notes("--max-new-tokens", "9")
