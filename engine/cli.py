"""The `gpt2` command: the list of subcommands, and how each one ends."""

import importlib.metadata
import platform
import sys

from engine import output, packages, system
from engine.commands import COMMANDS, SUMMARIES
from engine.errors import BAD_INPUT, DONE, INTERRUPTED, BadInput, Diverged, exit_code, nearest

PRINTED = (
    "data",
    "sample",
    "eval",
    "plan",
    "compare",
    "presets",
    "doctor",
)  # what is printed is all that these commands make

USAGE = "usage: {gpt2} COMMAND ...\n\nGPT-2 pretraining, from text to a model that speaks.\n\n" + "\n".join(
    f"  {name:<8} {summary}" for name, summary in SUMMARIES.items()
)
USAGE += """

{gpt2} COMMAND --help lists a command's flags, {gpt2} train --help the presets. A first run:
  {gpt2} prepare stdlib --out data/stdlib --tokenizer bytes && {gpt2} train tiny"""
VERSION = ("--version", "-V", "version")


def version() -> str:
    """Versions of this package, of PyTorch and of Python. Imports none of them."""
    found = []
    for name in ("gpt2-engine", "torch"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def main(args: list[str] | None = None) -> int:
    """Runs one command. Exit code: 0 done, 1 found damage, 2 bad input, 3 not finite, 130 interrupted."""
    args = sys.argv[1:] if args is None else args
    output.protect(" ".join(["gpt2", *args[:1]]))
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE.replace("{gpt2}", output.program()))
        return DONE if args else BAD_INPUT
    if args[0] in VERSION:
        print(version())
        return DONE
    try:
        if (problem := packages.shadowed()) is not None:
            raise BadInput(problem)
        if args[0] not in COMMANDS:
            raise BadInput(f"gpt2: the command must be one that exists, got {args[0]!r}{nearest(args[0], COMMANDS)}")
        code = COMMANDS[args[0]](args[1:], f"gpt2 {args[0]}") or DONE
        return code if args[0] not in PRINTED or output.is_whole() else BAD_INPUT
    except (BadInput, Diverged) as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    except (OSError, ImportError, MemoryError, RuntimeError) as error:
        message = _refusal(error, f"gpt2 {args[0]}")
        if message is None:  # a bug, which keeps its traceback
            raise
        print(message, file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"\ngpt2 {args[0]}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _refusal(error: Exception, command: str) -> str | None:
    """Error message for what the machine refused and no caller turned into one; None for a bug."""
    message = None
    if sys.modules.get("torch") is not None:  # whose errors tell how much was asked for
        from engine.health import failures

        message = failures.no_room_for_the_model(error, command)
    return message or system.sentence(error, command)


if __name__ == "__main__":
    sys.exit(main())
