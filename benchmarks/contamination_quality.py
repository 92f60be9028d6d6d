"""How well the contamination gate tells the same question from another one, canonical keys off.

    python -m benchmarks.contamination_quality [--seeds 4 5 6] [--part fresh|judge|tune] [--cases 1200]

A case is an evaluation prompt, and whether it was leaked into the training rows: verbatim, edited (case, punctuation,
spacing), paraphrased (another wording, the same content), or not: another instance of a template that training has, or
a prompt of a kind that training has not. Training holds 40 rows of each template beside what was leaked. A case counts
as detected where any training row matches it. Wordings lie in contamination_wordings.py, in three parts of different
tasks: the rule was tuned on `tune` with seed 0, then judged on `judge`, seeds 1 to 3; three faults that this showed
were mended, and it was judged again on `fresh`, written afterwards and not looked at before.

Compared with the same cases: cosine >= 0.95 alone, exact hash alone, word 3-gram Jaccard >= 0.9 alone, MinHash/LSH at
0.8 alone. Intervals are Wilson's, 95 %, over cases. The hard part is paraphrases and same-template negatives.
Beside the sum, of its own kind: the same slots under another task's wording, which must not be flagged either; one word
misspelt, and a polite phrase added, which must.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from benchmarks import contamination_wordings as wordings
from configs import cli
from curriculum import semantic
from curriculum.contamination import ContaminationDetector, Item
from curriculum.near import Near
from curriculum.wording import normalise, read, shingles
from infinite_jax.statistics import wilson

POSITIVE = ("exact", "edit", "paraphrase")
HARD = ("paraphrase", "template")
BESIDE = {"task": False, "typo": True, "polite": True}  # whether it is contamination
TRAINED = 40  # rows of a template


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument("--part", choices=("tune", "judge", "fresh"), default="fresh")
    parser.add_argument("--cases", type=int, default=1200, help="a seed; a fifth of each kind")
    parser.add_argument("--errors", action="store_true", help="prints what the gate got wrong")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="contamination.key=value")
    given = parser.parse_args()
    config = cli.compose_config("config", None, given.overrides).contamination
    embed = remembered(semantic.Embedder(config.model, config.batch).embed)
    found = defaultdict(list)  # detector -> (kind, truth, verdict) of all seeds
    for seed in given.seeds:
        train, cases = make(given.part, seed, given.cases)
        for name, verdicts in detectors(config, embed, train, cases).items():
            found[name] += [(kind, truth, bool(said)) for (kind, truth, _), said in zip(cases, verdicts)]
            if given.errors and name == "gate":
                show_errors(train, cases, verdicts)
    rows = {name: scores(judged) for name, judged in found.items()}
    print(f"part {given.part}, seeds {given.seeds}, {len(found['gate'])} cases")
    for name, row in rows.items():
        print(f"{name:<18} " + "  ".join(f"{key} {value}" for key, value in row.items()))
    if given.out:
        given.out.write_text(json.dumps({"part": given.part, "seeds": given.seeds, "rows": rows}, indent=1))


def make(part: str, seed: int, number: int) -> tuple[list[Item], list[tuple[str, bool, Item]]]:
    """(training rows, cases of (kind, whether contamination, evaluation row)); the rows in random order."""
    rng = random.Random(f"{part} {seed}")
    tasks, train, cases = wordings.PARTS[part], [], []
    used = defaultdict(set)
    for task in tasks:
        for _ in range(TRAINED):
            train.append((task.name, task.base.format(**fresh(task, rng, used[task.name]))))
    each = number // 5
    for kind in ("exact", "edit", "paraphrase", "template", *BESIDE):
        for i in range(each if kind not in BESIDE else each // 2):
            task = tasks[i % len(tasks)]
            content = fresh(task, rng, used[task.name])
            asked = task.base.format(**content)
            text = asked
            if kind == "edit":
                text = edited(asked, rng)
            elif kind == "paraphrase":
                text = rng.choice(task.others).format(**content)
            elif kind == "typo":
                text = misspelt(asked, rng)
            elif kind == "polite":
                text = rng.choice(wordings.POLITE[part]).format(asked)
            elif kind == "task":
                if not task.twins:
                    continue
                text = rng.choice(task.twins).format(**content)
            leaked = kind in POSITIVE or kind in BESIDE  # the twin's own content was trained on, under the base task
            if leaked:
                train.append((task.name, asked))
            cases.append((kind, BESIDE.get(kind, kind in POSITIVE), task.name, text))
    for i in range(each):
        cases.append(("unrelated", False, "other", wordings.unrelated(part, i, rng)))
    rng.shuffle(train)
    rng.shuffle(cases)
    return (
        [Item(text, name, f"{name}/train/{i}") for i, (name, text) in enumerate(train)],
        [(kind, truth, Item(text, name, f"{name}/test/{i}")) for i, (kind, truth, name, text) in enumerate(cases)],
    )


def fresh(task, rng: random.Random, used: set) -> dict:
    """Content that this task has not had."""
    while True:
        content = task.draw(rng)
        key = task.key(content)
        if key not in used:
            used.add(key)
            return content


def edited(text: str, rng: random.Random) -> str:
    """Another case, other punctuation at the end or between words, other spacing."""
    how = rng.randrange(4)
    if how == 0:
        return rng.choice([text.upper(), text.lower(), text.title() if "'" not in text else text.lower()])
    if how == 1:
        return text.rstrip("?.! ") + rng.choice(["", " ?", "...", "!!", "??"])
    if how == 2:
        return "  ".join(text.split(" ")) + "\n"
    return text.replace(", ", " , ").replace("'", '"').replace(":", " :")


def misspelt(text: str, rng: random.Random) -> str:
    """Two inner letters of one long word of the question's frame exchanged."""
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if word.isalpha() and word.islower() and len(word) >= 5]
    if not places:
        return text.lower()
    place = rng.choice(places)
    word, at = words[place], rng.randrange(1, len(words[place]) - 2)
    words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def remembered(embed):
    known = {}

    def cached(texts):
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, embed(new)))
        return np.stack([known[text] for text in texts])

    return cached


def detectors(config, embed, train: list[Item], cases: list) -> dict[str, list[bool]]:
    evaluation = [item for _, _, item in cases]
    texts, asked = [item.text for item in train], [item.text for item in evaluation]
    detector = ContaminationDetector(config)
    original, semantic.Embedder = semantic.Embedder, lambda *_: type("Cached", (), {"embed": staticmethod(embed)})
    try:
        by_eval = gate(detector, train, evaluation)
    finally:
        semantic.Embedder = original
    cosine = (embed(asked) @ embed(texts).T).max(1)
    hashes = {normalise(text) for text in texts}
    words_T, words_E = [read(text) for text in texts], [read(text) for text in asked]
    near = {e for _, e, _ in Near(words_E, 3, 0.8).pairs(words_T)}
    return {
        "gate": [i in by_eval for i in range(len(evaluation))],
        "cosine >= 0.95": list(cosine >= 0.95),
        "hash": [normalise(text) in hashes for text in asked],
        "3-gram >= 0.9": ngram(words_T, words_E, 0.9),
        "MinHash 0.8": [i in near for i in range(len(evaluation))],
    }


def gate(detector: ContaminationDetector, train: list[Item], evaluation: list[Item]) -> set[int]:
    """Numbers of evaluation prompts that a training row matches. find() names one match a training row, so that those
    it names are set aside and the rest is asked for again, until nothing is found."""
    left, caught = list(range(len(evaluation))), set()
    while left:
        matches = detector.find(train, [evaluation[i] for i in left]).matches
        named = {match.eval_id for match in matches}
        new = {i for i in left if evaluation[i].id in named}
        if not new:
            break
        caught |= new
        left = [i for i in left if i not in new]
    return caught


def ngram(train, evaluation, least: float) -> list[bool]:
    sets = [shingles(text.tokens, 3) for text in train]
    having = defaultdict(set)
    for number, found in enumerate(sets):
        for shingle in found:
            having[shingle].add(number)
    verdicts = []
    for text in evaluation:
        own = shingles(text.tokens, 3)
        shared = Counter(number for shingle in own for number in having[shingle])
        verdicts.append(any(n / (len(own) + len(sets[t]) - n) >= least for t, n in shared.items()))
    return verdicts


def scores(judged: list[tuple[str, bool, bool]]) -> dict[str, str]:
    def share(kept) -> str:
        right = [truth == said for kind, truth, said in judged if kept(kind)]
        low, high = wilson(sum(right), len(right))
        return f"{np.mean(right):.3f} [{low:.3f}, {high:.3f}]"

    def flagged(kind: str) -> str:
        said = [verdict for found, _, verdict in judged if found == kind]
        low, high = wilson(sum(said), len(said))
        return f"{np.mean(said):.3f} [{low:.3f}, {high:.3f}]"

    summed = [(truth, said) for kind, truth, said in judged if kind not in BESIDE]
    caught = sum(truth and said for truth, said in summed)
    return {
        "accuracy": share(lambda kind: kind not in BESIDE),
        "hard": share(lambda kind: kind in HARD),
        "precision": f"{caught / max(sum(said for _, said in summed), 1):.3f}",
        "recall": f"{caught / sum(truth for truth, _ in summed):.3f}",
        **{f"flagged {kind}": flagged(kind) for kind in (*POSITIVE, "template", "unrelated", *BESIDE)},
    }


def show_errors(train, cases, verdicts) -> None:
    by_domain = defaultdict(list)
    for item in train:
        by_domain[item.domain].append(item.text)
    for (kind, truth, item), said in zip(cases, verdicts):
        if truth != bool(said):
            print(f"  {kind:<10} {item.domain:<12} {'missed' if truth else 'flagged'}: {item.text!r}")


if __name__ == "__main__":
    main()
