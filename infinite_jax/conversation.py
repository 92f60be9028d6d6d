"""Rollouts of several turns, token in and token out: the policy's turns on the device, the environments' on the host.

    prompt | sampled | environment | sampled | ... | padding        the loss mask is True on what was sampled

A row whose turn ends goes to its environment (rubric/environments), whose turns are encoded by themselves, laid behind
the row and read into its cache, and the row goes on. Sampled ids are decoded to be shown to the environment and never
encoded again. Rows of all domains share the batch, each at its own turn: the device goes on with the others while the
host asks the environments of those that wait, and returns when a quarter of the rows that are still to come wait too.
When that is changes no row (infinite_jax/turns.py), and the order of events depends on nothing but the rows.

A row is over when its environment has no further turn, its turns are used up, it is cut off by max_new_tokens, or what
would follow leaves no room for a token. A reply that was cut off is not shown to the environment.

Of several processes each reads, answers and grades the rows of which it holds the first replica. What the others must
know of a row, they are told: whether its turn is over and, in ids, what its environment said. So all call the same
programs with the same arguments; the conversation itself stays where it was held.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from infinite_jax import stop_strings, turns
from infinite_jax.placement import place
from infinite_jax.prompts import Prompt
from infinite_jax.rollout import Generated, Sampling, generate
from models import tokenizer as chat
from models.architectures import DecoderConfig
from rubric.environments.protocol import Environment, Message
from rubric.environments.runner import Environments
from rubric.pool import Result
from sharding import exchange

PATIENCE = 4  # the host is called when one in so many of the rows that will need it waits


class Talk(NamedTuple):
    """What all conversations of a run share."""

    environments: Environments
    tokenizer: object
    apply_chat_template: bool
    max_turns: int  # of the policy, in one row
    chunk: int  # tokens a row of one forward pass over an environment's turn
    mesh: Mesh  # the rollout's
    table_XV: jax.Array  # i16, of stop_strings
    start_D: np.ndarray  # i32, a domain's first state in it


class Conversed(NamedTuple):
    """B = P x G rows, as rollout.generate gives them, and what was said in them."""

    made: Generated  # the loss mask has gaps; done_B: the policy ended its last turn, and nothing was to follow it
    messages: list[list[Message] | None]  # the row's own, then turns of policy and environment; None: another process'
    reasons: list[str]  # why the row is invalid, "" where it is not, or another process has it
    turns_B: np.ndarray  # i32, of the policy


def prepare(
    environments: Environments,
    tokenizer,
    vocab_size: int,
    mesh: Mesh,
    *,
    apply_chat_template: bool,
    max_turns: int,
    chunk: int,
) -> Talk:
    """Raises ValueError, one line, where the chat template cannot render an environment's turn."""
    chat.encode_turn(tokenizer, [{"role": "tool", "content": "?"}], apply_chat_template=apply_chat_template)
    stops_D = [tuple(getattr(environment, "stops", ())) for environment in environments.of_domain]
    table = stop_strings.build(tokenizer, vocab_size, stops_D)
    start_D = np.array([table.start[stops] for stops in stops_D], np.int32)
    table_XV = exchange.replicated(mesh, table.next_XV)
    return Talk(environments, tokenizer, apply_chat_template, max_turns, chunk, mesh, table_XV, start_D)


def respond(
    decoder: DecoderConfig,
    sampling: Sampling,
    params,
    mesh: Mesh,
    talk: Talk | None,
    chosen: Sequence[Prompt],
    prompt_PT: np.ndarray,
    length_P: np.ndarray,
    key: jax.Array,
) -> tuple[Generated, Conversed | None]:
    """group_size replies or conversations to each prompt; arguments as `converse` takes them.

    mesh: the rollout's. talk: None where no domain of the run holds conversations. Where one does, batches of single
    replies go through `converse` too, so that no step compiles another program than the first.
    """
    if talk is not None:
        conversed = converse(decoder, sampling, params, talk, chosen, prompt_PT, length_P, key)
        return conversed.made, conversed
    with jax.set_mesh(mesh):
        placed = (place(mesh, x) for x in (prompt_PT, length_P))
        return generate(decoder, sampling, params, *placed, key), None


def converse(
    decoder: DecoderConfig,
    sampling: Sampling,
    params,
    talk: Talk,
    chosen: Sequence[Prompt],
    prompt_PT: np.ndarray,
    length_P: np.ndarray,
    key: jax.Array,
) -> Conversed:
    """group_size conversations from each prompt. The key is consumed: a token's is folded from its row and slot.

    All processes call it together, with the same arguments.

    Args:
      params: as rollout.sync gives them, on talk.mesh.
      chosen: the prompts that prompt_PT, length_P (prompts.pad) hold; the rows of those behind them stay empty.
    """
    lines = [
        _Line(prompt, talk.environments.of_domain[prompt.domain], [*prompt.row["messages"]])
        for prompt in chosen
        for _ in range(sampling.group_size)
    ]
    with jax.set_mesh(talk.mesh):
        placed = functools.partial(place, talk.mesh)
        prefix, ahead_P, rows = turns.begin(decoder, sampling, params, placed(prompt_PT), placed(length_P))
        start_B = placed(_starts(talk, lines, len(rows.length_B)))
        mine_B = exchange.mine(start_B)
        for line, mine in zip(lines, mine_B):
            line.mine = bool(mine)
        context = turns.Context(params, prefix, ahead_P, key)
        program = functools.partial(turns.go_on, decoder, sampling, talk.chunk, context)
        rows = _interleave(talk, sampling, program, rows, start_B, lines)
        made = _laid_out(sampling, prompt_PT, length_P, rows)
        cut_B = np.zeros(len(mine_B), bool)
        cut_B[: len(lines)] = [line.cut for line in lines]
        (cut_B,) = exchange.rows(mine_B, (cut_B,))
        made = Generated(*map(placed, made._replace(done_B=made.done_B & ~cut_B)))
    turns_B = np.array([line.turns for line in lines], np.int32)
    messages = [line.messages if line.mine else None for line in lines]
    return Conversed(made, messages, [line.reason for line in lines], turns_B)


def grade(environments: Environments, prompt_B: Sequence[Prompt], conversed: Conversed) -> dict[int, Result]:
    """What the environments make of this process's conversations, by row; without rows of domains of single replies."""
    talks_B = [environments.of_domain[prompt.domain] is not None for prompt in prompt_B]
    rows = [b for b, messages in enumerate(conversed.messages) if messages is not None and talks_B[b]]
    asked = [b for b in rows if not conversed.reasons[b]]
    results = environments.grade(
        [prompt_B[b].domain for b in asked],
        [prompt_B[b].row for b in asked],
        [conversed.messages[b] for b in asked],
    )
    return {b: Result(None, conversed.reasons[b]) for b in rows} | dict(zip(asked, results))


def last_turns(conversed: Conversed) -> list[str | None]:
    """What the policy said last in each row: what graders of single replies read. None: another process has the row."""
    return [messages and messages[-1]["content"] for messages in conversed.messages]


def shown(chosen: Sequence[Prompt], conversed: Conversed) -> list[str | None]:
    """What followed each row's prompt, for people to read: a single reply as it is, several turns with their roles."""
    group = len(conversed.messages) // len(chosen)

    def text(said: Sequence[Message]) -> str:
        if len(said) == 1:
            return said[0]["content"]
        return "\n".join(f"[{turn['role']}] {turn['content']}" for turn in said)

    begins_B = [len(chosen[b // group].row["messages"]) for b in range(len(conversed.messages))]
    return [messages and text(messages[begin:]) for begin, messages in zip(begins_B, conversed.messages)]


@dataclass
class _Line:
    """A row on the host. Where another process has it only its turns are known, and that they go on."""

    prompt: Prompt
    environment: Environment | None
    messages: list[Message]
    mine: bool = True  # this process has it
    turns: int = 0  # of the policy, finished
    begins: int = 0  # tokens of the completion before the present turn
    closed: bool = False  # by the policy's own token, which the template need not add
    reason: str = ""
    cut: bool = False  # what would follow did not fit

    def listens(self, max_turns: int) -> bool:
        """Whether its environment is asked once the present turn ends."""
        return self.environment is not None and self.turns + 1 < max_turns


def _starts(talk: Talk, lines: Sequence[_Line], number: int) -> np.ndarray:
    """i32[B], the state of stop_strings in which each row's turns begin."""
    start_B = np.full(number, stop_strings.NEVER, np.int32)
    start_B[: len(lines)] = talk.start_D[[line.prompt.domain for line in lines]]
    return start_B


def _interleave(
    talk: Talk, sampling: Sampling, program, rows: turns.Rows, start_B: jax.Array, lines: Sequence[_Line]
) -> turns.Rows:
    """All turns of all rows."""
    placed, number = functools.partial(place, talk.mesh), len(rows.length_B)
    active_B = np.arange(number) < len(lines)
    waiting: list[int] = []
    added: dict[int, list[int]] = {}
    while active_B.any() or waiting:
        before_B = active_B
        if before_B.any():
            listens_B = np.array([b < len(lines) and lines[b].listens(talk.max_turns) for b in range(number)], bool)
            patience = np.int32(max(1, (listens_B & before_B).sum() // PATIENCE))
            ids_BA, adds_B = _padded(added, number, sampling)
            per_row = (start_B, *map(placed, (ids_BA, adds_B, before_B, listens_B)))
            rows, left_B = program(rows, talk.table_XV, *per_row, patience)
        found = _answers(talk, sampling, lines, [b for b in waiting if lines[b].mine])  # while the device works
        added = dict(itertools.chain.from_iterable(exchange.gather([*found.items()]))) if waiting else {}
        waiting = []
        if before_B.any():
            active_B, length_B, ended_B = exchange.whole((left_B, rows.length_B, rows.ended_B))
            (tokens_BS,) = exchange.near((rows.tokens_BS,))
            for b in np.flatnonzero(before_B & ~active_B):
                ids = tokens_BS[b, 1 : 1 + length_B[b]].tolist()
                if _finish(talk, sampling, lines[b], ids, bool(ended_B[b])):
                    waiting.append(int(b))
        active_B = active_B.copy()
        active_B[[*added]] = True
    return rows


def _finish(talk: Talk, sampling: Sampling, line: _Line, ids: list[int], ended: bool) -> bool:
    """Notes the turn that ends with the completion's `ids`; whether the environment is to be asked."""
    asked = ended and line.listens(talk.max_turns)
    line.turns += 1
    if line.mine:
        text = chat.decode(talk.tokenizer, ids[line.begins :])
        line.messages.append({"role": "assistant", "content": text})
        line.begins, line.closed = len(ids), ids[-1] in sampling.stop_ids
    return asked


def _answers(talk: Talk, sampling: Sampling, lines: Sequence[_Line], waiting: Sequence[int]) -> dict[int, list[int]]:
    """The ids to lay behind the rows that go on; the others of `waiting` are over, and their lines say why."""
    found = {}
    asked = [lines[b] for b in waiting]
    answers = talk.environments.interact(
        [line.prompt.domain for line in asked],
        [line.prompt.row for line in asked],
        [line.messages for line in asked],
    )
    for b, line, answer in zip(waiting, asked, answers):
        line.reason = answer.reason
        if answer.reason or not answer.messages:
            continue
        try:
            ids = chat.encode_turn(
                talk.tokenizer, answer.messages, ended=line.closed, apply_chat_template=talk.apply_chat_template
            )
        except ValueError as error:  # turns that the template cannot render are the environment's fault
            line.reason = str(error)[:160]
            continue
        line.cut = line.begins + len(ids) >= sampling.max_new_tokens
        if not line.cut:
            line.messages += answer.messages
            line.begins += len(ids)
            found[b] = ids
    return found


def _padded(added: dict[int, list[int]], rows: int, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """(i32 [B, max_new_tokens], i32 [B]): ids by row, and how many."""
    ids_BA, adds_B = np.zeros((rows, sampling.max_new_tokens), np.int32), np.zeros(rows, np.int32)
    for b, ids in added.items():
        ids_BA[b, : len(ids)], adds_B[b] = ids, len(ids)
    return ids_BA, adds_B


def _laid_out(sampling: Sampling, prompt_PT, length_P, rows: turns.Rows) -> Generated:
    """Host arrays: each completion right behind its prompt, where the row lies on this process's devices."""
    prompt_BT = np.repeat(prompt_PT, sampling.group_size, axis=0)
    tokens_BT = np.pad(prompt_BT, ((0, 0), (0, sampling.max_new_tokens)), constant_values=sampling.pad_id)
    mask_BT, logp_BT = np.zeros(tokens_BT.shape, bool), np.zeros(tokens_BT.shape, np.float32)
    *rows_BS, length_B, ended_B = exchange.near(
        (rows.tokens_BS, rows.sampled_BS, rows.logp_BS, rows.length_B, rows.ended_B)
    )
    for b, length in enumerate(length_B):
        start = length_P[b // sampling.group_size]
        tokens_BT[b, start:] = sampling.pad_id
        for into_BT, from_BS in zip((tokens_BT, mask_BT, logp_BT), rows_BS):
            into_BT[b, start : start + length] = from_BS[b, 1 : 1 + length]
    return Generated(tokens_BT, mask_BT, logp_BT, ended_B)
