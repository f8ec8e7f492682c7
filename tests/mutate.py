"""How much do the tests notice? Changes one sign, factor, comparison, index or flag at a time in the functions of
the registers (objectives, diversities, SFT losses, adapters, reward heads, decoders) and counts the changes that
make a test fail.

    python tests/mutate.py                         # all of them, hours; prints those that no test noticed
    python tests/mutate.py --sample 60 --seed 1    # a random sample, and the share with its interval
    python tests/mutate.py --only gem_loss --tests test_methods.py

A change works on a copy of the rooms in a temporary folder. The tests are run once unchanged, to see which of them
come to which function: a change is shown to those alone, the quickest first. Not part of the usual run.
"""

import argparse
import ast
import copy
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
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
        draft_means policy_loss""",
    "rewards.py": """VerifierReward overlong_penalty kept_share Values SCHEDULES scheduled spread_weight
        preference_loss draw_pair usable padded preference_step Heads new_heads HeadsReward""",
    "polylora.py": """gated pair_distances pair_mean diversity pair_advantages diversity_advantages leave_one_out log_det
        vendi alike distinct_answers answer_classes word_distances DIVERSITIES measure
        diversity_loss gem_loss entropy_loss unlikelihood_loss earlier_tokens ba_lora_regularizer ba_lora_loss
        base_states SFT_LOSSES reply_losses sed_loss ba_lora_nlu_loss covariance_penalty add_unlikely
        bonbon_loss add_bonbon token_slopes add_straight_through add_diversity""",
    "generate.py": "straight_through_loss",
    "metrics.py": "edit_distance ngram_distance repeated_tokens",
    "adapters.py": """kaiming LoRALinear RsLoRALinear DoRALinear PiSSALinear AdaLoRALinear LoRILinear ParallelLinear
        MultiLoRALinear MoALinear EnsembleLinear add_lora train_in_full adapter_state Budget shape_of beside_start
        drop_lora merge_lora interpolate_adapters""",
    "decoders.py": """diverse_beams contrastive_drafts draft_scores majority rewarded informative best_of read_list
        read_verbalized in_one_prompt DECODERS check_decoder"""}
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
    if isinstance(top, (ast.FunctionDef, ast.ClassDef)):
        return top.name
    named = isinstance(top, ast.Assign) and isinstance(top.targets[0], ast.Name)
    return top.targets[0].id if named else ""


def places(top):
    """(number of the node in ast.walk's order, number of its variant) of all changes; messages are left out."""
    walked = list(ast.walk(top))
    said = {id(x) for node in walked if isinstance(node, (ast.Raise, ast.JoinedStr)) for x in ast.walk(node)}
    return [(i, j) for i, node in enumerate(walked) if id(node) not in said for j, _ in enumerate(changed(node))]


def changes(source, names):
    """Every change as (number of the top-level statement, number of the node, number of its variant)."""
    tops = ast.parse(source).body
    if unknown := set(names) - {name_of(top) for top in tops}:
        sys.exit(f"there is no function {', '.join(sorted(unknown))}")
    return [(number, i, j) for number, top in enumerate(tops) if name_of(top) in names for i, j in places(top)]


def mutant(source, change):
    """(function, line, what is changed, the whole changed source)."""
    number, i, j = change
    tree = ast.parse(source)
    node = list(ast.walk(tree.body[number]))[i]
    new, name = list(changed(node))[j], name_of(tree.body[number])
    line, what = node.lineno, f"{ast.unparse(node)}  ->  {ast.unparse(new)}"
    tree.body[number] = Replace(node, new).visit(tree.body[number])
    return name, line, what, ast.unparse(ast.fix_missing_locations(tree))


class Seen:
    """A plugin of pytest: which functions and classes of the rooms each test comes to, and how long it takes."""

    def __init__(self, folder):
        self.folder, self.tests, self.failed = str(folder), {}, []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(f"{report.nodeid}: {str(report.longrepr)[-500:]}")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        found, began = set(), time.perf_counter()

        def note(frame, event, arg):                                           # of calls alone: it returns None
            code = frame.f_code
            if code.co_filename.startswith(self.folder):
                found.add(code.co_qualname.partition(".")[0])
        threading.settrace(note)
        sys.settrace(note)
        yield
        sys.settrace(None)
        threading.settrace(None)
        self.tests[item.nodeid] = time.perf_counter() - began, sorted(found)


def passes(folder, tests, match="", seconds=120, seen=None):
    """Runs the tests in a child process on the rooms in `folder`: do they pass? A child saves importing torch.
    seen: a file for what Seen finds."""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)                                                  # a change may loop for ever
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.chdir(folder)
        plugin = Seen(folder)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-k", match, *tests], [plugin] if seen else [])
        if seen:
            seen.write_text(json.dumps([plugin.tests, plugin.failed]))
        os._exit(int(code))
    return os.waitpid(child, 0)[1] == 0


def wilson(hits, n, z=1.96):
    """Wilson's interval of a share, 95%."""
    middle, half = hits / n + z * z / (2 * n), z * math.sqrt(hits * (n - hits) / n ** 3 + z * z / (4 * n * n))
    return [(middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tests", nargs="+", default=[f"test_{x}.py" for x in (
        "methods", "rivals", "rewards", "grpo", "polylora", "adapters", "decoders")])
    p.add_argument("--only", nargs="+", help="these functions alone")
    p.add_argument("--sample", type=int, help="so many of the changes, drawn at random")
    p.add_argument("--seed", type=int, default=0, help="of the sample")
    p.add_argument("--match", default="", help="of the tests those that pytest's -k would take")
    p.add_argument("--minutes", type=float, default=1e9, help="stop after so many, and say how far it came")
    args, began, survivors, total = p.parse_args(), time.perf_counter(), [], 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        for file in ROOT.glob("*.py"):
            shutil.copy(file, folder)
        shutil.copytree(ROOT / "tests", folder / "tests")
        sources = {room: (folder / room).read_text(encoding="utf-8") for room in FUNCTIONS}
        every = [(room, change) for room, names in FUNCTIONS.items()
                 for change in changes(sources[room], [n for n in names.split() if n in (args.only or names)])]
        if args.sample:
            every = random.Random(args.seed).sample(every, min(args.sample, len(every)))
        good = passes(folder, [f"tests/{f}" for f in args.tests], args.match, 3600, folder / "seen.json")
        seen, failed = json.loads((folder / "seen.json").read_text())
        if not good:
            sys.exit("the tests fail as they are: mend them first\n" + "\n".join(failed))
        tests = sorted((took, test, found) for test, (took, found) in seen.items())
        print(f"{len(every)} changes, {len(tests)} tests seen in {time.perf_counter() - began:.0f} s", flush=True)
        for room, change in every:
            if time.perf_counter() - began > 60 * args.minutes:
                print(f"stopped after {total} of {len(every)}")
                break
            name, line, what, text = mutant(sources[room], change)
            (folder / room).write_text(text, encoding="utf-8")
            table = name.isupper()                                             # read where a room is imported
            mine, total = [test for _, test, found in tests if table or name in found], total + 1
            if not mine or passes(folder, mine, "", 600):
                survivors.append(f"{room}:{line} {name}: {what}" + ("" if mine else "  (no test comes there)"))
                print(survivors[-1], flush=True)
            (folder / room).write_text(sources[room], encoding="utf-8")
    noticed, n = total - len(survivors), max(total, 1)
    low, high = wilson(noticed, n)
    print(f"{noticed} of {total} changes noticed ({noticed / n:.1%}; of a sample, 95% from {low:.1%} to {high:.1%}) in "
          f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
