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
from infinite_jax import prompts
from infinite_jax.prompts import Prompt
from infinite_jax.rollout import Sampling, generate
from infinite_jax.trainer import EVAL_STREAM, place, stream_key
from models.architectures import DecoderConfig
from rubric.evaluator import RubricEvaluator


class DomainResult(NamedTuple):
    greedy_N: np.ndarray  # f32 grades in [1, 4] of the domain's prompts, NaN where the grader gave none
    sampled_NS: np.ndarray | None  # the same for eval.samples completions a prompt at temperature 1


Results = dict[str, DomainResult]  # by domain name; prompts in the same order at every evaluation


class Evaluator:
    """Holds the test prompts in static batches; `run` is a function of the parameters only."""

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
        seed: int,
    ):
        self.config, self.algorithm, self.decoder, self.mesh = config, algorithm, decoder, mesh
        self.tokenizer, self.names, self.grader, self.seed = tokenizer, names, grader, seed
        self.greedy = Sampling(0.0, 0, 1.0, algorithm.max_new_tokens, 1, stop_ids, pad_id)
        kept = [domain[: config.prompts or None] for domain in test]
        # by length, so that a batch pays for its own bucket; static batches, the last one filled up
        self.test = sorted((prompt for domain in kept for prompt in domain), key=lambda prompt: len(prompt.ids))

    def run(self, params) -> Results:
        """Grades per domain name. Parameters are read, not donated."""
        with jax.set_mesh(self.mesh):
            greedy = self._grades(params, self.greedy)[:, 0]
            sampled = None
            if self.config.samples > 1:
                sampled = self._grades(params, self.greedy._replace(temperature=1.0, group_size=self.config.samples))
        domain = np.array([prompt.domain for prompt in self.test])
        return {
            name: DomainResult(greedy[domain == d], None if sampled is None else sampled[domain == d])
            for d, name in enumerate(self.names)
        }

    def _grades(self, params, sampling: Sampling) -> np.ndarray:
        """f32 [test prompts, group_size], NaN where invalid."""
        size = self.config.batch
        batches = [self.test[start : start + size] for start in range(0, len(self.test), size)]
        made = [self._generate(params, sampling, batch, number) for number, batch in enumerate(batches)]
        grades = []
        for batch, generated in zip(batches, made):  # the device works on the next batch while this one is graded
            tokens_BT, mask_BT = jax.device_get((generated.tokens_BT, generated.loss_mask_BT))
            rows = len(batch) * sampling.group_size
            replies = list(prompts.replies(self.tokenizer, tokens_BT[:rows], mask_BT[:rows]))
            repeated = [prompt for prompt in batch for _ in range(sampling.group_size)]
            graded = self.grader.grade([p.domain for p in repeated], [p.row for p in repeated], replies)
            grades.append(np.where(graded.valid_B, graded.grade_B, np.nan).reshape(len(batch), sampling.group_size))
        return np.concatenate(grades).astype(np.float32)

    def _generate(self, params, sampling: Sampling, batch: list[Prompt], number: int):
        filled = batch + [batch[-1]] * (self.config.batch - len(batch))
        prompt_PT, length_P = prompts.pad(filled, self.algorithm.prompt_buckets, sampling.pad_id)
        key = stream_key(self.seed, number, EVAL_STREAM)  # the same keys at every evaluation
        return generate(self.decoder, sampling, params, place(self.mesh, prompt_PT), place(self.mesh, length_P), key)


def passed(grades: np.ndarray) -> np.ndarray:
    """1.0 where grade >= 3, 0.0 where not, NaN where the grader gave none."""
    return np.where(np.isnan(grades), np.nan, grades >= 3)


def metrics(results: Results) -> dict[str, float | None]:
    """eval/pass_rate/<domain>, eval/grade/<domain>, eval/macro; with samples eval/pass_at_1/<domain> and its macro."""
    row, rates, sampled_rates = {}, [], []
    for name, result in results.items():
        rate, grade = average(passed(result.greedy_N)), average(result.greedy_N)
        row |= {f"eval/pass_rate/{name}": rate, f"eval/grade/{name}": grade}
        rates.append(rate)
        if result.sampled_NS is not None:
            sampled_rates.append(average(passed(result.sampled_NS)))
            row[f"eval/pass_at_1/{name}"] = sampled_rates[-1]
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
    with np.load(path) as arrays:
        names = [key.removeprefix("greedy/") for key in arrays if key.startswith("greedy/")]
        return {name: DomainResult(arrays[f"greedy/{name}"], arrays.get(f"sampled/{name}")) for name in names}
