"""A rubric as data: named criteria, what each is worth, and the grade that their weighted score comes to.

    about: one line, shown to a judge
    grades: {2: 0.25, 3: 0.6, 4: 0.95}   # weighted score from which the grade is given; below the first it is 1
    criteria:
      correct:
        check: orz            # see CHECKS of rubric/checks.py: a grader, a check, judge, environment, or a .py file
        weight: 3             # relative to the others' (default 1); 0 = only looked at
        pass: 0.6             # score from which the criterion counts as passed (default 0.6: grade 3 of a grader)
        veto: 2               # highest grade where it is not passed (default: none)
        part: content         # content | form: what rubric/watch.py sets against one another (default content)
        where: unit           # rows without this key in `meta` have no such criterion (default: all have it)
        log: [exact_match]    # measures of the check written as eval/<measure>/<domain> (default: none)
        ...                   # any other key is an option of the check

    score = sum of weight x score / sum of weight, over the criteria that the row has; every score lies in [0, 1]

A grader of 1 to 4 scores (grade - 1) / 3. Paths of .py files are taken from the rubric's own folder.

Left out: criteria that build on one another, and expressions: a `.py` file says such things better.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import yaml

from rubric.checks import CHECKS, Check, known_measures, refuse

SHIPPED = Path(__file__).with_name("rubrics")
PARTS = ("content", "form")
RESERVED = ("grade", "macro", "macro_pass_at_1", "pass_at_1", "pass_rate")  # eval/<name>/<domain> of the evaluation
OWN_KEYS = ("check", "weight", "pass", "veto", "part", "where", "log")


@dataclass(frozen=True)
class Criterion:
    name: str
    check: Check
    weight: float  # 0 or more
    passes: float  # score from which it is passed, above 0 and at most 1
    veto: int  # highest grade where it is not passed; 4 = no veto
    part: str  # content | form
    where: str  # key that `meta` must hold for the row to have the criterion; "" = every row has it
    log: tuple[str, ...]  # measures of the check that are written


@dataclass(frozen=True)
class Rubric:
    name: str
    about: str
    grades: tuple[float, float, float]  # score from which the grade is 2, 3, 4; ascending, in (0, 1]
    criteria: tuple[Criterion, ...]

    @property
    def judged(self) -> bool:
        return any(criterion.check.name == "judge" for criterion in self.criteria)

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(name for criterion in self.criteria for name in criterion.log)


def has(criterion: Criterion, meta: Mapping) -> bool:
    """Whether a row with this `meta` has the criterion."""
    return not criterion.where or criterion.where in meta


def shipped() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def resolve(source: str, key: str) -> Path:
    """The file of a shipped rubric's name or of a path. Raises ValueError, one line that begins with `key`."""
    path = Path(source) if source.endswith((".yaml", ".yml")) else SHIPPED / f"{source}.yaml"
    if path.is_file():
        return path
    if source.endswith((".yaml", ".yml")):
        raise ValueError(f"{key}={source!r}: no such file; relative paths are taken from {Path.cwd()}")
    raise ValueError(f"{key}={source!r}: {_nearest(source, shipped())}, or the path of a .yaml file")


def load(source: str, key: str = "rubric") -> Rubric:
    """The rubric of a shipped name or a YAML file. Raises ValueError, one line: file:line, the key, the remedy."""
    path = resolve(source, key)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.MarkedYAMLError, UnicodeDecodeError, yaml.reader.ReaderError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise ValueError(f"{path}:{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if root is None:
        raise ValueError(f"{path}:1: the file is empty; a rubric has `grades` and `criteria`")
    return _Reader(path).rubric(root)


def load_all(sources: Sequence[str | None]) -> list[Rubric | None]:
    """The rubric of each domain, None where it has none. Raises ValueError as `load`, naming domains[i].rubric."""
    return [None if each is None else load(each, f"domains[{i}].rubric") for i, each in enumerate(sources)]


class _Reader:
    """YAML nodes to dataclasses; nodes know their lines."""

    def __init__(self, path: Path):
        self.path = path

    def rubric(self, root: yaml.Node) -> Rubric:
        fields = self.mapping(root, "")
        self.known(fields, ("about", "grades", "criteria"), "", root)
        criteria = tuple(
            self.criterion(name, node) for name, node in self.mapping(fields["criteria"], "criteria").items()
        )
        if not any(criterion.weight for criterion in criteria):
            self.fail(fields["criteria"], "criteria", "has no criterion of a weight above 0: give one a weight")
        logged: dict[str, str] = {}
        for criterion in criteria:
            for measure in criterion.log:
                if measure in logged:
                    place = f"criteria.{criterion.name}.log"
                    self.fail(fields["criteria"], place, f"{measure} is logged by {logged[measure]} already: drop one")
                logged[measure] = criterion.name
        about = self.text(fields["about"], "about")
        return Rubric(self.path.stem, about, self.grades(fields["grades"]), criteria)

    def grades(self, node: yaml.Node) -> tuple[float, float, float]:
        given = self.plain(node)
        if not isinstance(given, dict) or set(given) != {2, 3, 4}:
            self.fail(
                node, f"grades={given!r}", "give the score from which each is reached: {2: 0.25, 3: 0.6, 4: 0.95}"
            )
        scores = [given[grade] for grade in (2, 3, 4)]
        numbers = all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores)
        if not numbers or not 0 < scores[0] <= scores[1] <= scores[2] <= 1:
            self.fail(node, f"grades={given!r}", "scores lie above 0, at most at 1, and do not fall with the grade")
        return tuple(float(score) for score in scores)

    def criterion(self, name: str, node: yaml.Node) -> Criterion:
        place = f"criteria.{name}"
        if not name.isidentifier():
            self.fail(node, place, "the name becomes part of a metric: use letters, digits and _")
        fields = self.mapping(node, place)
        if "check" not in fields:
            self.fail(node, f"{place}.check", f"is missing: give one of {', '.join(CHECKS)}, or a .py file")
        weight = self.number(fields, place, "weight", 1.0, 0.0, 1e6)
        passes = self.number(fields, place, "pass", 0.6, 1e-6, 1.0)
        veto = self.plain(fields["veto"]) if "veto" in fields else 4
        if type(veto) is not int or not 1 <= veto <= 4:
            self.fail(fields["veto"], f"{place}.veto={veto!r}", "give the highest grade where it is not passed, 1 to 3")
        part = self.text(fields["part"], f"{place}.part") if "part" in fields else "content"
        if part not in PARTS:
            self.fail(fields["part"], f"{place}.part={part!r}", f"use {' or '.join(PARTS)}")
        where = self.text(fields["where"], f"{place}.where") if "where" in fields else ""
        check = self.check(fields, place)
        return Criterion(name, check, weight, passes, veto, part, where, self.log(fields, place, check))

    def check(self, fields: dict[str, yaml.Node], place: str) -> Check:
        node = fields["check"]
        name = self.text(node, f"{place}.check")
        options = {key: self.plain(value) for key, value in fields.items() if key not in OWN_KEYS}
        if name.endswith(".py"):
            name = str((self.path.parent / name).resolve())
        elif name not in CHECKS:
            self.fail(node, f"{place}.check={name!r}", f"{_nearest(name, CHECKS)}, or the path of a .py file")
        if found := refuse(name, options):
            key, remedy = found
            if key in fields:
                self.fail(fields[key], f"{place}.{key}={options[key]!r}", remedy)
            self.fail(node, f"{place}.{key}", remedy)
        return Check(name, json.dumps(options, sort_keys=True, ensure_ascii=False))

    def log(self, fields: dict[str, yaml.Node], place: str, check: Check) -> tuple[str, ...]:
        if "log" not in fields:
            return ()
        given = self.plain(fields["log"])
        known = known_measures(check)
        for measure in given if isinstance(given, list) else [given]:
            if measure not in known or measure in RESERVED:
                has = f"{check.name} measures {', '.join(known)}" if known else f"{check.name} measures nothing more"
                self.fail(fields["log"], f"{place}.log={measure!r}", has)
        return tuple(given) if isinstance(given, list) else (given,)

    def number(self, fields: dict, place: str, key: str, default: float, least: float, most: float) -> float:
        if key not in fields:
            return default
        value = self.plain(fields[key])
        if type(value) not in (int, float) or not least <= value <= most:
            self.fail(fields[key], f"{place}.{key}={value!r}", f"give a number from {least:g} to {most:g}")
        return float(value)

    def text(self, node: yaml.Node, place: str) -> str:
        value = self.plain(node)
        if not isinstance(value, str) or not value.strip():
            self.fail(node, f"{place}={value!r}", "expected text")
        return value.strip()

    def mapping(self, node: yaml.Node, place: str) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode) or not node.value:
            self.fail(node, place or "the file", "expected a mapping, key: value")
        fields: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = str(self.plain(key))
            if name in fields:
                self.fail(key, f"{place}.{name}".lstrip("."), "stands twice: drop one")
            fields[name] = value
        return fields

    def known(self, fields: dict, names: Iterable[str], place: str, node: yaml.Node) -> None:
        for name in fields:
            if name not in names:
                self.fail(fields[name], name, f"is no key of a rubric: {_nearest(name, names)}")
        for name in names:
            if name not in fields:
                self.fail(node, name, "is missing")

    def plain(self, node: yaml.Node) -> object:
        try:
            return yaml.SafeLoader("").construct_document(node)
        except yaml.constructor.ConstructorError as error:
            raise ValueError(f"{self.path}:{node.start_mark.line + 1}: {error.problem}") from error

    def fail(self, node: yaml.Node, place: str, remedy: str) -> None:
        raise ValueError(f"{self.path}:{node.start_mark.line + 1}: {place}: {remedy}")


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
