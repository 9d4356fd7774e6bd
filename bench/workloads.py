"""What is timed: one attention call as data, with its exact costs and its inputs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import efficient_attn as ea

Op = Literal["attention", "decode", "mla_decode", "hyper"]
Mode = Literal["forward", "forward_backward"]
Window = tuple[int | None, int | None]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HYPER_CONFIGS = {"paper": ea.HyperConfig.paper(), "default": ea.HyperConfig()}
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Inputs(NamedTuple):
    """The tensors of one call, ``(batch, heads, tokens, dim)``.

    For ``"mla_decode"`` the value is a view of the first columns of the one key head.
    """

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One attention call.

    Attributes:
        name: Unique; ``family-length`` by convention.
        suite: The suite it belongs to.
        device: The kind of device its size is meant for, ``"cpu"`` or ``"cuda"``.
        op: The function of the package that is called. For the two that attend to a cache, keys and
            values are the cache, and the queries are its newest tokens. ``"hyper"`` estimates what
            the providers of the other side compute exactly.
        hyper: Which of ``HYPER_CONFIGS``, for ``"hyper"``.
        top_values: How many values a query reads, for ``"decode"``; torch reads them all.
        q_to_k: Key head of each query head; ``None`` means even contiguous groups.
        q_to_v: The same for value heads.
        window: Keys visible on the left and right of the lower-right diagonal, as in the package.
        layout: How the inputs are stored. ``"tokens"`` is what a projection produces,
            ``(batch, tokens, heads, dim)`` seen through a transpose; ``"heads"`` is contiguous, as
            caches are.
        replayed: On CUDA, the call is captured in a graph and replayed, as engines do: the time of
            launching is left out.
        rank: Order of value on a device whose time is limited; 0 is a headline.
        quick: Whether it belongs to the run that takes less than a minute.
    """

    name: str
    suite: str
    device: Literal["cpu", "cuda"]
    op: Op = "attention"
    batch: int = 1
    q_heads: int
    k_heads: int
    v_heads: int
    q_to_k: tuple[int, ...] | None = None
    q_to_v: tuple[int, ...] | None = None
    num_queries: int
    num_keys: int
    d_qk: int
    d_v: int
    causal: bool = True
    window: Window | None = None
    dtype: str = "float32"
    mode: Mode = "forward"
    hyper: Literal["paper", "default"] | None = None
    top_values: int | None = None
    layout: Literal["tokens", "heads"] = "tokens"
    replayed: bool = False
    rank: int = 1
    quick: bool = False

    @property
    def family(self) -> str:
        """The name without its length: workloads of one family make one curve."""
        return self.name.rsplit("-", 1)[0]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def scale(self) -> float:
        return self.d_qk**-0.5

    @property
    def needs_gradients(self) -> bool:
        return self.mode == "forward_backward"

    @property
    def reads_a_cache(self) -> bool:
        return self.op in ("decode", "mla_decode")

    @property
    def is_latent(self) -> bool:
        return self.op == "mla_decode"

    @property
    def has_own_heads(self) -> bool:
        """Whether every query head has a key head and a value head to itself."""
        return self.q_heads == self.k_heads == self.v_heads and self.has_even_groups

    @property
    def has_even_groups(self) -> bool:
        return self.q_to_k is None and self.q_to_v is None

    def key_index(self) -> list[int]:
        """The key head of each query head, written out."""
        return _written_out(self.q_to_k, self.q_heads, self.k_heads)

    def value_index(self) -> list[int]:
        """The value head of each query head, written out."""
        return _written_out(self.q_to_v, self.q_heads, self.v_heads)

    def head_map(self, device: str) -> ea.HeadMap | None:
        """The map to pass to the package; ``None`` where even groups follow from the shapes."""
        if self.has_even_groups:
            return None
        return ea.HeadMap.from_index(
            torch.tensor(self.key_index()),
            torch.tensor(self.value_index()),
            num_k_heads=self.k_heads,
            num_v_heads=self.v_heads,
        ).to(device)

    def reach(self) -> tuple[int, int]:
        """Keys visible left and right of the diagonal; a side without limit gets a large number."""
        left, right = self.window or (None, None)
        left = self.num_queries + self.num_keys if left is None else left
        right = self.num_queries + self.num_keys if right is None else right
        return left, min(right, 0) if self.causal else right

    def visible_keys(self, rows: Tensor) -> Tensor:
        """Which keys the given query rows see, bool ``(rows, num_keys)``."""
        left, right = self.reach()
        diagonal = rows.unsqueeze(1) + (self.num_keys - self.num_queries)
        keys = torch.arange(self.num_keys, device=rows.device)
        return (keys >= diagonal - left) & (keys <= diagonal + right)

    def visible_scores(self) -> int:
        """Query-key pairs of one head that are not masked, counted exactly."""
        left, right = self.reach()
        diagonal = torch.arange(self.num_queries) + (self.num_keys - self.num_queries)
        first = (diagonal - left).clamp(min=0)
        last = (diagonal + right).clamp(max=self.num_keys - 1)
        return int((last - first + 1).clamp(min=0).sum())

    def flops(self) -> int:
        """Matrix-product operations of the visible scores.

        Two products forward; five backward, of which the scores are recomputed.
        """
        per_score = 2 * (self.d_qk + self.d_v)
        if self.needs_gradients:
            per_score += 2 * (3 * self.d_qk + 2 * self.d_v)
        return self.batch * self.q_heads * self.visible_scores() * per_score

    def minimal_bytes(self) -> int:
        """Bytes that must cross the memory bus when everything else stays on the chip.

        Forward reads Q, K, V and writes O; backward reads Q, K, V, O, dO and writes dQ, dK, dV.
        Where a cache is read, that alone counts.
        """
        if self.reads_a_cache:
            return self.cache_bytes()
        moved = self._input_elements() + self._output_elements()
        passes = 3 if self.needs_gradients else 1
        return passes * moved * self.torch_dtype.itemsize

    def cache_bytes(self) -> int:
        """Bytes of keys and values that some query head reads, each counted once."""
        keys = len(set(self.key_index())) * self.num_keys
        values = 0 if self.is_latent else len(set(self.value_index())) * self.num_keys
        if self.top_values is not None:
            values = min(values, self.q_heads * self.num_queries * self.top_values)
        row_bytes = (keys * self.d_qk + values * self.d_v) * self.torch_dtype.itemsize
        return self.batch * row_bytes

    def result_bytes(self) -> int:
        """Bytes of what a call returns: the output, and the gradients of the inputs."""
        gradients = self._input_elements() if self.needs_gradients else 0
        return (self._output_elements() + gradients) * self.torch_dtype.itemsize

    def expanded_key_bytes(self) -> int:
        """Bytes of K written out once per query head, the buffer that a head map avoids."""
        elements = self.batch * self.q_heads * self.num_keys * self.d_qk
        return elements * self.torch_dtype.itemsize

    def copied_bytes(self) -> int:
        """Bytes of K and V written out once per query head."""
        elements = self.batch * self.q_heads * self.num_keys * (self.d_qk + self.d_v)
        return elements * self.torch_dtype.itemsize

    def score_bytes(self) -> int:
        """Bytes of the score matrix of all heads, which a plain implementation writes."""
        elements = self.batch * self.q_heads * self.num_queries * self.num_keys
        return elements * max(self.torch_dtype.itemsize, 4)

    def _input_elements(self) -> int:
        query = self.q_heads * self.num_queries * self.d_qk
        key_value = self.num_keys * (self.k_heads * self.d_qk + self.v_heads * self.d_v)
        return self.batch * (query + key_value)

    def _output_elements(self) -> int:
        return self.batch * self.q_heads * self.num_queries * self.d_v

    def make_inputs(self, device: str, seed: int = 0) -> Inputs:
        """Standard normal inputs. Never zeros: hardware is faster on them."""
        generator = torch.Generator(device).manual_seed(seed)
        query = self._normal(self.q_heads, self.num_queries, self.d_qk, generator)
        key = self._normal(self.k_heads, self.num_keys, self.d_qk, generator)
        if self.is_latent:
            return Inputs(query, key, key[..., : self.d_v])
        value = self._normal(self.v_heads, self.num_keys, self.d_v, generator)
        return Inputs(*(x.requires_grad_(self.needs_gradients) for x in (query, key, value)))

    def make_grad_out(self, generator: torch.Generator) -> Tensor:
        """A gradient of the output, on the generator's device."""
        return self._normal(self.q_heads, self.num_queries, self.d_v, generator)

    def _normal(self, heads: int, tokens: int, dim: int, generator: torch.Generator) -> Tensor:
        stored = (heads, tokens, dim) if self.layout == "heads" else (tokens, heads, dim)
        x = torch.randn(
            self.batch,
            *stored,
            device=generator.device,
            dtype=self.torch_dtype,
            generator=generator,
        )
        return x if self.layout == "heads" else x.transpose(1, 2)

    def as_record(self) -> dict:
        """The workload as plain data, with the costs that its numbers are computed from."""
        costs = {"flops": self.flops(), "minimal_bytes": self.minimal_bytes()}
        return {**asdict(self), "family": self.family, **costs}


def length_label(tokens: int) -> str:
    """``4096`` as ``4k``, ``300`` as ``300``."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _written_out(index: tuple[int, ...] | None, q_heads: int, heads: int) -> list[int]:
    return list(index) if index is not None else [h * heads // q_heads for h in range(q_heads)]


def gigaflops(workload: Workload) -> str:
    """The work of one call for a table, three significant digits."""
    value = workload.flops() / 1e9
    digits = max(0, 2 - math.floor(math.log10(value))) if value else 0
    return f"{value:.{digits}f}"
