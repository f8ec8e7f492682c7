"""Rewards without a verifier: by similarity to the post, by a reward model, by a judge."""

import torch
from torch.nn.utils.rnn import pad_sequence

import data
from rewards import embedded
from support.registry import REWARDS


def reply_form(post, reply):
    """How much a text is shaped like a reply to the text `post`, in [0, 1]: the product of three
    fractions that are 1 for an ordinary one. Length (3 to 60 words), words not copied (1 - fraction
    of its word trigrams that are in the post), no repetition (fraction of distinct bigrams)."""
    words = reply.lower().split()
    if not words:
        return 0.0
    length = min(1.0, len(words) / 3, 60 / len(words))
    trigrams = word_grams(words, 3)
    bigrams = word_grams(words, 2)
    of_post = set(word_grams(post.lower().split(), 3))
    copied = sum(gram in of_post for gram in trigrams) / max(len(trigrams), 1)
    return length * (1 - copied) * len(set(bigrams)) / max(len(bigrams), 1)


def word_grams(words, n):
    return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]


class RelevanceReward:
    """(1 + cosine of completion and post) / 2, in [0, 1], times the text's reply_form (length,
    words not copied, no repetition). For posts without a verifier: the cheapest reward, and easy to
    exploit. For a study of people use agreement, a reward model or a judge."""

    def __init__(self, embedder, domain):
        self.embedder = embedder
        self.domain = domain

    def __call__(self, posts, completions, seeds=None):
        """The rewards of P lists of completions: P lists of floats."""
        texts = []
        for post, group in zip(posts, completions):
            texts.append(post.post)
            texts.extend(group)
        vectors = self.embedder([texts])[0]
        rewards = []
        start = 0
        for post, group in zip(posts, completions):
            end = start + 1 + len(group)
            cosines = (vectors[start + 1:end] @ vectors[start]).tolist()
            of_post = []
            for cosine, text in zip(cosines, group):
                of_post.append((1 + cosine) / 2 * reply_form(post.post, text))
            rewards.append(of_post)
            start = end
        return rewards

    def rows(self, posts, texts):
        """Yield, for each post, what each of the texts would earn: an array (T,). Every text is
        embedded once, where __call__ would embed it for each post."""
        vectors = self.embedder([list(texts)])[0]
        of_posts = self.embedder([[post.post for post in posts]])[0]
        for post, vector in zip(posts, of_posts):
            form = torch.tensor([reply_form(post.post, text) for text in texts])
            cosines = (vectors @ vector).cpu()
            yield ((1 + cosines) / 2 * form).numpy()


class ModelReward:
    """A Qwen3 reward model's scalar (Qwen3ForSequenceClassification) for the chat of post and
    completion, written in that model's own chat format `form`. Control strings in both are broken
    up: a completion that spells <|im_end|> must not end its turn."""

    def __init__(self, model, tokenizer, domain, form=data.ChatFormat(), batch=32):
        self.model = model
        self.tokenizer = tokenizer
        self.domain = domain
        self.form = form
        self.batch = batch           # chats in one forward pass

    def chat(self, post, text):
        """The token ids of the chat whose last turn is scored."""
        turns = [*self.domain.messages(post), {"role": "assistant", "content": text}]
        return data.encode_chat(self.tokenizer, turns, add_generation_prompt=False, chat=self.form)

    @torch.no_grad()
    def __call__(self, posts, completions, seeds=None):
        """The rewards of P lists of completions: P lists of floats."""
        chats = []
        for post, group in zip(posts, completions):
            for text in group:
                chats.append(self.chat(post, text))
        device = self.model.device
        scores = []
        for start in range(0, len(chats), self.batch):
            some = [torch.tensor(ids) for ids in chats[start:start + self.batch]]
            lengths = torch.tensor([len(ids) for ids in some])
            tokens = pad_sequence(some, batch_first=True)                      # (B, T)
            scores.extend(self.values(tokens.to(device), lengths.to(device)).tolist())
        rewards = []
        start = 0
        for group in completions:
            rewards.append(scores[start:start + len(group)])
            start += len(group)
        return rewards

    def values(self, tokens, lengths):
        """The scores (B,) of chats, tokens (B, T) padded on the right."""
        return self.model.score(tokens, lengths)


class JudgeReward(ModelReward):
    """A Qwen3 chat model's probability of "yes" against "no" when asked whether the completion is a
    good reply, in [0, 1]."""

    def chat(self, post, text):
        """The token ids of the question, up to where the answer begins."""
        question = (f"Somebody posted:\n\n{post.post}\n\nA reply:\n\n{text}\n\nWould the person be "
                    "glad to get this reply: is it to the point, natural and kind? Answer yes or "
                    "no.")
        turns = [{"role": "user", "content": question}]
        return data.encode_chat(self.tokenizer, turns, add_generation_prompt=True, chat=self.form)

    def values(self, tokens, lengths):
        """The probabilities (B,) of "yes"."""
        words = []
        for word in ("yes", "no"):
            words.append(self.tokenizer.encode(word, add_special_tokens=False).ids[0])
        # In fp32: two bf16 logits near 20 differ by a multiple of 1/8, so few values would be left.
        head = self.model.head_weight()[words].float()
        hidden = self.model.last_hidden(tokens, lengths).float()
        return (hidden @ head.t()).softmax(-1)[:, 0]


@REWARDS.add("relevance", "similarity to the post, and form: cheap, easily exploited")
def relevance(session):
    """The RelevanceReward of the session's embedder and domain."""
    return embedded(RelevanceReward)(session)
