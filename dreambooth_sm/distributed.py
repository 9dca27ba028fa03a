"""Several processes that train together: one a GPU, on one instance or several.

Each process holds the whole model and draws its share of the global batch; gradients are averaged. SageMaker's
``resourceconfig.json`` names the hosts, the first of which is the meeting point.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dreambooth_sm.sagemaker import Contract

# Where processes of several hosts meet; a single host takes any free port.
PORT = 29500
# How long the other processes may take to end by themselves once one has ended badly.
_GRACE_S = 30.0


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        rank: its number, from 0; rank 0 logs, saves and uploads.
        size: how many there are.
        local_rank: its number on this host, which is the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, mine: Any) -> list[Any]:
        """Collects what each process gives, in the order of ranks, on every process."""
        if self.size == 1:
            return [mine]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def first(self, value: Any) -> Any:
        """Rank 0's value, on every process."""
        return self.gather(value)[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return any(self.gather(flag))


def count_processes(wish: int | str, *, on_cpu: bool) -> int:
    """Processes of this host: one a GPU unless ``wish`` says otherwise; one on the CPU."""
    if isinstance(wish, int):
        return wish
    if on_cpu:
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def is_worker() -> bool:
    """Whether :func:`run_workers` started this process."""
    return "DREAMBOOTH_SM_WORKER" in os.environ


def run_workers(command: Sequence[str], contract: Contract, processes: int) -> int:
    """Runs ``command`` in several processes of this host and waits for all of them.

    Where one ends badly the others are stopped, and its exit code is the result. Stop signals are passed on.
    """
    hosts = contract.hosts
    address = hosts[0] if len(hosts) > 1 else "127.0.0.1"
    port = PORT if len(hosts) > 1 else _free_port()
    first = sorted(hosts).index(contract.current_host) * processes
    workers = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                **_network_settings(contract),
                "DREAMBOOTH_SM_WORKER": "1",
                # NCCL would register the buffers of a captured step, and hang on memory of expandable segments.
                "NCCL_GRAPH_REGISTER": "0",
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
                "RANK": str(first + number),
                "LOCAL_RANK": str(number),
                "WORLD_SIZE": str(processes * len(hosts)),
            },
        )
        for number in range(processes)
    ]

    def pass_on(number: int, _: object) -> None:
        for worker in workers:
            worker.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    failed = 0
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers):
        codes = [worker.poll() for worker in workers]
        failed = failed or next((code for code in codes if code), 0)
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + _GRACE_S
        if time.monotonic() > deadline:
            for worker in workers:
                worker.kill()
        time.sleep(0.2)
    codes = [worker.returncode for worker in workers]
    code = failed or next((code for code in codes if code), 0)
    return code if code >= 0 else 128 - code


def join(patience: timedelta = timedelta(minutes=30)) -> World:
    """Meets the other processes; a world of one where :func:`run_workers` did not start this process.

    Args:
        patience: how long processes wait for each other: loading a base model, or drawing class images, may take one
            of them longer than the others.
    """
    if not is_worker():
        return World()
    import torch
    import torch.distributed as dist

    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() > world.local_rank
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=patience)
    return world


@contextmanager
def joined(patience: timedelta = timedelta(minutes=30)) -> Iterator[World]:
    """Inside, this process is one of those that :func:`join` met."""
    world = join(patience)
    try:
        yield world
    finally:
        leave()


def leave() -> None:
    """Ends what :func:`join` began."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _network_settings(contract: Contract) -> Mapping[str, str]:
    """The interface between the hosts; a single host needs none."""
    if len(contract.hosts) == 1 or not contract.network_interface:
        return {}
    name = contract.network_interface
    return {"NCCL_SOCKET_IFNAME": name, "GLOO_SOCKET_IFNAME": name}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
