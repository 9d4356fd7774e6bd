"""Multi-head and grouped-query attention to fewer key and value heads, in a checkpoint.

Decoders with even groups are written as their own class reads them. Encoders have no class that
reads fewer key heads, so all of their groups are written down as uneven ones are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from efficient_attn.convert.attending import output_error, with_own_heads
from efficient_attn.convert.gqa import group_layer
from efficient_attn.convert.gqa.grouping import check_grouping
from efficient_attn.convert.hidden_states import HiddenStates
from efficient_attn.convert.native import FORMAT
from efficient_attn.convert.output import Output
from efficient_attn.convert.pipeline import Conversion, Part
from efficient_attn.convert.source import FLOATING, Source


@dataclass(frozen=True)
class GqaOptions:
    """How heads are to be shared; see :func:`efficient_attn.convert.gqa.group_layer`.

    Args:
        num_kv_heads: Key and value heads that are left in each layer.
        partition: Which heads share one: ``"consecutive"``, ``"clustered"``, ``"searched"`` or
            ``"searched-even"``.
        pooling: What they share: ``"mean"``, ``"first"``, ``"norm"``, ``"aligned"``, ``"svd"`` or
            ``"fitted"``.
        seed: Of the search for groups.
        dtype: Of the output; by default that of the source.
    """

    num_kv_heads: int
    partition: str = "searched-even"
    pooling: str = "fitted"
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, *FLOATING):
            raise ValueError(f"dtype is {self.dtype!r}; take one of {', '.join(FLOATING)}.")


def grouped_record(groups: Mapping[str, list[int]]) -> dict[str, object]:
    """What ``config.json`` says under ``efficient_attn`` of groups that no stock class reads.

    Args:
        groups: By the name of a layer, how many query heads each key head serves.
    """
    return {"format": FORMAT, "conversion": "gqa", "groups": dict(groups)}


def plan(
    source: Source,
    options: GqaOptions,
    flow: Callable[[], HiddenStates] | None = None,
    *,
    dry_run: bool = False,
    progress: bool = False,
) -> Conversion:
    """What letting the heads of a source be shared would do.

    Args:
        source: The model.
        options: What is wanted.
        flow: Makes calibration tokens flow; without, weights alone decide.
        dry_run: Compute nothing to find out.
        progress: Unused; layers are all that takes time, and they have a bar of their own.

    Raises:
        ValueError: The number of heads does not fit, or an option has no such value.
    """
    config = source.config
    count, dim, layers = (
        config[name] for name in ("num_key_value_heads", "head_dim", "num_hidden_layers")
    )
    check_grouping(count, options.num_kv_heads, options.partition, options.pooling)
    dtype = source.dtype if options.dtype is None else FLOATING[options.dtype]
    activations = None if flow is None or dry_run else flow()
    written = _Written(source, options, dtype, activations)
    numbers = 2 * count * dim, 2 * options.num_kv_heads * dim
    parameters = written.parameters()
    warnings = list(source.warnings)
    if options.num_kv_heads < count:
        warnings.append("sharing heads changes the model; measure it, and train it a little.")
        if flow is None:
            warnings.append("nothing was given to fit to (calib), so weights alone decide.")
        if not source.family.causal:
            warnings.append(
                "no stock class has fewer key heads: load the output by load_grouped of "
                "efficient_attn.integrations.grouped_checkpoints."
            )
    return Conversion(
        method="gqa",
        decisions={
            **asdict(options),
            "dtype": written.dtype_name,
            "calibration": None if activations is None else activations.digest,
        },
        parts=written.parts(written.layer),
        config=written.config,
        bytes_per_token=(
            numbers[0] * layers * source.dtype.itemsize,
            numbers[1] * layers * dtype.itemsize,
        ),
        parameters=(source.parameters, parameters),
        output_bytes=parameters * dtype.itemsize,
        memory_bytes=written.memory_bytes(),
        parallel={
            str(n): tuple(
                int(2 * max(1, heads / n) * dim * layers * kind.itemsize)
                for heads, kind in ((count, source.dtype), (options.num_kv_heads, dtype))
            )
            for n in ((1, 2, 4, 8) if source.family.causal else ())
        },
        warnings=warnings,
        cached=source.family.causal,
    )


class _Written(Output):
    """The tensors and the config of the output."""

    def __init__(
        self,
        source: Source,
        options: GqaOptions,
        dtype: torch.dtype,
        flow: HiddenStates | None,
    ) -> None:
        super().__init__(source, dtype)
        self.options = options
        self.flow = flow

    def layer(self, index: int) -> Part:
        weights = self.source.attention(index)
        grouped = group_layer(
            weights,
            self.options.num_kv_heads,
            partition=self.options.partition,
            pooling=self.options.pooling,
            moments=None if self.flow is None else self.flow.moments(index),
            seed=self.options.seed,
        )
        notes = {
            "groups": " ".join("+".join(map(str, group)) for group in grouped.groups),
            "sizes": {"query_heads": grouped.group_sizes},
            "key_error": grouped.key_error,
            "value_error": grouped.value_error,
        }
        if self.flow is not None:
            read = grouped.head_map.key_index().long()
            written = with_own_heads(grouped.weights, read, read)
            notes["output_error"] = output_error(weights, written, self.flow.first_input())
        names = self.source.family.written(grouped.weights, self.source.family.layers.format(index))
        tensors = {name: x.to(self.dtype).contiguous() for name, x in names.items()}
        return tensors | self._others(self.source.other_names(index)), notes

    def config(self, notes: Mapping[str, dict]) -> dict[str, object]:
        source, wanted = self.source, self.options.num_kv_heads
        groups = {
            source.family.layer_name(source.config, int(part.removeprefix("layer "))): sizes
            for part, noted in notes.items()
            if (sizes := noted.get("sizes", {}).get("query_heads"))
        }
        told = {**source.checkpoint.config, "efficient_attn": {"conversion": "gqa"}}
        if "model_type" in source.checkpoint.config:
            told["dtype"] = self.dtype_name
        if not source.family.causal:
            # Their classes have as many key heads as query heads, and so refuse what is fewer.
            same = wanted == source.config["num_key_value_heads"]
            return told if same else told | {"efficient_attn": grouped_record(groups)}
        if all(len(set(sizes)) == 1 for sizes in groups.values()):
            return told | {"num_key_value_heads": wanted}
        # With the source's number of heads, no stock class finds tensors of the shape it wants.
        return told | {
            "num_key_value_heads": source.config["num_key_value_heads"],
            "efficient_attn": grouped_record(groups),
        }

    def parameters(self) -> int:
        config, biases = self.source.config, self.source.family.biases(self.source.config)
        fewer = (config["num_key_value_heads"] - self.options.num_kv_heads) * config["head_dim"]
        rows = 2 * config["hidden_size"] + biases[1] + biases[2]
        return self.source.parameters - config["num_hidden_layers"] * fewer * rows

    def memory_bytes(self) -> int:
        """Of a layer as read and in fp64, moments of its inputs and of its heads."""
        config = self.source.config
        width = config["hidden_size"]
        heads = 2 * (config["num_attention_heads"] + config["num_key_value_heads"])
        attention = heads * config["head_dim"] * width
        moments = 2 * width**2 + 4 * (config["num_key_value_heads"] * config["head_dim"]) ** 2
        layer = self.source.checkpoint.nbytes // config["num_hidden_layers"]
        return max(2 * layer + 8 * (2 * attention + moments), self._embedding_bytes())
