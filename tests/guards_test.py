"""The guards of the band capacities; isotonic regression is compared with a loop that pools violators."""

import dataclasses
import functools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.cli import compose_config
from curriculum import guards, policies, triage
from curriculum.triage import roster

D = 20
CONFIG = dataclasses.replace(
    compose_config("config", None, ["curriculum=a1"]).curriculum, policy="faithful", epsilon=0.0
)
START = triage.init(CONFIG, 0, roster(D))
monotone = jax.jit(guards.monotone)


@functools.cache
def shares(**changes):
    return jax.jit(policies.build(dataclasses.replace(CONFIG, **changes)).probabilities)


def state(bands, zvf=0.0):
    """Domains in those bands; the rest inactive. Rates of groups without a difference as given."""
    bands = np.array(bands)
    pad = (0, D - len(bands))
    active, band = np.arange(D) < len(bands), np.pad(bands, pad).astype(np.int32)
    zvf = np.pad(np.broadcast_to(np.float32(zvf), bands.shape), pad)
    return START._replace(active=active, performance_band=band, zvf_ema=zvf)


def pooled(ratio, weight):
    """Pool adjacent violators of the bands that have weight, in float64."""
    blocks = [[r, w, [k]] for k, (r, w) in enumerate(zip(ratio, weight)) if w > 0]
    i = 0
    while i + 1 < len(blocks):
        (r, w, ks), (s, v, js) = blocks[i], blocks[i + 1]
        if s > r:
            blocks[i : i + 2] = [[(r * w + s * v) / (w + v), w + v, ks + js]]
            i = max(i - 1, 0)
        else:
            i += 1
    return {k: r for r, _, ks in blocks for k in ks}


positive = st.floats(0.01, 100)


@given(st.lists(positive, min_size=3, max_size=3), st.lists(st.sampled_from([0, 1, 1, 3, 7.5]), min_size=3, max_size=3))
@settings(deadline=None, max_examples=150)
def test_pooling_is_non_increasing_keeps_capacity_and_equals_the_loop(ratio, weight):
    ratio = [r * (w > 0) for r, w in zip(ratio, weight)]
    got, expected = np.asarray(monotone(np.float32(ratio), np.float32(weight))), pooled(ratio, weight)
    np.testing.assert_allclose([got[k] for k in expected], list(expected.values()), rtol=1e-5)
    assert np.all(np.diff([got[k] for k in sorted(expected)]) <= 1e-5 * max(ratio))
    np.testing.assert_allclose(sum(got[k] * weight[k] for k in expected), np.dot(ratio, weight), rtol=1e-5)


def test_one_medium_domain_no_longer_outranks_eighteen_low_ones():
    bands = [0] * 18 + [1, 2]
    plain, guarded = (np.asarray(shares(**on)(state(bands))) for on in ({}, {"monotone": True}))
    np.testing.assert_allclose(plain[[0, 18, 19]], [0.6 / 18, 0.3, 0.1], rtol=1e-5)
    np.testing.assert_allclose(guarded, np.full(D, 1 / 20), rtol=1e-5)  # all three are pooled: 1 / 20 each
    bands = [0] * 2 + [1, 2]
    np.testing.assert_allclose(shares(monotone=True)(state(bands))[:4], [0.3, 0.3, 0.3, 0.1], rtol=1e-5)
    bands = [0, 1, 1, 2]  # in order already: nothing changes
    np.testing.assert_allclose(shares(monotone=True)(state(bands))[:4], [0.6, 0.15, 0.15, 0.1], rtol=1e-5)


def test_a_dead_low_band_keeps_a_twentieth_of_its_claim():
    claims = np.array([0.03, 0.3, 0.1]) / 0.43
    np.testing.assert_allclose(shares(guard=True)(state([0, 1, 2], [1, 0, 0]))[:3], claims, rtol=1e-5)
    two_dead = shares(guard=True)(state([0, 0, 1, 2], [1, 0.98, 0, 0]))
    g = np.array([0.05, 0.08])
    claims = np.array([*(0.6 * 0.08 * g / g.sum()), 0.3, 0.1])
    np.testing.assert_allclose(two_dead[:4], claims / claims.sum(), rtol=1e-5)


def test_one_learnable_member_keeps_the_band_and_takes_it():
    p = shares(guard=True)(state([0, 0, 1, 2], [1, 0.5, 0, 0]))
    np.testing.assert_allclose(p[:4], [0.6 * 0.05 / 1.05, 0.6 / 1.05, 0.3, 0.1], rtol=1e-5)


def test_the_guard_leaves_other_bands_and_living_domains_alone():
    """High bands have no variance because they are mastered; where all low ones learn, nothing changes."""
    for bands, zvf in (([0, 1, 2], [0.7, 1, 1]), ([1, 1, 2], [1, 1, 1]), ([0, 0, 0], [0.2, 0.75, 0])):
        np.testing.assert_allclose(shares(guard=True)(state(bands, zvf)), shares()(state(bands, zvf)), rtol=1e-6)
