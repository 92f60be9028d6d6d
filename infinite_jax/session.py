"""Builds everything a verb needs from a Config: mesh, model, data, curriculum, grader, trainer, evaluator.

All that the user gave is read and checked here, before anything is compiled.
"""

import hashlib
import itertools
import json
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import limits
from configs.schema import Config
from curriculum import domains, policies
from infinite_jax import prompts
from infinite_jax.heldout import Evaluator
from infinite_jax.prompts import Stream
from infinite_jax.trainer import InfiniteGRPOTrainer, initial_train_state
from infinite_jax.types import RunState
from models import policy, source, tokenizer
from models.architectures import DecoderConfig
from rubric.evaluator import RubricEvaluator
from sharding.mesh import make_mesh


class Session(NamedTuple):
    config: Config
    mesh: Mesh
    decoder: DecoderConfig
    tokenizer: object
    names: list[str]
    grader: RubricEvaluator
    evaluator: Evaluator
    trainer: InfiniteGRPOTrainer
    state: RunState  # of step 0
    data_sha256: str  # of every row read


def set_up_runtime(config: Config) -> None:
    """Process-wide settings; call before the first device is touched."""
    if config.run.deterministic:
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
        )


def open_session(config: Config) -> Session:
    """Reads model and data and builds the parts. Raises ValueError, one line, on anything the user must mend.

    The caller closes `grader`.
    """
    limits.validate(config, jax.device_count())
    mesh = make_mesh(config.mesh)
    names = [domain.name for domain in config.domains]
    grader = RubricEvaluator([domain.environment for domain in config.domains], config.rubric)
    try:
        text = source.load_tokenizer(config.model)
        train, test = _read_domains(config, text)
        decoder, params = source.load(config.model, mesh)
        stop_ids, pad_id = _markup(config, text, decoder, [*train, *test])
    except BaseException:
        grader.close()
        raise
    stream = Stream(train, names, config.run.seed)
    curriculum = policies.build(config.curriculum)
    # copied where the cast changes nothing: the parameters are donated to the update, the reference is not
    reference = None if config.algorithm.kl_type == "none" else jax.tree.map(jnp.copy, policy.cast(decoder, params))
    shared, ids = (decoder, mesh), (text, stop_ids, pad_id)
    trainer = InfiniteGRPOTrainer(
        config.algorithm, *shared, reference, *ids, names, stream, curriculum, grader, config.run.seed
    )
    evaluator = Evaluator(config.eval, config.algorithm, *shared, *ids, test, names, grader, config.run.seed)
    triage = curriculum.init(
        config.run.seed,
        [domain.weight for domain in config.domains],
        [not domain.eval_only for domain in config.domains],
        [domain.new for domain in config.domains],
        [domain.arrives for domain in config.domains],
    )
    triage = jax.device_put(triage, NamedSharding(mesh, PartitionSpec()))
    nowhere_D = np.zeros(len(names), np.int32)
    train_state = initial_train_state(config.algorithm, decoder, params, mesh)
    state = RunState(train_state, triage, nowhere_D, nowhere_D.copy(), np.zeros((), np.int64))
    return Session(config, mesh, decoder, text, names, grader, evaluator, trainer, state, _data_hash(train, test))


def _read_domains(config: Config, text) -> tuple[list, list]:
    limit, template = config.algorithm.prompt_buckets[-1], config.model.apply_chat_template
    train, test = [], []
    for index, domain in enumerate(domains.load(config.domains)):
        for kept, rows in ((train, domain.train_rows), (test, domain.test_rows)):
            kept.append(prompts.tokenise(text, rows, index, domain.name, limit, template))
    return train, test


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


def _data_hash(train: list, test: list) -> str:
    digest = hashlib.sha256()
    for prompt in itertools.chain.from_iterable([*train, *test]):
        digest.update(json.dumps([prompt.row, prompt.ids], sort_keys=True).encode())
    return digest.hexdigest()
