"""A search service over a corpus, for environments that retrieve.

    python -m rubric.search_service --corpus corpus.jsonl [--host 127.0.0.1] [--port 8000] [--mode bm25|dense]

    GET  /health                                      200 {"status": "ok", "documents": N, "mode": ...}
    POST /search {"query": str}                       200 {"results": [[{"id", "title", "text", "score"}, ...]]}
    POST /search {"queries": [str, ...], "topk": n}   the same, one list a query

A body that is not one of these gets 400 with {"error": ...}, another path 404. A request that has waited `--timeout`
seconds for its turn gets 503. With `--reply text` the answer to one query is a JSON string "Doc 1(Title: ...) ...", the
form that environments written for RL2 post on as it is; the default is the form above. Port 0 takes a free one; the
address is the first line printed. SIGTERM and SIGINT end the service after the requests that are being answered.

It has no password: keep it on the loopback or inside a trusted network.
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from rubric.search_index import DENSE_MODEL, MODES, Corpus, Hit, Index

BODY_BYTES = 1 << 20
QUERIES = 256  # of one request
QUERY_CHARACTERS = 2000
TOPK, MOST_TOPK = 3, 100
IDLE_S = 30.0  # until a connection that says nothing is closed
AT_ONCE = max(2, os.cpu_count() or 1)  # searches; more would only share the processors


class Asked(NamedTuple):
    queries: list[str]
    topk: int
    single: bool  # asked as "query"


def passages(hits: Sequence[Hit]) -> str:
    """Doc 1(Title: ...) text, a line a document: the form that searching policies are shown."""
    return "\n".join(f"Doc {n}(Title: {hit['title']}) {hit['text']}" for n, hit in enumerate(hits, 1))


def read_request(body: bytes) -> Asked:
    """Raises ValueError, one line for the client, on a body that is no search request."""
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError('the body is not JSON; send {"query": "..."} or {"queries": ["..."], "topk": 3}') from None
    if not isinstance(raw, dict) or ("query" in raw) == ("queries" in raw):
        raise ValueError('expected {"query": "..."} or {"queries": ["..."], "topk": 3}')
    queries, topk = raw.get("queries", [raw.get("query")]), raw.get("topk", TOPK)
    if not isinstance(queries, list) or not 1 <= len(queries) <= QUERIES:
        raise ValueError(f"queries must be a list of 1 to {QUERIES} texts")
    for query in queries:
        if not isinstance(query, str) or not query.strip() or len(query) > QUERY_CHARACTERS:
            raise ValueError(f"a query must be a text of 1 to {QUERY_CHARACTERS} characters")
    if isinstance(topk, bool) or not isinstance(topk, int) or not 1 <= topk <= MOST_TOPK:
        raise ValueError(f"topk must be a whole number from 1 to {MOST_TOPK}")
    return Asked(queries, topk, "query" in raw)


class Service(ThreadingHTTPServer):
    """One thread a connection; `index` answers at most AT_ONCE of them at a time."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], index: Index, about: dict, text_reply: bool, timeout_s: float):
        super().__init__(address, _Handler)
        self.index, self.about, self.text_reply, self.timeout_s = index, about, text_reply, timeout_s
        self.turns = threading.BoundedSemaphore(AT_ONCE)
        self.busy, self.idle = 0, threading.Condition()

    def drain(self, seconds: float) -> None:
        """Waits for the requests that are being answered."""
        with self.idle:
            self.idle.wait_for(lambda: self.busy == 0, seconds)

    def handle_error(self, request, client_address) -> None:
        pass  # a client that hung up


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    server: Service

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(200, {"status": "ok", **self.server.about})
        else:
            self._reply(404, {"error": f"no such path: {self.path[:100]}; there are GET /health and POST /search"})

    def do_POST(self) -> None:
        with self.server.idle:
            self.server.busy += 1
        try:
            self._search()
        finally:
            with self.server.idle:
                self.server.busy -= 1
                self.server.idle.notify_all()

    def _search(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= BODY_BYTES:
            self.close_connection = True  # the body stays unread
            return self._reply(400, {"error": f"expected a Content-Length of at most {BODY_BYTES} bytes"})
        body = self.rfile.read(length)
        if self.path != "/search":
            return self._reply(404, {"error": f"no such path: {self.path[:100]}; there are GET /health, POST /search"})
        try:
            asked = read_request(body)
        except ValueError as error:
            return self._reply(400, {"error": str(error)})
        if not self.server.turns.acquire(timeout=self.server.timeout_s):
            return self._reply(503, {"error": f"busy for {self.server.timeout_s:g} s; ask again"})
        try:
            results = self.server.index.search(asked.queries, asked.topk)
        except Exception as error:
            return self._reply(500, {"error": f"the search failed: {type(error).__name__}"})
        finally:
            self.server.turns.release()
        text = asked.single and self.server.text_reply
        self._reply(200, passages(results[0]) if text else {"results": results})

    def _reply(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass  # a line a request would be most of a run's log


def build(corpus: str, mode: str, model: str = DENSE_MODEL) -> tuple[Index, dict]:
    """The index, and what /health says of it. Raises ValueError or FileNotFoundError, one line."""
    documents = Corpus(corpus)
    index = MODES[mode](documents, model)
    return index, {"documents": len(documents.starts), "mode": mode}


@contextmanager
def running(
    corpus: str, mode: str = "bm25", host: str = "127.0.0.1", port: int = 0, text_reply: bool = False
) -> Iterator[str]:
    """The service in threads of this process, for a notebook or a test; gives its URL."""
    service = Service((host, port), *build(corpus, mode), text_reply, timeout_s=10.0)
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{service.server_address[1]}"
    finally:
        service.shutdown()
        service.drain(5.0)
        service.server_close()
        thread.join(5.0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rubric.search_service", description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="JSONL: {id, title, text}, or {id, contents: title\\ntext}")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--mode", choices=[*MODES], default="bm25")
    parser.add_argument("--model", default=DENSE_MODEL, help="of --mode dense: a folder, a hub id, or that package")
    parser.add_argument("--reply", choices=["results", "text"], default="results", help="to a single query")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds a request may wait for its turn")
    arguments = parser.parse_args()
    try:
        index, about = build(arguments.corpus, arguments.mode, arguments.model)
        address = (arguments.host, arguments.port)
        service = Service(address, index, about, arguments.reply == "text", arguments.timeout)
    except (ValueError, OSError, OverflowError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error

    def stop(*_: object) -> None:
        threading.Thread(target=service.shutdown, daemon=True).start()  # shutdown waits for the loop that runs here

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    host, port = service.server_address[:2]
    print(f"http://{host}:{port} serves {about['documents']} documents by {about['mode']}", flush=True)
    service.serve_forever(poll_interval=0.1)
    service.drain(arguments.timeout)
    service.server_close()


if __name__ == "__main__":
    main()
