"""Checks of text: answers, quantities with units, citations, form. Each is (reply, answer, meta, options) -> Found.

`match` compares as the reading-comprehension task SQuAD does (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1):
case folded, punctuation and the articles a, an, the taken out, blanks made one; F1 is that of the bags of words.
`variety` is the share of different words in stretches of 50 words, averaged (Covington and McFall 2010, without their
overlap). Units are compared as written, never converted.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from rubric import constraints as forms
from rubric.reading import NUMBER, answers_of, boxed, need, tagged

Found = tuple[float, dict[str, float]]

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_POWER = re.compile(r"\s{0,3}(?:×|\\times|\\cdot|\*|x)\s{0,3}10\s{0,3}\^?\s{0,3}\{?([+-]?[0-9]{1,3})\}?")
_LETTER = re.compile(r"(?:answer|option|choice)\W{0,3}(?:is|:)?\W{0,4}([A-J])(?![\w'’])", re.IGNORECASE)
_ALONE = re.compile(r"[(*\s]{0,4}([A-Ja-j])(?:[).:,*\]]|\s{0,20}$|\s{0,20}\n)")  # not the article of `A good ...`
_CITED = re.compile(r"\[([\w.-]{1,40}(?:,\s?[\w.-]{1,40}){0,9})\]")
_STRETCH = 50  # words
_LONG_WORD = 3  # letters; shorter words say little about where a sentence comes from


def bare(text: str) -> str:
    """As SQuAD compares."""
    return " ".join(_ARTICLES.sub(" ", text.casefold().translate(_PUNCTUATION)).split())


def candidate(reply: str) -> str:
    r"""The last \boxed{}, else the last <answer>, else the reply."""
    marked = boxed(reply)
    marked = tagged(reply) if marked is None else marked
    return reply if marked is None else marked


def overlap(guess: str, right: str) -> float:
    """F1 of the words of two texts, both `bare`; 1 where both are empty."""
    said, wanted = guess.split(), right.split()
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


def match(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """by exact: the candidate is a right answer. by f1: its best F1. by contained: a right answer stands in it."""
    guess, rights = bare(candidate(reply)), [bare(right) for right in answers_of(answer)]
    exact = float(any(guess == right and right for right in rights))
    f1 = max(overlap(guess, right) for right in rights)
    inside = float(any(right and f" {right} " in f" {guess} " for right in rights))
    return {"exact": exact, "f1": f1, "contained": inside}[options["by"]], {"exact_match": exact, "f1": f1}


def choice(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """One letter, A to J: the candidate begins with it, or says `answer: B`; the last such mention counts."""
    rights = {right.strip("(). ").upper() for right in answers_of(answer)}
    text = candidate(reply).strip()
    said = _LETTER.findall(text[-4000:])
    first = _ALONE.match(text)
    letter = said[-1] if said else first.group(1) if first else ""
    right = float(letter.upper() in rights)
    return right, {"accuracy": right}


def _last_line(reply: str) -> str:
    """Where a quantity stands: the marked answer, or the last line that is not blank, behind its last equals sign."""
    text = candidate(reply).strip()
    lines = text.split("\n")
    return lines[-1].rsplit("=", 1)[-1].replace("−", "-").replace("$", "").replace("{,}", ",")


def read_quantity(reply: str) -> tuple[float, str] | None:
    """(value, what follows it) of the first number there, powers of ten read; None without a number."""
    text = _POWER.sub(lambda found: "e" + found.group(1) + " ", _last_line(reply))
    found = NUMBER.search(text)
    if not found:
        return None
    return float(found.group().replace(",", "")), text[found.end() :]


def quantity(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """The value lies within meta["tolerance"], else options["tolerance"], of the answer, relative to it."""
    texts = [right.replace(",", "") for right in answers_of(answer)]
    try:
        rights = [float(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"answer {answer!r} is no number: check 'quantity' compares numbers") from error
    tolerance, read = float(meta.get("tolerance", options["tolerance"])), read_quantity(reply)
    near = read is not None and any(abs(read[0] - right) <= tolerance * abs(right) + 1e-12 for right in rights)
    return float(near), {"within_tolerance": float(near)}


def _unit(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|,|;|:| )|[{}\s.]", "", text.replace("²", "^2").replace("³", "^3"))
    return text.replace("·", "*").replace("\\cdot", "*").replace("µ", "μ").strip("*,;")


def unit(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """What follows the value is meta["unit"], or one of them where it is a list. Nothing there scores 1/2."""
    wanted = need(meta, "unit", "unit")
    wanted = {_unit(text) for text in (wanted if isinstance(wanted, list) else [wanted])}
    read = read_quantity(reply)
    given = None if read is None else _unit(read[1])
    right = float(given in wanted)
    return (0.5 if given == "" else right), {"unit_right": right}


def marked(reply: str, answer: object, meta: dict, options: dict) -> Found:
    r"""The reply marks one answer: \boxed{...}, <answer>...</answer>, or either; two different ones are none."""
    boxes, tags = reply.count("\\boxed{"), reply.count("<answer>")
    box = boxes == 1 and bool((boxed(reply) or "").strip())
    tag = tags == 1 and bool((tagged(reply) or "").strip())
    held = float({"boxed": box, "answer": tag, "either": box != tag and boxes + tags == 1}[options["by"]])
    return held, {"marked": held}


def constraint(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """One of the constraints of rubric/constraints.py, the same for every row."""
    return float(bool(reply.strip()) and forms.CHECKS[options["kind"]](reply.strip(), options)), {}


def constraints_held(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """The share of meta["constraints"] that holds; 0 for a reply that is no attempt at writing."""
    wanted = forms.checked(need(meta, "constraints", "constraints_held"))
    text = reply.strip()
    attempt = not forms.degenerate(text, wanted)
    share = sum(bool(forms.CHECKS[want["kind"]](text, want)) for want in wanted) / len(wanted) if attempt else 0.0
    return share, {"constraints_held": share, "all_held": float(share == 1.0)}


def no_repetition(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """0 for a reply that is no attempt at writing (`degenerate` of rubric/constraints.py), else 1."""
    return float(not forms.degenerate(reply.strip(), meta.get("constraints") or [])), {}


def variety(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """The share of different words, 1 from options["full"] on."""
    said = forms.words(reply)
    stretches = [said[at : at + _STRETCH] for at in range(0, len(said), _STRETCH)]
    if len(stretches) > 1 and len(stretches[-1]) < _STRETCH // 2:
        stretches.pop()  # the few words at the end are nearly always different
    share = sum(len(set(part)) / len(part) for part in stretches) / len(stretches) if stretches else 0.0
    return min(1.0, share / options["full"]), {"variety": share}


def _passages(meta: dict) -> dict[str, str]:
    """Text by id of meta["passages"] = [{"id", "text", "title"?}, ...]."""
    given = need(meta, "passages", "retrieval")
    if not all(isinstance(passage, Mapping) and {"id", "text"} <= passage.keys() for passage in given):
        raise ValueError('meta.passages: expected [{"id": ..., "text": ...}, ...]')
    return {str(passage["id"]): f"{passage.get('title', '')} {passage['text']}" for passage in given}


def cites(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """F1 between the passages cited, as [id] or [id, id], and meta["gold"]; an id that does not exist counts as one."""
    known, gold = _passages(meta), {str(each) for each in need(meta, "gold", "cites")}
    if not gold <= known.keys():
        raise ValueError(f"meta.gold names {sorted(gold - known.keys())}, which meta.passages does not hold")
    cited = {each.strip() for group in _CITED.findall(reply) for each in group.split(",")}
    right = len(cited & gold)
    precision, recall = right / len(cited) if cited else 0.0, right / len(gold)
    score = 2 * right / (len(cited) + len(gold))
    return score, {"citation_precision": precision, "citation_recall": recall}


def supported(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """The share of the candidate's words of three letters or more that stand in the passages."""
    there = {word for text in _passages(meta).values() for word in forms.words(text)}
    said = [word for word in forms.words(_CITED.sub(" ", candidate(reply))) if len(word) >= _LONG_WORD]
    share = sum(word in there for word in said) / len(said) if said else 0.0
    return share, {"supported": share}


@lru_cache(maxsize=64)
def compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression of Python: {error}") from error


def regex(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """The pattern is found in the reply."""
    return float(compiled(options["pattern"]).search(reply) is not None), {}
