"""A ready W&B workspace view of a project's GMAR keys (extra `workspace`)."""

from __future__ import annotations

from typing import Any

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
            wr.ScalarChart(title="collapsed heads now", metric="gmar/collapsed_heads"),
            wr.LinePlot(title="collapsed heads", y=["gmar/collapsed_heads", "gmar/newly_collapsed"]),
            wr.LinePlot(title="effective heads", y=["gmar/effective_heads", "gmar/importance_min"]),
            wr.LinePlot(title="heatmap drift", y=["gmar/heatmap_drift", "gmar/heatmap_drift_from_first"]),
            wr.MediaBrowser(title="head evolution", media_keys=["gmar/head_evolution"], layout=wide),
            wr.MediaBrowser(title="head importance", media_keys=["gmar/head_importance"]),
            wr.MediaBrowser(
                title="heatmaps",
                media_keys=["gmar/heatmaps"],
                mode="grid",
                grid_x_axis="step",
                grid_y_axis="index",
                layout=wide,
            ),
            wr.LinePlot(title="effective heads per layer", metric_regex="gmar_layers/effective_heads.*"),
            wr.LinePlot(title="every head", metric_regex="gmar_heads/.*", max_runs_to_show=1),
            wr.MarkdownPanel(markdown=_HOW_TO_READ),
        ],
    )
    settings = ws.WorkspaceSettings(x_axis="trainer/global_step")
    return ws.Workspace(entity=entity, project=project, name=name, sections=[section], settings=settings)
