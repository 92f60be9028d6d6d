"""The 25 instructions of IFEval, each on a text that follows it and one that does not, by hand."""

import pytest

from rubric.ifeval import KINDS, followed, ifeval, instructions

LONG = "One two three. Four five six! Seven?"

# kind: (arguments, follows, does not)
CASES = {
    "keywords:existence": ({"keywords": ["moon", "sea"]}, "Moons over the sea", "The moon"),
    "keywords:frequency": ({"keyword": "sea", "frequency": 2, "relation": "at least"}, "Sea to sea", "A sea"),
    "keywords:forbidden_words": ({"forbidden_words": ["sea"]}, "The season", "The sea."),
    "keywords:letter_frequency": ({"letter": "e", "let_frequency": 2, "let_relation": "less than"}, "Sea", "See"),
    "language:response_language": (
        {"language": "de"},
        "Ich weiß nicht, was soll es bedeuten, dass ich so traurig bin.",
        "I do not know why I am so sad, and what that is to mean.",
    ),
    "length_constraints:number_sentences": ({"num_sentences": 3, "relation": "at least"}, LONG, "One. Two"),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "One\n***\nTwo", "One\n\nTwo"),
    "length_constraints:number_words": ({"num_words": 4, "relation": "less than"}, "one two, three", "a b c d"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        'First this.\n\n"Then," that.',
        "Then this.\n\nFirst that.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] at [place]", "[name] at place"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\nP. S. Write!", "Bye. PS"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n- two", "* one\n** two"),
    "detectable_format:constrained_response": ({}, "My answer is maybe.", "Maybe."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*one* **two**", "*one* ** **"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na\nSection\nb",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', '{"a": }'),
    "detectable_format:title": ({}, "<<The sea>> and more", "<< >> The sea"),
    "combination:two_responses": ({}, "One\n******\nTwo", "One\n******\nOne"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, " say it. It.", "It. Say it."),
    "startend:end_checker": ({"end_phrase": "The end."}, 'So. "the END."', "The end. Really"),
    "startend:quotation": ({}, '"Yes"', '"Yes" she said'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "less than"},
        "NO way",
        "NO WAY",
    ),
    "change_case:english_capital": ({}, "ALL OF IT, 7 TIMES", "All"),
    "change_case:english_lowercase": ({}, "none of it, 7 times", "None"),
    "punctuation:no_comma": ({}, "One; two", "One, two"),
}


def meta(*kinds, kwargs=None):
    return {"instruction_id_list": [*kinds], "kwargs": kwargs or [CASES[kind][0] for kind in kinds]}


def test_all_of_the_suites_kinds_are_here():
    assert CASES.keys() == KINDS.keys() and len(KINDS) == 25


@pytest.mark.parametrize("kind", CASES)
def test_an_instruction_tells_right_from_wrong(kind):
    _, follows, does_not = CASES[kind]
    assert followed(follows, meta(kind))[0] == [True]
    assert followed(does_not, meta(kind))[0] == [False]
    assert followed("  \n", meta(kind)) == ([False], [False])


def test_loose_takes_off_the_first_line_the_last_and_asterisks():
    held = meta("change_case:english_lowercase", "startend:end_checker", "punctuation:no_comma")
    assert followed("Sure:\nall is calm. the end.", held) == ([False, True, True], [True, True, True])
    assert followed("all is calm. **the end.**\nHope it helps", held) == ([False, False, True], [True] * 3)
    assert followed("Sure, a, b", held)[1] == [False, False, False]


def test_grades_and_measures_by_hand():
    held = meta("change_case:english_lowercase", "punctuation:no_comma")
    assert ifeval("all is calm", None, held) == 4
    assert ifeval("Sure:\nall is calm", None, held) == 3
    assert ifeval("All is calm", None, held) == 2
    assert ifeval("All, all is calm", None, held) == 1
    score, measures = instructions("Sure:\nall is calm", None, held, {"by": "strict"})
    assert score == 0.5 and measures == {
        "instruction_strict": 0.5,
        "instruction_loose": 1.0,
        "prompt_strict": 0.0,
        "prompt_loose": 1.0,
    }
    assert instructions("Sure:\nall is calm", None, held, {"by": "loose"})[0] == 1.0


def test_null_arguments_are_as_good_as_missing():
    given = [{"keyword": "a", "frequency": 1, "relation": None, "num_words": None}]
    assert followed("a", meta("keywords:frequency", kwargs=given))[0] == [True]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "meta.instruction_id_list is missing"),
        (meta("punctuation:no_comma", kwargs=[{}, {}]), "meta.kwargs has 2 entries for 1"),
        ({"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}, "did you mean 'punctuation:no_comma'"),
        (meta("keywords:existence", kwargs=[{"words": []}]), "meta.kwargs of keywords:existence lacks 'keywords'"),
        (meta("keywords:frequency", kwargs=[{"keyword": "a", "frequency": 1, "relation": "over"}]), "relation 'over'"),
    ],
)
def test_a_row_that_cannot_be_graded_raises(wrong, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        ifeval("a reply", None, wrong)
