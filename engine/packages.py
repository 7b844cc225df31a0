"""Our packages `kernels` and `model` come before others of the same name, such as Hugging Face's `kernels`.

A program that imports `engine` gets ours too, also where it has a module `model` of its own.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("kernels", "model")
OUR_FILES = {"kernels": "dispatch.py", "model": "gpt2.py"}  # one that only ours has


class OwnFirst:
    """Finds our packages beside engine/, whatever others of their names are installed. First on sys.meta_path."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The spec of one of our packages, or None for any other module."""
        return PathFinder.find_spec(name, [str(ROOT)]) if name in NAMES else None


def come_first() -> None:
    """From now on an import of `kernels` or `model` finds ours. Safe to call again."""
    if OwnFirst not in sys.meta_path:
        sys.meta_path.insert(0, OwnFirst)


def strangers() -> list[Path]:
    """Other packages or modules named `kernels` or `model` on sys.path. Imports none of them."""
    places = [path for path in dict.fromkeys(sys.path) if Path(path or ".").resolve() != ROOT]
    specs = [PathFinder.find_spec(name, [place]) for name in NAMES for place in places]
    found = [Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None]
    return [path.parent if path.name == "__init__.py" else path for path in found]


def shadowed() -> str | None:
    """Error message if `kernels` or `model` cannot be ours, else None."""
    for name in NAMES:
        try:
            importlib.import_module(name)
            spec, got = importlib.util.find_spec(name), None
        except Exception as error:  # whatever a stranger's package does when it is imported
            spec, got = None, f"{type(error).__name__}: {error}"
        package = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if package != ROOT / name or not (package / OUR_FILES[name]).is_file():
            return (
                f"gpt2: `import {name}` must find {ROOT / name}, got {package or got or 'nothing'}; another package of "
                f"this name was imported first or is installed in the same place: uninstall it, or use a clone in an "
                "environment without it"
            )
    return None
