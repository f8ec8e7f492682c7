"""The adapter between two adapters (WiSE-FT, arXiv 2109.01903): `polylora.py interpolate`."""

import math
from pathlib import Path

import torch

from support.files import InputError, await_file, base_hash, first_rank, read_json, write_json
from support.peft_files import adapter_tensors, kind_of, read_adapter_config, write_adapter
from support.registry import COMMANDS


def interpolate_adapters(folder_a, folder_b, weight, out, scale):
    """Writes to `out` the adapter whose update is scale ((1 - weight) that of a + weight that of
    b): of two LoRAs one of rank r_a + r_b, A = [A_a; A_b], B = [(1 - weight) s_a B_a,
    weight s_b B_b] (WiSE-FT, arXiv 2109.01903; for Pass@k arXiv 2504.10478)."""
    config_a = read_adapter_config(Path(folder_a))
    config_b = read_adapter_config(Path(folder_b))
    a = read_matrices(folder_a)
    b = read_matrices(folder_b)
    check_compatible(folder_a, folder_b, config_a, config_b, a.keys() == b.keys())
    share_a = (1 - weight) * scale_of(config_a)
    share_b = weight * scale_of(config_b)
    tensors = {}
    for name in a:
        if "lora_A" in name:
            tensors[name] = torch.cat((a[name], b[name]))
        else:
            tensors[name] = torch.cat((share_a * a[name], share_b * b[name]), 1)
    rank = config_a["r"] + config_b["r"]
    config = {key: value for key, value in config_b.items() if key != "pissa_rank"}
    config |= {"r": rank, "lora_alpha": scale * rank, "use_rslora": False, "lora_dropout": 0.0}
    write_adapter(out, config, tensors)


def read_matrices(folder):
    """name -> tensor of an adapter's file, in fp32."""
    return {name: tensor.float() for name, tensor in adapter_tensors(Path(folder)).items()}


def check_compatible(folder_a, folder_b, config_a, config_b, same_layers):
    """Raises unless both are low-rank updates of one base, on the same layers."""
    if config_a.get("base_model_name_or_path") != config_b.get("base_model_name_or_path"):
        raise InputError(f"{folder_a} and {folder_b} are adapters of different base models")
    kinds = {kind_of(config_a), kind_of(config_b)}
    if not kinds <= {"lora", "rslora", "pissa"} or not same_layers:
        raise InputError(f"{folder_a} and {folder_b} cannot be interpolated: both must be of "
                         "lora, rslora or pissa, on the same layers")
    for config in (config_a, config_b):
        if config.get("init_lora_weights") == "pissa":
            raise InputError("a PiSSA adapter that leaves its start to be computed cannot be "
                             "interpolated: save it converted to LoRA")


def scale_of(config):
    """The factor of B A in an adapter's update."""
    rank = config["r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


# ---- The command ---------------------------------------------------------------------------------

def interpolate_command(sub):
    """`interpolate`: what lies between two adapters (WiSE-FT)."""
    i = sub.add_parser("interpolate", help="an adapter between two others, as a run to measure")
    add = i.add_argument
    add("folders", nargs=2, metavar="RUN", help="two finished runs, or adapter folders: A, then B")
    add("--weight", type=float, default=0.5, help="of B's update; A's has 1 - weight")
    add("--scale", type=float, default=1.0, help="of the sum: 0.5 halves the adapter's alpha")
    add("--out", required=True, help="folder to make: a run's if B is a run")
    i.set_defaults(run=run_interpolate)


def run_interpolate(args):
    run_a, run_b = map(Path, args.folders)
    check_interpolate(args, run_a, run_b)
    out = Path(args.out)
    nested = (run_b / "adapter").is_dir()
    is_run = (run_b / "done.json").exists()
    place = out / "adapter" if nested else out
    last = out / "done.json" if is_run else place / "adapter_config.json"  # what is written last
    if not first_rank():
        await_file(last)
        return
    check_free(out, last, nested)
    interpolate_adapters(adapter_folder(run_a), adapter_folder(run_b), args.weight, place,
                         args.scale)
    if is_run:                               # what `evaluate.py measure` reads of a run
        mark = {"wise": [str(run_a), str(run_b)], "weight": args.weight, "scale": args.scale}
        for name in ("config.json", "done.json"):
            write_json(out / name, read_json(run_b / name) | mark)
    print(f"Look at {place}: the adapter between {run_a} and {run_b}"
          + (", to be measured as any run" if is_run else ""))


def adapter_folder(run):
    """The adapter of a run, or of a folder that is one itself."""
    return run / "adapter" if (run / "adapter").is_dir() else run


def check_interpolate(args, run_a, run_b):
    # Of the bases' contents: one name may have been two models.
    hashes = {base_hash(run_a), base_hash(run_b)} - {None}
    if len(hashes) > 1:
        raise InputError(f"{run_a} and {run_b} were trained on different base models")
    if not 0 <= args.weight <= 1 or not 0 < args.scale < math.inf:
        raise InputError("--weight is from 0 to 1, and --scale above 0")


def check_free(out, last, nested):
    """Raises if `out` holds more than what a killed call leaves, which is made again."""
    killed = {"adapter", "config.json"} if nested else {"adapter_model.safetensors"}
    held = set()
    if out.exists():
        held = {path.name for path in out.iterdir() if path.suffix != ".partial"}
    if last.exists() or not held <= killed:
        raise InputError(f"{out} exists: choose another --out")


COMMANDS.add("interpolate", "an adapter between two others",
             program="polylora")(interpolate_command)
