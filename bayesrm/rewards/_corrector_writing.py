"""Greedy generation, free of the model's own generation settings."""

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def write_greedily(
    model: Any, readings: Sequence[Sequence[int]], *, two_parts: bool, pad: int, stop_ids: tuple[int, ...],
    max_new_tokens: int, batch_size: int,
) -> list[tuple[int, ...]]:  # fmt: skip
    """What the model writes after each reading, the end of the sequence included where it comes.

    Args:
        model: The model without the wrapper of peft, in evaluation mode.
        readings: Token ids that it reads.
        two_parts: Whether an encoder reads.
        pad: Token to fill batches with.
        stop_ids: Tokens that end a text.
        max_new_tokens: Most tokens to write.
        batch_size: Texts written side by side.
    """
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=pad,
        use_cache=True, return_dict_in_generate=False,
        decoder_start_token_id=int(model.config.decoder_start_token_id) if two_parts else None,
    )  # fmt: skip
    own, model.generation_config = model.generation_config, GenerationConfig()
    device = next(model.parameters()).device
    order = sorted(range(len(readings)), key=lambda row: -len(readings[row]))
    written: list[tuple[int, ...]] = [()] * len(readings)
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = len(readings[rows[0]])
            ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                count = len(readings[row])
                # A decoder goes on at the right end; an encoder is padded there.
                columns = slice(count) if two_parts else slice(longest - count, None)
                ids[place, columns] = torch.tensor(readings[row])
                mask[place, columns] = 1
            found = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )[:, 1 if two_parts else longest :].tolist()  # fmt: skip
            for place, row in enumerate(rows):
                end = next((i for i, token in enumerate(found[place]) if token in stop_ids), None)
                written[row] = tuple(found[place] if end is None else found[place][: end + 1])
    finally:
        model.generation_config = own
    return written
