"""The part of the demo that converts the model: to latent attention, and to DiffQKV."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PreTrainedModel

RATIOS = (0.5, 0.25, 0.125)
CALIBRATION_TOKENS = 16384
PROMPT, NEW_TOKENS = 16, 48
FEWER_KEYS = "one key head for all"
HEADS = ("cache", "class in transformers", "bytes/token", "test perplexity")


@dataclass(frozen=True)
class Converted:
    """The model, or what became of it.

    Attributes:
        name: Its cache beside that of the model.
        model_class: What transformers makes of its folder.
        bytes_per_token: What its cache holds of a token.
        loss: On text that nothing was chosen on, in nats per token.
        same_tokens: How many greedy tokens are those of the model, before the first that differs.
    """

    name: str
    model_class: str
    bytes_per_token: int
    loss: float
    same_tokens: int

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(self.loss)


def convert_and_compare(
    folder: Path,
    model: PreTrainedModel,
    loss: float,
    text: torch.Tensor,
    calibration: torch.Tensor,
    console: Console,
) -> list[Converted]:
    """Convert a model without loss and to smaller caches, and measure what was written.

    Args:
        folder: Its checkpoint.
        model: The same, loaded.
        loss: Its loss on ``text``.
        text: Rows of tokens to measure on.
        calibration: Rows of tokens that the smaller caches are fitted to.
        console: Shows the progress.
    """
    from efficient_attn.convert import convert
    from efficient_attn.integrations.verification import likeliest, load

    prompt = text[:1, :PROMPT]
    tokens, held = likeliest(model, prompt, NEW_TOKENS)
    found = [Converted("as trained", type(model).__name__, held, loss, NEW_TOKENS)]
    lossless = ("lossless", "mla", {"mode": "rorope", "target": "hf-deepseek"})
    smaller = (
        (f"1/{round(1 / ratio)} of the cache", "mla",
         {"mode": "compress", "kv_ratio": ratio, "calib": calibration})
        for ratio in RATIOS
    )  # fmt: skip
    fewer_keys = (FEWER_KEYS, "diffqkv", {"key_heads": 1, "calib": calibration})
    steps = track([lossless, *smaller, fewer_keys], "converting", console=console)
    with tempfile.TemporaryDirectory() as scratch:
        for name, method, options in steps:
            convert(folder, Path(scratch) / "converted", method, force=True, **options)
            converted = load(Path(scratch) / "converted", dtype=model.dtype)
            written, held = likeliest(converted, prompt, NEW_TOKENS)
            same = int((written == tokens).long().cumprod(0).sum())
            kind = type(converted).__name__
            found.append(Converted(name, kind, held, mean_loss(converted, text.split(4)), same))
    return found


def mean_loss(model: PreTrainedModel, batches: Iterable[torch.Tensor]) -> float:
    """In nats per token, over rows that are equally long."""
    import torch

    total = rows = 0
    with torch.no_grad():
        for batch in batches:
            total += float(model(batch, labels=batch).loss) * len(batch)
            rows += len(batch)
    return total / rows


def _rows(found: Sequence[Converted]) -> list[tuple[str, ...]]:
    return [(x.name, x.model_class, f"{x.bytes_per_token:,}", f"{x.perplexity:.2f}") for x in found]


def table(found: Sequence[Converted]) -> Table:
    """For the terminal."""
    shown = Table(*HEADS)
    for row in _rows(found):
        shown.add_row(*row)
    return shown


@dataclass(frozen=True)
class Trained:
    """What training gave back to a conversion to a smaller cache, when it was last measured.

    Attributes:
        bytes_per_token: What its cache holds of a token.
        perplexity: After the training.
        minutes: How long it took.
    """

    bytes_per_token: int
    perplexity: float
    minutes: float


def trained_before(records: Path) -> list[Trained]:
    """The conversions in a file of results, by what they cache; none if there is no such file."""
    if not records.exists():
        return []
    lines = map(json.loads, records.read_text(encoding="utf-8").splitlines())
    found = [
        Trained(r["bytes_per_token"], r["perplexity_after"], r["minutes"])
        for r in lines
        if r["kind"] == "recovery" and r["kv_ratio"] < 1
    ]
    return sorted(found, key=lambda x: x.bytes_per_token)


def markdown(found: Sequence[Converted], trained: Sequence[Trained], figure: str) -> str:
    """For the report."""
    lines = [HEADS, ("---",) * len(HEADS), *_rows(found)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""
## Conversion to latent attention and to DiffQKV

The lossless form is a checkpoint of the stock DeepSeek-V3 class; smaller caches are fitted to
{CALIBRATION_TOKENS} tokens of other text, and nothing is trained. DiffQKV merges the key heads and
leaves the values.

{rows}
{_told(trained)}
![perplexity against cache bytes]({figure})
"""


def _told(trained: Sequence[Trained]) -> str:
    if not trained:
        return ""
    points = ", ".join(f"{x.perplexity:.2f} at {x.bytes_per_token:,}" for x in reversed(trained))
    longest = max(x.minutes for x in trained)
    return f"""
Trained towards the model as it was, for at most {longest:.0f} minutes each, perplexity is {points}
bytes per token. That is not done here, but recorded by `python -m bench recovery`.
"""


def draw(found: Sequence[Converted], trained: Sequence[Trained], path: Path) -> None:
    """Perplexity against cache bytes, and where recorded what training made of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    source, lossless, *smaller, diff = found
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.axhline(source.perplexity, color="gray", linewidth=0.8, label="as trained")
    points = sorted([lossless, *smaller], key=lambda x: x.bytes_per_token)
    axes.plot(
        [x.bytes_per_token for x in points],
        [x.perplexity for x in points],
        "o-",
        label="converted to latent attention",
    )
    axes.plot(diff.bytes_per_token, diff.perplexity, "D", label="DiffQKV, one key head")
    if trained:
        axes.plot(
            [x.bytes_per_token for x in trained],
            [x.perplexity for x in trained],
            "s--",
            label="and trained for minutes (recorded)",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([x.bytes_per_token for x in points], [x.bytes_per_token for x in points])
    axes.set(xlabel="cached bytes per token", ylabel="test perplexity")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
