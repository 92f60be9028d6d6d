"""RUN_DIR/contamination/report.json and report.html: every match with its two texts, a summary of what was compared.

{"matches": [{"domain", "kind", "score", "train_text", "eval_text", "train_id", "eval_id", "eval_domain", "action"}],
 "summary": {"verdict", "policy", "stages", "domains": {name: {...}}, "config_hash", "data_sha256", ...}}
"""

import dataclasses
import json
import string
from collections import Counter
from pathlib import Path

from configs import schema
from configs.schema import Config
from curriculum.contamination import Found
from curriculum.domains import Domain
from infinite_jax import atomic, statistics
from infinite_jax.page import contamination

REPORT, PAGE = "report.json", "report.html"
SAMPLED = ("near", "semantic")  # stages that look at contamination.sample rows a domain


def build(config: Config, found: list[Domain], findings: Found, digests: dict[str, str], hit: bool) -> dict:
    """The report, its matches without what is done about them."""
    domains = {domain.name: _domain(config, domain, findings) for domain in found}
    summary = {
        "policy": config.contamination.policy,
        "tolerance": config.contamination.tolerance,
        "train_rows": sum(domain["train"] for domain in domains.values()),
        "evaluation_rows": sum(domain["evaluation"] for domain in domains.values()),
        "matched": len(findings.matches),
        "stages": [
            stage._asdict() | {"matched": sum(match.kind == stage.name for match in findings.matches)}
            for stage in findings.stages
        ],
        "domains": domains,
        "config": dataclasses.asdict(config.contamination),
        "config_hash": schema.config_hash(config),
        "data_sha256": digests,
        "cache_hit": hit,
    }
    return {"matches": [match._asdict() for match in findings.matches], "summary": summary}


def _domain(config: Config, domain: Domain, findings: Found) -> dict:
    """`share` is of all training rows; where near and semantic saw a sample it is the estimate for all, `interval` its
    95 % interval (Wilson), and None where every row was compared."""
    rows, most = len(domain.train_rows), config.contamination.sample
    kinds = Counter(match.kind for match in findings.matches if match.domain == domain.name)
    leaked = {match.eval_id for match in findings.matches if match.eval_domain == domain.name}
    whole = sum(number for kind, number in kinds.items() if kind not in SAMPLED)
    some, seen = sum(kinds[kind] for kind in SAMPLED), min(rows, most or rows)
    share = (whole + (rows - whole) * some / seen) / rows if rows and most else (whole + some) / max(rows, 1)
    interval = None
    if most and rows > seen:
        interval = [(whole + (rows - whole) * end) / rows for end in statistics.wilson(some, seen)]
    return {
        "train": rows,
        "evaluation": len(domain.test_rows),
        "matched": whole + some,
        "share": share,
        "interval": interval,
        "kinds": dict(kinds),
        "evaluation_matched": len(leaked),
    }


def write(folder: Path, report: dict) -> None:
    """Both files, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    # a prompt may hold half a surrogate pair
    atomic.replace(folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False), errors="backslashreplace")
    atomic.replace(folder / PAGE, page(report), errors="xmlcharrefreplace")


def page(report: dict) -> str:
    """The report as HTML."""
    template = string.Template((Path(__file__).parent / "page" / "template.html").read_text(encoding="utf-8"))
    return template.substitute(contamination.parts(report))
