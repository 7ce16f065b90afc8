"""Compares this package with PyTorch, and networks with their plain counterparts, alternating in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.cases import Case
from benchmarks.common import NOT_MEASURED, Measure, Table, in_turns
from benchmarks.session import OURS, Session, spread
from shared_basis.errors import UserError
from shared_basis.runtime.files import first_line

TIMES_AS_FAST = "ratio: its time over shared_basis'"
"""The quantity of rows on the speed of a framework relative to this package's."""
MISSING = "PyTorch is not installed and its columns are empty: pip install -e '.[bench]'"


@dataclasses.dataclass
class Comparison:
    """Seconds of each network in each framework, one value per round, as rows and tables."""

    session: Session
    subject: str
    groups: list[list[Case]]
    """Groups of cases, each starting with the plain network."""
    frameworks: list[str]
    """The PyTorch modes to compare with, starting with the default one."""
    seconds: dict[tuple[str, str], list[float]] = dataclasses.field(default_factory=dict)
    """Seconds by network and framework, for a step or batch of `Case.batch` images."""
    notes: list[str] = dataclasses.field(default_factory=list)

    def measure(self, ours: Callable[[Case], Measure], theirs: Callable[[Any], Measure]) -> None:
        """Measures all networks of a group alternately, in all frameworks, and adds rows.

        Args:
          ours: returns the measurement for this package.
          theirs: returns the measurement for PyTorch, given a `pytorch_trainer.Trainer`.
        """
        pytorch = _pytorch(self.session) if self.frameworks else None
        for group in self.groups:
            subjects: dict[tuple[str, str], Measure] = {}
            for case in group:
                self.session.print_progress(f"{self.subject}: compiling {case.network}")
                subjects[case.network, OURS] = ours(case)
                if pytorch is not None:
                    subjects |= {(case.network, name): measure for name, measure in
                                 self._prepared(pytorch, case, theirs)}
            self.session.print_progress(f"{self.subject}: {self.session.rounds} rounds of {len(subjects)} measurements")
            self.seconds |= in_turns(subjects, self.session.rounds)
            if pytorch is not None:
                pytorch.forget_compiled()
        self._record()

    def _prepared(self, pytorch: Any, case: Case,
                  theirs: Callable[[Any], Measure]) -> Iterator[tuple[str, Measure]]:
        """Yields PyTorch's modes after one trial each; failures become notes."""
        for framework in self.frameworks:
            self.session.print_progress(f"{self.subject}: preparing {case.network}, {framework}")
            try:
                measure = theirs(pytorch.make_trainer(case, framework.removeprefix("pytorch ")))
                measure()
            except UserError as error:
                self.notes.append(f"{error}.")
                return
            except Exception as error:  # compilers may raise anything
                self.notes.append(f"{case.network}, {framework}: {failure(error)}.")
            else:
                yield framework, measure

    def _record(self) -> None:
        for case in self.cases:
            for framework in (OURS, *self.frameworks):
                if seconds := self.seconds.get((case.network, framework)):
                    dtype = dtype_of(framework, case)
                    unit = "step" if self.subject == "step" else "batch"
                    self.session.add(self.subject, case, f"seconds per {unit}", seconds, framework=framework,
                                     dtype=dtype)
                    self.session.add(self.subject, case, "images/s", [case.batch / value for value in seconds],
                                     framework=framework, dtype=dtype)

    @property
    def cases(self) -> list[Case]:
        """All cases, plain ones first."""
        return [case for group in self.groups for case in group]

    def ratio(self, above: tuple[str, str], below: tuple[str, str]) -> list[float]:
        """Returns the ratios of two measurements by round; empty if one is missing."""
        return [a / b for a, b in zip(self.seconds.get(above, ()), self.seconds.get(below, ()), strict=False)]

    def times_as_fast(self) -> Table:
        """Returns a table of speed relative to PyTorch, and adds rows for it."""
        table = [["this package is times as fast as", *self.frameworks]]
        for case in self.cases:
            table.append([f"{case.network}, batch {case.batch}"])
            for framework in self.frameworks:
                values = self.ratio((case.network, framework), (case.network, OURS))
                table[-1].append(self.session.add(self.subject, case, TIMES_AS_FAST, values,
                                                  framework=framework, dtype=dtype_of(framework, case))
                                 if values else NOT_MEASURED)
        return table

    def against_plain(self) -> Table:
        """Returns a table of times relative to the plain network, next to relative MACs, and adds rows for it."""
        frameworks = (OURS, *self.frameworks[:1])
        table = [["over the plain network's", *(f"time, {_shown(name)}" for name in frameworks), "MACs", "parameters"]]
        for group in self.groups:
            for case in group[1:]:
                counts = case.counts()
                table.append([case.network])
                for framework in frameworks:
                    values = self.ratio((case.network, framework), (case.plain, framework))
                    table[-1].append(self.session.add(self.subject, case, "ratio: time over plain", values,
                                                      framework=framework, dtype=dtype_of(framework, case))
                                     if values else NOT_MEASURED)
                table[-1] += [spread([counts[f"{key} over plain"]]) for key in ("macs", "parameters")]
        return table

    def absolute(self, unit: str) -> Table:
        """Returns a table of milliseconds of all measurements and this package's images per second."""
        frameworks = (OURS, *self.frameworks)
        table = [[f"ms per {unit}", *map(_shown, frameworks), "images/s, this package"]]
        for case in self.cases:
            found = [self.seconds.get((case.network, framework)) for framework in frameworks]
            ours = self.seconds[case.network, OURS]
            table.append([f"{case.network}, batch {case.batch}", *(spread(part, 1000) if part else NOT_MEASURED
                                                                   for part in found),
                          spread([case.batch / value for value in ours])])
        return table

    def tables(self, unit: str) -> list[Table]:
        """Returns all non-empty tables, ratios first."""
        tables = [self.times_as_fast(), self.against_plain(), self.absolute(unit)]
        return [table for table in tables if len(table) > 1 and len(table[0]) > 1]


def torch_frameworks(session: Session, dtype: str) -> list[str]:
    """Returns the PyTorch modes to compare with, starting with the default one; those of `session`, if it names any.

    bfloat16 on a CPU without instructions for it is several times slower than float32, and only measured on request.
    """
    if session.platform == "tpu":  # not supported by PyTorch
        return []
    if session.modes:
        return [f"pytorch {mode}" for mode in session.modes]
    modes = ["channels_last", "eager", "compiled"]
    if dtype == "bfloat16":
        modes = ["channels_last bf16", "compiled bf16", "channels_last"]
    elif session.platform != "cpu":
        modes += ["channels_last bf16", "compiled bf16"]
    return [f"pytorch {mode}" for mode in modes]


def dtype_of(framework: str, case: Case) -> str:
    """Returns the compute dtype of a framework."""
    if framework == OURS:
        return case.dtype
    return "bfloat16" if framework.endswith("bf16") else "float32"


def failure(error: Exception) -> str:
    """Returns a one-line description of a failure."""
    return f"does not work: {type(error).__name__}: {first_line(error)[:200]}".rstrip(" .:")


def _shown(framework: str) -> str:
    return "this package" if framework == OURS else framework


def _pytorch(session: Session) -> Any:
    """Returns `benchmarks.pytorch_trainer`; None, with a message, if PyTorch is not installed."""
    try:
        from benchmarks import pytorch_trainer
    except ImportError:
        session.print_progress(MISSING)
        return None
    return pytorch_trainer
