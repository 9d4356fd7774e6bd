"""A checkpoint seen as attention layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.convert.checkpoint import Checkpoint
from efficient_attn.convert.encoder_configs import encoder_of, is_encoder
from efficient_attn.convert.families import complete, family_of
from efficient_attn.convert.family import Family
from efficient_attn.convert.rope import LENGTH_DEPENDENT, inverse_frequencies, rope_parameters
from efficient_attn.errors import ConversionError

FLOATING = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


@dataclass(frozen=True)
class Source:
    """A checkpoint of a known family whose tensors are all there, and no others.

    Attributes:
        checkpoint: Its files.
        family: How it is laid out.
        config: Its config, with the family's defaults filled in.
        rope: Its rotary settings; empty if nothing is turned.
        inverse_frequencies: ``(F,)``, after any scaling, fp32.
        rotary_scale: Factor on rotated queries and keys.
    """

    checkpoint: Checkpoint
    family: Family
    config: Mapping[str, object]
    rope: Mapping[str, object]
    inverse_frequencies: Tensor
    rotary_scale: float

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> Source:
        """Check names and shapes of all tensors against the config; nothing is read.

        Raises:
            ConversionError: The family is unknown, or tensors are missing, unknown or misshapen.
        """
        if is_encoder(checkpoint.config):
            family, config = encoder_of(checkpoint)
            rope, table, scale = {}, torch.zeros(0), 1.0
        else:
            config = complete(checkpoint.config)
            family = family_of(config)
            rope = rope_parameters(config, family.default_theta)
            table, scale = inverse_frequencies(
                rope, config["head_dim"], config["max_position_embeddings"]
            )
        source = cls(checkpoint, family, config, rope, table, scale)
        source._check_tensors()
        return source

    @property
    def num_layers(self) -> int:
        """Number of attention layers."""
        return self.config["num_hidden_layers"]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model runs in: its config's, or that of its weights."""
        told = self.config.get("dtype") or self.config.get("torch_dtype")
        if told in FLOATING:
            return FLOATING[told]
        return self.checkpoint.tensors[self.attention_names(0)[0]].dtype

    @property
    def parameters(self) -> int:
        """Number of weights, those that are ignored left out."""
        names = self.outside_names()
        for layer in range(self.num_layers):
            names += self.attention_names(layer) + self.other_names(layer)
        return sum(self.checkpoint.tensors[name].numel for name in names)

    @property
    def warnings(self) -> list[str]:
        """What a conversion cannot keep whatever its method."""
        kind = self.rope.get("rope_type")
        if kind not in LENGTH_DEPENDENT:
            return []
        return [
            f"rotary scaling {kind!r} changes its table with the length of the sequence; the "
            f"converted model keeps the one for sequences up to the {LENGTH_DEPENDENT[kind]}."
        ]

    def window(self, layer: int) -> int | None:
        """Keys that a query of a layer sees, itself included; None for all before it."""
        return self.family.window(self.config, layer)

    @property
    def closing_window(self) -> int | None:
        """The narrowest window that some sequence outgrows; None where every query sees all."""
        windows = (self.window(layer) for layer in range(self.num_layers))
        longest = self.config["max_position_embeddings"]
        return min((w for w in windows if w is not None and w < longest), default=None)

    def attention_names(self, layer: int) -> list[str]:
        """Names of the attention tensors of a layer."""
        prefix = self.family.layers.format(layer)
        return [prefix + name for name in self.family.attention_shapes(self.config)]

    def other_names(self, layer: int) -> list[str]:
        """Names of the other tensors of a layer."""
        prefix = self.family.layers.format(layer)
        return [prefix + name for name in self.family.others(self.config)]

    def outside_names(self) -> list[str]:
        """Names of the tensors outside of layers, those that come before these first."""
        found, family = self.checkpoint.tensors, self.family
        optional = [name for name in family.optional(self.config) if name in found]
        heads = sorted(filter(family.is_head, found))
        return [*family.outside(self.config), *optional, *heads]

    def attention(self, layer: int) -> GroupedAttentionWeights:
        """The attention of a layer, its tensors mapped from the file.

        Raises:
            ConversionError: A weight is not finite.
        """
        tensors = self.checkpoint.read(self.attention_names(layer))
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor.sum(dtype=torch.float64)):
                raise ConversionError(f"{name} holds numbers that are not finite.")
        return self._weights(layer, tensors)

    def outline(self, layer: int) -> GroupedAttentionWeights:
        """The attention of a layer, its tensors having shapes only; nothing is read."""
        names = self.attention_names(layer)
        shapes = {name: self.checkpoint.tensors[name].shape for name in names}
        empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return self._weights(layer, empty)

    def _weights(self, layer: int, tensors: Mapping[str, Tensor]) -> GroupedAttentionWeights:
        config = self.config
        return GroupedAttentionWeights(
            **self.family.read(tensors, self.family.layers.format(layer)),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            inverse_frequencies=self.inverse_frequencies,
            rotary_scale=self.rotary_scale,
            scale=config["head_dim"] ** -0.5,
            window=self.window(layer),
            causal=self.family.causal,
        )

    def _check_tensors(self) -> None:
        if self.num_layers > len(self.checkpoint.tensors):
            raise ConversionError(
                f"config.json: num_hidden_layers is {self.num_layers}, and there are "
                f"{len(self.checkpoint.tensors)} tensors."
            )
        attention = self.family.attention_shapes(self.config)
        in_layer = {**attention, **self.family.others(self.config)}
        expected = dict(self.family.outside(self.config))
        for layer in range(self.num_layers):
            prefix = self.family.layers.format(layer)
            expected |= {prefix + name: shape for name, shape in in_layer.items()}
        found = self.checkpoint.tensors
        optional = self.family.optional(self.config)
        expected |= {name: shape for name, shape in optional.items() if name in found}
        missing = sorted(set(expected) - set(found))
        unknown = sorted(
            name
            for name in set(found) - set(expected)
            if not name.endswith(self.family.ignored)
            and name != "lm_head.weight"
            and not self.family.is_head(name)
        )
        if missing or unknown:
            told = [
                f"{what} {len(names)} tensors ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
                for what, names in (("lacks", missing), ("has unknown", unknown))
                if names
            ]
            raise ConversionError(
                f"the checkpoint {' and '.join(told)}, judged by its config.json: "
                f"{self.config['model_type']!r} with {self.num_layers} layers."
            )
        for name, shape in expected.items():
            entry = found[name]
            if entry.shape != shape:
                raise ConversionError(
                    f"{name} has shape {list(entry.shape)}; by config.json it must be "
                    f"{list(shape)}."
                )
            if not entry.dtype.is_floating_point:
                raise ConversionError(f"{name} has dtype {entry.dtype}; weights must be floating.")
