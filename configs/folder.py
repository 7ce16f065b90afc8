"""A folder of photographs with one directory per class, and any network of this package.

    python main.py --config=configs/folder.py:resnet20-s8u1-double --images=DIR

DIR contains <class>/*, or train/<class>/* and test/<class>/*. `--images=DIR` without `--config` selects this recipe.
The run is named after the folder: runs/DIR-resnet20-s8u1-double. From a single tree, a fifth of each class is held out
for testing, and a tenth of the rest to choose the best checkpoint. Mean, standard deviation and batch size are chosen
from the images.

Networks for small images use 32×32 pixels: first results within minutes on a CPU. Those for large images, such as
`configs/folder.py:resnet34-s32u1`, use 224×224 and need a GPU. To change the size: `--config.data.image_size=64`. To
change the number of epochs, `--config.train.epochs=30` is enough, as the schedule is in fractions of the run.
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


def get_config(variant: str = "resnet20-s8u1-double") -> ConfigDict:
    """Returns the recipe for the network `variant`; set the folder with --images."""
    small = is_for_small_images(variant)
    config = to_config_dict(Config(
        model=ModelConfig(name=variant, stem="cifar" if small else "imagenet"),
        # At 224 pixels, training images are random crops of the photographs, as in the published ImageNet recipe.
        data=DataConfig(name="folder", directory=FOLDER, image_size=32 if small else 224,
                        crop="center" if small else "random_resized", mean=(), std=(), pad=4 if small else 0, flip=True,
                        validation=AUTO_VALIDATION),
        orthogonality=OrthogonalityConfig(weight=10.0, elements="shared", reduction="mean"),
        optimizer=OptimizerConfig(learning_rate=0.05, momentum=0.9, weight_decay=5e-4, schedule="cosine"),
        train=TrainConfig(epochs=100, batch_size=0, eval_batch_size=500 if small else 100, evaluate_every=5),
    ))
    config.name, config.data.directory = f"{FOLDER}-{variant}", ""  # --images sets the folder
    return config
