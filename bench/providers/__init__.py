"""Who is timed: every way to run a workload, each with the reasons why it may not.

A provider is built from a workload and its inputs and gives a call without arguments. What a user
would prepare once (an index, a mask, a compiled function) is prepared in ``build``; what he pays
for on every call (copying shared heads, say) happens in the call.
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.providers.authors import AuthorsHyper
from bench.providers.eager import Eager
from bench.providers.flex import Flex
from bench.providers.kernels import CacheKernel
from bench.providers.ours import Ours, OursExact
from bench.providers.packed import every_packed
from bench.providers.protocol import Call, Provider, Side
from bench.providers.read import Read
from bench.providers.sdpa import every_sdpa
from bench.workloads import Workload

__all__ = ["PROVIDERS", "Call", "Provider", "Side", "left_out", "reasons_against"]

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Ours(),
        OursExact(),
        CacheKernel("cuda"),
        CacheKernel("triton"),
        *every_sdpa(),
        *every_packed(),
        Flex(),
        Eager(),
        Read(),
        AuthorsHyper(),
        AuthorsHyper(own_kernels=True),
    )
}


def reasons_against(provider: Provider, workload: Workload, device: str) -> list[str]:
    """Every known reason not to run ``workload`` with ``provider``."""
    return [*provider.available(device), *provider.supports(workload)]


def left_out(providers: Iterable[Provider], device: str) -> dict[str, list[str]]:
    """The providers that cannot run at all on a kind of device here, by the reason for it."""
    names: dict[str, list[str]] = {}
    for provider in providers:
        if reasons := provider.available(device):
            names.setdefault("; ".join(reasons), []).append(provider.name)
    return names
