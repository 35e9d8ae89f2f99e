"""What a server says where something is wrong: one exception, which each dialect puts into its own shape."""

from griffin_gguf.runtime.errors import BackendError, BusyError, FileFormatError, GriffinError, NoRoomError

#: Seconds after which a refused client may well try again.
RETRY_AFTER = 1


class EndingError(GriffinError):
    """What ends requests that wait while a server is told to end."""


class ApiError(Exception):
    """An answer that is an error: an HTTP `status` and a `message` of one line.

    `retry_after` are seconds for the header of that name; `code` and `param` are OpenAI's words for what is wrong and
    where.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        retry_after: int | None = None,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.retry_after, self.code, self.param = retry_after, code, param


def as_api_error(error: Exception) -> ApiError:
    """What to say of an exception; of a bug only that there is one, since its text may hold a prompt's.

    A `GriffinError` is the request's fault, unless a file, a device or the machine's load is.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(429, str(error), retry_after=RETRY_AFTER, code="rate_limit_exceeded")
    if isinstance(error, EndingError | NoRoomError):
        return ApiError(503, str(error), retry_after=RETRY_AFTER)
    if isinstance(error, FileFormatError | BackendError):
        return ApiError(500, str(error))
    if isinstance(error, GriffinError):
        return ApiError(400, str(error))
    return ApiError(500, f"internal error ({type(error).__name__}); the server's log says more")
