"""Tile sizes as data.

What was measured on a device stands in ``measured_tiles.py`` and is asked first. The tables here
are untuned: chosen by reasoning and by the compiler's register and shared-memory reports. The
key is the architecture, the kernel, the width of an element and a bucket of the head dims. It
never contains a sequence length, so a kernel is compiled once per kind of call.
"""

from __future__ import annotations

import functools

import torch

from efficient_attn.kernels.triton.measured_tiles import MEASURED, Entry, Tile

# Keys and values (or queries and their gradients) of one section of heads should stay in the L2
# cache while the section runs: half of the smallest cache among the data-centre devices.
L2_BUDGET = 20 * 2**20

# Beyond this sum of head dims the gradients of keys and values do not fit the registers together,
# and computing the scores twice costs less than spilling.
LARGEST_DIMS_TOGETHER = 320

# Shared memory that one program may use, in bytes.
SHARED_MEMORY = {"sm80": 163 * 1024, "sm86": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}


# kernel -> kind of mask -> a tile for each bucket of head dims, for elements of two bytes.
_HALF = {
    "forward": {
        "plain": ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
        "window": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1)),
        "bias": ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1), (32, 32, 4, 1)),
    },
    "grad_query": {
        "plain": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
        "window": ((64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1)),
        "bias": ((64, 32, 4, 2), (64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
    },
    "grad_key_value": {
        "plain": ((64, 64, 4, 2), (32, 64, 8, 2), (32, 64, 8, 2), (16, 64, 8, 1)),
        "window": ((32, 64, 4, 2), (32, 64, 8, 2), (16, 64, 8, 1), (16, 32, 8, 1)),
        "bias": ((32, 64, 4, 2), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    },
    "hyper_forward": {
        "plain": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
    },
    "hyper_grad_query": {
        "plain": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
    },
    "hyper_grad_key_value": {
        "plain": ((32, 64, 4, 2), (32, 64, 8, 2), (32, 64, 8, 2), (16, 64, 8, 1)),
    },
    "grad_bias": {
        "bias": ((64, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
    },
}
# Where Ampere's registers do not hold what later devices keep in shared or tensor memory.
_HALF_ON_AMPERE = {
    ("forward", "plain"): ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
    ("hyper_forward", "plain"): ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
    ("hyper_grad_query", "plain"): ((64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1)),
    ("hyper_grad_key_value", "plain"): (
        (32, 64, 4, 2),
        (32, 64, 8, 1),
        (16, 64, 8, 1),
        (16, 32, 8, 1),
    ),
}
# Elements of four bytes: kernels that keep two accumulators, or many addresses, need smaller tiles.
_SINGLE = ((32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1))
_SINGLE_HYPER = ((32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1))
_SINGLE_KEY_VALUE = ((16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1))
_ROWS = Tile(64, 0, 4, 1)
# The largest head dims of queries and of values in each bucket.
_BUCKETS = ((64, 64), (128, 128), (256, 128), (256, 256))
# Small and never square, so that a few tokens make several tiles of each kind.
_INTERPRETED = {
    "forward": Tile(64, 32, 4, 1),
    "rows": Tile(64, 0, 4, 1),
    "grad_query": Tile(64, 32, 4, 1),
    "grad_key_value": Tile(32, 64, 4, 1),
    "grad_bias": Tile(32, 64, 4, 1),
    "hyper_forward": Tile(32, 16, 4, 1),
    "hyper_grad_query": Tile(32, 16, 4, 1),
    "hyper_grad_key_value": Tile(16, 32, 4, 1),
}


def architecture(device: torch.device) -> str:
    """The family of tables that serves a device; ``interpreted`` where there is no GPU."""
    if device.type != "cuda":
        return "interpreted"
    return family(torch.cuda.get_device_capability(device))


def family(capability: tuple[int, int]) -> str:
    """The family of a compute capability; ``sm86`` is whatever has 99 KiB of shared memory."""
    if capability[0] == 9:
        return "sm90"
    if capability[0] in (10, 11):
        return "sm100"
    return "sm80" if capability in ((8, 0), (8, 7)) else "sm86"


def tile(
    kernel: str,
    arch: str,
    element_size: int,
    head_dims: tuple[int, int],
    *,
    with_bias: bool = False,
    with_window_or_softcap: bool = False,
) -> Tile:
    """The tile of a kernel for the head dims of queries and values.

    A bias, a window that ends on the left, and a softcap each take registers from the tile.
    """
    if arch == "interpreted":
        return _INTERPRETED[kernel]
    if kernel == "rows":
        return _ROWS
    options = {"with_bias": with_bias, "with_window_or_softcap": with_window_or_softcap}
    return chosen(entry(kernel, arch, element_size, head_dims, **options))


def entry(
    kernel: str,
    arch: str,
    element_size: int,
    head_dims: tuple[int, int],
    *,
    with_bias: bool = False,
    with_window_or_softcap: bool = False,
) -> Entry:
    """Where the tile of a kernel stands among the measured ones."""
    kind = (
        "bias"
        if with_bias or kernel == "grad_bias"
        else "window"
        if with_window_or_softcap
        else "plain"
    )
    size = next(b for b in _BUCKETS if head_dims[0] <= b[0] and head_dims[1] <= b[1])
    return Entry(kernel, arch, triton_version(), element_size, kind, size)


def chosen(wanted: Entry) -> Tile:
    """The tile in force: the measured one, or else the one of the tables."""
    return MEASURED[wanted][0] if wanted in MEASURED else untuned_tile(wanted)


def untuned_tile(wanted: Entry) -> Tile:
    """The tile that was chosen by reasoning."""
    kernel, arch, _, element_size, kind, size = wanted
    if kernel in ("decode", "latent_decode"):
        return _untuned_decode_tile(wanted)
    bucket = _BUCKETS.index(size)
    if element_size == 4:
        tiles = _SINGLE_HYPER if kernel.startswith("hyper") else _SINGLE
        if kernel.endswith("grad_key_value"):
            tiles = _SINGLE_KEY_VALUE
        return Tile(*tiles[bucket])
    tiles = _HALF[kernel][kind]
    if arch in ("sm80", "sm86"):
        tiles = _HALF_ON_AMPERE.get((kernel, kind), tiles)
    return Tile(*tiles[bucket])


@functools.cache
def triton_version() -> str:
    """The first two numbers of Triton's version: the best tile changes with them."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def programs_wanted(arch: str) -> int:
    """How many programs fill a device, a few for each multiprocessor."""
    return 8 if arch == "interpreted" else 512


# Attention to a cache, which has to keep the memory busy: a stage of its pipeline holds about
# 32 KiB, and two programs share a multiprocessor where they fit. The key is the number of columns,
# of keys and values together, that are loaded for each token.
# largest number of columns -> (tokens, warps, stages), for elements of two bytes
_DECODE = {
    128: (128, 4, 3),
    256: (64, 4, 3),
    512: (32, 4, 3),
    1024: (32, 8, 2),
}
# Latent attention by rows; 64 rows are bound by their matmuls. Wider rows than 576 take fewer.
_DECODE_LATENT = {16: (32, 8, 3), 32: (32, 8, 3), 64: (64, 8, 2)}
# Elements of four bytes are multiplied outside of the tensor cores, 16 rows at a time.
_DECODE_SINGLE = {128: (32, 8, 2), 512: (16, 8, 2), 1024: (16, 8, 1)}


def decode_tile(
    arch: str, element_size: int, rows: int, columns: int, *, latent: bool, paged: bool
) -> Tile:
    """The tile of attention to a cache.

    Args:
        arch: The family of the device.
        element_size: Bytes of an element.
        rows: How many query rows there are to share a key head.
        columns: Columns that are loaded for each token.
        latent: Whether keys are the values too.
        paged: Whether a block table says where tokens are.
    """
    if arch == "interpreted":
        return Tile(16, 32, 4, 1)
    return chosen(decode_entry(arch, element_size, rows, columns, latent=latent, paged=paged))


def decode_entry(
    arch: str, element_size: int, rows: int, columns: int, *, latent: bool, paged: bool
) -> Entry:
    """Where the tile of attention to a cache stands among the measured ones."""
    is_ampere = arch in ("sm80", "sm86")
    most = 64
    if element_size == 4:
        most = 16
    elif (latent and columns > 576) or (is_ampere and columns > 256):
        most = 32
    rows = max(16, min(1 << (rows - 1).bit_length(), most))
    table = _DECODE if element_size == 2 else _DECODE_SINGLE
    size = (rows, next(largest for largest in table if columns <= largest))
    kernel, kind = "latent_decode" if latent else "decode", "paged" if paged else "dense"
    return Entry(kernel, arch, triton_version(), element_size, kind, size)


def _untuned_decode_tile(wanted: Entry) -> Tile:
    kernel, arch, _, element_size, kind, (rows, columns) = wanted
    tokens, warps, stages = (_DECODE if element_size == 2 else _DECODE_SINGLE)[columns]
    if kernel == "latent_decode" and element_size == 2:
        tokens, warps, stages = _DECODE_LATENT[rows]
        if arch == "sm100" and rows == 64:
            tokens = 32  # Triton 3.6 passes its accumulator through shared memory.
    if rows == 64:
        warps = 8
    if arch == "sm86":
        tokens = max(16, tokens // 2)
    if kind == "paged":
        # A look-up in the block table is a stage of its own before each of the others.
        stages = 2 * stages - 1
    return Tile(rows, tokens, warps, stages)


def smallest_split(arch: str) -> int:
    """How many tokens are worth a program of their own: about 64 KiB of keys and values."""
    return 32 if arch == "interpreted" else 128


def resident_programs(device: torch.device, tile: Tile, bytes_per_token: int, paged: bool) -> int:
    """How many programs of attention to a cache a device runs at a time, by its shared memory."""
    if device.type != "cuda":
        return 8
    # A load is under way while the tile before it is used.
    buffers = tile.num_stages // 2 if paged else tile.num_stages - 1
    needed = bytes_per_token * tile.columns * max(1, buffers)
    together = SHARED_MEMORY[architecture(device)] // needed
    # More would not find enough registers.
    together = max(1, min(together, max(2, 12 // tile.num_warps)))
    return together * torch.cuda.get_device_properties(device).multi_processor_count
