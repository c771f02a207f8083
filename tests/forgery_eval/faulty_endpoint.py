"""An OpenAI-compatible endpoint of this machine that fails as a test says, before whatever answers."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def completion(text: str, prompt_tokens: int = 100, completion_tokens: int = 10, **choice: Any) -> dict[str, Any]:
    """A completion in OpenAI's form."""
    message = {"role": "assistant", "content": text}
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    choices = [{"index": 0, "finish_reason": "stop", "message": message, "logprobs": None, **choice}]
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}


def forwarded(url: str) -> Answer:
    """What another endpoint answers."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        found = requests.post(f"{url}/chat/completions", json=body, timeout=60)
        found.raise_for_status()
        return dict(found.json())

    return answer


@contextmanager
def faulty(
    script: list[str], answer: Answer, always: str = "good", hang: float = 1.5
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serves, failing as a script says, request by request, and doing the same thing ever after.

    Args:
        script: Of each request: ``good``, a status, ``hang``, ``cut`` (half of the body) or ``no logprobs``, which
            refuses a request for them.
        answer: Answers what is not refused.
        always: What is done after the script.
        hang: Seconds that a hang takes.

    Yields:
        The address, and the requests that came: their bodies, and their ``step``, ``time`` and ``key``.
    """
    came: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                step = script.pop(0) if script else always
                came.append({"step": step, "time": time.monotonic(), "key": self.headers["Authorization"], **body})
            if step == "hang":
                time.sleep(hang)
            status = int(step) if step.isdigit() else 400 if step == "no logprobs" and "logprobs" in body else 200
            refusal = {"error": {"message": "no" + " logprobs" * (step == "no logprobs")}}
            content = json.dumps(answer(body) if status == 200 else refusal).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status == 429:
                self.send_header("Retry-After", "0.3")
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(content[: len(content) // 2] if step == "cut" else content)
            self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as opened:
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{opened.server_port}/v1", came
        opened.shutdown()
