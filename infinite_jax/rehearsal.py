"""Rehearsal: training rows for prior domains that have none left, written and answered by M0 itself.

python -m infinite_jax.rehearsal [--config-name NAME] [--config-dir DIR] [--only NAME,...] [key=value ...]

With upgrade.rehearsal=self an upgrade calls `prepare` before the contamination gate. As a command it writes for every
prior domain as if its rows were lost and shows what comes of it. Sources of prompts, in this order:

    prefix     M0 goes on where the chat template opens the user's turn, behind the turns that all rows of the domain
               begin with. Where there are none the domain is that whose form the text has, else the nearest description
    described  M0 is asked for a new exercise of the domain's description
    form       no model: the domain's form, filled at random. For an M0 that has learnt answers and no prompts

What is written is read (of the form, if one is known), deduplicated, dropped where the gate takes it for an evaluation
prompt, and answered by M0 several times. A rubric that needs no answer keeps a prompt whose replies it can all grade
and of which one passes; else a prompt is kept where enough replies agree (rubric/majority.py), with the majority's
answer: what is then rewarded is what M0 mostly says, right or wrong. With upgrade.writing.reward=none every prompt is
kept, all replies have the same grade, and the KL to M0 is all that acts on them: on-policy distillation (Agarwal et
al., 2306.13649, its reverse KL). That needs no grader, and takes over M0's distribution instead of its mode.

RUN_DIR/rehearsal/<domain>.jsonl holds the rows, report.json the counts and examples of every stage. The rows are the
domain's training source from then on, for the gate, the run and its continuation alike.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import jax
import numpy as np

from configs import cli, limits
from configs.schema import Config, located
from curriculum import domains, rehearsed, semantic
from curriculum.contamination import ContaminationDetector
from curriculum.domains import Domain
from curriculum.rehearsed import Frame
from infinite_jax import atomic, gate, rehearsal_rounds, run_folder, waiting
from infinite_jax.lock import RunLock
from infinite_jax.rehearsal_model import M0
from infinite_jax.rehearsal_rounds import Kept
from infinite_jax.session import set_up_runtime
from rubric import schema
from rubric.environments import registry
from rubric.evaluator import RubricEvaluator
from rubric.majority import BY_ROW, needs_answer
from sharding import exchange, multihost

FOLDER, REPORT = "rehearsal", "report.json"
STREAM = 0x61727365  # the end of "rehearse": keeps these keys off those folded from the same seed


def prepare(config: Config, run_dir: Path, lock: RunLock) -> Config:
    """`config` in which prior domains without training rows have those that M0 wrote; all processes call it.

    The same `config` where upgrade.rehearsal=none or no domain is such. A domain of which too few prompts were kept
    stays as it is, which is said in one line. Raises ValueError, one line, on what the user must mend, and where
    another run holds the folder's lock, which is taken before anything is written.
    """
    lost = [domain.name for domain in config.domains if domain.eval_only and not domain.new]
    if config.upgrade.rehearsal == "none" or not lost:
        return config
    if config.upgrade.writing.reward == "none":
        for key, hinders, why in (
            ("algorithm.zero_variance=drop", config.algorithm.zero_variance == "drop", "leaves out"),
            ("curriculum=dynamic", config.curriculum.policy == "dynamic", "draws others in place of"),
            ("algorithm.kl_coef=0", config.algorithm.kl_coef == 0, "teaches nothing from"),
        ):
            if hinders:
                raise ValueError(
                    f"upgrade.writing.reward=none: {key} {why} groups without a difference in reward, and M0's prompts "
                    "give no other: change it, or set upgrade.writing.reward=agreement"
                )
    kept, notes = write(config, lost)
    folder = (run_dir / FOLDER).absolute()
    run_folder.hold(lock, run_dir)
    if multihost.is_first():
        save(folder, config, kept, notes)
        print(table(kept, notes))
    exchange.barrier("rehearsal")
    return dataclasses.replace(
        config,
        domains=tuple(
            dataclasses.replace(domain, eval_only=False, train=str(file_of(folder, domain.name)))
            if domain.name in kept and not notes.get(domain.name)
            else domain
            for domain in config.domains
        ),
    )


def write(config: Config, names: Sequence[str], m0: M0 | None = None) -> tuple[dict[str, Kept], dict[str, str]]:
    """({domain: what was kept and dropped}, {domain: why it stays evaluation only, one line}).

    m0: loaded unless given. The evaluation rows are read for the frames and for the contamination check; the writer
    gets the frames alone.
    """
    limits.validate(config, jax.device_count())
    found = domains.load([dataclasses.replace(domain, train=None, eval_only=True) for domain in config.domains])
    rubrics = schema.load_all([domain.rubric for domain in config.domains])
    frames, notes = {}, {}
    for number, (domain, rubric) in enumerate(zip(found, rubrics)):
        if domain.name in names:
            frames[number] = rehearsed.frame(domain)
            if refusal := refused(frames[number], rubric, config.upgrade.writing.reward == "none"):
                notes[domain.name] = refusal
                del frames[number]
    kept = {frame.name: Kept(frame, number) for number, frame in frames.items()}
    if kept:
        single = [
            None if registry.is_multi_turn(domain.environment) else domain.environment for domain in config.domains
        ]
        with RubricEvaluator(single, config.rubric, rubrics) as grader, waiting.bars() as progress:
            tools = rehearsal_rounds.Tools(
                m0 or M0(config),
                contaminated(config, found, progress),
                lambda frame: needs_answer(frame.environment, rubrics[kept[frame.name].number]),
                graded_on_first(grader),
                nearest(config),
                jax.random.fold_in(jax.random.key(config.run.seed), STREAM),
            )
            rehearsal_rounds.run(config.upgrade.writing, list(kept.values()), tools)
            for each in kept.values():
                each.reasons = {why: n for (d, why), n in grader.failures.items() if d == each.number}
    for name, each in kept.items():
        if len(each.rows) < config.upgrade.writing.least:
            reason = next(iter(each.reasons), "")
            notes[name] = (
                f"{len(each.rows)} prompts kept, fewer than upgrade.writing.least={config.upgrade.writing.least}"
                + (f"; its grader said: {reason}" if reason else "")
            )
    return kept, notes


def refused(frame: Frame, rubric: schema.Rubric | None, ungraded: bool) -> str:
    """Why nothing can be written for a domain, in one line; "" where it can. ungraded: its rows need no grader."""
    if registry.is_multi_turn(frame.environment):
        return f"environment {frame.environment} grades conversations, not answers to a prompt of M0's"
    graded = ungraded or rubric is not None or frame.environment not in BY_ROW
    if not graded and not (frame.environment == "constraints" and frame.meta.get("constraints")):
        return f"environment {frame.environment} reads tests of each row's own, which M0 does not write"
    if not (frame.description or frame.form or frame.turns):
        return "nothing says what its prompts are: give the domain a description"
    return ""


def contaminated(
    config: Config, found: list[Domain], progress: Callable
) -> Callable[[list[tuple[Frame, str]]], list[bool]]:
    """Of (frame, prompt): whether the gate's detector takes the prompt for an evaluation row of any domain."""
    _, evaluation = gate.items(found)
    by_name = {domain.name: domain.config for domain in found}
    settings = dataclasses.replace(config.contamination, sample=0)  # every prompt is looked at

    def check(written: list[tuple[Frame, str]]) -> list[bool]:
        flagged = None
        if multihost.is_first():
            rows: dict[str, list[tuple[int, dict]]] = {}
            for n, (frame, prompt) in enumerate(written):
                rows.setdefault(frame.name, []).append((n, rehearsed.row(frame, prompt)))
            as_domains = [Domain(name, by_name[name], {1: [row for _, row in of]}, []) for name, of in rows.items()]
            detector = ContaminationDetector(settings, progress, insist=settings.policy == "halt")
            matches = detector.find(gate.items(as_domains)[0], evaluation).matches
            hits = {(match.domain, gate.number(match.train_id)) for match in matches}
            flagged = sorted(n for name, of in rows.items() for i, (n, _) in enumerate(of) if (name, i) in hits)
        flagged = set(exchange.from_first(flagged))
        return [n in flagged for n in range(len(written))]

    return check


def graded_on_first(grader: RubricEvaluator) -> Callable[[list[int], list[dict], list[str]], np.ndarray]:
    """Grades f32, NaN where there is none: a judge or a user's program is asked by one process only."""

    def grade(domain_B: list[int], rows: list[dict], replies: list[str]) -> np.ndarray:
        found = None
        if multihost.is_first():
            grades = grader.grade(np.array(domain_B, np.int32), rows, replies)
            found = np.where(grades.valid_B, grades.grade_B, -1.0).tolist()
        grade_B = np.array(exchange.from_first(found), np.float32)
        return np.where(grade_B < 0, np.nan, grade_B)

    return grade


def nearest(config: Config) -> Callable[[list[str]], list[str]]:
    """Of texts: the name of the domain with the nearest description, "" where none is near enough."""
    described = [(domain.name, domain.description) for domain in config.domains if domain.description]

    def find(texts: list[str]) -> list[str]:
        names = None
        if multihost.is_first():
            try:
                embedder = semantic.Embedder(config.contamination.model, config.contamination.batch)
                cosine_TD = embedder.embed(texts) @ embedder.embed([text for _, text in described]).T
            except semantic.Unavailable as error:
                print(f"rehearsal: prompts without a form are not assigned to domains: {error}")
                names = [""] * len(texts)
            else:
                least = config.upgrade.writing.likeness
                names = [described[d][0] if line[d] >= least else "" for line in cosine_TD for d in [line.argmax()]]
        return exchange.from_first(names)

    return find if described else lambda texts: [""] * len(texts)


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{quote(name, safe='')}.jsonl"


def save(folder: Path, config: Config, kept: dict[str, Kept], notes: dict[str, str]) -> None:
    """The rows of each domain that has enough, and the report of all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in kept.items():
        if not notes.get(name):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in each.rows)
            atomic.replace(file_of(folder, name), lines, errors="backslashreplace")
    report = {
        "model": config.model.path,
        "writing": dataclasses.asdict(config.upgrade.writing),
        "domains": {name: each.report() for name, each in kept.items()},
        "evaluation_only": notes,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    atomic.replace(folder / REPORT, text, errors="backslashreplace")


def table(kept: dict[str, Kept], notes: dict[str, str]) -> str:
    """A line for each domain and source, one for each domain that stays evaluation only."""
    heads = ("written", *rehearsal_rounds.DROPPED, "kept")
    width = max([6, *map(len, kept)])
    lines = [f"{'domain':<{width}} {'source':<9} " + " ".join(f"{head:>{max(len(head), 7)}}" for head in heads)]
    for name, each in kept.items():
        for source, counts in each.counts.items():
            numbers = " ".join(f"{counts[head]:>{max(len(head), 7)},}" for head in heads)
            lines.append(f"{name:<{width}} {source:<9} {numbers}")
    lines += [f"{name}: evaluation only: {note}" for name, note in notes.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("rehearsal", __doc__)
    cli.add_config_arguments(arguments)
    arguments.add_argument("--only", metavar="NAME,...", help="domains to write for; default: all that are not new")
    given = arguments.parse_args(argv)
    with cli.bad_input():
        config = located(cli.compose_config(given.config_name, given.config_dir, given.overrides))
        known = [domain.name for domain in config.domains if not domain.new]
        names = given.only.split(",") if given.only else known
        if unknown := set(names) - set(known):
            raise ValueError(f"--only {','.join(sorted(unknown))}: no such prior domain; there are {', '.join(known)}")
        set_up_runtime(config)
        folder = run_folder.choose(config) / FOLDER
        kept, notes = write(config, names)
        save(folder, config, kept, notes)
    print(table(kept, notes))
    print(f"rows and report: {folder}")
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
