"""The subcommands of `gpt2`, a file for each few: the flags of each, and what it does.

Each imports what it needs when it runs, so that --help is fast.
"""

from collections.abc import Callable

from engine.commands.comparing import compare, report
from engine.commands.data import prepare, verify
from engine.commands.evaluating import Evaluate, evaluate
from engine.commands.machine import Doctor, Presets, doctor, presets
from engine.commands.planning import plan
from engine.commands.plotting import Plot, plot
from engine.commands.sampling import Sample, sample
from engine.commands.training import train, tune
from engine.commands.viewing import data
from engine.commands.weights import Export, export, import_

__all__ = ["COMMANDS", "KINDS", "SUMMARIES"]

COMMANDS: dict[str, Callable[[list[str], str], int | None]] = {  # return the exit code; None: DONE
    "prepare": prepare,
    "data": data,
    "train": train,
    "tune": tune,
    "plan": plan,
    "sample": sample,
    "eval": evaluate,
    "import": import_,
    "export": export,
    "plot": plot,
    "compare": compare,
    "report": report,
    "verify": verify,
    "presets": presets,
    "doctor": doctor,
}

SUMMARIES = {
    "prepare": "turn text into token shards",
    "data": "show what token shards hold: documents, duplicates, some of the text",
    "train": "train a preset on token shards; resumes by itself",
    "tune": "find what trains a preset fastest on this machine; train reads it",
    "plan": "estimate memory, time, disk, energy and cost of a run before it is paid for",
    "sample": "continue a prompt with a trained model",
    "eval": "print the loss of a trained model, on other text too; HellaSwag and LAMBADA",
    "import": "turn GPT-2 weights in the Hugging Face layout into a run directory",
    "export": "turn a run into a directory that transformers opens",
    "plot": "redraw a run's loss curve, or draw several runs on one axis",
    "compare": "say how runs differ, and whether it is more than noise",
    "report": "write runs as one HTML page with curves, samples and settings",
    "verify": "check that every shard and checkpoint is whole",
    "presets": "list the presets with size, tokens, learning rate and memory",
    "doctor": "show this machine's hardware and software, and what each op runs on and why",
}

# Flags of the commands whose flags are a dataclass at the door.
KINDS = {"sample": Sample, "eval": Evaluate, "export": Export, "plot": Plot, "presets": Presets, "doctor": Doctor}
