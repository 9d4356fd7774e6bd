"""The state of DGQA and KDGQA: when it changes, how it is saved, resumed, recomputed and shared."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

import efficient_attn as ea
from efficient_attn.layers import DGQA, KDGQA, GroupedQueryAttention

EMBED, HEADS, GROUPS = 24, 6, 3


def make(kind=DGQA, **options):
    torch.manual_seed(0)
    if kind is DGQA:
        options = {"update_every": 3} | options
    layer = kind(EMBED, HEADS, num_kv_heads=GROUPS, **options)
    with torch.no_grad():  # key heads that differ, so that groups do
        layer.k_proj.weight.view(GROUPS, -1)[0].mul_(0.4)
    return layer


def batch(seed, size=4):
    """Tokens with channels of other scales in every batch, so that maps change."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 5, EMBED, generator=generator)
    return x * torch.rand(EMBED, generator=generator).mul(2).exp()


def step(layer, x, optimizer=None):
    """One training step on something to learn."""
    loss = layer(x).square().mean()
    layer.zero_grad()
    loss.backward()
    if optimizer is not None:
        optimizer.step()


def state(layer):
    return {name: x.clone() for name, x in layer.state_dict().items()}


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("compat", [None, "khan2024"])
@pytest.mark.parametrize("flavor", ["ema", "difference"])
def test_maps_follow_a_plain_loop_at_multiples_of_the_interval(flavor, compat):
    layer = make(flavor=flavor, compat=compat)
    memory, updates, sizes, seen = np.zeros(GROUPS), 0, [2, 2, 2], set()
    for number in range(10):
        x = batch(number, size=4 if number % 4 else 2)
        key = layer.k_proj(x).view(len(x), -1, GROUPS, EMBED // HEADS).detach().double()
        norms = key.square().sum((1, 3)).sqrt()
        norms = (norms.sum(0) if compat else norms.mean(0)).numpy()
        if number % 3 == 0:
            if compat:
                scores = abs(memory - norms) if flavor != "ema" else 0.9 * norms + 0.1 * memory
                memory = (memory + norms) / 3
            elif flavor == "ema":
                memory = 0.9 * memory + 0.1 * norms
                scores = memory / (1 - 0.9 ** (updates + 1))
            else:
                scores, memory = abs(norms - memory), norms
            updates += 1
            rounding = "nearest" if compat else "remainder"
            sizes = ea.allocate_heads(torch.from_numpy(scores), HEADS, rounding=rounding)[0]
            sizes = sizes.tolist()
        layer(x)
        seen.add(tuple(sizes))
        assert layer.group_sizes.tolist() == sizes
        np.testing.assert_allclose(layer.norm_memory.numpy(), memory, rtol=1e-5)
    assert (int(layer.num_updates), int(layer.num_steps)) == (4, 10) and len(seen) > 1


@pytest.mark.parametrize("kind", [DGQA, KDGQA])
def test_evaluation_changes_nothing(kind):
    layer = make(kind)
    for number in range(5):
        layer(batch(number))
    layer.eval()
    before = state(layer)
    for number in range(5, 12):
        layer(batch(number))
        with torch.inference_mode():
            layer(batch(number))
    assert_same_state(state(layer), before)


@pytest.mark.parametrize("kind", [DGQA, KDGQA])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(kind):
    def run(layer, first, last):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        for number in range(first, last):
            step(layer, batch(number), optimizer)
        return layer

    whole = run(make(kind), 0, 54)
    saved = state(run(make(kind), 0, 4))
    resumed = make(kind)
    resumed.load_state_dict(saved)
    assert_same_state(state(run(resumed, 4, 54)), state(whole))


def test_even_groups_load_and_so_does_a_frozen_layer():
    even = GroupedQueryAttention(EMBED, HEADS, num_kv_heads=GROUPS)
    used = make(update_every=1)
    for number in range(3):
        used(batch(number))
    used.freeze()
    assert used.group_sizes.tolist() != [2, 2, 2]
    again = make()
    again.load_state_dict(used.state_dict())
    assert again.group_sizes.tolist() == used.group_sizes.tolist()
    before = state(again)
    again(batch(7))
    assert_same_state(state(again), before)
    used.load_state_dict(even.state_dict())
    fresh = make(update_every=1)
    fresh.load_state_dict(even.state_dict())
    assert_same_state(state(used), state(fresh))
    used(batch(8))  # not frozen any more
    assert used.num_updates == 1


def test_a_map_that_is_not_of_this_kind_is_refused():
    layer = make()
    saved = state(layer)
    saved["q_to_v"][0] = 2
    with pytest.raises(RuntimeError, match="q_to_k and q_to_v differ"):
        layer.load_state_dict(saved)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [DGQA, KDGQA])
def test_activation_checkpointing_updates_once_and_gives_the_same_gradients(
    kind, compiled, reentrant
):
    layers = [make(kind) for _ in range(2)]
    call = torch.compile(layers[1], backend="aot_eager") if compiled else layers[1]
    for number in range(5):
        x = batch(number).requires_grad_()
        layers[0](x).square().mean().backward()
        checkpoint(call, x, use_reentrant=reentrant).square().mean().backward()
        grads = [[p.grad for p in layer.parameters()] for layer in layers]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
    assert_same_state(state(layers[0]), state(layers[1]))
    assert layers[0].num_updates == (2 if kind is DGQA else 5)


def test_two_forwards_before_a_backward():
    """The map of the first call must outlive the update in the second."""
    layer = make(update_every=1)
    first, second = batch(0).requires_grad_(), batch(1).requires_grad_()
    outs = layer(first), layer(second)
    (outs[0].sum() + outs[1].sum()).backward()
    alone = make(update_every=1)
    grad = torch.autograd.grad(alone(first).sum(), first)[0]
    torch.testing.assert_close(first.grad, grad)


def test_a_layer_can_be_copied_moved_and_cast():
    layer = make(update_every=1)
    layer(batch(0))
    other = copy.deepcopy(layer).half().float()
    assert other.norm_memory.dtype == torch.float32
    assert_same_state(
        {k: v for k, v in state(other).items() if "q_to" in k},
        {k: v for k, v in state(layer).items() if "q_to" in k},
    )


def _train_on_one_rank(rank, folder, world):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    group = dist.group.WORLD
    model = nn.Sequential(
        make(process_group=group), make(KDGQA, scope="batch", process_group=group)
    )
    model = nn.parallel.DistributedDataParallel(model)
    for number in range(4):
        x = torch.chunk(batch(number, size=6), world)[rank]
        out = model(x)
        (out.square().sum() / 6).backward()
    if rank == 0:  # evaluation waits for nobody
        model.module.eval()(x)
    torch.save([out.detach(), model.module.state_dict()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_share_their_maps_and_equal_one_process(tmp_path):
    mp.spawn(_train_on_one_rank, args=(str(tmp_path), 2), nprocs=2)
    (one, state_one), (two, state_two) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert_same_state(state_one, state_two)
    alone = nn.Sequential(make(), make(KDGQA, scope="batch"))
    for number in range(4):
        out = alone(batch(number, size=6))
    torch.testing.assert_close(torch.cat([one, two]), out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state_one, alone.state_dict(), rtol=1e-6, atol=1e-7)
    assert state_one["0.q_to_k"].bincount(minlength=3).tolist() != [2, 2, 2]
