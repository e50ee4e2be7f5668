"""A dense head on a ViT: explain the logits of a class averaged over a region of its output."""

import timm
import torch
from torch import nn

from gmar_lightning import gmar
from gmar_lightning.targets import MaskLogit


class Segmenter(nn.Module):
    """Patch tokens to a map of class logits, `(batch, classes, height, width)`."""

    def __init__(self, classes=3):
        super().__init__()
        self.vit = timm.models.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3
        )
        self.head = nn.Conv2d(24, classes, 1)

    def forward(self, images):
        tokens = self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :]
        return self.head(tokens.transpose(1, 2).unflatten(2, (4, 4)))


region = torch.zeros(4, 4)
region[1:3, 1:3] = 1  # the middle of the picture
result = gmar(Segmenter().eval(), torch.randn(2, 3, 32, 32), targets=MaskLogit(1, mask=region))
print(result.importance.shape, None if result.heatmaps is None else result.heatmaps.shape)
