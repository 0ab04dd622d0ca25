"""Every error Searoom raises on purpose, in one tree.

    SearoomError
    ├── ConfigError                 a wish that cannot be met: names the key or file, and the fix
    ├── ModelFileError              a model's own files are missing, broken or not supported
    ├── ReplicaGone                 the pinned replica has left Serve's running set
    └── ApiError                    what a client is told; carries status, OpenAI type and code
        ├── InvalidRequest          400
        │   ├── UnsupportedField    400
        │   └── ContextLengthExceeded 400
        ├── InvalidApiKey           401
        ├── NotFound                404
        │   └── ModelNotFound       404
        ├── MethodNotAllowed        405
        ├── BodyTooLarge            413
        ├── ServerOverloaded        503, with Retry-After
        ├── ReplicaLost             502, before the first token or as an event on the stream
        ├── DeadlineExceeded        504
        └── InternalError           500

The body a client sees is always ``{"error": {"message", "type", "param", "code"}}``.
"""

from __future__ import annotations

from typing import Any


class SearoomError(Exception):
    """Root of the tree; `str(error)` is fit to be shown to a person."""


class ConfigError(SearoomError):
    """A configuration, flag or machine that cannot do what was asked. Says what to change."""


class ModelFileError(SearoomError):
    """A model folder or file that cannot be served. Names the file and the fix."""


class ReplicaGone(SearoomError):
    """The replica a call was pinned to is no longer in Serve's running set, or died during the call."""

    def __init__(self, replica_id: str) -> None:
        super().__init__(f"replica {replica_id} is gone")
        self.replica_id = replica_id


class ApiError(SearoomError):
    """An error with an HTTP status and OpenAI's four fields."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The OpenAI error envelope."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class UnsupportedField(InvalidRequest):
    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class InvalidApiKey(ApiError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class NotFound(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(ApiError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class ServerOverloaded(ApiError):
    status = 503
    type = "service_unavailable_error"
    code = "server_is_overloaded"


class ReplicaLost(ApiError):
    status = 502
    type = "server_error"
    code = "replica_lost"


class DeadlineExceeded(ApiError):
    status = 504
    type = "server_error"
    code = "deadline_exceeded"


class InternalError(ApiError):
    status = 500
    type = "server_error"
    code = "internal_error"
