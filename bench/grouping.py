"""What two trained models lose when key and value heads are shared, by rule, without training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

from bench.quality_tasks import Encoder, LanguageModel
from bench.runner import Write
from efficient_attn.convert.gqa import PARTITIONS, POOLINGS
from efficient_attn.integrations.attention_sites import attention_sites
from efficient_attn.integrations.grouping import GroupingReport, calibrate, group_heads

# Model, and how many heads are to be left of its 12 and 2.
MODELS = {Encoder: (6, 4, 3, 2, 1), LanguageModel: (1,)}
# Rules that are measured of neighbours alone, and without a look at text, too.
BASELINES = ("first", "norm")
WEIGHTS_ALONE = ("aligned", "svd", "fitted")


def variants(counts: Sequence[int]) -> Iterator[tuple[int, str, str, bool]]:
    """Heads left, partition, pooling, and whether calibration text is looked at."""
    for count in counts:
        # All heads in one group leave nothing to choose.
        for partition in PARTITIONS if count > 1 else ("consecutive",):
            for pooling in POOLINGS:
                if partition == "consecutive" or pooling not in BASELINES:
                    yield count, partition, pooling, True
                if partition == "consecutive" and pooling in WEIGHTS_ALONE:
                    yield count, partition, pooling, False


def measure(
    write: Write,
    *,
    models: Sequence[type] = tuple(MODELS),
    counts: Sequence[int] | None = None,
    length: int = 128,
    rows: int = 64,
    calibration_rows: int = 64,
) -> None:
    """Every rule on both models.

    Args:
        write: Receives the records.
        models: Which of ``MODELS``.
        counts: How many heads are to be left; by default what ``MODELS`` says.
        length: Tokens in a row of text.
        rows: Rows that results are measured on.
        calibration_rows: Rows of other text for calibration.
    """
    for make in models:
        task = make(length, rows)
        source, heads = task.model, list(attention_sites(task.model).values())[0].num_kv_heads
        moments = calibrate(
            source, task.other_text(calibration_rows).split(4), attention_sites(source)
        )
        told = {"kind": "grouping", "model": task.name, "of_heads": heads, "tokens": length}
        write(
            {**told, "heads": heads, "partition": "", "pooling": "", "calibrated": False}
            | task.result()
        )
        for count, partition, pooling, calibrated in variants(counts or MODELS[make]):
            task.model = copy.deepcopy(source)
            report = group_heads(
                task.model,
                count,
                partition=partition,
                pooling=pooling,
                calibration=moments if calibrated else None,
            )
            record = {"heads": count, "partition": partition, "pooling": pooling}
            record |= {"calibrated": calibrated, **mean_errors(report), **task.result()}
            write(told | record)


def mean_errors(report: GroupingReport) -> dict:
    """What the layers lose on average, and the largest group."""
    layers = report.layers
    return {
        "key_error": math.fsum(layer.key_error for layer in layers) / len(layers),
        "value_error": math.fsum(layer.value_error for layer in layers) / len(layers),
        "largest_group": max(len(group) for layer in layers for group in layer.groups),
    }
