"""Wordings of contamination_quality.py: three parts of different tasks, each a template, paraphrases and look-alikes.

`others` ask the same as `base`; `twins` ask something else of the same content.
"""
# ruff: noqa: E501

import random
from collections.abc import Callable
from typing import Any, NamedTuple

Draw = Callable[[random.Random], dict[str, Any]]

NAMES = (
    "Ava Ben Carla Dmitri Elena Farid Grace Hugo Ines Jonas Keiko Liam Mona Nikhil Olga Pedro Rosa Samir Tara Viktor"
)
CITIES = "Oslo Lima Cairo Quito Seoul Delhi Paris Porto Miami Dakar Tunis Hanoi Perth Turin Kyoto Leeds Basel Sofia"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"
NOUNS = """garden castle bridge window candle river mountain teacher planet rocket basket pencil forest kitchen hammer
blanket market ladder engine button ticket tunnel whistle harbor meadow lantern violin pepper turtle helmet saddle
anchor pillow spider copper velvet magnet walnut island donkey carpet mirror bottle shovel guitar parrot""".split()
COLOURS = "red blue green yellow purple orange silver brown white black".split()
GOODS = "apples pears pencils stickers marbles coins shells postcards buttons cookies balloons stamps".split()
ELEMENTS = "hydrogen helium carbon nitrogen oxygen neon sodium iron copper silver gold mercury lead tin zinc calcium"
COUNTRIES = (
    "Norway Peru Egypt Ecuador Korea India France Portugal Senegal Tunisia Vietnam Australia Italy Japan Bulgaria"
)


class Task(NamedTuple):
    name: str
    base: str
    others: tuple[str, ...]
    draw: Draw
    twins: tuple[str, ...] = ()
    order: bool = True  # whether a list's order is part of the instance

    def key(self, content: dict) -> tuple:
        if self.order:
            return tuple(sorted(content.items()))
        return tuple(sorted(" ".join(map(str, content.values())).replace(",", " ").split()))


def whole(low: int, high: int, *names: str) -> Draw:
    return lambda rng: {name: rng.randint(low, high) for name in names}


def different(words: list[str] | str, *names: str) -> Draw:
    words = words.split() if isinstance(words, str) else words
    return lambda rng: dict(zip(names, rng.sample(words, len(names))))


def listed(name: str, number: tuple[int, int], low: int, high: int) -> Draw:
    return lambda rng: {name: ", ".join(map(str, rng.sample(range(low, high), rng.randint(*number))))}


def words(name: str, number: tuple[int, int]) -> Draw:
    return lambda rng: {name: ", ".join(rng.sample(NOUNS, rng.randint(*number)))}


def joined(*draws: Draw) -> Draw:
    return lambda rng: {key: value for draw in draws for key, value in draw(rng).items()}


def letters(name: str, low: int, high: int) -> Draw:
    return lambda rng: {name: "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(low, high)))}


def truths(rng: random.Random) -> dict:
    return {name: rng.choice(["True", "False"]) for name in "abcd"} | {
        name: rng.choice(["and", "or", "and not", "or not"]) for name in ("p", "q", "r")
    }


TUNE = (
    Task("plus", "What is {a} + {b}?",
         ("Compute the sum of {a} and {b}.", "Add {a} to {b} and tell me the total.", "{a} plus {b} equals what?",
          "If you add up {a} and {b}, what do you get?"), whole(2, 99, "a", "b"),
         ("What is {a} * {b}?", "What is {a} - {b}?"), order=False),
    Task("biggest", "Which of these numbers is the largest: {n}? Give only the number.",
         ("From the list {n}, pick out the greatest value.", "Find the maximum of {n}.",
          "Look at {n} and reply with the biggest of them."), listed("n", (3, 6), 1, 99),
         ("Which of these numbers is the smallest: {n}? Give only the number.",), order=False),
    Task("letter", "What is letter number {k} of the word '{w}'? Give only the letter.",
         ("In the word '{w}', which letter stands at position {k}?", "Name the letter at place {k} in '{w}'.",
          "Spell '{w}' and report letter {k}."), joined(whole(1, 5, "k"), different(NOUNS, "w")),
         ("How many times does the word '{w}' appear in a row of {k} copies?",)),
    Task("day", "Today is {d}. Which day of the week is it in {k} days? Give only the day.",
         ("If it is {d} now, what weekday comes {k} days later?", "Counting {k} days forward from {d}, name the weekday.",
          "What day will it be {k} days after {d}?"), joined(different(DAYS, "d"), whole(2, 60, "k")),
         ("Today is {d}. Which day of the week was it {k} days ago? Give only the day.",)),
    Task("send", "Send {n} the message 'meet me at the {w} in {c}'.",
         ("Please write to {n}: 'meet me at the {w} in {c}'.", "Text 'meet me at the {w} in {c}' to {n}.",
          "I want {n} to receive this note: 'meet me at the {w} in {c}'."),
         joined(different(NAMES, "n"), different(NOUNS, "w"), different(CITIES, "c"))),
    Task("sentence", "Write one short sentence in capital letters with the word {w} and the word {v}.",
         ("Using only upper case, compose a brief sentence that contains {w} and {v}.",
          "Give me a short all-caps sentence mentioning both {w} and {v}.",
          "I need one brief sentence, everything capitalised, that includes {v} as well as {w}."),
         different(NOUNS, "w", "v"), ("Write a poem in small letters about the word {w} and the word {v}.",), order=False),
    Task("goods", "{n} has {a} {g} and buys {b} more. Then {n} gives away {c} of them. How many {g} are left?",
         ("After starting with {a} {g}, getting {b} extra and handing out {c}, what number of {g} does {n} still own?",
          "How many {g} remain if {n} begins with {a}, purchases {b} further ones and donates {c}?",
          "{n} owned {a} {g}, bought another {b}, and later gave {c} to friends. What is the remaining count of {g}?"),
         joined(different(NAMES, "n"), different(GOODS, "g"), whole(5, 60, "a", "b"), whole(1, 5, "c"))),
    Task("bool", "Evaluate this expression: {a} {p} {b} {q} {c} {r} {d}. Answer True or False.",
         ("What truth value does {a} {p} {b} {q} {c} {r} {d} have?",
          "Is the following Python expression true or false? {a} {p} {b} {q} {c} {r} {d}"), truths),
    Task("reverse", "Reverse the order of these words: {w}.",
         ("Write the words {w} backwards, last one first.", "List {w} in the opposite order.",
          "Put the sequence {w} in reversed order."), words("w", (3, 5)),
         ("Sort these words alphabetically: {w}.",)),
    Task("program", "What does this Python program print?\nx = {a}\ny = '{w}'\nprint(y * x + '{v}')",
         ("Give the output of the code below.\nx = {a}\ny = '{w}'\nprint(y * x + '{v}')",
          "Run this script in your head and tell me the printed text:\nx = {a}\ny = '{w}'\nprint(y * x + '{v}')"),
         joined(whole(2, 9, "a"), different(NOUNS, "w", "v"))),
    Task("capital", "What is the capital city of {c}?",
         ("Name the city that serves as capital of {c}.", "{c}'s seat of government is located in which city?",
          "Which city is the capital in {c}?"), different(COUNTRIES + " " + "Chad Cuba Fiji Iran Iraq Mali Nepal Oman Qatar "
          "Kenya Ghana Togo Laos Malta Chile Spain Haiti Yemen Sudan Libya Benin Congo Gabon Niger Syria Samoa Tonga Palau "
          "Russia China Canada Mexico Brazil Poland Greece Turkey Sweden Finland Latvia Estonia Austria Hungary Serbia "
          "Croatia Ireland Iceland Denmark Belgium Ukraine Georgia Armenia Mongolia Thailand Malaysia Indonesia Pakistan "
          "Bolivia Colombia Uruguay Paraguay Venezuela Panama Honduras Jamaica Angola Zambia Uganda Rwanda Botswana "
          "Namibia Ethiopia Somalia Eritrea Djibouti Morocco Algeria Lebanon Jordan Kuwait Bahrain Bhutan Bangladesh "
          "Cambodia Myanmar Singapore Brunei Philippines Taiwan Nauru Kiribati Vanuatu Tuvalu Dominica Grenada Barbados "
          "Bahamas Belize Guatemala Nicaragua Suriname Guyana Albania Andorra Monaco Moldova Romania Slovakia Slovenia "
          "Lithuania Belarus Cyprus Luxembourg Germany Netherlands Switzerland Liechtenstein Kosovo Montenegro Azerbaijan "
          "Kazakhstan Uzbekistan Turkmenistan Tajikistan Kyrgyzstan Afghanistan Maldives Mauritius Madagascar Mozambique "
          "Malawi Lesotho Eswatini Zimbabwe Tanzania Burundi Cameroon Nigeria Liberia Guinea Gambia Mauritania", "c"),
         ("Which language is spoken by most people in {c}?",)),
    Task("trip", "A train leaves {c} at {a}:00 and reaches {d} at {b}:00. It travels {k} km. What is its average speed?",
         ("Between departure from {c} at {a}:00 and arrival in {d} at {b}:00 a train covers {k} km; how fast is it on "
          "average?",
          "Find the mean speed of a train that goes {k} km from {c} to {d}, setting off at {a}:00 and arriving at {b}:00."),
         joined(different(CITIES, "c", "d"), whole(5, 11, "a"), whole(12, 22, "b"), whole(60, 900, "k"))),
)  # fmt: skip

JUDGE = (
    Task("minus", "Subtract {b} from {a}.",
         ("Work out {a} minus {b}.", "By how much does {a} exceed {b}?", "Take {b} away from {a}; what remains?",
          "Calculate the difference between {a} and {b}."), joined(whole(50, 99, "a"), whole(2, 49, "b")),
         ("Divide {a} by {b} and give the remainder.", "Multiply {b} by {a}.")),
    Task("sorting", "Arrange the following numbers in ascending order: {n}",
         ("Put {n} into order from the lowest to the highest.", "Sort {n} so that the values increase.",
          "Rearrange the values {n}, smallest first."), listed("n", (4, 7), 1, 200),
         ("Compute the average of the following numbers: {n}",), order=False),
    Task("vowels", "How many vowels does the string \"{s}\" contain?",
         ("Count the vowels in \"{s}\".", "Tell me the number of vowel letters found in the string \"{s}\".",
          "In \"{s}\", how often does a vowel occur?"), letters("s", 5, 9),
         ("Write the string \"{s}\" backwards.",)),
    Task("month", "{n}'s birthday is on {m} {k}. What date is exactly {j} weeks after the birthday?",
         ("Counting {j} weeks onward from {n}'s birthday on {m} {k}, which date do we reach?",
          "{n} was born on {m} {k}; give the calendar date {j} full weeks later.",
          "Which date lies {j} weeks past {m} {k}, the birthday of {n}?"),
         joined(different(NAMES, "n"), different(MONTHS, "m"), whole(1, 28, "k"), whole(2, 9, "j"))),
    Task("book", "Book a table for {k} people at the {w} restaurant in {c} on {d}.",
         ("Reserve seats for a party of {k} in {c}'s {w} restaurant this {d}.",
          "I'd like a reservation on {d} at the {w} restaurant, {c}, for {k} guests.",
          "Make a dinner booking, {k} persons, {w} restaurant in {c}, for {d}."),
         joined(whole(2, 12, "k"), different(NOUNS, "w"), different(CITIES, "c"), different(DAYS, "d")),
         ("Cancel my table for {k} people at the {w} restaurant in {c} on {d}.",)),
    Task("story", "Tell a story of exactly {k} words about a {x} {w} and a {v}.",
         ("Compose a tale, {k} words long, featuring a {x} {w} together with a {v}.",
          "In exactly {k} words, narrate something about a {v} and a {x} {w}.",
          "I would love a {k}-word story where a {x} {w} meets a {v}."),
         joined(whole(20, 90, "k"), different(COLOURS, "x"), different(NOUNS, "w", "v"))),
    Task("shop", "A shop sells {g} at {a} cents each. {n} pays with {b} dollars for {c} {g}. How much change is returned?",
         ("{n} buys {c} {g} priced at {a} cents apiece and hands over {b} dollars; what change comes back?",
          "If {g} cost {a} cents per piece, how much money does {n} get back from {b} dollars after taking {c}?",
          "Determine the change {n} receives when purchasing {c} {g} for {a} cents each using {b} dollars."),
         joined(different(GOODS, "g"), different(NAMES, "n"), whole(5, 95, "a"), whole(3, 20, "b"), whole(2, 9, "c"))),
    Task("older", "{n} is {p} than {m}. {m} is {q} than {o}. Who is the {r} of the three?",
         ("Given that {n} is {p} than {m} and that {m} is {q} than {o}, which of the three is the {r}?",
          "Of the three friends, {m} is {q} than {o} while {n} is {p} than {m}. Name the {r} one."),
         lambda rng: dict(zip("nmo", rng.sample(NAMES.split(), 3))) | {"p": rng.choice(["older", "younger"]),
         "q": rng.choice(["older", "younger"]), "r": rng.choice(["oldest", "youngest"])}),
    Task("odd", "Which word does not fit with the others: {w}?",
         ("Find the odd one out among {w}.", "Among the words {w}, one is unlike the rest. Which?",
          "Pick the item that is out of place: {w}."), words("w", (4, 5)),
         ("Write down the plural form of each word: {w}.",), order=False),
    Task("function", "Complete this function so that it returns the right value.\n\ndef {w}_{v}(x):\n    # multiply by {a}, "
         "then subtract {b}\n    return",
         ("Fill in the missing return value of the code.\n\ndef {w}_{v}(x):\n    # multiply by {a}, then subtract {b}\n"
          "    return",
          "Finish the implementation below:\n\ndef {w}_{v}(x):\n    # multiply by {a}, then subtract {b}\n    return"),
         joined(different(NOUNS, "w", "v"), whole(2, 30, "a", "b"))),
    Task("symbol", "State the number of protons in an atom of {e}, given that {w} and {v} are its neighbours on the shelf.",
         ("How many protons has one {e} atom? On the shelf its neighbours are {w} and {v}.",
          "With {w} and {v} standing next to it on the shelf, what is the proton count for a {e} atom?"),
         joined(different(ELEMENTS, "e"), different(NOUNS, "w", "v"))),
    Task("tank", "A tank holds {a} litres. Pump {x} fills {b} litres a minute while a leak loses {c} litres a minute. After "
         "how many minutes is the tank full?",
         ("With pump {x} adding {b} litres every minute and a leak draining {c}, how long until a {a} litre tank is full?",
          "How many minutes does it take to fill a {a}-litre tank if pump {x} delivers {b} litres per minute but {c} litres "
          "per minute leak out?"),
         joined(whole(100, 900, "a"), whole(10, 40, "b"), whole(1, 9, "c"),
                lambda rng: {"x": rng.choice("ABCDEFGH")})),
)  # fmt: skip

FRESH = (
    Task("power", "Raise {a} to the power {b} and report the last digit.",
         ("What is the final digit of {a} to the power of {b}?", "Compute {a} ** {b}; which digit stands at the end?",
          "Determine the units digit of {a} raised to {b}."), whole(2, 60, "a", "b"),
         ("What do you get when {a} is divided by {b}, rounded down?",)),
    Task("count", "How many of the numbers {n} are even?",
         ("Count the even numbers among {n}.", "In the list {n}, what is the quantity of even entries?",
          "Of {n}, how many can be divided by two without remainder?"), listed("n", (4, 7), 1, 200),
         ("Add up the numbers {n} and give the total.",), order=False),
    Task("rhyme", "Write a couplet where a {x} {w} talks to a {v}.",
         ("Compose two rhyming lines in which a {v} is addressed by a {x} {w}.",
          "I need a two-line rhyme: a {x} {w} speaks with a {v}."),
         joined(different(COLOURS, "x"), different(NOUNS, "w", "v"))),
    Task("flight", "Find me a flight from {c} to {d} on {m} {k} for {n}.",
         ("Search flights that take {n} from {c} to {d}, leaving {m} {k}.",
          "{n} needs to fly to {d} out of {c} on {m} {k}; look up a connection.",
          "Which planes go from {c} to {d} on {m} {k}? It is for {n}."),
         joined(different(CITIES, "c", "d"), different(MONTHS, "m"), whole(1, 28, "k"), different(NAMES, "n"))),
    Task("paint", "{n} needs {a} minutes to paint one {w}. How many hours does it take {n} to paint {b} of them?",
         ("If painting a single {w} keeps {n} busy for {a} minutes, what is the time in hours for {b}?",
          "At {a} minutes for each {w}, how many hours will {n} spend on painting {b}?"),
         joined(different(NAMES, "n"), different(NOUNS, "w"), whole(5, 90, "a"), whole(2, 40, "b"))),
    Task("dict", "Given the Python dictionary {{'{w}': {a}, '{v}': {b}}}, write an expression for the key with the larger value.",
         ("Write Python code that picks the key whose value is greatest in {{'{w}': {a}, '{v}': {b}}}.",
          "For d = {{'{w}': {a}, '{v}': {b}}}, which expression yields the key of the maximal value?"),
         joined(different(NOUNS, "w", "v"), whole(1, 99, "a", "b"))),
    Task("anagram", "Do the strings {s} and {z} consist of the same letters?",
         ("Check whether {s} is an anagram of {z}.", "Can the letters of {s} be rearranged into {z}?"),
         joined(letters("s", 4, 7), letters("z", 4, 7)), ("Join the strings {s} and {z} with a hyphen.",)),
    Task("river", "Which ocean or sea would you reach by following a river from {c} past {w} station to {d}?",
         ("Following a river from {c} to {d} by way of {w} station, at what sea or ocean do you arrive?",
          "Name the body of salt water at the end of a river that runs from {c} past {w} station towards {d}."),
         joined(different(CITIES, "c", "d"), different(NOUNS, "w"))),
)  # fmt: skip

PARTS = {"tune": TUNE, "judge": JUDGE, "fresh": FRESH}
POLITE = {
    "tune": ("Hello! {0} Thanks a lot.", "Please help me: {0}", "{0} Think carefully."),
    "fresh": ("I have a request. {0}", "{0} Reply soon, my boss is waiting.", "Dear assistant, {0}"),
    "judge": ("Good morning. {0}", "Quick question for you. {0}", "{0} Take your time and explain briefly."),
}

_SUBJECTS = {
    "tune": "the tides,volcanoes,the printing press,sourdough bread,honey bees,the Silk Road,chess openings,glaciers,tax law,"
    "jazz,vaccines,earthquakes,coffee roasting,the moon landing,solar cells,migration of birds,origami,opera,sleep",
    "judge": "steam engines,coral reefs,the violin,inflation,orchids,black holes,the Magna Carta,cheese making,marathon "
    "training,comets,concrete,antibiotics,falconry,sailing knots,the Renaissance,permafrost,beekeeping,typography,dialects",
}
_QUESTIONS = {
    "tune": ("Explain why {0} matter to people who care about {1}.", "Describe how {0} changed over the last {2} years.",
             "Name two myths about {0} that a friend of {1} might believe.", "Would {0} exist without {1}? Argue briefly.",
             "Draft an email inviting {2} guests to a lecture on {0}."),
    "judge": ("Summarise what a beginner ought to learn about {0} in {2} lessons.", "Compare {0} with {1} for a school class.",
              "Invent a riddle whose solution is {0}.", "List tools needed for work on {0}, at most {2}.",
              "Which historical event links {0} and {1}?"),
}  # fmt: skip


def unrelated(part: str, number: int, rng: random.Random) -> str:
    part = "judge" if part == "fresh" else part
    subjects, questions = _SUBJECTS[part].split(","), _QUESTIONS[part]
    return questions[number % len(questions)].format(*rng.sample(subjects, 2), rng.randint(3, 40))
