"""What flows through a checkpoint on calibration tokens, one layer in memory at a time.

The decoder is written out here, in plain PyTorch, so that it runs from the tensors of a file as
they are read, whatever library the model is used with. Hidden states lie in a temporary file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_attn.convert.attending import grouped_attention, in_fp32
from efficient_attn.convert.hidden_states import ACTIVATIONS, HiddenStates, check_tokens
from efficient_attn.convert.source import Source

Attend = Callable[[Tensor], Tensor]


class Activations(HiddenStates):
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
        check_tokens(rows, source.config["vocab_size"])
        super().__init__(source, rows, rows.shape[1], batch, device)

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
        tensors = self._others()
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
