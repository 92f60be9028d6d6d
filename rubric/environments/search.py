"""Search between turns: a client of the search service that gives up in time, and the environment `searchr1`.

    policy        ... <search>who founded Velmar</search>
    environment   <information>Doc 1(Title: Velmar) ...</information>
    policy        ... <answer>Oru Tannic</answer>

The form is Search-R1's (2503.09516); the answer is graded by exact match after SQuAD's normalisation (1606.05250).

A service that is down says nothing about the policy: its rows are invalid. The client asks again with growing pauses;
after several failed requests in a row it stops asking for a while and fails at once, then lets one request through to
see. Without that every step of a run whose service died would last as long as all its time limits together.
"""

import http.client
import json
import re
import string
import threading
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from rubric.environments.protocol import Message, Unavailable
from rubric.search_service import QUERIES, Hit, passages

URL = "http://127.0.0.1:8000"
ATTEMPTS = 3
PAUSE_S = 0.2  # before the second attempt; doubled before each further one
FAILURES = 3  # failed requests in a row after which the circuit opens
REST_S = 15.0  # seconds it stays open
MOST_QUERIES = 4  # of one reply
QUERY_CHARACTERS = 400
PASSAGE_CHARACTERS = 600  # of a document that is shown

_SEARCH = re.compile(r"<search>(.*?)</search>", re.DOTALL)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Client:
    """Of the service at `url`. Safe to use from threads.

    Args:
      timeout_s: seconds until an attempt is given up.
    """

    def __init__(
        self, url: str, timeout_s: float, *, pause_s: float = PAUSE_S, failures: int = FAILURES, rest_s: float = REST_S
    ):
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ValueError(f"url={url} is no address of a search service; write {URL}")
        if not 0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s={timeout_s:g} is no positive number of seconds")
        self.url, self._parts, self._timeout_s = url, parts, timeout_s
        self._pause_s, self._most_failures, self._rest_s = pause_s, failures, rest_s
        self._lock, self._failures, self._open_until = threading.Lock(), 0, 0.0

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """Raises Unavailable when the service does not answer, ValueError when it refuses the request."""
        return [
            hits
            for start in range(0, len(queries), QUERIES)
            for hits in self._ask([*queries[start : start + QUERIES]], topk)
        ]

    def _ask(self, queries: list[str], topk: int) -> list[list[Hit]]:
        with self._lock:
            if time.monotonic() < self._open_until:
                raise Unavailable(f"search service {self.url} is down; asked again every {self._rest_s:g} s")
            probing = self._failures >= self._most_failures
            if probing:  # the others keep failing at once while this request finds out
                self._open_until = time.monotonic() + self._timeout_s
        attempts = 1 if probing else ATTEMPTS
        for attempt in range(attempts):
            if attempt:
                time.sleep(self._pause_s * 2 ** (attempt - 1))
            try:
                results = self._post({"queries": queries, "topk": topk})
            except (OSError, http.client.HTTPException, _Faulty) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                continue
            with self._lock:
                self._failures, self._open_until = 0, 0.0
            return results
        with self._lock:
            self._failures += 1
            self._open_until = time.monotonic() + self._rest_s if self._failures >= self._most_failures else 0.0
        raise Unavailable(
            f"search service {self.url} does not answer ({reason}): start it with python -m rubric.search_service"
        )

    def _post(self, request: dict) -> list[list[Hit]]:
        """Not through urllib, which would send a request to the loopback through a proxy of the environment."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname, self._parts.port, timeout=self._timeout_s)
        try:
            headers = {"Content-Type": "application/json"}
            path = self._parts.path.rstrip("/") + "/search"
            connection.request("POST", path, json.dumps(request).encode(), headers)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status >= 500 or response.status == 429:
            raise _Faulty(f"status {response.status}")
        if response.status != 200:
            raise ValueError(f"search service {self.url} refused a request with status {response.status}: {body[:100]}")
        return _results(body, len(request["queries"]))


class _Faulty(Exception):
    """An answer that another attempt may better."""


def _results(body: bytes, number: int) -> list[list[Hit]]:
    try:
        results = json.loads(body)["results"]
        if len(results) != number:
            raise _Faulty(f"{len(results)} results for {number} queries")
        return [[{"title": str(hit["title"]), "text": str(hit["text"])} for hit in hits] for hits in results]
    except (ValueError, TypeError, KeyError):
        raise _Faulty("its answer is not that of a search service") from None


def normalised_answer(text: str) -> str:
    """Lower case without punctuation and articles, white space runs made one blank (SQuAD's evaluation)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def last_answer(reply: str) -> str | None:
    """Content of the last <answer>...</answer>; None where there is none."""
    end = reply.rfind("</answer>")
    start = reply.rfind("<answer>", 0, max(end, 0))
    return reply[start + len("<answer>") : end] if 0 <= start < end else None


class SearchR1:
    """Answers <search>; over as soon as a reply has an <answer> or asks nothing."""

    stops = ("</search>", "</answer>")

    def __init__(self, client: Client, topk: int):
        if topk < 1:
            raise ValueError(f"topk={topk} is no positive whole number")
        self._client, self._topk = client, topk

    def interact(self, messages: Sequence[Message]) -> list[Message]:
        (turns,) = self.interact_all([messages])
        if isinstance(turns, Unavailable):
            raise turns
        return turns

    def interact_all(self, conversations: Sequence[Sequence[Message]]) -> list[list[Message] | Unavailable]:
        """All queries of all conversations go to the service together."""
        asked = [self._asked(messages[-1]["content"]) for messages in conversations]
        queries = [query for own in asked for query, error in own if not error]
        try:
            found = iter(self._client.search(queries, self._topk) if queries else [])
        except Unavailable as error:
            return [error if any(not wrong for _, wrong in own) else self._turns(own, iter(())) for own in asked]
        return [self._turns(own, found) for own in asked]

    def _asked(self, reply: str) -> list[tuple[str, str]]:
        """(query, what is wrong with it) for each search of a reply."""
        if last_answer(reply) is not None:
            return []
        queries = [query.strip() for query in _SEARCH.findall(reply)]
        if not queries and "<search>" in reply:
            return [("", "error: <search> without </search>")]
        asked = [(query, _wrong(query)) for query in queries[:MOST_QUERIES]]
        if len(queries) > MOST_QUERIES:
            asked.append(
                ("", f"error: more than {MOST_QUERIES} searches in one reply; the others were not carried out")
            )
        return asked

    def _turns(self, asked: list[tuple[str, str]], found) -> list[Message]:
        return [{"role": "tool", "content": error or _information(next(found))} for _, error in asked]

    def grade(self, messages: Sequence[Message], answer: object) -> float:
        """4 the last reply's <answer> is one of the accepted answers; 3 the whole reply is, without tags; 2 another
        <answer>; 1 else. Raises ValueError when there is no accepted answer."""
        accepted = {normalised_answer(str(text)) for text in (answer if isinstance(answer, list | tuple) else [answer])}
        accepted.discard("")
        if not accepted or answer is None:
            raise ValueError(f"answer {answer!r} is empty: give the right answer, or a list of right answers")
        reply = messages[-1]["content"]
        inner = last_answer(reply)
        if inner is None:
            return 3.0 if normalised_answer(reply) in accepted else 1.0
        return 4.0 if normalised_answer(inner) in accepted else 2.0


def _wrong(query: str) -> str:
    if not query:
        return "error: the query is empty"
    return f"error: the query is over {QUERY_CHARACTERS} characters" if len(query) > QUERY_CHARACTERS else ""


def _information(hits: Sequence[Hit]) -> str:
    shown = [{"title": hit["title"], "text": str(hit["text"])[:PASSAGE_CHARACTERS]} for hit in hits]
    return f"<information>{passages(shown) or 'nothing found'}</information>"
