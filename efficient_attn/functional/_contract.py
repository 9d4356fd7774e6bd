"""The contract of the attention calls, checked once; everything below assumes it."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.head_map import HeadMap, is_readable

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: tuple[str, ...],
    names: tuple[str, str, str] = ("query", "key", "value"),
) -> None:
    """Ranks, kinds and sizes that every attention call agrees on.

    Args:
        query: The query tensor.
        key: The key tensor.
        value: The value tensor.
        layout: Names of the dimensions, for example ``("batch", "heads", "tokens", "dim")``.
        names: What the caller calls the three.
    """
    named = tuple(zip(names, (query, key, value), strict=True))
    for name, x in named:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; pass a torch.Tensor.")
        if x.dim() != len(layout):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must have {len(layout)} dimensions, "
                f"({', '.join(layout)})."
            )
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name} has dtype {x.dtype}; attention takes float16, bfloat16, float32 or "
                "float64."
            )
        if x.device != query.device:
            raise ValueError(
                f"{name} is on {x.device} and query on {query.device}; move all three to one "
                "device."
            )
    mixed = {x.dtype for _, x in named}
    if len(mixed) > 1 and not torch.is_autocast_enabled(query.device.type):
        raise TypeError(
            f"query, key and value have dtypes {', '.join(str(x.dtype) for _, x in named)}; cast "
            "them to one, or run under torch.autocast."
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query has head dim {query.shape[-1]} and {names[1]} {key.shape[-1]}; they are "
            f"multiplied and must be equal ({names[2]} may differ)."
        )
    for name, x in (named[0], named[2]):
        if x.shape[-1] == 0:
            raise ValueError(f"{name} has head dim 0; it must be at least 1.")
    tokens = layout.index("tokens")
    if key.shape[tokens] != value.shape[tokens]:
        raise ValueError(
            f"{names[1]} has {key.shape[tokens]} tokens and {names[2]} {value.shape[tokens]}; "
            "every key needs one value."
        )
    if "batch" in layout:
        for name, x in named[1:]:
            if x.shape[0] != query.shape[0]:
                raise ValueError(
                    f"{name} has batch size {x.shape[0]} and query {query.shape[0]}; they must be "
                    f"equal. {name}.expand({query.shape[0]}, ...) costs no memory."
                )


def resolve_map(
    head_map: HeadMap | None, query: Tensor, key: Tensor, value: Tensor, heads: int, rows: int
) -> tuple[Tensor | None, Tensor | None]:
    """The two head indices of a call, after checking them against the tensors.

    Args:
        head_map: The map, or None for even groups.
        query: The query tensor.
        key: The key tensor.
        value: The value tensor.
        heads: Which dimension counts heads.
        rows: How many samples or sequences a map with one row for each must have.
    """
    counts = tuple(x.shape[heads] for x in (query, key, value))
    if head_map is None:
        for name, count in (("key", counts[1]), ("value", counts[2])):
            if count == 0 or counts[0] % count:
                raise ValueError(
                    f"{name} has {count} heads and query has {counts[0]}, which is not a whole "
                    f"number of query heads per {name} head. Pass "
                    "head_map=HeadMap.from_group_sizes([...]) for uneven groups."
                )
        return None, None
    if not isinstance(head_map, HeadMap):
        raise TypeError(f"head_map is a {type(head_map).__name__}; pass an efficient_attn.HeadMap.")
    expected = (head_map.num_q_heads, head_map.num_k_heads, head_map.num_v_heads)
    if counts != expected:
        raise ValueError(
            f"head_map is for {expected[0]} query, {expected[1]} key and {expected[2]} value "
            f"heads, but query, key and value have {counts[0]}, {counts[1]} and {counts[2]}."
        )
    for name, index in (("q_to_k", head_map.q_to_k), ("q_to_v", head_map.q_to_v)):
        if index is None:
            continue
        if index.device != query.device:
            raise ValueError(
                f"head_map.{name} is on {index.device} and query on {query.device}; use "
                f"head_map.to({str(query.device)!r}) once, outside the loop."
            )
        if index.dim() == 2 and index.shape[0] != rows:
            raise ValueError(
                f"head_map.{name} has {index.shape[0]} rows, but there are {rows} samples; pass "
                "one row per sample, or one index for all."
            )
    return head_map.q_to_k, head_map.q_to_v


def resolve_scale(scale: float | None, query: Tensor) -> float:
    """The softmax scale, by default ``D ** -0.5``."""
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def check_softcap(softcap: float) -> float:
    """A softcap is positive, or 0 for none."""
    if softcap < 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or 0.0 for none.")
    return float(softcap)


def check_bias(bias: Tensor | None, query: Tensor, key: Tensor) -> None:
    """A bias adds to the scores and must broadcast to them."""
    if bias is None:
        return
    if not bias.is_floating_point():
        raise TypeError(
            f"bias has dtype {bias.dtype}; it is added to the scores and must be floating. Turn a "
            "boolean mask (True: attend) into "
            "torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)."
        )
    if bias.device != query.device:
        raise ValueError(f"bias is on {bias.device} and query on {query.device}; move it there.")
    scores = (*query.shape[:3], key.shape[2])
    fits = bias.dim() <= 4 and all(
        have in (1, want) for have, want in zip(bias.shape[::-1], scores[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, which does not broadcast to the scores, "
            f"(batch, query heads, queries, keys) = {scores}."
        )


def check_key_lengths(key_lengths: Tensor | None, key: Tensor, name: str = "key_lengths") -> None:
    """One length per sample, no longer than the keys."""
    if key_lengths is None:
        return
    check_integers(name, key_lengths, key)
    batch, _, tokens, _ = key.shape
    if key_lengths.shape != (batch,):
        raise ValueError(
            f"{name} has shape {tuple(key_lengths.shape)}; it must be ({batch},), one length "
            "per sample."
        )
    if is_readable(key_lengths) and bool(((key_lengths < 0) | (key_lengths > tokens)).any()):
        raise ValueError(
            f"{name} is {key_lengths.tolist()}; every length must lie in [0, {tokens}], the "
            "number of tokens."
        )


def check_packing(name: str, cu_seqlens: Tensor, packed: Tensor) -> None:
    """Cumulative lengths start at 0, do not descend, and end within the packed tokens."""
    check_integers(name, cu_seqlens, packed)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{name} has shape {tuple(cu_seqlens.shape)}; it must be (sequences + 1,), the "
            "cumulative lengths from 0."
        )
    if not is_readable(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends != sorted(ends) or ends[-1] != packed.shape[0]:
        raise ValueError(
            f"{name} is {ends}; it must ascend from 0 to {packed.shape[0]}, the number of packed "
            "tokens."
        )


def check_longest(name: str, longest: int, cu_seqlens: Tensor) -> None:
    """No sequence may be longer than said: on a GPU its end would not be computed."""
    if not is_readable(cu_seqlens) or cu_seqlens.shape[0] < 2:
        return
    actual = int(cu_seqlens.diff().max())
    if longest < actual:
        raise ValueError(
            f"{name} is {longest}, but there is a sequence of {actual} tokens; pass the longest "
            "length or more."
        )


def check_integers(name: str, x: Tensor, beside: Tensor) -> None:
    """Lengths and tables are integers on the device of what they describe."""
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {x.dtype}; pass int32 or int64.")
    if x.device != beside.device:
        raise ValueError(
            f"{name} is on {x.device} and the tensors on {beside.device}; move it there."
        )
