"""Grader of instructions about form: all in capitals, with a given word, in one sentence, ...

A check looks at one property only, so a reply of one repeated word would satisfy many; such replies are sorted out
first (see `degenerate`). Words are runs of letters and digits; text without blanks between words counts as one word.
"""

import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache

from rubric.reading import need

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_QUOTES = " \t\r\n\"'`“”‘’«»*_"
_WINDOW = 50  # words; ordinary English uses about 40 different ones in 50


@lru_cache(maxsize=4)  # several checks ask for the words of one reply
def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def sentences(text: str) -> int:
    """Runs of words that end in . ! ? or … before a blank or the end; a last one without such a mark counts too."""
    ends = [token.rstrip("\"'”’»)*_").endswith((".", "!", "?", "…")) for token in text.split()]
    return sum(ends) + (not ends[-1]) if ends else 0


def _has(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", text.casefold()) is not None


CHECKS: dict[str, Callable[[str, dict], bool]] = {
    "uppercase": lambda text, want: text.isupper(),
    "lowercase": lambda text, want: text.islower(),
    "no_commas": lambda text, want: "," not in text,
    "no_digits": lambda text, want: not any(map(str.isdigit, text)),
    "contains": lambda text, want: _has(text, want["word"]),
    "excludes": lambda text, want: not _has(text, want["word"]),
    "sentences": lambda text, want: sentences(text) == want["n"],
    "max_words": lambda text, want: len(words(text)) <= want["n"],
    "min_words": lambda text, want: len(words(text)) >= want["n"],
    "starts_with": lambda text, want: text.startswith(want["text"]),
    "ends_with": lambda text, want: text.endswith(want["text"]),
}

# The field of a constraint that says how, "" where there is none.
ARGUMENTS = {kind: "" for kind in CHECKS} | {
    "contains": "word",
    "excludes": "word",
    "sentences": "n",
    "max_words": "n",
    "min_words": "n",
    "starts_with": "text",
    "ends_with": "text",
}


def degenerate(text: str, wanted: list[dict]) -> bool:
    """Whether a text is no attempt at writing: it cannot pass, whatever the checks say.

    That is: fewer than three words (or than max_words, if that is less); besides the words it was told to contain
    fewer than two different words of two letters or more (or than max_words leaves room for); or a stretch of 50
    words, or the whole of a shorter text, of which less than half are different.
    """
    said = words(text)
    told = {part for want in wanted if want["kind"] == "contains" for part in words(want["word"])}
    room = min((want["n"] for want in wanted if want["kind"] == "max_words"), default=len(said) + 3)
    own = {word for word in said if len(word) >= 2} - told
    if len(said) < min(3, room) or len(own) < min(2, room - len(told)):
        return True
    stretches = (said[at : at + _WINDOW] for at in range(0, len(said), _WINDOW))
    return any(2 * len(set(stretch)) < len(stretch) for stretch in stretches)


def checked(wanted: list[dict]) -> list[dict]:
    """`wanted`, if all its kinds are known. Raises ValueError."""
    for want in wanted:
        if want.get("kind") not in CHECKS:
            near = get_close_matches(str(want.get("kind")), CHECKS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"kinds are {', '.join(CHECKS)}"
            raise ValueError(f"meta.constraints has the unknown kind {want.get('kind')!r}: {hint}")
    return wanted


def constraints(reply: str, answer: object, meta: dict) -> int:
    """meta["constraints"] = [{"kind": ..., "word" | "n" | "text": ...}, ...], kinds as in CHECKS; `answer` is not read.

    4 all hold for the reply but for outer white space; 3 all hold once surrounding quotes and emphasis marks are taken
    off, or for its first line alone (a remark follows); 2 at least half hold; 1 else, and for every `degenerate` reply.
    """
    wanted = checked(need(meta, "constraints", "constraints"))
    text = reply.strip()
    best = 1
    for form in dict.fromkeys((text, text.strip(_QUOTES), text.split("\n", 1)[0].strip(_QUOTES))):
        if degenerate(form, wanted):
            continue
        held = sum(CHECKS[want["kind"]](form, want) for want in wanted)
        if held == len(wanted):
            return 4 if form == text else 3
        if 2 * held >= len(wanted):
            best = 2
    return best
