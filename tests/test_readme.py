"""README.md: its numbers stand in the results, its commands are ones that the programs take, its
table of files is true.

`python tests/test_readme.py` prints the table of files as it should be."""

import csv
import importlib
import re
import shlex

import pytest
import torch

from helpers import ROOT


README = (ROOT / "README.md").read_text(encoding="utf-8")

FILES = {
    "model.py": "Qwen3: config, layers, model, packed rows, log-probabilities of given tokens",
    "lora.py": "LoRA on and off, its files in PEFT's layout, merging",
    "generate.py": "k completions with a KV cache: the plain loop, the samplers, the embedder",
    "data.py": "prompts and replies, chat format, disjoint splits, what a domain is",
    "trainer.py": "the loop around a step, the session, seeds",
    "polylora.py": "D, its gradient, its gate; phase one, SFT with D",
    "rewards.py": "the verifier's reward, agreement with people's replies",
    "grpo.py": "advantages, the clipped loss; phase two, GRPO with D",
    "metrics.py": "Pass@k, Distinct-n, Self-BLEU, Vendi",
    "evaluate.py": "measure runs; drafts for one post",
}


def lines_of(name):
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def minutes_of(name):
    """Reading at some 30 lines a minute."""
    return round(lines_of(name) / 30)


def blocks(language=""):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_table_of_files_is_true():
    rows = re.findall(r"\| \[(\w+\.py)\]\(\1\) \| (.*?) \| (\d+) \| (\d+) \|", README)
    assert [row[0] for row in rows] == list(FILES)
    for name, about, lines, minutes in rows:
        assert about == FILES[name]
        assert abs(int(lines) - lines_of(name)) <= 10, name
        assert abs(int(minutes) - minutes_of(name)) <= 1, name


def test_it_is_short():
    assert len(README.encode()) <= 11_000 and len(README.splitlines()) <= 160
    text = re.sub(r"```.*?```|`[^`]*`|\(http[^)]*\)", "", README, flags=re.S)
    assert len(re.findall(r"(?<![\w`/.-])[+−-]?\.?\d[\d,.]*", text)) <= 90


def test_every_row_of_the_results_is_a_row_of_the_summary():
    with open(ROOT / "results" / "summary.csv", newline="", encoding="utf-8") as file:
        known = list(csv.DictReader(file))
    rows = re.findall(r"\| (.*?) \| (.*?) \| (\.\d+) \| (\.\d+) \| ([+-]\.\d+) \[([+-]\.\d+), "
                      r"([+-]\.\d+)\] \|", README)
    assert len(rows) == 7
    for _, rival, value, ours, *interval in rows:
        numbers = [float(x) for x in interval]
        matching = []
        for row in known:
            rivals = {row["best_without_diversity_term"]: row["best_without_diversity_term_value"],
                      row["best_published_term"]: row["best_published_term_value"]}
            same_rival = any(name and (name in rival or rival.startswith(name))
                             and float(number or "nan") == float(value)
                             for name, number in rivals.items())
            same = [float(row[name]) for name in ("difference", "low", "high")] == numbers
            if same_rival and same and float(row["d_value"]) == float(ours):
                matching.append(row)
        assert len(matching) == 1, (rival, value, ours, interval)


@pytest.mark.multirank
def test_every_command_is_one_that_the_programs_take():
    commands = [line for block in blocks() for line in block.splitlines() if line.strip()]
    assert len(commands) >= 6
    for line in commands:
        words = shlex.split(line)
        if words[0] == "python":
            program = importlib.import_module(words[1].removesuffix(".py"))
            program.parser().parse_args(words[2:])
        elif words[0] == "torchrun":
            page = (ROOT / "train.sh").read_text(encoding="utf-8")
            flags = [word for word in words[words.index("train.sh") + 1:] if word.startswith("--")]
            for flag in flags:
                assert f"{flag}|" in page or f"{flag})" in page, flag
        else:
            assert words[0] in ("pip", "pytest"), line


def test_every_link_leads_to_a_file():
    for place in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / place).exists(), place


def test_the_names_in_how_it_works_exist():
    functions = r"`(generate|engine|model|polylora|grpo|evaluate|metrics)\.(\w+)`"
    for module, name in re.findall(functions, README):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_the_example_of_a_method_registers_and_works():
    from support.registry import OBJECTIVES
    code, = blocks("python")
    assert len(code.strip().splitlines()) <= 8
    try:
        exec(compile(code, "methods/rank.py", "exec"), {"__name__": "methods.rank"})
        got = OBJECTIVES["rank"].function(torch.tensor([[0.5, 2.0, 1.0]]))
        assert got.tolist() == [[-1.0, 1.0, 0.0]]
    finally:
        del OBJECTIVES["rank"]
        OBJECTIVES.files.pop("rank", None)


def table():
    rows = ["| file | what is in it | lines | minutes |", "|---|---|---|---|"]
    for name, about in FILES.items():
        rows.append(f"| [{name}]({name}) | {about} | {lines_of(name)} | {minutes_of(name)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
