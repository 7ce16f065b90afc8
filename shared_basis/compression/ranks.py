"""Chooses ranks: the energy of a trained network that they capture, and the best network within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from shared_basis.compression.layers import PlainLayers
from shared_basis.config import ModelConfig
from shared_basis.data import Spec
from shared_basis.errors import UserError
from shared_basis.models import create_model, family_of
from shared_basis.models.summary import count_network
from shared_basis.runtime.reporter import Reporter

SHARINGS = {"single": "", "double": "-double"}
"""The kinds of sharing within a group, and the corresponding suffixes of network names."""

MEASURES = ("parameters", "macs")


class Candidates:
    """The networks `<base>-s<S>u<U>[-double]` to which a plain network can be compressed."""

    def __init__(self, plain: PlainLayers, model: ModelConfig, spec: Spec) -> None:
        """Sets the layers of the plain network `model`, and the images and classes for which costs are counted."""
        self._spec, self._model = spec, model
        forms = family_of(self._model.name).forms
        self.sharings = [sharing for sharing, ending in SHARINGS.items() if f"s<S>u<U>{ending}" in forms]
        networks = {sharing: create_model(self.name(sharing, 1, 1), stem=self._model.stem)
                    for sharing in self.sharings}
        shapes = [(group, shape) for group, named in networks["single"].shared_shapes().items()
                  for shape in named.values()]
        self.growth = {group: shape[-1] for group, shape in shapes}
        """The factor from the rank in the name to the rank of each group: 1, 2, 4, …."""
        self.space = min(math.prod(shape[:3]) // shape[3] for _, shape in shapes)
        """The largest S + U."""
        self._groups = {sharing: {group: plain.group(network, group) for group in self.growth}
                        for sharing, network in networks.items()}
        self._remaining: dict[tuple[str, str, int], np.ndarray] = {}
        self._costs: dict[str, list[Mapping[str, int]]] = {}

    def name(self, sharing: str, shared: int, unique: int) -> str:
        """Returns the name of a network; with S = 0 it is the same for all kinds of sharing."""
        return f"{self._model.name}-s{shared}u{unique}{SHARINGS[sharing] if shared else ''}"

    def captured(self, sharing: str, group: str, shared: int, unique: int) -> float:
        """Returns the fraction of energy that a network captures, averaged over the layers of `group`."""
        growth, key = self.growth[group], (sharing, group, shared)
        if key not in self._remaining:
            self._remaining[key] = self._groups[sharing][group].remaining(shared * growth)
        remaining = self._remaining[key]
        return 1 - float(remaining[min(unique * growth, len(remaining) - 1)])

    def mean_captured(self, sharing: str, shared: int, unique: int) -> float:
        """Returns the fraction of captured energy, averaged over all layers."""
        return float(np.average([self.captured(sharing, group, shared, unique) for group in self.growth],
                                weights=[len(group.layers) for group in self._groups[sharing].values()]))

    def cost(self, sharing: str, measure: str, shared: int, unique: int) -> int:
        """Returns the 'parameters' or 'macs' of a network.

        Costs are linear in the ranks, so the counts of three networks determine all others.
        """
        if sharing not in self._costs:
            self._costs[sharing] = [self._count(self.name(sharing, *ranks)) for ranks in ((1, 1), (2, 1), (1, 2))]
        base, more_shared, more_unique = (counts[measure] for counts in self._costs[sharing])
        return base + (shared - 1) * (more_shared - base) + (unique - 1) * (more_unique - base)

    def _count(self, name: str) -> Mapping[str, int]:
        return count_network(ModelConfig(name, self._model.stem), len(self._spec.classes), self._spec.image_shape)

    def plain_cost(self, measure: str) -> int:
        """Returns the 'parameters' or 'macs' of the plain network."""
        return self._count(self._model.name)[measure]

    def largest(self, measure: str, limit: float) -> Iterator[tuple[str, int, int]]:
        """Yields (sharing, S, U) for each sharing and U = 0, 1, 2, 4, …, with the largest S within `limit`."""
        for sharing in self.sharings:
            each = self.cost(sharing, measure, 1, 0) - self.cost(sharing, measure, 0, 0)
            unique = 0
            while unique <= self.space and self.cost(sharing, measure, 0, unique) <= limit:
                shared = int((limit - self.cost(sharing, measure, 0, unique)) // each)
                shared = min(shared, self.space - unique)
                if shared or unique:
                    yield sharing, shared, unique
                unique = 2 * unique or 1


def choose(candidates: Candidates, budget: float, measure: str, log: Callable[[str], None]) -> str:
    """Returns the name of the network within the budget that captures the most energy of the plain network.

    Args:
      budget: the fraction of the plain network's `measure` ('parameters' or 'macs') that it may cost.
      log: called with a line about each candidate.

    Raises:
      UserError: no network is within the budget.
    """
    limit = budget * candidates.plain_cost(measure)
    found = {}
    for sharing, shared, unique in candidates.largest(measure, limit):
        name = candidates.name(sharing, shared, unique)
        found[name] = candidates.mean_captured(sharing, shared, unique)
        log(f"{name}: {candidates.cost(sharing, measure, shared, unique):,} {measure}, {100 * found[name]:.2f} % of "
            "the energy")
    if not found:
        least = min(candidates.cost("single", measure, *ranks) for ranks in ((1, 0), (0, 1)))
        share = math.ceil(1000 * least / candidates.plain_cost(measure)) / 1000  # rounded up, so that it is enough
        raise UserError(f"--budget={budget:g} of {measure}: the smallest network has {share:.3f} of the plain "
                        "network's; layers that are not factorised count too.")
    return max(found, key=lambda name: found[name])


def check_budget(budget: float, measure: str) -> None:
    """Raises `UserError` unless `budget` is in (0, 1] and `measure` one of `MEASURES`."""
    if not 0 < budget <= 1:
        raise UserError(f"--budget={budget:g}: must be a fraction of the plain network, above 0 and at most 1.")
    if measure not in MEASURES:
        raise UserError(f"--budget_of={measure}: must be one of {', '.join(MEASURES)}.")


def shown_ranks(candidates: Candidates) -> list[int]:
    """Returns S = 1, 2, 3, 4, 6, 8, 12, … as long as the network has fewer parameters than the plain one."""
    limit = candidates.plain_cost("parameters")
    powers = [2**power for power in range(candidates.space.bit_length())]
    return [rank for rank in sorted({*powers, *(power * 3 // 2 for power in powers)}) if rank <= candidates.space
            and candidates.cost("single", "parameters", rank, 0) < limit]


def spectrum(candidates: Candidates, uniques: tuple[int, ...], reporter: Reporter) -> list[dict[str, Any]]:
    """Returns the energy that networks capture, one row per network and group, and for all layers.

    Columns: `sharing`; `group` ('all' for the mean of all layers); `S` and `U` of the network's name; the number of
    `shared_elements` of each basis and of `unique_elements` of each layer in the group; `captured` in [0, 1]; and,
    for all groups together, `parameters` and `macs` relative to the plain network.
    """
    rows: list[dict[str, Any]] = []
    ranks = shown_ranks(candidates)
    show = reporter.progress("computing spectra")
    plain = {measure: candidates.plain_cost(measure) for measure in MEASURES}
    for done, (sharing, shared) in enumerate(
            [(sharing, shared) for sharing in candidates.sharings for shared in ranks], start=1):
        for unique in uniques:
            if shared + unique > candidates.space:
                continue
            for group, growth in candidates.growth.items():
                rows.append({"sharing": sharing, "group": group, "S": shared, "U": unique,
                             "shared_elements": shared * growth, "unique_elements": unique * growth,
                             "captured": candidates.captured(sharing, group, shared, unique)})
            rows.append({"sharing": sharing, "group": "all", "S": shared, "U": unique,
                         "captured": candidates.mean_captured(sharing, shared, unique),
                         **{measure: candidates.cost(sharing, measure, shared, unique) / plain[measure]
                            for measure in MEASURES}})
        show(done, len(candidates.sharings) * len(ranks))
    return rows
