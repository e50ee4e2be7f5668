"""`python -m gmar_lightning`: `report` tells the story of runs, `explain` draws heatmaps for files."""

import argparse
import sys
from collections.abc import Sequence

from gmar_lightning.show.compare import add_arguments as add_report_arguments
from gmar_lightning.show.compare import report_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (2 for bad input)."""
    parser = argparse.ArgumentParser(prog="python -m gmar_lightning", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser(
        "report", help="verdict, comparison and HTML report from the records of runs"
    )
    add_report_arguments(report)
    report.set_defaults(run=report_command)
    # what trains and loads models is imported only for the command that needs it
    if _wants(argv, "explain"):
        from gmar_lightning.training.explain_files import add_arguments, explain_files

        explain = commands.add_parser("explain", help="heatmaps for image files from a checkpoint")
        add_arguments(explain)
        explain.set_defaults(run=explain_files)
    else:
        commands.add_parser("explain", help="heatmaps for image files from a checkpoint")
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _wants(argv: Sequence[str] | None, command: str) -> bool:
    given = sys.argv[1:] if argv is None else argv
    return bool(given) and given[0] == command


if __name__ == "__main__":
    sys.exit(main())
