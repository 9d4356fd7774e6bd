"""What flows through an encoder on calibration inputs: tokens of a text, or images.

As for decoders, the encoder is written out in plain PyTorch, so that it runs from the tensors of a
file, whatever library the model is used with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_attn.convert.attending import grouped_attention, in_fp32
from efficient_attn.convert.hidden_states import ACTIVATIONS, HiddenStates, check_tokens
from efficient_attn.convert.source import Source
from efficient_attn.errors import ConversionError


class EncoderActivations(HiddenStates):
    """The hidden states of calibration inputs, moved through an encoder layer by layer, in fp32.

    Args:
        source: The encoder.
        given: Tokens ``(B, N)``, none of them padding; or for a vision transformer, pixel values
            ``(B, C, H, W)`` of the size that it takes.
        batch: Inputs computed at once.
        device: Where they are computed.

    Raises:
        ConversionError: These are no inputs of this model, or the activation of its MLP is unknown.
    """

    def __init__(
        self, source: Source, given: Tensor, *, batch: int = 4, device: str = "cpu"
    ) -> None:
        config = source.config
        if "image_size" in config:
            wanted = (config["num_channels"], *config["image_size"])
            if not given.is_floating_point() or given.shape[1:] != wanted or not given.numel():
                raise ConversionError(
                    f"calibration images have shape {tuple(given.shape)} and dtype {given.dtype}; "
                    f"this model takes floating (images, {', '.join(map(str, wanted))})."
                )
            tokens = 1 + config["patches"]
        else:
            check_tokens(given, config["vocab_size"])
            tokens = given.shape[1]
            if tokens > config["max_position_embeddings"]:
                raise ConversionError(
                    f"rows have {tokens} tokens; this model has "
                    f"{config['max_position_embeddings']} positions."
                )
        super().__init__(source, given, tokens, batch, device)

    def inputs(self) -> Iterator[Tensor]:
        """Batches ``(B, N, D)`` of what enters the attention of the current layer."""
        family = self.source.family
        names = [f"{family.norms[0]}.{kind}" for kind in ("weight", "bias")]
        tensors = self._tensors(self.layer, names) if family.norm_first else {}
        for kept in self._states.split(self.batch):
            states = kept.to(self.device)
            yield self._normed(states, tensors, family.norms[0]) if family.norm_first else states

    def advance(self) -> None:
        """Through the current layer, to the next."""
        family, tensors = self.source.family, self._others()
        weights = in_fp32(self.source.attention(self.layer), self.device)

        def attend(x: Tensor) -> Tensor:
            return torch.stack([grouped_attention(weights, row) for row in x])

        def mlp(x: Tensor) -> Tensor:
            act = ACTIVATIONS[self.source.config["hidden_act"]]
            inner = act(_linear(x, tensors, family.mlp[0]))
            return _linear(inner, tensors, family.mlp[1])

        for kept in self._states.split(self.batch):
            states = kept.to(self.device)
            for norm, part in zip(family.norms, (attend, mlp), strict=True):
                if family.norm_first:
                    states = states + part(self._normed(states, tensors, norm))
                else:
                    states = self._normed(states + part(states), tensors, norm)
            kept.copy_(states)
        self.layer += 1

    def _embed(self) -> None:
        names = self.source.outside_names()[: self.source.family.before]
        found = self.source.checkpoint.read(names)
        embed = _patches if "image_size" in self.source.config else self._words
        tensors = [found[name].float() for name in names]
        for states, given in zip(
            self._states.split(self.batch), self.rows.split(self.batch), strict=True
        ):
            states.copy_(embed(given, *tensors))

    def _words(
        self, rows: Tensor, words: Tensor, places: Tensor, kinds: Tensor, *norm: Tensor
    ) -> Tensor:
        states = words[rows] + places[: rows.shape[1]] + kinds[0]
        return F.layer_norm(states, states.shape[-1:], *norm, self.source.config["layer_norm_eps"])

    def _normed(self, x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        parts = (tensors[f"{name}.{kind}"] for kind in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], *parts, self.source.config["layer_norm_eps"])


def _patches(images: Tensor, first: Tensor, places: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A token for each patch behind one for the image, with their places."""
    found = F.conv2d(images.float(), weight, bias, stride=weight.shape[-1]).flatten(2).mT
    return torch.cat((first.expand(len(images), -1, -1), found), 1) + places


def _linear(x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
