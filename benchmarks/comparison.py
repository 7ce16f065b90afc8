"""This package beside PyTorch, and networks beside their plain counterparts, measured in turns within one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.cases import Case
from benchmarks.common import NOT_MEASURED, Measure, Table, in_turns
from benchmarks.session import OURS, Session, spread
from shared_basis.errors import UserError
from shared_basis.runtime.files import first_line

MISSING = "PyTorch is not installed and its columns are empty: pip install -e '.[bench]'"


@dataclasses.dataclass
class Comparison:
    """Seconds of each network in each framework, one value for each round, as rows and tables."""

    session: Session
    subject: str
    groups: list[list[Case]]
    """Each begins with the plain network."""
    frameworks: list[str]
    """Those beside this package; the usual one to compare with first."""
    seconds: dict[tuple[str, str], list[float]] = dataclasses.field(default_factory=dict)
    """By network and framework; of a step, or a batch, of `Case.batch` images."""
    notes: list[str] = dataclasses.field(default_factory=list)

    def measure(self, ours: Callable[[Case], Measure], theirs: Callable[[Any], Measure]) -> None:
        """Measures all networks of a group in turns, in all frameworks, and adds rows.

        Args:
          ours: makes what is measured of this package.
          theirs: makes what is measured of PyTorch, from a `pytorch_trainer.Trainer`.
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
        """Yields PyTorch's ways to do it, each tried once; what does not work becomes a note."""
        for framework in self.frameworks:
            self.session.print_progress(f"{self.subject}: preparing {case.network}, {framework}")
            try:
                measure = theirs(pytorch.make_trainer(case, framework.removeprefix("pytorch ")))
                measure()
            except UserError as error:
                self.notes.append(f"{error}.")
                return
            except Exception as error:  # a compiler may fail in any way
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
        """All of them, plain ones first."""
        return [case for group in self.groups for case in group]

    def ratio(self, above: tuple[str, str], below: tuple[str, str]) -> list[float]:
        """Returns the quotients of two measurements, round by round; empty where one is missing."""
        return [a / b for a, b in zip(self.seconds.get(above, ()), self.seconds.get(below, ()), strict=False)]

    def times_as_fast(self) -> Table:
        """Returns how many times as fast as PyTorch this package is, and adds rows of it."""
        table = [["this package is times as fast as", *self.frameworks]]
        for case in self.cases:
            table.append([f"{case.network}, batch {case.batch}"])
            for framework in self.frameworks:
                values = self.ratio((case.network, framework), (case.network, OURS))
                table[-1].append(self.session.add(self.subject, case, "ratio: its time over shared_basis'", values,
                                                  framework=framework, dtype=dtype_of(framework, case))
                                 if values else NOT_MEASURED)
        return table

    def against_plain(self) -> Table:
        """Returns time over the plain network's, beside multiply-accumulates over its, and adds rows of it."""
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
        """Returns milliseconds of everything, and images per second of this package."""
        frameworks = (OURS, *self.frameworks)
        table = [[f"ms a {unit}", *map(_shown, frameworks), "images/s, this package"]]
        for case in self.cases:
            found = [self.seconds.get((case.network, framework)) for framework in frameworks]
            ours = self.seconds[case.network, OURS]
            table.append([f"{case.network}, batch {case.batch}", *(spread(part, 1000) if part else NOT_MEASURED
                                                                   for part in found),
                          spread([case.batch / value for value in ours])])
        return table

    def tables(self, unit: str) -> list[Table]:
        """Returns all that have anything in them, ratios first."""
        tables = [self.times_as_fast(), self.against_plain(), self.absolute(unit)]
        return [table for table in tables if len(table) > 1 and len(table[0]) > 1]


def torch_frameworks(platform: str, dtype: str) -> list[str]:
    """Returns the ways to use PyTorch that are measured beside this package, the usual one to compare with first.

    bfloat16 on a CPU without instructions for it is several times slower than float32; it is measured there on demand.
    """
    if platform == "tpu":  # PyTorch has no such device
        return []
    modes = ["channels_last", "eager", "compiled"]
    if dtype == "bfloat16":
        modes = ["channels_last bf16", "compiled bf16", "channels_last"]
    elif platform != "cpu":
        modes += ["channels_last bf16", "compiled bf16"]
    return [f"pytorch {mode}" for mode in modes]


def dtype_of(framework: str, case: Case) -> str:
    """Returns what a framework computes in."""
    if framework == OURS:
        return case.dtype
    return "bfloat16" if framework.endswith("bf16") else "float32"


def failure(error: Exception) -> str:
    """Returns in one line that something does not work."""
    return f"does not work: {type(error).__name__}: {first_line(error)[:200]}".rstrip(" .:")


def _shown(framework: str) -> str:
    return "this package" if framework == OURS else framework


def _pytorch(session: Session) -> Any:
    """Returns `benchmarks.pytorch_trainer`; where PyTorch is not installed prints so, and returns None."""
    try:
        from benchmarks import pytorch_trainer
    except ImportError:
        session.print_progress(MISSING)
        return None
    return pytorch_trainer
