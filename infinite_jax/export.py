"""Writes a run's policy as a Hugging Face folder: weights, config, tokenizer, chat template.

python -m infinite_jax.export RUN_DIR OUT [step=best|N] [as=adapter]

Adapters of a run with model.lora are merged into the weights; as=adapter writes them alone, as a folder of peft's.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from configs import cli
from infinite_jax import run_folder
from infinite_jax.placement import abstract_train_state
from infinite_jax.session import sized
from infinite_jax.types import RunState
from models import gguf, hf, lora, lora_folder, shapes, source
from sharding.mesh import make_mesh

FORMS = ("as=merged", "as=adapter")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("export", __doc__)
    arguments.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    arguments.add_argument("out", type=Path, metavar="OUT")
    arguments.add_argument(
        "overrides",
        nargs="*",
        default=[],  # without one argparse calls it required
        metavar="step=best|N",
        help="default: the newest; as=adapter; or mesh.*=...",
    )
    given = arguments.parse_args(argv)
    with cli.bad_input():
        step, overrides = run_folder.take_step([item for item in given.overrides if not item.startswith("as=")])
        form = next((item for item in reversed(given.overrides) if item.startswith("as=")), "as=merged")
        run_folder.check_writable(given.out, "OUT ")
        if given.out.exists() and any(given.out.iterdir()):
            raise ValueError(f"{given.out} is not empty: name another folder")
        config = run_folder.load_config(given.run_dir, overrides)
        decoder = source.network(config.model)
        if form not in FORMS:
            raise ValueError(f"{form}: expected {' or '.join(FORMS)}")
        if form == "as=adapter" and not decoder.lora:
            raise ValueError(f"as=adapter: {given.run_dir} has none, all its weights learnt: leave as=adapter out")
        base_path = base_of(config.model.path) if form == "as=adapter" else ""
        mesh = make_mesh(sized(config, decoder))
        train = abstract_train_state(config.algorithm, decoder, mesh)
        only_train = RunState(train, *[None] * (len(RunState._fields) - 1))
        number, state = run_folder.checkpoints(given.run_dir).restore(only_train, step)
        if form == "as=adapter":
            lora_folder.save(decoder, state.train.params, given.out, base_path)
        else:
            base = source.load(config.model, mesh)[1] if decoder.lora else None
            hf.save(decoder, lora.merge(decoder, lora.join(decoder, base, state.train.params)), given.out)
        source.load_tokenizer(config.model).save_pretrained(given.out)
    print(f"step {number} of {given.run_dir} -> {given.out}")
    if gguf.is_gguf(base_path):
        folder, name = os.path.split(base_path)
        print(
            "its base is a GGUF file, which peft does not find by itself: load it in transformers with "
            f"from_pretrained({folder!r}, gguf_file={name!r}), then PeftModel.from_pretrained(base, {str(given.out)!r})"
        )
    return cli.DONE


def base_of(path: str) -> str:
    """What stands for model.path in a folder of adapters: a name under which other programs find the base.

    Raises ValueError, one line, for a base that nobody else has.
    """
    if shapes.is_shape(path):
        raise ValueError(
            f"as=adapter: model.path={path} began from random weights, which no other program has: leave as=adapter out"
        )
    return str(gguf.find(path)) if gguf.is_gguf(path) else source.resolve(path)


if __name__ == "__main__":
    sys.exit(main())
