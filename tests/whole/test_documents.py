"""README.md and docs/*.md: every command parses, and every path, link, flag and name exists."""

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from engine import cli, config
from engine import commands as subcommands
from engine import flags as flag_parser
from engine.config import file as config_file
from engine.config import toml
from engine.errors import BadInput
from engine.tokens.prepare import PrepareConfig
from model.presets import PRESETS, GPT2Config

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PROGRAMS = {"gpt2", "python", "torchrun", "make", "pip", "sbatch", "kubectl"}
# Prefixes of paths that a run or a benchmark makes.
MADE = (
    "OUT/",
    "DIR/",
    "runs/",
    "data/",
    "checkpoints/",
    "tensorboard/",
    "compile_cache/",
    "fineweb-edu/",
    "bench/results/",
)
TRAINING = {
    "--" + name.replace("_", "-")
    for name in (
        *(field.name for field in dataclasses.fields(config.TrainConfig)),
        *(f"optim.{field.name}" for field in dataclasses.fields(config.OptimConfig)),
        *(f"model.{field.name}" for field in dataclasses.fields(GPT2Config)),
    )
}


class Parsed(Exception):
    """Raised once a parser has accepted its arguments. args[0] is what it returned."""


def stopping(parse: Callable) -> Callable:
    """Wraps a parser so that it raises Parsed before the program begins its work."""

    def wrapped(*args, **kwargs):
        raise Parsed(parse(*args, **kwargs))

    return wrapped


def parsed_by(program: Callable, *args: object) -> object:
    """Result of the parser of a program, which must be wrapped by `stopping`."""
    try:
        program(*args)
    except Parsed as parsed:
        return parsed.args[0]
    raise AssertionError("the arguments must reach the parser")


# ---- Text, code and commands of the documents ---------------------------------------------------------------------


def text(document: Path) -> str:
    """Text of the document, without the tables of results that a program writes."""
    return re.sub(r"<!-- bench:.*?<!-- /bench -->", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)


def inline_code(document: Path) -> list[str]:
    """Code in single backticks, without repeats."""
    return [*dict.fromkeys(INLINE.findall(FENCED.sub("", text(document))))]


def words_of(line: str) -> list[str]:
    """Words of a command, without comment, leading variables and directory; [] if it is none."""
    program = next((word for word in line.split() if not re.match(r"\w+=", word)), "").rpartition("/")[2]
    if program not in PROGRAMS:
        return []
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words.pop(0)
    return [program, *words[1:]]


def commands(document: Path) -> list[list[str]]:
    """Commands of the document: lines of fenced blocks, and inline code with arguments."""
    lines = [line for _, block in FENCED.findall(text(document)) for line in block.replace("\\\n", " ").splitlines()]
    fenced = [words for line in lines if (words := words_of(line))]
    inline = [words for code in inline_code(document) if len(words := words_of(code)) > 1]
    return fenced + [words for words in inline if words not in fenced]


COMMANDS = list(dict.fromkeys((document.name, tuple(words)) for document in DOCUMENTS for words in commands(document)))


# ---- Parsing ------------------------------------------------------------------------------------------------------


def parse(words: list[str], monkeypatch) -> None:
    """Asserts that the program of a command accepts its arguments. Runs nothing."""
    program, *args = words
    {
        "gpt2": parse_gpt2,
        "python": parse_python,
        "torchrun": parse_torchrun,
        "make": parse_make,
        "pip": parse_pip,
        "sbatch": parse_sbatch,
        "kubectl": parse_kubectl,
    }[program](args, monkeypatch)


def parse_gpt2(args: list[str], monkeypatch) -> None:
    command, *flags = args
    assert command in cli.COMMANDS, command
    if "--help" in flags:
        flags.remove("--help")
    if not flags:  # `gpt2 prepare`, the command's name
        return
    if command == "train":
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["engine.config.parse"], "given", a_whole_file)
            config.parse([flag for flag in flags if flag != "--print-config"], "gpt2 train")
        return
    with monkeypatch.context() as patch:
        patch.setattr(flag_parser, "checked", stopping(flag_parser.checked))
        asked = parsed_by(cli.COMMANDS[command], flags, f"gpt2 {command}")
    assert getattr(asked, "preset", "gpt2") in PRESETS


def a_whole_file(file: str, prog: str) -> config_file.Given:
    """What a file of --config holds that a document names and nobody wrote: every setting."""
    values = {name: toml.value_of(config.PRESETS["gpt2"], name) for name in toml.FIELDS}
    return config_file.Given(not file.endswith(".toml"), None, values)


def parse_python(args: list[str], monkeypatch) -> None:
    if args[:2] == ["-m", "pytest"]:
        assert_paths_exist([word for word in args[2:] if "/" in word and not word.startswith("-")])
        return
    if args[0] == "-c":
        assert all(map(importlib.util.find_spec, re.fullmatch(r"import (.+)", args[1])[1].split(", ")))
        return
    if args[0] == "-m":
        assert importlib.util.find_spec(args[1]), args[1]
        module, flags = importlib.import_module(args[1]), args[2:]
        if not flags:  # `python -m bench.gpu`, the command's name
            return
    else:
        assert_paths_exist(args[:1])
        spec = importlib.util.spec_from_file_location("documented", ROOT / args[0])
        module, flags = importlib.util.module_from_spec(spec), args[1:]
        monkeypatch.syspath_prepend(str((ROOT / args[0]).parent))
        spec.loader.exec_module(module)
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["program", *flags])
        patch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))
        if args[:2] == ["-m", "bench.rehearse"]:  # which leaves most flags to the parser of gpt2 train
            patch.setattr(module, "parse", stopping(module.parse))
        asked = parsed_by(module.main, *([flags] if args[0] == "-m" else []))
    model = getattr(asked, "model", "gpt2")
    assert isinstance(model, GPT2Config) or model in {**PRESETS, **getattr(module, "MODELS", {})}


def parse_torchrun(args: list[str], monkeypatch) -> None:
    from torch.distributed.run import get_args_parser

    asked = get_args_parser().parse_args(args)
    if asked.module and asked.training_script == "engine.cli":
        parse_gpt2(asked.training_script_args, monkeypatch)
        return
    assert asked.training_script == "engine/train.py"
    config.parse(asked.training_script_args, "torchrun")


def parse_make(args: list[str], monkeypatch) -> None:
    """Uses make's dry run, and parses the commands that it prints."""
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    makefile = (ROOT / "Makefile").read_text()
    for word in args:
        name, is_set, _ = word.partition("=")
        assert not is_set or f"$({name})" in makefile, f"the Makefile reads no {name}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "--dry-run", *args], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.replace("\\\n", " ").splitlines():
        if (words := words_of(line)) and words[:2] != ["pip", "install"]:
            parse(words, monkeypatch)


def parse_pip(args: list[str], monkeypatch) -> None:
    assert args[:2] == ["install", "-c"]
    assert (ROOT / args[2]).is_file()
    setup = (ROOT / "setup.py").read_text()
    for extra in re.findall(r"\[(\w+)\]", " ".join(args)):
        assert f'"{extra}": [' in setup, extra


def parse_sbatch(args: list[str], monkeypatch) -> None:
    assert_paths_exist([next(word for word in args if not word.startswith("-"))])


def parse_kubectl(args: list[str], monkeypatch) -> None:
    assert args[:2] == ["apply", "-f"]
    assert_paths_exist(args[2:])


def assert_paths_exist(paths: list[str]) -> None:
    """Asserts that paths exist below the repository root; a * stands for any name."""
    for path in paths:
        assert any(ROOT.glob(path.rstrip("/"))), f"{path} does not exist"


# ---- Tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "words"), COMMANDS, ids=[f"{document}: {shlex.join(words)}" for document, words in COMMANDS]
)
def test_every_command_parses(document, words, monkeypatch):
    try:
        parse(list(words), monkeypatch)
    except SystemExit as error:
        pytest.fail(f"{document}: {shlex.join(words)} is refused with exit code {error.code}")
    except BadInput as error:
        pytest.fail(f"{document}: {error}")


@pytest.mark.parametrize(
    "line",
    [
        "gpt2 train gtp2",
        "gpt2 train gpt2 --num-step 5",
        "gpt2 train gpt2 --precision bf61",
        "gpt2 sample --run runs/gpt2 --promt x",
        "gpt2 doctor --preset gtp2",
        "gpt2 trian gpt2",
        ".venv/bin/torchrun --nproc_per_node=8 engine/trane.py gpt2",
        ".venv/bin/torchrun --nproc_per_nodes=8 engine/train.py gpt2",
        ".venv/bin/torchrun --nproc_per_node=8 engine/train.py gpt2 --outt runs/x",
        "python -m bench.gpus --out DIR",
        "python -m bench.gpu --outt DIR",
        "python -m bench.roofline gtp2",
        "python tests/whole/chaos.py --secs 9",
        "make bench-all",
        "make train PRESETS=gpt2",
        "make train PRESET=gtp2",
    ],
)
def test_a_wrong_command_is_found(line, monkeypatch, capsys):
    with pytest.raises((AssertionError, BadInput, SystemExit, ModuleNotFoundError)):
        parse(words_of(line), monkeypatch)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_in_the_text_exists(document):
    path = re.compile(r"[\w.*/-]+(\.(py|md|png|json|slurm|yaml)|/)")
    paths = [code for code in inline_code(document) if path.fullmatch(code) and "/" in code]
    assert_paths_exist([path for path in paths if not path.startswith(MADE)])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document):
    for link in LINK.findall(text(document)):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in {title.lower().replace(" ", "-") for title in headings}, link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_in_the_text_exists(document, monkeypatch):
    from torch.distributed.run import get_args_parser

    known = TRAINING | {f"--no-{flag[2:]}" for flag in TRAINING}
    for kind in (PrepareConfig, *subcommands.KINDS.values()):
        flags = [field.name.replace("_", "-") for field in dataclasses.fields(kind)]
        known |= {prefix + flag for flag in flags for prefix in ("--", "--no-")}
    monkeypatch.setattr(flag_parser, "checked", stopping(flag_parser.checked))
    for command in ("plan", "plot", "compare", "report", "tune", "data"):
        asked = parsed_by(cli.COMMANDS[command], ["gpt2"], f"gpt2 {command}")
        known |= {"--" + field.name.replace("_", "-") for field in dataclasses.fields(asked)}
    known |= {option for action in get_args_parser()._actions for option in action.option_strings}
    known |= {
        "--config",
        "--print-config",
        "--help",
        "--shutdown-timeout",
    }  # the last is torchrun's, from torch 2.12 on
    for path in (*(ROOT / "bench").glob("*.py"), ROOT / "kernels" / "aot.py"):
        known |= set(re.findall(r'add_argument\("(--[a-z-]+)"', path.read_text()))
    for code in inline_code(document):
        if code.startswith("--"):
            flag, *value = shlex.split(code)
            assert flag in known, code
            if flag in TRAINING and value and "PATH" not in value and "DIR" not in value:
                config.parse(["gpt2", flag, *value], "gpt2 train")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_dotted_name_and_import_exists(document):
    for code in inline_code(document):
        if re.fullmatch(r"(kernels|model|engine|bench)(\.\w+)+", code):
            pkgutil.resolve_name(code)
    for language, block in FENCED.findall(text(document)):
        for node in ast.walk(ast.parse(block if language == "python" else "")):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    pkgutil.resolve_name(f"{node.module}:{alias.name}")


def test_a_wrong_path_is_found():
    for path in ("engine/trane.py", "engine/halth/", "bench/suite/bench_*.py"):
        with pytest.raises(AssertionError):
            assert_paths_exist([path])


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 165
