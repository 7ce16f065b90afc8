"""The published CIFAR-10 recipe for ResNets 20 to 110 (Kang & Kim, section 4.2).

    python main.py --config=configs/cifar_resnet.py:resnet56-s16u1-double

Published top-1 error of this command's network: 6.30 % (best test epoch of a single run). Others: ResNet-32 S8U1 8.08,
S16U1 7.43, S16U1* 6.93; ResNet-56 S8U1 7.52, S16U1 7.46 (* is double sharing). Without the original data set, train on
a directory of its images with `--images=DIR`. If the number of epochs changes, e.g. `--config.train.epochs=30`, the
learning rate decays at the same fractions of the run.
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


def get_config(variant: str = "resnet56-s16u1-double") -> ConfigDict:
    """Returns the recipe for the network `variant`, e.g. resnet56, resnet56-s16u1 or resnet56-s16u1-double."""
    return to_config_dict(Config(
        name=f"cifar_resnet-{variant}",
        model=ModelConfig(name=variant, stem="cifar"),
        # The official code normalises CIFAR-10 with ImageNet's statistics.
        data=DataConfig(name="cifar10", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), pad=4, flip=True),
        # The paper penalises unique elements only for CIFAR-10; elsewhere only shared ones.
        orthogonality=OrthogonalityConfig(weight=10.0, elements="shared+unique", reduction="mean"),
        optimizer=OptimizerConfig(learning_rate=0.1, momentum=0.9, weight_decay=5e-4, schedule="piecewise",
                                  boundaries=(0.5, 0.75), factors=(0.1, 0.1)),
        train=TrainConfig(epochs=300, batch_size=256),
    ))
