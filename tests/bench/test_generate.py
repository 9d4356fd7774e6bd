import io

import pytest
from rich.console import Console

pytest.importorskip("transformers")

from bench import generate
from bench.generate import Contender, llama, print_generation, time_generation

TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
CONTENDERS = (
    Contender("efficient_attn", "StaticPastKeyValues"),
    Contender("efficient_attn", "PagedPastKeyValues"),
    Contender("sdpa", "StaticCache"),
)


@pytest.fixture(scope="module")
def model():
    return llama(1, "cpu", **TINY)


def test_decoding_is_checked_and_timed(model):
    records = []
    time_generation(model, 40, records.append, tokens=2, contenders=CONTENDERS)
    assert [record["contender"] for record in records] == [each.name for each in CONTENDERS]
    for record in records:
        assert record["status"] == "timed" and record["error"] < record["error_limit"] < 0.1
        assert record["tokens_per_second"] > 0 and record["context"] == 40
        assert len(record["seconds_per_round"]) == generate.ROUNDS
    console = Console(record=True, width=200, file=io.StringIO())
    print_generation(records, console)
    assert "efficient_attn, PagedPastKeyValues" in console.export_text()


def test_wrong_logits_are_not_timed(model, monkeypatch):
    right = generate._next_logits

    def wrong(model, attention, ids, cache):
        logits = right(model, attention, ids, cache)
        return logits.flip(-1) if attention == "efficient_attn" else logits

    monkeypatch.setattr(generate, "_next_logits", wrong)
    records = []
    time_generation(model, 40, records.append, tokens=1, contenders=CONTENDERS)
    assert [record["status"] for record in records] == ["wrong", "wrong", "timed"]
    assert "tokens_per_second" not in records[0]


def test_every_token_reads_all_before_it(model):
    """Each round goes on where the last one ended."""
    cached = []

    def watch(module, arguments, options):
        cached.append(int(options["past_key_values"].get_seq_length()))

    handle = model.model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        time_generation(model, 40, lambda record: None, tokens=2, contenders=CONTENDERS)
    finally:
        handle.remove()
    checks, rounds = 1 + len(CONTENDERS), 1 + generate.ROUNDS
    assert sorted(cached) == sorted(
        checks * [40] + len(CONTENDERS) * list(range(40, 40 + 2 * rounds))
    )
