"""Give a model that exists other attention, one instance at a time, and take it back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType, TracebackType

from torch import nn

from efficient_attn.config import HyperConfig
from efficient_attn.errors import UnsupportedError
from efficient_attn.integrations import torch_modules
from efficient_attn.integrations.report import LayerReport, PatchReport
from efficient_attn.layers import MultiheadAttention

ATTENTION = ("exact", "hyper")

_PATCHED_BEFORE = "patched before, left as it is"
_NOT_ESTIMATED = (
    "estimated attention is for models of transformers; efficient_attn.layers.HyperAttention is a "
    "layer of its own"
)
_UNKNOWN = "it is no torch.nn.MultiheadAttention and does not use transformers' attention interface"


class PatchHandle:
    """A patch in place; as a context manager, it is taken back on leaving.

    Attributes:
        model: The patched model.
        report: What became of each attention layer.
    """

    def __init__(
        self, model: nn.Module, report: PatchReport, undo: Sequence[Callable[[], None]]
    ) -> None:
        self.model = model
        self.report = report
        self._undo = list(undo)

    def undo(self) -> None:
        """Restore what this patch replaced. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"patch of {type(self.model).__name__}\n{self.report}"


def patch_model(
    model: nn.Module,
    *,
    attention: str | HyperConfig = "exact",
    config: HyperConfig | None = None,
    seed: int = 0,
    layers: Iterable[int | str] | None = None,
    strict: bool = True,
) -> PatchHandle:
    """Let the attention layers of ``model`` compute their attention with this package.

    Parameters stay the objects that they are, and no other instance of a class is touched. A model
    patched as a whole gets a configuration object of its own, for it may share one with others.

    ``"hyper"`` estimates long inputs by :func:`~efficient_attn.hyper_attention`: for causal
    language models and for encoders, grouped heads included. Decoding with a cache stays exact, and
    so does what is shorter than ``config.exact_below``; the report says so. To estimate some layers
    and compute the others exactly, patch the former with ``layers=`` first, then the rest.

    Args:
        model: A model of transformers, or any module that holds one or ``nn.MultiheadAttention``.
        attention: ``"exact"``, which keeps the results up to rounding; ``"hyper"``; or a
            ``HyperConfig``, which stands for ``"hyper"`` with that configuration.
        config: How ``"hyper"`` chooses the keys of a query.
        seed: Fixes everything random in ``"hyper"``, for each layer in its own way.
        layers: Which attention layers, by position among them or by name; all by default.
        strict: Whether to change nothing and raise if one of these cannot be replaced, rather than
            to skip it.

    Returns:
        A handle with ``report`` and ``undo()``, which is a context manager too. Layers that were
        patched before are left alone, and the report says so.

    Raises:
        ValueError: ``attention`` is unknown, ``config`` is given for another, or ``layers`` names a
            layer that does not exist.
        TypeError: ``config`` or ``seed`` is of the wrong kind.
        UnsupportedError: There is no attention layer, or ``strict`` is set and one that was asked
            for cannot be replaced; every obstacle is named.

    Example:
        >>> with patch_model(model) as patch:
        ...     print(patch.report)
        ...     model.generate(**inputs)
    """
    estimate = _estimate(attention, config, seed)
    found = _attention_layers(model)
    chosen = list(found) if layers is None else _choose(list(found), layers)
    details, undo = _replace(model, found, chosen, estimate)
    rows = tuple(
        LayerReport(name, type(module).__name__, *details.get(name, ("skipped", "not asked for")))
        for name, module in found.items()
    )
    handle = PatchHandle(model, PatchReport(rows), undo)
    obstacles = [
        f"{name}: {detail}"
        for name, (action, detail) in details.items()
        if action == "skipped" and detail != _PATCHED_BEFORE
    ]
    if not found:
        obstacles = [f"there is no attention layer in {type(model).__name__}"]
    if obstacles and (strict or not found):
        handle.undo()
        raise UnsupportedError(
            f"patch_model on {type(model).__name__}",
            obstacles,
            "Leave these layers out with layers=, or pass strict=False to skip them."
            if found
            else "It replaces torch.nn.MultiheadAttention and the attention of transformers.",
        )
    return handle


def _estimate(
    attention: str | HyperConfig, config: HyperConfig | None, seed: int
) -> tuple[HyperConfig, int] | None:
    """The configuration and the seed of estimated attention, or None for exact attention."""
    if isinstance(attention, HyperConfig) and config is None:
        attention, config = "hyper", attention
    if attention not in ATTENTION:
        accepted = ", ".join(map(repr, ATTENTION))
        raise ValueError(
            f"attention is {attention!r}; accepted: {accepted}, or a HyperConfig and no config."
        )
    if config is not None and not isinstance(config, HyperConfig):
        raise TypeError(f"config is a {type(config).__name__}; pass a HyperConfig.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}; pass an integer.")
    if attention == "hyper":
        return config or HyperConfig(), seed
    if config is not None:
        raise ValueError('config is given, which attention="hyper" alone has use for.')
    return None


def _replace(
    model: nn.Module,
    found: dict[str, nn.Module],
    chosen: list[str],
    estimate: tuple[HyperConfig, int] | None,
) -> tuple[dict[str, tuple[str, str]], list[Callable[[], None]]]:
    """Replace the chosen layers: what became of each, and how to take it back."""
    switching = _transformers_part()
    details, undo, pending = {}, [], {}
    for name in chosen:
        module = found[name]
        if estimate and isinstance(module, nn.MultiheadAttention | MultiheadAttention):
            details[name] = ("skipped", _NOT_ESTIMATED)
        elif type(module) is nn.MultiheadAttention:
            undo.append(torch_modules.swap(model, module))
            details[name] = ("replaced", "was torch.nn.MultiheadAttention")
        elif isinstance(module, MultiheadAttention):
            details[name] = ("skipped", _PATCHED_BEFORE)
        elif not _uses_the_interface(module):
            details[name] = ("skipped", _UNKNOWN)
        elif switching.is_patched(module):
            details[name] = ("skipped", _PATCHED_BEFORE)
        elif estimate and (obstacle := switching.obstacle_to_estimating(module)):
            details[name] = ("skipped", obstacle)
        else:
            pending[name] = module
    was = {name: switching.describe(module) for name, module in pending.items()}
    names = switching and (switching.HYPER if estimate else switching.EXACT)
    if pending and len(pending) == sum(map(_uses_the_interface, found.values())):
        undo.append(switching.switch_models(model, names.whole))
    else:
        for name, module in pending.items():
            if obstacle := switching.obstacle_to_switching_alone(module):
                details[name] = ("skipped", obstacle)
            else:
                undo.append(switching.switch_layer(module, names.alone))
    for name, module in pending.items():
        if switching.is_patched(module):
            details[name] = ("replaced", was[name])
            if estimate:
                choice, forget = switching.choose(module, *estimate, list(found).index(name))
                undo.append(forget)
                details[name] = ("replaced", f"{was[name]}; {choice}")
        else:
            details.setdefault(name, ("skipped", "its model does not let its attention be set"))
    return details, undo


def _attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every attention layer by name, known or not; a wrapper around one is none itself."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        known = _is_known(module)
        if not known and "Attention" not in type(module).__name__:
            continue
        around = [outer for outer in found if name.startswith(f"{outer}.")]
        wrappers = [outer for outer in around if not _is_known(found[outer])]
        if known or wrappers == around:
            found[name] = module
            for wrapper in wrappers:
                del found[wrapper]
    return found


def _is_known(module: nn.Module) -> bool:
    known_classes = (nn.MultiheadAttention, MultiheadAttention)
    return type(module) in known_classes or _uses_the_interface(module)


def _uses_the_interface(module: nn.Module) -> bool:
    switching = _transformers_part()
    return switching is not None and switching.uses_the_interface(module)


def _transformers_part() -> ModuleType | None:
    """What knows transformers, unless the program has no model of it and maybe not the package."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    from efficient_attn.integrations import switching

    return switching


def _choose(names: list[str], layers: Iterable[int | str]) -> list[str]:
    """The names that ``layers`` stands for."""
    chosen = []
    for layer in layers:
        if isinstance(layer, int) and 0 <= layer < len(names):
            chosen.append(names[layer])
        elif layer in names:
            chosen.append(layer)
        else:
            raise ValueError(
                f"layers holds {layer!r}; accepted are positions from 0 to {len(names) - 1} and "
                f"the names {', '.join(names)}."
            )
    return chosen
