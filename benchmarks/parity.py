"""The same GRPO run here and with TRL's GRPOTrainer: one domain; model, prompts in order, loss and numbers alike.

    python -m benchmarks.parity run OUT [--only ours,trl] [--config-name bench12] [--domain NAME] [--steps N]
                                        [--seeds 0,1,2] [key=value ...]
    python -m benchmarks.parity table OUT            reads OUT/<who>-<seed>.json: a table, curves OUT/parity.png

Both sides: reward (grade - 1) / 3 from the same grader; advantage r - mean of the group, tokens weighted alike over the
batch, no KL, clip 0.2 (inert at one update a batch); AdamW with the same betas, no weight decay, a constant rate;
gradient clipped at norm 1; temperature 1, the whole distribution; float32 parameters, bfloat16
products on a GPU. Held out: greedy pass rate of the trained parameters, by this project's evaluator for both. TRL
generates with transformers (no vLLM). What is left to differ: the random draws, and which positions are computed in
which product. A finished run's file is kept and not run again.

TRL is not a dependency: pip install trl datasets.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from configs import cli
from configs.schema import Config
from infinite_jax import heldout, prompts, session, statistics
from models import hf

SAME = (
    "curriculum=uniform", "algorithm.advantage=none", "algorithm.aggregation=token_mean", "algorithm.kl_type=none",
    "algorithm.importance_cap=0", "algorithm.weight_decay=0", "algorithm.adam_b2=0.999", "algorithm.clip_low=0.2",
    "algorithm.clip_high=0.2", "algorithm.entropy_coef=0", "algorithm.zero_variance=keep", "algorithm.truncated=keep",
    "algorithm.lr_warmup_steps=0", "eval.canary=false",
)  # fmt: skip
LAST = 10  # steps that the final mean is over


def compose(given: argparse.Namespace, seed: int) -> Config:
    """The run's configuration with one domain and the settings of SAME."""
    with cli.bad_input():
        config = cli.compose_config(given.config_name, None, [*SAME, f"run.seed={seed}", *given.overrides])
        chosen = tuple(domain for domain in config.domains if domain.name == given.domain)
        if not chosen:
            raise ValueError(f"--domain {given.domain}: known: {', '.join(domain.name for domain in config.domains)}")
    return dataclasses.replace(config, domains=chosen, run=dataclasses.replace(config.run, steps=given.steps))


def open_run(config: Config) -> session.Session:
    with cli.bad_input():
        session.set_up_runtime(config)
        return session.open_session(config)


def prompt_order(opened: session.Session, steps: int) -> list[prompts.Prompt]:
    """The prompts of all steps in the order in which the trainer takes them: one domain, so no draw matters."""
    trainer, position, order = opened.trainer, opened.state.position, []
    each = np.zeros(opened.config.algorithm.prompts, np.int32)
    for _ in range(steps):
        chosen, position = trainer.stream.take(each, np.zeros(1, np.float32), position)
        order += chosen
    return order


def ours(config: Config) -> dict:
    opened, rewards, seconds = open_run(config), [], []
    with opened:
        state = opened.state
        before = passed(opened, state.train.params)
        for _ in range(config.run.steps):
            state, outcome = opened.trainer.step(state)
            rewards.append(outcome.metrics["reward/mean"])
            seconds.append(outcome.metrics["time/step_s"])
        after = passed(opened, state.train.params)
    settings = dataclasses.asdict(config.algorithm)
    step_s = float(np.median(seconds))
    return {"reward": rewards, "before": before, "after": after, "step_s": step_s, "settings": settings}


def passed(opened: session.Session, params) -> list[float]:
    """1 or 0 for every held-out prompt."""
    [result] = opened.evaluator.run(params).values()
    return heldout.passed(result.greedy_N).tolist()


def trl(config: Config) -> dict:
    """TRL on the same prompts; its parameters are read back for the evaluation."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    opened, algorithm = open_run(config), config.algorithm
    order = prompt_order(opened, config.run.steps)
    with opened, tempfile.TemporaryDirectory() as scratch:
        before = passed(opened, opened.state.train.params)
        start = Path(scratch) / "start"
        hf.save(opened.decoder, opened.state.train.params, start)
        opened.tokenizer.save_pretrained(start)
        opened = opened._replace(state=None)
        text = AutoTokenizer.from_pretrained(start)
        check_same_ids(text, order, config)
        rows = [{"prompt": prompt.row["messages"], "number": number} for number, prompt in enumerate(order)]

        def reward(completions, number, **_) -> list[float]:
            replies = [completion[-1]["content"] for completion in completions]
            graded = opened.grader.grade([0] * len(replies), [order[n].row for n in number], replies)
            return [float(r) if valid else None for r, valid in zip(graded.reward_B, graded.valid_B)]

        gpu, began = torch.cuda.is_available(), []

        class Clock(TrainerCallback):
            def on_step_end(self, *_, **__):
                began.append(time.perf_counter())

        settings = GRPOConfig(
            output_dir=str(Path(scratch) / "trl"),
            per_device_train_batch_size=algorithm.prompts * algorithm.group_size,
            num_generations=algorithm.group_size,
            gradient_accumulation_steps=1,
            max_steps=config.run.steps,
            max_completion_length=algorithm.max_new_tokens,
            shuffle_dataset=False,
            learning_rate=algorithm.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=algorithm.adam_b1,
            adam_beta2=algorithm.adam_b2,
            adam_epsilon=algorithm.adam_eps,
            weight_decay=0.0,
            max_grad_norm=algorithm.max_grad_norm,
            temperature=algorithm.temperature,
            beta=0.0,
            epsilon=algorithm.clip_low,
            scale_rewards="none",
            loss_type="dapo",
            bf16=gpu,
            use_cpu=not gpu,
            gradient_checkpointing=False,
            seed=config.run.seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation="eager"),
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=text,
            callbacks=[Clock()],
        )
        trainer.train()
        rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
        end = Path(scratch) / "end"
        trainer.model.to(torch.float32).save_pretrained(end)
        printed = {key: value for key, value in settings.to_dict().items() if isinstance(value, int | float | str)}
        del trainer
        torch.cuda.empty_cache()
        params = hf.load(str(end), "float32", mesh=opened.mesh)[1]
        after = passed(opened, params)
    step_s = float(np.median(np.diff(began))) if len(began) > 1 else None
    return {"reward": rewards, "before": before, "after": after, "step_s": step_s, "settings": printed}


def check_same_ids(text, order: list[prompts.Prompt], config: Config) -> None:
    for prompt in order:
        ids = text.apply_chat_template(prompt.row["messages"], add_generation_prompt=True, return_dict=False)
        if tuple(ids) != prompt.ids:
            raise SystemExit(f"{config.model.path}: transformers encodes {prompt.row['messages']} otherwise")


def run(given: argparse.Namespace) -> None:
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, given.seeds.split(",")):
        for who in given.only.split(","):
            path = given.out / f"{who}-{seed}.json"
            if path.is_file():
                continue
            config = compose(given, seed)
            found = {"ours": ours, "trl": trl}[who](config)
            path.write_text(json.dumps(found, default=str), encoding="utf-8")
            last = np.mean(found["reward"][-LAST:])
            print(f"{who} seed {seed}: reward {last:.3f}, held out {np.mean(found['after']):.3f}", flush=True)
            jax.clear_caches()


def table(out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    print("| | seeds | reward, last 10 steps | held out, before | held out, after | median step |")
    print("|---|---|---|---|---|---|")
    final = {}
    for who, colour in (("ours", "#0072B2"), ("trl", "#D55E00")):
        runs = [json.loads(path.read_text()) for path in sorted(out.glob(f"{who}-*.json"))]
        if not runs:
            print(f"| {who} | 0 | NOT RUN | | | |")
            continue
        curves = np.array([found["reward"] for found in runs])
        step = np.arange(1, curves.shape[1] + 1)
        axis.plot(step, curves.T, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(step, curves.mean(0), color=colour, label=f"{who}, mean of {len(runs)} seeds")
        final[who] = [np.nanmean(found["after"]) for found in runs]
        before, step_s = np.nanmean(runs[0]["before"]), np.median([found["step_s"] for found in runs])
        columns = (len(runs), spread(curves[:, -LAST:].mean(1)), f"{before:.3f}", spread(final[who]), f"{step_s:.2f} s")
        print(f"| {who} | {' | '.join(map(str, columns))} |")
    if len(final) == 2 and len(final["ours"]) == len(final["trl"]):
        found = statistics.t_interval(np.subtract(final["ours"], final["trl"]))
        if found:
            print(
                f"\nheld out, ours minus TRL, paired by seed: {found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            )
    axis.set(xlabel="step", ylabel="mean reward of the batch")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(out / "parity.png", dpi=110)


def spread(values) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.splitlines()[0])
    arguments.add_argument("verb", choices=("run", "table"))
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--only", default="ours,trl")
    arguments.add_argument("--config-name", default="bench12")
    arguments.add_argument("--domain", default="products")
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--seeds", default="0,1,2", help="separated by commas")
    arguments.add_argument("overrides", nargs="*", metavar="key=value")
    given = arguments.parse_intermixed_args()
    run(given) if given.verb == "run" else table(given.out)


if __name__ == "__main__":
    sys.exit(main())
