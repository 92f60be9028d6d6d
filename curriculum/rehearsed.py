"""Prompts that a model writes for a domain whose rows are lost: what it is told, and what is read off its text.

What it is told is a Frame: the domain's description and form as configured, and what all of its evaluation rows share
before and beside their questions: earlier turns, such as solved examples, and the grader's meta. A question, the last
message of a row, is never looked at here, and no answer.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from curriculum import wording
from curriculum.domains import Domain

ASK = (
    "Write one new exercise of this kind: {description}{examples}\nReply with the exercise alone, without its solution."
)
_LEAD = re.compile(r"\A(?:sure|certainly|here)\b[^\n]*:\s*\n+", re.IGNORECASE)
_LABEL = re.compile(
    r"\A[*#\s]*(?:(?:new|the) )?(?:exercise|question|task|problem|prompt|instruction)(?: \d+)?\s*:[*\s]*", re.IGNORECASE
)
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "«": "»"}


class Frame(NamedTuple):
    name: str
    environment: str
    description: str | None
    form: str | None
    turns: tuple[dict[str, str], ...]  # before the question, the same in all evaluation rows; () where they differ
    meta: dict[str, Any]  # of the grader, as far as it is the same in all evaluation rows


def frame(domain: Domain) -> Frame:
    rows, config = domain.test_rows, domain.config
    turns = _shared([row["messages"][:-1] for row in rows]) or ()
    metas = [row.get("meta") or {} for row in rows]
    shared = {key: _shared([meta.get(key) for meta in metas]) for key in metas[0]}
    meta = {key: value for key, value in shared.items() if value is not None}
    return Frame(domain.name, config.environment, config.description, config.form, tuple(turns), meta)


def _shared(values: Sequence[Any]) -> Any:
    """The value that all have, None where they differ or one row is all there is."""
    texts = {json.dumps(value, sort_keys=True) for value in values}
    return values[0] if len(values) > 1 and len(texts) == 1 else None


def request(frame: Frame) -> list[dict[str, str]]:
    """The messages that ask for a new prompt by the domain's description; examples are those that its rows show."""
    shown = [turn["content"] for turn in frame.turns if turn["role"] == "user"]
    examples = "".join(f"\n- {text}" for text in shown)
    text = ASK.format(description=frame.description, examples=f"\nExamples:{examples}" if shown else "")
    return [{"role": "user", "content": text}]


def parse(reply: str) -> str:
    """The prompt in a reply to `request`, "" where there is none: without a leading line, a label, quotes around it."""
    text = _LABEL.sub("", _LEAD.sub("", reply.strip())).strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[-1] not in text[1:-1]:
        text = text[1:-1].strip()
    return text if re.search(r"\w", text) else ""


def fresh(texts: Iterable[str], seen: set[str]) -> list[bool]:
    """Whether each text is the first of its wording; case, punctuation and spacing apart. `seen` grows."""
    found = []
    for text in texts:
        normalised = wording.normalise(text)
        found.append(normalised not in seen)
        seen.add(normalised)
    return found


def row(frame: Frame, prompt: str, answer: Any = None, **about: Any) -> dict[str, Any]:
    """A training row; `about` says in its meta how it came to be."""
    messages = [*frame.turns, {"role": "user", "content": prompt}]
    return {"messages": messages, "answer": answer, "meta": {**frame.meta, **({"rehearsal": about} if about else {})}}
