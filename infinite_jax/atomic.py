"""A text file that is there whole, as it was or as it is to be, whenever the writer is killed or the power goes."""

import os
from pathlib import Path


def replace(path: Path, text: str, errors: str = "strict") -> None:
    """Writes `text` in UTF-8 beside `path` and puts it in its place. `errors`: as of str.encode."""
    scratch = path.with_name(path.name + ".tmp")
    with open(scratch, "w", encoding="utf-8", errors=errors) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
