"""Further training of a model whose heads were grouped: what is logged, and when groups are fixed.

For any model: what a step does is the caller's. See ``uptrain.py`` for two of them.
"""

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from tqdm import tqdm

from efficient_attn.layers import DGQA, KDGQA, GroupedQueryAttention
from efficient_attn.layers.key_driven import freeze_groups

# Groups that change in training are fixed when this share of it is done.
FREEZE_AT = 0.85


def uptrain(
    model: nn.Module,
    batches: Iterator[Tensor],
    steps: int,
    *,
    update: Callable[[Tensor, float], float],
    watch: Callable[[], dict] = dict,
    log_every: int = 20,
    progress: bool = True,
) -> list[dict]:
    """Train a model whose heads were grouped, in place; returns the log.

    Layers whose groups follow their keys are frozen when most of the training is done, so that the
    rest of it, and all that comes after, sees one map.

    Args:
        model: The model.
        batches: Inputs of each step.
        steps: How many batches are used.
        update: From a batch, and the share of the steps that is done, to the loss before the
            weights were changed.
        watch: Measures whatever is to be logged.
        log_every: Steps between two entries of the log.
        progress: Whether to show a bar.
    """
    log, losses, seen, maps, changes = [], [], 0, group_sizes(model), 0
    frozen = False
    for step in tqdm(range(1, steps + 1), unit="step", mininterval=5, disable=not progress):
        model.train()
        batch = next(batches)
        losses.append(update(batch, (step - 0.5) / steps))
        seen += batch.numel()
        if not frozen and step >= FREEZE_AT * steps:
            freeze_groups(model)
            frozen = True
        sizes = group_sizes(model)
        changes += sum(sizes[name] != maps[name] for name in sizes)
        maps = sizes
        if step % log_every == 0 or step == steps:
            log.append(
                {
                    "step": step,
                    "seen": seen,
                    "train_loss": round(sum(losses) / len(losses), 4),
                    "map_changes": changes,
                    "empty_groups": sum(size == 0 for s in sizes.values() for size in s),
                    "groups": sizes,
                    **watch(),
                }
            )
            losses, changes = [], 0
    model.eval()
    return log


def group_sizes(model: nn.Module) -> dict[str, list[int]]:
    """How many query heads each key head serves, in layers that have a map of their own.

    Where a layer makes a map in every call, these are the sizes that it would be frozen with.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GroupedQueryAttention) and module.q_to_k is not None
    }
    return {
        name: layer.group_sizes.tolist()
        if isinstance(layer, KDGQA | DGQA)
        else layer.q_to_k.bincount(minlength=layer.num_key_heads).tolist()
        for name, layer in layers.items()
    }
