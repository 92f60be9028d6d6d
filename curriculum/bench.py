"""bench12: twelve domains for an instruction-tuned model of about 135 M parameters, as three-shot chat.

gcd, products and sums take questions and numbers from reasoning_gym (level 1 is its task with one-digit numbers, gcd up
to 20). Number filtering is written here: the library's lists hold quoted decimals of different precision and are
answered in Python's notation, where whole numbers between commas will do. Code tasks stand in code_tasks.py.

`calculator` is a conversation: a call, its result, the answer. Three more domains for the cases around the edge:
`lowercase` (easy), `spell_backwards` (nearly dead) and `acronym` (dead) for a model of that size. Left out: yes/no
tasks, where guessing passes half, and letter counting, where always answering 1 does.
"""

import json
import operator
from typing import Any

import numpy as np

from curriculum.code_tasks import code_output, code_write
from curriculum.few_shot import WORDS, Task, few_shot

SHORT_WORDS = [word for word in WORDS if len(word) <= 5]
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CITIES = (
    "Paris London Berlin Madrid Rome Oslo Vienna Prague Lisbon Athens Cairo Delhi Tokyo Seoul Lima Quito Boston Dallas "
    "Denver Miami Chicago Toronto Sydney Dublin Warsaw Moscow Istanbul Nairobi Havana Geneva"
).split()
NAMES = "Anna Ben Carla David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paula Rosa Sam Tina".split()
GENRES = ("jazz", "rock", "pop", "blues", "folk", "soul", "metal", "disco")
LANGUAGES = ("French", "German", "Spanish", "Italian", "Polish", "Turkish", "Greek", "Dutch")


def _gym(name: str, rng: np.random.Generator, **config: int) -> dict[str, Any]:
    """One item of a reasoning_gym data set."""
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise ValueError(f"generator {name} needs reasoning_gym: pip install reasoning-gym") from error
    return reasoning_gym.create_dataset(name, seed=int(rng.integers(2**31)), size=1, **config)[0]


def gcd(rng: np.random.Generator, difficulty: int) -> Task:
    """Greatest common divisor of two numbers from 2 to 20, 100, 500."""
    item = _gym("gcd", rng, min_value=2, max_value=(20, 100, 500)[difficulty - 1])
    return Task(item["question"], item["answer"], {}, f"gcd {sorted(item['metadata']['numbers'])}")


def products(rng: np.random.Generator, difficulty: int) -> Task:
    """Product of two digits; at level 2 of two numbers below 100, at level 3 of three."""
    item = _gym(
        "products", rng, max_digits=min(difficulty, 2), max_terms=max(2, difficulty), min_terms=max(2, difficulty)
    )
    factors = sorted(int(factor) for factor in item["metadata"]["expression"].split(" * "))
    return Task(item["question"], item["answer"], {}, f"products {factors}")


def sums(rng: np.random.Generator, difficulty: int) -> Task:
    """Sum or difference of two digits; at level 2 of two numbers below 100, at level 3 of three."""
    item = _gym(
        "chain_sum",
        rng,
        min_digits=1,
        max_digits=min(difficulty, 2),
        min_terms=max(2, difficulty),
        max_terms=max(2, difficulty),
    )
    terms = item["metadata"]["expression"].replace("+ ", "+").replace("- ", "-").split()
    return Task(item["question"], item["answer"], {}, f"sums {sorted(int(term) for term in terms)}")


def _numbers(rng: np.random.Generator, number: int) -> list[int]:
    """Different numbers from 1 to 99, in random order."""
    return [int(value) + 1 for value in rng.permutation(99)[:number]]


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def compare(rng: np.random.Generator, difficulty: int) -> Task:
    """The largest or smallest of difficulty + 2 numbers below 100."""
    numbers = _numbers(rng, difficulty + 2)
    name, pick = (("largest", max), ("smallest", min))[rng.integers(2)]
    question = f"Which of these numbers is the {name}: {_join(numbers)}? Give only the number."
    return Task(question, str(pick(numbers)), {}, f"compare {name} {sorted(numbers)}")


def sort_numbers(rng: np.random.Generator, difficulty: int) -> Task:
    """difficulty + 2 numbers below 100 in ascending order."""
    numbers = _numbers(rng, difficulty + 2)
    question = f"Sort these numbers from smallest to largest: {_join(numbers)}. Give only the list."
    return Task(question, _join(sorted(numbers)), {"separator": ", "}, f"sort_numbers {sorted(numbers)}")


def filter_numbers(rng: np.random.Generator, difficulty: int) -> Task:
    """Of difficulty + 2 numbers below 100 those above or below a limit, in their order; never all and never none."""
    *numbers, limit = _numbers(rng, difficulty + 3)
    name, kept = (
        ("larger", [number for number in numbers if number > limit]),
        ("smaller", [number for number in numbers if number < limit]),
    )[rng.integers(2)]
    if len(kept) in (0, len(numbers)):
        return filter_numbers(rng, difficulty)
    question = f"Keep all numbers {name} than {limit} in this list: {_join(numbers)}. Give only the new list."
    return Task(question, _join(kept), {"separator": ", "}, f"filter_numbers {name} {limit} {numbers}")


def kth_letter(rng: np.random.Generator, difficulty: int) -> Task:
    """A letter of a word, counted from its start; at level 2 from its end."""
    word = WORDS[rng.integers(len(WORDS))]
    k = int(rng.integers(1, len(word) + 1))
    rank = f"{k}{('st', 'nd', 'rd')[k - 1] if k < 4 else 'th'}"
    where, letter = (("", word[k - 1]), (" from the end", word[-k]))[difficulty - 1]
    question = f"What is the {rank} letter{where} of the word '{word}'? Give only the letter."
    return Task(question, letter, {"choices": sorted(set(word))}, f"kth_letter {word} {k} {where}")


def weekday(rng: np.random.Generator, difficulty: int) -> Task:
    """The day of the week 1 to 20, 60, 365 days from a given one."""
    today, ahead = int(rng.integers(7)), int(rng.integers(1, (20, 60, 365)[difficulty - 1] + 1))
    plural = "day" if ahead == 1 else "days"
    question = f"Today is {DAYS[today]}. Which day of the week is it in {ahead} {plural}? Give only the day."
    return Task(question, DAYS[(today + ahead) % 7], {"choices": list(DAYS)}, f"weekday {today} {ahead}")


def _tool(name: str, **arguments: str) -> dict[str, Any]:
    properties = {argument: {"type": kind} for argument, kind in arguments.items()}
    return {"name": name, "parameters": {"type": "object", "properties": properties, "required": list(arguments)}}


def _types(tool: dict[str, Any]) -> dict[str, str]:
    return {argument: schema["type"] for argument, schema in tool["parameters"]["properties"].items()}


TOOLS = [
    _tool("get_weather", city="string", day="string"),
    _tool("set_alarm", time="string", day="string"),
    _tool("send_message", to="string", text="string"),
    _tool("play_music", genre="string", minutes="integer"),
    _tool("translate", text="string", language="string"),
]
# The prompt shows the names and types of each schema only: its other words ("type": "object", "properties", "required")
# lengthen every prompt, and a model of this size repeats them as arguments.
TOOL_TURN = "\n".join(
    ['Answer with one call of one of these tools, as JSON: {"name": ..., "arguments": {...}}']
    + [json.dumps({"name": tool["name"], "parameters": _types(tool)}) for tool in TOOLS]
)


def _pick(rng: np.random.Generator, options: tuple | list) -> Any:
    return options[rng.integers(len(options))]


def _weather(rng: np.random.Generator) -> tuple[dict, str, str]:
    arguments = {"city": _pick(rng, CITIES), "day": _pick(rng, DAYS)}
    return arguments, "What will the weather be in {city} on {day}?", "On {day} I fly to {city}. Will it rain?"


def _alarm(rng: np.random.Generator) -> tuple[dict, str, str]:
    arguments = {"time": f"{rng.integers(5, 24)}:{rng.integers(60):02}", "day": _pick(rng, DAYS)}
    return arguments, "Set an alarm for {time} on {day}.", "My bus leaves on {day} at {time}. Ring me then."


def _message(rng: np.random.Generator) -> tuple[dict, str, str]:
    text = _pick(rng, ("bring the {}", "I found the {}", "buy a {}", "where is the {}")).format(_pick(rng, WORDS))
    arguments = {"to": _pick(rng, NAMES), "text": text}
    return arguments, "Send {to} the message '{text}'.", "'{text}': {to} should read that."


def _music(rng: np.random.Generator) -> tuple[dict, str, str]:
    arguments = {"genre": _pick(rng, GENRES), "minutes": int(rng.integers(5, 100))}
    return arguments, "Play {genre} for {minutes} minutes.", "I have {minutes} minutes and like {genre}. Play some."


def _translation(rng: np.random.Generator) -> tuple[dict, str, str]:
    arguments = {"text": _pick(rng, WORDS), "language": _pick(rng, LANGUAGES)}
    return arguments, "Translate '{text}' to {language}.", "What is the {language} word for '{text}'?"


REQUESTS = (_weather, _alarm, _message, _music, _translation)  # in the order of TOOLS


def tool_call(rng: np.random.Generator, difficulty: int) -> Task:
    """One call of the right one of five tools; level 2 also says what is wanted without the tool's own words."""
    tool = rng.integers(len(TOOLS))
    arguments, plain, indirect = REQUESTS[tool](rng)
    request = _pick(rng, (plain, indirect)[:difficulty]).format(**arguments)
    call = {"name": TOOLS[tool]["name"], "arguments": arguments}
    reply = json.dumps(call)
    return Task(request, reply, {"tools": TOOLS}, f"tool_call {reply}", answer=call)


def _sentence(rng: np.random.Generator, difficulty: int, case: str) -> Task:
    """One short sentence with `difficulty` given words, all in upper or all in lower case."""
    words = [WORDS[i] for i in rng.permutation(len(WORDS))[:difficulty]]
    frame = _pick(rng, ("We like the {}.", "She talks about the {}.", "They are looking for the {}."))
    reply = frame.format(" and the ".join(words))
    asked = f"the word{'s' if difficulty > 1 else ''} {' and '.join(words)}"
    constraints = [{"kind": case}, *({"kind": "contains", "word": word} for word in words)]
    constraints += [{"kind": "sentences", "n": 1}, {"kind": "min_words", "n": 3}, {"kind": "max_words", "n": 12}]
    letters, reply = ("capital", reply.upper()) if case == "uppercase" else ("lower-case", reply.lower())
    question = f"Write one short sentence in {letters} letters with {asked}."
    return Task(question, reply, {"constraints": constraints}, f"{case} {sorted(words)}")


def capitals(rng: np.random.Generator, difficulty: int) -> Task:
    """One short sentence in capitals with `difficulty` given words."""
    return _sentence(rng, difficulty, "uppercase")


def lowercase(rng: np.random.Generator, difficulty: int) -> Task:
    """One short sentence in lower case with `difficulty` given words."""
    return _sentence(rng, difficulty, "lowercase")


def spell_backwards(rng: np.random.Generator, difficulty: int) -> Task:
    """A word of at most 5 letters from its end; at level 2 of any length."""
    word = _pick(rng, WORDS if difficulty == 2 else SHORT_WORDS)
    return Task(f"Spell the word '{word}' backwards.", word[::-1], {}, f"spell_backwards {word}")


def acronym(rng: np.random.Generator, difficulty: int) -> Task:
    """The first letters of difficulty + 3 words, in capitals."""
    words = [WORDS[i] for i in rng.permutation(len(WORDS))[: difficulty + 3]]
    reply = "".join(word[0] for word in words).upper()
    return Task(f"What is the acronym of: {' '.join(words)}?", reply, {}, f"acronym {words}")


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
CALCULATOR_TURN = 'For arithmetic, write <tool name="calculator">expression</tool>. The next turn is its result.'


def calculator(rng: np.random.Generator, difficulty: int) -> Task:
    """A number below 1000 and `difficulty` numbers below 100 joined by + - *: too much for the head of a small model,
    one call of the calculator."""
    first, steps = int(rng.integers(100, 1000)), []
    for _ in range(difficulty):
        steps.append((_pick(rng, tuple(OPERATIONS)), int(rng.integers(12, 100))))
    expression, value = str(first), first
    for sign, number in steps:  # from left to right, so in parentheses where * would come first
        expression = f"({expression})" if sign == "*" and any(s in expression for s in "+-") else expression
        expression, value = f"{expression} {sign} {number}", OPERATIONS[sign](value, number)
    question = _pick(rng, ("What is {}?", "Work out {}.", "How much is {}?")).format(expression)
    call = ("assistant", f'<tool name="calculator">{expression}</tool>')
    signs = {sign for sign, _ in steps}
    steps = sorted(steps) if signs <= {"+", "-"} or signs == {"*"} else steps  # any order has the same value
    return Task(question, str(value), {}, f"calculator {first} {steps}", between=(call, ("tool", str(value))))


BENCH = {
    "gcd": few_shot("number", 3, gcd),
    "products": few_shot("number", 3, products),
    "sums": few_shot("number", 3, sums),
    "compare": few_shot("number", 6, compare),
    "sort_numbers": few_shot("list", 6, sort_numbers),
    "filter_numbers": few_shot("list", 6, filter_numbers, examples_seed=2),
    "kth_letter": few_shot("line", 2, kth_letter),
    "weekday": few_shot("line", 3, weekday),
    "code_write": few_shot("python_tests", 3, code_write, examples_seed=4),
    "code_output": few_shot("eq", 3, code_output, examples_seed=1),
    "tool_call": few_shot("json_call", 2, tool_call, TOOL_TURN, examples_seed=1),
    "capitals": few_shot("constraints", 3, capitals),
}
TALK = {
    "calculator": few_shot("calculator,show=no", 3, calculator, CALCULATOR_TURN, examples_seed=4)
}  # of several turns
EDGE = {
    "lowercase": few_shot("constraints", 3, lowercase),
    "spell_backwards": few_shot("eq", 2, spell_backwards),
    "acronym": few_shot("eq", 3, acronym),
}
