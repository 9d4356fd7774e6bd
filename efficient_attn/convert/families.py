"""The families of decoders that are converted: names, shapes and facts of their checkpoints.

A family says in data where a checkpoint of it keeps its attention. Encoders are in
:mod:`efficient_attn.convert.encoder_families`.
"""

from __future__ import annotations

from efficient_attn.convert.family import Config, Family
from efficient_attn.errors import ConversionError


def _decoder_outside(config: Config) -> dict[str, tuple[int, ...]]:
    vocabulary, width = config["vocab_size"], config["hidden_size"]
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, width)
    return shapes


def _norms(config: Config) -> dict[str, tuple[int, ...]]:
    width = (config["hidden_size"],)
    return {"input_layernorm.weight": width, "post_attention_layernorm.weight": width}


def _gated_mlp(config: Config) -> dict[str, tuple[int, ...]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    found = {f"mlp.{name}.weight": shape for name, shape in shapes.items()}
    if config["mlp_bias"]:
        found |= {f"mlp.{name}.bias": shape[:1] for name, shape in shapes.items()}
    return _norms(config) | found


def _experts(config: Config) -> dict[str, tuple[int, ...]]:
    width, inner, count = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_local_experts")
    )
    found = {"block_sparse_moe.gate.weight": (count, width)}
    for i in range(count):
        found |= {
            f"block_sparse_moe.experts.{i}.w1.weight": (inner, width),
            f"block_sparse_moe.experts.{i}.w2.weight": (width, inner),
            f"block_sparse_moe.experts.{i}.w3.weight": (inner, width),
        }
    return _norms(config) | found


def _one_window(config: Config, layer: int) -> int | None:
    return config["sliding_window"]


def _window_of_late_layers(config: Config, layer: int) -> int | None:
    if not config["use_sliding_window"] or config["sliding_window"] is None:
        return None
    kinds = config.get("layer_types")
    slides = kinds[layer] == "sliding_attention" if kinds else layer >= config["max_window_layers"]
    return config["sliding_window"] if slides else None


_DECODER = {
    "hidden_act": "silu",
    "head_dim": None,
    "num_key_value_heads": None,
    "tie_word_embeddings": False,
    "mlp_bias": False,
    "attention_bias": False,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
_QWEN = {
    **_DECODER,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        defaults={**_DECODER, "max_position_embeddings": 2048},
        biases=lambda config: (config["attention_bias"],) * 4,
        window=lambda config, layer: None,
        others=_gated_mlp,
        outside=_decoder_outside,
    ),
    "qwen2": Family(
        defaults=_QWEN,
        biases=lambda config: (True, True, True, False),
        window=_window_of_late_layers,
        others=_gated_mlp,
        outside=_decoder_outside,
    ),
    "qwen3": Family(
        defaults={**_QWEN, "head_dim": 128},
        biases=lambda config: (config["attention_bias"],) * 4,
        window=_window_of_late_layers,
        others=_gated_mlp,
        outside=_decoder_outside,
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
    ),
    "mistral": Family(
        defaults={
            **_DECODER,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 131072,
        },
        biases=lambda config: (False,) * 4,
        window=_one_window,
        others=_gated_mlp,
        outside=_decoder_outside,
    ),
    "mixtral": Family(
        defaults={
            **_DECODER,
            "num_key_value_heads": 8,
            "sliding_window": None,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
        },
        biases=lambda config: (False,) * 4,
        window=_one_window,
        others=_experts,
        outside=_decoder_outside,
        default_theta=1e6,
    ),
}

_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_MOST = 1 << 24


def family_of(config: Config) -> Family:
    """The family of a config, by its ``model_type``; an unknown one is a ConversionError."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConversionError(
            f"model_type is {kind!r}; conversion knows {', '.join(FAMILIES)}. A model that only "
            "differs in name can be given one of these in its config.json."
        )
    return FAMILIES[kind]


def complete(config: Config) -> dict[str, object]:
    """A config with what it leaves out filled in, its numbers checked.

    Raises:
        ConversionError: The family is unknown, or a number is missing, out of range or does not
            fit another.
    """
    family = family_of(config)
    full = {**family.defaults, **config}
    if full["num_key_value_heads"] is None:
        full["num_key_value_heads"] = full.get("num_attention_heads")
    if full["head_dim"] is None:
        width, heads = full.get("hidden_size"), full.get("num_attention_heads")
        if type(width) is int and type(heads) is int and heads > 0:
            full["head_dim"] = width // heads
    counts = [*_COUNTS, *(name for name in ("num_local_experts",) if name in full)]
    for name in counts:
        value = full.get(name)
        if type(value) is not int or not 1 <= value <= _MOST:
            raise ConversionError(
                f"config.json: {name} is {value!r}; it must be a whole number from 1 to {_MOST}."
            )
    heads, groups = full["num_attention_heads"], full["num_key_value_heads"]
    if heads % groups:
        raise ConversionError(
            f"config.json: {heads} query heads do not divide among {groups} key/value heads."
        )
    if full["head_dim"] % 2:
        raise ConversionError(f"config.json: head_dim is {full['head_dim']}; it must be even.")
    eps = full["rms_norm_eps"]
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise ConversionError(f"config.json: rms_norm_eps is {eps!r}; it must be in (0, 1).")
    window = full.get("sliding_window")
    if window is not None and (type(window) is not int or window < 1):
        raise ConversionError(f"config.json: sliding_window is {window!r}; at least 1, or null.")
    kinds = full.get("layer_types")
    known = {"full_attention", "sliding_attention"}
    if kinds is not None and (
        not isinstance(kinds, list)
        or len(kinds) != full["num_hidden_layers"]
        or not all(isinstance(kind, str) and kind in known for kind in kinds)
    ):
        raise ConversionError(
            f"config.json: layer_types must name {' or '.join(sorted(known))} for every layer."
        )
    return full
