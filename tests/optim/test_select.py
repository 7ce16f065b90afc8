"""Parameters that patterns of the configuration choose."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import tiny_network, user_error

from shared_basis.models.parameters import abstract_variables
from shared_basis.optim.paths import leaves_by_path
from shared_basis.optim.select import frozen, rate_factors

PARAMS = abstract_variables(tiny_network(), (8, 8, 1))["params"]
NAMES = {"/".join(path) for path in leaves_by_path(PARAMS)}
HEAD = {"head/kernel", "head/bias"}
BASES = {name for name in NAMES if name.startswith("bases/") or name.endswith("/unique")}


def names(tree: object) -> set[str]:
    return {"/".join(path) for path, chosen in leaves_by_path(tree).items() if chosen}


@pytest.mark.parametrize(("patterns", "expected"), [
    ("", set()), ("**", NAMES), ("**,!head/**", NAMES - HEAD), ("!head/** , **", NAMES),
    ("basis", BASES), ("basis,!bases/**", {name for name in BASES if name.endswith("unique")}),
    ("head/kernel", {"head/kernel"}), ("bias", {"head/bias"}),
    ("**,!norm", {name for name in NAMES if "norm/" not in name}),
], ids=lambda value: value if isinstance(value, str) else "")
def test_the_last_pattern_that_matches_freezes_or_lets_train(patterns: str, expected: set[str]) -> None:
    assert names(frozen(PARAMS, patterns)) == expected


def test_the_last_factor_that_matches_counts() -> None:
    factors = {"/".join(path): factor for path, factor in leaves_by_path(
        rate_factors(PARAMS, "kernel=2,basis=0.5,head/**=10")).items()}
    kernels = {name for name in NAMES if name.endswith("/kernel")} - HEAD
    assert "stem/kernel" in kernels
    for factor, chosen in ((2, kernels), (0.5, BASES), (10, HEAD), (1, NAMES - kernels - BASES - HEAD)):
        assert {factors[name] for name in chosen} == {factor}


def test_a_glob_that_matches_nothing_is_refused_with_what_there_is() -> None:
    with user_error("train.freeze='heads/**': matches no parameter of this network; give a kind (basis, coefficients, "
                    "kernel, norm, bias) or a glob of paths, such as bases/**, ", "head/**"):
        frozen(PARAMS, "!heads/**")
    with user_error("optimizer.learning_rate_factors='layer4/**': matches no parameter"):
        rate_factors(PARAMS, "layer4/**=2")


def test_a_kind_that_a_network_does_not_have_matches_nothing() -> None:
    plain = {"stem": {"kernel": np.ones((3, 3, 1, 4))}}
    assert names(frozen(plain, "basis")) == set()
