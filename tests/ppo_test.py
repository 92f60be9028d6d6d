"""Whole runs with a critic: what they write, that resume is bit for bit, that nothing compiles after the first step.

pytest -m slow tests/ppo_test.py            resume and compilations
pytest -m experiment tests/ppo_test.py      the runs of docs/results/ppo.md, minutes each
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from infinite_jax import export, record, resume, run_folder, session, train

KINDS = {
    "head": ["algorithm.critic=head", "algorithm.group_size=1", "algorithm.prompts=8"],
    "network": ["algorithm.epochs=2", "algorithm.freeze_steps=8"],
}


@pytest.fixture(scope="module")
def setting(small_run, tmp_path_factory) -> list[str]:
    """A policy of 17,000 parameters with an unembedding of its own, and grades that look random but are not."""
    folder = tmp_path_factory.mktemp("setting")
    text = (
        "domains:\n"
        "  - {name: copy, train: 'gen:copy,size=7', test: 'gen:copy,split=test,size=5', GRADER}\n"
        "  - {name: seen, test: 'gen:copy,split=test,size=3,seed=1', eval_only: true}\n"
        "  - {name: add, train: 'gen:add,size=50', test: 'gen:add,split=test,size=5', GRADER}\n"
        "run: {steps: 4, eval_every: 2, checkpoint_every: 2, keep_last: 9}\n"
        "algorithm: {prompts: 4, group_size: 2, prompt_buckets: [32], max_new_tokens: 4, minibatches: 2, "
        "learning_rate: 0.01, critic_learning_rate: 0.01}\n"
        "eval: {batch: 8, canary: false}\n"
        "anchors: {each: 0}\n"
        "rubric: {workers: 1}\n"
    )
    return small_run(
        folder,
        text,
        "[config, {override algorithm: ppo}, {override curriculum: uniform}, _self_]",
        tie_word_embeddings=False,
    )


def timeless(folder: Path) -> list[dict]:
    rows = record.read(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def state_of(folder: Path, step: int | None = None):
    opened = session.open_session(run_folder.load_config(folder, []))
    opened.close()
    return run_folder.checkpoints(folder).restore(run_folder.abstract(opened.state), step)[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_compiles_once_and_resumes_bit_for_bit(kind, setting, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train.main([*setting, *KINDS[kind], f"run.dir={straight}"]) == 0
    rows = record.read(straight / "metrics.jsonl")[1:]
    compiled = [row["time/compilations"] for row in rows]
    assert compiled[0] > 0 and compiled[1:] == [0] * 3, compiled
    assert all(row["value/loss"] > 0 and row["policy/skipped"] == 0 for row in rows)
    errors = [row[f"drift/value/{name}"] for row in rows for name in ("copy", "add")]
    assert all(error is None or error > 0 for error in errors) and any(errors)
    assert all(row["drift/value/seen"] is None and row["drift/value_explained/seen"] is None for row in rows)
    before, after = state_of(straight, 0).train, state_of(straight, 2).train
    frozen = [(np.asarray(a) == b).all() for a, b in zip(jax.tree.leaves(before[:2]), jax.tree.leaves(after[:2]))]
    learnt = [(np.asarray(a) != b).any() for a, b in zip(*(jax.tree.leaves(x.critic) for x in (before, after)))]
    assert all(learnt) and all(frozen) == (kind == "network")  # its eight updates; moments and their count, too
    assert train.main([*setting, *KINDS[kind], f"run.dir={stopped}", "run.steps=2"]) == 0
    assert resume.main([str(stopped), "run.steps=4"]) == 0
    assert timeless(stopped) == timeless(straight)
    for a, b in zip(jax.tree.leaves(state_of(stopped)), jax.tree.leaves(state_of(straight)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert export.main([str(stopped), str(tmp_path / "out")]) == 0


@pytest.mark.experiment
@pytest.mark.parametrize("seed", range(3))
def test_ppo_learns_the_tiny_domains(seed, tmp_path):
    """28,000 generated tokens, about 40 steps: the macro average of the held-out pass rates begins at 0.395."""
    budget = ["run.steps=1000", "run.tokens=28000", "run.eval_every=1000", "run.checkpoint_every=0", f"run.seed={seed}"]
    simple = ["algorithm=ppo", "curriculum=uniform", "eval.canary=false", "anchors.each=0"]
    assert train.main([*simple, *budget, f"run.dir={tmp_path / 'run'}"]) == 0
    rows = record.read(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["eval/macro"] - rows[0]["eval/macro"] > 0.15
    first, last = (np.mean([row["value/loss"] for row in part]) for part in (rows[1:6], rows[-5:]))
    assert last < first
