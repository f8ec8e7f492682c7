"""Prompts and replies: files of posts, disjoint splits, the chat format, and what a domain is.

    python data.py check posts.jsonl                       # read your file, show what is in it
    python data.py convert chats.json --out posts.jsonl    # chats, preferences, tables: posts
    python data.py split --data pocket --sizes base=5000,sft=1000,grpo=1000,eval=200 --out runs/data

A domain says how a post is put to the model and how a completion is judged. `Domain` judges by the
post's own replies, one in each style; `Replies` has no verifier. See also methods/pocket.py."""

import random
import sys
from array import array
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from tokenizers import Tokenizer

from support import registry
from support.chats import (PROBES, SAMPLE_TEXT, check_marks, check_round_trip, check_vocabulary,
                           control_of, default_system, harmless, no_tokenizer, split_thought,
                           template_texts, unknown_template, without_control)
from support.domains import check_exponent, check_styles, domain_name, read_record
from support.files import InputError, command, fetch, read_text, short
from support.hub import tokenizer_errors
from support.posts import Chosen, PostFile, normalise, places_of_unique
from support.registry import DOMAINS, WORLDS
from support.splits import (check_intents, data_parser, fitted, held_out_intents, parse_sizes,
                            report_posts, report_reading, show_posts, split_exists, split_record,
                            suggest_split, toy_posts, write_split)


# ---- Prompts and replies -------------------------------------------------------------------------

def load_posts(path, *, skip_bad_lines=False, max_chars=20_000):
    """A sequence of the posts (support/posts.py) of a file, each read when it is asked for.

    Its lines are JSON, plain or .gz: {"id", "post", "replies": [..] or {style: ..}}, or one of the
    other forms in support/formats.py. Lines of equal posts (same_text there) are merged, but of a
    post with replies by style only the first line counts. A repeated id gets a number.

    A bad line raises InputError with file, line and reason; with skip_bad_lines it is skipped and
    counted on stderr."""
    return PostFile(path, skip_bad_lines, max_chars)


# ---- Disjoint splits -----------------------------------------------------------------------------

def split_posts(posts, sizes, seed):
    """Disjoint random sequences of posts of the given sizes: disjoint by text, not by line."""
    places = array("Q", places_of_unique(posts))
    if sum(sizes) > len(places):
        raise InputError(f"{sum(sizes)} posts are asked for ({' + '.join(map(str, sizes))}) and "
                         f"there are {len(places)} different ones: ask for fewer (--sizes; "
                         "--posts of train.sh)")
    random.Random(f"split {seed}").shuffle(places)
    parts = []
    for size, end in zip(sizes, accumulate(sizes)):
        parts.append(Chosen(posts, places[end - size:end]))
    return parts


def split_by_intent(posts, sizes, seed, least_intents=40):
    """{name: posts} as split_posts, where parts called eval.. have intents that no other part has:
    what is measured there is new in content, not only in wording."""
    eval_sizes = {name: size for name, size in sizes.items() if name.startswith("eval")}
    other_sizes = {name: size for name, size in sizes.items() if name not in eval_sizes}
    counts = Counter(post.intent for post in posts)
    if "" in counts or len(counts) < 2 or not eval_sizes:
        raise InputError('--by intent needs posts with an "intent" each, and a part called eval')
    held_out = held_out_intents(counts, eval_sizes, other_sizes, seed, least_intents)
    eval_places = array("Q")
    other_places = array("Q")
    for place, post in enumerate(posts):
        places = eval_places if post.intent in held_out else other_places
        places.append(place)
    parts = {}
    for some, places in ((other_sizes, other_places), (eval_sizes, eval_places)):
        parts |= zip(some, split_posts(Chosen(posts, places), list(some.values()), seed))
    return {name: parts[name] for name in sizes}


# ---- The chat format and tokens ------------------------------------------------------------------

@dataclass(frozen=True)
class ChatFormat:
    """How a checkpoint writes ChatML."""
    think_block: bool = True     # an empty think block opens an answer (Qwen3's hybrid models)
    system: str = ""             # the system turn of a chat that has none
    think_history: bool = False  # earlier answers keep theirs too (TRL's training template)


def render_chat(messages, *, add_generation_prompt, thinking=False, chat=ChatFormat()):
    """ChatML of system, user and assistant turns, equal to what the checkpoint's template writes.

    With a think block, and without thinking, an empty one ends the prompt, and a final answer has
    its own or an empty one: what is trained and what is prompted agree. Earlier answers lose
    theirs, unless chat.think_history."""
    if chat.system and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": chat.system}, *messages]
    text = ""
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "assistant" and chat.think_block:
            thought, content = split_thought(message)
            final = i > last_user and (i == len(messages) - 1 or thought)
            if final or chat.think_history:
                content = f"<think>\n{thought}\n</think>\n\n" + content.lstrip("\n")
        text += f"<|im_start|>{message['role']}\n{content}<|im_end|>\n"
    if add_generation_prompt:
        text += "<|im_start|>assistant\n"
        if chat.think_block and not thinking:
            text += "<think>\n\n</think>\n\n"
    return text


def chat_format(folder):
    """The ChatFormat of a checkpoint's folder: the one whose text of two short chats is equal to
    that of the folder's own template. Qwen3's if it has no template; InputError if none fits."""
    wanted = template_texts(folder)
    if wanted is None:
        return ChatFormat()
    system = default_system(wanted[0])
    others = []
    for think_block, think_history in ((True, False), (True, True), (False, False)):
        chat = ChatFormat(think_block, system, think_history)
        texts = [render_chat(probe, add_generation_prompt=True, chat=chat) for probe in PROBES]
        if texts == wanted:
            return chat
        others.append(texts[1])
    raise InputError(unknown_template(folder, others, wanted[1]))


def load_tokenizer(path, *, revision=None):
    """The tokenizers.Tokenizer of a folder or of a name on the hub; it neither pads nor truncates.
    InputError if it has ids beyond the rows that config.json gives the model."""
    file = fetch(path, revision) / "tokenizer.json"
    if not file.exists():
        raise InputError(f"{file} is missing: {no_tokenizer(file.parent)}")
    with tokenizer_errors(file):
        tokenizer = Tokenizer.from_str(read_text(file))
        tokenizer.no_padding()               # a file may ask for 128 tokens, whatever the text
        tokenizer.no_truncation()
        ids = vocabulary(tokenizer)
    check_vocabulary(file, ids)
    return tokenizer


def vocabulary(tokenizer):
    """One more than the largest id."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_chat(tokenizer, path):
    """Raise InputError if a tokenizer lacks the marks of a chat, or does not give text back."""
    file = Path(path) / "tokenizer.json"
    with tokenizer_errors(file):
        check_marks(tokenizer, file)
        ids = encode_reply(tokenizer, SAMPLE_TEXT) + stop_ids(tokenizer)
        check_round_trip(decode(tokenizer, ids), file)


def stop_ids(tokenizer):
    """Ids that end a reply: <|im_end|> in a chat, <|endoftext|> from a base model."""
    ids = map(tokenizer.token_to_id, ("<|im_end|>", "<|endoftext|>"))
    return [i for i in ids if i is not None]


def encode_chat(tokenizer, messages, *, add_generation_prompt=True, chat=ChatFormat()):
    """Token ids of a chat of people's texts, whose only control tokens are the format's own."""
    control = control_of(tokenizer)
    messages = [m | {"content": harmless(m["content"], control)} for m in messages]
    text = render_chat(messages, add_generation_prompt=add_generation_prompt, chat=chat)
    return tokenizer.encode(text, add_special_tokens=False).ids


def encode_prompt(tokenizer, messages, chat=ChatFormat()):
    """Token ids of the chat up to the point where the reply starts."""
    return encode_chat(tokenizer, messages, chat=chat)


def encode_reply(tokenizer, reply):
    """Token ids of a reply and the <|im_end|> that ends it: exactly what the loss is taken over."""
    reply = without_control(reply, control_of(tokenizer))
    ids = tokenizer.encode(reply, add_special_tokens=False).ids
    return ids + [tokenizer.token_to_id("<|im_end|>")]


def decode(tokenizer, ids):
    """The text of a completion, without its stop token and outer spaces."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


# ---- What a domain is ----------------------------------------------------------------------------

MOST_VERDICTS = 10_000           # remembered by a domain


def long_tail(styles, exponent):
    """{style: share}, falling as (rank + 1) ** -exponent."""
    weights = [(rank + 1) ** -exponent for rank in range(len(styles))]
    total = sum(weights)
    return {style: weight / total for style, weight in zip(styles, weights)}


@DOMAINS.add("voices", "a right reply in each of several styles")
class Domain:
    """Posts with a right reply in each of several styles. A completion is right in a style if it
    is that reply, apart from letter case, punctuation and spacing (normalise).

    Each user likes one style. GRPO rewards and the evaluation draw users by popularity_of(post), a
    long tail. SFT pairs come from authors, who are the users unless they have a long tail of their
    own. With `permute` each theme (an intent up to its last /) has its own order for users."""
    name = "voices"
    exclusive = False            # only for posts that it claims
    free = False                 # its posts may have any styles, or none

    def __init__(self, posts, styles=None, popularity=1.5, writers=None, permute=False):
        self.styles = tuple(styles or (posts[0].styles if posts else ()))
        self.exponent = popularity
        self.writers_exponent = writers
        self.permute = permute
        self.verdicts = {}
        check_exponent("popularity", popularity)
        check_exponent("writers", writers)
        self.shares = list(long_tail(self.styles, popularity).values())    # by rank

    @staticmethod
    def claims(post):
        """Is it a post that only this domain can judge?"""
        return False

    def prepare(self, args):
        """Read the domain's own flags, before it judges completions."""

    def judged(self, posts, args):
        """Those of the posts that are read or split whose completions can be judged."""
        return posts

    def record(self):
        """What is fixed at the split and must be equal in every later stage, as JSON."""
        return {"domain": self.name, "voices": list(self.styles), "popularity": self.exponent,
                "writers": self.writers_exponent, "permute": self.permute}

    def messages(self, post):
        """The chat that puts the post to the model."""
        return [{"role": "user", "content": post.post}]

    def popularity_of(self, post):
        """{style: share of this post's users who like it}; {} in a domain without styles."""
        order = list(self.styles)
        if self.permute:
            theme = post.intent.rpartition("/")[0] or post.intent
            # Another text than "readers of" would change every run.
            random.Random(f"readers of {theme}").shuffle(order)
        shares = dict(zip(order, self.shares))
        return {style: shares[style] for style in self.styles}

    def user(self, post, rng):
        """The style that this post's user likes, drawn by popularity; None without styles."""
        if not self.styles:
            return None
        shares = self.popularity_of(post)
        return rng.choices(list(shares), list(shares.values()))[0]

    def author(self, post, rng):
        """The style of the author of an SFT pair; None without styles."""
        if self.writers_exponent is None or not self.styles:
            return self.user(post, rng)
        shares = long_tail(self.styles, self.writers_exponent)
        return rng.choices(list(shares), list(shares.values()))[0]

    def reply(self, post, style, rng):
        """A right reply to the post in that style."""
        return post.replies[post.styles.index(style)]

    def styles_of(self, post, text):
        """The styles in which a completion is right, () if it is wrong. Verdicts are remembered,
        because reward, gate, objective and log all ask for them."""
        key = (post, text)
        if key not in self.verdicts:
            if len(self.verdicts) >= MOST_VERDICTS:
                self.verdicts.clear()
            self.verdicts[key] = self.judge(post, text)
        return self.verdicts[key]

    def valid(self, posts, texts):
        """P lists of k, 1.0 or 0.0: is the completion right in any style?"""
        rows = []
        for post, group in zip(posts, texts):
            rows.append([float(bool(self.styles_of(post, text))) for text in group])
        return rows

    def judge(self, post, text):
        """The verifier: the styles, a tuple, in which a completion is right."""
        wanted = normalise(text)
        if not wanted:
            return ()
        replies = zip(post.styles, post.replies)
        return tuple(style for style, reply in replies if normalise(reply) == wanted)


@DOMAINS.add("replies", "people's replies, without a verifier")
class Replies(Domain):
    """Real posts with people's replies and no verifier: completions are scored by a reward."""
    name = "replies"
    free = True

    def __init__(self, posts, **ignored):
        super().__init__(())

    def messages(self, post):
        return [{"role": "user", "content": f"Write a short reply to this post:\n\n{post.post}"}]

    def reply(self, post, style, rng):
        if not post.replies:
            raise InputError(f"the post {short(post.id)} has no reply to learn from: give posts "
                             "with replies (grpo.py needs none)")
        return rng.choice(post.replies)

    def judge(self, post, text):
        raise InputError(f"posts of the domain {self.name} have no verifier: use a reward")


def make_domain(name, posts, **users):
    """The domain called `name` for these posts; auto: the one that claims them, else voices or
    replies, by what the posts have. users: popularity, writers and permute of Domain."""
    return DOMAINS[domain_name(name, posts)].function(posts, **users)


def load_domain(path, name, posts):
    """The domain of a file of posts: the one that data.py split wrote to domain.json in its folder,
    because a part of a split may not show what the whole is; else make_domain's."""
    file = Path(path).parent / "domain.json"
    if not file.exists():
        return make_domain(name, posts)
    record = read_record(file, name)
    domain = DOMAINS[record["domain"]].function
    if not domain.free:
        check_styles(path, posts, record, file)
    return domain(posts, styles=record["voices"], popularity=record["popularity"],
                  writers=record["writers"], permute=record["permute"])


# ---- Commands ------------------------------------------------------------------------------------

def check(args):
    """Read a file as the phases will, and print what is in it."""
    posts = load_posts(args.data, skip_bad_lines=args.skip_bad_lines)
    domain = load_domain(args.data, args.domain, posts)
    report_posts(args.data, posts, domain)
    domain.judged(posts, args)
    show_posts(posts, args.show)
    suggest_split(args.data, len(posts))


def split(args):
    """Write NAME.jsonl of each NAME=N of --sizes into --out, disjoint by post, and domain.json,
    the domain of every later stage. An existing equal split is kept."""
    sizes = parse_sizes(args.sizes)
    out = Path(args.out)
    wanted = split_record(args, sizes)
    if split_exists(out, wanted):
        return
    if args.data in WORLDS:
        posts = toy_posts(args, sum(sizes.values()))
    else:
        posts = load_posts(args.data, skip_bad_lines=args.skip_bad_lines)
    domain = make_domain(args.domain, posts, popularity=args.popularity, writers=args.writers,
                         permute=args.permute)
    usable = domain.judged(posts, args)
    if args.fit:
        sizes = fitted(sizes, len(places_of_unique(usable)))
    check_intents(args, usable)
    if args.by == "intent":
        parts = split_by_intent(usable, sizes, args.seed)
    else:
        parts = dict(zip(sizes, split_posts(usable, list(sizes.values()), args.seed)))
    write_split(out, parts, domain.record(), wanted)
    report_reading(posts)


def parser():
    return data_parser(check, split)


def main(argv=None):
    registry.load()
    return command(parser(), argv)


if __name__ == "__main__":
    # Files in methods/ import this one by its name: run that copy, not a second one.
    from data import main
    sys.exit(main())
