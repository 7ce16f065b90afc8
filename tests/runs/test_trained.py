"""Trained networks: how they are built, and their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, save_run, user_error

from shared_basis import data
from shared_basis.config import Config, DataConfig, ModelConfig
from shared_basis.runs.trained import Trained, build_model


@pytest.mark.parametrize("field", ["mean", "std"])
def test_normalisation_must_fit_the_channels(field: str) -> None:
    config = Config(data=DataConfig(**{field: (0.1, 0.2, 0.3)}))
    with user_error(f"data.{field}=(0.1, 0.2, 0.3)", "1 channel;"):
        build_model(config, data.Spec((8, 8, 1), ("a", "b")))
    assert build_model(config, data.Spec((8, 8, 3), ("a", "b"))).num_classes == 2


def test_build_model_follows_the_configuration() -> None:
    model = build_model(Config(model=ModelConfig(name="resnet14-s2u1", dtype="bfloat16")),
                        data.Spec((8, 8, 1), tuple("abcdefg")))
    assert (model.num_classes, model.sharing.shared_rank, model.sharing.unique_rank) == (7, 2, 1)
    assert model.dtype == jnp.bfloat16


def test_a_classifier_gives_the_logits_of_normalised_images_on_all_devices_and_in_float32_on_one(
        tmp_path: Path) -> None:
    config = Config(model=ModelConfig(name=TINY, dtype="bfloat16"), data=DataConfig(mean=(0.25,), std=(0.5,)))
    trained = Trained.open(save_run(tmp_path / "run", config, {1: 0.5}))
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), dtype=np.uint8)
    exact = trained.on_cpu()
    assert exact.mesh.size == 1
    expected = jax.jit(lambda images: exact.model.apply(trained.variables, (images / 255 - 0.25) / 0.5, train=False))(
        images.astype(np.float32))
    np.testing.assert_allclose(exact.classifier()(images), expected, rtol=1e-4, atol=1e-4)
    rounded = np.asarray(trained.classifier()(images))
    assert (rounded.shape, rounded.dtype) == ((8, 10), np.float32)
    np.testing.assert_allclose(rounded, expected, rtol=0.1, atol=0.1)
    assert np.abs(rounded - expected).max() > 1e-4, "the run's own is bfloat16"


def test_an_excluded_cpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained.open(save_run(tmp_path / "run", Config(model=ModelConfig(name=TINY)), {1: 0.5}))

    def without_cpu(*_: Any, **__: Any) -> None:
        raise RuntimeError("Unknown backend cpu")
    monkeypatch.setattr(jax, "local_devices", without_cpu)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with user_error("JAX_PLATFORMS='cuda'", "set JAX_PLATFORMS=cuda,cpu, or unset it"):
        trained.on_cpu()
