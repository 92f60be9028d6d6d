"""The forms that a user's row may have, read as one: {"messages", "answer", "meta"?, "tools"?, "key"?}.

    {"messages": [{"role", "content"}, ...], "answer": ...}
    {"prompt": "text", "answer": ...}                        `question` for `prompt` too; a message of the user's
    {"prompt": [{"role", "content"}, ...], "answer": ...}    as TRL has it
    {"prompt": [...], "reward_model": {"ground_truth": ...}} as verl has it

The first of `messages`, `prompt`, `question` that is there is read, and `answer` before `reward_model`. In a table
lists and objects may be JSON text.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from curriculum.generators import Row

ROLES = ("system", "user", "assistant", "tool")
PROMPTS = ("messages", "prompt", "question")  # fields that can hold what is asked, the first present is read
_LISTED = re.compile(r"""\s*\[\s*\{.*["']role["']\s*:""", re.DOTALL)  # in Python's quotes too, which are refused
OPTIONAL = (("meta", dict, "an object"), ("tools", list, "a list"), ("key", str, "text"))


def as_row(raw: Any, where: str) -> Row:
    """`raw` as a row with the contract's fields only, or ValueError that begins with `where`."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: the row is {what(raw)}; expected an object {{messages, answer}}")
    row: Row = {"messages": _asked(raw, where), "answer": _answer(raw)}
    if row["answer"] in (None, "", []):
        raise ValueError(f"{where}: answer is {what(row['answer'])}; expected text, a list of texts, or JSON")
    for field, kind, expected in OPTIONAL:
        if (value := raw.get(field)) is not None:
            if not isinstance(value, kind):
                raise ValueError(f"{where}: {field} is {what(value)}; expected {expected}")
            row[field] = value
    return row


def unread(raw: dict) -> list[str]:
    """The fields of a row that as_row drops."""
    read = {_column(raw), "answer", *(field for field, _, _ in OPTIONAL)}
    if raw.get("answer") is None:
        read.add("reward_model")
    return [field for field, value in raw.items() if field not in read and value is not None]


def _column(raw: dict) -> str:
    """The field that holds what is asked."""
    there = [name for name in PROMPTS if name in raw]
    return next((name for name in there if raw[name] is not None), there[0] if there else "messages")


def _answer(raw: dict) -> Any:
    answer, model = raw.get("answer"), raw.get("reward_model")
    return model.get("ground_truth") if answer is None and isinstance(model, dict) else answer


def _asked(raw: dict, where: str) -> list[dict[str, str]]:
    column = _column(raw)
    asked = raw.get(column)
    if column != "messages" and not isinstance(asked, list):
        if not isinstance(asked, str):
            raise ValueError(f"{where}: {column} is {what(asked)}; expected text, or a list of {{role, content}}")
        asked = [{"role": "user", "content": asked}]
    return _messages(asked, where, column)


def _messages(messages: Any, where: str, column: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{where}: {column} is {what(messages)}; expected a list of {{role, content}}, the user's last"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{where}: {column}[{i}] is {what(message)}; expected an object {{role, content}}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"{where}: {column}[{i}].role is {what(role)}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"{where}: {column}[{i}].content is {what(content)}; expected text")
    if role != "user" or not content.strip():
        raise ValueError(f"{where}: the last message is {what(messages[-1])}; expected one of the user's, with text")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def columns_fit(names: Iterable[str], where: str) -> None:
    """Raises ValueError where a table cannot hold rows."""
    if not {"answer", "reward_model"} & set(names) or not set(PROMPTS) & set(names):
        raise ValueError(
            f"{where}: the columns are {', '.join(names)}; expected answer and one of {', '.join(PROMPTS)}"
        )


def tabular(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """A table's row in the form of JSON's: JSON text becomes what it says, a prompt where it is a list of messages."""
    row = dict(raw)
    for field in ("messages", "prompt", "question", "meta", "tools", "reward_model"):
        if isinstance(row.get(field), str) and _is_json(field, row):
            try:
                row[field] = json.loads(row[field])
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: column {field} is not JSON: {error.msg} at character {error.pos + 1}"
                ) from error
    return row


def _is_json(field: str, row: dict[str, Any]) -> bool:
    """Whether a column's text is to be JSON."""
    if field in ("prompt", "question"):
        return field == _column(row) and bool(_LISTED.match(row[field]))  # what is not read may be any text
    return field != "reward_model" or row.get("answer") is None


def what(value: Any) -> str:
    """A value in an error message: short, on one line."""
    text = "missing" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
