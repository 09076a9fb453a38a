"""Entry point of the ``streamtrain`` command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from streamtrain import __version__
from streamtrain.run import interrupts
from streamtrain.run.signals import EXIT_INTERRUPTED, EXIT_USAGE

COMMANDS = (
    "pack", "index", "verify", "stats", "plan", "train", "evaluate", "embed", "visualize", "report", "export", "config",
)  # fmt: skip

_DESCRIPTION = """\
Train DINOv3-style self-supervised vision transformers from streams of images.
`streamtrain COMMAND --help` shows the options and examples of a command.
"""
_EPILOG = """\
examples:
  streamtrain pack --src photos/ --out sets/photos
  streamtrain train --config vits16.yaml data.shards=sets/photos run.dir=runs/photos
  streamtrain export --run runs/photos --to hf --out exported

exit status:
  0    completed
  1    failed
  2    an error in the input or the settings (one line on stderr)
  3    stopped by evaluation.stop_if_below after a checkpoint
  75   stopped on request after a checkpoint; run the same command again to resume
  130  interrupted

For shell completion, add this line to ~/.bashrc or ~/.zshrc:
  eval "$(register-python-argcomplete streamtrain)"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Without ``argv`` it runs the command line of this process, and Ctrl-C prints no traceback until the process ends.
    """
    words = sys.argv[1:] if argv is None else argv
    if argv is None:
        interrupts.end_quietly_on_interrupt()
    undo = None
    try:
        # before the slow imports; a run that has started nothing yet ends at once
        undo = interrupts.exit_on_interrupt() if words[:1] == ["train"] else interrupts.raise_on_interrupt()
        return _run_command(words, owns_process=argv is None)
    except KeyboardInterrupt:
        interrupts.report()
        return EXIT_INTERRUPTED
    finally:
        if argv is not None and undo is not None:
            undo()


def _run_command(words: Sequence[str], owns_process: bool) -> int:
    # imported here, so that Ctrl-C during these imports is handled
    import logging

    from shards.errors import ShardError, printable
    from streamtrain.errors import StreamtrainError
    from streamtrain.run.command_line import raise_descriptor_limit
    from streamtrain.run.gpu_allocator import set_allocator_defaults
    from streamtrain.run.logs import configure_logging, hide_library_messages

    # the module is __main__ under python -m
    logger = logging.getLogger("streamtrain.cli.main")
    status = 0
    try:
        arguments = parse_arguments(words)
        configure_logging()
        if owns_process:
            # before torch is imported: `train` imports it to count GPUs
            set_allocator_defaults()
            hide_library_messages()
        raise_descriptor_limit()
        command = importlib.import_module(f"streamtrain.cli.{arguments.command}")
        status = command.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # the reader of the output has gone, such as `head`; Python would fail again when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status
    except Exception as error:
        if interrupts.was_interrupted():
            raise KeyboardInterrupt from None
        if isinstance(error, (StreamtrainError, ShardError)):
            logger.error(error)
            return EXIT_USAGE
        if isinstance(error, OSError) and error.filename is not None:
            logger.error(printable(f"{error.strerror}: {error.filename}"))
            return EXIT_USAGE
        raise


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; ``a.b=value`` overrides may come before, between and after the options."""
    # import only the named command, unless the help or a completion lists all commands
    parser = build_parser(argv[:1] if argv and argv[0] in COMMANDS and "_ARGCOMPLETE" not in os.environ else COMMANDS)
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    arguments, rest = parser.parse_known_args(argv)
    arguments.words = list(argv)
    if hasattr(arguments, "overrides"):
        # argparse parses only the first group of positional arguments, and returns the others here
        arguments.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.prog += f" {arguments.command}"
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def build_parser(commands: Sequence[str]) -> argparse.ArgumentParser:
    from streamtrain.run.command_line import CommandParser

    parser = CommandParser(
        prog="streamtrain", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"streamtrain {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in commands:
        importlib.import_module(f"streamtrain.cli.{name}").add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
