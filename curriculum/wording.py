"""Prompts as tokens: what two prompts may differ in and still ask the same, and what they may not.

Normalisation keeps digits, decimal points, operators and brackets; case, other punctuation, width and spacing go. A
token is a number, a word (a sign of Chinese, Japanese or Korean is one), or one remaining sign. `numbers` are the
digits' multiset and, apart, the number words: a prompt may say `two numbers` and mean no 2, so that words may stand for
digits and need not.

Left out: other languages' number words and stop words. There the rules ask for more agreement, never for less.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_SIGNS = str.maketrans({"−": "-", "–": "-", "—": " ", "×": "*", "·": "*", "÷": "/", "⋅": "*", "’": "'", "‘": "'"})
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\d{3})+)(?![\d,])")
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(rf"\d+(?:\.\d+)?|[{_CJK}]|(?:(?![{_CJK}])[^\W\d_])+|[^\s\w]|_")
_KEPT = frozenset("+-*/^=<>%()[]{}|&~\\@#_")
OPERATORS = frozenset("+-*/^=<>%")

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_WORDS = {word: str(value) for value, word in enumerate(f"{_UNITS} eighteen nineteen".split())}
_WORDS |= {word: str(10 * value) for value, word in enumerate("twenty thirty forty fifty sixty".split(), 2)}
_WORDS |= {"seventy": "70", "eighty": "80", "ninety": "90", "hundred": "100", "thousand": "1000", "dozen": "12"}
_WORDS |= {word: str(value) for value, word in enumerate("first second third fourth fifth sixth".split(), 1)}
_WORDS |= {word: str(value) for value, word in enumerate("seventh eighth ninth tenth".split(), 7)}

NEGATIONS = frozenset("not no never none without except neither nor isn aren don doesn cannot".split())
# Words of any question's frame: a prompt that lacks one, or has another, may still ask the same.
FRAME = frozenset(
    """a an the this that these those it its i me my we us our you your he she they them their his her is are was were
    be been being am do does did done doing has have had having will would shall should can could may might must let s t
    of in on at to for from by with about as into onto upon over if then than so such and or but also too very just
    only please kindly what which who whom whose when where why how there here now
    give tell say state name find determine compute calculate work out evaluate write show provide return output
    report answer respond reply result solution question problem following below above given consider using use get
    figure identify pick choose select list need want like know help task make made take put would exactly simply
    final value word words number numbers nothing else one any some all each both every same up com hey hi hello thanks
    thank dear carefully think step lot help
    """.split()
)
POLITE = frozenset("hello hi hey please kindly thanks thank dear carefully".split())
CONNECTIVES = frozenset("and or if then than all any some every same one so but up over on in".split())
_SUFFIX = re.compile(r"(?:ies|es|s|ed|ing|ly)$")


class Wording(NamedTuple):
    text: str  # normalised, tokens joined by a space
    tokens: tuple[str, ...]
    digits: Counter  # multiset of numbers written in digits
    words: Counter  # of those written as words, first and second among them


def normalise(text: str) -> str:
    """The text's tokens, joined by a space: what the exact stage hashes."""
    return " ".join(_tokens(text))


def read(text: str) -> Wording:
    tokens = _tokens(text)
    digits = Counter(_plain(token) for token in tokens if token[0].isdecimal())
    words = Counter(_WORDS[token] for token in tokens if token in _WORDS)
    return Wording(" ".join(tokens), tokens, digits, words)


def _tokens(text: str) -> tuple[str, ...]:
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).translate(_SIGNS).casefold()
    text = _THOUSANDS.sub(lambda found: found[1] + found[2].replace(",", ""), text)
    text = re.sub(r"(?<=[^\W\d_])['\"`\u02bc](?=[^\W\d_])", "", text)  # what's -> whats
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", text)  # well-known -> well known; 7-3 and x - 3 stay
    found = _TOKEN.findall(text)
    kept = tuple(token for token in found if token[0].isalnum() or token in _KEPT)
    return kept or tuple(found)  # a prompt of signs alone is its signs


def _plain(number: str) -> str:
    number = number.lstrip("0") or "0"
    return number.rstrip("0").rstrip(".") if "." in number else number


def same_numbers(a: Wording, b: Wording) -> bool:
    """Whether every number in digits of each stands in the other, as often, in digits or as a word."""
    if a.digits == b.digits:
        return True
    return not (a.digits - (b.digits + b.words)) and not (b.digits - (a.digits + a.words))


def shingles(tokens: Sequence[str], length: int) -> frozenset[tuple[str, ...]]:
    """Word n-grams; of a shorter text the whole."""
    return frozenset(tuple(tokens[i : i + length]) for i in range(max(len(tokens) - length + 1, 1)))


def stem(token: str) -> str:
    return _SUFFIX.sub("", token) if len(token) > 4 else token


def misspelt(a: str, b: str) -> bool:
    """Whether one edit (a letter changed, added, left out, two exchanged) of a word of five or more makes the other."""
    if a == b:
        return True
    if min(len(a), len(b)) < 5 or abs(len(a) - len(b)) > 1 or not (a.isalpha() and b.isalpha()):
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    x, y = a[start:], b[start:]
    return x[1:] == y[1:] or x[1:] == y or x == y[1:] or (x[:2] == y[1::-1] and x[2:] == y[2:])
