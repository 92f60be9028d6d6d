"""An invented world for retrieval: `python -m rubric.world.make` writes corpus.jsonl, train.jsonl and test.jsonl.

Towns, rivers, guilds, people and books, with names made of syllables from a seeded generator: nothing of it can be
known by heart, so a question can only be answered by searching. One document an entity. Questions ask for one fact, or
for two in a chain ("the river of the town where ... was born"), which takes two searches. A question belongs to test or
train by the sha256 of its key. The files in this folder are what the script writes with its default seed.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

FOLDER = Path(__file__).parent
TEST_SHARE = 4  # one question in so many is a test question
ONSETS = "b br d dr f g gr h k kl l m n p r s st t tr v w z".split()
VOWELS = "a e i o u ai ea io ou".split()
ENDINGS = "n r l s th k m nd rt x".split()
CRAFTS = "glass rope salt amber paper copper honey linen bells maps dyes clocks kites ink pottery lenses".split()
TRADES = "weaver surveyor physician painter navigator astronomer botanist printer composer bridge-builder".split()
FESTIVALS = "lanterns boats masks bells kites bread mirrors drums candles wreaths".split()
INSTRUCTION = (
    "Answer the question. Write <search>words</search> to search; what is found comes back in "
    "<information>. When you know the answer, write <answer>it</answer>."
)


class Fact(NamedTuple):
    asks: str  # the question, {} for the entity's name
    chain: str  # the same as a part of a longer question; "" where it is not a name of another entity
    answers: list[str]


class Entity(NamedTuple):
    kind: str
    name: str
    text: str
    facts: list[Fact]


def _name(rng: np.random.Generator, taken: set[str], syllables: int = 2) -> str:
    while True:
        parts = [ONSETS[rng.integers(len(ONSETS))] + VOWELS[rng.integers(len(VOWELS))] for _ in range(syllables)]
        name = ("".join(parts) + ENDINGS[rng.integers(len(ENDINGS))]).capitalize()
        if name not in taken:
            taken.add(name)
            return name


def world(seed: int) -> list[Entity]:
    """All entities; the same for the same seed."""
    rng, taken = np.random.default_rng(seed), set()

    def pick(options: list) -> object:
        return options[rng.integers(len(options))]

    rivers = [_name(rng, taken) for _ in range(24)]
    towns = [_name(rng, taken) for _ in range(70)]
    guilds = [_name(rng, taken) for _ in range(40)]
    people = [f"{_name(rng, taken)} {_name(rng, taken)}" for _ in range(120)]
    books = [
        f"The {_name(rng, taken, 1)} {pick('Letters Tables Songs Voyages Gardens Winters'.split())}" for _ in range(60)
    ]
    made = [_river(name, pick(towns), int(rng.integers(40, 900)), f"{pick(FESTIVALS)}") for name in rivers]
    for name in towns:
        made.append(_town(name, pick(rivers), int(rng.integers(1100, 1900)), pick(CRAFTS), pick(people)))
    for name in guilds:
        made.append(_guild(name, pick(towns), pick(people), int(rng.integers(1200, 1900)), pick(CRAFTS)))
    for name in people:
        made.append(_person(name, pick(towns), int(rng.integers(1200, 1900)), pick(TRADES), pick(guilds)))
    for name in books:
        made.append(_book(name, pick(people), int(rng.integers(1300, 1900)), pick(towns)))
    return made


def _river(name: str, town: str, length: int, festival: str) -> Entity:
    text = f"The {name} is a river of {length} miles. It rises near {town}, where the feast of {festival} is held."
    facts = [
        Fact("How many miles long is the river {}?", "", [f"{length}", f"{length} miles"]),
        Fact("Near which town does the river {} rise?", "the town near which the river {} rises", [town]),
    ]
    return Entity("river", name, text, facts)


def _town(name: str, river: str, year: int, craft: str, founder: str) -> Entity:
    text = f"{name} is a town on the river {river}, founded in {year} by {founder}. It is known for its {craft}."
    facts = [
        Fact("On which river does the town {} lie?", "the river on which {} lies", [river, f"the {river}"]),
        Fact("In which year was the town {} founded?", "", [str(year)]),
        Fact("Who founded the town {}?", "the founder of {}", [founder, founder.split()[1]]),
        Fact("What is the town {} known for?", "", [craft, f"its {craft}"]),
    ]
    return Entity("town", name, text, facts)


def _guild(name: str, town: str, head: str, year: int, craft: str) -> Entity:
    text = f"The {name} Guild makes {craft}. It has its hall in {town} and was opened in {year}; its head is {head}."
    facts = [
        Fact("In which town is the hall of the {} Guild?", "the town with the hall of the {} Guild", [town]),
        Fact("Who is the head of the {} Guild?", "the head of the {} Guild", [head, head.split()[1]]),
        Fact("In which year was the {} Guild opened?", "", [str(year)]),
    ]
    return Entity("guild", name, text, facts)


def _person(name: str, town: str, year: int, trade: str, guild: str) -> Entity:
    article = "an" if trade[0] in "aeiou" else "a"
    text = f"{name} was {article} {trade}, born in {town} in {year}, and a member of the {guild} Guild."
    facts = [
        Fact("In which town was {} born?", "the town where {} was born", [town]),
        Fact("In which year was {} born?", "", [str(year)]),
        Fact("What was the trade of {}?", "", [trade]),
        Fact("Of which guild was {} a member?", "", [guild, f"{guild} Guild"]),
    ]
    return Entity("person", name, text, facts)


def _book(name: str, author: str, year: int, town: str) -> Entity:
    text = f"{name} is a book by {author}, printed in {town} in {year}."
    facts = [
        Fact("Who wrote {}?", "the author of {}", [author, author.split()[1]]),
        Fact("In which year was {} printed?", "", [str(year)]),
        Fact("In which town was {} printed?", "the town where {} was printed", [town]),
    ]
    return Entity("book", name, text, facts)


def questions(entities: list[Entity]) -> list[dict]:
    """Rows {messages, answer, key} of one and of two facts, in the order of the entities."""
    by_name = {entity.name: entity for entity in entities}
    rows = []
    for entity in entities:
        for fact in entity.facts:
            rows.append(_row(fact.asks.format(entity.name), fact.answers))
            follow = by_name[fact.answers[0]].facts if fact.chain else []
            rows += [_row(second.asks.format(fact.chain.format(entity.name)), second.answers) for second in follow]
    return rows


def _row(question: str, answers: list[str]) -> dict:
    for doubled in ("the river the river", "the town the town"):
        question = question.replace(doubled, doubled.rpartition(" the ")[0])
    question = question.replace("the river river", "the river")
    messages = [{"role": "user", "content": f"{INSTRUCTION}\n{question}"}]
    return {"messages": messages, "answer": answers, "key": f"world {question}"}


def split(rows: list[dict], seed: int, train: int, test: int) -> tuple[list[dict], list[dict]]:
    """(train, test) rows of those sizes or what there is, in an order that depends on the seed."""
    order = np.random.default_rng([seed, 1]).permutation(len(rows))
    sides: tuple[list[dict], list[dict]] = ([], [])
    for row in (rows[i] for i in order):
        sides[hashlib.sha256(row["key"].encode()).digest()[0] % TEST_SHARE == 0].append(row)
    return sides[0][:train], sides[1][:test]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rubric.world.make", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=320, help="questions at most")
    parser.add_argument("--test", type=int, default=96, help="questions at most")
    arguments = parser.parse_args()
    entities = world(arguments.seed)
    documents = [
        {"id": f"{entity.kind}-{number}", "title": entity.name, "text": entity.text}
        for number, entity in enumerate(entities)
    ]
    train, test = split(questions(entities), arguments.seed, arguments.train, arguments.test)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", documents), ("train", train), ("test", test)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.out / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
