"""A judge's answers on disk, one small file each: several processes may write at once, and a crash leaves no damage.

A file is written beside its place and moved there, which is one step for the file system; whoever comes second
replaces like with like. A file that does not hold a grade counts as missing.
"""

import json
import os
import tempfile
from pathlib import Path


class Cache:
    """Grades by key (hexadecimal). A disk that fails costs the answer's reuse, never the answer."""

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> int | None:
        try:
            grade = json.loads(self._path(key).read_text(encoding="utf-8"))["grade"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return grade if type(grade) is int and 1 <= grade <= 4 else None

    def put(self, key: str, grade: int) -> None:
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
                file.write(json.dumps({"grade": grade}))
            os.replace(file.name, path)
        except OSError:
            pass
