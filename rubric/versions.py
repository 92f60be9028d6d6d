"""Which grader it was: a hash over all that a domain's grades depend on and that this process can see.

That is the rubric as read (remarks in its file are no part of it), the sources of the graders and checks it uses, the
versions of the packages behind them, a user's own .py file, and of a judge its model, its settings and its prompt. A
source counts with every byte: a remark changes the hash, and re-grading the anchors (rubric/anchors.py) then finds no
shift. What an endpoint does behind a model's name cannot be seen here; the anchors show it.

Left out: modules that a user's file imports, and the endpoint's address.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from functools import cache
from pathlib import Path

from rubric.judge import JudgeConfig
from rubric.schema import Rubric

_HERE = Path(__file__).parent
_READ = ("reading.py", "verify.py")
_PROGRAMS = tuple(sorted(path.name for path in _HERE.glob("sandbox*.py")))
# Sources and packages behind a name; of every other name _READ, or text_checks.py with what it imports.
_BEHIND: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "orz": (_READ, ("math-verify", "latex2sympy2_extended", "sympy")),
    "constraints": (("reading.py", "constraints.py"), ()),
    "python_tests": ((*_READ, *_PROGRAMS), ()),
    "code_tests": ((*_READ, *_PROGRAMS, "code_checks.py"), ()),
    "code_only": (("code_checks.py",), ()),
    "asserts": (("reading.py", *_PROGRAMS, "asserts.py"), ()),
    "gym": (("reading.py", "gym.py"), ("reasoning-gym",)),
    "ifeval": (("reading.py", "constraints.py", "ifeval.py"), ("py3langid",)),
    "instructions": (("reading.py", "constraints.py", "ifeval.py"), ("py3langid",)),
    "schema": (("reading.py", "tool_checks.py"), ("jsonschema",)),
    "tool_schema": (("reading.py", "tool_checks.py"), ("jsonschema",)),
    "judge": (("verdict.py",), ()),
}
_TEXT_CHECKS = (("reading.py", "constraints.py", "text_checks.py"), ())
_UNTOUCHED = ("base_url_env", "key_env", "concurrency", "request_s", "timeout_s", "retries", "backoff_s", "cache")


def of_domain(environment: str | None, rubric: Rubric | None, judge: JudgeConfig | None = None) -> str:
    """16 hexadecimal digits. `environment` is a grader's name or a .py file's path, None where it grades elsewhere.

    A file that is gone counts as empty: the grader says so itself.
    """
    if rubric is None:
        return _digest([of_grader(environment)])
    parts: list[object] = [rubric.about, rubric.grades]
    for criterion in rubric.criteria:
        fields = dataclasses.asdict(criterion)
        name = criterion.check.name
        if name.endswith(".py"):
            fields["check"]["name"] = "a file"  # its content counts, not where it lies
        parts += [fields, of_grader(environment if name == "environment" else name)]
        if name == "judge" and judge is not None:
            settings = vars(judge)
            parts.append({key: value for key, value in settings.items() if key not in _UNTOUCHED})
    return _digest(parts)


def of_grader(name: str | None) -> str:
    if name is None:
        return ""
    if name.endswith(".py"):
        path = Path(name)
        return _digest([path.read_bytes().hex() if path.is_file() else ""])
    return _of_ours(name)


@cache
def _of_ours(name: str) -> str:
    from rubric.verify import GRADERS

    sources, packages = _BEHIND.get(name, (_READ, ()) if name in GRADERS else _TEXT_CHECKS)
    found = [hashlib.sha256((_HERE / source).read_bytes()).hexdigest() for source in sources]
    return _digest([name, found, [_version(package) for package in packages]])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _digest(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
