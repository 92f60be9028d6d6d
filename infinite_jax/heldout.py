"""Held-out evaluation: greedy, one completion a prompt, the same test prompts and keys every time.

`eval.samples` > 1 adds pass@1 at temperature 1. Prompts are the independent unit of every interval.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from configs.schema import AlgorithmConfig, EvalConfig
from infinite_jax import conversation, prompts, rows
from infinite_jax.conversation import Talk
from infinite_jax.prompts import Prompt
from infinite_jax.rollout import Sampling, sync
from infinite_jax.trainer import EVAL_STREAM, stream_key
from models import lora
from models.architectures import DecoderConfig
from rubric import scoring
from rubric.evaluator import Grades, RubricEvaluator, Scored
from rubric.schema import Rubric


class DomainResult(NamedTuple):
    greedy_N: np.ndarray  # f32 grades in [1, 4] of the domain's prompts, NaN where the grader gave none
    sampled_NS: np.ndarray | None  # the same for eval.samples completions a prompt at temperature 1
    scores_NK: np.ndarray | None = None  # f32 of the greedy replies: rubric.scoring.of_domain; this and more not saved
    rows: tuple[dict, ...] = ()  # of the prompts
    replies: tuple[str | None, ...] = ()  # greedy ones, the last of a conversation; None where another process has it


Results = dict[str, DomainResult]  # by domain name; prompts in the same order at every evaluation


class Evaluator:
    """Holds the test prompts in static batches; `run` is a function of the parameters only.

    mesh: the rollout's. base: what parameters are adapters of, or None.
    """

    def __init__(
        self,
        config: EvalConfig,
        algorithm: AlgorithmConfig,
        decoder: DecoderConfig,
        mesh: Mesh,
        tokenizer,
        stop_ids: tuple[int, ...],
        pad_id: int,
        test: Sequence[Sequence[Prompt]],
        names: Sequence[str],
        grader: RubricEvaluator,
        talk: Talk | None,
        seed: int,
        base=None,
    ):
        self.config, self.algorithm, self.decoder, self.mesh = config, algorithm, decoder, mesh
        self.tokenizer, self.names, self.grader, self.talk, self.seed = tokenizer, names, grader, talk, seed
        self.base = base
        self.greedy = Sampling(0.0, 0, 1.0, algorithm.max_new_tokens, 1, stop_ids, pad_id)
        kept = [domain[: config.prompts or None] for domain in test]
        # by length, so that a batch pays for its own bucket; static batches, the last one filled up
        self.test = sorted((prompt for domain in kept for prompt in domain), key=lambda prompt: len(prompt.ids))

    def run(self, params) -> Results:
        """Grades per domain name. Parameters, on whatever mesh, are read, not donated."""
        params = sync(self.decoder, lora.join(self.decoder, self.base, params), self.mesh)
        with jax.set_mesh(self.mesh):
            scored, replies = self._scored(params, self.greedy)
            sampled = None
            if self.config.samples > 1:
                warm = self.greedy._replace(temperature=1.0, group_size=self.config.samples)
                sampled = _known(self._scored(params, warm)[0].grades).reshape(-1, self.config.samples)
        domain, greedy = np.array([prompt.domain for prompt in self.test]), _known(scored.grades)
        return {
            name: DomainResult(
                greedy[domain == d],
                None if sampled is None else sampled[domain == d],
                scored.scores_BK[domain == d],
                tuple(self.test[i].row for i in np.flatnonzero(domain == d)),
                tuple(replies[i] for i in np.flatnonzero(domain == d)),
            )
            for d, name in enumerate(self.names)
        }

    def _scored(self, params, sampling: Sampling) -> tuple[Scored, list[str | None]]:
        """Of test prompts x group_size rows what they scored, and the replies that this process has."""
        size = self.config.batch
        batches = [self.test[start : start + size] for start in range(0, len(self.test), size)]
        made = [self._generate(params, sampling, batch, number) for number, batch in enumerate(batches)]
        held, said, grades, scores = [], [], [], []
        for batch, (generated, conversed) in zip(batches, made):  # the device is at the next batch meanwhile
            repeated, graded = [prompt for prompt in batch for _ in range(sampling.group_size)], {}
            if conversed is None:
                replies = rows.read(self.tokenizer, generated.tokens_BT, generated.loss_mask_BT)[: len(repeated)]
            else:
                replies = conversation.last_turns(conversed)
                graded = conversation.grade(self.talk.environments, repeated, conversed)
            mine_B, scored = rows.grade(self.grader, repeated, replies, graded)
            held.append(mine_B)
            said += replies
            grades.append(scored.grades)
            scores.append(scored.scores_BK)
        joined = Scored(Grades(*map(np.concatenate, zip(*grades))), np.concatenate(scores))
        return rows.whole(np.concatenate(held), joined), said

    def _generate(self, params, sampling: Sampling, batch: list[Prompt], number: int):
        filled = batch + [batch[-1]] * (self.config.batch - len(batch))
        prompt_PT, length_P = prompts.pad(filled, self.algorithm.prompt_buckets, sampling.pad_id)
        key = stream_key(self.seed, number, EVAL_STREAM)  # the same keys at every evaluation
        asked = (batch, prompt_PT, length_P, key)
        return conversation.respond(self.decoder, sampling, params, self.mesh, self.talk, *asked)


def _known(grades: Grades) -> np.ndarray:
    """f32 grades, NaN where invalid."""
    return np.where(grades.valid_B, grades.grade_B, np.nan).astype(np.float32)


def passed(grades: np.ndarray) -> np.ndarray:
    """1.0 where grade >= 3, 0.0 where not, NaN where the grader gave none."""
    return np.where(np.isnan(grades), np.nan, grades >= 3)


def metrics(results: Results, rubrics: Sequence[Rubric | None] = ()) -> dict[str, float | None]:
    """eval/pass_rate/<domain>, eval/grade/<domain>, eval/macro; with samples eval/pass_at_1/<domain> and its macro.

    rubrics: in the order of the results; adds eval/score, eval/criterion_<name> and eval/<measure> of each domain.
    """
    row, rates, sampled_rates = {}, [], []
    for name, result in results.items():
        rate, grade = average(passed(result.greedy_N)), average(result.greedy_N)
        row |= {f"eval/pass_rate/{name}": rate, f"eval/grade/{name}": grade}
        rates.append(rate)
        if result.sampled_NS is not None:
            sampled_rates.append(average(passed(result.sampled_NS)))
            row[f"eval/pass_at_1/{name}"] = sampled_rates[-1]
    for (name, result), rubric in zip(results.items(), rubrics):
        if rubric is not None and result.scores_NK is not None:
            row |= scoring.metrics(rubric, scoring.of_domain(rubric, result.scores_NK), name, "eval/")
    row["eval/macro"] = None if None in rates else float(np.mean(rates))
    if sampled_rates:
        row["eval/macro_pass_at_1"] = None if None in sampled_rates else float(np.mean(sampled_rates))
    return row


def average(x: np.ndarray) -> float | None:
    known = x[~np.isnan(x)]
    return float(known.mean()) if known.size else None


def save(path: Path, results: Results) -> None:
    """Every prompt's grades, for paired comparisons between steps and runs."""
    arrays = {}
    for name, result in results.items():
        arrays[f"greedy/{name}"] = result.greedy_N
        if result.sampled_NS is not None:
            arrays[f"sampled/{name}"] = result.sampled_NS
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **arrays)


def load(path: Path) -> Results:
    with open(path, "rb") as file, np.load(file) as arrays:
        names = [key.removeprefix("greedy/") for key in arrays if key.startswith("greedy/")]
        return {name: DomainResult(arrays[f"greedy/{name}"], arrays.get(f"sampled/{name}")) for name in names}
