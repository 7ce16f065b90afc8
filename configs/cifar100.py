"""The published CIFAR-100 recipe (Kang & Kim, section 4.2) for all of its networks.

    python main.py --config=configs/cifar100.py:resnet34-s32u1

Published top-1 error of this command's network: 21.79 % (best test epoch of a single run). Others:

    resnet34 (plain) ≈22.5    resnet34-s8u1 23.11     resnet34-s16u1 22.64
    resnet34-s16u0 23.43      resnet34-s32u0 22.32    resnet34-s0u16 23.26     resnet34-s0u32 23.00
    densenet121-s64u4 22.15   resnext50_32x4d-s64u4 20.09 (printed S16U1)
    mobilenetv2-shared 27.70  mobilenetv2-shared++ 27.54
"""

from ml_collections import ConfigDict

from shared_basis.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OrthogonalityConfig,
    TrainConfig,
    to_config_dict,
)


def get_config(variant: str = "resnet34-s32u1") -> ConfigDict:
    """Returns the recipe for `variant`: a ResNet-18 or 34, DenseNet-121, ResNeXt-50, or a network of compact.py."""
    return to_config_dict(Config(
        name=f"cifar100-{variant}",
        model=ModelConfig(name=variant, stem="cifar"),
        data=DataConfig(name="cifar100", mean=(0.507, 0.487, 0.441), std=(0.267, 0.256, 0.276), pad=4, flip=True),
        orthogonality=OrthogonalityConfig(weight=10.0, elements="shared", reduction="mean"),
        optimizer=OptimizerConfig(learning_rate=0.1, momentum=0.9, weight_decay=5e-4, schedule="piecewise",
                                  boundaries=(0.5, 0.75), factors=(0.1, 0.1)),
        train=TrainConfig(epochs=300, batch_size=256),
    ))
