"""Every image classifier of transformers, explained or refused: `python -m tests.benchmarks.census_transformers`.

Each class of the library's own mapping is built at random from its configuration with small sizes, as far as the
configuration allows, and judged as in `tests.benchmarks.census`. What each classifier reads is written down by hand.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from tests.benchmarks.census import CLASSES, LARGEST, Row, in_float64, judge, ordinary_statistics, table

PLAIN = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
# Tokens in front of the patches, and what is read of all tokens.
READ = {
    "vit": (1, "class"), "vit_msn": (1, "class"), "deit": (1 + 1, "class"), "beit": (1, "mean"),
    "data2vec-vision": (1, "mean"), "dinov2": (1, "both"), "dinov2_with_registers": (5, "both"), "clip": (1, "mean"),
    "metaclip_2": (1, "mean"), "ijepa": (0, "all"), "siglip": (0, "all"), "DeiTForImageClassificationWithTeacher":
    (2, "two"),
}  # fmt: skip


def configurations(config_class: Any) -> Iterator[Any]:
    """Configurations of a class, the smallest first; the last one is its default."""
    for sizes in (
        {"image_size": 32, "patch_size": 8, **PLAIN},
        {"image_size": 64},
        {"image_size": 64, **PLAIN},
        {},
    ):
        try:
            config = config_class(num_labels=CLASSES)
            for part in [config, *(getattr(config, name, None) for name in ("vision_config",))]:
                if part is not None:
                    _shrink(part, sizes)
            yield config
        except Exception:
            continue


def _shrink(config: Any, sizes: dict[str, Any]) -> None:
    lists = any(
        isinstance(getattr(config, key, None), (list, tuple))
        for key in ("hidden_sizes", "depths", "embed_dim")
    )
    for key, value in sizes.items():
        fits = isinstance(getattr(config, key, None), int) and not (lists and key in ("patch_size", *PLAIN))
        if fits:
            setattr(config, key, value)
        elif key == "image_size" and isinstance(getattr(config, key, None), (list, tuple)):
            setattr(config, key, [value, value])
    for key in ("depths", "depth", "num_hidden_layers"):
        if sizes and isinstance(getattr(config, key, None), (list, tuple)):
            setattr(config, key, [min(count, 2) for count in getattr(config, key)])


def reading(kind: str, name: str, images: Tensor, config: Any) -> dict[str, Any]:
    """Arguments of the reference."""
    prefix, read = READ.get(name) or READ[kind]
    config = getattr(config, "vision_config", config)
    grid = (images.shape[-2] // config.patch_size, images.shape[-1] // config.patch_size)
    rows = torch.zeros(prefix + grid[0] * grid[1])
    if read == "both":
        rows[0], rows[prefix:] = 0.5, 0.5 / (len(rows) - prefix)
    if read == "two":
        rows[:2] = 0.5
    return {"prefix": prefix, "grid": grid, "read": rows if read in ("both", "two") else read}


def examine(kind: str, model_class: Any, config_class: Any) -> tuple[str, str]:
    """Build, run and judge one class."""
    outcome = "not built", "no configuration"
    for config in configurations(config_class):
        try:
            torch.manual_seed(0)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
            if size > LARGEST:
                outcome = "too large", f"{size / 1e6:.0f} M parameters"
                continue
            model: nn.Module = in_float64(model_class(config))
        except Exception as failure:
            outcome = "not built", f"{type(failure).__name__}: {failure}"
            continue
        side = getattr(getattr(config, "vision_config", config), "image_size", 64)
        side = side if isinstance(side, int) else (side or [64])[0]
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)).double()
        try:
            with torch.no_grad(), ordinary_statistics(model):
                model(images)
        except Exception as failure:
            outcome = "not run", f"{type(failure).__name__}: {failure}"
            continue
        return judge(model, images, lambda m: reading(kind, model_class.__name__, images, config))  # noqa: B023
    return outcome


def census(words: tuple[str, ...] = ()) -> list[Row]:
    """Examine every class of the mapping (those that contain one of `words`)."""
    rows = []
    for config_class, classes in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.items():
        kind: str = config_class.model_type  # pyright: ignore[reportAttributeAccessIssue]
        for model_class in classes if isinstance(classes, tuple) else (classes,):
            name = model_class.__name__
            if words and not any(word in name.lower() for word in words):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verdict, reason = examine(kind, model_class, config_class)
            rows.append(Row([name], (kind, name[:28]), verdict, reason))
            print(f"{verdict:27s} {name}: {reason[:150]}", flush=True)
    return rows


def main() -> None:
    """Print the census; fail when anything is wrong."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = census(tuple(sys.argv[1:]))
    print(table(rows))
    sys.exit(any(row.verdict in ("wrong", "error") for row in rows))


if __name__ == "__main__":
    main()
