"""What a smaller cache costs the example model after conversion to latent attention.

Every number of cached numbers is tried with what the converter does by default and with the choices
of TransMLA, the best that there are for the model. Everything that is chosen by its results is
chosen on other text than what is reported.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bench.environment import ROOT
from bench.runner import Write
from efficient_attn.convert.activations import Activations
from efficient_attn.convert.attending import in_fp32, latent_attention
from efficient_attn.convert.attention_weights import LatentAttentionWeights
from efficient_attn.convert.checkpoint import Checkpoint
from efficient_attn.convert.mla import (
    CompressOptions,
    best_choice,
    calibrate,
    compress,
    error_curve,
    rank_beside,
    shared_table,
    turning_gains,
)
from efficient_attn.convert.mla.sizes import SHARES, sizes_by_layer
from efficient_attn.convert.mla_output import refit_output, wanted_behind
from efficient_attn.convert.source import Source
from efficient_attn.integrations.converted import replace_attention

FOLDER = ROOT / "examples" / "pycode_llama"
# Cached numbers per token and layer; the model has 128.
BUDGETS = (128, 96, 64, 48, 32, 24, 16)
PARTS = ("budget", "ladder", "lever")
# Those at which every lever is moved: a half, a quarter and an eighth.
PLACES = (64, 32, 16)
DEFAULT = CompressOptions()
# Before the last step, for that takes longest, and moves all of them alike.
BEFORE = replace(DEFAULT, refit_output=False)
LEVERS = {
    "real rotation": {"rotation": "real"},
    "unitary rotation": {"rotation": "unitary"},
    "no rotation": {"rotation": "none"},
    "two frequencies folded": {"fold": 2},
    "balanced metric": {"metric": "balanced"},
    "plain metric": {"metric": "plain"},
    "no shrinking": {"shrink": False},
    "not centred": {"center": False},
    "no bias on the output": {"output_bias": False},
    "damped by 0.001": {"damping": 1e-3},
    "damped by 0.01": {"damping": 1e-2},
    "not refined": {"refine": 0},
    "refined twice as long": {"refine": 16},
    "neither refined nor refitted": {"refine": 0, "refit": False},
}
PER_LAYER = "sizes for each layer"
REACHED = ".. and pairs are mixed by what queries need"
# From TransMLA's choices to the default, one after the other, but for the last.
LADDER = {
    "TransMLA, but the worst to lose stay turned": {"selection": "cost"},
    ".. and means are left out": {"center": True, "output_bias": True},
    ".. and the latent minimises the output's error": {"metric": "output"},
    ".. and what is not turned shrinks to its mean": {"shrink": True},
    ".. and what reads the cache is regressed": {"refit": True},
    ".. and the cache on what reads it, in turns": {"refine": DEFAULT.refine},
    REACHED: {"rotation": DEFAULT.rotation},
}


@dataclass(frozen=True)
class Text:
    """Rows of tokens, and the loss of the model as it was on every token but the first."""

    name: str
    ids: Tensor
    exact: Tensor


class Specimen:
    """The example model, its layers, what they do on calibration text, and text to judge by.

    Args:
        rows: Rows of text to judge by.
        length: Tokens in a row.
        calibration_rows: Rows to calibrate on.
    """

    def __init__(self, rows: int, length: int, calibration_rows: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from examples.corpus import python_sources

        self.model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(FOLDER)
        self.source = Source.open(Checkpoint.open(FOLDER))
        self.layers = [self.source.attention(i) for i in range(self.source.num_layers)]
        self.numbers = 2 * len(self.layers[0].key)

        def tokens(split: str, part: slice) -> list[int]:
            texts = [text for _, text in python_sources(split)][part]
            return [t for text in texts for t in tokenizer(text, verbose=False)["input_ids"]]

        # The files of one split by turns: one to calibrate on, one to choose by.
        chosen = tokens("calibration", slice(0, None, 2))
        self.calibration = _rows(chosen, calibration_rows, length)
        self.moments = self._moments(self.calibration)
        texts = {"selection": ("calibration", slice(1, None, 2)), "held out": ("test", slice(None))}
        self.texts = {}
        for name, where in texts.items():
            ids = _rows(tokens(*where), rows, length)
            self.texts[name] = Text(name, ids, token_losses(self.model, ids))

    def convert(
        self,
        numbers: int,
        rope_dim: int,
        options: CompressOptions,
        table: Tensor | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[list[LatentAttentionWeights], float]:
        """All layers with so many cached numbers, and the sum of their expected errors.

        Layers may have ``sizes`` of their own, numbers and how many of them are turned.
        """
        made, error = [], 0.0
        sizes = [(numbers, rope_dim)] * len(self.layers) if sizes is None else sizes
        flow, behind = (Activations(self.source, self.calibration) for _ in range(2))
        for weights, moments, (count, turned) in zip(self.layers, self.moments, sizes, strict=True):
            found = compress(
                weights,
                moments,
                kv_lora_rank=rank_beside(weights, count, turned),
                rope_dim=turned,
                options=options,
                frequencies=table,
            )
            error += found.key_error + found.value_error
            fitted = found.weights
            if options.refit_output:
                wanted = wanted_behind(flow, behind, weights)
                fitted = refit_output(fitted, wanted, bias=options.output_bias)
                flow.advance()
                behind.advance(partial(latent_attention, in_fp32(fitted)))
            made.append(fitted)
        return made, error

    def sizes(self, numbers: int, options: CompressOptions) -> list[tuple[int, int]]:
        """Numbers of each layer, as many altogether, and how many of them are turned."""
        shares = sorted({min(int(share * numbers), self.numbers) for share in SHARES})
        curves = [
            {n: error_curve(weights, moments, n, options) for n in shares}
            for weights, moments in zip(self.layers, self.moments, strict=True)
        ]
        return sizes_by_layer(curves, options.fold, numbers * len(self.layers))

    def rope_dim(self, numbers: int, options: CompressOptions, table=None) -> int:
        """How many of the numbers to turn."""
        return best_choice(
            error_curve(weights, moments, numbers, options, table=table)
            for weights, moments in zip(self.layers, self.moments, strict=True)
        )[1]

    def table(self, count: int) -> Tensor:
        """So many frequencies, the same for all layers."""
        gains = [turning_gains(w, m) for w, m in zip(self.layers, self.moments, strict=True)]
        return shared_table(gains, self.layers[0].inverse_frequencies, count)

    def grid(self, count: int) -> Tensor:
        """So many frequencies of a default rotary table over the range of the source's."""
        slowest = self.layers[0].inverse_frequencies[-1].double()
        return slowest ** (torch.arange(count, dtype=torch.float64) / max(count - 1, 1))

    def judge(self, weights: Sequence[LatentAttentionWeights], text: Text) -> dict:
        """Perplexity of the converted model, and what conversion adds to the loss."""
        model = replace_attention(copy.deepcopy(self.model), weights)
        losses = token_losses(model, text.ids)
        change = (losses - text.exact).mean(-1)
        return {
            "text": text.name,
            "perplexity": math.exp(float(losses.mean())),
            "change": float(change.mean()),
            "change_error": float(change.std() / math.sqrt(len(change))),
        }

    @torch.no_grad()
    def _moments(self, ids: Tensor) -> list:
        """Of every layer's inputs, which are all kept: the model is small."""
        inputs: list[list[Tensor]] = [[] for _ in self.layers]
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs, kept=kept: kept.append(kwargs["hidden_states"]),
                with_kwargs=True,
            )
            for layer, kept in zip(self.model.model.layers, inputs, strict=True)
        ]
        for batch in ids.split(4):
            self.model(batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        return [calibrate(w, each) for w, each in zip(self.layers, inputs, strict=True)]


def measure(
    write: Write,
    *,
    budgets: Sequence[int] = BUDGETS,
    parts: Sequence[str] = PARTS,
    rows: int = 12,
    length: int = 512,
    calibration_rows: int = 48,
) -> None:
    """Perplexity by cached numbers, the converter's default beside TransMLA, and of every lever."""
    specimen = Specimen(rows, length, calibration_rows)
    held_out, selection = specimen.texts["held out"], specimen.texts["selection"]

    def record(variant, part, numbers, rope_dim, made, text, **more):
        write(
            {
                "kind": "conversion",
                "model": "pycode_llama",
                "variant": variant,
                "part": part,
                "numbers": numbers,
                "of_numbers": specimen.numbers,
                "rope_dim": rope_dim,
                **specimen.judge(made[0], text),
                "expected_error": made[1],
                **more,
            }
        )

    for text in (held_out, selection):
        loss = float(text.exact.mean())
        write(
            {"kind": "conversion", "model": "pycode_llama", "variant": "original", "part": "source"}
            | {"numbers": specimen.numbers, "of_numbers": specimen.numbers, "text": text.name}
            | {"perplexity": math.exp(loss), "change": 0.0, "change_error": 0.0}
            | {"tokens": text.ids.numel()}
        )
    for numbers in budgets:
        chosen = specimen.rope_dim(numbers, DEFAULT)
        if "budget" in parts:
            made = specimen.convert(numbers, chosen, DEFAULT)
            record("default", "budget", numbers, chosen, made, held_out)
            if numbers in PLACES:
                _of_targets(specimen, record, numbers, held_out)
            _best_of_paper(specimen, record, numbers, held_out, selection)
        moved = {
            "ladder": _ladder(),
            "lever": {k: replace(BEFORE, **v) for k, v in LEVERS.items()},
        }
        for part in parts:
            for name, options in moved.get(part, {}).items() if numbers in PLACES else ():
                made = specimen.convert(numbers, chosen, options)
                record(name, part, numbers, chosen, made, held_out)
        if "lever" in parts and numbers in PLACES:
            sizes = specimen.sizes(numbers, BEFORE)
            made = specimen.convert(numbers, chosen, BEFORE, sizes=sizes)
            record(PER_LAYER, "lever", numbers, None, made, held_out, sizes=sizes)


def _ladder() -> dict[str, CompressOptions]:
    """From the published choices to the default, step by step."""
    options, found = CompressOptions.paper(fold=1), {}
    for name, change in LADDER.items():
        options = replace(options, **change)
        found[name] = options
    return found


def _of_targets(specimen, record, numbers, held_out) -> None:
    """The default under the tables that stock models can turn by."""
    for name, table in (("one table", specimen.table), ("a grid", specimen.grid)):
        rope_dim = specimen.rope_dim(numbers, DEFAULT, table)
        made = specimen.convert(numbers, rope_dim, DEFAULT, table(rope_dim // 2))
        record(name, "budget", numbers, rope_dim, made, held_out)


def _best_of_paper(specimen, record, numbers, held_out, selection) -> None:
    """The sizes and the fold of TransMLA with the least loss on the selection text."""
    dim = specimen.layers[0].head_dim
    pairs = dim // 2
    found = []
    for collapse in (1, 2, 4):
        for fold in (collapse, 2 * collapse, 4 * collapse):
            rope_dim = dim // collapse
            if rope_dim < numbers and pairs % fold == 0:
                made = specimen.convert(numbers, rope_dim, CompressOptions.paper(fold=fold))
                loss = specimen.judge(made[0], selection)["change"]
                found.append((loss, rope_dim, fold, made))
    if not found:
        return  # its narrowest rotary part is wider than that
    _, rope_dim, fold, made = min(found, key=lambda each: each[0])
    record("TransMLA", "budget", numbers, rope_dim, made, held_out, fold=fold, tried=len(found))


@torch.no_grad()
def token_losses(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Nats ``(rows, length - 1)`` of every token but the first of each row."""
    parts = []
    for batch in ids.split(4):
        logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none")
        parts.append(loss.view(len(batch), -1))
    return torch.cat(parts)


def _rows(tokens: list[int], count: int, length: int) -> Tensor:
    """``count`` rows, spread evenly over the tokens."""
    if len(tokens) < count * length:
        raise ValueError(f"{count} rows of {length} tokens are wanted of {len(tokens)} tokens.")
    step = len(tokens) // count
    return torch.tensor([tokens[i * step : i * step + length] for i in range(count)])
