"""The published implementation of HyperAttention, here a small stand-in for it."""

import pickle
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.measure import CpuClock
from bench.providers import PROVIDERS, left_out, reasons_against
from bench.providers.authors import VARIABLE
from bench.report import ratios
from bench.runner import run_workload
from tests.bench.toys import MHA

HYPER = replace(MHA, name="toy-hyper-33", suite="hyper", op="hyper", hyper="paper")
BOTH = replace(HYPER, name="toy-hyper-both-33", mode="forward_backward")
AUTHORS = PROVIDERS["authors-hyper"]

PACKAGE = """
import torch
from authors_parts import softmax

class HyperAttention(torch.nn.Module):
    def __init__(self, input_dim=64, lsh_num_projs=7, block_size=256, sample_size=256,
                 min_seq_len=4096, cuda=False):
        super().__init__()
        assert (input_dim, lsh_num_projs, block_size, sample_size) == (8, 7, 256, 256)
        assert min_seq_len == 4096 and not cuda

    def forward(self, query, key, value, scale=None, causal=False, return_lse=False):
        assert query.is_contiguous() and not return_lse
        out = softmax(scale * query @ key.transpose(-1, -2)) @ value
        return {fault}
"""
PARTS = "def softmax(x):\n    return x.softmax(-1)\n"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Writes the stand-in, whose output is ``fault``, and forgets what was imported of it."""

    def write(fault="out"):
        (tmp_path / "hyper_attn.py").write_text(PACKAGE.replace("{fault}", fault))
        (tmp_path / "authors_parts.py").write_text(PARTS)
        monkeypatch.setenv(VARIABLE, str(tmp_path))

    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    for name in ("hyper_attn", "authors_parts"):
        sys.modules.pop(name, None)


def timed(workload):
    records = []
    providers = [PROVIDERS["efficient_attn"], PROVIDERS["sdpa-math"], AUTHORS]
    run_workload(workload, providers, "cpu", CpuClock(), records.append, seconds=0.0)
    return {record["provider"]: record for record in records}, records


@pytest.mark.parametrize("workload", [HYPER, BOTH], ids=lambda w: w.mode)
def test_it_is_timed_and_compared_with_nothing(checkout, workload):
    checkout()
    by_name, records = timed(workload)
    theirs = by_name["authors-hyper"]
    # The toy is not causal, so that it is wrong by every measure but plausibility.
    assert (theirs["status"], theirs["side"], theirs["errors"]) == ("timed", "estimate", {})
    fast = theirs["seconds"] | {"median": 1e-9, "low": 1e-9, "high": 1e-9}
    records = [*(r for r in records if r is not theirs), theirs | {"seconds": fast}]
    assert [(r.ours, r.baseline) for r in ratios(records)] == [("efficient_attn", "sdpa-math")]


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("out * float('nan')", "wrong", "not finite"),
        ("out[:, :, 1:]", "wrong", "expected"),
        ("out.double()", "wrong", "float64"),
        ("out.undefined", "refused", "AttributeError"),
    ],
)
def test_what_is_not_plausible_is_not_timed(checkout, fault, status, reason):
    checkout(fault)
    theirs = timed(HYPER)[0]["authors-hyper"]
    assert theirs["status"] == status and "seconds" not in theirs
    assert reason in " ".join(theirs["reasons"])


def test_a_process_of_its_own_finds_it_too(checkout):
    """A worker gets the provider pickled, which then imports from what the environment names."""
    checkout()
    assert pickle.loads(pickle.dumps(AUTHORS)) == AUTHORS
    assert "hyper_attn" not in sys.modules


def test_a_module_of_that_name_from_elsewhere_is_not_taken(checkout, tmp_path_factory, monkeypatch):
    checkout()
    other = tmp_path_factory.mktemp("other")
    (other / "hyper_attn.py").write_text("")
    monkeypatch.syspath_prepend(str(other))
    theirs = timed(HYPER)[0]["authors-hyper"]
    assert theirs["status"] == "refused" and "outside" in theirs["reasons"][0]


def test_without_it_the_reason_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    (reason,) = left_out([AUTHORS], "cpu")
    assert VARIABLE in reason
    for command in (["list", "--who", "--suite", "hyper"], ["gpu", "--dry-run"]):
        said = CliRunner().invoke(app, command).output
        assert "authors-hyper" in said and VARIABLE in said
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    (reason,) = left_out([AUTHORS], "cpu")
    assert "no hyper_attn in the folder" in reason and str(tmp_path) not in reason


def test_it_is_listed_where_it_can_run(checkout):
    checkout()
    said = CliRunner().invoke(app, ["list", "--who", "--suite", "hyper", "--device", "cpu"]).output
    assert any("authors-hyper" in line and "paper" in line for line in said.splitlines())
    assert reasons_against(AUTHORS, replace(HYPER, hyper="default"), "cpu")
    assert reasons_against(AUTHORS, replace(HYPER, k_heads=2), "cpu")
