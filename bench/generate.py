"""Tokens per second of ``generate()`` at long context, with the attention of torch and with ours.

The model has layers of Llama 3 8B with random weights, only fewer of them, so that weights and
cache keep their proportion. The cache is filled with random rows instead of by reading a prompt:
what is timed is decoding alone, with everything that ``generate()`` does.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.providers import Side
from bench.runner import Write

# Llama 3 8B but for the number of layers and the vocabulary, which has no part in attention.
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 2**18,
    "eos_token_id": None,
}
ROUNDS = 3
# As for the ops: at most this many times the error of torch's own attention, plus a floor.
FACTOR, FLOOR = 2.0, 1e-3


@dataclass(frozen=True)
class Contender:
    """An attention by its name in transformers, and the class of the cache it reads."""

    attention: str
    cache: str

    @property
    def name(self) -> str:
        return f"{self.attention}, {self.cache}"

    @property
    def side(self) -> Side:
        """What transformers has is torch; its attention on our cache shows what the cache gains."""
        if self.attention == "efficient_attn":
            return "ours"
        return "yardstick" if self.cache in OUR_CACHES else "torch"


OUR_CACHES = ("StaticPastKeyValues", "PagedPastKeyValues")
PAGE_SIZE = 64
CONTENDERS = (
    Contender("efficient_attn", "DynamicCache"),
    *(Contender("efficient_attn", cache) for cache in OUR_CACHES),
    Contender("sdpa", "DynamicCache"),
    Contender("sdpa", "StaticCache"),
    Contender("sdpa", "StaticPastKeyValues"),
)


def llama(layers: int, device: str, **changes):
    """A random Llama in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, dtype=torch.bfloat16, **{**SHAPE, **changes})
    # Made where and as it is used: a copy in fp32 may not fit.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def time_generation(
    model,
    context: int,
    write: Write,
    *,
    tokens: int = 8,
    contenders: tuple[Contender, ...] = CONTENDERS,
) -> None:
    """Check every contender's logits, time it, and write one record for each.

    Args:
        model: A causal language model.
        context: Number of cached tokens when the first is generated.
        write: Receives the records.
        tokens: How many are generated in each of the interleaved rounds.
        contenders: Whom to time.
    """
    import efficient_attn.integrations.transformers  # noqa: F401  registers the name

    device = model.device
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (1, context + 1), generator=generator)
    rows = _random_rows(model, context, generator)
    room = context + 1 + tokens * (ROUNDS + 1)
    # A copy: casting the model forth and back would round its rotary frequencies.
    exact = copy.deepcopy(model).float()
    truth = _next_logits(exact, "sdpa", ids, _filled("DynamicCache", exact, rows, room))
    del exact
    errors = {
        each: _error(
            _next_logits(model, each.attention, ids, _filled(each.cache, model, rows, room)), truth
        )
        for each in contenders
    }
    allowed = FLOOR + FACTOR * max(e for each, e in errors.items() if each.attention == "sdpa")
    passed = [each for each in contenders if errors[each] <= allowed]
    runs = {
        each: _continued(model, each.attention, ids, _filled(each.cache, model, rows, room), tokens)
        for each in passed
    }
    seconds: dict[Contender, list[float]] = {each: [] for each in passed}
    for number in range(ROUNDS + 1):
        for each in passed[:: -1 if number % 2 else 1]:
            begun = time.perf_counter()
            runs[each]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            # The first round warms up.
            if number:
                seconds[each].append(time.perf_counter() - begun)
    for each in contenders:
        record = {
            "kind": "generate",
            "contender": each.name,
            "side": each.side,
            "context": context,
            "layers": model.config.num_hidden_layers,
            "new_tokens": tokens,
            "status": "timed" if each in passed else "wrong",
            "error": errors[each],
            "error_limit": allowed,
        }
        if each in passed:
            record["tokens_per_second"] = tokens / median(seconds[each])
            record["seconds_per_round"] = seconds[each]
        write(record)


def print_generation(records: list[dict], console: Console) -> None:
    """A table of tokens per second by context."""
    table = Table()
    for column in ("context", "attention", "tokens/s", "error", "ratio"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for record in records:
        if record["kind"] == "generate":
            table.add_row(
                str(record["context"]),
                record["contender"],
                f"{record.get('tokens_per_second', float('nan')):.2f}",
                f"{record['error']:.1e}",
                ratio_to_torch(record, records),
            )
    console.print(table)
    console.print("ratio: to the fastest of torch at the same context. error: of the logits.")


def ratio_to_torch(record: dict, records: list[dict]) -> str:
    """Tokens per second over those of the fastest of torch at the same context, as text."""
    speeds = [
        other["tokens_per_second"]
        for other in records
        if other["kind"] == "generate"
        and other["side"] == "torch"
        and other["status"] == "timed"
        and other["context"] == record["context"]
    ]
    if not speeds or record["status"] != "timed":
        return ""
    return f"{record['tokens_per_second'] / max(speeds):.2f}"


def _random_rows(model, context: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    config = model.config
    size = (1, config.num_key_value_heads, context, config.head_dim)

    def rows() -> Tensor:
        return torch.randn(size, generator=generator, device=generator.device, dtype=torch.bfloat16)

    return [(rows(), rows()) for _ in range(config.num_hidden_layers)]


def _filled(kind: str, model, rows: list[tuple[Tensor, Tensor]], room: int):
    """A cache that holds ``rows`` in the dtype of the model, with room for so many tokens."""
    from transformers import DynamicCache, StaticCache

    from efficient_attn.integrations.past_key_values import PagedPastKeyValues, StaticPastKeyValues

    cache = {
        "DynamicCache": lambda: DynamicCache(config=model.config),
        "StaticCache": lambda: StaticCache(config=model.config, max_cache_len=room),
        "StaticPastKeyValues": lambda: StaticPastKeyValues(room),
        "PagedPastKeyValues": lambda: PagedPastKeyValues(-(-room // PAGE_SIZE), PAGE_SIZE),
    }[kind]()
    for layer, (key, value) in enumerate(rows):
        cache.update(key.to(model.dtype), value.to(model.dtype), layer)
    return cache


@torch.no_grad()
def _next_logits(model, attention: str, ids: Tensor, cache) -> Tensor:
    model.set_attn_implementation(attention)
    return model(ids[:, -1:], past_key_values=cache).logits[:, -1].float()


def _error(logits: Tensor, truth: Tensor) -> float:
    return float((logits - truth).norm() / truth.norm())


def _continued(model, attention: str, ids: Tensor, cache, tokens: int) -> Callable[[], None]:
    """Generates ``tokens`` more at each call."""
    state = {"ids": ids}

    def call() -> None:
        model.set_attn_implementation(attention)
        state["ids"] = model.generate(
            state["ids"],
            attention_mask=torch.ones_like(state["ids"]),
            past_key_values=cache,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            disable_compile=True,
            pad_token_id=0,
        )

    return call
