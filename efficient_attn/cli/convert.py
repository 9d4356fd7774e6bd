"""``efficient-attn convert``: one verb per kind of attention that a model is converted to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from efficient_attn.cli._converting import carry_out, errors_in_one_line

app = typer.Typer(help="Convert the attention of a checkpoint.", no_args_is_help=True)

Src = Annotated[Path, typer.Argument(help="Folder of the model: config.json and safetensors.")]
Dst = Annotated[Path, typer.Argument(help="Folder of the output; appears when it is complete.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ...; by default the source's.")]
CalibTokens = Annotated[int, typer.Option(help="Tokens of it to use.", min=2)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted conversion.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the checkpoint at DST.")]
Report = Annotated[
    Path | None, typer.Option(help="Also write the report here, as JSON, and as Markdown beside.")
]
Text = Annotated[
    Path | None, typer.Option(help="A text to verify the output on; not one used in choosing it.")
]
Tokens = Annotated[int, typer.Option(help="Tokens of the text to verify on.", min=2)]
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
    kv_lora_rank: Annotated[int | None, typer.Option(help="Cached numbers of the latent.")] = None,
    rope_dim: Annotated[int | None, typer.Option(help="Cached numbers of the rotary key.")] = None,
    calib: Annotated[
        Path | None, typer.Option(help="A text to fit compress to; keep it apart from --text.")
    ] = None,
    calib_tokens: CalibTokens = 65536,
    paper: Annotated[
        bool, typer.Option("--paper", help="The choices of TransMLA, for comparison.")
    ] = False,
    fold: Annotated[
        int, typer.Option(help="Neighbouring frequencies taken for one (FreqFold).", min=1)
    ] = 1,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Fit each layer behind converted ones.")
    ] = False,
    weigh_tokens: Annotated[
        bool, typer.Option("--weigh-tokens", help="Weigh tokens of the text by their loss.")
    ] = False,
    allow_larger_cache: Annotated[
        bool, typer.Option("--allow-larger-cache", help="Convert although the cache would grow.")
    ] = False,
    dry_run: DryRun = False,
    resume: Resume = False,
    force: Force = False,
    report: Report = None,
    text: Text = None,
    text_tokens: Tokens = 16384,
    max_kl: MaxKl = None,
    max_ppl_ratio: MaxPplRatio = None,
) -> None:
    """To multi-head latent attention (MLA)."""
    with errors_in_one_line():
        from efficient_attn.convert.mla import CompressOptions

        choices = CompressOptions.paper(fold=fold) if paper else CompressOptions(fold=fold)
        choices = replace(choices, sequential=sequential, weigh_tokens=weigh_tokens)
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
            "kv_lora_rank": kv_lora_rank,
            "rope_dim": rope_dim,
            "calib": calib,
            "calib_tokens": calib_tokens,
            "choices": choices,
            "allow_larger_cache": allow_larger_cache,
        },
        report,
        (text, text_tokens, max_kl, max_ppl_ratio),
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
        Path | None, typer.Option(help="A text to fit heads to; keep it apart from --text.")
    ] = None,
    calib_tokens: CalibTokens = 65536,
    seed: Annotated[int, typer.Option(help="Of the search for groups.")] = 0,
    dtype: Dtype = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    force: Force = False,
    report: Report = None,
    text: Text = None,
    text_tokens: Tokens = 16384,
    max_kl: MaxKl = None,
    max_ppl_ratio: MaxPplRatio = None,
) -> None:
    """To fewer key and value heads (GQA), which stock classes load where groups are even."""
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
            "seed": seed,
            "dtype": dtype,
        },
        report,
        (text, text_tokens, max_kl, max_ppl_ratio),
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
    augmented_query_dim: Annotated[
        int, typer.Option(help="Inner width of an augmented query to train; 0 for none.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the augmented query's first weights.")] = 0,
    dtype: Dtype = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    force: Force = False,
    report: Report = None,
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
            "augmented_query_dim": augmented_query_dim,
            "seed": seed,
            "dtype": dtype,
        },
        report,
        (text, text_tokens, max_kl, max_ppl_ratio),
    )
