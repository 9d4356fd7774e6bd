"""Check that an engine computes what this checkpoint means.

    python self_check.py ENGINE

It lies in the folder of the checkpoint, with the log probabilities that its weights give to some
tokens. Neither needs the program that made them. ENGINE is vllm, sglang or transformers, whichever
is installed here. Exit code: 0 if its log probabilities are those, 1 if not.
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

GOLDEN = "golden_log_probabilities.json"


def of_vllm(
    vllm: ModuleType, folder: str, dtype: str, prompts: list[list[int]]
) -> list[list[float]]:
    """Of all tokens but the first of each prompt."""
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    llm = vllm.LLM(model=folder, dtype=dtype, skip_tokenizer_init=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    return [
        [told[token].logprob for token, told in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
        for ids, out in zip(prompts, outputs, strict=True)
    ]


def of_sglang(
    sglang: ModuleType, folder: str, dtype: str, prompts: list[list[int]]
) -> list[list[float]]:
    """Of all tokens but the first of each prompt."""
    engine = sglang.Engine(model_path=folder, dtype=dtype, skip_tokenizer_init=True)
    sampling = {"temperature": 0.0, "max_new_tokens": 1}
    outputs = engine.generate(
        input_ids=prompts, sampling_params=sampling, return_logprob=True, logprob_start_len=0
    )
    engine.shutdown()
    return [[told[0] for told in out["meta_info"]["input_token_logprobs"][1:]] for out in outputs]


def of_transformers(
    transformers: ModuleType, folder: str, dtype: str, prompts: list[list[int]]
) -> list[list[float]]:
    """Of all tokens but the first of each prompt."""
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    ).eval()
    ids = torch.tensor(prompts)
    with torch.no_grad():
        told = model(ids).logits[:, :-1].float().log_softmax(-1)
    return told.gather(-1, ids[:, 1:, None]).squeeze(-1).tolist()


ENGINES = {"vllm": of_vllm, "sglang": of_sglang, "transformers": of_transformers}


def main(words: list[str]) -> int:
    """Compare, say what was found, and give the exit code."""
    if len(words) != 1 or words[0] not in ENGINES:
        print(__doc__.strip())
        return 2
    folder = Path(__file__).resolve().parent
    golden = json.loads((folder / GOLDEN).read_text())
    engine = importlib.import_module(words[0])
    found = ENGINES[words[0]](engine, str(folder), golden["dtype"], golden["prompts"])
    apart = [
        abs(x - y)
        for xs, ys in zip(found, golden["log_probabilities"], strict=True)
        for x, y in zip(xs, ys, strict=True)
    ]
    mean, most = sum(apart) / len(apart), golden["tolerance"]
    print(f"{len(apart)} tokens: {mean:.4f} nats apart in the mean, {max(apart):.4f} at most")
    if not mean <= most:  # nor if it is no number
        print(f"WRONG: {words[0]} does not compute this model (allowed in the mean: {most}).")
        return 1
    print(f"{words[0]} computes this model.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
