"""CIFAR-10, CIFAR-100 (fine labels) and Fashion-MNIST by TensorFlow Datasets (TFDS), without TensorFlow.

They are read where TFDS finds them prepared, and prepared there first if need be: from files in
`data.manual_directory`, or by download. TFDS verifies the checksums of either.

`tensorflow_datasets` is slow to import, so it is imported only to load images.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_basis.config import DataConfig
from shared_basis.data.splits import Spec, Split, choose
from shared_basis.errors import UserError

BLOCK = 1000
"""Images that are read at once: faster than one by one, and short of holding all of them twice."""

PROBE_SECONDS = 5
"""How long a server may take to answer before a download counts as impossible. TFDS itself tries for minutes."""

_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree
wolf woman worm
"""

SPECS = {
    "cifar10": Spec((32, 32, 3), ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                                  "truck")),
    "cifar100": Spec((32, 32, 3), tuple(_CIFAR100.split())),
    "fashion_mnist": Spec((28, 28, 1), ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt",
                                        "Sneaker", "Bag", "Ankle boot")),
}
"""Fixed here, since TFDS knows CIFAR's class names only once it has the data; `load` compares them with the data."""


def describe(config: DataConfig) -> Spec:
    """Returns the spec, which is fixed."""
    return SPECS[config.name]


def load(config: DataConfig, names: Sequence[str]) -> dict[str, Split]:
    """Reads the splits `names`, in the order of TFDS; prepares the data set first where it is not.

    Raises:
      UserError: the data is neither prepared nor can be, prepared data is damaged, or fewer images exist than asked
        for.
    """
    builder = _builder(config)
    if not builder.data_path.exists():
        _prepare(builder, config)
    elif not builder.is_prepared():
        raise _damaged(builder, "it holds no metadata")
    try:
        sources = _open(builder, config.name, names)
        counts = {name: len(sources[name]) for name in names}
    except NotImplementedError as error:  # TFDS says so in several lines that send the user elsewhere
        raise UserError(f"the data in {builder.data_dir} is in a format that only TensorFlow reads; set another "
                        "--config.data.directory to have it prepared there as ArrayRecord.") from error
    except Exception as error:  # whatever damage does to the metadata
        raise _damaged(builder, _one_line(error)) from error
    chosen = choose(config, counts)
    try:
        return {name: _read(sources[name], chosen[name], SPECS[config.name]) for name in names}
    except Exception as error:  # ArrayRecord and the image decoders raise many types for broken data
        raise _damaged(builder, _one_line(error)) from error


def _builder(config: DataConfig) -> Any:
    from shared_basis.data.tfds_builders import BUILDERS

    directory = os.path.expanduser(config.directory) or None
    try:
        return BUILDERS[config.name](data_dir=directory)
    except Exception as error:  # it reads the metadata of prepared data, which may be damaged
        raise UserError(f"cannot read the {config.name} that is prepared in {directory or 'the TFDS data directory'}: "
                        f"{_one_line(error)}; delete it there to have it prepared again.") from error


def _open(builder: Any, name: str, names: Sequence[str]) -> dict[str, Any]:
    """Returns TFDS data sources by split."""
    classes = tuple(builder.info.features["label"].names)
    if classes != SPECS[name].classes:
        raise ValueError(f"its classes are {', '.join(classes)}")
    return {split: builder.as_data_source(split) for split in names}


def _read(source: Any, indices: np.ndarray, spec: Spec) -> Split:
    """Returns the examples `indices` of a data source."""
    images = np.empty((len(indices), *spec.image_shape), np.uint8)
    labels = np.empty(len(indices), np.int32)
    for start in range(0, len(indices), BLOCK):
        examples = source.__getitems__(indices[start:start + BLOCK].tolist())
        for row, example in enumerate(examples, start):
            images[row], labels[row] = example["image"], example["label"]
    return Split(images, labels)


def _damaged(builder: Any, reason: str) -> UserError:
    return UserError(f"cannot read the prepared data in {builder.data_dir}: {reason}; delete that directory to have it "
                     "prepared again, or set another --config.data.directory.")


def _prepare(builder: Any, config: DataConfig) -> None:
    """Writes the data set as ArrayRecord into the TFDS data directory; a failure leaves no directory of that name."""
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.util import DownloadError

    manual = os.path.expanduser(config.manual_directory) or None
    if manual and not os.path.isdir(manual):
        raise UserError(f"data.manual_directory={config.manual_directory!r}: no such directory; it must hold the "
                        f"source files of {config.name}.")
    _check_sources(builder, config, manual)
    print(f"Preparing {config.name} in {builder.data_dir}", file=sys.stderr, flush=True)
    options = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TFDS prints; standard output is for results
            builder.download_and_prepare(download_config=options, file_format="array_record")
    except NonMatchingChecksumError as error:
        raise UserError(f"{str(error).splitlines()[0].rstrip(':')}; it is not the published file: delete it and get it "
                        "again.") from error
    except (OSError, DownloadError, requests.RequestException) as error:
        raise UserError(f"cannot prepare {config.name} in {builder.data_dir}: {_one_line(error)}.") from error


def _check_sources(builder: Any, config: DataConfig, manual: str | None) -> None:
    """Raises `UserError` if a source file is neither in `manual`, nor downloaded before, nor can be downloaded."""
    from tensorflow_datasets.core.download import checksums, resource

    known = checksums.get_all_url_infos()
    downloads = Path(builder.data_dir_root) / "downloads" / config.name
    missing = {url: known[url] for url in builder.source_urls()
               if not (manual and os.path.exists(os.path.join(manual, known[url].filename)))
               and not (downloads / resource.get_dl_fname(url, known[url].checksum)).exists()}
    problem = next(filter(None, map(_probe, missing)), None)
    if problem:
        files = ", ".join(f"{info.filename} ({int(info.size)} bytes)" for info in missing.values())
        origin = os.path.dirname(next(iter(missing)))
        raise UserError(
            f"{config.name} is not prepared in {builder.data_dir_root}, and a download fails ({problem}). Missing: "
            f"{files} from {origin}/. Put them into a directory and set --config.data.manual_directory=DIR, or train "
            "on a directory of image files: --config.data.name=folder --config.data.directory=DIR.")


def _probe(url: str) -> str:
    """Returns why `url` cannot be downloaded, or an empty string if its server begins to send it."""
    import requests

    try:
        with requests.get(url, stream=True, timeout=PROBE_SECONDS) as response:
            return "" if response.ok else f"{response.status_code} {response.reason}"
    except requests.RequestException as error:
        return type(error).__name__


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
