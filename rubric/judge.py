"""A language model as judge: through any OpenAI-compatible endpoint, or a callable of the caller's.

The base URL and the key come from environment variables, and enter no message, no file and no metric. A question that
gets no usable grade makes its row invalid; nothing here ends a run. Answers are kept on disk by what was asked
(rubric/judge_cache.py); with `votes` above 1 a question is asked so often and the lower median counts.

429, 5xx, time-outs and answers that cannot be read are tried again, after backoff_s, 2 backoff_s, ... or as long as
Retry-After says. When IN_A_ROW questions have been lost with no answer in between, the rest of the batch is given up.

Redirects are refused: they would carry the key to another host.
"""

import hashlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import NamedTuple

from rubric import threads, verdict
from rubric.judge_cache import Cache
from rubric.verdict import Messages, Question

IN_A_ROW = 8  # questions lost with no answer in between (twice the concurrency if that is more): the judge is down
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
ANSWER_BYTES = 1 << 20
FORMATS = ("json_schema", "json_object", "none")


@dataclass(frozen=True)
class JudgeConfig:
    model: str  # as the endpoint calls it
    base_url_env: str  # environment variable that holds the base URL, https://.../v1
    key_env: str  # environment variable that holds the key; one that is not set sends none
    response_format: str  # json_schema | json_object | none: what the endpoint understands
    temperature: float  # 0 or more
    max_tokens: int  # of an answer
    votes: int  # answers to a question; their lower median is the grade
    concurrency: int  # requests at a time
    request_s: float  # seconds until a request is given up
    timeout_s: float  # seconds for a question, all its tries together
    retries: int  # further tries after the first
    backoff_s: float  # seconds before the first of them; doubles
    cache: str  # folder of answers; "" = none are kept


class Verdict(NamedTuple):
    grade: int | None  # 1 to 4; None when there is a reason
    reason: str  # "" for a grade
    spread: int = 0  # largest minus smallest vote
    cached: bool = False


@dataclass
class Costs:
    """Sums since the judge was made; a thread holds the judge's lock while it adds."""

    asked: int = 0  # questions
    cached: int = 0  # of them answered from disk
    requests: int = 0
    retried: int = 0
    lost: int = 0  # questions without a grade
    prompt_tokens: int = 0
    completion_tokens: int = 0
    disagreed: int = 0  # questions whose votes differ

    def metrics(self) -> dict[str, int]:
        return {f"judge/{name}": value for name, value in vars(self).items()}


def check(config: JudgeConfig) -> None:
    """Raises ValueError, in one line, for what no judge can work with. Looks at the environment; sends nothing."""
    if not config.model:
        raise ValueError("rubric.judge.model='': name the judge's model, as its endpoint calls it")
    url = os.environ.get(config.base_url_env, "")
    if not url.startswith(("http://", "https://")):
        raise ValueError(
            f"rubric.judge.base_url_env={config.base_url_env!r}: this environment variable is not set to a URL: "
            "export the endpoint's base URL under that name, https://.../v1"
        )
    if config.response_format not in FORMATS:
        raise ValueError(f"rubric.judge.response_format={config.response_format!r}: use {', '.join(FORMATS)}")
    for name, least in (("max_tokens", 1), ("votes", 1), ("concurrency", 1), ("retries", 0), ("temperature", 0)):
        if (value := getattr(config, name)) < least:
            raise ValueError(f"rubric.judge.{name}={value}: must be at least {least}")
    for name in ("request_s", "timeout_s", "backoff_s"):
        if not 0 < (value := getattr(config, name)) < float("inf"):
            raise ValueError(f"rubric.judge.{name}={value}: must be a positive number of seconds")


class _Lost(Exception):
    """A try that gave no grade."""

    def __init__(self, reason: str, again: bool, wait_s: float = 0.0):
        super().__init__(reason)
        self.again, self.wait_s = again, wait_s


class Judge:
    """Grades questions through an endpoint. Raises ValueError as `check`.

    Args:
      era: part of every key of the cache. A new number forgets what is kept: after a judge's model was found changed.
    """

    def __init__(self, config: JudgeConfig, era: int = 0):
        check(config)
        self.config, self.era, self.costs = config, era, Costs()
        self._url = os.environ[config.base_url_env].rstrip("/") + "/chat/completions"
        self._cache = Cache(config.cache) if config.cache else None
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def answers(self, questions: Sequence[Question], fresh: bool = False) -> list[Verdict]:
        """A verdict a question, in order; `fresh` neither reads nor writes the cache. Never raises for the endpoint's
        doing, and takes at most timeout_s a question and place in the queue."""
        lost = [0]  # in a row

        def one(question: Question) -> Verdict:
            with self._lock:
                down = lost[0] >= max(IN_A_ROW, 2 * self.config.concurrency)
            if down:
                return Verdict(None, f"given up: the {lost[0]} questions before it were lost")
            found = self._verdict(question, fresh)
            with self._lock:
                lost[0] = lost[0] + 1 if found.grade is None else 0
            return found

        def failed(reason: str, error: BaseException | None) -> Verdict:
            with self._lock:
                lost[0] += 1
            return Verdict(None, reason)

        found = threads.each(one, questions, self.config.concurrency, 1.1 * self.config.timeout_s + 0.1, failed)
        with self._lock:
            self.costs.asked += len(found)
            self.costs.cached += sum(each.cached for each in found)
            self.costs.lost += sum(each.grade is None for each in found)
            self.costs.disagreed += sum(each.spread > 0 for each in found)
        return found

    def _verdict(self, question: Question, fresh: bool) -> Verdict:
        deadline, grades, cached = time.monotonic() + self.config.timeout_s, [], True
        for vote in range(self.config.votes):
            body = self._body(verdict.messages(question), vote)
            key = hashlib.sha256(json.dumps([self.era, vote, self._url, body], sort_keys=True).encode()).hexdigest()
            grade = self._cache.get(key) if self._cache and not fresh else None
            if grade is None:
                cached = False
                try:
                    grade = self._asked(body, key, deadline)
                except _Lost as error:
                    return Verdict(None, str(error))
                if self._cache and not fresh:
                    self._cache.put(key, grade)
            grades.append(grade)
        return Verdict(median_low(grades), "", max(grades) - min(grades), cached)

    def _body(self, chat: Messages, vote: int) -> dict:
        body = {"model": self.config.model, "messages": chat, "temperature": self.config.temperature}
        body["max_tokens"] = self.config.max_tokens
        if vote:
            body["seed"] = vote  # an endpoint that keeps answers itself must not give the same one again
        if self.config.response_format == "json_schema":
            schema = {"name": "verdict", "strict": True, "schema": verdict.SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.config.response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    def _asked(self, body: dict, key: str, deadline: float) -> int:
        """The grade, after as many tries as it takes. Raises _Lost."""
        tries = self.config.retries + 1
        for number in range(tries):
            try:
                return self._try(body, deadline)
            except _Lost as error:
                # spread over half of the time and more, by the question, so that a crowd does not come back as one
                spread = 0.5 + int(key[:8], 16) / 2**33
                wait = max(error.wait_s, self.config.backoff_s * 2**number * spread)
                if not error.again:
                    raise
                if number + 1 == tries or time.monotonic() + wait >= deadline:
                    raise _Lost(f"{error} ({number + 1} of {tries} tries)", False) from error
            with self._lock:
                self.costs.retried += 1
            time.sleep(wait)
        raise AssertionError("unreachable")

    def _try(self, body: dict, deadline: float) -> int:
        left = min(self.config.request_s, deadline - time.monotonic())
        if left <= 0:
            raise _Lost("no time left for another try", False)
        with self._lock:
            self.costs.requests += 1
        answer = self._post(json.dumps(body).encode(), left)
        try:
            reply = json.loads(answer)
            text, usage = reply["choices"][0]["message"]["content"], reply.get("usage") or {}
            tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Lost("the answer is no chat completion", True) from error
        with self._lock:
            self.costs.prompt_tokens += tokens[0]
            self.costs.completion_tokens += tokens[1]
        grade = verdict.read(text) if isinstance(text, str) else None
        if grade is None:
            raise _Lost("the answer holds no grade from 1 to 4", True)
        return grade

    def _post(self, data: bytes, limit_s: float) -> bytes:
        """The body of the answer. What goes wrong is told by its kind alone: texts could hold the URL or the key."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.config.key_env):
            headers["Authorization"] = f"Bearer {key}"
        until, chunks, size = time.monotonic() + limit_s, [], 0
        try:
            request = urllib.request.Request(self._url, data, headers)
            with self._opener.open(request, timeout=limit_s) as response:
                while chunk := response.read1(1 << 16):
                    chunks.append(chunk)
                    size += len(chunk)
                    if time.monotonic() > until:
                        raise TimeoutError
                    if size > ANSWER_BYTES:
                        raise _Lost(f"the answer is over {ANSWER_BYTES} bytes", False)
        except urllib.error.HTTPError as error:
            with error:
                raise _Lost(f"HTTP {error.code}", error.code in AGAIN, _retry_after(error)) from None
        except TimeoutError:
            raise _Lost(f"timeout: over {limit_s:.3g} s", True) from None
        except urllib.error.URLError as error:
            kind = type(error.reason).__name__ if isinstance(error.reason, BaseException) else "URLError"
            raise _Lost("timeout of the connection" if kind == "TimeoutError" else kind, True) from None
        except (OSError, ValueError, urllib.error.ContentTooShortError) as error:
            raise _Lost(type(error).__name__, True) from None
        except _Lost:
            raise
        except Exception as error:  # http.client has kinds of its own: a line too long, an incomplete read
            raise _Lost(type(error).__name__, True) from None
        return b"".join(chunks)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the endpoint asks to wait; 0 where it says none, or a date."""
    text = error.headers.get("Retry-After") or ""
    return float(text) if text.replace(".", "", 1).isdecimal() else 0.0


class SelfJudge:
    """Grades questions with a callable, such as the policy itself: chats in, one text each out.

    The callable gets all questions of a batch at once, on the caller's thread; what it raises makes them invalid. It
    has no limit of time but its own.
    """

    def __init__(self, ask: Callable[[list[Messages]], Sequence[str]]):
        self._ask, self.costs = ask, Costs()

    def answers(self, questions: Sequence[Question], fresh: bool = False) -> list[Verdict]:
        self.costs.asked += len(questions)
        try:
            texts = list(self._ask([verdict.messages(question) for question in questions])) if questions else []
            if len(texts) != len(questions):
                raise ValueError(f"{len(texts)} answers to {len(questions)} questions")
            grades = [verdict.read(text) for text in texts]
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
            self.costs.lost += len(questions)
            return [Verdict(None, reason) for _ in questions]
        self.costs.requests += bool(questions)
        self.costs.lost += sum(grade is None for grade in grades)
        return [Verdict(grade, "" if grade else "the answer holds no grade from 1 to 4") for grade in grades]
