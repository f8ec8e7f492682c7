"""Tests of support/flags.py."""

import grpo
import polylora
from support.peft_files import LINEARS


# ---- A session -----------------------------------------------------------------------------------

def test_default_flags_are_those_of_the_card():
    """L2, L13, R9: no weight decay, no dropout, all seven linears, no KL."""
    sft_, rl_ = (p.parse_args([*flags, "--data", "-", "--out", "-"]) for p, flags in (
        (polylora.parser(), ["sft", "--model", "-"]), (grpo.parser(), ["--start", "-"])))
    assert (sft_.weight_decay, sft_.dropout, rl_.weight_decay, rl_.beta) == (0, 0, 0, 0)
    assert sft_.targets == ",".join(LINEARS) and len(LINEARS) == 7
