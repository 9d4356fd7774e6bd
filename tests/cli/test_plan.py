"""``efficient-attn plan``."""

import json

import pytest
from typer.testing import CliRunner

from efficient_attn.cli import app

SIGMA = ["--layers", "26", "--embed-dim", "2048", "--head-dim", "64", "--kv-heads", "16",
         "--key-heads", "4", "--value-heads", "16", "--augmented-query-dim", "3072"]  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "120"})


def test_it_prints_every_variant():
    shown = run(*SIGMA)
    assert shown.exit_code == 0, shown.output
    for name in ("MHA 32", "GQA 32/16", "MQA 32/1", "MLA 512+64", "DiffQKV 32/4/16"):
        assert name in shown.output
    assert "22,528" in shown.output


def test_its_json_holds_the_same_figures():
    report = json.loads(run(*SIGMA, "--json", "--bandwidth", "4300", "--context", "1000").output)
    assert report["rates"]["bandwidth"] == 4.3e12
    rows = {row["variant"]: row for row in report["variants"]}
    diff = rows["DiffQKV 32/4/16"]
    assert diff["cache_bytes_per_token"] == 66_560
    assert diff["seconds"]["cache"] == pytest.approx(66_560 * 1000 / 4.3e12)
    assert rows["MHA 32"]["break_even_tokens"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "--bandwidth"),
        (["--dtype", "int3"], "bf16"),
        (["--key-heads", "5"], "does not divide"),
        (["--heads", "0"], "--heads"),
    ],
)
def test_what_it_does_not_know_is_named(arguments, message):
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert message in refused.output
