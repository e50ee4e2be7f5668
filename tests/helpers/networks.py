"""Small transformers as users write them, with random weights."""

import torch
import torch.nn.functional as F
from torch import nn

DIM, HEADS, CLASSES = 24, 3, 5


def seeded(build, *args, seed=0, **kwargs):
    """Build a module with its own random weights, in evaluation mode."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        return build(*args, **kwargs).eval()
    finally:
        torch.set_rng_state(state)


def pictures(batch=2, height=32, width=32, seed=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """Plain self-attention; `options` go to the kernel."""

    def __init__(self, dim=DIM, heads=HEADS, key_heads=None, **options):
        super().__init__()
        self.heads, self.key_heads, self.options = heads, key_heads or heads, options
        self.head_dim = dim // heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * self.key_heads * self.head_dim)
        self.proj = nn.Linear(dim, dim)

    def qkv(self, x):
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.key_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x):
        x = F.scaled_dot_product_attention(*self.qkv(x), **self.options)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention=None, dim=DIM, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = attention if attention is not None else Attention(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim)
        )

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Tokens(nn.Module):
    """Patches of 8 px, learned positions for a grid, a class token in front."""

    def __init__(self, grid=(4, 4), dim=DIM, prefix=1):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 8, 8)
        self.prefix = nn.Parameter(torch.randn(1, prefix, dim))
        self.positions = nn.Parameter(0.5 * torch.randn(1, prefix + grid[0] * grid[1], dim))

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.prefix.expand(len(x), -1, -1), x], 1) + self.positions


class ViT(nn.Module):
    """A class-token transformer; subclasses change one thing each."""

    def __init__(self, depth=3, attention=Attention, grid=(4, 4), prefix=1, head=DIM, **options):
        super().__init__()
        self.tokens = Tokens(grid, prefix=prefix)
        self.blocks = nn.ModuleList(Block(attention(**options)) for _ in range(depth))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(head, CLASSES)

    def features(self, images):
        x = self.tokens(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images):
        return self.head(self.features(images)[:, 0])
