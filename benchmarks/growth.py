"""Measures how time and memory of a training step scale with depth, width, batch and devices: rows, table, plot."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import Case, Timed, by_form, make_step
from benchmarks.common import Measure, Table, in_turns
from benchmarks.processes import MIB, ROUNDS, ask
from benchmarks.session import Part, Session, spread
from benchmarks.worker import without_images
from shared_basis.models.base import Network
from shared_basis.models.parameters import abstract_variables, count_macs
from shared_basis.models.resnet import ResNet
from shared_basis.plotting import COLORS, MARKERS, png, set_log
from shared_basis.runs.trained import build_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = (1, 2, 4)
"""Factors of the usual width."""
BATCHES = (1 / 4, 1 / 2, 1, 2, 4)
"""Factors of the usual batch."""
DEVICES = (1, 2, 4)

UNITS = {"depth": "depth (layers)", "width": "width (× 16, 32, 64)", "batch": "batch (images)",
         "devices": "devices (same batch)"}
"""The dimensions of scaling, as axis labels."""


@dataclasses.dataclass
class Point:
    """A network at one size, with its measurements."""

    axis: str
    size: float
    case: Case
    name: str
    """The name of its line in the plot."""
    work: float
    """Multiply-accumulates of the forward pass for a batch."""
    model: Network | None = None
    """The network, if it differs from the one that the case names."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    bytes: int = 0
    """Bytes of parameters, optimizer and step per device, by XLA."""


def growth(session: Session, cases: Sequence[Case], picture: Path | None, *, widths: Sequence[int] = WIDTHS,
           batches: Sequence[float] = BATCHES, devices: Sequence[int] = DEVICES) -> Part:
    """Measures `cases` by depth, and the first one of each kind of sharing by width, batch and devices.

    Args:
      picture: the path of the plot; None for no plot.
      widths, batches: factors of the usual ones.
    """
    base = [networks[0] for networks in by_form(cases).values()]
    points = []
    for axis, made in (("depth", _by_depth(cases)), ("width", _by_width(base, widths)),
                       ("batch", _by_batch(base, batches))):
        session.print_progress(f"growth: {axis}, {len(made)} networks")
        _measure(made, session)
        points += made
    points += _by_devices(base, session, devices)
    _record(session, points)
    notes = []
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(png(functools.partial(_paint, points), size=(3.1 * len({p.axis for p in points}), 5.6)))
        notes.append(f"![time and memory by depth, width, batch and devices](../results/{picture.name})")
    return Part([_table(points)], notes)


def macs(case: Case, model: Network | None = None) -> int:
    """Returns the multiply-accumulates per image."""
    shape = (case.image_size, case.image_size, 3)
    network = model or _model(case)
    return sum(count_macs(network, abstract_variables(network, shape), shape).values())


def _model(case: Case) -> Network:
    from shared_basis.data.examples import Spec

    return build_model(case.config(), Spec((case.image_size, case.image_size, 3), ("",) * case.classes))


def _by_depth(cases: Sequence[Case]) -> list[Point]:
    depths = [(case, re.search(r"\d+", case.plain)) for case in cases]
    return [Point("depth", int(found[0]), case, case.form or "plain", macs(case) * case.batch)
            for case, found in depths if found]


def _by_width(cases: Sequence[Case], factors: Sequence[int]) -> list[Point]:
    points = []
    for case in cases:
        model = _model(case)
        for factor in factors if isinstance(model, ResNet) else ():
            sharing = dataclasses.replace(model.sharing, shared_rank=factor * model.sharing.shared_rank,
                                          unique_rank=factor * model.sharing.unique_rank)
            wide = model.clone(widths=tuple(factor * width for width in model.widths), sharing=sharing)
            points.append(Point("width", factor, case, case.form or "plain", macs(case, wide) * case.batch, wide))
    return points


def _by_batch(cases: Sequence[Case], factors: Sequence[float]) -> list[Point]:
    sized = [dataclasses.replace(case, batch=max(1, int(factor * case.batch))) for case in cases for factor in factors]
    return [Point("batch", case.batch, case, case.form or "plain", macs(case) * case.batch) for case in sized]


def _measure(points: Sequence[Point], session: Session) -> None:
    """Measures points alternately in this process."""
    subjects: dict[int, Measure] = {}
    for index, point in enumerate(points):
        made = make_step(point.case, point.model)
        point.bytes = without_images(made.program.memory)
        subjects[index] = Timed(made.run, session.seconds)
    for index, seconds in in_turns(subjects, session.rounds).items():
        points[index].seconds = seconds


def _by_devices(cases: Sequence[Case], session: Session, usual: Sequence[int]) -> list[Point]:
    """Measures the same batch on several devices, each in a separate process."""
    counts = [count for count in usual if all(case.batch % count == 0 for case in cases)]
    if session.platform != "cpu":
        counts = [count for count in counts if count <= ask("device")["devices"]] if session.platform == "gpu" else []
    points = [Point("devices", count, case, case.form or "plain", macs(case) * case.batch)
              for case in cases for count in counts]

    def measure(point: Point, cache: str) -> float:
        session.print_progress(f"growth: {point.case.network} on {point.size:g} devices")
        answer = ask("timing", point.case, {**_some_devices(session.platform, int(point.size)),
                                            "JAX_COMPILATION_CACHE_DIR": cache})
        point.bytes = answer["program"]
        return answer["seconds"]
    with tempfile.TemporaryDirectory() as cache:  # shared, so that only the first round compiles
        found = in_turns({index: functools.partial(measure, point, cache) for index, point in enumerate(points)},
                         min(ROUNDS, session.rounds))
    for index, seconds in found.items():
        points[index].seconds = seconds
    return points


def _some_devices(platform: str, count: int) -> dict[str, str]:
    """Returns the environment for `count` devices; on a CPU these are virtual and share its cores."""
    if platform == "cpu":
        others = os.environ.get("XLA_FLAGS", "")
        return {"XLA_FLAGS": f"{others} --xla_force_host_platform_device_count={count}".strip()}
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))}


def _record(session: Session, points: Sequence[Point]) -> None:
    for point in points:
        name = point.case.network + (f", {point.size:g} × as wide" if point.axis == "width" else "")
        virtual = "virtual devices on" if session.platform == "cpu" else "×"
        device = f"{point.size:g} {virtual} {session.device}" if point.axis == "devices" else ""
        for quantity, values in (("seconds per step", point.seconds),
                                 ("bytes of the program by XLA, without images", [float(point.bytes)])):
            session.add(f"growth by {point.axis}", point.case, quantity, values, network=name, device=device)


def _table(points: Sequence[Point]) -> Table:
    """Returns each point relative to the smallest of its line; time over MACs other than 1 means non-linear scaling."""
    table = [["growth by", "network", "time over MACs", "time", "MACs", "memory", "ms per step", "MiB"]]
    for point in points:
        first = next(other for other in points if (other.axis, other.name) == (point.axis, point.name))
        time = [a / b for a, b in zip(point.seconds, first.seconds, strict=True)]
        work = point.work / first.work
        table.append([f"{point.axis}: {point.size:g}", point.name, *(spread(values) for values in (
            [value / work for value in time], time, [work], [point.bytes / first.bytes])),
            spread(point.seconds, 1000), spread([point.bytes / MIB])])
    return table


def _paint(points: Sequence[Point], figure: Figure) -> None:
    """Draws time and memory over each dimension."""
    axes = list(dict.fromkeys(point.axis for point in points))
    grid = figure.subplots(2, len(axes), squeeze=False, sharey="row")
    for column, axis in enumerate(axes):
        here = [point for point in points if point.axis == axis]
        _draw(grid[0, column], here, lambda point: 1000 * statistics.median(point.seconds), work=True)
        _draw(grid[1, column], here, lambda point: point.bytes / MIB, work=False)
        grid[1, column].set_xlabel(UNITS[axis])
    grid[0, 0].set_ylabel("time of a step (ms)")
    grid[1, 0].set_ylabel("memory of a device (MiB)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def _draw(axes: Any, points: Sequence[Point], value: Callable[[Point], float], *, work: bool) -> None:
    """Draws a line per name; with `work`, also dashed lines proportional to MACs from the smallest point."""
    names = list(dict.fromkeys(point.name for point in points))
    for index, name in enumerate(names):
        line = [point for point in points if point.name == name]
        sizes = [point.size for point in line]
        axes.plot(sizes, [value(point) for point in line], marker=MARKERS[index], color=COLORS[index],
                  label=name)
        if work:
            ideal = [value(line[0]) * point.work / line[0].work for point in line]
            axes.plot(sizes, ideal, linestyle="--", linewidth=1, color=COLORS[index], alpha=0.6,
                      label="in proportion to MACs" if index == len(names) - 1 else None)
    for which in ("x", "y"):
        set_log(axes, which)
    axes.set_xticks(sorted({point.size for point in points}))
