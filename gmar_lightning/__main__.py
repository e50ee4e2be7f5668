"""What a Vision Transformer looks at and which heads matter: explain files, judge and follow runs, check models.

Exit codes: 0 when all went well; 1 when the answer is no (a finding named by --fail-on, a model that cannot be
explained, some files that could not); 2 for bad input, with one sentence on the error stream.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

# Name, one line of help, and the module whose `add_arguments` and `run` make the command. It is imported only
# when the command is wanted: some load models, and nobody should wait for that to read a help text.
COMMANDS = (
    ("explain", "heatmaps for image files, from a checkpoint", "gmar_lightning.training.explain_files"),
    (
        "report",
        "verdict, comparison and HTML report of runs; --json for programs",
        "gmar_lightning.show.report_command",
    ),
    (
        "doctor",
        "whether a model can be explained, what is shown, what a probe costs",
        "gmar_lightning.training.doctor",
    ),
    ("watch", "follow a running job in the terminal", "gmar_lightning.show.watch"),
    ("workspace", "save a W&B view of a project's GMAR panels", "gmar_lightning.show.workspace_command"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="gmar", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, words, module_name in COMMANDS:
        command = commands.add_parser(name, help=words, description=words)
        if given and given[0] == name:
            try:
                module = importlib.import_module(module_name)
            except ImportError as error:
                print(f"gmar {name} needs {error.name}: pip install 'gmar-lightning[train]'", file=sys.stderr)
                return 2
            module.add_arguments(command)
            command.set_defaults(execute=module.run)
    arguments = parser.parse_args(given)
    return arguments.execute(arguments)


if __name__ == "__main__":
    sys.exit(main())
