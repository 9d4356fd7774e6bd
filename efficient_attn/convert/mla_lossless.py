"""All layers of a model with as many cached numbers as before, and nothing lost."""

from __future__ import annotations

from efficient_attn.convert.activations import Activations
from efficient_attn.convert.attending import in_fp32
from efficient_attn.convert.attention_weights import (
    FactoredAttentionWeights,
    LatentAttentionWeights,
)
from efficient_attn.convert.mla import (
    calibrate,
    exact,
    factorise,
    frequency_transforms,
    query_rank,
    rorope,
    with_query_latent,
)
from efficient_attn.convert.mla.rotation import Rotation
from efficient_attn.convert.mla_targets import MlaSizes
from efficient_attn.convert.source import Source
from efficient_attn.errors import ConversionError


class LosslessLayers:
    """Layers of modes ``"exact"`` and ``"rorope"``.

    Args:
        source: The model.
        mode: Which of the two.
        flow: Calibration tokens that ``"rorope"`` fits its turning of heads to, or None for none.
        rotation: What kind of turning that is.
        q_lora_rank: Width of a latent to make queries from, or None.
    """

    def __init__(
        self,
        source: Source,
        mode: str = "rorope",
        flow: Activations | None = None,
        rotation: Rotation = "unitary",
        q_lora_rank: int | None = None,
    ) -> None:
        self.source = source
        self.flow = flow
        self.rotation = rotation
        self.q_lora_rank = q_lora_rank
        if q_lora_rank is not None and q_lora_rank != query_rank(source.outline(0)):
            raise ConversionError(
                f"q_lora_rank is {q_lora_rank}; without loss, the queries of this model take "
                f"{query_rank(source.outline(0))}. Mode 'compress' makes do with fewer."
            )
        groups, dim = source.config["num_key_value_heads"], source.config["head_dim"]
        turned = 2 * len(source.inverse_frequencies)
        # All that is turned is one key, frequency by frequency, and the rest the latent.
        sizes = MlaSizes(
            kv_lora_rank=groups * (2 * dim - turned),
            qk_rope_head_dim=groups * turned,
            qk_nope_head_dim=dim - turned,
            v_head_dim=dim,
        )
        self.sizes = (sizes,) * source.num_layers
        self.table = source.inverse_frequencies.double().repeat_interleave(groups)
        self.output_bias = any(source.family.biases(source.config)[2:])
        self._convert = {"exact": exact, "rorope": rorope}[mode]

    def convert(self, index: int) -> tuple[LatentAttentionWeights, dict[str, float]]:
        """One layer; there is nothing to tell of it."""
        weights = self.source.attention(index)
        if self.flow is None:
            found = self._convert(weights)
        else:
            self.flow.go_to(index)
            moments = calibrate(in_fp32(weights), self.flow.inputs(), device=self.flow.device)
            found = rorope(weights, frequency_transforms(weights, moments, self.rotation))
        if self.q_lora_rank is not None:
            found = with_query_latent(found, weights, self.q_lora_rank)
        return found, {}


class FactoredLayers:
    """Layers of mode ``"exact"`` whose factors may mix everything, for they are not absorbed.

    Args:
        source: The model.
        factor: What keys and values are factorised to.
        seed: Of random factors.
    """

    q_lora_rank = None

    def __init__(self, source: Source, factor: str, seed: int) -> None:
        self.source = source
        self.factor = factor
        self.seed = seed
        groups, dim = source.config["num_key_value_heads"], source.config["head_dim"]
        # Both latents are cached before anything is turned.
        self.sizes = (MlaSizes(2 * groups * dim, 0, dim, dim),) * source.num_layers
        self.table = source.inverse_frequencies
        self.output_bias = any(source.family.biases(source.config)[3:])

    def convert(self, index: int) -> tuple[FactoredAttentionWeights, dict[str, float]]:
        """One layer; there is nothing to tell of it."""
        seed = self.seed * self.source.num_layers + index
        return factorise(self.source.attention(index), self.factor, seed=seed), {}
