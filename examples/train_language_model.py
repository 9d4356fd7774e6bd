"""Train a small language model of Python code from scratch, on a CPU, in under an hour.

The model is a Llama with grouped heads: 5.2 million parameters, 8 query heads that share 2
key/value heads. It learns from the sources of Python's standard library (see ``corpus.py``), so
it needs no download. Train it, then measure it on the files that were held back::

    python examples/train_language_model.py train --minutes 45
    python examples/train_language_model.py evaluate

On Linux, a step this small spends much of its time asking the system for memory and handing it
back. These two settings let it keep what it has::

    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000

The budget is wall time rather than steps: the learning rate follows the share of the time that
has passed, so a run ends when it should, and with a finished schedule, on any machine. A run that
was stopped continues from its last checkpoint when it is started again.
"""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from corpus import python_sources
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"

VOCABULARY = 4096
MAX_LENGTH = 2048

TOKENS_PER_STEP = 2048
PEAK_RATE = 2e-3
WARM_UP = 0.03  # share of the time over which the rate rises
LONG_PHASE = 0.25  # share of the time, at the end, spent on sequences of MAX_LENGTH
SHORT_LENGTH = 512

LOG_SECONDS = 60
CHECKPOINT_SECONDS = 180

app = typer.Typer(add_completion=False, help=__doc__.split("\n")[0])

Folder = Annotated[Path, typer.Option(help="Folder of the model.")]


@app.command()
def train(
    minutes: Annotated[float, typer.Option(help="Wall time to train for.")] = 45,
    folder: Folder = HERE / "pycode_llama",
    seed: Annotated[int, typer.Option(help="Seed of the initial weights.")] = 0,
) -> None:
    """Train a tokenizer and a model, and store both."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(text for _, text in python_sources("train"))
    tokenizer.save_pretrained(folder)
    stream = token_stream(tokenizer, (text for _, text in python_sources("train")))
    # A tenth of the calibration text is enough to watch the run by.
    watched = token_stream(tokenizer, (text for _, text in python_sources("calibration")))
    watched = watched[:: len(watched) // 10].new_tensor(watched[: len(watched) // 10].tolist())

    model = LlamaForCausalLM(model_config(tokenizer))
    log = fit(model, stream, watched, minutes * 60, folder / "checkpoint.pt")
    store(model, folder)
    (folder / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    evaluate(folder)
