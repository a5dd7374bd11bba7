"""Text that a model makes up after prompts, sampled as ROME's code does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kscli.contexts import LIKELIEST
from kscli.models.loading import LoadedModel

_AT_ONCE = 64


def sample_texts(model: LoadedModel, prompts: Sequence[str], tokens: int, seed: int) -> list[str]:
    """What follows each prompt, `tokens` tokens at most, drawn with `seed` from the likeliest.

    transformers' own `generate` does it, so that prompts of all lengths share a batch.
    """
    tokenizer, module = model.tokenizer, model.decoder.model
    end = tokenizer.eos_token_id or 0
    found: list[str] = []
    devices = [model.decoder.device] if model.decoder.device.type == "cuda" else []
    for start in range(0, len(prompts), _AT_ONCE):
        encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts[start : start + _AT_ONCE]]
        longest = max(map(len, encoded))
        ids = torch.tensor([[end] * (longest - len(each)) + each for each in encoded])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in encoded])
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            drawn = module.generate(  # type: ignore[operator]
                ids.to(model.decoder.device),
                attention_mask=mask.to(model.decoder.device),
                do_sample=True,
                top_k=LIKELIEST,
                max_new_tokens=tokens,
                pad_token_id=end,
            )
        texts = tokenizer.batch_decode(drawn[:, longest:], skip_special_tokens=True)
        found += texts
    return found
