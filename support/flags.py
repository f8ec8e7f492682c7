"""Flags that several commands share, in groups: method, data, sampling, run, rivals, rare.

The flags of rival methods (files in methods/ that are not part of the plain method) and rarely
needed ones are shown by --help-all only. A flag's name is its key in a run's config.json, or its
`dest` where it was renamed; its help says units and default.
"""

import argparse
import sys
from dataclasses import dataclass

from support.checks import NEW_ADAPTER
from support.files import Tracker
from support.registry import (ADAPTERS, D_GRADIENTS, DECODERS, DIVERSITIES, DOMAINS, MEASURES,
                              REWARDS, add_flags, listed)


class HiddenGroup:
    """An argument group whose flags are shown by --help-all only."""

    def __init__(self, group):
        self.group = group
        self.shown = "--help-all" in sys.argv

    def add_argument(self, *names, **settings):
        if not self.shown:
            settings["help"] = argparse.SUPPRESS
        return self.group.add_argument(*names, **settings)


class ShortHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Help on about two screens: a usage line of what must be given, N and X for numbers, no
    defaults that say nothing."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=24)

    def _format_usage(self, usage, actions, groups, prefix):
        needed = [action for action in actions if action.required or not action.option_strings]
        return super()._format_usage(usage, needed, [], prefix).rstrip() + " [flags]\n\n"

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type, action.dest.split("_")[-1].upper())

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def keep_old_name(group, old, action):
    """Take a flag by its former name, too, for a release; no help shows it."""
    group.add_argument(old, dest=action.dest, type=action.type, default=action.default,
                       help=argparse.SUPPRESS)


@dataclass
class Groups:
    """The argument groups of a command's flags."""
    method: object
    data: object
    sampling: object
    run: object
    rivals: HiddenGroup
    rare: HiddenGroup


def flag_groups(parser):
    """The Groups of a parser; adds --help-all to it."""
    parser.formatter_class = ShortHelp
    parser.add_argument("--help-all", action="help",
                        help="the same with flags of rivals and rarely needed ones")
    return Groups(method=parser.add_argument_group("method"),
                  data=parser.add_argument_group("data"),
                  sampling=parser.add_argument_group("sampling"),
                  run=parser.add_argument_group("run"),
                  rivals=HiddenGroup(parser.add_argument_group("rivals")),
                  rare=HiddenGroup(parser.add_argument_group("rarely needed")))


def name_flag(group, flag, registry, default, about, extra=()):
    """Add a flag whose values are the names of a registry, with a line on each."""
    group.add_argument(flag, default=default, choices=[*extra, *registry], metavar="NAME",
                       help=f"{about}. {listed(registry)}")


def common_flags(groups, *, lr, steps, batch, schedule="cosine"):
    """Flags that every training phase has."""
    add = groups.data.add_argument
    add("--data", required=True, help="posts of this phase, JSON lines (.gz too); make disjoint "
                                      "ones with data.py split")
    domain_flags(groups)
    add = groups.run.add_argument
    add("--out", required=True, help="the run folder, which is made")
    add("--resume", action="store_true", help="go on with the unfinished run in --out")
    add("--dry-run", action="store_true",
        help="time a few steps, print the whole run's time, and write nothing")
    add("--seed", type=int, default=1, help="seed of everything random in this run")
    add("--steps", type=int, default=steps,
        help="optimizer steps; 0: by --epochs")
    add("--epochs", type=float, default=1, help="passes over the posts when --steps is 0")
    add("--batch", type=int, default=batch, help="posts a step, over all ranks")
    add("--lr", type=float, default=lr, help="peak learning rate of AdamW")
    add("--warmup", type=int, default=10, help="steps of linear warm-up")
    add("--schedule", default=schedule, choices=("cosine", "constant"), metavar="NAME",
        help="then the rate: cosine or constant")
    add("--clip", type=float, default=1.0, help="largest gradient norm, over all ranks")
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add("--micro-tokens", type=int, default=16384,
        help="tokens in one forward and backward pass: lower it to save memory")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=None,
        help="recompute activations: less memory; default: if need be")
    add = groups.rare.add_argument
    add("--beta2", type=float, default=0.999, help="AdamW's second moment decay")
    add("--weight-decay", type=float, default=0.0, help="AdamW's decoupled weight decay")
    add("--track", choices=list(Tracker.PACKAGES),
        help="send the log's numbers there too; the package must be installed")
    model_flags(groups)


def domain_flags(groups):
    """Flags of what the posts of --data are."""
    add = groups.data.add_argument
    add("--domain", default="auto", metavar="NAME",
        help=f"how completions are asked for and scored: auto, {', '.join(DOMAINS)}")
    add_flags(DOMAINS, groups.data)
    add("--skip-bad-lines", action="store_true",
        help="skip and count unreadable lines of --data")


def model_flags(groups):
    """Flags of how the model is held and how it samples."""
    add = groups.run.add_argument
    add("--device", default=None,
        help="cuda, cuda:1, cpu; default: this rank's GPU if there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), metavar="NAME",
        help="of the frozen weights: float32, bfloat16, or auto, bfloat16 on a GPU")
    add("--nf4", action="store_true",
        help="frozen base in 4 bits (QLoRA): a third of the memory, slower")
    add("--shard", action="store_true", help="spread the frozen base over the ranks (FSDP2): for "
                                             "models larger than a GPU, slower")
    add("--max-rows", type=int, default=256,
        help="completions sampled at a time on each rank: lower it to save memory")
    add = groups.rare.add_argument
    add("--revision", default=None, help="commit, tag or branch of the model on the hub")
    add("--no-graphs", action="store_true",
        help="sample without CUDA graphs: slower; for drivers that fail on them")


def adapter_flags(groups):
    """Flags of the adapter that trains."""
    name_flag(groups.method, "--adapter", ADAPTERS, NEW_ADAPTER["adapter"], "what trains")
    add = groups.method.add_argument
    add("--rank", type=int, default=NEW_ADAPTER["rank"], help="LoRA rank r")
    add("--alpha", type=float, default=NEW_ADAPTER["alpha"],
        help="LoRA alpha: the update is scaled by alpha / r")
    add("--dropout", type=float, default=0.0, help="LoRA dropout in the cross-entropy passes")
    add("--targets", default=",".join(NEW_ADAPTER["targets"]),
        help="linear layers with LoRA, comma-separated")
    groups.rivals.add_argument(
        "--members", type=int, default=NEW_ADAPTER["members"],
        help="LoRAs of rank r in one adapter, for the adapters that have several")


def diversity_flags(groups, k):
    """Flags of the completions a phase samples and of the diversity among them."""
    add = groups.sampling.add_argument
    add("--k", type=int, default=k, help="completions for each post")
    add("--max-new-tokens", type=int, default=100,
        help="longest completion, in tokens, stop token included")
    add("--temperature", type=float, default=1.0,
        help="of sampling, and of the distribution whose log-probabilities are trained")
    name_flag(groups.method, "--diversity", DIVERSITIES, "cosine",
              "the diversity D of k completions")
    add = groups.method.add_argument
    add("--gate", default="none", choices=("none", "auto", "verifier", "likelihood", "reward"),
        metavar="NAME",
        help="quality in [0, 1] by which D is multiplied: none, the verifier, likelihood under "
             "the base, or reward (phase two); auto: verifier where replies have styles, else "
             "reward, or likelihood in phase one")
    add("--embedder", default="base",
        help="what embeds completions: base (the frozen model), a BERT encoder or Qwen3-Embedding "
             "(folder, hub name), char-ngrams, word-ngrams, several joined by +")
    groups.rivals.add_argument(
        "--gate-floor", type=float, default=0.0,
        help="added to the distance of a gated pair of completions, so that equal ones count, too: "
             "more weight on quality, less on diversity")
    noise = groups.rivals.add_argument(
        "--label-noise", dest="flip", type=float, default=0.0,
        help="fraction of the verifier's verdicts that are inverted, each of reward, gate and "
             "coverage on its own")
    keep_old_name(groups.rivals, "--flip", noise)


def start_flags(groups):
    """Flags of what phase two starts from."""
    add = groups.method.add_argument
    add("--start", "--from", required=True,
        help="finished SFT run, or an adapter in PEFT's layout (after torchrun write --from: "
             "--start is its own)")
    add("--model", default=None,
        help="Qwen3 checkpoint; default: the one that the adapter names")


def policy_flags(groups):
    """Flags of GRPO's advantages and loss."""
    add = groups.method.add_argument
    add("--set-size", type=int, default=4,
        help="completions in a set, for set objectives")
    add("--diversity-weight", type=float, default=0.0,
        help="weight of D, added to what --advantage maximises: in standard deviations of reward "
             "where that divides by them, else in units of reward")
    add("--diversity-share", type=float, default=0.0,
        help="instead: norm of D's part of each step's advantages over the objective's")
    add("--beta", type=float, default=0.0,
        help="weight of the KL to the start")
    add("--clip-low", type=float, default=0.2,
        help="completions worse than their group get no gradient at ratios below 1 - this")
    add("--clip-high", type=float, default=0.2,
        help="better ones get none at ratios above 1 + this (DAPO: 0.28)")
    add("--updates", type=int, default=1, help="optimizer steps on each rollout")
    add = groups.rivals.add_argument
    add("--entropy-weight", type=float, default=0.0,
        help="weight of the entropy of whole completions, in nats, added to the reward")
    add("--ratio", default="token", choices=("token", "sequence"),
        help="what is clipped: each token's ratio, or the whole completion's (GSPO)")
    add("--tis", type=float, default=0.0, metavar="CAP",
        help="weigh each token by its probability in training over that in sampling, at most CAP "
             "(truncated importance sampling; 2 is usual); 0: no weight")


def sft_start_flags(groups):
    """Flags of what phase one starts from."""
    add = groups.method.add_argument
    add("--model", default=None, help="Qwen3 checkpoint: folder or hub name; with --start, by "
                                      "default the one that its adapter names")
    add("--start", "--from", default=None,
        help="train the adapter of this finished run, or of this folder in PEFT's layout, further, "
             "with a new optimizer and schedule; another --seed gives another order of posts")


def rival_sft_flags(groups):
    """Flags of other SFT losses and of other estimators of D's gradient."""
    groups.rivals.add_argument("--loss-value", type=float, default=None,
                               help="the number that --loss names; default: its paper's")
    name_flag(groups.rivals, "--d-gradient", D_GRADIENTS, "score", "how D's gradient is estimated")
    add_flags(D_GRADIENTS, groups.rivals)


def lambda_flags(groups):
    """Flags of D's weight in phase one."""
    add = groups.method.add_argument
    add("--lambda", dest="lam", type=float, default=0.0,
        help="weight of D, in nats per token for one unit of D")
    add("--lambda-share", type=float, default=0.0,
        help="instead of --lambda: the norm of D's part of a step's gradient over the "
             "cross-entropy's, held by setting lambda at each step that samples")
    add = groups.sampling.add_argument
    add("--draft-every", type=int, default=1, help="steps between those that sample completions")
    add("--draft-posts", type=int, default=8,
        help="posts of such a step that get k completions, over all ranks")


def reward_flags(groups):
    """Flags of what a completion earns."""
    name_flag(groups.method, "--reward", REWARDS, "auto",
              "what a completion earns. auto: reader where replies have styles, agreement where "
              "posts have several replies, else relevance", extra=("auto",))
    add = groups.rivals.add_argument
    add("--overlong", type=int, default=0,
        help="tokens before --max-new-tokens over which a completion loses up to 1 of its reward, "
             "DAPO's soft overlong punishment (arXiv 2503.14476)")
    add("--valid-weight", type=float, default=0.0,
        help="added to --reward reader for a completion that is right in any style")
    add("--reward-model", default=None,
        help="for --reward model a folder of rewards.py train, or a Qwen3 with a scalar head; for "
             "judge a chat model")
    add("--spread-penalty", type=float, default=1.0,
        help="how many times their standard deviation is taken off the mean of several reward "
             "models")


# ---- Flags of evaluate.py ------------------------------------------------------------------------

def measure_flags(parser, groups):
    """Flags of `measure`: what is measured, by what, and into which folder."""
    parser.add_argument("runs", nargs="*", metavar="RUN",
                        help="finished runs of polylora.py sft or grpo.py, all on one base model")
    add = groups.data.add_argument
    add("--data", required=True, help="held-out posts, JSON lines")
    domain_flags(groups)
    add = groups.run.add_argument
    base = add("--base-out", dest="bare", metavar="FOLDER",
               help="also measure the base model without adapter, as a run in this folder")
    keep_old_name(groups.run, "--bare", base)
    add("--seed", type=int, default=1,
        help="of the base model's completions; a run's are sampled with the run's own seed")
    add("--name", help="measure into RUN@NAME, a method of its own in a report; default: the "
                       "decoder's name, and RUN itself for sampling")
    add("--dry-run", action="store_true",
        help="say how long the completions of one run would take, and write nothing")
    groups.sampling.add_argument(
        "--n", "--samples", type=int, default=64,
        help="completions for each post: at least 10, for Pass@10, and more than the largest k is "
             "better (after torchrun write --samples: it takes --n for an option of its own)")
    groups.rivals.add_argument(
        "--set-size", type=int, default=5,
        help="completions in a set of a decoder that samples them jointly (beams, list, "
             "verbalized): their Pass@k is of whole sets, so for this k alone; beams write one "
             "set, others as many as fit into --n")
    name_flag(groups.method, "--reward", REWARDS, "auto",
              "what a completion earns, where there is no verifier; model or judge, where there "
              "is: another selector of the best of k", extra=("auto",))
    add = groups.method.add_argument
    add("--pass-above", type=float, default=None,
        help="the reward above which a completion passes, for posts without people's replies; "
             "default: 0.5 with --reward judge")
    add("--reward-model", help="Qwen3 folder or hub name for --reward model or judge, or a folder "
                               "of rewards.py train")
    add("--embedder", default="base",
        help="what embeds completions: base, the folder or hub name of an embedding model, "
             "char-ngrams, word-ngrams, or several joined by +")
    add_flags(MEASURES, groups.rivals)


def drafts_flags(parser, groups):
    """Flags of `drafts`: the run, the post, how many drafts."""
    parser.add_argument("folder", metavar="RUN",
                        help="finished run of polylora.py sft or grpo.py")
    parser.add_argument("post", nargs="?", help="the post, in quotes; without it, a prompt: type "
                                                "posts, pick drafts")
    groups.run.add_argument("--picks", metavar="JSONL", help="where the prompt keeps picks; "
                                                             "default: RUN/picks.jsonl")
    groups.sampling.add_argument("--k", type=int, default=5, help="drafts to write")
    groups.sampling.add_argument("--seed", type=int, default=1,
                                 help="of the sampling: another seed, other drafts")
    add = groups.rivals.add_argument
    add("--reward-model", help="Qwen3 folder or hub name for --best-by model or judge, or a folder "
                               "of rewards.py train")
    add("--embedder", default="base", help="what embeds drafts for --best-by")


def decoding_flags(groups):
    """Flags of the model that is sampled from, and of how."""
    groups.run.add_argument("--model", help="Qwen3 checkpoint under the adapters; default: the "
                                            "first run's")
    add = groups.sampling.add_argument
    add("--max-new-tokens", type=int, default=100,
        help="longest completion, in tokens, stop token included")
    add("--temperature", type=float, default=1.0,
        help="of sampling; 0 is greedy, so that all completions are equal")
    add("--top-k", type=int, default=0, help="sample from the likeliest tokens alone; 0: from all")
    add("--top-p", type=float, default=1.0, help="smallest share of probability to sample from")
    add("--min-p", type=float, default=0.0,
        help="sample from tokens of at least this share of the likeliest one's probability")
    name_flag(groups.sampling, "--decoder", DECODERS, "sampling", "how completions are sampled")
    add_flags(DECODERS, groups.rivals)
    groups.rivals.add_argument(
        "--spread-penalty", type=float, default=1.0,
        help="how many standard deviations of several reward models are taken off their mean")
    model_flags(groups)
