"""The semantic stage: close pairs of a block of training texts, sieved by arrays, then put to the slot rule.

In a templated domain nearly every pair is close, ten million of a block of 1,024 in the worst case. Two sieves over
arrays leave few for the rule itself, and drop none that it would keep: numbers by a hash, unless one side has number
words; slots by a bit for each hashed word form, of which one may be missing, a misspelling.
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from curriculum import semantic, slots
from curriculum.semantic import Close
from curriculum.slots import Slots, Templates
from curriculum.wording import FRAME, OPERATORS, Wording, read, stem

if TYPE_CHECKING:
    from curriculum.contamination import ContaminationConfig, Item

MATE = 0.6  # least cosine of the embeddings of prompts of one template
CHECKED = 64  # pairs of one training text put to the slot rule, the closest
BITS = 256  # of the sieve's word forms
Embed = Callable[[Sequence[str]], np.ndarray]  # texts -> unit vectors f32 [N, E]


def matches(
    config: "ContaminationConfig",
    embed: Embed,
    train: "Sequence[Item]",
    evaluation: "Sequence[Item]",
    words_E: Sequence[Wording],
    progress: Callable[[int, int], None],
) -> Iterator[tuple[int, int, float]]:
    """(training number, evaluation number, cosine): the closest evaluation text of each training text that matches."""
    vectors_EX = _in_blocks(embed, [item.text for item in evaluation])
    search = semantic.Search(vectors_EX)
    rule = Rule(config, embed, train, evaluation, words_E, vectors_EX) if config.slots else None
    least = min(config.slots, config.threshold) if config.slots else config.threshold
    for start in range(0, len(train), semantic.BLOCK):
        progress(start, len(train))
        block = train[start : start + semantic.BLOCK]
        vectors_BX = embed([item.text for item in block])
        close = search.close(vectors_BX, least)
        if rule is None:
            close = semantic.best_first(close, np.ones(len(close.train_P), bool))
            first_P = np.flatnonzero(np.diff(close.train_P, prepend=-1))
            found = zip(*(x[first_P].tolist() for x in close))
        else:
            found = rule.keep(block, vectors_BX, close)
        for t, e, cosine in found:
            yield start + t, e, min(cosine, 1.0)
    progress(len(train), len(train))


def _in_blocks(embed: Embed, texts: Sequence[str]) -> np.ndarray:
    return np.concatenate([embed(texts[i : i + semantic.BLOCK]) for i in range(0, len(texts), semantic.BLOCK)])


class Rule:
    """Which of the close pairs are one instance; holds the evaluation side's slots and the domains' templates."""

    def __init__(self, config, embed: Embed, train, evaluation, words_E: Sequence[Wording], vectors_EX: np.ndarray):
        self._config, self._words_E = config, words_E
        self._templates = {}
        for domain, rows in _by_domain(train).items():
            rows = [rows[i] for i in slots.sample(len(rows))]
            texts = [train[t].text for t in rows]
            self._templates[domain] = Templates([read(text) for text in texts], embed(texts), MATE)
        self._slots_E: list = [None] * len(evaluation)
        for rows in _by_domain(evaluation).values():
            chosen = [rows[i] for i in slots.sample(len(rows))]
            templates = Templates([words_E[e] for e in chosen], vectors_EX[chosen], MATE)
            for e, found in zip(rows, templates.slots([words_E[e] for e in rows], vectors_EX[rows])):
                self._slots_E[e] = found
        self._sums_E, self._wordy_E = _sums(words_E)
        self._forms_E = _bits([frozenset(text.tokens) for text in words_E])

    def keep(self, block, vectors_BX: np.ndarray, close: Close) -> Iterator[tuple[int, int, float]]:
        """The closest pair of each training text of the block that the slot rule keeps."""
        words_B = [read(item.text) for item in block]
        sums_B, wordy_B = _sums(words_B)
        t, e, _ = close
        kept = semantic.best_first(close, (sums_B[t] == self._sums_E[e]) | wordy_B[t] | self._wordy_E[e])
        rows = np.unique(kept.train_P)
        slots_B = self._slots(block, words_B, vectors_BX, rows)
        t, e, _ = kept
        absent_P = _missing(
            _bits([_sieved((found := slots_B.get(b)) and found.all) for b in range(len(block))])[t], self._forms_E[e]
        )
        kept = Close(*(x[absent_P <= 1] for x in kept))
        done, tried = -1, defaultdict(int)
        for t, e, cosine in zip(*(x.tolist() for x in kept)):
            tried[t] += 1
            if t != done and tried[t] <= CHECKED and self._same(words_B[t], slots_B[t], e, cosine):
                done = t
                yield t, e, cosine

    def _slots(self, block, words_B, vectors_BX, rows: np.ndarray) -> dict[int, Slots | None]:
        found = {}
        for domain, places in _by_domain([block[b] for b in rows]).items():
            chosen = rows[places]
            made = self._templates[domain].slots([words_B[b] for b in chosen], vectors_BX[chosen])
            found |= dict(zip(chosen.tolist(), made))
        return found

    def _same(self, text: Wording, slots_T: Slots | None, e: int, cosine: float) -> bool:
        slots_E = self._slots_E[e]
        templated = slots_T is not None or slots_E is not None
        least = self._config.slots if templated else self._config.threshold
        return cosine >= least and slots.same_instance(text, self._words_E[e], slots_T, slots_E)


def _by_domain(items) -> dict[str, list[int]]:
    found = defaultdict(list)
    for number, item in enumerate(items):
        found[item.domain].append(number)
    return found


def _sums(texts: Sequence[Wording]) -> tuple[np.ndarray, np.ndarray]:
    """(hash of each text's numbers i64, whether it has number words)."""
    sums = [zlib.crc32(" ".join(sorted(text.digits.elements())).encode()) for text in texts]
    return np.array(sums, np.int64), np.array([bool(text.words) for text in texts], bool)


def _sieved(found: frozenset[str] | None) -> frozenset[str]:
    """Slots that the rule looks for as words in the other text."""
    return frozenset(token for token in (found or frozenset()) - FRAME - OPERATORS if not token[0].isdecimal())


def _bits(sets: Sequence[frozenset[str]]) -> np.ndarray:
    """u64 [N, BITS / 64], a bit for each word form."""
    found = np.zeros((len(sets), BITS), bool)
    for row, tokens in zip(found, sets):
        row[[zlib.crc32(stem(token).encode()) % BITS for token in tokens]] = True
    return np.packbits(found, axis=1).view(np.uint64)


def _missing(asked: np.ndarray, there: np.ndarray) -> np.ndarray:
    """How many bits of each row of `asked` the row of `there` lacks."""
    return np.bitwise_count(asked & ~there).sum(1)
