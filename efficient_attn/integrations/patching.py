"""Give a model that exists other attention, one instance at a time, and take it back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType, TracebackType

from torch import nn

from efficient_attn.errors import UnsupportedError
from efficient_attn.integrations import torch_modules
from efficient_attn.integrations.report import LayerReport, PatchReport
from efficient_attn.layers import MultiheadAttention

ATTENTION = ("exact",)

_PATCHED_BEFORE = "patched before, left as it is"
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
    attention: str = "exact",
    layers: Iterable[int | str] | None = None,
    strict: bool = True,
) -> PatchHandle:
    """Let the attention layers of ``model`` compute their attention with this package.

    Parameters stay the objects that they are, and no other instance of a class is touched. A model
    patched as a whole gets a configuration object of its own, for it may share one with others.

    Args:
        model: A model of transformers, or any module that holds one or ``nn.MultiheadAttention``.
        attention: ``"exact"``, which keeps the results up to rounding.
        layers: Which attention layers, by position among them or by name; all by default.
        strict: Whether to change nothing and raise if one of these cannot be replaced, rather than
            to skip it.

    Returns:
        A handle with ``report`` and ``undo()``, which is a context manager too. Layers that were
        patched before are left alone, and the report says so.

    Raises:
        ValueError: ``attention`` is unknown, or ``layers`` names a layer that does not exist.
        UnsupportedError: There is no attention layer, or ``strict`` is set and one that was asked
            for cannot be replaced; every obstacle is named.

    Example:
        >>> with patch_model(model) as patch:
        ...     print(patch.report)
        ...     model.generate(**inputs)
    """
    if attention not in ATTENTION:
        accepted = ", ".join(map(repr, ATTENTION))
        raise ValueError(f"attention is {attention!r}; accepted: {accepted}.")
    found = _attention_layers(model)
    chosen = list(found) if layers is None else _choose(list(found), layers)
    details, undo = _replace(model, found, chosen)
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


def _replace(
    model: nn.Module, found: dict[str, nn.Module], chosen: list[str]
) -> tuple[dict[str, tuple[str, str]], list[Callable[[], None]]]:
    """Replace the chosen layers: what became of each, and how to take it back."""
    switching = _transformers_part()
    details, undo, pending = {}, [], {}
    for name in chosen:
        module = found[name]
        if type(module) is nn.MultiheadAttention:
            undo.append(torch_modules.swap(model, module))
            details[name] = ("replaced", "was torch.nn.MultiheadAttention")
        elif isinstance(module, MultiheadAttention):
            details[name] = ("skipped", _PATCHED_BEFORE)
        elif not _uses_the_interface(module):
            details[name] = ("skipped", _UNKNOWN)
        elif switching.is_patched(module):
            details[name] = ("skipped", _PATCHED_BEFORE)
        else:
            pending[name] = module
    was = {name: switching.describe(module) for name, module in pending.items()}
    if pending and len(pending) == sum(map(_uses_the_interface, found.values())):
        undo.append(switching.switch_models(model))
    else:
        for name, module in pending.items():
            if obstacle := switching.obstacle_to_switching_alone(module):
                details[name] = ("skipped", obstacle)
            else:
                undo.append(switching.switch_layer(module))
    for name, module in pending.items():
        if switching.is_patched(module):
            details[name] = ("replaced", was[name])
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
