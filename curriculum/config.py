"""The configuration group `curriculum`: static under jit, one line of error for every impossible value.

One file a policy under configs/curriculum/ holds the numbers; curriculum=<name> chooses it. What only one part reads
lies in a section of its own (curriculum.drift.threshold=12).
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

BANDS = ("low", "medium", "high")
GRADE_MIN, GRADE_MAX, GRADE_PASS = 1.0, 4.0, 3.0

NAMES = (
    "faithful",
    "recommended",
    "literal",
    "a1",
    "a2",
    "a3",
    "full",
    "spaced",
    "progress",
    "uniform",
    "size_proportional",
    "sequential",
    "single_signal",
    "sec",
    "dump",
    "p1p",
    "dynamic",
)

POSITIVE = "must be a finite number above 0"
OFF_AT_ZERO = "must be a finite number, at least 0 (0 = off)"


def require(section: object, prefix: str, checks: Iterable[tuple[str, bool, str]]) -> None:
    """Raises ValueError, one line with key, value and remedy, for the first (key, possible, remedy) not possible."""
    for key, possible, remedy in checks:
        if not possible:
            raise ValueError(f"{prefix}.{key}={getattr(section, key)}: {remedy}")


def finite(value: float, least: float = 0.0) -> bool:
    return least <= value < math.inf


@dataclass(frozen=True)
class ReservedConfig:
    """Slots of a batch kept for domains that were never tried or not for long; curriculum/sampler.py."""

    share: float  # of the batch at most; before any domain was tried, all of it but one prompt; 0 = none reserved
    rounds: float  # a gap is too long beyond so many rounds, a round being domains / prompts steps,
    steps: float  # and so many steps more

    def __post_init__(self):
        checks = (
            ("share", 0 <= self.share <= 1, "must be a share of the batch, 0 (none reserved) to 1"),
            ("rounds", finite(self.rounds), "must be at least 0 rounds over all domains"),
            ("steps", finite(self.steps), "must be at least 0 steps"),
        )
        require(self, "curriculum.reserved", checks)


@dataclass(frozen=True)
class DriftConfig:
    """The detector of falling pass rates and what a flag does; curriculum/drift.py."""

    threshold: float  # alarm where the cumulative sum of standardised shortfalls passes this
    margin: float  # a flag falls when the pass rate is back within this of what it was,
    patience: int  # or after so many visits
    boost: float  # added to a flagged domain's priority, log units; read by the triage rule only
    lr_scale: float  # learning rate of a flagged domain, relative to the others'; 1 = as theirs

    def __post_init__(self):
        checks = (
            ("threshold", 0 < self.threshold < math.inf, POSITIVE + ", such as 8"),
            ("margin", 0 <= self.margin <= 1, "must be a difference of pass rates, 0 to 1"),
            ("patience", self.patience >= 1, "must be at least 1 visit"),
            ("boost", finite(self.boost), OFF_AT_ZERO),
            ("lr_scale", 0 < self.lr_scale <= 1, "must be above 0 and at most 1 (1 = off)"),
        )
        require(self, "curriculum.drift", checks)


@dataclass(frozen=True)
class SpacedConfig:
    """How a domain's half-life of memory moves; policy `spaced`."""

    bar: float  # a review is passed at this pass rate of the step's groups
    start: float  # steps, half-life of a domain never reviewed
    growth: float  # factor after a passed review that was due
    shrink: float  # factor after a lapse
    longest: float  # steps

    def __post_init__(self):
        checks = (
            ("bar", 0 < self.bar <= 1, "must be a pass rate above 0, at most 1"),
            ("start", finite(self.start, 1.0), "must be at least 1 step"),
            ("growth", finite(self.growth, 1.0), "must be at least 1"),
            ("shrink", 0 < self.shrink <= 1, "must be above 0 and at most 1"),
            ("longest", finite(self.longest, self.start), f"must be at least start={self.start} steps"),
        )
        require(self, "curriculum.spaced", checks)


@dataclass(frozen=True)
class PromptConfig:
    """Priorities of single prompts, where `level` is prompt; curriculum/prompt_level.py."""

    beta: float  # weight of one group in a prompt's pass rate once it has been seen often, in (0, 1]
    low_weight: float  # kappa_l: log of the gain of a prompt never passed over one always passed
    uncertainty_weight: float  # kappa_u: log of the gain of a prompt passed half of the time over one always passed
    staleness_weight: float  # kappa_s: log of the largest gain from waiting
    unseen: float  # part of a domain's draws for prompts it has not shown yet, in [0, 1]

    def __post_init__(self):
        checks = (
            ("beta", 0 < self.beta <= 1, "must be above 0 and at most 1, such as 0.3"),
            ("low_weight", finite(self.low_weight), OFF_AT_ZERO),
            ("uncertainty_weight", finite(self.uncertainty_weight), OFF_AT_ZERO),
            ("staleness_weight", finite(self.staleness_weight), OFF_AT_ZERO),
            ("unseen", 0 <= self.unseen <= 1, "must be 0 to 1 (1 = a plain first epoch)"),
        )
        require(self, "curriculum.prompt", checks)


@dataclass(frozen=True)
class CurriculumConfig:
    """Numbers of the scheduler. Raises ValueError naming curriculum.<key> on an impossible value."""

    policy: str  # one of NAMES: the rule, and the name under which runs are compared
    beta: float  # weight of one prompt group in the moving averages, in (0, 1]
    low: float  # band low is acc < low
    high: float  # band high is acc > high
    hysteresis: float  # a band changes only this far beyond its threshold; 0 = at it
    acc_start: float  # pass rate assumed of a domain never sampled
    grade_mean_start: float  # grade mean assumed of a domain never sampled, in [1, 4]
    grade_variance_start: float  # grade variance assumed of a domain never sampled, at most (4 - mean)(mean - 1)
    backoff_cap: int  # steps a domain rests at most after failed tries; 0 = no rest
    capacity: str  # prompts | tokens | seconds: what the shares are shares of
    band_capacity: tuple[float, ...]  # shares of the capacity of low, medium, high; an empty band drops out
    eta: float  # 1: a band's share is split among its members; 0: every domain has its band's weight; between: part-way
    strict: bool  # staleness and uncertainty shift shares inside a band only
    guard: bool  # a low band that gives no signal loses its claim
    monotone: bool  # no band's member gets less than one of a higher band
    staleness_weight: float  # kappa_s: log of the largest gain from waiting
    staleness_steps: float  # tau_s: steps of waiting for 63 % of that gain,
    staleness_rounds: float  # but at least so many rounds over all domains (domains / prompts steps each)
    uncertainty_weight: float  # kappa_u: log of the gain at the largest possible grade variance
    uncertainty_of: str  # grades: their variance | passes: that of pass or fail; what U_i is
    signal_weight: float  # kappa_g: power of the share of groups with a difference; 0 = off
    gap_weight: float  # kappa_a: power of the share of groups not passed yet; 0 = off
    temperature: float  # of the softmax; other than 1 the bands no longer get exactly their capacity
    epsilon: float  # share of the capacity spread as a floor over all drawable domains, in [0, 1)
    floor: str  # project: no share below the floor, the others keep their proportions; mix: (1 - epsilon) q + floor
    single_every: int  # every so many steps the whole batch is one domain; 0 = never
    single_rule: str  # argmax: the one with the largest share; sampled: drawn by share
    difficulty: str  # fixed | adaptive: a domain's level moves towards a pass rate of one half
    difficulty_rate: float  # levels a group, times pass rate minus one half
    phase_steps: int  # sequential: steps a domain; 0 = until the next one arrives
    value_rate: float  # sec: weight of a step in a domain's value
    fast_beta: float  # progress: weight of one prompt group in the faster of the two averages
    level: str  # domain | prompt: prompts of a drawn domain in shuffled order, or by their own priority
    reserved: ReservedConfig
    drift: DriftConfig
    spaced: SpacedConfig
    prompt: PromptConfig

    def __post_init__(self):
        top = (GRADE_MAX - self.grade_mean_start) * (self.grade_mean_start - GRADE_MIN)
        between = (self.high - self.low) / 2
        checks = (
            ("policy", self.policy in NAMES, nearest(self.policy, NAMES)),
            ("beta", 0 < self.beta <= 1, "must be above 0 and at most 1, such as 0.05"),
            ("low", 0 <= self.low < self.high, f"must be at least 0 and below curriculum.high={self.high}"),
            ("high", self.low < self.high <= 1, f"must be above curriculum.low={self.low} and at most 1"),
            ("hysteresis", 0 <= self.hysteresis < between, f"must be at least 0 and below {between:g}, or medium ends"),
            ("acc_start", 0 <= self.acc_start <= 1, "must be a pass rate, 0 to 1"),
            ("grade_mean_start", top >= 0, f"must be a grade, {GRADE_MIN:g} to {GRADE_MAX:g}"),
            ("grade_variance_start", 0 <= self.grade_variance_start <= top, f"must be 0 to {top:g}, the most there is"),
            ("backoff_cap", self.backoff_cap >= 0, "must be at least 0 steps (0 = no rest)"),
            choice(self, "capacity", "prompts", "tokens", "seconds"),
            ("band_capacity", len(self.band_capacity) == len(BANDS), "give three numbers, for low, medium and high"),
            (
                "band_capacity",
                all(0 < c < math.inf for c in self.band_capacity),
                "all three must be finite numbers above 0",
            ),
            ("eta", 0 <= self.eta <= 1, "must be 0 to 1 (1 = bands get their capacity)"),
            ("staleness_weight", finite(self.staleness_weight), OFF_AT_ZERO),
            ("staleness_steps", 0 < self.staleness_steps < math.inf, POSITIVE),
            ("staleness_rounds", finite(self.staleness_rounds), OFF_AT_ZERO),
            ("uncertainty_weight", finite(self.uncertainty_weight), OFF_AT_ZERO),
            choice(self, "uncertainty_of", "grades", "passes"),
            ("signal_weight", finite(self.signal_weight), OFF_AT_ZERO),
            ("gap_weight", finite(self.gap_weight), OFF_AT_ZERO),
            ("temperature", 0 < self.temperature < math.inf, POSITIVE + " (1 = bands get their capacity)"),
            ("epsilon", 0 <= self.epsilon < 1, "must be at least 0 and below 1; it is shared by all domains"),
            choice(self, "floor", "project", "mix"),
            ("single_every", self.single_every >= 0, "must be at least 0 steps (0 = never)"),
            choice(self, "single_rule", "argmax", "sampled"),
            choice(self, "difficulty", "fixed", "adaptive"),
            ("difficulty_rate", 0 < self.difficulty_rate < math.inf, POSITIVE),
            ("phase_steps", self.phase_steps >= 0, "must be at least 0 steps (0 = by arrival)"),
            ("value_rate", 0 < self.value_rate <= 1, "must be above 0 and at most 1"),
            ("fast_beta", 0 < self.fast_beta <= 1, "must be above 0 and at most 1"),
            choice(self, "level", "domain", "prompt"),
            *self._definition(),
        )
        require(self, "curriculum", checks)

    def _definition(self):
        """A name that runs are compared under has to mean what it says: policy=a1 alone would leave other numbers."""
        preset = f"that is not {self.policy}; choose the file, curriculum={self.policy}"
        if self.policy == "recommended":
            guarded = self.guard or self.monotone or self.hysteresis > 0 or self.reserved.share > 0
            yield "policy", guarded, f"every guard is off, {preset}"
        if self.policy in ("a1", "a2", "a3"):
            yield "single_every", self.single_every == 0, preset
        if self.policy in ("a1", "a2"):
            yield "uncertainty_weight", self.uncertainty_weight == 0, preset
        if self.policy == "a1":
            yield "staleness_weight", self.staleness_weight == 0, preset


def choice(section: object, key: str, *known: str) -> tuple[str, bool, str]:
    return key, getattr(section, key) in known, f"expected one of {', '.join(known)}"


def nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
