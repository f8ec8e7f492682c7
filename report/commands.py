"""The commands of `python -m report`, which evaluate.py has too: report, ask, picks."""

import argparse

from metrics import KS
from report import people
from report.live import live
from report.report import report
from support import registry
from support.files import command
from support.registry import COMMANDS


def numbers(text):
    """"1,5,10" -> (1, 5, 10): whole numbers from 1 up, each once, for --ks."""
    ks = tuple(sorted({int(word) for word in text.split(",")}))
    if ks[0] < 1:
        raise ValueError
    return ks


def report_command(sub):
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    r = sub.add_parser("report", help="compare measured runs: tables and pictures", **form)
    add = r.add_argument
    add("runs", nargs="+", metavar="RUN",
        help="folder of a measured run; runs whose config.json names the same arm are its seeds")
    add("--out", default="report", metavar="FOLDER", help="folder for the report, made if need be")
    add("--against", metavar="ARM", help="arm from which paired differences are taken")
    add("--primary", nargs="+", metavar="ARM",
        help="after the runs: test the primary endpoint of the first arm against each of the "
             "others: Pass@5 superior, then Pass@1 not inferior, then Pass@10 superior")
    add("--ks", type=numbers, default=KS, metavar="K,K", help="the k of Pass@k")
    add("--live", action="store_true",
        help="rebuild the page while the runs train, until all are measured or Ctrl-C; a RUN may "
             "then be the folder of a whole study")
    add("--every", type=float, default=30, metavar="SECONDS", help="with --live: how often")
    r.set_defaults(run=run_report)


def run_report(args):
    if args.live:
        live(args.runs, args.out, args.against, args.ks, args.primary, args.every)
    else:
        report(args.runs, args.out, args.against, args.ks, endpoint=args.primary)


def people_commands(sub):
    people.commands(sub, dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter))


COMMANDS.add("report", "compare measured runs", program="evaluate")(report_command)
COMMANDS.add("people", "blind sheets, picks counted", program="evaluate")(people_commands)


def parser():
    p = argparse.ArgumentParser(description="Compare measured runs; ask people, count their picks.")
    sub = p.add_subparsers(required=True, dest="command", metavar="COMMAND")
    report_command(sub)
    people_commands(sub)
    return p


def main(argv):
    """`python -m report RUN ..` is `python -m report report RUN ..`."""
    registry.load()                          # metrics of methods/ are in the tables
    if argv and argv[0] not in ("report", "ask", "picks", "-h", "--help"):
        argv = ["report", *argv]
    return command(parser(), argv)
