"""The layout: lines of at most 100 columns, short files of the method, imports in one direction."""

import ast

import pytest

from helpers import ROOT

FOLDERS = ("docs", "methods", "report", "support", "tests")
FILES = sorted([*ROOT.glob("*.py"), *(f for name in FOLDERS for f in (ROOT / name).rglob("*.py"))])
METHOD = ("model", "lora", "generate", "data", "trainer", "polylora", "rewards", "grpo", "metrics",
          "evaluate")

# A file may import those of its own level and of the levels before it, and nobody imports methods/.
LEVELS = (("support",), ("model", "lora", "data", "metrics"), ("generate",), ("engine",),
          ("trainer",), ("polylora",), ("rewards",), ("grpo", "evaluate"))
LEVEL_OF = {name: number for number, names in enumerate(LEVELS) for name in names}


def imported(path):
    """Names of the modules that a file imports anywhere, the folder alone for those in folders."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def too_wide(path):
    """The numbers of a file's lines of more than 100 characters."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [number for number, line in enumerate(lines, 1) if len(line) > 100]


def test_no_line_has_more_than_100_columns(tmp_path):
    assert len(FILES) > 100
    assert {str(path.relative_to(ROOT)): too_wide(path) for path in FILES if too_wide(path)} == {}
    (tmp_path / "wide.py").write_text("x = 1\n" + "#" * 101 + "\n" + "#" * 100 + "\n")
    assert too_wide(tmp_path / "wide.py") == [2]


@pytest.mark.parametrize("name", METHOD)
def test_a_file_of_the_method_has_at_most_450_lines(name):
    assert len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize("path", [p for p in FILES if p.parent in (ROOT, ROOT / "support")],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_lead_from_the_simple_to_the_composed(path):
    """support before model, model before the phases; methods/ are loaded by the registry alone."""
    level = LEVEL_OF.get("support" if path.parent != ROOT else path.stem, len(LEVELS))
    names = imported(path)
    assert "methods" not in names
    assert not {name for name in names if LEVEL_OF.get(name, 0) > level}


def test_reports_import_metrics_and_support_only():
    names = set().union(*(imported(path) for path in (ROOT / "report").glob("*.py")))
    assert names & set(LEVEL_OF) == {"metrics", "support"} and "methods" not in names
