"""Slots: what tells two prompts of one template apart.

A domain's prompts are often one sentence with places to fill, and an embedding sees the sentence: `What is 12 + 7?` and
`What is 13 + 9?` are close, bool_eval's are all but equal. So a close pair counts as one instance only where

    the numbers of both are the same multiset (number words may stand for digits),
    the slots of each, as its own template shows them, stand in the other,
    and, where both are worded alike, what differs is no slot, number, operator or negation, and their order is one.

A prompt's template is read off its mates, prompts of a sample of its domain that are close to it and share most of
what is frequent among those that are: a token of SHARE of the mates or more is skeleton, the others are slots. With
fewer than MATES of them, or where the prompt lacks the skeleton itself, there is no template.
Similarity is the embeddings' cosine, or that of token sets where there are none (`bags`).
"""

import difflib
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from curriculum.wording import CONNECTIVES, FRAME, NEGATIONS, OPERATORS, POLITE, Wording, misspelt, same_numbers, stem

SAMPLE = 512  # prompts of a domain that templates are read off
MATES = 5  # at least, for a template
SHARE = 0.8  # of the mates that a token of the skeleton stands in
MOST_MATES = 64  # looked at
FREQUENT = 0.2  # share of the mates from which a token tells wordings apart
WORDED = 0.6  # Jaccard index of two prompts' frequent tokens from which they are worded by one template
ALIKE = 0.75  # share of equal tokens from which two prompts are worded alike
BAG = 1024  # hashed dimensions of a token set


def bags(texts: Sequence[Wording]) -> np.ndarray:
    """Token sets as unit vectors f32 [N, BAG], tokens hashed: similarity without an embedding."""
    found = np.zeros((len(texts), BAG), np.float32)
    for row, text in zip(found, texts):
        row[[zlib.crc32(token.encode()) % BAG for token in set(text.tokens)]] = 1
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def sample(number: int, most: int = SAMPLE) -> np.ndarray:
    """At most so many of 0 .. number - 1, evenly random and the same every time, ascending."""
    return np.sort(np.random.default_rng(number).permutation(number)[:most])


class Slots(NamedTuple):
    """What a prompt's template leaves open."""

    all: frozenset[str]  # tokens outside the skeleton
    skeleton: frozenset[str]
    vocabulary: frozenset[str]  # of the domain's prompts


class Templates:
    """The templates of one domain's prompts, from a sample of them.

    Args:
      texts: the sample; vectors_SE: f32 [S, E], unit length; mate: the least cosine of prompts of one template.
    """

    def __init__(self, texts: Sequence[Wording], vectors_SE: np.ndarray, mate: float):
        self._texts, self._vectors_SE, self._mate = texts, vectors_SE, mate
        seen = Counter(token for text in texts for token in set(text.tokens))
        self._vocabulary = frozenset(seen)
        self._column = {token: i for i, token in enumerate(token for token, often in seen.items() if often > 1)}
        self._has_SV = np.stack([self._row(text) for text in texts]) if texts else np.zeros((0, 0), bool)

    def slots(self, texts: Sequence[Wording], vectors_BE: np.ndarray) -> list[Slots | None]:
        """Of each prompt; None where it has no template."""
        if not self._texts or not len(texts):
            return [None] * len(texts)
        close_BS = vectors_BE @ self._vectors_SE.T >= self._mate
        return [self._of(text, np.flatnonzero(close_S)) for text, close_S in zip(texts, close_BS)]

    def _of(self, text: Wording, close: np.ndarray) -> Slots | None:
        close = [s for s in close if self._texts[s].text != text.text][:MOST_MATES]  # copies say nothing of what varies
        if len(close) < MATES:
            return None
        own_V, has_MV = self._row(text), self._has_SV[close]
        frequent_V = has_MV.mean(0) >= FREQUENT
        both = (has_MV & own_V)[:, frequent_V].sum(1)
        either = (has_MV | own_V)[:, frequent_V].sum(1)
        mates_MV = has_MV[both >= WORDED * either]
        if len(mates_MV) < MATES:
            return None
        skeleton_V = mates_MV.mean(0) >= SHARE
        if not skeleton_V.any() or own_V[skeleton_V].mean() < SHARE:
            return None
        tokens = set(text.tokens)
        out = frozenset(t for t in tokens if t not in self._column or not skeleton_V[self._column[t]])
        skeleton = frozenset(token for token, column in self._column.items() if skeleton_V[column])
        return Slots(out, skeleton, self._vocabulary)

    def _row(self, text: Wording) -> np.ndarray:
        row = np.zeros(len(self._column), bool)
        row[[self._column[token] for token in set(text.tokens) if token in self._column]] = True
        return row


def stand_in(slots: frozenset[str], other: Wording) -> bool:
    """Whether every slot but those of any question's frame stands in the other prompt, in some form of the word."""
    missing = {token for token in slots - FRAME - OPERATORS - set(other.tokens) if not token[0].isdecimal()}
    stems = {stem(token) for token in other.tokens} if missing else set()
    return all(stem(token) in stems or any(misspelt(token, there) for there in other.tokens) for token in missing)


def same_instance(a: Wording, b: Wording, slots_a: Slots | None, slots_b: Slots | None) -> bool:
    """Whether two close prompts ask the same, by their numbers, slots and, where worded alike, what differs.

    Of two prompts of one template the second is asked for values that training has: what is new in it may be added,
    and where it is another value, the first one's own is missing.
    """
    if not same_numbers(a, b):
        return False
    if bool(_negations(a, slots_a)) != bool(_negations(b, slots_b)):
        return False
    signs = [Counter(token for token in text.tokens if token in OPERATORS) for text in (a, b)]
    if all(signs) and signs[0] != signs[1]:
        return False
    if slots_a is not None and not stand_in(slots_a.all, b):
        return False
    one_template = _one_template(slots_a, slots_b)
    values_b = slots_b.all if slots_b else frozenset()
    if one_template:
        values_b &= slots_a.vocabulary
    if not stand_in(values_b, a):
        return False
    known = (slots_a.all if slots_a else frozenset()) | (values_b - FRAME)
    known |= (slots_a.skeleton if slots_a else frozenset()) - FRAME
    if one_template or alike(a, b):
        return harmless(a, b, known)
    return bool(a.digits) or slots_a is None or bool(slots_a.all - FRAME) or in_one_run(a, b)


def in_one_run(a: Wording, b: Wording) -> bool:
    """Whether half of the shorter stands in the other as it is: where only the order of words tells instances apart."""
    found = difflib.SequenceMatcher(None, a.tokens, b.tokens, autojunk=False).find_longest_match()
    return 2 * found.size >= min(len(a.tokens), len(b.tokens))


def _negations(text: Wording, slots: Slots | None) -> set[str]:
    """Those that are not of the template itself: `which does not fit` is a wording of `which is the odd one`."""
    return (NEGATIONS & set(text.tokens)) - (slots.skeleton if slots else frozenset())


def _one_template(a: Slots | None, b: Slots | None) -> bool:
    return a is not None and b is not None and len(a.skeleton & b.skeleton) >= SHARE * len(a.skeleton | b.skeleton)


def alike(a: Wording, b: Wording) -> bool:
    """Whether most tokens, in whatever order, are those of the other."""
    both = sum((Counter(a.tokens) & Counter(b.tokens)).values())
    return both >= ALIKE * max(len(a.tokens), len(b.tokens))


def harmless(a: Wording, b: Wording, slots: frozenset[str]) -> bool:
    """Whether what differs between two prompts worded alike can be an edit.

    A misspelling, or words of the frame for others, or words added: no slot, number, sign or negation among them, none
    moved from elsewhere, and no connective changed for another.
    """
    matcher = difflib.SequenceMatcher(None, a.tokens, b.tokens, autojunk=False)
    gone, come = Counter(), Counter()
    for kind, i, j, k, l in matcher.get_opcodes():
        left, right = a.tokens[i:j], b.tokens[k:l]
        if kind == "equal" or (len(left) == len(right) and all(map(misspelt, left, right))):
            continue
        if any(telling(token, slots) for token in (*left, *right)):
            return False
        if kind == "replace" and not {*left, *right} <= FRAME - CONNECTIVES:
            return False
        gone.update(left)
        come.update(right)
    return not (gone & come)


def telling(token: str, slots: frozenset[str]) -> bool:
    return (token in slots and token not in POLITE) or token[0].isdecimal() or token in OPERATORS or token in NEGATIONS
