"""Procedural domains: rows computed from a seed, at a difficulty, split into train and test by what they ask.

A generator draws a row from a numpy Generator and a difficulty (a level, 1 is the easiest). Every row carries `key`,
the canonical identity of its instance: what leaves the answer the same is put in order (the operands of a sum, the
numbers to sort), so `12 + 7` and `7 + 12` are one instance. Draws are deduplicated by key, and the key alone, by its
sha256, puts an instance on the train side or on the test side. The sides share nothing, whatever the sizes, seeds and
levels of two sources are, and each holds about half of the space: splitting the draws instead would leave nearly every
test prompt of a small space (55 products of two digits) in the training rows.

The generators here are the `tiny` set, for a byte-level model of a few million parameters: at most 64 tokens of prompt
with three of chat template, at most 31 bytes of answer. The row is {messages, answer, meta, key}; `meta` is what the
domain's grader needs. Yes/no questions are left out: guessing passes half of them.
"""

import hashlib
import itertools
import string
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]  # messages, answer, meta?, key?

DRAWS = 20_000  # draws at least tried for a split: enough to see a space of 2,000 instances whole
SPLIT_SIZE = {"train": 2000, "test": 256}  # rows, where the source gives no size
SALT = 243  # of the side's hash: one that halves the smallest spaces (products, sums, gcd, weekday) within 2 %


class Generator(NamedTuple):
    environment: str  # the grader its rows are made for
    levels: int  # difficulties 1 to levels
    draw: Callable[[np.random.Generator, int], Row]  # pure: (randomness, difficulty) -> row with its key


def side(key: str) -> str:
    """`test` or `train`, a property of the key alone."""
    return "test" if hashlib.sha256(f"{SALT} {key}".encode()).digest()[0] < 128 else "train"


def rows(name: str, generator: Generator, *, difficulty: int, split: str, size: int, seed: int) -> list[Row]:
    """The first `size` distinct instances of one side, in drawing order; fewer where the side is smaller.

    Rows of a larger size begin with those of a smaller one.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), difficulty])
    kept: dict[str, Row] = {}
    for _ in range(max(DRAWS, 10 * size)):
        row = generator.draw(rng, difficulty)
        if row["key"] not in kept and side(row["key"]) == split:
            kept[row["key"]] = row
            if len(kept) == size:
                break
    return list(kept.values())


def read(source: str, known: dict[str, Generator]) -> list[Row]:
    """Rows of `gen:NAME[,difficulty=1][,split=train][,size=N][,seed=0]`; size is 2000 for train, 256 for test.

    A range, difficulty=1..4, has `size` rows of every level, taken in turn: the levels are mixed evenly from the first
    row on. An instance that is one of two levels comes once. Raises ValueError, one line, on an unknown name or
    parameter, or a value out of range.
    """
    mixed: dict[str, Row] = {}
    for together in itertools.zip_longest(*read_levels(source, known).values()):
        for row in together:
            if row is not None:
                mixed.setdefault(row["key"], row)
    return list(mixed.values())


def read_levels(source: str, known: dict[str, Generator]) -> dict[int, list[Row]]:
    """The same by level, easiest first: `size` rows each, one level where no range is given."""
    first, last = level_range(source, known)
    given = _parameters(source)
    if given["split"] not in SPLIT_SIZE:
        raise ValueError(f"source {source!r}: split={given['split']!r}; expected train or test")
    size = _whole(source, "size", given.get("size", str(SPLIT_SIZE[given["split"]])), 1, 10**6)
    seed = _whole(source, "seed", given["seed"], 0, 2**32 - 1)
    name = generator_name(source)
    return {
        level: rows(name, known[name], difficulty=level, split=given["split"], size=size, seed=seed)
        for level in range(first, last + 1)
    }


def level_range(source: str, known: dict[str, Generator]) -> tuple[int, int]:
    """Easiest and hardest level of a source, (1, 4) for difficulty=1..4; generates nothing. Raises as `read` does."""
    name = generator_name(source)
    if name not in known:
        raise ValueError(f"source {source!r}: no generator is called {name!r}; known: {', '.join(known)}")
    text = _parameters(source)["difficulty"]
    ends = text.split("..") if ".." in text else [text, text]
    if len(ends) != 2:
        raise ValueError(f"source {source!r}: difficulty={text!r}; expected a level, 2, or a range, 1..4")
    first, last = (_whole(source, "difficulty", end, 1, known[name].levels) for end in ends)
    if first > last:
        raise ValueError(f"source {source!r}: difficulty={text!r}; the easier level comes first: {last}..{first}")
    return first, last


def generator_name(source: str) -> str:
    return source.removeprefix("gen:").split(",")[0]


def _parameters(source: str) -> dict[str, str]:
    given = {"difficulty": "1", "split": "train", "seed": "0"}
    for pair in source.split(",")[1:]:
        parameter, _, value = pair.partition("=")
        if parameter not in ("difficulty", "split", "size", "seed"):
            raise ValueError(f"source {source!r}: unknown parameter {pair!r}; known: difficulty, split, size, seed")
        given[parameter] = value
    return given


def _whole(source: str, parameter: str, value: str, least: int, most: int) -> int:
    if not (value.isdecimal() and least <= int(value) <= most):
        raise ValueError(f"source {source!r}: {parameter}={value!r}; expected a whole number from {least} to {most}")
    return int(value)


def _row(question: str, answer: str, key: str | None = None, **meta: Any) -> Row:
    return {"messages": [{"role": "user", "content": question}], "answer": answer, "meta": meta, "key": key or question}


def _digits(rng: np.random.Generator, number: int) -> list[str]:
    return [str(digit) for digit in rng.integers(10, size=number)]


def _letters(rng: np.random.Generator, number: int, alphabet: str = string.ascii_lowercase) -> list[str]:
    return [alphabet[i] for i in rng.integers(len(alphabet), size=number)]


def _distinct(rng: np.random.Generator, number: int, below: int) -> list[int]:
    """`number` different integers of 0 .. below - 1, in random order."""
    return [int(value) for value in rng.permutation(below)[:number]]


def copy(rng: np.random.Generator, difficulty: int) -> Row:
    """`copy: kqzpd` -> `kqzpd`; difficulty + 3 letters."""
    text = "".join(_letters(rng, difficulty + 3))
    return _row(f"copy: {text}", text)


def largest(rng: np.random.Generator, difficulty: int) -> Row:
    """`largest: 38 92 17` -> `92`; difficulty + 1 different numbers below 100."""
    numbers = _distinct(rng, difficulty + 1, 100)
    key = f"largest: {sorted(numbers)}"
    return _row(f"largest: {' '.join(map(str, numbers))}", str(max(numbers)), key)


def reverse(rng: np.random.Generator, difficulty: int) -> Row:
    """`reverse: 4 8 2 1` -> `1 2 8 4`; difficulty + 2 digits."""
    digits = _digits(rng, difficulty + 2)
    return _row(f"reverse: {' '.join(digits)}", " ".join(reversed(digits)), separator=" ")


def sort(rng: np.random.Generator, difficulty: int) -> Row:
    """`sort: 4 8 2 1` -> `1 2 4 8`; difficulty + 2 digits."""
    digits = _digits(rng, difficulty + 2)
    answer = " ".join(sorted(digits))
    return _row(f"sort: {' '.join(digits)}", answer, f"sort: {answer}", separator=" ")


def lookup(rng: np.random.Generator, difficulty: int) -> Row:
    """`get k: a7 k3 z9` -> `3`; difficulty + 1 letters, each before its digit, all letters and digits different."""
    names = [string.ascii_lowercase[i] for i in _distinct(rng, difficulty + 1, 26)]
    values = [str(digit) for digit in _distinct(rng, difficulty + 1, 10)]
    pairs = [name + value for name, value in zip(names, values)]
    wanted = int(rng.integers(len(names)))
    key = f"get {names[wanted]}: {sorted(pairs)}"
    return _row(f"get {names[wanted]}: {' '.join(pairs)}", values[wanted], key, choices=values)


def add(rng: np.random.Generator, difficulty: int) -> Row:
    """`add: 47 + 85` -> `132`; numbers of at most `difficulty` digits."""
    numbers = [int(number) for number in rng.integers(10**difficulty, size=2)]
    return _row(f"add: {numbers[0]} + {numbers[1]}", str(sum(numbers)), f"add: {sorted(numbers)}")


def shift(rng: np.random.Generator, difficulty: int) -> Row:
    """`shift 2: b x a` -> `d z c`, z is followed by a; three letters, moved by 1 to `difficulty`."""
    letters, by = _letters(rng, 3), int(rng.integers(1, difficulty + 1))
    moved = [string.ascii_lowercase[(string.ascii_lowercase.index(letter) + by) % 26] for letter in letters]
    return _row(f"shift {by}: {' '.join(letters)}", " ".join(moved), separator=" ")


def count(rng: np.random.Generator, difficulty: int) -> Row:
    """`count b: abcbdh` -> `2`; 4 + 2 difficulty letters, every answer from 1 to 2 + 2 difficulty equally likely."""
    length = 4 + 2 * difficulty
    wanted = "abcdefgh"[rng.integers(8)]
    number = int(rng.integers(1, length - 1))
    text = [wanted] * number + _letters(rng, length - number, "abcdefgh".replace(wanted, ""))
    shuffled = "".join(text[i] for i in rng.permutation(length))
    return _row(f"count {wanted}: {shuffled}", str(number), f"count {wanted}: {''.join(sorted(text))}")


TINY = {
    "copy": Generator("eq", 20, copy),
    "largest": Generator("number", 14, largest),
    "reverse": Generator("list", 14, reverse),
    "sort": Generator("list", 14, sort),
    "lookup": Generator("line", 9, lookup),
    "add": Generator("number", 9, add),
    "shift": Generator("list", 25, shift),
    "count": Generator("number", 20, count),
}
