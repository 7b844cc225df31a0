"""How the processes of a run find each other in torchrun's store, and what is said if they do not."""

import json
import os
import sys
import threading
import time
import uuid

import torch.distributed as dist

from engine.errors import BAD_INPUT


def watch(rank: int, world_size: int, seconds: float, has_joined: threading.Event, is_late: threading.Event) -> None:
    """Ends this process when its main thread is stuck in joining. Time in which it was suspended does not count."""
    waited, now = 0.0, time.monotonic()
    while not has_joined.wait(1.0):
        before, now = now, time.monotonic()
        waited += min(now - before, 2.0)
        if waited > seconds:
            is_late.set()
        if waited > seconds + 5:
            print(unreachable(rank, world_size, TimeoutError("no answer in time")), file=sys.stderr, flush=True)
            os._exit(BAD_INPUT)


def meet(store: dist.Store, rank: int, world_size: int, is_late: threading.Event) -> str:
    """Agrees on a prefix for store keys that only this attempt uses. The same on every rank.

    torchrun keeps one store across its restarts (github.com/pytorch/pytorch/issues/135712), so an
    attempt would find the addresses of dead processes there. Its restart count does not help,
    because each host counts separately. So rank 0 publishes a name. Each other rank answers the
    newest name with a random token, and continues once rank 0 has listed that token. Raises
    TimeoutError naming the missing ranks.
    """
    token = uuid.uuid4().hex
    others = range(1, world_size)
    if rank == 0:
        name = f"meeting_{token}"
        store.set("meeting", name)
    seen: dict[str, str] = {}
    while not is_late.is_set():
        if rank == 0:
            seen |= {str(r): store.get(f"{name}/{r}").decode() for r in others if store.check([f"{name}/{r}"])}
            if len(seen) == len(others):
                store.set(f"{name}/all", json.dumps(seen))
                break
        elif store.check(["meeting"]):
            name = store.get("meeting").decode()
            store.set(f"{name}/{rank}", token)
            if store.check([f"{name}/all"]) and json.loads(store.get(f"{name}/all")).get(str(rank)) == token:
                break
        time.sleep(0.02)
    else:
        missing = f"rank {', '.join(str(r) for r in others if str(r) not in seen)}" if rank == 0 else "rank 0"
        raise TimeoutError(f"no answer from {missing} in time")
    return name


def unreachable(rank: int, world_size: int, error: Exception) -> str:
    """Error message of a rank that could not join the others."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    lines = str(error).strip().splitlines()
    return (
        f"distributed: rank {rank} must reach the other {world_size - 1} processes, meeting at {address}, "
        f"got {lines[0] if lines else error!r}; check that every host runs the same torchrun command, that no firewall "
        "stands between them, and name the interface of their network with GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME "
        "on GPUs)"
    )
