"""docs/api.md says what there is and nothing else: paths, fields, bounds, keys, events, error codes; its lines run."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skylapse.serve.http.openapi import BODIES
from skylapse.serve.jobs.failures import KNOWN
from skylapse.serve.jobs.served_models import ServedModel
from skylapse.serve.wire.admin_responses import ADMIN_BODIES

from ..service import Service

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "api.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
CODE = re.compile("[a-z_]+")
PATH = re.compile(r"`(GET|HEAD|POST|PATCH|DELETE) (/[^`]*)`")
# `invalid_{kind}` of media.py. A job's ends that no request is answered with are not among the errors.
COMPUTED, ENDS = {"invalid_image", "invalid_video"}, {"cancelled", "crashed", "model_not_found"}


def table(title: str) -> dict[str, str]:
    """The rows of the table with this head, by what stands in their first cell or, behind a status, in the second."""
    _, _, rest = PAGE.partition(f"\n| {title}")
    assert rest, title
    rows = rest.partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    named = [next(cell for cell in row if cell.startswith("`")) for row in cells]
    assert len(set(named)) == len(named), f"a row of {title} is there twice"
    return {name.strip("`"): " | ".join(row[1:]) for name, row in zip(named, cells, strict=True)}


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    with service.client() as client:
        return client.get("/openapi.json").json()


def test_page_has_every_path_and_no_other(document: dict[str, Any]) -> None:
    documented = {(method.upper(), path) for path, found in document["paths"].items() for method in found}
    assert set(PATH.findall(PAGE)) == documented | {("HEAD", "/v1/videos/{video_id}/content")}


def test_page_has_every_field_with_its_bounds_and_no_other(document: dict[str, Any]) -> None:
    rows = table("field | in")
    fields: dict[str, list[dict[str, Any]]] = {}
    for schema, _ in BODIES.values():
        for name, field in document["components"]["schemas"][schema.__name__]["properties"].items():
            fields.setdefault(name, []).append(field)
    assert set(rows) == set(fields)
    for name, found in fields.items():
        for field in found:
            assert [bound for bound in bounds(field) if bound not in rows[name]] == [], name
    operations = [operation for found in document["paths"].values() for operation in found.values()]
    parameters = {parameter["name"] for operation in operations for parameter in operation.get("parameters", ())}
    assert {name for name in parameters if name not in PAGE} == set()


def test_operators_page_has_every_field_that_they_may_set(document: dict[str, Any]) -> None:
    for schema in ADMIN_BODIES.values():
        for name in document["components"]["schemas"][schema.__name__]["properties"]:
            assert f"`{name}`" in OPERATIONS, name


def bounds(field: dict[str, Any]) -> Iterator[str]:
    """Yield a field's bounds as the page writes them."""
    for kind in (field, *field.get("anyOf", ())):
        for name in ("minimum", "maximum", "minLength", "maxLength"):
            if name in kind and kind[name] not in (0, 1):
                yield f"{kind[name]:,g}"
        yield from (f"`{value}`" for value in kind.get("enum", ()))


def test_page_has_every_key_of_what_is_answered_and_no_other(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert set(table("key | ")) == set(schemas["Video"]["properties"])
    for name in ("AdminTenant", "AdminJob", "AdminEngine", "AdminNewKey", "AuditEntry"):
        assert [key for key in schemas[name]["properties"] if f"`{key}`" not in OPERATIONS] == [], name
    assert set(table("key of a model |")) == set(schemas["Model"]["properties"])
    events = table("event | beside `video` |")
    assert set(events) == set(schemas["VideoEvent"]["properties"]["type"]["enum"])
    told = {name for row in events.values() for name in re.findall(r"`(\w+)`", row)}
    stages = set(schemas["VideoEvent"]["properties"]["stage"]["anyOf"][0]["enum"])
    facts = set(schemas["VideoEvent"]["properties"]) - {"type", "video"}
    assert told == facts | stages | set(schemas["Preview"]["properties"])
    for name in ("VideoList", "VideoDeleted", "Generated", "ErrorDetail"):
        assert [key for key in schemas[name]["properties"] if key not in PAGE] == []
    assert [name for name in document["components"]["headers"] if name not in PAGE.lower()] == []
    assert [kind for kind in schemas["ErrorDetail"]["properties"]["type"]["enum"] if f"`{kind}`" not in PAGE] == []


def test_page_has_every_error_code_and_no_other() -> None:
    files = [path for path in (ROOT / "serve").rglob("*.py") if "store" not in path.parts]
    named = {code for path in files for code in codes(ast.parse(path.read_text()))}
    assert set(table("status | code |")) == named | COMPUTED
    assert set(table("code of a failed video |")) == {code for _, code, _ in KNOWN} | ENDS | {"internal_error"}
    store = {code for path in (ROOT / "serve" / "store").glob("*.py") for code in codes(ast.parse(path.read_text()))}
    assert store == ENDS


def codes(tree: ast.Module) -> Iterator[str]:
    """Whatever is given or assigned under the name `code`, `codes` or `error_code`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("code", "error_code"):
            yield from texts(node.value)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            if names & {"code", "codes"} and node.value is not None:
                yield from texts(node.value)


def texts(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from (*texts(node.body), *texts(node.orelse))
    elif isinstance(node, ast.Dict | ast.Tuple):
        yield from (text for value in getattr(node, "values", None) or node.elts for text in texts(value))
    elif isinstance(node, ast.Call):
        yield from (text for value in node.args for text in texts(value))


def test_pages_that_it_names_are_there() -> None:
    assert all((ROOT / "docs" / name).exists() for name in re.findall(r"\]\((\w+\.md)\)", PAGE))


def test_python_of_the_page_runs(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the page's blocks one after the other; the model takes two steps instead of thirty."""
    pytest.importorskip("openai")
    quick = property(lambda model: replace(model.folder.defaults, num_inference_steps=2))
    monkeypatch.setattr(ServedModel, "defaults", quick)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{service.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", service.key())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Sora API is scheduled", DeprecationWarning)
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(compile(block, "docs/api.md", "exec"), names)
        assert (tmp_path / "circle.mp4").read_bytes()[4:8] == b"ftyp"
        for video in (names["remake"], names["longer"]):
            assert names["client"].videos.poll(video.id, poll_interval_ms=50).status == "completed"
        names["client"].close()
