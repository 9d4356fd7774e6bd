"""The part of the demo that decodes behind a long prompt."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel

STEPS = 16
RUNS = 3


@dataclass
class Decoding:
    """How fast one token after the other came, with one attention and one cache.

    Attributes:
        attention: Name of the implementation.
        cache: What kept keys and values.
        cache_bytes: What it held for them.
        seconds: Time of each run of ``STEPS`` tokens.
        tokens: What was generated.
    """

    attention: str
    cache: Cache
    cache_bytes: int
    seconds: list[float] = field(default_factory=list)
    tokens: tuple[int, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Median over the runs."""
        return STEPS / statistics.median(self.seconds)

    def run(self, model: PreTrainedModel, token: torch.Tensor) -> None:
        """Generate once with the attention that the model has now; the cache forgets it again."""
        tokens = []
        start = time.perf_counter()
        for _ in range(STEPS):
            token = model(token, past_key_values=self.cache).logits.argmax(-1)
            tokens.append(int(token))
        self.seconds.append(time.perf_counter() - start)
        self.tokens = tuple(tokens)
        self.cache.crop(-STEPS)


def decode(model: PreTrainedModel, prompt: torch.Tensor, console: Console) -> list[Decoding]:
    """Generate behind a long prompt on torch's attention and on ours, by turns.

    The prompt is computed once, so that all start from the same keys and values. torch's attention
    is timed on our cache too, which tells the gain of the attention from that of the cache.
    """
    import torch
    from transformers.cache_utils import DynamicCache

    from efficient_attn.integrations.past_key_values import StaticPastKeyValues
    from efficient_attn.integrations.patching import patch_model

    static, dynamic = StaticPastKeyValues(prompt.shape[1] + STEPS), DynamicCache()
    with torch.no_grad():
        with patch_model(model):
            logits = model(prompt, past_key_values=static, logits_to_keep=1).logits
        for i, layer in enumerate(static.layers):
            dynamic.update(layer.keys.clone(), layer.values.clone(), i)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in dynamic.layers)
        grown = Decoding("sdpa", dynamic, held)
        kept = Decoding("sdpa", static, static.nbytes)
        ours = Decoding("efficient_attn", static, static.nbytes)
        first = logits.argmax(-1)
        for _ in track(range(RUNS), "decoding by turns", console=console):
            grown.run(model, first)
            kept.run(model, first)
            with patch_model(model):
                ours.run(model, first)
    return [grown, kept, ours]


def table(decodings: list[Decoding]) -> Table:
    """For the terminal."""
    rows = Table("attention", "cache", "cache size", "tokens per second")
    for run in decodings:
        size = f"{run.cache_bytes / 2**20:.2f} MiB"
        rows.add_row(run.attention, type(run.cache).__name__, size, f"{run.tokens_per_second:.1f}")
    return rows


def markdown(decodings: list[Decoding], length: int) -> str:
    """For the report."""
    rows = "\n".join(
        f"| {run.attention} | {type(run.cache).__name__} | {run.cache_bytes} | "
        f"{run.tokens_per_second:.1f} |"
        for run in decodings
    )
    return f"""## Decoding behind {length} cached tokens

| attention | cache | bytes held | tokens per second |
|---|---|---|---|
{rows}

Medians of {RUNS} runs of {STEPS} tokens, taken by turns from the same keys and values.
"""
