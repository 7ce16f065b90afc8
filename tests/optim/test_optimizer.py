"""The learning rate schedule, and the optimizer as the gradient of the summed loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tiny_network

from shared_basis.config import PARAMETER_LABELS as LABELS
from shared_basis.config import Config, OptimizerConfig, OrthogonalityConfig, TrainConfig
from shared_basis.models.parameters import abstract_variables
from shared_basis.optim.basis_group import BasisGroup
from shared_basis.optim.optimizer import learning_rate_schedule, make_optimizer
from shared_basis.optim.penalty import orthogonality_penalty


def rates(steps, *, epochs=8, steps_per_epoch=10, **fields):
    """Returns the learning rates (the initial one is 1) at `steps`."""
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, **fields), epochs, steps_per_epoch)
    return [float(schedule(step)) for step in steps]


def test_a_constant_rate_stays():
    assert rates([0, 1, 79]) == [1, 1, 1]


def test_a_piecewise_rate_falls_at_its_boundary_step_and_multiplies():
    found = rates([0, 24, 25, 59, 60, 79], boundaries=(2.5, 6.0), factors=(0.5, 0.1))
    assert found == pytest.approx([1, 1, 0.5, 0.5, 0.05, 0.05])


def test_a_boundary_between_steps_goes_to_the_nearest():
    assert rates([6, 7, 8], steps_per_epoch=3, boundaries=(2.4,), factors=(0.5,)) == pytest.approx([1, 0.5, 0.5])
    assert rates([7, 8], steps_per_epoch=3, boundaries=(2.6,), factors=(0.5,)) == pytest.approx([1, 0.5])


def test_boundaries_at_the_same_step_multiply():
    assert rates([1, 2], epochs=1, steps_per_epoch=3, boundaries=(0.5, 0.75), factors=(0.1, 0.5)) == pytest.approx(
        [1, 0.05])


def test_a_cosine_rate_falls_to_0_at_the_end():
    assert rates([0, 20, 40, 60, 80], schedule="cosine") == pytest.approx(
        [1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2, 0], abs=1e-6)


def test_warm_up_rises_from_0_and_does_not_move_the_boundaries():
    found = rates([0, 1, 4, 5, 24, 25], warmup_epochs=0.5, boundaries=(2.5,), factors=(0.1,))
    assert found == pytest.approx([0, 0.2, 0.8, 1, 1, 0.1])


def test_a_cosine_rate_falls_from_the_end_of_the_warm_up():
    assert rates([0, 10, 20, 50, 80], schedule="cosine", warmup_epochs=2.0) == pytest.approx([0, 0.5, 1, 0.5, 0],
                                                                                             abs=1e-6)


def test_a_warm_up_may_round_to_the_whole_run():
    assert rates([0, 1, 2], epochs=1, steps_per_epoch=2, schedule="cosine", warmup_epochs=0.99) == [0, 0.5, 1]


def test_the_published_schedule():
    fields = {"epochs": 300, "steps_per_epoch": 195, "boundaries": (150.0, 225.0), "factors": (0.1, 0.1)}
    assert rates([150 * 195 - 1, 150 * 195, 225 * 195 - 1, 225 * 195], **fields) == pytest.approx([1, 0.1, 0.1, 0.01])


PARAMS = {
    "bases": {"group1": {"shared": np.array([[2.0, 0.0], [0.0, 1.0]], np.float32)}},
    "layer": {"unique": np.array([[3.0], [0.0]], np.float32), "coefficients": np.full((3, 2), 0.5, np.float32),
              "norm": {"scale": np.array([1.0, 2.0, 3.0], np.float32), "bias": np.array([4.0, 5.0, 6.0], np.float32)}},
    "head": {"kernel": np.array([[7.0, -8.0]], np.float32), "bias": np.array([9.0, -1.0], np.float32)},
}
LABELLED = {"basis": [("bases", "group1", "shared"), ("layer", "unique")], "coefficients": [("layer", "coefficients")],
            "kernel": [("head", "kernel")], "norm": [("layer", "norm", "scale"), ("layer", "norm", "bias")],
            "bias": [("head", "bias")]}
"""The parameters of each kind, by hand."""


def at(tree, path):
    return functools.reduce(lambda node, key: node[key], path, tree)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [LABELS, (), ("norm", "coefficients"), ("kernel", "bias")],
                         ids=lambda decay: "+".join(decay) or "none")
def test_two_updates_rebuilt_by_hand(decay, nesterov):
    config = OptimizerConfig(learning_rate=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.25,
                             weight_decay_labels=decay)
    optimizer = make_optimizer(Config(optimizer=config), [], lambda step: 0.1 / (step + 1))
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(2):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    for label, paths in LABELLED.items():
        coefficient = 0.25 if label in decay else 0
        for path in paths:
            p, velocity = np.float64(at(PARAMS, path)), 0
            for step in range(2):
                gradient = 1 + coefficient * p
                velocity = 0.8 * velocity + gradient
                p = p - 0.1 / (step + 1) * (gradient + 0.8 * velocity if nesterov else velocity)
            np.testing.assert_allclose(at(params, path), p, rtol=1e-5, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize(("reduction", "pairs"), [("mean", 6 + 1), ("sum", 1)])
def test_the_penalty_is_added_before_momentum(reduction, pairs):
    elements = [BasisGroup((("bases", "group1", "shared"),), (("layer", "unique"),))]
    config = Config(optimizer=OptimizerConfig(weight_decay=0.0),
                    orthogonality=OrthogonalityConfig(weight=10.0, reduction=reduction))
    optimizer = make_optimizer(config, elements, lambda step: 1.0)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS), PARAMS)
    # Rows f = (2, 0), g = (0, 1) shared and h = (3, 0) unique: (f·f − 1)² + (g·g − 1)² + (f·h)² + (h·h − 1)² and more
    # that is 0 with gradient 0. Gradients: f: 4 · 3 f + 2 · 6 h; h: 2 · 6 f + 4 · 8 h.
    f, h = np.array([24.0 + 36, 0]), np.array([24.0 + 96, 0])
    np.testing.assert_allclose(updates["bases"]["group1"]["shared"], -10 / pairs * np.stack([f, [0, 0]], -1), rtol=1e-5)
    np.testing.assert_allclose(updates["layer"]["unique"][:, 0], -10 / pairs * h, rtol=1e-5)
    assert not np.any(updates["head"]["kernel"])


@pytest.mark.parametrize("orthogonality", [OrthogonalityConfig(weight=0.0), OrthogonalityConfig(weight=10.0)])
def test_without_weight_or_elements_no_penalty_is_added(orthogonality):
    elements = [BasisGroup((("bases", "group1", "shared"),))] if not orthogonality.weight else []
    config = Config(optimizer=OptimizerConfig(weight_decay=0.0), orthogonality=orthogonality)
    optimizer = make_optimizer(config, elements, lambda step: 1.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS), PARAMS)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))


def test_training_a_network_equals_descent_on_the_summed_loss():
    """Cross entropy + λ · penalty + ½ weight decay · ‖decaying parameters‖², over four steps with momentum."""
    model = tiny_network()
    rng = np.random.default_rng(0)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else
                            np.full(leaf.shape, path[-1].key in ("scale", "var"))).astype(np.float32),
        dict(abstract_variables(model, (8, 8, 1))))
    images = rng.normal(size=(4, 4, 8, 8, 1)).astype(np.float32)
    elements, rate = model.basis_groups("shared+unique"), 0.02

    def cross_entropy(params, batch):
        logits, _ = model.apply({**variables, "params": params}, batch, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, np.arange(4)).mean()

    def additions(params):
        squares = [jnp.sum(leaf**2) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
                   if path[-1].key in ("unique", "first", "second", "shared", "kernel")]
        return 10 * orthogonality_penalty(params, elements) + 0.05 / 2 * sum(squares)

    # One program serves both sides; it compiles in half the time without optimization.
    gradient = jax.jit(jax.grad(cross_entropy), compiler_options={"xla_backend_optimization_level": 0})
    config = Config(optimizer=OptimizerConfig(weight_decay=0.05, weight_decay_labels=("basis", "kernel")),
                    orthogonality=OrthogonalityConfig(weight=10.0))
    optimizer = make_optimizer(config, elements, lambda step: rate)

    @jax.jit
    def update(linked, state, gradient):
        updates, state = optimizer.update(gradient, state, linked)
        return optax.apply_updates(linked, updates), state

    @jax.jit
    def descend(summed, velocity, gradient):
        total = jax.tree.map(jnp.add, gradient, jax.grad(additions)(summed))
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, total)
        return jax.tree.map(lambda p, v: p - rate * v, summed, velocity), velocity

    linked = summed = variables["params"]
    state, velocity = optimizer.init(linked), jax.tree.map(np.zeros_like, summed)
    for batch in images:
        linked, state = update(linked, state, gradient(linked, batch))
        summed, velocity = descend(summed, velocity, gradient(summed, batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), linked, summed)


# Other optimizers, factors and freezing

GRADIENT = jax.tree.map(
    lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32), PARAMS)
TURNS = (1.0, -0.9, 0.5, 2.0)
"""What the gradient of each step is multiplied with."""


def descend(steps, params=PARAMS, epoch=1, descent=None, train=None, **fields):
    """Returns the parameters after each of so many updates, at rate 0.1 / (step + 1)."""
    config = Config(optimizer=OptimizerConfig(**fields), train=train or TrainConfig())
    optimizer = make_optimizer(config, [], lambda step: 0.1 / (step + 1), epoch, descent)
    state, found = optimizer.init(params), []
    for turn in TURNS[:steps]:
        updates, state = optimizer.update(jax.tree.map(lambda leaf, turn=turn: turn * leaf, GRADIENT), state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found


def directions(name, gradient, b1):
    """Returns two directions of Adam (Kingma & Ba 2015) or Lion (Chen et al. 2023)."""
    first = second = 0
    for step, turn in enumerate(TURNS[:2], 1):
        g = turn * gradient
        if name == "lion":
            yield np.sign(b1 * first + (1 - b1) * g)
            first = 0.99 * first + 0.01 * g
        else:
            first, second = b1 * first + (1 - b1) * g, 0.999 * second + 0.001 * g ** 2
            yield first / (1 - b1 ** step) / (np.sqrt(second / (1 - 0.999 ** step)) + 1e-8)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_two_updates_of_adamw_and_lion_with_decoupled_decay(name):
    found = descend(2, name=name, momentum=0.99, weight_decay=0.25, weight_decay_labels=("kernel", "norm"))[-1]
    for label, paths in LABELLED.items():
        for path in paths:
            p, gradient = np.float64(at(PARAMS, path)), np.float64(at(GRADIENT, path))
            for step, direction in enumerate(directions(name, gradient, 0.99)):
                p = p - 0.1 / (step + 1) * (direction + (0.25 * p if label in ("kernel", "norm") else 0))
            np.testing.assert_allclose(at(found, path), p, rtol=1e-4, atol=1e-5, err_msg=str(path))


def test_muon_orthogonalises_what_maps_channels_to_channels_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    params = {"stem": {"kernel": rng.normal(size=(3, 3, 2, 4))}, "layer": {"coefficients": rng.normal(size=(3, 5))},
              "head": {"kernel": rng.normal(size=(4, 2)), "bias": rng.normal(size=2)}}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    config = Config(optimizer=OptimizerConfig(name="muon", momentum=0.9, weight_decay=0.5,
                                              weight_decay_labels=("coefficients", "bias")))
    optimizer = make_optimizer(config, [], lambda step: 0.1)
    gradient = jax.tree.map(lambda leaf: leaf + 1, params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    for (layer, name), decay in ((("stem", "kernel"), 0), (("layer", "coefficients"), 0.5)):
        move = -np.asarray(updates[layer][name]) / 0.1 - decay * np.asarray(params[layer][name])
        move = move.reshape(-1, move.shape[-1])
        left, _, right = np.linalg.svd(np.reshape(gradient[layer][name], move.shape), full_matrices=False)
        scale = np.sqrt(max(1, move.shape[1] / move.shape[0]))
        # Five steps of Newton and Schulz leave singular values between 0.7 and 1.2.
        values = np.diag(left.T @ move @ right.T) / scale
        assert 0.6 < values.min() <= values.max() < 1.3
        np.testing.assert_allclose(left.T @ move @ right.T / scale, np.diag(values), atol=1e-3)
    for name, decay in (("kernel", 0), ("bias", 0.5)):
        expected = np.sign(gradient["head"][name]) + decay * np.asarray(params["head"][name])
        np.testing.assert_allclose(updates["head"][name], -0.1 * expected, rtol=1e-4)


OTHER = {"GroupNorm_0": {"scale": np.ones(2), "bias": np.ones(2)}, "LayerScale_0": {"gamma": np.ones(2)},
         "Embed_0": {"embedding": np.ones((3, 2))}, **PARAMS}
"""Also parameters with names of Flax and of networks of one's own."""


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "muon"])
def test_every_optimizer_trains_parameters_of_any_name(name):
    for decay, gradient, train, still in (
            ((), 1.0, TrainConfig(record_gradients=True), set()),
            (("kernel",), 0.0, TrainConfig(), {"GroupNorm_0", "LayerScale_0", "bases", "layer"}),
            (LABELS, 1.0, TrainConfig(freeze="kernel,norm"), {"GroupNorm_0", "Embed_0"})):
        config = OptimizerConfig(name=name, weight_decay=0.1, weight_decay_labels=decay)
        optimizer = make_optimizer(Config(optimizer=config, train=train), [], lambda step: 0.1)
        params = jax.tree.map(jnp.float32, OTHER)
        updates, _ = optimizer.update(jax.tree.map(lambda leaf, gradient=gradient: jnp.full_like(leaf, gradient),
                                                   params), optimizer.init(params), params)
        assert {key for key, tree in updates.items() if not any(map(jnp.any, jax.tree.leaves(tree)))} == still


def test_factors_multiply_the_learning_rate_with_its_decay():
    plain = descend(1, name="adamw", weight_decay=0.25)[0]
    scaled = descend(1, name="adamw", weight_decay=0.25, learning_rate_factors="basis=0,head/**=10")[0]
    for label, paths in LABELLED.items():
        for path in paths:
            factor = 0 if label == "basis" else 10 if path[0] == "head" else 1
            np.testing.assert_allclose(at(scaled, path) - at(PARAMS, path),
                                       factor * (at(plain, path) - at(PARAMS, path)), rtol=1e-3, atol=1e-5)


def test_frozen_parameters_stay_to_the_bit_whatever_else_moves_them():
    groups = [BasisGroup((("bases", "group1", "shared"),))]
    config = Config(orthogonality=OrthogonalityConfig(method="exact"), optimizer=OptimizerConfig(weight_decay=0.5),
                    train=TrainConfig(freeze="**,!head/**"))
    optimizer = make_optimizer(config, groups, lambda step: 0.1)
    updates, _ = optimizer.update(GRADIENT, optimizer.init(PARAMS), PARAMS)
    moved = optax.apply_updates(PARAMS, updates)
    for paths in LABELLED.values():
        for path in paths:
            assert np.array_equal(at(moved, path), at(PARAMS, path)) == (path[0] != "head")


def test_frozen_parameters_train_after_their_epochs():
    train = TrainConfig(freeze="**,!head/**", freeze_epochs=1.5)
    free, held = descend(4, epoch=2), descend(4, epoch=2, train=train)
    for step, params in enumerate(held):
        previous = held[step - 1] if step else PARAMS
        assert np.array_equal(params["layer"]["coefficients"], previous["layer"]["coefficients"]) == (step < 3)
        np.testing.assert_array_equal(params["head"]["kernel"], free[step]["head"]["kernel"])


def test_an_optimizer_of_ones_own_takes_the_place_of_descent_and_decay_alone():
    expected = optax.chain(optax.adabelief(lambda step: 0.1 / (step + 1)))
    state, params = expected.init(PARAMS), PARAMS
    for turn in TURNS[:2]:
        updates, state = expected.update(jax.tree.map(lambda leaf, turn=turn: turn * leaf, GRADIENT), state, params)
        params = optax.apply_updates(params, updates)
    found = descend(2, weight_decay=0.5, learning_rate_factors="head/**=0", descent=optax.adabelief)[-1]
    np.testing.assert_array_equal(found["layer"]["coefficients"], params["layer"]["coefficients"])
    np.testing.assert_array_equal(found["head"]["kernel"], PARAMS["head"]["kernel"])


@pytest.mark.parametrize("descent", [optax.adam(1e-3), lambda rate: None], ids=["made", "none"])
def test_what_makes_no_optimizer_is_refused(descent):
    with pytest.raises(TypeError, match=r"must be a function from the learning-rate schedule.*such as optax\.adam or"):
        descend(1, descent=descent)


@pytest.mark.parametrize(("method", "links"), [("penalty", 3), ("exact", 3)])
def test_the_state_of_a_published_chain_is_as_in_earlier_versions(method, links):
    """Its paths are those of saved checkpoints: a link more or less, and none of them opens."""
    config = Config(orthogonality=OrthogonalityConfig(method=method))
    state = make_optimizer(config, [BasisGroup((("bases", "group1", "shared"),))], lambda step: 0.1).init(PARAMS)
    names = {jax.tree_util.keystr(path[:3]) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    sgd = {"[1][0].trace", "[1][1].count"}
    assert len(state) == links
    assert names == ({"[0].count", *(name.replace("[1]", "[2]", 1) for name in sgd)} if method == "penalty" else sgd)
