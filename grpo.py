"""Phase two: GRPO on posts that phase one has not seen, from an SFT adapter.

    python grpo.py --start runs/poly --data grpo.jsonl --out runs/poly-grpo --diversity-weight 1
    torchrun --nproc-per-node=8 grpo.py ...                                # the same step, spread over 8 GPUs

One step: k drafts for each post, a reward for each draft, advantages within each post's group, one clipped
policy-gradient step. As in DAPO the loss is a mean over tokens, and unlike the first GRPO beta (the KL
weight) is 0 by default. The reference of the KL is a frozen copy of the adapter that the phase starts from,
not the bare base model.

Advantages are pure functions of rewards (P, k) and embeddings (P, k, dim). In order: advantages, the loss,
rewards, the step.
"""

import argparse
import math
import random
import sys
from itertools import combinations
from pathlib import Path

import torch

import data
from model import InputError, read_json, token_logprobs
from polylora import (Embedder, Session, Tally, adapter, adapter_state, batch_indices, diversity,
                      diversity_advantages, draft_flags, frozen_copy, load_adapter, load_model, pair_distances,
                      save_adapter, seed_of, train)


# ---- Advantages. Rewards (P, k) -> advantages (P, k), each group on its own. -----------------------------------

def group_advantages(rewards, *, normalise=True):
    """GRPO: (r - mean) / (std + 1e-4) in the group, population std; normalise=False is Dr. GRPO, r - mean.

    A group of equal rewards has advantage exactly 0: found by max == min, since rounding in the mean of equal
    numbers divided by a tiny std would give advantages of order one.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    if normalise:
        centred = centred / (rewards.std(-1, keepdim=True, correction=0) + 1e-4)
    return torch.where(rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True), 0.0, centred)


def passk_advantages(rewards, k):
    """Pass@k training (arXiv 2508.10751, eq. 11-15) for rewards 0 or 1 and N = rewards.shape[1] rollouts, N >
    k.

    R = 1 - C(neg,k)/C(N,k), s = sqrt(R(1-R)); right: (1-R)/s, wrong: (1 - R - C(neg-1,k-1)/C(N-1,k-1))/s. It
    is each draft's mean, over the k-subsets that hold it, of the standardised subset reward. Zero where s is
    (all or none pass).
    """
    n = rewards.shape[-1]
    if not 1 <= k < n:
        raise InputError(f"Pass@k training needs k below the number of drafts: k is {k}, drafts are {n} (n = k gives no gradient)")
    if not bool(((rewards == 0) | (rewards == 1)).all()):
        raise InputError("Pass@k training needs rewards of 0 or 1: use --advantage maxk for real-valued ones")
    out = torch.zeros_like(rewards)
    for i, row in enumerate(rewards.tolist()):
        neg = row.count(0.0)
        rate = 1 - math.comb(neg, k) / math.comb(n, k)
        if 0 < rate < 1:
            sigma = math.sqrt(rate * (1 - rate))
            wrong = (1 - rate - math.comb(neg - 1, k - 1) / math.comb(n - 1, k - 1)) / sigma
            out[i] = torch.tensor([wrong if r == 0 else (1 - rate) / sigma for r in row])
    return out


def subsets(n, size):
    """All index sets of `size` out of n, (sets, size), and who is in them, (sets, n) float."""
    sets = torch.tensor(list(combinations(range(n), size)))
    return sets, torch.zeros(len(sets), n).scatter_(1, sets, 1.0)


def set_advantages(values, member):
    """The one equation of all set objectives. values (P, sets): f of every n-subset of N drafts; member
    (sets, N).

    A_i = mean of f over the subsets that hold i, minus its mean over all. Then E[sum_i A_i grad log pi(y_i)]
    = (N/n - 1) grad E[f], exactly: n = N gives no gradient. (Poly-EPO, arXiv 2604.17654, Prop. 3.1, in its
    mean form.)
    """
    return values @ member / member.sum(0) - values.mean(-1, keepdim=True)


def maxk_advantages(rewards, k):
    """Max@k: f = the largest reward of the subset, for real rewards (P, N), N > k; sums to zero in the group.
    On 0/1 rewards it is passk_advantages times its sigma. (Same gradient, up to N/k - 1, as PKPO's
    leave-one-out forms, arXiv 2505.15201.)"""
    n = rewards.shape[-1]
    if not 1 <= k < n:
        raise InputError(f"max@k training needs k below the number of drafts: k is {k}, drafts are {n} (n = k gives no gradient)")
    sets, member = subsets(n, k)
    return set_advantages(rewards[:, sets].amax(-1), member.to(rewards))


def polychromic_advantages(rewards, embeddings, n, quality=None, floor=0.0):
    """The polychromic set objective (arXiv 2509.25424 eq. 7; for language models arXiv 2604.17654): f = mean
    reward of the set times its diversity D (gated by quality (P, N) if given), over n-subsets of the N
    drafts, 2 <= n < N. rewards (P, N), embeddings (P, N, dim)."""
    total = rewards.shape[-1]
    if not 2 <= n < total:
        raise InputError(f"the polychromic set size must be at least 2 and below the number of drafts: it is {n} of {total}")
    sets, member = subsets(total, n)
    member = member.to(rewards)
    within = torch.einsum("si,pij,sj->ps", member, pair_distances(embeddings, quality, floor).to(rewards), member)
    spread = within / (n * (n - 1))  # ordered pairs; the diagonal is zero
    return set_advantages(rewards[:, sets].mean(-1) * spread, member)


# ---- The loss --------------------------------------------------------------------------------------------------

def policy_loss(logp, old_logp, advantages, *, denominator, clip_low=0.2, clip_high=0.2, reference=None, beta=0.0):
    """Sum over tokens of -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + beta ratio k3, divided by
    `denominator`, the number of tokens of the whole step over all ranks and micro-batches. All (N,), fp32;
    gradient through `logp` alone.

    ratio = exp(logp - old_logp). k3 = exp(ref - logp) - 1 - (ref - logp), and times the ratio its expected
    gradient is that of KL(policy || reference) on policy, which k1's (zero) and k3's own are not. Returns
    (loss, clipped share, KL) with the last two summed over tokens.
    """
    ratio = (logp - old_logp.detach()).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    kl = torch.zeros_like(logp)
    if beta:
        gap = reference.detach() - logp
        kl = gap.exp() - 1 - gap
        loss = loss + beta * ratio * kl
    outside = (clipped * advantages < ratio * advantages).float().sum()
    return loss.sum() / denominator, outside, kl.detach().sum()


# ---- Rewards: called with P posts and, for each, a list of texts -> for each a list of floats ------------------

class ReaderReward:
    """1 when the draft is right in the voice of this post's reader, who is drawn by popularity anew at every
    step."""

    def __init__(self, domain, seed):
        self.domain, self.seed = domain, seed

    def __call__(self, posts, drafts, step):
        readers = [self.domain.reader(p, random.Random(seed_of(self.seed, "reader", step, p.id))) for p in posts]
        return [[float(v in self.domain.voices_of(p, t)) for t in ts] for p, v, ts in zip(posts, readers, drafts)]


class RelevanceReward:
    """For posts without a verifier, in [0, 1]: (1 + cosine of draft and post) / 2, times three shares that
    are 1 for an ordinary reply: length (3 to 60 words), words not copied (1 - share of the draft's word
    trigrams that stand in the post), and no repetition (share of distinct word bigrams). Cheap, and easy to
    game: for a study of people use a reward model or judge."""

    def __init__(self, embedder):
        self.embedder = embedder

    def __call__(self, posts, drafts, step=0):
        groups = [[post.post, *texts] for post, texts in zip(posts, drafts)]
        vectors = self.embedder([[t for group in groups for t in group]])[0].split([len(g) for g in groups])
        return [[float((1 + e @ vector[0]) / 2) * self.form(post, t) for e, t in zip(vector[1:], texts)]
                for vector, (post, *texts) in zip(vectors, groups)]

    @staticmethod
    def form(post, text):
        said, words = post.lower().split(), text.lower().split()
        grams = lambda w, n: [tuple(w[i:i + n]) for i in range(len(w) - n + 1)]
        length = min(1.0, len(words) / 3, 60 / max(len(words), 1))
        trigrams, bigrams = grams(words, 3), grams(words, 2)
        copied = sum(g in set(grams(said, 3)) for g in trigrams) / max(len(trigrams), 1)
        return length * (1 - copied) * len(set(bigrams)) / max(len(bigrams), 1) if words else 0.0


class ModelReward:
    """A Qwen3 reward model's scalar (Qwen3ForSequenceClassification) for the chat of post and draft, without
    a system turn."""

    def __init__(self, model, tokenizer, domain, batch=32):
        self.model, self.tokenizer, self.domain, self.batch = model, tokenizer, domain, batch

    def rendered(self, post, text):
        return data.render_chat([*self.domain.messages(post), {"role": "assistant", "content": text}], add_generation_prompt=False)

    @torch.no_grad()
    def __call__(self, posts, drafts, step=0):
        ids = [self.tokenizer.encode(self.rendered(p, t), add_special_tokens=False).ids for p, ts in zip(posts, drafts) for t in ts]
        scores = []
        for some in (ids[i:i + self.batch] for i in range(0, len(ids), self.batch)):
            lengths = torch.tensor([len(x) for x in some])
            tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in some], batch_first=True)
            scores += self.values(tokens.to(self.model.device), lengths.to(self.model.device)).tolist()
        flat = iter(scores)
        return [[next(flat) for _ in ts] for ts in drafts]

    def values(self, tokens, lengths):
        return self.model.score(tokens, lengths)


class JudgeReward(ModelReward):
    """A Qwen3 chat model's probability of "yes" against "no" when asked whether the draft is a good reply, in
    [0, 1]."""

    def rendered(self, post, text):
        question = (f"Somebody posted:\n\n{post.post}\n\nA reply:\n\n{text}\n\nWould the person be glad to get this reply: is it to "
                    "the point, natural and kind? Answer yes or no.")
        return data.render_chat([{"role": "user", "content": question}], add_generation_prompt=True)

    def values(self, tokens, lengths):
        yes, no = (self.tokenizer.encode(w, add_special_tokens=False).ids[0] for w in ("yes", "no"))
        logits = self.model.last_hidden(tokens, lengths) @ self.model.head_weight()[[yes, no]].t()
        return logits.float().softmax(-1)[:, 0]


REWARDS = ("auto", "reader", "relevance", "model", "judge")


def make_reward(name, s):
    """The reward called `name` for a loaded Session; auto: reader where the domain has voices, else
    relevance."""
    if name == "auto":
        name = "reader" if s.domain.voices else "relevance"
    if name == "reader":
        if not s.domain.voices:
            raise InputError("--reward reader needs replies by voice: use relevance, model or judge for posts like these")
        return ReaderReward(s.domain, s.args.seed)
    if name == "relevance":
        if s.embedder is None:
            s.load_embedder()
        return RelevanceReward(s.embedder)
    if not s.args.reward_model:
        raise InputError(f"--reward {name} needs --reward-model, a Qwen3 folder or hub name")
    model = load_model(s.args.reward_model, s.args, s.ranks.device)
    if not (model.has_score if name == "model" else model.has_logits):
        raise InputError(f"--reward-model {s.args.reward_model} has no {'scalar head (score.weight)' if name == 'model' else 'token head'}"
                         f": --reward {name} needs one")
    return {"model": ModelReward, "judge": JudgeReward}[name](model, data.load_tokenizer(s.args.reward_model), s.domain)


# ---- The step --------------------------------------------------------------------------------------------------

def advantages_of(a, rewards, embeddings, quality):
    """The flags' advantages (P, k): an objective on the reward, plus --diversity-weight times the gradient of
    D.

    Group advantages weigh E[reward] by k - 1 (each draft is also in its own baseline), so D's, which weigh
    E[D] by 1, are multiplied by k - 1: one unit of D is then worth --diversity-weight standard deviations of
    reward, whatever k is.
    """
    k = rewards.shape[1]
    if a.advantage in ("group", "drgrpo"):
        out = group_advantages(rewards, normalise=a.advantage == "group")
    elif a.advantage == "passk":
        out = passk_advantages(rewards, a.set_size)
    elif a.advantage == "maxk":
        out = maxk_advantages(rewards, a.set_size)
    else:
        out = polychromic_advantages(rewards, embeddings, a.set_size, quality, a.gate_floor)
    if a.diversity_weight:
        out = out + a.diversity_weight * (k - 1) * diversity_advantages(embeddings, quality, a.gate_floor)
    return out


def rollout(s, step, tally):
    """Drafts, rewards and advantages of this rank's share of a batch -> list of (rows, advantages, old,
    reference), tensors flat over reply tokens, and the step's global token count."""
    a = s.args
    indices = batch_indices(len(s.posts), a.batch, step // a.updates, a.seed)
    mine = s.deal(indices)
    prompts, samples, texts = s.write(mine, step, a.k)
    rewards = torch.tensor(s.reward([s.posts[i] for i in mine], texts, step))
    quality = s.quality(a.gate, mine, prompts, samples, texts)
    embeddings = s.embedder(texts).cpu() if s.embedder is not None else None
    advantages = advantages_of(a, rewards, embeddings, quality).flatten().to(s.ranks.device)
    logprobs, batches = [p for ps in samples.logprobs for p in ps], []
    for rows in s.rows(list(zip(prompts, samples.tokens))):
        sampled = torch.tensor([p for d in rows.draft.unique_consecutive().tolist() for p in logprobs[d]], device=s.ranks.device)
        with torch.no_grad():
            old = token_logprobs(s.model, rows, a.temperature)[0] if a.updates > 1 else None
            with adapter(s.model, s.start):
                reference = token_logprobs(s.model, rows, a.temperature)[0] if a.beta else None
        batches.append((rows, advantages[rows.draft], old, reference, sampled))
    equal = (rewards.amax(1) == rewards.amin(1)).float()
    tally.add("reward", rewards.sum(), rewards.numel())
    tally.add("reward_std", rewards.std(1, correction=0).sum(), len(mine))
    tally.add("zero_variance", equal.sum(), len(mine))
    tally.add("truncated", sum(not f for fs in samples.finished for f in fs), rewards.numel())
    tally.add("length", sum(map(len, logprobs)), rewards.numel())
    if s.domain.voices:
        right = [[bool(s.domain.voices_of(s.posts[i], t)) for t in ts] for i, ts in zip(mine, texts)]
        tally.add("valid", sum(map(sum, right)), rewards.numel())
    if embeddings is not None:
        tally.add("D", diversity(embeddings).sum(), len(mine))
    return batches, s.ranks.sum([sum(map(len, logprobs))])[0]


def grpo_step(s, step):
    """One update. With --updates U, every U-th step rolls out and the next U - 1 reuse its drafts."""
    a, tally = s.args, Tally()
    if step % a.updates == 0:
        s.batches, s.count = rollout(s, step, tally)
    for rows, advantages, old, reference, sampled in s.passes(s.batches):
        logp, entropy = token_logprobs(s.model, rows, a.temperature)
        # One update per rollout is on policy: the ratio is 1 in value, and exp(logp - logp.detach()) keeps
        # its gradient.
        loss, clipped, kl = policy_loss(logp, logp.detach() if old is None else old, advantages, denominator=s.count,
                                        clip_low=a.clip_low, clip_high=a.clip_high, reference=reference, beta=a.beta)
        loss.backward()
        tally.add("entropy", entropy.sum(), len(logp))
        tally.add("clipped", clipped, len(logp))
        tally.add("mismatch", (logp.detach() - sampled).abs().sum() if old is None else 0, len(logp))
        if a.beta:
            tally.add("kl", kl, len(logp))
        tally.add("tokens", rows.tokens.numel() + len(logp))
    return tally


LOGGED = ["reward", "valid", "D", "entropy", "reward_std", "zero_variance", "clipped", "kl", "mismatch", "length", "truncated"]


def run_grpo(args):
    """The GRPO phase: the start run's adapter, trained on; in OUT/adapter."""
    start = check_grpo(args)
    s = Session(args, "grpo")
    if not s.open_run():
        return
    s.load()
    if args.gate == "verifier" and not s.domain.voices:
        raise InputError("--gate verifier needs a domain with a verifier: use --gate likelihood for real posts")
    load_adapter(s.model, start, dropout=0.0)  # dropout would make ratios differ from 1
    s.start = frozen_copy(s.model)
    s.place()
    if args.diversity_weight or args.advantage == "polychromic":
        s.load_embedder()
    s.reward = make_reward(args.reward, s)
    args.steps = args.steps or math.ceil(len(s.posts) * args.epochs / args.batch) * args.updates
    # drafts are not part of a checkpoint
    args.save_every = math.ceil(args.save_every / args.updates) * args.updates
    params = list(adapter_state(s.model).values())
    summary = train(s, params, lambda step: grpo_step(s, step), LOGGED)
    if s.ranks.main:
        save_adapter(s.model, s.run.folder / "adapter", args.model)
    s.run.finish(summary | {"domain": s.domain.name})
    s.ranks.close()


def check_grpo(a):
    """Fill in the model from the start run; returns the start adapter's folder. Finds wrong flags before
    anything is loaded."""
    data.check_common(a)
    start = Path(a.start)
    start = start / "adapter" if (start / "adapter").is_dir() else start
    if not (start / "adapter_config.json").exists():
        raise InputError(f"--start {a.start}: no adapter there: give a finished run of polylora.py sft, or a folder with "
                         "adapter_config.json")
    a.model = a.model or read_json(start / "adapter_config.json").get("base_model_name_or_path")
    if not a.model:
        raise InputError(f"{start}/adapter_config.json does not name its base model: give --model")
    if a.k < 2:
        raise InputError(f"--k {a.k}: a group needs at least 2 drafts")
    if a.advantage in ("passk", "maxk", "polychromic") and not 1 <= a.set_size < a.k:
        raise InputError(f"--set-size {a.set_size} must be at least 1 and below --k {a.k}")
    if a.advantage == "polychromic" and a.set_size < 2:
        raise InputError("--set-size must be at least 2 for --advantage polychromic")
    if a.temperature <= 0:
        raise InputError("--temperature must be above 0: GRPO needs drafts that are sampled")
    return start


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--start", "--from", required=True, help="finished SFT run, or an adapter folder in PEFT's layout, to start from (after torchrun "
                                                 "write --from: it takes --start for an option of its own)")
    add("--model", default=None, help="Qwen3 checkpoint under the adapter; default: the one its config names")
    data.common_flags(p, lr=1e-5, steps=0, batch=16, schedule="constant")
    draft_flags(p, 8)
    add("--advantage", default="group", choices=("group", "drgrpo", "passk", "maxk", "polychromic"),
        help="objective: group (GRPO), drgrpo (no division by std), passk (Pass@k training), maxk, polychromic (set objective)")
    add("--set-size", type=int, default=4, help="drafts in a set for passk, maxk and polychromic: below --k")
    add("--diversity-weight", type=float, default=0.0, help="weight of D beside the reward, in standard deviations of reward")
    add("--reward", default="auto", choices=REWARDS, help="what a draft earns; auto: reader where replies have voices, else relevance")
    add("--reward-model", default=None, help="Qwen3 folder or hub name for --reward model (scalar head) or judge (chat model)")
    add("--beta", type=float, default=0.0, help="weight of the KL to the starting adapter, per token; 0 skips that pass")
    add("--clip-low", type=float, default=0.2, help="lower clip: ratios below 1 - this get no gradient")
    add("--clip-high", type=float, default=0.2, help="upper clip: ratios above 1 + this get no gradient (DAPO: 0.28)")
    add("--updates", type=int, default=1, help="optimizer steps on each batch of drafts")
    p.set_defaults(run=run_grpo)
    return p


def main(argv=None):
    return data.command(parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
