"""What a probe finds is what it leaves: parameters, buffers, gradients, modes, hooks, random states, memory."""

import gc
import random
import weakref

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from gmar_lightning import gmar
from gmar_lightning.explain.isolation import isolated_random_state, undisturbed
from tests.helpers.networks import CLASSES, ViT, pictures, seeded


class Noisy(ViT):
    """Draws from every random state, counts its calls in a buffer, and fails when it is told to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.batch_norm = nn.BatchNorm2d(3)
        self.failure, self.drawn = None, None

    def forward(self, images):
        self.drawn = torch.rand(1), np.random.rand(), random.random()
        self.calls += 1
        self.scratch.fill_(7)
        logits = super().forward(self.batch_norm(images))
        if self.failure is not None:
            raise self.failure
        return logits


def noisy():
    model = seeded(Noisy).train()
    model.blocks[1].eval()
    model.blocks[0].mlp[2].eval()
    model.tokens.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    return model


def snapshot(model):
    """Everything that must be the same afterwards, in comparable form."""
    return {
        "tensors": {k: v.clone() for k, v in [*model.named_parameters(), *model.named_buffers()]},
        "identity": [id(t) for t in [*model.parameters(), *model.buffers()]],
        "version": [p._version for p in model.parameters()],
        "grad": [p.grad.clone() for p in model.parameters()],
        "requires grad": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "class attributes": [sorted(vars(type(m))) for m in model.modules()],
        "forwards": [type(m).forward for m in model.modules()],
        "global hooks": [dict(value) for name, value in sorted(vars(module_hooks).items())
                         if name.startswith("_global_") and isinstance(value, dict)],
        "random": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
        "functions": (F.scaled_dot_product_attention, F.multi_head_attention_forward, F.softmax),
        "modes of torch": (len(_get_current_function_mode_stack()), torch.is_grad_enabled(),
                           torch.is_inference_mode_enabled(), torch.backends.mha.get_fastpath_enabled(),
                           torch.get_default_dtype(), torch._dynamo.eval_frame._stance.stance),
    }  # fmt: skip


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize("failure", [None, RuntimeError("halfway"), KeyboardInterrupt()])
def test_everything_is_as_it_was(failure):
    model, calls = noisy(), []
    model.blocks[0].register_forward_hook(lambda *args: None)
    theirs = module_hooks.register_module_forward_hook(lambda *args: calls.append(1) and None)
    try:
        before = snapshot(model)
        model.failure = failure
        if failure is None:
            gmar(model, pictures(), signals=True, rollout="gradient")
        else:
            with pytest.raises(type(failure), check=lambda raised: raised is failure):
                gmar(model, pictures())
        model.failure = None
        after = snapshot(model)
    finally:
        theirs.remove()
    for what, value in before.items():
        assert same(value, after[what]), what


def test_parameter_hooks_do_not_fire():
    model, fired = noisy(), []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad: fired.append("grad"))
            parameter.register_post_accumulate_grad_hook(lambda p: fired.append("accumulated"))
    gmar(model, pictures())
    assert not fired


def test_mode_of_the_user_stays():
    class Counting(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            Counting.seen += 1
            return func(*args, **(kwargs or {}))

    model = seeded(ViT)
    expected = gmar(model, pictures())
    with Counting() as mode:
        found = gmar(model, pictures())
        assert _get_current_function_mode_stack() == [mode]
    assert Counting.seen > 0
    assert torch.equal(found.heatmaps, expected.heatmaps)


def test_fused_flags_and_attention_implementation():
    model = seeded(timm.create_model, "vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=3, img_size=32)
    model.blocks[0].attn.fused_attn = False
    gmar(model, pictures())
    assert [block.attn.fused_attn for block in model.blocks] == [False, True]


def test_training_step_after_a_probe_is_the_same():
    def steps(probe):
        model, torch_state = seeded(ViT).train(), torch.manual_seed(3)
        for block in model.blocks:
            block.mlp[2].p = 0.3
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(pictures(4)), torch.tensor([0, 1, 2, 3]))
                if probe:
                    gmar(model, pictures(2, seed=9))
            loss.backward()
            if probe:
                gmar(model, pictures(2, seed=9))
            optimizer.step()
            optimizer.zero_grad()
        assert torch_state is not None
        return [p.detach().clone() for p in model.parameters()]

    assert same(steps(False), steps(True))


def test_nothing_stays_in_memory():
    model, images = seeded(ViT), pictures()
    gmar(model, images)
    gc.collect()
    before = sum(isinstance(found, torch.Tensor) for found in gc.get_objects())
    result = gmar(model, images, signals=True)
    kept = [weakref.ref(getattr(result, name)) for name in ("heatmaps", "importance", "logits")]
    names = ("heatmaps", "importance", "logits", "score", "contribution")
    assert all(getattr(result, name).grad_fn is None for name in names)
    assert all(signal.grad_fn is None for signal in result.signals.values())
    del result
    assert all(ref() is None for ref in kept)
    gc.collect()
    assert sum(isinstance(found, torch.Tensor) for found in gc.get_objects()) <= before


def test_model_can_be_freed():
    model = seeded(ViT)
    gmar(model, pictures())
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_undisturbed_on_its_own():
    model = noisy()
    model.calls += 4
    with torch.inference_mode(), undisturbed(model):
        assert not any(m.training for m in model.modules())
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        model.calls += 1
        torch.rand(3)
    assert model.calls == 4
    assert model.training
    assert not model.blocks[1].training


def test_overridden_train_and_eval_are_not_called():
    class Guarded(ViT):
        def train(self, mode=True):
            raise AssertionError("train() was called")

    model = Guarded()
    model.training = True
    gmar(model, pictures())
    assert model.training


@pytest.mark.parametrize("seed", [None, 5])
def test_random_states(seed):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    drawn = []

    def fail():
        with isolated_random_state(seed):
            drawn.extend([torch.rand(1), np.random.rand(), random.random()])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert same(before, (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()))
    if seed is not None:
        with isolated_random_state(seed):
            assert same(drawn, [torch.rand(1), np.random.rand(), random.random()])


def test_buffers_of_inference_mode_and_of_one_storage():
    model = seeded(ViT)
    with torch.inference_mode():
        model.register_buffer("inferred", torch.ones(2))
    model.register_buffer("expanded", torch.ones(1).expand(4))
    assert gmar(model, pictures()).logits.shape[1] == CLASSES
    assert torch.equal(model.inferred, torch.ones(2))
