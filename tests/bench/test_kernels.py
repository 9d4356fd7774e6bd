"""The providers that call one kernel: as the package would, and only where it can."""

import pytest
import torch

from bench.cache_suites import CACHE_SUITES
from bench.providers import PROVIDERS, reasons_against
from bench.providers.kernels import CacheKernel
from bench.providers.ours import Ours
from efficient_attn.ops import native

CUDA = [w for suite in CACHE_SUITES.values() for w in suite if w.device == "cuda"]


def test_every_cached_suite_on_a_gpu_asks_both_kernels():
    for workload in CUDA:
        exact, single = workload.top_values is None, workload.dtype == "float32"
        assert (not CacheKernel("triton").supports(workload)) == exact
        assert (not CacheKernel("cuda").supports(workload)) == (exact and not single)


def test_there_is_nothing_to_ask_on_a_cpu():
    for kernel in ("cuda", "triton"):
        assert reasons_against(PROVIDERS[f"efficient_attn-{kernel}"], CUDA[0], "cpu")


@pytest.mark.parametrize("name", ["decode-gqa32-8", "decode-maps-uneven32-8", "decode-mla-heads16"])
def test_it_is_called_as_the_package_calls_it(name):
    if native.status() is not None:
        pytest.skip(native.status())
    workload = next(w for suite in CACHE_SUITES.values() for w in suite if w.name.startswith(name))
    inputs = workload.make_inputs("cpu")
    ours, theirs = (x.build(workload, inputs)() for x in (Ours(), CacheKernel("cuda")))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
