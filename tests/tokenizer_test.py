"""models/tokenizer.py and the byte tokenizer of models/tiny, whose ids can be written down by hand."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from models import tokenizer
from models.tiny import tokenizer_build

TINY = str(tokenizer_build.FOLDER)
SYSTEM, USER, ASSISTANT, TOOL, END = 257, 258, 259, 260, 261
ROLE_IDS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL}
BYTES = tokenizer.load(TINY)  # not changed by any test


@pytest.fixture
def changeable():
    return tokenizer.load(TINY)


def by_hand(messages):
    turns = [[ROLE_IDS[turn["role"]], *turn["content"].encode(), END] for turn in messages]
    return [token for turn in turns for token in turn] + [ASSISTANT]


def test_committed_files_are_what_the_script_writes(tmp_path):
    tokenizer_build.write(tmp_path)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in written:
        assert (tmp_path / name).read_bytes() == (tokenizer_build.FOLDER / name).read_bytes(), name


def test_vocabulary_is_the_bytes_then_the_specials():
    assert len(BYTES) == 262
    assert BYTES.convert_tokens_to_ids(list(tokenizer_build.SPECIALS)) == list(range(256, 262))
    assert tokenizer.pad_id(BYTES) == 256
    assert tokenizer.stop_ids(BYTES, TINY) == (END,)


@given(st.text())
def test_bytes_round_trip(text):
    ids = tokenizer.encode_prompt(BYTES, [{"role": "user", "content": text}], apply_chat_template=False)
    assert ids == list(text.encode())
    assert tokenizer.decode(BYTES, ids) == text


def test_multi_turn_prompt_by_hand_and_by_transformers():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": " 2\n"},
        {"role": "user", "content": "é 😀"},
    ]
    ids = tokenizer.encode_prompt(BYTES, messages)
    assert ids == by_hand(messages)
    assert ids[:2] == [SYSTEM, ord("B")] and ids[-2:] == [END, ASSISTANT]
    assert ids == BYTES.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_tools_become_a_leading_system_turn():
    tools = [{"name": "add"}]
    ids = tokenizer.encode_prompt(BYTES, [{"role": "user", "content": "1+1"}], tools=tools)
    assert ids == by_hand([{"role": "system", "content": json.dumps(tools)}, {"role": "user", "content": "1+1"}])


PIECES = st.one_of(st.sampled_from([*tokenizer_build.SPECIALS, "<|", "end|>", "\ue000", "\ue0005\ue000"]), st.text())
CONTENTS = st.lists(PIECES, max_size=6).map("".join)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(list(ROLE_IDS)), "content": CONTENTS}), min_size=1)


@given(MESSAGES)
def test_text_never_becomes_a_special_token(messages):
    assert tokenizer.encode_prompt(BYTES, messages) == by_hand(messages)


def test_text_never_becomes_a_special_token_in_tools_and_base_prompts():
    tools = [{"name": "<|end|>", "properties": {"<|user|>": 1}}]
    user = {"role": "user", "content": "a<|end|>"}
    ids = tokenizer.encode_prompt(BYTES, [user], tools=tools)
    assert ids == by_hand([{"role": "system", "content": json.dumps(tools)}, user])
    assert tokenizer.encode_prompt(BYTES, [user], apply_chat_template=False) == list(b"a<|end|>")


def test_threads_may_encode_at_once():
    prompts = [[{"role": "user", "content": "a<|end|>" * 5}], [{"role": "user", "content": "hello" * 200}]] * 300
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda messages: tokenizer.encode_prompt(BYTES, messages), prompts))
    assert found == [by_hand(messages) for messages in prompts]


def test_guard_works_under_a_template_that_trims(changeable):
    changeable.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content | trim }}<|end|>{% endfor %}"
    ids = tokenizer.encode_prompt(changeable, [{"role": "user", "content": "  <|end|> x<|user|> \n"}])
    assert ids == [*b"user:<|end|> x<|user|>", END]


def test_base_prompt_joins_contents_after_bos(changeable):
    messages = [{"role": "system", "content": "Q: 1+1"}, {"role": "user", "content": "A:"}]
    assert tokenizer.encode_prompt(changeable, messages, apply_chat_template=False) == list(b"Q: 1+1\nA:")
    bos = processors.TemplateProcessing("<|system|> $A", special_tokens=[("<|system|>", SYSTEM)])
    changeable.backend_tokenizer.post_processor = bos
    assert tokenizer.encode_prompt(changeable, messages, apply_chat_template=False) == [SYSTEM, *b"Q: 1+1\nA:"]
    assert tokenizer.encode_prompt(changeable, messages) == by_hand(messages)  # the template writes its own markup


def test_decode_keeps_spaces_and_drops_special_tokens():
    text = " a . b , it 's  n't ?\n "
    assert tokenizer.decode(BYTES, [USER, *text.encode(), END, 256]) == text
    assert tokenizer.decode(BYTES, []) == ""
    assert tokenizer.decode(BYTES, [0xC3, ord("x")]) == "\ufffdx"


def test_missing_chat_template_names_the_remedy(changeable):
    changeable.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template: set model\.apply_chat_template=false") as error:
        tokenizer.encode_prompt(changeable, [{"role": "user", "content": "x"}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", [{"role": "critic", "content": "x"}, {"role": "user", "content": None}])
def test_refused_messages_are_one_line(message):
    with pytest.raises(ValueError, match=r"chat template of .* refuses a prompt") as error:
        tokenizer.encode_prompt(BYTES, [message])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("eos, expected", [(7, (7, END)), ([9, 7, END], (7, 9, END)), (None, (END,))])
def test_stop_ids_join_generation_config_and_tokenizer(tmp_path, eos, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert tokenizer.stop_ids(BYTES, str(tmp_path)) == expected


def test_stop_ids_know_turn_ends_of_other_families(changeable, tmp_path):
    changeable.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|eot_id|>"]})
    changeable.add_tokens(["<end_of_turn>"])  # in the vocabulary as text, not as markup
    assert tokenizer.stop_ids(changeable, str(tmp_path)) == (END, 262, 263)


def test_pad_falls_back_to_eos(changeable):
    changeable.pad_token = None
    assert tokenizer.pad_id(changeable) == END


def test_folder_without_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer that transformers can load") as error:
        tokenizer.load(str(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
