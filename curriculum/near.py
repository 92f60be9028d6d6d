"""Near-verbatim pairs: MinHash and LSH over word n-grams, by datasketch (Broder 1997; Leskovec et al., ch. 3).

The evaluation side is the index; training texts stream past it, so memory is the evaluation side's whatever the number
of training texts. Two exact bounds spare most of the hashing: with J(t, e) >= j a text shares at least j of its own
n-grams with e, so one that shares fewer with all of the evaluation side together is passed over; and what LSH proposes
is kept only where the true Jaccard index reaches the threshold.
"""

import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from curriculum.wording import Wording, shingles

PERMUTATIONS = 128
MISSED = 0.8  # weight of misses against false proposals in the choice of bands: a proposal is checked, a miss is not


class Near:
    """Finds evaluation texts whose word n-grams overlap. Raises ModuleNotFoundError without datasketch."""

    def __init__(self, evaluation: Sequence[Wording], length: int, jaccard: float):
        from datasketch import MinHashLSH

        self._length, self._jaccard = length, jaccard
        weights = (1 - MISSED, MISSED)
        self._index = MinHashLSH(jaccard, PERMUTATIONS, weights=weights)
        self._sets = [_hashes(text, length) for text in evaluation]
        self._all = set().union(*self._sets)
        with self._index.insertion_session() as session:
            for number, hashes in enumerate(self._sets):
                session.insert(number, _minhash(hashes), check_duplication=False)

    def pairs(
        self, texts: Iterable[Wording], plausible: Callable[[int, int], bool] | None = None
    ) -> Iterator[tuple[int, int, float]]:
        """(number of the text, number of the evaluation text, Jaccard index), of a text the closest first.

        plausible: of the two numbers; spares the comparison of what the caller would not keep.
        """
        for number, text in enumerate(texts):
            hashes = _hashes(text, self._length)
            if len(hashes & self._all) < self._jaccard * len(hashes):
                continue
            proposed = self._index.query(_minhash(hashes))
            if plausible is not None:
                proposed = [e for e in proposed if plausible(number, e)]
            found = [(jaccard(hashes, self._sets[e]), e) for e in proposed]
            for value, e in sorted(found, key=lambda pair: (-pair[0], pair[1])):
                if value >= self._jaccard:
                    yield number, e, value


def jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / len(a | b)


def _hashes(text: Wording, length: int) -> frozenset[int]:
    return frozenset(zlib.crc32(" ".join(shingle).encode()) for shingle in shingles(text.tokens, length))


@functools.cache
def _empty():
    from datasketch import MinHash

    return MinHash(PERMUTATIONS, hashfunc=int)


def _minhash(hashes: frozenset[int]):
    found = _empty().copy()  # its permutations are drawn once
    found.update_batch(np.fromiter(hashes, np.uint64, len(hashes)))
    return found
