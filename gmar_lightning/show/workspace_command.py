"""`gmar workspace ENTITY/PROJECT`: saves the W&B view."""

from __future__ import annotations

import argparse
import sys

from gmar_lightning.show.workspace import create


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gmar workspace`."""
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="the W&B project, with its user or team")
    parser.add_argument("--name", default="GMAR", help="name of the view (default GMAR)")


def run(arguments: argparse.Namespace) -> int:
    """Save the view and print its address.

    Returns:
        Exit code: 0, or 2 when the project is not named as it should be, the extra is not installed, or W&B
        refuses (not logged in, no network, no such project).
    """
    entity, _, project = arguments.project.partition("/")
    if not entity or not project or "/" in project:
        print(f"{arguments.project!r} is not ENTITY/PROJECT", file=sys.stderr)
        return 2
    try:
        address = create(entity, project, arguments.name)
    except Exception as error:
        # wandb and its client raise many kinds; whoever typed the command needs the reason, not a traceback.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(f"the view could not be saved: {reason[0]}", file=sys.stderr)
        return 2
    print(address)
    return 0
