"""A plan as text of at most 80 columns. Every line says whether it is counted, estimated, measured or assumed."""

import textwrap

from engine.planning.memory import MARGIN, MICRO_BATCHES, PARTS
from engine.planning.plan import NETWORK

WIDTH = 80
HEADS = ("weights", "grads", "moments", "activ.", "head", "buffers")


def text(plan: dict) -> str:
    """The whole plan."""
    blocks = [sizes(plan), memory(plan), time(plan), communication(plan), disk(plan), tokens(plan)]
    if "budget" in plan:
        blocks.append(budget(plan))
    return "\n\n".join("\n".join(map(wrapped, block)) for block in blocks)


def wrapped(line: str) -> str:
    """A line broken at 80 columns."""
    indent = " " * max(4, len(line) - len(line.lstrip()))
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def short(value: float) -> str:
    """A number with a prefix: 124.4M, 10.0B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:,.1f}{letter}"
    return f"{value:,.0f}"


def gigabytes(value: float) -> str:
    """Bytes in GB, without the unit."""
    return f"{value / 1e9:,.1f}"


def duration(seconds: float) -> str:
    """Milliseconds, seconds, hours or days."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 3600:,.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:,.1f} days"


def sizes(plan: dict) -> list[str]:
    """What is planned."""
    gpu, flops = plan["gpu"], plan["flops"]
    return [
        f"{plan['preset']} on {plan['gpus']:,} {gpu['name']}, {plan['precision']}, {plan['parallel']}, recompute "
        f"{plan['recompute']}, {plan['optimizer']}",
        f"parameters   {plan['parameters']:,} (counted)",
        f"tokens       {plan['tokens']:,} in {plan['run']['steps']:,} steps of {plan['step']['tokens']:,} (asked for)",
        f"FLOPs        {flops['per_token']:.4g} per token, {flops['all']:.4g} in all (counted)",
    ]


def memory(plan: dict) -> list[str]:
    """The table of parts."""
    lines = [
        "memory per GPU in GB at a step's peak, in micro-batches of B sequences: the largest of "
        f"{', '.join(map(str, MICRO_BATCHES[:2]))}, ..., 1 that fits into {gigabytes(plan['gpu']['memory_bytes'])} GB "
        f"less {MARGIN:.0%}, or the largest below that divides a GPU's share of a step (estimate)",
        f"  {'':<4} {'recompute':<9} {'B':>3} " + " ".join(f"{head:>7}" for head in HEADS) + f" {'all':>7}",
    ]
    for row in plan["memory"]:
        parts = [row[name] for name in PARTS]
        size = str(row["micro_batch_size"]) if row["fits"] else "-"
        is_chosen = (row["parallel"], row["recompute"]) == (plan["parallel"], plan["recompute"])
        lines.append(
            f"{'>' if is_chosen else ' '} {row['parallel']:<4} {row['recompute']:<9} {size:>3} "
            + " ".join(f"{gigabytes(part):>7}" for part in parts)
            + f" {gigabytes(sum(parts)):>7}"
        )
    if not all(row["fits"] for row in plan["memory"]):
        lines.append("  -: not even one sequence fits; its parts are those of one")
    if any(row["gradients"] == 0 for row in plan["memory"]):
        lines.append("  grads 0.0: with one micro-batch per step there are none yet at the peak")
    return lines


def time(plan: dict) -> list[str]:
    """A step and the run."""
    step, run, efficiency = plan["step"], plan["run"], plan["efficiency"]
    by = f"{efficiency['mfu']:.1%} of the peak ({efficiency['kind']}: {efficiency['source']})"
    by = f"the bound, which is above the time at {by}" if step["by"] == "bound" else by
    lines = [
        f"step         {step['micro_batches']} x {step['micro_batch_size']} sequences per GPU, micro-batches x "
        "their size (chosen)"
    ]
    if step["tokens"] != plan["preset_tokens_per_step"]:
        lines.append(
            f"  needs      --tokens-per-step {step['tokens']}, as the preset's {plan['preset_tokens_per_step']} do not "
            f"divide among {plan['gpus']:,} GPUs (counted)"
        )
    if not step["fits"]:
        lines.append("  does not fit into memory, see above: what follows is as if it did (estimate)")
    lines += [
        f"  at least   {duration(step['bound_s'])} (roofline bound from the data sheet, without communication)",
        f"  expected   {duration(step['seconds'])}, {run['tokens_per_s']:,.0f} tokens/s (estimate)",
        f"  by         {by}",
        *muon(step),
        f"run          {duration(3600 * run['hours'])} (estimate), at least {duration(3600 * plan['bound_hours'])}"
        " (bound): the training steps alone",
        f"energy       {run['kwh']:,.1f} kWh of them (assumption: {plan['gpu']['watts']:.0f} W per GPU, its design "
        "power)",
    ]
    if run["cost"] is not None:
        lines.append(f"cost         {run['cost']:,.2f} of them (estimate: hours x GPUs x the price that was given)")
    return lines


def muon(step: dict) -> list[str]:
    """Muon's part of a step."""
    if not step["muon_flops"]:
        return []
    return [
        f"  Muon       {duration(step['muon_s'])} of it, {step['muon_s'] / step['seconds']:.2%}, for "
        f"{step['muon_flops']:.4g} FLOPs of matrix products (estimate: at the same share of the peak)"
    ]


def communication(plan: dict) -> list[str]:
    """The table of world sizes."""
    links, rows = plan["gpu"]["links"], plan["communication"]
    name = max(links, key=links.get)
    cells = [("  GPUs", "B x micro", "tokens", "GB sent", "sending", "hidden", "step", "tokens/s")]
    for row in rows:
        rate = row["tokens"] / row["seconds"]
        hidden = f"{row['hidden_s'] / row['communication_s']:.0%}" if row["communication_s"] else "-"
        cells.append(
            (
                f"{'>' if row['world_size'] == plan['gpus'] else ' '} {row['world_size']:,}",
                f"{row['micro_batch_size']} x {row['micro_batches']}",
                short(row["tokens"]),
                f"{row['sent_bytes'] / 1e9:,.{2 if row['sent_bytes'] < 1e12 else 0}f}",
                duration(row["communication_s"]),
                *((hidden, duration(row["seconds"]), short(rate)) if row["fits"] else ("-", "-", "-")),
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "communication per step and GPU (bytes counted, times estimated; assumption: "
        f"{name} {links[name] / 1e9:.0f} GB/s in a host, InfiniBand {NETWORK / 1e9:.0f} GB/s per GPU between hosts)",
        *(_aligned(row, widths) for row in cells),
    ]
    if not all(row["fits"] for row in rows):
        lines.append("  step -: not even one sequence fits into memory (estimate)")
    if any(row["tokens"] != plan["preset_tokens_per_step"] for row in rows):
        lines.append("  tokens change where the preset's do not divide among the GPUs")
    lines.append("  hidden: behind computation; all but the embeddings' share and what Muon sends can be (assumption)")
    return lines


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    """A row of the table, the mark of the first cell at its left."""
    first = f"{cells[0][:2]}{cells[0][2:]:>{widths[0] - 2}}"
    return " ".join([first, *(f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))])


def disk(plan: dict) -> list[str]:
    """Data and checkpoints."""
    sizes = plan["disk"]
    return [
        f"disk         {gigabytes(sizes['data'])} GB of data (counted: 2 bytes per token)",
        f"             {gigabytes(sizes['checkpoint'])} GB per checkpoint, at most {gigabytes(sizes['checkpoints'])} "
        "GB for those of a run (counted)",
    ]


def tokens(plan: dict) -> list[str]:
    """How many tokens others would train on."""
    optimal = plan["compute_optimal_tokens"]
    return [
        f"tokens       {short(plan['tokens'])} asked for; {short(optimal)} are compute-optimal, 20 per parameter",
        "             (published: Hoffmann et al. 2022, arXiv:2203.15556);",
        f"             {short(plan['gpt3_tokens'])} is GPT-3's (published: Brown et al. 2020, table 2.1)",
    ]


def budget(plan: dict) -> list[str]:
    """What the budget buys."""
    bought, way = plan["budget"], f"{plan['parallel']}, recompute {plan['recompute']}"
    lines = [
        f"budget       {bought['hours']:,.1f} h buy {short(bought['tokens'])} tokens of {plan['preset']} (estimate)"
    ]
    if (best := bought["compute_optimal"]) is None:
        lines.append(f"             no preset's compute-optimal run fits into it with {way} (estimate)")
    else:
        lines += [
            f"             best for it: {best['preset']}, {short(best['tokens'])} tokens in {best['hours']:,.1f} h,",
            f"             the largest whose compute-optimal run fits with {way} (estimate)",
        ]
    if bought["too_large"]:
        lines.append(
            f"             left out, as they do not fit into memory with {way}: {', '.join(bought['too_large'])} "
            "(estimate)"
        )
    return lines
