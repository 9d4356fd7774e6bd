import time

import pytest
import torch

from bench.measure import MAX_ROUNDS, MIN_ROUNDS, SLOW_ROUNDS, CpuClock, interleave, peak_bytes

MIB = 2**20


class FakeClock:
    """Every call takes as long as its step says, twice as long on the first call of all."""

    round_seconds = 1.0

    def __init__(self):
        self.calls = []

    def sample(self, step, repeats):
        name, seconds = step()
        self.calls.append((name, repeats))
        return seconds


def steps(**seconds):
    return {name: lambda name=name, value=value: (name, value) for name, value in seconds.items()}


def test_rounds_alternate_in_direction():
    clock = FakeClock()
    timings = interleave(steps(a=1.0, b=1.0, c=1.0), clock, seconds=0.0)
    order = "".join(name for name, _ in clock.calls)
    assert order == "abc" + "abccba" * (MIN_ROUNDS // 2) + "abc" * (MIN_ROUNDS % 2)
    assert all(timing.rounds == MIN_ROUNDS for timing in timings.values())


def test_repeats_fill_a_round_and_rounds_fill_the_time():
    clock = FakeClock()
    timings = interleave(steps(fast=0.1, slower=0.2), clock, seconds=20.0)
    assert timings["fast"].repeats == 10 and timings["slower"].repeats == 5
    assert timings["fast"].rounds == 20
    assert interleave(steps(a=0.5), FakeClock(), seconds=1e9)["a"].rounds == MAX_ROUNDS


def test_slow_steps_sit_out():
    timings = interleave(steps(fast=1.0, slow=5.0), FakeClock(), seconds=0.0)
    assert timings["slow"].rounds == SLOW_ROUNDS and timings["fast"].rounds == MIN_ROUNDS


def test_slow_steps_that_take_long_are_timed_once():
    timings = interleave(steps(fast=9.0, slow=50.0), FakeClock(), seconds=0.0)
    assert timings["slow"].rounds == 1 and timings["fast"].rounds == MIN_ROUNDS
    assert timings["slow"].low == timings["slow"].median == timings["slow"].high == 50.0


def test_a_ceiling_makes_nobody_slow():
    every = steps(ceiling=0.1, fast=1.0, slow=5.0)
    timings = interleave(every, FakeClock(), seconds=0.0, apart=["ceiling"])
    rounds = {name: timing.rounds for name, timing in timings.items()}
    assert rounds == {"ceiling": MIN_ROUNDS, "fast": MIN_ROUNDS, "slow": SLOW_ROUNDS}


def test_quantiles():
    values = iter([9.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    timing = interleave({"a": lambda: ("a", next(values))}, FakeClock(), seconds=0.0)["a"]
    assert timing.median == 3.0
    assert timing.low == pytest.approx(1.8) and timing.high == pytest.approx(4.2)


def test_nothing_to_time():
    assert interleave({}, FakeClock(), seconds=1.0) == {}


def test_cpu_clock_counts_calls():
    calls = []
    assert CpuClock().sample(lambda: (calls.append(1), time.sleep(0.002)), 3) >= 0.002
    assert len(calls) == 3


def test_peak_counts_what_is_held_at_once():
    def step():
        first = torch.empty(MIB, dtype=torch.int8)
        second = torch.empty(2 * MIB, dtype=torch.int8)
        del first, second
        return torch.empty(MIB, dtype=torch.int8)

    # Twice, since what is left over from one profile must not count in the next.
    assert [peak_bytes(step, "cpu") for _ in range(2)] == [3 * MIB, 3 * MIB]


def test_peak_shows_an_expanded_key():
    key = torch.randn(1, 2, 512, 64)
    index = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    expanded = 8 * 512 * 64 * 4
    assert peak_bytes(lambda: key[:, index].sum(), "cpu") >= expanded
    assert peak_bytes(lambda: key.sum(), "cpu") < expanded / 100
