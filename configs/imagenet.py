"""The published ImageNet recipes (Kang & Kim, section 4.1): one for the ResNets, one for MobileNetV2.

    python main.py --config=configs/imagenet.py:resnet34-s32u1

Published top-1 / top-5 error of this command's network: 27.83 / 9.42 %. Others:

    resnet34-s48u1 27.88 / 9.29            resnet34-s32u1-double 27.20 / 8.93   resnet34-s48u1-double 26.67 / 8.54
    resnet50-shared 23.64 / 6.98           resnet50-shared++ 23.95 / 7.14       resnet101-shared 22.31 / 6.47
    mobilenetv2-shared 27.61 / 9.34        mobilenetv2-shared++ 28.21 / 9.85
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
    """Returns the recipe for the network `variant`: of ResNet-18, 34, 50 and 101, or MobileNetV2."""
    mobile = variant.startswith("mobilenet")
    if mobile:
        # ÷10, ÷10, and ÷2 for the last 15 epochs.
        epochs, boundaries, factors, decay = 300, (0.5, 0.75, 0.95), (0.1, 0.1, 0.5), 1e-5
    else:
        # Only ResNet-50-Shared was published with a weaker decay.
        decay = 4e-5 if variant == "resnet50-shared" else 1e-4
        epochs, boundaries, factors = 150, (60 / 150, 100 / 150, 140 / 150), (0.1, 0.1, 0.1)
    return to_config_dict(Config(
        name=f"imagenet-{variant}",
        model=ModelConfig(name=variant, stem="imagenet"),
        data=DataConfig(name="imagenet2012", image_size=224, crop="random_resized", mean=(0.485, 0.456, 0.406),
                        std=(0.229, 0.224, 0.225), flip=True),
        orthogonality=OrthogonalityConfig(weight=10.0, elements="shared", reduction="mean"),
        optimizer=OptimizerConfig(learning_rate=0.1, momentum=0.9, weight_decay=decay, schedule="piecewise",
                                  boundaries=boundaries, factors=factors),
        train=TrainConfig(epochs=epochs, batch_size=256),
    ))
