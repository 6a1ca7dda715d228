"""A small server for a study on this machine or in a laboratory's network: the page, and votes saved as they come.

It serves the page's own files and nothing else, so never the key. A rater's votes are in votes/<code>.json, sealed,
and given back to whoever opens the page with that code: raters can go on in another browser, and where that matters
their codes should be hard to guess. Answers can be changed but not removed. There is no encryption and no log-in:
`--host` other than the own machine is for a network that can be trusted.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lego_pipeline.atomic import write_text
from lego_pipeline.study.blinding import RATER, seal, votes_text
from lego_pipeline.study.page import FRAMES, PAGE, VOTES, Key, check_page, html
from lego_pipeline.study.votes import check_votes

LARGEST = 8_000_000  # bytes of votes that are taken
TYPES = {".html": "text/html; charset=utf-8", ".json": "application/json", ".png": "image/png"}


class StudyServer(ThreadingHTTPServer):
    """The server of one study.

    Args:
        folder: of the study, with page and key.
        key: of the study.
        host, port: to listen at; port 0 takes a free one.

    Raises:
        ValueError: a file of the study was changed.
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: Path, key: Key, host: str = "127.0.0.1", port: int = 0):
        check_page(folder, key)
        self.key, self.votes = key, folder / VOTES
        self.lock = threading.Lock()
        page = folder / PAGE
        text = (page / "study.json").read_text(encoding="utf-8")
        self.texts = {"/": html(text), "/index.html": html(text), "/study.json": text}
        self.files = {f"/{FRAMES}/{name}.png": page / FRAMES / f"{name}.png" for name in key.frames}
        super().__init__((host, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves before an answer is complete is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Address of the page."""
        host, port = self.server_address[:2]
        return f"http://{host}:{port}/"

    def stored(self, rater: str) -> dict[str, Any] | None:
        """Votes that are saved of a rater."""
        path = self.votes / f"{rater}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def save(self, content: Any) -> None:
        """Checks, seals and saves votes.

        Raises:
            ValueError: they were changed, or lack an answer that is saved already, or have an older one in its place.
        """
        votes = check_votes({name: value for name, value in content.items() if name != "seal"}, self.key)
        with self.lock:
            before = self.stored(votes.rater)
            saved = before["answers"] if before else ()
            own = votes.answers
            lost = [a for a in saved if a["question"] not in own or own[a["question"]]["at"] < a["at"]]
            if lost:
                raise ValueError(f"lack {len(lost)} answers that are saved already; load the page again")
            sealed = {**content, "seal": seal(self.key.secret, votes_text(content))}
            self.votes.mkdir(exist_ok=True)
            write_text(self.votes / f"{votes.rater}.json", json.dumps(sealed) + "\n")


class _Handler(BaseHTTPRequestHandler):
    """GET of the page's files and of votes/<code>, POST of votes."""

    protocol_version = "HTTP/1.1"

    @property
    def study(self) -> StudyServer:
        assert isinstance(self.server, StudyServer)
        return self.server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        folder, _, rater = path.rpartition("/")
        if path in self.study.texts:
            suffix = Path(path).suffix or ".html"
            self._answer(200, self.study.texts[path].encode(), TYPES[suffix])
        elif path in self.study.files:
            self._answer(200, self.study.files[path].read_bytes(), TYPES[".png"])
        elif folder == f"/{VOTES}" and RATER.fullmatch(rater):
            self._answer_json(200, {"saves": True, "votes": self.study.stored(rater)})
        else:
            self._answer_json(404, {"error": "there is nothing here"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        # JSON is asked for because a page of another site can't send it unasked.
        is_json = self.headers.get_content_type() == "application/json"
        if self.path != f"/{VOTES}" or not is_json or not length.isdigit() or int(length) > LARGEST:
            self.close_connection = True
            self._answer_json(400, {"error": f"votes must be posted to /{VOTES} as JSON of at most {LARGEST} bytes"})
            return
        try:
            content = json.loads(self.rfile.read(int(length)))
            if not isinstance(content, dict):
                raise ValueError("must be an object")
            self.study.save(content)
        except ValueError as error:
            self._answer_json(409, {"error": f"the votes {error}"})
        else:
            self._answer_json(200, {"saved": True})

    def _answer_json(self, status: int, content: dict[str, Any]) -> None:
        self._answer(status, json.dumps(content).encode(), TYPES[".json"])

    def _answer(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store" if kind != TYPES[".png"] else "max-age=3600")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *values: Any) -> None:
        """Nothing is printed for a request."""
