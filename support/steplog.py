"""What a step logs in metrics.jsonl: the names, and how each is counted."""

from support.posts import different_share, normalise

SFT_LOGGED = ["ce", "loss", "unlikely", "reward", "D", "gated_D", "quality", "D_share", "lambda",
              "truncated", "empty", "identical"]
GRPO_LOGGED = ["reward", "valid", "D", "different", "entropy", "gated_D", "quality", "D_share",
               "D_weight", "reward_std", "advantage", "zero_variance", "clipped", "kl", "k1", "k2",
               "mismatch", "far_off", "tis", "tis_capped", "length", "truncated", "empty",
               "identical"]


class Tally:
    """Sums and counts of named numbers over micro-batches; `means` adds up all ranks' and divides
    once."""

    def __init__(self):
        self.sums = {}

    def add(self, name, total, count=1):
        old_total, old_count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (old_total + float(total), old_count + float(count))

    def means(self, ranks, names):
        """The means over all ranks; a name that no rank added to is left out."""
        flat = []
        for name in names:
            flat.extend(self.sums.get(name, (0.0, 0.0)))
        flat = ranks.sum(flat)
        means = {}
        for name, total, count in zip(names, flat[::2], flat[1::2]):
            if count:
                means[name] = total / count
        return means


def equal_rewards(rewards):
    """(P,) bool: whether all rewards of a prompt are equal, so that it teaches nothing."""
    return rewards.amax(1) == rewards.amin(1)


def log_rollout(tally, features, samples, advantages):
    """Log a rollout: rewards, advantages and completions. D is logged where it is measured."""
    posts = len(features.rewards)
    count = features.rewards.numel()
    tally.add("reward", features.rewards.sum(), count)
    tally.add("reward_std", features.rewards.std(1, correction=0).sum(), posts)
    tally.add("advantage", advantages.abs().sum(), count)
    tally_completions(tally, samples.finished, features.texts)
    tally.add("length", features.lengths.sum(), count)
    if features.valid is not None:
        tally.add("valid", features.valid.sum(), count)
    if features.quality is not None:
        tally.add("quality", features.quality.sum(), count)
    if features.rewards.shape[1] > 1:
        if "zero_variance" not in tally.sums:  # --resample has counted every prompt it sampled
            equal = equal_rewards(features.rewards)
            tally.add("zero_variance", equal.sum(), posts)
        different = sum(map(different_share, features.texts))
        tally.add("different", different, posts)


def log_update(tally, batch, logp, entropy, clipped, kl):
    """Log a micro-batch of an update: entropy, clipped tokens, and distances to older policies."""
    tally.add("entropy", entropy.sum(), len(logp))
    tally.add("clipped", clipped, len(logp))
    tally.add("tokens", batch.rows.tokens.numel() + len(logp))
    if batch.old is None:
        add_mismatch(tally, logp, batch.sampled)
    if batch.reference is not None:
        k1 = logp - batch.reference
        tally.add("k1", k1.sum(), len(logp))
        tally.add("k2", (k1 ** 2).sum() / 2, len(logp))
        tally.add("kl", kl, len(logp))


def add_mismatch(tally, scored, sampled):
    """Log how far training's log-probabilities are from sampling's: the mean difference, and the
    fraction of tokens whose difference is above 0.1."""
    off = (scored - sampled).abs()
    tally.add("mismatch", off.sum(), len(off))
    tally.add("far_off", (off > 0.1).sum(), len(off))


def tally_completions(tally, finished, texts):
    """Log the fractions of completions that were cut off and that are empty, and of prompts whose
    completions are all one text. finished, texts: P lists of k."""
    count = 0
    cut = 0
    empty = 0
    for done, group in zip(finished, texts):
        count += len(group)
        cut += done.count(False)
        for text in group:
            empty += not text.strip()
    tally.add("truncated", cut, count)
    tally.add("empty", empty, count)
    several = 0
    identical = 0
    for group in texts:
        if len(group) > 1:
            several += 1
            identical += len(set(map(normalise, group))) == 1
    tally.add("identical", identical, several)
