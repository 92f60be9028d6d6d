"""The report page, read back as HTML: what a run recorded is on it, what it did not is said, nothing is left raw."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from infinite_jax import heldout, report
from infinite_jax.heldout import DomainResult
from infinite_jax.page import run as run_input
from infinite_jax.page.pieces import duration, esc, slug

ODD = "<b>odd</b> & 'two' $x$"
NAMES = ["add", ODD, "late", "unseen"]
STEPS = 12
EVIL = "<script>alert(1)</script>\x1b[31m \u202eevil & co"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Text by element, attributes, and whether every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.section, self.by_section = [], [], [], [], "", {}
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        self.by_section[self.section] = self.by_section.get(self.section, "") + " " + data


def grades_of(passes: int, of: int = 20) -> DomainResult:
    return DomainResult(np.array([4.0] * passes + [1.0] * (of - passes), np.float32), None)


def full_row(step: int) -> dict:
    late, row = step > 6, {"step": step, "reward/mean": 0.5, "policy/kl": 0.1, "policy/entropy": 1.0}
    row |= {"policy/skipped": float(step == 3), "rollout/invalid": 0.25 if step == 4 else 0.0, "rollout/length": 8.0}
    row |= {"tokens/generated": 100, "tokens/total": 100 * step, "curriculum/single_domain": float(step == 10)}
    row |= {"canary/nll": 2.0, "time/rollout_s": 1.0, "time/grade_s": 0.5, "time/update_s": 2.0, "time/step_s": 3.5}
    row |= {"time/compilations": 3 if step == 1 else 0, "time/peak_memory_bytes": 2**31}
    for d, name in enumerate(NAMES):
        trained = d < 2 or (d == 2 and late)
        share = (1 / 3 if late else 1 / 2) if trained else (0.0 if d == 3 else None)
        row |= {f"pass_rate/{name}": 0.5 if trained else None, f"triage/share/{name}": share}
        row |= {f"triage/acc_ema/{name}": 0.5 + step / 100, f"triage/band/{name}": 1, f"triage/zvf_ema/{name}": 0.1}
        row |= {f"triage/staleness/{name}": 7 if (d, step) == (1, 9) else 0, f"triage/uncertainty/{name}": 0.5}
        row |= {f"triage/level/{name}": 1.0 + d, f"triage/cost/{name}": 1.0, f"triage/lr_scale/{name}": 1.0}
        row |= {
            f"drift/ref/{name}": 0.9,
            f"drift/cusum/{name}": 0.5,
            f"drift/flag/{name}": int(d == 0 and step in (5, 6)),
        }
        row |= {f"forgetting/{name}": 0.0}
        terms = {"band": -1.5 - d, "staleness": 0.25, "uncertainty": 0.5, "base": 0.0}
        row |= {f"triage/priority_{term}/{name}": value for term, value in terms.items()}
    return row


def write_run(folder, rows, config=True, evaluations=()) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config:
        domains = [{"name": n, "eval_only": n == "unseen", "arrives": 6 if n == "late" else 0} for n in NAMES]
        data = {
            "run": {"name": "a run", "steps": STEPS, "seed": 5, "eval_every": 6},
            "model": {"path": "tiny"},
            "domains": domains,
            "curriculum": {"policy": "faithful", "low": 0.4, "high": 0.8},
            "algorithm": {"prompts": 4, "group_size": 2, "learning_rate": 2e-5, "kl_type": "reward", "kl_coef": 0.02},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(data))
    for step, results in evaluations:
        heldout.save(folder / "evaluations" / f"{step}.npz", results)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with every key: four domains, one late, one eval only; add from 5 to 15 of 20, the odd one from 15 to 5."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    rows, evaluations = [{"step": 0}, *map(full_row, range(1, STEPS + 1))], []
    for step, passes in ((0, (5, 15, 2, 10)), (6, (10, 15, 2, 10)), (12, (15, 5, 12, 10))):
        results = dict(zip(NAMES, map(grades_of, passes)))
        rows[step] |= heldout.metrics(results) | {"time/evaluate_s": 2.0}
        evaluations.append((step, results))
    write_run(folder, rows, evaluations=evaluations)
    sample = {"domain": ODD, "reply": "", "answer": "1", "grade": 4.0, "reward": 1.0}
    samples = [
        {"step": step, "kind": kind, "prompt": f"{EVIL} {step}"} | sample
        for step in range(1, STEPS + 1)
        for kind in ("best", "worst")
    ]
    (folder / "transcripts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    events = [
        {"step": 5, "kind": "drift", "domain": "add", "drift/ref": 0.9},
        {"step": 8, "kind": "drift_over", "domain": "add", "drift/ref": 0.85},
        {"step": 9, "kind": "grader_drift", "domain": ODD, "n": 16, "pass_shift": -0.25, "version_changed": True},
        {"step": 99, "kind": "of a step that was cut off", "domain": "add"},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    assert report.main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def text(whole) -> str:
    return (whole / "report.html").read_text()


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def render(folder, *arguments) -> Page:
    assert report.main([str(folder), *arguments]) == 0
    return Page((folder / "report.html").read_text())


def test_the_headline_is_the_paired_macro_change(page):
    # add +10, odd -10, late +10, unseen 0 of 20: macro (5 + 15 + 2 + 10) / 80 = .4 to (15 + 5 + 12 + 10) / 80 = .525
    head = page.by_section[""]
    assert "0.400 → 0.525" in head and "+0.125" in head and "paired over 80 prompts" in head
    assert "a run" in head and "all 12 steps done" in head and "1,200" in head
    assert re.search(r"2 up, 1 down\s+fell: <b>odd</b>", head)
    assert "0.02 in the reward" in head and "4, 1 of them eval only" in head
    drawn = page.by_section["heldout"]
    assert "+0.500" in drawn and "−0.500" in drawn and "+0.000" in drawn


def test_every_domain_is_in_every_part_that_lists_domains(page):
    for section in ("heldout", "stability", "queue", "staleness", "grades"):
        trained_only = section == "staleness"
        assert all(name in page.by_section[section] for name in ("add", "late")), section
        assert ("unseen" in page.by_section[section]) != trained_only, section
        assert "<b>odd</b>" in page.by_section[section]
    assert "add" in page.by_section["shares"] and "late" in page.by_section["shares"]


def test_the_queue_names_its_terms_and_options_that_differ(page):
    queue = page.by_section["queue"]
    assert all(term in queue for term in ("band", "staleness", "uncertainty", "weight and boost"))
    assert "level" in queue and "learning-rate scale" not in queue  # 1 for every domain: off
    label = next(value for key, value in page.attributes if key == "aria-label" and value.startswith("Priorities"))
    assert label.startswith("Priorities at step 12: add −0.75, <b>odd</b>") and "unseen" not in label  # no share


def test_events_are_listed_once_with_their_step(page):
    events = page.by_section["events"]
    assert len(re.findall(r"5\s+drift flag\s+add\s+pass rate \(EMA\) 0.550, reference 0.900", events)) == 1
    assert not re.search(r"6\s+drift flag", events)  # the flag still stands
    assert re.search(r"3\s+skipped update", events) and re.search(r"4\s+ungraded replies\s+25.0%", events)
    assert re.search(r"7\s+arrival, retirement\s+late", events)
    assert re.search(r"8\s+drift over\s+add\s+drift/ref 0.850", events) and "cut off" not in events
    drift = r"9\s+grader drift\s+<b>odd</b>.*?\s+n 16, pass_shift −0.250, version_changed True"
    assert len(re.findall(drift, events)) == 1 and re.search(r"grader drift\s+not recorded", events)  # no anchors here


def test_the_reward_hacking_watch_shows_each_flag_with_its_numbers(page, tmp_path):
    """Lengths of the odd domain from 10 to 30 tokens, those of add about 10 throughout."""
    assert "Not recorded" in page.by_section["hacking"]
    rows = [{"step": s, f"watch/length/{ODD}": (10 if s <= 20 else 30) + s % 2, "watch/length/add": 10 + s % 2}
            for s in range(1, 41)]  # fmt: skip
    write_run(tmp_path / "run", rows)
    shown = render(tmp_path / "run").by_section["hacking"]
    assert re.search(r"<b>odd</b>.*?\s+replies changed in length, tokens\s+10.5\s+30.5\s+[\d.]+\s+40", shown)
    assert shown.count("replies changed") == 1
    write_run(tmp_path / "short", rows[:39])
    assert "no domain has 40 steps" in render(tmp_path / "short").by_section["hacking"]
    quiet = [{key: value for key, value in row.items() if "odd" not in key} for row in rows]
    write_run(tmp_path / "quiet", quiet)
    assert "No flag, of 1 domains" in render(tmp_path / "quiet").by_section["hacking"]


def test_undefined_measures_show_their_reason(page):
    from infinite_jax import retention

    run = run_input.Run(
        None, {}, [{"step": 0, "eval/pass_rate/a": 0.5, "eval/macro": 0.5}], [run_input.Domain("a")], {}, [], []
    )
    found = retention.summary(retention.from_rows(run.rows, run.domains))
    undefined = [measure for measure in found.values() if measure.value is None]
    body = Page(f"<section id='r'>{report.held_out.retained(run).body}</section>").by_section["r"]
    assert undefined and all(measure.reason in body for measure in undefined) and "undefined" in body
    # acc: add .75, odd .25, late .6; unseen is not trained on
    assert re.search(r"acc\s+0.533", page.by_section["retention"])


def test_transcripts_are_shown_as_text(page, text):
    talk = page.by_section["transcripts"]
    assert r"<script>alert(1)</script>\x1b[31m \x202eevil & co 12" in talk and "(empty)" in talk
    assert "8 of the 12 recorded steps" in talk and " 1 best, 1 worst" in talk
    assert "script" not in page.tags and "b" in page.tags
    assert "\x1b" not in text and "\u202e" not in text


def test_the_page_needs_nothing_from_elsewhere_and_names_are_unique(page, text):
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert not any(key.startswith("on") for key, _ in page.attributes)
    for key, value in page.attributes:
        if key in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,")), value
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for key, value in page.attributes if key in ("href", "xlink:href") and value.startswith("#")}
    assert used | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_pictures_take_every_colour_from_the_style_sheet(text):
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    literal = set(re.findall(r"(?:fill|stroke): *(#[0-9a-f]{6})", drawn))
    assert not literal, literal
    style = text[: text.index("</style>")]
    light, dark = (set(re.findall(r"(--[\w-]+): ", part)) for part in style.split("prefers-color-scheme: dark"))
    assert set(re.findall(r"var\((--[\w-]+)\)", drawn)) <= light and light == dark


def test_the_same_run_gives_the_same_page(whole, tmp_path):
    assert report.main([str(whole), f"out={tmp_path / 'page.html'}"]) == 0
    assert (tmp_path / "page.html").read_bytes() == (whole / "report.html").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_run_in_progress_renders(tmp_path):
    rows = [{"step": 0} | heldout.metrics({name: grades_of(5) for name in NAMES})]
    write_run(tmp_path / "start", rows)
    page = render(tmp_path / "start")
    assert "0 of 12 steps so far" in page.by_section[""] and "no interval" in page.by_section[""]
    rows += [full_row(1), full_row(2)]
    write_run(tmp_path / "run", rows, evaluations=[(0, {name: grades_of(5) for name in NAMES})])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    page = render(tmp_path / "run")
    assert "2 of 12 steps so far" in page.by_section[""]
    assert "step 0" in page.by_section["grades"]  # one evaluation only
    assert "no transcripts.jsonl" in page.by_section["transcripts"]


@pytest.mark.parametrize(
    "prefixes", [("triage/", "drift/"), ("triage/priority", "drift/", "time/"), ("eval/", "reward")]
)
def test_a_run_without_some_keys_renders_and_says_so(whole, tmp_path, prefixes):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith(prefixes)} for row in rows]
    write_run(tmp_path / "run", rows, config="eval/" in prefixes)
    page = render(tmp_path / "run")
    said = " ".join(page.by_section.values())
    for prefix, words in (
        ("triage/", "this run logs no triage state"),
        ("triage/priority", "The terms (triage/priority_*) are not in this run"),
        ("drift/", "not recorded (no drift/flag in this run)"),
        ("time/", "No time was recorded"),
        ("eval/", "No evaluation yet"),
    ):
        assert (words in said) == (prefix in prefixes), words


def test_rows_of_nulls_and_other_steps_evaluations_render(tmp_path):
    rows = [{"step": 0}] + [{key: None if key != "step" else s for key in full_row(s)} for s in (1, 2, 3)]
    results = {name: DomainResult(np.full(3, np.nan, np.float32), None) for name in NAMES}
    write_run(tmp_path / "run", rows, evaluations=[(0, results), (3, results), (99, results)])
    page = render(tmp_path / "run")
    assert "steps 99" not in page.by_section[""] and "no evaluation yet" in page.by_section[""]


@pytest.mark.parametrize(
    "make, arguments, words",
    [
        (None, ["{dir}/nowhere"], ["{dir}/nowhere", "no such run directory"]),
        ("", ["{dir}"], ["{dir}", "no metrics.jsonl"]),
        ('{"step": 0, "a', ["{dir}"], ["no complete row yet"]),
        ('{"step": 0}\n', ["{dir}", "run.steps=3"], ["run.steps=3", "out=FILE"]),
        ('{"step": 0}\n', ["{dir}", "out={dir}/no/page.html"], ["out={dir}/no/page.html", "no folder"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, make, arguments, words):
    if make:
        (tmp_path / "metrics.jsonl").write_text(make)
    with pytest.raises(SystemExit) as ended:
        report.main([argument.format(dir=tmp_path) for argument in arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(word.format(dir=tmp_path) in error for word in words), error


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        report.main(["--help"])
    assert ended.value.code == 0 and "infinite_jax.report" in capsys.readouterr().out


def test_small_pieces():
    assert esc("a<b>\x00\n\"'") == "a&lt;b&gt;\\x00\n&quot;&#x27;"
    assert [duration(x) for x in (0.031, 59.2, 61, 3725)] == ["0.031 s", "59.2 s", "1 min 01 s", "1 h 02 min"]
    assert len({slug(name) for name in ("a b", "a-b", "a_b", "a.b")}) == 4


@pytest.mark.slow
def test_a_thousand_steps_of_twenty_domains_stay_small(tmp_path):
    """pytest -m slow tests/report_test.py"""
    rng, names = np.random.default_rng(0), [f"domain_{i}" for i in range(20)]
    keys = ("acc_ema", "share", "staleness", "uncertainty", *(f"priority_{t}" for t in ("band", "staleness", "base")))
    rows = []
    for step in range(1001):
        row = {"step": step, "reward/mean": rng.random(), "policy/entropy": rng.random()}
        for name in names:
            row |= {f"triage/{key}/{name}": rng.random() for key in (*keys, "priority_uncertainty")}
            row |= {f"triage/band/{name}": int(rng.integers(3)), f"drift/cusum/{name}": rng.random()}
        if step % 50 == 0:
            row |= {f"eval/pass_rate/{name}": rng.random() for name in names} | {"eval/macro": rng.random()}
        rows.append(row)
    write_run(tmp_path / "run", rows, config=False)
    render(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").stat().st_size < 5e6
