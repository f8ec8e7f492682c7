"""A judge of completions by whole questions: rubrics, and comparison with a person's reply."""

import data
from methods.rewards import JudgeReward
from support.checkpoint import checkpoint_hash
from support.files import InputError
from support.registry import MEASURES
from trainer import load_chat, load_model


# ---- A judge -------------------------------------------------------------------------------------

RUBRICS = {
    "helpfulness": "Does the reply help the person, or give them what they hoped to get?",
    "coherence": "Is the reply whole and well formed, and does it make sense?",
    "relevance": "Is the reply about what the post says?"}

PAIR = "Is reply A a better reply to the post than reply B?"


class Asked(JudgeReward):
    """A Qwen3 chat model's probability of "yes" against "no" to whole questions: called with P
    posts and P lists of questions."""

    def chat(self, post, text):
        turns = [{"role": "user", "content": f"{text} Answer yes or no."}]
        return data.encode_chat(self.tokenizer, turns, add_generation_prompt=True, chat=self.form)

    @classmethod
    def load(cls, session):
        folder = session.args.judge
        model = load_model(folder, session.args, session.ranks.device)
        if not model.has_logits:
            raise InputError(f"--judge {folder} has no token head: give a Qwen3 chat model")
        tokenizer, form = load_chat(folder)
        return cls(model, tokenizer, session.domain, form)


def add_judgement(session, records, scored):
    """The judge on the first --judge-drafts completions of each post: three rubrics; and each
    completion against the person's (the post's first) reply, once as A and once as B, since judges
    prefer a place."""
    if not session.judge:
        return
    for record, post in zip(records, scored.posts):
        completions = record["drafts"][:session.args.judge_drafts]
        posted = f"Somebody posted:\n\n{post.post}\n\n"
        judge = {}
        for name, question in RUBRICS.items():
            asked = [f"{posted}A reply:\n\n{text}\n\n{question}" for text in completions]
            judge[name], = session.judge([post], [asked])
        if post.replies:
            person = post.replies[0]
            as_a = [compared(posted, completion, person) for completion in completions]
            as_b = [compared(posted, person, completion) for completion in completions]
            first, = session.judge([post], [as_a])
            second, = session.judge([post], [as_b])
            judge["pairs"] = [[a, 1 - b] for a, b in zip(first, second)]
        record["judge"] = judge


def compared(posted, a, b):
    """The question whether reply a is better than reply b."""
    return f"{posted}Reply A:\n\n{a}\n\nReply B:\n\n{b}\n\n{PAIR}"


def judge_flags(p):
    p.add_argument("--judge", metavar="FOLDER",
                   help="a Qwen3 chat model that judges helpfulness, coherence and relevance, and "
                        "completions against a person's reply")
    p.add_argument("--judge-drafts", type=int, default=4,
                   help="completions of a post that the judge reads")


def check_judge(args):
    if args.judge_drafts < 1:
        raise InputError(f"--judge-drafts {args.judge_drafts}: at least 1")


def judge_settings(args):
    return {"judge": [checkpoint_hash(args.judge), args.judge_drafts]} if args.judge else {}


def load_judge(session):
    session.judge = Asked.load(session) if session.args.judge else None


MEASURES.add("judge", "a judge's verdicts", check=check_judge, settings=judge_settings,
             load=load_judge, flags=judge_flags)(add_judgement)
