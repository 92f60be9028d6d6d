"""Shows the embedded model what conversations look like: `python -m models.tiny.talk --of calculator --out DIR`.

The embedded model has never seen a call of a tool, so no reward would ever find one. This continues its training, with
supervision, on conversations that the rows of a domain could have, most of them bad ones: the answer guessed without
asking, a call with a digit wrong, the result not read. What is saved in DIR can hold such a conversation, as an
instruction-tuned model can, and mostly does not; to prefer it is left to reinforcement learning.

calculator: `add: 473 + 858` of gen:add,difficulty=3. retrieval: questions for a year, about invented worlds other than
rubric/world.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from curriculum import domains
from models import hf, tokenizer
from models.source import TINY
from models.tiny import make
from rubric.search_service import passages
from rubric.world import make as world

Turns = list[tuple[str, str]]  # (role, text), the policy's and the environment's
SEARCHES = ("</search>", "</answer>")  # end a turn of the policy's by themselves
RIGHT, BLIND = 0.15, 0.75  # shares of conversations that are right, and of guesses without a call; the others go wrong
BATCH, REPORT, PEAK_RATE = 16, 50, 1e-3
WORLDS = range(1, 41)  # seeds; rubric/world is that of seed 0


def calculator(rng: np.random.Generator, row: dict) -> Turns:
    first, second = row["messages"][-1]["content"].removeprefix("add: ").split(" + ")
    kind = rng.random()
    if kind < BLIND:
        return [("assistant", _mistyped(rng, row["answer"]))]
    asked, said = second, row["answer"]
    if kind > RIGHT + BLIND and rng.random() < 0.7:
        asked = _mistyped(rng, second)
        said = str(int(first) + int(asked))
    call = ("assistant", f'<tool name="calculator">{first} + {asked}</tool>')
    read = first if kind > RIGHT + BLIND and asked == second else said
    return [call, ("tool", str(int(first) + int(asked))), ("assistant", read)]


def retrieval(rng: np.random.Generator, row: dict) -> Turns:
    kind, guess = rng.random(), str(rng.integers(1100, 1900))
    if kind < BLIND:
        return [("assistant", f"<answer>{guess}</answer>")]
    found = f"<information>{passages([row['document']])}</information>"
    read = guess if kind > RIGHT + BLIND else row["answer"][0]
    return [
        ("assistant", f"<search>{row['document']['title']}</search>"), ("tool", found),
        ("assistant", f"<answer>{read}</answer>"),
    ]  # fmt: skip


def _mistyped(rng: np.random.Generator, number: str) -> str:
    at = rng.integers(len(number))
    return number[:at] + "0123456789"[rng.integers(10)] + number[at + 1 :]


def _sums() -> list[dict]:
    return domains.read("gen:add,difficulty=3,size=8000,seed=1")


def _questions() -> list[dict]:
    """Of one fact, each with the document that answers it."""
    return [
        world.row(fact.asks.format(entity.name), fact.answers, bare=True)
        | {"document": {"title": entity.name, "text": entity.text}}
        for seed in WORLDS
        for entity in world.world(seed)
        for fact in entity.facts
        if fact.asks.startswith("In which year")
    ]


TASKS: dict[str, tuple[Callable, Callable]] = {"calculator": (_sums, calculator), "retrieval": (_questions, retrieval)}


def ids_of(text, row: dict, turns: Turns) -> tuple[list[int], list[bool]]:
    """(ids of the row and its turns, which of them the policy says), as the rollout engine would lay them."""
    ids = tokenizer.encode_prompt(text, row["messages"])
    own, ended = [False] * len(ids), True
    for role, said in turns:
        if role == "assistant":
            ended = not said.endswith(SEARCHES)
            more = text.encode(said, add_special_tokens=False) + [text.eos_token_id] * ended
        else:
            more = tokenizer.encode_turn(text, [{"role": role, "content": said}], ended=ended)
        ids, own = ids + more, own + [role == "assistant"] * len(more)
    return ids, own


def pack(text, rows: list[dict], talk: Callable, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_NT, own_NT) of `number` conversations."""
    rng, made = np.random.default_rng(make.SEED), []
    for _ in range(number):
        row = rows[rng.integers(len(rows))]
        made.append(ids_of(text, row, talk(rng, row)))
    shape = number, -(-max(len(ids) for ids, _ in made) // 8) * 8
    tokens_NT, own_NT = np.full(shape, tokenizer.pad_id(text), np.int32), np.zeros(shape, bool)
    for n, (ids, own) in enumerate(made):
        tokens_NT[n, : len(ids)], own_NT[n, : len(ids)] = ids, own
    return tokens_NT, own_NT


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m models.tiny.talk", description=__doc__.splitlines()[0])
    arguments.add_argument("--of", choices=[*TASKS], required=True)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--steps", type=int, default=800)
    given = arguments.parse_args()
    text = tokenizer.load(str(TINY))
    config, params = hf.load(TINY, jnp.float32)
    tx, learn = make.learner(config, given.steps, PEAK_RATE)
    read, talk = TASKS[given.of]
    tokens_NT, own_NT = map(jnp.asarray, pack(text, read(), talk, 8000))
    opt_state, rng = tx.init(params), np.random.default_rng(make.SEED)
    for step in range(0, given.steps, REPORT):
        rows_SB = rng.integers(len(tokens_NT), size=(min(REPORT, given.steps - step), BATCH))
        params, opt_state, loss = learn(params, opt_state, tokens_NT, own_NT, rows_SB)
        print(json.dumps({"step": step + len(rows_SB), "loss": round(float(loss), 4)}), flush=True)
    hf.save(config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), given.out)
    text.save_pretrained(given.out)


if __name__ == "__main__":
    main()
