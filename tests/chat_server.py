"""A server on this machine that speaks the chat-completions protocol, streamed, and fails in every way asked for.

`python chat_server.py PORTFILE [SECONDS]` serves good answers, each after so many seconds, until it is ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

OPENERS = (
    "A picture",
    "This study",
    "An image",
    "A film",
    "A slice",
    "A view",
    "A frame",
    "A scan",
    "An example",
)
TRAITS = (
    "typical",
    "plain",
    "marked",
    "subtle",
    "classic",
    "clear",
    "faint",
    "evident",
    "visible",
    "distinct",
)


def part(body: dict[str, Any], name: str) -> str:
    """A part of the label that a request asks about."""
    return re.search(rf"^  {name}: (.*)$", body["messages"][-1]["content"], re.MULTILINE)[1]


def wanted(body: dict[str, Any]) -> int:
    return int(re.search(r"exactly (\d+) texts", body["messages"][-1]["content"])[1])


def captions(body: dict[str, Any], n: int | None = None) -> list[str]:
    """Good captions of the label, a pure function of the request."""
    finding, anatomy, seed = part(body, "finding"), part(body, "anatomy"), body["seed"]
    out = []
    for i in range(wanted(body) if n is None else n):
        x = int(hashlib.sha256(f"{part(body, 'modality')}/{finding}/{seed}/{i}".encode()).hexdigest(), 16)
        opener, trait, word = OPENERS[x % 9], TRAITS[x // 9 % 10], "abcdefghijklmnopqrstuvwxyz"[x // 90 % 26]
        out.append(f"{opener} of the {anatomy} in series {word}{i} with {trait} signs of {finding}.")
    return out


def events(content: str, *, finish: str | None = "stop", refusal: str = "", done: bool = True) -> list[str]:
    """The lines of a streamed answer."""
    shared = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "llm-7b-q4"}
    delta = lambda **d: shared | {"choices": [{"index": 0, "delta": d, "finish_reason": None}]}
    size = max(40, len(content) // 50)
    pieces = [content[i : i + size] for i in range(0, len(content), size)]
    chunks = [delta(role="assistant", content=""), *(delta(content=p) for p in pieces)]
    if refusal:
        chunks.append(delta(refusal=refusal))
    if finish:
        chunks.append(shared | {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    return [f"data: {json.dumps(c)}\n\n" for c in chunks] + (["data: [DONE]\n\n"] if done else [])


def good(handler: Handler, body: dict[str, Any]) -> None:
    handler.stream(events(json.dumps({"captions": captions(body)})))


def says(content: str, **options: Any) -> Callable[[Handler, dict[str, Any]], None]:
    return lambda handler, body: handler.stream(events(content, **options))


def gives(*texts: str) -> Callable[[Handler, dict[str, Any]], None]:
    return says(json.dumps({"captions": texts}))


def count(n: int) -> Callable[[Handler, dict[str, Any]], None]:
    """Well-formed, with another number of captions than asked for."""
    return lambda handler, body: handler.stream(events(json.dumps({"captions": captions(body, n)})))


def status(code: int, message: str = "no", **headers: str) -> Callable[[Handler, dict[str, Any]], None]:
    return lambda handler, body: handler.answer(code, {"error": {"message": message}}, headers)


def cut(handler: Handler, body: dict[str, Any]) -> None:
    """The connection ends in the middle of an answer."""
    handler.stream(events(json.dumps({"captions": captions(body)}))[:3], end=False)


def early(handler: Handler, body: dict[str, Any]) -> None:
    """The stream ends properly, the answer does not."""
    handler.stream(events(json.dumps({"captions": captions(body)}), finish=None))


def silent(handler: Handler, body: dict[str, Any]) -> None:
    handler.server.stopped.wait(20)


def stalls(handler: Handler, body: dict[str, Any]) -> None:
    handler.stream(events(json.dumps({"captions": captions(body)}))[:3], end=False, keep=True)


def half_refusal(handler: Handler, body: dict[str, Any]) -> None:
    """A refusal that announces more than it says."""
    handler.send_response(429)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"error"')
    handler.close_connection = True


def no_json_mode(handler: Handler, body: dict[str, Any]) -> None:
    """Refuses every response_format."""
    if "response_format" in body:
        handler.answer(400, {"error": {"message": "response_format is not supported"}}, {})
    else:
        handler.stream(events("Here you are:\n```json\n" + json.dumps(captions(body)) + "\n```"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(body)
            self.server.headers.append({k.lower(): v for k, v in self.headers.items()})
        if self.path != "/v1/chat/completions":
            self.answer(404, {"error": {"message": "no such path"}}, {})
            return
        if self.server.delay:
            time.sleep(self.server.delay)
        script = self.server.script
        action = script(body) if callable(script) else script[number] if number < len(script) else good
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            action(self, body)

    def answer(self, code: int, value: Any, headers: dict[str, str]) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, lines: list[str], *, end: bool = True, keep: bool = False) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            data = line.encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
        if end:
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True
        if keep:
            self.server.stopped.wait(20)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, script: Any = (), delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.delay = script, delay
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.handle_error = lambda *_: None  # clients that go away
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextlib.contextmanager
def serving(script: Any = (), delay: float = 0.0) -> Iterator[Server]:
    """A server; `script` is what it does at each request in turn and then answers well, or chooses by the body."""
    server = Server(script, delay)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    own = Server(delay=float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    Path(sys.argv[1]).write_text(own.url)
    own.serve_forever()
