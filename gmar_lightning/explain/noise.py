"""What a trial of a model replaces: attention outputs of some tokens, parts of some inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gmar_lightning.explain.inputs import image_key

# Size of the noise in standard deviations of what it replaces: enough to turn a routing or a sorting over.
_NOISE = 10.0


def with_noise(output: Tensor, rows: Tensor) -> Tensor:
    """`(batch, heads, tokens, dim)` with some `(batch, tokens)` replaced by noise."""
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    size = output.float().std().nan_to_num(0.0).clamp_min(0.1).to(output.dtype)
    return torch.where(rows[:, None, :, None].to(output.device), _NOISE * size * noise, output)


def part_changed(inputs: Mapping[str, Any], number: int, images: Tensor) -> dict[str, Any] | None:
    """The inputs with a corner of some images (or a word of some sequences) exchanged; None for other inputs."""
    key = image_key(inputs)
    rows = images.nonzero().flatten().tolist()
    if key is not None and inputs[key].is_floating_point():
        image = inputs[key].clone()
        height, width = (max(1, side // 4) for side in image.shape[-2:])
        corners = ((0, 0), (image.shape[-2] // 2, image.shape[-1] // 2), (0, image.shape[-1] - width))
        top, left = corners[number % 3]
        part = image[rows, :, top : top + height, left : left + width]
        noise = torch.randn(part.shape, generator=torch.Generator().manual_seed(2 + number)).to(part)
        image[rows, :, top : top + height, left : left + width] = noise - part
        return {**inputs, key: image}
    words, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(words, Tensor) or words.ndim != 2:
        return None
    words = words.clone()
    for row in rows:
        # A word takes the place of the next; the ends (class and end marks, padding) are left alone.
        real = int(mask[row].sum()) if isinstance(mask, Tensor) and mask.ndim == 2 else words.shape[1]
        if real > 4:
            place = 1 + number % (real - 3)
            words[row, place] = words[row, place + 1]
    return {**inputs, "input_ids": words}
