"""The rollout engine against plain full forwards, and its sampled distribution against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig

from infinite_jax.rollout import Sampling, generate, processed_logp
from infinite_jax.score import completion_logp
from models import policy
from models.architectures import from_hf

PAD, STOP = 0, 1
SAMPLING = Sampling(1.0, 0, 1.0, 6, 3, (STOP,), PAD)


@pytest.fixture(scope="module")
def model():
    shape = LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    config = from_hf(shape)
    return config, jax.tree.map(lambda x: x * 3.0, policy.init(config, jax.random.key(0)))


PROMPT = np.array([[5, 6, 7, 8, 9], [3, 4, PAD, PAD, PAD]], np.int32)
LENGTH = np.array([5, 2], np.int32)


def run(model, sampling=SAMPLING, seed=0):
    return jax.device_get(generate(*model[:1], sampling, model[1], PROMPT, LENGTH, jax.random.key(seed)))


def test_rows_are_prompt_completion_padding_without_a_gap(model):
    made = run(model)
    assert made.tokens_BT.shape == (6, 11)
    for n in range(6):
        length, generated = LENGTH[n // 3], np.flatnonzero(made.loss_mask_BT[n])
        np.testing.assert_array_equal(made.tokens_BT[n, :length], PROMPT[n // 3, :length])
        np.testing.assert_array_equal(generated, np.arange(length, length + len(generated)))
        assert (made.tokens_BT[n, length + len(generated) :] == PAD).all()
        stops = np.flatnonzero(made.tokens_BT[n, generated] == STOP)
        assert made.done_B[n] == (len(stops) > 0)
        assert len(stops) == 0 or (len(stops) == 1 and stops[0] == len(generated) - 1)  # nothing after the end
        assert len(stops) or len(generated) == SAMPLING.max_new_tokens


def test_behaviour_log_probs_equal_the_trainers_in_float32(model):
    config, params = model
    made = run(model)
    logp, _ = jax.jit(completion_logp, static_argnums=(0, 4, 5, 6))(
        config, params, made.tokens_BT, made.loss_mask_BT, 1.0, SAMPLING.max_new_tokens, SAMPLING.group_size
    )
    np.testing.assert_allclose(made.logp_BT, logp, atol=2e-6)
    assert (made.logp_BT[~made.loss_mask_BT] == 0).all() and (made.logp_BT[made.loss_mask_BT] < 0).all()


def test_a_row_without_a_mask_leaves_its_group_as_it_is(model):
    """A reply that could not be graded: its prompt's length then comes from the others of the group."""
    config, params = model
    made, score = run(model), jax.jit(completion_logp, static_argnums=(0, 4, 5, 6))
    mask_BT = made.loss_mask_BT.copy()
    mask_BT[[0, 3, 4, 5]] = False  # one of the first group, all of the second
    logp, entropy = score(config, params, made.tokens_BT, mask_BT, 1.0, SAMPLING.max_new_tokens, SAMPLING.group_size)
    np.testing.assert_allclose(logp, np.where(mask_BT, made.logp_BT, 0.0), atol=2e-6)
    assert np.isfinite(logp).all() and np.isfinite(entropy).all()


def test_greedy_follows_the_argmax_of_a_full_forward(model):
    config, params = model
    made = run(model, SAMPLING._replace(temperature=0.0, group_size=1))
    for p in range(2):
        ids = list(PROMPT[p, : LENGTH[p]])
        for _ in range(int(made.loss_mask_BT[p].sum())):
            logits = policy.logits(config, params, jnp.array([ids]))
            ids.append(int(jnp.argmax(logits[0, -1])))
        np.testing.assert_array_equal(made.tokens_BT[p, : len(ids)], ids)


def test_the_key_and_nothing_else_decides_the_draw(model):
    np.testing.assert_array_equal(run(model).tokens_BT, run(model).tokens_BT)
    assert (run(model).tokens_BT != run(model, seed=1).tokens_BT).any()


def test_samples_of_a_group_differ(model):
    made = run(model)
    assert len({tuple(row) for row in made.tokens_BT[:3]}) > 1


def test_first_token_frequencies_are_the_models(model):
    config, params = model
    sampling = SAMPLING._replace(group_size=4000, max_new_tokens=1, temperature=0.7)
    made = run(model, sampling)
    first = made.tokens_BT[:4000, LENGTH[0]]
    expected = np.asarray(jax.nn.softmax(policy.logits(config, params, PROMPT[:1])[0, -1] / 0.7))
    found = np.bincount(first, minlength=13) / 4000
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / np.sqrt(4000))
    np.testing.assert_allclose(np.exp(made.logp_BT[:4000, LENGTH[0]]), expected[first], rtol=1e-4)


def test_top_k_and_top_p_by_hand():
    probs = np.array([[0.4, 0.3, 0.2, 0.1]])
    logits = jnp.log(jnp.array(probs))
    kept = np.exp(processed_logp(logits, SAMPLING._replace(top_k=2)))
    np.testing.assert_allclose(kept, [[4 / 7, 3 / 7, 0, 0]], rtol=1e-6)
    kept = np.exp(processed_logp(logits, SAMPLING._replace(top_p=0.75)))  # .4 + .3 < .75, so the third is needed
    np.testing.assert_allclose(kept, [[4 / 9, 3 / 9, 2 / 9, 0]], rtol=1e-6)
    kept = np.exp(processed_logp(logits, SAMPLING._replace(top_p=0.69)))
    np.testing.assert_allclose(kept, [[4 / 7, 3 / 7, 0, 0]], rtol=1e-6)
    kept = np.exp(processed_logp(logits, SAMPLING._replace(temperature=0.5)))
    np.testing.assert_allclose(kept, probs**2 / (probs**2).sum(), rtol=1e-6)


def test_behaviour_log_probs_are_of_the_truncated_distribution(model):
    made = run(model, SAMPLING._replace(top_k=1))
    np.testing.assert_allclose(made.logp_BT, 0.0, atol=1e-6)  # one token left: probability 1


def test_second_call_does_not_compile(model):
    run(model)
    before = generate._cache_size()
    run(model, seed=5)
    assert generate._cache_size() == before
