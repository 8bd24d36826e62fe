"""Answers that say no, all in one form: {"error": {"message", "type", "param", "code"}}, as OpenAI has it."""

from typing import Any

from pydantic import BaseModel

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


class RefusedError(Exception):
    """A request that is not answered: its HTTP status, and why in one line."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_seconds: int | None = None) -> None:
        self.status, self.message, self.param = status, one_line(message), param
        self.headers = {"Retry-After": str(retry_seconds)} if retry_seconds else {}
        super().__init__(message)


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


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what a route's OpenAPI says of its refusals."""
    return {status: {"model": ErrorAnswer, "description": TYPES[status].replace("_", " ")} for status in statuses}
