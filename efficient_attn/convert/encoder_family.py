"""How the checkpoints of one family of encoders are laid out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.convert.family import Config, Family, Shapes


@dataclass(frozen=True, kw_only=True)
class EncoderFamily(Family):
    """A family whose tokens see each other.

    Attributes:
        module: The attention of a layer in the model class, with its number to be filled in.
        base: Name of the class of the bare encoder, or None. Others have it under ``prefix``.
        prefix: See ``base``.
        norms: Names of a layer's two norms.
        mlp: Names of the two projections of a layer's MLP.
        norm_first: Whether norms stand before attention and MLP, or after their sum with the input.
        optional_outside: Shapes of tensors outside of layers that may be missing.
        heads: How names of tensors of a task begin.
    """

    module: str
    norms: tuple[str, str]
    mlp: tuple[str, str]
    norm_first: bool
    base: str | None = None
    prefix: str = ""
    optional_outside: Shapes = lambda config: {}
    heads: tuple[str, ...] = ()

    @property
    def causal(self) -> bool:
        """No."""
        return False

    def optional(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Shapes of tensors outside of layers that a checkpoint may lack."""
        return self.optional_outside(config)

    def is_head(self, name: str) -> bool:
        """Whether a tensor is of what a task adds to the encoder."""
        return name.startswith(self.heads) if self.heads else False

    def layer_name(self, config: Config, layer: int) -> str:
        """The attention of a layer, as the model class names it."""
        bare = self.base is None or config["architectures"][0] == self.base
        return ("" if bare else self.prefix) + self.module.format(layer)


@dataclass(frozen=True, kw_only=True)
class FusedFamily(EncoderFamily):
    """A family with one projection for queries, keys and values, and separate ones once grouped.

    Attributes:
        fused: Its name in a layer. The inherited names are those that a grouped layer has.
        fused_output: Name of the output projection beside it.
    """

    fused: str
    fused_output: str

    def attention_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Shapes of the attention tensors of a layer, by their names in it."""
        width = config["hidden_size"]
        shapes = {f"{self.fused}.weight": (3 * width, width)}
        if config["qkv_bias"]:
            shapes[f"{self.fused}.bias"] = (3 * width,)
        output = {f"{self.fused_output}.weight": (width, width)}
        return shapes | output | {f"{self.fused_output}.bias": (width,)}

    def read(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor | None]:
        """Projections and biases of a layer, as attributes of its weights."""
        found: dict[str, Tensor | None] = {}
        for kind, ending in (("weight", ""), ("bias", "_bias")):
            joint = tensors.get(f"{prefix}{self.fused}.{kind}")
            parts = (None,) * 3 if joint is None else joint.chunk(3)
            for role, part in zip(("query", "key", "value"), parts, strict=True):
                found[role + ending] = part
            found["output" + ending] = tensors.get(f"{prefix}{self.fused_output}.{kind}")
        return found

    def written(self, weights: GroupedAttentionWeights, prefix: str) -> dict[str, Tensor]:
        """The tensors of a layer by name; fused as before if no head is shared."""
        if weights.num_kv_heads < weights.num_heads:
            return super().written(weights, prefix)
        found = {}
        for kind, ending in (("weight", ""), ("bias", "_bias")):
            parts = [getattr(weights, role + ending) for role in ("query", "key", "value")]
            if parts[0] is not None:
                found[f"{prefix}{self.fused}.{kind}"] = torch.cat(parts)
            found[f"{prefix}{self.fused_output}.{kind}"] = getattr(weights, "output" + ending)
        return found
