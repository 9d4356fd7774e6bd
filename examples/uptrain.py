"""Group the heads of the example language model, and train it a little further.

A conversion is measured on the test files before and after some steps on the training files, beside
the source, trained as long: the source is not at the end of its training either. Every run is one
line of a file, which may hold other records, and runs that it has already are not repeated::

    python examples/uptrain.py run --pooling source --pooling fitted --out runs.jsonl
    python examples/uptrain.py run --pooling fitted --distill 0.5 --out runs.jsonl

Use ``uptrain`` from here for any model whose heads were grouped, with whatever loss it has.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import kl_div
from tqdm import tqdm
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

from efficient_attn.convert.gqa.learned import LearnedAverage, fold_averages
from efficient_attn.integrations.grouping import calibrate, group_heads
from efficient_attn.layers import GroupedQueryAttention
from efficient_attn.layers.key_driven import freeze_groups

SOURCE = "source"
LENGTH = 512
# A quarter of the highest rate of the source's training.
PEAK_RATE = 1e-3
# Groups that change in training are fixed when this share of it is done.
FREEZE_AT = 0.85
CALIBRATION_ROWS = 32
TEST_TOKENS = 32_768

app = typer.Typer(add_completion=False, help=__doc__.split("\n")[0])


@app.callback()
def main() -> None:
    """Keep ``run`` a name, for there may be more."""


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
    log = uptrain(
        model,
        (batch_at(streams["train"], step, LENGTH) for step in range(steps)),
        steps,
        optimizers=optimizers_of(model),
        loss_of=distilled(model, source, distill) if distill else None,
        watch=lambda: {"calibration_loss": round(mean_loss(model, watched, LENGTH), 4)},
    )
    fold_averages(model)
    after = mean_loss(model, test, LENGTH)
    return {
        "trained_tokens": log[-1]["tokens"],
        "test_tokens": len(test),
        "perplexity_before": math.exp(before),
        "perplexity_after": math.exp(after),
        "log": log,
    }


def uptrain(
    model: nn.Module,
    batches: Iterator[Tensor],
    steps: int,
    *,
    optimizers: list[torch.optim.Optimizer],
    peak_rate: float = PEAK_RATE,
    loss_of: Callable[[Tensor], Tensor] | None = None,
    watch: Callable[[], dict] = dict,
    log_every: int = 20,
) -> list[dict]:
    """Train a model whose heads were grouped, in place; returns the log.

    Layers whose groups follow their keys are frozen when most of the training is done, so that the
    rest of it, and all that comes after, sees one map.

    Args:
        model: The model.
        batches: Rows of inputs.
        steps: How many batches are used.
        optimizers: What updates the weights.
        peak_rate: The highest learning rate.
        loss_of: From one row to its loss; by default, cross entropy of the next token.
        watch: Measures whatever is to be logged.
        log_every: Steps between two entries of the log.
    """
    log, losses, tokens, maps, changes = [], [], 0, group_sizes(model), 0
    frozen = False
    with worker_pool() as pool:
        for step in tqdm(range(1, steps + 1), unit="step", mininterval=5):
            model.train()
            batch = next(batches)
            rate = peak_rate * schedule((step - 0.5) / steps)
            losses.append(train_step(model, optimizers, batch, rate, pool, loss_of))
            tokens += batch.numel()
            if not frozen and step >= FREEZE_AT * steps:
                freeze_groups(model)
                frozen = True
            sizes = group_sizes(model)
            changes += sum(sizes[name] != maps[name] for name in sizes)
            maps = sizes
            if step % log_every == 0 or step == steps:
                log.append(
                    {
                        "step": step,
                        "tokens": tokens,
                        "train_loss": round(sum(losses) / len(losses), 4),
                        "map_changes": changes,
                        "empty_groups": sum(size == 0 for s in sizes.values() for size in s),
                        "groups": sizes,
                        **watch(),
                    }
                )
                losses, changes = [], 0
    model.eval()
    return log


def group_sizes(model: nn.Module) -> dict[str, list[int]]:
    """How many query heads each key head serves, in layers that have a map of their own."""
    return {
        name: module.q_to_k.bincount(minlength=module.num_key_heads).tolist()
        for name, module in model.named_modules()
        if isinstance(module, GroupedQueryAttention) and module.q_to_k is not None
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


if __name__ == "__main__":
    app()
