"""Compact networks on ImageNet that the paper does not evaluate: MobileNet, ShuffleNet, EfficientNet.

    python main.py --config=configs/compact.py:mobilenetv1-shared

The paper mentions MobileNets and ShuffleNets; EfficientNet is widely deployed. There are no published errors of the
shared forms, and this recipe has not been run yet. All networks use the same recipe, so that plain and shared forms are
comparable: that of ShuffleNet V2 (Ma et al. 2018), with five epochs of warm-up and a cosine schedule instead of linear
decay; weight decay excludes normalisation and biases, as there. Others:

    mobilenetv1-s64u4          shufflenetv1_g3-shared     shufflenetv1_g3-shared++
    shufflenetv2_x1_0-shared   shufflenetv2_x1_0-shared++ shufflenetv2_x1_0-s16u1-double
    efficientnet_b0-shared     efficientnet_b0-shared++   mobilenetv2-s8u1

`configs/cifar100.py` supports the same networks for small images.
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


def get_config(variant: str = "mobilenetv1-shared") -> ConfigDict:
    """Returns the recipe for the network `variant`: of MobileNet V1 and V2, ShuffleNet V1 and V2, EfficientNet-B0."""
    return to_config_dict(Config(
        name=f"compact-{variant}",
        model=ModelConfig(name=variant, stem="imagenet"),
        data=DataConfig(name="imagenet2012", image_size=224, crop="random_resized", mean=(0.485, 0.456, 0.406),
                        std=(0.229, 0.224, 0.225), flip=True),
        orthogonality=OrthogonalityConfig(weight=10.0, elements="shared", reduction="mean"),
        optimizer=OptimizerConfig(learning_rate=0.5, momentum=0.9, weight_decay=4e-5, schedule="cosine",
                                  weight_decay_labels=("basis", "coefficients", "kernel"), warmup_epochs=5.0),
        train=TrainConfig(epochs=240, batch_size=1024),
    ))
