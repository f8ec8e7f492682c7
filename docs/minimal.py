"""Phase two of the method in one file: GRPO with a diversity term D on a toy task, in PyTorch.

    python docs/minimal.py        # under 30 seconds on one CPU core

An app shows k drafts and the user picks one, so a model should be trained for its best of k. GRPO
trains the single draft: it settles on the most popular style, and k drafts become one. Here:
1. Fit a start policy that has many styles and makes many mistakes, as after fine-tuning (SFT).
2. Sample k completions y_1 .. y_k of each prompt, token by token.
3. Reward: r_i = 1 if y_i is right and in the style that this user likes, else 0.
4. GRPO's advantages: A_i = (r_i - mean r) / (std r + 1e-4) over the k completions of one prompt.
5. D = mean over pairs of (1 - e_i . e_j) q_i q_j: e_i a unit embedding, q_i = 1 if y_i is right.
6. The gradient of D, as advantages too: a_i = D - D_without_i. The loss uses A_i + weight * a_i.
7. Measure Pass@k, the probability that at least one of k completions pleases the user."""

import argparse
import copy

import torch
from torch import nn

# Each prompt has one right completion in each style; every other completion is wrong.
PROMPTS = 12
POPULARITY = torch.tensor([0.40, 0.24, 0.16, 0.12, 0.08])   # of styles among users: a long tail
STYLES = len(POPULARITY)
VOCAB = 20                      # tokens; the first STYLES of them open a completion in that style
LENGTH = 3                      # tokens in a completion
K = 8                           # completions in the group of a prompt
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}          # 95% t-interval, by number of seeds


class Policy(nn.Module):
    """A small language model: logits (B, t + 1, V) after the prompt and after each of t tokens."""

    def __init__(self, width=48):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB + PROMPTS, width)
        self.layers = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, prompts, tokens):
        inputs = torch.cat([VOCAB + prompts.unsqueeze(1), tokens], dim=1)       # (B, t + 1)
        states, _ = self.layers(self.embedding(inputs))
        return self.head(states)


@torch.no_grad()
def sample(policy, prompts):
    """Return one completion (B, T) of each prompt (B,): each token is drawn given those before."""
    tokens = torch.empty(len(prompts), 0, dtype=torch.long)
    for _ in range(LENGTH):
        logits = policy(prompts, tokens)[:, -1]                             # (B, V)
        token = torch.multinomial(logits.softmax(-1), 1)                    # (B, 1)
        tokens = torch.cat([tokens, token], dim=1)
    return tokens


def log_prob(policy, prompts, tokens):
    """Return log pi(token_t | prompt, tokens before t), (B, T); its sum over T is log pi(y | x)."""
    logp = policy(prompts, tokens[:, :-1]).log_softmax(-1)                  # (B, T, V)
    return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def embed(tokens):
    """Return e, (P, k, V): token counts of completions (P, k, T), unit length; never trained."""
    counts = torch.eye(VOCAB)[tokens].sum(-2)
    return counts / counts.norm(dim=-1, keepdim=True)


def diversity(embeddings, quality):
    """Return D = 2 / (k (k - 1)) * sum over i < j of (1 - e_i . e_j) q_i q_j, (P,)."""
    k = quality.shape[1]
    assert k >= 2, f"D is a mean over pairs and needs 2 or more completions, not {k}"
    distance = 1 - embeddings @ embeddings.mT                               # (P, k, k)
    gate = quality.unsqueeze(2) * quality.unsqueeze(1)                      # both must be right
    different = 1 - torch.eye(k)                                            # 0 where i = j
    total = (distance * gate * different).sum((1, 2))                       # each pair twice
    return total / (k * (k - 1))


def diversity_advantages(embeddings, quality):
    """Return a_i = D - D_without_i, (P, k), where D_without_i is D of the other k - 1 completions.

    grad E[D] = E[sum_i a_i grad log pi(y_i)], the score function: sampling has no gradient, its
    log-probabilities have. D_without_i does not depend on y_i, so it adds no bias. Needs k >= 3."""
    k = quality.shape[1]
    advantages = []
    for i in range(k):
        others = torch.arange(k) != i
        without_i = diversity(embeddings[:, others], quality[:, others])    # (P,)
        advantages.append(diversity(embeddings, quality) - without_i)
    return torch.stack(advantages, dim=1)


def group_advantages(rewards):
    """Return GRPO's A_i = (r_i - mean r) / (std r + 1e-4), (P, k), over the k of each prompt."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True, correction=0) + 1e-4)


def policy_loss(logp, old_logp, advantages, clip=0.2):
    """Return - mean over tokens of min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A).

    pi_old is the policy that sampled, ratio = pi / pi_old of a token. Where the ratio is 1, the
    gradient is - sum_i A_i grad log pi(y_i) / (number of tokens)."""
    ratio = (logp - old_logp).exp()                                         # (B, T)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def pass_at_k(n, c, k):
    """Return 1 - C(n - c, k) / C(n, k), unbiased, where c of n samples please the user."""
    assert 1 <= k <= n, f"Pass@{k} needs at least {k} samples, not {n}"
    all_bad = 1                                         # C(n - c, k) / C(n, k), factor by factor
    for i in range(k):
        all_bad = all_bad * (n - c - i) / (n - i)
    return 1 - all_bad


def is_right(answers, tokens):
    """Return (P, k, S): whether each completion (P, k, T) is the right one in each style."""
    return (tokens.unsqueeze(2) == answers.unsqueeze(1)).all(-1)


def fit_start(policy, answers, steps=40):
    """Fit right completions in styles drawn by popularity, and stop early: stands in for SFT."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    for _ in range(steps):
        prompts = torch.randint(PROMPTS, (128,))
        styles = torch.multinomial(POPULARITY, 128, replacement=True)
        loss = -log_prob(policy, prompts, answers[prompts, styles]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train(policy, answers, steps, weight):
    """Train by GRPO with the advantages A_i + weight * a_i; with weight 0 it is plain GRPO."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.002)
    prompts = torch.arange(PROMPTS).repeat_interleave(K)                    # (P k,)
    for _ in range(steps):
        tokens = sample(policy, prompts)                                    # (P k, T)
        groups = tokens.view(PROMPTS, K, LENGTH)
        right = is_right(answers, groups)                                   # (P, k, S)
        users = torch.multinomial(POPULARITY, PROMPTS, replacement=True)    # the style each likes
        rewards = right[torch.arange(PROMPTS), :, users].float()            # (P, k)
        quality = right.any(2).float()                                      # (P, k)
        advantages = group_advantages(rewards)
        advantages += weight * diversity_advantages(embed(groups), quality)
        old_logp = log_prob(policy, prompts, tokens).detach()
        for _ in range(2):                              # two updates on the same samples
            logp = log_prob(policy, prompts, tokens)
            loss = policy_loss(logp, old_logp, advantages.view(-1, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def evaluate(policy, answers, n=100):
    """Return Pass@1, Pass@5, D and the fraction of right completions, from n samples a prompt."""
    prompts = torch.arange(PROMPTS).repeat_interleave(n)
    groups = sample(policy, prompts).view(PROMPTS, n, LENGTH)
    right = is_right(answers, groups)                   # (P, n, S)
    quality = right.any(2).float()
    counts = right.sum(1)                               # (P, S): c for a user who likes that style
    pass_1 = pass_at_k(n, counts, 1) @ POPULARITY       # (P,): mean over users
    pass_5 = pass_at_k(n, counts, 5) @ POPULARITY
    d = diversity(embed(groups), quality)
    return torch.stack([pass_1, pass_5, d, quality.mean(1)]).mean(1)


def main():
    parser = argparse.ArgumentParser(description="GRPO with and without D on a toy task")
    parser.add_argument("--seeds", type=int, default=5, choices=T_QUANTILE)
    parser.add_argument("--steps", type=int, default=100, help="GRPO steps")
    parser.add_argument("--weight", type=float, default=8.0, help="of a_i: grpo.py's, times k - 1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {"start": [], "GRPO": [], "GRPO + D": []}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        answers = torch.randint(STYLES, VOCAB, (PROMPTS, STYLES, LENGTH))   # the right completions
        answers[:, :, 0] = torch.arange(STYLES)         # begin with the opening of their style
        start = Policy()
        fit_start(start, answers)
        results["start"].append(evaluate(start, answers))
        for name, weight in {"GRPO": 0.0, "GRPO + D": args.weight}.items():
            policy = copy.deepcopy(start)
            train(policy, answers, args.steps, weight)
            results[name].append(evaluate(policy, answers))
    print("          Pass@1           Pass@5           D                right")
    for name, runs in results.items():
        runs = torch.stack(runs)                        # (seeds, 4)
        mean = runs.mean(0)
        half_width = T_QUANTILE[len(runs)] * runs.std(0) / len(runs) ** 0.5
        cells = [f"{m:.3f} +- {h:.3f}" for m, h in zip(mean, half_width)]
        print(f"{name:10}" + "   ".join(cells))


if __name__ == "__main__":
    main()
