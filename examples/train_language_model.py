"""Train a small language model of Python code from scratch, on a CPU, in under an hour.

The model is a Llama with grouped heads: 5.2 million parameters, and 8 query heads that share 2
key/value heads. It learns from the sources of Python's standard library (see ``corpus.py``), so
nothing has to be downloaded. Train it, then measure it on the files that were held back::

    python examples/train_language_model.py train --minutes 47
    python examples/train_language_model.py evaluate

On Linux, steps this small spend much of their time asking the system for memory and handing it
back. These settings make the process keep what it has::

    export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000

The budget is wall time rather than steps: the learning rate follows the share of the time that
has passed, so a run ends on time, and with a finished schedule, on any machine. A run that was
stopped continues from its last checkpoint when it is started again; one that ended is taken further
by ``train --more``.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from corpus import Split, python_sources
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

MODEL_FOLDER = Path(__file__).resolve().parent / "pycode_llama"
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
POSITIONS = 2048

TOKENS_PER_STEP = 2048
PEAK_RATE = 4e-3
WARM_UP = 0.03  # share of the time in which the learning rate rises

# Short sequences are cheaper per token; long ones at the end teach the positions beyond.
SHORT, LONG = 512, 1024
LONG_PHASE = 0.15  # share of the time, at the end

LOG_SECONDS = 300
CHECKPOINT_SECONDS = 180

app = typer.Typer(add_completion=False, help=__doc__.split("\n")[0])
Folder = Annotated[Path, typer.Option(help="Folder of the model.")]


@app.command()
def train(
    minutes: Annotated[float, typer.Option(help="Wall time to train for.")] = 47,
    folder: Folder = MODEL_FOLDER,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights.")] = 0,
    peak_rate: Annotated[float, typer.Option(help="The highest learning rate.")] = PEAK_RATE,
    more: Annotated[
        bool, typer.Option("--more", help="Start from the stored model, with a new schedule.")
    ] = False,
) -> None:
    """Train a tokenizer and a model, store both, and measure what was stored."""
    log_file = folder / "training_log.json"
    if more:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        log = json.loads(log_file.read_text())
    else:
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(text for _, text in python_sources("train"))
        tokenizer.save_pretrained(folder)
        model, log = LlamaForCausalLM(model_config(tokenizer)), []
    log = fit(model, tokenizer, minutes * 60, peak_rate, folder / "checkpoint.pt", log)
    store(model, folder)
    log_file.write_text(json.dumps(log, indent=1) + "\n")
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    evaluate(folder)


@app.command()
def evaluate(
    folder: Folder = MODEL_FOLDER,
    split: Annotated[str, typer.Option(help="test, calibration or train.")] = "test",
    length: Annotated[int, typer.Option(help="Tokens of context, at most.")] = 1024,
) -> None:
    """Print the loss of the stored model, in nats per token and in bits per byte of text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = token_stream(tokenizer, split)
    size = sum(len(text.encode()) for _, text in python_sources(split))
    loss = mean_loss(model, tokens, length)
    bits_per_byte = loss / math.log(2) * (len(tokens) - 1) / size
    print(f"{split}: {loss:.4f} nats per token, {bits_per_byte:.4f} bits per byte")
    print(f"{len(tokens) - 1:,} tokens, {size:,} bytes, context up to {length}")


# --- text to tokens ---------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE: any text can be written in it and comes back unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, split: Split) -> Tensor:
    """All files of a split in one row of tokens, with an end-of-text token around each."""
    end = tokenizer.eos_token_id
    stream = [end]
    for _, text in python_sources(split):
        stream += tokenizer.backend_tokenizer.encode(text).ids
        stream.append(end)
    return torch.tensor(stream)


# --- the model --------------------------------------------------------------------------------


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama in miniature: every part of the large ones, at a hundredth of their width."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def store(model: LlamaForCausalLM, folder: Path) -> None:
    """Save the weights in half precision, under a configuration that loads them in single."""
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # CPUs are slow in half precision; a plain ``from_pretrained`` should not land there.
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def mean_loss(model: LlamaForCausalLM, tokens: Tensor, length: int) -> float:
    """Mean cross entropy in nats of every token but the first, each predicted once.

    The row of tokens is cut into windows of ``length``. A window begins with the last token of
    the one before, so that no prediction is lost between two windows.
    """

    @torch.inference_mode()
    def total(start: int) -> float:
        window = tokens[None, start : start + length]
        return model(window, labels=window).loss.item() * (window.shape[1] - 1)

    model.eval()
    with worker_pool() as pool:
        return sum(pool.map(total, range(0, len(tokens) - 1, length - 1))) / (len(tokens) - 1)


# --- training ---------------------------------------------------------------------------------


def fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seconds: float,
    peak_rate: float,
    checkpoint: Path,
    log: list[dict[str, float]],
) -> list[dict[str, float]]:
    """Train the model in place for so many seconds, and return the log, continued."""
    stream = token_stream(tokenizer, "train")
    watched = token_stream(tokenizer, "calibration")[-16_384:]
    optimizers = make_optimizers(model)
    before = log[-1] if log else {"step": 0, "tokens": 0, "minutes": 0.0}
    state = {"step": before["step"], "tokens": before["tokens"], "elapsed": 0.0, "log": [*log]}
    if checkpoint.exists():
        state = restore(checkpoint, model, optimizers)

    def record(elapsed: float, losses: list[float]) -> None:
        entry = {
            "step": state["step"],
            "tokens": state["tokens"],
            "minutes": round(before["minutes"] + elapsed / 60, 2),
            "train_loss": round(sum(losses) / len(losses), 4),
            "calibration_loss": round(mean_loss(model, watched, SHORT), 4),
        }
        state["log"].append(entry)
        tqdm.write(json.dumps(entry))

    began = time.monotonic() - state["elapsed"]
    logged = saved = state["elapsed"]
    losses = []
    with worker_pool() as pool, tqdm(total=round(seconds), unit="s", mininterval=10) as bar:
        while (elapsed := time.monotonic() - began) < seconds:
            progress = elapsed / seconds
            length = SHORT if progress < 1 - LONG_PHASE else LONG
            batch = batch_at(stream, state["step"], length)
            rate = peak_rate * schedule(progress)
            losses.append(train_step(model, optimizers, batch, rate, pool))
            state["step"] += 1
            state["tokens"] += batch.numel()

            if elapsed - logged > LOG_SECONDS:
                record(elapsed, losses)
                logged, losses = elapsed, []
            if elapsed - saved > CHECKPOINT_SECONDS:
                save(checkpoint, model, optimizers, state | {"elapsed": elapsed})
                saved = elapsed
            bar.update(round(elapsed) - bar.n)
    if losses:
        record(elapsed, losses)
    return state["log"]


def train_step(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    batch: Tensor,
    rate: float,
    pool: Executor,
    loss_of: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """One update of the weights; returns the loss before it.

    The loss is the mean of ``loss_of`` over rows; by default, of their cross entropy.
    """
    weights = list(model.parameters())

    def cross_entropy(row: Tensor) -> Tensor:
        return model(row[None], labels=row[None], use_cache=False).loss

    def of_one(row: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        loss = (loss_of or cross_entropy)(row) / len(batch)
        return loss.item(), torch.autograd.grad(loss, weights)

    losses, gradients = zip(*pool.map(of_one, batch), strict=True)
    for weight, parts in zip(weights, zip(*gradients, strict=True), strict=True):
        weight.grad = sum(parts)
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return sum(losses)


def worker_pool() -> Executor:
    """One thread for each core, each working through whole sequences by itself.

    Threads that share every matrix product, PyTorch's way, wait for the slowest after each; on a
    busy machine that is most of the time. These meet once in a step.
    """
    cores = torch.get_num_threads()
    return ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))


def schedule(progress: float) -> float:
    """The share of the peak rate: a linear rise, then half a cosine down to zero."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2


def batch_at(stream: Tensor, step: int, length: int) -> Tensor:
    """The sequences of one step, as ``(sequences, length)``.

    Multiples of the golden ratio, modulo one, cover an interval evenly however many there are.
    Sequences that start at them visit all of the text at an even pace, in an order that needs no
    epochs and nothing to remember.
    """
    golden = (math.sqrt(5) - 1) / 2
    rows = max(2, TOKENS_PER_STEP // length)  # two at least, or a second core would idle
    starts = (int((step * rows + row) * golden % 1 * (len(stream) - length)) for row in range(rows))
    return torch.stack([stream[start : start + length] for start in starts])


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embeddings and the norms' scales.

    Muon needs about half the tokens of AdamW for the same loss (Liu et al., "Muon is scalable for
    LLM training", 2025), and its steps are scaled so that one rate suits both.
    """
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    scales = [weight for weight in model.parameters() if weight.ndim == 1]
    return [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [model.model.embed_tokens.weight], "weight_decay": 0.1},
                {"params": scales, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]


def save(
    path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], state: dict
) -> None:
    """Write a checkpoint; a kill half-way leaves the previous one whole."""
    part = path.with_suffix(".part")
    moments = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"model": model.state_dict(), "optimizers": moments, "state": state}, part)
    part.replace(path)


def restore(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> dict:
    """Read a checkpoint back into the model and the optimizers; returns the state of the run."""
    stored = torch.load(path, weights_only=True)
    model.load_state_dict(stored["model"])
    for optimizer, moments in zip(optimizers, stored["optimizers"], strict=True):
        optimizer.load_state_dict(moments)
    return stored["state"]


if __name__ == "__main__":
    app()
