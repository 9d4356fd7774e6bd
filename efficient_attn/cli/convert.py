"""``efficient-attn convert``: one verb per kind of attention that a model is converted to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from efficient_attn.cli._converting import (
    Bounds,
    carry_out,
    errors_in_one_line,
    fail,
    text_or_images,
)

app = typer.Typer(help="Convert the attention of a checkpoint.", no_args_is_help=True)

Src = Annotated[Path, typer.Argument(help="Folder of the model: config.json and safetensors.")]
Dst = Annotated[Path, typer.Argument(help="Folder of the output; appears when it is complete.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ...; by default the source's.")]
CalibTokens = Annotated[int, typer.Option(help="Tokens of it to use.", min=2)]
CalibLength = Annotated[
    int, typer.Option(help="Tokens in a row: as far back as attention is seen to look.", min=2)
]
Device = Annotated[str, typer.Option(help="Where the calibration text is computed: cpu or cuda.")]
MaxMemory = Annotated[
    float | None, typer.Option(help="Gigabytes; refuse what is estimated to take more.")
]
ShardSize = Annotated[
    float | None, typer.Option(help="Gigabytes that no file of the output exceeds.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted conversion.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the checkpoint at DST.")]
Report = Annotated[
    Path | None, typer.Option(help="Also write the report here, as JSON, and as Markdown beside.")
]
Verify = Annotated[
    str,
    typer.Option(
        help="With --text: none, quick, or full, which adds long positions and, for compress, what "
        "part of the loss is due to turning less."
    ),
]
Text = Annotated[
    Path | None, typer.Option(help="A text to verify the output on; not one used in choosing it.")
]
Images = Annotated[
    Path | None,
    typer.Option(help="For a ViT: a folder of images, or an .npy file, to verify the output on."),
]
Tokens = Annotated[
    int, typer.Option(help="Tokens of the text, or of the images, to verify on.", min=2)
]
MinCosine = Annotated[
    float | None,
    typer.Option(help="Fail if embeddings of an encoder are less alike; with --text or --images."),
]
MaxKl = Annotated[
    float | None, typer.Option(help="Fail if the mean KL divergence is above this; with --text.")
]
MaxPplRatio = Annotated[
    float | None, typer.Option(help="Fail if perplexity grows by more than this; with --text.")
]


@app.command()
def mla(
    src: Src,
    dst: Dst,
    mode: Annotated[
        str, typer.Option(help="exact or rorope (lossless), or compress (a smaller cache).")
    ] = "rorope",
    target: Annotated[
        str, typer.Option(help="native, hf-deepseek (stock transformers) or engine.")
    ] = "native",
    dtype: Dtype = None,
    kv_ratio: Annotated[
        float | None, typer.Option(help="Cached numbers per token, as a share of the source's.")
    ] = None,
    kv_budget: Annotated[
        int | None, typer.Option(help="Cached bytes per token of all layers, instead.")
    ] = None,
    kv_lora_rank: Annotated[
        int | None, typer.Option(help="Cached numbers of the latent in each layer, instead.")
    ] = None,
    rope_dim: Annotated[
        int | None, typer.Option(help="Cached numbers of the rotary key; chosen if left out.")
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Give layers different sizes; native only.")
    ] = False,
    q_lora_rank: Annotated[
        int | None, typer.Option(help="Make queries from a latent of so many numbers.")
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(help="A text to fit compress or rorope to; keep it apart from --text."),
    ] = None,
    calib_tokens: CalibTokens = 65536,
    calib_length: CalibLength = 512,
    paper: Annotated[
        bool, typer.Option("--paper", help="The choices of TransMLA, for comparison.")
    ] = False,
    rotation: Annotated[
        str | None, typer.Option(help="none, real, unitary or query-aware (default).")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Of the latent: plain, balanced or output (default).")
    ] = None,
    center: Annotated[
        bool | None, typer.Option("--center/--no-center", help="Whether means are left out.")
    ] = None,
    fold: Annotated[
        str | None,
        typer.Option(
            help="Neighbouring frequencies taken for one (FreqFold), or auto; 1, with --paper auto."
        ),
    ] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Fit each layer behind converted ones.")
    ] = False,
    weigh_tokens: Annotated[
        bool, typer.Option("--weigh-tokens", help="Weigh tokens of the text by their loss.")
    ] = False,
    factor: Annotated[
        str,
        typer.Option(help="In mode exact: selector; svd or random-orthogonal to train further."),
    ] = "selector",
    seed: Annotated[int, typer.Option(help="Of random factors.", min=0)] = 0,
    allow_larger_cache: Annotated[
        bool, typer.Option("--allow-larger-cache", help="Convert although the cache would grow.")
    ] = False,
    allow_rope_approx: Annotated[
        bool,
        typer.Option(
            "--allow-rope-approx", help="For engine: the rotary table nearest to a scaled."
        ),
    ] = False,
    tp: Annotated[
        int | None, typer.Option(help="Devices that will share the heads, for the report.")
    ] = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    shard_size: ShardSize = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    force: Force = False,
    report: Report = None,
    verify: Verify = "quick",
    text: Text = None,
    text_tokens: Tokens = 16384,
    max_kl: MaxKl = None,
    max_ppl_ratio: MaxPplRatio = None,
) -> None:
    """To multi-head latent attention (MLA)."""
    with errors_in_one_line():
        from efficient_attn.convert.mla import CompressOptions

        fold = fold or ("auto" if paper else "1")
        if fold != "auto" and not fold.isdecimal():
            fail(f"--fold is {fold!r}; pass a number or auto.")
        folded = None if fold == "auto" else int(fold)
        own = {"rotation": rotation, "metric": metric, "center": center}
        own = {name: value for name, value in own.items() if value is not None}
        choices = CompressOptions.paper(fold=folded) if paper else CompressOptions(fold=folded)
        choices = replace(choices, sequential=sequential, weigh_tokens=weigh_tokens, **own)
    carry_out(
        src,
        dst,
        "mla",
        {"dry_run": dry_run, "resume": resume, "force": force},
        {
            "mode": mode,
            "target": target,
            "dtype": dtype,
            "kv_ratio": kv_ratio,
            "kv_budget": kv_budget,
            "kv_lora_rank": kv_lora_rank,
            "rope_dim": rope_dim,
            "per_layer": per_layer,
            "q_lora_rank": q_lora_rank,
            "calib": calib,
            "calib_tokens": calib_tokens,
            "calib_length": calib_length,
            "choices": choices,
            "factor": factor,
            "seed": seed,
            "allow_larger_cache": allow_larger_cache,
            "allow_rope_approx": allow_rope_approx,
            "tp": tp,
            "device": device,
            "max_memory": max_memory,
            "shard_size": shard_size,
        },
        report,
        Bounds(text, text_tokens, max_kl, max_ppl_ratio, verify),
    )


@app.command()
def gqa(
    src: Src,
    dst: Dst,
    num_kv_heads: Annotated[int, typer.Option(help="Key and value heads that are left.")],
    partition: Annotated[
        str, typer.Option(help="Who shares: consecutive, clustered, searched or searched-even.")
    ] = "searched-even",
    pooling: Annotated[
        str, typer.Option(help="What is shared: mean, first, norm, aligned, svd or fitted.")
    ] = "fitted",
    calib: Annotated[
        Path | None,
        typer.Option(help="A text, or images, to fit heads to; keep it apart from --text."),
    ] = None,
    calib_tokens: CalibTokens = 65536,
    calib_length: CalibLength = 512,
    seed: Annotated[int, typer.Option(help="Of the search for groups.")] = 0,
    dtype: Dtype = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    shard_size: ShardSize = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    force: Force = False,
    report: Report = None,
    verify: Verify = "quick",
    text: Text = None,
    images: Images = None,
    text_tokens: Tokens = 16384,
    max_kl: MaxKl = None,
    max_ppl_ratio: MaxPplRatio = None,
    min_cosine: MinCosine = None,
) -> None:
    """To fewer key and value heads (GQA): of decoders, BERT, and ViT of transformers or timm."""
    carry_out(
        src,
        dst,
        "gqa",
        {"dry_run": dry_run, "resume": resume, "force": force},
        {
            "num_kv_heads": num_kv_heads,
            "partition": partition,
            "pooling": pooling,
            "calib": calib,
            "calib_tokens": calib_tokens,
            "calib_length": calib_length,
            "seed": seed,
            "dtype": dtype,
            "device": device,
            "max_memory": max_memory,
            "shard_size": shard_size,
        },
        report,
        Bounds(
            text_or_images(text, images), text_tokens, max_kl, max_ppl_ratio, verify, min_cosine
        ),
    )


@app.command()
def diffqkv(
    src: Src,
    dst: Dst,
    key_heads: Annotated[int, typer.Option(help="Key heads of the output.")],
    value_heads: Annotated[
        int | None, typer.Option(help="Value heads of the output; by default the source's.")
    ] = None,
    merge: Annotated[
        str, typer.Option(help="How key heads become one: mean, select or complex_svd.")
    ] = "complex_svd",
    calib: Annotated[
        Path | None, typer.Option(help="A text to fit heads to; keep it apart from --text.")
    ] = None,
    calib_tokens: CalibTokens = 65536,
    augmented_query_dim: Annotated[
        int, typer.Option(help="Inner width of an augmented query to train; 0 for none.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the augmented query's first weights.")] = 0,
    dtype: Dtype = None,
    max_memory: MaxMemory = None,
    shard_size: ShardSize = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    force: Force = False,
    report: Report = None,
    verify: Verify = "quick",
    text: Text = None,
    text_tokens: Tokens = 16384,
    max_kl: MaxKl = None,
    max_ppl_ratio: MaxPplRatio = None,
) -> None:
    """To fewer key heads than value heads (DiffQKV)."""
    carry_out(
        src,
        dst,
        "diffqkv",
        {"dry_run": dry_run, "resume": resume, "force": force},
        {
            "key_heads": key_heads,
            "value_heads": value_heads,
            "merge": merge,
            "calib": calib,
            "calib_tokens": calib_tokens,
            "augmented_query_dim": augmented_query_dim,
            "seed": seed,
            "dtype": dtype,
            "max_memory": max_memory,
            "shard_size": shard_size,
        },
        report,
        Bounds(text, text_tokens, max_kl, max_ppl_ratio, verify),
    )
