from dataclasses import replace

import pytest
import torch

from bench import runner
from bench.check import formula, judge, largest_error, prepare
from bench.measure import CpuClock
from bench.providers import PROVIDERS, reasons_against
from bench.runner import make_step, run_workload
from tests.bench.toys import ALL, BOTH, CACHE, CACHED, FULL, GQA, Stand


def verdict_of(workload, provider):
    inputs = workload.make_inputs("cpu")
    truth = prepare(workload, inputs)
    step = make_step(provider.build(workload, inputs), inputs, truth.grad_out)
    return judge(workload, truth, step())


@pytest.mark.parametrize("workload", ALL, ids=lambda workload: workload.name)
def test_every_provider_that_can_run_passes(workload):
    records = []
    run_workload(workload, list(PROVIDERS.values()), "cpu", CpuClock(), records.append, seconds=0.0)
    status = {record["provider"]: record["status"] for record in records}
    excluded = {n for n, p in PROVIDERS.items() if reasons_against(p, workload, "cpu")}
    assert set(status) == set(PROVIDERS) - excluded
    assert set(status.values()) <= {"timed", "refused"}, records
    assert status["eager"] == status["efficient_attn"] == "timed"
    timed_by_torch = [r for r in records if r["side"] == "torch" and r["status"] == "timed"]
    assert timed_by_torch, "without a torch provider there is no ratio"


@pytest.mark.parametrize("workload", CACHED, ids=lambda workload: workload.name)
def test_every_provider_of_a_cache_passes(workload, monkeypatch):
    monkeypatch.setattr(runner, "COLD_BYTES", 2 * workload.cache_bytes())
    records = []
    run_workload(workload, list(PROVIDERS.values()), "cpu", CpuClock(), records.append, seconds=0.0)
    status = {record["provider"]: record["status"] for record in records}
    excluded = {n for n, p in PROVIDERS.items() if reasons_against(p, workload, "cpu")}
    assert set(status) == set(PROVIDERS) - excluded
    assert set(status.values()) <= {"timed", "refused"}, records
    always = ("efficient_attn", "bmm-packed", "bmm-keys-packed", "read")
    assert {status[name] for name in always} == {"timed"}
    assert {r["provider"] for r in records if r["side"] == "ceiling"} == {"read"}
    assert any(n.startswith("sdpa-flash") and s == "timed" for n, s in status.items())


def test_a_cache_is_timed_cold(monkeypatch):
    """Copies of the inputs take turns, so that none is still in the processor when it comes."""
    monkeypatch.setattr(runner, "COLD_BYTES", 3 * CACHE.cache_bytes())
    built = []

    class Watched(Stand):
        def build(self, workload, inputs):
            built.append(inputs)
            return super().build(workload, inputs)

    run_workload(CACHE, [Watched("w", inner="bmm-packed")], "cpu", CpuClock(), list, seconds=0.0)
    assert len({inputs.key.data_ptr() for inputs in built}) == 3
    assert all(torch.equal(inputs.key, built[0].key) for inputs in built)
    assert runner.copies_wanted(CACHE, "cuda") == runner.copies_wanted(GQA, "cpu") == 1


@pytest.mark.parametrize("fault", ["last row", "nan", "shape", "half gradient"])
def test_the_gate_refuses_what_is_wrong(fault):
    # An output of another shape already fails in autograd.
    workload = replace(GQA if fault == "shape" else BOTH, num_queries=300, num_keys=300)
    verdict = verdict_of(workload, Stand("bad", fault=fault))
    assert not verdict.passed
    named = {"half gradient": ["dq", "dk", "dv"]}.get(fault, ["out"])
    assert [reason.split()[0] for reason in verdict.reasons if reason.split()[0] in named] == named


def test_a_wrong_row_is_seen_however_small_its_values_are():
    """In a long causal sequence late rows are averages of many keys, close to zero."""
    workload = replace(GQA, batch=1, num_queries=16, num_keys=4096, dtype="bfloat16")
    assert verdict_of(workload, Stand("good")).passed
    verdict = verdict_of(workload, Stand("bad", fault="last row"))
    assert verdict.errors["out"] > 3 * verdict.limits["out"]


def test_what_failed_is_reported_and_not_timed():
    records = []
    stands = [
        Stand("good"),
        Stand("wrong", fault="last row"),
        Stand("refused", fault="raise"),
        Stand("buggy", side="ours", fault="bug"),
    ]
    run_workload(GQA, stands, "cpu", CpuClock(), records.append, seconds=0.0)
    found = {record["provider"]: record for record in records}
    assert {name: record["status"] for name, record in found.items()} == {
        "good": "timed",
        "wrong": "wrong",
        "refused": "refused",
        "buggy": "broken",
    }
    assert "seconds" in found["good"]
    for name in ("wrong", "refused", "buggy"):
        assert "seconds" not in found[name] and found[name]["reasons"]
    assert found["refused"]["reasons"] == ["RuntimeError: no kernel at kernel.cu for this"]


def test_formula_has_the_gradients_of_autograd():
    query, key, value, grad_out = (torch.randn(2, 7, 5, dtype=torch.float64) for _ in range(4))
    visible = FULL.visible_keys(torch.arange(7))[:, :7].tril()
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    scores = (leaves[0] @ leaves[1].mT * 0.3).masked_fill(~visible, -torch.inf)
    out = scores.softmax(-1) @ leaves[2]
    expected = dict(
        zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, grad_out), strict=True), out=out
    )
    results, squares = formula(query, key, value, grad_out, visible, 0.3)
    for name, value_ in results.items():
        torch.testing.assert_close(value_, expected[name].detach())
        assert squares[name].shape == value_.shape and (squares[name] >= 0).all()


def test_a_row_that_sees_nothing_gives_zeros():
    ones = torch.ones(1, 3, 2, dtype=torch.float64)
    visible = torch.tensor([[True] * 3, [False] * 3, [True] * 3])
    results, _ = formula(ones, ones, ones, ones, visible, 1.0)
    assert not any(x.isnan().any() for x in results.values())
    assert (results["out"][0, 1] == 0).all() and (results["dq"][0, 1] == 0).all()


def test_error_of_what_must_be_zero():
    zero, tiny = torch.zeros(1, dtype=torch.float64), torch.full((1,), 1e-300, dtype=torch.float64)
    assert largest_error(zero, zero, tiny) == 0
    assert largest_error(zero + 1e-9, zero, tiny) > 1e200


def test_reasons_are_all_listed():
    reasons = reasons_against(PROVIDERS["sdpa-cudnn-gqa-pad"], ALL[3], "cpu")
    assert len(reasons) == 3


def test_checked_with_a_sparse_gradient_and_timed_with_a_dense_one():
    """Hardware is faster on zeros."""
    densities = []

    class Watched(Stand):
        def build(self, workload, inputs):
            call = super().build(workload, inputs)

            def watched():
                out = call()
                out.register_hook(lambda grad: densities.append(float((grad != 0).double().mean())))
                return out

            return watched

    workload = replace(BOTH, num_queries=600, num_keys=600)
    run_workload(workload, [Watched("w")], "cpu", CpuClock(), lambda record: None, seconds=0.0)
    assert densities[0] < 0.5
    assert len(densities) > 5 and min(densities[1:]) > 0.99
