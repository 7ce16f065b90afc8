"""The kinds of filters of a layer and the validation of its inputs, shared by the Linen and NNX modules."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from shared_basis.nn.types import Array


class Form(enum.Enum):
    """The kind of filters of a layer."""

    OWN_KERNEL = enum.auto()
    BASIS = enum.auto()
    WHOLE_FILTERS = enum.auto()
    TEMPLATES = enum.auto()


def kernel_shape(size: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the kernel's size by axis; a single number means a square kernel."""
    return (size, size) if isinstance(size, int) else tuple(size)


def form_of(shared: Array | None, unique_rank: int, whole_filters: bool, axes: int) -> Form:
    """Returns what the filters are made of for a layer with `axes` spatial axes that is called with `shared`.

    Raises:
      TypeError: `shared` is not an array: a dict of bases, or `train` in its place.
    """
    if shared is None:
        return Form.BASIS if unique_rank else Form.OWN_KERNEL
    if not hasattr(shared, "ndim"):
        advice = "pass train by name, train=True" if isinstance(shared, bool) else "pass one, as bases['body']"
        raise TypeError(f"shared is a {type(shared).__name__}: must be an array [*k, C, s], or None; {advice}")
    if shared.ndim == axes + 3:  # the last axis counts templates, each of which is a whole kernel
        return Form.TEMPLATES
    return Form.WHOLE_FILTERS if whole_filters else Form.BASIS


def check_arrays(x: Array, shared: Array | None, form: Form, size: tuple[int, ...], features: int, groups: int,
                 shared_groups: int) -> None:
    """Raises `ValueError` unless images `x [..., *image, C]` and `shared` fit a layer with kernels of shape `size`."""
    if x.ndim < len(size) + 1:
        raise ValueError(f"x of shape {x.shape}: a kernel of shape {size} needs {len(size)} spatial axes and channels")
    channels = x.shape[-1]
    for name, count in (("feature_group_count", groups), ("shared_feature_group_count", shared_groups)):
        if channels % count:
            raise ValueError(f"{name}={count}: must divide the {channels} channels of x")
    if shared is None:
        return
    ends = {Form.BASIS: ("elements",), Form.WHOLE_FILTERS: (features,), Form.TEMPLATES: (features, "templates")}[form]
    needed = (*size, channels // shared_groups, *ends)
    fits = len(shared.shape) == len(needed) and all(
        isinstance(need, str) or have == need for have, need in zip(shared.shape, needed, strict=True))
    if not fits or not jnp.issubdtype(shared.dtype, jnp.floating):
        raise ValueError(f"shared array of shape {shared.shape} and type {shared.dtype}: this layer needs floats of "
                         f"shape ({', '.join(map(str, needed))})")


def check_norm(norm: object) -> None:
    """Raises `ValueError` unless `norm` names what is applied between basis and coefficients."""
    if not (norm in ("batch", None) or callable(norm)):
        raise ValueError(f"norm={norm!r}: must be 'batch', None, or a callable that returns a normalisation module, "
                         "such as functools.partial(flax.linen.GroupNorm, num_groups=4)")


def whether_to_train(train: bool | None, *use_running_average: bool | None) -> bool:
    """Returns whether to use batch statistics, given by any of the arguments.

    Raises:
      TypeError: one of them is an array, such as a traced value.
      ValueError: none of the arguments is given, or they contradict each other.
    """
    if any(isinstance(value, (jax.Array, np.ndarray)) for value in (train, *use_running_average)):
        raise TypeError("train and use_running_average must be Python bools, not arrays: mark them static in jit and "
                        "remat (static_argnums or static_argnames)")
    said = {train} | {None if average is None else not average for average in use_running_average}
    said.discard(None)
    if len(said) != 1:
        what = "contradictory train and use_running_average" if said else "neither train nor use_running_average given"
        raise ValueError(f"{what}: a layer with batch statistics needs one of them, e.g. train=True")
    return bool(said.pop())
