"""Train a small vision transformer on digit images with each way to group heads, and compare.

The images are the 1,797 digits of 8 x 8 pixels that come with scikit-learn; half of them are held
back. All models have the same query heads; key and value heads are 1 to 8. Runs are written one by
one, and those already written are not repeated::

    python examples/train_vit_digits.py run --seeds 5 --out runs.jsonl
    python examples/train_vit_digits.py report runs.jsonl --plot runs.png

``uptrain.py digits`` converts a trained model instead; ``report`` takes its runs as well.
"""

import json
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from efficient_attn.layers import DGQA, KDGQA, PGQA, GroupedQueryAttention

WIDTH, LAYERS, HEADS, PATCH = 64, 2, 8, 2
EPOCHS, BATCH, PEAK_RATE, UPDATE_EVERY = 12, 32, 4e-3, 20

# How a layer is made from its widths, its query heads and its key heads.
WAYS = {
    "even groups": GroupedQueryAttention,
    "KDGQA, per sample": KDGQA,
    "KDGQA, published": partial(KDGQA, compat="khan2024"),
    "DGQA, average": partial(DGQA, update_every=UPDATE_EVERY),
    "DGQA, difference": partial(DGQA, flavor="difference", update_every=UPDATE_EVERY),
    "PGQA": PGQA,
}
KEY_HEADS = (1, 2, 4, 8)
# With as many key heads as query heads, or only one, there is nothing to group.
RUNS = [(way, n) for n in KEY_HEADS for way in (WAYS if 1 < n < HEADS else ["even groups"])]

app = typer.Typer(add_completion=False, help=__doc__.split("\n")[0])


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        hidden = nn.Linear(WIDTH, 2 * WIDTH)
        self.feed_forward = nn.Sequential(hidden, nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.feed_forward(self.norms[1](x))


class VisionTransformer(nn.Module):
    """Patches, blocks, and a classifier of the mean token."""

    def __init__(self, way: str, num_kv_heads: int):
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(1, (8 // PATCH) ** 2, WIDTH))
        make = partial(WAYS[way], WIDTH, HEADS, num_kv_heads=num_kv_heads)
        self.blocks = nn.Sequential(*(Block(make()) for _ in range(LAYERS)))
        self.classify = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT + self.position
        return self.classify(self.blocks(x).mean(1))


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images ``(1797, 1, 8, 8)`` between -1 and 1, and their classes."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    return images, torch.from_numpy(data.target)


def split(seed: int) -> tuple[Tensor, Tensor]:
    """Which images are learnt from and which are held back, half of them each."""
    images, _ = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return order.chunk(2)


def train(way: str, num_kv_heads: int, seed: int, epochs: int = EPOCHS) -> nn.Module:
    """A trained model; the seed fixes the split, the start, and the order of batches."""
    images, classes = digits()
    learnt, _ = split(seed)
    torch.manual_seed(seed)
    model = VisionTransformer(way, num_kv_heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.05)
    steps = epochs * -(-len(learnt) // BATCH)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, steps, pct_start=0.1)
    for _ in range(epochs):
        for batch in learnt[torch.randperm(len(learnt))].split(BATCH):
            loss = nn.functional.cross_entropy(model(images[batch]), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, seed: int) -> float:
    """Share of the held-back images that are classified right."""
    images, classes = digits()
    _, held_back = split(seed)
    found = torch.cat([model(images[batch]).argmax(-1) for batch in held_back.split(128)])
    return (found == classes[held_back]).float().mean().item()


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Where one line per run is added.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each way.")] = 5,
    minutes: Annotated[float, typer.Option(help="Begin no run after so much time.")] = 60.0,
    workers: Annotated[int | None, typer.Option(help="Processes. Default: one per core.")] = None,
) -> None:
    """Train what is missing in a file of runs, seed by seed."""
    wanted = [(*each, seed) for seed in range(seeds) for each in RUNS]
    run_missing(out, wanted, train_and_measure, minutes, workers)


def run_missing(
    out: Path,
    wanted: list[tuple[str, int, int]],
    measure: Callable[[str, int, int], dict],
    minutes: float,
    workers: int | None,
) -> None:
    """Add a line for each way, number of key heads and seed that a file of runs lacks.

    Args:
        out: The file.
        wanted: Which runs.
        measure: What a run gives.
        minutes: Begin no run after so much time.
        workers: Processes; by default one per core.
    """
    done = {(r["way"], r["key_heads"], r["seed"]) for r in read(out)} if out.exists() else set()
    missing = [each for each in wanted if each not in done]
    deadline = time.monotonic() + 60 * minutes
    start_process = multiprocessing.get_context("spawn")
    with (
        out.open("a", encoding="utf-8") as file,
        ProcessPoolExecutor(workers, start_process, torch.set_num_threads, (1,)) as pool,
    ):
        results = [pool.submit(in_time, measure, each, deadline) for each in missing]
        for result in tqdm(as_completed(results), total=len(results), unit="run"):
            if result.result() is not None:
                file.write(json.dumps(result.result()) + "\n")
                file.flush()


def in_time(measure: Callable, each: tuple[str, int, int], deadline: float) -> dict | None:
    """The record of one run; nothing if it is too late to begin."""
    if time.monotonic() > deadline:
        return None
    return dict(zip(("way", "key_heads", "seed"), each, strict=True)) | measure(*each)


def train_and_measure(way: str, key_heads: int, seed: int) -> dict:
    """What is noted of a run from scratch."""
    model = train(way, key_heads, seed)
    groups = [layer.group_sizes.tolist() for layer in model.modules() if isinstance(layer, DGQA)]
    return {"groups": groups, "accuracy": accuracy(model, seed)}


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="Files of runs.")],
    plot: Annotated[
        Path | None, typer.Option(help="Where to draw accuracy over key heads.")
    ] = None,
) -> None:
    """Show accuracy by way and number of key heads; of converted models, before training too."""
    runs = [read(file) for file in files]
    for each in runs:
        heads, *rows = table(each)
        shown = Table(*heads)
        for row in rows:
            shown.add_row(*row)
        Console().print(shown)
    if plot is not None:
        draw(runs, plot)


def read(path: Path) -> list[dict]:
    """The runs of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_kind(runs: list[dict], measure: str = "accuracy") -> dict[tuple[str, int], dict[int, float]]:
    """A measure in per cent of each way and number of key heads, by seed."""
    found = defaultdict(dict)
    for each in runs:
        if measure in each:
            found[each["way"], each["key_heads"]][each["seed"]] = 100 * each[measure]
    return found


def baseline(runs: list[dict]) -> str:
    """The way that others are compared with: even groups, made of averages in a conversion."""
    return "average" if any("before" in each for each in runs) else "even groups"


def table(runs: list[dict]) -> list[tuple[str, ...]]:
    """Cells: accuracy in per cent, mean and deviation over seeds, and the mean difference.

    Differences are to even groups of as many key heads, seed by seed, with their standard error.
    """
    kinds, before, even = by_kind(runs), by_kind(runs, "before"), baseline(runs)
    rows = [("key heads", "groups", *(["before, %"] if before else []), "accuracy, %", "deviation")]
    rows[0] += (f"to {even}", "±", "seeds")
    for (way, key_heads), percent in sorted(kinds.items(), key=lambda item: item[0][1]):
        row = [str(key_heads), way]
        if before:
            row.append(f"{statistics.mean(before[way, key_heads].values()):.2f}")
        row += [f"{statistics.mean(percent.values()):.2f}", f"{deviation(percent.values()):.2f}"]
        reference = kinds.get((even, key_heads), {})
        apart = [x - reference[seed] for seed, x in percent.items() if seed in reference]
        if way == even or len(apart) < 2:
            row += ["", ""]
        else:
            error = deviation(apart) / len(apart) ** 0.5
            row += [f"{statistics.mean(apart):+.2f}", f"{error:.2f}"]
        rows.append((*row, str(len(percent))))
    return rows


def deviation(values: Iterable[float]) -> float:
    """Of a sample; 0 for a single value."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else 0.0


def draw(files: list[list[dict]], path: Path) -> None:
    """Mean accuracy over the number of key heads, with its standard error, a panel for each file.

    Hollow points are converted models before any training.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors, size = plt.get_cmap("tab20"), (6 * len(files), 4.6)
    options = {"layout": "constrained", "sharey": True, "squeeze": False}
    figure, panels = plt.subplots(1, len(files), figsize=size, **options)
    for axes, runs in zip(panels[0], files, strict=True):
        for number, (measure, style) in enumerate((("accuracy", {}), ("before", {"mfc": "white"}))):
            kinds = by_kind(runs, measure)
            ways = dict.fromkeys(way for way, _ in by_kind(runs))
            for shift, way in enumerate(ways):
                points = sorted((n, found) for (name, n), found in kinds.items() if name == way)
                axes.errorbar(
                    [n * 1.03**shift for n, _ in points],
                    [statistics.mean(found.values()) for _, found in points],
                    [deviation(found.values()) / len(found) ** 0.5 for _, found in points],
                    marker="o",
                    capsize=2,
                    color=colors(shift),
                    label=None if number else way,
                    linestyle="-" if way == baseline(runs) and not number else "none",
                    **style,
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks(KEY_HEADS, [str(n) for n in KEY_HEADS])
        axes.set_xlabel(f"key and value heads, of {HEADS} query heads")
        origin = "from scratch" if baseline(runs) == "even groups" else "converted, trained further"
        axes.set_title(origin, fontsize=9)
        axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    panels[0][0].set_ylabel("accuracy on held-back digits, %")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    app()
