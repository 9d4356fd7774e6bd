"""Hidden states of calibration inputs in a temporary file, one layer of the model in memory."""

from __future__ import annotations

import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_attn.convert.gqa.moments import InputMoments
from efficient_attn.convert.source import Source
from efficient_attn.errors import ConversionError

# As transformers names them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
DEVICES = ("cpu", "cuda")


class HiddenStates(ABC):
    """What inputs become in a model, layer after layer, in fp32.

    Args:
        source: The model.
        rows: Inputs, along their first dimension.
        tokens: How many tokens one of them becomes.
        batch: Inputs computed at once.
        device: Where they are computed.

    Attributes:
        layer: The layer that the states are about to enter.

    Raises:
        ConversionError: There is no such device, or the activation of the MLP is unknown.
    """

    def __init__(self, source: Source, rows: Tensor, tokens: int, batch: int, device: str) -> None:
        if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
            raise ConversionError(
                f"device is {device!r}; take one of {', '.join(DEVICES)}, and cuda only where "
                "torch has one."
            )
        if source.config["hidden_act"] not in ACTIVATIONS:
            raise ConversionError(
                f"hidden_act is {source.config['hidden_act']!r}; calibration knows "
                f"{', '.join(ACTIVATIONS)}."
            )
        self.source = source
        self.rows = rows
        self.batch = batch
        self.device = device
        self.layer = 0
        self._folder = tempfile.TemporaryDirectory(prefix="activations-")
        shape = (len(rows), tokens, source.config["hidden_size"])
        path = str(Path(self._folder.name) / "states")
        count = shape[0] * shape[1] * shape[2]
        self._states = torch.from_file(path, shared=True, size=count, dtype=torch.float32)
        self._states = self._states.view(shape)
        self._embed()

    @property
    def digest(self) -> str:
        """SHA-256 of the inputs."""
        digest = hashlib.sha256(str(tuple(self.rows.shape)).encode())
        digest.update(self.rows.contiguous().numpy())
        return digest.hexdigest()

    def restart(self) -> None:
        """Back to the first layer."""
        self.layer = 0
        self._embed()

    def go_to(self, layer: int) -> None:
        """On to a layer, or back to one, with the source's own layers before it."""
        if self.layer > layer:
            self.restart()
        while self.layer < layer:
            self.advance()

    def moments(self, layer: int) -> InputMoments:
        """Moments of what enters the attention of a layer, which is the current one from now on."""
        self.go_to(layer)
        found = InputMoments(self.source.config["hidden_size"])
        for inputs in self.inputs():
            found.add(inputs)
        return found

    def first_input(self) -> Tensor:
        """What the first input ``(N, D)`` brings to the attention of the layer, on the CPU."""
        return next(self.inputs())[0].cpu()

    @abstractmethod
    def inputs(self) -> Iterator[Tensor]:
        """Batches ``(B, N, D)`` of what enters the attention of the current layer."""

    @abstractmethod
    def advance(self) -> None:
        """Through the current layer, to the next."""

    @abstractmethod
    def _embed(self) -> None:
        """Make the states those that enter the first layer."""

    def _tensors(self, layer: int, names: list[str]) -> dict[str, Tensor]:
        """Tensors of a layer, by their names in it."""
        prefix = self.source.family.layers.format(layer)
        found = self.source.checkpoint.read([prefix + name for name in names])
        options = {"device": self.device, "dtype": torch.float32}
        return {name.removeprefix(prefix): x.to(**options) for name, x in found.items()}

    def _others(self) -> dict[str, Tensor]:
        """All tensors of the current layer but those of its attention."""
        prefix = self.source.family.layers.format(self.layer)
        names = [name.removeprefix(prefix) for name in self.source.other_names(self.layer)]
        return self._tensors(self.layer, names)


def check_tokens(rows: Tensor, vocabulary: int) -> None:
    """Raise a ConversionError unless these are rows of known tokens."""
    if rows.dim() != 2 or not rows.numel():
        raise ConversionError(
            f"calibration tokens have shape {tuple(rows.shape)}; they must be (rows, tokens)."
        )
    if not bool(((rows >= 0) & (rows < vocabulary)).all()):
        raise ConversionError(f"calibration tokens lie outside of the {vocabulary} known ones.")
