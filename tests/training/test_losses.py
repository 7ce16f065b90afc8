"""What a step minimises, against NumPy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import cross_entropies

from shared_basis.config import DistillationConfig
from shared_basis.training.losses import Targets, checked_loss, cross_entropy, divergence, make_loss

RNG = np.random.default_rng(0)
LOGITS, TEACHER = (RNG.normal(0, 3, (6, 4)).astype(np.float32) for _ in range(2))
LABELS = np.array([0, 1, 2, 3, 3, 0])
PROBABILITIES = RNG.dirichlet(np.ones(4), 6).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(np.asarray(logits, np.float64))
    return exponentials / exponentials.sum(-1, keepdims=True)


def divergences(temperature: float) -> np.ndarray:
    ours, theirs = softmax(LOGITS / temperature), softmax(TEACHER / temperature)
    return temperature ** 2 * (theirs * np.log(theirs / ours)).sum(-1)


def test_cross_entropy_takes_classes_or_probabilities() -> None:
    np.testing.assert_allclose(cross_entropy(LOGITS, jnp.asarray(LABELS)), cross_entropies(LOGITS, LABELS), rtol=1e-5)
    expected = -(PROBABILITIES * np.log(softmax(LOGITS))).sum(-1)
    np.testing.assert_allclose(cross_entropy(LOGITS, jnp.asarray(PROBABILITIES)), expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_divergence_and_its_gradient_are_those_of_the_paper(temperature: float) -> None:
    np.testing.assert_allclose(divergence(LOGITS, TEACHER, temperature), divergences(temperature), rtol=1e-4)
    gradient = jax.grad(lambda logits: divergence(logits, TEACHER, temperature).sum())(LOGITS)
    # Hinton et al. 2015, equation 2, times the T² that they recommend
    expected = temperature * (softmax(LOGITS / temperature) - softmax(TEACHER / temperature))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [LABELS, PROBABILITIES], ids=["classes", "probabilities"])
def test_the_loss_weighs_labels_and_teacher(labels: np.ndarray) -> None:
    loss = make_loss(DistillationConfig(teacher="run", weight=0.3, temperature=2.0))
    found = loss(LOGITS, Targets(jnp.asarray(labels), jnp.asarray(TEACHER)))
    hard = np.asarray(cross_entropy(LOGITS, jnp.asarray(labels)))
    np.testing.assert_allclose(found, 0.7 * hard + 0.3 * divergences(2.0), rtol=1e-4)
    np.testing.assert_array_equal(loss(LOGITS, Targets(jnp.asarray(labels))), hard)


def test_a_hit_is_the_class_or_the_most_probable_one() -> None:
    classes = LOGITS.argmax(-1)
    classes[:2] = (classes[:2] + 1) % 4
    smoothed = np.full((6, 4), 0.1, np.float32)
    smoothed[np.arange(6), classes] = 0.7
    assert float(Targets(jnp.asarray(classes)).hits(LOGITS)) == 4
    assert float(Targets(jnp.asarray(smoothed)).hits(LOGITS)) == 4


def test_a_loss_that_is_not_one_for_each_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one number for each image, of shape \(6,\) here.*returned \(6, 4\)"):
        checked_loss(lambda logits, labels: logits)(LOGITS, PROBABILITIES)
