"""The rounds in which rehearsal fills its domains: write, read, deduplicate, answer, keep, check for contamination.

A domain asks M0's own sources first. A source that gave a domain nothing in a round is not asked again for it; when M0
has nothing more to give, the form fills what is missing. What the check drops is asked for again. It comes last because
it costs most: it embeds every evaluation prompt each time. `Tools` is all that a round may use: no evaluation row is
among it.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from curriculum import forms, rehearsed
from curriculum.rehearsed import Frame
from curriculum.upgrade import RehearsalConfig
from rubric import majority
from rubric.evaluator import FIXED, PASS_GRADE

PREFIX, DESCRIBED, FORM = "prefix", "described", "form"
# Why a written prompt is dropped, in the order of the stages.
DROPPED = ("unended", "unread", "duplicate", "too_long", "disputed", "failed", "contaminated")
NOT_GRADED = "not graded"  # the answer of rows where nothing is rewarded
EXAMPLES = 3  # texts of each outcome in the report


class Tools(NamedTuple):
    m0: object  # open_turn, ask, answer, fits: rehearsal_model.M0
    contaminated: Callable[[list[tuple[Frame, str]]], list[bool]]
    needs_answer: Callable[[Frame], bool]
    grade: Callable[[list[int], list[dict], list[str]], np.ndarray]  # domains' numbers, rows, replies -> f32, NaN
    nearest: Callable[[list[str]], list[str]]  # texts -> names of domains, "" for none
    key: jax.Array


class Kept:
    """What has come of one domain so far."""

    def __init__(self, frame: Frame, number: int):
        self.frame, self.number = frame, number  # among the run's domains
        self.rows: list[dict] = []
        self.checked = 0  # of them, for contamination
        self.counts: dict[str, Counter] = {}  # by source, of "written", "kept" and DROPPED
        self.examples: dict[str, list[str]] = defaultdict(list)
        self.reasons: dict[str, int] = {}  # why its grader gave no grade
        self.tries, self.barren = Counter(), set()
        self.seen: set[str] = set()  # wordings
        rehearsed.fresh((turn["content"] for turn in frame.turns if turn["role"] == "user"), self.seen)

    def next(self, config: RehearsalConfig) -> list[str]:
        """The sources of the next round; none when it has enough or nothing is left to try."""
        if len(self.rows) >= config.prompts:
            return []
        own = [PREFIX] + [DESCRIBED] * bool(self.frame.description)
        left = [source for source in own if source not in self.barren and self.tries[source] < config.attempts]
        if left or not self.frame.form:
            return left
        return [FORM] * (FORM not in self.barren and self.tries[FORM] < config.attempts)

    def count(self, source: str, outcome: str) -> int:
        return self.counts.get(source, Counter())[outcome]

    def tally(self, source: str, outcome: str, text: str) -> None:
        self.counts.setdefault(source, Counter())[outcome] += 1
        if outcome != "written" and len(self.examples[outcome]) < EXAMPLES:
            self.examples[outcome].append(text)

    def keep(self, source: str, text: str, answer: object, by: str, share: float | None) -> None:
        """by: rubric | agreement | distillation; share: of M0's replies that pass or agree."""
        self.tally(source, "kept", f"{text} -> {answer}")
        row = rehearsed.row(self.frame, text, answer, source=source, by=by, agreement=share)
        if by == "distillation":
            row["meta"][FIXED] = 4
        self.rows.append(row)

    def report(self) -> dict:
        by = Counter(row["meta"]["rehearsal"]["by"] for row in self.rows)
        shares = [row["meta"]["rehearsal"]["agreement"] for row in self.rows]
        shares = [share for share in shares if share is not None]
        return {
            "rows": len(self.rows),
            "kept_by_rubric": by["rubric"],
            "kept_by_agreement": by["agreement"],
            "kept_for_distillation": by["distillation"],
            "agreement": float(np.mean(shares)) if shares else None,
            "answers": len({repr(row["answer"]) for row in self.rows}),  # different ones
            "sources": {
                source: {key: counts[key] for key in ("written", *DROPPED, "kept")}
                for source, counts in self.counts.items()
            },
            "not_graded": self.reasons,
            "examples": dict(self.examples),
        }


class Written(NamedTuple):
    kept: Kept
    source: str
    text: str


def run(config: RehearsalConfig, kept: Sequence[Kept], tools: Tools) -> None:
    """Fills `kept`, at most config.prompts rows each. The key is consumed."""
    number = 0
    while True:
        while asked := [(each, source) for each in kept for source in each.next(config)]:
            _round(config, asked, tools._replace(key=jax.random.fold_in(tools.key, number)))
            number += 1
        if all(each.checked == len(each.rows) for each in kept):
            break
        _clean(kept, tools)
    for each in kept:
        order = (PREFIX, DESCRIBED, FORM)
        each.rows.sort(key=lambda row: order.index(row["meta"]["rehearsal"]["source"]))
        del each.rows[config.prompts :]


def _round(config: RehearsalConfig, asked: Sequence[tuple[Kept, str]], tools: Tools) -> None:
    answered_key, *keys = jax.random.split(tools.key, 1 + len(asked))
    before = [each.count(source, "kept") for each, source in asked]
    written = _fresh(_write(config, asked, tools, keys), tools)
    if config.reward == "none":
        for each in written:
            each.kept.keep(each.source, each.text, NOT_GRADED, "distillation", None)
    else:
        _answer(config, written, tools, answered_key)
    for (each, source), had in zip(asked, before):
        each.tries[source] += 1
        if each.count(source, "kept") == had:
            each.barren.add(source)


def _write(config: RehearsalConfig, asked, tools: Tools, keys) -> list[Written]:
    """What the sources give, as far as it can be read as a prompt of the domain."""
    found, bare, bare_key = [], [], None
    for (each, source), key in zip(asked, keys):
        if source == FORM:
            rng = random.Random(int(jax.random.bits(key)))
            texts = [forms.draw(each.frame.form, rng) for _ in range(config.prompts)]
            for text in texts:
                each.tally(source, "written", text)
            found += [Written(each, source, text) for text in texts]
        elif source == PREFIX and not each.frame.turns:
            bare.append(each)
            bare_key = key if bare_key is None else bare_key
        else:
            if source == PREFIX:
                replies = tools.m0.open_turn(each.frame.turns, config.prompts, key)
            else:
                replies = tools.m0.ask(rehearsed.request(each.frame), config.prompts, key)
            found += _read(each, source, replies)
    if bare:  # they open the same turn, so it is sampled once
        replies = tools.m0.open_turn((), config.prompts, bare_key)
        owners = _owners([reply.text.strip() for reply in replies], bare, tools)
        for each in bare:
            found += _read(each, PREFIX, replies, [owner is each for owner in owners])
    return found


def _read(each: Kept, source: str, replies: Sequence, owned: Sequence[bool] | None = None) -> list[Written]:
    """The prompts in replies; owned: which of them are the domain's, None = all."""
    found = []
    for n, reply in enumerate(replies):
        text = rehearsed.parse(reply.text) if source == DESCRIBED else reply.text.strip()
        each.tally(source, "written", reply.text)
        if not reply.ended:
            each.tally(source, "unended", reply.text)
        elif not text or not (owned is None or owned[n]) or not _formed(each.frame, text):
            each.tally(source, "unread", reply.text)
        else:
            found.append(Written(each, source, text))
    return found


def _formed(frame: Frame, text: str) -> bool:
    return frame.form is None or forms.matches(frame.form, text)


def _owners(texts: Sequence[str], bare: Sequence[Kept], tools: Tools) -> list[Kept | None]:
    """Of texts written without any hint: the one domain whose form each has, else that of the nearest description."""
    owners = []
    for text in texts:
        of = [each for each in bare if each.frame.form and forms.matches(each.frame.form, text)]
        owners.append(of[0] if len(of) == 1 else None)
    by_name = {each.frame.name: each for each in bare if not each.frame.form}
    unowned = [n for n, owner in enumerate(owners) if owner is None and texts[n]] if by_name else []
    if unowned:
        for n, name in zip(unowned, tools.nearest([texts[n] for n in unowned])):
            owners[n] = by_name.get(name)
    return owners


def _fresh(written: list[Written], tools: Tools) -> list[Written]:
    """Without repetitions and what is too long to train on."""
    found = []
    for each in written:
        if not rehearsed.fresh([each.text], each.kept.seen)[0]:
            each.kept.tally(each.source, "duplicate", each.text)
        elif not tools.m0.fits(rehearsed.row(each.kept.frame, each.text)["messages"]):
            each.kept.tally(each.source, "too_long", each.text)
        else:
            found.append(each)
    return found


def _clean(kept: Sequence[Kept], tools: Tools) -> None:
    """Drops of the rows not yet checked what the gate takes for an evaluation prompt."""
    new = [(each, row) for each in kept for row in each.rows[each.checked :]]
    flagged = tools.contaminated([(each.frame, row["messages"][-1]["content"]) for each, row in new])
    for each in kept:
        del each.rows[each.checked :]
    for (each, row), is_flagged in zip(new, flagged, strict=True):
        if not is_flagged:
            each.rows.append(row)
            continue
        source = row["meta"]["rehearsal"]["source"]
        each.counts[source]["kept"] -= 1
        each.tally(source, "contaminated", row["messages"][-1]["content"])
    for each in kept:
        each.checked = len(each.rows)


def _answer(config: RehearsalConfig, written: list[Written], tools: Tools, key: jax.Array) -> None:
    """Adds the rows that are kept."""
    if not written:
        return
    asked = [rehearsed.row(each.kept.frame, each.text)["messages"] for each in written]
    answered = tools.m0.answer(asked, key)
    # replies as answers, or as they are where the rubric needs none: each against each is then a column
    choices, by_answer = [], [tools.needs_answer(each.kept.frame) for each in written]
    for each, replies, needed in zip(written, answered, by_answer):
        frame = each.kept.frame
        if needed:
            read = [majority.candidate(frame.environment, reply.text) if reply.ended else None for reply in replies]
            choices.append(majority.distinct(read))
        else:
            choices.append([None])
    domain_B, rows, texts = [], [], []
    for each, replies, answers in zip(written, answered, choices):
        for answer in answers:
            row = rehearsed.row(each.kept.frame, each.text, answer)
            domain_B += [each.kept.number] * len(replies)
            rows += [row] * len(replies)
            texts += [reply.text if reply.ended else "" for reply in replies]  # cut off: it says nothing
    grade_B, at = tools.grade(domain_B, rows, texts), 0
    for each, replies, answers, needed in zip(written, answered, choices, by_answer):
        grade_AN = grade_B[at : at + len(answers) * len(replies)].reshape(len(answers), len(replies))
        at += grade_AN.size
        found = majority.majority(answers, grade_AN) if needed else _judged(replies, grade_AN[0])
        _keep(config, each, found, by_rubric=not needed)


def _judged(replies: Sequence, grade_N: np.ndarray) -> majority.Majority:
    """The best reply, and the share that passes; none where a reply could not be graded or none passes."""
    if np.isnan(grade_N).any() or not (grade_N >= PASS_GRADE).any():
        return majority.Majority(None, 0.0)
    return majority.Majority(replies[int(grade_N.argmax())].text.strip() or None, float((grade_N >= PASS_GRADE).mean()))


def _keep(config: RehearsalConfig, each: Written, found: majority.Majority, by_rubric: bool) -> None:
    if found.answer is None:
        each.kept.tally(each.source, "failed", each.text)
    elif not by_rubric and found.share < config.agreement:
        each.kept.tally(each.source, "disputed", each.text)
    else:
        by = "rubric" if by_rubric else "agreement"
        each.kept.keep(each.source, each.text, found.answer, by, found.share)
