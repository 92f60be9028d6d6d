"""Retention measures: hand-computed numbers, and those of published code on one matrix."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from curriculum.domains import DomainConfig
from infinite_jax import decay, record
from infinite_jax import retention as rt
from infinite_jax.decay import Decay
from infinite_jax.retention import Evaluations, Measure

NAN, INF = np.nan, np.inf


def run(rate_KD, arrives_D=None, trained_D=None, at_K=None) -> Evaluations:
    rate_KD = np.array(rate_KD, np.float64)
    steps, domains = rate_KD.shape
    return Evaluations(
        np.arange(steps) * 10.0 if at_K is None else np.array(at_K, np.float64),
        rate_KD,
        np.zeros(domains) if arrives_D is None else np.array(arrives_D, np.float64),
        np.ones(domains, bool) if trained_D is None else np.array(trained_D),
    )


def check_value(measure: Measure, expected: float):
    assert measure.reason == "" and measure.value == pytest.approx(expected, abs=1e-12)


def check_undefined(measure: Measure, *words: str):
    assert measure.value is None
    assert all(word in measure.reason for word in words), measure.reason


# Four tasks, one a phase of 10 steps, evaluated before training and at the end of each phase.
BEFORE = [0.10, 0.20, 0.05, 0.30]
MATRIX = [[0.80, 0.25, 0.10, 0.35], [0.60, 0.90, 0.15, 0.30], [0.85, 0.95, 0.85, 0.50], [0.50, 0.80, 0.95, 0.75]]
TASKS = run([BEFORE, *MATRIX], arrives_D=[0, 10, 20, 30])


def test_transfer_and_forgetting_agree_with_published_code():
    """BEFORE and MATRIX were given to the released functions; these are the numbers they returned.

    GEM, facebookresearch/GradientEpisodicMemory 34c6b8e metrics/metrics.py confusion_matrix, with result_t 0 0 1 2 3:
      final accuracy .75, backward -.075, forward .0875; sums over T - 1 tasks, divided by T = 4 (the paper: T - 1).
    Mammoth, aimagelab/mammoth e75a491 utils/metrics.py: backward_transfer -.1, forward_transfer .116667,
      forgetting .166667: the maximum includes the last row, so task 3, which gained .10, counts 0.
    Avalanche, ContinualAI/avalanche eb075be forgetting_bwt.py Forgetting: first minus last of tasks 1 to 3 after the
      last task .3, .1, -.1, mean .1; its BWT is the negative.
    By hand: BWT ((.5 - .8) + (.8 - .9) + (.95 - .85)) / 3; FWT ((.25 - .2) + (.15 - .05) + (.5 - .3)) / 3;
      Chaudhry ((.85 - .5) + (.95 - .8) + (.85 - .95)) / 3 = .4 / 3.
    """
    found = rt.summary(TASKS)
    check_value(found["acc"], 0.75)
    check_value(found["bwt"], -0.1)
    check_value(found["bwt"], -0.075 * 4 / 3)
    check_value(found["fwt"], 0.35 / 3)
    check_value(found["fwt"], 0.0875 * 4 / 3)
    check_value(found["forgetting"], 0.4 / 3)
    check_value(found["forgetting_first"], 0.1)
    assert found["forgetting"].value == pytest.approx(0.5 / 3 - 0.1 / 3)  # Mammoth's, less what task 3 gained


def test_the_whole_summary_by_hand():
    """Two domains from the start, one from step 15, one eval-only; evaluations at 0, 10, 20, 40.

    domain 0   .0  .6  .4  .3       domain 1   .2  .2  .4  .6      domain 2 (arrives at 15)  .1  .2  .4  .5
    unseen     .3  .3  .2  .4

    acc (.3 + .6 + .5) / 3; worst .3
    areas 0 to 40: d0 10 * .3 + 10 * .5 + 20 * .35 = 15; d1 2 + 3 + 10 = 15; d2 1.5 + 3 + 9 = 13.5
    macro = mean of area / 40 = (15 + 15 + 13.5) / 120; aurc of d2 from 15, R(15) = .3: (5 * .35 + 20 * .45) / 25 = .43
    ret: d0 (peak 0 at first: no ratio) 1, .4/.6, .3/.6 -> 13/18; d1 all 1; d2 from step 15 1, 1
    bwt over d0, d1; the first phase ends at the last evaluation up to 15, that at 10: (.3 - .6 + .6 - .2) / 2 = .05
    fwt over d2: .2 - .1; fwt_unseen .4 - .3
    forgetting, all trained on before step 20: d0 .6 - .3, d1 .4 - .6, d2 .4 - .5, mean 0
    forgetting_first: -.05
    decay, alpha .9: d0 peak at 10, below .54 at 20 and 40: 10, observed; d1 and d2 peak at the end: censored at 0;
    with n = 3 at time 0 (2 censored) and 1 at time 10: S(10) = 0, median 10
    """
    rates = [[0.0, 0.2, 0.1, 0.3], [0.6, 0.2, 0.2, 0.3], [0.4, 0.4, 0.4, 0.2], [0.3, 0.6, 0.5, 0.4]]
    found = rt.summary(run(rates, [0, 0, 15, 0], [True, True, True, False], [0, 10, 20, 40]))
    expected = {
        "acc": 1.4 / 3,
        "worst": 0.3,
        "macro": 43.5 / 120,
        "aurc": (15 / 40 + 15 / 40 + 0.43) / 3,
        "ret": (13 / 18 + 1 + 1) / 3,
        "bwt": 0.05,
        "fwt": 0.1,
        "fwt_unseen": 0.1,
        "forgetting": 0.0,
        "forgetting_first": -0.05,
        "time_to_decay": 10.0,
    }
    for name, value in expected.items():
        check_value(found[name], value)
    check_undefined(found["forgetting_median3"], "fewer than 4 evaluations")
    assert found.keys() == expected.keys() | {"forgetting_median3"}


def test_an_evaluation_at_the_arrival_belongs_to_the_phase_before():
    """It is made after as many updates as the arrival says, none of them on the domain."""
    rates = [[0.1, 0.1], [0.5, 0.3], [0.9, 0.4], [0.7, 0.9]]
    on = run(rates, [0, 20])  # phase 0 ends with the evaluation at 20
    check_value(rt.bwt(on), 0.7 - 0.9)
    check_value(rt.fwt(on), 0.4 - 0.1)
    before = run(rates, [0, 19])  # the evaluation at 20 has seen one update on domain 1
    check_value(rt.bwt(before), 0.7 - 0.5)
    check_value(rt.fwt(before), 0.3 - 0.1)


def test_a_phase_without_an_evaluation_has_no_end():
    rates = [[0.1, 0.1, 0.1], [0.5, 0.3, 0.2], [0.6, 0.8, 0.4]]
    found = rt.summary(run(rates, [0, 10, 15]))  # nothing in (10, 15]
    check_undefined(found["fwt"], "domain 2", "phase before")
    check_undefined(found["bwt"], "domain 1", "end of its phase")
    last = run([[0.1, 0.1], [0.5, 0.3], [NAN, 0.3], [0.4, 0.6]], [0, 20])  # the end of a phase is its last value
    check_value(rt.bwt(last), 0.4 - 0.5)


def test_avalanche_weighs_phases_and_we_weigh_domains():
    """Phase 0 holds domains that lost .3 and .1, phase 1 one that lost .4: -bwt .8 / 3, by phase (.2 + .4) / 2."""
    rates = [[0.1] * 4, [0.8, 0.6, 0.1, 0.1], [0.8, 0.6, 0.9, 0.1], [0.5, 0.5, 0.5, 0.5]]
    found = rt.summary(run(rates, [0, 0, 10, 20]))
    check_value(found["bwt"], -0.8 / 3)
    check_value(found["forgetting_first"], 0.3)


def test_without_phases_transfer_is_undefined_and_forgetting_is_not():
    found = rt.summary(run([[0.1, 0.2], [0.6, 0.5], [0.4, 0.7]]))
    for name in ("bwt", "fwt", "forgetting_first"):
        check_undefined(found[name], "one phase")
    check_value(found["forgetting"], ((0.6 - 0.4) + (0.5 - 0.7)) / 2)
    check_undefined(found["fwt_unseen"], "no eval-only domain")


def test_the_start_is_no_peak_to_forget_in_chaudhrys_sense():
    """Known before, gone at the first evaluation: the maximum runs over what came after training began."""
    check_value(rt.forgetting(run([[0.9], [0.2], [0.3]])), 0.2 - 0.3)


def test_a_median_of_three_is_not_misled_by_one_lucky_evaluation():
    """Medians of the windows .5 .9 .5, .9 .5 .6 and .5 .6 .6: .5, .6, .6."""
    noisy = run([[0.0], [0.5], [0.9], [0.5], [0.6], [0.6], [0.4]])
    check_value(rt.forgetting(noisy), 0.5)
    check_value(rt.forgetting(noisy, width=3), 0.2)
    gap = run([[0.0], [0.5], [0.9], [NAN], [0.6], [0.6], [0.5], [0.4]])  # only .6 .6 .5 is whole
    check_value(rt.forgetting(gap, width=3), 0.2)
    check_undefined(
        rt.forgetting(run([[0.0], [0.5], [NAN], [0.5], [0.4]]), width=3), "domain 0", "before and at the end"
    )


def test_domains_that_never_arrived_are_left_out():
    rates = [[0.1, 0.1], [0.5, 0.1], [0.6, 0.1]]
    found, alone = rt.summary(run(rates, [0, 20])), rt.summary(run(np.array(rates)[:, :1]))
    assert found == alone  # also with a domain that arrives at the last evaluation: it was never trained on
    check_undefined(rt.summary(run(rates, [50, 60]))["acc"], "no domain was trained on")
    check_undefined(rt.summary(run(rates, [50, 60]))["bwt"], "no domain was trained on")


def test_aurc_by_hand_where_the_domain_arrives_between_evaluations():
    """R is .2 at 10, .6 at 20, .6 at 30; from 15, R = .4: (5 * .5 + 10 * .6) / 15. Only the part after counts."""
    check_value(rt.aurc(run([[0.9], [0.2], [0.6], [0.6]], [15])), 8.5 / 15)
    check_value(rt.aurc(run([[0.9], [0.2], [0.6], [0.6]], [10])), (10 * 0.4 + 10 * 0.6) / 20)
    late = run([[0.2], [0.6]], at_K=[10, 30])  # no evaluation 0: the mean over what was seen
    check_value(rt.aurc(late), 0.4)
    check_undefined(rt.fwt(run([[0.2, 0.1], [0.6, 0.1], [0.6, 0.1]], [0, 20], at_K=[10, 20, 30])), "is at 10")


def test_a_linear_curve_has_the_same_aurc_however_often_it_is_evaluated():
    for at in ([0, 100], [0, 3, 10, 50, 99, 100], np.linspace(0, 100, 41)):
        rate = 0.1 + 0.008 * np.array(at)[:, None] * np.array([[1.0, 0.5]])
        check_value(rt.aurc(run(rate, [0, 40], at_K=at)), (0.5 + (0.1 + 0.004 * 70)) / 2)


def test_missing_values_make_a_measure_undefined_and_name_the_domain():
    rates = np.array([[0.1, 0.1], [0.5, 0.2], [0.6, 0.6], [0.4, 0.7]])

    def without(k, d):
        gap = rates.copy()
        gap[k, d] = NAN
        return rt.summary(run(gap, [0, 10]))

    end = without(3, 1)
    for name in ("acc", "worst", "macro", "aurc", "forgetting"):
        check_undefined(end[name], "domain 1", "end" if name == "forgetting" else "last evaluation")
    check_value(end["bwt"], 0.4 - 0.5)  # asks nothing of domain 1
    check_undefined(without(1, 0)["bwt"], "domain 0", "end of its phase")
    check_undefined(without(1, 0)["forgetting_first"], "phase 0")
    check_undefined(without(0, 1)["fwt"], "domain 1", "evaluation 0")  # a domain added while the run goes on
    check_undefined(without(1, 1)["fwt"], "domain 1", "phase before")
    for found in (without(2, 0), without(2, 1)):
        assert all((measure.value is None) == bool(measure.reason) for measure in found.values())


def test_gaps_are_passed_over_where_the_docstring_says_so():
    """R .2 at 0, gap at 10, .6 at 20, .3 at 30: areas 8 and 4.5; a gap at the front: from 10 on, (4.5 + 4.5) / 20."""
    check_value(rt.aurc(run([[0.2], [NAN], [0.6], [0.3]])), 12.5 / 30)
    check_value(rt.aurc(run([[NAN], [0.3], [0.6], [0.3]])), 9 / 20)
    check_value(rt.macro(run([[NAN], [0.3], [0.6], [0.3]])), 9 / 20)
    check_value(rt.ret(run([[0.2], [NAN], [0.6], [0.3]])), (1 + 1 + 0.5) / 3)
    check_undefined(rt.aurc(run([[NAN], [NAN], [0.6]])), "domain 0")
    check_undefined(rt.ret(run([[0.2, NAN], [0.4, NAN]])), "domain 1 has no value after it arrived")


def test_retention_leaves_out_what_was_never_passed():
    check_value(rt.ret(run([[0.0, 0.5], [0.0, 0.25], [0.0, 1.0]])), (1 + 0.5 + 1) / 3)
    check_undefined(rt.ret(run([[0.0], [0.0]])), "nothing could be lost")
    check_value(rt.ret(run([[0.9], [0.2], [0.4]], [10])), 1.0)  # what was lost before it arrived is not its scheduler's


def test_curves_begin_with_the_domain():
    at, rate, peak, kept = rt.curves(run([[0.0, 0.9], [0.5, 0.2], [NAN, 0.1], [0.4, 0.3]], [0, 10]))
    np.testing.assert_array_equal(at, [0, 10, 20, 30])
    np.testing.assert_array_equal(rate, [[0, NAN], [0.5, 0.2], [NAN, 0.1], [0.4, 0.3]])
    np.testing.assert_array_equal(peak, [[0, NAN], [0.5, 0.2], [NAN, 0.2], [0.5, 0.3]])
    np.testing.assert_allclose(kept, [[NAN, NAN], [1, 1], [NAN, 0.5], [0.8, 1]])


def test_a_single_evaluation_defines_nothing():
    found = rt.summary(run([[0.3, 0.4]], trained_D=[True, False]))
    assert {name for name, measure in found.items() if measure.value is not None} == set()
    assert all(measure.reason for measure in found.values())


def test_disordered_or_misshapen_evaluations_are_refused():
    good = run([[0.1, 0.2], [0.3, 0.4]])
    with pytest.raises(ValueError, match=r"evaluations are at \[0.0, 0.0\]: give them once each"):
        rt.summary(good._replace(at_K=np.zeros(2)))
    for wrong in (good._replace(trained_D=np.ones(3, bool)), good._replace(at_K=np.zeros(1)), run(np.zeros((0, 2)))):
        with pytest.raises(ValueError, match="give"):
            rt.summary(wrong)


def test_decay_needs_two_low_evaluations_in_a_row():
    at = np.arange(7) * 10.0

    def time(*rates, since=0.0):
        return decay.decay(at[: len(rates)], np.array(rates), since)

    assert time(0.1, 1.0, 0.9, 0.89, 0.95, 0.8, 0.7) == Decay(40, True)  # peak at 10; .89 alone is noise, .9 not below
    assert time(0.1, 1.0, 0.9, 0.89, 0.95, 0.96, 0.7) == Decay(50, False)  # one low at the end is not two
    assert time(1.0, 0.2, NAN, 0.3) == Decay(10, True)  # neighbours across a gap
    assert time(0.5, 1.0) == Decay(0, False)  # still at its peak
    assert time(1.0, 1.0, 0.5, 0.5) == Decay(20, True)  # from the first time that it was as high
    assert time(1.0, 0.6, 0.6, 0.5, 0.5, since=10) == Decay(20, True)  # practice ended at 10: what counts is .6
    assert time(0.0, 0.0) is None and time(NAN, NAN) is None and time(0.4, 0.4, since=11) is None
    assert decay.decay(at[:3], np.array([1.0, 0.4, 0.4]), 0.0, alpha=0.3) == Decay(20, False)


def test_the_median_is_kaplan_and_meiers():
    """Freireich et al. 1963, 6-MP arm: 21 remissions in weeks, median 23 (any survival text); 12 are censored.

    S: 6 18/21, 7 16/17, 10 14/15, 13 11/12, 16 10/11, 22 6/7, 23 5/6: .857 .807 .753 .690 .627 .538 .448.
    """
    seen, still = [6, 6, 6, 7, 10, 13, 16, 22, 23], [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    remissions = [Decay(t, True) for t in seen] + [Decay(t, False) for t in still]
    assert decay.median(remissions) == 23
    assert np.median(seen) == 10  # what leaving the censored ones out would say
    assert decay.median(remissions[:-12] + [Decay(40, False)] * 12) is None  # 12 of 21 never: S ends at 12/21
    assert decay.median([Decay(t, True) for t in (1, 2, 3, 4)]) == 2  # S(2) is exactly 1/2


def test_time_to_decay_pools_runs_and_says_when_too_few_decayed():
    fast = run([[1.0, 1.0], [0.5, 1.0], [0.5, 1.0], [0.5, 1.0]])
    slow = run([[1.0], [1.0], [0.5], [0.5]])
    check_value(rt.time_to_decay([fast]), 10)  # times 10 and 30+: S(10) = 1/2
    # times 10, 30+ and 20: S(10) = 2/3, S(20) = 1/3
    check_value(rt.time_to_decay([fast, slow]), 20)
    held = run([[1.0] * 3, [0.5, 1.0, 1.0], [0.5, 1.0, 1.0]])
    check_undefined(rt.time_to_decay([held]), "censored: 1 of 3 decayed")
    check_undefined(rt.time_to_decay([run([[0.0], [0.0]])]), "no trained domain was ever passed")


DOMAINS = [
    DomainConfig("add", "t", "t"),
    DomainConfig("seen", None, "t", eval_only=True),
    DomainConfig("sort", "t", "t", arrives=2),
]


def rows():
    made = [{"step": step, "reward/mean": 0.5} for step in range(5)]
    for step, rates in ((0, (0.1, 0.3, 0.2)), (2, (0.5, None, 0.2)), (4, (0.7, 0.4, 0.8))):
        made[step] |= {f"eval/pass_rate/{domain.name}": rate for domain, rate in zip(DOMAINS, rates)}
    for step, tokens in ((1, 100), (2, 260), (3, 300), (4, 500)):
        made[step] |= {"tokens/total": tokens, "triage/acc_ema/add": 0.5 + step / 10}
    return made


def test_rows_of_a_run_become_evaluations():
    at, rate, arrives, trained = rt.from_rows(rows(), DOMAINS)
    np.testing.assert_array_equal(at, [0, 2, 4])
    np.testing.assert_array_equal(rate, [[0.1, 0.3, 0.2], [0.5, NAN, 0.2], [0.7, 0.4, 0.8]])
    np.testing.assert_array_equal(arrives, [0, 0, 2])
    np.testing.assert_array_equal(trained, [True, False, True])


def test_arrivals_are_carried_over_to_tokens():
    at, _, arrives, _ = rt.from_rows(rows(), DOMAINS, axis="tokens/total")
    np.testing.assert_array_equal(at, [0, 260, 500])
    np.testing.assert_array_equal(arrives, [0, 0, 260])
    later = [*DOMAINS[:2], DomainConfig("sort", "t", "t", arrives=9)]
    np.testing.assert_array_equal(rt.from_rows(rows(), later, axis="tokens/total").arrives_D, [0, 0, INF])
    assert rt.summary(rt.from_rows(rows(), later, axis="tokens/total"))["acc"].value == 0.7


def test_other_curves_of_the_domains_and_a_domain_without_any():
    ema = rt.from_rows(rows(), DOMAINS, key="triage/acc_ema")
    np.testing.assert_array_equal(ema.at_K, [1, 2, 3, 4])
    np.testing.assert_allclose(ema.rate_KD[:, 0], [0.6, 0.7, 0.8, 0.9])
    assert np.isnan(ema.rate_KD[:, 1:]).all()


def test_rows_that_do_not_serve_are_refused():
    with pytest.raises(ValueError, match=r"no row has eval/pass_rate/<domain> for any of \['div'\]"):
        rt.from_rows(rows(), [DomainConfig("div", "t", "t")])
    old = [{key: value for key, value in row.items() if key != "tokens/total"} for row in rows()]
    with pytest.raises(ValueError, match="row of step 2 has no tokens/total: compare this run over steps"):
        rt.from_rows(old, DOMAINS, axis="tokens/total")


def test_the_rows_of_a_published_run():
    """docs/results/first-run/faithful.jsonl: 12 domains from the start, evaluated at 0, 15, 30, 45."""
    read = record.read(Path(__file__).resolve().parent.parent / "docs/results/first-run/faithful.jsonl")
    names = [key.removeprefix("eval/pass_rate/") for key in read[0] if key.startswith("eval/pass_rate/")]
    found = rt.summary(rt.from_rows(read, [DomainConfig(name, "t", "t") for name in names]))
    check_value(found["acc"], read[-1]["eval/macro"])
    macro = {row["step"]: row["eval/macro"] for row in read if "eval/macro" in row}
    steps = sorted(macro)
    area = sum((b - a) * (macro[a] + macro[b]) / 2 for a, b in itertools.pairwise(steps))
    check_value(found["macro"], area / steps[-1])
    check_value(found["aurc"], area / steps[-1])
    check_undefined(found["bwt"], "one phase")
