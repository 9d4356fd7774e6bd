"""Comparing a converted checkpoint with its source, both loaded as people would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from efficient_attn.convert.checkpoint import Checkpoint
from efficient_attn.convert.report import table
from efficient_attn.convert.verify import Comparison, verify
from efficient_attn.errors import ConversionError
from efficient_attn.integrations import diffqkv_model  # noqa: F401  registers its classes
from efficient_attn.integrations.converted import load_converted
from efficient_attn.integrations.grouped_checkpoints import load_grouped

PROMPT, NEW_TOKENS = 16, 64
# Long positions are the last so many tokens of one row of at most so many.
LONG, LONG_TAIL = 8192, 512


@dataclass(frozen=True)
class Verification:
    """What comparing two checkpoints found.

    Attributes:
        comparison: Of their logits.
        greedy_match: How many of ``greedy_tokens`` new tokens, the likeliest each, are the same
            before the first that differs.
        greedy_tokens: How many were generated.
        bytes_per_token: Cached bytes of a token, counted in the live caches ``before`` and
            ``after``.
        classes: The model classes, ``before`` and ``after``.
        long: Of their logits at the end of one long row, if that was asked for.
        long_tokens: Tokens of that row.
    """

    comparison: Comparison
    greedy_match: int
    greedy_tokens: int
    bytes_per_token: dict[str, int]
    classes: dict[str, str]
    long: Comparison | None = None
    long_tokens: int = 0

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            **self.comparison.as_dict(),
            "greedy_match": self.greedy_match,
            "greedy_tokens": self.greedy_tokens,
            "bytes_per_token": self.bytes_per_token,
            "classes": self.classes,
            "long_tokens": self.long_tokens,
            "long": None if self.long is None else self.long.as_dict(),
        }

    @property
    def tokens(self) -> int:
        """How many predictions were compared."""
        return self.comparison.tokens

    def broken_bounds(self, **bounds: float | None) -> list[str]:
        """See :meth:`efficient_attn.convert.verify.Comparison.broken_bounds`."""
        return self.comparison.broken_bounds(**bounds)

    def markdown(self) -> str:
        """For people."""
        before, after = (self.bytes_per_token[side] for side in ("before", "after"))
        rows = [
            ("greedy tokens that are the same", f"{self.greedy_match} of {self.greedy_tokens}"),
            ("cached bytes per token, measured", f"{before:,} before, {after:,} after"),
            ("class", f"{self.classes['before']} before, {self.classes['after']} after"),
        ]
        if self.long is not None:
            end = f"last {self.long.tokens} of {self.long_tokens:,} tokens"
            ratio, kl = self.long.perplexity_ratio, self.long.mean_kl
            rows.append((end, f"mean kl {kl:.6g}, perplexity ratio {ratio:.6g}"))
        return self.comparison.markdown() + "\n".join(table(("", ""), rows)[2:]) + "\n"


def load(folder: str | Path, *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A checkpoint, converted or not, checked and loaded without any code of its own.

    Raises:
        ConversionError: The folder is not what it says, or weights are missing or left over.
    """
    record = Checkpoint.open(folder).config.get("efficient_attn") or {}
    if "layers" in record:
        return load_converted(folder, dtype=dtype).eval()
    if "groups" in record:
        return load_grouped(folder, dtype=dtype).eval()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    problems = {kind: sorted(names) for kind, names in info.items() if names}
    if problems:
        raise ConversionError(f"the weights in {folder} do not fit its config: {problems}.")
    return model.eval()


def verify_folders(
    src: str | Path,
    dst: str | Path,
    rows: Tensor,
    *,
    long_row: Tensor | None = None,
    dtype: torch.dtype | str = "auto",
    batch: int = 4,
    progress: bool = False,
) -> Verification:
    """Load two checkpoints and compare them.

    Args:
        src: Folder of the source.
        dst: Folder of the converted model.
        rows: Tokens ``(B, N)`` to compare them on; the first 16 are the prompt that is continued.
        long_row: ``(1, N)`` tokens, at the end of which they are compared too.
        dtype: Of both models; by default each has that of its checkpoint.
        batch: Rows computed at once.
        progress: Show a progress bar.
    """
    models = {"before": load(src, dtype=dtype), "after": load(dst, dtype=dtype)}
    batches = tqdm(rows.split(batch), unit="batch", desc="comparing", disable=not progress)
    comparison = verify(*(_logits(model) for model in models.values()), batches)
    prompt = rows[:1, :PROMPT]
    found = {side: likeliest(model, prompt, NEW_TOKENS) for side, model in models.items()}
    before, after = (tokens for tokens, _ in found.values())
    differ = (before != after).nonzero()
    return Verification(
        comparison=comparison,
        greedy_match=int(differ[0]) if len(differ) else NEW_TOKENS,
        greedy_tokens=NEW_TOKENS,
        bytes_per_token={side: held for side, (_, held) in found.items()},
        classes={side: type(model).__name__ for side, model in models.items()},
        **({} if long_row is None else _at_the_end(*models.values(), long_row)),
    )


def _at_the_end(
    before: PreTrainedModel, after: PreTrainedModel, row: Tensor
) -> dict[str, Comparison | int]:
    """Compare two models on the last tokens of a row, of which alone logits are made."""
    tail = row[:, -LONG_TAIL:]
    ends = (
        lambda _, model=model: model(row, use_cache=False, logits_to_keep=tail.shape[1]).logits
        for model in (before, after)
    )
    return {"long": verify(*ends, [tail]), "long_tokens": row.shape[1]}


def _logits(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    return lambda tokens: model(tokens, use_cache=False).logits


def likeliest(model: PreTrainedModel, prompt: Tensor, count: int) -> tuple[Tensor, int]:
    """The likeliest tokens behind ``prompt``, ``(1, N)``, and the cached bytes of a token."""
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    layers = out.past_key_values.layers
    held = sum((x.keys.nbytes + x.values.nbytes) // x.keys.shape[-2] for x in layers)
    return out.sequences[0, prompt.shape[1] :], held
