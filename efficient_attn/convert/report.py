"""What a conversion did, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from efficient_attn.convert.pipeline import Conversion
    from efficient_attn.convert.source import Source

REPORT = "conversion.json"


@dataclass(frozen=True)
class ConversionReport:
    """What became of a checkpoint; printed as Markdown, stored as JSON.

    Attributes:
        identity: Version, digest of the source, method and decisions: equal ones give equal bytes.
        bytes_per_token: Bytes of keys and values of a token in all layers, ``before`` and
            ``after``.
        parameters: Number of parameters, ``before`` and ``after``.
        output_bytes: Size of the weights, about.
        memory_bytes: Memory that converting takes at most, about.
        parallel: Cached bytes per token on each of so many devices that share the heads, before
            and after.
        source_files: SHA-256 of the source's files.
        output_files: SHA-256 of the output's files; empty for a dry run.
        layers: Figures of each layer.
        losses: On held-out text, in nats per token: of the ``source``, and of the model ``turned in
            part``, whose channels turn as they do after conversion, everything being kept.
        warnings: What a user should know before using the output.
        cached: Whether keys and values are cached; an encoder's are not.
    """

    identity: dict
    bytes_per_token: dict[str, int]
    parameters: dict[str, int]
    output_bytes: int
    memory_bytes: int
    parallel: dict[str, list[int]] = field(default_factory=dict)
    source_files: dict[str, str] = field(default_factory=dict)
    output_files: dict[str, str] = field(default_factory=dict)
    layers: list[dict] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    cached: bool = True

    @classmethod
    def of(
        cls,
        source: Source,
        conversion: Conversion,
        identity: Mapping[str, object],
        notes: Mapping[str, dict],
        output_files: Mapping[str, str],
    ) -> ConversionReport:
        """The report of a conversion that was carried out."""
        return cls(
            identity=dict(identity),
            **_figures(conversion),
            source_files=source.checkpoint.digests,
            output_files=dict(output_files),
            layers=[{"part": part, **noted} for part, noted in notes.items() if noted],
        )

    @classmethod
    def before(cls, conversion: Conversion) -> ConversionReport:
        """What is known before anything is read: for a dry run."""
        identity = {"method": conversion.method, "decisions": dict(conversion.decisions)}
        return cls(identity=identity, **_figures(conversion))

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def markdown(self) -> str:
        """For people."""
        decisions = {"method": self.identity["method"], **flat(self.identity["decisions"])}
        told = [(name, value) for name, value in decisions.items() if value is not None]
        lines = ["# Conversion", "", *table(("", ""), told), ""]
        lines += table(
            ("", "before", "after", "ratio"),
            [
                _compared(
                    "cached bytes per token" if self.cached else "keys and values, bytes per token",
                    self.bytes_per_token,
                ),
                _compared("parameters", self.parameters),
            ],
        )
        lines += ["", f"Weights written: {self.output_bytes / 1e6:,.1f} MB. "]
        lines[-1] += f"Memory at most: about {self.memory_bytes / 1e6:,.0f} MB."
        if self.parallel:
            rows = [(devices, *pair) for devices, pair in self.parallel.items()]
            lines += ["", "Cached bytes per token on each device under tensor parallelism:", ""]
            lines += table(("devices", "before", "after"), rows)
        if self.losses:
            told = [(name, f"{loss:.4f}") for name, loss in self.losses.items()]
            lines += ["", "Loss on held-out text, in nats per token:", "", *table(("", ""), told)]
        if self.warnings:
            lines += ["", "## Warnings", "", *(f"- {warning}" for warning in self.warnings)]
        plain = ((k, v) for layer in self.layers for k, v in layer.items())
        names = list(dict.fromkeys(k for k, v in plain if not isinstance(v, dict)))
        if len(names) > 1:
            rows = [[_short(layer.get(name, "")) for name in names] for layer in self.layers]
            lines += ["", "## Layers", "", *table(names, rows)]
        return "\n".join(lines) + "\n"


def flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested entries under dotted names."""
    found: dict[str, object] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(str(cell) for cell in row)} |" for row in cells]


def _figures(conversion: Conversion) -> dict[str, object]:
    before_after = ("before", "after")
    return {
        "bytes_per_token": dict(zip(before_after, conversion.bytes_per_token, strict=True)),
        "parameters": dict(zip(before_after, conversion.parameters, strict=True)),
        "output_bytes": conversion.output_bytes,
        "memory_bytes": conversion.memory_bytes,
        "parallel": {devices: list(pair) for devices, pair in conversion.parallel.items()},
        "warnings": list(conversion.warnings),
        "cached": conversion.cached,
    }


def _compared(name: str, pair: Mapping[str, int]) -> tuple[str, ...]:
    before, after = pair["before"], pair["after"]
    return name, f"{before:,}", f"{after:,}", f"{after / before:.3f}"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
