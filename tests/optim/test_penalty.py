"""The orthogonality penalty against its formula, its link of an optax chain, and the diagnostics.

The parameter trees here are no network of this project: bases are found by path in any nested dicts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from shared_basis.optim.basis_group import BasisGroup
from shared_basis.optim.penalty import add_orthogonality_penalty, orthogonality_diagnostics, orthogonality_penalty

A, B, C = ("a", "shared"), ("a", "second"), ("b", "deep", "basis")
WIDE = ("layers", "wide")
U1, U2, U3 = ("layers", "u1"), ("layers", "u2"), ("layers", "u3")

SETS = {
    "shared only": [BasisGroup((A,))],
    "double": [BasisGroup((A, B))],
    "shared and unique": [BasisGroup((A,), (U1, U2))],
    "double and unique": [BasisGroup((A, B), (U1, U2, U3))],
    "unique only": [BasisGroup((), (U1, U2))],
    "unique of different rank": [BasisGroup((A,), (U1, WIDE))],
    "several groups": [BasisGroup((A, B), (U1,)), BasisGroup((C,)), BasisGroup((), (U2, U3))],
}


def random_tree(seed=0):
    """Returns a tree with bases of [3, 3, 2, ·], one of [5, ·] and an array that is no basis."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (0.4 * rng.normal(size=shape)).astype(np.float32)
    return {"a": {"shared": draw(3, 3, 2, 4), "second": draw(3, 3, 2, 3)}, "b": {"deep": {"basis": draw(5, 3)}},
            "layers": {"u1": draw(3, 3, 2, 2), "u2": draw(3, 3, 2, 2), "u3": draw(3, 3, 2, 2), "wide": draw(18, 5)},
            "other": draw(7)}


def rows(tree, path):
    for key in path:
        tree = tree[key]
    return np.float64(tree).reshape(-1, np.shape(tree)[-1]).T


def stack(tree, elements):
    """Returns the rows B of one group, and for each row the layer that owns it (None for a shared one)."""
    paths = [(path, None) for path in elements.shared] + [(path, i) for i, path in enumerate(elements.unique)]
    b = [rows(tree, path) for path, _ in paths]
    return np.concatenate(b), [owner for array, (_, owner) in zip(b, paths, strict=True) for _ in array]


def mask(owners):
    """Returns M: a shared row counts with every row; a unique row with the unique rows of its own layer."""
    return np.array([[a is None or a == b for b in owners] for a in owners])


def penalty_reference(tree, sets, reduction="mean"):
    """Σ_groups Σ_ij M_ij (B Bᵀ − I)²_ij, over Σ_groups Σ_ij M_ij for the mean, in float64."""
    total = count = 0
    for elements in sets:
        b, owners = stack(tree, elements)
        total += np.sum(mask(owners) * (b @ b.T - np.eye(len(b)))**2)
        count += np.sum(mask(owners))
    return total / count if reduction == "mean" else total


def test_the_mask_of_the_reference_is_one_sided():
    np.testing.assert_array_equal(mask([None, None, 0, 1, 1]), [
        [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sets", SETS.values(), ids=SETS)
def test_penalty_is_the_formula(sets, reduction):
    tree = random_tree()
    np.testing.assert_allclose(orthogonality_penalty(tree, sets, reduction), penalty_reference(tree, sets, reduction),
                               rtol=1e-5)


def test_penalty_by_hand():
    # Rows (2, 0) and (1, 1) of one shared basis; B Bᵀ = [[4, 2], [2, 2]]; less I, squared: 9 + 4 + 4 + 1.
    tree = {"basis": jnp.array([[2.0, 1.0], [0.0, 1.0]])}
    assert orthogonality_penalty(tree, [BasisGroup((("basis",),))], "sum") == 18
    assert orthogonality_penalty(tree, [BasisGroup((("basis",),))]) == 4.5


def test_the_mean_is_over_the_pairs_of_all_groups_together():
    tree = {"ones": jnp.eye(3), "long": jnp.array([[2.0]])}  # 9 pairs that add 0, and one that adds (4 − 1)²
    assert orthogonality_penalty(tree, [BasisGroup((("ones",),)), BasisGroup((("long",),))]) == pytest.approx(0.9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_is_that_of_finite_differences(reduction):
    sets = SETS["several groups"]
    penalty = jax.jit(lambda tree: orthogonality_penalty(tree, sets, reduction))
    check_grads(penalty, (random_tree(),), order=1, modes=["rev"], eps=1e-2, atol=2e-3, rtol=2e-3)


def test_the_gradient_is_derived_by_hand():
    # One element f: penalty (‖f‖² − 1)², gradient 4 (‖f‖² − 1) f = 4 · 24 · (3, 4).
    gradient = jax.grad(orthogonality_penalty)({"f": jnp.array([[3.0], [4.0]])}, [BasisGroup((("f",),))])
    np.testing.assert_allclose(gradient["f"][:, 0], [288, 384])


@pytest.mark.parametrize("function", [orthogonality_penalty, orthogonality_diagnostics])
def test_compiled_values_are_those_without_compilation(function):
    sets = SETS["several groups"]
    compiled = jax.jit(lambda tree: function(tree, sets))(random_tree())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), compiled, function(random_tree(), sets))


@pytest.mark.slow
def test_types_of_results_are_those_of_the_parameters_in_float64_mode():
    groups = SETS["several groups"]
    with jax.enable_x64(True):
        for dtype, error in ((jnp.float64, 1e-12), (jnp.float32, 1e-5)):
            tree = jax.tree.map(lambda leaf, dtype=dtype: jnp.asarray(np.asarray(leaf, np.float64) / 3, dtype),
                                random_tree())
            penalty, diagnostics = orthogonality_penalty(tree, groups), orthogonality_diagnostics(tree, groups)
            assert {leaf.dtype for leaf in jax.tree.leaves((penalty, diagnostics))} == {jnp.dtype(dtype)}
            np.testing.assert_allclose(penalty, penalty_reference(tree, groups), rtol=error)


@pytest.mark.slow
def test_bfloat16_parameters_are_handled_in_float32():
    sets = SETS["several groups"]
    tree = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_tree())
    penalty = orthogonality_penalty(tree, sets)
    assert penalty.dtype == jnp.float32
    np.testing.assert_allclose(penalty, penalty_reference(tree, sets), rtol=1e-5)
    link = add_orthogonality_penalty(lambda count: jnp.float32(10), sets)
    updates, _ = link.update(jax.tree.map(jnp.zeros_like, tree), link.init(tree), tree)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    diagnostics = orthogonality_diagnostics(tree, sets)
    assert {leaf.dtype for leaf in diagnostics.values()} == {jnp.dtype("float32")}


# The link of an optax chain

@pytest.mark.parametrize(("weight", "reduction"), [(10.0, "sum"), (lambda step: 2.0 * (step + 1), "mean")],
                         ids=["constant weight of the sum", "scheduled weight of the mean"])
def test_the_link_equals_the_gradient_of_the_summed_loss(weight, reduction):
    sets, decay = SETS["several groups"], 0.05
    sgd = optax.sgd(0.003, momentum=0.9)
    chain = optax.chain(add_orthogonality_penalty(weight, sets, reduction), optax.add_decayed_weights(decay), sgd)

    def task_loss(params, targets):
        return sum(jnp.sum((p - t)**2) for p, t in zip(*map(jax.tree.leaves, (params, targets)), strict=True))

    def summed_loss(params, targets, scale):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return task_loss(params, targets) + scale * orthogonality_penalty(params, sets, reduction) + decay / 2 * squares

    @jax.jit
    def update(linked, linked_state, summed, summed_state, targets, scale):
        updates, linked_state = chain.update(jax.grad(task_loss)(linked, targets), linked_state, linked)
        linked = optax.apply_updates(linked, updates)
        updates, summed_state = sgd.update(jax.grad(summed_loss)(summed, targets, scale), summed_state)
        return linked, linked_state, optax.apply_updates(summed, updates), summed_state

    linked = summed = random_tree()
    states = chain.init(linked), sgd.init(summed)
    for step in range(7):
        scale = weight(step) if callable(weight) else weight
        linked, linked_state, summed, summed_state = update(
            linked, states[0], summed, states[1], random_tree(seed=step + 1), scale)
        states = linked_state, summed_state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), linked, summed)


def test_the_weight_is_that_of_the_number_of_updates_made_so_far():
    tree, sets = {"f": jnp.array([[3.0], [4.0]])}, [BasisGroup((("f",),))]
    link = add_orthogonality_penalty(lambda count: 0.5 * count, sets)
    state = link.init(tree)
    for count in range(3):
        updates, state = link.update({"f": jnp.ones((2, 1))}, state, tree)
        np.testing.assert_allclose(updates["f"][:, 0], [1 + 0.5 * count * 288, 1 + 0.5 * count * 384])


def test_the_link_needs_the_parameters():
    link = add_orthogonality_penalty(10.0, SETS["shared only"])
    state = link.init(random_tree())
    with pytest.raises(ValueError, match="add_orthogonality_penalty needs the parameters: call update"):
        link.update(random_tree(), state)


WRONG = [
    ([BasisGroup((("a", "third"),))], "mean", KeyError, "no basis at a/third: the parameter tree has no a/third"),
    ([BasisGroup((A,), (("x", "y"),))], "mean", KeyError, "no basis at x/y: the parameter tree has no x"),
    ([BasisGroup((("other", "y"),))], "mean", KeyError, "no basis at other/y: the parameter tree has no other/y"),
    (SETS["shared only"], "median", ValueError, "reduction='median': must be 'mean' or 'sum'"),
    ([], "mean", ValueError, "basis_groups is empty: name at least one basis"),
]


@pytest.mark.parametrize(("sets", "reduction", "kind", "words"), WRONG)
@pytest.mark.parametrize("use", [
    orthogonality_penalty,
    lambda tree, sets, reduction: add_orthogonality_penalty(10.0, sets, reduction).init(tree),
], ids=["penalty", "link"])
def test_mistakes_are_told_at_once(use, sets, reduction, kind, words):
    with pytest.raises(kind, match=words):
        use(random_tree(), sets, reduction)


# Diagnostics

def test_diagnostics_by_hand():
    # Shared rows (3, 4, 0) and (0, 0, 1); unique rows (1, 0, 0) of one layer, (0, 2, 0) of another. Products of
    # different rows that count: shared 0; shared with unique 3, 8, 0, 0. Unique rows of two layers do not count.
    tree = {"s": jnp.array([[3.0, 0], [4, 0], [0, 1]]), "u": jnp.array([[1.0], [0], [0]]),
            "v": jnp.array([[0], [2.0], [0]])}
    diagnostics = orthogonality_diagnostics(tree, [BasisGroup((("s",),), (("u",), ("v",)))])
    # (25 − 1)² + 3² + 8² of the 8 pairs of shared rows, and (4 − 1)² of the 2 of unique rows.
    assert diagnostics == pytest.approx({"penalty": (576 + 9 + 64 + 9) / 10, "norm_min": 1, "norm_mean": 9 / 4,
                                         "norm_max": 5, "coherence": 8})


def test_coherence_is_that_of_the_worst_group_and_counts_negative_products():
    tree = {"a": jnp.array([[1.0, -2.0], [0, 0]]), "b": jnp.eye(2)}
    assert orthogonality_diagnostics(tree, [BasisGroup((("b",),)), BasisGroup((("a",),))])["coherence"] == 2


def test_orthonormal_bases_have_no_penalty():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(18, 18)))[0].astype(np.float32)
    tree = {"s": q[:, :6].reshape(3, 3, 2, 6), "u": q[:, 6:8].reshape(3, 3, 2, 2), "v": q[:, 8:10].reshape(3, 3, 2, 2)}
    diagnostics = orthogonality_diagnostics(tree, [BasisGroup((("s",),), (("u",), ("v",)))])
    norms = dict.fromkeys(("norm_min", "norm_mean", "norm_max"), 1)
    assert diagnostics == pytest.approx({"penalty": 0, "coherence": 0, **norms}, abs=1e-6)
