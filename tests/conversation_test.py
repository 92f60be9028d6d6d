"""Conversations against a sampler without batch and cache: one row, one token, one whole forward pass at a time.

The reference shares with the engine the order of random keys and encode_turn, nothing else: it finds stop strings in
decoded text, and lays rows out as lists.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import Gemma3TextConfig, LlamaConfig

from infinite_jax import conversation, prompts, turns
from infinite_jax.conversation import converse
from infinite_jax.prompts import Prompt
from infinite_jax.rollout import Sampling, generate
from infinite_jax.score import completion_logp
from infinite_jax.stop_strings import NEVER
from models import policy, tokenizer
from models.architectures import from_hf
from models.source import TINY
from rubric.environments.protocol import Unavailable
from rubric.environments.runner import Environments
from sharding import exchange
from sharding.mesh import build

ROOT = Path(__file__).resolve().parents[1]
TEXT = tokenizer.load(str(TINY))
PAD, END = tokenizer.pad_id(TEXT), tokenizer.stop_ids(TEXT, str(TINY))
SPARE = tuple(range(200, 230))  # ids that end a turn as well: a random model would hardly find END alone
SAMPLING = Sampling(1.0, 0, 1.0, 48, 3, (*END, *SPARE), PAD)
TURNS, CHUNK, BUCKETS = 3, 8, (16, 24)
SHAPE = dict(
    vocab_size=262, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
    max_position_embeddings=128, tie_word_embeddings=True,
)  # fmt: skip
LLAMA = from_hf(LlamaConfig(num_hidden_layers=2, **SHAPE))
GEMMA = from_hf(
    Gemma3TextConfig(
        num_hidden_layers=2, sliding_window=5, sliding_window_pattern=2, query_pre_attn_scalar=4, **SHAPE
    )
)  # fmt: skip


class Chatter:
    """Answers in 1 to 40 characters, or not at all, by what was said; sometimes it is down."""

    stops = ("\x00", "ab", "A")  # of the first, no token but one's own byte

    def interact(self, messages):
        choice = zlib.crc32(repr([m["content"] for m in messages]).encode())
        if choice % 11 == 0:
            raise Unavailable("it rains")
        return [{"role": "tool", "content": "x" * (1 + choice // 7 % (40 if choice % 5 == 0 else 6))}] * (choice % 3)

    def grade(self, messages, answer):
        return 4.0 if messages[-1]["role"] == "assistant" else 1.0


class Quiet(Chatter):
    stops = ()

    def interact(self, messages):
        return [{"role": "user", "content": "<|end|> go on"}]


WORDS = ["hi", "count", "?", "why not"]
CHOSEN = [
    Prompt({"messages": [{"role": "user", "content": word}]}, tuple(ids), d)
    for d, word in zip((0, 1, 2, 0), WORDS)
    for ids in [tokenizer.encode_prompt(TEXT, [{"role": "user", "content": word}])]
]
ROWS = [prompt for prompt in CHOSEN for _ in range(SAMPLING.group_size)]


@functools.cache
def params_of(config):
    return jax.tree.map(lambda x: x * 3.0, policy.init(config, jax.random.key(0)))


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Programs here run few steps of a tiny model: compiled without optimisation they cost a third."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def environments():
    with Environments([Chatter(), "eq", Quiet()]) as made:
        yield made


def talk_of(environments, shape=(1, 1, 1, 1), max_turns=TURNS):
    settings = dict(apply_chat_template=True, max_turns=max_turns, chunk=CHUNK)
    return conversation.prepare(environments, TEXT, 262, build(shape, jax.devices()[: np.prod(shape)]), **settings)


def run(environments, config=LLAMA, sampling=SAMPLING, seed=0, chosen=CHOSEN, **talk):
    prompt_PT, length_P = prompts.pad(CHOSEN, BUCKETS, PAD)
    made = converse(
        config, sampling, policy.sampled(config, params_of(config)), talk_of(environments, **talk), chosen, prompt_PT,
        length_P, jax.random.key(seed),
    )  # fmt: skip
    return made._replace(made=jax.device_get(made.made))


class Reference:
    """One row by hand."""

    def __init__(self, environments, config, sampling, seed, max_turns=TURNS):
        self.environments, self.sampling, self.max_turns = environments, sampling, max_turns
        self.key = jax.random.key(seed)

        @jax.jit
        def last(ids_T, length, key):
            logits = policy.logits(config, params_of(config), ids_T[None])[0, length - 1]
            if not sampling.temperature:
                return jnp.argmax(logits), 0.0
            logp = jax.nn.log_softmax(logits / sampling.temperature)
            token = jax.random.categorical(key, logp)
            return token, logp[token]

        self.last = last

    def row(self, number, prompt):
        environment, room = self.environments.of_domain[prompt.domain], self.sampling.max_new_tokens
        ids, mask, logp, messages = [*prompt.ids], [], [], [*prompt.row["messages"]]
        for turn in range(self.max_turns):
            said, ended = [], False
            while len(mask) < room and not ended:
                key = jax.random.fold_in(jax.random.fold_in(self.key, number), len(mask))
                token, found = self.last(np.pad(ids, (0, 80 - len(ids))), len(ids), key)
                ids, mask, logp, said = [*ids, int(token)], [*mask, True], [*logp, float(found)], [*said, int(token)]
                text = tokenizer.decode(TEXT, said)
                ended = said[-1] in self.sampling.stop_ids
                ended |= any(stop in text for stop in getattr(environment, "stops", ()))
            messages.append({"role": "assistant", "content": text})
            if not ended or environment is None or turn + 1 == self.max_turns:
                return ids, mask, logp, ended, messages, ""
            (answer,) = self.environments.interact([prompt.domain], [prompt.row], [messages])
            if answer.reason or not answer.messages:
                return ids, mask, logp, True, messages, answer.reason
            more = tokenizer.encode_turn(TEXT, answer.messages, ended=said[-1] in self.sampling.stop_ids)
            if len(mask) + len(more) + 1 > room:
                return ids, mask, logp, False, messages, ""
            messages += answer.messages
            ids, mask, logp = ids + more, mask + [False] * len(more), logp + [0.0] * len(more)


CASES = [
    pytest.param(LLAMA, SAMPLING, 0, id="llama-0"),
    pytest.param(LLAMA, SAMPLING, 1, id="llama-1"),
    pytest.param(GEMMA, SAMPLING, 3, id="gemma3", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("config, sampling, seed", CASES)
def test_every_row_is_what_one_row_alone_would_be(environments, config, sampling, seed):
    """Ids, mask, log-probs, messages, ends and reasons of all rows, exactly: what is trained on is what was sampled and
    what was appended."""
    found, reference = run(environments, config, sampling, seed), Reference(environments, config, sampling, seed)
    kinds = set()
    for b, prompt in enumerate(ROWS):
        ids, mask, logp, done, messages, reason = reference.row(b, prompt)
        head = len(prompt.ids)
        assert found.made.tokens_BT[b].tolist() == ids + [PAD] * (len(found.made.tokens_BT[b]) - len(ids))
        assert np.flatnonzero(found.made.loss_mask_BT[b]).tolist() == [head + i for i, own in enumerate(mask) if own]
        np.testing.assert_allclose(found.made.logp_BT[b, head : head + len(logp)], logp, atol=2e-5)
        assert not found.made.logp_BT[b][~found.made.loss_mask_BT[b]].any()
        assert (found.messages[b], found.reasons[b], bool(found.made.done_B[b])) == (messages, reason, done)
        assert found.turns_B[b] == sum(m["role"] == "assistant" for m in messages)
        kinds |= {("turns", int(found.turns_B[b])), ("done", done), ("reason", reason)}
        assert prompt.domain != 1 or found.turns_B[b] == 1  # a domain of single replies
    assert kinds >= {("turns", 1), ("turns", 2), ("turns", 3), ("done", True), ("done", False)}


def test_the_trainers_log_probs_are_the_samplers(environments):
    found = run(environments)
    lengths = (1.0, SAMPLING.max_new_tokens, SAMPLING.group_size)
    score = jax.jit(completion_logp, static_argnums=(0, 4, 5, 6))
    logp_BT, _ = score(LLAMA, params_of(LLAMA), found.made.tokens_BT, found.made.loss_mask_BT, *lengths)
    np.testing.assert_allclose(found.made.logp_BT, logp_BT, atol=2e-6)
    gaps = np.diff(found.made.loss_mask_BT.astype(int)) > 0  # where a run of sampled tokens begins
    np.testing.assert_array_equal(gaps.sum(1), found.turns_B)


def test_a_failed_environment_makes_a_row_invalid_and_the_others_are_graded(environments):
    seeds = [run(environments, seed=seed) for seed in range(3)]
    found = next(each for each in seeds if any(each.reasons))
    results = conversation.grade(environments, ROWS, found)
    assert sorted(results) == [b for b, prompt in enumerate(ROWS) if prompt.domain != 1]
    for b, result in results.items():
        assert (result.grade is None) == bool(found.reasons[b]) and result.reason == found.reasons[b]
        assert result.grade in (None, 4.0)  # the last message is the policy's
    assert {*found.reasons} == {"", "it rains"}


def test_rows_depend_on_nothing_but_themselves(environments, monkeypatch):
    """Neither on the rows beside them nor on when the host is called."""
    whole = run(environments)
    part = run(environments, chosen=CHOSEN[:1])  # the others stay empty
    assert part.messages == whole.messages[:3] and len(part.reasons) == 3
    np.testing.assert_array_equal(part.made.logp_BT[:3], whole.made.logp_BT[:3])
    assert not part.made.loss_mask_BT[3:].any() and not part.made.done_B[3:].any()
    monkeypatch.setattr(conversation, "PATIENCE", 1)
    later = run(environments)
    assert later.messages == whole.messages
    jax.tree.map(np.testing.assert_array_equal, later.made, whole.made)


class Two:
    """Two processes, which are threads here: sharding/exchange.py for rows of which the second one has every third."""

    def __init__(self):
        self.own, self.said, self.together = threading.local(), {}, threading.Barrier(2, timeout=60)

    def gather(self, value):
        self.said[self.own.number] = value
        self.together.wait()
        found = [self.said[0], self.said[1]]
        self.together.wait()
        return found

    def mine(self, x):
        return (np.arange(len(x)) % 3 == 2) == self.own.number

    def near(self, arrays):
        hidden_B = ~self.mine(arrays[0])
        return tuple(np.where(hidden_B.reshape(-1, *[1] * (x.ndim - 1)), 0, x) for x in map(np.array, arrays))

    def rows(self, mine_B, arrays):
        (_, theirs), (second_B, others) = self.gather((mine_B, arrays))
        return tuple(np.where(second_B, other, x) for x, other in zip(theirs, others))

    whole, replicated = staticmethod(exchange.whole), staticmethod(exchange.replicated)


def test_each_of_two_processes_asks_for_its_rows_and_both_call_the_same_programs(environments, monkeypatch):
    expected = run(environments, chosen=CHOSEN[:3])
    two, called, go_on = Two(), ([], []), turns.go_on

    def recorded(*given):
        called[two.own.number].append([np.array(x).tolist() for x in given[6:]])
        return go_on(*given)

    def process(number):
        two.own.number, asked = number, []
        with Environments([Chatter(), "eq", Quiet()]) as of_process:
            interact = of_process.interact
            monkeypatch.setattr(of_process, "interact", lambda *given: asked.extend(given[2]) or interact(*given))
            try:
                return run(of_process, chosen=CHOSEN[:3]), asked
            except BaseException:
                two.together.abort()
                raise

    monkeypatch.setattr(conversation, "exchange", two)
    monkeypatch.setattr(conversation.turns, "go_on", recorded)
    with ThreadPoolExecutor(2) as threads:
        found = [*threads.map(process, range(2))]
    assert called[0] == called[1] and len(called[0]) > 2
    for number, (made, asked) in enumerate(found):
        mine = [b for b in range(9) if (b % 3 == 2) == number]
        assert asked and all(any(said is made.messages[b] for b in mine) for said in asked)
        assert made.messages == [expected.messages[b] if b in mine else None for b in range(9)]
        assert made.reasons == [expected.reasons[b] if b in mine else "" for b in range(9)]
        np.testing.assert_array_equal(made.turns_B, expected.turns_B)
        for x, y in zip(made.made, expected.made):
            np.testing.assert_array_equal(x[mine], y[mine])
        assert sorted(conversation.grade(environments, ROWS, made)) == [b for b in mine if ROWS[b].domain != 1]
        assert [text is None for text in conversation.shown(CHOSEN[:3], made)] == [b not in mine for b in range(9)]
    assert max(expected.turns_B) == TURNS


def test_rows_do_not_depend_on_whether_layers_are_unrolled(environments):
    apart = dataclasses.replace(LLAMA, unrolled=True)
    assert "layers_0" in policy.sampled(apart, params_of(apart))
    found, expected = run(environments, apart), run(environments)
    assert found.messages == expected.messages and max(found.turns_B) == TURNS
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found.made, expected.made)


def test_one_compilation_a_bucket(environments):
    run(environments)
    before = turns.begin._cache_size(), turns.go_on._cache_size()
    for seed in range(3):
        run(environments, seed=seed, chosen=CHOSEN[seed:], max_turns=1 + seed)
    assert (turns.begin._cache_size(), turns.go_on._cache_size()) == before


def test_rows_lie_as_those_of_generate(environments):
    """So that what comes after is not compiled twice."""
    mesh = build((1, 1, 1, 1), jax.devices()[:1])
    prompt_PT, length_P = prompts.pad(CHOSEN, BUCKETS, PAD)
    with jax.set_mesh(mesh):
        placed = (conversation.place(mesh, x) for x in (prompt_PT, length_P))
        single = generate(LLAMA, SAMPLING, params_of(LLAMA), *placed, jax.random.key(0))
    args = (talk_of(environments), CHOSEN, prompt_PT, length_P, jax.random.key(0))
    several = converse(LLAMA, SAMPLING, params_of(LLAMA), *args).made
    for one, other in zip(single, several):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    copy(single), copy(several)
    assert copy._cache_size() == 1


def test_a_template_without_turns_of_tools_is_refused(environments, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("no such turns")

    monkeypatch.setattr(conversation.chat, "encode_turn", refuse)
    with pytest.raises(ValueError, match="no such turns"):
        talk_of(environments)


def test_named_environments_bring_their_stop_strings():
    with Environments(["searchr1", "calculator", "eq"]) as named:
        start_D = talk_of(named).start_D
    assert start_D[0] != NEVER and start_D[1:].tolist() == [NEVER, NEVER]


def test_draws_have_rollouts_semantics():
    """Greedy has probability 1, as has the only token of top_k=1; a row's key is its own."""
    logits_BV = jnp.log(jnp.array([[0.2, 0.5, 0.3]] * 600))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(600))
    slot_B = jnp.arange(600) % 7
    for sampling in (SAMPLING._replace(temperature=0.0), SAMPLING._replace(top_k=1)):
        token_B, logp_B = turns._choose(logits_BV, keys, slot_B, sampling)
        assert (token_B == 1).all() and not logp_B.any()
    token_B, logp_B = turns._choose(logits_BV, keys, slot_B, SAMPLING._replace(top_k=2))
    np.testing.assert_allclose(np.exp(logp_B), np.where(token_B == 1, 5 / 8, 3 / 8), rtol=1e-5)
    assert abs(float((token_B == 1).mean()) - 5 / 8) < 4 * 0.5 / np.sqrt(600)
    again_B, _ = turns._choose(logits_BV[:9], keys[:9], slot_B[:9], SAMPLING._replace(top_k=2))
    np.testing.assert_array_equal(again_B, token_B[:9])


def summary(shape):
    with Environments([Chatter(), "eq", Quiet()]) as environments:
        before = turns.go_on._cache_size()
        found = run(environments, shape=shape)
        again = run(environments, seed=1, shape=shape)
        compiled = turns.go_on._cache_size() - before
    rows = [each.made.tokens_BT.tolist() for each in (found, again)]
    return {"rows": rows, "reasons": found.reasons, "logp": found.made.logp_BT.tolist(), "compiled": compiled}


@pytest.mark.slow
def test_a_mesh_gives_one_devices_rows():
    """A child process with eight fake CPU devices, this file run as a script."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, __file__], env=os.environ | flags, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found, expected = json.loads(ran.stdout.splitlines()[-1]), summary((1, 1, 1, 1))
    assert found["rows"] == expected["rows"] and found["reasons"] == expected["reasons"]
    np.testing.assert_allclose(found["logp"], expected["logp"], atol=1e-5)
    assert found["compiled"] == 1


if __name__ == "__main__":
    print(json.dumps(summary((4, 1, 1, 2))))
