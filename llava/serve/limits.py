"""What the server takes, and how it says that something is too much. Imports no torch."""

from dataclasses import dataclass

from llava.cli import option, positive_float, positive_int
from llava.errors import OptionError

MEGA = 1_000_000


@dataclass(frozen=True)
class Limits:
    """What a request may cost, and how long it may take.

    Attributes:
        upload_mb: Largest body of a request, in millions of bytes.
        megapixels: Largest image, in millions of pixels.
        images: Images a request.
        queue: Images that are accepted and not yet answered; more are answered by 429.
        batch_size: Images that the model analyses at a time; None leaves it to the system.
        batch_wait_ms: How long the first image of a batch waits for others.
        timeout: Seconds until a request is given up.
        upload_timeout: Seconds for the arrival of a request's body.
        answer_tokens: Longest answer that may be asked for.
    """

    upload_mb: float = option(32.0, "largest upload in MB (default: 32)", type=positive_float)
    megapixels: float = option(50.0, "largest image in millions of pixels (default: 50)", type=positive_float)
    images: int = option(16, "images a request (default: 16)", name="--max-images", type=positive_int)
    queue: int = option(128, "images accepted at a time; more get 429 (default: 128)", type=positive_int)
    batch_size: int | None = option(None, "images the model sees at a time (default: the system's)", type=positive_int)
    batch_wait_ms: float = option(15.0, "how long an image waits for others to share a batch, in ms (default: 15)")
    timeout: float = option(300.0, "seconds until a request is given up (default: 300)", type=positive_float)
    upload_timeout: float = option(60.0, "seconds for an upload to arrive (default: 60)", type=positive_float)
    answer_tokens: int = option(1024, "longest answer that may be asked for (default: 1024)", type=positive_int)

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            OptionError: They exclude each other.
        """
        if not 0 <= self.batch_wait_ms <= 10_000:
            raise OptionError(f"--batch-wait-ms must be from 0 to 10000, not {self.batch_wait_ms}")
        if self.images > self.queue:
            raise OptionError(f"--max-images {self.images} must not be above --queue {self.queue}")

    @property
    def upload_bytes(self) -> int:
        """Largest body of a request."""
        return int(self.upload_mb * MEGA)

    @property
    def pixels(self) -> int:
        """Largest image."""
        return int(self.megapixels * MEGA)


class RequestError(Exception):
    """What is wrong with a request; it becomes the answer.

    Attributes:
        status: HTTP status.
        code: A short name for programs.
        message: What is wrong, and what to do.
        retry_after: Seconds after which the same request may succeed, or None.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, dict[str, str]]:
        """The answer, in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What the answer says besides."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
