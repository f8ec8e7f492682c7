"""--tokens: rules for some of a step's tokens, Clip-Cov and KL-Cov (arXiv 2505.22617)."""

import torch

from support.files import seed_of
from support.registry import TOKENS


def token_covariances(logp, advantages):
    """(A - mean A) (log pi - mean log pi) of tokens, all (N,): how much the update of each token
    lowers the entropy (arXiv 2505.22617, eq. 10)."""
    return (advantages - advantages.mean()) * (logp - logp.mean())


def chosen_tokens(session, advantages, logprobs, step):
    """The tokens that --tokens chooses among all of the step's, for this rank's completions: P k
    lists of bool. advantages (P, k); logprobs: P lists of k lists.

    The choice does not depend on the number of ranks: every rank chooses among the tokens of all,
    in the order of the step's prompts, and keeps its own."""
    ranks = session.ranks
    mine = []
    for completions, of_completions in zip(logprobs, advantages.tolist()):
        mine.append((ranks.rank, completions, of_completions))
    everyone = ranks.gather(mine)  # after --resample, ranks can have unequal numbers of prompts
    if not everyone:
        return []
    pairs = []                               # (log-probability, advantage) of every token
    for _, completions, of_completions in everyone:
        for tokens, advantage in zip(completions, of_completions):
            pairs.extend((logp, advantage) for logp in tokens)
    covariances = token_covariances(*torch.tensor(pairs).T)
    seed = seed_of(session.args.seed, "tokens", step)
    choose = TOKENS[session.args.tokens].function
    flags = choose(covariances, seed, session.args.token_share).tolist()
    chosen = []
    start = 0
    for rank, completions, _ in everyone:
        for tokens in completions:
            end = start + len(tokens)
            if rank == ranks.rank:
                chosen.append(flags[start:end])
            start = end
    return chosen


def without_chosen(loss, gap, chosen):
    """Clip-Cov's change of the loss (N,): none for the chosen tokens."""
    return loss.masked_fill(chosen, 0.0)


def with_gap(loss, gap, chosen):
    """KL-Cov's change of the loss (N,): |log pi - log pi_old| added for the chosen tokens."""
    return loss + gap.abs() * chosen


def share_flag(p):
    """Add --token-share."""
    p.add_argument("--token-share", type=float, default=2e-4,
                   help="fraction of a step's tokens that --tokens chooses, at least one token")


@TOKENS.add("clip-cov", "no gradient for some of high covariance (arXiv 2505.22617)",
            chosen=chosen_tokens, change=without_chosen, flags=share_flag)
def clip_cov(covariance, seed, share=2e-4, low=1.0, high=5.0):
    """Clip-Cov (arXiv 2505.22617): bool (N,), a fraction `share` of all tokens, at least one, drawn
    at random among those with a covariance between low and high. They get no gradient."""
    wanted = max(1, int(share * len(covariance)))
    odds = torch.rand(len(covariance), generator=torch.Generator().manual_seed(seed))
    odds = odds.masked_fill((covariance <= low) | (covariance >= high), -1.0)
    best = odds.topk(min(wanted, len(odds)))
    chosen = torch.zeros(len(odds), dtype=torch.bool)
    chosen[best.indices[best.values >= 0]] = True
    return chosen


@TOKENS.add("kl-cov", "a KL to the old policy for those of the highest, no clip (same paper)",
            chosen=chosen_tokens, change=with_gap, clips=False)
def kl_cov(covariance, seed=0, share=2e-4):
    """KL-Cov (arXiv 2505.22617): bool (N,), the fraction `share` of tokens, at least one, with the
    largest covariance. Nothing is clipped; the chosen ones pay |log pi - log pi_old|, which differs
    from 0 only from the second of --updates on."""
    chosen = torch.zeros(len(covariance), dtype=torch.bool)
    wanted = max(1, int(share * len(covariance)))
    chosen[covariance.topk(wanted).indices] = True
    return chosen
