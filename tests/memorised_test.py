"""The memorised stage: twins, scores of a random model against its own logits a token at a time, NOT RUN."""

import jax
import numpy as np
import pytest

from configs import cli
from curriculum import domains
from infinite_jax import memorised
from models import policy, source
from sharding.mesh import make_mesh


def test_twins_differ_in_numbers_or_else_in_one_word():
    made = memorised.twins("add 12 and 7", ["add 12 and 7"])
    assert len(set(made)) == 4 and made == memorised.twins("add 12 and 7", [])
    for twin in made:
        a, first, b, second = twin.split()
        assert (a, b) == ("add", "and") and len(first) == 2 and len(second) == 1
    (twin, *_) = memorised.twins("spell garden", ["spell castle"])
    assert twin != "spell garden" and sum(x != y for x, y in zip(twin.split(), ["spell", "garden"])) == 1
    assert memorised.twins("a b", ["a b"]) == []


def test_scores_are_those_of_the_logits_a_token_at_a_time():
    config = cli.compose_config("config", None, ["mesh=single"])
    mesh = make_mesh(config.mesh)
    decoder, params = source.load(config.model, mesh)
    text = source.load_tokenizer(config.model)
    rows = [memorised.encode(text, line) for line in ("copy: abcdef", "add: 1")]
    found = memorised.score(decoder, params, mesh, rows, 0)
    for ids, (mean, completed) in zip(rows, found):
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(ids)] = ids
        with jax.set_mesh(mesh):
            logits = np.asarray(policy.logits(decoder, params, tokens), np.float64)[0]
        logp = [
            logits[t] - np.log(np.exp(logits[t] - logits[t].max()).sum()) - logits[t].max() for t in range(len(ids))
        ]
        assert mean == pytest.approx(np.mean([logp[t][ids[t + 1]] for t in range(len(ids) - 1)]), abs=2e-3)
        tail = range(len(ids) // 2, min(len(ids) // 2 + memorised.TAIL, len(ids)))
        assert completed == all(logp[t - 1].argmax() == ids[t] for t in tail)


def test_estimates_are_over_prompts():
    found = memorised._estimates([[(-1.0, True), (-2.0, False), (-3.0, False)], [(-1.0, False), (-1.5, False)]])
    assert found["completed"] == 0.5 and found["gap"] == pytest.approx((1.5 + 0.5) / 2)
    assert found["gap_interval"][0] < 1 < found["gap_interval"][1]
    assert memorised._estimates([[(-1.0, True)]])["gap"] is None


def test_a_model_that_is_not_there_is_one_line():
    config = cli.compose_config("config", None, ["model.path=./nowhere"])
    found = memorised.measure(config, domains.load(config.domains[:1]))
    assert found["status"] == "NOT RUN" and "nowhere" in found["note"] and "\n" not in found["note"]
