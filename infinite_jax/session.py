"""Builds everything a verb needs from a Config: mesh, model, data, curriculum, grader, trainer, evaluator.

All that the user gave is read and checked here, before anything is compiled.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs import limits
from configs.schema import Config, EvalConfig
from curriculum import domains, monitor, policies
from curriculum.domains import Domain
from infinite_jax import conversation, placement, prompts, roster
from infinite_jax.canary import Canary
from infinite_jax.conversation import Talk
from infinite_jax.heldout import Evaluator
from infinite_jax.prompts import PriorityStream, Prompt, Stream
from infinite_jax.trainer import ADAPTER_STREAM, InfiniteGRPOTrainer, stream_key
from infinite_jax.types import Params, RunState
from models import policy, source, tokenizer
from models.architectures import DecoderConfig
from rubric import schema
from rubric.environments.runner import Environments
from rubric.evaluator import RubricEvaluator
from sharding import exchange
from sharding.mesh import MeshConfig, make_mesh, make_rollout_mesh


class Session(NamedTuple):
    config: Config
    mesh: Mesh  # that trains
    decoder: DecoderConfig
    tokenizer: object
    names: list[str]
    grader: RubricEvaluator
    evaluator: Evaluator
    baseline: Evaluator | None  # of M0, in an upgrade
    canary: Canary | None
    trainer: InfiniteGRPOTrainer
    state: RunState  # of step 0
    data_sha256: dict[str, str]  # of every row used, by domain
    environments: Environments  # of conversations

    def close(self) -> None:
        """Ends the processes of graders and environments. Or use the session in `with`."""
        self.grader.close()
        self.environments.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def set_up_runtime(config: Config) -> None:
    """Process-wide settings; call before the first device is touched."""
    if config.run.deterministic:
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
        )


class Loaded(NamedTuple):
    """What is read from the model's and the domains' files: the same for every policy and seed."""

    mesh: Mesh  # that trains
    rollout_mesh: Mesh
    decoder: DecoderConfig
    tokenizer: object
    stop_ids: tuple[int, ...]
    pad_id: int
    train: list[dict[int, list[Prompt]]]  # of each domain its training prompts by level
    test: list[list[Prompt]]


def open_session(config: Config, rows: list[Domain] | None = None) -> Session:
    """Reads model and data and builds the parts. Raises ValueError, one line, on anything the user must mend.

    rows: of the domains, as the contamination gate leaves them (gate.py); None = all that the sources have.
    The caller closes it.
    """
    limits.validate(config, jax.device_count())
    if config.mesh.rollout_devices and jax.process_count() > 1:
        raise ValueError(
            f"mesh.rollout_devices={config.mesh.rollout_devices}: a rollout on devices of its own needs one process, "
            "since arrays do not move between several: set it to 0"
        )
    return assemble(config, *load(config, rows))


def load(config: Config, rows: list[Domain] | None = None) -> tuple[Loaded, Params]:
    """The files, and the model's parameters on the mesh."""
    sizes = sized(config, source.network(config.model))
    mesh = make_mesh(sizes)
    text = source.load_tokenizer(config.model)
    if rows is None:
        rows = domains.load(config.domains, adaptive=config.curriculum.difficulty == "adaptive")
    with Environments([domain.environment for domain in config.domains]) as environments:
        train, test = _tokenised(config, text, rows, environments)
    decoder, params = source.load(config.model, mesh)
    if decoder.lora:
        params = policy.cast(decoder, params)  # frozen: as they compute
    stop_ids, pad_id = _markup(config, text, decoder, [*_all(train), *test])
    return Loaded(mesh, make_rollout_mesh(sizes, mesh), decoder, text, stop_ids, pad_id, train, test), params


def sized(config: Config, decoder: DecoderConfig) -> MeshConfig:
    """config.mesh with its sizes chosen where it leaves them open; prints why. Raises ValueError, one line."""
    memory = jax.local_devices()[0].memory_stats() or {}
    memory = exchange.from_first(memory.get("bytes_limit"))  # hosts may differ, meshes must not
    mesh, reason = placement.chosen(config, decoder, jax.device_count(), memory)
    if reason and jax.device_count() > 1 and jax.process_index() == 0:
        print(reason)
    return mesh


def assemble(config: Config, loaded: Loaded, params: Params) -> Session:
    """The parts, built. `params` go into the state of step 0, which a step donates, or are the base of its adapters.

    The caller closes the session.
    """
    mesh, rollout_mesh, decoder, text, stop_ids, pad_id, train, test = loaded
    names, seed = [domain.name for domain in config.domains], config.run.seed
    if config.curriculum.level == "prompt":
        stream = PriorityStream(train, seed, config.curriculum.prompt)
    else:
        stream = Stream(train, names, seed)
    upgraded = config.upgrade if config.upgrade.active else None
    curriculum = policies.build(config.curriculum, upgraded)
    base, template = params if decoder.lora else None, config.model.apply_chat_template
    canary = Canary(decoder, mesh, text, pad_id, template, params, base) if config.eval.canary else None
    params, reference = _learnt_and_reference(config, decoder, mesh, params)
    ids, offload = (text, stop_ids, pad_id), config.mesh.offload
    environments, talk, grader = _graders(config, loaded)
    trainer = InfiniteGRPOTrainer(
        config.algorithm,
        decoder,
        mesh,
        rollout_mesh,
        offload,
        placement.waiting(offload, reference),
        base,
        *ids,
        names,
        stream,
        curriculum,
        config.curriculum.capacity,
        np.array([domain.kl for domain in config.domains], np.float32),
        upgraded,
        roster.mute_of(train),
        grader,
        talk,
        seed,
    )

    def evaluator_of(asked: EvalConfig, test: list[list[Prompt]]) -> Evaluator:
        return Evaluator(asked, config.algorithm, decoder, rollout_mesh, *ids, test, names, grader, talk, seed, base)

    baseline = None
    if upgraded is not None:
        test = [prompts.by_hash(prompts.distinct(domain)) for domain in test]  # an evaluation's are a sample of M0's
        asked = dataclasses.replace(config.eval, prompts=upgraded.baseline * config.eval.prompts, samples=1)
        baseline = evaluator_of(asked, test)
    state = _initial_state(config, decoder, mesh, params, curriculum, stream)
    grader.require_loaded()
    parts = (grader, evaluator_of(config.eval, test), baseline, canary, trainer, state)
    return Session(config, mesh, decoder, text, names, *parts, _data_hashes(names, train, test), environments)


def _learnt_and_reference(config: Config, decoder: DecoderConfig, mesh: Mesh, params: Params) -> tuple[Params, Params]:
    """What the updates change, and what the KL holds it to; None where there is no KL."""
    wanted = config.algorithm.kl_type != "none"
    if decoder.lora:  # the base is the reference, too
        key = stream_key(config.run.seed, 0, ADAPTER_STREAM)
        return placement.initial_adapters(decoder, mesh, key), params if wanted else None
    # copied where the cast changes nothing: the parameters are donated to the update, the reference is not
    return params, jax.tree.map(jnp.copy, policy.cast(decoder, params)) if wanted else None


def _initial_state(
    config: Config, decoder: DecoderConfig, mesh: Mesh, params: Params, curriculum, stream: Stream | PriorityStream
) -> RunState:
    train_state = placement.initial_train_state(config.algorithm, decoder, params, mesh, config.mesh.offload)
    triage = curriculum.init(config.run.seed, roster.members(config, stream.sets.size_D))
    watching = None
    if config.upgrade.active:  # on the host: every process holds it whole, and a checkpoint of it belongs to no mesh
        watching = jax.device_get(monitor.init(config.upgrade.monitor, len(config.domains)))
    return RunState(train_state, exchange.replicated(mesh, triage), stream.start(), np.zeros((), np.int64), watching)


def _graders(config: Config, loaded: Loaded) -> tuple[Environments, Talk | None, RubricEvaluator]:
    """Of conversations and of single replies. Talk: None where no domain holds conversations."""
    rubrics = schema.load_all([domain.rubric for domain in config.domains])
    environments, talk = Environments([domain.environment for domain in config.domains]), None
    single = [
        domain.environment if environment is None else None
        for domain, environment in zip(config.domains, environments.of_domain)
    ]
    if None in single:
        talk = conversation.prepare(
            environments,
            loaded.tokenizer,
            loaded.decoder.vocab_size,
            loaded.rollout_mesh,
            apply_chat_template=config.model.apply_chat_template,
            max_turns=config.algorithm.max_turns,
            chunk=config.algorithm.turn_chunk,
        )
    return environments, talk, RubricEvaluator(single, config.rubric, rubrics)


def _tokenised(
    config: Config, text, found: list[Domain], environments: Environments
) -> tuple[list[dict[int, list]], list[list]]:
    """For each domain its training prompts by level and its test prompts, with the tools that the model may call."""
    limit, template = config.algorithm.prompt_buckets[-1], config.model.apply_chat_template
    train, test = [], []
    for index, domain in enumerate(found):

        def tokenised(rows, index=index, name=domain.name):
            tools = functools.partial(environments.tools, index)
            return prompts.tokenise(text, rows, index, name, limit, template, tools)

        train.append({level: tokenised(rows) for level, rows in domain.train_levels.items()})
        test.append(tokenised(domain.test_rows))
    return train, test


def _all(train: list[dict[int, list]]) -> list[list]:
    return [found for levels in train for found in levels.values()]


def _markup(config: Config, text, decoder: DecoderConfig, prompted: list) -> tuple[tuple[int, ...], int]:
    """(stop ids, pad id), after checking that model, tokenizer and lengths belong together."""
    stop_ids, pad_id = tokenizer.stop_ids(text, source.resolve(config.model.path)), tokenizer.pad_id(text)
    largest = max([pad_id, *(max(prompt.ids) for domain in prompted for prompt in domain)])
    known = tuple(stop for stop in stop_ids if stop < decoder.vocab_size)
    if largest >= decoder.vocab_size or not known:
        raise ValueError(
            f"model.path={config.model.path}: the tokenizer uses ids up to {max(largest, *stop_ids)}, the model knows "
            f"{decoder.vocab_size}: use the tokenizer that the model was trained with"
        )
    longest = config.algorithm.prompt_buckets[-1] + config.algorithm.max_new_tokens
    if longest > decoder.max_length:
        raise ValueError(
            f"algorithm.prompt_buckets + algorithm.max_new_tokens = {longest} tokens, more than the model's "
            f"{decoder.max_length}: lower one of them"
        )
    return known, pad_id


def _data_hashes(names: list[str], train: list[dict[int, list]], test: list[list]) -> dict[str, str]:
    found = {}
    for name, levels, held_out in zip(names, train, test, strict=True):
        digest = hashlib.sha256()
        for prompt in itertools.chain(*levels.values(), held_out):
            digest.update(json.dumps([prompt.row, prompt.ids], sort_keys=True).encode())
        found[name] = digest.hexdigest()
    return found
