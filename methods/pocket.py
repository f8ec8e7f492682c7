"""The toy tasks, with exact verifiers: `pocket` (replies to short posts), `pocket-stories` (very
short tales) and `pocket-code` (expressions with a given value).

A post of `pocket` belongs to an intent theme/event/thing. A grammar for each theme and event
writes posts, and a grammar for each style and event writes right replies; the verifier parses a
completion with the same grammars. In templates {a|b} is a choice, nested at will and possibly
empty; [n] is the thing."""

import ast
import functools
import operator
import random
import re
from collections import namedtuple
from fractions import Fraction
from functools import partial

from data import Domain
from support.files import InputError
from support.posts import Post, normalise
from support.registry import DOMAINS, WORLDS


# things {theme: words}, openers {event: template}, posts {theme: {event: template}}, voices {style:
# {event: template}}
World = namedtuple("World", "things openers posts styles")


def read_table(text):
    """{heading: {event: template}}: a heading a line, its events indented under it. A line that is
    indented further continues the one before, after a space."""
    table = {}
    for line in text.strip().split("\n"):
        if not line.startswith(" "):
            rows = table[line] = {}
        elif not line.startswith("    "):
            event, _, template = line[2:].partition(": ")
            rows[event] = template
        else:
            rows[event] += " " + line[4:]
    return table


THINGS = {"pet": "kitten puppy rabbit parrot hamster pony",
          "dish": "soup curry cake lasagne pie stew",
          "music": "guitar violin trumpet piano flute cello",
          "plant": "rose fern cactus tulip pumpkin hedge",
          "craft": "quilt scarf lamp kite necklace basket",
          "outing": "hike picnic cruise marathon festival voyage"}

POSTS = read_table("""
pet
  news: {we|I} {just |}{adopted|took in|brought home} a {little |tiny |}[n]
  trouble: {my|our} [n] {is ill|hurt a leg|ran off|will not eat} {again|today|and I feel awful}
  advice: how do I {get|teach|train} {my|a} [n] to {sleep at night|stay calm|come when called}
  pride: {my|our} [n] {learned|has learned} {a trick|its name|to wait} {at last|all by itself|today}
  plan: {next week|tomorrow|soon} {I|we} {pick up|will meet|will get} {a|our new} [n]
  memory: {thinking of|I still miss|I often dream of} the [n] {I grew up with|we had|from my
    childhood}
dish
  news: {there is|we have|I found} a {new |great |}[n] {place in town|stall round the corner|on the
    menu here}
  trouble: {my|the} [n] {burned|fell on the floor|tastes of nothing|is a disaster}
    {again|tonight|once more}
  advice: what do I {add to|put in|serve with} a [n] {to make it better|for six people|so it is not
    dull}
  pride: {I|we} {made|cooked} a [n] from {nothing|scratch} and {it was perfect|everybody had
    seconds|the plates came back empty}
  plan: {tonight|on Sunday|this weekend} {I|we} {will try|will make|cook} a [n] {for friends|for
    ten|for the first time}
  memory: {nothing tastes like|I still remember|I miss} the [n] {my grandmother made|of my
    childhood|we had at home}
music
  news: {look what came|it is here|guess what I bought}, a {second hand |shiny |beautiful |}[n]
  trouble: {my|the} [n] {broke|cracked|is out of tune|got wet} {before the show|an hour ago|on the
    bus}
  advice: {which|what} {teacher|book|exercise} is {best|right} for {learning|starting} the [n] {at
    forty|late in life|with small hands}
  pride: {played|I played} the [n] {on stage|in front of people|without a mistake} {for the first
    time|tonight|at last}
  plan: {I start|we begin|I am taking} [n] lessons {next month|in spring|on Monday}
  memory: {my father|my aunt|an old friend} played the [n] {every evening|when I was small|by the
    window}
plant
  news: {a neighbour gave me|I was given|somebody left me} a {huge |young |lovely |}[n] {today|for
    the balcony|for the garden}
  trouble: {the snails ate|frost killed|the dog dug up} {my|our} [n] {last night|overnight|this
    morning}
  advice: {when|how often|where} should I {water|plant|cut|move} {my|a} [n] {in this heat|before
    winter|on a balcony}
  pride: {my|our} [n] {won a prize|is taller than me|flowers after three years|came through the
    winter}
  plan: {this autumn|in April|when it is warmer} {I|we} {will grow|want to plant} a [n] {by the
    door|under the window|for my mother}
  memory: {there was|we always had} a [n] {by my grandparents' gate|in the yard where I played|at
    our old house}
craft
  news: {my sister|a friend|my neighbour} {gave|sent|made} me a {handmade |bright |wonderful |}[n]
  trouble: {I dropped|somebody sat on|I lost|the cat tore} the [n] {I worked on for weeks|that was
    a gift|I had nearly finished}
  advice: {what|which} {colour|material|pattern} {would you take|works best} for a [n] {for a
    child|as a present|for a beginner}
  pride: {finished|I have finished|just finished} {my first|a whole} [n] {by hand|after two
    months|and it holds}
  plan: {I am going to|we will|I want to} {make|build} a [n] {for my niece|this winter|for the
    school fair}
  memory: {found|I came across} {an old photo of|a drawing of} the [n] {my mother made|we made at
    school|from our first home}
outing
  news: {we won|I got|they gave us} {free places|two tickets|the last places} for {a|the} {famous
    |big |}[n]
  trouble: {the|our} [n] {was called off|ended in the rain|was a mess} and {we are stuck|I caught a
    cold|nobody told us}
  advice: what {should I bring|do people wear|do I need} {for|on} a {long |first |}[n] {in
    June|with two kids|alone}
  pride: {did|I did|we did} {the whole|my first|our first} [n] {without giving up|today|with my dad}
  plan: {off to|we leave for|I signed up for} {a|the} [n] {next Saturday|in two weeks|with the whole
    office}
  memory: {ten years ago|back in school|one summer} we went on a [n] {and never stopped
    laughing|and got lost|that I will not forget}
""")

OPENERS = {
    "news": "{|big news: |guess what: |so, |good morning: |hello world: }",
    "trouble": "{|oh no, |what a day: |well, |of course |not again: }",
    "advice": "{|quick question: |help: |can anyone say, |honest question: |dear all, }",
    "pride": "{|so proud: |finally: |a small win: |I can hardly believe it: |look at me: }",
    "plan": "{|here we go: |it is settled: |wish me luck: |no way back: |so, }",
    "memory": "{|late thoughts: |funny, |on days like this, |tonight, |for no reason, }",
}


# Right replies. Each style has its own turns of phrase, and each event its own core, so that no
# reply belongs to two of either.
STYLES = read_table("""
warm
  news: {how lovely|how sweet|that is wonderful}, {enjoy|cherish|love} {every moment with|each day
    with|all of} {the|your} [n]
  trouble: {I am so sorry|that must hurt|poor you}, {sending a hug|big hugs|I feel with you}
    {about|over|because of} the [n]
  advice: {be gentle with yourself|take heart|no rush, dear}, the [n] {will come right|will be
    fine|needs only love}
  pride: {I am so happy for you|my heart is full|you deserve this}, {you and|what a joy with}
    {the|your} [n]
  plan: {how exciting for you|I am with you|fingers crossed}, {the|your} [n] {will be
    beautiful|will make you glad|will do you good}
  memory: {what a tender thought|thank you for sharing|how dear}, {hold on to|keep|treasure} that
    [n] {always|in your heart|for ever}
witty
  news: {plot twist|breaking news|rumour has it}: the [n] {chose you|runs the house now|wants its
    own account}
  trouble: {well,|officially,|in short,} the [n] {has resigned|filed a complaint|wants a lawyer}
    {again|now|today}
  advice: {step one|rule one|the trick}: {let|just let} the [n] {think it is in charge|do the
    talking|read the manual}
  pride: {move over|step aside|watch out}, {Mozart|world|champions}, {here comes|make way for} the
    [n] {star|legend|boss}
  plan: {famous last words|what could go wrong|somebody film this}, {the|one} [n] {never stood a
    chance|will never be the same|has no idea}
  memory: {somewhere|up there|in some attic} {that|the} [n] {still laughs at you|is writing its
    memoirs|wants royalties}
curious
  news: {ooh,|wait,|oh,} {what will you call|where will you keep|who picked|how big is} the [n]?
  trouble: {hm,|oh,|wait,} {how did that happen to|what went wrong with|can anyone mend|what
    happens now with} the [n]?
  advice: {hm,|say,|wait,} {what have you tried with|how long have you had|who else knows|what kind
    is} the [n]{ so far|}?
  pride: {tell me,|ooh,|say,} {how long did it take with|what was hardest about|who helped
    with|what comes after} the [n]?
  plan: {ooh,|say,|tell me,} {why a|what made you pick a|who joins you for the|how do you prepare
    for the} [n]?
  memory: {say,|tell me,|oh,} {what became of|do you have a picture of|what was so special
    about|who else remembers} {that|the} [n]?
practical
  news: {first|to start|tip}: {check|sort out|write down} {the costs|the dates|the basics} {for|of}
    the [n]
  trouble: {call|ask|ring} {a professional|the shop|an expert} {today|before noon|right now} about
    the [n]
  advice: {start|begin} {small|early|simple} with the [n] and {keep notes|go step by step|change
    one thing at a time}
  pride: {next|now|from here}: {set a new goal|raise the bar|show others} with the [n] {this
    month|while it is fresh|soon}
  plan: {make a list|book ahead|plan an hour more|pack the night before} for the [n], {it saves
    time|trust me|it pays}
  memory: {write it down|record it|scan the photos} {now|while you can|this week}, the [n]
    {deserves an album|belongs in print|should not be lost}
excited
  news: {yes|wow|hooray}! {a [n]|the [n]}! {best day ever|I am jumping|this is huge}!
  trouble: {no|nooo|argh}! {not the|the poor} [n]! {we will fix this|do not give up|fight on}!
  advice: {yes|wow|oh}! {great question|go for it|you can do this}! {a [n]|the [n]} {rocks|is pure
    fun}!
  pride: {wow|boom|yes}! {you did it|what a win|unreal}! {the|that} [n] {for president|is gold}!
  plan: {yes|wow|woo}! {take me along|count me in|I cannot wait}! {the|a} [n]!
  memory: {aww|wow|oh}! {what a time|those were days|so many feelings}! {that|the} [n]!
blunt
  news: {fine|okay|sure}. {a [n] is work|the [n] costs money|a [n] is not for everyone}{, you
    know|. Good luck|}
  trouble: {it happens|told you so|that is life}. {get|buy|find} {another|a better|a cheaper} [n]
  advice: {honestly|frankly}, {forget the [n]|sell the [n]|nobody needs a [n]|skip the [n]}{ and
    move on|. Done|}
  pride: {about time|not bad|took you long enough}. {the|that} [n] {looks okay|will do|was easy}
  plan: {I give it a week|do not overdo it|lower your hopes}. {it is|just} {a|one} [n]{, nothing
    more|}
  memory: {the past is past|let it go|old stories}. {it was|just} {a|only a} [n]{, that is all|}
""")


@functools.lru_cache(maxsize=None)
def parse(template):
    """A template as a tuple of texts and choices; a choice is a tuple of parsed alternatives."""
    return parse_parts(template, 0, in_choice=False)[0]


def parse_parts(template, at, in_choice):
    """(parts, where they end) of the text from `at`, up to the end of an alternative."""
    parts = []
    text = ""
    while at < len(template):
        letter = template[at]
        if in_choice and letter in "|}":
            break
        if letter == "{":
            choice, at = parse_choice(template, at + 1)
            parts += [text, choice]
            text = ""
        else:
            text += letter
            at += 1
    return (*parts, text), at


def parse_choice(template, at):
    """(alternatives, where the text goes on) of a choice whose first alternative begins at `at`."""
    alternatives = []
    while template[at - 1] != "}":
        parts, end = parse_parts(template, at, in_choice=True)
        alternatives.append(parts)
        at = end + 1                         # behind | or }
    return tuple(alternatives), at


def expand(parts, rng):
    """One text of a parsed template."""
    texts = []
    for part in parts:
        texts.append(part if isinstance(part, str) else expand(rng.choice(part), rng))
    return "".join(texts)


def polish(text, thing):
    """The text with [n] filled in, a capital in each sentence and a full stop at the end."""
    text = text.replace("[n]", thing).strip()
    text = re.sub(r"([.!?] +)([a-z])", lambda m: m[1] + m[2].upper(), text)
    end = "" if text[-1] in ".!?" else "."
    return text[0].upper() + text[1:] + end


def scene_maker(world):
    """rng -> (post, intent, {style: right reply}) of a world. About one post in three is written
    carelessly: small letters, no full stop."""
    def make(rng):
        theme = rng.choice(list(world.things))
        event = rng.choice(list(world.openers))
        thing = rng.choice(world.things[theme].split())
        text = expand(parse(world.openers[event] + world.posts[theme][event]), rng)
        careless = rng.random() < 0.3
        if careless:
            text = text.replace("[n]", thing)
        else:
            text = polish(text + rng.choice(("", "", "!")), thing)
        if event == "advice":
            text = text.rstrip(".!") + "?"
        replies = {}
        for style, events in world.styles.items():
            replies[style] = polish(expand(parse(events[event]), rng), thing)
        return text, f"{theme}/{event}/{thing}", replies
    return make


POCKET = World(THINGS, OPENERS, POSTS, STYLES)


# ---- Stories: styles are their themes, events their places, things their heroes ------------------

PLACES = {
    "sea": "{by|near|next to} the {sea|ocean|wide sea}",
    "forest": "in {the|a} {woods|forest|deep forest}",
    "town": "in {the|a} {town|city|big city}",
    "winter": "{in|one day in|on a night in} {winter|deep winter}"}

REQUEST = ("{tell me|write|I want|give me} {a|one} {short |little |tiny |}{story|tale} "
           "{|for a child |to end the day }about {a|the} [n] ")

TALES = World(
    {"animals": "fox owl bear hare crow toad", "people": "baker sailor miner clown nurse tailor"},
    dict.fromkeys(PLACES, REQUEST), {"animals": PLACES, "people": PLACES},
    read_table("""
adventure
  sea: the [n] {built a raft|took a boat}. {past the rocks|beyond the reef} it found {an
    island|gold}
  forest: the [n] {left the path|went north}. {behind the hills|over the river} lay {a castle|a
    cave}
  town: the [n] {climbed the tower|ran over the roofs}. up there it {saw the thief|found a key}
  winter: the [n] {crossed the ice|set out in snow}. at dawn it {reached the peak|saw the pass}
friendship
  sea: the [n] met {a whale|a gull}. they {shared fish|sang all day} and {never parted|stayed
    friends}
  forest: the [n] helped {a deer|a bee}. they {ate berries|built a hut} and {never parted|stayed
    friends}
  town: the [n] met {a girl|a mouse}. they {shared bread|danced all day} and {never parted|stayed
    friends}
  winter: the [n] let {a wolf|a robin} in. they {shared soup|kept warm} and {never parted|stayed
    friends}
mystery
  sea: {each|every} night {a lamp|a bell} called the [n] to the shore. nobody {lit it|was there}
  forest: {each|every} night {a door|a face} waited for the [n] in a tree. nobody {made it|knew it}
  town: {each|every} night {a letter|a shoe} came for the [n]. nobody {sent it|saw who}
  winter: {each|every} night {tracks|footprints} led to the [n]. nobody {made them|ever came}
loss
  sea: the waves took {the house|the boat} of the [n]. it {waits|looks out} there {still|to this
    day}
  forest: fire took {the nest|the tree} of the [n]. it {weeps|sits} there {still|to this day}
  town: they tore down {the street|the shop} of the [n]. it {goes|walks} there {still|to this day}
  winter: the frost took {the garden|the friend} of the [n]. it {mourns|sings} {still|to this day}
humour
  sea: the [n] {fished|dived} for {a crown|pearls} and got {a boot|a sneeze}. it {wears it|kept it}
  forest: the [n] {asked|begged} {an oak|a mushroom} for advice. it {got none|said yes}. so they
    married
  town: the [n] {became mayor|bought a hat}. {the hat|the dog} {ruled|did the work}. nobody noticed
  winter: the [n] built {a snowman|a sledge} {indoors|in bed}. it {melted|left}. the bill did not
"""))


# ---- Code: expressions in x whose value is n -----------------------------------------------------

OPERATORS = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}

ARITHMETIC = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul,
              "divide": operator.truediv}

SHAPES = (*OPERATORS.values(), "mixed")      # the styles

TASK = parse("{write|give|find|show me} {an expression|a formula|code|one line} {in x|with x|of x} "
             "that {is|gives|makes|equals} [n] {when|where|if|for} x {is|=|equals} [x]{.|!|}")


# (n, x) where x divides n, so that each shape has a right answer in whole numbers.
SUMS = [(n, x) for n in range(4, 49) for x in range(2, n // 2 + 1) if n % x == 0]


def write_sum(shape, n, x, rng):
    """A right expression of that shape."""
    factor = rng.choice([f for f in range(2, n // x + 2) if f * x != n])
    rest = n - factor * x
    sign = "+" if rest > 0 else "-"
    expressions = {"add": (f"x + {n - x}", f"{n - x} + x"),
                   "subtract": (f"{n + x} - x",),
                   "multiply": (f"x * {n // x}", f"{n // x} * x"),
                   "divide": (f"{n * x} / x",),
                   "mixed": (f"x * {factor} {sign} {abs(rest)}",)}
    return rng.choice(expressions[shape])


def shape_of(text, n, x):
    """The shape of an expression in x whose value is n, None for any other text. `mixed` uses more
    than one of the four operators. No code is run: the text is parsed as a tree of + - * /, x and
    whole numbers, and computed in fractions."""
    if len(text) > 60 or not re.fullmatch(r"[x0-9+*/() -]+", text):
        return None
    found = set()
    try:
        value = value_of(ast.parse(text.strip(), mode="eval").body, x, found)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    operators = found - {"x"}
    if value != n or "x" not in found or not operators:
        return None
    return operators.pop() if len(operators) == 1 else "mixed"


def value_of(node, x, found):
    """The value of a tree. The names of its operators, and "x", are added to `found`."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        name = OPERATORS[type(node.op)]
        found.add(name)
        left = value_of(node.left, x, found)
        right = value_of(node.right, x, found)
        return ARITHMETIC[name](left, right)
    if isinstance(node, ast.Name) and node.id == "x":
        found.add("x")
        return Fraction(x)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    raise ValueError("something else than arithmetic")


# ---- Posts and verifiers -------------------------------------------------------------------------

def pattern(parts):
    """The regular expression of all normalised texts of a parsed template; [n] is left in."""
    out = ""
    for part in parts:
        if isinstance(part, str):
            out += "[n]".join(map(normalise, part.split("[n]")))
        else:
            out += "(?:" + "|".join(map(pattern, part)) + ")"
    return out


@functools.lru_cache(maxsize=4096)
def right_replies(template, thing):
    return re.compile(pattern(parse(template)).replace("[n]", normalise(thing)))


def pocket_posts(count, seed=0, name="pocket"):
    """`count` distinct posts of a toy task, each with a right reply in every style. InputError if
    the task is too small for `count`."""
    rng = random.Random(f"{name} {seed}")
    posts = {}
    misses = 0                               # in a row
    while len(posts) < count:
        text, intent, replies = MAKERS[name](rng)
        key = normalise(text)
        misses = misses + 1 if key in posts else 0
        if misses > 1000:
            raise InputError(f"the toy task {name} has no {count} different posts: ask for fewer")
        post = Post(f"{name}-{seed}-{len(posts)}", text, tuple(replies.values()), tuple(replies),
                    intent)
        posts.setdefault(key, post)
    return list(posts.values())


def intent_parts(intent):
    """The three parts of an intent a/b/c; "" for each that it lacks."""
    return (intent.split("/") + ["", "", ""])[:3]


@DOMAINS.add("pocket", "the toy task of replies to posts")
class Pocket(Domain):
    """A completion is right in a style if that style's grammar for the post's event and thing
    parses it."""
    name = "pocket"
    world = POCKET
    exclusive = True

    @classmethod
    def claims(cls, post):
        theme, event, thing = intent_parts(post.intent)
        world = cls.world
        of_world = event in world.openers and thing in world.things.get(theme, "").split()
        return bool(post.styles) and set(post.styles) == set(world.styles) and of_world

    def reply(self, post, style, rng):
        _, event, thing = post.intent.split("/")
        return polish(expand(parse(self.world.styles[style][event]), rng), thing)

    def judge(self, post, text):
        _, event, thing = post.intent.split("/")
        text = normalise(text)
        right = []
        for style, events in self.world.styles.items():
            if right_replies(events[event], thing).fullmatch(text):
                right.append(style)
        return tuple(right)


@DOMAINS.add("pocket-code", "the toy task of expressions with a given value")
class PocketCode(Domain):
    """Expressions in x whose value is n; the styles are the shapes of expressions."""
    name = "pocket-code"
    exclusive = True

    @staticmethod
    def make(rng):
        n, x = rng.choice(SUMS)
        text = expand(TASK, rng).replace("[n]", str(n)).replace("[x]", str(x))
        replies = {shape: write_sum(shape, n, x, rng) for shape in SHAPES}
        return text, f"sum/{n}/{x}", replies

    @staticmethod
    def numbers(post):
        """(n, x) of a post; None if its intent is not one of this task's."""
        kind, n, x = intent_parts(post.intent)
        if kind != "sum" or not n.isdecimal() or not x.isdecimal():
            return None
        return int(n), int(x)

    @classmethod
    def claims(cls, post):
        return cls.numbers(post) in SUMS and set(post.styles) == set(SHAPES)

    def reply(self, post, style, rng):
        return write_sum(style, *self.numbers(post), rng)

    def judge(self, post, text):
        shape = shape_of(text, *self.numbers(post))
        return (shape,) if shape else ()


@DOMAINS.add("pocket-stories", "the toy task of stories")
class PocketStories(Pocket):
    """Stories; the styles are their themes."""
    name = "pocket-stories"
    world = TALES


# name -> maker(rng) -> (post, intent, {style: right reply})
MAKERS = {"pocket": scene_maker(POCKET), "pocket-code": PocketCode.make,
          "pocket-stories": scene_maker(TALES)}


WORLDS.add("pocket", "replies to posts")(partial(pocket_posts, name="pocket"))
WORLDS.add("pocket-code", "expressions")(partial(pocket_posts, name="pocket-code"))
WORLDS.add("pocket-stories", "stories")(partial(pocket_posts, name="pocket-stories"))
