"""A ready W&B workspace view of a project's GMAR keys (extra `workspace`)."""

from __future__ import annotations

from typing import Any

from gmar_lightning.show import keys

_HOW_TO_READ = """\
**Collapsed heads** above 0 is an alarm: look up the head in *head evolution*, a dark streak
from the step of the flag.
**Effective heads** falling over the whole run means that few heads do the work.
**Heatmaps**: rows are images, columns are steps. A map that stops looking at the object while accuracy stays high
is a shortcut. **Heatmap drift** near 0 means that the explanations have settled.
"""


def create(entity: str, project: str, name: str = "GMAR") -> str:
    """Save a view of the project with one section of GMAR panels; needs a W&B login.

    Each call makes a new view, so call it once per project.

    Args:
        entity: W&B user or team.
        project: W&B project.
        name: Name of the view.

    Returns:
        Address of the view.

    Raises:
        ImportError: When `wandb-workspaces` is not installed.
    """
    return layout(entity, project, name).save().url


def layout(entity: str, project: str, name: str = "GMAR") -> Any:
    """The view, not saved: a `wandb_workspaces.workspaces.Workspace`.

    Raises:
        ImportError: When `wandb-workspaces` is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces.reports.v2.interface import Layout
    except ImportError as error:
        raise ImportError(
            "the workspace view needs wandb-workspaces: pip install gmar-lightning[workspace]"
        ) from error
    wide = Layout(w=24, h=10)
    section = ws.Section(
        name="GMAR",
        is_open=True,
        panels=[
            wr.ScalarChart(title="collapsed heads now", metric=keys.COLLAPSED),
            wr.LinePlot(title="collapsed heads", y=[keys.COLLAPSED, keys.NEWLY_COLLAPSED]),
            wr.LinePlot(title="effective heads", y=[keys.EFFECTIVE_HEADS, keys.IMPORTANCE_MIN]),
            wr.LinePlot(title="heatmap drift", y=[keys.DRIFT, keys.DRIFT_FROM_FIRST]),
            wr.MediaBrowser(title="head evolution", media_keys=[keys.HEAD_EVOLUTION], layout=wide),
            wr.MediaBrowser(title="head importance", media_keys=[keys.HEAD_IMPORTANCE]),
            wr.MediaBrowser(
                title="heatmaps",
                media_keys=[keys.HEATMAPS],
                mode="grid",
                grid_x_axis="step",
                grid_y_axis="index",
                layout=wide,
            ),
            wr.LinePlot(
                title="effective heads per layer", metric_regex=keys.any_layer(keys.LAYER_EFFECTIVE_HEADS)
            ),
            wr.LinePlot(title="every head", metric_regex=keys.any_layer(keys.HEAD_SHARE), max_runs_to_show=1),
            wr.MarkdownPanel(markdown=_HOW_TO_READ),
        ],
    )
    settings = ws.WorkspaceSettings(x_axis=keys.STEP)
    return ws.Workspace(entity=entity, project=project, name=name, sections=[section], settings=settings)
