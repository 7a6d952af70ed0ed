"""Which machines take part in a run, as the environment tells: none, our variables, or SLURM."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Nodes", "find_nodes"]

_PORT = 29500  # torchrun's own


@dataclass(frozen=True)
class Nodes:
    """The machines of a run.

    Attributes:
        count: how many.
        rank: which of them this is.
        address: where the first one is reached; empty for a single machine.
        port: free on the first one.
    """

    count: int = 1
    rank: int = 0
    address: str = ""
    port: int = _PORT

    def options(self) -> list[str]:
        """What torchrun's launcher is told."""
        if self.count == 1:
            return ["--standalone"]
        return [
            f"--nnodes={self.count}",
            f"--node-rank={self.rank}",
            f"--master-addr={self.address}",
            f"--master-port={self.port}",
        ]


def find_nodes(environment: Mapping[str, str]) -> Nodes:
    """Read NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT; within srun, SLURM's own variables.

    What is set by hand counts more than what SLURM says.

    Raises:
        ValueError: variables that are missing, no numbers, or contradict.
    """
    slurm = _slurm(environment) if "SLURM_STEP_NUM_NODES" in environment else {}
    found = {**slurm, **{key: environment[key] for key in _KEYS if environment.get(key)}}
    count = _number(found, "NNODES", 1)
    if count == 1:
        return Nodes()
    for key in ("NODE_RANK", "MASTER_ADDR"):
        if key not in found:
            raise ValueError(
                f"NNODES={count}, but {key} is not set: give the number of this machine (from 0) "
                "as NODE_RANK and the first one's address as MASTER_ADDR"
            )
    rank = _number(found, "NODE_RANK", 0)
    if not 0 <= rank < count:
        raise ValueError(f"NODE_RANK={rank}: with NNODES={count} it must be 0 to {count - 1}")
    return Nodes(count, rank, found["MASTER_ADDR"], _number(found, "MASTER_PORT", _PORT))


_KEYS = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


def _slurm(environment: Mapping[str, str]) -> dict[str, str]:
    nodes, tasks = (environment.get(f"SLURM_STEP_NUM_{what}", "1") for what in ("NODES", "TASKS"))
    if nodes != tasks:
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS={tasks} on SLURM_STEP_NUM_NODES={nodes}: start one task a node "
            "(srun --ntasks-per-node=1); it starts a rank for each GPU"
        )
    found = {"NNODES": nodes, "NODE_RANK": environment.get("SLURM_NODEID", "0")}
    if nodes != "1":
        found["MASTER_ADDR"] = environment.get("MASTER_ADDR") or _first_host(
            environment["SLURM_STEP_NODELIST"]
        )
    job = environment.get("SLURM_JOB_ID", "0")  # jobs that share a machine need their own ports
    return {**found, "MASTER_PORT": str(20_000 + int(job) % 20_000)}


def _first_host(nodes: str) -> str:
    """Expand SLURM's ``node[01-04]`` with SLURM's own command."""
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def _number(found: Mapping[str, str], key: str, default: int) -> int:
    try:
        return int(found.get(key, default))
    except ValueError:
        raise ValueError(f"{key}={found[key]}: expected a number") from None
