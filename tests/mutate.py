"""How much do the tests notice? Changes one sign, factor, comparison, index or flag at a time in the functions of
the registers (objectives, diversities, SFT losses) and counts the changes that make a test fail.

    python tests/mutate.py                     # all of them, some minutes; prints those that no test noticed
    python tests/mutate.py --only gem_loss --tests test_methods.py

A change works on a copy of the rooms in a temporary folder. Not part of the usual run.
"""

import argparse
import ast
import copy
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = {
    "grpo.py": """group_advantages check_size check_binary passk_advantages subsets set_advantages maxk_advantages
        polychromic_advantages coverage_advantages passk_full_advantages random_sets passk_bootstrap_advantages
        passk_mixed_advantages bon_advantages polyepo_advantages darling_advantages dra_advantages dqo_advantages
        uniqueness_advantages unlikeliness_advantages evol_advantages maxrl_advantages tailrl_advantages
        wreinforce_advantages focal_advantages of_drafts of_sets of_both OBJECTIVES advantages_of
        ucpo_advantages mara_advantages soft_advantages stream_advantages token_covariances clip_cov kl_cov
        draft_means policy_loss overlong_penalty""",
    "rewards.py": """kept_share preference_loss draw_pair usable padded preference_step""",
    "polylora.py": """gated pair_distances pair_mean diversity pair_advantages diversity_advantages leave_one_out log_det
        vendi alike distinct_answers answer_classes word_distances DIVERSITIES measure
        diversity_loss gem_loss entropy_loss unlikelihood_loss earlier_tokens ba_lora_regularizer ba_lora_loss
        base_states SFT_LOSSES reply_losses sed_loss ba_lora_nlu_loss covariance_penalty repeated_tokens add_unlikely
        bonbon_loss add_bonbon"""}
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
         ast.FloorDiv: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
         ast.BitXor: ast.BitOr, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Eq: ast.NotEq,
         ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
         ast.In: ast.NotIn, ast.NotIn: ast.In}
NAMES = {"amax": "amin", "amin": "amax", "max": "min", "min": "max", "argmax": "argmin", "minimum": "maximum",
         "any": "all", "all": "any"}


def changed(node):
    """The node's variants, each with one thing changed in it (not in its children)."""
    if isinstance(node, ast.BinOp) or isinstance(node, ast.BoolOp):
        if type(node.op) in SWAPS:
            yield with_field(node, "op", SWAPS[type(node.op)]())
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield with_field(node, "ops", [*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1:]])
    whole = isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant) and isinstance(node.operand.value, int)
    if isinstance(node, ast.UnaryOp) and not whole:                            # -1 becomes -2 below, not 1: often the same axis
        yield node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield with_field(node, "value", not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield with_field(node, "value", node.value + 1 if isinstance(node.value, int) else 2 * node.value + 0.5)
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield with_field(node, "attr", NAMES[node.attr])
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield with_field(node, "id", NAMES[node.id])


def with_field(node, field, value):
    node = copy.deepcopy(node)
    setattr(node, field, value)
    return node


class Replace(ast.NodeTransformer):
    def __init__(self, old, new):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else super().visit(node)


def name_of(top):
    if isinstance(top, ast.FunctionDef):
        return top.name
    named = isinstance(top, ast.Assign) and isinstance(top.targets[0], ast.Name)
    return top.targets[0].id if named else ""


def places(top):
    """(number of the node in ast.walk's order, number of its variant) of all changes; messages are left out."""
    walked = list(ast.walk(top))
    said = {id(x) for node in walked if isinstance(node, (ast.Raise, ast.JoinedStr)) for x in ast.walk(node)}
    return [(i, j) for i, node in enumerate(walked) if id(node) not in said for j, _ in enumerate(changed(node))]


def mutants(source, names):
    """(function, line, what is changed, the whole changed source) of every change."""
    for number, top in enumerate(ast.parse(source).body):
        for i, j in places(top) if name_of(top) in names else ():
            tree = ast.parse(source)
            node = list(ast.walk(tree.body[number]))[i]
            new = list(changed(node))[j]
            line, what = node.lineno, f"{ast.unparse(node)}  ->  {ast.unparse(new)}"
            tree.body[number] = Replace(node, new).visit(tree.body[number])
            yield name_of(top), line, what, ast.unparse(ast.fix_missing_locations(tree))


def passes(folder, files, match="", seconds=120):
    """Runs the tests in a child process on the rooms in `folder`: do they pass? A child saves importing torch."""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)                                                  # a change may loop for ever
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.chdir(folder)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-k", match, *(str(Path("tests") / f) for f in files)])
        os._exit(int(code))
    return os.waitpid(child, 0)[1] == 0


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tests", nargs="+", default=["test_methods.py", "test_rivals.py", "test_rewards.py", "test_grpo.py"])
    p.add_argument("--only", nargs="+", help="these functions alone")
    p.add_argument("--match", default="", help="of the tests those that pytest's -k would take")
    p.add_argument("--minutes", type=float, default=1e9, help="stop after so many, and say how far it came")
    args, began, survivors, total = p.parse_args(), time.perf_counter(), [], 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for file in ROOT.glob("*.py"):
            shutil.copy(file, folder)
        shutil.copytree(ROOT / "tests", folder / "tests")
        if not passes(folder, args.tests, args.match):
            sys.exit("the tests fail as they are: mend them first")
        for room, names in FUNCTIONS.items():
            source = (folder / room).read_text(encoding="utf-8")
            for name, line, what, text in mutants(source, args.only or names.split()):
                if time.perf_counter() - began > 60 * args.minutes:
                    print(f"stopped at {room}:{line} {name}")
                    break
                (folder / room).write_text(text, encoding="utf-8")
                total += 1
                if passes(folder, args.tests, args.match):
                    survivors.append(f"{room}:{line} {name}: {what}")
                    print(survivors[-1], flush=True)
            (folder / room).write_text(source, encoding="utf-8")
    noticed = total - len(survivors)
    print(f"{noticed} of {total} changes noticed ({noticed / max(total, 1):.1%}) in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
