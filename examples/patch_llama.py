"""A trained Llama generates the same tokens after one line has changed its attention.

The model is the small one in ``pycode_llama``, which writes Python. The batch is padded on the
left, as batches are for generation, and one run keeps its keys and values in a static cache. At the
end, a single layer is patched, and everything is taken back.

Run it with ``python examples/patch_llama.py``; it takes a few seconds on a CPU.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from efficient_attn import patch_model

MODEL = Path(__file__).parent / "pycode_llama"
PROMPTS = ["def binary_search(items, target):\n", "import os\n", "class Stack:\n    def push("]
NEW_TOKENS = 16


def generate(model: PreTrainedModel, inputs: dict, cache: str = "dynamic") -> torch.Tensor:
    """The tokens that the model finds most likely, prompts included."""
    return model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        cache_implementation=cache,
        disable_compile=True,
    )


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    before = generate(model, inputs)

    patch = patch_model(model)
    print(patch.report)
    for cache in ("dynamic", "static"):
        after = generate(model, inputs, cache)
        print(f"same tokens with a {cache} cache: {'yes' if torch.equal(after, before) else 'NO'}")
    print(tokenizer.decode(after[0], skip_special_tokens=True))
    patch.undo()

    with patch_model(model, layers=[0]) as patch:
        print(f"patched alone: {', '.join(patch.report.replaced)}")
        same = torch.equal(generate(model, inputs), before)
        print(f"same tokens: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
