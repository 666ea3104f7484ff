"""What goes wrong, as a client is told of it: a status, a body, and whether to try again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from maestrale.errors import CheckpointError, MemoryLimitError, RequestError

_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
_PHRASES = {404: "no such route", 405: "this route does not take that method"}


class ApiError(Exception):
    """An answer that is no success. retry_after: seconds, where trying again makes sense; None where it does not."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = self.headers | {"x-should-retry": "false" if self.retry_after is None else "true"}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        answer = JSONResponse(self.body(), self.status, headers)
        if self.status == 401:
            for scheme in ("Bearer", "Basic"):  # a line each: Chromium reads only the first scheme of a line
                answer.headers.append("www-authenticate", f'{scheme} realm="maestrale"')
        return answer


def bad_request(message: str, param: str | None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as its answer. A RequestError is the client's where it names a field; else it is the model's fault,
    as damaged weights are."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError) and error.param is not None:
        return bad_request(str(error), error.param)
    if isinstance(error, RequestError | CheckpointError):
        return ApiError(500, str(error), code="model_error")
    if isinstance(error, MemoryLimitError):
        return ApiError(500, str(error), code="out_of_memory")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, _PHRASES.get(error.status_code, error.detail), headers=error.headers)
    return ApiError(500, "an internal error; the server's log has it under this answer's x-request-id")
