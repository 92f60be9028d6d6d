"""Writes the byte tokenizer of the embedded model: `python -m models.tiny.tokenizer_build`.

Ids 0..255 are the bytes of UTF-8 text, so every string has exactly one encoding and decodes back to itself; ids from
256 on are the tokens of SPECIALS, in that order. There are no merges: a byte-level BPE without merges is the form of a
plain byte table that transformers loads as PreTrainedTokenizerFast, without code of ours.

The chat template costs two tokens a turn, the role and `<|end|>`, and one for the generation prompt. Tool descriptions
become a leading system turn in JSON.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

FOLDER = Path(__file__).parent
PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIALS = (PAD, *(f"<|{role}|>" for role in ROLES), END)

CHAT_TEMPLATE = (
    "{%- if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{% endif %}"
    "{%- for message in messages %}"
    f"{{%- if message.role not in {list(ROLES)} %}}"
    f"{{{{ raise_exception('role ' + message.role + ' is none of {', '.join(ROLES)}') }}}}{{% endif %}}"
    "{{- '<|' + message.role + '|>' + message.content + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The character that stands for each of the 256 bytes in byte-level BPE (GPT-2): itself where it is visible and not
    a space, else one from U+0100 on, in order."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def build() -> Tokenizer:
    vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return tokenizer


def write(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(build().to_str() + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


if __name__ == "__main__":
    write(FOLDER)
