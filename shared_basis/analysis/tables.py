"""An analysis as numbers, as tables, and as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shared_basis.analysis import bases
from shared_basis.analysis.bases import BasisSet
from shared_basis.analysis.collect import Analysis
from shared_basis.analysis.gradient_flow import by_depth


def numbers(one: Analysis) -> dict[str, Any]:
    """Returns the numbers of an analysis that `analyze` returns."""
    return {
        "sets": {name: [{key: value for key, value in basis.items() if key != "singular_values"} for basis in described]
                 for name, described in one.described.items()},
        "similarity": {name: {"layers": len(matrices), "cosine": bases.mean_off_diagonal(bases.cosines(matrices)),
                              "alignment": bases.mean_off_diagonal(bases.uncentered_linear_cka(matrices)),
                              "chance": bases.chance_alignment(matrices[0])}
                       for name, _, matrices in bases.compared(one.sets)},
        "gradient_flow": {str(step): both for step, both in one.flow.items()}}


Table = Iterator[Sequence[Any]]


def tables(analyses: Sequence[Analysis]) -> Iterator[tuple[str, Table]]:
    """Yields the name and the rows, header first, of each CSV; those of a second run end in '.against'."""
    for suffix, one in zip(("", ".against"), analyses, strict=False):
        for found in one.sets:
            name = found.name.replace("/", "_")
            yield f"products_{name}{suffix}", _products(found)
            yield f"filters_{name}{suffix}", _filters({**found.shared, **found.unique})
            if found.coefficients:
                yield f"coefficients_{name}{suffix}", _coefficients(found)
        yield f"stem{suffix}", _filters({"stem": one.stem})
        for name, layers, matrices in bases.compared(one.sets):
            yield f"similarity_{name.replace('/', '_')}{suffix}", _similarity(layers, matrices)
    if any(one.sets for one in analyses):
        yield "bases", _bases(analyses)
        yield "singular_values", _singular_values(analyses)
    if any(one.flow for one in analyses):
        yield "gradient_flow", _flow_rows(analyses)
    if any(one.recorded for one in analyses):
        yield "gradient_training", _recorded_rows(analyses)


def _products(found: BasisSet) -> Table:
    matrix, names = found.all_rows()
    yield ["element", *names]
    for name, row in zip(names, matrix @ matrix.T, strict=True):
        yield [name, *map(_figure, row)]


def _filters(arrays: Mapping[str, np.ndarray]) -> Table:
    yield ["element", "shape", "values, in C order of the shape"]
    for name, array in arrays.items():
        shape = "x".join(map(str, array.shape[:-1]))
        for index, row in enumerate(bases.rows(array)):
            yield [f"{name}:{index}", shape, *map(_figure, row)]


def _coefficients(found: BasisSet) -> Table:
    yield ["layer", "element", "effective coefficients for each output channel"]
    for layer, matrix in found.coefficients.items():
        unique = found.unique[layer].shape[-1] if layer in found.unique else 0
        for index, row in enumerate(matrix):
            element = f"unique:{index}" if index < unique else f"{found.uses[layer]}:{index - unique}"
            yield [layer, element, *map(_figure, row)]


def _similarity(layers: Sequence[str], matrices: list[np.ndarray]) -> Table:
    yield ["measure", "layer", *layers]
    for measure, matrix in (("cosine", bases.cosines(matrices)), ("alignment", bases.uncentered_linear_cka(matrices))):
        for layer, row in zip(layers, matrix, strict=True):
            yield [measure, layer, *map(_figure, row)]


def _bases(analyses: Sequence[Analysis]) -> Table:
    names = [name for name in next(iter(next(one for one in analyses if one.sets).described.values()))[0]
             if name != "singular_values"]
    yield ["run", "step", "set", *names]
    for one in analyses:
        for name, described in one.described.items():
            for basis in described:
                yield [one.label, one.step, name, *(_figure(basis[key]) for key in names)]


def _singular_values(analyses: Sequence[Analysis]) -> Table:
    yield ["run", "step", "set", "basis", "singular values, falling"]
    for one in analyses:
        for name, described in one.described.items():
            for basis in described:
                yield [one.label, one.step, name, basis["basis"], *map(_figure, basis["singular_values"])]


def _flow_rows(analyses: Sequence[Analysis]) -> Table:
    yield ["run", "step", "kind", "path", "norm"]
    for one in analyses:
        for step, both in one.flow.items():
            for kind, norms in both.items():
                ordered = norms if kind == "blocks" else by_depth(one.layers, norms)
                for path in ordered:
                    yield [one.label, step, kind.removesuffix("s"), path, _figure(norms[path])]


def _recorded_rows(analyses: Sequence[Analysis]) -> Table:
    yield ["run", "step", "epoch", "path", "norm"]
    for one in analyses:
        for line in one.recorded:
            for path in by_depth(one.layers, line["norms"]):
                yield [one.label, line["step"], line["epoch"], path, _figure(line["norms"][path])]


def _figure(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def render(result: Mapping[str, Any]) -> str:
    """Returns `analyze`'s result as lines for a person."""
    lines = [*_render_run(result)]
    if "against" in result:
        lines += ["", *_render_run(result["against"])]
    return "\n".join([*lines, "", f"{len(result['files'])} files, pictures and their data, in {result['output']}"])


def _render_run(one: Mapping[str, Any]) -> list[str]:
    lines = [f"{one['model']} at step {one['step']:,} of {one['workdir']}:"]
    columns = {"basis": "basis", "elements": "elements", "norm_min": "norm min", "norm_mean": "mean", "norm_max": "max",
               "coherence_shared": "coherence shared", "coherence_between": "with unique",
               "coherence_unique": "unique", "cosine": "largest cosine", "effective_rank": "effective rank",
               "stable_rank": "stable rank",
               "condition": "condition"}
    for name, described in one["sets"].items():
        table = [(name, *list(columns.values())[1:])]
        for basis in described:
            cells = {**basis, "basis": f"  {basis['basis'].removeprefix(f'{name}/')}",
                     "elements": _elements(basis["shared"], basis["unique"])}
            table.append(tuple(_cell(cells[key]) for key in columns))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                            for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
                  for row in table]
    for name, found in one["similarity"].items():
        lines.append(f"coefficients of {found['layers']} layers on {name}: mean cosine {found['cosine']:.3f}, "
                     f"alignment {found['alignment']:.3f} (by chance {found['chance']:.3f})")
    for step, both in one["gradient_flow"].items():
        norms = list(both["blocks"].values())
        lines.append(f"gradient at the output of blocks, {'initialisation' if step == '0' else f'step {int(step):,}'}: "
                     f"first {norms[0]:.3g}, last {norms[-1]:.3g}, first over last {_ratio(norms[0], norms[-1])}")
    return [*lines, *(f"note: {note}" for note in one["notes"])]


def _ratio(first: float, last: float) -> str:
    return f"{first / last:.3g}" if last else "–"


def _elements(shared: int, unique: int) -> str:
    return " + ".join(str(count) for count in (shared, unique) if count)


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
