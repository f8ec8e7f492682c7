"""Tests of the studies' commands."""

import pytest

from helpers import asked, parsed


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("given, sft, then", [("7,3", 7, 3), ("5", 5, 5)])
def test_both_phases_may_have_steps_of_their_own(tmp_path, given, sft, then):
    commands = asked(tmp_path, "--seeds", "11", "--steps", given)
    first = [args for args in parsed(commands, "polylora") if args.command == "sft"]
    assert {args.steps for args in first} == {sft}
    assert {args.steps for args in parsed(commands, "grpo")} == {then}
