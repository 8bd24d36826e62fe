"""Answers that say no, all in one form: {"error": {"message", "type", "param", "code"}}, as OpenAI has it."""

from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from bigbatch.recipes.core.errors import one_line

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class RefusedError(HTTPException):
    """A request that is not answered: its HTTP status, and why in one line."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_seconds: int | None = None) -> None:
        headers = {"Retry-After": str(retry_seconds)} if retry_seconds else None
        super().__init__(status, one_line(message), headers)
        self.param = param


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: int | None = None


class ErrorAnswer(BaseModel):
    """The answer to a request that is refused."""

    error: ErrorBody


def error_document(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Return the JSON of a refusal."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": one_line(message), "type": kind, "param": param, "code": status}}


def mistake_of(error: ValidationError | RequestValidationError) -> RefusedError:
    """Return the first mistake in a request as its refusal."""
    first = error.errors()[0]
    if first["type"] == "json_invalid" and "ctx" in first and first["loc"]:  # FastAPI's, which counts characters
        return RefusedError(422, f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if first["loc"] == ("body",) and first["type"] == "missing":
        return RefusedError(422, "the body is empty; right is a JSON object")
    where = ".".join(str(part) for part in first["loc"] if part != "body" and "constrained-" not in str(part))
    message = first["msg"].removeprefix("Value error, ")
    return RefusedError(422, f"{where}: {message}" if where else message, where or None)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what a route's OpenAPI says of its refusals."""
    return {status: {"model": ErrorAnswer, "description": TYPES[status].replace("_", " ")} for status in statuses}
