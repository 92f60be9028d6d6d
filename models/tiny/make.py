"""Makes the embedded model: a byte-level Llama, trained with supervision on part of the tiny domains, then saved here.

    python -m models.tiny.make [--steps N] [--out DIR]

The start that reinforcement learning needs is a model that can do a task but does not always: for most domains a share
of the examples shows a wrong habit (the list as it stands instead of reversed, the first number instead of the
largest), so that the model holds both, as a pretrained one holds good and bad continuations. Two domains are shown
right but at lower levels or seldom, so that little of them is known. Pass rates then begin anywhere between nearly none
and nearly all, and every format is known. Loss: cross-entropy of the answer's tokens and the end of the turn.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import LlamaConfig

from curriculum import domains
from kernels.logprob import token_logp
from models import hf, policy, tokenizer
from models.architectures import from_hf

HERE = Path(__file__).parent
SHAPE = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
)
# (generator, level, share of the practice, share of right answers); the run's levels are those of the tiny domains
PRACTICE = (
    ("copy", 2, 1.0, 0.7),
    ("largest", 2, 1.5, 0.55),
    ("reverse", 3, 1.0, 0.45),
    ("sort", 4, 1.5, 0.4),
    ("lookup", 1, 1.0, 1.0),
    ("lookup", 2, 1.0, 1.0),
    ("lookup", 3, 0.5, 1.0),
    ("add", 1, 1.0, 0.5),
    ("add", 2, 2.0, 0.5),
    ("shift", 2, 1.0, 0.45),
    ("count", 1, 0.5, 1.0),
    ("count", 2, 0.3, 1.0),
)
LENGTH, BATCH, REPORT = 40, 128, 100  # tokens a row, rows a step, steps a report
PEAK_RATE, WEIGHT_DECAY, SEED = 3e-3, 0.1, 0


def wrong_habit(name: str, question: str) -> str:
    """The answer of a plausible misreading of the question."""
    given = question.partition(": ")[2]
    return {
        "copy": lambda: given[::-1],
        "largest": lambda: given.split()[0],
        "reverse": lambda: given,
        "sort": lambda: given,
        "add": lambda: given.split()[0],
        "shift": lambda: given,
    }[name]()


def rows_of(text, source: str, right: float = 1.0) -> list[tuple[list[int], int]]:
    """(ids of prompt and answer, length of the prompt) of every row of a source, a share `right` answered right."""
    rng, end, name = np.random.default_rng(SEED), text.eos_token_id, source.removeprefix("gen:").partition(",")[0]
    rows = []
    for row in domains.read(source):
        question = row["messages"][-1]["content"]
        answer = row["answer"] if rng.random() < right else wrong_habit(name, question)
        prompt = tokenizer.encode_prompt(text, row["messages"])
        rows.append((prompt + text.encode(answer, add_special_tokens=False) + [end], len(prompt)))
    return rows


def pack(rows: list[tuple[list[int], int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_BT, answer_BT): answer is True on the tokens to learn."""
    tokens_BT = np.full((len(rows), LENGTH), pad, np.int32)
    answer_BT = np.zeros((len(rows), LENGTH), bool)
    for n, (ids, prompt) in enumerate(rows):
        tokens_BT[n, : len(ids)] = ids
        answer_BT[n, prompt : len(ids)] = True
    return tokens_BT, answer_BT


def answer_logp(config, params, tokens_BT):
    hidden_BTE = policy.hidden(config, params, tokens_BT[:, :-1])
    return token_logp(functools.partial(policy.unembed, config, params), hidden_BTE, tokens_BT[:, 1:])[0]


def learner(config, steps: int, peak_rate: float = PEAK_RATE):
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, peak_rate, min(100, steps // 10), steps),
            b2=0.98,
            weight_decay=WEIGHT_DECAY,
        ),
    )

    def loss(params, tokens_BT, answer_BT):
        mask = answer_BT[:, 1:]
        return -jnp.sum(jnp.where(mask, answer_logp(config, params, tokens_BT), 0.0)) / mask.sum()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def learn(params, opt_state, tokens_NT, answer_NT, rows_SB):
        def one(state, rows_B):
            params, opt_state = state
            value, grads = jax.value_and_grad(loss)(params, tokens_NT[rows_B], answer_NT[rows_B])
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        (params, opt_state), values_S = jax.lax.scan(one, (params, opt_state), rows_SB)
        return params, opt_state, values_S.mean()

    return tx, learn


@functools.partial(jax.jit, static_argnums=0)
def exact(config, params, tokens_BT, answer_BT):
    """Share of rows whose every answer token is the argmax: what greedy decoding would get exactly right."""
    guess = jnp.argmax(policy.logits(config, params, tokens_BT[:, :-1]), -1)
    return jnp.mean(jnp.all((guess == tokens_BT[:, 1:]) | ~answer_BT[:, 1:], axis=1))


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m models.tiny.make", description=__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=6000)
    arguments.add_argument("--out", type=Path, default=HERE)
    given = arguments.parse_args()
    text = tokenizer.load(str(HERE))
    config = from_hf(LlamaConfig(vocab_size=len(text), eos_token_id=text.eos_token_id, **SHAPE))
    params = policy.init(config, jax.random.key(SEED))
    practice = [
        rows_of(text, f"gen:{name},difficulty={level},split=train,size=20000", right)
        for name, level, _, right in PRACTICE
    ]
    rows = pack([row for source in practice for row in source], text.pad_token_id)
    sizes, share = np.array([len(source) for source in practice]), np.array([weight for _, _, weight, _ in PRACTICE])
    first = np.cumsum(sizes) - sizes
    run_levels = {name: max(each[1] for each in PRACTICE if each[0] == name) for name, *_ in PRACTICE}
    held_out = {
        name: pack(rows_of(text, f"gen:{name},difficulty={level},split=test,size=256"), text.pad_token_id)
        for name, level in run_levels.items()
    }
    tx, learn = learner(config, given.steps)
    opt_state, rng = tx.init(params), np.random.default_rng(SEED)
    rows = jax.device_put(rows)
    for step in range(REPORT, given.steps + 1, REPORT):
        source_SB = rng.choice(len(practice), (REPORT, BATCH), p=share / share.sum())
        rows_SB = first[source_SB] + rng.integers(sizes[source_SB])
        params, opt_state, value = learn(params, opt_state, *rows, rows_SB)
        rates = {name: round(float(exact(config, params, *test)), 3) for name, test in held_out.items()}
        print(f"step {step} loss {float(value):.3f} {rates}", flush=True)
    hf.save(config, params, given.out, dtype=jnp.bfloat16)


if __name__ == "__main__":
    main()
