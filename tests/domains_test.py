"""Reading, checking and ordering of domains. Every malformed file names its line."""

import csv
import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from curriculum.domains import DomainConfig, check, first_gap, level_ends, load, shuffled
from curriculum.sources import GENERATORS, read

ROOT = Path(__file__).parent.parent
USER = {"role": "user", "content": "2 + 2?"}
ROW = {"messages": [USER], "answer": "4"}
TURNS = {
    "messages": [{"role": "system", "content": "Add."}, USER, {"role": "assistant", "content": "4"}, USER],
    "answer": ["4", "four"],
    "meta": {"separator": ", "},
    "key": "2 + 2",
}


def write(folder: Path, name: str, text: str | bytes) -> str:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def test_json_forms_read_alike(tmp_path):
    tools = [{"name": "f", "parameters": {"type": "object"}}]
    rows = [ROW, TURNS, ROW, {**ROW, "answer": {"name": "f", "arguments": {}}, "tools": tools}]
    sources = [
        write(tmp_path, "a.json", json.dumps(rows)),
        write(tmp_path, "b.json", "\ufeff" + json.dumps(rows, indent=3).replace("\n", "\r\n")),
        write(tmp_path, "c.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\r\n"),
        write(tmp_path, "d.jsonl", "\n".join(json.dumps({**row, "source": "web"}, ensure_ascii=False) for row in rows)),
    ]
    assert [read(source, tmp_path) for source in sources] == [rows] * 4
    assert read(str(tmp_path / "a.json")) == rows


def test_json_text_keeps_line_separators(tmp_path):
    row = {"messages": [{"role": "user", "content": "a\u2028b"}], "answer": "\u2028"}
    write(tmp_path, "a.jsonl", json.dumps(row, ensure_ascii=False))
    assert read("a.jsonl", tmp_path) == [row]


def test_prompts_of_other_trainers_read_as_messages(tmp_path, capsys):
    from pyarrow import Table, parquet

    text, turns = {"prompt": "2 + 2?", "answer": "4"}, {"prompt": [USER], "answer": "4"}
    verl = {"data_source": "sums", "prompt": [USER], "ability": "math", "extra_info": {"index": 7, "split": "train"}}
    verl["reward_model"] = {"style": "rule", "ground_truth": "4"}
    for name, rows in (("text", [text]), ("trl", [turns]), ("verl", [verl]), ("both", [text, turns, ROW])):
        write(tmp_path, f"{name}.jsonl", "\n".join(map(json.dumps, rows)))
        write(tmp_path, f"{name}.json", json.dumps(rows))
        assert read(f"{name}.jsonl", tmp_path) == read(f"{name}.json", tmp_path) == [ROW] * len(rows), name
    for name, row in (("trl", turns), ("verl", verl)):
        parquet.write_table(Table.from_pylist([row, row]), tmp_path / f"{name}.parquet")
        assert read(f"{name}.parquet", tmp_path) == [ROW] * 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in said] == [f"verl.{end}" for end in ("jsonl", "json", "parquet")]
    assert "verl.parquet: the rows' data_source, ability, extra_info are not read; what a grader" in said[-1]


def test_fields_that_nobody_reads_are_named_once_a_file(tmp_path, capsys):
    rows = [{**ROW, "solution": "by hand", "id": 1}, {**ROW, "level": 3, "meta": {"a": 1}}, {**TURNS, "prompt": "x"}]
    write(tmp_path, "own.jsonl", "\n".join(map(json.dumps, rows)))
    for _ in range(2):
        assert read("own.jsonl", tmp_path) == [ROW, {**ROW, "meta": {"a": 1}}, TURNS]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "own.jsonl: the rows' solution, id, level, prompt are not read" in said
    write(tmp_path, "plain.jsonl", json.dumps({**ROW, "key": "k"}))
    read("plain.jsonl", tmp_path)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3, "answer": "4"}, "prompt is 3; expected text, or a list of"),
        ({"prompt": [{"role": "user"}], "answer": "4"}, r"prompt\[0\].content is missing; expected text"),
        ({"prompt": " ", "answer": "4"}, "the last message is .*; expected one of the user's, with text"),
        ({"prompt": "2 + 2?", "reward_model": {"style": "rule"}}, "answer is missing"),
        ({"prompt": "2 + 2?", "solution": "4"}, "answer is missing"),
    ],
)
def test_a_prompt_that_cannot_be_read_names_its_field(tmp_path, row, message):
    write(tmp_path, "a.jsonl", json.dumps(row))
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: {message}"):
        read("a.jsonl", tmp_path)


def test_tables_read_alike(tmp_path):
    from pyarrow import Table, parquet

    write(tmp_path, "a.csv", 'question,answer,id\n"2 + 2?",4,7\r\n')
    write(tmp_path, "b.csv", 'answer,prompt,meta,key\n4,"2 + 2?","",\n')
    write(tmp_path, "c.csv", "messages,answer\n" + '"' + json.dumps([USER]).replace('"', '""') + '",4\n')
    parquet.write_table(Table.from_pylist([{"prompt": "2 + 2?", "answer": "4"}]), tmp_path / "d.parquet")
    parquet.write_table(Table.from_pylist([ROW]), tmp_path / "e.parquet")
    for name in ("a.csv", "b.csv", "c.csv", "d.parquet", "e.parquet"):
        assert read(name, tmp_path) == [ROW], name
    write(
        tmp_path, "f.csv", 'prompt,answer,meta,key,tools\nq,"1, 2","{""separator"": "", ""}",k,"[{""name"": ""f""}]"\n'
    )
    (row,) = read("f.csv", tmp_path)
    assert row["answer"] == "1, 2" and row["meta"] == {"separator": ", "} and row["key"] == "k"
    assert row["tools"] == [{"name": "f"}]


def table_of(folder: Path, row: dict) -> str:
    with (folder / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([row, row.values()])
    return "a.csv"


@pytest.mark.parametrize("column", ["messages", "prompt", "question"])
def test_a_cell_may_hold_a_list_of_messages(column, tmp_path):
    assert read(table_of(tmp_path, {column: json.dumps(TURNS["messages"]), "answer": "4"}), tmp_path) == [
        {"messages": TURNS["messages"], "answer": "4"}
    ]
    named = json.dumps([{"name": "Ann", "content": "[{}]", "role": "user"}])
    (row,) = read(
        table_of(tmp_path, {column: named, "answer": "4", "question": str([USER])} | {column: named}), tmp_path
    )
    assert row["messages"] == [{"role": "user", "content": "[{}]"}]
    with pytest.raises(ValueError, match=rf"a.csv:2: column {column} is not JSON: Expecting property name"):
        read(table_of(tmp_path, {column: str([USER]), "answer": "4"}), tmp_path)  # as pandas writes it


@pytest.mark.parametrize("text", ["[{1, 2}, {3}]: how many sets?", '[{"a": 1}]', "[{", "[1]", '{"role": "user"}'])
def test_a_prompt_with_brackets_is_text(text, tmp_path):
    (row,) = read(table_of(tmp_path, {"prompt": text, "answer": "2"}), tmp_path)
    assert row["messages"] == [{"role": "user", "content": text}]


def test_a_cell_may_hold_a_reward_model(tmp_path):
    model = json.dumps({"style": "rule", "ground_truth": "4"})
    asked = {"prompt": "2 + 2?"}
    assert read(table_of(tmp_path, {**asked, "reward_model": model}), tmp_path) == [ROW]
    assert read(table_of(tmp_path, {**asked, "reward_model": model, "answer": ""}), tmp_path) == [ROW]
    assert read(table_of(tmp_path, {**asked, "reward_model": "mine-7b", "answer": "4"}), tmp_path) == [ROW]
    with pytest.raises(ValueError, match=r"a.csv:2: column reward_model is not JSON: Expecting value at character 1"):
        read(table_of(tmp_path, {**asked, "reward_model": "mine-7b"}), tmp_path)


GOOD = json.dumps(ROW)
MALFORMED = [
    ("a.json", f"[\n{GOOD},\n\n3]", ":4: the row is 3; expected an object"),
    ("a.json", f'[\n{GOOD},\n{{"answer": "4"}}\n]', ":3: messages is missing"),
    ("a.json", f'[{GOOD},\n{{"messages": [],\n"answer": "4"}}]', ":2: messages is []"),
    ("a.json", f"[\n{GOOD},\n{{'x': 1}}]", ":3: not JSON: Expecting property name"),
    ("a.json", f"[{GOOD},\n]", ":2: not JSON: Expecting value"),
    ("a.json", f"[{GOOD}\n{GOOD}]", ':2: not JSON: "{" after a row; expected a comma or ]'),
    ("a.json", f"[{GOOD}", ':1: not JSON: "" after a row'),
    ("a.json", f"[{GOOD}]\n\nx", ":3: not JSON: text after the list"),
    ("a.json", f"\n{GOOD}", ":2: the file is no JSON list"),
    ("a.json", "", ":1: the file is no JSON list"),
    ("a.json", "[]", "a.json: no rows"),
    ("a.json", b'[\n"\xff"]', ":2: byte 0xff is not UTF-8"),
    ("a.jsonl", "\n \n", "a.jsonl: no rows"),
    ("a.jsonl", f"{GOOD}\n\n{GOOD[:-1]}", ":3: not JSON: Expecting ',' delimiter"),
    ("a.jsonl", f"{GOOD}\n{GOOD} {GOOD}", ":2: not JSON: text after the row"),
    ("a.jsonl", GOOD.replace("user", "human"), ':1: messages[0].role is "human"; expected one of system, user'),
    ("a.jsonl", GOOD.replace("user", "assistant"), ":1: the last message is {"),
    ("a.jsonl", GOOD.replace('"2 + 2?"', "null"), ":1: messages[0].content is missing; expected text"),
    ("a.jsonl", GOOD.replace("2 + 2?", " "), ":1: the last message is {"),
    ("a.jsonl", '{"messages": ["hi"], "answer": 1}', ':1: messages[0] is "hi"'),
    ("a.jsonl", '{"messages": "hi", "answer": 1}', ':1: messages is "hi"'),
    ("a.jsonl", GOOD.replace("answer", "answers"), ":1: answer is missing; expected text, a list of texts, or JSON"),
    ("a.jsonl", GOOD.replace('"4"', '""'), ':1: answer is ""'),
    ("a.jsonl", GOOD[:-1] + ', "meta": 3}', ":1: meta is 3; expected an object"),
    ("a.jsonl", GOOD[:-1] + ', "tools": {}}', ":1: tools is {}; expected a list"),
    ("a.jsonl", GOOD[:-1] + ', "key": 3}', ":1: key is 3; expected text"),
    ("a.jsonl", GOOD.encode() + b"\n" + GOOD.replace("4", "\xe9").encode("latin-1"), ":2: byte 0xe9 is not UTF-8"),
    ("a.csv", "q,answer\n1,2\n", ":1: the columns are q, answer; expected answer and one of messages, prompt"),
    ("a.csv", 'prompt,answer\n"two\nlines",1\nlast\n', ":4: 1 fields; expected 2: prompt, answer"),
    ("a.csv", 'prompt,answer\n"two\nlines",1\n\n"two\nlines",\n', ":5: answer is missing"),
    ("a.csv", "prompt,answer\n,1\n", ":2: prompt is missing; expected text"),
    ("a.csv", 'messages,answer\n"[{",1\n', ":2: column messages is not JSON: Expecting property name"),
    ("a.csv", 'prompt,answer\n1,2\n"open,1\n', ":3: not CSV: unexpected end of data"),
    ("a.csv", "prompt,answer\n", "a.csv: no rows"),
    ("a.parquet", "PAR", "a.parquet: not parquet: "),
    ("a.txt", "x", "source 'a.txt': expected a .json, .jsonl, .csv, .parquet file, split@hub-name, or gen:NAME"),
]


@pytest.mark.parametrize("name,text,message", MALFORMED)
def test_malformed_rows_name_their_line(tmp_path, name, text, message):
    with pytest.raises(ValueError) as error:
        read(write(tmp_path, name, text), tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path)) == message.startswith(":") or name in str(error.value)


def test_missing_file_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.json: no such file; relative paths are taken from "):
        read("x.json", tmp_path)


def test_parquet_rows_are_numbered(tmp_path):
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"prompt": "a", "answer": "b"}, {"prompt": "c"}]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet:row 2: answer is missing"):
        read("a.parquet", tmp_path)


def test_hub_data_sets(monkeypatch):
    class Table(list):
        column_names = ("question", "answer")

    def load_dataset(name, split):
        if name != "school/sums":
            raise ConnectionError("no route\nto host")
        return Table([{"question": "2 + 2?", "answer": "4"}, {"question": "1?", "answer": None}][: 1 if split else 2])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read("train@school/sums") == [ROW]
    with pytest.raises(ValueError, match=r"source 'train@other': the hub did not give it \(no route\); download it"):
        read("train@other")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read("train@school/sums")


FINE = DomainConfig("a", train="gen:copy", test="gen:copy,split=test")


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"train": None}, "domains[1].train=None: give a source of training rows, or set eval_only: true"),
        ({"test": None}, "domains[1].test=None: give a source of held-out rows"),
        ({"name": "a"}, "domains[1].name='a': domains[0] has this name, rename one"),
        ({"name": ""}, "domains[1].name='': metrics carry the name, give one"),
        ({"weight": 0.0}, "domains[1].weight=0.0: must be above 0; for share 0 set eval_only: true"),
        ({"weight": float("nan")}, "domains[1].weight=nan: must be above 0"),
        ({"arrives": -1}, "domains[1].arrives=-1: must be a step, 0 or more"),
        ({"arrives": 2**31}, "domains[1].arrives=2147483648: must be a step"),
        ({"arrives": 5, "retires": 4}, "domains[1].retires=4: must be a step from arrives=5 on, or left out"),
        ({"retires": 2**31 - 1}, "domains[1].retires=2147483647: must be a step"),
        (
            {"test": "gen:sort,split=test"},
            "domains[1].environment='eq': the rows of gen:sort,split=test are made for list",
        ),
    ],
)
def test_impossible_values_name_their_key(changed, message):
    second = DomainConfig(**{"name": "b", "train": "gen:copy", "test": "gen:copy,split=test", **changed})
    for function in (check, load):
        with pytest.raises(ValueError) as error:
            function([FINE, second])
        assert message in str(error.value) and "\n" not in str(error.value)


def test_load(tmp_path):
    write(tmp_path, "a.json", json.dumps([ROW]))
    configs = [FINE, DomainConfig("b", test="a.json", eval_only=True), DomainConfig("c", train="a.json", test="a.json")]
    domains = load(configs, tmp_path)
    assert [domain.name for domain in domains] == ["a", "b", "c"] and [domain.config for domain in domains] == configs
    assert [len(domain.train_rows) for domain in domains] == [2000, 0, 1]
    assert [len(domain.test_rows) for domain in domains] == [256, 1, 1]


def test_levels_are_kept_apart_where_difficulty_adapts(tmp_path):
    write(tmp_path, "a.json", json.dumps([ROW]))
    ranged = DomainConfig(
        "a", train="gen:sort,difficulty=2..4,size=9", test="gen:sort,split=test,size=5", environment="list"
    )
    configs = [
        ranged,
        DomainConfig("b", train="a.json", test="a.json"),
        DomainConfig("c", test="a.json", eval_only=True),
    ]
    fixed, adaptive = load(configs, tmp_path), load(configs, tmp_path, adaptive=True)
    assert [{k: len(rows) for k, rows in d.train_levels.items()} for d in adaptive] == [
        {2: 9, 3: 9, 4: 9},
        {1: 1},
        {1: 0},
    ]
    assert [{k: len(rows) for k, rows in d.train_levels.items()} for d in fixed] == [{2: 27}, {1: 1}, {1: 0}]
    assert [d.test_rows for d in fixed] == [d.test_rows for d in adaptive]  # what is measured stays
    assert sorted(map(json.dumps, fixed[0].train_rows)) == sorted(map(json.dumps, adaptive[0].train_rows))
    assert [level_ends(config) for config in configs] == [(2, 4), (1, 1), (1, 1)]


@pytest.mark.parametrize(
    "spans,gap",
    [
        ([(0, None)], None),
        ([(0, 4), (4, None)], None),
        ([(0, 4), (2, 9)], 9),
        ([(3, None), (0, 2)], 2),
        ([(1, None)], 0),
        ([(0, 9), (2, 4), (5, 6)], 9),
        ([(0, 0), (0, 3)], 3),
    ],
)
def test_the_first_step_without_a_domain_to_train_on(spans, gap):
    configs = [dataclasses.replace(FINE, name=str(i), arrives=a, retires=r) for i, (a, r) in enumerate(spans)]
    check(configs)
    assert first_gap([*configs, DomainConfig("seen", test="a.json", eval_only=True)]) == gap


@pytest.mark.parametrize("group", ["tiny", "bench12"])
def test_yaml_groups_load(group):
    """Shapes a run counts on: enough rows, an environment that grades them, train and test apart."""
    entries = yaml.safe_load((ROOT / "configs/domains" / f"{group}.yaml").read_text())["domains"]
    configs = [DomainConfig(**entry) for entry in entries]
    for config, domain in zip(configs, load(configs), strict=True):
        assert config.environment == GENERATORS[config.name].environment
        assert not {row["key"] for row in domain.train_rows} & {row["key"] for row in domain.test_rows}
        assert len(domain.test_rows) == 64 if group == "tiny" else 24 <= len(domain.test_rows) <= 256
        assert len(domain.train_rows) == 2000 or group == "bench12"
    assert len(configs) == {"tiny": 8, "bench12": 12}[group]


def order(size: int, seed: int, name: str, start: int, stop: int) -> list[int]:
    dataset = shuffled([{"answer": i} for i in range(size)], seed, name)
    return [dataset[i]["answer"] for i in range(start, stop)]


def test_every_epoch_is_a_permutation_of_its_own():
    epochs = [order(50, 0, "sums", 50 * e, 50 * e + 50) for e in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_order_is_a_function_of_seed_domain_and_position():
    first = order(50, 0, "sums", 0, 150)
    assert order(50, 0, "sums", 120, 130) == first[120:130]
    others = [order(50, 0, "sort", 0, 150), order(50, 1, "sums", 0, 150), first[50:] + order(50, 0, "sums", 150, 200)]
    assert all(sum(a == b for a, b in zip(first, other)) < 15 for other in others)  # by chance 150 / 50 = 3


def test_order_is_the_same_in_another_process():
    """hash() of a text would differ here."""
    code = (
        "from curriculum.domains import shuffled\n"
        "ds = shuffled([{'answer': i} for i in range(50)], 0, 'sums')\n"
        "print([ds[i]['answer'] for i in range(100, 110)])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == order(50, 0, "sums", 100, 110)


def test_one_row_and_no_rows():
    assert order(1, 0, "sums", 0, 3) == [0, 0, 0]
    with pytest.raises(ValueError, match="domain 'sums' has no rows"):
        shuffled([], 0, "sums")


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "curriculum.domains", *arguments]
    return subprocess.run(line, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_command_writes_a_generator_to_a_file_that_reads_back(tmp_path):
    done = command("gen:sort,difficulty=2,split=test,size=9", "--head", "5", folder=tmp_path)
    write(tmp_path, "a.jsonl", done.stdout)
    assert done.returncode == 0 and read("a.jsonl", tmp_path) == read("gen:sort,difficulty=2,split=test,size=5")


def test_command_ends_with_one_line_and_2(tmp_path):
    write(tmp_path, "a.jsonl", "{}")
    done = command("a.jsonl", folder=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: a.jsonl:1: messages is missing; expected a list of {role, content}, the user's last\n"
