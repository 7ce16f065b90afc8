"""Patches are those that a convolution sees, and their moments those of NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shared_basis
from shared_basis.compression import patches as patches_module
from shared_basis.compression.kernels import matrix
from shared_basis.compression.patches import patch_moments, patches
from shared_basis.nn.convolution import Window

RNG = np.random.default_rng(1)


@pytest.mark.parametrize(("size", "image", "options"), [
    ((3, 3), (5, 6), {}), ((3, 2), (7, 5), {"strides": (2, 1), "padding": "SAME"}),
    ((3,), (9,), {"dilation": 2}), ((2, 3, 1), (4, 5, 3), {"strides": 2, "padding": "VALID"})])
def test_patches_are_those_of_a_convolution(size: tuple[int, ...], image: tuple[int, ...], options: Any) -> None:
    x, kernel = RNG.normal(size=(2, *image, 3)), RNG.normal(size=(*size, 3, 4))
    window = Window.of(size, image, **options)
    letters = "DHW"[-len(size):]
    by_lax = jax.lax.conv_general_dilated(
        jnp.asarray(x), jnp.asarray(kernel), window.strides, window.padding, rhs_dilation=window.dilation,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"))
    found = patches(jnp.asarray(x), size, window)
    assert found.shape == (*by_lax.shape[:-1], np.prod(size) * 3)
    np.testing.assert_allclose(found @ matrix(kernel), by_lax, atol=1e-5)


def test_moments_are_those_of_numpy_however_many_images_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x = RNG.normal(1, 1, size=(5, 4, 4, 2))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = np.array([padded[n, i:i + 3, j:j + 3].ravel() for n in range(5) for i in range(0, 4, 2)
                     for j in range(0, 4, 2)])
    monkeypatch.setattr(patches_module, "CHUNK", 2 * 9 * x[0].size)
    whole = shared_basis.patch_moments(x, 3, strides=2)
    added = patch_moments(x[:2], 3, strides=2) + patch_moments(x[2:], 3, strides=2)
    for moments in (whole, added):
        assert moments.count == len(rows) == 20
        np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(moments.second, rows.T @ rows / 20, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(moments.covariance, np.cov(rows.T, bias=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "options", "message"), [
    ((4, 4, 2), {}, r"inputs of shape \[4, 4, 2\]: a kernel of shape \[3, 3\] needs 4 axes"),
    ((0, 4, 4, 2), {}, r"inputs of shape \[0, 4, 4, 2\].* yields no patches"),
    ((1, 2, 2, 2), {"padding": "VALID"}, r"inputs of shape \[1, 2, 2, 2\].* yields no patches"),
    ((1, 3, 9, 2), {"padding": "VALID", "kernel_size": 5}, r"\[1, 3, 9, 2\].* yields no patches")])
def test_inputs_without_patches_are_refused(shape: tuple[int, ...], options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch_moments(np.ones(shape), **options)


def test_inputs_that_are_not_finite_are_refused() -> None:
    x = np.ones((1, 4, 4, 2))
    x[0, 3, 3, 1] = np.nan
    with pytest.raises(ValueError, match="inputs hold NaN or infinity"):
        patch_moments(x)
