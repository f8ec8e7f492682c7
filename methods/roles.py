"""Roles: each completion of a set is asked for in a role of its own, as in MoDA (arXiv 2609.14896).

    python evaluate.py measure RUN --data eval.jsonl --decoder roles --set-size 5

A model that was trained in roles can give each of them its own answers; of any other this measures
what the number alone does."""

import data
from engine import generate
from generate import SAMPLING, Samples
from methods.decoders import texts_of
from support.registry import DECODERS
from trainer import sampling_of

ROLE = "You are role {i}."


def role_prompt(session, visit, i):
    """The ids of a post's prompt that begins with role i, counted from 1."""
    *before, last = session.domain.messages(session.posts[visit.index])
    asked = last | {"content": f"{ROLE.format(i=i)}\n\n{last['content']}"}
    return data.encode_prompt(session.tokenizer, [*before, asked], session.chat)


@DECODERS.add("roles", 'one completion a role, "You are role i": MoDA\'s way to a set',
              paper="arXiv 2609.14896", knobs=(*SAMPLING, "set_size"), joint=True)
def in_roles(session, visits, k, progress=None, helper=None):
    """k // size sets of `size` completions for each visit, the i-th of a set in role i."""
    args = session.args
    size = args.set_size
    prompts = []
    seeds = []
    for visit in visits:
        for i in range(1, size + 1):
            prompts.append(role_prompt(session, visit, i))
            seeds.append(session.seed_for(f"role {i}", 0, visit))
    by_role = generate(session.model, prompts, k=k // size, max_new_tokens=args.max_new_tokens,
                       stop_ids=session.stops, seed=seeds, max_rows=args.max_rows,
                       **sampling_of(args))
    out = Samples(in_sets(by_role.tokens, size), in_sets(by_role.logprobs, size),
                  in_sets(by_role.finished, size))
    if progress:
        progress(len(visits))
    return out, texts_of(session, out.tokens)


def in_sets(rows, size):
    """Of each post and role some completions' rows -> of each post its sets, one after the other: a
    set has one of each role."""
    posts = []
    for first in range(0, len(rows), size):
        sets = zip(*rows[first:first + size])
        posts.append([row for one_of_each in sets for row in one_of_each])
    return posts
