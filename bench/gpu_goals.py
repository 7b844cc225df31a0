"""The goals of bench.gpu, held against its rows. Free of PyTorch."""

from bench.gpu_plan import OPS, PEERS

Row = dict
HEADLINE = "gpt2 bf16"  # the op of the rows whose speed and memory are goals


def find(rows: list[Row], section: str, op: str, contestant: str) -> Row | None:
    """The row of this section, op and contestant, or None."""
    return next(
        (row for row in rows if (row["section"], row["op"], row["contestant"]) == (section, op, contestant)), None
    )


def goals(rows: list[Row], gpu: str) -> list[dict]:
    """Every goal and what was measured: {"goal", "unit", "wanted", "measured", "is_met"}.

    The last two are None where a figure is missing. gpu: its name; a goal meant for one GPU is not measured on others.
    """
    return [*step_goals(rows, gpu), *kernel_goals(rows)]


def step_goals(rows: list[Row], gpu: str) -> list[dict]:
    """The goals of a training step of GPT-2 124M in bf16: ours is compiled, on Triton."""
    steps = {
        row["contestant"]: row for row in rows if (row["section"], row["op"]) == ("step", HEADLINE) and "step_ms" in row
    }
    ours, reference = steps.get("triton compiled"), steps.get("reference compiled")
    peers = [row["tokens_per_s"] for name, row in steps.items() if name.split()[0] in PEERS]
    speed = ours["tokens_per_s"] if ours and "H200" in gpu else None
    ratio = ours["tokens_per_s"] / max(peers) if ours and peers else None
    memory = None
    if ours and reference and ours["batch"] == reference["batch"]:
        memory = reference["peak_gib"] / ours["peak_gib"]
    return [
        at_least(f"{HEADLINE} training step on an H200", speed, 600_000, "tokens/s"),
        at_least(f"{HEADLINE} training step, tokens/s against the best peer", ratio, 1.3),
        at_least(f"{HEADLINE} training step, times less peak memory than the compiled reference", memory, 2.0),
    ]


def kernel_goals(rows: list[Row]) -> list[dict]:
    """The goals of single ops."""

    def median_ms(section: str, op: str, contestant: str, phase: str) -> float | None:
        row = find(rows, section, op, contestant)
        return row["phases"][phase]["median_ms"] if row and phase in row.get("phases", {}) else None

    def times_faster(section: str, op: str, rivals: list[str], phase: str) -> float | None:
        ours = median_ms(section, op, "triton", phase)
        theirs = [t for rival in rivals if (t := median_ms(section, op, rival, phase)) is not None]
        return min(theirs) / ours if ours is not None and theirs else None

    def share(section: str, op: str, phase: str) -> float | None:
        row = find(rows, section, op, "triton")
        return row["phases"][phase]["share_of_ceiling"] if row and phase in row.get("phases", {}) else None

    sdpa = [
        row["contestant"]
        for row in rows
        if (row["section"], row["op"]) == ("attention", "attention") and row["contestant"] != "triton"
    ]
    found = [
        at_least(
            "attention, forward + backward, against the best of PyTorch's with its copies",
            times_faster("attention", "attention", sdpa, "both"),
            1.0,
        )
    ]
    for section in ("layer_norm", "gelu"):
        for op in OPS[section]:
            for phase, wanted in (("forward", 0.9), ("backward", 0.8)):
                goal = f"{op}, {phase}, share of the copy ceiling"
                found.append(at_least(goal, share(section, op, phase), wanted, "of it"))
            for phase, words in (("forward", "forward"), ("both", "forward + backward")):
                ratio = times_faster(section, op, ["compile"], phase)
                found.append(at_least(f"{op}, {words}, against torch.compile", ratio, 1.0))
    head = ("cross_entropy", "linear_cross_entropy")
    ratio = times_faster(*head, ["compile"], "both")
    found.append(at_least("linear_cross_entropy, forward + backward, against torch.compile", ratio, 1.0))
    ours, theirs = (find(rows, *head, contestant) for contestant in ("triton", "compile"))
    memory = None
    if ours and theirs and "peak_bytes" in ours and "peak_bytes" in theirs:
        memory = theirs["peak_bytes"] / max(1, ours["peak_bytes"])
    found.append(at_least("linear_cross_entropy, times less peak memory than torch.compile", memory, 6.0))
    return found


def at_least(goal: str, measured: float | None, wanted: float, unit: str = "x") -> dict:
    """One goal: measured >= wanted."""
    return {
        "goal": goal,
        "unit": unit,
        "wanted": wanted,
        "measured": measured,
        "is_met": None if measured is None else measured >= wanted,
    }
