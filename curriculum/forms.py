r"""The form of a domain's prompts, where it is known: a regular expression simple enough to be drawn from.

    copy: [a-z]{5}          largest: \d{1,2}( \d{1,2}){2}          is it (hot|cold) in [A-Z][a-z]{3,6}\?

Literal characters, \ before one that means something else, \d, classes with ranges, groups with alternatives, and
behind each of these {n}, {m,n} or ?. Left out: *, + and ., which have no largest number of draws or no alphabet, and
^ in a class.
"""

import random
import re
import string
from collections.abc import Sequence
from typing import NamedTuple

SPECIAL = frozenset("\\[](){}|?*+.^$")
_COUNT = re.compile(r"\{(\d{1,3})(?:,(\d{1,3}))?\}")


class Part(NamedTuple):
    """One of `options`, each a character or a sequence of parts, `least` to `most` times."""

    options: tuple
    least: int = 1
    most: int = 1


def check(form: str) -> None:
    """Raises ValueError, one line that begins with the form and the character that does not fit."""
    _read(form)


def matches(form: str, text: str) -> bool:
    return re.fullmatch(form, text, re.ASCII) is not None


def draw(form: str, rng: random.Random) -> str:
    """A text of the form: numbers of repetitions and alternatives are equally likely each."""
    return _draw(_read(form), rng)


def _draw(options: Sequence, rng: random.Random) -> str:
    chosen = rng.choice(options)
    if isinstance(chosen, str):
        return chosen
    return "".join(_draw(part.options, rng) for part in chosen for _ in range(rng.randint(part.least, part.most)))


def _read(form: str) -> tuple:
    options, at = _alternatives(form, 0)
    if at < len(form):
        raise _wrong(form, at, "closes no group")
    return options


def _alternatives(form: str, at: int) -> tuple[tuple, int]:
    """(the alternatives from `at` on, where they end: at ) or the end of the form)"""
    found, parts = [], []
    while at < len(form) and form[at] != ")":
        if form[at] == "|":
            found.append(tuple(parts))
            parts, at = [], at + 1
            continue
        options, at = _one(form, at)
        part, at = _repeated(form, options, at)
        parts.append(part)
    return (*found, tuple(parts)), at


def _one(form: str, at: int) -> tuple[tuple, int]:
    sign = form[at]
    if sign == "(":
        options, end = _alternatives(form, at + 1)
        if end == len(form):
            raise _wrong(form, at, "is never closed")
        return options, end + 1
    if sign == "[":
        return _class(form, at)
    if sign == "\\":
        return _escaped(form, at)
    if sign in SPECIAL:
        raise _wrong(form, at, "has no meaning here: write \\ before it, or {m,n} for repetition")
    return (sign,), at + 1


def _escaped(form: str, at: int) -> tuple[tuple, int]:
    after = form[at + 1 : at + 2]
    if after == "d":
        return tuple(string.digits), at + 2
    if not after or after.isalnum():
        raise _wrong(form, at, "stands before one of \\ [ ] ( ) { } | ? * + . ^ $ - or d")
    return (after,), at + 2


def _class(form: str, at: int) -> tuple[tuple, int]:
    """Of [a-z0-9]: its characters."""
    start, chars = at, []
    at += 1
    while at < len(form) and form[at] != "]":
        if form[at] in "^[" or (form[at] == "-" and (not chars or form[at + 1 : at + 2] == "]")):
            raise _wrong(form, at, "in a class needs \\ before it")
        if form[at] == "-":
            last, at = _char(form, at + 1)
            if ord(last) < ord(chars[-1]):
                raise _wrong(form, at - 1, "ends a range that runs backwards")
            chars += [chr(code) for code in range(ord(chars[-1]) + 1, ord(last) + 1)]
            continue
        if form[at : at + 2] == "\\d":
            chars, at = [*chars, *string.digits], at + 2
            continue
        char, at = _char(form, at)
        chars.append(char)
    if at == len(form) or not chars:
        raise _wrong(form, start, "opens a class that is empty or never closed")
    return tuple(dict.fromkeys(chars)), at + 1


def _char(form: str, at: int) -> tuple[str, int]:
    if form[at : at + 1] == "\\":
        (char, *_), end = _escaped(form, at)
        return char, end
    if at >= len(form):
        raise _wrong(form, at - 1, "opens a range that never ends")
    return form[at], at + 1


def _repeated(form: str, options: tuple, at: int) -> tuple[Part, int]:
    if form[at : at + 1] == "?":
        return Part(options, 0, 1), at + 1
    if form[at : at + 1] != "{":
        return Part(options), at
    found = _COUNT.match(form, at)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if least > most:
        raise _wrong(form, at, "must begin {n} or {m,n}, n at least m")
    return Part(options, least, most), found.end()


def _wrong(form: str, at: int, why: str) -> ValueError:
    return ValueError(f"{form!r}: character {at + 1}, {form[at : at + 1]!r}, {why}")
