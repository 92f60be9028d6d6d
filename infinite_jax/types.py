"""The central types of the training loop, and the one dimension key of the repository.

Arrays carry their axes in their names:

    B  sequences of a batch, B = P x G     L  layers
    P  prompts of a batch                  H  attention heads
    G  samples of one prompt (a group)     K  key/value heads
    T  tokens of a sequence                E  model (embedding) width
    V  vocabulary                          F  width of the MLP
    D  domains; in models/ also head width N  tokens flattened over B and T

Rows are left-aligned: prompt, completion, padding last, no gap. Index t of every _BT array belongs to token t, so the
log-probability of token 0 is 0: nothing predicts it.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

Params = Any  # nested dict of jax.Array; blocks are stacked on axis 0


class Rollout(NamedTuple):
    """What the policy wrote, token in and token out: ids are never re-tokenised."""

    tokens_BT: jax.Array  # i32, prompt then completion then padding
    loss_mask_BT: jax.Array  # bool, True on the tokens the policy generated, its end-of-turn token included
    logp_BT: jax.Array  # f32, log-probability under the distribution really sampled; 0 outside the mask
    domain_B: np.ndarray  # i32
    prompt_B: np.ndarray  # i32, index of the row's prompt in the batch: B // G
    done_B: jax.Array  # bool, the policy ended its turn within the token limit


class Judged(NamedTuple):
    """What a critic makes of a batch, f32, 0 outside the mask."""

    value_BT: jax.Array  # V(s_t) before token t is written, under the parameters that the updates begin from
    return_BT: jax.Array  # what the critic is to learn: the advantage before it is whitened, plus that value
    outcome_BT: jax.Array  # the discounted sum of the rewards that came; read by drift/value alone


class Batch(NamedTuple):
    """All that the gradient step may see."""

    tokens_BT: jax.Array  # i32
    loss_mask_BT: jax.Array  # bool; rows without a valid grade are all False
    logp_beh_BT: jax.Array  # f32, from the sampler
    logp_old_BT: jax.Array  # f32, the trainer's own, under the parameters that sampled
    logp_ref_BT: jax.Array  # f32, under the frozen reference
    advantage_BT: jax.Array  # f32
    kl_coef_B: jax.Array  # f32, weight of the KL term in the loss
    lr_scale_B: jax.Array  # f32, learning rate of the row relative to the configured one
    judged: Judged | None = None  # only with a critic


class Critic(NamedTuple):
    params: Params  # infinite_jax/critic.py
    opt_state: Any


class TrainState(NamedTuple):
    params: Params
    opt_state: Any
    step: jax.Array  # i32[], updates applied or skipped so far
    critic: Critic | None = None  # only where algorithm.critic names one


class Roles(NamedTuple):
    """Parameters of the two that learn; the rollout has the actor's."""

    actor: Params
    critic: Params


def learning(state: TrainState) -> Params | Roles:
    """The parameters that an update differentiates: the policy's, or both roles'."""
    return state.params if state.critic is None else Roles(state.params, state.critic.params)


class RunState(NamedTuple):
    """The checkpoint: nothing else is needed to continue a run bit for bit."""

    train: TrainState
    curriculum: Any  # TriageState
    position: Any  # in the training data: prompts.Cursors, or PromptState where curriculum.level is prompt
    tokens: np.ndarray  # i64[], generated for training so far
    monitor: Any = None  # MonitorState; None outside upgrade mode
