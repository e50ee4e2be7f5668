"""What mixes tokens (or images) without being attention, as modules `(batch, tokens, DIM)` to the same shape."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.networks import DIM


class Gate(nn.Module):
    """A mixer behind a learned factor that starts small, or closed."""

    def __init__(self, inner, value):
        super().__init__()
        self.inner, self.gate = inner, nn.Parameter(torch.tensor(float(value)))

    def forward(self, x):
        return x + self.gate * self.inner(x)


class By(nn.Module):
    """A function of the tokens as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Recurrent(nn.Module):
    def __init__(self, kind=nn.GRU, **options):
        super().__init__()
        self.cells = kind(DIM, DIM, batch_first=True, **options)

    def forward(self, x):
        return x + self.cells(x)[0]


class Matrix(nn.Module):
    def __init__(self, equation="nm,bmc->bnc"):
        super().__init__()
        self.equation, self.weight = equation, nn.Parameter(torch.randn(17, 17) / 4)

    def forward(self, x):
        return x + torch.einsum(self.equation, self.weight, x)


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(DIM, 6), nn.Linear(6, DIM)

    def forward(self, x):
        return x * self.two(self.one(x.mean(1, keepdim=True)).relu()).sigmoid()


class SoftExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.slots = nn.Parameter(torch.randn(DIM, 4))
        self.expert = nn.Linear(DIM, DIM)

    def forward(self, x):
        scores = x @ self.slots
        return x + scores.softmax(-1) @ self.expert(scores.softmax(1).mT @ x)


class Mean(nn.Module):
    """Linear attention, by a name that says nothing."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return x + q @ (k.mT @ v) / (q @ k.sum(1, keepdim=True).mT)


class Exponential(nn.Module):
    """Attention normalised by hand, without a softmax."""

    def __init__(self, score=torch.exp):
        super().__init__()
        self.score, self.qkv = score, nn.Linear(DIM, 3 * DIM)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        a = self.score(q @ k.mT * DIM**-0.5)
        return x + a / a.sum(-1, keepdim=True) @ v


class Aten(nn.Module):
    """The kernel behind the back of the function."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return x + torch.ops.aten.scaled_dot_product_attention(q, k, v)[:, 0]


class Capacity(nn.Module):
    """Hard routing: only the tokens with the largest score pass the expert."""

    def __init__(self):
        super().__init__()
        self.score, self.expert = nn.Linear(DIM, 1), nn.Linear(DIM, DIM)

    def forward(self, x):
        chosen = self.score(x)[..., 0].topk(6, 1).indices[..., None].expand(-1, -1, DIM)
        return x + torch.zeros_like(x).scatter(1, chosen, self.expert(x.gather(1, chosen)))


def grn(x):
    size = x.norm(dim=1, keepdim=True)
    return x + x * size / size.mean(-1, keepdim=True)


def group_norm(x):
    return F.group_norm(x.mT, 4).mT


def unfolded(x):
    around = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1)
    return x + around.mean(-1)


MIXERS = {
    "reversed patches": lambda: By(lambda x: torch.cat([x[:, :1], x[:, 1:].flip(1)], 1)),
    "permuted patches": lambda: By(lambda x: x[:, [0, 2, 1, *range(3, 17)]]),
    "shift": lambda: By(lambda x: x.roll(1, 1)),
    "sorting": lambda: By(lambda x: x.gather(1, x[..., :1].argsort(1).expand_as(x))),
    "GRU": Recurrent,
    "RNN": lambda: Recurrent(nn.RNN),
    "einsum": Matrix,
    "matmul": lambda: By(lambda x: x + torch.ones(17, 17).tril().div(17) @ x),
    "cumulative sum": lambda: By(lambda x: x + x.cumsum(1) / 17),
    "squeeze and excite": SqueezeExcite,
    "GRN": lambda: By(grn),
    "group norm": lambda: By(group_norm),
    "instance norm": lambda: By(lambda x: F.instance_norm(x.mT).mT),
    "norm over tokens and channels": lambda: By(lambda x: F.layer_norm(x, x.shape[1:])),
    "softmax over tokens": lambda: By(lambda x: x + x.softmax(1)),
    "soft experts": SoftExperts,
    "routing with a capacity": Capacity,
    "unfold": lambda: By(unfolded),
    "max over tokens": lambda: By(lambda x: x + x.amax(1, keepdim=True)),
    "detached statistics": lambda: By(lambda x: x * (1 + x.mean(1, keepdim=True).detach())),
    "linear attention": Mean,
    "exponential attention": Exponential,
    "sigmoid attention": lambda: Exponential(torch.sigmoid),
    "attention by its operator": Aten,
    "traced attention": lambda: Traced(),
    "Fourier": lambda: By(lambda x: x + torch.fft.ifft(torch.fft.fft(x, dim=1).conj(), dim=1).real),
    "a gate that starts small": lambda: Gate(Matrix(), 1e-6),
    "a gate that starts closed": lambda: Gate(Mean(), 0.0),
    "neighbours": lambda: By(lambda x: x + F.pad(x[:, 1:] - x[:, :-1], (0, 0, 0, 1))),
    "circular difference": lambda: By(lambda x: torch.lerp(x, x.roll(-1, 1), 0.01)),
}


class Traced(nn.Module):
    """A whole attention module that a tracer turned into a graph."""

    def __init__(self):
        super().__init__()
        self.inner = torch.jit.trace(Kernel().eval(), torch.randn(1, 17, DIM))

    def forward(self, x):
        return self.inner(x)


class Kernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v)[:, 0]


# What changes each token by itself and must not be refused.
ROWWISE = {
    "adapter": lambda: nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM)),
    "gated layer": lambda: By(lambda x: x * x.sigmoid()),
    "norm of each token": lambda: By(lambda x: F.normalize(x, dim=-1)),
    "channels reversed": lambda: By(lambda x: x.flip(-1)),
    "positions added": lambda: By(lambda x: x + torch.linspace(0, 1, 17)[:, None]),
    "weight per position": lambda: By(lambda x: x * torch.linspace(0.5, 1, 17)[:, None]),
    "there and back": lambda: By(lambda x: x.flip(1).mT.contiguous().mT.flip(1)),
    "1 x 1 convolution": lambda: nn.Sequential(
        By(lambda x: x.mT), nn.Conv1d(DIM, DIM, 1), By(lambda x: x.mT)
    ),
}
