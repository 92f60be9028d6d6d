"""Whether the model itself knows the evaluation prompts, before this project trained on anything.

    completed  of a prompt cut after half of its tokens, the share of prompts whose next TAIL tokens come out as they
               stand, greedily (Golchin & Surdeanu 2023, 2308.08493). They do where each is the most probable one after
               those before it, so that one pass over the whole prompt tells, and nothing is generated
    gap        mean log-probability a token of the prompt, less that of its twins, in which every number is another of
               as many digits and, where there is none, one long word is another of the domain's (Mattern et al. 2023,
               2305.18462)

A prompt that was in the model's training data is completed and gains on its twins. A template that everyone knows is
completed as well, so that `completed` alone says little of generated domains. Intervals are 95 %, over prompts:
Wilson's and Student's. Prompts are read as plain text, without a chat template, their first LONGEST tokens. Nothing is
done about what is found: what a base model knows cannot be taken out of it, and its score there is no proof of skill.
"""

import functools
import random
import re

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import Config
from curriculum import slots
from curriculum.domains import Domain
from infinite_jax import statistics
from infinite_jax.placement import place
from infinite_jax.session import sized
from models import policy, source
from models import tokenizer as chat
from models.architectures import DecoderConfig
from models.layout import padded, positions
from sharding.mesh import make_mesh

TWINS = 4  # of a prompt
TAIL = 8  # tokens to come out as they stand
LONGEST = 256  # tokens of a prompt that are read
BATCH = 8  # rows at a time: logits of all their positions are held
LONG = 5  # letters of a word that a twin may exchange


def measure(config: Config, found: list[Domain]) -> dict:
    """{"status", "note", "domains": {name: {prompts, completed, completed_interval, gap, gap_interval}}} of the base
    model on contamination.memorised evaluation prompts a domain; NOT RUN where the model cannot be loaded."""
    try:
        mesh = make_mesh(sized(config, source.network(config.model)))
        text = source.load_tokenizer(config.model)
        decoder, params = source.load(config.model, mesh)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return {"status": "NOT RUN", "note": " ".join(str(error).split()), "domains": {}}
    domains = {}
    for domain in found:
        asked = [row["messages"][-1]["content"] for row in domain.test_rows]
        chosen = [asked[i] for i in slots.sample(len(asked), config.contamination.memorised)]
        made = [[prompt, *twins(prompt, asked)] for prompt in chosen]
        rows = [encode(text, line) for lines in made for line in lines]
        with jax.set_mesh(mesh):
            scores = iter(score(decoder, params, mesh, rows, chat.pad_id(text)))
        domains[domain.name] = _estimates([[next(scores) for _ in lines] for lines in made])
    return {"status": "ran", "note": "", "domains": domains}


def twins(prompt: str, asked: list[str]) -> list[str]:
    """TWINS different variants of a prompt, the same every time; fewer where it has nothing to exchange."""
    rng, made = random.Random(prompt), {}
    others = sorted({word for text in asked for word in re.findall(rf"[^\W\d_]{{{LONG},}}", text)})
    words = [found for found in re.finditer(rf"[^\W\d_]{{{LONG},}}", prompt)]
    for _ in range(10 * TWINS):
        if re.search(r"\d", prompt):
            twin = re.sub(r"\d+", lambda found: _number(found.group(), rng), prompt)
        elif words and others:
            place = rng.choice(words)
            twin = prompt[: place.start()] + rng.choice(others) + prompt[place.end() :]
        else:
            break
        if twin != prompt:
            made[twin] = None
    return list(made)[:TWINS]


def _number(digits: str, rng: random.Random) -> str:
    return str(rng.randrange(10 ** (len(digits) - 1) if len(digits) > 1 else 0, 10 ** len(digits)))


def encode(text, line: str) -> list[int]:
    return chat.encode_prompt(text, [{"role": "user", "content": line}], apply_chat_template=False)[:LONGEST]


def score(decoder: DecoderConfig, params, mesh, rows: list[list[int]], pad_id: int) -> list[tuple[float, bool]]:
    """Of each row (mean log-probability of its tokens but the first, whether its tail is completed)."""
    width = -(-max(map(len, rows)) // 32) * 32
    found = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        tokens_RT = np.full((BATCH, width), pad_id, np.int32)
        for line, ids in zip(tokens_RT, batch):
            line[: len(ids)] = ids
        logp_RT, best_RT = jax.device_get(_likely(decoder, params, place(mesh, tokens_RT)))
        for ids, logp_T, best_T in zip(batch, logp_RT, best_RT):
            half, last = len(ids) // 2, len(ids) - 1  # index t of both belongs to token t + 1
            tail_T = best_T[max(half, 1) - 1 : last][:TAIL]
            found.append((float(logp_T[:last].mean()) if last else 0.0, bool(len(tail_T) and tail_T.all())))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _likely(decoder: DecoderConfig, params, tokens_RT) -> tuple[jax.Array, jax.Array]:
    """Of each token but the first its log-probability f32 [R, T-1], and whether it is the most probable one."""
    width = tokens_RT.shape[1]
    order = positions(padded(width))
    laid = jnp.pad(tokens_RT, ((0, 0), (0, padded(width) - width)))[:, order]
    hidden_RTE = policy.hidden(decoder, params, laid)[:, np.argsort(order)[: width - 1]]
    logp_RTV = jax.nn.log_softmax(policy.unembed(decoder, params, hidden_RTE).astype(jnp.float32))
    target_RT = tokens_RT[:, 1:]
    logp_RT = jnp.take_along_axis(logp_RTV, target_RT[..., None], axis=-1)[..., 0]
    return logp_RT, jnp.argmax(logp_RTV, -1) == target_RT


def _estimates(scored: list[list[tuple[float, bool]]]) -> dict:
    """scored: of each prompt its own score, then its twins'."""
    completed = sum(lines[0][1] for lines in scored)
    gaps = [lines[0][0] - float(np.mean([logp for logp, _ in lines[1:]])) for lines in scored if len(lines) > 1]
    gap = statistics.t_interval(gaps)
    return {
        "prompts": len(scored),
        "completed": completed / len(scored),
        "completed_interval": statistics.wilson(completed, len(scored)),
        "gap": gap.mean if gap else None,
        "gap_interval": [gap.low, gap.high] if gap else None,
    }
