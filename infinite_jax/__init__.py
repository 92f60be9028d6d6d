"""The trainer. Its siblings are plain top-level packages: one of the same name from elsewhere must not shadow them."""

import importlib.util
import os
from pathlib import Path

# transformers is here for tokenizers and configurations: its line about a missing PyTorch is no advice
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HERE = Path(__file__).resolve().parent.parent

for _name in ("models", "kernels", "sharding", "curriculum", "rubric", "configs"):
    _spec = importlib.util.find_spec(_name)
    if _spec is None or _HERE / _name / "__init__.py" != Path(_spec.origin or "").resolve():
        _found = "missing" if _spec is None else _spec.origin
        raise ImportError(
            f"package {_name!r} is {_found}, expected {_HERE / _name}: "
            "install infinite_jax in an environment of its own (pip install -e .), outside that other package"
        )
