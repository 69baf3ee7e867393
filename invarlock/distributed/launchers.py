"""Environment of processes that torchrun, Slurm or MPI start."""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass

PORTS = range(29500, 32500)
"""Rendezvous ports: 29500 is the default of torch, and ephemeral ports of Linux start at 32768."""


@dataclass(frozen=True)
class Launcher:
    """Environment variables in which a launcher passes rank and number of processes."""

    rank: str
    size: str
    run: tuple[str, ...] = ()
    """Variables that number the run, so that several runs on one machine use different ports."""
    nodes: str = ""
    """Variable that lists the machines, that of rank 0 first."""


LAUNCHERS = (
    Launcher("RANK", "WORLD_SIZE"),  # torchrun
    Launcher(
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", run=("OMPI_MCA_ess_base_jobid",), nodes="SLURM_JOB_NODELIST"
    ),
    Launcher("PMI_RANK", "PMI_SIZE", nodes="SLURM_JOB_NODELIST"),  # MPICH and its kin
    # srun; sbatch alone sets no number of tasks of a step. Last, for MPI starts its daemons with srun, too.
    Launcher(
        "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", run=("SLURM_JOB_ID", "SLURM_STEP_ID"), nodes="SLURM_STEP_NODELIST"
    ),
)
LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


def local_rank() -> int:
    """Rank of this process among those of the run on this machine."""
    return int(next((os.environ[name] for name in LOCAL_RANKS if name in os.environ), "0"))


def started_by() -> Launcher | None:
    """The launcher that started this process, or None where it runs by itself."""
    return next((known for known in LAUNCHERS if {known.rank, known.size} <= os.environ.keys()), None)


def rendezvous_address(launcher: Launcher) -> tuple[str, int]:
    """Rendezvous host and port, unless ``MASTER_ADDR`` and ``MASTER_PORT`` set them."""
    # The first of n[01-04,07],m3 is n01.
    first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", os.environ.get(launcher.nodes) or "localhost").split(",")[0]
    number = ".".join(os.environ[name] for name in launcher.run if name in os.environ)
    return first, PORTS[zlib.crc32(number.encode()) % len(PORTS)]
