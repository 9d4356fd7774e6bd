import re

import pytest
import torch
from typer.testing import CliRunner

import bench.__main__ as commands
import bench.ceilings
from bench.report import read_records
from bench.suites import SUITES
from tests.bench.toys import GQA, UNEVEN


@pytest.fixture
def toy_suite(monkeypatch):
    monkeypatch.setitem(SUITES, "toy", [GQA, UNEVEN])
    monkeypatch.setitem(bench.ceilings.MATMUL_SIZE, "cpu", 64)
    monkeypatch.setitem(bench.ceilings.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(bench.ceilings.READ_BYTES, "cpu", 2**16)


def invoke(*arguments, exit_code=0):
    result = CliRunner().invoke(commands.app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return re.sub(r"\s+", " ", result.output)


def test_help_explains_every_command_and_option():
    for name in ("list", "run", "generate", "gpu", "tune", "plot", "compare", "docs"):
        assert name in invoke("--help")
        invoke(name, "--help")
    for command in commands.app.registered_commands:
        assert command.callback.__doc__


def test_list(toy_suite):
    output = invoke("list", "--suite", "toy", "--who")
    assert GQA.name in output and UNEVEN.name in output and "efficient_attn" in output
    assert UNEVEN.name not in invoke("list", "--suite", "toy", "--match", "gqa")
    invoke("list", "--suite", "nosuch", exit_code=2)


def test_run_plot_compare(toy_suite, tmp_path):
    results = tmp_path / "results.jsonl"
    output = invoke("run", "--suite", "toy", "--seconds", "0", "--out", results)
    assert "ratio" in output
    records = read_records(results)
    assert [record["kind"] for record in records[:2]] == ["environment", "ceilings"]
    ceilings = records[1]
    assert ceilings["copy_bytes_per_second"] > 0 and ceilings["read_bytes_per_second"] > 0
    assert ceilings["matmul_flops_per_second"]["float32"] > 0
    timed = {(r["workload"]["name"], r["provider"]) for r in records if r.get("seconds")}
    assert {(GQA.name, "efficient_attn"), (UNEVEN.name, "sdpa-flash-gather")} <= timed
    invoke("plot", results, "--out", tmp_path)
    assert (tmp_path / "ratio.png").exists()
    assert "same" in invoke("compare", results, results)


def test_run_tells_what_it_does_not_know(toy_suite, tmp_path):
    invoke("run", "--provider", "nosuch", exit_code=2)
    invoke("run", "--device", "tpu", exit_code=2)
    invoke("run", "--suite", "toy", "--match", "nothing", exit_code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_without_a_gpu(tmp_path):
    assert "No CUDA device" in invoke("gpu", "--out", tmp_path / "gpu", exit_code=2)
    assert not (tmp_path / "gpu").exists()
    invoke("run", "--device", "cuda", exit_code=2)
