import pytest
import torch

from efficient_attn.convert.mla import CompressOptions, compress
from efficient_attn.convert.mla.rotation import choose, components, errors_of_turning
from efficient_attn.convert.mla.sizes import (
    best_choice,
    error_curve,
    shared_table,
    turning_gains,
)
from tests.convert.mla.layers import layer
from tests.convert.mla.test_compress import moments_of


def test_the_whole_budget_keeps_everything():
    source = layer()
    curve = error_curve(source, moments_of(source), 48)
    assert best_choice([curve]) == (1, 24)
    assert curve[1, 24] == pytest.approx(0, abs=1e-9)


def test_the_size_with_the_least_error_over_all_layers_is_taken():
    assert best_choice([{0: 3.0, 2: 1.0, 4: 2.0}, {0: 3.0, 2: 9.0, 4: 5.0}]) == 0
    assert best_choice([{0: 3.0, 2: 1.0, 4: 2.0}, {0: 3.0, 2: 3.0, 4: 1.0}]) == 4
    with pytest.raises(ValueError, match="no curves"):
        best_choice([])


def test_a_curve_tells_what_compressing_tells():
    source, options = layer(), CompressOptions(refine=0)
    moments = moments_of(source)
    curve = error_curve(source, moments, 16)
    for rope_dim in (0, 4, 14):
        made = compress(
            source, moments, kv_lora_rank=16 - rope_dim, rope_dim=rope_dim, options=options
        )
        assert curve[1, rope_dim] == pytest.approx(made.key_error + made.value_error)


def test_a_shared_table_has_the_frequencies_that_layers_together_need_most():
    gains = [torch.tensor([[5.0, 1.0], [4.0, 3.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])]
    frequencies = torch.tensor([1.0, 0.5])
    assert shared_table(gains, frequencies, 2).tolist() == [1.0, 0.5]
    assert shared_table(gains, frequencies, 3).tolist() == [1.0, 0.5, 0.5]
    assert shared_table(gains, frequencies, 4).tolist() == [1.0, 1.0, 0.5, 0.5]


def test_one_layer_alone_shares_its_own_choice():
    source = layer()
    moments = moments_of(source)
    part = choose(source, moments, components(source, moments, "query-aware"), 5)
    table = shared_table([turning_gains(source, moments)], source.inverse_frequencies, 5)
    assert torch.equal(part.frequencies, table)
    given = choose(source, moments, components(source, moments, "query-aware"), 5, table=table)
    assert torch.equal(given.frequencies, table)


def test_turning_at_the_right_speed_costs_nothing_and_at_none_most():
    source = layer()
    moments = moments_of(source)
    found = components(source, moments, "unitary")
    own = errors_of_turning(source, moments, found, source.inverse_frequencies.double())
    still = errors_of_turning(source, moments, found, torch.zeros(1, dtype=torch.float64))
    at = found.frequency
    assert own[torch.arange(len(at)), at].abs().max() < 1e-12 * still.max()
    assert (still[:, 0] > 0).all()


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"kv_lora_rank": 8, "rope_dim": 3}, "even and at most 24"),
        ({"kv_lora_rank": 8, "rope_dim": 26}, "even and at most 24"),
        ({"kv_lora_rank": 0, "rope_dim": 4}, "from 1 to 20"),
        ({"kv_lora_rank": 21, "rope_dim": 4}, "from 1 to 20"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, complaint):
    source = layer()
    with pytest.raises(ValueError, match=complaint):
        compress(source, moments_of(source), **sizes)


def test_choices_that_do_not_exist_are_refused():
    source = layer()
    moments = moments_of(source)
    for given in ({"rotation": "pca"}, {"selection": "all"}, {"metric": "l1"}):
        with pytest.raises(ValueError, match="take "):
            CompressOptions(**given)
    with pytest.raises(ValueError, match="needs refit"):
        CompressOptions(refit=False)
    with pytest.raises(ValueError, match="fold starts at 1"):
        CompressOptions(fold=0)
    with pytest.raises(ValueError, match="must divide the 4"):
        compress(source, moments, kv_lora_rank=8, rope_dim=4, options=CompressOptions(fold=3))
    with pytest.raises(ValueError, match="multiple of rope_dim"):
        compress(source, moments, kv_lora_rank=8, rope_dim=6, options=CompressOptions.paper(fold=1))
    with pytest.raises(ValueError, match="for 2 turned pairs"):
        table = torch.ones(3, dtype=torch.float64)
        compress(source, moments, kv_lora_rank=8, rope_dim=4, frequencies=table)


def test_the_same_input_gives_the_same_bytes():
    source = layer()
    first, again = (
        compress(source, moments_of(source), kv_lora_rank=8, rope_dim=4).weights for _ in range(2)
    )
    for name in ("query", "latent_down", "latent_up", "inverse_frequencies"):
        assert torch.equal(getattr(first, name), getattr(again, name))
