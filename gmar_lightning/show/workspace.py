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
    """Save a view of the project with sections of GMAR panels in reading order; needs a W&B login.

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

    def browser(title: str, key: str, **settings: Any) -> Any:
        return wr.MediaBrowser(title=title, media_keys=[key], layout=Layout(w=24, h=10), **settings)

    # In the order in which a run is read: is anything wrong, what does it look at, which heads, then the rest.
    sections = [
        ws.Section(
            name="GMAR 1: is anything wrong?",
            is_open=True,
            panels=[
                wr.MarkdownPanel(markdown=_HOW_TO_READ),
                wr.ScalarChart(title="collapsed heads now", metric=keys.COLLAPSED),
                wr.LinePlot(title="collapsed heads", y=[keys.COLLAPSED, keys.NEWLY_COLLAPSED]),
                wr.LinePlot(title="effective heads", y=[keys.EFFECTIVE_HEADS, keys.IMPORTANCE_MIN]),
                wr.LinePlot(title="heatmap drift", y=[keys.DRIFT, keys.DRIFT_FROM_FIRST]),
                wr.WeavePanelSummaryTable(table_name=keys.EVENTS),
            ],
        ),
        ws.Section(
            name="GMAR 2: what does it look at?",
            is_open=True,
            panels=[
                browser(
                    "heatmaps over steps", keys.HEATMAPS, mode="grid", grid_x_axis="step", grid_y_axis="index"
                ),
                # Rows are images, columns are runs: the same probe images side by side.
                browser(
                    "runs side by side", keys.HEATMAPS, mode="grid", grid_x_axis="run", grid_y_axis="index"
                ),
                browser("the photographs", keys.INPUTS),
                wr.WeavePanelSummaryTable(table_name=keys.IMAGES),
            ],
        ),
        ws.Section(
            name="GMAR 3: which heads?",
            panels=[
                browser("head evolution", keys.HEAD_EVOLUTION),
                browser("head importance", keys.HEAD_IMPORTANCE),
                browser(
                    "head importance, runs side by side", keys.HEAD_IMPORTANCE, mode="grid", grid_x_axis="run"
                ),
                wr.LinePlot(
                    title="effective heads per layer", metric_regex=keys.any_layer(keys.LAYER_EFFECTIVE_HEADS)
                ),
                wr.LinePlot(
                    title="every head", metric_regex=keys.any_layer(keys.HEAD_SHARE), max_runs_to_show=1
                ),
            ],
        ),
        ws.Section(
            name="GMAR 4: report and tables",
            panels=[wr.WeavePanelSummaryTable(table_name=keys.HEAD_TABLE)],
        ),
    ]
    settings = ws.WorkspaceSettings(x_axis=keys.STEP)
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)
