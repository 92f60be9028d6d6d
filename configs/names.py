"""The remedy for an unknown name: the nearest known one, by spelling, by its last part, or as others call it."""

import difflib
from collections.abc import Iterable, Sequence

# As TRL, verl and Tunix call what has another name here; last parts of keys on both sides.
SAME = {
    "lr": "learning_rate",
    "beta": "kl_coef",
    "kl_beta": "kl_coef",
    "kl_loss_coef": "kl_coef",
    "n": "group_size",
    "num_generations": "group_size",
    "num_iterations": "epochs",
    "ppo_epochs": "epochs",
    "clip_ratio_low": "clip_low",
    "clip_ratio_high": "clip_high",
    "epsilon_high": "clip_high",
    "gradient_accumulation_steps": "microbatches",
    "max_tokens": "max_new_tokens",
    "max_completion_length": "max_new_tokens",
    "max_response_length": "max_new_tokens",
    "max_tokens_to_generate": "max_new_tokens",
    "max_prompt_length": "prompt_buckets",
    "train_batch_size": "prompts",
    "max_steps": "steps",
    "total_training_steps": "steps",
}
MANY = 4  # more are no help


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest known one, or all of them."""
    known, name = list(known), str(name)
    close = [SAME[name]] if SAME.get(name) in known else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def nearest_key(key: str, keys: Sequence[str], groups: Sequence[str]) -> str:
    """The remedy for an unknown dotted key.

    In this order: keys with a part of that very name, or with what others call so, of its own section if there are
    any; a group that is spelt alike; a key that is; the keys of its section, or the sections.
    """
    section, dot, tail = key.replace("/", ".").partition(".")
    last = tail.rpartition(".")[2] if dot else key
    found = [known for known in keys if {last, SAME.get(last)} & set(known.split("."))]
    own = [known for known in keys if dot and known.startswith(section + ".")]
    found = [known for known in found if known in own] or found
    if 0 < len(found) <= MANY:
        return f"did you mean {' or '.join(found)}?"
    if own:
        tails = {known.partition(".")[2]: known for known in own}
        close = [tails[end] for end in difflib.get_close_matches(tail, tails, n=1, cutoff=0.5)]
    elif dot:
        close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    else:
        ends = {known.rpartition(".")[2]: known for known in reversed(keys)}
        close = difflib.get_close_matches(key, groups, n=1)
        close = close or [ends[end] for end in difflib.get_close_matches(key, ends, n=1)]
    if close:
        return f"did you mean {close[0]}?"
    if own:
        return f"known: {', '.join(own)}"
    sections = dict.fromkeys(known.split(".")[0] for known in keys)
    return f"the sections are {', '.join(sections)}; docs/configuration.md lists their keys"
