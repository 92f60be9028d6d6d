"""One set of hyper-parameters for four families of decoders: Llama (SmolLM2, Llama 3), Qwen2/2.5, Qwen3, Gemma 3 text.

A family is nothing but a choice of these fields: models/decoder.py reads them and knows no family name. They are read
from and written to Hugging Face configs (`from_hf`, `to_hf`), in which the rotary embedding has scaling variants:

    default  w_i = theta^(-2i / D)                       Su et al. 2021, arXiv 2104.09864
    linear   w_i / factor                                position interpolation, Chen et al. 2023, arXiv 2306.15595
    dynamic  w_i up to max_length                        NTK-aware; beyond max_length the base would grow with the row
    llama3   w_i, w_i / factor and a ramp between them   by wave length; Llama 3.1, arXiv 2407.21783
    yarn     the same by number of rotations             and cos, sin times an attention factor; arXiv 2309.00071

Left out: longrope and partial rotary embeddings (no model of the four families has them), biases elsewhere than on the
query, key and value projections, Gemma 3 with images, bidirectional attention. A config that asks for one is refused.
"""

import math
from dataclasses import dataclass

import numpy as np
import transformers

FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}  # model_type -> family
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # Hugging Face name -> ours
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a kind of layer."""

    kind: str  # one of ROPE_KINDS
    theta: float  # base of the wave lengths, in tokens
    scaling: tuple[tuple[str, float], ...]  # the kind's own parameters, under their Hugging Face names, sorted


@dataclass(frozen=True)
class LoraConfig:
    """Adapters that learn in place of the network's own weights (models/lora.py)."""

    rank: int  # 0 = none: all weights learn
    alpha: float  # their change is scaled by alpha / rank
    targets: tuple[str, ...]  # of q, k, v, o, gate, up, down


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that determines the network and the arithmetic it runs in. Hashable: a static argument of jit."""

    family: str  # llama, qwen2, qwen3 or gemma3: only `to_hf` and models/hf.py look at it
    vocab_size: int  # rows of the embedding
    embed_dim: int  # width of the residual stream
    mlp_dim: int  # width of the gated MLP
    num_layers: int
    num_heads: int  # query heads, a multiple of num_kv_heads
    num_kv_heads: int
    head_dim: int
    max_length: int  # tokens a row may have, as trained
    norm_eps: float  # added to the mean square in RMSNorm
    norm_offset: float  # RMSNorm multiplies by offset + weight: 1 in Gemma, else 0
    tied_embeddings: bool  # logits use the embedding; else params hold `head`
    qkv_bias: bool  # a bias on the query, key and value projections
    qk_norm: bool  # RMSNorm over each head's query and key, before the rotary embedding
    post_norms: bool  # RMSNorm also after attention and MLP, before the residual sum
    activation: str  # of the gate: silu or gelu_tanh
    rope: Rope  # of layers that see the whole row
    rope_local: Rope  # of layers with a window
    windows: tuple[int, ...]  # a layer: how many tokens, itself included, a token sees; 0 = all before it
    embed_scale: float  # multiplies the embedding
    query_scale: float  # multiplies the scores q.k
    final_softcap: float  # c in c tanh(logits / c); 0 = none
    dtype: str  # of matrix products and activations: float32 or bfloat16
    remat: str  # what the backward pass recomputes: none; dots: all but weight products, attention; full: all
    attention: str  # kernel of training and prefill: xla, tpu, cudnn or mgpu (kernels/select.py)
    unrolled: bool  # sampling reads each layer's weights as arrays of their own (models/policy.py: apart)
    lora: LoraConfig | None  # what learns; None = all of it. Says nothing of parameters without adapters


def unrolls(platform: str) -> bool:
    """DecoderConfig.unrolled on a platform of jax.

    On GPUs every decoded token would copy each layer's weights out of the stack. TPUs read them where they lie; what
    CPUs run is small and would mostly take longer to compile.
    """
    return platform == "gpu"


def rope_frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians a token of each pair of head dimensions, f32 [head_dim / 2], and the factor on cos and sin."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = 1.0 / np.float32(rope.theta) ** exponents
    scaling = dict(rope.scaling)
    match rope.kind:
        case "linear":
            return (plain / scaling["factor"]).astype(np.float32), 1.0
        case "llama3":
            return _llama3(plain, scaling), 1.0
        case "yarn":
            return _yarn(plain, scaling, rope.theta, head_dim)
    return plain, 1.0


def _llama3(plain: np.ndarray, scaling: dict[str, float]) -> np.ndarray:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    rotations = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)  # within the original length
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (keep * plain + (1 - keep) * plain / scaling["factor"]).astype(np.float32)


def _yarn(plain: np.ndarray, scaling: dict[str, float], theta: float, head_dim: int) -> tuple[np.ndarray, float]:
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def dimension(rotations: float) -> float:  # the pair that turns this often within the original length
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.get("beta_fast") or 32.0), dimension(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = (np.arange(head_dim // 2) - first) / (last - first if last != first else 0.001)
    keep = 1.0 - np.clip(ramp, 0.0, 1.0)
    attention = scaling.get("attention_factor")
    if attention is None:
        over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = _mscale(factor, over) / _mscale(factor, under) if over and under else _mscale(factor, 1.0)
    return (keep * plain + (1 - keep) * plain / factor).astype(np.float32), float(attention)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def from_hf(hf_config: transformers.PretrainedConfig) -> DecoderConfig:
    """The hyper-parameters of a config as AutoConfig returns it, whatever its age; dtype float32, remat none, attention
    xla, not unrolled.

    Raises ValueError for a model type, rotary scaling, activation or option that the decoder does not have.
    """
    if hf_config.model_type not in FAMILIES:
        raise ValueError(
            f"config.json: model_type '{hf_config.model_type}' is not supported: use one of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[hf_config.model_type]
    gemma = family == "gemma3"
    _refuse_options(hf_config)
    activation = hf_config.hidden_activation if gemma else hf_config.hidden_act
    if activation not in ACTIVATIONS:
        raise ValueError(f"config.json: activation '{activation}' is not supported: use {' or '.join(ACTIVATIONS)}")
    embed_dim, num_heads = hf_config.hidden_size, hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or embed_dim // num_heads
    rope = hf_config.rope_parameters
    return DecoderConfig(
        family=family,
        vocab_size=hf_config.vocab_size,
        embed_dim=embed_dim,
        mlp_dim=hf_config.intermediate_size,
        num_layers=hf_config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=head_dim,
        max_length=hf_config.max_position_embeddings,
        norm_eps=hf_config.rms_norm_eps,
        norm_offset=1.0 if gemma else 0.0,
        tied_embeddings=hf_config.tie_word_embeddings,
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "gemma3"),
        post_norms=gemma,
        activation=ACTIVATIONS[activation],
        rope=_read_rope(rope["full_attention"] if gemma else rope),
        rope_local=_read_rope(rope["sliding_attention"] if gemma else rope),
        windows=_windows(hf_config),
        embed_scale=math.sqrt(embed_dim) if gemma else 1.0,
        query_scale=(hf_config.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
        final_softcap=(getattr(hf_config, "final_logit_softcapping", None) or 0.0) if gemma else 0.0,
        dtype="float32",
        remat="none",
        attention="xla",
        unrolled=False,
        lora=None,
    )


def _refuse_options(hf_config: transformers.PretrainedConfig) -> None:
    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention", "attn_logit_softcapping"):
        value = getattr(hf_config, name, None)
        if value:
            raise ValueError(f"config.json: {name}={value} is not supported: only models without it can be loaded")
    heads, kv_heads = hf_config.num_attention_heads, hf_config.num_key_value_heads
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}"
        )


def _read_rope(parameters: dict) -> Rope:
    kind = parameters["rope_type"]
    if kind not in ROPE_KINDS:
        raise ValueError(f"config.json: rope_type '{kind}' is not supported: use one of {', '.join(ROPE_KINDS)}")
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
            f"config.json: partial_rotary_factor={parameters['partial_rotary_factor']} is not supported: it must be 1"
        )
    skip = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in parameters.items() if key not in skip and value is not None}
    return Rope(kind, float(parameters["rope_theta"]), tuple(sorted(scaling.items())))


def _windows(hf_config: transformers.PretrainedConfig) -> tuple[int, ...]:
    layer_types = getattr(hf_config, "layer_types", None) or ["full_attention"] * hf_config.num_hidden_layers
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown or len(layer_types) != hf_config.num_hidden_layers:
        raise ValueError(
            f"config.json: layer_types {sorted(set(layer_types))} for {len(layer_types)} layers is not supported: it "
            f"must hold full_attention or sliding_attention {hf_config.num_hidden_layers} times"
        )
    return tuple(hf_config.sliding_window if kind == "sliding_attention" else 0 for kind in layer_types)


def to_hf(config: DecoderConfig) -> transformers.PretrainedConfig:
    """The transformers config of `config`. Token ids (bos, eos, pad) are None: they belong to the tokenizer."""
    fields = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_length,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_embeddings,
        rope_parameters=_write_rope(config.rope),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation]
    window = max(config.windows)
    layer_types = ["sliding_attention" if size else "full_attention" for size in config.windows]
    match config.family:
        case "llama":
            hf_class, name = transformers.LlamaConfig, "LlamaForCausalLM"
            fields |= dict(hidden_act=activation)
        case "qwen2" | "qwen3":
            qwen2 = config.family == "qwen2"
            hf_class = transformers.Qwen2Config if qwen2 else transformers.Qwen3Config
            name = "Qwen2ForCausalLM" if qwen2 else "Qwen3ForCausalLM"
            fields |= dict(hidden_act=activation, layer_types=layer_types)
            fields |= dict(use_sliding_window=bool(window), sliding_window=window or None)
        case "gemma3":
            hf_class, name = transformers.Gemma3TextConfig, "Gemma3ForCausalLM"
            rope = {"full_attention": _write_rope(config.rope), "sliding_attention": _write_rope(config.rope_local)}
            fields |= dict(hidden_activation=activation, layer_types=layer_types, rope_parameters=rope)
            fields |= dict(query_pre_attn_scalar=round(config.query_scale**-2), sliding_window=window or None)
            fields |= dict(final_logit_softcapping=config.final_softcap or None)
    return hf_class(architectures=[name], **fields)


def _write_rope(rope: Rope) -> dict:
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **dict(rope.scaling)}
