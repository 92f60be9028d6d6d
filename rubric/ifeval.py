"""Instruction checks of IFEval (Zhou et al. 2023, arXiv 2311.07911): its 25 kinds, by its ids and its arguments.

A row holds, as the suite is published, meta = {"instruction_id_list": [id, ...], "kwargs": [{argument: value}, ...]}.
Strict: the reply as it is. Loose: one of eight forms of it will do, with and without its first line, its last line and
its asterisks. `null` arguments are as good as missing.

Different from the paper's code, which needs nltk's data: sentences end as in rubric/constraints.py, words in capitals
are runs of letters and digits, a keyword is a text, not a pattern, and the checks of case do not ask for English. The
reply's language is guessed by py3langid instead of langdetect.
"""

import json
import re
from collections.abc import Callable
from difflib import get_close_matches

from rubric.constraints import sentences
from rubric.reading import need

Found = tuple[float, dict[str, float]]

_WORD = re.compile(r"\w+")
_STARS = re.compile(r"\*[^\n*]*\*")
_TWO_STARS = re.compile(r"\*\*[^\n*]*\*\*")
_BULLET = re.compile(r"^[^\S\n]*(?:\*[^*\n]|-)", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\[[^\]\n]*\]")
_TITLE = re.compile(r"<<[^\n<>]+>>")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _holds(number: int, relation: str | None, wanted: int) -> bool:
    if relation not in (None, "at least", "less than"):
        raise ValueError(f"meta.kwargs: relation {relation!r}: use 'at least' or 'less than'")
    return number < wanted if relation == "less than" else number >= wanted


def _has(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", text.casefold()) is not None


def _paragraphs(text: str) -> int:
    """Parts between lines of ***; -1 where one between two others is empty."""
    parts = [part.strip() for part in re.split(r"\*\*\*", text)]
    if not parts[0]:
        parts = parts[1:]
    if parts and not parts[-1]:
        parts = parts[:-1]
    return len(parts) if all(parts) else -1


def _nth_paragraph(text: str, want: dict) -> bool:
    parts = [part.strip() for part in text.split("\n\n") if part.strip()]
    nth = want["nth_paragraph"]
    if len(parts) != want["num_paragraphs"] or not 1 <= nth <= len(parts):
        return False
    first = parts[nth - 1].split()[0].strip("'\"").casefold()
    return first.rstrip(".,?!'\"") == want["first_word"].casefold()


def _postscript(text: str, want: dict) -> bool:
    """A line that begins with the marker, blanks between its letters or not, with text behind it."""
    marker = r"\s?".join(re.escape(mark) for mark in want["postscript_marker"].replace(" ", "").casefold())
    return re.search(rf"(?:^|[\s]){marker}[^\n]*\S", text.casefold()) is not None


def _highlights(text: str) -> int:
    single = sum(bool(found.strip("* ")) for found in _STARS.findall(text))
    return single + sum(bool(found.strip("* ")) for found in _TWO_STARS.findall(text))


def _json(text: str) -> bool:
    text = text.strip().removeprefix("```json").removeprefix("```Json").removeprefix("```JSON").removeprefix("```")
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str) -> bool:
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    said = [part.strip() for part in parts if part.strip()]
    return len(said) == 2 and said[0] != said[1]


def _language(text: str, language: str) -> bool:
    try:
        import py3langid
    except ImportError as error:
        raise ValueError("language:response_language needs the package: pip install py3langid") from error
    return py3langid.classify(text)[0] == language.split("-")[0]


def _capital_words(text: str) -> int:
    return sum(word.isupper() for word in _WORD.findall(text))


KINDS: dict[str, Callable[[str, dict], bool]] = {
    "keywords:existence": lambda text, want: all(word.casefold() in text.casefold() for word in want["keywords"]),
    "keywords:frequency": lambda text, want: _holds(
        text.casefold().count(want["keyword"].casefold()), want.get("relation"), want["frequency"]
    ),
    "keywords:forbidden_words": lambda text, want: not any(_has(text, word) for word in want["forbidden_words"]),
    "keywords:letter_frequency": lambda text, want: _holds(
        text.casefold().count(want["letter"].casefold()), want.get("let_relation"), want["let_frequency"]
    ),
    "language:response_language": lambda text, want: _language(text, want["language"]),
    "length_constraints:number_sentences": lambda text, want: _holds(
        sentences(text), want.get("relation"), want["num_sentences"]
    ),
    "length_constraints:number_paragraphs": lambda text, want: _paragraphs(text) == want["num_paragraphs"],
    "length_constraints:number_words": lambda text, want: _holds(
        len(_WORD.findall(text)), want.get("relation"), want["num_words"]
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": lambda text, want: (
        len(_PLACEHOLDER.findall(text)) >= want["num_placeholders"]
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, want: len(_BULLET.findall(text)) == want["num_bullets"],
    "detectable_format:constrained_response": lambda text, want: any(said in text for said in _ANSWERS),
    "detectable_format:number_highlighted_sections": lambda text, want: _highlights(text) >= want["num_highlights"],
    "detectable_format:multiple_sections": lambda text, want: (
        len(re.findall(rf"{re.escape(want['section_spliter'])}\s?[0-9]+", text)) >= want["num_sections"]
    ),
    "detectable_format:json_format": lambda text, want: _json(text),
    "detectable_format:title": lambda text, want: any(found.strip("<> ") for found in _TITLE.findall(text)),
    "combination:two_responses": lambda text, want: _two_responses(text),
    "combination:repeat_prompt": lambda text, want: (
        text.strip().casefold().startswith(want["prompt_to_repeat"].strip().casefold())
    ),
    "startend:end_checker": lambda text, want: (
        text.strip().strip('"').casefold().endswith(want["end_phrase"].strip().casefold())
    ),
    "startend:quotation": lambda text, want: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda text, want: _holds(
        _capital_words(text), want.get("capital_relation"), want["capital_frequency"]
    ),
    "change_case:english_capital": lambda text, want: text.isupper(),
    "change_case:english_lowercase": lambda text, want: text.islower(),
    "punctuation:no_comma": lambda text, want: "," not in text,
}


def loose_forms(reply: str) -> list[str]:
    lines = reply.split("\n")
    cuts = (lines, lines[1:], lines[:-1], lines[1:-1])
    texts = ["\n".join(cut).strip() for cut in cuts]
    return [*texts, *(text.replace("*", "") for text in texts)]


def _wanted(meta: dict) -> list[tuple[str, dict]]:
    kinds, given = need(meta, "instruction_id_list", "ifeval"), meta.get("kwargs") or []
    if len(kinds) != len(given):
        raise ValueError(f"meta.kwargs has {len(given)} entries for {len(kinds)} of meta.instruction_id_list")
    for kind in kinds:
        if kind not in KINDS:
            near = get_close_matches(str(kind), KINDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"kinds are {', '.join(KINDS)}"
            raise ValueError(f"meta.instruction_id_list has the unknown kind {kind!r}: {hint}")
    return [
        (kind, {key: value for key, value in (want or {}).items() if value is not None})
        for kind, want in zip(kinds, given)
    ]


def _followed(kind: str, text: str, want: dict) -> bool:
    try:
        return bool(text.strip()) and KINDS[kind](text, want)
    except KeyError as error:
        raise ValueError(f"meta.kwargs of {kind} lacks {error}") from error


def followed(reply: str, meta: dict) -> tuple[list[bool], list[bool]]:
    """(strict, loose) of each instruction."""
    wanted, forms = _wanted(meta), loose_forms(reply)
    strict = [_followed(kind, reply, want) for kind, want in wanted]
    return strict, [
        held or any(_followed(kind, form, want) for form in forms) for held, (kind, want) in zip(strict, wanted)
    ]


def ifeval(reply: str, answer: object, meta: dict) -> int:
    """4 all are followed strictly; 3 all are loosely; 2 at least half are loosely; 1 else."""
    strict, loose = followed(reply, meta)
    if all(strict):
        return 4
    return 3 if all(loose) else 2 if 2 * sum(loose) >= len(loose) else 1


def instructions(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """The share of instructions followed, strictly or loosely by options["by"]; measures as the suite reports them."""
    strict, loose = followed(reply, meta)
    shares = {"strict": sum(strict) / len(strict), "loose": sum(loose) / len(loose)}
    measures = {f"instruction_{by}": share for by, share in shares.items()}
    measures |= {f"prompt_{by}": float(share == 1.0) for by, share in shares.items()}
    return shares[options["by"]], measures
