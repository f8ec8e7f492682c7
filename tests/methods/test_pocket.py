"""Tests of methods/pocket.py."""

import itertools
import random

import pytest

import data
from methods import pocket
from support.files import InputError
from support import posts as support_posts
from support.posts import Post
from support import words


def texts(parts):
    """Every text of a parsed template."""
    options = [[p] if isinstance(p, str) else [t for o in p for t in texts(o)] for p in parts]
    return ["".join(c) for c in itertools.product(*options)]


def test_no_toy_reply_is_right_in_two_styles_or_events():
    """Exhaustive over all wordings: otherwise one string could please two readers and diversity
    would be free."""
    owner, count = {}, 0
    for style, events in pocket.STYLES.items():
        for event, template in events.items():
            for text in texts(pocket.parse(template)):
                assert "[n]" in text
                key = support_posts.normalise(text.replace("[n]", "kitten"))
                assert owner.setdefault(key, (style, event)) == (style, event), text
                count += 1
    assert len(owner) > 700 and set(pocket.STYLES["warm"]) == set(pocket.OPENERS)


def test_the_toy_verifier_accepts_only_toy_replies():
    posts = pocket.pocket_posts(400, seed=5)
    domain = data.make_domain("auto", posts)
    assert domain.name == "pocket" and len(domain.styles) == 6
    rng = random.Random(0)
    for p in posts:
        style = rng.choice(domain.styles)
        right = domain.reply(p, style, rng)
        assert domain.styles_of(p, right) == (style,)
        assert domain.styles_of(p, right.upper().replace(" ", "  ").rstrip(".!?")) == (style,)
        assert (
            domain.styles_of(p, right + " really")
            == ()
            == domain.styles_of(p, "")
            == domain.styles_of(p, p.post)
        )
        other = next(q for q in posts if q.intent.split("/")[1:] != p.intent.split("/")[1:])
        assert domain.styles_of(p, domain.reply(other, style, rng)) == ()


@pytest.mark.slow
def test_toy_posts_are_distinct_seeded_many_and_varied(monkeypatch):
    posts = pocket.pocket_posts(8200, seed=0)
    assert len({support_posts.normalise(p.post) for p in posts}) == 8200
    assert posts[:50] == pocket.pocket_posts(50, seed=0) != pocket.pocket_posts(50, seed=1)
    assert 0.1 < sum(p.post[0].islower() for p in posts) / 8200 < 0.5
    assert (len({p.intent for p in posts}) == 6 * 6 * 6
            and all(3 <= len(p.post.split()) <= 20 for p in posts))
    small = pocket.POCKET._replace(things={"pet": "kitten"})
    # the whole world would take ten seconds to use up
    monkeypatch.setitem(pocket.MAKERS, "pocket", pocket.scene_maker(small))
    with pytest.raises(InputError, match="ask for fewer"):
        pocket.pocket_posts(2000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pocket-code", "pocket-stories"])
def test_toy_code_and_stories_are_verified_exactly(name, tmp_path):
    """Each post has a right reply in every voice, right in no other voice and for no other
    intent; files keep it."""
    assert data.main(["split", "--data", name, "--sizes", "base=60,eval=40",
                      "--out", str(tmp_path)]) == 0
    posts = data.load_posts(tmp_path / "base.jsonl")
    domain = data.load_domain(tmp_path / "base.jsonl", "auto", posts)
    assert (domain.name == name and data.make_domain("auto", posts).name == name
            and len(domain.styles) == 5)
    rng = random.Random(0)
    for p in posts:
        for style, reply in zip(p.styles, p.replies):
            assert domain.styles_of(p,
                                    reply) == (style,) == domain.styles_of(p,
                                                                           domain.reply(p, style,
                                                                                        rng))
            assert domain.styles_of(p, reply + " 1") == () == domain.styles_of(p, "")
        other = next(q for q in posts if q.intent.split("/")[1:] != p.intent.split("/")[1:])
        assert not set(other.replies) & set(p.replies) or name == "pocket-code"
        wrong = [domain.styles_of(p, r) for r in other.replies]
        assert wrong == [()] * 5 or name == "pocket-code" and () in wrong
    assert len({support_posts.normalise(p.post)
                for p in pocket.pocket_posts(7200, name=name)}) == 7200
    with pytest.raises(InputError, match=f"--data {name}"):
        data.make_domain(name, [Post("a", "b", ("c",), ("warm",))])


def test_expressions_are_read_not_run():
    shape = lambda text: pocket.shape_of(text, 12, 3)
    shapes = {"x + 9": "add", "9+x": "add", "15 - x": "subtract", "x*4": "multiply",
              "36 / x": "divide", "x * 3 + x": "mixed", "(x - 1) * 6": "mixed", "x+x+x+x": "add"}
    assert {text: shape(text) for text in shapes} == shapes
    for text in ("12", "x + 8", "9 + 3", "x ** 2 + 3", "x // 1 * 4", "x / 0", "x +", "exit()",
                 "x * 4 #", "x*4; x", "",
                 "-x + 15", "x\n+9", "y + 9", "__import__('os')", "x" * 61, "(" * 50 + "x",
                 "12 if x else x", "x, 12",
                 "9" * 58 + "-x", "x + 9.0", "x * 04", "lambda x: 12"):
        assert shape(text) is None, text
    for n, x in pocket.SUMS:
        for style in pocket.SHAPES:
            assert pocket.shape_of(pocket.write_sum(style, n, x, random.Random(n)), n, x) == style


# ---- Texts ---------------------------------------------------------------------------------------

def test_punctuation_continues_its_word():
    """Hindi fell apart at its vowel signs, which made unlike drafts alike; and by --diversity
    ngram or levenshtein, which left them out, words that differ were equal."""
    assert words.words("\u0939\u093f\u0928\u094d\u0926\u0940 ok, don't") == [
        "\u0939\u093f\u0928\u094d\u0926\u0940", "ok", ",", "don't"]
    assert words.words("cafe\u0301") == words.words("caf\u00e9") == ["caf\u00e9"]
    assert words.plain_words("Don't, caf\u00e9_1") == ["don", "t", "caf\u00e9_1"]
    for a, b in itertools.combinations(("\u0915\u0940", "\u0915\u093e", "\u0915\u0947"), 2):
        assert words.plain_words(a) != words.plain_words(b)
