"""A server of the OpenAI chat protocol on 127.0.0.1 that answers as a test tells it to, well or badly."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server sends for one request.

    Attributes:
        content: a JSON object, or text that is sent as it is.
        status, headers: of the reply.
        stall: seconds before it.
        is_truncated: announce more bytes than are sent, then hang up.
        is_doubled: send the whole reply twice.
    """

    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stall: float = 0.0
    is_truncated: bool = False
    is_doubled: bool = False


def completion(text: str | None, *others: str, finish_reason: str = "stop") -> Reply:
    """A chat completion with one choice or more, of 100 prompt tokens and 20 others."""
    choices = [
        {"index": i, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content}}
        for i, content in enumerate((text, *others))
    ]
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return Reply(
        {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}
    )


def failure(status: int, message: str = "try later", **headers: str) -> Reply:
    """An error of the server; the client is told to wait a millisecond only."""
    return Reply({"error": {"message": message}}, status, {"retry-after-ms": "1", **headers})


def sentence(action: str) -> str:
    """A description that can be used, and no other action's."""
    return f"My right hand reaches across the counter to {action} and does it slowly and with care."


def action_of(body: dict[str, Any]) -> str:
    """The label that a request asks about, also where it is asked for the second time."""
    queries = [message["content"] for message in body["messages"] if message["content"].startswith("Action: ")]
    return queries[-1].splitlines()[0].removeprefix("Action: ")


class ChatServer:
    """The server; `with ChatServer() as server` runs it, and `server.url` is its address.

    Args:
        script: the reply to a request, given its label, how often that label was asked about before, and its body;
            without one every request gets a usable description.
    """

    def __init__(self, script: Callable[[str, int, dict[str, Any]], Reply] | None = None):
        self.script = script or (lambda action, before, body: completion(sentence(action)))
        self.bodies: list[dict[str, Any]] = []  # requests in their order
        self.keys: list[str | None] = []  # Authorization of each
        self.most_at_once = 0
        self._asked: Counter[str] = Counter()
        self._lock, self._running = threading.Lock(), 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def actions(self) -> list[str]:
        """Labels of the requests."""
        return [action_of(body) for body in self.bodies]

    def _reply(self, body: dict[str, Any], key: str | None) -> Reply:
        with self._lock:
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
            action = action_of(body)
            before = self._asked[action]
            self._asked[action] += 1
            self.bodies.append(body)
            self.keys.append(key)
        try:
            reply = self.script(action, before, body)
            time.sleep(reply.stall)
            return reply
        finally:
            with self._lock:
                self._running -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reply = owner._reply(body, self.headers["Authorization"])
                is_text = isinstance(reply.content, str)
                data = (reply.content if is_text else json.dumps(reply.content)).encode()
                try:
                    for _ in range(2 if reply.is_doubled else 1):
                        self.send_response(reply.status)
                        self.send_header("Content-Type", "text/html" if is_text else "application/json")
                        self.send_header("Content-Length", str(len(data) + 500 * reply.is_truncated))
                        for name, value in reply.headers.items():
                            self.send_header(name, value)
                        self.end_headers()
                        self.wfile.write(data)
                    self.close_connection = self.close_connection or reply.is_truncated
                except OSError:  # the client is gone
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        return Handler
