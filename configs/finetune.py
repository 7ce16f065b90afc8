"""Fine-tuning on a directory of images: first the head, then all layers, with a lower learning rate than from scratch.

    python main.py --config=configs/finetune.py:resnet34-s32u1 --images=DIR --init=RUN

starts from the weights of a run, or of a file: `--init=FILE` (docs/finetune.md). Images are normalised as for those
weights. Networks for small images use 32×32 pixels, all others 224×224. To train all layers from the start:
`--config.train.freeze=`; only the head: `--config.train.freeze_epochs=0.0`, and with few images
`--config.train.freeze_statistics=True`.
"""

from ml_collections import ConfigDict

from shared_basis.config import (
    AUTO_VALIDATION,
    FOLDER,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OrthogonalityConfig,
    TrainConfig,
    is_for_small_images,
    to_config_dict,
)


def get_config(variant: str = "resnet34-s32u1") -> ConfigDict:
    """Returns the recipe for the network `variant`."""
    small = is_for_small_images(variant)
    images = {"image_size": 32, "pad": 4} if small else {"image_size": 224, "crop": "random_resized"}
    config = to_config_dict(Config(
        model=ModelConfig(name=variant, stem="cifar" if small else "imagenet"),
        data=DataConfig(name="folder", directory=FOLDER, mean=(), std=(), flip=True, validation=AUTO_VALIDATION,
                        **images),
        orthogonality=OrthogonalityConfig(weight=10.0, elements="shared"),
        optimizer=OptimizerConfig(learning_rate=0.01, learning_rate_factors="head/**=10", weight_decay=1e-4,
                                  weight_decay_labels=("basis", "coefficients", "kernel"), schedule="cosine",
                                  warmup_epochs=1.0),
        train=TrainConfig(epochs=20, batch_size=0, eval_batch_size=256, freeze="**,!head/**", freeze_epochs=2.0,
                          label_smoothing=0.1, ema_decay=0.999),
    ))
    config.name, config.data.directory = f"{FOLDER}-finetuned-{variant}", ""  # --images sets the folder
    return config
