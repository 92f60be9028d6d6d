"""Prompts: rows turned into token ids once, drawn by position, padded to one of a few static lengths."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from curriculum import domains
from models import tokenizer as chat


class Prompt(NamedTuple):
    row: dict  # the data row: messages, answer, meta, key
    ids: tuple[int, ...]
    domain: int


def tokenise(tokenizer, rows: Sequence[dict], domain: int, name: str, limit: int, template: bool) -> list[Prompt]:
    """Raises ValueError on a prompt of more than `limit` tokens: shapes are static, and a cut question is corrupt."""
    prompts = []
    for number, row in enumerate(rows):
        ids = tuple(chat.encode_prompt(tokenizer, row["messages"], apply_chat_template=template))
        if len(ids) > limit:
            raise ValueError(
                f"domain {name}, row {number}: the prompt has {len(ids)} tokens, more than the largest of "
                f"algorithm.prompt_buckets, {limit}: raise it or shorten {row['messages'][-1]['content'][:40]!r}"
            )
        prompts.append(Prompt(row, ids, domain))
    return prompts


class Stream:
    """Each domain's training prompts in a fresh order every epoch. The position is the caller's: cursor_D, epoch_D."""

    def __init__(self, train: Sequence[Sequence[Prompt]], names: Sequence[str], seed: int):
        self.size_D = np.array([len(prompts) for prompts in train], np.int32)
        self._orders = [
            domains.shuffled(prompts, seed, name) if prompts else None for prompts, name in zip(train, names)
        ]

    def take(
        self, domain_P: np.ndarray, cursor_D: np.ndarray, epoch_D: np.ndarray
    ) -> tuple[list[Prompt], np.ndarray, np.ndarray]:
        """The next prompt of each drawn domain, and the new position."""
        cursor_D, epoch_D, prompts = cursor_D.copy(), epoch_D.copy(), []
        for d in domain_P:
            prompts.append(self._orders[d][int(epoch_D[d]) * int(self.size_D[d]) + int(cursor_D[d])])
            cursor_D[d] += 1
            if cursor_D[d] == self.size_D[d]:
                cursor_D[d], epoch_D[d] = 0, epoch_D[d] + 1
        return prompts, cursor_D, epoch_D


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
