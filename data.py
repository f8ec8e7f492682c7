"""Posts and replies: files, splits, the chat format, batches, the domains and the pocket world.

    python data.py check posts.jsonl                                        # read your file, show what is in it
    python data.py split --data posts.jsonl --sizes sft=2500,grpo=2500,eval=500 --out runs/data
    python data.py split --data pocket --sizes base=6000,sft=1000,grpo=1000,eval=200 --out runs/data

A domain says how a post is put to the model and how a draft is judged. Two have an exact verifier: `voices`
(posts with a right reply in each of several voices, as in a file) and `pocket` (a small world whose right
replies are a grammar); for `replies`, real posts with one or more human replies, grpo.py has rewards.
"""

import argparse
import functools
import gzip
import json
import math
import os
import random
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from model import InputError, fetch

# ---- Files of posts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Post:
    """A post and the replies people gave, or the right replies, one a voice: `voices` is parallel to
    `replies` or empty."""
    id: str
    post: str
    replies: tuple[str, ...]
    voices: tuple[str, ...] = ()
    intent: str = ""


def normalise(text):
    """Lower-cased letters and digits, nothing else: the form in which posts and replies are compared. Two
    texts are the same when they differ in letter case, punctuation and spacing alone."""
    return "".join(c for c in text.lower() if c.isalnum())


def load_posts(path, *, skip_bad_lines=False, max_chars=20_000):
    """Posts from JSON lines, plain or .gz: {"id", "post", "replies": [..] or {voice: ..}}, or "reply": "..",
    or the fields tweet_id, tweet, reply. Other fields are left alone. Lines of the same post are merged,
    their replies kept in order.

    A bad line (not UTF-8, not JSON, no post, no reply, a wrong type, over `max_chars` characters) raises
    InputError with file, line and reason; with skip_bad_lines it is left out and counted on stderr.
    """
    posts, bad, number = {}, [], 0
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    post = parse_line(line, number, max_chars)
                except ValueError as e:
                    if not skip_bad_lines:
                        raise InputError(f"{path}, line {number}: {e} (--skip-bad-lines leaves such lines out)") from None
                    bad.append(number)
                    continue
                merge(posts, post)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}: give --data a file of posts") from None
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"{path} cannot be read after line {number} ({e}): is it whole?") from None
    if bad:
        print(f"{path}: {len(bad)} bad lines left out (first: line {bad[0]})", file=sys.stderr)
    if not posts:
        raise InputError(f"{path} holds no posts")
    return list(posts.values())


def parse_line(line, number, max_chars):
    """One JSON line -> Post; ValueError says what is wrong with it."""
    try:
        d = json.loads(line.decode("utf-8-sig"))  # some editors start a file with a mark
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError):  # ValueError: a number of 5,000 digits, too
        raise ValueError("not JSON") from None
    if not isinstance(d, dict):
        raise ValueError("not a JSON object")
    post = d.get("tweet") if d.get("post") is None else d["post"]  # a field may be there and be null
    replies = d.get("reply") if d.get("replies") is None else d["replies"]
    if not isinstance(post, str) or not post.strip():
        raise ValueError('no "post" (or "tweet") text')
    voices = tuple(replies) if isinstance(replies, dict) else ()
    replies = [replies] if isinstance(replies, str) else list(replies.values()) if voices else replies
    if not isinstance(replies, list) or not replies:
        raise ValueError('no "replies" (or "reply")')
    if not all(isinstance(r, str) and r.strip() for r in replies):
        raise ValueError("a reply is not a text, or is empty")
    if max(map(len, (post, *replies))) > max_chars:
        raise ValueError(f"a text of more than {max_chars:,} characters")
    if not normalise(post):
        raise ValueError("the post has no letter or digit")
    if voices and not all(map(normalise, replies)):  # an empty draft would be right in that voice
        raise ValueError("a reply in a voice has no letter or digit")
    name, intent = str(d.get("id", d.get("tweet_id", f"line-{number}"))), str(d.get("intent", ""))
    try:
        "".join((name, post, intent, *replies, *voices)).encode("utf-8")
    except UnicodeEncodeError:  # neither a file nor the tokenizer takes it
        raise ValueError("half a character (an escape like \\ud83d without its pair)") from None
    return Post(name, post.strip(), tuple(r.strip() for r in replies), voices, intent)


def merge(posts, post):
    """Add a post to {normalised text: Post}; the same text again brings only its new replies."""
    key = normalise(post.post)
    old = posts.get(key)
    if old is None:
        posts[key] = post
    elif not old.voices and not post.voices:
        replies = old.replies + tuple(r for r in post.replies if r not in old.replies)
        posts[key] = Post(old.id, old.post, replies, (), old.intent)


def save_posts(posts, path):
    """The same layout, one post a line; written beside and moved into place."""
    with open(f"{path}.{os.getpid()}.partial", "w", encoding="utf-8") as file:
        for p in posts:
            replies = dict(zip(p.voices, p.replies)) if p.voices else list(p.replies)
            line = {"id": p.id, "post": p.post, "replies": replies} | ({"intent": p.intent} if p.intent else {})
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(file.name, path)


def split_posts(posts, sizes, seed):
    """Disjoint random lists of posts of the given sizes: disjoint by text, not by line."""
    unique = list({normalise(p.post): p for p in posts}.values())
    if sum(sizes) > len(unique):
        raise InputError(f"{sum(sizes)} posts are asked for ({' + '.join(map(str, sizes))}) and there are {len(unique)} different "
                         "ones: ask for fewer")
    random.Random(f"split {seed}").shuffle(unique)
    ends = np.cumsum([0, *sizes])
    return [unique[a:b] for a, b in zip(ends, ends[1:])]


# ---- The chat format and tokens --------------------------------------------------------------------------------

def render_chat(messages, *, add_generation_prompt, thinking=False):
    """Qwen3's ChatML for system, user and assistant turns, character for character as its own template.

    Without thinking, an empty think block opens the answer, in the prompt; and a final assistant turn always
    has one, its own or an empty one, so that what is trained and what is prompted agree. Earlier assistant
    turns lose theirs.
    """
    out, last_user = [], max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, m in enumerate(messages):
        content = m["content"]
        if m["role"] == "assistant":
            thought, mark, rest = content.rpartition("</think>")
            if m.get("reasoning_content") is not None:
                thought = m["reasoning_content"].strip("\n")
            elif mark:
                thought, content = thought.rpartition("<think>")[2].strip("\n"), rest.lstrip("\n")
            if i > last_user and (i == len(messages) - 1 or thought):
                content = f"<think>\n{thought}\n</think>\n\n" + content.lstrip("\n")
        out.append(f"<|im_start|>{m['role']}\n{content}<|im_end|>\n")
    if add_generation_prompt:
        out.append("<|im_start|>assistant\n" + ("" if thinking else "<think>\n\n</think>\n\n"))
    return "".join(out)


def load_tokenizer(path, *, revision=None):
    """tokenizer.json of a folder or of a name on the hub -> tokenizers.Tokenizer."""
    file = fetch(path, revision) / "tokenizer.json"
    if not file.exists():
        raise InputError(f"{file} is missing: the checkpoint needs its tokenizer")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises plain Exception
        raise InputError(f"{file} is not a tokenizer ({e})") from None


def train_tokenizer(texts, vocab_size):
    """A small byte-level BPE with Qwen3's special tokens, so that the same chat format works.
    Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    frame = ["user\n", "assistant\n", "\n\n"] * len(texts)  # the chat frame: one token each, in every prompt
    tokenizer.train_from_iterator([*texts, *frame], trainers.BpeTrainer(
        vocab_size=vocab_size - 2, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    # not special, as in Qwen3
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    return tokenizer


def stop_ids(tokenizer):
    """Ids that end a reply: <|im_end|> in a chat, <|endoftext|> from a base model."""
    return [i for i in map(tokenizer.token_to_id, ("<|im_end|>", "<|endoftext|>")) if i is not None]


def harmless(text):
    """A person's text with its control strings broken: somebody who types <|im_end|> must not end a turn."""
    return re.sub(r"<(\|\w+\||/?(?:think|tool_call|tool_response))>", "<\u200b\\1>", text)


def encode_prompt(tokenizer, messages):
    """Token ids of the chat up to the point where the reply starts."""
    messages = [m | {"content": harmless(m["content"])} for m in messages]
    return tokenizer.encode(render_chat(messages, add_generation_prompt=True), add_special_tokens=False).ids


def encode_reply(tokenizer, reply):
    """Token ids of a reply and the <|im_end|> that ends it: just what the loss is taken over."""
    return tokenizer.encode(harmless(reply), add_special_tokens=False).ids + [tokenizer.token_to_id("<|im_end|>")]


def decode(tokenizer, ids):
    """The text of a draft, without its stop token."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


# ---- Batches ---------------------------------------------------------------------------------------------------

@dataclass
class Rows:
    """Token rows for one forward pass. A row holds one post and all its drafts, so the post is computed once:

        tokens     post post post | a a a | b b | c c c c | pad        (B, T)
        owner        -1   -1   -1 | 0 0 0 | 1 1 | 2 2 2 2 | -2         (B, T)  which draft of its row
        positions     0    1    2 | 3 4 5 | 3 4 | 3 4 5 6 | 0          (B, T)  every draft follows the post

    A token sees the post and its own draft up to itself. The N reply tokens to be predicted are listed flat:
    `predict`, where in the flattened (B T) rows the state stands that predicts it (for a first token the
    post's last, for all drafts); `target`, its id; `draft`, which draft it is of, counted over all groups in
    the order given to pack.
    """
    tokens: torch.Tensor
    positions: torch.Tensor
    owner: torch.Tensor
    predict: torch.Tensor
    target: torch.Tensor
    draft: torch.Tensor
    shared: bool

    def mask(self):
        """(B, 1, T, T) bool, True where row i may look at column j; None when no row holds two drafts: plain
        causal."""
        if not self.shared:
            return None
        owner, t = self.owner, self.tokens.shape[1]
        seen = (owner[:, None, :] == -1) | (owner[:, None, :] == owner[:, :, None])
        return (seen & torch.ones(t, t, dtype=torch.bool, device=owner.device).tril())[:, None]


def pack(groups, tokens_per_batch, device="cpu"):
    """Groups (prompt ids, [draft ids, ...]) -> list of Rows, each of at most `tokens_per_batch` padded
    tokens.

    Groups are sorted by length so that rows of a batch are alike; one too long for the budget is split
    between its drafts (each part reads the post again). A draft's last token is only predicted, so it is not
    part of the row.
    """
    parts, first = [], 0
    for prompt, drafts in groups:
        part, size = [], len(prompt)
        for i, draft in enumerate(drafts):
            if part and size + len(draft) - 1 > tokens_per_batch:
                parts.append((prompt, part, size))
                part, size = [], len(prompt)
            part.append((first + i, draft))
            size += len(draft) - 1
        parts.append((prompt, part, size))
        first += len(drafts)
    parts.sort(key=lambda p: -p[2])
    batches, start = [], 0
    while start < len(parts):
        count = max(1, tokens_per_batch // parts[start][2])
        batches.append(_rows(parts[start:start + count], device))
        start += count
    return batches


def _rows(parts, device):
    width = parts[0][2]                                                        # the longest comes first
    tokens, positions = np.zeros((2, len(parts), width), dtype=np.int64)
    owner = np.full((len(parts), width), -2)
    predict, target, which = [], [], []
    for b, (prompt, drafts, _) in enumerate(parts):
        p = at = len(prompt)
        tokens[b, :p], positions[b, :p], owner[b, :p] = prompt, np.arange(p), -1
        for j, (index, draft) in enumerate(drafts):
            n = len(draft) - 1
            tokens[b, at:at + n], positions[b, at:at + n], owner[b, at:at + n] = draft[:-1], np.arange(p, p + n), j
            predict += [b * width + p - 1, *range(b * width + at, b * width + at + n)]
            target += draft
            which += [index] * len(draft)
            at += n
    put = lambda x: torch.as_tensor(x, dtype=torch.long).to(device, non_blocking=True)
    return Rows(put(tokens), put(positions), put(owner), put(predict), put(target), put(which),
                shared=any(len(drafts) > 1 for _, drafts, _ in parts))


# ---- The pocket world: scenes (theme / event / thing), a grammar of posts for each, a grammar of right replies -
# for each voice
#
# One description serves to write and to judge. {a|b} is a choice, nested at will and possibly empty; [n] is
# the thing.

THINGS = {
    "pet": "kitten puppy rabbit parrot hamster pony",
    "dish": "soup curry cake lasagne pie stew",
    "music": "guitar violin trumpet piano flute cello",
    "plant": "rose fern cactus tulip pumpkin hedge",
    "craft": "quilt scarf lamp kite necklace basket",
    "outing": "hike picnic cruise marathon festival voyage",
}

POSTS = {
    "pet": {
        "news": "{we|I} {just |}{adopted|took in|brought home} a {little |tiny |}[n]",
        "trouble": "{my|our} [n] {is ill|hurt a leg|ran off|will not eat} {again|today|and I feel awful}",
        "advice": "how do I {get|teach|train} {my|a} [n] to {sleep at night|stay calm|come when called}",
        "pride": "{my|our} [n] {learned|has learned} {a trick|its name|to wait} {at last|all by itself|today}",
        "plan": "{next week|tomorrow|soon} {I|we} {pick up|will meet|will get} {a|our new} [n]",
        "memory": "{thinking of|I still miss|I often dream of} the [n] {I grew up with|we had|from my childhood}",
    },
    "dish": {
        "news": "{there is|we have|I found} a {new |great |}[n] {place in town|stall round the corner|on the menu here}",
        "trouble": "{my|the} [n] {burned|fell on the floor|tastes of nothing|is a disaster} {again|tonight|once more}",
        "advice": "what do I {add to|put in|serve with} a [n] {to make it better|for six people|so it is not dull}",
        "pride": "{I|we} {made|cooked} a [n] from {nothing|scratch} and {it was perfect|everybody had seconds|the plates came back empty}",
        "plan": "{tonight|on Sunday|this weekend} {I|we} {will try|will make|cook} a [n] {for friends|for ten|for the first time}",
        "memory": "{nothing tastes like|I still remember|I miss} the [n] {my grandmother made|of my childhood|we had at home}",
    },
    "music": {
        "news": "{look what came|it is here|guess what I bought}, a {second hand |shiny |beautiful |}[n]",
        "trouble": "{my|the} [n] {broke|cracked|is out of tune|got wet} {before the show|an hour ago|on the bus}",
        "advice": "{which|what} {teacher|book|exercise} is {best|right} for {learning|starting} the [n] {at forty|late in life|with small hands}",
        "pride": "{played|I played} the [n] {on stage|in front of people|without a mistake} {for the first time|tonight|at last}",
        "plan": "{I start|we begin|I am taking} [n] lessons {next month|in spring|on Monday}",
        "memory": "{my father|my aunt|an old friend} played the [n] {every evening|when I was small|by the window}",
    },
    "plant": {
        "news": "{a neighbour gave me|I was given|somebody left me} a {huge |young |lovely |}[n] {today|for the balcony|for the garden}",
        "trouble": "{the snails ate|frost killed|the dog dug up} {my|our} [n] {last night|overnight|this morning}",
        "advice": "{when|how often|where} should I {water|plant|cut|move} {my|a} [n] {in this heat|before winter|on a balcony}",
        "pride": "{my|our} [n] {won a prize|is taller than me|flowers after three years|came through the winter}",
        "plan": "{this autumn|in April|when it is warmer} {I|we} {will grow|want to plant} a [n] {by the door|under the window|for my mother}",
        "memory": "{there was|we always had} a [n] {by my grandparents' gate|in the yard where I played|at our old house}",
    },
    "craft": {
        "news": "{my sister|a friend|my neighbour} {gave|sent|made} me a {handmade |bright |wonderful |}[n]",
        "trouble": "{I dropped|somebody sat on|I lost|the cat tore} the [n] {I worked on for weeks|that was a gift|I had nearly finished}",
        "advice": "{what|which} {colour|material|pattern} {would you take|works best} for a [n] {for a child|as a present|for a beginner}",
        "pride": "{finished|I have finished|just finished} {my first|a whole} [n] {by hand|after two months|and it holds}",
        "plan": "{I am going to|we will|I want to} {make|build} a [n] {for my niece|this winter|for the school fair}",
        "memory": "{found|I came across} {an old photo of|a drawing of} the [n] {my mother made|we made at school|from our first home}",
    },
    "outing": {
        "news": "{we won|I got|they gave us} {free places|two tickets|the last places} for {a|the} {famous |big |}[n]",
        "trouble": "{the|our} [n] {was called off|ended in the rain|was a mess} and {we are stuck|I caught a cold|nobody told us}",
        "advice": "what {should I bring|do people wear|do I need} {for|on} a {long |first |}[n] {in June|with two kids|alone}",
        "pride": "{did|I did|we did} {the whole|my first|our first} [n] {without giving up|today|with my dad}",
        "plan": "{off to|we leave for|I signed up for} {a|the} [n] {next Saturday|in two weeks|with the whole office}",
        "memory": "{ten years ago|back in school|one summer} we went on a [n] {and never stopped laughing|and got lost|that I will not forget}",
    },
}

OPENERS = {
    "news": "{|big news: |guess what: |so, |good morning: |hello world: }",
    "trouble": "{|oh no, |what a day: |well, |of course |not again: }",
    "advice": "{|quick question: |help: |can anyone say, |honest question: |dear all, }",
    "pride": "{|so proud: |finally: |a small win: |I can hardly believe it: |look at me: }",
    "plan": "{|here we go: |it is settled: |wish me luck: |no way back: |so, }",
    "memory": "{|late thoughts: |funny, |on days like this, |tonight, |for no reason, }",
}

# Right replies. Each voice has its own turns of phrase, and each event its own core, so no reply belongs to
# two.
VOICES = {
    "warm": {
        "news": "{how lovely|how sweet|that is wonderful}, {enjoy|cherish|love} {every moment with|each day with|all of} {the|your} [n]",
        "trouble": "{I am so sorry|that must hurt|poor you}, {sending a hug|big hugs|I feel with you} {about|over|because of} the [n]",
        "advice": "{be gentle with yourself|take heart|no rush, dear}, the [n] {will come right|will be fine|needs only love}",
        "pride": "{I am so happy for you|my heart is full|you deserve this}, {you and|what a joy with} {the|your} [n]",
        "plan": "{how exciting for you|I am with you|fingers crossed}, {the|your} [n] {will be beautiful|will make you glad|will do you good}",
        "memory": "{what a tender thought|thank you for sharing|how dear}, {hold on to|keep|treasure} that [n] {always|in your heart|for ever}",
    },
    "witty": {
        "news": "{plot twist|breaking news|rumour has it}: the [n] {chose you|runs the house now|wants its own account}",
        "trouble": "{well,|officially,|in short,} the [n] {has resigned|filed a complaint|wants a lawyer} {again|now|today}",
        "advice": "{step one|rule one|the trick}: {let|just let} the [n] {think it is in charge|do the talking|read the manual}",
        "pride": "{move over|step aside|watch out}, {Mozart|world|champions}, {here comes|make way for} the [n] {star|legend|boss}",
        "plan": "{famous last words|what could go wrong|somebody film this}, {the|one} [n] {never stood a chance|will never be the same|has no idea}",
        "memory": "{somewhere|up there|in some attic} {that|the} [n] {still laughs at you|is writing its memoirs|wants royalties}",
    },
    "curious": {
        "news": "{ooh,|wait,|oh,} {what will you call|where will you keep|who picked|how big is} the [n]?",
        "trouble": "{hm,|oh,|wait,} {how did that happen to|what went wrong with|can anyone mend|what happens now with} the [n]?",
        "advice": "{hm,|say,|wait,} {what have you tried with|how long have you had|who else knows|what kind is} the [n]{ so far|}?",
        "pride": "{tell me,|ooh,|say,} {how long did it take with|what was hardest about|who helped with|what comes after} the [n]?",
        "plan": "{ooh,|say,|tell me,} {why a|what made you pick a|who joins you for the|how do you prepare for the} [n]?",
        "memory": "{say,|tell me,|oh,} {what became of|do you have a picture of|what was so special about|who else remembers} {that|the} [n]?",
    },
    "practical": {
        "news": "{first|to start|tip}: {check|sort out|write down} {the costs|the dates|the basics} {for|of} the [n]",
        "trouble": "{call|ask|ring} {a professional|the shop|an expert} {today|before noon|right now} about the [n]",
        "advice": "{start|begin} {small|early|simple} with the [n] and {keep notes|go step by step|change one thing at a time}",
        "pride": "{next|now|from here}: {set a new goal|raise the bar|show others} with the [n] {this month|while it is fresh|soon}",
        "plan": "{make a list|book ahead|plan an hour more|pack the night before} for the [n], {it saves time|trust me|it pays}",
        "memory": "{write it down|record it|scan the photos} {now|while you can|this week}, the [n] {deserves an album|belongs in print|should not be lost}",
    },
    "excited": {
        "news": "{yes|wow|hooray}! {a [n]|the [n]}! {best day ever|I am jumping|this is huge}!",
        "trouble": "{no|nooo|argh}! {not the|the poor} [n]! {we will fix this|do not give up|fight on}!",
        "advice": "{yes|wow|oh}! {great question|go for it|you can do this}! {a [n]|the [n]} {rocks|is pure fun}!",
        "pride": "{wow|boom|yes}! {you did it|what a win|unreal}! {the|that} [n] {for president|is gold}!",
        "plan": "{yes|wow|woo}! {take me along|count me in|I cannot wait}! {the|a} [n]!",
        "memory": "{aww|wow|oh}! {what a time|those were days|so many feelings}! {that|the} [n]!",
    },
    "blunt": {
        "news": "{fine|okay|sure}. {a [n] is work|the [n] costs money|a [n] is not for everyone}{, you know|. Good luck|}",
        "trouble": "{it happens|told you so|that is life}. {get|buy|find} {another|a better|a cheaper} [n]",
        "advice": "{honestly|frankly}, {forget the [n]|sell the [n]|nobody needs a [n]|skip the [n]}{ and move on|. Done|}",
        "pride": "{about time|not bad|took you long enough}. {the|that} [n] {looks okay|will do|was easy}",
        "plan": "{I give it a week|do not overdo it|lower your hopes}. {it is|just} {a|one} [n]{, nothing more|}",
        "memory": "{the past is past|let it go|old stories}. {it was|just} {a|only a} [n]{, that is all|}",
    },
}


@functools.lru_cache(maxsize=None)
def parse(template):
    """A template as a tuple of texts and of choices, a choice being a tuple of parsed alternatives."""
    def sequence(at, inside):
        parts, text, options = [], "", []
        while at < len(template) and not (inside and template[at] in "|}"):
            if template[at] == "{":
                parts, text, options, at = parts + [text], "", [], at + 1
                while template[at - 1] != "}":
                    option, at = sequence(at, True)
                    options.append(option)
                    at += 1
                parts.append(tuple(options))
            else:
                text, at = text + template[at], at + 1
        return tuple(parts + [text]), at
    return sequence(0, False)[0]


def expand(parts, rng):
    """One text of a parsed template."""
    return "".join(p if isinstance(p, str) else expand(rng.choice(p), rng) for p in parts)


def pattern(parts):
    """The regular expression of all normalised texts of a parsed template; [n] is left in."""
    return "".join("[n]".join(map(normalise, p.split("[n]"))) if isinstance(p, str) else
                   "(?:" + "|".join(map(pattern, p)) + ")" for p in parts)


@functools.lru_cache(maxsize=4096)
def right_replies(voice, event, thing):
    return re.compile(pattern(parse(VOICES[voice][event])).replace("[n]", normalise(thing)))


def polish(text, thing):
    """[n] filled in, each sentence with a capital, a full stop at the end."""
    text = re.sub(r"([.!?] +)([a-z])", lambda m: m[1] + m[2].upper(), text.replace("[n]", thing).strip())
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def pocket_posts(count, seed=0):
    """`count` distinct posts of the pocket world, each with one right reply per voice written out. Roughly
    one in three is written carelessly: small letters, no full stop. InputError when the world is too small
    for `count`."""
    rng, posts, misses = random.Random(f"pocket {seed}"), {}, 0
    while len(posts) < count:
        theme, event = rng.choice(list(THINGS)), rng.choice(list(OPENERS))
        thing = rng.choice(THINGS[theme].split())
        text = expand(parse(OPENERS[event] + POSTS[theme][event]), rng)
        style = rng.random()
        text = text.replace("[n]", thing) if style < 0.3 else polish(text + rng.choice(("", "", "!")), thing)
        if event == "advice":
            text = text.rstrip(".!") + "?"
        key = normalise(text)
        misses = misses + 1 if key in posts else 0
        if misses > 1000:
            raise InputError(f"the pocket world has no {count} different posts: ask for fewer")
        intent = f"{theme}/{event}/{thing}"
        replies = tuple(polish(expand(parse(VOICES[v][event]), rng), thing) for v in VOICES)
        posts.setdefault(key, Post(f"pocket-{seed}-{len(posts)}", text, replies, tuple(VOICES), intent))
    return list(posts.values())


# ---- Domains ---------------------------------------------------------------------------------------------------

def long_tail(voices, exponent):
    """{voice: share}, falling as (rank + 1) ** -exponent."""
    weights = [(rank + 1) ** -exponent for rank in range(len(voices))]
    return {v: w / sum(weights) for v, w in zip(voices, weights)}


class Domain:
    """Posts with a right reply in each of several voices. Readers differ: each likes one voice.

    A draft is right in a voice when it is the post's reply in that voice, letter case, punctuation and
    spacing aside (normalise). `popularity` is whom SFT pairs and GRPO rewards come from, long-tailed over the
    voices in the order of the file; `tastes`, even, whom evaluation asks: the reader who picks may like any
    voice.
    """
    name = "voices"

    def __init__(self, posts):
        self.voices = posts[0].voices if posts else ()
        self.popularity, self.tastes = long_tail(self.voices, 1.5), long_tail(self.voices, 0.0)

    def messages(self, post):
        return [{"role": "user", "content": post.post}]

    def reader(self, post, rng):
        """The voice that this post's reader likes, drawn by popularity; None in a domain without voices."""
        return rng.choices(list(self.popularity), list(self.popularity.values()))[0]

    def reply(self, post, voice, rng):
        """A right reply to the post in that voice."""
        return post.replies[post.voices.index(voice)]

    def voices_of(self, post, draft):
        """The verifier: the voices in which the draft is right, () when it is wrong."""
        said = normalise(draft)
        return tuple(v for v, r in zip(post.voices, post.replies) if said and normalise(r) == said)

    def noisy_reply(self, post, others, rng, noise):
        """What an unreliable base is taught: with probability `noise` a reply to another post, else a right
        one, in a voice drawn evenly."""
        about = rng.choice(others) if rng.random() < noise else post
        return self.reply(about, rng.choice(self.voices), rng)


class Pocket(Domain):
    """The pocket world: a draft is right in a voice when that voice's grammar for the post's event and thing
    parses it."""
    name = "pocket"

    def reply(self, post, voice, rng):
        _, event, thing = post.intent.split("/")
        return polish(expand(parse(VOICES[voice][event]), rng), thing)

    def voices_of(self, post, draft):
        _, event, thing = post.intent.split("/")
        said = normalise(draft)
        return tuple(v for v in VOICES if right_replies(v, event, thing).fullmatch(said))


class Replies(Domain):
    """Real posts with people's replies and no verifier: judged by a reward (grpo.py)."""
    name = "replies"

    def __init__(self, posts):
        self.voices, self.popularity, self.tastes = (), {}, {}

    def messages(self, post):
        return [{"role": "user", "content": f"Write a short reply to this post:\n\n{post.post}"}]

    def reader(self, post, rng):
        return None

    def reply(self, post, voice, rng):
        return rng.choice(post.replies)

    def voices_of(self, post, draft):
        raise InputError("posts of the domain replies have no verifier: use a reward")


DOMAINS = {d.name: d for d in (Pocket, Domain, Replies)}


def is_scene(intent):
    theme, event, thing = (intent.split("/") + ["", "", ""])[:3]
    return theme in THINGS and event in OPENERS and thing in THINGS[theme].split()


def make_domain(name, posts):
    """The domain called `name` for these posts; auto: pocket, voices or replies, by what the posts hold."""
    # in any order: the first post's counts
    voiced = all(p.voices and set(p.voices) == set(posts[0].voices) for p in posts)
    scenes = voiced and all(is_scene(p.intent) and set(p.voices) == set(VOICES) for p in posts)
    if name == "auto":
        name = "pocket" if scenes else "voices" if voiced else "replies"
    if name not in DOMAINS:
        raise InputError(f"there is no domain {name!r}: choose auto, {', '.join(DOMAINS)}")
    if name == "pocket" and not scenes or name == "voices" and not voiced:
        raise InputError(f"--domain {name} needs posts that all have replies in the same voices"
                         f"{', written by data.py split --data pocket' if name == 'pocket' else ''}: use --domain replies or auto")
    return DOMAINS[name](posts)


# ---- What the commands of all files share ----------------------------------------------------------------------

def common_flags(p, *, lr, steps, batch, schedule="cosine"):
    """Flags that every phase has. Names are the config's keys; units and defaults are in the help."""
    p.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = p.add_argument
    add("--data", required=True, help="posts of this phase, JSON lines (.gz too); make disjoint ones with `python data.py split`")
    add("--domain", default="auto", help="how drafts are asked for and scored: auto, pocket, voices or replies")
    add("--out", required=True, help="run folder to make")
    add("--resume", action="store_true", help="go on with an unfinished run in --out")
    add("--seed", type=int, default=1, help="of everything random in this run")
    add("--steps", type=int, default=steps, help="optimizer steps; 0: as many as --epochs passes over the posts take")
    add("--epochs", type=float, default=1, help="passes over the posts when --steps is 0")
    add("--batch", type=int, default=batch, help="posts a step, over all ranks")
    add("--lr", type=float, default=lr, help="peak learning rate of AdamW")
    add("--beta2", type=float, default=0.999, help="AdamW's second moment decay")
    add("--weight-decay", type=float, default=0.0, help="AdamW's decoupled weight decay")
    add("--warmup", type=int, default=10, help="steps of linear warm-up")
    add("--schedule", default=schedule, choices=("cosine", "constant"), help="learning rate after the warm-up")
    add("--clip", type=float, default=1.0, help="largest gradient norm, over all trained parameters and ranks")
    add("--save-every", type=int, default=100, help="steps between checkpoints to resume from")
    add("--micro-tokens", type=int, default=16384, help="tokens in one forward and backward pass: lower it to save memory")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, a third more time")
    add("--skip-bad-lines", action="store_true", help="skip, count and report unreadable lines of --data instead of stopping")
    model_flags(p)


def model_flags(p):
    """Flags of how the model is held and how it writes."""
    add = p.add_argument
    add("--device", default=None, help="cuda, cuda:1, cpu; default: this rank's GPU if there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the frozen weights; auto: bfloat16 on a GPU")
    add("--nf4", action="store_true", help="the frozen base in 4 bits (QLoRA): a third of the memory, slower")
    add("--shard", action="store_true", help="spread the frozen base over the ranks (FSDP2), for models larger than a GPU: slower")
    add("--revision", default=None, help="commit, tag or branch of the model on the hub")
    add("--max-rows", type=int, default=256, help="drafts written at a time on each rank: lower it to save memory")
    add("--compile", action="store_true", help="write drafts with torch.compile: 1.4 to 2.8 times as fast on small models after up to a minute "
                                               "at the start; needs a C++ compiler, or Triton on a GPU")
    add("--no-graphs", action="store_true", help="write drafts without CUDA graphs: slower, a way around a driver that fails on them")


def check_common(a):
    """Numbers that no phase can work with; NaN is in no interval. (flag, lowest, is that allowed itself,
    above all allowed)"""
    inf = math.inf
    for name, low, closed, high in (
            ("batch", 1, True, inf), ("steps", 0, True, inf), ("epochs", 0, bool(a.steps), inf), ("save_every", 1, True, inf),
            ("warmup", 0, True, inf), ("lr", 0, True, inf), ("weight_decay", 0, True, inf), ("beta2", 0, True, 1), ("clip", 0, False, inf),
            ("micro_tokens", 1, True, inf), ("max_rows", 1, True, inf), ("dropout", 0, True, 1), ("noise", 0, True, 1), ("rank", 1, True, inf),
            ("alpha", 0, False, inf), ("lam", 0, True, inf), ("max_new_tokens", 1, True, inf), ("temperature", 0, True, inf),
            ("draft_every", 1, True, inf), ("draft_posts", 1, True, inf), ("gate_floor", 0, True, inf), ("beta", 0, True, inf),
            ("diversity_weight", 0, True, inf), ("clip_low", 0, True, 1), ("clip_high", 0, True, inf), ("updates", 1, True, inf)):
        value = getattr(a, name, None)
        if value is not None and not (low <= value < high if closed else low < value < high):
            flag = "--lambda" if name == "lam" else f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is {value:g}: it must be {f'{low} or more' if closed else f'above {low}'}"
                             + (f" and below {high}" if high < inf else " and finite"))


def command(parser, argv=None):
    """Run a program's command: 0 when it worked; 2, with one sentence on stderr, when the input was wrong."""
    args = parser.parse_args(argv)
    try:
        args.run(args)
        return 0
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


# ---- Commands --------------------------------------------------------------------------------------------------

def check(a):
    """Read a file as the phases will, and say what is in it."""
    posts = load_posts(a.data, skip_bad_lines=a.skip_bad_lines)
    domain = make_domain(a.domain, posts)
    replies = [r for p in posts for r in p.replies]
    print(f"{a.data}: {len(posts)} posts, {len(replies)} replies ({len(set(map(normalise, replies)))} different), domain {domain.name}"
          + (f", voices {', '.join(domain.voices)}" if domain.voices else ""))
    for p in random.Random(0).sample(posts, min(a.show, len(posts))):
        print(f"\n{p.post}")
        for i, r in enumerate(p.replies):
            print(f"    {p.voices[i] + ': ' if p.voices else ''}{r}")


def split(a):
    """Write NAME.jsonl for each NAME=N of --sizes into --out: disjoint by post. A split made already is
    kept."""
    try:
        sizes = {n: int(c) for n, c in (part.split("=") for part in a.sizes.split(","))}
        assert all(c > 0 for c in sizes.values())
    except (ValueError, AssertionError):
        raise InputError(f"--sizes {a.sizes}: write NAME=N,NAME=N with N at least 1") from None
    out, wanted = Path(a.out), {"data": str(a.data), "sizes": sizes, "seed": a.seed}
    if (out / "split.json").exists():
        if json.loads((out / "split.json").read_text()) != wanted:
            raise InputError(f"{out} holds another split (see its split.json): choose another --out, or delete that folder")
        return
    posts = pocket_posts(sum(sizes.values()), a.seed) if a.data == "pocket" else load_posts(a.data, skip_bad_lines=a.skip_bad_lines)
    out.mkdir(parents=True, exist_ok=True)
    for name, part in zip(sizes, split_posts(posts, list(sizes.values()), a.seed)):
        save_posts(part, out / f"{name}.jsonl")
    beside = out / f"split.json.{os.getpid()}.partial"  # several ranks may write the same
    beside.write_text(json.dumps(wanted, indent=2) + "\n")
    os.replace(beside, out / "split.json")
    print(f"{out}: " + ", ".join(f"{n} {c}" for n, c in sizes.items()) + " posts")


def parser():
    p = argparse.ArgumentParser(description="Posts and replies: look at a file, split it into disjoint parts.")
    sub = p.add_subparsers(dest="command", required=True)
    c = sub.add_parser("check", help="read a file of posts and say what is in it", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    c.add_argument("data", help="JSON lines (.gz too)")
    c.add_argument("--domain", default="auto", help="auto, pocket, voices or replies")
    c.add_argument("--show", type=int, default=3, help="posts to print")
    c.set_defaults(run=check)
    s = sub.add_parser("split", help="write disjoint parts of a file, or of the pocket world", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    s.add_argument("--data", required=True, help="JSON lines (.gz too), or `pocket` for posts of the pocket world")
    s.add_argument("--sizes", required=True, help="posts in each part: sft=2500,grpo=2500,eval=500")
    s.add_argument("--out", required=True, help="folder for NAME.jsonl and split.json")
    s.add_argument("--seed", type=int, default=0, help="of the shuffle, and of the pocket world")
    s.set_defaults(run=split)
    for q in (c, s):
        q.add_argument("--skip-bad-lines", action="store_true", help="leave unreadable lines out and count them, instead of stopping")
    return p


def main(argv=None):
    return command(parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
