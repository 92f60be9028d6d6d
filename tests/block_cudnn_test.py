"""cuDNN's attention as a block: what is passed to it, which rows are guarded, and (on a GPU) its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_xla_test import reference, relative

from kernels import block_cudnn
from kernels.block import MASKED, Mask

GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU: JAX_PLATFORMS=cuda pytest -m slow")
B, T, H, K, D, SCALE = 2, 8, 4, 2, 8, 0.3


def dense(q, k, v, do, seen_BTS, scale):
    """o, lse, dq, dk, dv in float64."""
    *found, ((dk, dv),) = reference(q, do, [(k, v, np.broadcast_to(seen_BTS, (len(q), q.shape[1], k.shape[1])))], scale)
    return *found, dk, dv


def random(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


def inputs(length=T, head_dim=D, heads=H, kv_heads=K):
    q, kv = (B, length, heads, head_dim), (B, length, kv_heads, head_dim)
    return random(0, q, kv, kv, q)


class Primitive:
    """Stands for one of jax's two: dense attention over the first kv_seqlen keys, not a number in a row without any."""

    def __init__(self, is_forward):
        self.is_forward, self.calls = is_forward, []

    def bind(self, q, k, v, *arrays, **static):
        arrays = dict(zip((*block_cudnn.ARRAYS, *block_cudnn.RESIDUALS)[3:], arrays))
        self.calls.append(static)
        seen = np.ones((B, q.shape[1], k.shape[1]), bool)
        if static["mask_type"].name.startswith("PADDING"):
            np.testing.assert_array_equal(arrays["q_seqlen"], [q.shape[1]] * B)
            seen &= np.arange(k.shape[1]) < np.asarray(arrays["kv_seqlen"])[:, None, None]
        if static["mask_type"].name.endswith("CAUSAL"):
            seen &= np.tri(q.shape[1], dtype=bool)
        do = arrays.get("grad_output", q)
        o, lse, *gradients = dense(q, k, v, do, seen, static["scale"])
        if self.is_forward:
            empty = ~seen.any((1, 2))
            o[empty], lse[empty] = np.nan, np.nan
            return jnp.asarray(o, q.dtype), jnp.asarray(lse, jnp.float32)
        unseen = np.broadcast_to(~seen.any(1)[..., None, None], k.shape)
        for x in gradients[1:]:
            x[unseen] = np.nan  # what lies behind the padding is not relied on
        return [jnp.asarray(x, jnp.float32) for x in gradients]


@pytest.fixture
def cudnn(monkeypatch):
    """block_cudnn over stand-ins for jax's primitives."""
    real = block_cudnn.private()
    fake = real._replace(forward=Primitive(True), backward=Primitive(False))
    monkeypatch.setattr(block_cudnn, "private", lambda: fake)
    return fake


def test_rows_without_keys_have_neither_output_nor_gradient(cudnn):
    q, k, v, do = inputs()
    lengths = np.array([0, 5])
    mask = Mask(lengths_B=jnp.asarray(lengths, jnp.int32))
    seen = np.broadcast_to(np.arange(T) < lengths[:, None, None], (B, T, T))
    expected = dense(q, k, v, do, seen, SCALE)
    o, lse = block_cudnn.forward(q, k, v, mask, SCALE)
    np.testing.assert_array_equal(o[0], np.zeros((T, H, D)))
    np.testing.assert_array_equal(lse[0], np.full((H, T), MASKED, np.float32))
    np.testing.assert_allclose(np.asarray(o, np.float32), expected[0], atol=0.02)
    np.testing.assert_allclose(lse[1], expected[1][1], rtol=1e-5)
    gradients = block_cudnn.backward(q, k, v, o, lse, None, do, mask, SCALE)
    for ours, theirs in zip(gradients, expected[2:]):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_causality_padding_scale_and_layout_reach_cudnn(cudnn):
    q, k, v, do = inputs()
    lengths = jnp.asarray([3, 8], jnp.int32)
    names = {
        "NO_MASK": Mask(),
        "CAUSAL": Mask(causal=True),
        "PADDING": Mask(lengths_B=lengths),
        "PADDING_CAUSAL": Mask(causal=True, lengths_B=lengths),
    }
    for name, mask in names.items():
        o, lse = block_cudnn.forward(q, k, v, mask, SCALE)
        block_cudnn.backward(q, k, v, o, lse, None, do, mask, SCALE)
        for primitive in (cudnn.forward, cudnn.backward):
            passed = primitive.calls.pop()
            assert passed["mask_type"].name == name
            assert passed["scale"] == SCALE and passed["layout"] == 0 and passed["dropout_rate"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": Mask(segments=(0, 0))}, "no segments here"),
        ({"mask": Mask(positions=(0, 0))}, r"no positions \(windows\) here"),
        ({"dtype": jnp.float32}, "float32, float32, float32: set model.dtype=bfloat16"),
        ({"head_dim": 264}, "head dimension 264: it is a multiple of 8 up to 256"),
    ],
)
def test_what_cudnn_lacks_is_refused_in_one_line(change, message):
    q, k, v, _ = inputs(head_dim=change.get("head_dim", D))
    q, k, v = (x.astype(change.get("dtype", x.dtype)) for x in (q, k, v))
    with pytest.raises(ValueError, match=message) as error:
        block_cudnn.forward(q, k, v, change.get("mask", Mask()), SCALE)
    assert "\n" not in str(error.value)


@pytest.fixture
def module(monkeypatch):
    """jax's private module, to be changed; the check of its names runs again before and after."""
    from jax._src.cudnn import fused_attention_stablehlo

    block_cudnn.private.cache_clear()
    yield fused_attention_stablehlo
    block_cudnn.private.cache_clear()


def test_a_changed_jax_is_named_with_the_remedy(monkeypatch, module):
    def reordered(ctx, key, query, value):
        return ctx

    for name, there in (
        ("_dot_product_attention_bwd_cuda_lowering", reordered),
        ("_dot_product_attention_fwd_p", None),
    ):
        block_cudnn.private()
        block_cudnn.private.cache_clear()
        with monkeypatch.context() as change:
            change.setattr(module, name, there) if there else change.delattr(module, name)
            message = f"jax {jax.__version__} lacks .*{'key' if there else name}.*model.attention=xla"
            with pytest.raises(ValueError, match=message) as error:
                block_cudnn.private()
        assert "\n" not in str(error.value)


def test_lowers_for_cuda_without_a_gpu():
    """To cuDNN's custom calls, q, k, v untransposed. That it compiles and runs, only a GPU shows."""
    q, kv = (jax.ShapeDtypeStruct((B, 256, heads, 64), jnp.bfloat16) for heads in (H, K))
    lse = jax.ShapeDtypeStruct((B, H, 256), jnp.float32)
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)

    def both(q, k, v, o, lse, do, lengths):
        ahead = block_cudnn.BLOCK.forward(q, k, v, Mask(lengths_B=lengths), 0.125)
        return ahead, block_cudnn.BLOCK.backward(q, k, v, o, lse, None, do, Mask(causal=True), 0.125)

    text = jax.jit(both).trace(q, kv, kv, q, lse, q, lengths).lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaSoftmax(%arg0, %arg1, %arg2, " in text
    assert "@__cudnn$fmhaSoftmaxBackward(%arg0, %arg1, %arg2, %arg4, %arg5, %arg3)" in text
    assert text.count(r"\22fmha_scale\22: 0.125") == 2 and r"\22mask_type\22: \22PADDING\22" in text


@GPU
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, (0, 700)])
def test_on_a_gpu_against_float64(head_dim, causal, lengths):
    length = 1024
    q, k, v, do = inputs(length, head_dim, 6, 2)
    mask = Mask(causal=causal, lengths_B=None if lengths is None else jnp.asarray(lengths, jnp.int32))
    seen = np.ones((B, length, length), bool) & (np.tri(length, dtype=bool) if causal else True)
    if lengths is not None:
        seen &= np.arange(length) < np.array(lengths)[:, None, None]
    expected = dense(q, k, v, do, seen, SCALE)
    o, lse = jax.jit(block_cudnn.forward, static_argnums=4)(q, k, v, mask, SCALE)
    gradients = jax.jit(block_cudnn.backward, static_argnums=8)(q, k, v, o, lse, lse, do, mask, SCALE)
    for ours, theirs, tolerance in zip((o, lse, *gradients), expected, (6e-3, 1e-4, 1e-2, 1e-2, 1e-2)):
        assert relative(ours, theirs) <= tolerance
