"""Reading a reply: the one candidate answer that a grader then compares, found without looking at the right answer.

Every function takes time linear in the reply (regular expressions without nested or overlapping repeats, a bounded
number of JSON attempts), because most of them run inside the trainer on text that a policy under training wrote.
"""

import json
import re
import unicodedata

# A decimal number that stands free of letters; 1,000 is one number, 5.7x and 3.1.4 are none.
NUMBER = re.compile(
    r"(?<![\w.])[+-]?(?:[0-9]{1,3}(?:,[0-9]{3}){1,6}(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?(?!\w|\.[0-9])"
)
# Signs, %, <, > and other symbols that change what an answer means are not in this set.
_SURROUNDING = " \t\r\n.,;:!?\"'`“”‘’«»()[]{}*_…。、"
_SPACES = re.compile(r"\s+")
_CODE_STARTS = re.compile(r"(?:async )?def \w|class \w|import \w|from [\w.]+ import |@\w|\w+ ?= ?\S")


def answers_of(answer: object) -> list[str]:
    """The right answers of a row as stripped strings. Raises ValueError when there is none or one is empty."""
    several = answer if isinstance(answer, list | tuple) else [answer]
    texts = [str(text).strip() for text in several if text is not None]
    if not texts or not all(texts):
        raise ValueError(f"answer {answer!r} is empty: give the right answer, or a list of right answers")
    return texts


def need(meta: dict, key: str, environment: str) -> object:
    """meta[key]. Raises ValueError when it is missing or empty."""
    if not meta.get(key):
        raise ValueError(f"meta.{key} is missing or empty: environment {environment!r} reads it from each row")
    return meta[key]


def tagged(reply: str) -> str | None:
    """Content of the last <answer>...</answer>, or None."""
    end = reply.rfind("</answer>")
    start = reply.rfind("<answer>", 0, end) if end >= 0 else -1
    return reply[start + len("<answer>") : end] if start >= 0 else None


def boxed(reply: str) -> str | None:
    r"""Content of the last \boxed{...}, or None when there is none or its braces do not close."""
    start = reply.rfind("\\boxed{")
    if start < 0:
        return None
    first, depth = start + len("\\boxed{"), 1
    for at in range(first, len(reply)):
        depth += (reply[at] == "{") - (reply[at] == "}")
        if depth == 0:
            return reply[first:at]
    return None


def normalised(text: str) -> str:
    """NFKC, case folded, runs of white space made one blank, surrounding white space and punctuation taken off."""
    text = _SPACES.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    core = text.strip(_SURROUNDING)
    if core[:1].isdigit() and text[: text.find(core)].endswith("."):
        return "." + core  # .5 is not 5
    return core


def items(text: str, separator: str) -> list[str]:
    """A list without brackets, quotes and final full stop, split at `separator`, or else at , ; | line ends, blanks."""
    text = text.strip().removesuffix(".").strip("[](){} \t\r\n")
    for mark in ("\n" if "\n" in separator else separator.strip(), ",", ";", "|", "\n"):
        if mark and mark in text:
            return [item.strip(" \t\r\n\"'`[](){}") for item in text.split(mark)]
    return text.split()


def json_objects(text: str) -> list[dict]:
    """The outermost JSON objects in a text, left to right; at most 16 places are tried, so that the time is linear."""
    decoder, found, at = json.JSONDecoder(), [], 0
    for _ in range(16):
        at = text.find("{", at)
        if at < 0:
            break
        try:
            value, at = decoder.raw_decode(text, at)
            found.append(value)
        except (ValueError, RecursionError):
            at += 1
    return found


def programs(reply: str, entry: str) -> list[str]:
    """What may be the program: the reply itself, the last fenced block that names `entry`, or its lines of code."""
    fenced = [block.partition("\n")[2] for block in reply.split("```")[1::2]]
    naming = [block for block in fenced if entry in block]
    lines = reply.split("\n")
    starts = [at for at, line in enumerate(lines) if _CODE_STARTS.match(line)]
    inside = [at for at, line in enumerate(lines) if line[:1] in (" ", "\t") and line.strip()]
    unfenced = ["\n".join(lines[starts[0] : max(starts + inside) + 1])] if starts and not fenced else []
    return [reply.strip(), *(naming or fenced)[-1:], *unfenced]
