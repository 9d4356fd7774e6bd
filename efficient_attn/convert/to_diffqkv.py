"""Grouped-query attention to DiffQKV: fewer key heads in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from efficient_attn.convert.activations import Activations
from efficient_attn.convert.attending import output_error, with_own_heads
from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.convert.diffqkv import MERGES, DiffQKVWeights, separate_heads
from efficient_attn.convert.output import Output
from efficient_attn.convert.pipeline import Conversion, Part
from efficient_attn.convert.source import FLOATING, Source
from efficient_attn.errors import ConversionError

# What a config says of windows; a source that has any is refused.
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


@dataclass(frozen=True)
class DiffQKVOptions:
    """How a model is to become one with fewer key heads.

    Args:
        key_heads: Key heads of the output; a divisor of the source's.
        value_heads: Value heads of the output, a divisor of the source's; by default all.
        merge: How key heads become one: ``"mean"``, ``"select"`` or ``"complex_svd"``; see
            :func:`efficient_attn.convert.diffqkv.separate_heads`.
        augmented_query_dim: Inner width of an augmented query to add, which starts without effect
            and is there to be trained; 0 for none.
        seed: Of the augmented query's first weights.
        dtype: Of the output; by default that of the source.
    """

    key_heads: int
    value_heads: int | None = None
    merge: str = "complex_svd"
    augmented_query_dim: int = 0
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("merge", MERGES), ("dtype", (None, *FLOATING))):
            if getattr(self, name) not in allowed:
                told = ", ".join(str(value) for value in allowed if value is not None)
                raise ValueError(f"{name} is {getattr(self, name)!r}; take one of {told}.")
        for name, least in (("key_heads", 1), ("value_heads", 1), ("augmented_query_dim", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")


def plan(
    source: Source,
    options: DiffQKVOptions,
    flow: Callable[[], Activations] | None = None,
    *,
    dry_run: bool = False,
    progress: bool = False,
) -> Conversion:
    """What converting a source to DiffQKV would do.

    Args:
        source: The model.
        options: What is wanted.
        flow: Makes calibration tokens flow; without, weights alone decide.
        dry_run: Compute nothing to find out.
        progress: Unused; layers are all that takes time, and they have a bar of their own.

    Raises:
        ConversionError: It cannot be done in this way; the message has every reason.
    """
    config = source.config
    groups, dim = config["num_key_value_heads"], config["head_dim"]
    value_heads = groups if options.value_heads is None else options.value_heads
    reasons = _reasons_to_refuse(source, options.key_heads, value_heads)
    if reasons:
        raise ConversionError(
            f"{source.checkpoint.folder} cannot become DiffQKV: {'; '.join(reasons)}."
        )
    dtype = source.dtype if options.dtype is None else FLOATING[options.dtype]
    activations = None if flow is None or dry_run else flow()
    written = _Written(source, options, value_heads, dtype, activations)
    numbers = 2 * groups * dim, (options.key_heads + value_heads) * dim
    parameters = written.parameters()
    return Conversion(
        method="diffqkv",
        decisions={
            **asdict(options),
            "value_heads": value_heads,
            "dtype": written.dtype_name,
            "calibration": None if activations is None else activations.digest,
        },
        parts=written.parts(written.layer),
        config=written.config,
        bytes_per_token=(
            numbers[0] * source.num_layers * source.dtype.itemsize,
            numbers[1] * source.num_layers * dtype.itemsize,
        ),
        parameters=(source.parameters, parameters),
        output_bytes=parameters * dtype.itemsize,
        memory_bytes=written.memory_bytes(),
        warnings=[*source.warnings, *written.warnings(fitted=flow is not None)],
    )


def _reasons_to_refuse(source: Source, key_heads: int, value_heads: int) -> list[str]:
    config, reasons = source.config, []
    groups = config["num_key_value_heads"]
    for name, count in (("key", key_heads), ("value", value_heads)):
        if groups % count:
            reasons.append(f"{count} {name} heads do not divide its {groups}")
    if source.family.query_norm is not None:
        reasons.append("it normalises query and key heads, and the DiffQKV model does not")
    if "num_local_experts" in config:
        reasons.append("its layers have experts, and those of the DiffQKV model have none")
    if source.closing_window is not None:
        reasons.append(
            f"it attends within a window of {source.closing_window} tokens, and the DiffQKV model "
            "to all"
        )
    return reasons


class _Written(Output):
    """The tensors and the config of the output."""

    def __init__(
        self,
        source: Source,
        options: DiffQKVOptions,
        value_heads: int,
        dtype: torch.dtype,
        flow: Activations | None,
    ) -> None:
        super().__init__(source, dtype)
        self.options = options
        self.value_heads = value_heads
        self.flow = flow
        self.has_bias = any(source.family.biases(source.config))

    def layer(self, index: int) -> Part:
        weights = self.source.attention(index)
        found = separate_heads(
            weights,
            self.options.key_heads,
            self.value_heads,
            merge=self.options.merge,
            moments=None if self.flow is None else self.flow.moments(index),
        )
        notes = {"key_error": found.key_error, "value_error": found.value_error}
        if self.flow is not None:
            written = _with_own_heads(weights, found)
            notes["output_error"] = output_error(weights, written, self.flow.first_input())
        prefix = self.source.family.layers.format(index) + "self_attn."
        tensors = {
            prefix + name: x.to(self.dtype).contiguous()
            for name, x in self._attention(found, index).items()
        }
        return tensors | self._others(self.source.other_names(index)), notes

    def config(self, notes: Mapping[str, dict]) -> dict[str, object]:
        source, options = self.source, self.options
        kept = {k: x for k, x in source.checkpoint.config.items() if k not in _WINDOWS}
        return {
            **kept,
            "architectures": ["DiffQKVForCausalLM"],
            "model_type": "diffqkv",
            "num_key_heads": options.key_heads,
            "num_value_heads": self.value_heads,
            "head_dim": source.config["head_dim"],
            "v_head_dim": source.config["head_dim"],
            "augmented_query_dim": options.augmented_query_dim,
            "query_residual": options.augmented_query_dim > 0,
            "attention_bias": self.has_bias,
            "rope_parameters": dict(source.rope),
            "dtype": self.dtype_name,
            "efficient_attn": {"conversion": "diffqkv"},
        }

    def parameters(self) -> int:
        source, dim = self.source, self.source.config["head_dim"]
        width, groups = source.config["hidden_size"], source.config["num_key_value_heads"]
        removed = 2 * groups - self.options.key_heads - self.value_heads
        change = self._query_width() * 3 * self.options.augmented_query_dim
        change -= removed * dim * (width + self.has_bias)
        if self.has_bias and not source.family.biases(source.config)[3]:
            change += width
        return source.parameters + source.num_layers * change

    def memory_bytes(self) -> int:
        """Of a layer in fp64, copied while heads are merged; or of the embedding, twice."""
        config = self.source.config
        layer = self.source.checkpoint.nbytes // self.source.num_layers
        keys = config["num_key_value_heads"] * config["head_dim"]
        attention = (2 * self._query_width() + 2 * keys) * config["hidden_size"]
        moments = 2 * config["hidden_size"] ** 2 + 4 * keys**2
        return max(2 * layer + 8 * (4 * attention + moments), self._embedding_bytes())

    def warnings(self, *, fitted: bool) -> list[str]:
        if self.options.key_heads == self.value_heads == self.source.config["num_key_value_heads"]:
            return []
        told = ["sharing heads changes the model; measure it, and train it a little."]
        if not fitted:
            told.append("no text was given to fit to (calib), so weights alone decide.")
        return told

    def _query_width(self) -> int:
        return self.source.config["num_attention_heads"] * self.source.config["head_dim"]

    def _attention(self, layer: DiffQKVWeights, index: int) -> dict[str, Tensor]:
        state = {}
        for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
            weight, bias = getattr(layer, name), getattr(layer, f"{name}_bias")
            state[f"{short}_proj.weight"] = weight
            if self.has_bias:
                state[f"{short}_proj.bias"] = (
                    weight.new_zeros(len(weight)) if bias is None else bias
                )
        inner, width = self.options.augmented_query_dim, self._query_width()
        if inner:
            generator = torch.Generator().manual_seed(self.options.seed + index)
            for name in ("gate", "up"):
                random = torch.randn(inner, width, generator=generator)
                state[f"q_{name}_proj.weight"] = random * width**-0.5
            state["q_down_proj.weight"] = torch.zeros(width, inner)
        return state


def _with_own_heads(
    source: GroupedAttentionWeights, found: DiffQKVWeights
) -> GroupedAttentionWeights:
    """What was found as a layer with a key and a value head for every query head."""
    names = {field.name for field in fields(found)} & {field.name for field in fields(source)}
    separate = replace(source, **{name: getattr(found, name) for name in names})
    heads = torch.arange(source.num_heads)
    counts = found.num_key_heads, found.num_value_heads
    return with_own_heads(separate, *(heads * count // source.num_heads for count in counts))
