"""What clients are told when something is wrong: OpenAI's envelope, which its SDKs unpack into their exceptions."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

MAX_RETRY_AFTER_S = 60  # a longer Retry-After is ignored by OpenAI's JavaScript SDK, which then retries at once


class ApiError(Exception):
    """An answer that is an error.

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


def refusal(error: ValidationError) -> ApiError:
    """A 400 for the first field that pydantic refused; what was sent is not repeated."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"] if not isinstance(part, int)) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{param}'.", code="unknown_parameter", param=param)
    if first["type"] == "missing":
        message = f"Missing required parameter: '{param}'."
        return ApiError(400, message, code="missing_required_parameter", param=param)
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"Invalid '{param}': {message}.", code="invalid_value", param=param)
