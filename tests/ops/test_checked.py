"""Kernels that have to show that they agree: who answers, who is removed, and who is told."""

import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

from efficient_attn.ops.checked import Candidate, CheckedKernel
from efficient_attn.planning.ordering import segment_order

CODES = torch.tensor([[[3, 1, 3, 0, 2, 1]]], dtype=torch.int32)
ARGUMENTS = (CODES, 4, [6], 6, 0)
TRUTH = segment_order(*ARGUMENTS)


class Kernel:
    """Computes segment_order, or what it is told to, and counts its calls."""

    def __init__(self, *answers):
        self.answers, self.calls = list(answers), 0

    def __call__(self, *args):
        self.calls += 1
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer or segment_order(*args)


@pytest.fixture
def put_in_place():
    """Put a kernel in the place of the portable one, on the CPU; afterwards it is removed."""
    handles = []

    def put(kernel, covers=lambda codes, *_: codes.shape[-1] == 6):
        def sample(device):
            samples.append(device)
            return ARGUMENTS

        samples = []
        candidate = Candidate("segment_order", covers, sample, torch.equal)
        handles.append(CheckedKernel(candidate, kernel, "CPU"))
        return handles[-1], samples

    yield put
    for handle in handles:
        handle.remove()


def order():
    return torch.ops.efficient_attn.segment_order(*ARGUMENTS)


def is_true(result):
    return all(map(torch.equal, result, TRUTH))


def test_a_kernel_that_agrees_answers_and_is_checked_once(put_in_place):
    kernel = Kernel()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle, samples = put_in_place(kernel)
        assert is_true(order()) and is_true(order())
    assert samples == [torch.device("cpu")] and kernel.calls == 3 and handle.refusal is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (TRUTH[::-1], "computes a small sample wrongly"),
        (RuntimeError("no kernel image is available"), "failed: no kernel image is available"),
    ],
)
def test_a_kernel_that_fails_its_check_is_removed_with_one_warning(put_in_place, answer, said):
    kernel = Kernel(answer)
    handle, _ = put_in_place(kernel)
    with pytest.warns(RuntimeWarning, match=f"of segment_order {said}") as told:
        assert is_true(order()) and is_true(order())
    assert len(told) == 1 and kernel.calls == 1 and said in handle.refusal


def test_a_kernel_that_fails_later_is_removed_with_one_warning(put_in_place):
    kernel = Kernel(None, None, RuntimeError("too many resources"))
    handle, _ = put_in_place(kernel)
    assert is_true(order())
    with pytest.warns(RuntimeWarning, match="too many resources") as told:
        assert is_true(order()) and is_true(order())
    assert len(told) == 1 and kernel.calls == 3 and handle.refusal


def test_what_is_not_covered_goes_to_what_answered_before(put_in_place):
    kernel = Kernel()
    handle, samples = put_in_place(kernel, covers=lambda *_: False)
    assert is_true(order())
    assert kernel.calls == 0 and not samples and handle.refusal is None


def test_the_handle_gives_the_op_back(put_in_place):
    kernel = Kernel()
    handle, _ = put_in_place(kernel)
    order()
    handle.remove()
    handle.remove()
    assert is_true(order()) and kernel.calls == 2 and handle.refusal == "removed"


@pytest.fixture
def call_on(put_in_place, monkeypatch):
    """Call a kernel on a device that need not be there; returns on which it has been checked."""
    handle, _ = put_in_place(Kernel())
    checked = []
    monkeypatch.setattr(handle, "_reproduces_the_sample", lambda x: checked.append(str(x)) or True)

    def call(device, capturing=False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        with FakeTensorMode():
            handle._call(torch.empty(1, 1, 6, dtype=torch.int32, device=device), *ARGUMENTS[1:])
        return checked

    return call


def test_every_device_is_checked_once(call_on):
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        checked = call_on(device)
    assert checked == ["cuda:0", "cuda:1"]


def test_nothing_is_checked_while_a_graph_is_captured(call_on):
    assert call_on("cuda:0", capturing=True) == []
    assert call_on("cuda:0") == ["cuda:0"]
