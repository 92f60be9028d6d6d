"""Procedural domains on token level for the compiled laboratory: prompts, answers and a grader, all of them jittable.

A prompt is the domain's own tag, some digits, and GO; the answer is digits and END. A family has two lengths, the
longer one being its harder variant, which no run trains on. Families come in two draws of ten that share none, so that
what is tuned on one can be judged on the other. In each draw eight are trained and two only tested, near relatives of
trained ones (`min` of `max`), which show what training does to a neighbour. Two more serve worlds in which something is
wrong: `dead`, whose answer has nothing to do with the prompt, and `noisy`, the same, for a world to grade by a coin.

The grader compares place by place, with the meaning of rubric/verify.py:

    4  the answer's digits and END
    3  the answer's digits, then something else than END
    2  ended, as long as the answer, at least two digits, at least half of them right in place
    1  anything else

Left out: families of open-ended answers, and text: a tokenizer would be the slowest part of the program.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

PAD, END, GO = 0, 1, 2
FIRST_DIGIT, DIGITS = 3, 10
FEW = 5  # digits of the arithmetic families, whose tables would otherwise take most of the practice
FIRST_TAG = FIRST_DIGIT + DIGITS
MAX_DIGITS = 10  # of a prompt, in the harder variants
PROMPT = MAX_DIGITS + 2  # tokens of the longest prompt: tag, digits, GO
ANSWER = 9  # tokens of the longest answer, END included
BLANK = -1  # in a family's answer: no digit from here on
RAW = 14  # random numbers of a row
RAW_BELOW = 2520  # they are uniform below this multiple of 1..10: modulo any of those they stay uniform

Made = tuple[jax.Array, jax.Array]  # digits of the prompt and of the answer, i32; the answer may end in BLANKs
Make = Callable[[jax.Array, int], Made]  # (raw_X, length) -> one row


class Rows(NamedTuple):
    prompt_NT: jax.Array  # i32[N, PROMPT], left-aligned, then PAD
    length_N: jax.Array  # i32, tokens of the prompt
    answer_NC: jax.Array  # i32[N, ANSWER], digits, END, then PAD


class Family(NamedTuple):
    make: Make
    length: int  # of the question; what it counts depends on the family
    harder: int  # the same in the harder variant


def on_list(answer: Callable[[jax.Array], jax.Array], below: int = DIGITS) -> Make:
    """A family whose question is one list of digits."""

    def make(raw_X, length):
        x = raw_X[:length] % below
        return x, answer(x)

    return make


def on_halves(answer: Callable[[jax.Array, jax.Array], jax.Array]) -> Make:
    """A family whose question is two lists of `length` digits, one behind the other."""

    def make(raw_X, length):
        x = raw_X[: 2 * length] % DIGITS
        return x, answer(x[:length], x[length:])

    return make


def kept(x: jax.Array, keep: jax.Array) -> jax.Array:
    """The digits of x to keep, in their order, then BLANKs."""
    order = jnp.argsort(~keep, stable=True)
    return jnp.where(jnp.arange(len(x)) < keep.sum(), x[order], BLANK)


def _first_seen(x):
    return kept(x, jnp.argmax(x[:, None] == x[None], axis=1) == jnp.arange(len(x)))


def _shift(raw_X, length):
    x = raw_X[: length + 1] % FEW  # the first says by how much
    return x, (x[1:] + x[0]) % FEW


def _lookup(raw_X, length):
    """Three places, then a list: the digits at those places."""
    asked, x = raw_X[:3] % length, raw_X[3 : 3 + length] % DIGITS
    return jnp.concatenate([asked, x]), x[asked]


def _evens(raw_X, length):
    x = raw_X[:length] % DIGITS
    x = x.at[0].add(-(x[0] % 2))  # at least one is kept: an empty answer would be right whatever follows it
    return x, kept(x, x % 2 == 0)


def _count(x):
    return jnp.sum(x[None] == jnp.arange(3)[:, None], axis=1)


def _swap(x):
    return x.reshape(-1, 2)[:, ::-1].reshape(-1)


def _unrelated(raw_X, length):
    return raw_X[:length] % DIGITS, raw_X[length : 2 * length] % DIGITS


FAMILIES = {
    "copy": Family(on_list(lambda x: x), 6, 8),
    "sort": Family(on_list(jnp.sort), 5, 7),
    "max": Family(on_list(jax.lax.cummax), 6, 8),  # the largest so far
    "min": Family(on_list(jax.lax.cummin), 6, 8),
    "add": Family(on_list(lambda x: (x[1:] + x[:-1]) % FEW, below=FEW), 6, 8),  # neighbours, modulo 5
    "shift": Family(_shift, 5, 7),
    "lookup": Family(_lookup, 5, 7),
    "parity": Family(on_list(lambda x: jnp.cumsum(x) % 2), 6, 8),  # of the digits so far
    "dedupe": Family(on_list(_first_seen), 6, 8),
    "rotate": Family(on_list(lambda x: jnp.roll(x, -1)), 6, 8),
    "reverse": Family(on_list(lambda x: x[::-1]), 6, 8),
    "descending": Family(on_list(lambda x: jnp.sort(x)[::-1]), 5, 7),
    "larger": Family(on_halves(jnp.maximum), 3, 4),
    "difference": Family(on_list(lambda x: (x[1:] - x[:-1]) % FEW, below=FEW), 6, 8),  # of neighbours, modulo 5
    "mirror": Family(on_list(lambda x: DIGITS - 1 - x), 6, 8),
    "interleave": Family(on_halves(lambda a, b: jnp.stack([a, b], 1).reshape(-1)), 3, 4),
    "sum": Family(on_list(lambda x: jnp.cumsum(x) % FEW, below=FEW), 6, 8),  # of the digits so far, modulo 5
    "evens": Family(_evens, 6, 8),
    "count": Family(on_list(_count, below=3), 6, 8),  # how many 0, 1 and 2
    "swap": Family(on_list(_swap), 6, 8),  # neighbours change places
    "dead": Family(_unrelated, 5, 7),
    "noisy": Family(_unrelated, 5, 7),
}
TUNING = "copy sort max add shift lookup parity dedupe rotate min"
JUDGING = "reverse descending larger difference mirror interleave sum evens swap count"
DRAWS = {"tuning": tuple(TUNING.split()), "judging": tuple(JUDGING.split())}
TRAINED = 8  # of a draw; the two behind them are only tested
TAGS = {name: FIRST_TAG + number for number, name in enumerate(FAMILIES)}
VOCABULARY = FIRST_TAG + len(FAMILIES)


def stacked(names: Sequence[str], key: jax.Array, num: int, harder: bool = False) -> Rows:
    """`num` independent rows of each family, leaves [len(names), num, ...]. Consumes `key`; the rest is static."""
    raw_DNX = jax.random.randint(key, (len(names), num, RAW), 0, RAW_BELOW)
    made = [rows(name, raw_NX, harder) for name, raw_NX in zip(names, raw_DNX)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)


def rows(name: str, raw_NX: jax.Array, harder: bool) -> Rows:
    """A row of the family for each line of random numbers, i32[N, RAW] in [0, RAW_BELOW)."""
    family, num = FAMILIES[name], len(raw_NX)
    length = family.harder if harder else family.length
    question_NX, answer_NX = jax.vmap(lambda raw_X: family.make(raw_X, length))(raw_NX)
    size = question_NX.shape[1]
    tag, go = jnp.full((num, 1), TAGS[name]), jnp.full((num, 1), GO)
    prompt_NT = jnp.concatenate([tag, question_NX + FIRST_DIGIT, go], axis=1)
    prompt_NT = jnp.pad(prompt_NT, ((0, 0), (0, PROMPT - size - 2)), constant_values=PAD)
    answer_NC = jnp.pad(answer_NX, ((0, 0), (0, ANSWER - answer_NX.shape[1])), constant_values=BLANK)
    given_N1 = jnp.sum(answer_NC != BLANK, axis=1, keepdims=True)
    after = jnp.where(jnp.arange(ANSWER) == given_N1, END, PAD)
    answer_NC = jnp.where(answer_NC == BLANK, after, answer_NC + FIRST_DIGIT)
    return Rows(prompt_NT.astype(jnp.int32), jnp.full(num, size + 2, jnp.int32), answer_NC.astype(jnp.int32))


def grade(reply_NC: jax.Array, answer_NC: jax.Array) -> jax.Array:
    """Grades 1 to 4, f32[N], by the rules above. Pure.

    Args:
      reply_NC: i32[N, ANSWER], what the policy wrote, then PAD. answer_NC: i32[N, ANSWER], as in Rows.
    """
    chex.assert_equal_shape([reply_NC, answer_NC])
    digit_NC = answer_NC >= FIRST_DIGIT
    length_N = digit_NC.sum(1)
    right_N = jnp.sum(digit_NC & (reply_NC == answer_NC), axis=1)
    end_NC = reply_NC == END
    ended_N = end_NC.any(1) & (jnp.argmax(end_NC, axis=1) == length_N)
    same_N = right_N == length_N
    partly_N = ended_N & (length_N >= 2) & (2 * right_N >= length_N)
    return jnp.where(same_N, jnp.where(ended_N, 4.0, 3.0), jnp.where(partly_N, 2.0, 1.0))


def completions(tokens_BT: jax.Array, length_B: jax.Array) -> jax.Array:
    """The ANSWER tokens behind each row's prompt, i32[B, ANSWER]."""
    slot_BC = length_B[:, None] + jnp.arange(ANSWER)
    return jnp.take_along_axis(tokens_BT, slot_BC, axis=1)
