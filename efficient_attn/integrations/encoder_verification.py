"""Comparing a converted encoder with its source: how alike what they make of inputs is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from tqdm import tqdm
from transformers import PreTrainedModel

from efficient_attn.convert.checkpoint import Checkpoint
from efficient_attn.convert.encoder_configs import kind_of
from efficient_attn.convert.encoder_families import TIMM
from efficient_attn.convert.report import table
from efficient_attn.errors import ConversionError
from efficient_attn.integrations.grouped_checkpoints import groups_of, load_grouped
from efficient_attn.integrations.timm_checkpoints import load_timm

# From inputs to hidden states (B, N, D) and, if the model has a task, its logits (B, ...).
Encode = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class EncoderVerification:
    """What comparing two encoders found.

    Attributes:
        inputs: Number of texts or images.
        tokens: What they became, all together.
        mean_cosine: Of embeddings, each the mean of an input's tokens, averaged over inputs.
        min_cosine: Lowest of them.
        first_token_cosine: The same of the first token alone, which stands for the input where a
            model was trained so.
        token_cosine: Averaged over all tokens.
        top1_agreement: Share of predictions whose likeliest class is the same; None without a task.
        parameters: Of the models, ``before`` and ``after``.
        classes: The model classes, ``before`` and ``after``.
    """

    inputs: int
    tokens: int
    mean_cosine: float
    min_cosine: float
    first_token_cosine: float
    token_cosine: float
    top1_agreement: float | None
    parameters: dict[str, int]
    classes: dict[str, str]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def markdown(self) -> str:
        """For people."""
        figures = {k: v for k, v in self.as_dict().items() if isinstance(v, int | float)}
        rows = [(name.replace("_", " "), f"{value:.6g}") for name, value in figures.items()]
        for name in ("parameters", "classes"):
            pair = getattr(self, name)
            rows.append((name, f"{pair['before']} before, {pair['after']} after"))
        return "\n".join(table(("", ""), rows)) + "\n"

    def broken_bounds(self, *, min_cosine: float | None = None) -> list[str]:
        """What falls below a bound on the mean cosine of embeddings."""
        if min_cosine is None or self.mean_cosine >= min_cosine:
            return []
        return [f"mean cosine is {self.mean_cosine:.6g}, below the bound of {min_cosine:g}"]


def verify_encoders(
    src: str | Path, dst: str | Path, inputs: Tensor, *, batch: int = 4, progress: bool = False
) -> EncoderVerification:
    """Load two checkpoints and compare them.

    Args:
        src: Folder of the source.
        dst: Folder of the converted model.
        inputs: Tokens ``(B, N)`` without padding, or pixel values ``(B, C, H, W)``.
        batch: Inputs computed at once.
        progress: Show a progress bar.

    Raises:
        ConversionError: A folder is not what it says, or a result is not finite.
    """
    models = {"before": load_encoder(src), "after": load_encoder(dst)}
    encoders = [_encoding(model) for model in models.values()]
    found: dict[str, list[Tensor]] = {"mean": [], "first": [], "tokens": [], "same": []}
    count = 0
    for given in tqdm(inputs.split(batch), unit="batch", desc="comparing", disable=not progress):
        with torch.no_grad():
            (truth, classes), (other, likewise) = (encode(given) for encode in encoders)
        truth, other = truth.double(), other.double()
        if not bool(torch.isfinite(truth).all() and torch.isfinite(other).all()):
            raise ConversionError("a hidden state is not finite; nothing can be compared.")
        count += truth.shape[0] * truth.shape[1]
        found["mean"].append(cosine_similarity(truth.mean(1), other.mean(1), dim=-1))
        found["first"].append(cosine_similarity(truth[:, 0], other[:, 0], dim=-1))
        found["tokens"].append(cosine_similarity(truth, other, dim=-1).mean(1))
        if classes is not None:
            same = (classes.argmax(-1) == likewise.argmax(-1)).double()
            found["same"].append(same.view(len(given), -1).mean(1))
    mean, first, tokens = (torch.cat(found[name]) for name in ("mean", "first", "tokens"))
    return EncoderVerification(
        inputs=len(inputs),
        tokens=count,
        mean_cosine=float(mean.mean()),
        min_cosine=float(mean.min()),
        first_token_cosine=float(first.mean()),
        token_cosine=float(tokens.mean()),
        top1_agreement=float(torch.cat(found["same"]).mean()) if found["same"] else None,
        parameters={s: sum(p.numel() for p in m.parameters()) for s, m in models.items()},
        classes={side: type(model).__name__ for side, model in models.items()},
    )


def load_encoder(folder: str | Path) -> nn.Module:
    """An encoder, converted or not, checked and loaded without any code of its own.

    Raises:
        ConversionError: The folder is not what it says, or weights are missing or left over.
    """
    config = Checkpoint.open(folder).config
    if groups_of(config):
        return load_grouped(folder).eval()
    if kind_of(config) == TIMM:
        return load_timm(folder, {})
    name = str((config.get("architectures") or [None])[0])
    stock = getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise ConversionError(f"config.json names the class {name}, which transformers lacks.")
    model, info = stock.from_pretrained(
        folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    # Positions of tokens, which some versions saved and none reads.
    left = [n for n in problems.pop("unexpected_keys", []) if not n.endswith("position_ids")]
    if problems or left:
        raise ConversionError(f"weights in {folder} do not fit its config: {problems} {left}.")
    return model.eval()


def _encoding(model: nn.Module) -> Encode:
    if not isinstance(model, PreTrainedModel):

        def of_timm(given: Tensor) -> tuple[Tensor, Tensor]:
            states = model.forward_features(given)
            return states, model.forward_head(states)

        return of_timm

    def of_transformers(given: Tensor) -> tuple[Tensor, Tensor | None]:
        states: list[Tensor] = []
        handle = model.base_model.register_forward_hook(lambda *call: states.append(call[-1][0]))
        try:
            out = model(given)
        finally:
            handle.remove()
        return states[0], getattr(out, "logits", None)

    return of_transformers
