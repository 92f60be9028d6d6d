"""benchmarks/measure.py: the order in which contenders are timed."""

import collections
import itertools

import pytest

from benchmarks.measure import in_turns


@pytest.mark.parametrize("n, rounds", [(2, 2), (3, 6), (4, 4), (5, 10), (6, 6)])
def test_in_turns_each_follows_each(n, rounds):
    order = []
    in_turns({name: lambda name=name: order.append(name) or 0.0 for name in range(n)}, rounds)
    each = [order[i : i + n] for i in range(0, len(order), n)]
    assert len(each) == rounds and all(sorted(turn) == list(range(n)) for turn in each)
    follows = collections.Counter(pair for turn in each for pair in itertools.pairwise(turn))
    places = collections.Counter(place for turn in each for place in enumerate(turn))
    assert len(follows) == n * (n - 1) and set(follows.values()) == {rounds // n}
    assert len(places) == n * n and set(places.values()) == {rounds // n}


def test_in_turns_medians():
    times = {"a": iter([5.0, 1.0, 2.0]), "b": iter([4.0, 9.0, 7.0])}
    assert in_turns({name: lambda t=t: next(t) for name, t in times.items()}, 3) == {"a": 2.0, "b": 7.0}
