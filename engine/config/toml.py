"""Settings as TOML: what --print-config prints and --config reads.

The names are those of the flags, with dashes or underscores, nested ones in the tables [model] and
[optim]. TOML has no null: "None" in quotes is no value, as on a command line, and so is "auto" for
micro_batch_size.
"""

import dataclasses
import difflib
import json
import operator
import re
import tomllib
from typing import Any, get_args

from engine import flags
from engine.config.fields import TrainConfig, flag_of
from engine.errors import BadInput
from model.files import BadFile, check_fields
from model.presets import num_parameters

NONE = "None"
PRESET = "preset"  # a name that is no field: what the file leaves out has this preset's value


def fields_of(kind: type, prefix: str = "") -> dict[str, Any]:
    """Type of each field by its dotted name. Nested dataclasses are left out, their fields are not."""
    found = {}
    for each in dataclasses.fields(kind):
        name = prefix + each.name
        found |= fields_of(each.type, f"{name}.") if dataclasses.is_dataclass(each.type) else {name: each.type}
    return found


FIELDS = fields_of(TrainConfig)
TABLES = {name.partition(".")[0] for name in FIELDS if "." in name}


def value_of(config: TrainConfig, name: str) -> Any:
    """The value of a field by its dotted name."""
    return operator.attrgetter(name)(config)


def applied(values: dict[str, Any], base: TrainConfig) -> TrainConfig:
    """The config with these values, by dotted names. Raises ValueError if a part of it refuses its values."""
    parts = {
        table: dataclasses.replace(
            getattr(base, table),
            **{name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{table}.")},
        )
        for table in TABLES
    }
    return dataclasses.replace(base, **parts, **{name: value for name, value in values.items() if "." not in name})


# ---- Write --------------------------------------------------------------------------------------------------------


def dump(config: TrainConfig, prog: str) -> str:
    """All settings, with what follows from them in comments. Raises BadInput if TOML cannot hold a text."""
    count, tokens = num_parameters(config.model, padded=False), config.num_steps * config.tokens_per_step
    lines = [
        f"# {prog} --config FILE reads this.",
        f"# {count:,} parameters, {tokens:,} tokens in {config.num_steps:,} steps.",
    ]
    table = ""
    for name in sorted(FIELDS, key=lambda name: name.rpartition(".")[0]):  # those of no table first
        inside, _, key = name.rpartition(".")
        value = value_of(config, name)
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{prog}: --print-config needs settings of valid text, got {value!r} in {name}") from error
        lines += ["", f"[{inside}]"] if inside != table else []
        table = inside
        note = f"  # {config.sequence_length}, the model's n_positions" if name == "context" and value is None else ""
        lines.append(f"{key} = {_literal(value)}{note}")
    return "\n".join(lines)


def _literal(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    text = NONE if value is None else value  # of JSON's literals TOML takes texts, integers and booleans
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


# ---- Read ---------------------------------------------------------------------------------------------------------


def parse(content: bytes) -> tuple[str | None, dict[str, Any]]:
    """(preset, or None; values by dotted names) of a TOML file.

    Raises BadFile if it is no TOML, and ValueError with a line for each name or type that is wrong.
    """
    try:
        text = content.decode("utf-8-sig")
        table = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise BadFile(f"text that is not UTF-8 at byte {error.start:,}") from error
    except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
        raise BadFile(f"no TOML: {error}") from error
    except RecursionError as error:
        raise BadFile("TOML that is nested too deep") from error
    values, wrong = {}, []
    for key, name, value in _flat(table):
        where = _line_of(key, text)
        if name in values:
            wrong.append(f"{where}{name} must be set once, got it twice")
        elif (problem := _problem(name, value)) is not None:
            wrong.append(where + problem)
        else:
            values[name] = None if _is_none(name, value) else value
    if wrong:
        raise ValueError("\n  ".join(wrong))
    return values.pop(PRESET, None), values


def _flat(table: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """(key as written, dotted name, value) of all settings."""
    found = []
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in TABLES and isinstance(value, dict):
            found += [(inner, f"{name}.{inner.replace('-', '_')}", each) for inner, each in value.items()]
        else:
            found.append((key, name, value))
    return found


def _is_none(name: str, value: Any) -> bool:
    """Whether a value stands for the None of its field."""
    is_word = value == NONE or (name == "micro_batch_size" and value == "auto")
    return is_word and type(None) in get_args(FIELDS.get(name))


def _problem(name: str, value: Any) -> str | None:
    """What is wrong with a setting, or None."""
    if name in TABLES:
        return f'{name} must be a table, [{name}], got {value!r}; a preset is named by {PRESET} = "gpt2"'
    if name not in FIELDS and name != PRESET:
        return f"a name must be that of a flag, got {name}{_advice(name)}"
    try:
        check_fields({name: None if _is_none(name, value) else value}, {name: FIELDS.get(name, str)})
    except BadFile as error:
        return f"a value must have its type, got {error}".replace(" or null", f' or "{NONE}"')
    return None


def _advice(name: str) -> str:
    known = {flag_of(field) for field in FIELDS}
    for word in (name, name.rpartition(".")[2]):
        if (ours := flags.hint(flag_of(word), known)) is not None:
            return f"; here it is {ours.removeprefix('--')}"
    close = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else "; --print-config lists all"


def _line_of(key: str, text: str) -> str:
    """ "line 3: ", or "" if the key stands on no line or on several."""
    pattern = re.compile(rf"\s*\[?\s*(?:[\w-]+\s*\.\s*)*[\"']?{re.escape(key)}[\"']?\s*[=.\]]")
    lines = [number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)]
    return f"line {lines[0]}: " if len(lines) == 1 else ""
