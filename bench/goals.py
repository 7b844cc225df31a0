"""The goals, held against rows of bench.peers and bench.gpu. Free of PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench import tables
from bench.results import Row, find

HEADLINE = "gpt2 B=64 bf16"  # the case of bench.gpu whose speed and memory are goals
SPEED = {"fp32": 1.0, "bf16": 1.2}  # times the speed of the fastest peer, on a CPU
CEILING, MEMORY = 0.85, 0.5  # of the rate of a matrix product; of the leanest peer's step memory
SHARES = {"forward": 0.9, "backward": 0.8}  # of the copy ceiling, for ops that memory limits
MEMORY_BOUND = ("layer_norm", "add_layer_norm", "gelu", "bias_gelu")


@dataclass(frozen=True)
class Goal:
    """A value that must be at least, or at most, the wanted one. measured: None where a figure is missing."""

    name: str
    measured: float | None
    wanted: float
    unit: str = "x"
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """Whether it is met."""
        if self.measured is None:
            return "not measured"
        is_met = self.measured <= self.wanted if self.at_most else self.measured >= self.wanted
        return "met" if is_met else "not met"

    def cells(self) -> tuple[str, str, str, str]:
        """The goal as a table row."""
        measured = "-" if self.measured is None else tables.amount(self.measured, self.unit)
        bound = "at most" if self.at_most else "at least"
        return self.name, measured, f"{bound} {tables.amount(self.wanted, self.unit)}", self.verdict

    def __str__(self) -> str:
        name, measured, wanted, verdict = self.cells()
        return f"{name}: {measured}, the goal is {wanted}: {verdict}"


HEADS = ("goal", "measured", "wanted", "")


def best_of(rows: Sequence[Row]) -> list[Row]:
    """Our fastest row with malloc tuned, and without."""
    ours = [row for row in rows if row.peer.startswith("ours") and row.status == "measured"]
    found = []
    for is_tuned in (True, False):
        some = [row for row in ours if row.peer.endswith("malloc tuned") == is_tuned]
        found += [min(some, key=lambda row: row.value("step"))] if some else []
    return found


def peers_of(rows: Sequence[Row]) -> list[Row]:
    """The measured rows that are not ours."""
    return [row for row in rows if not row.peer.startswith("ours") and row.status == "measured"]


def cpu_goals(rows: Sequence[Row]) -> list[Goal]:
    """The goals of one case of bench.peers on a CPU."""
    found, peers = [], peers_of(rows)
    for row in best_of(rows) if peers else []:
        leanest = min(peer.value("step memory") for peer in peers)
        memory = row.value("step memory") / leanest if leanest else None
        found += [
            Goal(
                f"{row.peer}, speed against the fastest peer",
                row.value("speed"),
                SPEED.get(row.facts["precision"], 1.0),
            ),
            Goal(f"{row.peer}, of the matmul ceiling", row.value("of ceiling"), CEILING, "%"),
            Goal(f"{row.peer}, step memory against the leanest peer", memory, MEMORY, at_most=True),
        ]
    return found


def gpu_goals(rows: Sequence[Row], gpu: str) -> list[Goal]:
    """The goals of bench.gpu. gpu: its name; a goal meant for one GPU is not measured on others."""
    return [*_step_goals(rows, gpu), *_op_goals(rows)]


def _step_goals(rows: Sequence[Row], gpu: str) -> list[Goal]:
    steps = {row.peer: row for row in rows if row.key[:2] == ("step", HEADLINE) and row.status == "measured"}
    ours, reference = steps.get("ours compiled"), steps.get("reference compiled")
    tokens_per_s = ours.value("tokens") if ours else None
    peers = [row.value("tokens") for row in peers_of([*steps.values()])]
    memory = None
    if ours and reference and ours.facts["batch"] == reference.facts["batch"]:
        memory = reference.value("peak memory") / ours.value("peak memory")
    name = f"{HEADLINE} training step"
    return [
        Goal(f"{name} on an H200", tokens_per_s if "H200" in gpu else None, 600_000, "tokens/s"),
        Goal(f"{name}, tokens/s against the best peer", tokens_per_s / max(peers) if ours and peers else None, 1.3),
        Goal(f"{name}, times less peak memory than the compiled reference", memory, 2.0),
    ]


def _op_goals(rows: Sequence[Row]) -> list[Goal]:
    def value(op: str, peer: str, figure: str) -> float | None:
        row = find(rows, "ops", op, peer)
        return row.value(figure) if row else None

    def speed(op: str, others: Sequence[str], phase: str) -> float | None:
        ours, theirs = value(op, "triton", phase), [value(op, other, phase) for other in others]
        theirs = [seconds for seconds in theirs if seconds is not None]
        return min(theirs) / ours if ours is not None and theirs else None

    sdpa = [row.peer for row in rows if row.key[:2] == ("ops", "attention") and row.peer != "triton"]
    found = [
        Goal("attention, forward + backward, against the best of PyTorch's", speed("attention", sdpa, "both"), 1.0)
    ]
    for op in MEMORY_BOUND:
        for phase, wanted in SHARES.items():
            ratio = value(op, "triton", f"{phase} of ceiling")
            found.append(Goal(f"{op}, {phase}, share of the copy ceiling", ratio, wanted, "%"))
        for phase, words in (("forward", "forward"), ("both", "forward + backward")):
            found.append(Goal(f"{op}, {words}, against torch.compile", speed(op, ["compile"], phase), 1.0))
    head = "linear_cross_entropy"
    found.append(Goal(f"{head}, forward + backward, against torch.compile", speed(head, ["compile"], "both"), 1.0))
    ours, theirs = value(head, "triton", "peak memory"), value(head, "compile", "peak memory")
    memory = theirs / ours if ours and theirs else None
    return [*found, Goal(f"{head}, times less peak memory than torch.compile", memory, 6.0)]
