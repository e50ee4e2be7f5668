"""In a notebook, a result and a record show themselves; here the same pages are written to files."""

from pathlib import Path

import timm
import torch

from gmar_lightning import gmar

model = timm.models.VisionTransformer(
    img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4
)
result = gmar(model, torch.randn(2, 3, 32, 32))
result  # noqa: B018  (the last line of a notebook's cell is shown)

print(result.importance.shape)  # (images, layers, heads)
print(result.contribution.abs().mean(0))  # what each head adds to the answer
Path("result.html").write_text(result._repr_html_())
