"""`efficient-attn demo` on a little text and without the benchmark."""

import importlib

from typer.testing import CliRunner

from efficient_attn.cli import _compressing, app

runner = CliRunner()


def test_the_demo_writes_a_report_and_finds_the_same_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(_compressing, "RATIOS", (0.5,))
    monkeypatch.setattr(_compressing, "CALIBRATION_TOKENS", 1024)
    few = ["--test-tokens", "1024", "--context", "100", "--no-benchmark"]
    arguments = ["demo", "--out", str(tmp_path), *few]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = (tmp_path / "report.md").read_text()
    assert "a long one: identical" in report and "def binary_search" in report
    assert "HyperAttention over 1024 tokens" in report and "times as fast" in report
    # 6 layers, 2 key and 2 value heads, 32 wide, 4 bytes: 3072 for a token.
    assert f"| sdpa | DynamicCache | {100 * 3072} |" in report
    assert f"| efficient_attn | StaticPastKeyValues | {116 * 3072} |" in report
    assert "| lossless | DeepseekV3ForCausalLM | 3,072 |" in report
    assert "| 1/2 of the cache | LlamaForCausalLM | 1,536 |" in report
    assert "| one key head for all | DiffQKVForCausalLM | 2,304 |" in report
    assert (tmp_path / "conversion.png").exists()


def test_outside_a_clone_it_says_what_to_do(monkeypatch, tmp_path):
    module = importlib.import_module("efficient_attn.cli.demo")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "a" / "b" / "demo.py"))
    result = runner.invoke(app, ["demo"])
    assert result.exit_code == 2 and "make demo" in result.output
