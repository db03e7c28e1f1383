"""Error answers: OpenAI's envelope, which its SDKs unpack into their exceptions."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ..core.field_words import fault, field_at, fields_of, near, shown

MAX_TOLD = 32  # characters of a value that an answer repeats
PRIVATE = ("prompt", "negative_prompt", "key", "webhook_url")  # what clients write there is repeated nowhere
MAX_RETRY_AFTER_S = 60  # a longer Retry-After is ignored by OpenAI's JavaScript SDK, which then retries at once


class ApiError(Exception):
    """An error that is answered to the client.

    retry_after_s: when to try again, in seconds; None where trying again is of no use, which a 409 says in a header of
    its own, since SDKs retry it otherwise.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str = "invalid_request_error",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.type = status, message, code, param, type
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {"x-should-retry": "false"} if self.status == 409 else {}
        return {"retry-after": str(min(MAX_RETRY_AFTER_S, max(1, round(self.retry_after_s))))}


def refusal(error: ValidationError, schema: type[BaseModel] | None = None) -> ApiError:
    """Return a 400 for the first field of a body that pydantic refused; a schema lets it name all that is allowed."""
    return refused_field(error.errors(include_url=False)[0], schema)


def refused_field(found: ErrorDetails, schema: type[BaseModel] | FieldInfo | None) -> ApiError:
    """Return a 400 for one error; its place begins with the field. Only a number or a short word is repeated."""
    names = [str(part) for part in found["loc"] if not isinstance(part, int)]
    param = ".".join(names) or None
    if found["type"] == "extra_forbidden":
        holder = field_at(schema, found["loc"][:-1]) if len(names) > 1 else schema
        meant = near(names[-1], fields_of(holder))
        hint = f" Did you mean '{meant}'?" if meant else ""
        return ApiError(400, f"Unknown parameter: '{param}'.{hint}", code="unknown_parameter", param=param)
    if found["type"] == "missing":
        message = f"Missing required parameter: '{param}'."
        return ApiError(400, message, code="missing_required_parameter", param=param)
    value, wrong = found["input"], fault(found, schema)
    if param is None:
        return ApiError(400, f"The body {wrong}.", code="invalid_value")
    is_told = isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= MAX_TOLD)
    got = f", got {shown(value)}" if is_told and param not in PRIVATE and ", got " not in wrong else ""
    return ApiError(400, f"Invalid '{param}': {wrong}{got}.", code="invalid_value", param=param)
