"""The embedded model learns to call a calculator: docs/results/environments.md has the numbers.

pytest -m experiment -n 0 tests/environments_learning_test.py
"""

import pytest

from infinite_jax import record, train
from models.tiny import talk


def rates(folder, name: str) -> tuple[float, float]:
    rows = [row for row in record.read(folder / "metrics.jsonl") if "eval/macro" in row]
    assert all(row.get("rollout/invalid", 0) == 0 for row in rows)
    return rows[0][f"eval/pass_rate/{name}"], rows[-1][f"eval/pass_rate/{name}"]


@pytest.mark.experiment
def test_the_embedded_model_learns_to_call_a_calculator(tmp_path):
    model, folder = tmp_path / "model", tmp_path / "run"
    talk.main(["--out", str(model)])
    wanted = ["domains=tiny_calculator", f"model.path={model}", "run.steps=30", f"run.dir={folder}"]
    assert train.main(wanted) == 0
    start, end = rates(folder, "calculator")
    assert start < 0.3 and end > 0.9
