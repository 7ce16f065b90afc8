"""A network without batch normalisation, which has no running statistics, in training and in a checkpoint."""

from __future__ import annotations

import functools
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from helpers import assert_trees_equal, make_images, mesh_of

from shared_basis.config import Config
from shared_basis.models.parameters import abstract_variables
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runtime.distributed import batch_sharding, replicated
from shared_basis.training.composition import compose
from shared_basis.training.steps import TrainState, create_train_state, train_step


class Plain(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        return nn.Dense(10)(nn.relu(nn.Dense(8)(images.mean(-1).reshape(len(images), -1))))


def one_step(parts: int) -> TrainState:
    mesh, optimizer = mesh_of(1), optax.sgd(0.1)
    images, labels = make_images(8)
    step = jax.jit(functools.partial(
        train_step, functions=compose(Config(), Plain(), 10, optimizer), seed=0, steps_per_epoch=2,
        batch_sharding=batch_sharding(mesh), grad_accumulation_steps=parts))
    return step(create_train_state(Plain(), optimizer, 0, (8, 8, 1)), images, labels)[0]


def test_it_trains_and_gradients_of_parts_add_up_to_that_of_the_batch() -> None:
    whole, parts = one_step(1), one_step(2)
    assert whole.batch_stats == {}
    assert parts.batch_stats == {}
    start = create_train_state(Plain(), optax.sgd(0.1), 0, (8, 8, 1)).params
    for before, one, other in zip(*map(jax.tree.leaves, (start, whole.params, parts.params)), strict=True):
        assert not np.array_equal(before, one)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_its_checkpoint_is_restored_with_no_statistics(tmp_path: Path) -> None:
    state = create_train_state(Plain(), optax.sgd(0.1, momentum=0.9), 0, (8, 8, 1))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state, {}, None)
    checkpoints.wait()
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh_of(1))),
                          (state, dict(abstract_variables(Plain(), (8, 8, 1)))))
    restored, variables = checkpoints.restore(1, target[0]), checkpoints.restore_variables(1, target[1])
    checkpoints.close()
    assert_trees_equal(restored, state)
    assert_trees_equal(variables, {"params": state.params, "batch_stats": {}})
