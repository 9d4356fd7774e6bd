"""Where converted layers go: this package's own, in the model of the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from efficient_attn.convert.native import (
    FORMAT,
    TABLE,
    NativeWeights,
    native_facts,
    native_state,
)
from efficient_attn.convert.output import Output
from efficient_attn.convert.pipeline import Checks, Part
from efficient_attn.convert.source import Source

# What kernels for CUDA take.
LARGEST_ROW, LARGEST_HEAD = 640, 256
# What Python and torch take before anything is done.
LIBRARIES = 400_000_000


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
        sizes: Their widths, layer by layer.
        table: ``(d_r / 2,)``, their rotary table, as far as they have one in common.
        output_bias: Whether they may have a bias on the output.
        q_lora_rank: Width of the latent that queries are made from, if they are made from one.
    """

    sizes: Sequence[MlaSizes]
    table: Tensor
    output_bias: bool
    q_lora_rank: int | None


class NativeTarget(Output):
    """The source's model with layers of this package in it; takes every source.

    Args:
        source: What is converted.
        layers: What it is converted to.
        dtype: Of the output.

    Attributes:
        sizes: Of its layers, one after the other.
    """

    name = "native"
    one_table = False

    def __init__(self, source: Source, layers: Layers, dtype: torch.dtype) -> None:
        super().__init__(source, dtype)
        self.layers = layers
        self.sizes = layers.sizes

    def reasons_to_refuse(self) -> list[str]:
        """Why the source cannot be written for this target: every reason."""
        if self.layers.q_lora_rank is None or self.source.family.query_norm is None:
            return []
        return ["it normalises query heads behind their projection, which is kept as it is"]

    def warnings(self) -> list[str]:
        """What a user should know before using the output."""
        row = max(each.kv_lora_rank + each.qk_rope_head_dim for each in self.sizes)
        head = max(each.qk_nope_head_dim + each.qk_rope_head_dim for each in self.sizes)
        if row <= LARGEST_ROW and head <= LARGEST_HEAD:
            return []
        return [
            f"on CUDA this package has kernels for rows of up to {LARGEST_ROW} numbers and heads "
            f"of up to {LARGEST_HEAD}; here rows have {row} and heads {head}."
        ]

    def checks(self, rows: Tensor) -> Checks | None:
        """What makes files for checking the output where it is used, on such tokens."""
        return None

    def layer(self, index: int, weights: NativeWeights) -> Part:
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
        return others + sum(map(self._attention_parameters, self.sizes))

    def memory_bytes(self) -> int:
        """What one part takes while it is made, about: in fp64, rounded, and read."""
        layer = max(map(self._attention_parameters, self.sizes))
        working = (8 + self.dtype.itemsize) * layer
        working += self.source.checkpoint.nbytes // self.source.num_layers
        return max(working, self._embedding_bytes()) + LIBRARIES

    def _attention(self, index: int, weights: NativeWeights) -> Part:
        state = {
            name: x if name == TABLE else x.to(self.dtype)
            for name, x in native_state(weights).items()
        }
        return state, {"facts": native_facts(weights)}

    def _source_attention(self) -> int:
        names = self.source.attention_names(0)
        return sum(self.source.checkpoint.tensors[name].numel for name in names)

    def _attention_parameters(self, sizes: MlaSizes) -> int:
        config, latent = self.source.config, self.layers.q_lora_rank
        width, heads = config["hidden_size"], config["num_attention_heads"]
        queries, rows = self._query_rows(sizes), sizes.kv_lora_rank + sizes.qk_rope_head_dim
        count = heads * (sizes.qk_nope_head_dim + sizes.v_head_dim) * sizes.kv_lora_rank
        count += width * heads * sizes.v_head_dim + sizes.qk_rope_head_dim // 2
        of_query, *of_keys_and_values, of_output = self.source.family.biases(config)
        count += width * self.layers.output_bias
        if self.source.family.query_norm is None:
            count += rows * (width + any(of_keys_and_values))
            if latent is None:
                return count + queries * (width + of_query)
            return (
                count + queries * (latent + of_query) + latent * (width + any(of_keys_and_values))
            )
        # The projections and norms of the source stay, and feed the new ones.
        dim, groups = config["head_dim"], config["num_key_value_heads"]
        output = width * config["num_attention_heads"] * dim + width * of_output
        kept = self._source_attention() - output
        return count + kept + queries * dim + rows * 2 * groups * dim

    def _query_rows(self, sizes: MlaSizes) -> int:
        width = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
        return self.source.config["num_attention_heads"] * width


class FactoredTarget(NativeTarget):
    """The same, its layers in two factors that may mix heads before they are turned."""

    def _attention_parameters(self, sizes: MlaSizes) -> int:
        config, dim = self.source.config, self.source.config["head_dim"]
        ups = 2 * config["num_attention_heads"] * config["num_key_value_heads"] * dim**2
        return self._source_attention() + ups + len(self.layers.table)

    def warnings(self) -> list[str]:
        """What a user should know before using the output."""
        return ["every step expands all that is cached: train this form, and serve another."]
