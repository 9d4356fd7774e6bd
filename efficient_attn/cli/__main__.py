"""``python -m efficient_attn.cli`` is the ``efficient-attn`` command."""

from efficient_attn.cli import app

app()
