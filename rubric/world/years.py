"""A smaller invented world: `python -m rubric.world.years --out DIR` writes corpus.jsonl, train.jsonl and test.jsonl.

For models that read characters. A document says one year of one name of four letters, and a question asks for it in ten
characters, so a whole conversation with the search service is about a hundred. Which side a name is on depends on its
sha256 alone, its year on the seed: `train` and `test` are written here, and `shown` is left for supervision
(models.tiny.talk), so that no name of the corpus has been met before.
"""

import argparse
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np

CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
YEARS = 1000, 2000  # the first one, and the first that is none; a guess is right once in a thousand
SIDES = "test", "train", "train", "shown", "shown", "shown", "shown", "shown"  # by sha256


def names(side: str) -> list[str]:
    """Those of a side, in the order of the alphabet."""
    syllables = [*map("".join, itertools.product(CONSONANTS, VOWELS))]
    every = (first.capitalize() + second for first in syllables for second in syllables)
    return [name for name in every if SIDES[hashlib.sha256(name.encode()).digest()[0] % len(SIDES)] == side]


def questions(side: str, seed: int) -> list[dict]:
    """Rows {messages, answer, key}, one a name, in an order that depends on the seed as the years do."""
    own = names(side)
    rng = np.random.default_rng([seed, SIDES.index(side)])
    years = rng.integers(*YEARS, len(own))
    return [_row(own[n], int(years[n])) for n in rng.permutation(len(own))]


def _row(name: str, year: int) -> dict:
    messages = [{"role": "user", "content": f"year: {name}"}]
    return {"messages": messages, "answer": [str(year)], "key": f"year {name}"}


def document(row: dict) -> dict:
    """The one that answers a question."""
    name = row["key"].removeprefix("year ")
    return {"id": name, "title": name, "text": row["answer"][0]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m rubric.world.years", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=1800, help="questions at most")
    parser.add_argument("--test", type=int, default=96, help="questions at most")
    arguments = parser.parse_args(argv)
    train, test = (questions(side, arguments.seed) for side in ("train", "test"))
    documents = [document(row) for row in train + test]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", documents), ("train", train[: arguments.train]), ("test", test[: arguments.test])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.out / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
