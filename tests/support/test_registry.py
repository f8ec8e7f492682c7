"""Tests of support/registry.py."""

import re

import torch
import torch.nn.functional as F

import evaluate
import grpo
import polylora
from grpo import group_advantages, maxk_advantages, passk_advantages
from helpers import ROOT, advantages_of
from methods.objectives import polychromic_advantages
from polylora import Features
from support import registry
from support.registry import DECODERS, DIVERSITIES, OBJECTIVES


# ---- Objectives on sets --------------------------------------------------------------------------

def test_the_flag_chooses_the_objective(monkeypatch):
    monkeypatch.setattr("sys.argv", ["grpo.py", "--help-all"])
    r, e = torch.tensor([[1.0, 0, 0, 1, 0]]), F.normalize(torch.randn(1, 5, 3), dim=-1)
    q = torch.rand(1, 5)
    choose = lambda name: advantages_of(OBJECTIVES[name], Features(r, e, q, set_size=3))
    want = {"group": group_advantages(r), "drgrpo": group_advantages(r, normalise=False),
            "rloo": torch.tensor([[0.75, -0.5, -0.5, 0.75, -0.5]]),
            "passk": passk_advantages(r, 3), "maxk": maxk_advantages(r, 3),
            "polychromic": polychromic_advantages(r, e, 3, q)}
    for name, value in want.items():
        assert torch.equal(choose(name), value)
        assert sum(torch.allclose(value, other) for other in want.values()) == 1
        help_ = grpo.parser().format_help().replace("\n", " ")
        assert name in help_ and OBJECTIVES[name].about.split(" (")[0].split()[-1] in help_


# ---- SFT losses ----------------------------------------------------------------------------------

# no paper's
OWN = {"coverage", "ce", "cosine", "distinct", "floor", "ngram", "levenshtein", "all", "score",
       "full", *registry.REWARDS}


def test_help_lists_every_registry_entry_with_its_paper(monkeypatch):
    monkeypatch.setattr("sys.argv", ["grpo.py", "--help-all"])
    command = lambda module, name: module.parser()._subparsers._group_actions[0].choices[name]
    decoders = {name: (f"{way.about} ({way.paper})",) for name, way in DECODERS.items()}
    tables = (registry.SFT_LOSSES, registry.ADAPTERS, registry.D_GRADIENTS, DIVERSITIES)
    for parser, tables in ((grpo.parser(),
                            (OBJECTIVES, DIVERSITIES, registry.TOKENS, registry.REWARDS)),
                           (command(polylora, "sft"), tables),
                           (command(evaluate, "measure"), (decoders,))):
        # lines break at hyphens
        plain = lambda text: " ".join(text.split()).replace("- ", "-")
        said = plain(parser.format_help())
        for name, row in (pair for table in tables for pair in table.items()):
            line = getattr(row, "about", row[-1])
            assert plain(f"{name}: {line}") in said, name
            assert name in OWN or "arXiv" in line or "same paper" in line, name


# ---- The report ----------------------------------------------------------------------------------

def test_every_module_is_in_the_package():
    """sandbox.py was missing: an installed package could not be imported."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'"(\w+)"', re.search(r"py-modules = \[(.*?)\]", text, re.S)[1]))
    root = ROOT
    assert listed == {path.stem for path in root.glob("*.py")}
    folders = set(re.findall(r'"(\w+)"', re.search(r"packages = \[(.*?)\]", text, re.S)[1]))
    assert folders == {path.parent.name for path in root.glob("*/__init__.py")}
