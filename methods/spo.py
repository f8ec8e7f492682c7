"""Single-stream SPO (arXiv 2509.13232): the baseline is a value that is tracked for each post."""

import json

import torch

from model import token_logprobs
from methods.objectives import sample_scale
from support.files import InputError
from support.registry import OBJECTIVES
from trainer import Visit


def kept_share(kl, half=0.06, low=0.875, high=0.96):
    """rho = 2^(-kl / half), held between low and high (arXiv 2509.13232): the fraction of a post's
    counts that is kept when the policy has moved by `kl` nats a token since the post was last
    sampled."""
    return min(max(2 ** (-kl / half), low), high)


class Values:
    """The value right / (right + wrong) of each post: the mean of Beta(right, wrong).

    Rewards r in [0, 1] of a post change its counts to right = rho right + sum r and wrong = rho
    wrong + sum (1 - r), with rho = kept_share of the KL, which is the mean over tokens of
    log pi_then - log pi_now on the post's last completions. A post starts from 8 = 1/(1 - 0.875)
    completions of the policy at its first step.

    All of that is kept in OUT/values.jsonl, one line a rollout, written after it. The values at a
    step depend only on the lines of earlier steps, so a resumed run continues from the same ones.
    """
    FIRST = 8                    # completions that a new post starts from

    def __init__(self, session, step):
        self.session = session
        self.known = {}          # post's key -> {"right", "wrong", "tokens", "logprobs"}
        self.path = None
        if session.run is not None:
            self.path = session.run.folder / "values.jsonl"
            if self.path.exists():
                self.read(step)

    def read(self, step):
        """Take the values that were written before `step`."""
        for text in self.path.read_text(encoding="utf-8").splitlines():
            if not text:
                continue
            try:
                line = json.loads(text)
            except ValueError:   # cut off by a kill; its step is made again
                continue
            if line["step"] < step:
                self.known.update(line["posts"])

    def key(self, visit):
        """The key of a prompt's post."""
        return self.session.posts[visit.index].key

    def __call__(self, visits, step):
        """The values (P,) of these prompts' posts, from before this step's rewards."""
        new = {}
        for visit in visits:
            if self.key(visit) not in self.known:
                new[self.key(visit)] = Visit(visit.index, -1)      # seeds of their own: epoch -1
        if new:
            self.start(new, step)
        values = []
        for visit in visits:
            counts = self.known[self.key(visit)]
            values.append(counts["right"] / (counts["right"] + counts["wrong"]))
        return torch.tensor(values)

    def start(self, new, step):
        """Set the counts of new posts, {key: prompt}, by sampling completions for them."""
        session = self.session
        visits = list(new.values())
        posts = [session.posts[visit.index] for visit in visits]
        _, samples, texts = session.sample_completions(visits, step, self.FIRST)
        seeds = [session.seed_for("reader", step, visit) for visit in visits]
        rewards = session.reward(posts, texts, seeds)
        for i, key in enumerate(new):
            self.known[key] = {"right": float(sum(rewards[i])),
                               "wrong": float(sum(1 - r for r in rewards[i])),
                               "tokens": samples.tokens[i], "logprobs": samples.logprobs[i]}

    def learn(self, visits, rewards, samples, step):
        """Count this step's rewards (P, k)."""
        if not bool(((rewards >= 0) & (rewards <= 1)).all()):
            raise InputError("--advantage single-stream-spo needs rewards from 0 to 1: choose "
                             "another --reward or --advantage")
        drift = self.drift(visits)
        mine = []
        for i, visit in enumerate(visits):
            old = self.known[self.key(visit)]
            rho = kept_share(drift[i])
            kept = {"right": rho * old["right"], "wrong": rho * old["wrong"], "tokens": [],
                    "logprobs": []}
            seen = {"right": float(rewards[i].sum()), "wrong": float((1 - rewards[i]).sum()),
                    "tokens": samples.tokens[i], "logprobs": samples.logprobs[i]}
            mine.append((self.key(visit), kept, seen))
        updated = {}
        for key, kept, seen in self.session.ranks.gather(mine):
            counts = updated.setdefault(key, kept)         # a post may be in a step twice
            for name in counts:
                counts[name] = counts[name] + seen[name]
        self.known.update(updated)
        if self.path and self.session.ranks.main:
            self.write({"step": step, "posts": updated})

    def write(self, line):
        """Append a line to values.jsonl, after a line break that ends a line which a kill cut off.
        """
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(line))
        except OSError as e:
            raise InputError(f"{self.path} cannot be written ({e}): free some disk space, then go "
                             "on with --resume") from None

    @torch.no_grad()
    def drift(self, visits):
        """For each prompt the mean of log pi_then - log pi_now over the tokens of its post's last
        completions: P floats."""
        session = self.session
        last = [self.known[self.key(visit)] for visit in visits]
        pairs = []
        owner = []                           # completion -> which prompt it belongs to
        for i, visit in enumerate(visits):
            pairs.append((session.prompt(visit.index), last[i]["tokens"]))
            owner.extend([i] * len(last[i]["tokens"]))
        owner = torch.tensor(owner)
        now = torch.zeros(len(visits))
        for rows in session.micro_batches(pairs):
            logp, _ = token_logprobs(session.model, rows, session.args.temperature)
            now.index_add_(0, owner[rows.completion.cpu()], logp.cpu())
        drift = []
        for i, counts in enumerate(last):
            then = []
            for logprobs in counts["logprobs"]:
                then.extend(logprobs)
            drift.append((sum(then) - float(now[i])) / len(then))
        return drift


def add_values(session, visits, group, samples, step):
    """Set the values of a rollout's posts, from before its rewards; then count these rewards."""
    if session.values is None:
        session.values = Values(session, step)
    group.values = session.values(visits, step)
    session.values.learn(visits, group.rewards, samples, step)


@OBJECTIVES.add("single-stream-spo",
                "SPO with a tracked value a post, --k 1 too (arXiv 2509.13232)",
                needs=("rewards", "values"), gradient_scale=sample_scale, alone=True,
                shards=False, observe=add_values)
def stream_advantages(rewards, values):
    """Single-stream SPO (arXiv 2509.13232, eq. 7): A_i = r_i - v, v (P,) the post's tracked value
    from earlier steps. The paper's division by the batch's std is left out: with it a post's
    advantages would depend on the other posts of the batch."""
    return rewards - values[:, None].to(rewards)
