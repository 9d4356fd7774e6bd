"""Latent attention as a stock DeepSeek-V3 checkpoint, which runs without any code of ours.

DeepSeek's classes differ from :class:`LatentAttentionWeights` in four ways, which lose nothing:

- They RMS normalise the latent. Scaled down until the norm's epsilon outweighs its variance, the
  latent passes unchanged: with ``u = s c`` and a norm weight ``2 ** k = sqrt(eps) / s``,
  ``RMSNorm(u) = c / sqrt(1 + mean(c ** 2) 4 ** -k)``, a relative error of at most
  ``mean(c ** 2) 2 ** (-2 k - 1)``.
- The epsilon of that norm is 1e-6 in transformers and ``rms_norm_eps`` in engines. With
  ``beta = sqrt(1e-6 / eps)``, multiplying by beta everything that is added to the residual stream
  turns a model of any epsilon into one of 1e-6.
- Scores are scaled by ``(d_n + d_r) ** -0.5``: the queries make up for it.
- There is one rotary table for all layers, ``theta ** (-2 i / d_r)``: other tables go through the
  divisors of longrope.

A bias on queries takes another way, through DeepSeek's low-rank queries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_attn.convert.attention_weights import LatentAttentionWeights
from efficient_attn.errors import ConversionError

LATENT_EPS = 1e-6
# Error that neutralising may leave, as a power of two: below half a unit in the last place.
TOLERATED = {torch.float32: -22, torch.bfloat16: -12, torch.float64: -30}
# Widths that are multiples of this suit matrix units.
ALIGNMENT = 16


@dataclass(frozen=True)
class DeepseekFormat:
    """What holds for all layers of one exported checkpoint.

    Attributes:
        hidden_size: Width ``D`` of the tokens.
        norm_eps: Epsilon of the source's norms.
        dtype: Of the output: fp32 or bf16.
        frequencies: ``(d_r / 2,)``, the rotary table of all layers.
        query_bias: Whether queries may have a bias.
        bias: Whether anything may.
        query_latent: Width of a latent that queries are made from, or None for the input itself.
    """

    hidden_size: int
    norm_eps: float
    dtype: torch.dtype
    frequencies: Tensor
    query_bias: bool = False
    bias: bool = False
    query_latent: int | None = None

    @property
    def residual_gain(self) -> float:
        """Factor ``beta`` on everything that is added to the residual stream."""
        return 1.0 if self.norm_eps == LATENT_EPS else math.sqrt(LATENT_EPS / self.norm_eps)

    @property
    def q_lora_rank(self) -> int | None:
        """Width of the latent of queries, with a one for a bias and padding; None for none."""
        if not self.query_bias:
            return self.query_latent
        width = self.hidden_size if self.query_latent is None else self.query_latent
        return math.ceil((width + 1) / ALIGNMENT) * ALIGNMENT

    def layer(
        self, weights: LatentAttentionWeights, input_norm: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The tensors of one ``self_attn``, and bounds on what its norm changes.

        Args:
            weights: The layer, without norms on heads.
            input_norm: Weight ``(D,)`` of the RMS norm before it.

        Returns:
            Tensors by name, rounded once to ``dtype``; and ``latent_mean_square`` (largest possible
            mean square of a latent), ``norm_exponent`` (``k``) and ``norm_error`` (largest possible
            relative error).

        Raises:
            ConversionError: The weights have a bias that the format leaves out, or another table.
        """
        self._refuse(weights)
        rank, down = weights.kv_lora_rank, weights.latent_down.double()
        bias = weights.latent_down_bias
        bias = down.new_zeros(len(down)) if bias is None else bias.double()
        ceiling = latent_ceiling(down[:rank], bias[:rank], input_norm)
        exponent = self._norm_exponent(ceiling)
        shrink = down.new_ones(len(down))
        shrink[:rank] = math.sqrt(LATENT_EPS) * 2.0**-exponent
        tensors = {
            **self._queries(weights, input_norm),
            "kv_a_proj_with_mqa.weight": self._rounded(down, shrink.unsqueeze(1)),
            "kv_a_layernorm.weight": torch.full((rank,), 2.0**exponent, dtype=self.dtype),
            "kv_b_proj.weight": self._rounded(weights.latent_up),
            "o_proj.weight": self._rounded(weights.output, self.residual_gain),
        }
        if self.bias:
            out = weights.output_bias
            out = torch.zeros(self.hidden_size) if out is None else out
            tensors["kv_a_proj_with_mqa.bias"] = self._rounded(bias, shrink)
            tensors["o_proj.bias"] = self._rounded(out, self.residual_gain)
        return tensors, {
            "latent_mean_square": ceiling,
            "norm_exponent": exponent,
            "norm_error": ceiling * 2.0 ** (-2 * exponent - 1),
        }

    def others(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rest of a layer, or what lies outside of layers, with the residual rescaled."""
        rescaled = ("mlp.down_proj.weight", "embed_tokens.weight")
        return {
            name: self._rounded(x, self.residual_gain if name.endswith(rescaled) else 1.0)
            for name, x in tensors.items()
        }

    def _queries(self, weights: LatentAttentionWeights, input_norm: Tensor) -> dict[str, Tensor]:
        gain, latent = _query_gain(weights), self.q_lora_rank
        if latent is None:
            return {"q_proj.weight": self._rounded(weights.query, gain.unsqueeze(1))}
        down, width = weights.query_down, self.hidden_size
        if down is None:
            # The latent is the input itself.
            made, squares = width, width * float(input_norm.double().square().max())
        else:
            made = len(down)
            squares = made * latent_ceiling(down.double(), torch.zeros(made), input_norm)
        # A bias is carried by a one behind it.
        exponent = self._norm_exponent((squares + self.query_bias) / latent)
        shrink = math.sqrt(LATENT_EPS) * 2.0**-exponent
        one = torch.tensor(shrink).to(self.dtype)
        # By what rounding made of it, not by what it was to be: this undoes it exactly.
        regain = gain * (shrink / float(one))
        first = torch.zeros(latent, width, dtype=self.dtype)
        up = torch.zeros(len(weights.query), latent, dtype=self.dtype)
        if down is None:
            first.diagonal().fill_(one)
            up[:, :made] = self._rounded(weights.query, regain.unsqueeze(1))
        else:
            first[:made] = self._rounded(down, shrink)
            up[:, :made] = self._rounded(weights.query, gain.unsqueeze(1))
        if weights.query_bias is not None:
            up[:, made] = self._rounded(weights.query_bias, regain)
        found = {
            "q_a_proj.weight": first,
            "q_a_layernorm.weight": torch.full((latent,), 2.0**exponent, dtype=self.dtype),
            "q_b_proj.weight": up,
        }
        if self.bias:
            found["q_a_proj.bias"] = torch.zeros(latent, dtype=self.dtype)
            found["q_a_proj.bias"][made : made + self.query_bias] = one
        return found

    def _norm_exponent(self, mean_square: float) -> int:
        """The smallest even ``k`` that leaves less than what is tolerated."""
        least = (math.log2(max(mean_square, 2.0**-60)) - 1 - TOLERATED[self.dtype]) / 2
        return max(0, 2 * math.ceil(least / 2))

    def _rounded(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """``x * gain`` in fp64, rounded once; some rows at a time, to hold no second copy."""
        if x.dtype == self.dtype and not isinstance(gain, Tensor) and gain == 1:
            return x
        out = torch.empty(x.shape, dtype=self.dtype)
        for start in range(0, len(x), 4096):
            rows = slice(start, start + 4096)
            factor = gain[rows] if isinstance(gain, Tensor) else gain
            out[rows] = x[rows].double() * factor
        return out

    def _refuse(self, weights: LatentAttentionWeights) -> None:
        if not torch.equal(weights.inverse_frequencies.double(), self.frequencies.double()):
            raise ConversionError("the layer has a rotary table of its own; this target has one.")
        if self.query_latent != (None if weights.query_down is None else len(weights.query_down)):
            raise ConversionError("the layer's queries are made from a latent of another width.")
        left_out = []
        if weights.query_bias is not None and not self.query_bias:
            left_out.append("query_bias")
        if not self.bias:
            left_out += [
                name
                for name in ("latent_down_bias", "output_bias")
                if getattr(weights, name) is not None
            ]
        if left_out:
            raise ConversionError(
                f"the layer has {' and '.join(left_out)}, which this target leaves out."
            )


def _query_gain(weights: LatentAttentionWeights) -> Tensor:
    """Factor ``(H (d_n + d_r),)`` on the rows of queries: the scale of scores, and of rotation."""
    nope, rope = weights.qk_nope_head_dim, weights.qk_rope_head_dim
    gain = torch.full((nope + rope,), weights.scale * math.sqrt(nope + rope), dtype=torch.float64)
    gain[nope:] *= weights.rotary_scale**2
    return gain.repeat(weights.num_heads)


def latent_ceiling(down: Tensor, bias: Tensor, input_norm: Tensor) -> float:
    """The largest mean square that a latent can have, whatever the input.

    The input has been RMS normalised, so it is ``input_norm`` times a vector of length at most
    ``sqrt(D)``; the latent is then at most the largest singular value times that, plus the bias.

    Args:
        down: ``(r, D)``, fp64.
        bias: ``(r,)``.
        input_norm: ``(D,)``.
    """
    rank, width = down.shape
    turned = down * input_norm.double()
    largest = torch.linalg.eigvalsh(turned @ turned.mT)[-1].clamp(min=0).sqrt()
    # eigvalsh is right to a few units in the last place of the largest eigenvalue.
    bound = float(largest) * (1 + 1e-9) * math.sqrt(width) + float(bias.norm())
    return bound**2 / rank


def deepseek_config(
    source: Mapping[str, object],
    sizes: Mapping[str, int],
    form: DeepseekFormat,
    rope: Mapping[str, object],
) -> dict[str, object]:
    """The ``config.json`` of the export, for transformers and for engines.

    Args:
        source: The source's config, complete.
        sizes: ``kv_lora_rank``, ``qk_rope_head_dim``, ``qk_nope_head_dim`` and ``v_head_dim``.
        form: The format that the layers were written in.
        rope: Rotary settings that make the format's table.
    """
    layers, heads = source["num_hidden_layers"], source["num_attention_heads"]
    copied = (
        ["vocab_size", "hidden_size", "intermediate_size", "hidden_act", "num_hidden_layers"]
        + ["num_attention_heads", "max_position_embeddings", "initializer_range"]
        + ["bos_token_id", "eos_token_id", "pad_token_id"]
    )
    return {
        **{name: source[name] for name in copied if name in source},
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": heads,
        "q_lora_rank": form.q_lora_rank,
        **sizes,
        "head_dim": sizes["qk_rope_head_dim"],
        "attention_bias": form.bias,
        "attention_dropout": 0.0,
        "rms_norm_eps": LATENT_EPS,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_interleave": True,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": str(form.dtype).removeprefix("torch."),
        "torch_dtype": str(form.dtype).removeprefix("torch."),
        # No layer is a mixture of experts; the other numbers are read, but never used.
        "first_k_dense_replace": layers,
        "num_nextn_predict_layers": 0,
        "moe_layer_freq": 1,
        "moe_intermediate_size": source["intermediate_size"],
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
