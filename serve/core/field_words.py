"""Names a field's allowed values and its errors in our own words, for bodies, queries and configuration.

pydantic finds the field and describes the error in its own voice; what is allowed is read from the field's JSON schema.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, PydanticUserError, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

MAX_SHOWN = 60  # characters of a value that is repeated
# Words by the start of pydantic's name of an error, for a field whose schema is not at hand.
BY_TYPE = (
    ("int", "a whole number"),
    ("float", "a number"),
    ("finite_number", "a finite number"),
    ("bool", "true or false"),
    ("string", "text"),
    ("list", "a list"),
    ("tuple", "a list"),
    ("dict", "an object of names and values"),
    ("model", "an object of settings"),
)
BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def near(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that was probably meant, or None."""
    plain = {other.replace("_", "").replace("-", "").lower(): other for other in names}
    found = difflib.get_close_matches(name.replace("_", "").replace("-", "").lower(), plain, 1, 0.75)
    return plain[found[0]] if found else None


def fault(error: ErrorDetails, model: type[BaseModel] | FieldInfo | None) -> str:
    """Return the error in a field's value, to follow the field's name: "must be ..."; "is missing" for no value.

    model: what was validated, or the one field. The value is not repeated.
    """
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return "is missing"
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", error["msg"])).strip()
    if kind == "json_invalid":
        return "must be JSON"
    if (found := field_at(model, error["loc"])) is not None and (words := allowed(found)) is not None:
        return f"must be {words}"
    if kind in BOUNDS:
        key, word = BOUNDS[kind]
        return f"must be {word} {context[key]:g}"
    if kind in ("literal_error", "enum"):
        return f"must be {context['expected']}"
    return "must be " + next((words for start, words in BY_TYPE if kind.startswith(start)), "of another kind")


def shown(value: Any) -> str:
    """Return a value as a message repeats it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def allowed(field: FieldInfo) -> str | None:
    """Return the values that a field allows, such as "a whole number of at least 1"; None if that is unknown."""
    try:
        schema = TypeAdapter(_annotated(field)).json_schema()
    except PydanticUserError:
        return None
    return _words(schema, schema.get("$defs", {}))


def field_at(model: type[BaseModel] | FieldInfo | None, loc: Sequence[str | int]) -> FieldInfo | None:
    """Return the field that an error's place leads to."""
    field = model if isinstance(model, FieldInfo) else None
    holder: Any = None if isinstance(model, FieldInfo) else model
    for part in () if isinstance(model, FieldInfo) else loc:
        if _is_model(holder):
            field = _of_name(holder, part)
            if field is None:
                return None
            holder = _without_none(field.annotation)
        elif (inner := _inner(holder)) is not None:
            field, holder = FieldInfo.from_annotation(inner), _without_none(inner)
        # else a union's own part, which names no further field
    return field


def fields_of(holder: type[BaseModel] | FieldInfo | None) -> list[str]:
    """Return the names that an object may have: a model's, or those of the model in a field or in its list."""
    kind: Any = holder
    if isinstance(holder, FieldInfo):
        kind = _without_none(holder.annotation)
        kind = _without_none(_inner(kind)) if _inner(kind) is not None else kind
    return [*kind.model_fields] if _is_model(kind) else []


def _is_model(holder: Any) -> bool:
    return isinstance(holder, type) and issubclass(holder, BaseModel)


def _of_name(model: type[BaseModel], name: str | int) -> FieldInfo | None:
    fields = model.model_fields
    return next((field for key, field in fields.items() if name in (key, field.alias, field.validation_alias)), None)


def _inner(holder: Any) -> Any:
    """Return the type of a list's items or of an object's values."""
    arguments = [argument for argument in get_args(holder) if argument is not Ellipsis]
    return arguments[-1] if get_origin(holder) in (list, tuple, dict, set, frozenset, Mapping) and arguments else None


def _without_none(annotation: Any) -> Any:
    """Return the type without `Annotated`, and the one type beside None."""
    if get_origin(annotation) is Annotated:
        return _without_none(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return _without_none(kinds[0]) if len(kinds) == 1 else None
    return annotation


def _annotated(field: FieldInfo) -> Any:
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str | None:
    if "$ref" in schema:
        return _words(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        parts = [_words(part, definitions) for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(part for part in parts if part)) or None
    if "enum" in schema or "const" in schema:
        return " or ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "integer":
            return "a whole number" + _range(schema)
        case "number":
            return "a number" + _range(schema)
        case "boolean":
            return "true or false"
        case "string":
            return _text(schema)
        case "array":
            items = _words(schema.get("items", {}), definitions)
            return f"a list of which each is {items}" if items else "a list"
        case "object" if "properties" in schema:
            return f"an object of {', '.join(schema['properties'])}"
        case "object":
            values = schema.get("additionalProperties")
            words = _words(values, definitions) if isinstance(values, dict) else None
            return f"an object of names, of which each has {words}" if words else "an object of names and values"
    return None


def _range(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {_number(low)} to {_number(high)}"
    parts = [
        f"{word} {_number(bound)}"
        for word, bound in (("at least", low), ("above", above), ("at most", high), ("below", below))
        if bound is not None
    ]
    return " of " + " and ".join(parts) if parts and parts[0].startswith("at") else " " + " and ".join(parts)[:200]


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def _text(schema: Mapping[str, Any]) -> str:
    if examples := schema.get("examples"):
        return f"text such as {' or '.join(map(str, examples))}"
    low, high = schema.get("minLength"), schema.get("maxLength")
    length = f" of {low or 0} to {high} characters" if high else f" of at least {low} characters" if low else ""
    pattern = f" that matches {schema['pattern']}" if "pattern" in schema else ""
    return f"text{length}{pattern}"
