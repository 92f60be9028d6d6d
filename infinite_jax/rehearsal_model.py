"""M0 as the writer of rehearsal: it opens a user's turn, answers a request for a prompt, answers prompts.

A prompt sampled from where the chat template opens the user's turn is one that the model has learnt to expect there
(Magpie: Xu et al., 2406.08464). All of it is sampled by the rollout engine, in batches of one shape.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from configs.schema import Config
from infinite_jax import prompts, rows
from infinite_jax.placement import place
from infinite_jax.prompts import Prompt
from infinite_jax.rollout import Sampling, generate, sync
from infinite_jax.session import sized
from models import source
from models import tokenizer as chat
from sharding import exchange
from sharding.mesh import make_mesh, make_rollout_mesh

Messages = Sequence[dict[str, str]]
PROBES = ("A", "7", "é")  # beginnings of a user's text; what precedes all of them is the template's
STEP = 64  # tokens to which a request longer than algorithm.prompt_buckets is filled up


class Reply(NamedTuple):
    text: str
    ended: bool  # by the model, not by the limit of tokens


class M0:
    """The model of config.model on its rollout mesh. All processes call it together, and all get every reply."""

    def __init__(self, config: Config):
        if not config.model.apply_chat_template:
            raise ValueError(
                "upgrade.rehearsal=self: M0 writes prompts in its chat template: set model.apply_chat_template=true, "
                "or upgrade.rehearsal=none"
            )
        sizes = sized(config, source.network(config.model))
        mesh = make_mesh(sizes)
        self._mesh = make_rollout_mesh(sizes, mesh)
        self._text = source.load_tokenizer(config.model)
        self._decoder, params = source.load(config.model, mesh)
        self._params = sync(self._decoder, params, self._mesh)
        stops = chat.stop_ids(self._text, source.resolve(config.model.path))
        self._stops = tuple(stop for stop in stops if stop < self._decoder.vocab_size)
        self._pad, self._config = chat.pad_id(self._text), config

    def open_turn(self, turns: Messages, number: int, key: jax.Array) -> list[Reply]:
        """`number` user's turns after the turns given, as the model goes on."""
        rendered = [chat.encode_prompt(self._text, [*turns, {"role": "user", "content": probe}]) for probe in PROBES]
        alike = (n for n, ids in enumerate(zip(*rendered)) if len(set(ids)) > 1)
        return self._write(rendered[0][: next(alike)], number, key)

    def ask(self, messages: Messages, number: int, key: jax.Array) -> list[Reply]:
        """`number` replies at the temperature of writing."""
        return self._write(chat.encode_prompt(self._text, messages), number, key)

    def answer(self, asked: Sequence[Messages], key: jax.Array) -> list[list[Reply]]:
        """upgrade.writing.samples replies at temperature 1 to each prompt."""
        encoded = [chat.encode_prompt(self._text, messages) for messages in asked]
        return self._sample(
            encoded, self._config.upgrade.writing.samples, 1.0, self._config.algorithm.max_new_tokens, key
        )

    def fits(self, messages: Messages) -> bool:
        """Whether a prompt is short enough to be trained on."""
        return len(chat.encode_prompt(self._text, messages)) <= self._config.algorithm.prompt_buckets[-1]

    def _write(self, ids: list[int], number: int, key: jax.Array) -> list[Reply]:
        writing = self._config.upgrade.writing
        together = min(self._config.eval.batch, writing.prompts)
        copies = -(-number // together)
        made = self._sample([ids] * copies, together, writing.temperature, writing.tokens, key)
        return [reply for replies in made for reply in replies][:number]

    def _sample(
        self, encoded: list[list[int]], samples: int, temperature: float, tokens: int, key: jax.Array
    ) -> list[list[Reply]]:
        """Of each prompt its replies. The key is consumed."""
        sampling = Sampling(temperature, 0, 1.0, tokens, samples, self._stops, self._pad)
        size, found = max(1, self._config.eval.batch // samples), []
        order = sorted(range(len(encoded)), key=lambda n: len(encoded[n]))  # so that a batch pays for its own bucket
        for start in range(0, len(order), size):
            batch = [Prompt({}, tuple(encoded[n]), 0) for n in order[start : start + size]]
            made = self._generate(sampling, batch + [batch[-1]] * (size - len(batch)), jax.random.fold_in(key, start))
            found += [made[n * samples : (n + 1) * samples] for n in range(len(batch))]
        replies = dict(zip(order, found))
        return [replies[n] for n in range(len(encoded))]

    def _generate(self, sampling: Sampling, batch: list[Prompt], key: jax.Array) -> list[Reply]:
        prompt_PT, length_P = prompts.pad(batch, self._buckets(max(len(prompt.ids) for prompt in batch)), self._pad)
        longest = prompt_PT.shape[1] + sampling.max_new_tokens
        if longest > self._decoder.max_length:
            raise ValueError(
                f"upgrade.rehearsal=self: a request and its reply take {longest} tokens, more than the model's "
                f"{self._decoder.max_length}: shorten the descriptions of domains, or lower upgrade.writing.tokens"
            )
        with jax.set_mesh(self._mesh):
            placed = (place(self._mesh, x) for x in (prompt_PT, length_P))
            made = generate(self._decoder, sampling, self._params, *placed, key)
        mine = rows.read(self._text, made.tokens_BT, made.loss_mask_BT)
        texts = {}
        for part in exchange.gather([[b, text] for b, text in enumerate(mine) if text is not None]):
            texts |= dict(part)
        return [Reply(texts[b], bool(done)) for b, done in enumerate(exchange.whole(made.done_B))]

    def _buckets(self, longest: int) -> tuple[int, ...]:
        buckets = self._config.algorithm.prompt_buckets
        return buckets if longest <= buckets[-1] else (-(-longest // STEP) * STEP,)
