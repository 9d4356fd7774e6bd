"""What flows through a checkpoint on calibration tokens, one layer in memory at a time.

The decoder is written out here, in plain PyTorch, so that it runs from the tensors of a file as
they are read, whatever library the model is used with. Hidden states lie in a temporary file.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_attn.convert.attending import grouped_attention, in_fp32
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
Attend = Callable[[Tensor], Tensor]
DEVICES = ("cpu", "cuda")


class Activations:
    """The hidden states of calibration tokens, moved through a model layer by layer, in fp32.

    Args:
        source: The model.
        rows: Tokens ``(B, N)``.
        batch: Rows computed at once.
        device: Where they are computed.

    Raises:
        ConversionError: There is no such device, a token is not in the vocabulary, or the
            activation of the MLP is unknown.
    """

    def __init__(
        self, source: Source, rows: Tensor, *, batch: int = 4, device: str = "cpu"
    ) -> None:
        if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
            raise ConversionError(
                f"device is {device!r}; take one of {', '.join(DEVICES)}, and cuda only where "
                "torch has one."
            )
        if rows.dim() != 2 or not rows.numel():
            raise ConversionError(
                f"calibration tokens have shape {tuple(rows.shape)}; they must be (rows, tokens)."
            )
        vocabulary = source.config["vocab_size"]
        if not bool(((rows >= 0) & (rows < vocabulary)).all()):
            raise ConversionError(f"calibration tokens lie outside of the {vocabulary} known ones.")
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
        count = rows.numel() * source.config["hidden_size"]
        states = torch.from_file(
            str(Path(self._folder.name) / "states"), shared=True, size=count, dtype=torch.float32
        )
        self._states = states.view(*rows.shape, -1)
        self._embed()

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens."""
        return hashlib.sha256(str(self.rows.tolist()).encode()).hexdigest()

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

    def first_input(self) -> Tensor:
        """What the first row ``(N, D)`` brings to the attention of the layer, on the CPU."""
        return next(self.inputs())[0].cpu()

    def states(self) -> Iterator[Tensor]:
        """Batches ``(B, N, D)`` of the hidden states before the current layer."""
        for states in self._states.split(self.batch):
            yield states.to(self.device)

    def inputs(self) -> Iterator[Tensor]:
        """Batches ``(B, N, D)`` of what enters the attention of the current layer."""
        norm = self._tensors(self.layer, ["input_layernorm.weight"])["input_layernorm.weight"]
        for states in self._states.split(self.batch):
            yield self._normalised(states.to(self.device), norm)

    def advance(self, attend: Attend | None = None) -> None:
        """Through the current layer, to the next.

        Args:
            attend: From the inputs ``(N, D)`` of its attention, one sequence, to what that adds to
                the hidden states, on the device of these; by default, the source's.
        """
        if attend is None:
            weights = in_fp32(self.source.attention(self.layer), self.device)
            attend = partial(grouped_attention, weights)
        prefix = self.source.family.layers.format(self.layer)
        tensors = self._tensors(
            self.layer, [n.removeprefix(prefix) for n in self.source.other_names(self.layer)]
        )
        for kept in self._states.split(self.batch):
            states = kept.to(self.device)
            x = self._normalised(states, tensors["input_layernorm.weight"])
            states += torch.stack([attend(row) for row in x])
            x = self._normalised(states, tensors["post_attention_layernorm.weight"])
            kept.copy_(states + self._feed_forward(x, tensors))
        self.layer += 1

    def losses(self) -> Tensor:
        """Each token's loss ``(B, N)`` in nats after the last layer; that of the first is 0."""
        self.go_to(self.source.num_layers)
        names = ["model.norm.weight", "lm_head.weight"]
        if self.source.config["tie_word_embeddings"]:
            names[1] = "model.embed_tokens.weight"
        norm, head = (
            self.source.checkpoint.read([name])[name].to(self.device, torch.float32)
            for name in names
        )
        found = torch.zeros(self.rows.shape)
        for i, states in enumerate(self._states):
            logits = self._normalised(states[:-1].to(self.device), norm) @ head.T
            following = self.rows[i, 1:].to(self.device)
            found[i, 1:] = F.cross_entropy(logits, following, reduction="none")
        return found

    def _embed(self) -> None:
        name = "model.embed_tokens.weight"
        table = self.source.checkpoint.read([name])[name]
        for states, rows in zip(self._states, self.rows, strict=True):
            states.copy_(table[rows])

    def _tensors(self, layer: int, names: list[str]) -> dict[str, Tensor]:
        prefix = self.source.family.layers.format(layer)
        found = self.source.checkpoint.read([prefix + name for name in names])
        options = {"device": self.device, "dtype": torch.float32}
        return {name.removeprefix(prefix): x.to(**options) for name, x in found.items()}

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.source.config["rms_norm_eps"])

    def _feed_forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        act = ACTIVATIONS[self.source.config["hidden_act"]]

        def linear(x: Tensor, name: str) -> Tensor:
            return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

        def gated(x: Tensor, gate: str, up: str, down: str) -> Tensor:
            return linear(act(linear(x, gate)) * linear(x, up), down)

        if "mlp.gate_proj.weight" in tensors:
            return gated(x, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        # Mixtral: the best experts, their shares adding up to one.
        moe = "block_sparse_moe"
        shares = linear(x, f"{moe}.gate").softmax(-1)
        best, chosen = shares.topk(self.source.config["num_experts_per_tok"], -1)
        best = best / best.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(shares.shape[-1]):
            at = chosen == expert
            tokens = at.any(-1)
            names = (f"{moe}.experts.{expert}.{name}" for name in ("w1", "w3", "w2"))
            weight = (best * at).sum(-1, keepdim=True)[tokens]
            out[tokens] += weight * gated(x[tokens], *names)
        return out
