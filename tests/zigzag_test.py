"""The zigzag order, against orders written by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import zigzag

ORDERS = {  # (length, devices): a line a device
    (4, 1): [0, 1, 2, 3],
    (8, 2): [0, 1, 6, 7, 2, 3, 4, 5],
    (6, 3): [0, 5, 1, 4, 2, 3],
    (16, 4): [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9],
}


@pytest.mark.parametrize("shape", ORDERS)
def test_a_device_holds_an_early_and_a_late_chunk(shape):
    order = zigzag.order(*shape)
    assert order.tolist() == ORDERS[shape] and order.dtype == np.int32


@pytest.mark.parametrize("shape", [*ORDERS, (60, 5), (48, 8)])
def test_inverse_restores_the_order(shape):
    row = np.arange(shape[0])
    assert (row[zigzag.order(*shape)][zigzag.inverse(*shape)] == row).all()
    assert zigzag.inverse(*shape).dtype == np.int32


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_causal_attention_costs_each_device_the_same(n):
    """Keys that the queries of a device see, over a row: two equal shares of an arithmetic series."""
    length = 24 * n
    seen = (zigzag.order(length, n) + 1).reshape(n, -1).sum(1)
    assert (seen == length * (length + 1) // 2 // n).all()


@pytest.mark.parametrize("length, n, expected", [(8, 2, 8), (9, 2, 12), (1, 4, 8), (7, 3, 12), (5, 1, 6)])
def test_padded_is_the_next_length_that_divides(length, n, expected):
    assert zigzag.padded(length, n) == expected
    zigzag.order(expected, n)


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"length 10 is no multiple of 8 = 2 x 4 devices: pad it to 16$"):
        zigzag.order(10, 4)


def test_the_tokens_before_a_rows_end_are_counted_chunk_by_chunk():
    order = zigzag.order(24, 3).reshape(3, 2, 4)  # device, lo or hi, token
    lengths = np.array([0, 3, 4, 9, 22, 24])
    for device in range(3):
        found = zigzag.chunk_lengths(jnp.asarray(lengths), device, 3, 4)
        expected = (order[device][..., None] < lengths).sum(1)
        np.testing.assert_array_equal(found, expected)


def test_of_another_devices_keys_causality_shows_half_whole():
    """All queries and its lo, if it comes earlier, else the hi queries and all of its keys."""
    chunks = zigzag.order(8, 4).reshape(4, 2)  # numbers of the chunks that a device holds, lo and hi
    for me in range(4):
        for src in set(range(4)) - {me}:
            seen = chunks[me][:, None] > chunks[src]
            assert seen.tolist() == ([[True, False]] * 2 if src < me else [[False] * 2, [True] * 2])
