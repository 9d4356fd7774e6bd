"""Where converted layers go: this package's own layers, or stock DeepSeek classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from efficient_attn.convert.attention_weights import LatentAttentionWeights
from efficient_attn.convert.deepseek import DeepseekFormat, deepseek_config, is_plain_table
from efficient_attn.convert.native import FORMAT, TABLE, native_facts, native_state
from efficient_attn.convert.output import Output
from efficient_attn.convert.pipeline import Part
from efficient_attn.convert.source import Source

# What decode kernels of engines are built for: latent and rotary width.
ENGINE_SIZES = ((512, 64), (256, 64))

# What Python and torch take before anything is done.
LIBRARIES = 300_000_000


@dataclass(frozen=True)
class MlaSizes:
    """Widths of converted layers, named as in DeepSeek's config."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int


class Layers(Protocol):
    """What is common to all converted layers of a model.

    Attributes:
        sizes: Their widths.
        table: ``(d_r / 2,)``, their rotary table, as far as they have one in common.
        output_bias: Whether they may have a bias on the output.
    """

    sizes: MlaSizes
    table: Tensor
    output_bias: bool


class NativeTarget(Output):
    """The source's model with layers of this package in it; takes every source.

    Args:
        source: What is converted.
        layers: What it is converted to.
        dtype: Of the output.
    """

    name = "native"
    one_table = False

    def __init__(self, source: Source, layers: Layers, dtype: torch.dtype) -> None:
        super().__init__(source, dtype)
        self.layers = layers
        self.sizes = layers.sizes

    def reasons_to_refuse(self) -> list[str]:
        """Why the source cannot be written for this target: every reason."""
        return []

    def warnings(self) -> list[str]:
        """What a user should know before using the output."""
        return []

    def layer(self, index: int, weights: LatentAttentionWeights) -> Part:
        """One layer, and what is to be noted of it."""
        state, notes = self._attention(index, weights)
        prefix = self.source.family.layers.format(index)
        tensors = {f"{prefix}self_attn.{name}": x for name, x in state.items()}
        return tensors | self._others(self.source.other_names(index)), notes

    def config(self, notes: Mapping[str, dict]) -> dict[str, object]:
        """``config.json``, from the notes of all parts."""
        layers = [noted["facts"] for noted in notes.values() if "facts" in noted]
        return {
            **self.source.checkpoint.config,
            "dtype": self.dtype_name,
            "torch_dtype": self.dtype_name,
            "efficient_attn": {"format": FORMAT, "conversion": "mla", "layers": layers},
        }

    def parameters(self) -> int:
        """Number of weights of the output."""
        others = self.source.parameters - self.source.num_layers * self._source_attention()
        return others + self.source.num_layers * self._attention_parameters()

    def memory_bytes(self) -> int:
        """What one part takes while it is made, about: in fp64, rounded, and read."""
        layer = self._attention_parameters()
        working = (8 + self.dtype.itemsize) * layer
        working += self.source.checkpoint.nbytes // self.source.num_layers
        return max(working, self._embedding_bytes()) + LIBRARIES

    def _attention(self, index: int, weights: LatentAttentionWeights) -> Part:
        state = {
            name: x if name == TABLE else x.to(self.dtype)
            for name, x in native_state(weights).items()
        }
        return state, {"facts": native_facts(weights)}

    def _source_attention(self) -> int:
        names = self.source.attention_names(0)
        return sum(self.source.checkpoint.tensors[name].numel for name in names)

    def _attention_parameters(self) -> int:
        config, sizes = self.source.config, self.sizes
        width, heads = config["hidden_size"], config["num_attention_heads"]
        queries, rows = self._query_rows(), sizes.kv_lora_rank + sizes.qk_rope_head_dim
        count = heads * (sizes.qk_nope_head_dim + sizes.v_head_dim) * sizes.kv_lora_rank
        count += width * heads * sizes.v_head_dim + sizes.qk_rope_head_dim // 2
        of_query, *of_keys_and_values, of_output = self.source.family.biases(config)
        count += width * self.layers.output_bias
        if self.source.family.query_norm is None:
            return count + queries * (width + of_query) + rows * (width + any(of_keys_and_values))
        # The projections and norms of the source stay, and feed the new ones.
        dim, groups = config["head_dim"], config["num_key_value_heads"]
        output = width * config["num_attention_heads"] * dim + width * of_output
        kept = self._source_attention() - output
        return count + kept + queries * dim + rows * 2 * groups * dim

    def _query_rows(self) -> int:
        sizes = self.sizes
        width = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
        return self.source.config["num_attention_heads"] * width


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
        )

    def reasons_to_refuse(self) -> list[str]:
        """Why stock classes cannot be this model: every reason."""
        source, config, reasons = self.source, self.source.config, []
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
            asdict(self.sizes),
            self.format,
            self.source.rope["rope_theta"],
        )
        kept = ["model.layers.*.self_attn.kv_a_proj_with_mqa"]
        if self.format.query_bias:
            kept.append("model.layers.*.self_attn.q_a_proj")
        about = {"conversion": "mla", "do_not_quantize_per_tensor": kept}
        return {**found, "efficient_attn": about}

    def parameters(self) -> int:
        """Number of weights of the output."""
        config, layers = self.source.config, self.source.num_layers
        width, sizes = config["hidden_size"], self.sizes
        rank = sizes.kv_lora_rank
        count = rank + self._query_rows() * width + (rank + sizes.qk_rope_head_dim) * width
        count += config["num_attention_heads"] * (
            (sizes.qk_nope_head_dim + sizes.v_head_dim) * rank + sizes.v_head_dim * width
        )
        if self.format.bias:
            count += rank + sizes.qk_rope_head_dim + width
        if latent := self.format.q_lora_rank:
            count += latent * (width + 2) + self._query_rows() * (latent - width)
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
    """The same in stock vLLM and SGLang, which ignore or reject more of it."""

    name = "engine"

    def reasons_to_refuse(self) -> list[str]:
        """Why engines cannot serve this model: every reason."""
        reasons, config, sizes = super().reasons_to_refuse(), self.source.config, self.sizes
        if self.format.bias:
            reasons.append("it has biases in attention, which engines drop without a word")
        if not is_plain_table(self.layers.table, self.source.rope["rope_theta"]):
            reasons.append(
                "its rotary table is not the plain one of its base, and engines take any scaling "
                "for yarn"
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


TARGETS: dict[str, type[NativeTarget]] = {
    target.name: target for target in (NativeTarget, DeepseekTarget, EngineTarget)
}
