"""What Hydra cannot compose, as one line: value, place, remedy. Its own messages are paragraphs that name no file."""

import dataclasses
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.types import Override

from configs import schema


def check_group(override: Override) -> None:
    """Raises ValueError, one line, where a group is set to what names no file."""
    group, value = override.key_or_group, override.value()
    if group not in schema.groups() or override.is_delete() or override.is_sweep_override():
        return
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) for name in names):
        keys = [key for key in schema.known_keys() if key.startswith(group.replace("/", ".") + ".")]
        single = f"single keys are set as {keys[0]}=..." if keys else f"or a list, {group}=[{{name:...,train:...}}]"
        raise ValueError(
            f"{group}={override.get_value_string()}: expected one of {', '.join(schema.options(group))}, or a file "
            f"{group}/NAME.yaml of --config-dir; {single}"
        )


def one_line(error: Exception, overrides: Sequence[str], folder: str | None) -> str:
    """Hydra's paragraph as one line with the nearest key or option."""
    text = str(error)
    if isinstance(error, UnicodeDecodeError):
        return _undecoded(folder) or text
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found.group(1)
        if key in schema.known_keys():
            return f"{key}: the file does not extend the base; begin it with `defaults: [config, _self_]`"
        if key.startswith("rubric.judge."):
            return f"{key}: this run has no judge to set it for: set rubric=judge, too"
        value = next((item.partition("=")[2] for item in overrides if item.lstrip("+~").startswith(key + "=")), "")
        return f"unknown key {key}={value}: {schema.nearest_key(key)}"
    if found := re.search(
        r"Could not find '([^']+)/([^'/]+)'.*?Available options in '[^']+':(.*?)\n\s*\n", text + "\n\n", re.S
    ):
        group, option, rest = found.groups()
        options = rest.split("Config search path")[0].split()
        return f"{group}={option}: no such option; {schema.nearest(option, options)}"
    if found := re.search(r"Cannot find primary config '([^']+)'", text):
        return f"--config-name {found.group(1)}: no such file; use config, grpo, or a file of --config-dir"
    if found := re.search(r"In '([^']+)': .*Cannot merge", text, re.S):
        return _misshapen(folder, found.group(1)) or " ".join(text.split())
    return " ".join(text.split())


def _undecoded(folder: str | None) -> str | None:
    for path in sorted(Path(folder).rglob("*.yaml")) if folder else ():
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            return f"{path}:{line}: byte {error.object[error.start]:#x} is not UTF-8: save the file as UTF-8"
    return None


def _misshapen(folder: str | None, name: str) -> str | None:
    """Where a file of the user's has a list in place of a mapping, or the other way round."""
    path = Path(folder or "", f"{name}.yaml")
    if folder is None or not path.is_file():
        return None
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "/" in name:  # a file of a group holds one section
        data = {name.split("/")[0]: data}
    return next((f"{path}: {line}" for line in _shapes(schema.Config, data, "")), None)


def _shapes(cls: type, data: dict, prefix: str) -> Iterator[str]:
    for key, hint in typing.get_type_hints(cls).items():
        value, place = data.get(key), prefix + key
        if dataclasses.is_dataclass(hint):
            if isinstance(value, dict):
                yield from _shapes(hint, value, place + ".")
            elif isinstance(value, list):
                yield f"{place}={value}: expected a mapping, key: value"
        elif typing.get_origin(hint) is tuple and isinstance(value, dict):
            each = "- {name: ..., train: ..., test: ...}" if key == "domains" else "[...]"
            yield f"{place}={value}: expected a list, {each}"
