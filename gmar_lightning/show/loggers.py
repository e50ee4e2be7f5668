"""One adapter per logger. A logger is known by the name of its class, so none is imported unless it is in use."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gmar_lightning.show import keys
from gmar_lightning.show.publication import Adapter, Ending, Publication
from gmar_lightning.show.wandb_logger import WandbAdapter


class TensorBoardAdapter(Adapter):
    """TensorBoard: numbers, pictures and the histogram."""

    pictures = True

    def publish(self, shown: Publication) -> None:
        """Hand over one probe."""
        super().publish(shown)
        writer = self.logger.experiment
        for name, images in shown.lists.items():
            writer.add_images(name, np.stack(images), shown.step, dataformats="NHWC")
        for name, picture in shown.grids.items():
            writer.add_image(name, picture, shown.step, dataformats="HWC")
        finite = shown.importance[np.isfinite(shown.importance)]
        if finite.size:
            writer.add_histogram(self.key(keys.IMPORTANCE_HISTOGRAM), finite, shown.step)


class ImageHookAdapter(Adapter):
    """Any logger with `log_image(key, images, step, caption)`: SwanLab's, and what users write themselves."""

    pictures = True

    def publish(self, shown: Publication) -> None:
        """Hand over one probe: the numbers, then one call per list of pictures and per grid."""
        self.logger.log_metrics(shown.finite, step=shown.step)
        for name, images in shown.lists.items():
            captions = [*shown.captions[: len(images)]]
            self.logger.log_image(key=name, images=list(images), step=shown.step, caption=captions)
        for name, picture in shown.grids.items():
            self.logger.log_image(key=name, images=[picture], step=shown.step, caption=[_at(shown.step)])


class MLFlowAdapter(Adapter):
    """MLflow: pictures as images with steps, one key per probe image so that each has its own slider."""

    pictures = True

    def publish(self, shown: Publication) -> None:
        """Hand over one probe."""
        self.logger.log_metrics(shown.finite, step=shown.step)
        client, run = self.logger.experiment, self.logger.run_id
        for name, picture, _ in _single_pictures(shown):
            client.log_image(run, picture, key=self.prefixed(name), step=shown.step)

    def close(self, ending: Ending) -> None:
        """The report as an artifact, the summary as tags, by which MLflow filters runs."""
        client, run = self.logger.experiment, self.logger.run_id
        if ending.report is not None:
            client.log_artifact(run, str(ending.report), self.key("gmar"))
        for name, value in ending.summary.items():
            client.set_tag(run, self.prefixed(name), str(value))


class CometAdapter(Adapter):
    """Comet: pictures in the Graphics tab, the report in the HTML tab, alarms as notifications."""

    pictures = True

    def publish(self, shown: Publication) -> None:
        """Hand over one probe."""
        self.logger.log_metrics(shown.finite, step=shown.step)
        for name, picture, caption in _single_pictures(shown):
            self.logger.experiment.log_image(
                picture, name=self.prefixed(name), step=shown.step, metadata={"caption": caption}
            )

    def alert(self, title: str, text: str) -> None:
        """A notification, sent to whoever has switched them on."""
        self.logger.experiment.send_notification(title, "warning", {"message": text})

    def close(self, ending: Ending) -> None:
        """The report, and the summary under Other."""
        if ending.report is not None:
            self.logger.experiment.log_html(ending.report.read_text(encoding="utf-8"))
        self.logger.experiment.log_others(
            {self.prefixed(name): value for name, value in ending.summary.items()}
        )


class LitLoggerAdapter(Adapter):
    """Lightning's own service: pictures as media with steps, or as files where `log_media` is missing."""

    pictures = True

    def publish(self, shown: Publication) -> None:
        """Hand over one probe."""
        self.logger.log_metrics(shown.finite, step=shown.step)
        # The service uploads in the background, from its own link to the file.
        with tempfile.TemporaryDirectory() as folder:
            for name, picture, caption in _single_pictures(shown):
                # A file's name is its key, and a key can be used once.
                path = Path(folder, f"{name.replace('/', '_')}_step_{shown.step:08d}.png")
                Image.fromarray(picture).save(path)
                if hasattr(self.logger, "log_media"):
                    self.logger.log_media(name=name, path=str(path), step=shown.step, caption=caption)
                else:
                    self.logger.log_file(str(path))

    def close(self, ending: Ending) -> None:
        """The report as a file, the summary as metadata."""
        if ending.report is not None:
            self.logger.log_file(str(ending.report))
        self.logger.log_metadata(dict(ending.summary))


_ADAPTERS: dict[str, type[Adapter]] = {
    "WandbLogger": WandbAdapter,
    "TensorBoardLogger": TensorBoardAdapter,
    "MLFlowLogger": MLFlowAdapter,
    "CometLogger": CometAdapter,
    "LitLogger": LitLoggerAdapter,
    "LightningLogger": LitLoggerAdapter,  # the same service, as its own package ships it
}


def adapter_for(logger: Any) -> Adapter:
    """The adapter that knows this logger; any other gets pictures if it has `log_image`, and the numbers."""
    # By name: `lightning` and `pytorch_lightning` each have their own class.
    for kind in type(logger).__mro__:
        if kind.__name__ in _ADAPTERS:
            return _ADAPTERS[kind.__name__](logger)
    takes_images = callable(getattr(logger, "log_image", None)) and type(logger).__name__ != "DummyLogger"
    return ImageHookAdapter(logger) if takes_images else Adapter(logger)


def _single_pictures(shown: Publication) -> list[tuple[str, np.ndarray, str]]:
    """Name, picture and caption of every picture, for services that take one at a time."""
    listed = [
        (f"{name}/{index:02d}", image, caption)
        for name, images in shown.lists.items()
        for index, (image, caption) in enumerate(zip(images, _captions(shown, images), strict=True))
    ]
    return listed + [(name, picture, _at(shown.step)) for name, picture in shown.grids.items()]


def _captions(shown: Publication, images: Sequence[np.ndarray]) -> list[str]:
    return [*shown.captions, *[""] * len(images)][: len(images)]


def _at(step: int) -> str:
    return f"step {step}"
