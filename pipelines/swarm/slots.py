"""How many workers of one run each a cluster has room for, and what each is given. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ulm.errors import ClusterError
from ulm.recipes.train import SwarmResources

EPSILON = 1e-6  # thirds and tenths of a GPU do not add up to one in floats
Node = Mapping[str, float]  # what a node has: {"CPU": 8.0, "GPU": 1.0}


@dataclass(frozen=True)
class Shape:
    """What a worker is given: CPUs, and GPUs if it is one with a GPU. Both may be fractions."""

    cpus: float
    gpus: float  # of a worker with a GPU; 0: all are without

    @property
    def threads(self) -> int:
        """Of its sums on a CPU."""
        return max(1, int(self.cpus))


@dataclass(frozen=True)
class Slots:
    """Workers with a GPU, and without."""

    gpu: int
    cpu: int

    @property
    def all(self) -> int:
        """Of both kinds."""
        return self.gpu + self.cpu


def shape(nodes: Sequence[Node], resources: SwarmResources, most: int) -> Shape:
    """What each of up to `most` workers is given: the recipe's, else equal shares of the CPUs, at least one.

    ClusterError where no node has room for a single one.
    """
    gpus = resources.gpus_per_worker
    if gpus is None:
        gpus = float(sum(node.get("GPU", 0.0) for node in nodes) >= 1)
    if resources.cpus_per_worker is not None:
        given = Shape(resources.cpus_per_worker, gpus)
    else:
        given = Shape(1.0, gpus)
        number = slots(nodes, given, resources, most)
        largest = int(max((node.get("CPU", 0.0) for node in nodes), default=0.0))
        wider = (Shape(float(cpus), gpus) for cpus in range(largest, 1, -1))
        given = next((it for it in wider if number.all and slots(nodes, it, resources, most) == number), given)
    if not slots(nodes, given, resources, most).all:
        has = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
        needs = f"resources: a worker needs {given.cpus:g} CPUs and {given.gpus:g} GPUs"
        raise ClusterError(f"{needs}, the cluster has {has['CPU']:g} and {has['GPU']:g}; give a worker less")
    return given


def slots(nodes: Sequence[Node], given: Shape, resources: SwarmResources, most: int) -> Slots:
    """How many workers of this shape there is room for, `most` in all: first those with a GPU, where there are any."""
    gpu = cpu = 0
    for node in nodes:
        cpus = node.get("CPU", 0.0)
        here = _times(cpus, given.cpus)
        if given.gpus:
            here = min(here, _times(node.get("GPU", 0.0), given.gpus), most - gpu)
            gpu += here
            here = _times(cpus - here * given.cpus, given.cpus)
        cpu += here
    limit = most - gpu
    return Slots(gpu, min(cpu, limit, resources.cpu_workers) if given.gpus else min(cpu, limit))


def _times(there: float, one: float) -> int:
    return int(there / one + EPSILON)
