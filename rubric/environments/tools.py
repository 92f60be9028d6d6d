"""Function calling: tools declared as JSON schemas, calls read from a reply, results returned as turns of role `tool`.

A call is either of

    <tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>      (Hermes, Qwen)
    <tool name="calculator">6*7</tool>       (arguments as JSON, or the text of a tool's only required argument)

several a reply. What is wrong with a call (JSON that does not parse, an unknown name, arguments against the schema)
comes back as a `tool` turn that says so, and the conversation goes on. A right call of a tool that is only declared,
without a function behind it, is the policy's answer: the conversation is over and the grader reads the call.
What stands before the last </think> is not searched for calls.

A row's `tools` replace those of its domain. Left out: calls in other markup (Llama's <|python_tag|>), and carrying out
the calls of one reply at the same time.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rubric.environments.protocol import Message
from rubric.verify import GRADERS

MOST_CALLS = 8  # a reply; each may cost a process
RESULT_CHARACTERS = 2000
Grader = Callable[[str, object, dict], float]


class Tool(NamedTuple):
    name: str
    description: str
    parameters: dict  # JSON schema of the arguments, an object
    run: Callable[..., str] | None = None  # keyword arguments -> text; None: only declared

    @property
    def schema(self) -> dict:
        """In the form that chat templates take."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class Call(NamedTuple):
    name: str
    arguments: dict
    error: str  # "" where the call can be carried out


def declared(schemas: object, where: str) -> list[Tool]:
    """Tools from JSON schemas, bare ({"name", "parameters"}) or wrapped ({"type": "function", "function": {...}}).

    Raises ValueError, one line that begins with `where`.
    """
    if not isinstance(schemas, list | tuple):
        raise ValueError(f"{where}: tools is {json.dumps(schemas, default=str)[:60]}; expected a list of JSON schemas")
    found = []
    for number, schema in enumerate(schemas):
        place = f"{where}: tools[{number}]"
        bare = schema.get("function", schema) if isinstance(schema, dict) else None
        if not isinstance(bare, dict) or not isinstance(bare.get("name"), str) or not bare["name"]:
            raise ValueError(f'{place} has no name; expected {{"name": ..., "description": ..., "parameters": schema}}')
        parameters = bare.get("parameters") or {"type": "object", "properties": {}}
        if error := _schema_error(json.dumps(parameters, default=str)):
            raise ValueError(f"{place}.parameters is no JSON schema: {error}")
        found.append(Tool(bare["name"], str(bare.get("description") or ""), parameters))
    names = [tool.name for tool in found]
    if len({*names}) < len(names):
        raise ValueError(f"{where}: two tools are named {max(names, key=names.count)!r}; rename one")
    return found


def calls(reply: str, tools: Mapping[str, Tool]) -> list[Call]:
    """The calls of a reply, in order, checked against the tools; at most MOST_CALLS + 1 are read."""
    text, found, at = reply.rpartition("</think>")[2], [], 0
    while len(found) <= MOST_CALLS:
        starts = {mark: text.find(mark, at) for mark in ("<tool_call>", "<tool name=")}
        starts = {mark: start for mark, start in starts.items() if start >= 0}
        if not starts:
            break
        mark = min(starts, key=starts.get)
        read = _hermes if mark == "<tool_call>" else _simple
        call, at = read(text, starts[mark] + len(mark), tools)
        found.append(call)
    return found


def _hermes(text: str, start: int, tools: Mapping[str, Tool]) -> tuple[Call, int]:
    """The call behind <tool_call>, and the position after it."""
    end = text.find("</tool_call>", start)
    if end < 0:
        return Call("", {}, "error: <tool_call> without </tool_call>"), len(text)
    after = end + len("</tool_call>")
    try:
        value = json.loads(text[start:end])
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "too deep")
        return Call("", {}, f"error: the text in <tool_call> is not JSON: {reason}"), after
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call("", {}, 'error: expected {"name": ..., "arguments": {...}} in <tool_call>'), after
    return _checked(value["name"], value.get("arguments", {}), tools), after


def _simple(text: str, start: int, tools: Mapping[str, Tool]) -> tuple[Call, int]:
    """The call behind <tool name=, and the position after it."""
    opened = text.find(">", start)
    end = text.find("</tool>", opened)
    if opened < 0 or end < 0:
        return Call("", {}, "error: <tool name=...> without </tool>"), len(text)
    name, body = text[start:opened].strip().strip("\"'"), text[opened + 1 : end].strip()
    after = end + len("</tool>")
    try:
        arguments = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        argument = _only_text_argument(tools.get(name))
        if argument is None and name in tools:
            return Call(name, {}, f"error: expected the arguments of {name} as a JSON object"), after
        arguments = {argument: body}
    return _checked(name, arguments, tools), after


def _only_text_argument(tool: Tool | None) -> str | None:
    """The one argument that plain text can be."""
    properties = tool.parameters.get("properties", {}) if tool else {}
    names = tool.parameters.get("required") or [*properties] if tool else []
    return names[0] if len(names) == 1 and properties.get(names[0], {}).get("type") == "string" else None


def _checked(name: str, arguments: object, tools: Mapping[str, Tool]) -> Call:
    """The call with what is wrong with it."""
    if name not in tools:
        return Call(name, {}, f"error: no tool is named {name[:40]!r}; there is {', '.join(tools) or 'none'}")
    if isinstance(arguments, str):  # OpenAI's form: JSON in a string
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            pass
    if not isinstance(arguments, dict):
        return Call(name, {}, f"error: the arguments of {name} are no JSON object")
    error = _first_error(tools[name].parameters, arguments)
    return Call(name, arguments, f"error: {name}: {error}" if error else "")


def _first_error(schema: dict, arguments: dict) -> str:
    """What is wrong with arguments, "" for nothing. A name that the schema lacks is wrong unless it allows others."""
    unknown = [name for name in arguments if name not in schema.get("properties", {})]
    if unknown and not schema.get("additionalProperties") and not schema.get("patternProperties"):
        return f"has no argument {unknown[0][:40]!r}; it has {', '.join(schema.get('properties', {})) or 'none'}"
    error = _jsonschema().exceptions.best_match(_jsonschema().Draft202012Validator(schema).iter_errors(arguments))
    if error is None:
        return ""
    place = ".".join(map(str, error.absolute_path))
    return " ".join(f"{place}{': ' if place else ''}{error.message}".split())[:200]


@functools.lru_cache(maxsize=256)  # rows mostly share their tools
def _schema_error(schema: str) -> str:
    """What is wrong with a JSON schema, given as JSON."""
    jsonschema = _jsonschema()
    try:
        jsonschema.Draft202012Validator.check_schema(json.loads(schema))
    except jsonschema.SchemaError as error:
        return " ".join(error.message.split())[:120]
    return ""


def _jsonschema():
    try:
        import jsonschema.exceptions
    except ModuleNotFoundError as error:
        raise ValueError("tools need jsonschema: pip install jsonschema") from error
    return jsonschema


class ToolEnvironment:
    """Answers calls of tools; the last reply is graded by a grader of single replies.

    A conversation that ends in a call, cut off by the limit of turns, has no answer and gets 1, unless the grader reads
    calls.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        grader: str,
        known: Mapping[str, Tool],
        meta: dict | None = None,
        shown: bool = True,
    ):
        """`known`: tools with a function, by name, that a row may declare; `grader`: a key of verify.GRADERS; `shown`:
        whether prompts list the tools."""
        self._tools, self._grader, self._known, self._meta = {t.name: t for t in tools}, grader, known, meta or {}
        self._shown = shown

    @property
    def tools(self) -> list[dict]:
        return [tool.schema for tool in self._tools.values()] if self._shown else []

    def of_row(self, row: Mapping) -> "ToolEnvironment":
        tools = [*self._tools.values()]
        if row.get("tools"):
            tools = declared(row["tools"], f"row {row.get('key') or row.get('answer')!r}"[:60])
            tools = [
                tool._replace(run=self._known[tool.name].run) if tool.name in self._known else tool for tool in tools
            ]
        return ToolEnvironment(tools, self._grader, self._known, row.get("meta"), self._shown)

    def interact(self, messages: Sequence[Message]) -> list[Message]:
        found = calls(messages[-1]["content"], self._tools)
        if all(not call.error and self._tools[call.name].run is None for call in found):
            return []
        answers = [self._answer(call) for call in found[:MOST_CALLS]]
        if len(found) > MOST_CALLS:
            answers.append(f"error: more than {MOST_CALLS} calls in one reply; the others were not carried out")
        return [{"role": "tool", "content": answer} for answer in answers]

    def _answer(self, call: Call) -> str:
        if call.error:
            return call.error
        run = self._tools[call.name].run
        if run is None:
            return f"error: {call.name} gives no result here; call it alone, as your answer"
        try:
            text = run(**call.arguments)
        except (ValueError, TypeError) as error:
            text = f"error: {' '.join(str(error).split())}"
        return text if len(text) <= RESULT_CHARACTERS else text[:RESULT_CHARACTERS] + " (cut)"

    def grade(self, messages: Sequence[Message], answer: object) -> float:
        reply = messages[-1]["content"]
        if self._grader != "json_call" and calls(reply, self._tools):
            return 1.0
        return float(GRADERS[self._grader](reply, answer, self._meta))
