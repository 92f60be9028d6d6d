"""The compiled laboratory: its step is the trainer's functions one by one, arms share a start, worlds are as said."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curriculum import policies
from curriculum.triage import statistics
from infinite_jax import ablate, batch, grpo
from infinite_jax.rollout import Sampling, generate
from infinite_jax.score import Scorer
from infinite_jax.types import Rollout
from infinite_jax.worlds import compiled, practice, side_by_side, stage, tasks
from infinite_jax.worlds.compiled import Sample
from infinite_jax.worlds.tasks import Rows
from models import policy
from rubric.evaluator import Grades

P, G, SEED = 4, 3, 5
COINED = (0, 1, 2, 3, 11)  # domains graded by a coin where a model that knows nothing must earn something
TINY = stage.Settings(
    draw="tuning",
    regimes=("plain",),
    parallel=2,
    steps=2,
    eval_every=1,
    test_rows=2,
    train_rows=8,
    zipf_rows=8,
    prompts=P,
    group_size=G,
    learning_rate=1e-2,
    layers=1,
    width=16,
    heads=2,
    dtype="float32",
    practice=practice.Plan(rounds=1, steps=2, rows=8, train_rows=4, test_rows=2, learning_rate=1e-2),
)


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Programs here run once or twice: compiled without optimisation they cost a third."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def arm(name: str):
    return ablate.compose_arm(name, "config", None, [])


@functools.cache
def data():
    return jax.jit(functools.partial(stage.make_data, TINY))(SEED)


def by_hand(program, world, reference, state):
    """One step, every function called by itself, rows and grades found on the host."""
    algorithm, curriculum, number = program.algorithm, policies.build(program.curriculum), int(state.triage.step)
    draw = jax.jit(curriculum.draw, static_argnums=1)(state.triage, P)
    cursor_D, lines = np.array(state.cursor_D), []
    for d in np.asarray(draw.domain_P):
        lines.append(jax.tree.map(lambda x, d=d: x[d, cursor_D[d] % int(world.members.size[d])], data().train))
        cursor_D[d] += 1
    rows = jax.tree.map(lambda *x: jnp.stack(x), *lines)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), number), 0)
    sampling = Sampling(1.0, 0, 1.0, tasks.ANSWER, G, (tasks.END,), tasks.PAD)
    made = generate(program.decoder, sampling, state.train.params, rows.prompt_NT, rows.length_N, key)
    domain_B, prompt_B = np.repeat(np.asarray(draw.domain_P), G), np.repeat(np.arange(P), G)
    replies = [line[mask] for line, mask in zip(np.asarray(made.tokens_BT), np.asarray(made.loss_mask_BT))]
    reply_BC = jnp.array([np.pad(reply, (0, tasks.ANSWER - len(reply))) for reply in replies])
    grade_B = np.asarray(tasks.grade(reply_BC, rows.answer_NC[prompt_B])).copy()
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), number), int(stage.COIN))
    coin_B = np.asarray(jax.random.bernoulli(key, 0.5, (P * G,)))
    coined_B = np.isin(domain_B, COINED)
    grade_B = np.where(coined_B, np.where(coin_B, 4.0, 1.0), grade_B).astype(np.float32)
    assert 0 < coined_B.sum() < P * G
    grades = Grades(grade_B, ((grade_B - 1) / 3).astype(np.float32), np.ones(P * G, bool))
    rollout = Rollout(made.tokens_BT, made.loss_mask_BT, made.logp_BT, domain_B, prompt_B, made.done_B)
    scorer = Scorer(program.decoder, 1.0, tasks.ANSWER, G)
    scored = (state.train.params, reference, rollout, grades, jnp.ones(12))
    learnt = jax.jit(batch.prepare, static_argnums=(0, 1))(algorithm, scorer, *scored)
    train, _ = jax.jit(grpo.train_step, static_argnums=(0, 1))(algorithm, scorer, state.train, learnt)
    graded = (x.reshape(P, G) for x in grades)
    stats = statistics(draw.domain_P, *graded, jnp.ones(P), 12)
    triage = jax.jit(curriculum.update)(state.triage, stats)
    return compiled.State(train, triage, jnp.asarray(cursor_D), None), len(np.concatenate(replies))


@pytest.mark.slow
def test_a_compiled_step_is_the_trainers_functions_one_by_one():
    program = compiled.compose(TINY, arm("faithful"), "zipf+noisy")
    world = stage.make_world(TINY, "zipf+noisy", SEED)
    world = world._replace(coin_D=jnp.isin(jnp.arange(12), jnp.array(COINED)))
    start = jax.jit(policy.init, static_argnums=0)(program.decoder, jax.random.key(1))
    state = compiled.initial_state(program, data(), world, start, jnp.int32(SEED))
    one = jax.jit(functools.partial(compiled.step, program))
    for _ in range(2):
        expected, tokens = by_hand(program, world, start, state)
        before, (state, p_D, counted) = state, one(data(), world, start, jnp.int32(SEED), state)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
        jax.tree.map(close, state.train.params, expected.train.params)
        jax.tree.map(close, state.triage, expected.triage)
        assert state.cursor_D.tolist() == expected.cursor_D.tolist() and counted == tokens
        assert abs(p_D.sum() - 1) < 1e-6 and p_D[8:11].sum() == 0  # only tested, and the dead one of other worlds
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before.train.params, state.train.params)
        assert max(jax.tree.leaves(moved)) > 1e-3


def test_right_answers_are_graded_right():
    names = stage.slots(TINY)
    rows = jax.tree.map(lambda x: x[jnp.array([0, 10]), 0], data().train)
    tokens, mask = practice.joined(jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), rows))
    tokens = tokens.at[1].set(jnp.where(mask[1], tasks.PAD, tokens[1]))
    rollout = Rollout(tokens, mask, None, jnp.array([0, 0, 10, 10]), jnp.array([0, 0, 1, 1]), None)
    world = compiled.World(None, jnp.zeros(len(names), bool))
    assert compiled.grade(True, world, rollout, rows, jax.random.key(0)).reward_B.tolist() == [1, 0, 1, 1]
    assert compiled.grade(False, world, rollout, rows, jax.random.key(0)).reward_B.tolist() == [1, 0, 1, 1]
    coin = compiled.grade(True, world._replace(coin_D=~world.coin_D), rollout, rows, jax.random.key(2))
    assert sorted(set(coin.grade_B.tolist())) == [1, 4] and coin.valid_B.all()


def test_one_start_and_one_draw_of_rows_for_all_arms(monkeypatch):
    """The plumbing of `run` with the programs replaced: what goes into every arm's program, and what comes out."""
    calls = []

    def build(function, size, inputs, shared=()):
        calls.append((function.func.__name__, inputs, shared))
        shapes = ((3, 10), (3, 10), (2, 12), (2,))
        halves = compiled.Curves(*(np.full((size, *shape), 0.5) for shape in shapes))
        call = (lambda *_: halves) if function.func is compiled._unit else (lambda seeds: {"given": seeds})
        return side_by_side.Executable(size, call)

    monkeypatch.setattr(side_by_side, "build", build)
    settings = dataclasses.replace(TINY, regimes=("plain", "zipf"))
    wanted = {"plain": {"uniform": [4, 5], "faithful": [5]}, "zipf": {"uniform": [], "faithful": [7]}}
    arms = [arm("uniform"), arm("faithful")]
    found = list(compiled.run(settings, arms, lambda regime, name: wanted[regime][name]))
    assert [(r.arm, r.world, r.seed_S.tolist()) for r in found] == [
        ("uniform", "plain", [4, 5]),
        ("faithful", "plain", [5]),
        ("faithful", "zipf", [7]),
    ]
    assert [name for name, *_ in calls] == ["make_data", "make_start", "_unit", "_unit"]
    (_, (seeds,), _), (_, (starts,), _), first, second = calls
    assert seeds.tolist() == starts.tolist() == [4, 5, 7]
    assert all(one is other for one, other in zip(first[2], second[2]))  # the same rows and starts,
    assert [call[1][0].tolist() for call in (first, second)] == [[0, 1], [1, 2]]  # each seed's by its place
    assert [call[1][2].tolist() for call in (first, second)] == [[4, 5], [5, 7]]
    assert found[0].cost["tokens"] == 1 and found[0].extra_S["harder"].tolist() == [0.5, 0.5]
    assert list(compiled.run(settings, arms, lambda *_: [])) == []


def test_a_last_part_is_filled_up():
    traced = []

    def double(x, shared):
        traced.append(x.shape)
        return 2 * x + shared

    inputs, shared = (np.arange(7.0),), (1.0,)
    found = side_by_side.run(side_by_side.build(double, 3, inputs, shared), inputs, shared)
    assert found.tolist() == [1, 3, 5, 7, 9, 11, 13] and traced == [()]


@pytest.fixture(scope="module")
def runs():
    """Two arms on two worlds and two seeds; three runs at a time of four, so that the last part is filled up."""
    settings = dataclasses.replace(TINY, parallel=3, regimes=("plain", "arrivals+dead"))
    arms = [arm("uniform"), arm("recommended")]
    return [list(compiled.run(settings, arms, lambda *_: [SEED, 9])) for _ in range(2)]


@pytest.mark.slow
def test_all_arms_of_a_seed_begin_alike_and_then_differ(runs):
    assert [(r.arm, r.world) for r in runs[0]] == [
        (name, world) for name in ("uniform", "recommended") for world in ("plain", "arrivals+dead")
    ]
    first = [[evaluations.rate_KD[0] for evaluations in r.evaluations] for r in runs[0]]
    assert all(np.array_equal(rates, first[0]) for rates in first)
    shares = [r.share_STD for r in runs[0]]
    assert not np.allclose(shares[0], shares[2]) and shares[0].shape == (2, 2, 12)


@pytest.mark.slow
def test_the_same_again_is_the_same(runs):
    for once, again in zip(*runs):
        assert np.array_equal(once.share_STD, again.share_STD) and once.cost["tokens"] == again.cost["tokens"]
        for a, b in zip(once.evaluations, again.evaluations):
            assert np.array_equal(a.rate_KD, b.rate_KD)


@pytest.mark.slow
def test_runs_are_what_the_table_reads(runs):
    plain, late = runs[0][:2]
    assert plain.seed_S.tolist() == [SEED, 9] and plain.extra_S["harder"].shape == (2,)
    assert P * G * 2 <= plain.cost["tokens"] <= P * G * 2 * tasks.ANSWER
    evaluations = plain.evaluations[0]
    assert evaluations.at_K.tolist() == [0, 1, 2] and evaluations.rate_KD.shape == (3, 10)
    assert evaluations.trained_D.tolist() == [True] * 8 + [False] * 2
    assert sorted(late.evaluations[0].arrives_D[:8]) == [0, 0, 0, 0, 0, 0, 1, 1]  # thirds of two steps


@pytest.mark.slow
def test_shares_keep_to_the_world(runs):
    plain, late = runs[0][:2]
    np.testing.assert_allclose(plain.share_STD[..., :8], 1 / 8, rtol=1e-6)
    assert (late.share_STD[:, :, 10] > 0).all() and (late.share_STD[:, :, 11] == 0).all()
    waiting = late.evaluations[0].arrives_D[:8] > 0
    assert (late.share_STD[0, 0, :8][waiting] == 0).all() and (late.share_STD[0, 1, :8] > 0).all()


def test_rows_come_in_order_and_round_again():
    index = jnp.arange(3 * 8).reshape(3, 8)
    rows = compiled.Data(Rows(index[..., None], index, index[..., None]), None, None)
    domain_P = jnp.array([2, 0, 2, 2])
    taken, cursor_D = compiled.take(rows, jnp.array([8.0, 8.0, 3.0]), jnp.array([7, 0, 1]), domain_P)
    assert taken.length_N.tolist() == [17, 7, 18, 16] and cursor_D.tolist() == [8, 0, 4]


def test_useful_groups_wait_until_they_fill_a_batch():
    def groups(numbers, useful):
        rows = jnp.repeat(jnp.array(numbers), 2)
        return Sample(Rollout(*[rows] * 6), Grades(*[rows] * 3), jnp.array(useful))

    waiting = groups([1, 2, 3], [True, False, False])
    some = compiled.gathered(waiting, groups([4, 5, 6], [False, True, False]))
    assert some.rollout.domain_B[::2].tolist()[:2] == [1, 5] and some.useful_P.tolist() == [True, True, False]
    full = compiled.gathered(some, groups([7, 8, 9], [True, True, False]))
    assert full.grades.grade_B.tolist() == [1, 1, 5, 5, 7, 7] and full.useful_P.all()


@pytest.mark.slow
def test_dynamic_sampling_updates_only_on_a_full_batch(monkeypatch):
    def graded(_, world, *rest):  # by hand: as many of the first groups differ as the first weight says
        grade_B = jnp.tile(jnp.array([4.0, 1.0, 1.0]), P) * (jnp.arange(P * G) < world.members.weight[0] * G)
        return Grades(grade_B, grade_B / 4, jnp.ones(P * G, bool))

    monkeypatch.setattr(compiled, "grade", graded)
    program = compiled.compose(TINY, arm("dynamic"), "plain")
    world = stage.make_world(TINY, "plain", SEED)
    start = jax.jit(policy.init, static_argnums=0)(program.decoder, jax.random.key(1))
    state = compiled.initial_state(program, data(), world, start, jnp.int32(SEED))
    one = jax.jit(functools.partial(compiled.step, program))
    updates = []
    for useful in (3.0, 2.0, 1.0):
        members = world.members._replace(weight=world.members.weight.at[0].set(useful))
        state, _, _ = one(data(), world._replace(members=members), start, jnp.int32(SEED), state)
        updates.append((int(state.train.step), int(state.waiting.useful_P.sum())))
    assert updates == [(0, 3), (1, 0), (1, 1)] and state.triage.step == 3


def test_an_answer_is_laid_behind_its_prompt():
    rows = Rows(
        jnp.array([[7, 8, 2] + [0] * 9, [7] * 12]),
        jnp.array([3, 12]),
        jnp.array([[5, 6, 1] + [0] * 6, [4] * 8 + [1]]),
    )
    tokens, mask = practice.joined(rows)
    assert tokens.tolist() == [[7, 8, 2, 5, 6, 1] + [0] * 15, [7] * 12 + [4] * 8 + [1]]
    assert mask.tolist() == [[False] * 3 + [True] * 3 + [False] * 15, [False] * 12 + [True] * 9]


def test_targets_are_spread_over_the_trained_domains():
    target_D = np.asarray(practice.targets(jax.random.key(3), 10))
    np.testing.assert_allclose(np.diff(np.sort(target_D[:8])), (practice.HIGH - practice.LOW) / 7, rtol=1e-5)
    assert np.diff(target_D[:8]).min() < 0 and (target_D[8:] == np.float32(practice.UNSEEN)).all()


def test_worlds():
    settings = dataclasses.replace(TINY, steps=300, train_rows=64, zipf_rows=64)
    zipf = stage.make_world(settings, "zipf+dead", 1).members
    assert sorted(zipf.size[:8].tolist()) == [64 // rank for rank in range(8, 0, -1)]
    assert zipf.active.tolist() == [True] * 8 + [False, False, True, False]
    other = stage.make_world(settings, "zipf+dead", 2).members
    assert zipf.size.tolist() != other.size.tolist()
    late = stage.make_world(settings, "arrivals", 1).members
    assert sorted(late.arrives[:8].tolist()) == [0, 0, 0, 100, 100, 100, 200, 200] and late.size[0] == 64
    noisy = stage.make_world(settings, "noisy", 1)
    assert noisy.coin_D.tolist() == [False] * 11 + [True] and noisy.members.active[11] and not noisy.members.active[10]


def test_sequential_has_the_length_of_its_phases_from_the_world():
    settings = dataclasses.replace(TINY, steps=90, eval_every=10)
    phases = [compiled.compose(settings, arm("sequential"), world) for world in ("plain", "zipf+dead", "arrivals")]
    assert [program.curriculum.phase_steps for program in phases] == [11, 10, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draw": "juding"}, "compiled.draw=juding: did you mean judging?"),
        ({"regimes": ("zipf+ded",)}, "compiled.regimes: no world zipf+ded; did you mean dead?"),
        ({"regimes": ()}, "compiled.regimes=[]: name at least one"),
        ({"steps": 3, "eval_every": 2}, "compiled.steps=3: must be a multiple of eval_every=2"),
        ({"zipf_rows": 9}, "compiled.zipf_rows=9: at most compiled.train_rows=8"),
        ({"width": 18}, "compiled.width=18: must be a multiple of twice compiled.heads=2"),
        ({"group_size": 1}, "compiled.group_size=1: must be at least 2"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(TINY, **changes)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_seconds_are_refused():
    with pytest.raises(ValueError, match=r"^arms: faithful,capacity=seconds: .* set capacity=prompts"):
        compiled.compose(TINY, arm("faithful,capacity=seconds"), "plain")


def test_the_section_of_the_file_is_what_the_world_reads():
    config, section = ablate.read(["world=compiled"])
    assert ablate.schema.build(stage.Settings, section, "compiled").draw == "tuning" and config.world == "compiled"


@pytest.mark.experiment
@pytest.mark.parametrize("draw", tasks.DRAWS)
def test_reinforcement_learning_raises_the_held_out_mean(draw):
    """The defaults, three seeds: starts are spread, and equal shares raise the mean of the trained domains."""
    _, section = ablate.read(["world=compiled", "compiled.regimes=[plain]", f"compiled.draw={draw}"])
    settings = ablate.schema.build(stage.Settings, section, "compiled")
    (runs,) = compiled.run(settings, [arm("uniform")], lambda *_: [0, 1, 2])
    rate_SKD = np.array([evaluations.rate_KD[:, :8] for evaluations in runs.evaluations])
    assert rate_SKD[:, 0].min() < 0.2 and rate_SKD[:, 0].max() > 0.6
    assert ((rate_SKD[:, -1] - rate_SKD[:, 0]).mean(1) > 0.1).all()
