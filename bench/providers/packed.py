"""torch for a few queries: the query heads that share a key head become rows of one head.

Then keys are read once for all of them and nothing is copied. Any contiguous groups can be packed,
also where keys and values have different numbers of heads; uneven ones after padding the smaller
groups, or one call per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from bench.providers.protocol import Call, Side, equally_wide, too_many_scores
from bench.providers.sdpa import BACKENDS, query_heads_by_pair
from bench.workloads import Inputs, Workload


@dataclass(frozen=True)
class Packed:
    """Packed heads, given to one of torch's kernels.

    Attributes:
        kernel: A backend of ``scaled_dot_product_attention``, or ``"bmm"``: product, softmax,
            product; or ``"bmm-keys"``: the same, but the scores are keys times queries, which torch
            multiplies faster where queries are few, and are transposed.
        apart: One call for each pair of key and value head that is read.
        pad: Whether the narrower of keys and values is padded with zeros to the wider.
    """

    kernel: str
    apart: bool = False
    pad: bool = False
    side: Side = "torch"

    @property
    def name(self) -> str:
        family = self.kernel if self._is_product else f"sdpa-{self.kernel}"
        return f"{family}-packed{'-apart' if self.apart else ''}{'-pad' if self.pad else ''}"

    @property
    def _is_product(self) -> bool:
        return self.kernel.startswith("bmm")

    def available(self, device: str) -> list[str]:
        if device == "cpu" and self.kernel in ("cudnn", "efficient"):
            return [f"{self.kernel} needs CUDA"]
        return []

    def supports(self, workload: Workload) -> list[str]:
        reasons = too_many_scores(workload) if self._is_product else []
        if not workload.reads_a_cache:
            reasons.append("it is for a few queries")
        if workload.has_own_heads and not self._is_product:
            reasons.append("no heads are shared")
        if self.apart and workload.has_even_groups:
            reasons.append("even groups need no splitting")
        if self.pad and workload.d_qk == workload.d_v:
            reasons.append("keys and values are equally wide")
        few, many = sorted((workload.k_heads, workload.v_heads))
        if not self.apart and workload.has_even_groups and many % few:
            reasons.append("key and value heads do not nest")
        if not self.apart and workload.q_to_k != workload.q_to_v:
            reasons.append("keys and values are grouped differently")
        return reasons

    def build(self, workload: Workload, inputs: Inputs) -> Call:
        if self.apart:
            return self._one_by_one(workload, inputs)
        return (self._even if workload.has_even_groups else self._padded)(workload, inputs)

    def _even(self, workload: Workload, inputs: Inputs) -> Call:
        few, many = sorted((workload.k_heads, workload.v_heads))
        sizes = (workload.batch * few, many // few)
        group = workload.q_heads // many
        mask = _mask(workload, group, inputs.query.device)

        def folded(x: Tensor) -> Tensor:
            # What there are fewer of is seen several times: a view, since few heads join the batch.
            x = x.reshape(sizes[0], -1, *x.shape[2:])
            return x.expand(*sizes, *x.shape[2:])

        def call() -> Tensor:
            query = inputs.query.reshape(*sizes, -1, workload.d_qk)
            out = self._attend(workload, query, folded(inputs.key), folded(inputs.value), mask)
            return out.reshape(workload.batch, workload.q_heads, -1, workload.d_v)

        return call

    def _padded(self, workload: Workload, inputs: Inputs) -> Call:
        """Every group is filled up to the largest with copies of head 0, whose rows are dropped."""
        device = inputs.query.device
        heads_of: list[list[int]] = [[] for _ in range(workload.k_heads)]
        places = []
        for head, read in enumerate(workload.key_index()):
            places.append((read, len(heads_of[read])))
            heads_of[read].append(head)
        group = max(map(len, heads_of))
        filled = [heads + [0] * (group - len(heads)) for heads in heads_of]
        slots = torch.tensor(filled, device=device).flatten()
        place = torch.tensor([read * group + slot for read, slot in places], device=device)
        mask = _mask(workload, group, device)

        def call() -> Tensor:
            query = inputs.query[:, slots].reshape(
                workload.batch, workload.k_heads, -1, workload.d_qk
            )
            out = self._attend(workload, query, inputs.key, inputs.value, mask)
            return out.reshape(workload.batch, len(slots), -1, workload.d_v)[:, place]

        return call

    def _one_by_one(self, workload: Workload, inputs: Inputs) -> Call:
        device = inputs.query.device
        groups = query_heads_by_pair(workload, device)
        sizes = [inputs.query[:, heads].shape[1] for heads, *_ in groups.members]
        masks = [_mask(workload, size, device) for size in sizes]

        def call() -> Tensor:
            outs = []
            for (heads, k, v), mask in zip(groups.members, masks, strict=True):
                query = inputs.query[:, heads].reshape(workload.batch, 1, -1, workload.d_qk)
                key, value = inputs.key[:, k : k + 1], inputs.value[:, v : v + 1]
                out = self._attend(workload, query, key, value, mask)
                outs.append(out.reshape(workload.batch, -1, workload.num_queries, workload.d_v))
            return torch.cat(outs, 1)[:, groups.order]

        return call

    def _attend(
        self, workload: Workload, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        if self.pad:
            query, key, value = equally_wide(workload, query, key, value)
        if self._is_product:
            query = query * workload.scale
            if self.kernel == "bmm":
                scores = _product(query, key.mT)
            else:
                scores = _product(key, query.mT).mT.contiguous()
            if mask is not None:
                scores = scores.masked_fill_(~mask, -torch.inf)
            out = _product(scores.softmax(-1), value)
        else:
            with sdpa_kernel(BACKENDS[self.kernel]):
                out = F.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, scale=workload.scale
                )
        return out[..., : workload.d_v]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``; one matrix that is seen several times is multiplied once, not copied."""
    if left.shape[:2] == right.shape[:2] == (1, 1):
        # torch has faster code for matrices than for a batch of one.
        return (left[0, 0] @ right[0, 0])[None, None]
    if right.shape[1] > 1 and right.stride(1) == 0:
        return (left.flatten(1, 2) @ right[:, 0]).unflatten(1, left.shape[1:3])
    if left.shape[1] > 1 and left.stride(1) == 0:
        columns = right.transpose(1, 2).flatten(2, 3)
        return (left[:, 0] @ columns).unflatten(2, right.shape[1::2]).transpose(1, 2)
    return left @ right


def _mask(workload: Workload, group: int, device: torch.device) -> Tensor | None:
    """What each packed row sees, ``(group * queries, keys)``; ``None`` if everything."""
    visible = workload.visible_keys(torch.arange(workload.num_queries, device=device))
    return None if visible.all() else visible.repeat(group, 1)


def every_packed() -> list[Packed]:
    """Every kernel but math, which is a product; together and apart, with and without padding."""
    return [
        Packed(kernel, apart, pad)
        for kernel in ("flash", "cudnn", "efficient", "bmm", "bmm-keys")
        for apart in (False, True)
        for pad in (False, True)
        # A product takes any width.
        if not (pad and kernel.startswith("bmm"))
    ]
