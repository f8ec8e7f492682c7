"""The model card of an adapter: README.md beside its files, in the hub's layout.

It is written when a run ends, and again by `lora.py push`, with the evaluation if there is one. It
names files by their last name only: a card is published, and a path tells about a machine."""

import json
import os
import re
import shlex
from pathlib import Path

from support.files import printable, write_text
from support.posts import Post

# Its first line after the header. A card without it was edited by hand and is kept.
MARK = "<!-- written by lora.py: remove this line to keep your own text -->"

PROGRAMS = ("polylora.py", "grpo.py")

# What stands for the post in the card's prompt.
ANY_POST = Post("", "{post}", ())

READ_BY_PEFT = ("LORA", "ADALORA")

# name in a run's config.json -> what it is. Those at 0 or null are left out, and OF_D without D.
SETTINGS = {"adapter": "adapter", "rank": "rank", "alpha": "alpha", "targets": "layers",
            "loss": "loss", "lam": "lambda, the weight of D",
            "lambda_share": "D's gradient, as a fraction of the cross-entropy's",
            "advantage": "objective", "set_size": "completions in a set",
            "diversity_weight": "weight of D",
            "diversity_share": "D's part of the advantages, as a fraction of the objective's",
            "diversity": "diversity D", "gate": "quality gate of D", "embedder": "embedder of D",
            "reward": "reward", "beta": "KL weight", "k": "completions a post (k)",
            "temperature": "temperature", "max_new_tokens": "longest completion, tokens",
            "batch": "posts a step", "lr": "learning rate", "seed": "seed", "nf4": "base in NF4"}


OF_D = ("diversity", "gate", "embedder")


def write_card(folder, config, summary, messages, table=(), base=None, licence=None):
    """Writes README.md into an adapter's folder, unless one is there that was edited by hand.

    config, summary: a run's config.json and done.json; messages: the chat that puts ANY_POST to the
    model; table: rows (metric, mean, low, high) of an evaluation; base: the hub name of the base,
    where config has a folder; licence: of the adapter, in the hub's terms. Returns the text of the
    card."""
    path = Path(folder) / "README.md"
    if path.exists():
        old = path.read_text(encoding="utf-8")
        if MARK not in old:
            return old
    adapter = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    text = card_text(config, summary, messages, adapter, table, base or public_name(config),
                     licence)
    write_text(path, text)
    return text


def prompt_of(domain):
    """The chat that puts any post to the model, with {post} for its text; [] where a domain (one
    that is registered from outside may do anything) needs a post of its own kind for that: a
    finished run is not lost for its card."""
    try:
        return domain.messages(ANY_POST)
    except Exception:
        return []


def public_name(config):
    """The name of the base in a run's config.json, where it is one of the hub's; else None."""
    name = str(config.get("model") or "")
    if os.path.exists(name) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    return name


def last_name(word):
    """A path of this machine cut to its last part; other words as they are."""
    path = Path(word)
    if path.is_absolute() or word.startswith(("~", ".")) or os.path.exists(word):
        return path.name or word
    return word


def command_of(config):
    """The command that trained a run, of config.json; None where it was not one of PROGRAMS."""
    words = config.get("argv") or [""]
    if Path(words[0]).name not in PROGRAMS:
        return None
    shown = [Path(words[0]).name]
    for word in words[1:]:
        flag, is_set, value = word.partition("=")
        shown.append(f"{flag}={last_name(value)}" if is_set else last_name(word))
    return "python " + shlex.join(shown)


# ---- Its parts -----------------------------------------------------------------------------------

def card_text(config, summary, messages, adapter, table, base, licence):
    title = last_name(str(config.get("out") or "adapter"))
    parts = [header(base, adapter, licence), MARK, f"# {printable(title)}",
             about(config, summary, base), training(config, summary), evaluation(table),
             use(messages, adapter, base, config), LIMITS, licence_text(base, licence)]
    return "\n\n".join(parts) + "\n"


def header(base, adapter, licence):
    """The YAML that the hub reads. JSON texts are YAML, too."""
    lines = ["---"]
    if base:
        lines.append(f"base_model: {json.dumps(base)}")
    if adapter.get("peft_type") in READ_BY_PEFT:
        lines.append("library_name: peft")
    lines += ["pipeline_tag: text-generation",
              f"license: {json.dumps(licence or licence_of(base))}",
              "tags: [lora, qwen3, diversity, polychromic-lora]", "---"]
    return "\n".join(lines)


def licence_of(base):
    """The licence of the base in the hub's terms, where it is known."""
    return "apache-2.0" if str(base).startswith("Qwen/Qwen3") else "other"


def weight_of_d(config):
    """The weight of D in either phase, absolute or as a fraction; 0 without D."""
    for name in ("lam", "lambda_share", "diversity_weight", "diversity_share"):
        if config.get(name):
            return config[name]
    return 0


def method_of(config, summary):
    """One phrase on how a run was trained."""
    method = "supervised fine-tuning"
    if summary.get("stage") == "grpo":
        method = f"GRPO (objective: {config.get('advantage')})"
    weight = weight_of_d(config)
    if not weight:
        return f"{method}, without a diversity term"
    return f"{method} with the diversity term D ({config.get('diversity')}), weight {weight:g}"


def about(config, summary, base):
    named = base or f"{last_name(str(config.get('model')))} (a folder)"
    text = f"An adapter for {printable(named)}, trained by {method_of(config, summary)}"
    if config.get("start"):
        text += f", from the adapter {last_name(str(config['start']))}"
    if config.get("wise"):
        ends = " and ".join(last_name(str(run)) for run in config["wise"])
        text += f", then interpolated between {ends} (weight {config.get('weight')})"
    return text + (". It is meant for apps that show a person k drafts to pick from: with D, the k "
                   "drafts of a post are trained to be good and to differ.")


def training(config, summary):
    """Data, settings, command and commit."""
    domain = (summary.get("domain") or {}).get("domain")
    data = [f"`{last_name(str(config.get('data')))}`, domain {domain}"]
    if config.get("data_hash"):
        data.append(f"sha256 {config['data_hash'][:16]}")
    sizes = (config.get("split") or {}).get("sizes")
    if sizes:
        parts = ", ".join(f"{name} {size}" for name, size in sizes.items())
        data.append(f"a part of a split into disjoint posts ({parts})")
    rows = ["| setting | value |", "|---|---|", f"| steps | {summary.get('step')} |"]
    for name, meaning in SETTINGS.items():
        value = config.get(name)
        unused = name in OF_D and not weight_of_d(config)
        if value not in (None, 0, False, "") and not unused:
            shown = printable(last_name(str(value))).replace("|", "\\|")
            rows.append(f"| {meaning} | {shown} |")
    lines = ["## Training", f"Data: {'; '.join(data)}.", "\n".join(rows)]
    command = command_of(config)
    if command:
        lines.append(f"Command:\n\n```\n{command}\n```")
    environment = config.get("environment") or {}
    commit = environment.get("commit")
    if commit:
        changed = ", with local changes" if environment.get("clean") is False else ""
        lines.append(f"Code: Polychromic LoRA, commit {commit}{changed}; "
                     f"torch {environment.get('torch')}.")
    return "\n\n".join(lines)


def evaluation(table):
    """Means with 95% intervals."""
    if not table:
        return ("## Evaluation\n\nNot measured yet: `python evaluate.py measure RUN --data "
                "eval.jsonl`, then `python lora.py push` puts the table here.")
    lines = ["## Evaluation", "", "| metric | mean | 95% interval |", "|---|---|---|"]
    for name, mean, low, high in table:
        lines.append(f"| {name} | {mean:.3f} | [{low:.3f}, {high:.3f}] |")
    lines += ["", "Means over held-out posts. The intervals are over posts: one training run, so "
                  "the variance of training again is not in them."]
    return "\n".join(lines)


def use(messages, adapter, base, config):
    """How to ask the model: PEFT's lines where PEFT reads it, the prompt, the temperature."""
    lines = ["## Use", "Ask for k completions at the temperature of training, without top-k or "
                       f"top-p: temperature {config.get('temperature', 1.0):g}, top_p 1, top_k 0. "
                       "The chat is the base's, without thinking; {post} stands for "
                       "the post:"]
    if not messages:                         # see prompt_of
        messages = [{"role": "user", "content": "{post}"}]
    turns = json.dumps(messages, ensure_ascii=False)
    name = json.dumps(base or "BASE")
    if adapter.get("peft_type") not in READ_BY_PEFT:
        lines.append(f"```\nmessages = {turns}\n```")
        lines.append("PEFT does not read this kind of adapter: use `python evaluate.py drafts`, or "
                     "merge it with `python lora.py merge`.")
        return "\n\n".join(lines)
    lines.append(f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({name}), "ADAPTER")
messages = {turns}
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,
                                       enable_thinking=False, return_tensors="pt")
drafts = model.generate(**prompt, do_sample=True, num_return_sequences=5, max_new_tokens=100,
                        temperature={config.get('temperature', 1.0):g}, top_p=1.0, top_k=0,
                        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"))
```""")
    return "\n\n".join(lines)


LIMITS = """## Intended use and limits

Short replies of which a person picks one. Nothing checks what a completion says: it may be false,
unkind or a copy of a training reply, so a person should read it before it is sent. D rewards
completions that differ, which is not the same as completions that are good; the table above, where
there is one, is of the posts named there and of no others. Languages, topics and styles are those
of the data."""


def licence_text(base, licence):
    if licence:
        said = f"This adapter: {licence}."
    elif licence_of(base) == "apache-2.0":
        said = "The base is under Apache 2.0."
    else:
        said = "The base's licence applies to what is made with it."
    return ("## Licence\n\n" + said + " Whether the data may be used and its replies be learnt "
            "from is for whoever publishes this to know. The training code is under MIT.")
