"""PagedCache against a model of Python lists, and its refusals one by one."""

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from efficient_attn.cache import KeyValueRows, LatentRows, PagedCache
from efficient_attn.errors import CacheFullError

PAGES, PAGE_SIZE = 5, 3


class Machine(RuleBasedStateMachine):
    """Every token is one number, so that lists of numbers say what the sequences must hold."""

    alive = Bundle("alive")

    def __init__(self):
        super().__init__()
        self.cache = PagedCache(KeyValueRows(1, 2, 1, 1), PAGES, PAGE_SIZE, dtype=torch.float64)
        for part in self.cache._pages.parts:
            part.fill_(torch.nan)
        self.model = {}
        self.batches = []
        self.next = 0

    @rule(target=alive)
    def allocate(self):
        return self.add(self.cache.allocate(), [])

    @rule(target=alive, origin=alive)
    def fork(self, origin):
        if origin not in self.model:
            return multiple()
        return self.add(self.cache.fork(origin), self.model[origin])

    def add(self, sequence, tokens):
        assert sequence not in self.model
        self.model[sequence] = list(tokens)
        return sequence

    @rule(data=st.data(), tokens=st.integers(0, 9))
    def append(self, data, tokens):
        if not self.model:
            return
        sequences = data.draw(st.permutations(sorted(self.model)))
        sequences = sequences[: data.draw(st.integers(1, len(sequences)))]
        counts = [data.draw(st.integers(0, tokens)) for _ in sequences]
        new = torch.arange(self.next, self.next + len(sequences) * tokens).double()
        new = new.view(len(sequences), 1, tokens, 1)
        self.next += new.numel()
        batch = self.cache.batch(sequences)
        self.batches = [*self.batches[-2:], batch]  # older ones must notice what others do
        before = self.state()
        try:
            batch.append(new, torch.cat([-new, new + 0.5], 1), counts=counts)
        except CacheFullError:
            assert self.state() == before
            # One after the other they do not fit either.
            with pytest.raises(CacheFullError):
                alone = copy.deepcopy(self.cache)
                for sequence, count in zip(sequences, counts, strict=True):
                    one = torch.zeros(1, 1, count, 1).double()
                    alone.batch([sequence]).append(one, one.expand(1, 2, -1, -1))
            return
        for b, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            self.model[sequence] += new[b, 0, tokens - count :, 0].tolist()

    @rule(sequence=alive, length=st.integers(0, 20))
    def crop(self, sequence, length):
        if sequence in self.model:
            self.cache.crop(sequence, length)
            del self.model[sequence][length:]

    @rule(sequence=consumes(alive))
    def free(self, sequence):
        if sequence in self.model:
            self.cache.free(sequence)
            del self.model[sequence]
        with pytest.raises(ValueError, match=f"sequence {sequence} was freed before"):
            self.cache.free(sequence)

    def state(self):
        held = self.cache._sequences
        return (
            {s: (list(x.pages), x.length) for s, x in held.items()},
            list(self.cache._free),
            list(self.cache._owners),
        )

    @invariant()
    def no_page_is_lost(self):
        held = [page for x in self.cache._sequences.values() for page in x.pages]
        assert sorted({*held, *self.cache._free}) == list(range(PAGES))
        assert not set(held) & set(self.cache._free)
        assert len(self.cache._free) == len(set(self.cache._free)) == self.cache.num_free_pages
        assert [held.count(page) for page in range(PAGES)] == self.cache._owners

    @invariant()
    def every_sequence_is_what_was_appended(self):
        assert self.cache.sequences == tuple(self.model)
        batches = [b for b in self.batches if set(b.sequences) <= set(self.model)]
        if self.model:
            batches.append(self.cache.batch(sorted(self.model)))
        for batch in batches:
            key, value = batch.filled()
            assert batch.lengths.tolist() == batch.host_lengths
            for b, sequence in enumerate(batch.sequences):
                expected = torch.tensor(self.model[sequence]).double()
                length = batch.host_lengths[b]
                assert length == len(expected) == self.cache.length(sequence)
                assert torch.equal(key[b, 0, :length, 0], expected)
                assert torch.equal(value[b, 0, :length, 0], -expected)
                assert torch.equal(value[b, 1, :length, 0], expected + 0.5)


TestAgainstLists = Machine.TestCase
TestAgainstLists.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)


def test_a_fork_shares_pages_until_one_of_the_two_goes_on(rows, new_tokens):
    cache = PagedCache(rows, 6, 4)
    origin = cache.allocate()
    cache.batch([origin]).append(*new_tokens(rows, 1, 6))
    assert cache.num_free_pages == 4
    fork = cache.fork(origin)
    assert cache.num_free_pages == 4
    both = cache.batch([origin, fork])
    both.append(*new_tokens(rows, 2, 1))  # one of them needs a copy, the other has the page alone
    assert cache.num_free_pages == 3
    table = both.block_table
    assert table[0, 0] == table[1, 0] and table[0, 1] != table[1, 1]
    ours, theirs = zip(*(part.unbind() for part in both.filled()), strict=True)
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x[..., :6, :], y[..., :6, :]) and not torch.equal(x, y)
    cache.free(origin)
    assert cache.num_free_pages == 4
    cache.free(fork)
    assert cache.num_free_pages == 6 and cache.sequences == ()


def test_a_pool_without_a_page_for_the_copy_is_left_as_it_was(new_tokens):
    rows = LatentRows(4, 2)
    cache = PagedCache(rows, 2, 4)
    origin = cache.allocate()
    cache.batch([origin]).append(*new_tokens(rows, 1, 7))
    fork = cache.fork(origin)
    both = cache.batch([origin, fork])
    with pytest.raises(CacheFullError, match="1 more pages are needed and 0 of 2 are free"):
        both.append(*new_tokens(rows, 2, 1))
    assert both.host_lengths == [7, 7] and torch.equal(*both.block_table)
    cache.free(origin)
    cache.batch([fork]).append(*new_tokens(rows, 1, 1))
    assert cache.num_free_pages == 0


def test_bytes_are_the_formula(rows):
    cache = PagedCache(rows, 5, 16, dtype=torch.bfloat16)
    assert cache.nbytes == PagedCache.bytes_needed(rows, 5, 16, torch.bfloat16)
    assert cache.nbytes == 5 * 16 * 2 * sum(torch.Size(shape).numel() for shape in rows.shapes)


def test_what_is_refused(new_tokens):
    rows = LatentRows(4, 2)
    cache = PagedCache(rows, 4, 4)
    first, second = cache.allocate(), cache.allocate()
    batch = cache.batch([first, second])
    batch.append(*new_tokens(rows, 2, 5))
    with pytest.raises(CacheFullError, match="2 more pages are needed and 0 of 4 are free"):
        batch.append(*new_tokens(rows, 2, 4))
    assert batch.host_lengths == [5, 5]
    with pytest.raises(TypeError, match="float64 and the cache"):
        batch.append(*new_tokens(rows, 2, 1, torch.float64))
    with pytest.raises(ValueError, match=r"latent has shape \(1, 1, 6\)"):
        batch.append(*new_tokens(rows, 1, 1))
    with pytest.raises(ValueError, match="one comes twice"):
        cache.batch([first, first])
    with pytest.raises(ValueError, match="at least one"):
        cache.batch([])
    with pytest.raises(ValueError, match="must not be negative"):
        cache.crop(first, -1)
    cache.free(second)
    for call in (
        lambda: batch.append(*new_tokens(rows, 2, 1)),
        lambda: batch.block_table,
        lambda: cache.fork(second),
        lambda: cache.crop(second, 0),
        lambda: cache.batch([second]),
        lambda: cache.free(second),
    ):
        with pytest.raises(ValueError, match="sequence 1 was freed before"):
            call()
    with pytest.raises(ValueError, match="sequence 7 was never allocated"):
        cache.free(7)
    assert cache.num_free_pages == 2
