"""`lora.py push`: a run's adapter and its model card, to the Hugging Face hub."""

import json

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from report.runs import group_runs
from report.summary import summarise
from support.card import ANY_POST, prompt_of, public_name, write_card
from support.checkpoint import start_folder
from support.evaluations import config_of
from support.files import InputError, read_json, read_object
from support.peft_files import read_adapter_config
from support.registry import COMMANDS, DOMAINS

# name of a metric -> what the card calls it, in this order; those that a run lacks are left out.
SHOWN = {"pass@1": "Pass@1", "pass@5": "Pass@5", "pass@10": "Pass@10",
         "valid": "completions that are right or pass", "semantic": "diversity D (cosine)",
         "distinct-2": "Distinct-2"}

FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")


# ---- What is published ---------------------------------------------------------------------------

def evaluation_table(run):
    """Rows (metric, mean, low, high) of the run's evaluation.json; [] without one. Metrics that
    cannot be computed, or that a report refuses, are left out."""
    if not (run / "evaluation.json").exists():
        return []
    (arm,) = summarise(group_runs([run]))["arms"].values()
    rows = []
    for name, shown in SHOWN.items():
        row = arm["metrics"].get(name, {"mean": None})
        if row["mean"] is not None:
            rows.append((shown, row["mean"], row["low"], row["high"]))
    return rows


def domain_of(summary):
    """The domain that done.json names, for its prompts."""
    record = summary.get("domain") or {}
    if record.get("domain") not in DOMAINS:
        return None
    return DOMAINS[record["domain"]].function([ANY_POST], styles=record["voices"],
                                              popularity=record["popularity"],
                                              writers=record["writers"], permute=record["permute"])


def prepare(path, base, licence):
    """{file name: bytes} of what is published: the adapter, its configuration with the base's hub
    name, and its card, which is written again with the run's evaluation. path: a run, or its
    adapter folder. InputError for a run that is not finished, or whose base has no name that others
    can use."""
    folder = start_folder(path)
    run = folder.parent if folder.name == "adapter" else folder
    adapter = read_adapter_config(folder)
    config = config_of(run)
    if config and not (run / "done.json").exists():
        raise InputError(f"{run} is not finished: go on with it by --resume, then push")
    base = base or public_name({"model": adapter.get("base_model_name_or_path")})
    if base is None:
        raise InputError(f"{folder}/adapter_config.json names the base by a folder of this machine "
                         f"({adapter.get('base_model_name_or_path')}): give the name that others "
                         "load it by with --base owner/name")
    summary = read_object(run / "done.json") if config else {}
    if config:
        write_card(folder, config, summary, prompt_of(domain_of(summary)), evaluation_table(run),
                   base, licence)
    elif not (folder / "README.md").exists():
        raise InputError(f"{folder} has no README.md, and is no run that says how it was trained: "
                         "write its model card there")
    found = {name: (folder / name).read_bytes() for name in FILES}
    public = read_json(folder / "adapter_config.json") | {"base_model_name_or_path": base}
    found["adapter_config.json"] = (json.dumps(public, indent=2) + "\n").encode()
    return found


def upload(api, name, files, private):
    """Make the repository, if it is not there, and commit the files to it: all in one commit.
    Returns the commit's address. `api`: a huggingface_hub.HfApi. InputError for what the hub
    refuses, and for a public repository where --private is asked for."""
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise InputError(f"{name} exists and is public, and --private does not change that: "
                             "make it private on its page, or give another name")
        operations = []
        for file, content in files.items():
            operations.append(CommitOperationAdd(path_in_repo=file, path_or_fileobj=content))
        commit = api.create_commit(name, operations, commit_message="Adapter and model card")
    except InputError:
        raise
    except Exception as e:       # the hub client has many kinds: not logged in, no rights, offline
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise InputError(f"{name} could not be pushed ({reason[0][:200]}): log in with `hf auth "
                         "login` and a token that may write there, and check the connection") \
            from None
    return commit.commit_url


# ---- The command ---------------------------------------------------------------------------------

@COMMANDS.add("push", "a run's adapter and model card, to the hub", program="lora")
def push_command(sub):
    """Add `push` to the commands of lora.py."""
    p = sub.add_parser("push", help="upload a run's adapter and its model card to the hub")
    add = p.add_argument
    add("adapter", metavar="RUN", help="a finished run")
    add("name", metavar="OWNER/NAME", help="the repository on the hub; it is made if it is missing")
    add("--private", action="store_true", help="make a private repository")
    add("--dry-run", action="store_true",
        help="write the card, print it and what would be sent, and send nothing")
    add("--base", default=None,
        help="hub name of the base; default: the one in adapter_config.json")
    add("--license", dest="licence", default=None,
        help="of the adapter, in the hub's terms (such as apache-2.0 or cc-by-4.0); default: "
             "apache-2.0 on a Qwen3 of Qwen's, else other")
    p.set_defaults(run=run_push)


def run_push(args):
    for name in filter(None, (args.name, args.base)):
        check_name(name)
    files = prepare(args.adapter, args.base, args.licence)
    for name, content in files.items():
        print(f"{name}: {len(content):,} bytes")
    if args.dry_run:
        print(f"\nnothing was sent to {args.name}; the card:\n\n{files['README.md'].decode()}")
        return
    print(f"pushed: {upload(HfApi(), args.name, files, args.private)}")


def check_name(name):
    """Raise InputError unless it is OWNER/NAME as the hub takes it."""
    try:
        validate_repo_id(name)
        is_full = name.count("/") == 1
    except HFValidationError:
        is_full = False
    if not is_full:
        raise InputError(f"{name!r} is no name on the hub: give owner/name, of letters, digits, "
                         "-, _ and .")
