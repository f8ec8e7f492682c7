"""How much do the tests notice? Changes one sign, factor, comparison, index or flag at a time and
counts the changes that make a test fail. Needs a system with fork.

    python tests/mutate.py --of core --sample 300 --seed 1    # a share with its interval
    python tests/mutate.py --of registries                    # all, in hours: what no test noticed
    python tests/mutate.py --only gem_loss --tests methods/test_losses.py

`registries` are the methods to choose from: objectives, diversities, SFT losses, adapters, reward
heads, decoders. `core` is what every run depends on: the steps of SFT and GRPO, sampling, the
model, the LoRA layers, data and its verifiers, metrics and intervals, measuring, the training loop.

A change is made in a copy of the project in a temporary folder, in place, so that all else keeps
its line. The tests are run once unchanged, to see which lines each test reaches. A change is shown
to the tests that reach its statement alone: those of the module's own test file first, then the
quickest, until one fails. What is left out makes the share smaller, never larger: tests longer than
--longest seconds, all tests of a change beyond --budget seconds together, and what a test reaches
in a process of its own.

Not changed, by rule: messages (raise, f-strings), what is only printed or drawn (PRINTED, SHOWN),
type annotations, sizes of caches, and the digits of round(). Not part of the usual run.
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

import huggingface_hub  # noqa: F401  (here, and once, rather than in every child)
import numpy  # noqa: F401
import pytest
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch
import tqdm  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
REGISTRIES = {
    "grpo.py": """group_advantages passk_advantages subsets set_advantages maxk_advantages
        coverage_advantages completion_means policy_loss combine""",
    "support/checks.py": """check_size check_binary check_decoder""",
    "methods/objectives.py": """polychromic_advantages passk_full_advantages random_sets
        passk_bootstrap_advantages passk_mixed_advantages bon_advantages polyepo_advantages
        darling_advantages dra_advantages dqo_advantages uniqueness_advantages
        unlikeliness_advantages evol_advantages maxrl_advantages tailrl_advantages
        wreinforce_advantages focal_advantages ucpo_advantages mara_advantages soft_advantages""",
    "methods/spo.py": """stream_advantages kept_share Values""",
    "methods/tokens.py": """token_covariances clip_cov kl_cov""",
    "rewards.py": """VerifierReward overlong_penalty diversity_weight""",
    "methods/reward_model.py": """preference_loss draw_pair usable padded preference_step Heads
        new_heads HeadsReward""",
    "polylora.py": """gated pair_distances pair_mean diversity pair_advantages leave_one_out log_det
        measure_diversity diversity_loss add_diversity""",
    "methods/diversities.py": """vendi alike distinct_answers word_distances edit_distance
        ngram_distance""",
    "methods/losses.py": """gem_loss entropy_loss unlikelihood_loss earlier_tokens
        ba_lora_regularizer ba_lora_loss base_states reply_losses sed_loss ba_lora_nlu_loss
        covariance_penalty add_unlikely bonbon_loss add_bonbon repeated_tokens""",
    "methods/straight_through.py": """token_gradients add_straight_through straight_through_loss""",
    "lora.py": """kaiming LoRALinear add_lora adapter_state drop_lora merge_lora""",
    "methods/adapters.py": """RsLoRALinear DoRALinear PiSSALinear ParallelLinear MultiLoRALinear
        MoALinear train_in_full with_start""",
    "methods/pruned.py": """AdaLoRALinear LoRILinear Budget""",
    "methods/ensemble.py": """EnsembleLinear""",
    "support/peft_files.py": """shape_of""",
    "methods/interpolate.py": """interpolate_adapters""",
    "methods/decoders.py": """diverse_beams contrastive_completions majority rewarded informative
        best_of read_list read_verbalized in_one_prompt""",
    "methods/likelihoods.py": """completion_scores add_likelihoods"""}
CORE = {
    "grpo.py": """group_advantages passk_advantages completion_means policy_loss Rollout Batch
        collect add_older_logprobs weigh combine
        diversity_advantages rollout grpo_step run_grpo""",
    "methods/objectives.py": """polychromic_advantages""",
    "methods/tokens.py": """chosen_tokens""",
    "methods/resample.py": """mapped joined""",
    "polylora.py": """gated pair_distances pair_mean diversity pair_advantages measure_diversity
        diversity_loss held_out Gate mean_logprobs add_diversity sft_step run_sft""",
    "methods/losses.py": """reply_losses TokenLosses in_chunks whole_chunks token_losses""",
    "rewards.py": """VerifierReward AgreementReward overlong_penalty diversity_weight""",
    "methods/rewards.py": """RelevanceReward""",
    "generate.py": """over_members DecodingState Embedder plain_loop generate_plain sample""",
    "support/draws.py": """inverse draw uniforms""",
    "engine.py": """linear joined decoding_parts_of FusedLinear FusedBlock FusedBlocks DecodeBatch
        Scheduler batch_for generate""",
    "trainer.py": """sampling_of epoch_order batch_visits learning_rate train Session
        add_cross_entropy""",
    "model.py": """rms_norm RMSNorm rotary rotate Attention MLP Block full_attention Backbone Qwen3
        Rows pack rows_tensors chunk_size chunks SelectedLogprobs selected_logprobs
        predicting_states token_logprobs""",
    "support/packing.py": """plan_batches split_group""",
    "support/steplog.py": """Tally add_mismatch""",
    "lora.py": """kaiming LoRALinear lora_layers add_adapter add_lora trained base frozen_copy
        adapter drop_lora merge_lora""",
    "methods/adapters.py": """RsLoRALinear""",
    "support/posts.py": """normalise merge""",
    "data.py": """split_posts split_by_intent render_chat encode_chat encode_prompt encode_reply
        decode long_tail Domain Replies""",
    "methods/stories.py": """Stories""",
    "methods/code.py": """Code""",
    "methods/pocket.py": """right_replies""",
    "metrics.py": """pass_at_k ngrams distinct_n self_bleu vendi_score duplicate_rate post_metrics
        pleasing""",
    "methods/metrics.py": """max_at_k picked add_separation add_agreement""",
    "report/stats.py": """interval crossed_spread sign_flip holm""",
    "support/student_t.py": """t_quantile incomplete_beta""",
    "support/pass_bar.py": """bar intents_of stranger_pairs strangers shuffled_share each_held_out
        earned share_error pair_quantile""",
    "support/evaluations.py": """jobs_of job_of measured alike""",
    "evaluate.py": """measure load_measures passing change_adapter measure_run make_records
        some_records each_once add_diversity add_verdicts""",
    "support/files.py": """seed_of""",
    "support/checkpoint.py": """RunFolder checksum StallWarnings replay learnt_enough"""}
SETS = {"core": CORE, "registries": REGISTRIES}
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
         ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult, ast.MatMult: ast.Mult,
         ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
         ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
         ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And,
         ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
NAMES = {"amax": "amin", "amin": "amax", "max": "min", "min": "max", "argmax": "argmin",
         "minimum": "maximum", "any": "all", "all": "any"}
PRINTED = {"say", "print", "announce", "warn", "tqdm"}     # calls, as far as their arguments
# Keywords that change what is displayed, and sizes of caches.
SHOWN = {"help", "desc", "unit", "mininterval", "disable", "maxsize"}
FIRST = 12         # so many tests are tried before the others
NEAR = 5           # a test of the module's own file goes before one that is so many times quicker


def changed(node):
    """The node's variants, each with one thing changed in it (not in its children)."""
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)):
        if type(node.op) in SWAPS:
            yield with_field(node, "op", SWAPS[type(node.op)]())
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield with_field(node, "ops", [*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1:]])
    # -1 becomes -2 below, not 1: as an axis that is often the same one.
    if isinstance(node, ast.UnaryOp) and not is_whole_number(node.operand):
        yield node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield with_field(node, "value", not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        other = node.value + 1 if isinstance(node.value, int) else 2 * node.value + 0.5
        yield with_field(node, "value", other)
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield with_field(node, "attr", NAMES[node.attr])
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield with_field(node, "id", NAMES[node.id])


def is_whole_number(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


def with_field(node, field, value):
    node = copy.deepcopy(node)
    setattr(node, field, value)
    return node


def name_of(top):
    if isinstance(top, (ast.FunctionDef, ast.ClassDef)):
        return top.name
    named = isinstance(top, ast.Assign) and isinstance(top.targets[0], ast.Name)
    return top.targets[0].id if named else ""


def left_out(node):
    """The parts of a node that the rule leaves out: see the file's docstring."""
    if isinstance(node, (ast.Raise, ast.JoinedStr)):
        return [node]
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        shown = [keyword for keyword in node.keywords if keyword.arg in SHOWN]
        return shown + (node.args if name in PRINTED else node.args[1:] if name == "round" else [])
    if isinstance(node, (ast.AnnAssign, ast.arg)):
        return [node.annotation] if node.annotation else []
    if isinstance(node, ast.FunctionDef) and node.returns:
        return [node.returns]
    return []


def places(top):
    """(number of the node in ast.walk's order, number of its variant) of all changes of a top-level
    statement."""
    walked = list(ast.walk(top))
    out = {id(x) for node in walked for part in left_out(node) for x in ast.walk(part)}
    return [(i, j) for i, node in enumerate(walked) if id(node) not in out
            for j, _ in enumerate(changed(node))]


def changes(source, names):
    """Every change as (number of the top-level statement, number of the node, number of its
    variant)."""
    tops = ast.parse(source).body
    if unknown := set(names) - {name_of(top) for top in tops}:
        sys.exit(f"there is no function {', '.join(sorted(unknown))}")
    return [(number, i, j) for number, top in enumerate(tops) if name_of(top) in names
            for i, j in places(top)]


def statement_lines(top, node):
    """The lines at which a test reaches the node's statement; None for what is run when the module
    is imported."""
    inside, found = False, None

    def visit(current, in_function):
        nonlocal inside, found
        if isinstance(current, ast.stmt):
            body = getattr(current, "body", None)
            last = body[0].lineno - 1 if body else current.end_lineno
            if current.lineno <= node.lineno <= max(last, current.lineno):
                inside, found = in_function, range(current.lineno, max(last, current.lineno) + 1)
        for child in ast.iter_child_nodes(current):
            of_body = isinstance(current, ast.FunctionDef) and child in current.body
            visit(child, in_function or of_body)
    visit(top, False)
    return found if inside else None


def mutant(source, change):
    """(the top-level statement, the changed node, what is changed, the whole changed source)."""
    number, i, j = change
    top = ast.parse(source).body[number]
    node = list(ast.walk(top))[i]
    new = list(changed(node))[j]
    lines = source.encode().splitlines(keepends=True)      # columns count bytes
    begin = sum(map(len, lines[:node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[:node.end_lineno - 1])) + node.end_col_offset
    text = ast.unparse(ast.fix_missing_locations(new))
    text = text if isinstance(new, ast.stmt) else f"({text})"
    whole = b"".join(lines)
    whole = whole[:begin] + text.encode() + whole[end:]
    return top, node, f"{ast.unparse(node)}  ->  {ast.unparse(new)}", whole.decode()


class Seen:
    """A plugin of pytest: which lines of the project's modules each test reaches, and how long it
    takes."""

    def __init__(self, folder):
        self.folder, self.tests, self.failed, self.names = Path(folder), {}, [], {}

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(f"{report.nodeid}: {str(report.longrepr)[-500:]}")

    def module(self, filename):
        """The module's file name, or None for what is not the project's own."""
        if filename not in self.names:
            path = Path(filename)
            name = None
            if path.is_relative_to(self.folder) and not path.is_relative_to(self.folder / "tests"):
                name = path.relative_to(self.folder).as_posix()
            self.names[filename] = name
        return self.names[filename]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        found = set()

        def call(frame, event, arg):
            name = self.module(frame.f_code.co_filename)
            if name is None:
                return None

            def line(frame, event, arg):
                found.add((name, frame.f_lineno))
                return line
            found.add((name, frame.f_lineno))
            return line
        threading.settrace(call)
        sys.settrace(call)
        began = time.perf_counter()
        yield
        took = time.perf_counter() - began
        sys.settrace(None)
        threading.settrace(None)
        lines = {}
        for name, number in sorted(found):
            lines.setdefault(name, []).append(number)
        self.tests[item.nodeid] = took, lines


def passes(folder, tests, match="", seconds=120, seen=None, flags=("-x",)):
    """Runs the tests in a child process on the modules in `folder`: do they pass? A child saves
    importing torch. seen: a file for what Seen finds; flags: of pytest."""
    child = os.fork()
    if child == 0:
        signal.alarm(int(seconds))                         # a change may loop for ever
        nowhere = os.open(os.devnull, os.O_RDWR)
        for seed in range(3):
            os.dup2(nowhere, seed)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        plugin = Seen(folder)
        command = [*flags, "-q", "-p", "no:cacheprovider", "-k", match, *tests]
        code = pytest.main(command, [plugin] if seen else [])
        if seen:
            seen.write_text(json.dumps([plugin.tests, plugin.failed]))
        os._exit(int(code))
    return os.waitpid(child, 0)[1] == 0


def within(tests, budget):
    """The first tests [(test, seconds)] that take `budget` seconds together, at least one."""
    total, chosen = 0.0, []
    for test, took in tests:
        total += took
        if chosen and total > budget:
            break
        chosen.append((test, took))
    return chosen


def survives(folder, module, text, tests):
    """Do all tests [(test, seconds)] pass with the module's changed text? The first few are tried
    alone at first, which most changes do not outlive: what they need is collected much sooner than
    what all need."""
    path = folder / module
    kept, before = path.read_bytes(), path.stat()
    path.write_text(text, encoding="utf-8")
    limit = max(60, 10 * sum(took for _, took in tests))
    parts = [[test for test, _ in part] for part in (tests[:FIRST], tests[FIRST:]) if part]
    try:
        return all(passes(folder, part, seconds=limit) for part in parts)
    finally:
        path.write_bytes(kept)
        # Its bytecode is valid again.
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def wilson(hits, n, z=1.96):
    """Wilson's interval of a share, 95%."""
    middle = hits / n + z * z / (2 * n)
    half = z * math.sqrt(hits * (n - hits) / n ** 3 + z * z / (4 * n * n))
    return [(middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]


def tests_of(seen, module, top, node, args):
    """The tests that reach the node's statement, [(test, seconds)], as far as the budget goes:
    those of the module's own file as if they were NEAR times quicker, the quickest first."""
    lines, own = statement_lines(top, node), f"test_{Path(module).name}"
    if lines is None:                  # run on import: the tests that reach anything of it
        lines = range(top.lineno, top.end_lineno + 1)
    lines, table, found = set(lines), name_of(top).isupper(), []
    for test, (took, reached) in seen.items():
        if took <= args.longest and (table or not lines.isdisjoint(reached.get(module, ()))):
            near = test.partition("::")[0].endswith(own)
            found.append((took / (NEAR if near else 1), test, took))
    return within([(test, took) for _, test, took in sorted(found)], args.budget)


def report(survivors, total, began):
    noticed, n = total - len(survivors), max(total, 1)
    low, high = wilson(noticed, n)
    print(f"{noticed} of {total} changes noticed ({noticed / n:.1%}; of a sample, 95% from "
          f"{low:.1%} to {high:.1%}) in {time.perf_counter() - began:.0f} s", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    folder = ROOT / "tests"
    every_test = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("test_*.py")
                        if path.stem != "test_tools")
    add = p.add_argument
    add("--of", choices=SETS, default="registries", help="which functions are changed")
    add("--tests", nargs="+", default=every_test, help="files of tests/; default: all")
    add("--only", nargs="+", help="these functions alone")
    add("--sample", type=int, help="so many of the changes, drawn at random")
    add("--seed", type=int, default=0, help="of the sample")
    add("--match", default="", help="of the tests those that pytest's -k would take")
    add("--minutes", type=float, default=1e9, help="stop after so many, and say how far it came")
    add("--longest", type=float, default=20, help="leave out tests of more seconds")
    add("--budget", type=float, default=120, help="seconds of tests for one change")
    add("--quick", type=float, default=30,
        help="of these seconds, tried on all changes before the rest")
    add("--seen", type=Path,
        help="keep what the unchanged run found in this file, or take it from there")
    args, began, survivors, total = p.parse_args(), time.perf_counter(), [], 0
    functions = SETS[args.of]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve() / "project"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs"))
        sources = {module: (folder / module).read_text(encoding="utf-8") for module in functions}
        every = []
        for module, names in functions.items():
            chosen = [name for name in names.split() if not args.only or name in args.only]
            every += [(module, change) for change in changes(sources[module], chosen)]
        known = len(every)
        if args.sample:
            every = random.Random(args.seed).sample(every, min(args.sample, len(every)))
        kept = args.seen or folder / "seen.json"
        tests = [f"tests/{name}" for name in args.tests]
        if not kept.exists():
            passes(folder, tests, args.match, 7200, kept, flags=())
        seen, failed = json.loads(kept.read_text())
        for said in failed:
            test = said.partition(": ")[0]
            seen.pop(test, None)
            print(f"left out, since it fails as it is: {test}", flush=True)
        if args.seen:                                      # whose bytecode an earlier run had
            passes(folder, tests, seconds=600, flags=("--collect-only",))
        # Two changes of one second and size would share a file.
        sys.dont_write_bytecode = True
        print(f"{len(every)} of {known} changes, {len(seen)} tests seen in "
              f"{time.perf_counter() - began:.0f} s", flush=True)
        doubtful = []
        for module, change in every:
            if time.perf_counter() - began > 60 * args.minutes:
                print(f"stopped after {total} of {len(every)}")
                break
            top, node, what, text = mutant(sources[module], change)
            mine = tests_of(seen, module, top, node, args)
            place, total = f"{module}:{node.lineno} {name_of(top)}: {what}", total + 1
            quick = within(mine, args.quick)
            if not mine:
                survivors.append(place)
                print(f"{place}  (no test comes there)", flush=True)
            elif survives(folder, module, text, quick):
                doubtful.append((place, module, text, mine[len(quick):]))
                print(f"quick tests pass: {place}", flush=True)
            if total % 20 == 0:
                print(f"{total} tried, {len(doubtful)} to be tried longer, "
                      f"{len(survivors)} without a test", flush=True)
        for place, module, text, rest in doubtful:
            if survives(folder, module, text, rest):
                survivors.append(place)
                print(f"SURVIVED: {place}", flush=True)
    report(survivors, total, began)


if __name__ == "__main__":
    main()
