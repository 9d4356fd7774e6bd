"""Models of transformers whose attention layers were converted to latent attention.

Everything but attention stays the class it was, so ``generate`` and training work as before::

    model = load_converted("llama-as-mla", dtype=torch.bfloat16)
    model.generate(**inputs)

A cache of transformers, or one of :mod:`efficient_attn.integrations.past_key_values`, holds one row
per token and layer, as its keys; its values have no width. Decoding reads that memory where it
lies. ``save_pretrained`` writes what ``load_converted`` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from efficient_attn.convert.checkpoint import Checkpoint
from efficient_attn.convert.families import complete, family_of
from efficient_attn.convert.native import (
    FORMAT,
    TABLE,
    Facts,
    NativeWeights,
    native_facts,
    native_state,
)
from efficient_attn.errors import ConversionError, UnsupportedError
from efficient_attn.integrations.past_key_values import InPages
from efficient_attn.integrations.transformers import NAME, as_bias, reasons_to_refuse
from efficient_attn.layers import FactoredAttention, MultiheadLatentAttention, NormedLatentAttention
from efficient_attn.layers.latent_rows import pages_of_one, row_positions
from efficient_attn.layers.rotary import RotaryEmbedding


class _InModel:
    """A latent layer called as the attention of a transformers model is."""

    layer_idx: int
    is_causal = True

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        *,
        position_ids: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attend; ``position_embeddings`` go unused, for the layer has a table of its own."""
        if reasons := reasons_to_refuse(attention_mask, 0.0, kwargs):
            raise UnsupportedError(f"latent attention in layer {self.layer_idx}", reasons)
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        query, rows = self.project(hidden_states, position_ids)
        positions = position_ids
        if past_key_values is not None:
            past = past_key_values.get_seq_length(self.layer_idx)
            new = rows.unsqueeze(1)
            rows, _ = past_key_values.update(new, new[..., :0], self.layer_idx)
            if self.can_decode(query) and (places := _places(rows, attention_mask, query.shape[2])):
                return self.combine(self.decode(query, *places)), None
            rows = rows.squeeze(1)
            if rows.shape[1] > query.shape[2]:
                end = min(past + query.shape[2], rows.shape[1])
                positions = row_positions(position_ids, end, rows.shape[1])
        options = {"causal": True, "window": self.window}
        if attention_mask is not None:
            options = {"bias": as_bias(attention_mask, query.dtype)}
        return self.combine(self.attend(query, rows, positions, **options)), None


class ConvertedAttention(_InModel, MultiheadLatentAttention):
    """:class:`MultiheadLatentAttention` in a model of transformers."""


class ConvertedNormedAttention(_InModel, NormedLatentAttention):
    """:class:`NormedLatentAttention` in a model of transformers."""


class ConvertedFactoredAttention(_InModel, FactoredAttention):
    """:class:`FactoredAttention` in a model of transformers."""


def _places(
    rows: Tensor, mask: Tensor | None, tokens: int
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Rows, lengths and block table of what all new tokens may see, or None if that differs."""
    if isinstance(rows, InPages):
        batch = rows.batch
        held, lengths, table = batch.parts[0].squeeze(1), batch.lengths, batch.block_table
    else:
        held, table = rows.squeeze(1), None
        lengths = held.new_full(held.shape[:1], held.shape[1], dtype=torch.int32)
    if mask is None:
        return held, lengths, table
    if tokens > 1 or mask.shape[1] > 1:
        return None
    seen = mask[:, 0, 0].expand(len(lengths), -1)
    if seen.is_floating_point():
        hidden = seen <= torch.finfo(seen.dtype).min
        seen = seen == 0
        if not bool((seen ^ hidden).all()):
            return None
    # Padding is left out: what is seen comes first, in its order.
    chosen = seen.logical_not().byte().argsort(dim=-1, stable=True)
    held, table = pages_of_one(held, table, chosen)
    return held, seen.sum(-1, dtype=torch.int32), table


def replace_attention(
    model: PreTrainedModel, weights: Sequence[NativeWeights], *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Give ``model`` converted attention layers, in place.

    Args:
        model: A decoder of transformers, such as ``LlamaForCausalLM``.
        weights: Of every layer, first to last. They may belong to any device and dtype.
        dtype: Of the new layers; by default that of what they replace. Tables of rotary
            frequencies keep fp32.

    Returns:
        ``model``. Its configuration tells of the layers, so that ``save_pretrained`` and
        :func:`load_converted` keep them.

    Raises:
        ConversionError: The number of layers differs, or weights do not fit each other.
    """
    facts = [native_facts(layer) for layer in weights]
    made = _layers(model, facts)
    for i, (new, layer) in enumerate(zip(made, model.get_decoder().layers, strict=True)):
        before = next(layer.self_attn.parameters())
        place = (before.device, dtype or before.dtype)
        state = {
            name: x.detach().to(*(place[:1] if name == TABLE else place), copy=True)
            for name, x in native_state(weights[i]).items()
        }
        try:
            new.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ConversionError(f"weights of layer {i} do not fit each other: {error}") from error
        new.requires_grad_(before.requires_grad).train(layer.self_attn.training)
    _install(model, made, facts)
    model.set_attn_implementation(NAME)
    return model


def load_converted(
    path: str | Path, *, dtype: torch.dtype | str = "auto", **kwargs: object
) -> PreTrainedModel:
    """A natively converted checkpoint as the model it came from, with latent attention.

    Args:
        path: A folder with ``config.json`` and safetensors.
        dtype: Of the parameters; by default that of the checkpoint.
        kwargs: For ``from_pretrained`` of transformers, for example ``device_map``.

    Raises:
        ConversionError: The checkpoint is not a native one, or its tensors are not exactly those
            that its configuration asks for.
    """
    checkpoint = Checkpoint.open(path)
    record = checkpoint.config.get("efficient_attn")
    if not isinstance(record, dict) or "layers" not in record:
        raise ConversionError(
            f"{path} has no efficient_attn entry with layers in its config.json, so it is not a "
            "natively converted checkpoint; load it by transformers' AutoModelForCausalLM."
        )
    if record.get("format") != FORMAT:
        raise ConversionError(
            f"{path} is written in format {record.get('format')}, and this version reads {FORMAT}."
        )
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    model_class = _converted_class(type(config))
    _check_tensors(checkpoint, model_class, config)
    model, info = model_class.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation=NAME,
        output_loading_info=True,
        **kwargs,
    )
    found = {kind: names for kind, names in info.items() if names}
    if found:
        raise ConversionError(f"the tensors in {path} are not those of its configuration: {found}.")
    for module in model.modules():
        if isinstance(module, RotaryEmbedding) and module.inverse_frequencies is not None:
            # In a model of fp64 too, for that is what the source computes its angles in.
            module.inverse_frequencies = module.inverse_frequencies.float()
    return model


def _converted_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The stock class, whose instances get latent layers before weights are loaded."""
    stock = AutoModelForCausalLM._model_mapping[config_class]

    def __init__(self, config: PreTrainedConfig, *args: object, **kwargs: object) -> None:
        stock.__init__(self, config, *args, **kwargs)
        facts = config.efficient_attn["layers"]
        _install(self, _layers(self, facts), facts)

    # The stock name, which save_pretrained writes down.
    keep = {"_keep_in_fp32_modules_strict": {"inverse_frequencies"}}
    return type(stock.__name__, (stock,), {"__init__": __init__, **keep})


def _check_tensors(
    checkpoint: Checkpoint, model_class: type[PreTrainedModel], model_config: PreTrainedConfig
) -> None:
    """Refuse tensors that are not exactly those of the configuration, before any is read."""
    config, family = complete(checkpoint.config), family_of(checkpoint.config)
    with torch.device("meta"):
        state = model_class(model_config).state_dict()
    expected = {name: tuple(x.shape) for name, x in state.items() if ".self_attn." in name}
    expected |= family.outside(config)
    for i in range(config["num_hidden_layers"]):
        prefix = family.layers.format(i)
        expected |= {prefix + name: shape for name, shape in family.others(config).items()}
    found = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    if config["tie_word_embeddings"]:
        found.pop("lm_head.weight", None)
    wrong = [
        f"{name} is {found.get(name, 'missing')} and should be {expected.get(name, 'absent')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConversionError(
            f"the tensors in {checkpoint.folder} are not those of its configuration: "
            f"{'; '.join(wrong[:3])}{more}."
        )


def _layers(model: PreTrainedModel, facts: Sequence[Facts]) -> list[nn.Module]:
    """Layers without memory, to take the place of the attention of a model."""
    stock = [layer.self_attn for layer in model.get_decoder().layers]
    if len(facts) != len(stock):
        raise ConversionError(
            f"there are weights of {len(facts)} layers, and {type(model).__name__} has "
            f"{len(stock)}."
        )
    made = []
    for i, (own, before) in enumerate(zip(facts, stock, strict=True)):
        try:
            made.append(_layer(own, before, model.config.hidden_size))
        except (KeyError, TypeError, ValueError) as error:
            raise ConversionError(f"what is said of layer {i} makes none: {error!r}.") from error
    return made


def _install(model: PreTrainedModel, made: Sequence[nn.Module], facts: Sequence[Facts]) -> None:
    """Put layers in place, and tell of them in the configuration."""
    for i, (layer, attention) in enumerate(zip(model.get_decoder().layers, made, strict=True)):
        attention.layer_idx = i
        layer.self_attn = attention
    record = getattr(model.config, "efficient_attn", None) or {}
    model.config.efficient_attn = {**record, "format": FORMAT, "layers": list(facts)}


def _layer(facts: Facts, stock: nn.Module, embed_dim: int) -> nn.Module:
    """A converted layer on the meta device."""
    facts = dict(facts)
    form, num_heads, window = facts.pop("form"), facts.pop("num_heads"), facts.pop("window")
    facts["window"] = None if window is None else (window - 1, 0)
    factor = facts.pop("rotary_scale")
    width = facts.pop("rotary_dim") if form == "factored" else facts["qk_rope_head_dim"]
    with torch.device("meta"):
        if form != "latent":
            norms, eps = facts.pop("norms"), facts.pop("norm_eps")
            for name in ("q_norm", "k_norm"):
                facts[name] = _norm(stock, name, facts["head_dim"], eps) if norms else None
        facts["rotary"] = width and RotaryEmbedding(
            width,
            # Converted heads are paired as DeepSeek's, and factored ones are still the source's.
            interleaved=form != "factored",
            inverse_frequencies=torch.empty(width // 2),
            attention_factor=factor,
            persistent=True,
        )
        if form == "factored":
            return ConvertedFactoredAttention(embed_dim, num_heads, **facts)
        if form == "normed":
            return ConvertedNormedAttention(embed_dim, num_heads, **facts)
        return ConvertedAttention(embed_dim, num_heads, latent_norm=False, **facts)


def _norm(stock: nn.Module, name: str, width: int, eps: float) -> nn.Module:
    """Another norm of the class that the source has there, rounding where it rounds."""
    if not isinstance(getattr(stock, name, None), nn.Module):
        raise ConversionError(f"the weights have {name}, and {type(stock).__name__} has none.")
    return type(getattr(stock, name))(width, eps=eps)
