"""Train a converted model towards the model it came from, to win back what its smaller cache cost.

The parent teaches: its logits are the target, beside the text itself, and in the first steps so
are the outputs of its attention layers. It may be converted to anything; latent attention is
trained in its native form, and exported to other forms afterwards::

    python examples/recover_mla.py PARENT CONVERTED RECOVERED --text train.txt --steps 2000
    torchrun --nproc-per-node 8 examples/recover_mla.py PARENT CONVERTED RECOVERED ...

With several processes, both models are divided among them layer by layer (FSDP2). Each step sees
the same sequences however many there are.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from efficient_attn.integrations.verification import load


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: Number of updates.
        batch: Sequences of a step, over all processes.
        length: Tokens of a sequence.
        rate: Highest learning rate: 2e-5 for 7 billion parameters, 1e-4 for 2 and below.
        teacher: Weight of the divergence from the parent's predictions, beside that of the text.
        temperature: Of both predictions in that.
        attention_steps: Share of the steps, at the start, that also match attention outputs.
        attention_only: Whether everything outside attention stays as it is.
    """

    steps: int = 1000
    batch: int = 8
    length: int = 1024
    rate: float = 1e-4
    teacher: float = 1.0
    temperature: float = 1.0
    attention_steps: float = 0.05
    attention_only: bool = False


WARM_UP = 0.03  # share of the steps in which the learning rate rises
LOWEST_RATE = 0.1  # share of the highest one that is left in the end


def recover(
    student: PreTrainedModel,
    parent: PreTrainedModel,
    stream: Tensor,
    recipe: Recipe,
    told: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> None:
    """Train ``student`` in place on a row of tokens.

    Args:
        student: A converted model in fp32; with several processes, of :func:`shard`.
        parent: What it was converted from, likewise.
        stream: ``(tokens,)``, more than ``recipe.length`` of them.
        recipe: How.
        told: Called after each step with its number and the losses of this process's sequences:
            ``text``, ``parent``, and in the first steps ``attention``.
    """
    rank, world = _rank_and_world()
    if recipe.batch % world:
        raise typer.BadParameter(f"a batch of {recipe.batch} cannot be divided by {world}.")
    if len(stream) <= recipe.length:
        raise typer.BadParameter(
            f"the text has {len(stream)} tokens; sequences of {recipe.length} need more."
        )
    parent.eval().requires_grad_(False)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".self_attn." in name or not recipe.attention_only)
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0)
    student.train()
    for step in range(recipe.steps):
        ids = sequences(stream, step, recipe)[rank::world].to(student.device)
        losses = _losses(student, parent, ids, recipe, step < recipe.attention_steps * recipe.steps)
        weighted = {"parent": recipe.teacher * recipe.temperature**2}
        optimizer.zero_grad()
        sum(weighted.get(name, 1.0) * loss for name, loss in losses.items()).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * schedule(step, recipe.steps)
        optimizer.step()
        told(step, {name: loss.item() for name, loss in losses.items()})
    student.eval()


def _losses(
    student: PreTrainedModel,
    parent: PreTrainedModel,
    ids: Tensor,
    recipe: Recipe,
    match_attention: bool,
) -> dict[str, Tensor]:
    with _attention_outputs(student, parent, match_attention) as (ours, theirs):
        with torch.no_grad():
            target = parent(ids, use_cache=False).logits[:, :-1]
        logits = student(ids, use_cache=False).logits[:, :-1]
    losses = {"text": F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())}
    ours_log, theirs_log = (
        F.log_softmax(x.flatten(0, 1).float() / recipe.temperature, -1) for x in (logits, target)
    )
    losses["parent"] = F.kl_div(ours_log, theirs_log, reduction="batchmean", log_target=True)
    if match_attention:
        # Relative to their size, so that every layer and every sequence counts alike.
        errors = [
            (x - y).square().mean((1, 2)) / y.square().mean((1, 2))
            for x, y in zip(ours, theirs, strict=True)
        ]
        losses["attention"] = torch.stack(errors).float().mean()
    return losses


@contextlib.contextmanager
def _attention_outputs(
    student: PreTrainedModel, parent: PreTrainedModel, wanted: bool
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """What the attention layers of both give while this is open, in their order."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    hooks = [
        layer.self_attn.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[0]))
        for model, kept in zip((student, parent), found, strict=True)
        for layer in (model.get_decoder().layers if wanted else ())
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def sequences(stream: Tensor, step: int, recipe: Recipe) -> Tensor:
    """The sequences of one step, ``(batch, length)``, spread evenly over the text."""
    golden = (math.sqrt(5) - 1) / 2
    starts = [
        int((step * recipe.batch + row + 1) * golden % 1 * (len(stream) - recipe.length))
        for row in range(recipe.batch)
    ]
    return torch.stack([stream[start : start + recipe.length] for start in starts])


def schedule(step: int, steps: int) -> float:
    """The share of the highest rate: a linear rise, then half a cosine down to a tenth."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return LOWEST_RATE + (1 - LOWEST_RATE) * (1 + math.cos(math.pi * progress)) / 2


# --- several processes ------------------------------------------------------------------------


def shard(model: PreTrainedModel) -> PreTrainedModel:
    """Divide a model among all processes, layer by layer; with one, give it to its device."""
    device = _device()
    model = model.to(device)
    if not distributed.is_initialized():
        return model
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    # Weights and their updates stay in fp32; what is computed with them need not.
    low = torch.bfloat16 if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write the whole model, which appears at once or not at all."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if _rank_and_world()[0] == 0:
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part, state_dict=state)
        part.rename(folder)


def _rank_and_world() -> tuple[int, int]:
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


# --- the command ------------------------------------------------------------------------------


def tokens_of(files: Sequence[Path], tokenizer) -> Tensor:
    """All files in one row of tokens, with an end-of-text token behind each."""
    stream: list[int] = []
    for file in files:
        stream += tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
        stream.append(tokenizer.eos_token_id)
    return torch.tensor(stream)


def load_to_train(folder: Path) -> PreTrainedModel:
    """A converted model in fp32, of a form that training does not ruin."""
    model = load(folder, dtype=torch.float32)
    if model.config.model_type == "deepseek_v3":
        raise typer.BadParameter(
            f"{folder} is an export, some of whose rows are too small for an optimiser's steps; "
            "convert to the native target, train that, and export it."
        )
    return model


def main(
    parent: Annotated[Path, typer.Argument(help="The model that was converted.")],
    converted: Annotated[Path, typer.Argument(help="Its conversion; to MLA, the native one.")],
    recovered: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    text: Annotated[list[Path], typer.Option(help="Text to train on; may be repeated.")],
    steps: Annotated[int, typer.Option(help="Number of updates.")] = Recipe.steps,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = Recipe.batch,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = Recipe.length,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = Recipe.rate,
    teacher: Annotated[
        float, typer.Option(help="Weight of the parent's predictions, beside the text's 1.")
    ] = Recipe.teacher,
    attention_only: Annotated[
        bool, typer.Option("--attention-only", help="Train attention layers alone.")
    ] = False,
) -> None:
    """Train a converted model towards the model it came from."""
    if recovered.exists():
        raise typer.BadParameter(f"{recovered} exists; name a folder that does not.")
    recipe = Recipe(steps, batch, length, rate, teacher, attention_only=attention_only)
    if "WORLD_SIZE" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(_device())
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        tokenizer = AutoTokenizer.from_pretrained(parent)
        stream = tokens_of(text, tokenizer)
        teaching = shard(AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32))
        student = shard(load_to_train(converted))
        first = _rank_and_world()[0] == 0
        with tqdm(total=steps, unit="step", disable=not first) as bar:

            def told(step: int, losses: dict[str, float]) -> None:
                bar.set_postfix({name: f"{loss:.4f}" for name, loss in losses.items()})
                bar.update()

            recover(student, teaching, stream, recipe, told)
        save(student, recovered)
        if first:
            tokenizer.save_pretrained(recovered)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
