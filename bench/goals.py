"""The goals, held against rows of bench.peers and bench.gpu. Free of PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench import tables
from bench.results import Row, find

HEADLINE = "gpt2 B=64 bf16"  # the case of bench.gpu whose speed and memory are goals
SPEED = {"fp32": 1.0, "bf16": 1.2}  # times the speed of the fastest peer, on a CPU
CEILING, MEMORY = 0.85, 0.5  # of the rate of a matrix product; of the leanest peer's step memory
MEMORY_BOUND = ("layer_norm", "add_layer_norm", "gelu", "bias_gelu")
SHARES = {"forward": 0.9, "backward": 0.8}  # of the copy ceiling, for those
OURS = ("triton", "torch", "plain")  # implementations that ours on Triton is not held against
HEADS = ("goal", "measured", "wanted", "")


@dataclass(frozen=True)
class Goal:
    """A value that must be at least, or at most, the wanted one. measured: None where a figure is missing."""

    name: str
    measured: float | None
    wanted: float
    unit: str = "x"
    at_most: bool = False

    def cells(self) -> tuple[str, str, str, str]:
        """The goal as a table row; last whether it is met."""
        wanted = f"at {'most' if self.at_most else 'least'} {tables.amount(self.wanted, self.unit)}"
        if self.measured is None:
            return self.name, "-", wanted, "not measured"
        is_met = self.measured <= self.wanted if self.at_most else self.measured >= self.wanted
        return self.name, tables.amount(self.measured, self.unit), wanted, "met" if is_met else "not met"

    def __str__(self) -> str:
        return "{}: {}, the goal is {}: {}".format(*self.cells())


def best_of(rows: Sequence[Row]) -> list[Row]:
    """Our fastest row with malloc tuned, and without."""
    ours = [row for row in rows if row.peer.startswith("ours") and row.status == "measured"]
    both = ([row for row in ours if row.peer.endswith("malloc tuned") == is_tuned] for is_tuned in (True, False))
    return [min(some, key=lambda row: row.value("step")) for some in both if some]


def peers_of(rows: Sequence[Row]) -> list[Row]:
    """The measured rows that are not ours."""
    return [row for row in rows if not row.peer.startswith("ours") and row.status == "measured"]


def cpu_goals(rows: Sequence[Row]) -> list[Goal]:
    """The goals of one case of bench.peers on a CPU."""
    found, peers = [], peers_of(rows)
    for row in best_of(rows) if peers else []:
        leanest = min(peer.value("step memory") for peer in peers)
        memory, speed = row.value("step memory") / leanest if leanest else None, SPEED.get(row.facts["precision"], 1.0)
        found.append(Goal(f"{row.peer}, speed against the fastest peer", row.value("speed"), speed))
        found.append(Goal(f"{row.peer}, of the matmul ceiling", row.value("of ceiling"), CEILING, "%"))
        found.append(Goal(f"{row.peer}, step memory against the leanest peer", memory, MEMORY, at_most=True))
    return found


def gpu_goals(rows: Sequence[Row], gpu: str) -> list[Goal]:
    """The goals of bench.gpu. gpu: its name; a goal meant for one GPU is not measured on others."""

    def value(section: str, case: str, peer: str, figure: str) -> float | None:
        row = find(rows, section, case, peer)
        return row.value(figure) if row is not None and row.status == "measured" else None

    def ratio(theirs: float | None, ours: float | None) -> float | None:
        return theirs / ours if theirs and ours else None

    is_hopper = any(name in gpu for name in ("H100", "H200")) and not any(
        less in gpu for less in ("PCIe", "NVL", "MIG")
    )
    ours = value("step", HEADLINE, "ours compiled", "tokens")
    step = find(rows, "step", HEADLINE, "ours compiled"), find(rows, "step", HEADLINE, "reference compiled")
    is_alike = all(step) and step[0].facts.get("batch") == step[1].facts.get("batch")
    memory = [
        value("step", HEADLINE, f"{who} compiled", "peak memory") if is_alike else None for who in ("reference", "ours")
    ]
    fastest = max((r.value("tokens") for r in peers_of(rows) if r.key[:2] == ("step", HEADLINE)), default=None)
    found = [
        Goal(f"{HEADLINE} step on an H100 or H200", ours if is_hopper else None, 600_000, "tokens/s"),
        Goal(f"{HEADLINE} step, tokens/s against the best peer", ratio(ours, fastest), 1.3),
        Goal(f"{HEADLINE} step, times less peak memory than the compiled reference", ratio(*memory), 2.0),
    ]
    for op in ("attention", *MEMORY_BOUND, "linear_cross_entropy"):
        theirs = [r.value("both") for r in rows if r.key[:2] == ("ops", op) and r.peer not in OURS and r.value("both")]
        speed = ratio(min(theirs, default=None), value("ops", op, "triton", "both"))
        found.append(Goal(f"{op}, forward + backward, against PyTorch's best", speed, 1.0))
        for phase, wanted in SHARES.items() if op in MEMORY_BOUND else ():
            share = value("ops", op, "triton", f"{phase} of ceiling")
            found.append(Goal(f"{op}, {phase}, share of the copy ceiling", share, wanted, "%"))
    head = [value("ops", "linear_cross_entropy", peer, "peak memory") for peer in ("compile", "triton")]
    return [*found, Goal("linear_cross_entropy, times less peak memory than torch.compile", ratio(*head), 6.0)]
