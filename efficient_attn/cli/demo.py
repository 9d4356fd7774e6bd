"""``efficient-attn demo``: the whole story on a small model in a few minutes.

Needs a clone of the repository, which holds the model and the benchmarks; a wheel holds neither.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from efficient_attn.cli import _compressing, _decoding, _estimating

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "def binary_search(items, target):\n",
    "class Queue:\n    def __init__(self",
    "import os\nimport sys\n\ndef main():\n",
)
NEW_TOKENS = 48
TOLERANCE = 1e-4

console = Console()


@dataclass(frozen=True)
class Run:
    """What the model did with one attention implementation."""

    name: str
    tokens: list[list[int]]
    generate_seconds: float
    loss: float
    evaluate_seconds: float

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss in nats per token."""
        return math.exp(self.loss)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report; made if missing.")] = Path(
        "demo-report"
    ),
    test_tokens: Annotated[
        int, typer.Option(help="Number of test tokens for the perplexity.", min=512)
    ] = 16384,
    context: Annotated[
        int, typer.Option(help="Number of cached tokens behind which decoding is timed.", min=1)
    ] = 8192,
    benchmark: Annotated[bool, typer.Option(help="Run and draw a short benchmark.")] = True,
) -> None:
    """Run a trained language model on torch's attention and on ours, convert it, benchmark both."""
    root = _checkout()
    _need("transformers", "matplotlib")
    out.mkdir(parents=True, exist_ok=True)

    model, tokenizer, text = _load(root, test_tokens)
    from efficient_attn.integrations.patching import patch_model

    theirs = _run("sdpa", model, tokenizer, text)
    with patch_model(model) as patch:
        ours = _run("efficient_attn", model, tokenizer, text)
        patched = str(patch.report)
    prompt = text.flatten()[:context][None]
    decodings = _decoding.decode(model, prompt, console)
    estimation = _estimating.estimate(model, text.flatten()[None])
    calibration = _rows(tokenizer, "calibration", _compressing.CALIBRATION_TOKENS)
    folder = root / "examples" / "pycode_llama"
    converted = _compressing.convert_and_compare(
        folder, model, theirs.loss, text, calibration, console
    )
    trained, lossless, *_ = converted
    same = theirs.tokens == ours.tokens and len({run.tokens for run in decodings}) == 1
    same = same and lossless.same_tokens == trained.same_tokens
    difference = max(
        abs(theirs.perplexity - ours.perplexity), abs(trained.perplexity - lossless.perplexity)
    )
    console.print(_table(theirs, ours))
    console.print(f"decoding behind {prompt.shape[1]} cached tokens:", _decoding.table(decodings))
    console.print(str(estimation))
    console.print("converted to latent attention and to DiffQKV:", _compressing.table(converted))
    console.print(f"same greedy tokens: {'yes' if same else 'NO'}")
    console.print(f"difference in test perplexity: {difference:.1e}")

    figure = _benchmark(root, out) if benchmark else None
    report = out / "report.md"
    texts = [tokenizer.decode(tokens) for tokens in ours.tokens]
    decoded = _decoding.markdown(decodings, prompt.shape[1])
    decoded += f"\n## Estimating attention\n\n{estimation}. One layer of the model, forward.\n"
    trained = _compressing.trained_before(root / "bench" / "results" / "recovery-cpu.jsonl")
    _compressing.draw(converted, trained, out / "conversion.png")
    decoded += _compressing.markdown(converted, trained, "conversion.png")
    report.write_text(_markdown(theirs, ours, same, difference, patched, texts, decoded, figure))
    console.print(f"report: {report}")
    if not same or difference > TOLERANCE:
        console.print("[red]What should be the same is not.[/]")
        raise typer.Exit(1)


def _checkout() -> Path:
    root = Path(__file__).resolve().parents[2]
    if not (root / "examples" / "pycode_llama").is_dir():
        console.print(
            "The demo needs the model and the benchmarks of the repository, which an installed "
            "package does not carry. Clone the repository and type `make demo` in it."
        )
        raise typer.Exit(2)
    return root


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        console.print(
            f"The demo needs {' and '.join(missing)}: pip install 'efficient_attn[hf,bench]'."
        )
        raise typer.Exit(2)


def _load(
    root: Path, test_tokens: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.Tensor]:
    """The shipped model in fp32, its tokenizer, and rows of 512 tokens that it has never seen."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(root))
    folder = root / "examples" / "pycode_llama"
    console.print(f"model: {folder.relative_to(root)}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer, _rows(tokenizer, "test", test_tokens)


def _rows(tokenizer: PreTrainedTokenizerBase, split: str, count: int) -> torch.Tensor:
    """At most so many tokens of a split of the corpus, in rows of 512."""
    import torch

    from examples.corpus import python_sources

    tokens: list[int] = []
    for _, text in python_sources(split):
        # Quietly: a file is longer than the model's context, but it is cut into rows below.
        tokens += tokenizer(text, verbose=False)["input_ids"]
        if len(tokens) >= count:
            break
    rows = min(count, len(tokens)) // 512
    return torch.tensor(tokens[: rows * 512]).view(rows, 512)


def _run(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: torch.Tensor
) -> Run:
    """Greedy continuations and the test loss with the attention that the model has now."""
    start = time.perf_counter()
    tokens = []
    for prompt in track(PROMPTS, f"{name}: generating", console=console):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        tokens.append(output[0].tolist())
    middle = time.perf_counter()
    batches = track(text.split(4), f"{name}: test perplexity", console=console)
    loss = _compressing.mean_loss(model, batches)
    end = time.perf_counter()
    return Run(name, tokens, middle - start, loss, end - middle)


def _table(*runs: Run) -> Table:
    table = Table("attention", "test loss", "test perplexity", "evaluation", "generation")
    for run in runs:
        table.add_row(
            run.name,
            f"{run.loss:.5f} nats",
            f"{run.perplexity:.5f}",
            f"{run.evaluate_seconds:.1f} s",
            f"{run.generate_seconds:.1f} s",
        )
    return table


def _benchmark(root: Path, out: Path) -> str | None:
    """Time ours against torch in a process of its own; returns the figure's name."""
    results = out.resolve() / "benchmark.jsonl"
    bench = [sys.executable, "-m", "bench"]
    subprocess.run([*bench, "run", "--quick", "--out", str(results)], cwd=root, check=True)
    subprocess.run(
        [*bench, "plot", str(results), "--out", str(out.resolve())],
        cwd=root,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return "ratio.png" if (out / "ratio.png").exists() else None


def _markdown(
    theirs: Run,
    ours: Run,
    same: bool,
    difference: float,
    patched: str,
    texts: list[str],
    decoded: str,
    figure: str | None,
) -> str:
    rows = "\n".join(
        f"| {run.name} | {run.loss:.5f} | {run.perplexity:.5f} | {run.evaluate_seconds:.1f} | "
        f"{run.generate_seconds:.1f} |"
        for run in (theirs, ours)
    )
    verdict = "identical" if same else "DIFFERENT"
    continuations = "\n".join(f"```python\n{text}\n```\n" for text in texts)
    picture = f"## Benchmark\n\n![ratio to the fastest of torch]({figure})\n" if figure else ""
    return f"""# efficient_attn demo

A language model trained on Python's standard library, run on torch's attention and on ours.

| attention | test loss (nats) | test perplexity | evaluation (s) | generation (s) |
|---|---|---|---|---|
{rows}

- Greedy tokens of {len(texts)} prompts, and behind a long one: {verdict}.
- Difference in test perplexity: {difference:.1e} (allowed: {TOLERANCE:.0e}).

{decoded}
## What was replaced

```
{patched}
```

## What the model writes

{continuations}
{picture}"""
