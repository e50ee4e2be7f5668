"""Vision transformers in the style of hand-written collections: no fused kernel, softmax as a module."""

import torch
import torch.nn.functional as F
from torch import nn

DIM, HEADS, CLASSES = 32, 4, 5


class Attend(nn.Module):
    """Heads from one projection, `nn.Softmax`, two matrix products."""

    def __init__(self):
        super().__init__()
        self.heads, self.scale = HEADS, (DIM // HEADS) ** -0.5
        self.norm, self.attend, self.dropout = nn.LayerNorm(DIM), nn.Softmax(dim=-1), nn.Dropout(0.1)
        self.to_qkv, self.to_out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM)

    def qkv(self, x):
        return (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.to_qkv(x).chunk(3, -1))

    def map(self, dots):
        return self.dropout(self.attend(dots))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x))
        out = torch.matmul(self.map(torch.matmul(q, k.transpose(-1, -2)) * self.scale), v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Locality(Attend):
    """A learned temperature, and no token attends to itself."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.log(torch.tensor((DIM // HEADS) ** -0.5)))

    def map(self, dots):
        dots = dots / self.scale * self.temperature.exp()
        own = torch.eye(dots.shape[-1], device=dots.device, dtype=torch.bool)
        return super().map(dots.masked_fill(own, -torch.finfo(dots.dtype).max))


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HEADS, HEADS))

    def forward(self, maps):
        return torch.einsum("b h i j, h g -> b g i j", maps, self.weight)


class TalkingHeads(Attend):
    """Heads mixed in front of the softmax and behind it (CaiT)."""

    def __init__(self):
        super().__init__()
        self.mix_pre, self.mix_post = Mix(), Mix()

    def map(self, dots):
        return self.mix_post(super().map(self.mix_pre(dots)))


class ReAttention(Attend):
    """Maps mixed over heads and normalised over them (DeepViT)."""

    def __init__(self):
        super().__init__()
        self.mix, self.reattn_norm = Mix(), HeadNorm()

    def map(self, dots):
        return self.reattn_norm(self.mix(super().map(dots)))


class HeadNorm(nn.LayerNorm):
    def __init__(self):
        super().__init__(HEADS)

    def forward(self, maps):
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CosineSimilarity(Attend):
    """Queries and keys of length one."""

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x))
        dots = torch.einsum("b h i d, b h j d -> b h i j", F.normalize(q, dim=-1), F.normalize(k, dim=-1)) * 8
        out = torch.einsum("b h i j, b h j d -> b h i d", self.map(dots), v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Vit(nn.Module):
    """Patches cut by reshaping and embedded by a linear layer; class token, or a mean as in SimpleViT."""

    def __init__(self, attention=Attend, pool="cls", registers=0, depth=3):
        super().__init__()
        self.pool, self.registers = pool, registers
        self.embed = nn.Sequential(nn.LayerNorm(3 * 64), nn.Linear(3 * 64, DIM), nn.LayerNorm(DIM))
        self.front = nn.Parameter(torch.randn(1, 1 if pool == "cls" else 0, DIM))
        self.behind = nn.Parameter(torch.randn(1, registers, DIM))
        self.positions = nn.Parameter(torch.randn(1, 16, DIM))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    attention(),
                    nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 64), nn.GELU(), nn.Linear(64, DIM)),
                ]
            )
            for _ in range(depth)
        )
        self.mlp_head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES))

    def forward(self, img):
        x = img.unflatten(-1, (4, 8)).unflatten(-3, (4, 8)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        x = self.embed(x) + self.positions
        x = torch.cat([self.front.expand(len(x), -1, -1), x, self.behind.expand(len(x), -1, -1)], 1)
        for attend, feed_forward in self.layers:
            x = attend(x) + x
            x = feed_forward(x) + x
        front, last = self.front.shape[1], self.front.shape[1] + 16
        return self.mlp_head(x[:, 0] if self.pool == "cls" else x[:, front:last].mean(1))

    def row(self):
        front = self.front.shape[1]
        row = torch.zeros(front + 16 + self.registers)
        row[0 if self.pool == "cls" else slice(0, 16)] = 1
        return row / row.sum()


HANDWRITTEN = {
    "vit": lambda: Vit(),
    "simple vit": lambda: Vit(pool="mean"),
    "simple vit with registers": lambda: Vit(pool="mean", registers=4),
    "vit for small data sets": lambda: Vit(Locality),
    "talking heads": lambda: Vit(TalkingHeads),
    "deepvit": lambda: Vit(ReAttention),
    "cosine similarity": lambda: Vit(CosineSimilarity, pool="mean"),
}
