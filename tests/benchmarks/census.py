"""Every architecture timm lists, explained or refused: `python -m tests.benchmarks.census [WORD ...]`.

Each listed model is built with random weights, its own options and small sizes (three layers, narrow, a few
patches); names that become the same small model are run once and counted each. An explanation is compared with
the materialised reference, whose readout comes from timm's own attributes, not from the package. Where there is no
picture of the whole, every head is compared with plain autograd, image by image, and the picture of a last stage
with the product of its materialised maps.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import inspect
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn

from gmar_lightning import UnsupportedModelError, gmar
from tests.helpers.materialised import heads_alone, maps_of_one, stage_row
from tests.helpers.reference import reference, relative_error

WHOLE, STAGE, HEADS_ONLY = "map and heads exact", "last-stage map, heads exact", "heads exact"
HEADS, HEAD_DIM, DEPTH, CLASSES = 4, 16, 3, 5
LARGEST = 600_000_000  # parameters, after shrinking
TOLERANCE = 1e-6  # in float64


@dataclasses.dataclass(frozen=True)
class Listed:
    """A model name as timm would build it."""

    name: str
    file: str
    cls: Any
    options: dict[str, Any]

    @property
    def family(self) -> tuple[str, str]:
        return self.file, getattr(self.cls, "__name__", str(self.cls))

    @property
    def key(self) -> str:
        """Equal for names that differ in nothing but sizes."""
        described = f"{self.family} {sorted((k, _described(v)) for k, v in self.options.items())}"
        described = re.sub(r"0x[0-9a-f]+", "", described)
        return (
            described
            if "img_size" in self.options and "embed_dim" in self.options
            else re.sub(r"\d+(\.\d+)?(e-\d+)?", "#", described)
        )

    @property
    def bulk(self) -> float:
        """A number that grows with the size of the model."""
        return sum(float(number) for number in re.findall(r"\d+", str(list(self.options.values()))))


@dataclasses.dataclass
class Row:
    """What became of one small model, and the names that stand for it."""

    names: list[str]
    family: tuple[str, str]
    verdict: str
    reason: str = ""


class _Caught(Exception):
    """Carries what a model entry point asked the builder for."""


@contextmanager
def builder(replacement: Callable[..., Any]) -> Iterator[None]:
    """Put a function in the place of timm's `build_model_with_cfg`, wherever it was imported to."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("timm.models.") and hasattr(module, "build_model_with_cfg"):
                stack.enter_context(mock.patch.object(module, "build_model_with_cfg", replacement))
        yield


def listed_models(words: Sequence[str] = ()) -> list[Listed]:
    """All names (those that contain one of `words`), with the small options they would be built with."""

    def catch(cls: Any, variant: str, pretrained: bool, *args: Any, **options: Any) -> Any:
        if options.get("features_only"):
            return _build(cls, variant, pretrained, *args, **options)  # the stem of a hybrid
        raise _Caught(cls, options)

    found = []
    names = [name for name in timm.list_models() if not words or any(word in name for word in words)]
    with builder(catch):
        for name in names:
            entry = timm.model_entrypoint(name)
            try:
                entry(pretrained=False)
            except _Caught as caught:
                cls, options = caught.args
                file = entry.__module__.rsplit(".", 1)[-1]
                found.append(Listed(name, file, cls, shrunk(cls, options)))
    return found


def shrunk(cls: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a model with small sizes; everything else about it is kept."""
    hidden = ("pretrained_cfg", "pretrained_filter_fn", "feature_cfg", "pretrained_strict", "kwargs_filter")
    small = {key: value for key, value in options.items() if not key.startswith(hidden)}
    known = _parameters(cls)
    settings = {**{key: p.default for key, p in known.items() if p.default is not p.empty}, **small}
    if isinstance(settings.get("embed_dim"), int) and isinstance(settings.get("num_heads"), int):
        small |= {"embed_dim": HEADS * HEAD_DIM, "num_heads": HEADS}
        if isinstance(settings.get("mlp_ratio"), float):
            small["mlp_ratio"] = round(2 * settings["mlp_ratio"]) / 2  # hidden layers that split in two
    if isinstance(settings.get("depth"), int):
        small["depth"] = min(settings["depth"], DEPTH)
    if isinstance(settings.get("num_kv_heads"), (tuple, list)):
        small["num_kv_heads"] = (HEADS, *settings["num_kv_heads"][1:DEPTH])
        small["num_kv_heads"] = tuple(
            min(h, HEADS // 2) if i else h for i, h in enumerate(small["num_kv_heads"])
        )
    for key in ("depths", "layers", "serial_depths"):
        if isinstance(settings.get(key), (tuple, list)) and all(isinstance(d, int) for d in settings[key]):
            small[key] = type(settings[key])(min(d, 2) for d in settings[key])
    patch = settings.get("patch_size")
    if isinstance(patch, int) and "img_size" in known and "embed_dim" in small and patch > 1:
        # Stages halve the grid three times, and the last one still has four tokens.
        small["img_size"] = 16 * patch if "depths" in settings else 4 * patch
    elif "img_size" in known:
        small["img_size"] = 128
    if dataclasses.is_dataclass(small.get("cfg")):
        small["cfg"] = _shrunk_config(small["cfg"])
    return small


def _shrunk_config(config: Any) -> Any:
    sizes = {"embed_dim": HEADS * HEAD_DIM, "num_heads": HEADS, "depth": DEPTH}
    return dataclasses.replace(config, **{k: v for k, v in sizes.items() if hasattr(config, k)})


def _parameters(cls: Any) -> dict[str, inspect.Parameter]:
    if not inspect.isclass(cls):
        return {}
    found: dict[str, inspect.Parameter] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base) and base is not object:
            found |= inspect.signature(base.__init__).parameters
    return found


def _described(value: Any) -> str:
    if isinstance(value, functools.partial):
        return f"{value.func.__name__}({value.args}, {sorted(value.keywords)})"
    return value.__name__ if inspect.isclass(value) or inspect.isfunction(value) else repr(value)


def construct(model: Listed, options: dict[str, Any]) -> nn.Module:
    """Build a listed model with other options than its own."""

    def small(cls: Any, variant: str, pretrained: bool, *args: Any, **own: Any) -> Any:
        if not own.get("features_only"):
            own |= copy.deepcopy(options)  # some builders take their options apart
        return _build(cls, variant, pretrained, *args, **own)

    with builder(small):
        return timm.create_model(model.name, num_classes=CLASSES)


def build(model: Listed) -> nn.Module:
    """Build a listed model with its small options, or its own if those do not fit, and no weight at zero."""
    torch.manual_seed(0)
    try:
        built = construct(model, model.options)
    except Exception:
        built = construct(model, {})
    return in_float64(built)


def in_float64(model: nn.Module) -> nn.Module:
    """A model in evaluation mode, in float64, with no weight at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.double().eval()


_build = timm.models.build_model_with_cfg  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def ordinary_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalisation learns its statistics from the pass inside the block: activations keep an ordinary size.

    With those of an untrained model activations explode, the softmax saturates, and rounding is all that is compared.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    yield
    for norm in norms:
        norm.eval()


def image_sizes(model: nn.Module, options: dict[str, Any]) -> list[tuple[int, int]]:
    """Sizes to try, the smallest first."""
    given, cfg = options.get("img_size"), getattr(model, "pretrained_cfg", {})
    _, *sides = cfg.get("input_size") or (3, 224, 224)
    own = (sides[0], sides[1])
    if isinstance(given, int):
        return [(given, given), (6 * given // 4, 6 * given // 4), own]
    return [(64, 64), own] if not cfg.get("fixed_input_size") else [own]


def pooled_by_attention(model: nn.Module) -> bool:
    """Whether a convolutional network ends in one attention layer, in front of whose places their mean stands."""
    return any(
        type(module).__name__ in ("AttentionPool2d", "RotAttentionPool2d") for module in model.modules()
    )


def reading(model: Any, tokens: int) -> dict[str, Any]:
    """How the classifier reads its tokens, from timm's attributes."""
    body = getattr(model, "encoder", model)
    if pooled_by_attention(model):
        return {"read": "class", "prefix": 1}
    prefix = getattr(body, "num_prefix_tokens", 0)
    pool = getattr(model, "global_pool", "")
    blocks = list(getattr(body, "blocks", []))
    parallel = len(getattr(blocks[0], "attns", [0])) if blocks else 1
    if type(model).__name__ == "VisionTransformerDistilled":
        rows = torch.zeros(tokens)
        rows[:2] = 0.5
        return {"read": rows, "prefix": prefix, "parallel": parallel}
    read = {"token": "class", "avg": "mean", "map": "pool"}[pool]
    if read == "mean" and getattr(body, "pool_include_prefix", False):
        read = "all"
    return {"read": read, "prefix": prefix, "parallel": parallel}


def patch_grid(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """The live patch grid, from timm's patch embedding."""
    body = getattr(model, "encoder", model)
    if pooled_by_attention(model):
        stride = model.feature_info[-1]["reduction"]
        return size[0] // stride, size[1] // stride
    embed = next(m for m in (getattr(body, k, None) for k in ("patch_embed", "embeds")) if m is not None)
    if hasattr(embed, "dynamic_feat_size"):
        return tuple(embed.dynamic_feat_size(size))
    patch = embed.patch_size
    patch = (patch, patch) if isinstance(patch, int) else patch
    return size[0] // patch[0], size[1] // patch[1]


def judge(model: nn.Module, images: Tensor, how: Callable[[Any], dict[str, Any]]) -> tuple[str, str]:
    """Explain a model and compare with the reference: verdict and reason.

    Args:
        model: In evaluation mode.
        images: The batch.
        how: Of the model: arguments of the reference that say how the classifier reads its tokens.
    """
    forms = ("paper", "gradient")
    try:
        found = gmar(model, images, rollout=forms)
    except UnsupportedModelError as refusal:
        return "refused", str(refusal)
    except Exception as failure:
        return "error", f"{type(failure).__name__}: {failure}"
    try:
        if found.scope == "whole":
            worst = max(_whole_error(model, images, found, form, how(model)) for form in forms)
        else:
            worst = _heads_error(model, images, found)
    except Exception as failure:
        return "error", f"the reference failed, {type(failure).__name__}: {failure}"
    if not worst < TOLERANCE:
        return "wrong", f"{worst:.0e}"
    exact = WHOLE if found.scope == "whole" else HEADS_ONLY if found.heatmaps is None else STAGE
    return exact, f"{worst:.0e}" + ("" if found.scope == "whole" else f" {found.scope}")


def _whole_error(model: nn.Module, images: Tensor, found: Any, form: str, how: dict[str, Any]) -> float:
    expected = reference(model, images, found.targets, rollout=form, **how)
    assert len(expected.importance) == len(found.layers), f"{len(expected.importance)} maps"
    errors = [relative_error(found.maps[form], expected.heatmaps)]
    for layer, (importance, contribution) in enumerate(
        zip(expected.importance, expected.contribution, strict=True)
    ):
        heads = importance.shape[1]
        errors.append(relative_error(found.importance[:, layer, :heads], importance))
        errors.append(relative_error(found.contribution[:, layer, :heads], contribution))
    return max(errors)


def _heads_error(model: nn.Module, images: Tensor, found: Any) -> float:
    """Largest error of importance, contribution and the picture of the last stage; NaN counts as an error."""
    errors = []
    for index, image in enumerate(images):
        maps = maps_of_one(model, image[None], found.targets[index])
        # A layer on which the logit does not depend has importance zero, and no gradient in the reference.
        used = [
            layer for layer in range(len(found.layers)) if found.importance[index, layer].nan_to_num().any()
        ]
        assert len(maps) == len(used), f"{len(maps)} maps for {len(used)} layers"
        for layer, expected in zip(used, heads_alone(maps), strict=True):
            for ours, theirs in zip((found.importance, found.contribution), expected, strict=True):
                errors.append(relative_error(ours[index, layer, : len(theirs)], theirs))
                assert ours[index, layer, len(theirs) :].isnan().all()
        if found.heatmaps is not None:
            parallel = 1 + any(type(m).__name__ == "ParallelPartitionAttention" for m in model.modules())
            for form, rows in found.maps.items():
                errors.append(relative_error(rows[index].flatten(), stage_row(maps, form, parallel)))
    return max(error if error == error else float("inf") for error in errors)


def of_timm(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """What timm's own attributes say about grid and readout."""
    grid = patch_grid(model, (images.shape[-2], images.shape[-1]))
    prefix = getattr(getattr(model, "encoder", model), "num_prefix_tokens", 0)
    return {"grid": grid, **reading(model, prefix + grid[0] * grid[1])}


def examine(model: Listed) -> tuple[str, str]:
    """Build, run and judge one model."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in construct(model, model.options).parameters())
    except Exception:
        size = 0  # no meta construction: find out by building
    if size > LARGEST:
        return "too large", f"{size / 1e6:.0f} M parameters"
    outcome = "not run", "no image size"
    sizeless = {key: value for key, value in model.options.items() if key != "img_size"}
    for options in (model.options, sizeless):  # some branches fit together at their own size alone
        outcome = _examined(dataclasses.replace(model, options=options))
        if outcome[0] not in ("not run", "not built"):
            break
    return outcome


def _examined(model: Listed) -> tuple[str, str]:
    try:
        built = build(model)
    except Exception as failure:
        return "not built", f"{type(failure).__name__}: {failure}"
    outcome = "not run", "no image size"
    for height, width in image_sizes(built, model.options):
        images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).double()
        try:
            with torch.no_grad(), ordinary_statistics(built):
                built(images)
        except Exception as failure:
            outcome = "not run", f"{type(failure).__name__}: {failure}"
            continue
        return judge(built, images, functools.partial(of_timm, images=images))
    return outcome


def census(words: Sequence[str] = ()) -> list[Row]:
    """Examine every listed model; of a class without any attention, one and those that name attention."""
    groups: dict[str, list[Listed]] = collections.defaultdict(list)
    for model in listed_models(words):
        groups[model.key].append(model)
    rows: list[Row] = []
    convolutional: dict[tuple[str, str], Row] = {}
    for number, models in enumerate(groups.values()):
        started = time.monotonic()
        models.sort(key=lambda model: model.bulk)
        if models[0].family in convolutional and "attn" not in models[0].key:
            convolutional[models[0].family].names += [model.name for model in models]
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdict, reason = examine(models[0])
        rows.append(Row([m.name for m in models], models[0].family, verdict, reason))
        if reason.startswith("no attention seen") and "ran without" not in reason:
            convolutional[models[0].family] = rows[-1]
        seconds = time.monotonic() - started
        print(
            f"[{number + 1}/{len(groups)}] {seconds:5.1f} s  {verdict:27s} {models[0].name}: {reason[:150]}",
            flush=True,
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Verdicts per family and in total, as text."""
    families: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    reasons: dict[tuple[str, str], str] = {}
    for row in rows:
        families[row.family][row.verdict] += len(row.names)
        if row.verdict == "refused":
            reasons.setdefault(row.family, row.reason)
    lines = []
    for (file, cls), verdicts in sorted(families.items()):
        counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
        lines.append(f"{file:26s} {cls:28s} {counts:46s} {reasons.get((file, cls), '')[:110]}")
    total: collections.Counter[str] = collections.Counter()
    for row in rows:
        total[row.verdict] += len(row.names)
    lines.append(f"{len(rows)} distinct models for {total.total()} names: {dict(total.most_common())}")
    return "\n".join(lines)


def main() -> None:
    """Print the census; fail when anything is wrong."""
    torch.set_num_threads(1)
    rows = census(sys.argv[1:])
    print(table(rows))
    bad = [row for row in rows if row.verdict in ("wrong", "error")]
    for row in bad:
        print(f"{row.verdict}: {', '.join(row.names)}: {row.reason}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
