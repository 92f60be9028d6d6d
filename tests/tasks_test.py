"""Families against plain Python, the grader against a second one, by hand and on random replies."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinite_jax.worlds import tasks
from infinite_jax.worlds.tasks import ANSWER, DIGITS, DRAWS, END, FAMILIES, FIRST_DIGIT, GO, PAD, TAGS

ROWS = 32


def so_far(best, x):
    return [best(x[: i + 1]) for i in range(len(x))]


def halves(x):
    return list(zip(x[: len(x) // 2], x[len(x) // 2 :]))


REFERENCE = {
    "copy": lambda x: x,
    "sort": sorted,
    "max": lambda x: so_far(max, x),
    "min": lambda x: so_far(min, x),
    "add": lambda x: [(a + b) % 5 for a, b in itertools.pairwise(x)],
    "shift": lambda x: [(d + x[0]) % 5 for d in x[1:]],
    "lookup": lambda x: [x[3 + place] for place in x[:3]],
    "parity": lambda x: so_far(lambda part: sum(part) % 2, x),
    "dedupe": lambda x: list(dict.fromkeys(x)),
    "rotate": lambda x: [*x[1:], x[0]],
    "reverse": lambda x: x[::-1],
    "descending": lambda x: sorted(x, reverse=True),
    "larger": lambda x: [max(pair) for pair in halves(x)],
    "difference": lambda x: [(b - a) % 5 for a, b in itertools.pairwise(x)],
    "mirror": lambda x: [9 - d for d in x],
    "interleave": lambda x: [d for pair in halves(x) for d in pair],
    "sum": lambda x: so_far(lambda part: sum(part) % 5, x),
    "evens": lambda x: [d for d in x if d % 2 == 0],
    "count": lambda x: [x.count(d) for d in range(3)],
    "swap": lambda x: [x[i ^ 1] for i in range(len(x))],
}


@pytest.fixture(scope="module")
def made():
    """Rows of every family in both variants, on the host."""
    names = list(FAMILIES)

    def both(key):
        return [tasks.stacked(names, jax.random.fold_in(key, hard), ROWS, bool(hard)) for hard in (0, 1)]

    quick = jax.jit(both, compiler_options={"xla_backend_optimization_level": 0})  # compiled for one call
    standard, harder = jax.device_get(quick(jax.random.key(0)))
    return {
        (name, hard): jax.tree.map(lambda x, d=d: x[d], rows)
        for hard, rows in ((False, standard), (True, harder))
        for d, name in enumerate(names)
    }


def question(rows, n):
    return [int(t) - FIRST_DIGIT for t in rows.prompt_NT[n, 1 : rows.length_N[n] - 1]]


def answer(rows, n):
    line = rows.answer_NC[n].tolist()
    return [t - FIRST_DIGIT for t in line[: line.index(END)]]


@pytest.mark.parametrize("harder", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_laid_out_and_answered_right(made, name, harder):
    rows = made[name, harder]
    for n in range(ROWS):
        line, length = rows.prompt_NT[n].tolist(), int(rows.length_N[n])
        assert line[0] == TAGS[name] and line[length - 1] == GO and set(line[length:]) <= {PAD}
        asked, given = question(rows, n), answer(rows, n)
        assert all(0 <= digit < DIGITS for digit in asked + given) and given
        assert set(rows.answer_NC[n, len(given) + 1 :].tolist()) <= {PAD}
        if name in REFERENCE:
            assert given == REFERENCE[name](asked)


def test_harder_is_longer_and_rows_differ(made):
    for name in FAMILIES:
        assert made[name, True].length_N[0] > made[name, False].length_N[0]
        assert len({tuple(line) for line in made[name, False].prompt_NT.tolist()}) > ROWS // 2


def test_the_answer_of_the_dead_family_does_not_follow_from_the_prompt(made):
    rows = made["dead", False]
    assert np.mean([np.array(question(rows, n)) == np.array(answer(rows, n)) for n in range(ROWS)]) < 0.3


def test_draws_share_no_family_and_have_their_parts():
    assert set(DRAWS["tuning"]) & set(DRAWS["judging"]) == set()
    assert set(DRAWS["tuning"]) | set(DRAWS["judging"]) == set(REFERENCE)
    assert all(len(set(draw)) == tasks.TRAINED + 2 for draw in DRAWS.values())


def grade_by_hand(reply: list[int], right: list[int]) -> int:
    """A second grader, on lists: `right` is the answer's digits, a reply ends at its first END."""
    if reply[: len(right)] == right:
        return 4 if reply[len(right)] == END else 3
    written = reply[: reply.index(END)] if END in reply else None
    if written is None or len(written) != len(right) or len(right) < 2:
        return 1
    return 2 if sum(a == b for a, b in zip(written, right)) * 2 >= len(right) else 1


def line(*digits, then=(END,)):
    tokens = [*(FIRST_DIGIT + d for d in digits), *then]
    return tokens + [PAD] * (ANSWER - len(tokens))


HAND = [
    (line(1, 2, 3, 4), 4),
    (line(1, 2, 3, 4, 5), 3),  # junk behind the answer
    (line(1, 2, 3, 4, then=()), 3),  # padding is no END
    (line(1, 2, 9, 9), 2),
    (line(1, 9, 9, 9), 1),
    (line(1, 2, 3), 1),  # too short
    (line(1, 2, 9, 4, 5), 1),  # too long and not right
    (line(1, 2, 9, 4, then=()), 1),  # never ended
    ([END, *line(1, 2, 3, 4)[:-1]], 1),
    ([FIRST_DIGIT + 1, END, *line(3, 4)[: ANSWER - 2]], 1),
]


def test_grades_by_hand():
    right = jnp.array([line(1, 2, 3, 4)] * len(HAND))
    assert tasks.grade(jnp.array([reply for reply, _ in HAND]), right).tolist() == [grade for _, grade in HAND]
    single = jnp.array([line(7)] * 2)
    assert tasks.grade(jnp.array([line(7), line(8)]), single).tolist() == [4, 1]


def test_grades_as_the_second_grader_on_random_replies(made):
    rng, answers = np.random.default_rng(0), np.concatenate([rows.answer_NC for rows in made.values()])
    replies = answers.copy()
    for number, reply in enumerate(replies):  # 0 to 3 places overwritten, ends and padding included
        places = rng.integers(ANSWER, size=number % 4)
        reply[places] = rng.integers(tasks.VOCABULARY, size=len(places))
    given = np.asarray(tasks.grade(jnp.asarray(replies), jnp.asarray(answers)))
    expected = [
        grade_by_hand(reply.tolist(), right.tolist()[: right.tolist().index(END)])
        for reply, right in zip(replies, answers)
    ]
    assert given.tolist() == expected and set(expected) == {1, 2, 3, 4}


def test_completions_start_behind_the_prompt():
    tokens = jnp.arange(2 * (tasks.PROMPT + ANSWER)).reshape(2, -1)
    found = tasks.completions(tokens, jnp.array([5, tasks.PROMPT]))
    assert found[0].tolist() == list(range(5, 5 + ANSWER))
    assert found[1].tolist() == list(range(21 + 12, 21 + 12 + ANSWER))
