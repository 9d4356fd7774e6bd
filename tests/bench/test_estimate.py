from dataclasses import replace

import pytest
import torch

import efficient_attn as ea
from bench import runner
from bench.estimate import log_multiplicity
from bench.measure import CpuClock
from bench.providers import PROVIDERS
from efficient_attn.reference.hyper import multiplicity
from tests.bench.toys import BOTH

SMALL = {
    "paper": ea.HyperConfig.paper(block_size=8, sample_size=8, exact_below=8),
    "default": ea.HyperConfig(
        block_size=8, sample_size=4, leaf_size=4, window=4, sinks=2, exact_below=8
    ),
}
HYPER = replace(BOTH, name="toy-hyper-64", op="hyper", batch=1, num_queries=64, num_keys=64,
                k_heads=4, v_heads=4, hyper="paper")  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_rows_of_a_plan_are_those_of_the_reference(name, causal):
    for nq, nk in ((64, 64), (37, 70)):
        query, key = torch.randn(1, 4, nq, 8), torch.randn(1, 2, nk, 8)
        plan = ea.hyper_plan(query, key, causal=causal, config=SMALL[name])
        expected = multiplicity(plan, nq, nk, 2).flatten(1, 2)[0]
        rows = torch.tensor([0, 1, 9, 30, nq - 1])
        for head in range(4):
            actual = log_multiplicity(plan, nq, head, rows).exp()
            torch.testing.assert_close(actual, expected[head, rows], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_the_estimate_is_judged_by_its_plan_and_the_exact_side_by_the_formula(
    name, causal, monkeypatch
):
    for module in ("bench.estimate", "bench.providers.ours"):
        monkeypatch.setattr(f"{module}.HYPER_CONFIGS", SMALL)
    workload = replace(HYPER, hyper=name, causal=causal)
    chosen = [PROVIDERS[p] for p in ("efficient_attn", "efficient_attn-exact", "sdpa-flash")]
    records = []
    runner.run_workload(workload, chosen, "cpu", CpuClock(), records.append, seconds=0.0)
    assert [r["status"] for r in records] == ["timed"] * 3, records[0]["reasons"]

    class WrongSeed(type(chosen[0])):
        def build(self, workload, inputs):
            options = {"causal": workload.causal, "config": SMALL[workload.hyper], "seed": 9}
            return lambda: ea.hyper_attention(*inputs, **options)

    records = []
    runner.run_workload(workload, [WrongSeed()], "cpu", CpuClock(), records.append, seconds=0.0)
    assert records[0]["status"] == "wrong"
