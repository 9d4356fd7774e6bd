"""What the weights of a stock DeepSeek checkpoint mean, in a few lines of plain PyTorch.

Engines have drawn nonsense from checkpoints of other converters without a word: a norm too many, a
bias too few, another rotary table. So a checkpoint for engines brings the log probabilities that
its own written weights give to some tokens, and a program that compares an engine with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from efficient_attn.convert import self_check
from efficient_attn.convert.rope import inverse_frequencies
from efficient_attn.convert.writer import as_json

Read = Callable[[Iterable[str]], Mapping[str, Tensor]]
Config = Mapping[str, object]

PROMPTS, LENGTH = 4, 64
# Nats in the mean: ten times what rounding to bfloat16 does, and a tenth of what a mistake does.
TOLERANCE = 0.05


def check_files(rows: Tensor, read: Read, config: Config) -> dict[str, bytes]:
    """The program that checks an engine, and what it compares with.

    Args:
        rows: Tokens ``(B, N)``, the beginning of which serves as prompts.
        read: Gives tensors of the written checkpoint by name.
        config: Its ``config.json``.
    """
    rows = rows[:PROMPTS, :LENGTH]
    told = {
        "dtype": config["dtype"],
        "prompts": rows.tolist(),
        "log_probabilities": log_probabilities(rows, read, config).tolist(),
        "tolerance": TOLERANCE,
    }
    program = Path(self_check.__file__).read_bytes()
    return {self_check.GOLDEN: as_json(told), "self_check.py": program}


def log_probabilities(rows: Tensor, read: Read, config: Config) -> Tensor:
    """Of each token of ``rows``, ``(B, N)``, but the first, given those before it: ``(B, N - 1)``.

    In fp32 from the weights as they are stored, one layer in memory at a time. Without biases and
    experts, which engines do not take or conversion does not make.
    """
    table, scale = inverse_frequencies(
        config["rope_parameters"], config["qk_rope_head_dim"], config["max_position_embeddings"]
    )
    x = read(["model.embed_tokens.weight"])["model.embed_tokens.weight"][rows].float()
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        names = [*_ATTENTION[config["q_lora_rank"] is None], *_AROUND]
        found = read([prefix + name for name in names])
        weights = {name: found[prefix + name].float() for name in names}
        normed = _norm(x, weights["input_layernorm.weight"], config)
        x = x + _attention(normed, weights, config, table, scale)
        normed = _norm(x, weights["post_attention_layernorm.weight"], config)
        gate, up, down = (weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (F.silu(normed @ gate.mT) * (normed @ up.mT)) @ down.mT
    found = read(["model.norm.weight", "lm_head.weight"])
    x = _norm(x[:, :-1], found["model.norm.weight"].float(), config)
    told = (x @ found["lm_head.weight"].float().mT).log_softmax(-1)
    return told.gather(-1, rows[:, 1:, None]).squeeze(-1)


def _attention(
    x: Tensor, weights: Mapping[str, Tensor], config: Config, table: Tensor, scale: float
) -> Tensor:
    own = {name.split(".")[1]: x for name, x in weights.items() if name.startswith("self_attn.")}
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    if config["q_lora_rank"] is None:
        query = x @ own["q_proj"].mT
    else:
        query = _norm(x @ own["q_a_proj"].mT, own["q_a_layernorm"], config) @ own["q_b_proj"].mT
    query = rearrange(query, "b n (h d) -> b h n d", h=heads)
    latent, key_rope = (x @ own["kv_a_proj_with_mqa"].mT).split((rank, rope), -1)
    expanded = _norm(latent, own["kv_a_layernorm"], config) @ own["kv_b_proj"].mT
    expanded = rearrange(expanded, "b n (h d) -> b h n d", h=heads)
    key, value = expanded.split((nope, config["v_head_dim"]), -1)
    angle = torch.arange(x.shape[1])[:, None] * table
    cos, sin = angle.cos() * scale, angle.sin() * scale

    def turned(rows: Tensor) -> Tensor:
        even, odd = rows[..., 0::2], rows[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    query = torch.cat((query[..., :nope], turned(query[..., nope:])), -1)
    shared = turned(key_rope[:, None]).expand(-1, heads, -1, -1)
    key = torch.cat((key, shared), -1)
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=(nope + rope) ** -0.5
    )
    return rearrange(out, "b h n d -> b n (h d)") @ own["o_proj"].mT


def _norm(x: Tensor, weight: Tensor, config: Config) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, config["rms_norm_eps"])


_KEYS_AND_VALUES = [
    f"self_attn.{name}.weight"
    for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
]
# By whether queries are made from the input itself.
_ATTENTION = {
    True: ["self_attn.q_proj.weight", *_KEYS_AND_VALUES],
    False: [f"self_attn.{name}.weight" for name in ("q_a_proj", "q_a_layernorm", "q_b_proj")]
    + _KEYS_AND_VALUES,
}
_AROUND = ["input_layernorm.weight", "post_attention_layernorm.weight"]
_AROUND += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
