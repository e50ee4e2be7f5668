"""What a forward can do to its surroundings, and that a probe leaves none of it behind."""

from __future__ import annotations

import array
import collections
import contextlib
import functools
import itertools
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gmar_lightning import UnsupportedModelError, gmar
from gmar_lightning.explain.isolation import kept
from tests.helpers.networks import ViT, pictures, seeded
from tests.helpers.tiny import digest

STREAM = np.random.default_rng(3)
TALLY = {"calls": 0}
COUNT = 0


class Config:
    step = 0

    def __init__(self) -> None:
        self.scale, self.nested = 1.0, {"history": [1, {"deep": collections.deque([1], maxlen=3)}]}


class Slotted:
    __slots__ = ("__dict__", "count")

    def __init__(self) -> None:
        self.count = 0


class Hostile:
    """Answers no question and is equal to nothing."""

    def __init__(self) -> None:
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise RuntimeError("neither")


class Strict(dict):
    """A dictionary that forbids writes but through a method of its own."""

    def __setitem__(self, key: Any, value: Any) -> None:
        raise KeyError(key)

    def clear(self) -> None:
        raise KeyError("clear")

    def put(self, key: Any, value: Any) -> None:
        dict.__setitem__(self, key, value)


def helper() -> float:
    global COUNT
    COUNT += 1
    TALLY["calls"] += 1
    return float(STREAM.normal())


class Stateful(ViT):
    """A ViT that keeps every kind of state."""

    calls = 0
    shared: ClassVar[list[int]] = []

    def __init__(self, act: Callable[[Any], Any]):
        super().__init__()
        self.act = act
        self.register_buffer("memory", torch.zeros(3))
        self.register_buffer("empty", torch.zeros(0))
        self.deque, self.counter = collections.deque([1, 2], maxlen=4), collections.Counter(a=1)
        self.ordered, self.default = collections.OrderedDict(a=1, b=2), collections.defaultdict(list)
        self.nested: Any = {"a": [{"b": {1, 2}}, (1, [2])]}
        self.array, self.arrays = np.zeros(4), [np.zeros(2), {"x": np.zeros(2)}]
        self.objects = np.array([[1], None], dtype=object)
        self.tensors = [torch.zeros(2), {"x": torch.zeros(2)}]
        self.config, self.slotted, self.hostile = Config(), Slotted(), Hostile()
        self.space, self.strict = types.SimpleNamespace(count=0), Strict()
        self.bytes, self.compact = bytearray(b"ab"), array.array("i", [1, 2])
        self.own_numpy, self.own_python = np.random.default_rng(1), random.Random(1)
        self.own_torch, self.legacy = torch.Generator().manual_seed(1), np.random.RandomState(1)
        self.ticks, self.cycle = itertools.count(), iter(list(range(5000)))
        self.view = self.head.bias.detach().numpy()
        self.teacher = nn.Linear(2, 2)
        self.loop: list[Any] = []
        self.loop.append(self.loop)
        enclosed = {"n": 0}
        plain = 0

        def hook(*args: Any) -> None:
            nonlocal plain
            enclosed["n"] += 1
            plain += 1

        self.enclosed = lambda: (enclosed["n"], plain)
        self.norm.register_forward_hook(hook)
        self.partial = functools.partial(self.deque.append)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            self.act(self)
        return super().forward(images)


def increment(owner: Any, name: str) -> None:
    setattr(owner, name, getattr(owner, name) + 1)


def swap_parameter(model: Any) -> None:
    model.head.bias = nn.Parameter(torch.ones_like(model.head.bias))


def resize(model: Any) -> None:
    model.memory.resize_(100).fill_(3)
    model.empty.resize_(7).fill_(1)


def freeze(model: Any) -> None:
    model.head.bias.requires_grad_(False)
    model.head.bias.grad = torch.ones_like(model.head.bias)


def add_module(model: Any) -> None:
    model.extra = nn.Linear(2, 2)
    model.register_buffer("late", torch.ones(2))
    model.norm.register_forward_pre_hook(lambda *args: None)


def in_place(tensor: Tensor) -> None:
    tensor.add_(1)


WRITES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda m: increment(m, "number"),
    "deque": lambda m: m.deque.append(5),
    "deque rotated": lambda m: m.deque.rotate(1),
    "counter": lambda m: m.counter.update("ab"),
    "ordered dictionary": lambda m: m.ordered.move_to_end("a"),
    "default dictionary": lambda m: m.default["x"].append(1),
    "set in a list in a dictionary": lambda m: m.nested["a"][0]["b"].add(7),
    "list in a tuple": lambda m: m.nested["a"][1][1].append(7),
    "numpy array": lambda m: m.array.__iadd__(1),
    "numpy arrays in containers": lambda m: (m.arrays[0].fill(4), m.arrays[1]["x"].fill(3)),
    "numpy array of objects": lambda m: m.objects[0].append(1),
    "tensors in a list": lambda m: (m.tensors[0].add_(1), m.tensors[1]["x"].fill_(2)),
    "config object": lambda m: increment(m.config, "scale"),
    "containers of a config object": lambda m: m.config.nested["history"][1]["deep"].append(3),
    "namespace": lambda m: increment(m.space, "count"),
    "slots": lambda m: increment(m.slotted, "count"),
    "attribute of a hostile object": lambda m: vars(m.hostile).update(count=2),
    "strict dictionary": lambda m: m.strict.put("a", 1),
    "class attribute": lambda m: increment(type(m), "calls"),
    "list of a class": lambda m: type(m).shared.append(1),
    "class attribute of a config": lambda m: increment(type(m.config), "step"),
    "new class attribute": lambda m: setattr(type(m), "late_attribute", 3),
    "module globals": lambda m: helper(),
    "generator of NumPy": lambda m: m.own_numpy.normal(),
    "generator of Python": lambda m: m.own_python.random(),
    "generator of torch": lambda m: torch.rand(1, generator=m.own_torch),
    "RandomState": lambda m: m.legacy.rand(),
    "itertools.count": lambda m: next(m.ticks),
    "iterator of a list": lambda m: next(m.cycle),
    "weights through .data": lambda m: m.head.weight.data.add_(1),
    "weights in place": lambda m: m.head.weight.add_(1),
    "weights through a NumPy view": lambda m: m.view.__iadd__(1),
    "weights replaced through .data": lambda m: setattr(m.head.weight, "data", m.head.weight * 2),
    "a parameter replaced": swap_parameter,
    "bytearray": lambda m: m.bytes.extend(b"c"),
    "array of the standard library": lambda m: m.compact.append(1),
    "buffer in place": lambda m: m.memory.add_(1),
    "buffer through .data": lambda m: m.memory.data.add_(1),
    "buffer replaced": lambda m: setattr(m, "memory", m.memory + 1),
    "buffers resized": resize,
    "teacher": lambda m: m.teacher.weight.lerp_(torch.ones(2, 2), 0.1),
    "requires_grad and .grad": freeze,
    "modules, buffers and hooks added": add_module,
    "bound method in a partial": lambda m: m.partial(9),
    "mode": lambda m: m.teacher.eval(),
}


def everything(model: Any) -> str:
    """All state, read by hand."""
    module = type(model)
    plain = [
        model.deque, model.counter, model.ordered, model.default, model.nested, model.space, dict(model.strict),
        model.config.__dict__, model.slotted.count, vars(model.hostile), module.calls, module.shared, Config.step,
        hasattr(module, "late_attribute"), TALLY, COUNT, STREAM.bit_generator.state,
        model.own_numpy.bit_generator.state,
        model.own_python.getstate(), model.legacy.get_state()[1].tolist(), repr(model.ticks),
        model.cycle.__reduce__()[2], model.enclosed(), sorted(vars(model)), model.number,
        bytes(model.bytes), model.compact.tolist(),
    ]  # fmt: skip
    tensors = [
        *model.parameters(), *[buffer.clone() for buffer in model.buffers()], model.own_torch.get_state(),
        model.tensors[0], model.tensors[1]["x"],
        *[p.grad for p in model.parameters()],
    ]  # fmt: skip
    arrays = [model.array, model.arrays[0], model.arrays[1]["x"], model.view]
    places = (
        [id(t) for t in [*model.parameters(), *model.buffers()]],
        [t.data_ptr() for t in model.parameters()],
    )
    shapes = [tuple(t.shape) for t in model.buffers()], [p.requires_grad for p in model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    names = list(model.state_dict())
    return digest([repr(plain), repr(list(model.objects)), tensors, arrays, places, shapes, hooks, names])


@pytest.mark.parametrize("name", WRITES)
def test_gmar_alone_leaves_no_trace(name: str) -> None:
    model = seeded(Stateful, lambda m: None)
    model.number = 1
    plain = gmar(model, pictures(2))
    model.act = WRITES[name]
    before = everything(model)
    found = gmar(copy_of_identity(model), pictures(2))
    assert everything(model) == before
    assert torch.equal(plain.importance, found.importance) or "weights" in name or "parameter" in name
    gmar(model, pictures(2))
    assert everything(model) == before


def copy_of_identity(model: nn.Module) -> nn.Module:
    """The model, as if it had never been explained."""
    from gmar_lightning.explain import isolation

    isolation._WRITTEN.pop(model, None)
    return model


@pytest.mark.parametrize("name", WRITES)
def test_every_write_is_one(name: str) -> None:
    """Or the test above could not fail."""
    model = seeded(Stateful, WRITES[name])
    model.number = 1
    before = everything(model)
    with kept({"model": model}) as trace:
        model(pictures(1))
        during = everything(model)
    assert during != before
    assert everything(model) == before
    assert trace.changed
    assert not trace.left
    if hasattr(Stateful, "late_attribute"):
        del Stateful.late_attribute


def test_a_live_generator_is_refused_by_name() -> None:
    model = seeded(Stateful, lambda m: next(m.stream))
    model.stream = (number for number in range(9))
    with pytest.raises(UnsupportedModelError, match=r"Stateful\.stream, a live iterator"):
        gmar(model, pictures(1))
    assert next(model.stream) == 0


def test_weights_written_later_than_the_first_call_are_named() -> None:
    model = seeded(Stateful, lambda m: None)
    model.number = 1
    gmar(model, pictures(1))
    model.act = lambda m: m.teacher.weight.add_(1)
    with pytest.warns(UserWarning, match=r"wrote Stateful\.teacher\.weight"):
        gmar(model, pictures(1))
    before = everything(model)
    gmar(model, pictures(1))
    assert everything(model) == before


@pytest.mark.filterwarnings("ignore:.*jit.*")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_scripted_submodules(how: str) -> None:
    model = seeded(ViT)
    norm = nn.BatchNorm2d(3)
    norm = torch.jit.script(norm) if how == "script" else torch.jit.trace(norm.eval(), pictures(1))
    model.tokens.patches = nn.Sequential(norm, model.tokens.patches)
    model.train()
    before = digest(model.state_dict()), [m.training for m in model.modules()]
    gmar(model, pictures(2))
    assert (digest(model.state_dict()), [m.training for m in model.modules()]) == before


def test_lazy_layers_stay_lazy() -> None:
    model = seeded(ViT)
    model.head = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(5))
    reference = seeded(ViT)
    reference.head = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(5))
    torch.manual_seed(1)
    gmar(model, pictures(2))
    assert type(model.head[1]) is nn.LazyLinear
    assert isinstance(model.head[1].weight, nn.parameter.UninitializedParameter)
    assert isinstance(model.head[0].running_mean, nn.parameter.UninitializedBuffer)
    for each in (reference, model):
        torch.manual_seed(1)
        each(pictures(4))
    assert digest(model.state_dict()) == digest(reference.state_dict())


def test_open_file_keeps_its_place(tmp_path: Path) -> None:
    (tmp_path / "numbers").write_text("1\n2\n3\n")
    with open(tmp_path / "numbers") as stream:
        model = seeded(Stateful, lambda m: m.file.readline())
        model.file = stream
        gmar(model, pictures(1))
        assert stream.readline() == "1\n"


class LinearProbe(ViT):
    """A trained head on features that training does not differentiate."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def forward(self, images: Tensor) -> Tensor:
        guard: Any = contextlib.nullcontext()
        if self.how in ("no_grad", "inference_mode"):
            guard = getattr(torch, self.how)()
        with guard:
            if self.how == "set_grad_enabled":
                torch.set_grad_enabled(False)
            features = self.features(images)
        if self.how == "detach":
            features = features.detach()
        if self.how == "set_grad_enabled":
            torch.set_grad_enabled(True)
        if self.how == "data":
            features = features.data
        return self.head(features.clone() if self.how == "inference_mode" else features)

    def features(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]


class Decorated(LinearProbe):
    features = torch.no_grad()(LinearProbe.features)


@pytest.mark.parametrize(
    "how", ["no_grad", "inference_mode", "set_grad_enabled", "detach", "data", "decorator"]
)
def test_linear_probes_are_explained_as_if_nothing_was_cut(how: str) -> None:
    plain = seeded(LinearProbe, "nothing")
    model = seeded(Decorated if how == "decorator" else LinearProbe, how)
    model.load_state_dict(plain.state_dict())
    for parameter in [*model.blocks.parameters(), *model.tokens.parameters()]:
        parameter.requires_grad_(False)
    expected, found = gmar(plain, pictures(2)), gmar(model, pictures(2))
    assert torch.equal(found.importance, expected.importance)
    assert torch.equal(found.heatmaps, expected.heatmaps)
    gradients = torch.autograd.grad(model(pictures(1)).sum(), [model.norm.weight], allow_unused=True)
    assert gradients == (None,)  # the switches work again


def test_detached_on_purpose_stays_detached() -> None:
    """A model that can be explained as it is, is."""

    class Tempered(ViT):
        lift = False

        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            scale = logits.norm(dim=-1, keepdim=True)
            return 10 * logits / (scale if self.lift else scale.detach())

    model = seeded(Tempered)
    found = gmar(model, pictures(2))
    model.lift = True
    assert not torch.equal(gmar(model, pictures(2)).importance, found.importance)


class Counts(nn.Module):
    """To be scripted: keeps a number in C++."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


@pytest.mark.filterwarnings("ignore:.*jit.*")
def test_numbers_inside_a_scripted_module() -> None:
    model = seeded(ViT)
    model.head = nn.Sequential(torch.jit.script(Counts()), model.head)
    gmar(model, pictures(2))
    assert model.head[0].count == 0
