"""Reads studies/NAME.toml: a study with its setting and arms, every flag checked by the parser of
the program that takes it."""
import contextlib
import functools
import hashlib
import importlib
import io
import itertools
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from support.files import InputError

STUDIES = Path(__file__).resolve().parents[1] / "studies"

# phase -> the program, its subcommand, and what its parser wants beside flags
PROGRAMS = {
    "data": ("data", "split", "--out -"),
    "base": ("polylora", "base", "--data - --out -"),
    "sft": ("polylora", "sft", "--model - --data - --out -"),
    "grpo": ("grpo", None, "--start - --data - --out -"),
    "interpolate": ("polylora", "interpolate", "- - --out -"),
    "measure": ("evaluate", "measure", "--data -"),
    "report": ("evaluate", "report", "- --out -"),
}


@dataclass(frozen=True)
class Arm:
    name: str
    phase: str                    # "sft", "grpo" or "interpolate"
    flags: dict                   # the setting's and its own
    starts: tuple                 # names of the arms that it is made from


@dataclass(frozen=True)
class Study:
    name: str
    setting: dict                 # section -> flags
    seeds: list
    arms: dict                    # name -> Arm, each after those that it starts from
    temperatures: list            # at which every arm is measured, besides 1
    decoders: dict                # {"of": arms, "names": other decoders of each} or empty
    against: str                  # the arm from which differences are taken
    endpoint: list                # the arm and its rivals, or empty


# ---- From a TOML file to arms --------------------------------------------------------------------

def read_toml(name):
    path = STUDIES / f"{name}.toml"
    if not path.exists():
        raise InputError(f"there is no study {name}: python study.py list shows all")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as e:
        raise InputError(f"{path}: {e}") from None


def read_setting(name):
    """{section: flags}. A setting that inherits changes single flags of another's sections."""
    own = read_toml(name)
    setting = read_setting(own.pop("inherits")) if "inherits" in own else {}
    for section, flags in own.items():
        setting[section] = setting.get(section, {}) | flags
    return setting


def value_of(text):
    """A number, true, false or a word, as TOML would read it."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def fill(flags, values, arm):
    """The flags with every "$name" replaced by the setting's value of that name."""
    filled = {}
    for flag, value in flags.items():
        if isinstance(value, str) and value.startswith("$"):
            if value[1:] not in values:
                raise InputError(f"arm {arm}: the setting's [values] have no {value[1:]}")
            value = values[value[1:]]
        filled[flag] = value
    return filled


def make_arm(text, library, setting):
    """The arm of NAME or NAME+FLAG=VALUE+... A flag that has this value anyway is left out of the
    name, so that one way to train has one name."""
    base, *changes = text.split("+")
    if base not in library:
        raise InputError(f"there is no arm {base}: the arms are in {STUDIES / '_arms.toml'}")
    entry = library[base]
    if "between" in entry:
        return Arm(base, "interpolate", entry["interpolate"], tuple(entry["between"]))
    phase = "grpo" if "grpo" in entry else "sft"
    name, start = base, entry.get("from")
    flags = setting[phase] | fill(entry[phase], setting["values"], base)
    for change in changes:
        flag, equals, word = change.partition("=")
        if not equals:
            raise InputError(f"arm {text}: write NAME+FLAG=VALUE")
        value = value_of(word)
        if isinstance(value, float):
            change = f"{flag}={value:g}"
        if flag.startswith("sft.") and start:
            changed_start = make_arm(f"{start}+{change[4:]}", library, setting).name
            changed, start = changed_start != start, changed_start
        else:
            before, flags = meaning(phase, flags, text), flags | {flag: value}
            changed = meaning(phase, flags, text) != before
        name += f"+{change}" if changed else ""
    return Arm(name, phase, flags, (start,) if start else ())


def names_of(file):
    """The arms that a study's file asks for: its list, then each combination of each grid."""
    names = list(file["arms"])
    for grid in file.get("grid", []):
        for values in itertools.product(*grid["over"].values()):
            changes = "".join(f"+{flag}={value}" for flag, value in zip(grid["over"], values))
            names += [arm + changes for arm in grid["arms"]]
    return names


def in_order(arms):
    """{name: arm}: SFT, then what starts from it, then what is interpolated."""
    ordered = {}
    for phase in ("sft", "grpo", "interpolate"):
        for arm in arms:
            if arm.phase == phase:
                ordered[arm.name] = arm
    for arm in ordered.values():
        for start in arm.starts:
            if start not in ordered:
                raise InputError(f"arm {arm.name} starts from {start}, which is not in the study")
    return ordered


def seeds_of(text):
    """"11-22" or "1 2 3" -> numbers."""
    if re.fullmatch(r"\d+-\d+", text):
        first, last = text.split("-")
        return list(range(int(first), int(last) + 1))
    if re.fullmatch(r"\d+( \d+)*", text):
        return [int(word) for word in text.split()]
    raise InputError(f"seeds {text}: write 11-22, or numbers with a blank between")


def change_setting(setting, args):
    """Applies --set, --data and --model to a setting."""
    for change in args.set:
        place, equals, value = change.partition("=")
        section, dot, flag = place.partition(".")
        if not equals or not dot or section not in setting:
            raise InputError(f"--set {change}: write SECTION.FLAG=VALUE, with SECTION one of "
                             + ", ".join(setting))
        setting[section] = setting[section] | {flag: value_of(value)}
    if args.data:
        setting["data"] = setting["data"] | {"data": args.data}
    if args.model:
        setting.pop("base", None)
    elif "base" not in setting:
        raise InputError(f"study {args.study} makes no base model: give --model")


def load(args):
    """The study that the command line names and changes."""
    file = read_toml(args.study)
    setting = read_setting(file["setting"])
    change_setting(setting, args)
    library, own = read_toml("_arms"), file.get("arm", {})
    for name in own:
        if name in library:
            raise InputError(f"study {args.study}: the arm {name} has a meaning in _arms.toml")
    names = args.arms or names_of(file)
    arms = in_order([make_arm(name, library | own, setting) for name in names])
    temperatures = args.temperatures or file.get("temperatures", [])
    against = file.get("against", "base")
    endpoint = []
    if "endpoint" in file:
        endpoint = [file["endpoint"]["arm"], *file["endpoint"]["rivals"]]
    reported = set(arms)
    for t in temperatures:
        reported.update(f"{name}@{t:g}" for name in arms)
    if not reported.issuperset(endpoint):
        endpoint = []             # other arms or temperatures were asked than the endpoint's
    return Study(args.study, setting, seeds_of(args.seeds or file["seeds"]), arms, temperatures,
                 decoders_of(file, arms), against if against in arms else "base", endpoint)


def decoders_of(file, arms):
    """The file's decoders, of those of their arms that are asked for."""
    decoders = file.get("decoders", {"of": [], "names": []})
    unknown = set(decoders["of"]) - set(names_of(file))
    if unknown:
        raise InputError(f"decoders of {', '.join(sorted(unknown))}: write arms of the study")
    for text in decoders["names"]:
        if not re.fullmatch(r"[\w-]+(\+[\w-]+=[^+=]+)*", text):
            raise InputError(f"decoder {text}: write NAME or NAME+FLAG=VALUE")
    of = [name for name in decoders["of"] if name in arms]
    return {"of": of, "names": decoders["names"] if of else []}


# ---- Flags, checked by the programs' parsers, and the identity of a run --------------------------

@functools.cache
def parser_of(phase):
    program, subcommand, _ = PROGRAMS[phase]
    parser = importlib.import_module(program).parser()
    return parser._subparsers._group_actions[0].choices[subcommand] if subcommand else parser


def meaning(phase, flags, who):
    """{name: value} of the flags as the program's parser reads them, defaults left out."""
    parser, said = parser_of(phase), io.StringIO()
    names = []
    for flag in flags:
        if f"--{flag}" not in parser._option_string_actions:   # nor the beginning of one
            raise InputError(f"{who}: {PROGRAMS[phase][0]}.py has no --{flag}")
        names.append(parser._option_string_actions[f"--{flag}"].dest)
    try:
        with contextlib.redirect_stderr(said):
            read = vars(parser.parse_args(PROGRAMS[phase][2].split() + words_of(flags)))
    except SystemExit:
        raise InputError(f"{who}: {said.getvalue().strip().splitlines()[-1]}") from None
    return {name: read[name] for name in sorted(names) if read[name] != parser.get_default(name)}


def identity(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def words_of(flags):
    """{"lr": 0.001, "permute": True, "until": False} -> ["--lr", "0.001", "--permute"]."""
    words = []
    for flag, value in flags.items():
        if value is True:
            words.append(f"--{flag}")
        elif value is not False:
            words += [f"--{flag}", str(value)]
    return words
