"""A policy learns from what its environment answers: the last turn is right only if it says what a turn before it said.

pytest -m experiment tests/conversation_learning_test.py
"""

import dataclasses
import zlib

import jax
import numpy as np
import pytest

from configs.cli import compose_config
from infinite_jax import batch, conversation, grpo, prompts
from infinite_jax.placement import initial_train_state
from infinite_jax.prompts import Prompt
from infinite_jax.rollout import Sampling
from infinite_jax.score import Scorer
from infinite_jax.types import Rollout
from models import source, tokenizer
from rubric.environments.runner import Environments
from rubric.evaluator import Grades
from sharding.mesh import build

SIZES = ["algorithm.prompts=8", "algorithm.group_size=8", "algorithm.max_new_tokens=24"]
CONFIG = compose_config("config", None, SIZES)
ALGORITHM = dataclasses.replace(CONFIG.algorithm, kl_type="none", learning_rate=1e-3)
STEPS = 120


class Oracle:
    """Tells one of four letters, which no prompt has, and grades whether the next turn begins with it."""

    def told(self, messages):
        return "abcd"[zlib.crc32(messages[0]["content"].encode()) % 4]

    def interact(self, messages):
        return [{"role": "tool", "content": self.told(messages)}]

    def grade(self, messages, answer):
        reply, told = messages[-1]["content"], self.told(messages)
        if len(messages) < 4:
            return 1.0
        return 4.0 if reply == told else 3.0 if reply[:1] == told else 2.0


@pytest.mark.experiment
def test_the_tiny_model_learns_to_repeat_what_it_was_told():
    mesh = build((1, 1, 1, 1), jax.devices()[:1])
    decoder, params = source.load(CONFIG.model, mesh)
    text = source.load_tokenizer(CONFIG.model)
    pad = tokenizer.pad_id(text)
    sampling = Sampling(1.0, 0, 1.0, 24, 8, tokenizer.stop_ids(text, str(source.TINY)), pad)
    scorer = Scorer(decoder, 1.0, 24, 8)
    prepare = jax.jit(batch.prepare, static_argnums=(0, 1))
    update = jax.jit(grpo.update, static_argnums=(0, 1), donate_argnums=2)
    state, passed = initial_train_state(ALGORITHM, decoder, params, mesh), []
    with Environments([Oracle()]) as environments, jax.set_mesh(mesh):
        talk = conversation.prepare(
            environments, text, decoder.vocab_size, mesh, apply_chat_template=True, max_turns=2, chunk=8
        )
        for step in range(STEPS):
            key = jax.random.fold_in(jax.random.key(0), step)
            asked = [[{"role": "user", "content": f"ask {number}"}] for number in range(step * 8, step * 8 + 8)]
            chosen = [Prompt({"messages": m}, tuple(tokenizer.encode_prompt(text, m)), 0) for m in asked]
            padded = prompts.pad(chosen, (32,), pad)
            found = conversation.converse(decoder, sampling, state.params, talk, chosen, *padded, key)
            rows = [prompt for prompt in chosen for _ in range(8)]
            results = conversation.grade(environments, rows, found)
            grade_B = np.array([results[b].grade for b in range(64)], np.float32)
            grades = Grades(grade_B, (grade_B - 1) / 3, np.ones(64, bool))
            prompt_B = np.repeat(np.arange(8, dtype=np.int32), 8)
            made = found.made
            rollout = Rollout(
                made.tokens_BT, made.loss_mask_BT, made.logp_BT, np.zeros(64, np.int32), prompt_B, made.done_B
            )
            scored = (state.params, state.params, rollout, grades, np.ones(1, np.float32), np.zeros(1, np.float32))
            ready = prepare(ALGORITHM, scorer, *scored)
            state, metrics = update(ALGORITHM, scorer, state, ready, key)
            passed.append(float((grade_B >= 3).mean()))
            assert float(metrics["rollout/logp_gap"]) < 1e-4  # sampler and trainer agree on rows with gaps
    assert np.mean(passed[:3]) < 0.2 and np.mean(passed[-5:]) > 0.9
