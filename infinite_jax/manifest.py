"""Checksums of a folder: a manifest.json with path, size and sha256 of every file below it, and of itself.

Written after the files and after they were flushed, by a temporary file and one rename: a folder with a manifest is
whole and outlives a power cut. Against decay and half-done copies, not against forgery: nothing is signed.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

NAME = "manifest.json"


def write(folder: Path, **facts: Any) -> None:
    """Flushes the files of `folder` and writes its manifest, together with `facts` (JSON values)."""
    files = []
    for path in sorted(folder.rglob("*")):
        _flush(path)
        if path.is_file() and path.name not in (NAME, f"{NAME}.tmp"):
            size = path.stat().st_size
            files.append({"path": path.relative_to(folder).as_posix(), "size": size, "sha256": _sha256(path)})
    content = facts | {"files": files}
    temporary = folder / f"{NAME}.tmp"
    with open(temporary, "w") as file:
        json.dump({"sha256": _own_sha256(content), "content": content}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / NAME)
    _flush(folder)
    _flush(folder.parent)


def exists(folder: Path) -> bool:
    return (folder / NAME).exists()


def read(folder: Path) -> dict[str, Any] | None:
    """The facts and `files` of the manifest; None when it is missing or damaged."""
    try:
        outer = json.loads((folder / NAME).read_bytes())
        return outer["content"] if outer["sha256"] == _own_sha256(outer["content"]) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def fault(folder: Path) -> str | None:
    """What is wrong with the files, with the path of the first bad one; None when all match the manifest."""
    if not exists(folder):
        return f"{folder / NAME} is missing"
    content = read(folder)
    if content is None:
        return f"{folder / NAME} is damaged"
    for entry in content["files"]:
        path = folder / entry["path"]
        try:
            if path.stat().st_size != entry["size"]:
                return f"{path} has {path.stat().st_size} bytes and not {entry['size']}"
            if _sha256(path) != entry["sha256"]:
                return f"{path} differs from its checksum"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
