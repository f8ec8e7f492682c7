"""Runs a study: studies/NAME.toml names a question, a setting, seeds and arms.

    python study.py list                          the studies and their questions
    python study.py show fresh --seeds 23         its commands, which can be copied and run alone
    python study.py plan fresh                    what each command costs, and all; trains nothing
    python study.py run fresh --jobs 2            every command that is not done, then the report
    torchrun --nproc-per-node=2 study.py run fresh
    python study.py report fresh                  the report alone

An arm is a way to train. Its name has one meaning, written in studies/_arms.toml; NAME+FLAG=VALUE
is that arm with one flag changed (+sft.FLAG=VALUE: one flag of the arm that it starts from). Runs
are kept in OUT/seedN/ID/NAME. ID is a hash of the flags that the run and what it starts from do
not leave at their defaults, so that equal arms of two studies are trained once.
"""
import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from support.files import InputError, command
from support.jobs import default_jobs, device_count, dry_run, run_side_by_side, shown
from support.studies import (PROGRAMS, STUDIES, identity, load, meaning, names_of, read_toml,
                             words_of)

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Stage:
    phase: str
    words: list                   # the command without the runs it measures
    runs: tuple = ()              # arms' folders that it measures
    done: str | None = None       # a file that says there is nothing left to do


def program(phase):
    name, subcommand, _ = PROGRAMS[phase]
    path = f"{name}.py" if Path.cwd() == HERE else str(HERE / f"{name}.py")
    return [path, subcommand] if subcommand else [path]


# ---- The commands of one seed --------------------------------------------------------------------

def stages(study, seed, out, model=None):
    """The commands of one seed in order, and where its arms are: [Stage], {arm: folder}."""
    setting, folder, listed = study.setting, f"{out}/seed{seed}", []
    split = {"seed": seed} | setting["data"]
    # The seed is in the folder's name, but where a file has one split for all seeds.
    fixed = {flag: value for flag, value in split.items() if flag != "seed" or value != seed}
    data_id = identity("data", meaning("data", fixed, f"{study.name}, [data]"))
    data = f"{out}/seed{split['seed']}/{data_id}/data"
    listed.append(Stage("data", [*program("data"), *words_of(split), "--out", data]))
    base_id = identity(data_id, model)
    common = ["--seed", str(seed), "--resume"]
    if "base" in setting:
        flags = setting["base"]
        base_id = identity("base", meaning("base", flags, f"{study.name}, [base]"), data_id)
        listed.append(Stage("base", [*program("base"), "--data", f"{data}/base.jsonl", "--out",
                                     f"{folder}/{base_id}/base-model", *common, *words_of(flags)]))
        model = f"{folder}/{base_id}/base-model/model"
    ids, folders = {}, {"base": f"{folder}/{base_id}/base"}
    for name, arm in study.arms.items():
        parents = [ids[start] for start in arm.starts] or [base_id]
        ids[name] = identity(arm.phase, meaning(arm.phase, arm.flags, f"arm {name}"), *parents)
        to = folders[name] = f"{folder}/{ids[name]}/{name}"
        starts = [folders[start] for start in arm.starts]
        words = [*program(arm.phase)]
        if arm.phase == "interpolate":
            words += [*starts, "--out", to, *words_of(arm.flags)]
            listed.append(Stage(arm.phase, words, done=f"{to}/done.json"))
            continue
        words += ["--start", *starts] if starts else []
        words += ["--model", model, "--data", f"{data}/{arm.phase}.jsonl", "--out", to, *common]
        listed.append(Stage(arm.phase, words + words_of(arm.flags)))
    for first, second in itertools.combinations(study.arms, 2):
        if ids[first] == ids[second]:
            raise InputError(f"study {study.name}: {first} and {second} are the same: keep one")
    return listed + measuring(study, seed, model, data, folders), folders


def measuring(study, seed, model, data, folders):
    """The commands that measure a seed's arms: at T = 1, at each other temperature into RUN@T, by
    each other decoder into RUN@DECODER."""
    flags = study.setting["measure"]
    meaning("measure", flags, f"{study.name}, [measure]")
    words = [*program("measure"), "--model", model, "--data", f"{data}/eval.jsonl", "--seed",
             str(seed), *words_of(flags)]
    runs = tuple(folders[name] for name in study.arms)
    listed = [Stage("measure", [*words, "--base-out", folders["base"]], (folders["base"], *runs))]
    for t in study.temperatures:
        at = ["--temperature", f"{t:g}", "--name", f"{t:g}"]
        listed.append(Stage("measure", words + at, runs))
    decoded = tuple(folders[name] for name in study.decoders["of"])
    for decoder in study.decoders["names"]:
        listed.append(Stage("measure", words + words_of_decoder(decoder), decoded))
    return listed


def words_of_decoder(text):
    """NAME or NAME+FLAG=VALUE+.. as flags of evaluate.py measure, into RUN@NAME or
    RUN@NAME+FLAG=VALUE+.."""
    decoder, *changes = text.split("+")
    words = ["--decoder", decoder]
    for change in changes:
        flag, _, value = change.partition("=")
        words += [f"--{flag}", value]
    return words + (["--name", text] if changes else [])


def command_of(stage):
    """The words of a stage with its runs; the base is given by --base-out."""
    return stage.words + [folder for folder in stage.runs if folder not in stage.words]


def report_of(study, args):
    """The command that compares the arms over all seeds."""
    runs = []
    for seed in study.seeds:
        _, folders = stages(study, seed, args.out, args.model)
        runs += [folders["base"], *(folders[name] for name in study.arms)]
        for t in study.temperatures:
            runs += [f"{folders[name]}@{t:g}" for name in study.arms]
        for decoder in study.decoders["names"]:
            runs += [f"{folders[name]}@{decoder}" for name in study.decoders["of"]]
    words = [*program("report"), *runs, "--out", f"{args.out}/report-{study.name}", "--against",
             study.against]
    return words + (["--primary", *study.endpoint] if study.endpoint else [])


# ---- The command line ----------------------------------------------------------------------------

def list_studies(args):
    """print the studies, their seeds, numbers of arms and questions"""
    for name in sorted(path.stem for path in STUDIES.glob("[!_]*.toml")):
        file = read_toml(name)
        print(f"{name:14}{file['seeds']:>8}{len(names_of(file)):4} arms  {file['question']}")


def show(args):
    """print every command, as it can be copied"""
    study = load(args)
    for seed in study.seeds:
        for stage in stages(study, seed, args.out, args.model)[0]:
            print(shown(command_of(stage)))
    print(shown(report_of(study, args)))


def plan(args):
    """print every command of one seed with its cost, and the total; train nothing"""
    study, total = load(args), 0
    seed = study.seeds[0]
    real, _ = stages(study, seed, args.out, args.model)
    with tempfile.TemporaryDirectory() as folder:
        rehearsed, folders = stages(study, seed, folder, args.model)
        for stage, said in zip(rehearsed, real):
            print(shown(command_of(said)), flush=True)
            if stage.phase == "data":
                subprocess.run([sys.executable, *stage.words], check=True)
            elif stage.phase == "measure":       # its time is that of one run
                base = [] if "--base-out" in stage.words else ["--base-out", folders["base"]]
                total += len(stage.runs) * dry_run(stage.words + base)
            elif stage.phase != "interpolate":
                total += dry_run(stage.words)
            if stage.phase == "base":            # later stages need some base: one of a single step
                subprocess.run([sys.executable, *stage.words, "--steps", "1"], check=True,
                               stdout=subprocess.DEVNULL)
    gpus = device_count()
    jobs = args.jobs or default_jobs(len(study.seeds), gpus)
    rounds = -(-len(study.seeds) // jobs)
    if not gpus:                  # more programs than cores
        total *= max(1, jobs / (os.cpu_count() or 1))
    print(f"The whole study: about {rounds * total / 60:.0f} minutes ({rounds} x {total:.0f} s)")


def run(args):
    """run every command that is not done, seeds side by side, then the report"""
    study, lists = load(args), {}
    for seed in study.seeds:
        listed, _ = stages(study, seed, args.out, args.model)
        lists[f"{study.name}-{seed}"] = [(command_of(stage), stage.done) for stage in listed]
    gpus = device_count()
    run_side_by_side(lists, args.jobs or default_jobs(len(lists), gpus), gpus)
    report(args)


def report(args):
    """compare what is measured"""
    if os.environ.get("RANK", "0") == "0":
        words = report_of(load(args), args)
        run_side_by_side({"report": [(words, None)]}, 1, 0)


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="command", required=True)
    sub.add_parser("list", help=list_studies.__doc__).set_defaults(run=list_studies)
    for name, function in (("show", show), ("plan", plan), ("run", run), ("report", report)):
        s = sub.add_parser(name, help=function.__doc__, description=function.__doc__)
        s.set_defaults(run=function)
        add = s.add_argument
        add("study", help="a name that list shows")
        add("--out", default="runs/studies", help="folder of all studies, which share equal runs")
        add("--seeds", help='"11-22", or numbers separated by blanks')
        add("--arms", nargs="+", metavar="ARM", help="these, NAME or NAME+FLAG=VALUE, instead")
        add("--temperatures", nargs="+", type=float, metavar="T", help="measure at these, too")
        add("--set", action="append", default=[], metavar="SECTION.FLAG=VALUE",
            help="change the setting, as measure.n=20")
        add("--data", metavar="FILE", help="posts, instead of the setting's")
        add("--model", help="Qwen3 checkpoint, instead of a small base that the study makes")
        add("--jobs", type=int, default=0, help="seeds side by side (default: one a core or GPU)")
    return p


def main(argv=None):
    return command(parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
