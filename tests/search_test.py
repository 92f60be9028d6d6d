"""The search environment and its client: queries, answers, and a service that is slow, faulty, wrong, away and back."""

import http.server
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from rubric.environments.protocol import Unavailable
from rubric.environments.runner import Environments
from rubric.environments.search import Client, SearchR1, last_answer, normalised_answer

HIT = {"id": "1", "title": "Oss", "text": "A river.", "score": 1.0}


@contextmanager
def fake(answers):
    """A service that gives `answers(number, request)` -> (status, value or bytes); its requests are kept."""
    requests, lock = [], threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append(request)
                number = len(requests)
            status, value = answers(number, request)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client did not wait

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.requests = True, requests
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def right(number, request):
    return 200, {"results": [[HIT | {"text": query}] for query in request["queries"]]}


def client(url: str, **options) -> Client:
    return Client(url, options.pop("timeout_s", 2.0), pause_s=0.01, **options)


def said(text: str) -> list[dict]:
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]


def test_answers_come_in_the_order_of_the_queries_in_few_requests():
    with fake(right) as service:
        queries = [f"q{number}" for number in range(300)]
        assert [hits[0]["text"] for hits in client(service.url).search(queries, 2)] == queries
        assert [len(request["queries"]) for request in service.requests] == [256, 44]
        assert service.requests[0]["topk"] == 2
        assert client(service.url + "/").search([], 2) == []


@pytest.mark.parametrize(
    "status, value",
    [(500, {"error": "x"}), (429, {}), (503, b""), (200, b"<html>"), (200, {"results": []}), (200, [1]), (200, {})],
)
def test_faults_are_asked_again(status, value):
    with fake(lambda number, request: right(number, request) if number == 3 else (status, value)) as service:
        assert client(service.url).search(["a"], 1)[0][0]["text"] == "a"
        assert len(service.requests) == 3


def test_a_refused_request_is_no_fault_of_the_service():
    with fake(lambda number, request: (400, {"error": "no"})) as service:
        asking = client(service.url, failures=1)
        for _ in range(3):
            with pytest.raises(ValueError, match="refused a request with status 400"):
                asking.search(["a"], 1)
        assert len(service.requests) == 3


def test_slow_answers_are_given_up():
    def slow(number, request):
        time.sleep(1.0)
        return right(number, request)

    with fake(slow) as service:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="does not answer") as error:
            client(service.url, timeout_s=0.1).search(["a"], 1)
        assert time.monotonic() - began < 0.9
        assert "python -m rubric.search_service" in str(error.value) and "\n" not in str(error.value)


def test_the_circuit_opens_and_one_request_closes_it_again():
    up = threading.Event()
    with fake(lambda number, request: right(number, request) if up.is_set() else (500, {})) as service:
        asking = client(service.url, failures=2, rest_s=0.3)
        for _ in range(2):
            with pytest.raises(Unavailable, match="status 500"):
                asking.search(["a"], 1)
        assert len(service.requests) == 6  # three attempts each
        for _ in range(20):
            with pytest.raises(Unavailable, match="is down"):
                asking.search(["a"], 1)
        assert len(service.requests) == 6  # none of them was sent
        time.sleep(0.35)
        with pytest.raises(Unavailable, match="status 500"):
            asking.search(["a"], 1)
        assert len(service.requests) == 7  # one attempt to see
        with pytest.raises(Unavailable, match="is down"):
            asking.search(["a"], 1)
        time.sleep(0.35)
        up.set()
        assert asking.search(["a"], 1) and asking.search(["b"], 1)
        assert len(service.requests) == 9


def test_while_one_request_looks_the_others_fail_at_once():
    looking, go_on = threading.Event(), threading.Event()

    def answers(number, request):
        if number <= 3:
            return 500, {}
        looking.set()
        go_on.wait(5)
        return right(number, request)

    with fake(answers) as service, ThreadPoolExecutor(1) as threads:
        asking = client(service.url, failures=1, rest_s=0.0)
        with pytest.raises(Unavailable):
            asking.search(["a"], 1)
        probe = threads.submit(asking.search, ["a"], 1)
        looking.wait(5)
        with pytest.raises(Unavailable, match="is down"):
            asking.search(["b"], 1)
        go_on.set()
        assert probe.result()[0][0]["text"] == "a"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:99999", "http://x:y", ""])
def test_wrong_addresses_are_one_line(url):
    with pytest.raises(ValueError, match="is no address of a search service"):
        Client(url, 1.0)


class Recorded:
    """A client that finds each query's own words."""

    def __init__(self):
        self.asked = []

    def search(self, queries, topk):
        self.asked.append([*queries])
        return [[{"title": "T", "text": f"about {query}"}] * topk if query != "nothing" else [] for query in queries]


@pytest.mark.parametrize(
    "reply, contents",
    [
        ("I know it.", []),
        ("<answer>Oss</answer>", []),
        ("<search>a</search> <answer>Oss</answer>", []),
        ("<search> river\nOss </search>", ["<information>Doc 1(Title: T) about river\nOss</information>"]),
        ("<search>nothing</search>", ["<information>nothing found</information>"]),
        ("<search>a", ["error: <search> without </search>"]),
        ("<search> </search>", ["error: the query is empty"]),
        (f"<search>{'x' * 401}</search>", ["error: the query is over 400 characters"]),
        (
            "<search>a</search><search></search><search>b</search>",
            [
                "<information>Doc 1(Title: T) about a</information>",
                "error: the query is empty",
                "<information>Doc 1(Title: T) about b</information>",
            ],
        ),
    ],
)
def test_searches_are_answered_in_order(reply, contents):
    turns = SearchR1(Recorded(), 1).interact(said(reply))
    assert turns == [{"role": "tool", "content": content} for content in contents]


def test_searches_are_bounded_and_long_documents_cut():
    turns = SearchR1(Recorded(), 2).interact(said("<search>a</search>" * 9))
    assert len(turns) == 5 and "more than 4 searches" in turns[-1]["content"]
    assert turns[0]["content"] == "<information>Doc 1(Title: T) about a\nDoc 2(Title: T) about a</information>"
    recorded = Recorded()
    recorded.search = lambda queries, topk: [[{"title": "T", "text": "x" * 5000}]]
    (turn,) = SearchR1(recorded, 1).interact(said("<search>a</search>"))
    assert len(turn["content"]) < 700


def test_a_batch_is_one_request():
    recorded = Recorded()
    replies = ["<search>a</search>", "no", "<search>b</search><search>c</search>", "<answer>x</answer>"]
    found = SearchR1(recorded, 1).interact_all([said(reply) for reply in replies])
    assert recorded.asked == [["a", "b", "c"]] and [len(turns) for turns in found] == [1, 0, 2, 0]
    assert "about c" in found[2][1]["content"]


def test_rows_that_search_are_invalid_while_the_service_is_down_and_the_others_are_not():
    with fake(right) as service:
        pass  # its port is free again
    down = SearchR1(client(service.url, timeout_s=0.2), 1)
    with Environments([down]) as environments:
        replies = ["<search>a</search>", "<answer>x</answer>", "done", "<search>", "<search>b</search>"]
        turns = environments.interact([0] * 5, [{}] * 5, [said(reply) for reply in replies])
    assert [bool(turn.reason) for turn in turns] == [True, False, False, False, True]
    assert "start it with python -m rubric.search_service" in turns[0].reason
    assert turns[3].messages[0]["content"] == "error: <search> without </search>"


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The  Oss!", "oss"),
        ("a river, an end", "river end"),
        ("theory of An. anthem", "theory of anthem"),
        ("U.S.", "us"),
        ("don't", "dont"),
        ("  Ärger\n", "ärger"),
        ("the", ""),
        ("bridge-builder", "bridgebuilder"),
    ],
)
def test_squad_normalisation_by_hand(text, normal):
    assert normalised_answer(text) == normal


@pytest.mark.parametrize(
    "reply, answer, grade",
    [
        ("<answer>Oss</answer>", "Oss", 4),
        ("So <answer> the OSS. </answer> it is", "Oss", 4),
        ("<answer>x</answer><answer>Oss</answer>", ["River Oss", "Oss"], 4),
        ("<answer>Oss</answer><answer>x</answer>", "Oss", 2),  # the last counts
        ("<answer>Oss and Velmar</answer>", "Oss", 2),
        ("<answer></answer>", "Oss", 2),
        ("the Oss", "Oss", 3),
        ("It is the Oss", "Oss", 1),
        ("<answer>Oss", "Oss", 1),
        ("</answer><answer>", "Oss", 1),
        ("<search>Oss</search>", "Oss", 1),
        ("<answer>1850</answer>", 1850, 4),
        ("", "Oss", 1),
    ],
)
def test_grades(reply, answer, grade):
    assert SearchR1(Recorded(), 1).grade(said(reply), answer) == grade


def test_a_row_without_an_answer_is_an_error():
    for answer in (None, [], "", "the", [""]):
        with pytest.raises(ValueError, match="is empty: give the right answer"):
            SearchR1(Recorded(), 1).grade(said("x"), answer)


def test_last_answer():
    assert last_answer("<answer>a</answer> <answer>b</answer> <answer>") == "b"
    assert last_answer("a</answer>") is None
