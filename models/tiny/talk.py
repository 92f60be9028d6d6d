"""Shows the embedded model what calls look like: `python -m models.tiny.talk [--of calculator|retrieval] --out DIR`.

The embedded model has never seen a call of a tool, so no reward would ever find one. This continues its training, with
supervision: first on right conversations, every token of them, so that it learns to copy what was said before; then on
mixed ones, most of them bad: the answer guessed without asking, a call with a digit wrong, the result not read. What is
saved in DIR can hold such a conversation, as an instruction-tuned model can, and mostly does not; to prefer it is left
to reinforcement learning.

calculator: the rows of gen:add,difficulty=3: `add: 473 + 858`, then `<tool name="calculator">473 + 858</tool>`, `1331`
of the tool's, and `1331`. retrieval: those of rubric.world.years, of names that its corpus does not have: `year: Kesa`,
then `<search>Kesa</search>`, `<information>Doc 1(Title: Kesa) 1432</information>`, and `<answer>1432</answer>`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curriculum import domains
from models import hf, tokenizer
from models.source import TINY
from models.tiny import make
from rubric.environments.search import SearchR1
from rubric.search_service import passages
from rubric.world import years

Turns = list[tuple[str, str]]  # (role, text), the policy's and the environment's
RIGHT, BLIND = 0.15, 0.75  # shares of mixed conversations that are right, and of guesses without a call
FIRST = 0.75  # share of the steps on right ones
BATCH, REPORT, PEAK_RATE = 16, 25, 2e-3
ROWS = 8000  # conversations


class Task(NamedTuple):
    rows: Callable[[], list[dict]]
    conversation: Callable[[np.random.Generator, dict, float], Turns]
    width: int  # tokens that hold any conversation
    stops: tuple[str, ...]  # texts that end a turn of the policy's by themselves
    steps: int  # until what was said before is copied


def sum_with_calculator(rng: np.random.Generator, row: dict, kind: float) -> Turns:
    """One about the row; kind: from 0 to 1, below RIGHT a right one."""
    first, second = row["messages"][-1]["content"].removeprefix("add: ").split(" + ")
    if RIGHT < kind < RIGHT + BLIND:
        return [("assistant", _mistyped(rng, row["answer"]))]
    asked, said = second, row["answer"]
    if kind > RIGHT + BLIND and rng.random() < 0.7:
        asked = _mistyped(rng, second)
        said = str(int(first) + int(asked))
    call = ("assistant", f'<tool name="calculator">{first} + {asked}</tool>')
    read = first if kind > RIGHT + BLIND and asked == second else said
    return [call, ("tool", str(int(first) + int(asked))), ("assistant", read)]


def _mistyped(rng: np.random.Generator, number: str) -> str:
    at = rng.integers(len(number))
    return number[:at] + "0123456789"[rng.integers(10)] + number[at + 1 :]


def search_for_year(rng: np.random.Generator, row: dict, kind: float) -> Turns:
    """The same for a question of rubric.world.years."""
    guess = str(rng.integers(*years.YEARS))
    if RIGHT < kind < RIGHT + BLIND:
        return [("assistant", f"<answer>{guess}</answer>")]
    document = years.document(row)
    asked, found, said = document["title"], passages([document]), document["text"]
    if kind > RIGHT + BLIND:
        said = guess
        if rng.random() < 0.7:
            asked, found = _misspelt(rng, asked), "nothing found"
    return [
        ("assistant", f"<search>{asked}</search>"),
        ("tool", f"<information>{found}</information>"),
        ("assistant", f"<answer>{said}</answer>"),
    ]


def _misspelt(rng: np.random.Generator, name: str) -> str:
    at = rng.integers(len(name) // 2) * 2 + 1
    others = years.VOWELS.replace(name[at], "")
    return name[:at] + others[rng.integers(len(others))] + name[at + 1 :]


TASKS = {
    "calculator": Task(
        lambda: domains.read(f"gen:add,difficulty=3,size={ROWS},seed=1"),
        sum_with_calculator,
        width=80,
        stops=(),
        steps=1000,
    ),
    "retrieval": Task(
        lambda: [row for seed in (1, 2) for row in years.questions("shown", seed)],
        search_for_year,
        width=112,
        stops=SearchR1.stops,
        steps=2000,
    ),
}


def ids_of(text, row: dict, turns: Turns, stops: tuple[str, ...]) -> tuple[list[int], list[bool]]:
    """(ids of the row and its turns, which of them the policy says), as the rollout engine would lay them."""
    ids = tokenizer.encode_prompt(text, row["messages"])
    own, ended = [False] * len(ids), True
    for role, said in turns:
        if role == "assistant":
            ended = not said.endswith(stops)
            more = text.encode(said, add_special_tokens=False) + [text.eos_token_id] * ended
        else:
            more = tokenizer.encode_turn(text, [{"role": role, "content": said}], ended=ended)
        ids, own = ids + more, own + [role == "assistant"] * len(more)
    return ids, own


def pack(text, task: Task, mixed: bool) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_NT, own_NT) of ROWS conversations: right ones, all tokens to learn, or mixed ones, the policy's."""
    rows, rng, made = task.rows(), np.random.default_rng(make.SEED), []
    for _ in range(ROWS):
        row = rows[rng.integers(len(rows))]
        ids, own = ids_of(text, row, task.conversation(rng, row, rng.random() if mixed else 0.0), task.stops)
        made.append((ids, own if mixed else [True] * len(ids)))
    shape = ROWS, task.width
    tokens_NT, own_NT = np.full(shape, tokenizer.pad_id(text), np.int32), np.zeros(shape, bool)
    for n, (ids, own) in enumerate(made):
        tokens_NT[n, : len(ids)], own_NT[n, : len(ids)] = ids, own
    return tokens_NT, own_NT


def main(argv: Sequence[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(prog="python -m models.tiny.talk", description=__doc__.splitlines()[0])
    arguments.add_argument("--of", choices=[*TASKS], default="calculator")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--steps", type=int, help="1000 for a calculator, 2000 for retrieval")
    given = arguments.parse_args(argv)
    task = TASKS[given.of]
    steps = task.steps if given.steps is None else given.steps
    text = tokenizer.load(str(TINY))
    config, params = hf.load(TINY, jnp.float32)
    tx, learn = make.learner(config, steps, PEAK_RATE)
    right, mixed = (jax.device_put(pack(text, task, each)) for each in (False, True))
    opt_state, rng = tx.init(params), np.random.default_rng(make.SEED)
    for step in range(0, steps, REPORT):
        rows_SB = rng.integers(ROWS, size=(min(REPORT, steps - step), BATCH))
        shown = right if step < FIRST * steps else mixed
        params, opt_state, loss = learn(params, opt_state, *shown, rows_SB)
        print(json.dumps({"step": step + len(rows_SB), "loss": round(float(loss), 4)}), flush=True)
    hf.save(config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), given.out)
    text.save_pretrained(given.out)


if __name__ == "__main__":
    main()
