"""What a word is, in any script, and which texts share nearly all of theirs."""

import functools
import re
import unicodedata
from collections import Counter

from support.posts import normalise


# Scripts without spaces between words: Thai, Lao, Khmer, Japanese, Chinese. There a character
# counts.
UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"


@functools.cache
def word_patterns():
    """The patterns of plain_words and words. Compiled when first used: they contain every combining
    mark of Unicode (as in Hindi, or accents written apart), which \\w leaves out."""
    marks = ""
    for code in range(0x300, 0x1f000):
        if unicodedata.category(chr(code))[0] == "M":
            marks += chr(code)
    letters = rf"[^\W{UNSPACED}]+(?:[{marks}]+[^\W{UNSPACED}]*)*"
    plain = re.compile(rf"[\w{marks}]+")
    full = re.compile(rf"[{UNSPACED}]|{letters}(?:['’]{letters})*|[^\w\s]")
    return plain, full


def plain_words(text):
    """Lower-cased words of letters, marks, digits and _, by which completions are compared."""
    plain, _ = word_patterns()
    return plain.findall(unicodedata.normalize("NFC", text.lower()))


def words(text):
    """Lower-cased words ("don't" is one), single characters of scripts without spaces, and single
    punctuation marks or emoji: what all metrics count."""
    _, full = word_patterns()
    return full.findall(unicodedata.normalize("NFC", text.lower()))


def near_duplicates(texts, share=0.8):
    """For each text the index of the first earlier one that it nearly repeats, or None.

    Two texts are near duplicates when `share` or more of their words (letters and digits only) are
    common: Dice's coefficient of the two multisets. Texts without a word are compared by their
    characters."""
    bags = []
    for text in texts:
        counted = Counter(word for word in words(text) if normalise(word))
        bags.append(counted or Counter(text.split() or [""]))
    found = []
    for i, bag in enumerate(bags):
        found.append(None)
        for j, earlier in enumerate(bags[:i]):
            common = (bag & earlier).total()
            if 2 * common >= share * (bag.total() + earlier.total()):
                found[i] = j
                break
    return found
