"""The embedded model learns to call a calculator, and to search: docs/results/environments.md has the numbers.

pytest -m experiment -n 0 tests/environments_learning_test.py
"""

from pathlib import Path

import pytest

import configs
from infinite_jax import record, train
from models.tiny import talk
from rubric import search_service
from rubric.world import years


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


@pytest.mark.experiment
def test_the_embedded_model_learns_to_search(tmp_path):
    pytest.importorskip("bm25s", reason="needs: pip install bm25s")
    model, folder, world = tmp_path / "model", tmp_path / "run", tmp_path / "years"
    talk.main(["--of", "retrieval", "--out", str(model)])
    years.main(["--out", str(world)])
    with search_service.running(str(world / "corpus.jsonl")) as url:
        given = (Path(configs.__file__).parent / "domains" / "tiny_retrieval.yaml").read_text()
        given = given.replace("http://127.0.0.1:8000", url).replace(": years/", f": {world}/")
        (tmp_path / "searching.yaml").write_text(f"{given}\ndefaults: [config, _self_]\n")
        named = ["--config-name", "searching", "--config-dir", str(tmp_path)]
        assert train.main([*named, f"model.path={model}", "run.steps=20", f"run.dir={folder}"]) == 0
    start, end = rates(folder, "retrieval")
    assert start < 0.3 and end > 0.6
