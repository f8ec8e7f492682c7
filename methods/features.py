"""Features of completions that only some objectives and diversities need: verdicts by style or
person, their shares, equal answers."""

import torch

from methods.people import (agreement_by_reply, equal_shares, is_code, passes_by_test,
                            prepare_people, unit_tests)
from support.draws import with_label_noise
from support.posts import normalise
from support.registry import FEATURES


@FEATURES.add("right", "whom each completion pleases: users by style, people who replied, tests",
              prepare=prepare_people)
def right_by_person(session, posts, texts, seeds):
    """(P, k, S) in 0, 1: is the completion right in each of the domain's styles, does it pass each
    of a task's unit tests, or does it agree with each of people's replies? Label noise included."""
    if is_code(session):
        verdicts = passes_by_test(session, posts, texts)
    elif session.domain.styles:
        rows = [style_rows(session.domain, post, group) for post, group in zip(posts, texts)]
        verdicts = torch.tensor(rows)
    else:
        verdicts = agreement_by_reply(session, posts, texts)
    return with_label_noise(verdicts, session.args.flip, seeds, "voices")


def style_rows(domain, post, texts):
    """For each text a row of 0 and 1: in which of the domain's styles it is right."""
    rows = []
    for text in texts:
        right = domain.styles_of(post, text)
        rows.append([float(style in right) for style in domain.styles])
    return rows


@FEATURES.add("shares", "the share of users that each style, person or test stands for")
def shares_of_people(session, posts, texts, seeds):
    """(P, S): the share of a post's users that likes each style; people who replied, and unit
    tests, have equal shares."""
    if is_code(session):
        return equal_shares([len(unit_tests(post)) for post in posts])
    if not session.domain.styles:
        return equal_shares([len(post.replies) for post in posts])
    rows = []
    for post in posts:
        popularity = session.domain.popularity_of(post)
        rows.append([popularity[style] for style in session.domain.styles])
    return torch.tensor(rows)


@FEATURES.add("classes", "equal numbers for equal answers")
def classes_feature(session, posts, texts, seeds):
    return answer_classes(session.domain, posts, texts)


def answer_classes(domain, posts, texts):
    """Numbers (P, k) of completions, P lists of k: equal numbers, equal answers; -1 is no answer.
    An answer is the set of styles that a completion is right in; without a verifier it is the text
    but for case and punctuation."""
    classes = []
    for post, group in zip(posts, texts):
        numbers = {}
        classes.append([])
        for text in group:
            answer = frozenset(domain.styles_of(post, text)) if domain.styles else normalise(text)
            number = numbers.setdefault(answer, len(numbers)) if answer else -1
            classes[-1].append(number)
    return torch.tensor(classes)
