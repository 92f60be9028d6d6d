"""Domains that come and go where a run is continued: what changes, and that nothing else does."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from curriculum.domains import DomainConfig
from curriculum.triage import SHARED
from infinite_jax import changes, heldout, record, resume, run_folder, session, train

ADDED = "- {name: sort, train: 'gen:sort,size=20', test: 'gen:sort,split=test,size=4', environment: list, weight: 9}\n"


@pytest.fixture(scope="module")
def setting(small_run, tmp_path_factory) -> Path:
    """A policy of 17,000 parameters, four prompts a step, grades that look random but are not."""
    folder = tmp_path_factory.mktemp("setting")
    text = (
        "domains:\n"
        "  - {name: copy, train: 'gen:copy,size=7', test: 'gen:copy,split=test,size=5', GRADER}\n"
        "  - {name: seen, test: 'gen:copy,split=test,size=3,seed=1', eval_only: true}\n"
        "  - {name: add, train: 'gen:add,difficulty=1..2,size=9', test: 'gen:add,split=test,size=5', GRADER}\n"
        "run: {steps: 6, eval_every: 2, checkpoint_every: 3, keep_last: 9}\n"
        "algorithm: {prompts: 4, group_size: 2, prompt_buckets: [32], max_new_tokens: 4, learning_rate: 0.01}\n"
        "eval: {batch: 8, canary: false}\n"
        "curriculum: {single_every: 0}\n"
        "rubric: {workers: 1}\n"
    )
    small_run(folder, text)
    (folder / "more.yaml").write_text(ADDED)
    return folder


def started(setting: Path, folder: Path, *options: str) -> Path:
    """Three of six steps."""
    base = ["--config-dir", str(setting), "--config-name", "small"]
    assert train.main([*base, f"run.dir={folder}", "run.steps=3", *options]) == 0
    return folder


@pytest.fixture(scope="module")
def three(setting, tmp_path_factory) -> Path:
    return started(setting, tmp_path_factory.mktemp("runs") / "three")


@pytest.fixture(scope="module")
def priorities(setting, tmp_path_factory) -> Path:
    """The same with prompts by their priority and a level that moves."""
    options = ["curriculum.level=prompt", "curriculum.difficulty=adaptive", "curriculum.difficulty_rate=5"]
    return started(setting, tmp_path_factory.mktemp("runs") / "priorities", *options)


def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def restored(folder: Path):
    """The newest state of a run as its own configuration describes it."""
    opened = session.open_session(run_folder.load_config(folder, []))
    opened.close()
    return run_folder.checkpoints(folder).restore(run_folder.abstract(opened.state))


def assert_begins_with(new, old) -> None:
    """Leaf by leaf: bits equal, and what is longer has something appended."""
    for (path, a), b in zip(jax.tree.leaves_with_path(old), jax.tree.leaves(new), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        where = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, where
        np.testing.assert_array_equal(b if b.ndim == 0 else b[: len(a)], a, err_msg=where)


@pytest.mark.parametrize("kind", ["three", pytest.param("priorities", marks=pytest.mark.slow)])
def test_growth_leaves_every_other_leaf_bit_identical(kind, setting, request):
    run = request.getfixturevalue(kind)
    step, before = restored(run)
    asked, _ = changes.take([f"add={setting / 'more.yaml'}", "retire=copy"])
    config = changes.apply(run_folder.load_config(run, []), asked)
    opened = session.open_session(config)
    opened.close()
    abstract = run_folder.abstract(opened.state)
    start, after = changes.restore(run_folder.checkpoints(run), opened, abstract, changes.entry(asked, 0))
    assert_begins_with(after, before)
    config = changes.date(config, asked, start)
    grown, new = changes.grow(opened._replace(config=config), after)
    assert start == step == 3 and new == ["sort"]
    for a, b in zip(jax.tree.leaves(before.train), jax.tree.leaves(grown.train), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(grown.curriculum.retires, [3, 2**31 - 1, 2**31 - 1, 2**31 - 1])
    assert_begins_with(grown.curriculum._replace(retires=before.curriculum.retires), before.curriculum)
    assert_begins_with(grown.position, before.position)
    assert {len(leaf) for name, leaf in zip(grown.curriculum._fields, grown.curriculum) if name not in SHARED} == {4}
    added = jax.tree.map(lambda leaf: leaf[3:] if leaf.ndim else leaf, grown.curriculum)
    assert (added.arrives, added.visits, added.last_seen_step) == (3, 0, -1)
    assert jax.tree.map(np.shape, grown) == jax.tree.map(np.shape, opened.state)  # as a run that had all from the start
    assert any(np.any(leaf) for leaf in jax.tree.leaves(before.position))  # there was something to keep


@pytest.mark.slow
def test_an_added_domain_is_drawn_and_evaluated_and_the_others_go_on(priorities, setting, tmp_path, capsys):
    run, folder = priorities, copied(priorities, tmp_path)
    assert resume.main([str(folder), "run.steps=6", f"add={setting / 'more.yaml'}"]) == 0
    assert "added: sort" in capsys.readouterr().out
    rows = record.read(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    assert all("triage/share/sort" not in row for row in rows[:4])
    assert all(row["triage/share/sort"] > 0 for row in rows[4:])
    assert any(row["pass_rate/sort"] is not None for row in rows[4:])
    assert [row["step"] for row in rows if "eval/pass_rate/sort" in row] == [3, 4, 6]  # 3: before any training on it
    before, after = (heldout.load(folder / "evaluations" / f"{step}.npz") for step in (0, 3))
    assert list(after) == [*before, "sort"]
    stopped = heldout.load(run / "evaluations" / "3.npz")  # the same parameters, evaluated before the domain came
    for name, result in stopped.items():
        np.testing.assert_array_equal(result.greedy_N, after[name].greedy_N)
    for earlier, row in zip(record.read(run / "metrics.jsonl"), rows[:4]):
        timeless = [
            {k: v for k, v in r.items() if not k.startswith(("time/", *record.OF_EVALUATION))} for r in (earlier, row)
        ]
        assert timeless[0] == timeless[1]
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert [domain["name"] for domain in saved["domains"]] == ["copy", "seen", "add", "sort"]
    assert saved["changes"] == [{"step": 3, "add": ["sort"], "retire": []}] and saved["domains"][3]["arrives"] == 3
    old, new = (yaml.safe_load((f / "config.yaml").read_text())["provenance"] for f in (run, folder))
    assert new["data_sha256"].keys() == {"copy", "seen", "add", "sort"} and new["config_hash"] != old["config_hash"]
    assert old["data_sha256"].items() <= new["data_sha256"].items()
    step, state = restored(folder)  # the hash fits, the shapes are today's
    assert step == 6 and state.curriculum.visits[3] > 0


@pytest.mark.slow
def test_levels_and_priorities_move_with_the_grades(priorities):
    """Sets of copy, seen, add at levels 1 and 2: the level of a step's start says which of the two is drawn."""
    rows = record.read(priorities / "metrics.jsonl")
    levels = [1.0] + [row["triage/level/add"] for row in rows[1:]]
    assert all(1 <= level <= 2 for level in levels) and len(set(levels)) > 1
    step, state = restored(priorities)
    drawn = {1: 0, 2: 0}
    for level, row in zip(levels, rows[1:]):
        drawn[round(level)] += row["pass_rate/add"] is not None
    assert step == 3 and [found > 0 for found in state.position.drawn_S[2:]] == [drawn[1] > 0, drawn[2] > 0]
    assert state.position.drawn_S.sum() == state.position.visits.sum() == 3 * 4
    covered = (state.position.visits[:7] > 0).mean()  # of copy
    np.testing.assert_allclose(rows[-1]["prompts/covered/copy"], covered, rtol=1e-6)
    assert rows[-1]["prompts/covered/seen"] is None
    assert len(set(state.position.acc_ema[state.position.visits > 0])) > 1


def timeless(folder: Path) -> list[dict]:
    rows = record.read(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


@pytest.mark.slow
def test_a_run_killed_after_a_change_or_fallen_back_before_it_comes_to_the_same_end(
    three, setting, tmp_path, monkeypatch
):
    arguments = ["run.steps=5", f"add={setting / 'more.yaml'}", "retire=add"]
    straight, killed = copied(three, tmp_path / "a"), copied(three, tmp_path / "b")
    assert resume.main([str(straight), *arguments]) == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resume, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        resume.main([str(killed), *arguments])
    assert [int(p.name) for p in (killed / "checkpoints").iterdir()].count(3) == 1
    assert resume.main([str(killed), "run.steps=5"]) == 0  # the change stands in its config.yaml
    assert timeless(killed) == timeless(straight)
    for a, b in zip(jax.tree.leaves(restored(killed)), jax.tree.leaves(restored(straight)), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = record.read(straight / "metrics.jsonl")
    assert all(row["triage/share/add"] == 0 and row["pass_rate/add"] is None for row in rows[4:])
    assert "eval/pass_rate/add" in rows[-1]
    shutil.rmtree(straight / "checkpoints" / "5")  # only steps from before the change are left
    assert resume.main([str(straight)]) == 0
    assert timeless(killed) == timeless(straight)
    shown = yaml.safe_load((straight / "config.yaml").read_text())["changes"]
    assert shown == [{"step": 3, "add": ["sort"], "retire": ["add"]}]


MORE = "name: sort, test: 'gen:sort,split=test'"


@pytest.mark.parametrize(
    "text, arguments, words",
    [
        (None, [], ["more.yaml: no such file"]),
        (
            "- {name: copy, train: a.json, test: a.json}",
            [],
            ["add: the run has a domain 'copy' already", "another name"],
        ),
        ("- {name: x, train: a, test: a}\n- {name: x, train: a, test: a}", [], ["a domain 'x' already"]),
        ("- {name: x, train: a.json, test: a.json}", [], ["a.json: no such file"]),
        ("- {nam: x}", [], ["unknown key add=", "domains[0].nam='x'", "did you mean name?"]),
        ("3", [], ["more.yaml: expected a list of domains"]),
        ("[", [], ["more.yaml: not YAML"]),
        (f"- {{{MORE}, train: 'gen:sort'}}", [], ["environment='eq'", "set environment: list"]),
        (
            f"- {{{MORE}, train: 'gen:sort', environment: list, retires: 2}}",
            [],
            ["sort retires at 2", "at step 3 already"],
        ),
        (ADDED, ["retire=cpoy"], ["retire=cpoy", "it trains on copy, add"]),
        (ADDED, ["retire=seen"], ["retire=seen", "eval_only"]),
        (ADDED, ["step=0"], ["step=0", "newest intact checkpoint", "the copy's checkpoints/"]),
        (
            f"- {{{MORE}, environment: list, eval_only: true}}",
            ["retire=copy,add"],
            ["retire=copy,add: no domain is left to train on at step 3"],
        ),
    ],
)
def test_bad_changes_are_one_line_and_leave_the_run_alone(three, tmp_path, monkeypatch, capsys, text, arguments, words):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("more.yaml").write_text(text)
    before = {path.name: path.read_bytes() for path in three.iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as ended:
        resume.main([str(three), "run.steps=6", "add=more.yaml", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert {path.name: path.read_bytes() for path in three.iterdir() if path.is_file()} == before


def test_a_copy_without_its_later_checkpoints_goes_on_from_the_earlier_one(three, tmp_path, capsys):
    folder = copied(three, tmp_path)
    shutil.rmtree(folder / "checkpoints" / "3")
    assert resume.main([str(folder), "run.steps=2"]) == 0
    assert f"continuing {folder} after step 0" in capsys.readouterr().out
    again, first = record.read(folder / "metrics.jsonl"), record.read(three / "metrics.jsonl")
    assert [row["step"] for row in again] == [0, 1, 2]
    assert again[1]["reward/mean"] == first[1]["reward/mean"]


def test_dates_are_the_step_at_hand_or_later_and_what_retired_cannot_retire_again(three):
    config = run_folder.load_config(three, [])
    later = DomainConfig("later", train="a.json", test="a.json", arrives=50)
    asked = changes.Changes((later,), ("copy",))
    dated = changes.date(changes.apply(config, asked), asked, 7)
    assert [(domain.arrives, domain.retires) for domain in dated.domains] == [(0, 7), (0, None), (0, None), (50, None)]
    with pytest.raises(ValueError, match="retire=copy: it retired at step 7 already"):
        changes.date(dated, changes.Changes((), ("copy",)), 9)
    never = changes.date(dated, changes.Changes((), ("later",)), 9).domains[3]
    assert (never.arrives, never.retires) == (50, 50)


def test_changed_data_names_its_domain_and_an_old_hash_is_explained(three, tmp_path):
    folder = copied(three, tmp_path)
    found = yaml.safe_load((folder / "config.yaml").read_text())["provenance"]["data_sha256"]
    run_folder.check_data(folder, found | {"another": "0"})
    with pytest.raises(ValueError, match="the data of domain add has changed"):
        run_folder.check_data(folder, found | {"add": "0"})
    text = (folder / "config.yaml").read_text()
    saved = yaml.safe_load(text)
    saved["provenance"]["data_sha256"] = "0" * 64
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ValueError, match="one data_sha256 for all domains, as an earlier version wrote it"):
        run_folder.check_data(folder, found)


def test_arguments_are_split_from_the_keys(tmp_path):
    (tmp_path / "a.yaml").write_text(f"domains:\n{ADDED}")
    asked, rest = changes.take(["run.steps=9", f"add={tmp_path / 'a.yaml'}", "retire=a,b", "retire=c"])
    assert rest == ["run.steps=9"] and asked.retire == ("a", "b", "c")
    assert asked.add == (
        DomainConfig("sort", "gen:sort,size=20", "gen:sort,split=test,size=4", environment="list", weight=9.0),
    )
    assert json.dumps(changes.entry(asked, 4)) == '[{"step": 4, "add": ["sort"], "retire": ["a", "b", "c"]}]'
