"""Rewards: what a completion earns, by a verifier or by agreement with people's replies.

    python rewards.py train --model Qwen/Qwen3-0.6B --data picks.jsonl --out runs/reward
    python grpo.py --reward model --reward-model runs/reward ...

A reward is called with P posts, for each a list of texts, and a seed; it returns P lists of floats.
REWARDS names them for --reward, `make_reward` makes one for a session. Rewards by another model,
and the training of reward models (the command above), are in methods/.
"""

import argparse
import math
import random
import sys

from support import registry
from support.files import InputError, command, short
from support.registry import REWARDS, add_commands
from trainer import load_embedder


# ---- A verifier's rewards ------------------------------------------------------------------------

class VerifierReward:
    """1 when the completion is right in the style of the post's user, drawn anew at every visit by
    popularity; or, with any_style, when it is right in any style.

    valid_weight is added for being right in any style; flip is the label noise, the fraction of
    verdicts that are inverted (for studies of a noisy verifier)."""

    def __init__(self, domain, *, any_style=False, valid_weight=0.0, flip=0.0):
        if not domain.styles:
            raise InputError("--reward reader and valid need replies by style: use agreement, "
                             "relevance, model or judge for posts like these")
        self.domain = domain
        self.any_style = any_style
        self.valid_weight = valid_weight
        self.flip = flip
        self.best = 1.0 + valid_weight       # what a right completion earns

    def __call__(self, posts, completions, seeds):
        rewards = []
        for post, texts, seed in zip(posts, completions, seeds):
            rng = random.Random(seed)
            user = self.domain.user(post, rng)
            rewards.append([])
            for text in texts:
                styles = self.domain.styles_of(post, text)
                valid = bool(styles)
                right = valid if self.any_style else user in styles
                # Noise inverts the two verdicts independently.
                right = right != (rng.random() < self.flip)
                valid = valid != (rng.random() < self.flip)
                rewards[-1].append(float(right) + self.valid_weight * valid)
        return rewards


@REWARDS.add("reader", "1 if right in the style of the post's user")
def user_reward(session):
    return VerifierReward(session.domain, **verifier_options(session.args))


@REWARDS.add("valid", "1 if right in any style")
def valid_reward(session):
    return VerifierReward(session.domain, any_style=True, **verifier_options(session.args))


def verifier_options(args):
    """The flags of the verifier's rewards, which only grpo.py has."""
    return {name: getattr(args, name) for name in ("valid_weight", "flip") if hasattr(args, name)}


# ---- Agreement with people's replies -------------------------------------------------------------

class AgreementReward:
    """For posts with people's replies, in [-1, 1]: the largest cosine between the completion and
    any of the post's replies, by a frozen embedder: does it say what some person said?"""

    def __init__(self, embedder, domain=None):
        self.embedder = embedder

    def __call__(self, posts, completions, seeds=None):
        sizes = []
        flat = []
        for post, texts in zip(posts, completions):
            sizes.append(len(post.replies) + len(texts))
            flat += [*post.replies, *texts]
        rewards = []
        for vectors, post in zip(self.embedder([flat])[0].split(sizes), posts):
            people = vectors[:len(post.replies)]
            own = vectors[len(post.replies):]
            rewards.append((own @ people.T).amax(1).tolist())
        return rewards

    def rows(self, posts, texts):
        """For each post what each of the texts would earn, an array (T,). Every text is embedded
        once, where a call embeds it for each post."""
        vectors = self.embedder([list(texts)])[0]
        replies = self.embedder([[text for post in posts for text in post.replies]])[0]
        for people in replies.split([len(post.replies) for post in posts]):
            yield (vectors @ people.T).amax(1).cpu().numpy()


def embedded(reward):
    """A function (session) -> reward, for a reward by the session's embedder."""
    def make(session):
        if session.args.embedder == "base" and len(session.posts) < 2:
            raise InputError("the base's states of a single post do not separate completions: name "
                             "an embedding model by --embedder, or choose by a reward model")
        if session.embedder is None:
            load_embedder(session)
        return reward(session.embedder, session.domain)
    return make


@REWARDS.add("agreement", "likeness to the nearest of people's own replies")
def agreement_reward(session):
    for post in session.posts:
        if not post.replies:
            raise InputError(f"the post {short(post.id)} has no reply that a completion could "
                             "agree with: leave such posts out, or use --reward relevance")
    return embedded(AgreementReward)(session)


# ---- Beside the reward ---------------------------------------------------------------------------

def overlong_penalty(lengths, longest, cache):
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), added to rewards: from 0 at
    longest - cache tokens to -1 at the longest completion."""
    return ((longest - cache - lengths) / cache).clamp(-1, 0)


def diversity_weight(args, own, of_D, factor, tally):
    """D's weight in this step, from the squared norms, over all ranks, of the objective's
    advantages and of D's at weight 1, and the schedule's factor.

    --diversity-share sets it so that D's part has that share of the objective's norm; D is then
    left out where the objective's is zero, and so is the log's D_share."""
    if not own:
        return 0.0 if args.diversity_share else factor * args.diversity_weight
    weight = factor * args.diversity_weight
    ratio = math.sqrt(of_D / own)
    if args.diversity_share:
        weight = factor * args.diversity_share / ratio if ratio else 0.0
        tally.add("D_weight", weight)
    if weight:
        tally.add("D_share", weight * ratio)
    return weight


def reward_name(name, session):
    """auto: reader where replies have styles, agreement where most posts have several people's
    replies, else relevance."""
    if name != "auto":
        return name
    if session.domain.styles:
        return "reader"
    several = sum(len(post.replies) > 1 for post in session.posts)
    return "agreement" if 2 * several > len(session.posts) else "relevance"


def make_reward(name, session):
    """The reward called `name` for a loaded Session."""
    return REWARDS[reward_name(name, session)].function(session)


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sub = p.add_subparsers(dest="command", required=True)
    add_commands("rewards", sub)
    return p


def main(argv=None):
    registry.load()
    return command(parser(), argv)


if __name__ == "__main__":
    # Files in methods/ import this one by its name: run that copy, not a second one.
    from rewards import main
    sys.exit(main())
