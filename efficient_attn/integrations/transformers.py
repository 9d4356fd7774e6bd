"""Exact attention for Hugging Face models, under the name ``efficient_attn``.

Importing this module registers two functions with transformers: one that computes attention, and
one that says which mask it wants. Both are needed: with the first alone, transformers hands over no
mask, and padded batches come out wrong without a warning::

    import efficient_attn.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="efficient_attn")

The mask function leaves out whatever the op can do by itself. What the two agree on:

===========================  =====================================================================
mask handed over             meaning
===========================  =====================================================================
``None``, causal layer       causal along the diagonal that ends in the lower right corner, inside
                             the layer's sliding window if it has one
``None``, any other layer    every query sees every key
four dimensions              complete: the layer's own order and window are already in it. Floating
                             masks are added to the scores, boolean ones are true where a key is
                             seen
===========================  =====================================================================
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

from efficient_attn.errors import UnsupportedError
from efficient_attn.functional import attention, attention_decode, attention_varlen
from efficient_attn.functional.decode import FEW_TOKENS
from efficient_attn.head_map import HeadMap
from efficient_attn.integrations.model_facts import ModelFacts, facts
from efficient_attn.integrations.past_key_values import InPages

# transformers treats a name that holds "flash", "sdpa", "flex", a slash or a bar in a special way.
NAME = "efficient_attn"
NAME_FOR_SOME_LAYERS = "efficient_attn_some_layers"

# Arguments that reach every attention layer and say nothing about the scores. What is neither here
# nor in a signature below may change the result, and is refused.
SAYS_NOTHING_ABOUT_SCORES = frozenset(
    (
        *("deterministic", "num_items_in_batch", "output_attentions", "output_hidden_states"),
        *("output_router_logits", "position_ids", "return_dict", "seq_idx", "use_cache"),
    )
)


def register() -> None:
    """Make ``attn_implementation="efficient_attn"`` known to transformers; may be called again.

    Raises:
        ImportError: This version of transformers builds its masks by another interface.
    """
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError(
            f"transformers {transformers.__version__} builds attention masks by an interface that "
            "efficient_attn does not know. It needs 5.4 or later and is tested with 5.23: "
            "pip install -U transformers"
        )
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    # A model in which only some layers are ours keeps the masks that its other layers need.
    AttentionInterface.register(NAME_FOR_SOME_LAYERS, attention_forward_under_sdpa_masks)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend as the interface of transformers asks.

    Args:
        module: The calling layer; its ``is_causal`` counts where the argument is absent, and its
            ``kv_group_sizes``, if it has any, say how many query heads each key head serves.
        query: ``(B, Hq, Nq, D)``.
        key: ``(B, Hk, Nk, D)``; key and value heads are read in groups, never repeated.
        value: ``(B, Hk, Nk, Dv)``.
        attention_mask: See the top of this module.
        dropout: Dropout of the attention weights; must be 0.
        scaling: Factor of the scores, ``D ** -0.5`` by default.
        is_causal: Whether the layer is causal; used where ``attention_mask`` is None.
        sliding_window: Number of keys that a causal query sees, itself included; used where
            ``attention_mask`` is None.
        softcap: Bound of the scores, as in Gemma 2.
        position_bias: Added to the scores, ``(B or 1, Hq, Nq, Nk)``, as in T5; differentiable.
        s_aux: Attention sinks, one logit per query head that takes weight and gives no value, as in
            GPT-OSS; differentiable.
        cu_seq_lens_q: Where each of several packed sequences starts, used where ``attention_mask``
            is None; with it go ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k``.
        cu_seq_lens_k: See ``cu_seq_lens_q``.
        max_length_q: See ``cu_seq_lens_q``.
        max_length_k: See ``cu_seq_lens_q``.
        **kwargs: Must not concern the scores.

    Returns:
        The output, ``(B, Nq, Hq, Dv)``, contiguous; and None, for the weights are never formed.

    Raises:
        UnsupportedError: An argument asks for what is not done here; every such one is named.
    """
    causal = attention_mask is None and (
        getattr(module, "is_causal", True) if is_causal is None else is_causal
    )
    slides = attention_mask is None and sliding_window is not None
    packed = attention_mask is None and cu_seq_lens_q is not None
    reasons = reasons_to_refuse(attention_mask, dropout, kwargs)
    if slides and not causal and key.shape[2] > sliding_window:
        reasons.append("sliding_window came without a mask to a layer that is not causal")
    if packed and (query.shape[0] != 1 or position_bias is not None):
        reasons.append("packed sequences (cu_seq_lens_q) need batch size 1 and no position_bias")
    if reasons:
        raise UnsupportedError(
            f"attention in {type(module).__name__}",
            reasons,
            'Use attn_implementation="eager" for this model, or leave this layer unpatched.',
        )
    options = {
        "head_map": uneven_groups(module, query.device),
        "causal": bool(causal),
        "window": (sliding_window - 1, 0) if slides and causal else None,
        "scale": scaling,
        "softcap": softcap or 0.0,
        "return_lse": True,
    }
    if packed:
        out, lse = attention_varlen(
            *(x[0].transpose(0, 1) for x in (query, key, value)),
            cu_seqlens_q=cu_seq_lens_q,
            cu_seqlens_k=cu_seq_lens_k,
            max_seqlen_q=int(max_length_q),
            max_seqlen_k=int(max_length_k),
            **options,
        )
        out, lse = out.transpose(0, 1)[None], lse.transpose(0, 1)[None]
    elif (
        attention_mask is None and position_bias is None and _can_decode(query, key, value, causal)
    ):
        del options["causal"]
        out, lse = _decode(query, key, value, options)
    else:
        bias = None if attention_mask is None else as_bias(attention_mask, query.dtype)
        if position_bias is not None:
            bias = position_bias if bias is None else position_bias + bias
        out, lse = attention(query, key, value, bias=bias, **options)
    if s_aux is not None:
        out = out * share_of_keys(lse, s_aux).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def uneven_groups(module: nn.Module, device: torch.device) -> HeadMap | None:
    """The head map of a layer whose heads were grouped unevenly, or None for even groups."""
    sizes = getattr(module, "kv_group_sizes", None)
    return None if sizes is None else _map_of(tuple(sizes), device)


@functools.cache
def _map_of(sizes: tuple[int, ...], device: torch.device) -> HeadMap:
    return HeadMap.from_group_sizes(sizes).to(device)


def share_of_keys(lse: Tensor, s_aux: Tensor) -> Tensor:
    """What sinks, one logit for each head, leave to the keys: ``(B, Hq, Nq, 1)``."""
    return torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None])[..., None]


def _can_decode(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> bool:
    """Whether this is a step of decoding: few tokens, the last of all, and nothing to learn."""
    queries, keys = query.shape[2], key.shape[2]
    few = queries <= FEW_TOKENS and queries <= keys and (causal or queries == 1)
    # Under autocast, what is cached may have another dtype than the query.
    alike = query.dtype == key.dtype == value.dtype
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return few and alike and not learning


def _decode(query: Tensor, key: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """Attend to a cache that is full up to its last row, or to pages where they lie."""
    if isinstance(key, InPages):
        batch = key.batch
        options |= {"cache_lengths": batch.lengths, "block_table": batch.block_table}
        key, value = batch.parts
    else:
        lengths = torch.full((key.shape[0],), key.shape[2], dtype=torch.int32, device=key.device)
        options |= {"cache_lengths": lengths}
    return attention_decode(query, key, value, **options)


def attention_forward_under_sdpa_masks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """:func:`attention_forward` where the masks were made for ``sdpa`` or ``eager``."""
    if attention_mask is None:
        key, value, kwargs = cut_to_filled(module, query, key, value, kwargs)
    return attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def cut_to_filled(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict
) -> tuple[Tensor, Tensor, dict]:
    """Keys, values and arguments in which a missing mask of ``sdpa`` means what it means here.

    It differs in one case. Several queries and more keys mean there that a static cache is being
    filled: the queries are the first tokens, and what lies behind them is empty.
    """
    queries, keys = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if causal and 1 < queries < keys:
        key, value = key[:, :, :queries], value[:, :, :queries]
        if kwargs.get("position_bias") is not None:
            kwargs = {**kwargs, "position_bias": kwargs["position_bias"][..., :queries]}
    return key, value, kwargs


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype = torch.float32,
    config: transformers.PreTrainedConfig | None = None,
    **kwargs,
) -> Tensor | None:
    """The mask that :func:`attention_forward` wants, or None where it needs none.

    Args:
        batch_size: Number of samples ``B``.
        q_length: Number of queries ``Nq``.
        kv_length: Number of keys ``Nk``, those included that a static cache has yet to fill.
        q_offset: Position of the first query; a tensor where a static cache counts it.
        kv_offset: Position of the first key.
        mask_function: Says for given positions whether a query sees a key.
        attention_mask: ``(B, positions)``, true for tokens that are not padding.
        local_size: Sliding window or chunk size, if ``mask_function`` has one.
        allow_is_causal_skip: Whether ``mask_function`` is causal, up to ``local_size``, and nothing
            else.
        allow_is_bidirectional_skip: Whether it lets everything be seen, up to ``local_size``.
        dtype: Of the mask.
        config: Of the model.
        **kwargs: Passed on to transformers' own mask function.

    Returns:
        An additive mask of 0 and -inf, ``(B, 1, Nq, Nk)``; samples or queries that share theirs
        share its memory. A padding token before every real one sees nothing, and its output is 0.
    """
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
    in_the_corner = (
        not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    )
    layers = _facts(type(config))
    local_size_is_no_limit = local_size is None or kv_length < local_size
    # It may also be the size of chunks.
    local_size_is_a_window = local_size == getattr(config, "sliding_window", None)
    if (
        allow_is_causal_skip
        and in_the_corner
        and layers.know_their_order
        and (local_size_is_no_limit or (local_size_is_a_window and layers.know_their_window))
        and _no_real_query_sees(padding, q_length)
    ):
        return None
    if allow_is_bidirectional_skip and local_size_is_no_limit and _is_all_true(padding):
        return None
    allowed = sdpa_mask(
        batch_size=batch_size,
        # One row serves all queries if only padding decides.
        q_length=1 if mask_function is bidirectional_mask_function else q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )
    # Views of full size, for some models join masks to others.
    return as_bias(allowed, dtype).expand(batch_size, -1, q_length, -1)


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask of the smallest shape that broadcasts to that of ``mask``.

    A boolean mask turns into 0 and -inf; a floating one is taken as it is.
    """
    for dim, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True)):
        if size > 1 and stride == 0:
            mask = mask.narrow(dim, 0, 1)
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


# What code says is a constant to a graph that is being traced.
@torch.compiler.assume_constant_result
def _facts(config_class: type) -> ModelFacts:
    return facts(config_class)


def _no_real_query_sees(padding: Tensor | None, q_length: int) -> bool:
    """Whether the causal order alone keeps padding out of the sight of every token that is none.

    So it does when all padding comes last; such padding then sees real tokens, as if it were one.
    """
    if padding is None:
        return True
    if is_tracing(padding):
        return False
    if q_length == padding.shape[1]:
        return bool((padding[:, 1:] <= padding[:, :-1]).all())
    return bool(padding.all())


def _is_all_true(padding: Tensor | None) -> bool:
    return padding is None or (not is_tracing(padding) and bool(padding.all()))


def reasons_to_refuse(mask: Tensor | None, dropout: float, kwargs: dict) -> list[str]:
    """What no attention here does, among arguments that no signature here names."""
    reasons = []
    if dropout:
        reasons.append(
            f"dropout is {dropout}, and attention weights are never formed that could be dropped: "
            "load the model with attention_dropout=0.0 (BERT: attention_probs_dropout_prob=0.0), "
            "or call model.eval()"
        )
    if kwargs.get("output_attentions"):
        reasons.append("output_attentions is set, and attention weights are never formed")
    if mask is not None:
        if not isinstance(mask, Tensor):
            reasons.append(f"attention_mask is a {type(mask).__name__}, not a tensor")
        elif mask.dim() != 4:
            reasons.append(
                f"attention_mask has shape {tuple(mask.shape)}; it must have four dimensions"
            )
        elif not (mask.is_floating_point() or mask.dtype == torch.bool):
            reasons.append(f"attention_mask has dtype {mask.dtype}; it must be boolean or floating")
    for name, argument in kwargs.items():
        if argument is not None and name not in SAYS_NOTHING_ABOUT_SCORES:
            reasons.append(f"{name} is given, and is not known here")
    return reasons


register()
