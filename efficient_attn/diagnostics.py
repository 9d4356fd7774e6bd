"""What is installed, what the machine has, and which kernel answers each op.

Only the standard library is imported at the top, and every probe is guarded, so that a report can
be made even where importing torch fails: ``python efficient_attn/diagnostics.py``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform

PACKAGES = ("efficient_attn", "torch", "triton", "transformers", "safetensors", "numpy", "einops")

# A backward op is answered by the same implementations as its forward.
OPS = (
    "attention",
    "attention_varlen",
    "attention_decode",
    "selective_decode",
    "mla_decode",
    "merge_states",
    "lsh_codes",
    "segment_order",
)
_CUDA_OPS = ("lsh_codes", "segment_order")
_CPU_OPS = ("attention_decode", "selective_decode", "mla_decode", "merge_states", *_CUDA_OPS)
_WITHOUT_TRITON = ("merge_states", "lsh_codes", "segment_order")


def report() -> dict:
    """Everything that ``efficient-attn info`` shows, as plain data for ``--json``.

    Returns:
        ``versions`` (package to version or None), ``machine`` (facts), and ``kernels``: for each op
        and device, a list of implementations in the order in which they are asked, each with
        ``name``, ``answers`` and, where it does not answer, ``reason``.
    """
    machine = _machine()
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "machine": machine,
        "kernels": {op: _implementations(op, machine) for op in OPS},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict:
    facts = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    try:
        import torch
    except ImportError as error:
        return {**facts, "torch": f"cannot be imported: {error}", "cuda": None}
    facts["cpu"] = torch.backends.cpu.get_cpu_capability()
    facts["threads"] = torch.get_num_threads()
    facts["cuda"] = None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        facts["cuda"] = {
            "device": torch.cuda.get_device_name(),
            "capability": f"sm_{major}{minor}",
            "runtime": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def _implementations(op: str, machine: dict) -> dict[str, list[dict]]:
    """Who is asked for one op on each device, first to last."""
    no_gpu = None if machine["cuda"] else "torch sees no CUDA device"
    no_triton = None if importlib.util.find_spec("triton") else "triton is not installed"
    first = "native (csrc/cpu)" if op in _CPU_OPS else "torch's flash op, where it fits"
    absent = _native_is_absent(op, "cpu") if op in _CPU_OPS else None
    cpu = [_entry(first, absent), _entry("portable", None)]
    cuda = []
    if op in _CUDA_OPS:
        absent = _native_is_absent(op, "cuda") or (f"built, but {no_gpu}" if no_gpu else None)
        cuda.append(_entry("native (csrc/cuda), where it fits", absent))
    if op in _WITHOUT_TRITON:
        cuda.append(_entry("portable", no_gpu))
    elif no_triton:
        absent = "; ".join(filter(None, (no_gpu, no_triton)))
        cuda += [_entry("triton", absent), _entry("portable", no_gpu)]
    else:
        if op == "attention":
            cuda.append(_entry("torch's cuDNN and flash ops, where they fit", no_gpu))
        cuda.append(_entry("triton", no_gpu))
    return {"cpu": cpu, "cuda": cuda}


def _entry(name: str, reason: str | None) -> dict:
    return {"name": name, "answers": reason is None, "reason": reason}


def _native_is_absent(op: str, device: str) -> str | None:
    try:
        from efficient_attn.ops import cuda, native
    except ImportError as error:
        return f"efficient_attn cannot be imported: {error}"
    return native.status() if device == "cpu" else cuda.status(op)


if __name__ == "__main__":
    print(json.dumps(report(), indent=2))
