"""Every choice that compressing keys and values to a latent leaves open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from efficient_attn.convert.mla.rotation import Rotation


@dataclass(frozen=True)
class CompressOptions:
    """How :func:`compress` decides; the defaults are what measurably helps.

    Args:
        rotation: How pairs of one frequency are mixed among heads before some are kept turned:
            ``"none"``, ``"real"`` (TransMLA's), ``"unitary"``, or ``"query-aware"``.
        fold: Neighbouring frequencies that are mixed as if they were one; 1 for none. For a whole
            model, None takes what is expected to lose least.
        selection: ``"cost"`` turns the components that are worst to leave unturned, at their own
            frequencies; ``"grid"`` every ``d / d_r``-th frequency once, as TransMLA does.
        metric: Of the error that the latent minimises: of keys and values as they are
            (``"plain"``), with keys scaled to the size of values (``"balanced"``), or of the
            layer's output to first order (``"output"``).
        shrink: Put in place of a turned component that is no longer turned the mean of it over
            the distances that queries attend to, not its value at distance 0.
        center: Leave means out: those of keys shift all scores of a query alike, and those of
            values go to the output's bias where ``output_bias`` allows.
        refit: Read keys and values from the cache by regression, for each head on its own.
        refine: Rounds of regressing what is cached on how it is read, and back.
        refit_output: Regress the output projection on what heads bring it behind converted layers,
            so that hidden states come near to those of the source. For whole models only.
        damping: Share of the mean variance that is added to every variance of a regression.
        output_bias: Whether the target has a bias on the output.
        weigh_tokens: Weigh calibration tokens by the loss of the model on them.
        sequential: Calibrate each layer on inputs from converted layers before it.
    """

    rotation: Rotation = "query-aware"
    fold: int | None = 1
    selection: Literal["cost", "grid"] = "cost"
    metric: Literal["plain", "balanced", "output"] = "output"
    shrink: bool = True
    center: bool = True
    refit: bool = True
    refine: int = 8
    refit_output: bool = True
    damping: float = 1e-6
    output_bias: bool = True
    weigh_tokens: bool = False
    sequential: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "rotation": ("none", "real", "unitary", "query-aware"),
            "selection": ("cost", "grid"),
            "metric": ("plain", "balanced", "output"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; take {', '.join(values)}.")
        if (self.fold is not None and self.fold < 1) or self.refine < 0 or self.damping < 0:
            raise ValueError(
                f"fold is {self.fold}, refine {self.refine} and damping {self.damping}; fold "
                "starts at 1, the others at 0."
            )
        if self.refine and not self.refit:
            raise ValueError(f"refine is {self.refine}, which needs refit; set refine=0.")

    @classmethod
    def paper(cls, *, fold: int | None = None) -> CompressOptions:
        """The choices of TransMLA (arXiv 2502.07864v3) and its code.

        Args:
            fold: FreqFold, a multiple of ``d / d_r``; by default chosen, as its code does too.
        """
        return cls(
            rotation="real",
            fold=fold,
            selection="grid",
            metric="balanced",
            shrink=False,
            center=False,
            refit=False,
            refine=0,
            refit_output=False,
            output_bias=False,
            weigh_tokens=False,
            sequential=False,
        )
