"""A small shared-basis ResNet on scikit-learn's handwritten digits: the embedded default.

    python main.py

trains ResNet-20 S8U1* (double sharing) on 1,442 real 8×8 images and tests on the other 355. It runs offline, in
about half a minute on two CPU cores with compilation. Another network: `--config=configs/digits_resnet.py:resnet20`.
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


def get_config(variant: str = "resnet20-s8u1-double") -> ConfigDict:
    """Returns the recipe for the network `variant`."""
    return to_config_dict(Config(
        name=f"digits_resnet-{variant}",
        model=ModelConfig(name=variant),
        data=DataConfig(name="digits", mean=(0.3,), std=(0.38,), pad=1),
        orthogonality=OrthogonalityConfig(weight=10.0, elements="shared+unique"),
        optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=5e-4, schedule="cosine", warmup_epochs=1.0),
        train=TrainConfig(epochs=24, batch_size=64, eval_batch_size=360, evaluate_every=4),
    ))
