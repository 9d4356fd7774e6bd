"""Group the heads of a trained model, and train it a little further: a language model, or a ViT.

A conversion is measured on held-back data before and after some steps, beside the source, trained
as long: the source is not at the end of its training either. Every run is one line of a file, and
runs that it has already are not repeated. The language model is that of this folder::

    python examples/uptrain.py run --pooling source --pooling fitted --out runs.jsonl
    python examples/uptrain.py run --pooling fitted --distill 0.5 --out runs.jsonl

and the vision transformer that of ``train_vit_digits.py``, with all of its ways to group heads::

    python examples/uptrain.py digits --seeds 5 --out digits.jsonl
    python examples/train_vit_digits.py report digits.jsonl --plot digits.png

Use ``uptraining.py`` for any model whose heads were grouped, with whatever loss it has.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import torch
import train_vit_digits as vit
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from train_language_model import (
    MODEL_FOLDER,
    batch_at,
    make_optimizers,
    mean_loss,
    schedule,
    token_stream,
    train_step,
    worker_pool,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from uptraining import uptrain

from efficient_attn.convert.gqa.learned import LearnedAverage, fold_averages
from efficient_attn.integrations.grouping import calibrate, group_heads

SOURCE = "source"
LENGTH = 512
# A quarter of the highest rate of the source's training.
PEAK_RATE = 1e-3
CALIBRATION_ROWS = 32
TEST_TOKENS = 32_768

# Ways to convert the vision transformer. Those whose groups follow the keys, and PGQA, start from
# averages of neighbours, as their authors do.
CONVERSIONS = {
    "average": {"partition": "consecutive", "pooling": "mean"},
    "aligned": {"partition": "consecutive", "pooling": "aligned"},
    "clustered, average": {"partition": "clustered", "pooling": "mean"},
    "clustered, aligned": {"partition": "clustered", "pooling": "aligned"},
    "searched, fitted": {"partition": "searched-even", "pooling": "fitted"},
}
KEY_DRIVEN = [way for way in vit.WAYS if way != "even groups"]
VIT_RUNS = [
    (SOURCE, vit.HEADS),
    *((way, n) for n in vit.KEY_HEADS[1:-1] for way in (*CONVERSIONS, *KEY_DRIVEN)),
    *((way, 1) for way, options in CONVERSIONS.items() if options["partition"] != "clustered"),
]
# As much slower, in as much of the source's training.
VIT_RATE, VIT_EPOCHS = vit.PEAK_RATE / 4, 3

app = typer.Typer(add_completion=False, help=__doc__.split("\n")[0])


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Where one line per run is added.")],
    pooling: Annotated[
        list[str],
        typer.Option(help="mean, first, norm, aligned, svd, fitted, learned; source for none."),
    ],
    heads: Annotated[int, typer.Option(min=1, help="Key and value heads left.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps of 2,048 tokens.")] = 32,
    distill: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the loss that is the source's opinion.")
    ] = 0.0,
    folder: Annotated[Path, typer.Option(help="Folder of the source.")] = MODEL_FOLDER,
) -> None:
    """Group, measure, train and measure again, for each way to make a shared head."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    streams = {split: token_stream(tokenizer, split) for split in ("train", "calibration", "test")}
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for name in pooling:
        setting = {
            "kind": "uptrained", "model": folder.name, "pooling": name, "steps": steps,
            "heads": source.config.num_key_value_heads if name == SOURCE else heads,
            "of_heads": source.config.num_key_value_heads, "distill": distill,
        }  # fmt: skip
        if any(setting.items() <= {**record}.items() for record in done):
            continue
        result = one_run(source, name, heads, steps, distill, streams)
        with out.open("a") as lines:
            lines.write(json.dumps(setting | result) + "\n")


def one_run(
    source: LlamaForCausalLM,
    pooling: str,
    heads: int,
    steps: int,
    distill: float,
    streams: dict[str, Tensor],
) -> dict:
    """Perplexity before and after, and the course of training."""
    model, test = copy.deepcopy(source), streams["test"][:TEST_TOKENS]
    if pooling != SOURCE:
        rows = streams["calibration"][: CALIBRATION_ROWS * LENGTH].view(-1, LENGTH)
        layers = [name for name, module in model.named_modules() if name.endswith("self_attn")]
        group_heads(
            model, heads, pooling=pooling, calibration=calibrate(model, rows.split(4), layers)
        )
    before = mean_loss(model, test, LENGTH)
    watched = streams["calibration"][-16_384:]
    optimizers = optimizers_of(model)
    loss_of = distilled(model, source, distill) if distill else None
    with worker_pool() as pool:

        def update(batch: Tensor, progress: float) -> float:
            rate = PEAK_RATE * schedule(progress)
            return train_step(model, optimizers, batch, rate, pool, loss_of)

        log = uptrain(
            model,
            (batch_at(streams["train"], step, LENGTH) for step in range(steps)),
            steps,
            update=update,
            watch=lambda: {"calibration_loss": round(mean_loss(model, watched, LENGTH), 4)},
        )
    fold_averages(model)
    after = mean_loss(model, test, LENGTH)
    return {
        "trained_tokens": log[-1]["seen"],
        "test_tokens": len(test),
        "perplexity_before": math.exp(before),
        "perplexity_after": math.exp(after),
        "log": log,
    }


def distilled(
    model: LlamaForCausalLM, teacher: LlamaForCausalLM, share: float
) -> Callable[[Tensor], Tensor]:
    """Cross entropy of the next token, and divergence from what a teacher expects of it."""

    def loss_of(row: Tensor) -> Tensor:
        out = model(row[None], labels=row[None], use_cache=False)
        with torch.no_grad():
            truth = teacher(row[None], use_cache=False).logits.log_softmax(-1)
        expected = out.logits.log_softmax(-1)
        divergence = kl_div(expected, truth, reduction="none", log_target=True).sum(-1).mean()
        return (1 - share) * out.loss + share * divergence

    return loss_of


def optimizers_of(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Those of the source's training, and the weights of learned averages with the scales."""
    optimizers = make_optimizers(model)
    learned = [module.weight for module in model.modules() if isinstance(module, LearnedAverage)]
    if learned:
        optimizers[-1].add_param_group({"params": learned, "weight_decay": 0.0})
    return optimizers


# --- the vision transformer -------------------------------------------------------------------


@app.command()
def digits(
    out: Annotated[Path, typer.Option(help="Where one line per run is added.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each way.")] = 5,
    distill: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the loss that is the source's opinion.")
    ] = 0.0,
    minutes: Annotated[float, typer.Option(help="Begin no run after so much time.")] = 60.0,
    workers: Annotated[int | None, typer.Option(help="Processes. Default: one per core.")] = None,
) -> None:
    """Convert a trained vision transformer in every way, and train what comes of it further."""
    wanted = [(*each, seed) for seed in range(seeds) for each in VIT_RUNS]
    vit.run_missing(out, wanted, partial(convert_and_uptrain, distill=distill), minutes, workers)


def convert_and_uptrain(way: str, key_heads: int, seed: int, distill: float = 0.0) -> dict:
    """Accuracy on held-back images before and after, and the course of training."""
    images, classes = vit.digits()
    learnt, _ = vit.split(seed)
    source = trained(seed)
    model = converted(way, key_heads, source, images[learnt])
    before = vit.accuracy(model, seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=VIT_RATE, weight_decay=0.05)

    def update(batch: Tensor, progress: float) -> float:
        logits = model(images[batch])
        loss = cross_entropy(logits, classes[batch])
        if distill:
            with torch.no_grad():
                truth = source(images[batch]).log_softmax(-1)
            divergence = kl_div(
                logits.log_softmax(-1), truth, reduction="batchmean", log_target=True
            )
            loss = (1 - distill) * loss + distill * divergence
        optimizer.param_groups[0]["lr"] = VIT_RATE * schedule(progress)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    steps = VIT_EPOCHS * -(-len(learnt) // vit.BATCH)
    log = uptrain(model, epochs_of(learnt), steps, update=update, progress=False)
    return {
        "before": before,
        "accuracy": vit.accuracy(model, seed),
        "epochs": VIT_EPOCHS,
        "distill": distill,
        "log": log,
    }


@cache
def trained(seed: int) -> nn.Module:
    """A vision transformer with a key head for every query head."""
    return vit.train("even groups", vit.HEADS, seed)


def converted(way: str, key_heads: int, source: nn.Module, images: Tensor) -> nn.Module:
    """The source with fewer key heads, fitted to images that it has learnt from."""
    model = copy.deepcopy(source)
    if way == SOURCE:
        return model
    group_heads(
        model, key_heads, calibration=[images], **CONVERSIONS.get(way, CONVERSIONS["average"])
    )
    if way in KEY_DRIVEN:
        state = model.state_dict()
        model = vit.VisionTransformer(way, key_heads)
        model.load_state_dict(state)
    return model.eval()


def epochs_of(indices: Tensor) -> Iterator[Tensor]:
    """Batches of all images in a random order, again and again."""
    while True:
        yield from indices[torch.randperm(len(indices))].split(vit.BATCH)


if __name__ == "__main__":
    app()
