"""The networks that the paper reports, with their published errors, as a table: `python -m studies.published`.

They are followed by compact networks that are not in the paper, without published errors.

Parameters and multiply-accumulates are computed; only errors are quoted (Kang & Kim; top-1 error at the best test
epoch, apparently of single runs; top-1 / top-5 for ImageNet).
"""

from __future__ import annotations

from typing import NamedTuple

from shared_basis.config import ModelConfig
from shared_basis.models.summary import compare_with_plain


class Published(NamedTuple):
    """A network as reported in the paper."""

    dataset: str
    name: str
    error: str = ""
    """In percent; empty if the paper gives none, or text if it does not have the network."""


PUBLISHED = (
    Published("CIFAR-10", "resnet32"),
    Published("CIFAR-10", "resnet32-s8u1", "8.08"),
    Published("CIFAR-10", "resnet32-s16u1", "7.43"),
    Published("CIFAR-10", "resnet32-s16u1-double", "6.93"),
    Published("CIFAR-10", "resnet56"),
    Published("CIFAR-10", "resnet56-s8u1", "7.52"),
    Published("CIFAR-10", "resnet56-s16u1", "7.46"),
    Published("CIFAR-10", "resnet56-s16u1-double", "6.30"),
    Published("CIFAR-100", "resnet34", "≈22.5"),
    Published("CIFAR-100", "resnet34-s8u1", "23.11"),
    Published("CIFAR-100", "resnet34-s16u1", "22.64"),
    Published("CIFAR-100", "resnet34-s32u1", "21.79"),
    Published("CIFAR-100", "resnet34-s16u0", "23.43"),
    Published("CIFAR-100", "resnet34-s32u0", "22.32"),
    Published("CIFAR-100", "resnet34-s0u16", "23.26"),
    Published("CIFAR-100", "resnet34-s0u32", "23.00"),
    Published("CIFAR-100", "densenet121-s64u4", "22.15"),
    Published("CIFAR-100", "resnext50_32x4d-s64u4", "20.09"),
    Published("CIFAR-100", "mobilenetv2-shared", "27.70"),
    Published("CIFAR-100", "mobilenetv2-shared++", "27.54"),
    Published("ImageNet", "resnet34-s32u1", "27.83 / 9.42"),
    Published("ImageNet", "resnet34-s48u1", "27.88 / 9.29"),
    Published("ImageNet", "resnet34-s32u1-double", "27.20 / 8.93"),
    Published("ImageNet", "resnet34-s48u1-double", "26.67 / 8.54"),
    Published("ImageNet", "resnet50-shared", "23.64 / 6.98"),
    Published("ImageNet", "resnet50-shared++", "23.95 / 7.14"),
    Published("ImageNet", "resnet101-shared", "22.31 / 6.47"),
    Published("ImageNet", "mobilenetv2-shared", "27.61 / 9.34"),
    Published("ImageNet", "mobilenetv2-shared++", "28.21 / 9.85"),
)
"""In the paper's order."""

OTHERS = tuple(Published("ImageNet", name, "not in the paper") for name in (
    "mobilenetv1", "mobilenetv1-shared", "mobilenetv1-s64u4", "mobilenetv2-s8u1",
    "shufflenetv1_g3", "shufflenetv1_g3-shared", "shufflenetv1_g3-shared++",
    "shufflenetv2_x1_0", "shufflenetv2_x1_0-shared", "shufflenetv2_x1_0-shared++", "shufflenetv2_x1_0-s16u1-double",
    "efficientnet_b0", "efficientnet_b0-shared", "efficientnet_b0-shared++", "efficientnet_b0-s16u1"))
"""Compact networks that are not in the paper."""

_DATASETS = {"CIFAR-10": (10, 32, "cifar"), "CIFAR-100": (100, 32, "cifar"), "ImageNet": (1000, 224, "imagenet")}
"""Classes, image size and stem of each data set."""


def table() -> str:
    """Returns the table in Markdown."""
    lines = ["| data | network | parameters | fewer than plain | MACs | fewer than plain | published error % |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in (*PUBLISHED, *OTHERS):
        classes, size, stem = _DATASETS[row.dataset]
        counts = compare_with_plain(ModelConfig(name=row.name, stem=stem), classes, (size, size, 3))
        saving = {key: f"{100 * value:.1f} %" for key, value in counts["saving"].items()}
        lines.append(f"| {row.dataset} | `{row.name}` | {counts['parameters']:,} | {saving['parameters']} | "
                     f"{counts['macs']:,} | {saving['macs']} | {row.error or '–'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
