"""How likely completions are under the policy and under the base, and the policy's entropy."""

import torch

from lora import base
from model import pack, token_logprobs
from support.registry import MEASURES


@MEASURES.add("likelihoods", "log-probability under policy and base, entropy")
def add_likelihoods(session, records, scored):
    """Add to records how likely the completions are under policy and base, and the policy's entropy
    as it wrote them: sums over each completion's tokens at temperature 1."""
    pairs = list(zip(scored.prompts, scored.tokens))
    logprobs, entropies = completion_scores(session, pairs)
    with base(session.model):
        base_logprobs, _ = completion_scores(session, pairs)
    for i, record in enumerate(records):
        record["tokens"] = [len(ids) for ids in scored.tokens[i]]
        record["logprobs"] = [round(x, 4) for x in logprobs[i]]
        record["entropies"] = [round(x, 4) for x in entropies[i]]
        record["base_logprobs"] = [round(x, 4) for x in base_logprobs[i]]


@torch.no_grad()
def completion_scores(session, pairs, temperature=1.0):
    """(log-probability, entropy) of the completions of (prompt ids, list of ids) pairs under the
    model as it stands: each P lists of sums over the completion's tokens, stop token included.
    Equal completions of a post are scored once, but in an ensemble, where completion d is scored by
    member d mod M."""
    members = session.model.members
    groups = []                              # (prompt, what is scored)
    places = []                              # of each completion, among what is scored
    for prompt, completions in pairs:
        scored = [tuple(ids) for ids in completions]
        own = list(range(len(scored)))
        if members == 1:
            once = {ids: None for ids in scored}
            number = {ids: i for i, ids in enumerate(once)}
            own = [number[ids] for ids in scored]
            scored = list(once)
        groups.append((prompt, scored))
        places.append(own)
    sizes = [len(scored) for _, scored in groups]
    sums = torch.zeros(2, sum(sizes), dtype=torch.float64)
    for rows in session.passes(pack(groups, 2 ** 14, session.model.device, members)):
        logprob, entropy = token_logprobs(session.model, rows, temperature)
        completion = rows.completion.cpu()
        sums[0].index_add_(0, completion, logprob.double().cpu())
        sums[1].index_add_(0, completion, entropy.double().cpu())
    out = []
    for total in sums:
        parts = total.split(sizes)
        out.append([part[own].tolist() for part, own in zip(parts, places)])
    return out
