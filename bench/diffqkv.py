"""What the example language model loses when it is converted to DiffQKV, without training."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.environment import ROOT
from bench.quality_tasks import LanguageModel
from bench.runner import Write
from efficient_attn.convert import convert
from efficient_attn.convert.diffqkv import MERGES

FOLDER = ROOT / "examples" / "pycode_llama"
# Key and value heads that are left of two of each.
COUNTS = ((1, 2), (1, 1))


def measure(
    write: Write,
    *,
    counts: Sequence[tuple[int, int]] = COUNTS,
    length: int = 512,
    rows: int = 32,
    calibration_rows: int = 64,
) -> None:
    """Perplexity of the model and of what each rule makes of it, with and without a look at text.

    Args:
        write: Receives the records.
        counts: Key and value heads that are left.
        length: Tokens in a row of text.
        rows: Rows that results are measured on.
        calibration_rows: Rows of other text for calibration.
    """
    from efficient_attn.integrations.verification import load

    task = LanguageModel(length, rows)
    calibration = task.other_text(calibration_rows)
    told = {"kind": "diffqkv", "model": task.name, "test_tokens": task.text.numel()}
    heads = task.model.config.num_key_value_heads
    start = {"key_heads": heads, "value_heads": heads, "merge": "", "calibrated": False}
    write(told | start | task.result())
    for key_heads, value_heads in counts:
        for merge in MERGES:
            for calib in (calibration, None):
                with tempfile.TemporaryDirectory() as scratch:
                    out = Path(scratch) / "converted"
                    options = {"key_heads": key_heads, "value_heads": value_heads, "merge": merge}
                    report = convert(FOLDER, out, "diffqkv", calib=calib, **options)
                    task.model = load(out, dtype=torch.float32)
                errors = {
                    f"{kind}_error": math.fsum(layer[f"{kind}_error"] for layer in report.layers)
                    / len(report.layers)
                    for kind in ("key", "value")
                }
                record = options | {"calibrated": calib is not None, **errors, **task.result()}
                write(told | record | {"bytes_per_token": report.bytes_per_token})
