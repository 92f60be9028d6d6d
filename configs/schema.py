"""The schema of a run's configuration. YAML under configs/ holds the numbers; a key missing here fails there.

Every part of the house owns its section; this file adds those of the loop itself and composes them.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs import names
from configs.names import nearest
from curriculum import suites
from curriculum.contamination import ContaminationConfig
from curriculum.domains import DomainConfig
from curriculum.policies import CurriculumConfig
from curriculum.upgrade import UpgradeConfig
from models.source import ModelConfig
from rubric.anchor_keeper import AnchorConfig
from rubric.evaluator import RubricConfig
from sharding.mesh import MeshConfig

HERE = Path(__file__).parent


@dataclass(frozen=True)
class RunConfig:
    dir: str  # "" = runs/<name>-<UTC time>
    name: str
    seed: int
    steps: int  # updates in all, a bound of the loop and of nothing else
    tokens: int  # the run ends at the step that brings the generated tokens to so many; 0 = no such bound
    eval_every: int  # steps; the last step is always evaluated
    checkpoint_every: int  # steps; the last step is always saved; 0 = nothing is saved
    check_every: int  # steps after which processes compare their triage state and data position; 0 = never
    keep_last: int  # newest checkpoints kept
    keep_best: int  # best checkpoints kept, by eval/macro
    deterministic: bool  # on a GPU: deterministic operations, at a cost in speed


@dataclass(frozen=True)
class AlgorithmConfig:
    prompts: int  # P, prompts a step
    group_size: int  # G, samples of each prompt
    prompt_buckets: tuple[int, ...]  # tokens; ascending, at most three; longer prompts are refused at the start
    max_new_tokens: int  # tokens of a completion; in conversations of all turns, the environment's too
    max_turns: int  # of the policy, in a conversation with an environment
    turn_chunk: int  # tokens a row of one forward pass over an environment's turn
    temperature: float  # > 0
    top_k: int  # 0 = off
    top_p: float  # 1 = off
    epochs: int  # times that a batch is gone through
    minibatches: int  # updates an epoch, each on its part of the groups
    advantage: str  # against the group: std | none | loo | global; gae: by a critic's values
    gamma: float  # gae: discount of a token
    gae_lambda: float  # gae: 0 trusts the critic's next value, 1 the rewards that came
    critic: str  # none | head: on the policy's last hidden state | network: a decoder of its own
    critic_learning_rate: float
    value_clip: float  # range in which a value may move from the one before the updates, units of the reward; 0 = off
    freeze_steps: int  # updates of the critic alone, at the start
    ratio: str  # token | sequence: GSPO's, the geometric mean over a row's tokens
    clip_low: float  # the clip acts from the second update on a batch on: before it the ratio is 1
    clip_high: float
    importance_cap: float  # truncation of the sampler-to-trainer weight; 0 = off
    aggregation: str  # token_mean | seq_mean | seq_sum_const
    zero_variance: str  # keep | drop: whether groups without a difference stay in the denominators
    truncated: str  # keep | mask: whether rows cut off at max_new_tokens are learnt from
    resample_rounds: int  # rounds of P prompts a step at most, where curriculum=dynamic draws such groups again
    kl_type: str  # loss | reward | none
    kl_estimator: str  # k1 | k2 | k3 | k3_is
    kl_coef: float
    entropy_coef: float
    microbatches: int  # gradient accumulation
    learning_rate: float
    lr_warmup_steps: int
    lr_decay_steps: int  # 0 = constant
    weight_decay: float  # of every parameter, norms included
    adam_b1: float
    adam_b2: float
    adam_eps: float
    max_grad_norm: float


@dataclass(frozen=True)
class EvalConfig:
    batch: int  # prompts at a time
    prompts: int  # test prompts a domain, the first of its file; 0 = all
    samples: int  # 1 = greedy only; more adds pass@1 at temperature 1 over so many samples
    canary: bool  # nll of a fixed text and KL to the start on neutral prompts: what no domain trains


@dataclass(frozen=True)
class Config:
    run: RunConfig
    model: ModelConfig
    domains: tuple[DomainConfig, ...]
    curriculum: CurriculumConfig
    rubric: RubricConfig
    anchors: AnchorConfig
    contamination: ContaminationConfig
    upgrade: UpgradeConfig
    algorithm: AlgorithmConfig
    eval: EvalConfig
    mesh: MeshConfig


# Keys whose change at resume is harmless: they bound the run or place it, and enter no computation.
FREE_AT_RESUME = (
    "run.steps",
    "run.tokens",
    "run.eval_every",
    "run.checkpoint_every",
    "run.check_every",
    "run.keep_last",
    "run.keep_best",
    "contamination.policy",  # of domains that join; what became of the others stands in removed.json
    "contamination.tolerance",
    "mesh",
)


def build(cls: type, data: object, key: str = "") -> Any:
    """A `cls` (dataclass, tuple of them, or scalar type) from plain YAML data.

    Raises ValueError, one line with key, value and remedy, on an unknown or missing key and on a wrong type.
    """
    if dataclasses.is_dataclass(cls):
        if not isinstance(data, dict):
            raise ValueError(f"{key}={data!r}: expected a mapping with the keys {', '.join(_fields(cls))}")
        for name in data:
            if name not in _fields(cls):
                raise ValueError(f"unknown key {_join(key, name)}={data[name]!r}: {nearest(name, _fields(cls))}")
        for name, spec in _fields(cls).items():
            if name not in data and spec.default is dataclasses.MISSING:
                raise ValueError(f"missing key {_join(key, name)}: set {_join(key, name)}=...")
        hints = typing.get_type_hints(cls)
        return cls(**{name: build(hints[name], value, _join(key, name)) for name, value in data.items()})
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise ValueError(f"{key}={data!r}: expected a list")
        return tuple(build(args[0], value, f"{key}[{i}]") for i, value in enumerate(data))
    if origin in (types.UnionType, typing.Union):
        return None if data is None else build(args[0], data, key)
    if cls is float and type(data) is int:
        return float(data)
    if type(data) is not cls:
        raise ValueError(f"{key}={data!r}: expected {_ARTICLE[cls]}")
    return data


_ARTICLE = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        key = _join(prefix, name)
        keys += known_keys(hint, key) if dataclasses.is_dataclass(hint) else [key]
    return keys


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def _join(prefix: str, name: object) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


def groups() -> list[str]:
    """Names of what a file is chosen for, group=name."""
    found = [path for path in HERE.glob("**/") if path != HERE and any(path.glob("*.yaml"))]
    return sorted(path.relative_to(HERE).as_posix() for path in found)


def options(group: str) -> list[str]:
    """The files of a group that come with the package."""
    return sorted(path.stem for path in (HERE / group).glob("*.yaml"))


def nearest_key(key: str, more: Sequence[str] = ()) -> str:
    """The remedy for a key that is neither of the schema nor one of `more`."""
    return names.nearest_key(key, [*more, *known_keys()], groups())


def get(config: Config, key: str) -> Any:
    """The value under a dotted key: get(config, "run.steps")."""
    return functools.reduce(getattr, key.split("."), config)


def override(config: Config, assignments: Sequence[str]) -> Config:
    """`config` with key=value assignments, values in YAML. Raises ValueError, one line, on an unknown key."""
    data = as_dict(config)
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if equals and key in typing.get_type_hints(Config):
            raise ValueError(
                f"argument {assignment!r}: groups are chosen at the start; set single keys, {key}.<name>=..."
            )
        if not equals:
            raise ValueError(f"argument {assignment!r}: expected key=value, such as run.steps=100")
        if key not in known_keys():
            raise ValueError(f"unknown key {assignment}: {nearest_key(key)}")
        *sections, name = key.split(".")
        functools.reduce(dict.__getitem__, sections, data)[name] = yaml.safe_load(value)
    return build(Config, data)


def as_dict(config: Config) -> dict:
    """Plain data for YAML and JSON; build(Config, as_dict(config)) == config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(config: Config) -> dict[str, Any]:
    """Dotted key -> value for every leaf; lists are leaves."""

    def walk(data, prefix):
        for name, value in data.items():
            if isinstance(value, dict):
                yield from walk(value, _join(prefix, name))
            else:
                yield _join(prefix, name), value

    return dict(walk(as_dict(config), ""))


def config_hash(config: Config) -> str:
    """sha256 over every key that enters a computation (not FREE_AT_RESUME, not the run's name and place)."""
    left_out = (*FREE_AT_RESUME, "run.name", "run.dir")
    kept = {key: value for key, value in flat(config).items() if not covers(left_out, key)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def covers(keys: Iterable[str], key: str) -> bool:
    """Whether `key` is one of `keys` or lies in a section that is."""
    return any(key == each or key.startswith(each + ".") for each in keys)


def located(config: Config) -> Config:
    """`config` with the paths of existing files and folders made absolute, so that a run continues from anywhere."""

    def absolute(path: str | None) -> str | None:
        return os.path.abspath(path) if path and os.path.exists(path) else path

    sources = [
        dataclasses.replace(
            domain,
            train=absolute(domain.train),
            test=absolute(domain.test) and suites.located(absolute(domain.test)),
            rubric=absolute(domain.rubric) if (domain.rubric or "").endswith((".yaml", ".yml")) else domain.rubric,
            environment=_located_environment(domain.environment, absolute),
        )
        for domain in config.domains
    ]
    model = config.model
    if model.path != "tiny":
        model = dataclasses.replace(model, path=absolute(model.path))
    rubric = config.rubric
    if rubric.judge is not None and rubric.judge.cache:
        judge = dataclasses.replace(rubric.judge, cache=os.path.abspath(rubric.judge.cache))
        rubric = dataclasses.replace(rubric, judge=judge)
    contamination = dataclasses.replace(config.contamination, model=absolute(config.contamination.model))
    return dataclasses.replace(config, model=model, domains=tuple(sources), rubric=rubric, contamination=contamination)


def _located_environment(environment: str, absolute: Callable[[str | None], str | None]) -> str:
    """With the file of a user's module, or of a `file=` option, made absolute."""
    if environment.endswith(".py"):
        return absolute(environment)
    return re.sub(r"(?<=,file=)[^,]+", lambda found: absolute(found[0]), environment)
