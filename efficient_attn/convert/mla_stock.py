"""Where converted layers go: stock DeepSeek classes, in transformers and in engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from efficient_attn.convert.attention_weights import LatentAttentionWeights
from efficient_attn.convert.deepseek import DeepseekFormat, deepseek_config
from efficient_attn.convert.golden import check_files
from efficient_attn.convert.mla_targets import Layers, NativeTarget
from efficient_attn.convert.pipeline import Checks, Part
from efficient_attn.convert.source import Source
from efficient_attn.convert.stock_rope import NEAR_YARN, PLAIN, engine_rope, rotary_settings

# What decode kernels of engines are built for: latent and rotary width.
ENGINE_SIZES = ((512, 64), (256, 64))


class DeepseekTarget(NativeTarget):
    """The stock ``DeepseekV3ForCausalLM`` of transformers."""

    name = "hf-deepseek"

    one_table = True

    def __init__(self, source: Source, layers: Layers, dtype: torch.dtype) -> None:
        super().__init__(source, layers, dtype)
        biases = source.family.biases(source.config)
        self.format = DeepseekFormat(
            hidden_size=source.config["hidden_size"],
            norm_eps=source.config["rms_norm_eps"],
            dtype=dtype,
            frequencies=layers.table,
            query_bias=biases[0],
            bias=any(biases) or layers.output_bias,
            query_latent=layers.q_lora_rank,
        )

    def reasons_to_refuse(self) -> list[str]:
        """Why stock classes cannot be this model: every reason."""
        source, config, reasons = self.source, self.source.config, super().reasons_to_refuse()
        if self.dtype == torch.float16:
            reasons.append(
                "in float16 the scaled latent vanishes below the smallest number; take bfloat16 or "
                "float32"
            )
        if source.family.query_norm is not None:
            reasons.append("it normalises query and key heads, which DeepSeek has no place for")
        if "num_local_experts" in config:
            reasons.append("its router renormalises the best experts, which DeepSeek's does not")
        if config.get("mlp_bias"):
            reasons.append("its MLP has biases, which DeepSeek's has not")
        if source.closing_window is not None:
            reasons.append(
                f"it attends within a window of {source.closing_window} of up to "
                f"{config['max_position_embeddings']} tokens, and DeepSeek to all of them"
            )
        return reasons

    def warnings(self) -> list[str]:
        """What a user should know before using the output."""
        return [
            "the latent rows of kv_a_proj_with_mqa are scaled down so that the norm behind them "
            "does nothing: quantising that matrix with one scale per tensor makes them zero. Leave "
            "it out, or use blocks of rows.",
            "do not train this form, for steps of an optimizer dwarf those rows; train the native "
            "one and export again.",
        ]

    def head(self) -> Part:
        """What comes after the layers, with an output layer of its own where it was tied."""
        source = self.source.checkpoint.read(self.source.outside_names())
        found = self.format.others({k: x for k, x in source.items() if "embed_tokens" not in k})
        if self.source.config["tie_word_embeddings"]:
            found["lm_head.weight"] = source["model.embed_tokens.weight"].to(self.dtype)
        return found, {}

    def config(self, notes: Mapping[str, dict]) -> dict[str, object]:
        """``config.json``, from the notes of all parts."""
        found = deepseek_config(
            self.source.config,
            asdict(self.sizes[0]),
            self.format,
            self.rotary_settings(),
        )
        kept = ["model.layers.*.self_attn.kv_a_proj_with_mqa"]
        if self.format.q_lora_rank is not None:
            kept.append("model.layers.*.self_attn.q_a_proj")
        about = {"conversion": "mla", "do_not_quantize_per_tensor": kept}
        return {**found, "efficient_attn": about}

    def rotary_settings(self) -> dict[str, object]:
        """What the classes compute their rotary table from."""
        theta, longest = self.source.rope["rope_theta"], "max_position_embeddings"
        return rotary_settings(self.layers.table, theta, self.source.config[longest])

    def parameters(self) -> int:
        """Number of weights of the output."""
        config, layers = self.source.config, self.source.num_layers
        width, sizes, latent = config["hidden_size"], self.sizes[0], self.format.q_lora_rank
        rank, queries = sizes.kv_lora_rank, self._query_rows(sizes)
        count = rank + (rank + sizes.qk_rope_head_dim) * width
        count += config["num_attention_heads"] * (
            (sizes.qk_nope_head_dim + sizes.v_head_dim) * rank + sizes.v_head_dim * width
        )
        if self.format.bias:
            count += rank + sizes.qk_rope_head_dim + width
        if latent is None:
            count += queries * width
        else:
            count += latent * (width + 1 + self.format.bias) + queries * latent
        count = (count - self._source_attention()) * layers + self.source.parameters
        if config["tie_word_embeddings"]:
            count += config["vocab_size"] * width
        return count

    def _attention(self, index: int, weights: LatentAttentionWeights) -> Part:
        name = self.source.family.layers.format(index) + "input_layernorm.weight"
        return self.format.layer(weights, self.source.checkpoint.read([name])[name])

    def _others(self, names: list[str]) -> dict[str, Tensor]:
        return self.format.others(self.source.checkpoint.read(names))


class EngineTarget(DeepseekTarget):
    """The same in stock vLLM and SGLang, which ignore or reject more of it.

    Args:
        source: What is converted.
        layers: What it is converted to.
        dtype: Of the output.
        allow_rope_approx: Take the nearest rotary table that engines have.
    """

    name = "engine"

    def __init__(
        self,
        source: Source,
        layers: Layers,
        dtype: torch.dtype,
        *,
        allow_rope_approx: bool = False,
    ) -> None:
        super().__init__(source, layers, dtype)
        self.allow_rope_approx = allow_rope_approx
        own = layers.sizes[0]
        self._rope, self._table = engine_rope(source, own.qk_rope_head_dim)
        # A model that needs less is filled up with zeros.
        ranks = [rank for rank, rope in ENGINE_SIZES if rope == own.qk_rope_head_dim]
        rank = min((rank for rank in ranks if rank >= own.kv_lora_rank), default=own.kv_lora_rank)
        self.sizes = (replace(own, kv_lora_rank=rank),) * source.num_layers

    def reasons_to_refuse(self) -> list[str]:
        """Why engines cannot serve this model: every reason."""
        reasons, config, sizes = super().reasons_to_refuse(), self.source.config, self.sizes[0]
        kind = self.source.rope["rope_type"]
        if self.format.bias:
            reasons.append("it has biases in attention, which engines drop without a word")
        if kind in NEAR_YARN and not self.allow_rope_approx:
            reasons.append(
                f"its rotary table is that of {kind}, and engines take any scaling for a yarn of "
                "their own (allow_rope_approx takes the nearest)"
            )
        elif kind not in (*NEAR_YARN, *PLAIN):
            reasons.append(f"its rotary table is that of {kind}, and engines have no such")
        if not torch.equal(self.layers.table.float(), self._table):
            reasons.append(
                "its rotary key would turn several pairs by one frequency, and that of engines "
                "turns each by its own"
            )
        if config["hidden_act"] != "silu":
            reasons.append(f"its activation is {config['hidden_act']}, and theirs is silu")
        if (sizes.kv_lora_rank, sizes.qk_rope_head_dim) not in ENGINE_SIZES:
            known = " or ".join(f"{rank} + {rope}" for rank, rope in ENGINE_SIZES)
            reasons.append(
                f"their kernels are built for {known} cached numbers, and this is "
                f"{sizes.kv_lora_rank} + {sizes.qk_rope_head_dim}"
            )
        return reasons

    def warnings(self) -> list[str]:
        """What a user should know before using the output."""
        found = [
            *super().warnings(),
            "no engine has loaded such a checkpoint yet: run self_check.py",
        ]
        if self.source.rope["rope_type"] in NEAR_YARN:
            found.append(
                "pairs turn by the nearest table that engines have, so long contexts lose more "
                "than the figures of short ones show."
            )
        return found

    def _attention(self, index: int, weights: LatentAttentionWeights) -> Part:
        return super()._attention(index, filled_up(weights, self.sizes[index].kv_lora_rank))

    def rotary_settings(self) -> dict[str, object]:
        """What engines compute their rotary table from."""
        return self._rope

    def checks(self, rows: Tensor) -> Checks:
        """What compares an engine with the written weights, on the beginning of ``rows``."""
        return partial(check_files, rows)


def filled_up(weights: LatentAttentionWeights, rank: int) -> LatentAttentionWeights:
    """The same layer with a latent of ``rank`` numbers, those that it has not being zeros."""
    own = weights.kv_lora_rank

    def rows(x: Tensor) -> Tensor:
        return torch.cat((x[:own], x.new_zeros(rank - own, *x.shape[1:]), x[own:]))

    bias = weights.latent_down_bias
    return replace(
        weights,
        latent_down=rows(weights.latent_down),
        latent_down_bias=None if bias is None else rows(bias),
        latent_up=pad(weights.latent_up, (0, rank - own)),
    )


TARGETS: dict[str, type[NativeTarget]] = {
    target.name: target for target in (NativeTarget, DeepseekTarget, EngineTarget)
}
