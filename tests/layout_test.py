"""The house: packages are this checkout's, imports point down only, a foreign package of the same name is refused."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A package may import those of the floors below it, and itself.
BELOW = {
    "infinite_jax": {"configs", "models", "kernels", "sharding", "curriculum", "rubric"},
    "configs": {"models", "kernels", "sharding", "curriculum", "rubric"},
    "models": {"kernels", "sharding", "curriculum", "rubric"},
    "kernels": {"sharding"},
    "sharding": set(),
    "curriculum": set(),
    "rubric": set(),
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", BELOW)
def test_package_is_this_checkouts(package):
    assert Path(importlib.import_module(package).__file__) == ROOT / package / "__init__.py"


@pytest.mark.parametrize("package", BELOW)
def test_imports_point_down_only(package):
    for path in (ROOT / package).rglob("*.py"):
        above = imports(path) & set(BELOW) - BELOW[package] - {package}
        assert not above, f"{path} imports {above}"


def test_only_the_decoder_imports_flax():
    users = {
        str(p.relative_to(ROOT)) for package in BELOW for p in (ROOT / package).rglob("*.py") if "flax" in imports(p)
    }
    assert users == {"models/decoder.py"}


@pytest.mark.parametrize("package", BELOW)
def test_no_torch_and_no_test_package_in_the_training_path(package):
    for path in (ROOT / package).rglob("*.py"):
        assert not imports(path) & {"torch", "pytest", "hypothesis"}, path


def test_a_foreign_package_of_the_same_name_is_refused(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import infinite_jax"
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "package 'kernels' is" in ran.stderr and "environment of its own" in ran.stderr
