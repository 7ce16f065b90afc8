"""An analysis as plain data, CSV files and text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shared_basis.analysis import bases
from shared_basis.analysis.bases import BasisSet
from shared_basis.analysis.collect import Analysis
from shared_basis.analysis.gradient_flow import by_depth
from shared_basis.runtime.files import align, csv_text

COLUMNS = {"basis": "basis", "elements": "elements", "norm_min": "norm min", "norm_mean": "mean", "norm_max": "max",
           "coherence_shared": "coherence shared", "coherence_between": "with unique", "coherence_unique": "unique",
           "cosine": "largest cosine", "effective_rank": "effective rank", "stable_rank": "stable rank",
           "condition": "condition"}
"""Columns of the printed tables: keys of `describe_set` and headings."""

Table = Iterator[Sequence[Any]]
"""The rows of a CSV file, starting with the header."""


def numbers(one: Analysis) -> dict[str, Any]:
    """Returns `sets`, `similarity` and `gradient_flow` of `analyze`'s result, as JSON-serialisable data."""
    return {
        "sets": {name: [{key: value for key, value in basis.items() if key != "singular_values"} for basis in described]
                 for name, described in one.described.items()},
        "similarity": {name: {"layers": len(matrices), "cosine": bases.mean_off_diagonal(bases.cosines(matrices)),
                              "alignment": bases.mean_off_diagonal(bases.uncentered_linear_cka(matrices)),
                              "chance": bases.chance_alignment(matrices[0])}
                       for name, _, matrices in bases.compared(one.sets)},
        "gradient_flow": {str(step): both for step, both in one.flow.items()}}


def csv_files(analyses: Sequence[Analysis]) -> dict[str, bytes]:
    """Returns the CSV files of one or two analyses, by name; files of only the second run end in '.against.csv'."""
    files = {}
    for name, (header, *rows) in _tables(analyses):
        files[f"{name}.csv"] = csv_text(header, rows).encode(errors="backslashreplace")  # paths may not be Unicode
    return files


def _tables(analyses: Sequence[Analysis]) -> Iterator[tuple[str, Table]]:
    for suffix, one in zip(("", ".against"), analyses, strict=False):
        for found in one.sets:
            name = found.name.replace("/", "_")
            yield f"products_{name}{suffix}", _products(found)
            yield f"filters_{name}{suffix}", _filters({**found.shared, **found.unique})
            if found.coefficients:
                yield f"coefficients_{name}{suffix}", _coefficients(found)
        if one.stem is not None:
            yield f"stem{suffix}", _filters({"stem": one.stem})
        for name, layers, matrices in bases.compared(one.sets):
            yield f"similarity_{name.replace('/', '_')}{suffix}", _similarity(layers, matrices)
    if any(one.sets for one in analyses):
        yield "bases", _bases(analyses)
        yield "singular_values", _singular_values(analyses)
    if any(one.flow for one in analyses):
        yield "gradient_flow", _gradient_flow(analyses)
    if any(one.recorded for one in analyses):
        yield "gradient_training", _gradient_training(analyses)


def _products(found: BasisSet) -> Table:
    matrix, names = found.all_rows()
    yield ["element", *names]
    for name, row in zip(names, matrix @ matrix.T, strict=True):
        yield [name, *map(_digits, row)]


def _filters(arrays: Mapping[str, np.ndarray]) -> Table:
    yield ["element", "shape", "values, in C order of the shape"]
    for name, array in arrays.items():
        shape = "x".join(map(str, array.shape[:-1]))
        for index, row in enumerate(bases.rows(array)):
            yield [f"{name}:{index}", shape, *map(_digits, row)]


def _coefficients(found: BasisSet) -> Table:
    yield ["layer", "element", "effective coefficients for each output channel"]
    for layer, matrix in found.coefficients.items():
        unique = found.unique[layer].shape[-1] if layer in found.unique else 0
        for index, row in enumerate(matrix):
            element = f"unique:{index}" if index < unique else f"{found.uses[layer]}:{index - unique}"
            yield [layer, element, *map(_digits, row)]


def _similarity(layers: Sequence[str], matrices: list[np.ndarray]) -> Table:
    yield ["measure", "layer", *layers]
    for measure, matrix in (("cosine", bases.cosines(matrices)), ("alignment", bases.uncentered_linear_cka(matrices))):
        for layer, row in zip(layers, matrix, strict=True):
            yield [measure, layer, *map(_digits, row)]


def _bases(analyses: Sequence[Analysis]) -> Table:
    names = [name for name in next(iter(next(one for one in analyses if one.sets).described.values()))[0]
             if name != "singular_values"]
    yield ["run", "step", "set", *names]
    for one in analyses:
        for name, described in one.described.items():
            for basis in described:
                yield [one.label, one.step, name, *(_digits(basis[key]) for key in names)]


def _singular_values(analyses: Sequence[Analysis]) -> Table:
    yield ["run", "step", "set", "basis", "singular values, falling"]
    for one in analyses:
        for name, described in one.described.items():
            for basis in described:
                yield [one.label, one.step, name, basis["basis"], *map(_digits, basis["singular_values"])]


def _gradient_flow(analyses: Sequence[Analysis]) -> Table:
    yield ["run", "step", "kind", "path", "norm"]
    for one in analyses:
        for step, both in one.flow.items():
            for kind, norms in both.items():
                ordered = norms if kind == "blocks" else by_depth(one.layers, norms)
                for path in ordered:
                    yield [one.label, step, kind.removesuffix("s"), path, _digits(norms[path])]


def _gradient_training(analyses: Sequence[Analysis]) -> Table:
    yield ["run", "step", "epoch", "path", "norm"]
    for one in analyses:
        for line in one.recorded:
            for path in by_depth(one.layers, line["norms"]):
                yield [one.label, line["step"], line["epoch"], path, _digits(line["norms"][path])]


def _digits(value: Any) -> Any:
    """Returns `value` for a CSV: floats with six digits, None as an empty cell."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def render(result: Mapping[str, Any]) -> str:
    """Returns the result of `analyze` as human-readable lines."""
    lines = [*_render_run(result)]
    if "against" in result:
        lines += ["", *_render_run(result["against"])]
    return "\n".join([*lines, "", f"{len(result['files'])} files, plots and their data, in {result['output']}"])


def _render_run(one: Mapping[str, Any]) -> list[str]:
    lines = [f"{one['model']} at step {one['step']:,} of {one['workdir']}:"]
    for name, described in one["sets"].items():
        rows = [[name, *list(COLUMNS.values())[1:]]]
        for basis in described:
            cells = {**basis, "basis": f"  {basis['basis'].removeprefix(f'{name}/')}",
                     "elements": " + ".join(str(basis[kind]) for kind in ("shared", "unique") if basis[kind])}
            rows.append([_cell(cells[key]) for key in COLUMNS])
        lines += align(rows, right=True)
    for name, found in one["similarity"].items():
        lines.append(f"coefficients of {found['layers']} layers on {name}: mean cosine {found['cosine']:.3f}, "
                     f"alignment {found['alignment']:.3f} (by chance {found['chance']:.3f})")
    for step, both in one["gradient_flow"].items():
        if not (norms := list(both["blocks"].values())):  # the network has no modules that are blocks
            continue
        lines.append(f"gradient at the output of blocks, {'initialisation' if step == '0' else f'step {int(step):,}'}: "
                     f"first {norms[0]:.3g}, last {norms[-1]:.3g}, first over last {_ratio(norms[0], norms[-1])}")
    return [*lines, *(f"note: {note}" for note in one["notes"])]


def _ratio(first: float, last: float) -> str:
    return f"{first / last:.3g}" if last else "–"


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
