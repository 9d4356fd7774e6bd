"""What a few minutes of training give back to the example model with a smaller cache.

The model is converted, measured, trained towards itself as it was, and measured again. The model as
it was is trained as long by the same recipe: it is not at the end of its training either, and what
it gains so is no merit of recovery.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.conversion import FOLDER, token_losses
from bench.runner import Write
from examples.recover_mla import Recipe, recover

# Shares of the cache that are left; 1 is the source, which is not converted.
RATIOS = (1.0, 0.5, 0.25, 0.125)
# Chosen on calibration text that no conversion was fitted to.
RECIPE = Recipe(steps=120, batch=4, length=512, rate=1e-3)
ROW = 512
# To convert on and to measure on; those of the demo.
TOKENS = 16384


def measure(
    write: Write,
    *,
    recipe: Recipe = RECIPE,
    ratios: Sequence[float] = RATIOS,
    tokens: int = TOKENS,
) -> None:
    """Perplexity of held-out text before and after training, by the bytes that are cached."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from efficient_attn.convert import convert
    from efficient_attn.integrations.converted import load_converted

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    test, calibration = (_rows(tokenizer, split, tokens) for split in ("test", "calibration"))
    end = torch.tensor([tokenizer.eos_token_id])
    stream = torch.cat([part for file in _files(tokenizer, "train") for part in (file, end)])
    source = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    for ratio in ratios:
        if ratio == 1:
            model, held = copy.deepcopy(source), None
        else:
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "converted"
                told = convert(FOLDER, out, mode="compress", kv_ratio=ratio, calib=calibration)
                model, held = load_converted(out, dtype=torch.float32), told.bytes_per_token
        before = token_losses(model, test)
        start = time.perf_counter()
        recover(model, source, stream, recipe)
        minutes = (time.perf_counter() - start) / 60
        after = token_losses(model, test)
        write(
            {
                "kind": "recovery",
                "model": FOLDER.name,
                "kv_ratio": ratio,
                "bytes_per_token": _bytes_per_token(source) if held is None else held["after"],
                "steps": recipe.steps,
                "rate": recipe.rate,
                "trained_tokens": recipe.steps * recipe.batch * recipe.length,
                "minutes": minutes,
                "test_tokens": test.numel(),
                "perplexity_before": math.exp(float(before.mean())),
                "perplexity_after": math.exp(float(after.mean())),
            }
        )


def _rows(tokenizer, split: str, count: int) -> Tensor:
    """The beginning of a split, in rows."""
    found: list[Tensor] = []
    for file in _files(tokenizer, split):
        found.append(file)
        if sum(map(len, found)) >= count:
            break
    tokens = torch.cat(found)
    number = min(count, len(tokens)) // ROW
    return tokens[: number * ROW].view(number, ROW)


def _files(tokenizer, split: str) -> Iterator[Tensor]:
    from examples.corpus import python_sources

    for _, text in python_sources(split):
        yield torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def _bytes_per_token(model) -> int:
    config = model.config
    numbers = 2 * config.num_key_value_heads * config.head_dim
    return numbers * config.num_hidden_layers * model.dtype.itemsize
