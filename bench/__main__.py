"""``python -m bench``: workloads, timings, quality of models, plots and pages of results."""

from __future__ import annotations

import os
import sys

from bench.environment import keep_pages

if __name__ == "__main__":
    # The profiler that weighs memory is talkative; this is one above its highest level.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    keep_pages()

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.ceilings import measure_ceilings
from bench.compare import changes, differences_of_environment, print_changes
from bench.environment import describe, device_name
from bench.generate import llama, print_generation, time_generation
from bench.gpu import RESULTS, list_jobs, run_everything
from bench.key_driven import SHAPES, print_layers, time_layers
from bench.measure import clock_for
from bench.pages import draw_figures, filled
from bench.plot import draw
from bench.providers import PROVIDERS, Provider, left_out, reasons_against
from bench.replay import replay, replay_rows
from bench.replay_steps import step_rows, time_steps
from bench.report import ResultsFile, print_summary, read_records
from bench.runner import run_workload
from bench.suites import SUITES, select
from bench.tiles import KERNELS, architecture, case
from bench.tune import missing, search_on_this_device, told
from bench.workloads import Workload, gigaflops

app = typer.Typer(
    help=__doc__.splitlines()[0],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
# Written to a file or a pipe, tables keep the width that their names need.
console = Console(width=None if sys.stdout.isatty() else 120)

# What writes all scores has never been the fastest at the lengths of the quick run.
LEFT_OUT_OF_QUICK = {name for name in PROVIDERS if name == "eager" or "-math" in name}

Device = Annotated[str, typer.Option(help="cpu or cuda; each has workloads of its own size.")]
Suites = Annotated[
    list[str] | None,
    typer.Option("--suite", help=f"One of {', '.join(SUITES)}; may be repeated. Default: all."),
]
Match = Annotated[str, typer.Option(help="Only workloads whose name contains this text.")]
Chosen = Annotated[
    list[str] | None,
    typer.Option("--provider", help="A provider by name; may be repeated. Default: all."),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Less than a minute; without what writes all scores.")
]
Output = Annotated[Path, typer.Option(help="Where to write; made if missing.")]


@app.command("list")
def list_workloads(
    device: Device = "",
    suite: Suites = None,
    match: Match = "",
    quick: Quick = False,
    who: Annotated[
        bool, typer.Option("--who", help="Also which providers can run each workload.")
    ] = False,
) -> None:
    """Show the workloads."""
    table = Table()
    for column in ("name", "rank", "GFLOP", *(["providers"] if who else [])):
        table.add_column(column, justify="right" if column in ("rank", "GFLOP") else "left")
    for workload in _select(device, suite, match, quick):
        able = [
            n for n, p in PROVIDERS.items() if not reasons_against(p, workload, workload.device)
        ]
        cells = [workload.name, str(workload.rank), gigaflops(workload)]
        table.add_row(*cells, *([", ".join(able)] if who else []))
    Console(width=max(console.width, 160) if who else None).print(table)
    if who:
        for kind in dict.fromkeys(w.device for w in _select(device, suite, match, quick)):
            _say_who_is_left_out(PROVIDERS.values(), kind)


@app.command()
def run(
    device: Device = "cpu",
    suite: Suites = None,
    match: Match = "",
    provider: Chosen = None,
    quick: Quick = False,
    seconds: Annotated[
        float | None, typer.Option(help="Time for each provider on each workload.")
    ] = None,
    out: Output = Path("bench-out/results.jsonl"),
) -> None:
    """Check, then time, and write one JSON line for each workload and provider."""
    if device == "cuda":
        _need_cuda()
    workloads = _select(device, suite, match, quick)
    if not workloads:
        raise typer.BadParameter("no workload fits; see `python -m bench list`.")
    seconds = seconds if seconds is not None else (0.3 if quick else 1.0)
    clock = clock_for(device)
    dtypes = sorted({workload.dtype for workload in workloads})
    chosen = _providers(provider)
    if quick and not provider:
        chosen = [each for each in chosen if each.name not in LEFT_OUT_OF_QUICK]
    with ResultsFile(out) as results:
        results.write({"kind": "environment", **describe(device)})
        results.write(measure_ceilings(device, clock, dtypes))
        for workload in track(workloads, "timing", console=console, transient=True):
            run_workload(workload, chosen, device, clock, results.write, seconds=seconds)
    print_summary(read_records(out), console)
    console.print(f"records: {out}")


@app.command()
def generate(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    context: Annotated[
        list[int] | None,
        typer.Option(help="Cached tokens; may be repeated. Default: 8192, 32768 and 131072."),
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens generated in each round.")] = 8,
    out: Output = Path("bench-out/generate.jsonl"),
) -> None:
    """Time ``generate()`` of a random Llama at long context: decoding alone, torch against ours."""
    if device == "cuda":
        _need_cuda()
    with ResultsFile(out) as results:
        results.write({"kind": "environment", **describe(device)})
        model = llama(layers, device)
        for length in context or (8192, 32768, 131072):
            time_generation(model, length, results.write, tokens=tokens)
    print_generation(read_records(out), console)
    console.print(f"records: {out}")


@app.command("key-driven")
def key_driven(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="Time for each contender, part and mode.")] = 2.0,
    out: Output = Path("bench-out/key-driven.jsonl"),
) -> None:
    """Time layers with uneven groups: a training step, inference, and the making of the map."""
    if device == "cuda":
        _need_cuda()
    clock = clock_for(device)
    with ResultsFile(out) as results:
        results.write({"kind": "environment", **describe(device)})
        results.write(measure_ceilings(device, clock, ["float32"]))
        for shape in track(SHAPES, "timing", console=console, transient=True):
            time_layers(shape, device, clock, results.write, seconds=seconds)
    print_layers(read_records(out), console)
    console.print(f"records: {out}")


@app.command("replay")
def replay_sigma(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    prefix: Annotated[
        list[int] | None,
        typer.Option(help="Cached tokens; may be repeated. Default: 2048, 4096, 16384 and 32768."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of decoding: bfloat16, float16 or float32.")
    ] = "bfloat16",
    step_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of a prefill and a training step in fp32; 0: none.")
    ] = 1024,
    out: Output = Path("bench-out/replay.jsonl"),
) -> None:
    """Replay the decoding experiment of the Sigma paper, without a cache that copies itself.

    Then time a prefill and a training step of one layer, which the paper does not.
    """
    if device == "cuda":
        _need_cuda()
    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"dtype is {dtype!r}; it must be bfloat16, float16 or float32.")
    with ResultsFile(out) as results:
        results.write({"kind": "environment", **describe(device)})
        for length in prefix or (2048, 4096, 16384, 32768):
            replay(length, getattr(torch, dtype), device, results.write)
        if step_tokens:
            clock = clock_for(device)
            time_steps(step_tokens, torch.float32, device, clock, results.write)
    for rows_of in (replay_rows, step_rows):
        heads, *rows = rows_of(read_records(out))
        table = Table(*heads)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"records: {out}")


@app.command()
def quality(
    model: Annotated[
        list[str] | None, typer.Option(help="Only models whose name contains this; repeatable.")
    ] = None,
    size: Annotated[
        list[int] | None, typer.Option(help="Only b = m of 16, 32 or 64; repeatable.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in a text, at most 512.")] = 512,
    rows: Annotated[int, typer.Option(help="Texts for each model.")] = 8,
    seeds: Annotated[int, typer.Option(help="How often what is random is drawn anew.")] = 1,
    out: Output = Path("bench-out/quality.jsonl"),
) -> None:
    """Measure what HyperAttention costs two trained models, beside a window of equal cost."""
    from bench.quality import MODELS, SIZES, measure

    models = _models(MODELS, model)
    with ResultsFile(out) as results:
        results.write({"kind": "environment", **describe("cpu")})
        measure(
            results.write, models=models, sizes=size or SIZES, length=length, rows=rows, seeds=seeds
        )
    console.print(f"records: {out}")


@app.command()
def conversion(
    budget: Annotated[
        list[int] | None, typer.Option(help="Cached numbers per token and layer; repeatable.")
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="budget, ladder or lever; repeatable. Default: all.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of text to judge by.")] = 12,
    length: Annotated[int, typer.Option(help="Tokens in a row.")] = 512,
    calibration_rows: Annotated[int, typer.Option(help="Rows of text to calibrate on.")] = 48,
    out: Output = Path("bench-out/conversion.jsonl"),
) -> None:
    """Measure what a smaller cache costs the example model after conversion to MLA."""
    from bench.conversion import BUDGETS, PARTS, measure

    if not set(part or ()) <= set(PARTS):
        raise typer.BadParameter(f"part is {part}; there are {', '.join(PARTS)}.")
    with ResultsFile(out) as results:
        results.write({"kind": "environment", **describe("cpu")})
        measure(
            results.write,
            budgets=budget or BUDGETS,
            parts=part or PARTS,
            rows=rows,
            length=length,
            calibration_rows=calibration_rows,
        )
    console.print(f"records: {out}")


@app.command()
def recovery(
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Share of the cache that is left, 1 for the source; repeatable."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of 2,048 tokens after each conversion.")] = 120,
    out: Output = Path("bench-out/recovery.jsonl"),
) -> None:
    """Measure what training gives back to the example model after conversion to a smaller cache."""
    from bench.recovery import RATIOS, RECIPE, measure

    with ResultsFile(out) as results:
        results.write({"kind": "environment", **describe("cpu")})
        measure(results.write, recipe=replace(RECIPE, steps=steps), ratios=ratio or RATIOS)
    console.print(f"records: {out}")


@app.command()
def grouping(
    model: Annotated[
        list[str] | None, typer.Option(help="Only models whose name contains this; repeatable.")
    ] = None,
    heads: Annotated[
        list[int] | None, typer.Option(help="Only so many heads left; repeatable.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in a text, at most 512.")] = 128,
    rows: Annotated[int, typer.Option(help="Texts for each model.")] = 64,
    out: Output = Path("bench-out/grouping.jsonl"),
) -> None:
    """Measure what two trained models lose when their key and value heads are shared."""
    from bench.grouping import MODELS, measure

    models = _models(MODELS, model)
    with ResultsFile(out) as results:
        results.write({"kind": "environment", **describe("cpu")})
        measure(results.write, models=models, counts=heads, length=length, rows=rows)
    console.print(f"records: {out}")


@app.command()
def diffqkv(
    rows: Annotated[int, typer.Option(help="Rows of text to judge by.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens in a row, at most 2048.")] = 512,
    calibration_rows: Annotated[int, typer.Option(help="Rows of text to calibrate on.")] = 64,
    out: Output = Path("bench-out/diffqkv.jsonl"),
) -> None:
    """Measure what the example model loses when it gets fewer key heads, by rule."""
    from bench.diffqkv import measure

    with ResultsFile(out) as results:
        results.write({"kind": "environment", **describe("cpu")})
        measure(results.write, length=length, rows=rows, calibration_rows=calibration_rows)
    console.print(f"records: {out}")


@app.command()
def gpu(
    out: Output = Path("bench-out/gpu"),
    minutes: Annotated[float, typer.Option(help="Time for everything together.")] = 9.0,
    suite: Suites = None,
    match: Match = "",
    provider: Chosen = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the stages and why each is skipped; no GPU.")
    ] = False,
) -> None:
    """Do all that needs a GPU, most valuable first, until the time is spent.

    Ceilings, the GPU-marked tests, probes of torch's ops, the suites by rank, and in what time is
    left, tiles of the Triton kernels. Every result is written as it comes, so the run may be killed
    at any moment.
    """
    workloads = _select("cuda", suite, match, False)
    if dry_run:
        table = Table("stage", "likely s", "skipped because")
        for job in list_jobs(
            workloads, minutes=minutes, reason="this is a dry run", kernels=KERNELS
        ):
            table.add_row(job["job"], f"{job['likely_seconds']:.0f}", job["reason"])
        console.print(table)
        _say_who_is_left_out(_providers(provider), "cuda")
        return
    _need_cuda()
    records = run_everything(
        out,
        workloads,
        _providers(provider),
        minutes=minutes,
        kernels=KERNELS,
        say=console.print,
    )
    print_summary(records, console)
    console.print(f"records: {out / RESULTS}")


@app.command()
def tune(
    kernel: Annotated[str, typer.Argument(help=f"One of {', '.join(KERNELS)}.")],
    dim: Annotated[int, typer.Option(help="Head dim of queries and keys.")] = 128,
    value_dim: Annotated[int | None, typer.Option(help="Head dim of values; default: dim.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    window: Annotated[int | None, typer.Option(help="Keys visible on the left.")] = None,
    rows: Annotated[
        int, typer.Option(help="Query rows on one key head, for a cache: 16, 32 or 64.")
    ] = 16,
    most: Annotated[int, typer.Option(help="How many tiles to try.")] = 32,
    seconds: Annotated[float, typer.Option(help="Time for each tile, besides compiling.")] = 0.3,
    minutes: Annotated[float, typer.Option(help="Time for everything together.")] = 8.0,
    out: Output = Path("bench-out/tune.jsonl"),
) -> None:
    """Search the tile of a Triton kernel on the GPU at hand, and print the entry for its table.

    Each tile is compiled and compared with fp64 before it is timed; one that fails costs itself.
    """
    if reasons := missing():
        console.print(f"A tile cannot be tuned here: {'; '.join(reasons)}.", soft_wrap=True)
        raise typer.Exit(2)
    options = {"dims": (dim, value_dim or dim), "dtype": dtype, "window": window, "rows": rows}
    try:
        tuned = case(kernel, architecture(), **options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with ResultsFile(out) as results:
        results.write({"kind": "environment", **describe("cuda")})
        found = search_on_this_device(tuned, most=most, seconds=seconds, timeout=60 * minutes)
        results.write(found)
    console.print(told(found, device_name("cuda")), soft_wrap=True, highlight=False, markup=False)
    console.print(f"records: {out}")


@app.command()
def plot(
    results: Annotated[Path, typer.Argument(help="A file that run or gpu wrote.", exists=True)],
    out: Output = Path("bench-out"),
) -> None:
    """Draw what the results hold: ratio.png, time.png, quality.png, conversion.png and so on."""
    for path in draw(read_records(results), out):
        console.print(str(path))


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="The older results.", exists=True)],
    after: Annotated[Path, typer.Argument(help="The newer results.", exists=True)],
) -> None:
    """Tell what became slower or faster beyond noise; exit code 1 if anything became slower."""
    old, new = read_records(before), read_records(after)
    for difference in differences_of_environment(old, new):
        console.print(f"[yellow]different environment[/] {difference}")
    found = changes(old, new)
    print_changes(found, console)
    if any(change.verdict == "slower" for change in found):
        raise typer.Exit(1)


@app.command()
def docs(
    page: Annotated[Path, typer.Argument(help="A page in Markdown.", exists=True)],
) -> None:
    """Make the tables of a page of the documentation anew from the results that it names.

    Beside the table of goals stand rooflines, which are drawn into the folder of the page's name.
    """
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    for path in draw_figures(page):
        console.print(str(path))


def _select(device: str, suite: list[str] | None, match: str, quick: bool) -> list[Workload]:
    if device not in ("", "cpu", "cuda"):
        raise typer.BadParameter(f"device is {device!r}; it must be cpu or cuda.")
    try:
        return select(device=device or None, suites=suite, match=match, quick=quick)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _models(known: Iterable[type], names: list[str] | None) -> list[type]:
    """Those whose name contains one of ``names``; all of them where there are none."""
    models = [m for m in known if not names or any(name in m.name for name in names)]
    if not models:
        raise typer.BadParameter(f"no model fits; there are {[m.name for m in known]}.")
    return models


def _providers(names: list[str] | None) -> list[Provider]:
    unknown = sorted(set(names or ()) - set(PROVIDERS))
    if unknown:
        raise typer.BadParameter(f"unknown providers {unknown}; there are {sorted(PROVIDERS)}.")
    return [PROVIDERS[name] for name in names or PROVIDERS]


def _say_who_is_left_out(providers: Iterable[Provider], device: str) -> None:
    for reason, names in left_out(providers, device).items():
        console.print(f"left out on {device}: {', '.join(names)} ({reason})", highlight=False)


def _need_cuda() -> None:
    if not torch.cuda.is_available():
        console.print(
            "No CUDA device is visible, or this torch was built without CUDA. "
            "`python -m bench run` does what a CPU can do."
        )
        raise typer.Exit(2)


if __name__ == "__main__":
    app(prog_name="python -m bench")
