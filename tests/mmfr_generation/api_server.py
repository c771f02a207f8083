"""A local server that speaks the files, batches and chat API, and fails on request."""

import email.parser
import email.policy
import json
import os
import signal
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

KEY = "sk-test-0123456789abcdef"


@dataclass
class Failure:
    """How to fail at the next request whose method and path fit.

    ``what``: a status code, ``drop`` (close before handling), ``drop_after`` (handle, then close without a reply),
    ``cut`` (send half of the reply), ``kill_before`` or ``kill_after`` (SIGKILL the client before or after handling).
    """

    method: str
    path: str
    what: object
    times: int = 1
    headers: dict = field(default_factory=dict)
    body: dict | None = None


class ApiServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.RLock()
        self.files: dict[str, dict] = {}
        self.batches: dict[str, dict] = {}
        self.failures: list[Failure] = []
        self.plans: list[dict] = []
        self.requests = Counter()
        self.asked = Counter()
        self.kill_at: set[int] = set()
        self.client_pid = 0
        self.polls_needed = 2
        self.at_work = 0
        self.most_at_work = 0
        self.answer = answer_for
        self.seen_keys: set[str] = set()
        self.count = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass

    def add_file(self, name, content, purpose):
        file_id = f"file-{len(self.files) + 1}"
        self.files[file_id] = {"name": name, "content": content, "purpose": purpose}
        return file_id

    def uploads(self):
        return Counter(file["content"] for file in self.files.values() if file["purpose"] == "batch")

    def finish(self, batch):
        """Ends a batch as its plan says; without a plan every request is answered."""
        plan = batch["plan"]
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]]["content"].splitlines()]
        status = plan.get("status", "completed")
        output, errors = [], []
        if status != "failed":
            for number, request in enumerate(lines):
                if number in plan.get("errors", {}):
                    error = plan["errors"][number]
                    errors.append(result_line(request, error.get("status", 400), {"error": error}))
                elif status == "expired" and number >= plan.get("done", 0):
                    errors.append(
                        {
                            "custom_id": request["custom_id"],
                            "response": None,
                            "error": {"code": "batch_expired", "message": "not in time"},
                        }
                    )
                elif number in plan.get("silent", ()):
                    continue
                else:
                    self.asked[request["custom_id"]] += 1
                    output.append(result_line(request, 200, self.answer(request)))
        if plan.get("shuffle"):
            output.reverse()
        batch["status"] = status
        for kind, entries in (("output", output), ("error", errors)):
            if entries:
                content = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
                batch[f"{kind}_file_id"] = self.add_file(f"{kind}.jsonl", content, "batch_output")
        if status == "failed":
            batch["errors"] = {"object": "list", "data": [{"code": plan["code"], "message": plan["message"]}]}


def result_line(request, status, body):
    return {
        "id": "batch_req_1",
        "custom_id": request["custom_id"],
        "response": {"status_code": status, "request_id": "r", "body": body},
        "error": None,
    }


def completion(text, finish_reason="stop"):
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}],
    }


def answer_for(request):
    prompt = request["body"]["messages"][0]["content"][0]["text"]
    if "Describe what this image shows" in prompt:
        return completion(f"A picture called {request.get('custom_id', 'x')}.")
    if "The image is fake." in prompt:
        return completion(
            '{"Answer": "The image is fake.", "Forgery Attributes": {"Low Image Quality": "It is soft."}}'
        )
    return completion(
        '```json\n{"Answer": "The image is real.", "Attributes": {"High Image Quality": "It is sharp."}}\n```'
    )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.serve("GET")

    def do_POST(self):
        self.serve("POST")

    def serve(self, method):
        server = self.server
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = urlsplit(self.path).path
        with server.lock:
            server.count += 1
            server.requests[method, path.split("/")[2]] += 1
            server.seen_keys.add(self.headers.get("authorization", ""))
            failure = next((f for f in server.failures if f.method == method and path.startswith(f.path)), None)
            if failure:
                failure.times -= 1
                if not failure.times:
                    server.failures.remove(failure)
            what = failure.what if failure else None
            if server.count in server.kill_at:
                what = ("kill_before", "kill_after", "kill_half")[server.count % 3]
            if what == "kill_before":
                os.kill(server.client_pid, signal.SIGKILL)
                return self.hang_up()
            if what == "drop":
                return self.hang_up()
            if isinstance(what, int):
                return self.reply(
                    what, failure.body or {"error": {"message": "injected", "code": None}}, failure.headers
                )
            server.at_work += 1
            server.most_at_work = max(server.most_at_work, server.at_work)
        try:
            status, answer = self.answer(method, path, body)
        finally:
            with server.lock:
                server.at_work -= 1
        if what in {"kill_after", "kill_half"}:
            if what == "kill_half":
                self.reply(status, answer, {}, cut=True)
            os.kill(server.client_pid, signal.SIGKILL)
            return self.hang_up()
        if what == "drop_after":
            return self.hang_up()
        return self.reply(status, answer, {}, cut=what == "cut")

    def hang_up(self):
        self.close_connection = True
        self.connection.close()

    def reply(self, status, answer, headers, cut=False):
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self.hang_up()

    def answer(self, method, path, body):
        server = self.server
        parts = path.split("/")[2:]
        if (method, path) == ("POST", "/v1/chat/completions"):
            threading.Event().wait(0.01)
            request = json.loads(body)
            with server.lock:
                server.asked[json.dumps(request["messages"])] += 1
            return 200, server.answer({"body": request})
        with server.lock:
            if method == "POST" and parts == ["files"]:
                return 200, self.file_object(self.upload(body))
            if method == "GET" and parts == ["files"]:
                wanted = [i for i, f in server.files.items() if f["purpose"] == "batch"]
                return 200, self.page([self.file_object(i) for i in reversed(wanted)], size=3)
            if method == "GET" and parts[0] == "files" and parts[-1] == "content":
                return 200, server.files[parts[1]]["content"]
            if method == "POST" and parts == ["batches"]:
                return 200, self.create(json.loads(body))
            if method == "GET" and parts == ["batches"]:
                return 200, self.page([self.batch_object(b) for b in reversed(server.batches.values())], size=3)
            if method == "GET" and parts[0] == "batches":
                return 200, self.poll(server.batches[parts[1]])
        return 404, {"error": {"message": f"no {path}", "code": None}}

    def upload(self, body):
        head = f"content-type: {self.headers['content-type']}\r\n\r\n".encode()
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
        fields = {part.get_param("name", header="content-disposition"): part for part in message.iter_parts()}
        file = fields["file"]
        purpose = fields["purpose"].get_payload(decode=True).decode().strip()
        return self.server.add_file(file.get_filename(), file.get_payload(decode=True), purpose)

    def create(self, wanted):
        server = self.server
        batch = {
            "id": f"batch-{len(server.batches) + 1}",
            "object": "batch",
            "endpoint": wanted["endpoint"],
            "input_file_id": wanted["input_file_id"],
            "completion_window": wanted["completion_window"],
            "created_at": 0,
            "status": "validating",
            "metadata": wanted.get("metadata"),
            "polls": 0,
            "plan": server.plans.pop(0) if server.plans else {},
        }
        server.batches[batch["id"]] = batch
        return self.batch_object(batch)

    def poll(self, batch):
        batch["polls"] += 1
        if batch["status"] in {"validating", "in_progress"}:
            batch["status"] = "in_progress"
            if batch["polls"] >= self.server.polls_needed:
                self.server.finish(batch)
        return self.batch_object(batch)

    def batch_object(self, batch):
        total = self.server.files[batch["input_file_id"]]["content"].count(b"\n")
        counts = {"total": total, "completed": 0, "failed": 0}
        return {k: v for k, v in batch.items() if k not in {"polls", "plan"}} | {"request_counts": counts}

    def file_object(self, file_id):
        file = self.server.files[file_id]
        return {
            "id": file_id,
            "object": "file",
            "bytes": len(file["content"]),
            "created_at": 0,
            "filename": file["name"],
            "purpose": file["purpose"],
            "status": "processed",
        }

    def page(self, items, size):
        after = parse_qs(urlsplit(self.path).query).get("after", [None])[0]
        ids = [item["id"] for item in items]
        first = ids.index(after) + 1 if after in ids else 0
        return {"object": "list", "data": items[first : first + size], "has_more": first + size < len(items)}
