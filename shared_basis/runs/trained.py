"""A trained network, opened from a checkpoint of a run."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from shared_basis import data
from shared_basis.config import Config, DataConfig, replace
from shared_basis.data.augment import normalize
from shared_basis.errors import UserError
from shared_basis.models import Network, create_model
from shared_basis.models.parameters import abstract_variables
from shared_basis.nn import ops
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.workdir import FILES, Workdir
from shared_basis.runtime import memory
from shared_basis.runtime.distributed import make_mesh, platform_of, replicated
from shared_basis.runtime.files import Place
from shared_basis.runtime.reporter import Reporter

Variables = Mapping[str, Any]


def build_model(config: Config, spec: data.Spec) -> Network:
    """Returns the network of `config` for data of `spec`.

    Raises:
      UserError: see `create_model`; or the normalisation does not match the channels of the images.
    """
    channels = spec.image_shape[2]
    for field in ("mean", "std"):
        values = getattr(config.data, field)
        if not values:
            raise UserError(f"data.{field} is empty, and only measured when training begins; set it. Published weights "
                            "use ImageNet's, --config.data.mean='(0.485,0.456,0.406)' "
                            "--config.data.std='(0.229,0.224,0.225)'.")
        if len(values) not in (1, channels):
            raise UserError(f"data.{field}={values}: the images have {channels} channel{'s' * (channels > 1)}; set "
                            "one value, or one per channel.")
    return create_model(config.model.name, num_classes=len(spec.classes), stem=config.model.stem,
                        dtype=jnp.dtype(config.model.dtype),
                        scan_blocks={"auto": None, "yes": True, "no": False}[config.model.scan_blocks])


def predict_logits(model: nn.Module, variables: Variables, images: jax.Array, config: DataConfig) -> jax.Array:
    """Returns logits, float32 `[N, classes]`, of images uint8 `[N, H, W, C]`, normalised as in `config`.

    Args:
      variables: `params` and `batch_stats`, whose running statistics are used.
    """
    logits: Any = model.apply(variables, normalize(images, config), train=False)
    return logits


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network: a checkpoint of a run, with its variables on the devices."""

    run: Workdir
    config: Config
    """The run's configuration with the caller's overrides."""
    spec: data.Spec
    mesh: Mesh
    checkpoints: Checkpoints
    step: int
    """The step of the checkpoint."""
    model: Network
    variables: Variables
    """`params` and `batch_stats`."""
    own_images: DataConfig
    """The run's own data configuration: where its images are and how they were split."""
    images: DataConfig
    """The data configuration of the images to score, from `config`; see `open_source`."""
    files: str | None
    """The fingerprint of the run's own folder of images when the run began; None if unknown or not a folder."""

    @classmethod
    def open(cls, workdir: Place, which: str = "latest", overrides: Mapping[str, Any] | None = None) -> Trained:
        """Restores the checkpoint `which` ('latest', 'best' or a step number) of the run in `workdir`.

        Args:
          overrides: fields of the run's configuration to replace, by dotted path: those of `data`, e.g. if the images
            have moved, and `train.eval_batch_size`. See `open_source` for the effect of another folder.

        Raises:
          UserError: no such run or checkpoint, or it is damaged or of a different network, or an override is invalid.
        """
        run = Workdir(workdir)
        config, record = run.load()
        for path in overrides or {}:
            if not path.startswith("data.") and path != "train.eval_batch_size":
                raise UserError(f"--config.{path} cannot be changed for the trained run in {run.path}; only the fields "
                                "of data and train.eval_batch_size can.")
        own, config = config.data, replace(config, overrides or {})
        mesh = make_mesh()
        with memory.oom_as_user_error(config, "train.eval_batch_size"):
            checkpoints = Checkpoints(run.checkpoints, read_only=True)
            step = checkpoints.find(which)
            spec = data.Spec(tuple(record["data"]["image_shape"]), tuple(record["data"]["classes"]))
            model = build_model(config, spec)
            variables = _restore(checkpoints, step, config, model, spec, mesh)
        files = record["data"].get(FILES)
        other = _is_another_folder(config.data, own, files)
        images = _all_of_it(config.data, spec, overrides or {}) if other else config.data
        return cls(run, config, spec, mesh, checkpoints, step, model, variables, own, images, files)

    def at(self, step: int) -> Trained:
        """Restores another checkpoint of the same run.

        Raises:
          UserError: the checkpoint is damaged.
        """
        variables = _restore(self.checkpoints, step, self.config, self.model, self.spec, self.mesh)
        return dataclasses.replace(self, step=step, variables=variables)

    def open_source(self, reporter: Reporter | None = None) -> data.Source:
        """Opens the run's test images, or those of another folder given by the overrides.

        All images of another folder are test images, unless it has split directories or `data.test` is overridden too.
        They are resized to the run's size and converted to its channels. See also `warn_if_redrawn`.

        Raises:
          UserError: see `data.open_source`; the images must have the run's classes.
        """
        source = data.open_source(self.images, ("test",), self.spec, reporter)
        if reporter is None:
            return source
        own = self.own_images
        warn_if_redrawn(source, self.images, own, self.files, reporter)
        if self.images is not self.config.data:
            gone = own.name == "folder" and not os.path.isdir(os.path.expanduser(own.directory))
            moved = (f"; if it is the same folder, moved, --config.data.test={own.test:g} scores only its test part"
                     if gone else "")
            reporter.info(f"{self.images.directory} is another folder than the run's own ({own.directory or own.name}):"
                          f" all its images are scored, or those in test/ or val/ if present{moved}")
        return source

    def on_cpu(self) -> Trained:
        """Returns the same network on one CPU device, in float32 regardless of the run's dtype, with unrolled blocks.

        Serves as the reference for exported files.

        Raises:
          UserError: JAX_PLATFORMS excludes the CPU.
        """
        try:
            mesh = Mesh(np.array(jax.local_devices(backend="cpu")[:1]), ("data",))
        except RuntimeError as error:
            platforms = os.environ.get("JAX_PLATFORMS", "")
            raise UserError(f"exported files are computed on the CPU, which JAX_PLATFORMS={platforms!r} excludes: set "
                            f"JAX_PLATFORMS={platforms},cpu, or unset it.") from error
        model = self.model.clone(dtype=jnp.float32, scan_blocks=False)
        return dataclasses.replace(self, mesh=mesh, model=model, variables=jax.device_get(dict(self.variables)))

    def require_finite(self) -> None:
        """Raises `UserError`, naming the array, unless all weights are finite."""
        require_finite_weights(self.variables, f"the run in {self.run.path}", self.step)

    def classifier(self) -> Callable[[jax.Array | np.ndarray], jax.Array]:
        """Returns the compiled function from images uint8 `[N, H, W, C]` to logits float32 `[N, classes]`."""
        @ops.jit_for(platform_of(self.mesh), out_shardings=replicated(self.mesh))
        def classify(variables: Variables, images: jax.Array) -> jax.Array:
            return predict_logits(self.model, variables, images, self.config.data)

        return functools.partial(classify, self.variables)


def require_finite_weights(variables: Variables, where: str, step: int | None) -> None:
    """Raises `UserError`, naming the array, unless all `variables` of checkpoint `step` are finite."""
    for path, leaf in flatten_dict(dict(variables)).items():
        if not np.isfinite(np.asarray(leaf)).all():
            of = "" if step is None else f" of checkpoint {step}"
            raise UserError(f"{where}: {'/'.join(path)}{of} is not finite; choose other weights, e.g. another "
                            "checkpoint of a run.")


class LoadedRun(NamedTuple):
    """The result of `load_run`: `model, variables, classes = load_run(workdir)`."""

    model: Network
    """Maps images float32 `[N, H, W, C]`, normalised like the run's, to logits `[N, classes]`."""
    variables: Variables
    """`params` and `batch_stats` (empty without batch normalisation), on all devices."""
    classes: tuple[str, ...]
    """The names of the classes, in the order of the logits."""


def load_run(workdir: str | os.PathLike[str], checkpoint: str | int = "latest") -> LoadedRun:
    """Returns the network of the run in `workdir`, as saved at `checkpoint`.

        model, variables, classes = load_run("runs/digits_resnet-resnet20-s8u1-double", "best")
        logits = model.apply(variables, images, train=False)

    Images must be normalised as `(pixels / 255 - mean) / std` with `data.mean` and `data.std` of the run's
    configuration, stored in `run.json`. A user-defined network must be registered first; see `register_network`.

    Args:
      checkpoint: 'latest', 'best' or a step number.

    Raises:
      UserError: there is no such run or checkpoint, it is damaged, or its network is unknown.
    """
    trained = Trained.open(os.fspath(workdir), str(checkpoint))
    return LoadedRun(trained.model, trained.variables, trained.spec.classes)


def warn_if_redrawn(source: data.Source, config: DataConfig, own: DataConfig, files: str | None,
                    reporter: Reporter) -> None:
    """Warns if the test images of a run were drawn again from its own folder, whose files have changed.

    Args:
      source: the images to score, of `config`.
      own, files: the run's own data configuration and fingerprint; see `Trained`.
    """
    if source.single_tree and files and _place(config) == _place(own) and not _has_files(own, config.directory, files):
        reporter.warn(f"the files in {config.directory} have changed since the run began: its test images are drawn "
                      "again, and may include training images.")


def _is_another_folder(config: DataConfig, own: DataConfig, files: str | None) -> bool:
    """Returns whether the images of `config` are a different folder from the run's `own`, which may have been moved."""
    if config.name != "folder" or _place(config) == _place(own):
        return False
    return own.name != "folder" or not files or not _has_files(own, config.directory, files)


def _place(images: DataConfig) -> str:
    return os.path.realpath(os.path.expanduser(images.directory)) if images.name == "folder" else ""


def _has_files(own: DataConfig, directory: str, files: str) -> bool:
    """Returns whether `directory`, split as in `own`, has the fingerprint `files`."""
    try:
        source = data.open_source(dataclasses.replace(own, directory=directory))
    except UserError:  # not valid for training, but possibly for scoring
        return False
    return data.fingerprint(source.splits) == files


def _all_of_it(config: DataConfig, spec: data.Spec, overrides: Mapping[str, Any]) -> DataConfig:
    """Returns `config` for all images of its folder, resized to the size of `spec`, unless overridden."""
    fields: dict[str, Any] = {"test": 1.0, "test_examples": 0, "image_size": config.image_size or spec.image_shape[0]}
    return dataclasses.replace(config, **{field: value for field, value in fields.items()
                                          if f"data.{field}" not in overrides})


def _restore(checkpoints: Checkpoints, step: int, config: Config, model: Network, spec: data.Spec,
             mesh: Mesh) -> Variables:
    """Returns the variables of `step` to evaluate: their moving averages if the run has them."""
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
                          dict(abstract_variables(model, spec.image_shape)))
    if config.train.ema_decay:
        return checkpoints.restore_variables(step, {"averaged": target})["averaged"]
    return checkpoints.restore_variables(step, target)
