"""Slots: what tells two prompts of one template apart.

A domain's prompts are often one sentence with places to fill, and an embedding sees the sentence: `What is 12 + 7?` and
`What is 13 + 9?` are close, bool_eval's are all but equal. So a close pair counts as one instance only where

    the numbers of both are the same multiset (number words may stand for digits),
    the slots of each, as its own template shows them, stand in the other,
    and, where both are worded alike, what differs is no slot, number, operator or negation, and their order is one.

A prompt's template is read off its mates, the prompts of a sample of its domain that are as close to it as MATE: a
token of SHARE of them or more is skeleton, the others are slots. With fewer than MATES of them there is no template.
Similarity is the embeddings' cosine, or that of token sets where there are none (`bags`).
"""

import difflib
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from curriculum.wording import FRAME, NEGATIONS, OPERATORS, Wording, misspelt, same_numbers, stem

SAMPLE = 512  # prompts of a domain that templates are read off
MATES = 5  # at least, for a template
SHARE = 0.8  # of the mates that a token of the skeleton stands in
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


class Templates:
    """The templates of one domain's prompts, from a sample of them.

    Args:
      texts: the sample; vectors_SE: f32 [S, E], unit length; mate: the least cosine of prompts of one template.
    """

    def __init__(self, texts: Sequence[Wording], vectors_SE: np.ndarray, mate: float):
        self._texts, self._vectors_SE, self._mate = texts, vectors_SE, mate
        seen = Counter(token for text in texts for token in set(text.tokens))
        self._column = {token: i for i, token in enumerate(token for token, often in seen.items() if often > 1)}
        self._has_SV = np.zeros((len(texts), len(self._column)), np.float32)
        for row, text in zip(self._has_SV, texts):
            row[[self._column[token] for token in set(text.tokens) if token in self._column]] = 1

    def slots(self, texts: Sequence[Wording], vectors_BE: np.ndarray) -> list[frozenset[str] | None]:
        """Of each prompt the tokens outside its template's skeleton; None where it has no template."""
        if not self._texts or not len(texts):
            return [None] * len(texts)
        close_BS = vectors_BE @ self._vectors_SE.T >= self._mate
        for line, text in zip(close_BS, texts):  # its own copies say nothing of what varies
            for s in np.flatnonzero(line):
                if self._texts[s].text == text.text:
                    line[s] = False
        mates_B = close_BS.sum(1)
        share_BV = (close_BS.astype(np.float32) @ self._has_SV) / np.maximum(mates_B, 1)[:, None]
        return [
            None
            if mates < MATES
            else frozenset(token for token in set(text.tokens) if self._share(share, token) < SHARE)
            for text, mates, share in zip(texts, mates_B, share_BV)
        ]

    def _share(self, share_V: np.ndarray, token: str) -> float:
        column = self._column.get(token)
        return 0.0 if column is None else float(share_V[column])


def stand_in(slots: frozenset[str], other: Wording, frame: frozenset[str] = FRAME) -> bool:
    """Whether every slot but those of any question's frame stands in the other prompt, in some form of the word."""
    missing = slots - frame - set(other.tokens)
    missing = {token for token in missing if not token[0].isdecimal()}  # numbers are compared for themselves
    if not missing:
        return True
    stems = {stem(token) for token in other.tokens}
    return all(
        stem(token) in stems or token in OPERATORS or any(misspelt(token, other_token) for other_token in other.tokens)
        for token in missing
    )


def same_instance(a: Wording, b: Wording, slots_a: frozenset[str] | None, slots_b: frozenset[str] | None) -> bool:
    """Whether two close prompts ask the same, by their numbers, slots and, where worded alike, what differs."""
    if not same_numbers(a, b):
        return False
    if bool(NEGATIONS & set(a.tokens)) != bool(NEGATIONS & set(b.tokens)):
        return False
    signs = [Counter(token for token in text.tokens if token in OPERATORS) for text in (a, b)]
    if all(signs) and signs[0] != signs[1]:
        return False
    if (slots_a is not None and not stand_in(slots_a, b)) or (slots_b is not None and not stand_in(slots_b, a)):
        return False
    known = (slots_a or frozenset()) | (slots_b or frozenset())
    return not alike(a, b) or harmless(a, b, known)


def alike(a: Wording, b: Wording) -> bool:
    """Whether most tokens, in whatever order, are those of the other."""
    both = sum((Counter(a.tokens) & Counter(b.tokens)).values())
    return both >= ALIKE * max(len(a.tokens), len(b.tokens))


def harmless(a: Wording, b: Wording, slots: frozenset[str]) -> bool:
    """Whether what differs between two prompts worded alike can be an edit: no slot, number, sign or negation in it."""
    matcher = difflib.SequenceMatcher(None, a.tokens, b.tokens, autojunk=False)
    for kind, i, j, k, l in matcher.get_opcodes():
        if kind == "equal":
            continue
        left, right = a.tokens[i:j], b.tokens[k:l]
        if len(left) == len(right) and all(map(misspelt, left, right)):
            continue
        if any(telling(token, slots) for token in (*left, *right)):
            return False
    return True


def telling(token: str, slots: frozenset[str]) -> bool:
    return token in slots or token[0].isdecimal() or token in OPERATORS or token in NEGATIONS
