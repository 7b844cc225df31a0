"""Made-up question sets in the formats of HellaSwag and LAMBADA, and a model that answers some of them."""

import json
import random
from pathlib import Path

import torch

from model.gpt2 import GPT2, GPT2Config

SUBJECTS = ("A man in a blue coat", "The old café owner", "She", "A group of children", "The cook, who is new,")
VERBS = ("walks up to", "paints", "is seen lifting", "quickly cleans", "talks about", "puts down", "throws")
THINGS = ("a wooden ladder", "the 3 red bowls", "some naïve drawing", "the dog's leash", "a drum kit", "an “open” box")
REST = ("and smiles.", "while the crowd watches", "before leaving the room.", "[substeps] again and again.", "— twice!")
WORDS = ("dog", "house", "water", "Sarah", "nothing", "marmalade", "him", "door", "Kraków", "time")


def hellaswag() -> list[dict]:
    """40 examples, with what is odd in the real ones: artefacts of WikiHow, double spaces, long texts."""
    drawn, records = random.Random(0), []

    def sentence(most: int = 1) -> str:
        return " ".join(" ".join(map(drawn.choice, (SUBJECTS, VERBS, THINGS, REST))) for _ in range(most))

    for index in range(40):
        how_to, is_long = index % 3 == 1, index % 10 == 7
        first = sentence(5 if is_long else 1)
        if how_to:
            first = f"[header] How to do it [title] {first} [step] {sentence()}"
        second = "" if how_to else drawn.choice(("he", "the Cook", "they  then"))
        endings = [f"{drawn.choice(VERBS)} {drawn.choice(THINGS)} {drawn.choice(REST)}" for _ in range(4)]
        endings[index % 4] += f" [title] {sentence()}" if how_to else ""
        label = drawn.randrange(4)
        record = {"ind": index, "activity_label": drawn.choice(("Baking", "Home and Garden", "Windsurfing"))}
        record |= {"ctx_a": first, "ctx_b": second, "ctx": f"{first} {second}".strip(), "endings": endings}
        records.append(record | {"label": str(label) if index % 5 == 0 else label})
    return records


def lambada() -> list[dict]:
    """40 passages. Half of them repeat a word, which `model` expects."""
    drawn, records = random.Random(1), []
    for index in range(40):
        word, length = drawn.choice(WORDS), 8 if index % 10 == 3 else 1
        text = " ".join(" ".join(map(drawn.choice, (SUBJECTS, VERBS, THINGS, REST))) for _ in range(length))
        before = f" {word}" if index % 2 else " " if index % 10 == 4 else ""  # two spaces, as there are in novels
        records.append({"text": f"{text} It was the{before} {word}"})
    return records


def short() -> dict[str, list[dict]]:
    """Sets of 12 examples that a model of bytes with 32 positions can be asked."""
    drawn, found = random.Random(2), {"hellaswag": [], "lambada": []}
    for index in range(12):
        endings = [
            drawn.choice(("if x:", "return None", "import os", "pass", "def f():")) * (1 + k % 2) for k in range(4)
        ]
        context = {"activity_label": "Code", "ctx_a": f"class A{index}:", "ctx_b": "self"}
        found["hellaswag"].append(context | {"ctx": f"class A{index}: self", "endings": endings, "label": index % 4})
        found["lambada"].append({"text": f"import x{index} from " + drawn.choice(("e", "os", "None"))})
    return found


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def model() -> GPT2:
    """Random weights of which the embedding counts most, so that the likeliest token is the last one again."""
    torch.manual_seed(0)
    made = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=64, n_positions=64, vocab_size=50257))
    with torch.no_grad():
        made.wpe.weight *= 0.5
        for block in made.h:
            block.attn.c_proj.weight *= 0.1
            block.mlp.c_proj.weight *= 0.05
    return made.eval()
