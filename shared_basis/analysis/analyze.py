"""The mode `analyze`: what a trained network's bases, coefficients and gradients look like, as tables and pictures."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shared_basis import data, plotting
from shared_basis.analysis import bases, figures
from shared_basis.analysis.bases import BasisSet
from shared_basis.config import replace
from shared_basis.data import feeds
from shared_basis.errors import UserError
from shared_basis.evaluation.evaluate import Trained
from shared_basis.nn import ops
from shared_basis.optim.gradient_norms import by_depth, gradient_flow, layer_paths
from shared_basis.runs import inspect
from shared_basis.runtime import memory
from shared_basis.runtime.reporter import Screen
from shared_basis.training.steps import normalize

Flow = dict[int, dict[str, dict[str, float]]]
"""By step (0 is initialisation) `blocks` and `parameters`: norms by path, see `gradient_flow`."""

_OURS = re.compile(r"((products|filters|coefficients|similarity)_\w+|stem|bases|singular_values|effective_rank|"
                   r"gradient_flow|gradient_training)(\.against)?\.(csv|png)")
"""The names of the files of an analysis."""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """All that is known of one run for its tables and pictures."""

    label: str
    """Names the run in pictures: its directory's name."""
    model: str
    step: int
    sets: list[BasisSet]
    described: dict[str, list[dict[str, Any]]]
    """By name of the set, `analysis.describe_set`."""
    stem: np.ndarray
    """`[k, k, channels, T]`."""
    layers: list[str]
    """The paths of all layers, in order of depth."""
    flow: Flow
    recorded: list[dict[str, Any]]
    """The lines of gradients.jsonl."""
    notes: list[str]
    """What does not apply to this network or this run, and why."""

    @classmethod
    def of(cls, trained: Trained, tell: Callable[[str], None] = lambda text: None) -> Analysis:
        """Analyses a checkpoint, and the gradients at all that are kept."""
        variables = jax.device_get(trained.variables)
        sets = bases.basis_sets(trained.model, variables)
        notes = list(_notes(trained, sets))
        flow: Flow = {}
        try:
            inputs = training_batch(trained, tell)
        except UserError as error:
            notes.append(f"no gradients at the checkpoints, for want of images: {error}")
        else:
            tell("gradients: compiling …")
            flow = flows(trained, *inputs)
        recorded = trained.run.gradients()
        if not recorded:
            notes.append("no gradients while training: the run was made without --config.train.record_gradients")
        return cls(trained.run.path.absolute().name, trained.config.model.name, trained.step, sets,
                   {found.name: bases.describe_set(found) for found in sets}, np.asarray(
                       variables["params"]["stem"]["kernel"]),
                   ["/".join(path) for path in layer_paths(trained.model, trained.spec.image_shape)], flow, recorded,
                   notes)


def _notes(trained: Trained, sets: Sequence[BasisSet]) -> Iterator[str]:
    """Yields a line for whatever of the analysis does not apply to the network."""
    sharing = trained.model.sharing
    if not sets:
        yield "a plain network: it has no bases and no coefficients"
        return
    if sharing.templates:
        yield "templates are not drawn orthonormal and not penalised; coefficients combine whole kernels"
    elif not sharing.orthonormal:
        yield "the shared filters are whole layers (naive recursion), not drawn orthonormal and not penalised"
    elif sharing.whole_filters:
        yield "the shared filters are whole layers: there are no unique elements"
    if sharing.whole_filters:
        yield "no coefficients: the layers share their filters themselves"
    if not any(found.shared for found in sets):
        yield "nothing is shared: coefficients of different layers belong to different elements and are not compared"
    if not all(found.comparable for found in sets):
        yield ("unique elements see other channels than shared ones (channel groups): no products between them, and "
               "the unique elements of each layer are described by themselves")


def training_batch(trained: Trained, tell: Callable[[str], None]) -> tuple[jax.Array, jax.Array]:
    """Returns the run's first batch of training images, normalised and not augmented, and its labels.

    Raises:
      UserError: the images cannot be found or read.
    """
    # Streamed by threads, so that no more than the batch is read.
    config = replace(trained.config, {"data.placement": "stream", "data.workers": 0})
    source = data.open_source(config.data, ("train",), trained.spec)
    feed = feeds.load(source, config.data, trained.mesh, Screen(verbosity="quiet")).feed(config, trained.mesh)
    batches = feed.batches(0)
    images, labels = next(batches)
    batches.close()
    tell(f"gradients: on the first {len(labels)} training images")
    return normalize(images, config.data), labels


def flows(trained: Trained, images: jax.Array, labels: jax.Array) -> Flow:
    """Returns the norms of gradients at initialisation (step 0) and at each checkpoint that is kept."""
    flow = gradient_flow(trained.model)

    def initial() -> Any:
        return trained.model.init(jax.random.key(trained.config.seed), jnp.zeros((1, *trained.spec.image_shape)),
                                  train=False)

    steps = {step: trained.at(step).variables for step in trained.checkpoints.steps if step}
    # A run that began with published weights has them as step 0; others began with what the seed gives.
    first = (trained.at(0).variables if 0 in trained.checkpoints.steps else
             jax.jit(initial, compiler_options=ops.quick_compiler_options())())
    with memory.explained(trained.config, "train.batch_size"):
        return {step: dict(zip(("blocks", "parameters"), flow(
            variables["params"], variables["batch_stats"], images, labels), strict=True))
            for step, variables in {0: first, **steps}.items()}


def analyze(workdir: str | Path, which: str = "latest", overrides: Mapping[str, Any] | None = None,
            against: str = "", output: str = "", tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Analyses a checkpoint of `workdir` and writes pictures, each with its data as CSV beside it.

    Args:
      which, overrides: as in `Trained.open`.
      against: another checkpoint to draw beside it: a step of this run, or a workdir, or WORKDIR:STEP.
      output: the directory to write to; empty is `workdir`/analysis. Files of an earlier analysis in it are removed.
      tell: is given what is going on, line by line.

    Returns:
      `workdir`, `step`, `model`, `output`, `files` (names in it), `notes`, `sets`: by name `describe_set`, without the
      singular values, which are in a CSV; `similarity`: by shared array the mean `cosine` and `alignment` of the
      coefficients of two layers, and the alignment that `chance` gives; `gradient_flow`; with `against` the same of
      the other under that name.

    Raises:
      UserError: as `Trained.open`, or the directory cannot be written.
    """
    runs = [Trained.open(workdir, which, overrides)]
    if against:
        path, step = inspect.other_checkpoint(workdir, against)
        runs.append(Trained.open(path, step, overrides))
    directory = Path(os.path.expanduser(output) if output else Path(workdir) / "analysis")
    try:  # before what takes minutes
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(directory, error) from error
    analyses = _labelled([Analysis.of(trained, tell) for trained in runs])
    tell("drawing …")
    written: list[str] = []
    for name, table in tables(analyses):
        _write(directory / f"{name}.csv", _csv(table), written)
    for name, (_, paint, size) in figures.paintings(analyses).items():
        _write(directory / f"{name}.png", plotting.png(paint, size=size), written)
    _remove_others(directory, written)
    one, *others = ({"workdir": str(trained.run.path), "step": each.step, "model": each.model, "notes": each.notes,
                     **numbers(each)} for trained, each in zip(runs, analyses, strict=True))
    return {**one, "output": str(directory), "files": written, **({"against": others[0]} if others else {})}


def _remove_others(directory: Path, written: Sequence[str]) -> None:
    """Removes the files of an earlier analysis that this one has not written again, as they tell of another one."""
    try:
        for path in directory.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in written:
                path.unlink()
    except OSError as error:
        raise _unwritable(directory, error) from error


def _labelled(analyses: list[Analysis]) -> list[Analysis]:
    """Returns the analyses with labels that differ."""
    if len({each.label for each in analyses}) == len(analyses):
        return analyses
    labels = [f"{each.label} at {each.step}" for each in analyses]
    labels = labels if len(set(labels)) == len(labels) else [f"{label} ({i})" for i, label in enumerate(labels, 1)]
    return [dataclasses.replace(each, label=label) for each, label in zip(analyses, labels, strict=True)]


def numbers(one: Analysis) -> dict[str, Any]:
    """Returns the numbers of an analysis that `analyze` returns."""
    return {
        "sets": {name: [{key: value for key, value in basis.items() if key != "singular_values"} for basis in described]
                 for name, described in one.described.items()},
        "similarity": {name: {"layers": len(matrices), "cosine": bases.mean_off_diagonal(bases.cosines(matrices)),
                              "alignment": bases.mean_off_diagonal(bases.alignments(matrices)),
                              "chance": bases.chance_alignment(matrices[0])}
                       for name, _, matrices in bases.compared(one.sets)},
        "gradient_flow": {str(step): both for step, both in one.flow.items()}}


# Tables

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
    for measure, matrix in (("cosine", bases.cosines(matrices)), ("alignment", bases.alignments(matrices))):
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


def _csv(table: Table) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _write(path: Path, content: bytes, written: list[str]) -> None:
    """Writes a file whole or not at all, and notes its name."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    written.append(path.name)


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"--output={path}: cannot be written ({error.strerror}); choose another directory with --output.")


# Text

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
