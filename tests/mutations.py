"""Changes the package in many small ways and tells which of these mutations the tests catch.

By hand, as it takes long; pytest does not collect this file:

    python tests/mutations.py --check                          only looks whether the table fits the package
    python tests/mutations.py --out=after.csv                  judges every mutation that the file has not got yet
    python tests/mutations.py --out=after.csv --only=ops-momentum,steps-top5 --jobs=2
    python tests/mutations.py --out=after.csv --first-only     without going on to the whole suite
    python tests/mutations.py --out=after.csv --control        the tests that caught something, on the package as it is
    python tests/mutations.py --table before.csv after.csv     what was caught before and after, in Markdown

A mutation replaces a piece of source text that occurs exactly once in the package, wherever the file lies that has it.
The tree (what git knows or would add, as it lies on disk) is copied to a temporary directory and mutated there. First
the test files run whose path below tests/ contains one of the mutation's words, in their order, and only if these pass
all others. Each result is a row of the file as soon as it is known, so that a run can be stopped and called again.

Compiled programs are kept in .pytest_cache/jax of this tree, unless JAX_COMPILATION_CACHE_DIR says otherwise. With
JAX_DISABLE_MOST_OPTIMIZATIONS=1 in the environment programs compile sooner.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "shared_basis"
COLUMNS = ("name", "file", "caught", "test", "seconds", "commit")
FAILED = re.compile(r"\[gw\d+\] .*?\b(?:FAILED|ERROR) (tests/\S+?\.py::.+?)\s*$"
                    r"|(tests/\S+?\.py::.+) (?:FAILED|ERROR)\b"
                    r"|(?:FAILED|ERROR) (tests/\S+?\.py(?:::.+?)?)(?: - .*)?$")
"""A line of pytest's that tells of a failure: as it happens, with and without workers, and in the summary."""


class Mutation(NamedTuple):
    """A small change of the package."""

    name: str
    """Begins with the area that it belongs to."""
    old: str
    """Occurs exactly once in the package."""
    new: str
    words: tuple[str, ...]
    """The test files whose path contains one of them run first."""


MUTATIONS = (
    # Filter bases
    Mutation("basis-he-fan", 'variance_scaling(2.0, "fan_out", "normal")', 'variance_scaling(2.0, "fan_in", "normal")',
             ("basis_conv", "models/", "registry")),
    Mutation("basis-largest-rank", "if rank > space:", "if rank >= space:", ("basis_conv", "models/", "registry")),
    Mutation("basis-orthonormal-together", "len(names) * rank <= math.prod(space)",
             "len(names) * rank < math.prod(space)", ("basis_conv", "models/")),
    Mutation("basis-unique-first", "basis.insert(0, self.param(", "basis.append(self.param(",
             ("basis_conv", "faces", "pytorch", "layouts")),
    Mutation("basis-activation-inside", "y if activation is None else activation(y), coefficients",
             "y, coefficients", ("basis_conv", "faces", "pytorch", "registry", "test_export")),
    Mutation("basis-one-group", "one_group = all(filters.shape[-2] == x.shape[-1] for filters in basis)",
             "one_group = True", ("faces", "transformations", "registry")),
    Mutation("basis-bias-fused", "isinstance(then, BatchNorm) and not self.use_bias and (",
             "isinstance(then, BatchNorm) and (", ("faces",)),
    Mutation("basis-shared-groups", "needed = (*size, channels // shared_groups, *ends)",
             "needed = (*size, channels, *ends)", ("faces", "registry")),
    Mutation("basis-nnx-train", "self.bias is None and self._is_joined_by(then):", "self.bias is None:", ("faces",)),
    Mutation("basis-nnx-statistics", "        if train and then is not None and moved_then is not None:",
             "        if then is None and moved_then is not None:", ("faces", "transformations")),
    Mutation("basis-template-scale", "shared.shape[-1] ** -0.5", "shared.shape[-1] ** 0.5",
             ("basis_conv", "registry", "models/")),

    # Operations
    Mutation("ops-momentum", "mean=MOMENTUM * self.mean + (1 - MOMENTUM) * mean",
             "mean=(1 - MOMENTUM) * self.mean + MOMENTUM * mean", ("batch_norm", "basis_conv", "models/")),
    Mutation("ops-few-filters-stride", "<= FEW_FILTERS and max(window.strides) == 1", "<= FEW_FILTERS",
             ("convolution", "basis_conv", "models/")),
    Mutation("ops-few-filters-gradient", "for i in reversed(range(rows)) for j in reversed(range(columns))]",
             "for i in reversed(range(rows)) for j in range(columns)]", ("ops", "models/")),
    Mutation("ops-input-gradient", "kernel[::-1, ::-1].transpose(0, 1, 3, 2)", "kernel[::-1].transpose(0, 1, 3, 2)",
             ("ops", "models/")),
    Mutation("ops-kernel-gradient", "tuple(zip(before, after, strict=True)), rhs_dilation",
             "tuple(zip(after, before, strict=True)), rhs_dilation", ("convolution", "models/", "registry")),
    Mutation("ops-varying", "if axes else array", "if not axes else array", ("transformations",)),
    Mutation("ops-span", "(size - 1) * factor + 1 for size", "size * factor for size", ("convolution",)),
    Mutation("ops-norm-gradient", "(norm.bias - (mean - center) * factor)", "norm.bias", ("batch_norm", "models/")),
    Mutation("ops-gram-gradient", "return gram(x), half + half.T", "return gram(x), half", ("batch_norm", "models/")),
    Mutation("ops-cross-block", "blocks[j, i].T for j", "blocks[j, i] for j", ("batch_norm", "faces", "models/")),
    Mutation("ops-axis-name", "jax.lax.pmean(values, axis_name)", "values", ("transformations",)),
    Mutation("ops-norm-offset", "(offset - mean_then) * factor + then.bias", "offset * factor + then.bias",
             ("batch_norm", "faces")),
    Mutation("ops-one-mean", "return _central(product[:-1, -1], product[:-1, :-1])",
             "return _central(product[:-1, 0], product[:-1, :-1])", ("batch_norm", "faces")),
    Mutation("ops-one-offset", "offset[None].astype(dtype)]), jnp.zeros_like(offset)",
             "offset[None].astype(dtype)]), offset", ("batch_norm", "faces")),
    Mutation("ops-relu-gradient", "return y, jnp.where(y > 0, tangents[0], 0)", "return y, tangents[0]",
             ("registry", "pytorch", "models/")),
    Mutation("ops-norm-scale", "scaled, offset = scaled * factor, (", "scaled, offset = scaled, (", ("batch_norm",)),
    Mutation("ops-norm-mean", "offset = offset - jnp.sum(mean[:, None] * scaled, 0)",
             "offset = offset + jnp.sum(mean[:, None] * scaled, 0)", ("batch_norm", "basis_conv")),
    Mutation("ops-joint-variance", "covariance = product - mean[:, None] * mean", "covariance = product",
             ("batch_norm", "faces")),
    Mutation("ops-rounded-product", "sum((p.astype(doffset.dtype) for p in products), doffset)",
             "sum(p.astype(doffset.dtype) for p in products)", ("batch_norm",)),
    Mutation("ops-variance", "return mean, jnp.maximum(square - jnp.square(mean), 0), None",
             "return mean, jnp.maximum(square, 0), None", ("batch_norm", "basis_conv")),

    # Orthogonality: penalty
    Mutation("penalty-identity", "jnp.sum((products - identity) ** 2)", "jnp.sum((products + identity) ** 2)",
             ("penalty", "pytorch")),
    Mutation("penalty-reduction", 'reduction == "mean" else 1)', 'reduction == "sum" else 1)',
             ("penalty", "optimizer")),
    Mutation("penalty-coherence", "jnp.max(jnp.abs(p) * (1 - identity))", "jnp.max(p * (1 - identity))",
             ("penalty", "analysis/")),
    Mutation("penalty-sign", "g + (scale * p).astype(g.dtype)", "g - (scale * p).astype(g.dtype)",
             ("penalty", "optimizer")),

    # Orthogonality: exact
    Mutation("exact-tangent", "(products + _transposed(products)) / 2", "(products - _transposed(products)) / 2",
             ("orthonormal",)),
    Mutation("exact-unique", "moved - _product(_product(moved, space.T), space)",
             "moved - _product(_product(now, space.T), space)", ("orthonormal",)),
    Mutation("exact-last-iteration", "_factor(_product(x, _transposed(x)), [CONVERGING])",
             "_factor(_product(x, _transposed(x)), [LIFTING])", ("orthonormal",)),
    Mutation("exact-room", "if shared + unique > size:", "if shared + unique >= size:", ("orthonormal", "optimizer")),

    # Naming bases
    Mutation("naming-glob", 'if pattern[0] == "**":', 'if pattern[0] == "*":', ("basis_group",)),
    Mutation("naming-twice", "if each in seen:", "if seen is None:", ("basis_group",)),
    Mutation("naming-tuple", "isinstance(key, (str, int)) and not isinstance(key, Glob) for key",
             "isinstance(key, (str, int)) for key", ("basis_group",)),
    Mutation("naming-integers", "if not jnp.issubdtype(leaf.dtype, jnp.floating):", "if leaf.dtype is None:",
             ("basis_group",)),
    Mutation("naming-sizes", "if shared and not _one_size(shapes, axes):", "if shared is None:", ("basis_group",)),
    Mutation("naming-masked", "path_of(entries) == path[:len(path_of(entries))]", "path_of(entries) == path",
             ("basis_group",)),
    Mutation("stacks-axes", "if len(shape) - (axis is not None) > most:", "if len(shape) > most + 1:",
             ("basis_group",)),
    Mutation("stacks-axis", "array = jnp.moveaxis(array, axis, 0)", "array = jnp.moveaxis(array, 0, 0)", ("stacks",)),
    Mutation("stacks-heights", "(len(heights) <= 1 or len(stacked) < len(shapes))", "len(shapes) > 0", ("stacks",)),
    Mutation("exact-ranks", "found.setdefault(array.shape, []).append(index)",
             "found.setdefault(array.shape[-1:], []).append(index)", ("orthonormal", "penalty")),

    # Gradients by depth
    Mutation("gradients-epoch", "first = state.steps % steps == 0", "first = state.steps % steps == 1",
             ("gradient", "training/")),
    Mutation("gradients-order", 'depth.get(path.rpartition("/")[0], len(layers))',
             'depth.get(path.rpartition("/")[0], -1)', ("gradient", "analysis/")),
    Mutation("gradients-flow", "* len(labels) ** 0.5", "* len(labels)", ("analysis/", "gradient")),

    # Optimizer and schedule
    Mutation("optimizer-boundaries", "round(boundary * steps_per_epoch) - warmup", "round(boundary * steps_per_epoch)",
             ("optimizer", "recipes")),
    Mutation("optimizer-cosine", "config.learning_rate, epochs * steps_per_epoch - warmup)",
             "config.learning_rate, epochs * steps_per_epoch)", ("optimizer", "recipes")),
    Mutation("optimizer-exempt", "and path_of(entries) not in kept", "",
             ("orthonormal", "optimizer")),
    Mutation("optimizer-nesterov", "optax.sgd(rate, momentum=given.momentum, nesterov=given.nesterov)",
             "optax.sgd(rate, momentum=given.momentum)", ("optimizer", "steps")),
    Mutation("optimizer-lion-momentum", "optax.lion(rate, b1=given.momentum, ", "optax.lion(rate, ", ("optimizer",)),
    Mutation("optimizer-muon-head", '(label == "kernel" and leaf.ndim > 2)', '(label == "kernel")', ("optimizer",)),
    Mutation("optimizer-muon-decay", "optax.add_decayed_weights(given.weight_decay, mask=setting.decays),\n", "\n",
             ("optimizer",)),
    Mutation("optimizer-thaw", "lambda step: step < steps", "lambda step: step <= steps", ("optimizer", "finetune")),
    Mutation("optimizer-freeze-last", "_scale, _retract, _freeze)", "_freeze, _scale, _retract)", ("optimizer",)),
    Mutation("select-first-match", "found |= dict.fromkeys(matching, value)",
             "found = {**found, **dict.fromkeys([path for path in matching if found[path] == default], value)}",
             ("select",)),

    # Networks
    Mutation("models-same-start", 'jax.random.split(self.make_rng("params"), len(names))',
             'jnp.stack([self.make_rng("params")] * len(names))', ("models/",)),
    Mutation("models-loop-from", "blocks >= MANY_BLOCKS", "blocks > MANY_BLOCKS", ("registry", "models/", "ops")),
    Mutation("models-head", "dtype, -(features**-0.5), features**-0.5)", "dtype, 0.0, features**-0.5)",
             ("models/",)),
    Mutation("models-means-apart", "reduction_group=path[-1]", 'reduction_group=""',
             ("registry", "models/", "penalty")),
    Mutation("resnet-shortcut", "(missing // 2, missing - missing // 2)", "(0, missing)", ("models/", "pytorch")),
    Mutation("resnet-ranks-grow", "self.shared_rank << g or kernel[-1]", "self.shared_rank or kernel[-1]",
             ("models/", "registry", "parameters")),
    Mutation("resnet-stride", "self.widths[g], 2 if first and g else 1", "self.widths[g], 2 if first else 1",
             ("registry", "models/", "parameters")),
    Mutation("densenet-pooling", "nn.avg_pool(x, (2, 2), (2, 2))", "nn.max_pool(x, (2, 2), (2, 2))",
             ("pytorch", "registry", "test_export")),
    Mutation("densenet-last-relu", 'nn.relu(batch_norm(train, self.dtype, "final_norm")(x))',
             'batch_norm(train, self.dtype, "final_norm")(x)', ("pytorch", "registry")),
    Mutation("resnext-unique-groups", "(sharing.unique_rank << g) // GROUP_WIDTH or 1",
             "sharing.unique_rank // GROUP_WIDTH or 1", ("registry", "pytorch")),
    Mutation("resnext-rank", "rank and self.widths[0] % (rank // GROUP_WIDTH)", "False", ("registry", "models/")),
    Mutation("mobilenet-stage", 'self.stem == "cifar" and s == 6', 'self.stem == "cifar" and s == 5',
             ("registry", "pytorch")),
    Mutation("mobilenet-last-relu", 'if layer != "third":', 'if layer == "second":',
             ("pytorch", "registry", "layouts")),
    Mutation("shuffle-turns", "jnp.swapaxes(apart, -1, -2)", "apart", ("test_compact",)),
    Mutation("shuffle-first-groups", 'groups = 1 if stage == "stage2" else self.groups', "groups = self.groups",
             ("test_compact",)),
    Mutation("efficientnet-adds", "x + y if self.strides == 1 and x.shape[-1] == self.features else y", "y",
             ("test_compact_pytorch",)),
    Mutation("stages-ranks-grow", "self.sharing.unique_rank << stages.index(stage)", "self.sharing.unique_rank",
             ("test_compact",)),
    Mutation("registry-widths", "2 * width, 4 * width)", "2 * width, 3 * width)", ("models/",)),
    Mutation("registry-double", '"shared" if one and not double else layer', '"shared" if double else layer',
             ("models/", "registry", "parameters")),
    Mutation("registry-shared++", 'separate_means=kind == "shared++"', 'separate_means=kind == "shared"',
             ("registry", "models/", "pytorch")),

    # Parameters and multiply-accumulates
    Mutation("params-norm-bias", 'norm and name in ("scale", "bias")', 'norm and name == "scale"',
             ("parameters", "optimizer")),
    Mutation("params-norm-beside", "norm=path[:-1] in scaled", "norm=bool(scaled)", ("labels", "parameters")),
    Mutation("params-integers", "jnp.result_type(leaf), jnp.inexact)", "jnp.result_type(leaf), jnp.number)",
             ("labels",)),
    Mutation("params-count", "counts.get(kinds[path], 0) + math.prod(leaf.shape)", "math.prod(leaf.shape)",
             ("parameters",)),
    Mutation("params-macs-loop", 'repeats * eqn.params.get("length", 1)', "repeats", ("parameters", "registry")),
    Mutation("params-macs-taps", "kernel.shape[numbers.rhs_spec[0]]", "kernel.shape[numbers.rhs_spec[1]]",
             ("parameters", "registry")),
    Mutation("summary-saving", "1 - counts[key] / plain[key]", "1 - plain[key] / counts[key]",
             ("parameters", "readme")),
    Mutation("summary-shared", 'row["parameters"] += tree_size(tree) + shared',
             'row["parameters"] += tree_size(tree)',
             ("parameters", "report/")),

    # Configuration
    Mutation("config-validation", "auto or 0 <= self.validation < 1,", "auto or 0 <= self.validation <= 1,",
             ("config", "folder")),
    Mutation("config-boundaries-rise", "all(a < b for a, b in itertools.pairwise((0.0,",
             "all(a <= b for a, b in itertools.pairwise((0.0,", ("config",)),
    Mutation("config-boundary-epochs", "boundary < self.train.epochs", "boundary <= self.train.epochs", ("config",)),
    Mutation("config-parts", "if any(boundary >= 1 for boundary in self.boundaries):",
             "if all(boundary >= 1 for boundary in self.boundaries):", ("config",)),
    Mutation("config-ignored", "if value != DEFAULTS[field]:", "if value and not DEFAULTS[field]:", ("config",)),
    Mutation("config-earlier", "[boundary / epochs for boundary in boundaries]", "boundaries", ("continuation",)),
    Mutation("config-places", "and path not in LOCATION_FIELDS", "", ("config", "training/", "workdir")),
    Mutation("config-bool", "hint is float and isinstance(value, int) and not isinstance(value, bool)",
             "hint is float and isinstance(value, int)", ("config", "fuzz")),

    # Data sets
    Mutation("splits-held-out", "np.sort(order[held:])", "np.sort(order[:held])", ("folder", "reader", "digits")),
    Mutation("splits-order", "np.random.default_rng((seed, 0, epoch))", "np.random.default_rng((seed, 0, 0))",
             ("test_images", "streaming", "steps")),
    Mutation("splits-seed", "np.random.default_rng(config.split_seed).permutation(count)",
             "np.random.default_rng(0).permutation(count)", ("folder", "reader", "digits")),
    Mutation("arrays-labels", "if not 0 <= label < len(spec.classes)", "if not 0 <= label <= len(spec.classes)",
             ("in_memory", "streaming", "reader")),
    Mutation("arrays-cgroup", "int(limit) - int(used) + cache", "int(limit) - int(used)", ("in_memory", "test_memory")),
    Mutation("arrays-centre", 'TEST_PART if config.crop == "random_resized" else 1.0',
             '1.0 if config.crop == "random_resized" else TEST_PART', ("folder", "streaming", "test_images")),
    Mutation("images-reduction", "spare = min((box[3] - box[1]) / size[0]", "spare = max((box[3] - box[1]) / size[0]",
             ("test_images", "folder")),
    Mutation("images-aspect", "round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))",
             "round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))", ("test_images",)),
    Mutation("images-sixteen-bits", "(deep + 128) // 257", "deep // 257", ("test_images", "reader")),
    Mutation("images-turn", "6: Image.Transpose.ROTATE_270", "6: Image.Transpose.ROTATE_180", ("test_images",)),
    Mutation("images-transparent", 'Image.new("RGBA", image.size, "white")', 'Image.new("RGBA", image.size, "black")',
             ("test_images", "folder")),
    Mutation("stream-shard", "range(self.index * rows, (self.index + 1) * rows)", "range(0, rows)",
             ("streaming", "test_distributed")),
    Mutation("stream-crops", "self._regions([int(number) * self._batch_size + row for row in self._rows])",
             "self._regions([step * self._batch_size + row for row in self._rows])", ("streaming", "feeds")),
    Mutation("stream-last-batch", "return -(-len(self._examples) // self._batch_size)",
             "return len(self._examples) // self._batch_size", ("streaming", "feeds")),
    Mutation("folder-validation", '"validation": validation if own_test else None', '"validation": validation',
             ("folder",)),
    Mutation("folder-own-validation", 'and "train" in parts and "validation" not in parts', 'and "train" in parts',
             ("folder",)),
    Mutation("folder-cycle", "if real in above:", "if len(above) > 50:", ("folder",)),
    Mutation("folder-nested", "return _unwrapped(Path(inside[0].path))", "return directory", ("folder",)),
    Mutation("folder-parts", "if len(set(paths)) < len(entries) or any(", "if any(", ("folder",)),
    Mutation("folder-unicode", 'unicodedata.normalize("NFC", folder.name)', "folder.name", ("folder",)),
    Mutation("folder-thumbnails", "entry.is_dir() and entry.name.lower() not in OTHERS_DIRECTORIES", "entry.is_dir()",
             ("folder",)),
    Mutation("folder-one-left", "held = min(held, len(order) - 1)", "held = min(held, len(order))", ("folder",)),
    Mutation("digits-test", "[TEST_EVERY - 1::TEST_EVERY]", "[::TEST_EVERY]", ("digits",)),
    Mutation("digits-grey", "digits.images * (255 / 16)", "digits.images * 15", ("digits",)),
    Mutation("tfds-overlap", "file == other_file and start < end", "file == other_file and start + 1 < end",
             ("reader",)),
    Mutation("tfds-test-split", 'for name in ("test", "validation") if name in existing',
             'for name in ("validation", "test") if name in existing', ("reader", "tfds/test_builders")),
    Mutation("tfds-planes", ".reshape(3, 32, 32).transpose(1, 2, 0)", ".reshape(32, 32, 3)", ("tfds/test_builders",)),
    Mutation("tfds-imagenet-labels", "zip(sorted(archive.getnames()), listed", "zip(archive.getnames(), listed",
             ("tfds/test_builders",)),
    Mutation("tfds-checksum", "if size < 2**30 and (found", "if size > 2**30 and (found", ("tfds/test_prepare",)),
    Mutation("tfds-foreign-class", 'name.startswith("tensorflow_datasets.core.features.")',
             'name.startswith("tensorflow_datasets.")', ("reader", "hostile")),
    Mutation("feeds-batches", "-(-min(batch_size, count) // devices) * devices",
             "min(batch_size, count) // devices * devices", ("feeds", "evaluation/")),
    Mutation("feeds-broken", "following[np.argmin(broken[following])]", "following[np.argmax(broken[following])]",
             ("feeds", "streaming")),
    Mutation("feeds-host", "needed * copies * HOST_SHARE <= host", "needed * copies <= host", ("feeds", "test_memory")),
    Mutation("feeds-new-order", "if order is None or not rest:", "if order is None:", ("feeds", "training/")),

    # Devices and memory
    Mutation("devices-order", "key=lambda device: (device.process_index, device.id)", "key=lambda device: device.id",
             ("test_distributed",)),
    Mutation("devices-process", "process < 0 or processes is None or process >= processes",
             "process < 0 or processes is None or process > processes", ("test_distributed",)),
    Mutation("devices-nearest", "for size in (below, below + divisor) if size)",
             "for size in (below, below + divisor))", ("test_distributed", "training/")),
    Mutation("memory-alias", "analysis.output_size_in_bytes - analysis.alias_size_in_bytes",
             "analysis.output_size_in_bytes", ("test_memory",)),
    Mutation("memory-there-already", "free + memory.data * copies", "free", ("test_memory",)),
    Mutation("memory-largest", "needed.data > needed.step", "needed.data < needed.step", ("test_memory",)),

    # Runs and checkpoints
    Mutation("workdir-rewind", 'for line in lines if line["step"] <= step]',
             'for line in lines if line["step"] < step]', ("workdir", "training/")),
    Mutation("continuation-past", "if not np.array_equal(past_rates(now, per_epoch, step),",
             "if np.array_equal(past_rates(now, per_epoch, step),", ("continuation", "training/")),
    Mutation("continuation-fewer", "now.train.epochs * per_epoch < step",
             "now.train.epochs * per_epoch < step - per_epoch",
             ("continuation", "training/")),
    Mutation("continuation-others", "if changes.keys() - set(SCHEDULE_FIELDS):", "if False:", ("continuation",)),
    Mutation("continuation-record", '{**saved, "config": record["config"],', "{**saved,", ("continuation", "workdir")),
    Mutation("settle-power", "power = 1 << (wanted.bit_length() - 1)", "power = wanted", ("settle",)),
    Mutation("statistics-broken", "images[labels >= 0].reshape", "images.reshape", ("settle",)),
    Mutation("workdir-shape", "type(size) is int and size > 0 for size in shape", "type(size) is int for size in shape",
             ("workdir", "hostile", "fuzz")),
    Mutation("checkpoints-chosen-on", 'for name in ("validation", "test") if f"{name}_accuracy" in metrics',
             'for name in ("test", "validation") if f"{name}_accuracy" in metrics', ("checkpoints", "training/")),
    Mutation("checkpoints-kept", "preservation_policy.LatestN(2)", "preservation_policy.LatestN(1)",
             ("checkpoints", "training/")),
    Mutation("checkpoints-best", "return steps[-1] if best is None else best", "return steps[-1]",
             ("checkpoints", "evaluation/")),
    Mutation("checkpoints-metrics-later", "and step in self.steps and self.metrics(step) is None",
             "and step in self.steps and self.metrics(step) is not None", ("checkpoints", "training/")),
    Mutation("checkpoints-dtype", 'for what in ("shape", "dtype"):', 'for what in ("shape",):',
             ("checkpoints", "hostile")),

    # Training and evaluation
    Mutation("train-last-epoch", "epoch % every == 0 or epoch == epochs", "epoch % every == 0",
             ("training/", "test_loop")),
    Mutation("train-rate", '"learning_rate": float(self.program.schedule(step - 1))',
             '"learning_rate": float(self.program.schedule(step))', ("training/", "report/")),
    Mutation("train-clock", "self._training += now - self._last", "self._training += now - self._began",
             ("training/",)),
    Mutation("train-best-of-equals", "max(reversed(lines), key", "max(lines, key", ("training/",)),
    Mutation("steps-batch", "step % (order.shape[0] // batch_size) * batch_size", "step * batch_size",
             ("steps", "training/")),
    Mutation("steps-crop", "0, 2 * pad + 1)", "0, 2 * pad)", ("steps",)),
    Mutation("steps-mirror", "images[:, :, ::-1], images)", "images[:, ::-1], images)", ("steps",)),
    Mutation("steps-totals", "jnp.where(first, new, total + new)", "total + new", ("steps", "training/")),
    Mutation("steps-parts-dropout", "jax.random.fold_in(dropout, index)", "jax.random.fold_in(dropout, 0)",
             ("steps", "test_memory", "registry")),
    Mutation("mixing-partner", "(1 - share) * jnp.roll(arrays, 1, axis=0)",
             "(1 - share) * jnp.roll(arrays, -1, axis=0)", ("mixing",)),
    Mutation("mixing-area", "share = 1 - replaced.mean((1, 2), dtype=jnp.float32)",
             "share = 1 - side[:, 0] ** 2", ("mixing",)),
    Mutation("mixing-smoothing", "images, optax.smooth_labels(targets, config.label_smoothing)", "images, targets",
             ("mixing",)),
    Mutation("mixing-key", "_stream(seed, 3, state.step)", "_stream(seed, 3, 0)", ("finetune", "steps")),
    Mutation("losses-temperature", "return temperature ** 2 * optax", "return temperature * optax", ("losses",)),
    Mutation("losses-weight", "return ((1 - config.weight) * labels", "return (labels", ("losses", "finetune")),
    Mutation("averages-decay", "(1 + state.step) / (10 + state.step)", "state.step / (10 + state.step)", ("finetune",)),
    Mutation("averages-opened", "if config.train.ema_decay:\n", "if False:\n", ("finetune",)),
    Mutation("averages-scored", "        return self.averaged\n",
             '        return {"params": self.params, "batch_stats": self.batch_stats}\n', ("finetune",)),
    Mutation("teacher-normalises", "variables, images, teacher.data)", "variables, images, config.data)",
             ("finetune",)),
    Mutation("statistics-frozen", "train=not given.freeze_statistics", "train=True", ("finetune",)),
    Mutation("gradients-frozen", "jax.lax.stop_gradient(leaf) if fixed else leaf", "leaf", ("finetune",)),
    Mutation("steps-top5", "jnp.sum(logits > target_logit, axis=-1) < 5",
             "jnp.sum(logits > target_logit, axis=-1) <= 5", ("steps", "evaluation/")),
    Mutation("steps-nan", "& ~jnp.isnan(target_logit[:, 0])", "", ("steps", "evaluation/", "test_loop")),
    Mutation("steps-filling", '"loss": jnp.where(counts, loss, 0)', '"loss": loss', ("steps", "evaluation/")),
    Mutation("evaluate-overrides", 'if not path.startswith("data.") and',
             'if not path.startswith(("data.", "train.")) and', ("evaluation/", "fuzz")),
    Mutation("evaluate-all-of-it", '"test": 1.0, "test_examples": 0,', '"test": 0.2, "test_examples": 0,',
             ("evaluation/",)),
    Mutation("evaluate-channels", "if len(values) not in (1, channels):", "if len(values) not in (1, 3):",
             ("test_trained", "config")),
    Mutation("evaluate-chosen-on", 'if which == "best" else None', 'if which != "latest" else None', ("evaluation/",)),

    # What a run is asked
    Mutation("prediction-class", "spec.classes[int(row.argmax())]", "spec.classes[int(row.argmin())]", ("predict",)),
    Mutation("prediction-hidden", 'entries if not entry.name.startswith(".")', "entries", ("predict", "folder")),
    Mutation("inspection-step", 'if against in ("best", "latest") or against.isdecimal():',
             'if against in ("best", "latest"):', ("inspect", "analysis/")),
    Mutation("inspection-added", "dict.fromkeys((*one, *other))", "dict.fromkeys(one)", ("inspect",)),
    Mutation("inspection-bytes", "math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize", "math.prod(leaf.shape)",
             ("inspect",)),

    # Published weights
    Mutation("official-layout", "tensor.transpose(2, 3, 1, 0)", "tensor.transpose(3, 2, 1, 0)",
             ("pytorch", "layouts")),
    Mutation("official-alias", "np.array_equal(copy, tensor, equal_nan=True)", "copy.shape == tensor.shape",
             ("pytorch", "layouts")),
    Mutation("official-fourth-basis", "np.array_equal(used, third)", "np.array_equal(used, fourth)",
             ("layouts", "pytorch")),
    Mutation("official-torchvision", "ones * (1 - EPSILON)", "ones", ("layouts", "pytorch")),
    Mutation("state-dicts-beyond", "sum((size - 1) * stride for size, stride", "sum(size * stride for size, stride",
             ("pytorch", "hostile")),
    Mutation("state-dicts-compressed", "or info.file_size > info.compress_size", "", ("pytorch", "hostile")),
    Mutation("import-new", "    require_new(workdir)\n    spec = data.describe", "    spec = data.describe",
             ("training/test_start", "faults", "end_to_end")),
    Mutation("import-outputs", "np.take(arrays[path], order, axis)", "arrays[path]", ("training/test_start",)),
    Mutation("import-names", "if len(bare) < len(found):", "if bare:", ("interop/test_wild",)),
    Mutation("init-other-source", 'or began["source"] != absolute(init.source)', "", ("training/test_start",)),
    Mutation("pytorch-shared", "dict.fromkeys((owner, *copies), ", "dict.fromkeys((owner,), ",
             ("layouts", "export/test_pytorch")),

    # Compression in closed form
    Mutation("compression-directions", "np.linalg.eigh(stacked @ stacked.T)[1][:, ::-1]",
             "np.linalg.eigh(stacked @ stacked.T)[1]", ("compression/",)),
    Mutation("compression-weights", "layer.kernel / np.sqrt(layer.energy or 1.0)", "layer.kernel", ("compression/",)),
    Mutation("compression-energies", "np.cumsum(squares)[::-1]", "np.cumsum(squares[::-1])", ("compression/",)),
    Mutation("compression-unique", "np.linalg.qr(directions)[0][:, basis.shape[1]:]",
             "np.linalg.qr(directions)[0][:, :unique_rank]", ("compression/",)),
    Mutation("calibration-covariance", "self.second - np.outer(self.mean, self.mean)",
             "self.second + np.outer(self.mean, self.mean)", ("compression/",)),
    Mutation("calibration-filling", "x.astype(jnp.float32) * jnp.expand_dims(counts, tuple(range(1, x.ndim)))",
             "x.astype(jnp.float32)", ("compression/",)),
    Mutation("calibration-patches", "for taps in itertools.product(*map(range, size))]",
             "for taps in sorted(itertools.product(*map(range, size)), key=lambda taps: taps[::-1])]",
             ("compression/",)),
    Mutation("calibration-strides", "length - span + tap * factor, stride)", "length - span + tap * factor, 1)",
             ("compression/",)),
    Mutation("calibration-batches", "self.count + other.count", "self.count", ("compression/",)),
    Mutation("ranks-cost", "(unique - 1) * (more_unique - base)", "unique * (more_unique - base)", ("compression/",)),
    Mutation("ranks-growth", "min(unique * growth, len(remaining) - 1)", "min(unique, len(remaining) - 1)",
             ("compression/",)),
    Mutation("ranks-space", "min(shared, self.space - unique)", "min(shared, self.space)", ("compression/",)),
    Mutation("compressing-scale", "np.sqrt(var + EPSILON)", "np.sqrt(var)", ("compression/",)),
    Mutation("compressing-moved-var", '[*norm, "var"] * found.var_ratio', '[*norm, "var"] / found.var_ratio',
             ("compression/",)),
    Mutation("kernels-centered", "moments.covariance if centered else moments.second", "moments.second",
             ("compression/",)),
    Mutation("compressing-order", "elements = np.concatenate([own.unique, basis], axis=1)",
             "elements = np.concatenate([basis, own.unique], axis=1)", ("compression/",)),

    # Analysis
    Mutation("analysis-coefficients", "return scale[:, None] * coefficients", "return coefficients", ("analysis/",)),
    Mutation("analysis-effective-rank", "np.exp(-np.sum(p * np.log(p)))", "np.exp(-np.sum(p**2 * np.log(p)))",
             ("analysis/",)),
    Mutation("analysis-stable-rank", "np.sum(values**2) / values[0] ** 2", "np.sum(values**2) / values[0]",
             ("analysis/",)),
    Mutation("analysis-shared-last", "coefficients[-count:] for layer", "coefficients[:count] for layer",
             ("analysis/",)),
    Mutation("analysis-strongest", 'np.argsort(-norms, kind="stable")[:limit]',
             'np.argsort(norms, kind="stable")[:limit]', ("analysis/",)),
    Mutation("analyze-element", 'f"unique:{index}" if index < unique', 'f"unique:{index}" if index <= unique',
             ("analysis/",)),

    # Export
    Mutation("trace-affine", 'x.arrays["offset"] * scale + offset', 'x.arrays["offset"] + offset', ("test_export",)),
    Mutation("trace-subtraction", "_affine(x, 1.0, -constant, scope) if behind",
             "_affine(x, 1.0, constant, scope) if behind", ("test_export",)),
    Mutation("trace-clip", '"high": min(high, number)}', '"high": high}', ("test_export",)),
    Mutation("folding-padding", 'or (np.any(offset) and np.any(node.attributes.get("padding", 0)))', "",
             ("test_export",)),
    Mutation("folding-cheaper", "macs(whole) >= macs(node) + sum(map(macs, parts))",
             "macs(whole) <= macs(node) + sum(map(macs, parts))", ("test_export",)),
    Mutation("folding-bias", 'before.arrays.get("bias", 0.0) * scale + node', 'before.arrays.get("bias", 0.0) + node',
             ("test_export",)),
    Mutation("graph-alone", "uses[source] == 1", "uses[source] >= 1", ("test_export",)),
    Mutation("onnx-kernels", "{4: (3, 2, 0, 1)}", "{4: (3, 2, 1, 0)}", ("test_export",)),
    Mutation("onnx-relu6", '(given["low"], given["high"]) == (0, math.inf)', 'given["low"] == 0', ("test_export",)),
    Mutation("onnx-height-width", "return *channels, height, width", "return *channels, width, height",
             ("test_export",)),
    Mutation("stablehlo-paths", "jax.config.update(name, 0)", "jax.config.update(name, limit)", ("test_export",)),
    Mutation("export-resizing", "round(min(shape[:2]) / part)", "round(min(shape[:2]) * part)", ("resizing",)),
    Mutation("export-verify-nan", "if not difference <= TOLERANCE * max(1.0, largest):",
             "if difference > TOLERANCE * max(1.0, largest):", ("test_export",)),
    Mutation("quantization-tolerance", "if lost > tolerance:", "if lost > 100 * tolerance:", ("test_quantization",)),
    Mutation("quantization-finite", "np.where(np.isfinite(logits).all(-1), logits.argmax(-1), -1)",
             "logits.argmax(-1)", ("test_quantization",)),
    Mutation("quantization-channels", "per_channel=True", "per_channel=False", ("test_quantization",)),
    Mutation("quantization-range", "reduce_range=True", "reduce_range=False", ("test_quantization",)),
    Mutation("quantization-logits", '["Gemm"]}', "[]}", ("test_quantization",)),
    Mutation("quantization-constants", "nodes_to_exclude=by_channel", "nodes_to_exclude=[]", ("test_quantization",)),

    # Reports
    Mutation("facts-images", 'self.lines[-1]["step"] * self.config.train.batch_size',
             'self.lines[-1]["epoch"] * self.config.train.batch_size', ("report/",)),
    Mutation("facts-evaluation", 'counted and line["step"] >= line["epoch"] and', "counted and", ("report/", "fuzz")),
    Mutation("scores-confusion", '(found["label"][counted], found["predicted"][counted])',
             '(found["predicted"][counted], found["label"][counted])',
             ("report/",)),
    Mutation("scores-diagonal", "self.confusion * (1 - np.eye(len(self.confusion), dtype=np.int64))", "self.confusion",
             ("report/",)),
    Mutation("comparison-deviation", "np.std(values, ddof=1)", "np.std(values, ddof=0)", ("report/",)),
    Mutation("comparison-epoch", "and one.epoch == other.epoch", "", ("report/",)),
    Mutation("plots-pooled", ".max((1, 3))", ".mean((1, 3))", ("report/",)),
    Mutation("plots-boundary", "if epoch <= run.epoch:", "if epoch < run.epoch:", ("report/",)),
    Mutation("html-escape", "Html(html.escape(printable(child, NO_BREAK)))", "Html(printable(child, NO_BREAK))",
             ("report/",)),

    # The command line and the screen
    Mutation("modes-distributed", 'mode not in ("train", "evaluate"):', 'mode not in ("train", "evaluate", "predict"):',
             ("cli/", "test_distributed", "test_distributed")),
    Mutation("modes-compressed", 'f"{request.workdir}-compressed"', "request.workdir",
             ("cli/", "compression/", "end_to_end")),
    Mutation("modes-summary", '_names_recipe(values) and values.mode != "summary"', "_names_recipe(values)",
             ("cli/",)),
    Mutation("modes-run-alone", "stored_config(os.path.expanduser(run)) if run and not asks_recipe else None", "None",
             ("cli/",)),
    Mutation("modes-folder-recipe", '"images" in given and given.get("mode", "train") in',
             'given.get("mode", "train") in', ("cli/",)),
    Mutation("modes-runs", "[request.workdir] if request.workdir_given else []", "[]",
             ("cli/", "report/", "end_to_end")),
    Mutation("screen-units", "if size < 1024:", "if size <= 1024:", ("reporter", "test_memory")),
    Mutation("screen-minutes", "{minutes % 60:02}:{rest:02}", "{minutes:02}:{rest:02}", ("reporter",)),
    Mutation("tensorboard-void", "step=step + 1,", "step=step,", ("tensorboard",)),
    Mutation("signals-thread", "if threading.current_thread() is threading.main_thread():", "if True:", ("test_loop",)),
    Mutation("signals-ignored", "if not ignored and (", "if (", ("test_loop",)),
    Mutation("screen-encoding", 'text.encode(self._encoding, "backslashreplace")', 'text.encode("utf-8")',
             ("reporter",)),
    Mutation("screen-closed", "except (OSError, ValueError):  # closed", "except ValueError:  # closed",
             ("reporter",)),
    Mutation("steps-groups", "jnp.mean(x, 0).astype(x.dtype), moved)", "x[0], moved)", ("test_steps",)),
    Mutation("steps-group-keys", "jax.random.split(key, len(groups)))", "jnp.stack([key] * len(groups)))",
             ("test_steps",)),
    Mutation("signals-exit-code", "128 + signum", "127 + signum", ("training/", "end_to_end")),
)


class Found(NamedTuple):
    """A mutation and the file that it changes."""

    mutation: Mutation
    file: str
    text: str
    """The file's mutated contents."""


def find(mutations: Iterable[Mutation]) -> list[Found]:
    """Returns the mutations with their files; ends with a list of all that do not fit the package as they should."""
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
               for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
    tests = test_files(ROOT)
    found, problems = [], [f"{name}: the name is given {count} times" for name, count in
                           Counter(each.name for each in MUTATIONS).items() if count > 1]
    for mutation in mutations:
        places = {file: text.count(mutation.old) for file, text in sources.items() if mutation.old in text}
        if sum(places.values()) != 1:
            where = ", ".join(f"{count} in {file}" for file, count in places.items()) or "nowhere"
            problems.append(f"{mutation.name}: must occur exactly once, and occurs {where}: {mutation.old!r}")
            continue
        file = next(iter(places))
        text = sources[file].replace(mutation.old, mutation.new)
        try:
            compile(text, file, "exec")
        except SyntaxError as error:
            problems.append(f"{mutation.name}: what it makes of {file} is not Python: {error}")
        if not chosen(mutation, tests):
            problems.append(f"{mutation.name}: no test file has one of its words {', '.join(mutation.words)}")
        found.append(Found(mutation, file, text))
    if problems:
        sys.exit("\n".join([f"{len(problems)} problems:", *problems]))
    return found


def test_files(root: Path) -> list[str]:
    """Returns the test files of the tree in `root`."""
    return sorted(path.relative_to(root).as_posix() for path in (root / "tests").rglob("test_*.py"))


def chosen(mutation: Mutation, tests: Sequence[str]) -> list[str]:
    """Returns those of the test files that have one of the mutation's words, in the order of the words."""
    return list(dict.fromkeys(file for word in mutation.words for file in tests
                              if word in file.removeprefix("tests/")))


def copy_tree(target: Path) -> None:
    """Copies what git knows of this tree, or would add, as it lies on disk."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, check=True).stdout.decode()
    for name in dict.fromkeys(filter(None, listed.split("\0"))):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def pytest(root: Path, tests: Sequence[str], options: argparse.Namespace, *, first: bool) -> tuple[str, str]:
    """Runs pytest on `tests` of the tree in `root`, with `first` until one fails.

    Returns:
      Whether one has failed: 'yes', 'no', or 'timeout' where it took too long; and the first one that has.

    Raises:
      SystemExit: it could not run the tests.
    """
    jobs = ["-n", str(options.jobs)] if options.jobs is not None else []
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "--color=no", *jobs, *tests]
    late = threading.Event()
    lines: list[str] = []
    failed = ""
    with subprocess.Popen(command, cwd=root, env=environment(root), text=True, errors="replace", start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        def end() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(options.timeout or threading.TIMEOUT_MAX, lambda: (late.set(), end()))
        timer.start()
        try:
            for line in process.stdout or ():
                lines.append(line)
                if not failed and (found := FAILED.match(line)):
                    failed = next(filter(None, found.groups()))
                    if first:  # pytest's -x would wait for what other workers are at
                        break
        finally:
            timer.cancel()
            end()  # workers, after a stop by Ctrl-C too
    if not first:
        print(*lines[-30:], sep="", end="")
    if not failed and not late.is_set() and process.returncode not in (0, 5):
        sys.exit(f"{''.join(lines[-60:])}\npytest could not run the tests in {root} (exit code {process.returncode})")
    return ("yes" if failed else "timeout" if late.is_set() else "no"), failed


def environment(root: Path) -> dict[str, str]:
    """Returns the environment in which Python imports the package of the tree in `root`."""
    return {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
            "SHARED_BASIS_REFERENCE": str(ROOT.parent / "shared" / "reference"), **os.environ,
            "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}


def judge(found: Found, options: argparse.Namespace) -> tuple[str, str]:
    """Judges a mutation.

    Returns:
      Whether it is caught: 'yes', 'no', 'timeout', or 'broken' where the mutated file cannot be imported; and the first
      test that failed, or the test file that could not be imported though the mutated file could.
    """
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        root = Path(directory).resolve()
        copy_tree(root)
        (root / found.file).write_text(found.text, encoding="utf-8")
        tests = test_files(root)
        first = chosen(found.mutation, tests)
        rest = [] if options.first_only else [file for file in tests if file not in first]
        for part in filter(None, (first, rest)):
            caught, test = pytest(root, part, options, first=True)
            if caught == "yes" and "::" not in test and not imports(root, found.file):
                caught = "broken"
            if caught != "no":
                return caught, test
    return "no", ""


def imports(root: Path, file: str) -> bool:
    """Returns whether a file of the package can be imported in the tree in `root`."""
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return subprocess.run([sys.executable, "-c", f"import {module}"], cwd=root, env=environment(root),
                          capture_output=True).returncode == 0


def commit() -> str:
    """Returns the commit that the tree is at, with '-dirty' where it differs from that."""
    return subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, text=True,
                          capture_output=True, check=True).stdout.strip()


def read(file: Path) -> list[dict[str, str]]:
    """Returns the rows of a file of results; none where there is no file."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def append(file: Path, row: dict[str, str]) -> None:
    """Adds a row to a file of results."""
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def run(found: Sequence[Found], options: argparse.Namespace) -> None:
    """Judges the mutations that the file of results has not got yet."""
    known = {row["name"] for row in read(options.out)} if options.out else set()
    left = [each for each in found if each.mutation.name not in known]
    version = commit()
    for number, each in enumerate(left, start=1):
        began = time.monotonic()
        caught, test = judge(each, options)
        seconds = f"{time.monotonic() - began:.0f}"
        row = dict(zip(COLUMNS, (each.mutation.name, each.file, caught, test, seconds, version), strict=True))
        if options.out:
            append(options.out, row)
        print(f"{number}/{len(left)}  {row['name']}  caught: {caught}  {test}  {seconds} s", flush=True)


def control(file: Path, options: argparse.Namespace) -> None:
    """Runs the tests that caught a mutation by `file` on the package as it is; none of them may fail there."""
    tests = sorted({row["test"] for row in read(file) if row["test"]})
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        root = Path(directory).resolve()
        copy_tree(root)
        caught, test = pytest(root, tests, options, first=False) if tests else ("no", "")
    if caught != "no":
        sys.exit(f"without any mutation: {test or caught}. What such a test has caught means nothing.")


def table(files: Sequence[Path]) -> str:
    """Returns one or two files of results beside each other, in Markdown."""
    results = [{row["name"]: row for row in read(file)} for file in files]
    names = list(dict.fromkeys(name for found in results for name in found))
    heads = ["result"] if len(files) == 1 else ["before", "after"]

    def cell(row: dict[str, str] | None) -> str:
        if row is None:
            return "–"
        if row["caught"] != "yes":
            return "**not caught**" if row["caught"] == "no" else f"**{row['caught']}**"
        return f"`{row['test']}`".replace("|", "\\|")

    lines = [f"| mutation | file | {' | '.join(heads)} |", f"| --- | --- |{' --- |' * len(heads)}"]
    for name in names:
        rows = [found.get(name) for found in results]
        file = next(row["file"] for row in reversed(rows) if row)
        lines.append(f"| {name} | {file} | {' | '.join(map(cell, rows))} |")
    totals = [f"{sum(row['caught'] == 'yes' for row in found.values())} of {len(found)}" for found in results]
    lines.append(f"| caught | | {' | '.join(totals)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Returns what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only see whether each mutation fits the package")
    parser.add_argument("--only", default="", metavar="NAME,…", help="these mutations alone")
    parser.add_argument("--jobs", metavar="N", help="processes of pytest-xdist; by default as pyproject.toml says")
    parser.add_argument("--first-only", action="store_true", help="only the test files that a mutation's words choose")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for each run of pytest; by default none")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="results; mutations that it holds are passed over")
    parser.add_argument("--control", action="store_true", help="run the tests named in --out on the package as it is")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE.csv", help="print one or two files as a table")
    options = parser.parse_args()
    if options.table and len(options.table) > 2:
        parser.error("--table takes one or two files")
    if options.control and not (options.out and options.out.exists()):
        parser.error("--control needs --out=FILE.csv with results")
    if unknown := set(filter(None, options.only.split(","))) - {each.name for each in MUTATIONS}:
        parser.error(f"--only: no mutations of the names {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    """Does what the command line asks for."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that nothing is left running, or lying about
    if options.table:
        print(table(options.table))
        return
    if options.control:
        control(options.out, options)
        return
    only = set(filter(None, options.only.split(",")))
    found = find(each for each in MUTATIONS if not only or each.name in only)
    if options.check:
        areas = Counter(each.mutation.name.partition("-")[0] for each in found)
        print(f"{len(found)} mutations of {len({each.file for each in found})} files: "
              + ", ".join(f"{area} {count}" for area, count in areas.items()))
        return
    run(found, options)


if __name__ == "__main__":
    main()
