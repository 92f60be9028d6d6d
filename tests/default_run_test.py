"""The promise of the default run: it raises the held-out macro average by 12 points on every seed.

pytest -m experiment tests/default_run_test.py
"""

import pytest

from infinite_jax import record, train


@pytest.mark.experiment
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_run_gains_twelve_points(tmp_path, seed):
    assert train.main([f"run.seed={seed}", f"run.dir={tmp_path / 'run'}"]) == 0
    rows = record.read(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["eval/macro"] - rows[0]["eval/macro"] >= 0.12
