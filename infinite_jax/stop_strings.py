"""Stop strings, found on the device: the automaton of Aho and Corasick (1975) with whole tokens for its letters.

A state is how much of a stop string the turn's text ends with; the table says where each token leads from there. So a
row stops by itself at the token that completes "</search>", however it was cut into tokens, and the host is asked when
there is something to do. What a token has behind the string stays in the turn: sampled ids are never cut.

A token's text is what it adds to the decoded text behind another; special tokens add none. Left out: stop strings with
characters that the tokenizer cuts into bytes; such a turn ends as others do.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models import tokenizer as chat

FOUND, NEVER = 0, 1  # states: a stop string is complete; this turn has none to look for
Stops = tuple[str, ...]


class StopTable(NamedTuple):
    next_XV: np.ndarray  # i16, the state after each token
    start: dict[Stops, int]  # the state in which a turn with these stop strings begins


def build(tokenizer, vocab_size: int, wanted: Sequence[Stops]) -> StopTable:
    """The table of all sets of stop strings of a run; an empty set is known in any case.

    Raises ValueError for a stop string that is empty.
    """
    sets = sorted({tuple(stops) for stops in wanted} - {()})
    for stops in sets:
        if not all(stops):
            raise ValueError(f"stop strings {stops!r}: an empty one would end a turn before it begins; leave it out")
    known = np.tile(np.array([[FOUND], [NEVER]], np.int16), (1, vocab_size))
    texts = _texts(tokenizer, vocab_size) if sets else []
    parts, start = [known], {(): NEVER}
    for stops in sets:
        first = sum(map(len, parts))
        start[stops] = first
        parts.append(_transitions(stops, texts, first))
    return StopTable(np.concatenate(parts), start)


def _texts(tokenizer, vocab_size: int) -> list[str]:
    """What each id adds to a text; nothing for ids that the tokenizer does not know."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = len(chat.decode(tokenizer, anchor))
    known = min(vocab_size, len(tokenizer))
    return [chat.decode(tokenizer, [*anchor, i])[before:] for i in range(known)] + [""] * (vocab_size - known)


def _transitions(stops: Stops, texts: Sequence[str], first: int) -> np.ndarray:
    """i16 [states, V]; state `first` is the empty text, the others the beginnings of the stop strings."""
    beginnings = sorted(
        {stop[:size] for stop in stops for size in range(len(stop))}, key=lambda text: (len(text), text)
    )
    number = {text: first + place for place, text in enumerate(beginnings)}

    def after(text: str) -> int:
        if any(text.endswith(stop) for stop in stops):
            return FOUND
        return next(number[text[at:]] for at in range(len(text) + 1) if text[at:] in number)

    letters = {letter: place for place, letter in enumerate(sorted({*"".join(stops)}), 1)}  # 0: any other
    step_XA = np.full((first + len(beginnings), len(letters) + 1), first, np.int16)
    step_XA[FOUND], step_XA[NEVER] = FOUND, NEVER
    for text in beginnings:
        step_XA[number[text], 1:] = [after(text + letter) for letter in letters]
    found_XV = np.repeat(np.arange(first, first + len(beginnings), dtype=np.int16)[:, None], len(texts), axis=1)
    longest = max(map(len, texts), default=0)
    for place in range(longest):
        at = np.array([v for v, text in enumerate(texts) if len(text) > place])
        found_XV[:, at] = step_XA[found_XV[:, at], [letters.get(texts[v][place], 0) for v in at]]
    return found_XV
