"""A wrong value in any field of a body, the configuration or the command line is refused in our words, by its name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from skylapse import cli
from skylapse.runtime.commands.options import Parser
from skylapse.serve.commands.serve import _serve_parser
from skylapse.serve.core.config import ServeConfig
from skylapse.serve.core.config_source import load_config, told
from skylapse.serve.wire import requests as schema
from skylapse.serve.wire.errors import refusal

VOICES = re.compile(
    r"Extra inputs|Input should|unable to (parse|interpret)|Expecting|invalid literal|validation error|String should|"
    r"value is not|Value error|Assertion|List should|Tuple should|Dictionary should|could not convert|invalid choice|"
    r"unrecognized|expected one|argument -|are required|not allowed with|NoneType|Traceback|pydantic|Error\b|"
    r"Field required|instance of|valid (string|integer|number|dictionary|list|boolean)|Decimal|JSONDecode|while parsing"
)
WRONG: list[Any] = ["many", "", " ", -1, 0, 1.5, 10**30, float("inf"), float("nan"), True, None, [], {}, [1], {"a": 1}]
WRONG += ["x" * 20_000, "\0", {"a": {"b": []}}, [{"a": 1}], "9" * 5000, "64x", object()]
SCHEMAS = [
    kind
    for kind in vars(schema).values()
    if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not BaseModel
]
NAMES = sorted({*ServeConfig.model_fields})


def check(message: str, name: str) -> None:
    assert not VOICES.search(message), message
    assert name in message and "\n" not in message and len(message) < 1000, message


@pytest.mark.parametrize("name", NAMES)
def test_no_setting_speaks_in_a_librarys_voice(name: str) -> None:
    refused = 0
    for value in WRONG:
        try:
            ServeConfig(**{name: value})
        except ValidationError as error:
            check(told(error, ServeConfig), name if error.errors()[0]["loc"] else "")
            refused += 1
    assert refused > 0 or name == "artifacts_options"


@pytest.mark.parametrize("name", NAMES)
def test_no_option_and_no_variable_speaks_in_a_librarys_voice(name: str) -> None:
    option, variable = f"--{name.replace('_', '-')}", f"SKYLAPSE_SERVE_{name.upper()}"
    for text in ("many", "-1", "[", "{a: ", "nan", "9" * 5000, "!!python/object:os.system", "2026-13-45"):
        for arguments, environ in (([f"{option}={text}"], {}), ([], {variable: text})):
            try:
                load_config(_serve_parser().parse_args(arguments), environ)
            except ValueError as error:
                message = str(error)
                assert not VOICES.search(message.replace("datetime", "")) and "\n" not in message, message


@pytest.mark.parametrize("kind", SCHEMAS, ids=lambda kind: kind.__name__)
def test_no_body_speaks_in_a_librarys_voice(kind: type[BaseModel]) -> None:
    good = {"prompt": "a star", "seconds": "4", "id": "video_" + "0" * 32, "image_url": "data:,"}
    fields = {key: value for key, value in good.items() if key in kind.model_fields}
    for name in kind.model_fields:
        for value in WRONG:
            try:
                kind.model_validate(fields | {name: value})
            except ValidationError as error:
                refused = refusal(error, kind)
                check(refused.message, name)
                assert refused.status == 400 and refused.param is not None and refused.param.split(".")[0] == name
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(fields | {"nothing_like_it": 1})
    check(refusal(caught.value, kind).message, "nothing_like_it")


def test_a_misspelt_parameter_is_told_the_one_that_was_meant() -> None:
    with pytest.raises(ValidationError) as caught:
        schema.CreateVideo.model_validate({"prompt": "a star", "sead": 1})
    assert refusal(caught.value, schema.CreateVideo).message == "Unknown parameter: 'sead'. Did you mean 'seed'?"


def test_a_refusal_names_the_field_its_value_and_what_is_allowed() -> None:
    for field, value, message in (
        ("seed", "x", "Invalid 'seed': must be a whole number of at least 0 and below 9007199254740992, got 'x'."),
        ("num_inference_steps", 0, "Invalid 'num_inference_steps': must be a whole number from 1 to 1000, got 0."),
        ("size", "64", "Invalid 'size': must be text such as 1280x720, got '64'."),
        ("size", "15x64", "Invalid 'size': width and height must be even and from 16 to 4096, got '15x64'."),
        ("resize", "perhaps", "Invalid 'resize': must be true or false, got 'perhaps'."),
        ("prompt", "", "Invalid 'prompt': must be text of 1 to 10000 characters."),
    ):
        with pytest.raises(ValidationError) as caught:
            schema.CreateVideo.model_validate({"prompt": "a star", field: value})
        assert refusal(caught.value, schema.CreateVideo).message == message


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("limit=many", "Invalid 'limit': must be a whole number from 0 to 100, got 'many'."),
        ("limit=-1", "Invalid 'limit': must be a whole number from 0 to 100, got '-1'."),
        ("order=up", "Invalid 'order': must be asc or desc, got 'up'."),
    ],
)
def test_a_query_is_refused_in_the_same_words(query: str, message: str, service: Any) -> None:
    with service.client() as client:
        answer = client.get(f"/v1/videos?{query}")
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)


def parsers(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from parsers(below, (*words, name))


def test_no_option_of_the_command_line_speaks_in_argparses_voice() -> None:
    seen = 0
    for root in (cli._parser(), _serve_parser()):
        for _, parser in parsers(root):
            assert isinstance(parser, Parser)
            for action in parser._actions:
                for option in action.option_strings[-1:]:
                    for wrong in ([f"{option}=many"], [option], [f"{option}x"]):
                        if wrong == [option] and action.nargs == 0:
                            continue
                        try:
                            parser.parse_args(wrong)
                        except ValueError as error:
                            seen += 1
                            assert not VOICES.search(str(error)) and "\n" not in str(error), str(error)
                        except SystemExit:  # --help
                            pass
    assert seen > 80
