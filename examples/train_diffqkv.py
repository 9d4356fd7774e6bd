"""Train one small language model with each arrangement of heads, and compare loss with cache.

All have the same number of parameters to within a thousandth, because the feed-forward layers take
up what attention leaves over, and see the same tokens in the same order. Every run is one line of a
file, which may hold other records, and runs that it has already are not repeated::

    python examples/train_diffqkv.py run --steps 250 --seeds 3 --out runs.jsonl
    python -m bench plot runs.jsonl --out .

The text and the way of training are those of ``train_language_model.py``.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
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
from transformers import AutoTokenizer

from efficient_attn.integrations.diffqkv_model import DiffQKVConfig, DiffQKVForCausalLM

WIDTH, LAYERS, HEADS, LENGTH = 128, 4, 8, 256
FEED_FORWARD = 344  # of multi-head attention, the largest; the others get more
PEAK_RATE = 6e-3

# Query, key and value heads; what else differs from plain attention.
VARIANTS = {
    "MHA 8/8/8": {"num_key_heads": 8, "num_value_heads": 8},
    "GQA 8/4/4": {"num_key_heads": 4, "num_value_heads": 4},
    "GQA 8/2/2": {"num_key_heads": 2, "num_value_heads": 2},
    "MQA 8/1/1": {"num_key_heads": 1, "num_value_heads": 1},
    "DiffQKV 8/1/4": {"num_key_heads": 1, "num_value_heads": 4},
    "DiffQKV 8/4/1": {"num_key_heads": 4, "num_value_heads": 1},
    "DiffQKV 8/1/4, augmented query": {
        "num_key_heads": 1, "num_value_heads": 4, "augmented_query_dim": 192,
    },
    "DiffQKV 8/1/4, augmented query, half keys": {
        "num_key_heads": 1, "num_value_heads": 4, "augmented_query_dim": 192, "head_dim": 8,
    },
}  # fmt: skip

app = typer.Typer(add_completion=False, help=__doc__.split("\n")[0])


@app.callback()
def main() -> None:
    """Keep ``run`` a name, for there may be more."""


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Where one line per run is added.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of 2,048 tokens.")] = 250,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 2,
) -> None:
    """Train what is missing in a file of runs, seed by seed."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    stream, held_back = (token_stream(tokenizer, split) for split in ("train", "test"))
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(r["variant"], r["seed"], r["steps"]) for r in records if r["kind"] == "trained"}
    wanted = [(name, seed) for seed in range(seeds) for name in VARIANTS]
    for name, seed in tqdm([run for run in wanted if (*run, steps) not in done], unit="run"):
        model = build(name, len(tokenizer), seed)
        fit(model, stream, steps, seed)
        record = {
            "kind": "trained",
            "variant": name,
            "seed": seed,
            "steps": steps,
            "tokens": steps * batch_at(stream, 0, LENGTH).numel(),
            "parameters": model.num_parameters(),
            "cache_numbers_per_token": cache_numbers(model),
            "test_loss": round(mean_loss(model, held_back[:100_000], LENGTH), 4),
        }
        with out.open("a") as lines:
            lines.write(json.dumps(record) + "\n")


def build(name: str, vocabulary: int, seed: int) -> DiffQKVForCausalLM:
    """A variant, its feed-forward layers so wide that all variants are equally large."""
    options = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
        "attn_implementation": "sdpa",
    }

    def parameters(name: str, feed_forward: int) -> int:
        with torch.device("meta"):
            config = DiffQKVConfig(**options | VARIANTS[name], intermediate_size=feed_forward)
            return DiffQKVForCausalLM(config).num_parameters()

    spare = parameters("MHA 8/8/8", FEED_FORWARD) - parameters(name, FEED_FORWARD)
    feed_forward = FEED_FORWARD + round(spare / (3 * WIDTH * LAYERS))
    torch.manual_seed(seed)
    return DiffQKVForCausalLM(
        DiffQKVConfig(**options | VARIANTS[name], intermediate_size=feed_forward)
    )


def fit(model: DiffQKVForCausalLM, stream: torch.Tensor, steps: int, seed: int) -> None:
    """Train in place; another seed starts elsewhere in the text, too."""
    optimizers = make_optimizers(model.train())
    with worker_pool() as pool:
        for step in range(steps):
            batch = batch_at(stream, step + seed * steps, LENGTH)
            train_step(model, optimizers, batch, PEAK_RATE * schedule((step + 1) / steps), pool)


def cache_numbers(model: DiffQKVForCausalLM) -> int:
    """What all layers keep of a token."""
    rows = (layer.self_attn.cache_rows for layer in model.model.layers)
    return sum(row.bytes_per_token(torch.float32) for row in rows) // 4


if __name__ == "__main__":
    app()
