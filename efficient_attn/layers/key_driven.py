"""Attention in which the norms of the key heads decide how many query heads each serves."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from efficient_attn.errors import UnsupportedError
from efficient_attn.functional import (
    difference_scores,
    ema_scores,
    key_norms,
    khan2024_scores,
)
from efficient_attn.functional.grouping import (
    Flavor,
    Normalization,
    Rounding,
    check_choice,
    is_recomputed,
)
from efficient_attn.head_map import HeadMap
from efficient_attn.layers.norm_memory import Compat, KeyDrivenAttention

Scope = Literal["sample", "batch", "prompt", "frozen"]


class KDGQA(KeyDrivenAttention):
    """Key-driven grouped-query attention: the larger a key head's norm, the more queries it serves.

    In every call the query heads are cut anew into contiguous groups, in proportion to the norms of
    the key heads of that call, on the device. In training it also remembers the norms, from which
    :meth:`freeze` makes a map that stays.

    Source: Khan et al., Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention,
    arXiv 2408.08454. ``compat="khan2024"`` is the authors' code, with even groups where it hangs.

    Args:
        embed_dim: Width ``E`` of the tokens.
        num_heads: Number of query heads ``Hq``.
        num_kv_heads: Number ``G`` of key and value heads.
        scope: Whose norms decide. ``"sample"``: each sample has a map of its own, so that its
            output does not depend on its neighbours. ``"batch"``: one map for the batch, as
            published. ``"prompt"``: each sequence keeps the map of its prompt, see
            :meth:`prompt_map`. ``"frozen"``: the layer's own map, even until :meth:`freeze`.
            By default ``"sample"``, with ``compat`` ``"batch"``.
        normalization, rounding, min_queries: Of :func:`~efficient_attn.allocate_heads`. With
            ``"minmax"``, the default, the head of the smallest norm serves ``min_queries`` only.
        beta: Weight of the past in what is remembered.
        compat: ``"khan2024"`` for the published arithmetic.
        process_group: Ranks whose batches count as one, for example
            ``torch.distributed.group.WORLD``; by default every rank is on its own.
        options: Of :class:`GroupedQueryAttention`, such as ``causal`` and ``rotary``.

    Shape:
        - x: ``(B, N, E)``
        - context: ``(B, M, E)``
        - output: ``(B, N, E)``

    Raises:
        UnsupportedError: ``causal`` with a live map, which is a function of all keys.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int,
        scope: Scope | None = None,
        normalization: Normalization = "minmax",
        rounding: Rounding | None = None,
        min_queries: int = 0,
        beta: float = 0.9,
        compat: Compat | None = None,
        process_group: ProcessGroup | None = None,
        **options: object,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            normalization=normalization,
            rounding=rounding,
            min_queries=min_queries,
            beta=beta,
            compat=compat,
            process_group=process_group,
            **options,
        )
        if scope is None:
            scope = "sample" if compat is None else "batch"
        check_choice("scope", scope, ("sample", "batch", "prompt", "frozen"))
        if scope in ("sample", "batch") and self._hides_later_keys:
            raise UnsupportedError(
                f"KDGQA with scope={scope!r}",
                ["the layer is causal, and a live map is a function of all keys, later ones too"],
                "Use scope='prompt' with prompt_map(), or scope='frozen' and freeze().",
            )
        if scope == "prompt" and not self.causal:
            raise ValueError("scope='prompt' is for causal layers; without, use scope='sample'.")
        self.scope = scope

    def choose_head_map(
        self, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None
    ) -> HeadMap:
        """The map of this call, by the norms of its keys or the layer's own, as ``scope`` says."""
        is_live = not self._frozen and self.scope in ("sample", "batch")
        if not self._frozen and self.scope == "prompt":
            raise ValueError(
                "scope='prompt' has no map of its own: call head_map = layer.prompt_map(prompt) "
                "once, and pass head_map= with the prompt and with every later token."
            )
        if not is_live and not self._learns:
            return self.head_map
        norms = key_norms(key, key_lengths=key_lengths)
        over_batch = self._over_batch(norms) if self._learns or self.scope == "batch" else None
        if self._learns:
            self._remember(over_batch)
        if not is_live:
            return self.head_map
        return self._as_map(self._allocate(norms if self.scope == "sample" else over_batch))

    @property
    def group_sizes(self) -> Tensor:
        """Query heads of each key head; while the map is live, those that freeze() would fix."""
        if self._frozen or self.scope not in ("sample", "batch"):
            return super().group_sizes
        return self._as_map(self._allocate(self.norm_memory)).inverse_k().starts.diff()

    @torch.no_grad()
    def prompt_map(self, prompt: Tensor, *, key_lengths: Tensor | None = None) -> HeadMap:
        """The map that each sequence gets by its prompt, one row for each.

        Args:
            prompt: ``(B, N, E)``, what the layer is given of the prompt. A norm does not depend on
                the order of tokens: where padding comes first, pass ``prompt.flip(1)``.
            key_lengths: How many leading tokens of each prompt count; by default all.
        """
        _, key, _ = self.project(prompt, prompt)
        return self._as_map(self._allocate(key_norms(key, key_lengths=key_lengths)))

    def freeze(self) -> None:
        """Make a map of the norms remembered from training, and keep it for good.

        To take it from chosen data, run that through the layer in training mode before.

        Raises:
            ValueError: Nothing was ever remembered.
        """
        if not self._frozen:
            if not self.num_updates:
                raise ValueError(
                    "there are no norms to freeze: run some batches through the layer in training "
                    "mode first, under torch.no_grad() if nothing is to be learnt."
                )
            self._set_map(self._allocate(self.norm_memory))
        super().freeze()

    def extra_repr(self) -> str:
        """That of the layer with an explicit map, and how the map comes about."""
        return f"{super().extra_repr()}, scope={self.scope!r}"

    def _remember(self, norms: Tensor) -> None:
        _, memory = ema_scores(norms, self.norm_memory, self.num_updates, beta=self.beta)
        usable = norms.isfinite().all() & ~is_recomputed(norms)
        self.norm_memory.copy_(memory.where(usable, self.norm_memory))
        self.num_updates.add_(usable)


class DGQA(KeyDrivenAttention):
    """Dynamic grouped-query attention: the map follows the key norms as they evolve in training.

    Every ``update_every`` training steps the norms of the batch are taken, and the query heads are
    cut anew; in between, in evaluation and when frozen, the map stays. A step is a call in training
    mode: where gradients of ``k`` calls accumulate, a window of ``n`` steps of the optimizer is
    ``update_every=n * k``. A causal layer cuts by the norms of the update before, so that no output
    depends on later keys.

    Source: Khan et al., arXiv 2408.08454. ``compat="khan2024"`` has the arithmetic of the authors'
    code, where the window also divides the memory; but steps are counted through all epochs,
    evaluation changes nothing, and what is left over is given by rule instead of at random.

    Args:
        embed_dim: Width ``E`` of the tokens.
        num_heads: Number of query heads ``Hq``.
        num_kv_heads: Number ``G`` of key and value heads.
        flavor: ``"ema"``: shares by a moving average of the norms. ``"difference"``: by how much
            each has changed since the last time.
        update_every: Training steps from one map to the next, the window of the paper.
        beta: Weight of the past in the average.
        rounding, min_queries: Of :func:`~efficient_attn.allocate_heads`.
        compat: ``"khan2024"`` for the published arithmetic.
        process_group: Ranks whose batches count as one, for example
            ``torch.distributed.group.WORLD``; by default every rank is on its own.
        options: Of :class:`GroupedQueryAttention`, such as ``causal`` and ``rotary``.

    Shape:
        - x: ``(B, N, E)``
        - context: ``(B, M, E)``
        - output: ``(B, N, E)``

    Attributes:
        num_steps: How many training steps there were.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int,
        flavor: Flavor = "ema",
        update_every: int = 300,
        beta: float = 0.9,
        rounding: Rounding | None = None,
        min_queries: int = 0,
        compat: Compat | None = None,
        process_group: ProcessGroup | None = None,
        **options: object,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            normalization="sum",
            rounding=rounding,
            min_queries=min_queries,
            beta=beta,
            compat=compat,
            process_group=process_group,
            **options,
        )
        check_choice("flavor", flavor, ("ema", "difference"))
        if update_every < 1:
            raise ValueError(f"update_every is {update_every}; it must be at least 1.")
        self.flavor = flavor
        self.update_every = update_every
        self._add_state("num_steps", (), torch.int64)
        self._add_state("scores", (num_kv_heads,), torch.float32)

    def choose_head_map(
        self, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None
    ) -> HeadMap:
        """The layer's own map, in training after an update if one is due."""
        if self._learns:
            self._update(self._over_batch(key_norms(key, key_lengths=key_lengths)))
        return self.head_map

    def _update(self, norms: Tensor) -> None:
        is_new = ~is_recomputed(norms)
        due = (self.num_steps % self.update_every == 0) & norms.isfinite().all() & is_new
        scores, memory = self._score(norms)
        index = self._allocate(self.scores if self._hides_later_keys else scores)
        self._set_map(index.where(due, self.q_to_k))
        self.scores.copy_(scores.where(due, self.scores))
        self.norm_memory.copy_(memory.where(due, self.norm_memory))
        self.num_updates.add_(due)
        self.num_steps.add_(is_new)

    def _score(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        if self.compat:
            options = {"flavor": self.flavor, "window": self.update_every}
            return khan2024_scores(norms, self.norm_memory, **options)
        if self.flavor == "ema":
            return ema_scores(norms, self.norm_memory, self.num_updates, beta=self.beta)
        return difference_scores(norms, self.norm_memory)

    def extra_repr(self) -> str:
        """That of the layer with an explicit map, and how the map comes about."""
        own = f"flavor={self.flavor!r}, update_every={self.update_every}"
        return f"{super().extra_repr()}, {own}"


def freeze_groups(model: nn.Module) -> dict[str, Tensor]:
    """Freeze the map of every key-driven layer of a model; its name, and its group sizes.

    Meant for the last tenth or fifth of a training, so that what is used is what was trained.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, KeyDrivenAttention)}
    for layer in layers.values():
        layer.freeze()
    return {name: layer.group_sizes for name, layer in layers.items()}
