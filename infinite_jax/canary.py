"""The canary: how far the parameters have moved from the start of the run on text that no domain trains.

    canary/nll         mean over the tokens of a fixed text of -log p(token), nats
    canary/kl          mean over positions of neutral prompts of KL(start || now) = sum_v p0 log(p0 / p), nats
    canary/kl_reverse  the same with the two exchanged, KL(now || start): what a KL penalty on samples estimates

kl is large where the start gave weight to tokens that have become unlikely: something was lost. kl_reverse is large
where the policy now writes what the start would not.

The texts are canary.txt: 16 lines of prose, each a row cut to TEXT_TOKENS, an empty line, 16 prompts. A prompt counts
with its last POSITIONS positions, in a chat the markup that opens the reply and thus its first token included. Values
depend on the tokenizer: compare runs of one model.

The start's predictions are taken once, when the canary is made, from the parameters that a run begins with, and kept on
the host as float32 log-probabilities: 16 x POSITIONS x V, 50 MB for a vocabulary of 49,152. A resumed run loads its
start from model.path, as it does for a reference, and so has the same numbers; whether there is a reference does not
matter. Keeping the start's unembedding instead would take E x V, more for every model wider than 256.

Both sides run in float32 at full matrix precision, whatever the run computes in: bfloat16's rounding would stand in the
KL. Its sum is taken as sum_v p0 log(p0 / p) + p - p0, where what is added is 0 if both sum to 1: no term is negative,
and an error of the normalisers cancels to first order.

Left out: a benchmark of general skills (add it as an eval-only domain).
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from infinite_jax.placement import place
from kernels.logprob import token_logp
from models import lora, policy
from models import tokenizer as chat
from models.architectures import DecoderConfig
from models.layout import padded, positions
from sharding.rules import constrain

TEXT_TOKENS = 64  # of each line of prose
POSITIONS = 16  # of each prompt, the last ones
CHUNK = 4  # positions of all prompts whose distributions are on the device at a time
FILE = Path(__file__).parent / "canary.txt"


class Canary:
    """Holds the texts and the start's predictions; `run` is a function of the parameters only.

    Args:
      apply_chat_template: as for the run's own prompts.
      start: the parameters at step 0, in the dtype they are stored in; read here and not kept.
      base: what the parameters that `run` takes are adapters of, or None.

    Raises ValueError where the tokenizer and the model do not belong together.
    """

    def __init__(
        self, decoder: DecoderConfig, mesh: Mesh, tokenizer, pad_id: int, apply_chat_template: bool, start, base=None
    ):
        text, prompts = (block.splitlines() for block in FILE.read_text(encoding="utf-8").strip().split("\n\n"))
        text = [_encode(tokenizer, line, False)[:TEXT_TOKENS] for line in text]
        prompts = [_encode(tokenizer, line, apply_chat_template) for line in prompts]
        largest = max(map(max, text + prompts))
        if largest >= decoder.vocab_size:
            raise ValueError(
                f"the tokenizer gives id {largest}, the model knows {decoder.vocab_size}: use the tokenizer that the "
                "model was trained with"
            )
        width = -(-max(map(len, text + prompts)) // 32) * 32  # one shape for both, one compiled program
        self.mesh, self.base = mesh, base
        self.text_RT, self.length_R = _rows(text, width, pad_id)
        self.prompt_PT, length_P = _rows(prompts, width, pad_id)
        self.position_PC = length_P[:, None] - POSITIONS + np.arange(POSITIONS)  # negative where the prompt is shorter
        self.decoder = dataclasses.replace(decoder, dtype="float32", remat="none", attention="xla")
        with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
            self._start = [jax.device_get(log_prob_PCV) for log_prob_PCV in self._predictions(start)]

    def run(self, params) -> dict[str, float]:
        """canary/nll, canary/kl, canary/kl_reverse. Parameters are read, not donated."""
        params = lora.join(self.decoder, self.base, params)
        with jax.set_mesh(self.mesh), jax.default_matmul_precision("float32"):
            text_RT = place(self.mesh, self.text_RT)
            nll = _nll(self.decoder, params, _hidden(self.decoder, params, text_RT), text_RT, self.length_R)
            pairs = zip(self._start, self._predictions(params))
            kl_PC2 = [jax.device_get(_divergence(start, now)) for start, now in pairs]
        kl_PC2 = np.concatenate(kl_PC2, axis=1).astype(np.float64)
        forward, reverse = kl_PC2[self.position_PC >= 0].mean(axis=0)
        return {"canary/nll": float(nll), "canary/kl": float(forward), "canary/kl_reverse": float(reverse)}

    def _predictions(self, params):
        """Yields log-probabilities [P, CHUNK, V] of the next token at the prompts' positions, in their order."""
        hidden_PTE = _hidden(self.decoder, params, place(self.mesh, self.prompt_PT))
        for first in range(0, POSITIONS, CHUNK):
            at_PC = np.maximum(self.position_PC[:, first : first + CHUNK], 0)
            yield _log_probs(self.decoder, params, hidden_PTE, at_PC)


def divergence(start: jax.Array, now: jax.Array) -> jax.Array:
    """KL(start || now) and KL(now || start) of log-probabilities [..., V], f32 [..., 2]."""
    p0, p, ratio = jnp.exp(start), jnp.exp(now), start - now
    return jnp.stack([jnp.sum(p0 * ratio + (p - p0), -1), jnp.sum(-p * ratio + (p0 - p), -1)], -1)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(decoder: DecoderConfig, params, rows_RT) -> jax.Array:
    """Last hidden states [R, T, E] in reading order, whatever splits the rows, which are short."""
    width = rows_RT.shape[1]
    order = positions(padded(width))
    rows_RT = jnp.pad(rows_RT, ((0, 0), (0, padded(width) - width)))[:, order]
    return policy.hidden(decoder, params, rows_RT)[:, np.argsort(order)[:width]]


@jax.jit
def _divergence(start: jax.Array, now: jax.Array) -> jax.Array:
    return constrain(divergence(start, now), None, None, None)  # whole everywhere: every process can fetch it


@functools.partial(jax.jit, static_argnums=0)
def _nll(decoder: DecoderConfig, params, hidden_RTE, text_RT, length_R) -> jax.Array:
    """Mean -log p over the tokens of all rows but each one's first, f32[]."""
    logp_RT, _ = token_logp(functools.partial(policy.unembed, decoder, params), hidden_RTE[:, :-1], text_RT[:, 1:])
    inside_RT = jnp.arange(1, text_RT.shape[1]) < length_R[:, None]
    return -jnp.sum(logp_RT, where=inside_RT) / jnp.sum(inside_RT)


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(decoder: DecoderConfig, params, hidden_PTE, position_PC) -> jax.Array:
    """Log-probabilities of what follows each position, f32 [P, C, V]."""
    hidden_PCE = jnp.take_along_axis(hidden_PTE, position_PC[..., None], axis=1)
    return constrain(jax.nn.log_softmax(policy.unembed(decoder, params, hidden_PCE)), None, None, None)


def _encode(tokenizer, line: str, template: bool) -> list[int]:
    return chat.encode_prompt(tokenizer, [{"role": "user", "content": line}], apply_chat_template=template)


def _rows(lines: list[list[int]], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(i32 [lines, width], i32 [lines] lengths)."""
    rows = np.full((len(lines), width), pad_id, np.int32)
    for row, ids in zip(rows, lines):
        row[: len(ids)] = ids
    return rows, np.array([len(ids) for ids in lines], np.int32)
