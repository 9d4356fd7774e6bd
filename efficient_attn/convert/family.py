"""How the checkpoints of one family of models are laid out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from efficient_attn.convert.attention_weights import GroupedAttentionWeights

Config = Mapping[str, object]
Shapes = Callable[[Config], dict[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one family are laid out.

    Attributes:
        defaults: What a config that leaves these keys out means.
        query: Name of the query projection in a layer; so ``key``, ``value`` and ``output``.
        query_norm: Name of the norm on query heads in a layer, or None; so ``key_norm``.
        layers: Name of a layer, with its number to be filled in.
        biases: Which of the four projections have biases.
        window: Keys that a query of a layer sees, itself included, or None for all before it.
        others: Shapes of the other tensors of a layer.
        outside: Shapes of the tensors outside of layers, those that come before these first.
        before: How many of them come before.
        default_theta: Rotary base where the config names none.
        ignored: Endings of names of tensors that mean nothing.
    """

    defaults: Config
    biases: Callable[[Config], tuple[bool, bool, bool, bool]]
    window: Callable[[Config, int], int | None]
    others: Shapes
    outside: Shapes
    before: int = 1
    layers: str = "model.layers.{}."
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    default_theta: float = 10000.0
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    @property
    def causal(self) -> bool:
        """Whether a token attends to itself and those before it alone."""
        return True

    def optional(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Shapes of tensors outside of layers that a checkpoint may lack."""
        return {}

    def is_head(self, name: str) -> bool:
        """Whether a tensor is of what a task adds to the model; such are kept as they are."""
        return False

    def layer_name(self, config: Config, layer: int) -> str:
        """The attention of a layer, as the model class names it."""
        return self.layers.format(layer) + self.query.rpartition(".")[0]

    def attention_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Shapes of the attention tensors of a layer, by their names in it."""
        width, dim = config["hidden_size"], config["head_dim"]
        queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
        shapes = {
            self.query: (queries, width),
            self.key: (keys, width),
            self.value: (keys, width),
            self.output: (width, queries),
        }
        found: dict[str, tuple[int, ...]] = {}
        for (name, shape), has_bias in zip(shapes.items(), self.biases(config), strict=True):
            found[f"{name}.weight"] = shape
            if has_bias:
                found[f"{name}.bias"] = shape[:1]
        for norm in (self.query_norm, self.key_norm):
            if norm is not None:
                found[f"{norm}.weight"] = (dim,)
        return found

    @property
    def roles(self) -> dict[str, str]:
        """Tensors of a layer, by the attributes of its weights that they are."""
        heads = {"query": self.query, "key": self.key, "value": self.value, "output": self.output}
        found = {role: f"{name}.weight" for role, name in heads.items()}
        found |= {f"{role}_bias": f"{name}.bias" for role, name in heads.items()}
        norms = {"query_norm": self.query_norm, "key_norm": self.key_norm}
        return found | {r: f"{name}.weight" for r, name in norms.items() if name is not None}

    def read(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor | None]:
        """Projections, biases and norms of a layer, as attributes of its weights."""
        return {role: tensors.get(prefix + name) for role, name in self.roles.items()}

    def written(self, weights: GroupedAttentionWeights, prefix: str) -> dict[str, Tensor]:
        """The tensors of a layer by name, from its weights."""
        found = {prefix + name: getattr(weights, role) for role, name in self.roles.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}
