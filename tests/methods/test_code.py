"""Tests of methods/code.py."""

import pytest

from methods import sandbox


# ---- Texts ---------------------------------------------------------------------------------------

HEAD = "def add(a, b):\n"


@pytest.mark.parametrize("completion", [
    "return a + b", "c = a + b\n    return c", "c = a + b\nreturn c",
    "if a:\n        return a + b\n    return b",
    "```python\r\n    return a + b\n```", "``` python\ndef add(a, b):\n    return a + b\n```",
    "~~~py\n    return a + b\n~~~",
    "add = lambda a, b: a + b", "```\n    return a + b\n```\nThis adds.",
    "def add(a, b):\n    return a + b"])
def test_a_body_that_lost_its_first_indent_is_a_body(completion):
    """HumanEval's own way of completing could never be right: drafts are stripped."""
    for head in (HEAD, '"""Sums."""\n' + HEAD + "    'Add.'\n"):
        space = {}
        exec(sandbox.program_of(completion, head, ["add"]), space)
        assert space["add"](2, 3) == 5
