"""The choices that a user makes once, validated where they are made."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PROJECTIONS = 16


@dataclass(frozen=True, kw_only=True)
class HyperConfig:
    """How HyperAttention chooses the keys of a query.

    A query attends to some keys exactly (sinks, and the keys around it), to one block of keys with
    a similar hash, and to a sample of the keys that remain, weighted so that the sum over all keys
    is estimated without bias; how much the sample may weigh can be limited.

    There are two structures. With a ``leaf_size``, queries are cut into leaves of that many
    neighbours; a leaf shares its exact keys and has a sample of its own, and the causal form costs
    the same for every query and never looks ahead. Without one (``leaf_size=None``) it is the
    published algorithm: one sample for all queries, and under a causal mask a recursion that halves
    the sequence until what is left is exact.

    Args:
        block_size: Keys in the hashed block of a query; 0 for no hashing.
        sample_size: Sampled keys; 0 for no sampling.
        leaf_size: Neighbouring queries that share their exact keys and their sample, or None for
            the published structure.
        window: Keys before the leaf (without a causal mask, behind it too) that are exact.
        sinks: Keys at the beginning that are exact for every query.
        num_projections: Bits of the hash, at most 16; None for as many as make the average bucket
            one block.
        exact_below: Shorter key sequences get exact attention. In the published structure this is
            also the length at which the recursion stops.
        center: Subtract the mean of queries and of keys before hashing; softmax does not see it.
        align_blocks: Without a causal mask, give queries the keys that surround their own code,
            rather than those of equal rank.
        own_samples: Draw each leaf's sample independently. Otherwise leaves share random numbers,
            and their errors are alike.
        replacement: Sample with replacement, as published; otherwise one key from each of
            ``sample_size`` equal intervals.
        max_sample_mass: The most that the sample of a query may weigh, as a multiple of the mass of
            its exact keys. A few draws that stand for hundreds of keys can outweigh all that is
            certain; with a limit they are trusted less, at the price of a bias towards what is
            near where attention really is spread out. None for no limit, as without leaves.
        max_error: Compute a head of a sample exactly if, in more than a tenth of its rows, the
            standard error of the softmax denominator is more than this share of it, such as 0.1.
            The errors cost a second pass over the samples, and are read back from an accelerator.
            None for no limit.

    Raises:
        TypeError: A field is of the wrong kind.
        ValueError: A field is out of range, or does not fit the structure.
    """

    block_size: int = 128
    sample_size: int = 128
    leaf_size: int | None = 128
    window: int = 256
    sinks: int = 16
    num_projections: int | None = None
    exact_below: int = 1024
    center: bool = True
    align_blocks: bool = True
    own_samples: bool = True
    replacement: bool = False
    max_sample_mass: float | None = 0.5
    max_error: float | None = None

    @classmethod
    def paper(cls, **changes: object) -> HyperConfig:
        """The estimator and the parameters as published, less the defects of the published code.

        Under a causal mask this plan is *not* strictly causal: which block of keys a query meets
        depends on the hashes of later queries.
        """
        published = {
            "block_size": 256,
            "sample_size": 256,
            "leaf_size": None,
            "window": 0,
            "sinks": 0,
            "num_projections": 7,
            "exact_below": 4096,
            "center": False,
            "align_blocks": False,
            "own_samples": False,
            "replacement": True,
            "max_sample_mass": None,
        }
        return cls(**{**published, **changes})

    def __post_init__(self) -> None:
        at_least = {"block_size": 0, "sample_size": 0, "window": 0, "sinks": 0, "exact_below": 2}
        for name, least in at_least.items():
            _check_integer(name, getattr(self, name), least)
        if self.leaf_size is not None:
            _check_integer("leaf_size", self.leaf_size, 1)
        if self.num_projections is not None:
            _check_integer("num_projections", self.num_projections, 1, MAX_PROJECTIONS)
        for name in ("center", "align_blocks", "own_samples", "replacement"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; pass True or False.")
        for name in ("max_sample_mass", "max_error"):
            _check_limit(name, getattr(self, name))
        if self.leaf_size is None:
            self._check_published_structure()

    @property
    def is_published(self) -> bool:
        """Whether this is the structure of the paper: one sample for all, causal by recursion."""
        return self.leaf_size is None

    def _check_published_structure(self) -> None:
        misplaced = {name: getattr(self, name) for name in ("window", "sinks")}
        if any(misplaced.values()):
            raise ValueError(
                f"window is {self.window} and sinks is {self.sinks}, which the published structure "
                "does not have; set leaf_size, or make both 0."
            )
        if self.own_samples:
            raise ValueError(
                "own_samples is True, but without leaves there is one sample for all; set "
                "leaf_size, or own_samples=False."
            )
        if self.max_sample_mass is not None:
            raise ValueError(
                f"max_sample_mass is {self.max_sample_mass}, but without leaves the sample of a "
                "query is not told apart; set leaf_size, or max_sample_mass=None."
            )
        if self.block_size == self.sample_size == 0:
            raise ValueError(
                "block_size and sample_size are both 0, which leaves no keys to attend to; make "
                "one of them positive."
            )


def _check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; pass an integer.")
    if value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{name} is {value}; it must be {limit}.")


def _check_limit(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; pass a number or None.")
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be above 0.")
