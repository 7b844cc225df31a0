"""A step of a run on many GPUs, rehearsed on this CPU: what one of its ranks holds, sends and reads, against the plan.

See engine.rehearsal. If anything differs from engine.planning, the exit code is 1.
"""

import argparse
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

from bench.tables import amount
from engine.config import TrainConfig, batch_shape, parse
from engine.distributed import Ranks
from engine.errors import BAD_INPUT, DONE, BadInput
from engine.planning import memory
from engine.planning.communication import communication, muon_communication
from engine.rehearsal import Call, one_of, partition, rehearse

FAILED = 1


def folded(calls: list[Call]) -> Iterator[tuple[int, list[Call]]]:
    """The calls in order, as (times, pattern): up to 8 calls that repeat are one pattern."""
    while calls:
        found = []
        for period in range(1, 9):
            times = 1
            while calls[times * period : (times + 1) * period] == calls[:period]:
                times += 1
            found.append((times * period if times > 1 else 0, -period, times))
        _, period, times = max(found)
        yield times, calls[:-period]
        calls = calls[-period * times :]


def planned(config: TrainConfig, ranks: Ranks, precision: str) -> tuple[dict[str, int], dict[tuple, tuple[int, int]]]:
    """engine.planning's bytes of a rank, and (calls, bytes) of a step by purpose, kind and ranks."""
    world_size, place = ranks.world_size, memory.Place(ranks.world_size, device_type="cpu", is_compiled=False)
    (size, micro_batches), shards = batch_shape(config, world_size), place.shards(config)
    of_rank = config, size, precision, place
    held = {part: memory.peaks(*of_rank)["optimizer"][part] for part in ("weights", "gradients", "moments")}
    options = {"micro_batches": micro_batches, "reshard": config.reshard, "shard_size": config.shard_size}
    calls = communication(config.model, world_size, config.parallel, precision, **options)
    calls += muon_communication(config, world_size, shards, ranks.rank % shards)
    sent = {(each.name, each.kind, each.group_size): (each.calls, each.payload_bytes) for each in calls}
    return held | {"peak": memory.step_bytes(*of_rank)}, sent


def totals(calls: list[Call]) -> dict[tuple, tuple[int, int]]:
    """(calls, bytes) by purpose, kind and ranks."""
    found: dict[tuple, tuple[int, int]] = {}
    for *key, size in calls:
        count, before = found.get((*key,), (0, 0))
        found[(*key,)] = count + 1, before + size
    return found


def verdict(claim: str, planned: dict, found: dict, is_right: Callable[[int, int], bool] = operator.eq) -> bool:
    """Prints whether all is as planned, or what is not. is_right: of two values, planned and found."""
    wrong = [
        f"{key}: {found.get(key)}, planned {planned.get(key)}"
        for key in planned | found
        if key not in planned or key not in found or not is_right(planned[key], found[key])
    ]
    print(f"{claim}: {'differs: ' if wrong else 'yes'}{'; '.join(wrong)}")
    return not wrong


def report(config: TrainConfig, ranks: Ranks, precision: str) -> bool:
    """Prints what the rank does, and whether that is the plan."""
    held, calls = rehearse(config, ranks, precision)
    will_hold, will_send = planned(config, ranks, precision)
    windows, is_partition = partition(config, ranks)
    sequences, accumulation = batch_shape(config, ranks.world_size)
    mode = f"{config.parallel}, {precision}, recompute {config.recompute}"
    sizes = f"{sequences} x {config.sequence_length}"
    print(f"rank {ranks.rank} of {ranks.world_size:,}, {mode}: an update of {config.tokens_per_step:,} tokens,")
    print(f"micro-batches of {sizes}, {accumulation} on each rank")
    print(f"\n{'holds':<11}{'rehearsed':>12}{'planned':>12}")
    for part in will_hold:
        print(f"  {part:<9}{amount(held[part], 'B'):>12}{amount(will_hold[part], 'B'):>12}")
    print("\nsends, in order")
    for times, pattern in folded(calls):
        for index, (purpose, kind, count, size) in enumerate(pattern):
            often = "" if index else f"{times:,} x"
            print(f"{often:>8} {kind:<14}{amount(size, 'B'):>9}{count:>7,} ranks  {purpose}")
    print(f"\nreads, of {sum(map(len, windows[0])) * ranks.world_size:,} windows")
    for rank in sorted({0, ranks.rank, ranks.world_size - 1}):
        more = " ..." if sequences * accumulation > 6 else ""
        print(f"  rank {rank}: {' '.join(map(str, windows[rank][0][:6]))}{more}")
    # A tensor is cut into equal parts along its first axis, of which the last ones may be short or empty.
    is_first_shard = ranks.rank % memory.Place(ranks.world_size).shards(config) == 0
    same, is_same = ("equal to", operator.eq) if is_first_shard else ("at most", operator.ge)
    peaks = [{"peak": each.pop("peak")} for each in (will_hold, held)]
    return all(
        [
            verdict(f"\nweights, gradients and moments {same} the plan", will_hold, held, is_same),
            verdict("peak within 10% of the plan", *peaks, lambda planned, found: abs(found / planned - 1) <= 0.1),
            verdict("collectives equal to the plan", will_send, totals(calls)),
            verdict("batches of all ranks are the step's windows, each once", {"": True}, {"": is_partition}),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """0 if all is as planned, 1 if not, 2 for bad input."""
    epilog = "PRESET and all other flags are those of gpt2 train, such as --parallel fsdp --recompute block"
    parser = argparse.ArgumentParser(
        prog="python -m bench.rehearse PRESET", description=__doc__, epilog=epilog, allow_abbrev=False
    )
    parser.add_argument("--world", type=int, default=8, help="ranks")
    parser.add_argument("--rank", type=int, default=0, help="the one that is rehearsed")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="ranks that share a replica of hsdp")
    args, rest = parser.parse_known_args(arguments)
    try:
        config = replace(parse(rest, "bench.rehearse"), kernels="torch", compile=False)
        if not 0 <= args.rank < args.world or args.gpus_per_node < 1:
            raise BadInput(f"bench.rehearse: --rank must be 0 to --world - 1, got {args.rank} and {args.world}")
        if config.parallel == "hsdp" and config.shard_size is None:
            config = replace(config, shard_size=min(args.gpus_per_node, args.world))
        if config.head != "full":
            raise BadInput("bench.rehearse: --head must be full, got sampled; leave it out")
        batch_shape(config, args.world)
        with one_of(args.world, args.rank, args.gpus_per_node) as ranks:
            precision = "bf16" if config.precision == "auto" else config.precision
            return DONE if report(config, ranks, precision) else FAILED
    except BadInput as error:
        print(error, file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
