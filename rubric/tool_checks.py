"""Checks of JSON: a reply against a schema, function calls against their tools' schemas (JSON Schema 2020-12).

Left out: references to schemas elsewhere, which are never fetched.
"""

import json
from collections.abc import Mapping

from rubric.reading import json_objects, need

Found = tuple[float, dict[str, float]]

JSON_ONLY = 1 / 3  # score of JSON that the schema does not allow


def _valid(value: object, schema: Mapping) -> bool:
    """Raises ValueError on a schema that is none."""
    try:
        import jsonschema
        import referencing
    except ImportError as error:
        raise ValueError("checks of JSON schemas need the package: pip install jsonschema") from error
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
        return kind(schema, registry=referencing.Registry()).is_valid(value)
    except (jsonschema.SchemaError, referencing.exceptions.Unresolvable) as error:
        raise ValueError(f"the JSON schema is none: {' '.join(str(error).split())[:80]}") from error


def _found(valid: float, parsed: float) -> Found:
    return (valid if valid else JSON_ONLY * parsed), {"json_valid": parsed, "schema_valid": valid}


def schema(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """The reply, or the one fenced block in it, is JSON that options["schema"] or else meta["schema"] allows."""
    wanted = options.get("schema") or need(meta, "schema", "schema")
    text = reply.strip()
    parts = text.split("```")
    for each in (text, parts[1].partition("\n")[2] if len(parts) == 3 else ""):
        try:
            return _found(float(_valid(json.loads(each), wanted)), 1.0)
        except (json.JSONDecodeError, RecursionError):
            continue
    return _found(0.0, 0.0)


def tool_schema(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """Every call {"name", "arguments"} in the reply is of a tool in meta["tools"], its arguments as the schema says.

    An argument that the schema does not name is refused, unless it allows more by additionalProperties.
    """
    tools = [tool.get("function", tool) for tool in need(meta, "tools", "tool_schema")]
    schemas = {tool["name"]: {"additionalProperties": False} | (tool.get("parameters") or {}) for tool in tools}
    calls = json_objects(reply)
    valid = bool(calls) and all(_fits(call, schemas) for call in calls)
    return _found(float(valid), float(bool(calls)))


def _fits(call: dict, schemas: Mapping[str, dict]) -> bool:
    name, arguments = call.get("name"), call.get("arguments")
    return isinstance(name, str) and name in schemas and _valid(arguments, {"type": "object"} | schemas[name])
