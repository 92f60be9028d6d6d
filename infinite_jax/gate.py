"""The contamination gate: what training and evaluation rows share, and what becomes of it, before anything is compiled.

    screened = gate.screen(config)                     reads the domains, compares, applies contamination.policy
    screened = gate.screen(config, run_dir)            of a run that goes on: what it began with stays as it was

The detector is curriculum/contamination.py's. Under `remove` matched training rows are dropped. Under `halt` a stage
that cannot run, or a domain with a larger share of matched rows than the tolerance, ends the run before it begins; else
matched rows are dropped as well. Under `report` nothing is.

RUN_DIR/contamination/ holds report.json, report.html and removed.json: by domain a hash of the rows as they were read
and the numbers of those dropped. A run that is continued drops these and compares nothing again, so that another
machine's embeddings cannot change its data; only domains that join it are compared, with all others. Findings are
kept by a hash of configuration and data in contamination.cache, so that the same comparison is not made twice.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax

from configs import limits
from configs.schema import Config
from curriculum import domains, semantic
from curriculum.contamination import ContaminationConfig, ContaminationDetector, Found, Item, Match, Stage
from curriculum.domains import Domain
from infinite_jax import atomic, contamination_report, waiting
from sharding import exchange, multihost

WORST = 3  # domains that the console names
RULES = 1  # of the comparison; raised with every change that can change what is found
FOLDER, REMOVED = "contamination", "removed.json"
REMOVE, KEEP, LATE, STOP = "removed", "kept", "kept: trained on already", "halted"
# Keys that say what is done with findings, and do not change them.
DEEDS = ("policy", "tolerance", "batch", "memorised", "cache")


class Screened(NamedTuple):
    domains: list[Domain]  # without the rows removed
    report: dict | None  # of report.json; None where nothing was compared
    removed: dict  # of removed.json
    halted: str  # one line; "" = go on


def screen(config: Config, run_dir: Path | None = None, again: bool = False) -> Screened:
    """Reads all domains and applies the gate; all processes call it, the first one compares.

    run_dir: a run's folder, whose decision on its own domains stands; `again` compares even where findings are kept.
    Raises ValueError or FileNotFoundError, one line, on what the user must mend.
    """
    limits.validate(config, jax.device_count())
    found = domains.load(config.domains, adaptive=config.curriculum.difficulty == "adaptive")
    decided = read_removed(run_dir) if run_dir else {}
    fresh = [domain.name for domain in found if domain.name not in decided]
    decision = None
    if multihost.is_first():
        decision = _decide(config, found, decided, fresh, again)
    halted, removed = exchange.from_first(decision and [decision.halted, decision.removed])
    report = decision.report if decision else None
    kept = found if halted else [without(domain, removed[domain.name]["rows"]) for domain in found]
    return Screened(kept, report, removed, halted)


def _decide(config: Config, found: list[Domain], decided: dict, fresh: list[str], again: bool) -> Screened:
    digests = {domain.name: rows_sha256(domain) for domain in found}
    nothing = {name: {"sha256": digest, "rows": []} for name, digest in digests.items()}
    # of rows that are not those of the record nothing is dropped: run_folder.check_data then says that they changed
    removed = nothing | {name: was for name, was in decided.items() if was["sha256"] == digests.get(name)}
    if not fresh or not config.contamination.stages:
        return Screened(found, None, removed, "")
    findings, hit = compare(config.contamination, found, digests, again)
    report = contamination_report.build(config, found, findings, digests, hit)
    gone = {name: set(was["rows"]) for name, was in removed.items()}
    report["matches"], halted = judge(config.contamination, findings, report["summary"], fresh, gone)
    if not halted:
        for match in report["matches"]:
            if match["action"] == REMOVE and match["domain"] in fresh:
                removed[match["domain"]]["rows"].append(number(match["train_id"]))
    report["summary"]["verdict"] = halted or "passed"
    _say(config.contamination, report, halted)
    return Screened(found, report, removed, halted)


def items(found: list[Domain]) -> tuple[list[Item], list[Item]]:
    """(training rows, evaluation rows) of all domains as the detector reads them; ids count as removed.json does."""
    train, evaluation = [], []
    for domain in found:
        sides = (train, "train", domain.train_rows), (evaluation, "test", domain.test_rows)
        for (into, side, rows), maker in zip(sides, domain.makers):
            into += [
                Item(row["messages"][-1]["content"], domain.name, f"{domain.name}/{side}/{i}", row.get("key"), maker)
                for i, row in enumerate(rows)
            ]
    return train, evaluation


def compare(
    config: ContaminationConfig, found: list[Domain], digests: dict[str, str], again: bool = False
) -> tuple[Found, bool]:
    """What the detector finds, and whether it was found before: then it is read from contamination.cache."""
    path = Path(config.cache) / f"{cache_key(config, found, digests)}.json" if config.cache else None
    if path is not None and not again and (kept := _load(path)) is not None:
        return kept, True
    with waiting.bars() as progress:
        findings = ContaminationDetector(config, progress, insist=config.policy == "halt").find(*items(found))
    if path is not None and not findings.not_run:
        _store(path, findings)
    return findings, False


def cache_key(config: ContaminationConfig, found: list[Domain], digests: dict[str, str]) -> str:
    """sha256 of all that the findings depend on: rules, configuration, data and the versions of what compares."""
    asked = {key: value for key, value in dataclasses.asdict(config).items() if key not in DEEDS}
    sources = [[domain.name, digests[domain.name], *domain.makers] for domain in found]
    with_model = config.policy == "halt"  # the comparison then fails without one
    parts = [RULES, asked, sources, _versions(), _model(config.model), with_model]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str | None]:
    found = {}
    for name in ("datasketch", "faiss-cpu", "sentence-transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _model(name: str) -> list | None:
    """Names, sizes and times of the model's files; the name itself where it is no folder."""
    try:
        folder = Path(semantic.locate(name))
    except semantic.Unavailable:
        return None
    if not folder.is_dir():
        return [name]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _load(path: Path) -> Found | None:
    """What a file of the cache holds; None where it is missing or damaged: then it is found again."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Found([Match(*match) for match in data["matches"]], [Stage(*stage) for stage in data["stages"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(path: Path, findings: Found) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(json.dumps(findings._asdict()), encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        print(f"warning: contamination.cache: findings are not kept: {error}", file=sys.stderr)


def number(train_id: str) -> int:
    """Of a training row within its domain, as removed.json counts."""
    return int(train_id.rsplit("/", 1)[1])


def judge(
    config: ContaminationConfig, found: Found, summary: dict, fresh: list[str], gone: dict[str, set[int]]
) -> tuple[list[dict], str]:
    """(matches with what is done about each, why the run must not begin or "").

    gone: of the domains that are not fresh, the training rows that the run began without.
    """
    halted = ""
    if config.policy == "halt":
        if found.not_run:
            stage = found.not_run[0]
            halted = f"contamination.policy=halt: stage {stage.name} NOT RUN, so nothing is known: {stage.note}"
        for name, domain in summary["domains"].items():
            if not halted and name in fresh and domain["share"] > config.tolerance:
                halted = (
                    f"contamination.policy=halt: {domain['matched']:,} of {domain['train']:,} training rows of domain "
                    f"{name} ({domain['share']:.2%}) are evaluation prompts, tolerance {config.tolerance:.2%}: see the "
                    "report, mend the data, or set contamination.policy=remove"
                )
    action = STOP if halted else KEEP if config.policy == "report" else REMOVE

    def done(match: Match) -> str:
        if match.domain in fresh:
            return action
        return REMOVE if number(match.train_id) in gone[match.domain] else LATE

    return [{**match._asdict(), "action": done(match)} for match in found.matches], halted


def _say(config: ContaminationConfig, report: dict, halted: str) -> None:
    """One line for the whole, one for each stage that could not run."""
    summary = report["summary"]
    for stage in summary["stages"]:
        if stage["status"] == "NOT RUN":
            print(f"contamination: stage {stage['name']} NOT RUN: {stage['note']}")
    counts = Counter(match["action"] for match in report["matches"])
    done = ", ".join(f"{number:,} {action}" for action, number in counts.items()) or "none matched"
    done += _where(report["matches"])
    hit = " (cache hit)" if summary["cache_hit"] else ""
    print(
        f"contamination: {summary['train_rows']:,} training rows against {summary['evaluation_rows']:,} evaluation "
        f"prompts: {done}{hit}"
    )
    if halted:
        print(f"halted: {halted}", file=sys.stderr)


def _where(matches: list[dict]) -> str:
    """ " (a 60, b 30, c 5, 2 other domains 7)": the matched rows of the worst three domains and of the rest."""
    rows = Counter(match["domain"] for match in matches).most_common()
    parts = [f"{name} {number:,}" for name, number in rows[:WORST]]
    if others := rows[WORST:]:
        parts.append(f"{len(others)} other domain{'s' * (len(others) > 1)} {sum(number for _, number in others):,}")
    return f" ({', '.join(parts)})" if parts else ""


def rows_sha256(domain: Domain) -> str:
    """Of the rows as they were read, both sides."""
    digest = hashlib.sha256()
    for rows in (*domain.train_levels.values(), domain.test_rows):
        digest.update(f"{len(rows)}\n".encode())
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def without(domain: Domain, numbers: list[int]) -> Domain:
    """The domain without the training rows of these numbers, counted over all its levels.

    Raises ValueError, one line, where a level would be left empty.
    """
    dropped, first, kept = set(numbers), 0, {}
    for level, rows in domain.train_levels.items():
        kept[level] = [row for i, row in enumerate(rows, first) if i not in dropped]
        first += len(rows)
        if rows and not kept[level]:
            where = f", level {level}" if len(domain.train_levels) > 1 else ""
            raise ValueError(
                f"domain {domain.name}{where}: all {len(rows)} training rows are evaluation prompts: give other rows, "
                "set eval_only: true, or contamination.policy=report"
            )
    return domain._replace(train_levels=kept) if dropped else domain


def write(folder: Path, screened: Screened) -> None:
    """RUN_DIR/contamination, on the first process."""
    if not multihost.is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if screened.report is not None:
        contamination_report.write(folder, screened.report)
    if screened.halted:
        print(f"report: {folder / contamination_report.REPORT}, {folder / contamination_report.PAGE}", file=sys.stderr)
    else:
        if screened.report is not None and screened.report["matches"]:
            print(f"contamination: every match stands in {folder / contamination_report.PAGE}")
        atomic.replace(folder / REMOVED, json.dumps(screened.removed))


def read_removed(run_dir: Path) -> dict:
    """removed.json of a run, {} where it has none. Raises ValueError, one line, on another file."""
    path = run_dir / FOLDER / REMOVED
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(name): {"sha256": str(was["sha256"]), "rows": list(map(int, was["rows"]))}
            for name, was in found.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the file that a run writes: restore it from a backup") from error
