"""Text files as rows of tokens, by the tokenizer of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from efficient_attn.convert.checkpoint import inside
from efficient_attn.convert.header import read_bounded
from efficient_attn.errors import ConversionError

MAX_TOKENIZER_BYTES = 256 << 20
MAX_TEXT_BYTES = 1 << 30


def rows_of_text(
    folder: str | Path, file: str | Path, *, tokens: int, length: int, ends: bool = False
) -> Tensor:
    """The beginning of a text, cut into rows.

    Args:
        folder: A checkpoint with a ``tokenizer.json``.
        file: A text in UTF-8.
        tokens: How many tokens are wanted.
        length: Tokens of a row.
        ends: Put around each row what the tokenizer puts around a text, as encoders expect.

    Returns:
        ``(tokens // length, length)``, int64.

    Raises:
        ConversionError: There is no tokenizer, the file is no text, or it is too short.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConversionError("reading a text needs tokenizers: pip install tokenizers.") from error
    path = inside(Path(folder), "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_buffer(read_bounded(path, MAX_TOKENIZER_BYTES))
    except Exception as error:  # the library raises no narrower one
        raise ConversionError(f"{path} is no tokenizer: {error}.") from error
    if not Path(file).is_file():
        raise ConversionError(f"{file} is not a file; pass a text.")
    try:
        text = read_bounded(Path(file), MAX_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{file} is not a text in UTF-8: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    around = tokenizer.encode("").ids if ends else []
    if len(around) not in (0, 2) or len(around) >= length:
        raise ConversionError(
            f"the tokenizer puts {len(around)} tokens around a text, and rows have {length}; two "
            "are expected, with room for others between them."
        )
    inner = length - len(around)
    # Three bytes a token is few, so this seldom needs a second go; a long text is not tokenized
    # to its end for the sake of its beginning.
    ids: list[int] = []
    for size in (8 * tokens, len(text)):
        ids = tokenizer.encode(text[:size], add_special_tokens=False).ids
        if len(ids) >= tokens:
            break
    count = max(1, tokens // length)
    if len(ids) < count * inner:
        raise ConversionError(
            f"{file} has {len(ids)} tokens, and {count * inner} were asked for; pass a longer "
            "text, or ask for fewer."
        )
    rows = torch.tensor(ids[: count * inner]).view(count, inner)
    edges = [torch.full((count, 1), edge) for edge in around]
    return torch.cat([edges[0], rows, edges[1]], 1) if edges else rows
