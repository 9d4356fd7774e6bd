"""The search for tiles, with a launcher and a clock that stand in for a GPU."""

import os
import re
from dataclasses import dataclass, replace

import pytest
import torch
from typer.testing import CliRunner

import bench.__main__ as commands
from bench import tiles, tune
from bench.providers import PROVIDERS
from bench.runner import run_workload
from bench.tiles import KERNELS, candidates, case
from bench.worker import Worker
from efficient_attn.kernels.triton import configs
from efficient_attn.kernels.triton.measured_tiles import MEASURED, Entry, Tile
from tests.bench.toys import GQA

pytest.importorskip("triton", reason="tiles are those of its kernels")

FORWARD = replace(case("forward", "sm90"), workload=GQA)
IN_FORCE = Tile(128, 64, 8, 2)
NEIGHBOUR, OTHER = Tile(128, 64, 4, 2), Tile(128, 128, 8, 2)


@pytest.fixture(autouse=True)
def tables_as_they_were():
    before = dict(MEASURED)
    yield
    assert before == MEASURED


@dataclass(frozen=True)
class Launcher:
    """Computes the formula, and goes wrong with some tiles."""

    crashes: Tile | None = None
    wrong: Tile | None = None
    refused: Tile | None = None

    def __call__(self, workload, inputs):
        right = PROVIDERS["eager"].build(workload, inputs)

        def call():
            tile = MEASURED[FORWARD.entry][0]
            if tile == self.crashes:
                os._exit(1)
            if tile == self.refused:
                raise RuntimeError("out of resource: shared memory")
            return right() * (1.1 if tile == self.wrong else 1.0)

        return call


class Clock:
    """The seconds of the tile that a step asks for."""

    round_seconds = 0.1

    def __init__(self, seconds):
        self.seconds = seconds

    def sample(self, step, repeats):
        step()
        return self.seconds.get(MEASURED[FORWARD.entry][0], 1.0)


def search(seconds, launcher=Launcher(), most=12):
    def run(workload, providers, write):
        run_workload(workload, providers, "cpu", Clock(seconds), write, seconds=0.0)

    return tune.search(FORWARD, run, most=most, launch=launcher)


def test_the_fastest_is_returned():
    record = search({NEIGHBOUR: 0.5})
    assert record["tile"] == list(NEIGHBOUR) and record["before"] == list(IN_FORCE)
    assert record["times_as_fast"] == pytest.approx(2.0)
    assert len(record["tried"]) == 12 and {o["status"] for o in record["tried"]} == {"timed"}


def test_what_is_in_force_stays_where_nothing_is_faster():
    record = search({})
    assert record["tile"] == list(IN_FORCE) and record["times_as_fast"] == 1.0


def test_a_wrong_result_is_never_chosen():
    record = search({NEIGHBOUR: 0.1, OTHER: 0.5}, Launcher(wrong=NEIGHBOUR))
    assert record["tile"] == list(OTHER)
    (wrong,) = [o for o in record["tried"] if o["status"] == "wrong"]
    assert wrong["tile"] == list(NEIGHBOUR) and wrong["seconds"] is None and wrong["reasons"]


def test_what_does_not_compile_costs_itself():
    record = search({OTHER: 0.5}, Launcher(refused=NEIGHBOUR))
    assert record["tile"] == list(OTHER)
    (broken,) = [o for o in record["tried"] if o["status"] == "broken"]
    assert broken["tile"] == list(NEIGHBOUR) and "shared memory" in broken["reasons"][0]


def test_where_the_tile_in_force_fails_the_fastest_of_the_others_is_taken():
    record = search({OTHER: 0.5}, Launcher(wrong=IN_FORCE))
    assert record["tile"] == list(OTHER) and record["times_as_fast"] is None
    assert "did not pass" in tune.told(record, "a device")


def test_where_nothing_passes_nothing_is_entered():
    record = search({}, Launcher(wrong=IN_FORCE), most=1)
    assert record["tile"] is None and tune.pasted(record, "a device") == ""
    assert "stays (128, 64, 8, 2)" in tune.told(record, "a device")


def test_a_crash_costs_one_candidate():
    deadly = candidates(FORWARD.entry, 3)[1]
    with Worker("cpu", seconds=0.0) as worker:

        def run(workload, providers, write):
            worker.run(workload, providers, write, timeout=300)

        record = tune.search(FORWARD, run, most=3, launch=Launcher(crashes=deadly))
    status = {tuple(outcome["tile"]): outcome["status"] for outcome in record["tried"]}
    assert len(status) == 3 and status.pop(deadly) == "broken"
    assert set(status.values()) == {"timed"} and tuple(record["tile"]) in status


def test_an_entry_is_pasted_into_the_table_and_then_in_force():
    line = tune.pasted(search({NEIGHBOUR: 0.5}), "a device")
    pasted = eval(f"{{{line}}}", {"Entry": Entry, "Tile": Tile})
    assert pasted == {FORWARD.entry: (NEIGHBOUR, "a device")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MEASURED, *next(iter(pasted.items())))
        assert configs.tile("forward", "sm90", 2, (128, 128)) == NEIGHBOUR
        assert configs.tile("forward", "sm90", 2, (128, 96)) == NEIGHBOUR
        assert configs.tile("forward", "sm90", 2, (64, 64)) == Tile(128, 64, 8, 3)
        assert configs.tile("forward", "sm80", 2, (128, 128)) != NEIGHBOUR
        # A search starts from what is in force, and leaves it there.
        again = search({IN_FORCE: 0.1})
        assert again["before"] == list(NEIGHBOUR) and again["tile"] == list(IN_FORCE)
        assert MEASURED[FORWARD.entry] == (NEIGHBOUR, "a device")
        patch.setattr(configs, "triton_version", lambda: "another")
        assert configs.tile("forward", "sm90", 2, (128, 128)) != NEIGHBOUR


@pytest.mark.parametrize("arch", configs.SHARED_MEMORY)
@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_begin_with_the_tile_in_force_and_stay_within_reason(kernel, arch):
    for dims in ((64, 64), (128, 128), (192, 128), (256, 256)):
        for dtype in ("bfloat16", "float32"):
            entry = case(kernel, arch, dims=dims, dtype=dtype).entry
            some, every = candidates(entry, 8), candidates(entry, 1000)
            assert every[: len(some)] == some and len(set(every)) == len(every) > 3
            # What the tables hold compiles without spilling, so the estimate must let it pass.
            assert some[0] == configs.untuned_tile(entry) and tiles._fits(entry, some[0])
            assert all(configs.untuned_tile(entry).rows == t.rows for t in every) or (
                not kernel.endswith("decode")
            )


def test_the_entry_of_a_case_is_the_one_that_its_call_asks_for(monkeypatch):
    """The launchers' own arguments, on tensors without memory."""
    from efficient_attn.kernels.triton._arguments import Problem
    from efficient_attn.kernels.triton._decode_plan import Plan

    asked = []
    monkeypatch.setattr(configs, "architecture", lambda device: "sm90")
    monkeypatch.setattr(configs, "chosen", lambda entry: asked.append(entry) or Tile(16, 16, 4, 1))

    def meta(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    for kernel, options in (
        *((kernel, {}) for kernel in KERNELS),
        ("forward", {"window": 512, "dims": (192, 128)}),
        ("decode", {"rows": 32, "dims": (64, 64)}),
        ("latent_decode", {"rows": 64}),
    ):
        of = case(kernel, "sm90", **options)
        w = of.workload
        query = meta(w.batch, w.q_heads, w.num_queries, w.d_v if w.is_latent else w.d_qk)
        key = meta(w.batch, w.k_heads, w.num_keys, w.d_qk)
        value = None if w.is_latent else meta(w.batch, w.v_heads, w.num_keys, w.d_v)
        if w.reads_a_cache:
            assert Plan(query, None, key, value, None, None).tile
        else:
            left = None if w.window is None else w.window[0]
            Problem(query, key, value, None, None, left, 0, 1.0, 0.0).tile(kernel)
        assert asked.pop() == of.entry, kernel


@pytest.mark.parametrize(
    ("kernel", "options", "reason"),
    [
        ("grad_bias", {}, "there are forward"),
        ("forward", {"dims": (4, 64)}, "8 to 256"),
        ("forward", {"dtype": "int8"}, "there are float32"),
        ("decode", {"rows": 8}, "one of"),
        ("decode", {"window": 5}, "leave it out"),
    ],
)
def test_what_cannot_be_tuned_is_refused(kernel, options, reason):
    with pytest.raises(ValueError, match=reason):
        case(kernel, "sm90", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_line_says_what_is_missing(tmp_path):
    out = tmp_path / "tune.jsonl"
    result = CliRunner().invoke(commands.app, ["tune", "forward", "--out", str(out)])
    assert result.exit_code == 2 and not out.exists()
    assert re.fullmatch(r"A tile cannot be tuned here: .*no CUDA device.*\.\n", result.output)
