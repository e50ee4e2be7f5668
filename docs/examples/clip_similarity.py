"""Which part of an image makes it similar to a text? CLIP's image side, with similarities in place of logits."""

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from gmar_lightning import gmar

sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
clip = CLIPModel(  # CLIPModel.from_pretrained("openai/clip-vit-base-patch32") in earnest
    CLIPConfig(
        text_config={**sizes, "vocab_size": 50, "eos_token_id": 49, "bos_token_id": 48},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
).eval()


class Similarity(nn.Module):
    """Images to their similarity with each of the texts."""

    def __init__(self, clip, tokens):
        super().__init__()
        self.vision, self.projection = clip.vision_model, clip.visual_projection
        with torch.no_grad():
            text = clip.text_projection(clip.text_model(tokens).pooler_output)
        self.register_buffer("text", nn.functional.normalize(text, dim=-1))

    def forward(self, pixel_values):
        image = self.projection(self.vision(pixel_values).pooler_output)
        return nn.functional.normalize(image, dim=-1) @ self.text.T


tokens = torch.tensor([[48, 5, 7, 49], [48, 9, 2, 49]])  # what the tokenizer makes of two texts
result = gmar(Similarity(clip, tokens), torch.randn(1, 3, 32, 32), targets=torch.tensor([1]))
print(result.heatmaps.shape, result.layers)
