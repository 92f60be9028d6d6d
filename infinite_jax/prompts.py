"""Prompts: rows turned into token ids once, drawn by position or by priority, padded to one of a few static lengths.

Training prompts stand in sets, one for a domain or one for each level of its difficulty. `Stream` goes through a set in
a fresh order every epoch; `PriorityStream` draws from it by what its prompts have shown (curriculum/prompt_level.py).
A trainer uses either in the same way: position = start(); take(...) at each step; learn(...) from the grades.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curriculum import domains, prompt_level
from curriculum.config import GRADE_PASS, PromptConfig
from curriculum.prompt_level import PromptState
from models import tokenizer as chat
from rubric.evaluator import Grades

KEY_STREAM = 0x70726F6D  # "prom": keeps these keys off those folded from the same seed


class Prompt(NamedTuple):
    row: dict  # the data row: messages, answer, meta, tools, key
    ids: tuple[int, ...]
    domain: int
    number: int = 0  # place among all training prompts, counted by PriorityStream


def tokenise(
    tokenizer,
    rows: Sequence[dict],
    domain: int,
    name: str,
    limit: int,
    template: bool,
    tools: Callable[[dict], list[dict] | None] = lambda row: None,
) -> list[Prompt]:
    """Raises ValueError on a prompt of more than `limit` tokens: shapes are static, and a cut question is corrupt.

    tools: the JSON schemas that a row's prompt is to show, if any.
    """
    prompts = []
    for number, row in enumerate(rows):
        try:
            shown = tools(row)
        except ValueError as error:
            raise ValueError(f"domain {name}, row {number}: {error}") from error
        ids = tuple(chat.encode_prompt(tokenizer, row["messages"], apply_chat_template=template, tools=shown))
        if len(ids) > limit:
            raise ValueError(
                f"domain {name}, row {number}: the prompt has {len(ids)} tokens, more than the largest of "
                f"algorithm.prompt_buckets, {limit}: raise it or shorten {row['messages'][-1]['content'][:40]!r}"
            )
        prompts.append(Prompt(row, ids, domain))
    return prompts


def distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first of each; two are the same where the model reads the same and the answer is the same."""
    found = {}
    for prompt in prompts:
        found.setdefault((prompt.ids, json.dumps(prompt.row.get("answer"), sort_keys=True)), prompt)
    return list(found.values())


def by_hash(prompts: Sequence[Prompt]) -> list[Prompt]:
    """In an order by hash, so that the first few stand for all: a source of distinct rows soon runs out of its small
    kinds, and its end is another mixture than its beginning."""
    return sorted(prompts, key=lambda prompt: hashlib.sha256(json.dumps(prompt.ids).encode()).digest())


class PromptSets:
    """Which set a domain draws from at its level.

    Args:
      train: for each domain its training prompts by level, levels without a gap; where there are none, one empty set.
    """

    def __init__(self, train: Sequence[Mapping[int, Sequence[Prompt]]]):
        self.size_D = np.array([sum(map(len, levels.values())) for levels in train], np.int32)
        self.size_S = np.array([len(prompts) for levels in train for prompts in levels.values()], np.int32)
        self.lowest_D = np.array([min(levels) for levels in train], np.int32)
        self.highest_D = np.array([max(levels) for levels in train], np.int32)
        self.first_D = np.cumsum([0, *map(len, train)])[:-1].astype(np.int32)

    def of(self, domain_P: np.ndarray, level_D: np.ndarray) -> np.ndarray:
        """i32[P], the set of each drawn domain at its level, f32[D], rounded."""
        level_D = np.clip(np.rint(level_D).astype(np.int32), self.lowest_D, self.highest_D)
        return (self.first_D + level_D - self.lowest_D)[domain_P]

    def sizes(self, num_domains: int | None) -> np.ndarray:
        """Of the sets of the first `num_domains` domains, None = all; domains only ever come at the end."""
        first = self.first_D[num_domains] if num_domains is not None and num_domains < len(self.first_D) else None
        return self.size_S[:first]


class Cursors(NamedTuple):
    """The position of a Stream; S sets of prompts."""

    cursor_S: np.ndarray  # i32[S], next position in the set's shuffled order
    epoch_S: np.ndarray  # i32[S], how often the set was gone through


class Stream:
    """Each set's prompts in a fresh order every epoch. The position is the caller's."""

    def __init__(self, train: Sequence[Mapping[int, Sequence[Prompt]]], names: Sequence[str], seed: int):
        self.sets = PromptSets(train)
        self._orders = [
            # a domain of one level has the order of its name alone
            domains.shuffled(prompts, seed, name if len(levels) == 1 else f"{name}@{level}") if prompts else None
            for levels, name in zip(train, names, strict=True)
            for level, prompts in levels.items()
        ]

    def start(self, num_domains: int | None = None) -> Cursors:
        """The position before the first step, of all or of the first `num_domains` domains."""
        zero_S = np.zeros(len(self.sets.sizes(num_domains)), np.int32)
        return Cursors(zero_S, zero_S.copy())

    def grow(self, position: Cursors) -> Cursors:
        """`position` with the sets of the domains that it lacks at its end."""
        return Cursors(*(np.concatenate([old, new[len(old) :]]) for old, new in zip(position, self.start())))

    def take(self, domain_P: np.ndarray, level_D: np.ndarray, position: Cursors) -> tuple[list[Prompt], Cursors]:
        """The next prompt of each drawn domain at its level, and the new position."""
        cursor_S, epoch_S, prompts = position.cursor_S.copy(), position.epoch_S.copy(), []
        for s in self.sets.of(domain_P, level_D):
            size = int(self.sets.size_S[s])
            prompts.append(self._orders[s][int(epoch_S[s]) * size + int(cursor_S[s])])
            cursor_S[s] += 1
            if cursor_S[s] == size:
                cursor_S[s], epoch_S[s] = 0, epoch_S[s] + 1
        return prompts, Cursors(cursor_S, epoch_S)

    def learn(self, position: Cursors, chosen: Sequence[Prompt], grades: Grades) -> Cursors:
        """An order that is fixed learns nothing from grades."""
        return position

    def metrics(self, position: Cursors) -> dict[str, np.ndarray]:
        return {}


class PriorityStream:
    """Prompts of each set by their own priority. The position, with all that is known of them, is the caller's.

    It lives on the host between steps: a few bytes a prompt, and a checkpoint of it belongs to no mesh.
    """

    def __init__(self, train: Sequence[Mapping[int, Sequence[Prompt]]], seed: int, config: PromptConfig):
        self.sets = PromptSets(train)
        every = itertools.chain.from_iterable(prompts for levels in train for prompts in levels.values())
        self._prompts = [prompt._replace(number=number) for number, prompt in enumerate(every)]
        self._layout = jax.tree.map(jnp.asarray, prompt_level.layout(self.sets.size_S))
        self._domains = prompt_level.layout(self.sets.size_D)
        root = jax.random.fold_in(jax.random.key(seed), KEY_STREAM)

        def draw(where, state, stream_P):
            return prompt_level.draw(config, where, state, jax.random.fold_in(root, state.draws), stream_P)

        self._draw = jax.jit(draw)
        self._update = jax.jit(functools.partial(prompt_level.update, config))
        self._metrics = jax.jit(prompt_level.metrics)

    def start(self, num_domains: int | None = None) -> PromptState:
        """The position before the first step, of all or of the first `num_domains` domains."""
        return jax.device_get(prompt_level.init(prompt_level.layout(self.sets.sizes(num_domains))))

    def grow(self, position: PromptState) -> PromptState:
        """`position` with the prompts of the domains that it lacks at its end."""
        return jax.device_get(prompt_level.grow(position, prompt_level.layout(self.sets.size_S)))

    def take(
        self, domain_P: np.ndarray, level_D: np.ndarray, position: PromptState
    ) -> tuple[list[Prompt], PromptState]:
        """A prompt of each drawn domain at its level, and the new position. A draw has a key of its own."""
        number_P, position = jax.device_get(self._draw(self._layout, position, self.sets.of(domain_P, level_D)))
        return [self._prompts[number] for number in number_P], position

    def learn(self, position: PromptState, chosen: Sequence[Prompt], grades: Grades) -> PromptState:
        """The position after the chosen prompts' replies were graded, as many replies to each."""
        groups = (len(chosen), -1)
        valid_PG = grades.valid_B.reshape(groups)
        passed_PG = (grades.grade_B.reshape(groups) >= GRADE_PASS) & valid_PG
        rows_P = valid_PG.sum(1)
        pass_P = (passed_PG.sum(1) / np.maximum(rows_P, 1)).astype(np.float32)
        number_P = np.array([prompt.number for prompt in chosen], np.int32)
        return jax.device_get(self._update(position, number_P, pass_P, rows_P > 0))

    def metrics(self, position: PromptState) -> dict[str, np.ndarray]:
        """Arrays [D]: prompts/covered, prompts/uncertainty; NaN where a domain has no training prompts."""
        found = jax.device_get(self._metrics(self._domains, position))
        return {f"prompts/{key}": value_D for key, value_D in found.items()}


def pad(prompts: Sequence[Prompt], buckets: Sequence[int], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(prompt_PT, length_P), i32; T is the smallest bucket that holds the longest prompt."""
    length_P = np.array([len(prompt.ids) for prompt in prompts], np.int32)
    width = next(bucket for bucket in buckets if bucket >= length_P.max())
    prompt_PT = np.full((len(prompts), width), pad_id, np.int32)
    for line, prompt in zip(prompt_PT, prompts):
        line[: len(prompt.ids)] = prompt.ids
    return prompt_PT, length_P


def replies(tokenizer, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> Iterator[str]:
    """The text the policy generated in each row."""
    for tokens, mask in zip(tokens_BT, mask_BT):
        yield chat.decode(tokenizer, tokens[mask].tolist())
