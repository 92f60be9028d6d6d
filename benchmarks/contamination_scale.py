"""Time and memory of the contamination gate at size: 1e6 training prompts against 1e4 evaluation prompts.

    python -m benchmarks.contamination_scale [--train 1000000] [--eval 10000] [--stage text|search|embed] [--out FILE]

text    the stages exact, key and near as they are, on synthetic templated and free prompts, 1 in 1,000 leaked
search  the semantic stage but for the embedding: seeded vectors of 384 dimensions stand for it, prompts of a template
        around a common centre, so that most pairs of a template are close; leaked prompts get their partner's vector
embed   the embedding alone, of so many of the same prompts: --train 1000 says what a thousand cost

Each stage in its own process, whose peak resident memory (ru_maxrss) is given, with that before the stage began.
"""

import argparse
import json
import random
import resource
import time
import zlib
from pathlib import Path

import numpy as np

from configs import cli
from curriculum import semantic
from curriculum.contamination import ContaminationDetector, Item

TEMPLATES = 200
LEAKED = 1000  # one in so many
DIMENSIONS = 384
VOCABULARY = [
    f"{a}{b}{c}" for a in "bcdfglmnprst" for b in ("a", "e", "io", "u") for c in ("ban", "dor", "kel", "mit", "ro")
]


def prompt(number: int, seed: int) -> tuple[str, int]:
    """(text, template): twelve words of its template with three numbers, and two more words; one in four is free."""
    rng = random.Random(f"{seed} {number}")
    template = number % TEMPLATES
    if number % 4 == 3:
        return " ".join(rng.choices(VOCABULARY, k=25)), -1
    words = random.Random(template).choices(VOCABULARY, k=12)
    for place in (2, 5, 9):
        words.insert(place, str(rng.randrange(10, 1000)))
    return " ".join([*words, *rng.choices(VOCABULARY, k=2)]), template


def rows(number: int, evaluation: int) -> tuple[list[Item], list[Item]]:
    asked = [Item(prompt(i, 1)[0], f"d{prompt(i, 1)[1] % 20}", f"test/{i}") for i in range(evaluation)]
    train = []
    for i in range(number):
        text, template = prompt(i, 0)
        if i % LEAKED == 0:
            leaked = asked[i // LEAKED % evaluation]
            train.append(Item(leaked.text.upper() if i % 2 else f"{leaked.text} please", leaked.domain, f"train/{i}"))
        else:
            train.append(Item(text, f"d{template % 20}", f"train/{i}"))
    return train, asked


class Vectors:
    """Stands for a model: a unit vector for each text, near its template's centre, as prompts of one template are."""

    def __init__(self):
        self._centres = np.random.default_rng(0).normal(size=(TEMPLATES + 1, DIMENSIONS)).astype(np.float32)

    def embed(self, texts) -> np.ndarray:
        found = np.empty((len(texts), DIMENSIONS), np.float32)
        for row, text in zip(found, texts):
            text = text.removesuffix(" please").lower()
            centre = zlib.crc32(" ".join(w for w in text.split(" ")[:8] if not w.isdecimal()).encode()) % TEMPLATES
            noise = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(DIMENSIONS, np.float32)
            row[:] = self._centres[centre] + 0.6 * noise
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=1_000_000)
    parser.add_argument("--eval", type=int, default=10_000)
    parser.add_argument("--stage", choices=("text", "search", "embed"), default="text")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    stages = {"text": "[exact,key,near]", "search": "[semantic]", "embed": "[]"}[given.stage]
    config = cli.compose_config("config", None, [f"contamination.stages={stages}"]).contamination
    train, asked = rows(given.train, given.eval)
    before = peak()
    if given.stage == "embed":
        embedder = semantic.Embedder(config.model, config.batch)
        began = time.perf_counter()
        for start in range(0, len(train), semantic.BLOCK):
            embedder.embed([item.text for item in train[start : start + semantic.BLOCK]])
        found = None
    else:
        if given.stage == "search":
            semantic.Embedder = lambda *_: Vectors()
        began = time.perf_counter()
        found = ContaminationDetector(config).find(train, asked)
    seconds = time.perf_counter() - began
    result = {
        "stage": given.stage,
        "train": given.train,
        "evaluation": given.eval,
        "seconds": round(seconds, 1),
        "ms_per_1000": round(1e6 * seconds / given.train, 1),
        "peak_gib": round(peak(), 2),
        "rows_alone_gib": round(before, 2),
    }
    if found is not None:
        leaked = {f"train/{i}" for i in range(0, given.train, LEAKED)}
        caught = {match.train_id for match in found.matches}
        result |= {"leaked": len(leaked), "caught": len(leaked & caught), "others": len(caught - leaked)}
    print(json.dumps(result))
    if given.out:
        given.out.write_text(json.dumps(result))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
