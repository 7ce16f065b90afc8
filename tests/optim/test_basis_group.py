"""How bases are named: forms, globs, predicates; and what is refused, by which words."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_basis import BasisGroup, add_orthogonality_penalty, keep_orthonormal
from shared_basis.optim.find import find_groups

TREE = {
    "bases": {"body": jnp.ones((3, 3, 2, 4)), "head": jnp.ones((3, 3, 2, 3)),
              "tail": {"first": jnp.ones((3, 3, 2, 2))}},
    "layers": [{"unique": jnp.ones((3, 3, 2, 1)), "norm": {"bias": jnp.ones(3)}}, {"unique": jnp.ones((3, 3, 2, 1))}],
    "steps": jnp.zeros((2, 2), jnp.int32), "a*b": {"w": jnp.ones((2, 2))}, "linear/1": {"w": jnp.ones((2, 2))},
    "stack": jnp.ones((5, 3, 3, 2, 4)), "line": jnp.ones((3, 2, 4)),
    "wide": jnp.ones((3, 3, 5, 1)),
}


def paths(shared: Any, unique: Any = (), tree: Any = TREE, **options: Any) -> list[str]:
    (found,) = find_groups(tree, [BasisGroup(shared, unique, **options)])
    return ["/".join(path) for path in found.paths]


def test_a_path_is_a_string_or_a_tuple_of_keys_and_a_list_holds_several() -> None:
    group = BasisGroup([("bases", "body")], [("layers", "0", "unique")])
    assert BasisGroup("bases/body", "layers/0/unique") == group
    assert BasisGroup(("bases", "body"), ("layers", 0, "unique")) == group
    assert BasisGroup(["bases/body"], [("layers", 0, "unique")]) == group
    assert BasisGroup((("bases", "body"),), (("layers", "0", "unique"),)) == group  # as all wrote it in version 0.1
    assert BasisGroup(["a", "b"]).shared == (("a",), ("b",))
    assert BasisGroup(("a", "b")).shared == (("a", "b"),)
    with pytest.raises(dataclasses.FrozenInstanceError):
        group.shared = ()


@pytest.mark.parametrize(("glob", "found"), [
    ("bases/*", ["bases/body", "bases/head"]),
    ("bases/**", ["bases/body", "bases/head", "bases/tail/first"]),
    ("**/first", ["bases/tail/first"]),
    ("**/unique", ["layers/0/unique", "layers/1/unique"]),
    ("bases/[bh]*", ["bases/body", "bases/head"]),
    ("bases/?ody", ["bases/body"]),
    ("**/tail/**", ["bases/tail/first"]),
])
def test_globs_are_over_keys(glob: str, found: list[str]) -> None:
    assert paths(glob) == found


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=4), st.data())
def test_a_glob_made_of_a_path_matches_it(path: list[str], data: st.DataObject) -> None:
    pattern = list(path)
    start = data.draw(st.integers(0, len(path)))
    stop = data.draw(st.integers(start, len(path)))
    pattern[start:stop] = ["**"]
    tree: Any = np.ones((2, 2))
    for key in reversed(path):
        tree = {key: tree}
    assert paths("/".join(pattern), tree=tree) == ["/".join(path)]
    with pytest.raises(KeyError, match="matches no array"):
        paths("/".join([*pattern, "*c"]), tree=tree)


def test_predicates_see_path_and_array() -> None:
    assert paths(lambda path, array: path[0] == "bases" and array.shape[-1] > 2) == ["bases/body", "bases/head"]
    assert paths(["bases/body", lambda path, _: path[-1] == "first"]) == ["bases/body", "bases/tail/first"]


def test_keys_of_a_tuple_are_taken_literally() -> None:
    assert paths([("a*b", "w")]) == ["a*b/w"]
    assert paths([("linear/1", "w")]) == ["linear/1/w"]


def test_the_order_is_that_of_the_names_and_then_of_the_tree() -> None:
    assert paths(["bases/tail/first", "bases/*"]) == ["bases/tail/first", "bases/body", "bases/head"]


FORMS = [
    (3, TypeError, r"BasisGroup\(shared=3\): must be a path \('bases/body' or"),
    (None, TypeError, r"BasisGroup\(shared=None\)"),
    ({"bases": 1}, TypeError, r"BasisGroup\(shared=\{'bases': 1\}\)"),
    (jnp.ones((1, 2)), TypeError, r"holds a \w+: must be a path"),
    ([["bases", "body"]], TypeError, r"holds \['bases', 'body'\]: must be a path"),
    ("bases//body", ValueError, "a key of the path is empty; write 'bases/body'"),
    ("/bases", ValueError, "a key of the path is empty; write 'bases'"),
    ("", ValueError, "a key of the path is empty"),
    ([], ValueError, "names no basis"),
    (("bases/body", "bases/head"), ValueError, r"several paths or as one: write \['bases/body', 'bases/head'\] for"),
    (("bases", "*"), ValueError, r"write \['bases', '\*'\] for several, or \[\('bases', '\*'\)\] for one"),
]


@pytest.mark.parametrize(("value", "kind", "words"), FORMS)
def test_wrong_forms_are_refused_at_once(value: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        BasisGroup(value)


def test_options_of_wrong_types_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"stack_axis='0'\): must be an integer"):
        BasisGroup("bases/body", stack_axis="0")
    with pytest.raises(TypeError, match=r"num_spatial_dims=None\): must be an integer"):
        BasisGroup("bases/body", num_spatial_dims=None)
    with pytest.raises(TypeError, match="pass several paths as a list"):
        BasisGroup("bases/body", "layers/0/unique", ("layers", 1, "unique"))


REFUSED = [
    (BasisGroup("bases/bodi"), KeyError, "no basis at bases/bodi: .* has no bases/bodi; nearest: bases/body"),
    (BasisGroup("zzz"), KeyError, "has no zzz; it has .*bases/body, bases/head, …"),
    (BasisGroup("params/bases/body"), KeyError, "has no params; nearest: bases/body"),
    (BasisGroup("bases"), ValueError, r"no basis at bases: it holds bases/body, .* BasisGroup\('bases/body'\), or all "
                                      r"of them, as in BasisGroup\('bases/\*\*'\)"),
    (BasisGroup("basis/*"), KeyError, r"the glob 'basis/\*' matches no array of the parameter tree; nearest: bases/"),
    (BasisGroup(lambda path, _: False), KeyError, "the predicate <lambda> selects no array"),
    (BasisGroup("layers/0/norm/bias"), ValueError, r"layers/0/norm/bias cannot be a basis: its shape \[3\] is that of"),
    (BasisGroup("layers/**"), ValueError, "layers/0/norm/bias cannot be a basis"),
    (BasisGroup("steps"), ValueError, "steps cannot be a basis: its dtype is int32"),
    (BasisGroup("bases/*", "bases/body"), ValueError, "the basis bases/body is named twice"),
    (BasisGroup(["bases/body", "bases/*"]), ValueError, "the basis bases/body is named twice"),
    (BasisGroup("bases/body", ["layers/0/unique", "**/unique"]), ValueError, "layers/0/unique is named twice"),
    (BasisGroup("stack"), ValueError, r"stack of shape \[5, 3, 3, 2, 4\] has more axes .*stack_axis=0.*num_spatial"),
    (BasisGroup("bases/body", num_spatial_dims=1), ValueError, "bases/body of shape .* has more axes"),
    (BasisGroup("stack", stack_axis=5), ValueError, r"has no axis 5: check stack_axis"),
    (BasisGroup("a*b/w".replace("*", "?"), stack_axis=0), ValueError, r"a\*b/w of shape \[2, 2\] cannot be a stack"),
    (BasisGroup("bases/body", "line"), ValueError, r"one size.*bases/body \[3, 3, 2, 4\], line \[3, 2, 4\]; if unique"),
    (BasisGroup("bases/body", "wide"), ValueError, r"one size.*wide \[3, 3, 5, 1\]; use a separate BasisGroup"),
    (BasisGroup("stack", "bases/body", stack_axis=0), ValueError, "must have one size.*check stack_axis"),
]


@pytest.mark.parametrize(("group", "kind", "words"), REFUSED, ids=[words[:30] for _, _, words in REFUSED])
def test_what_is_no_basis_is_refused_by_both_methods(group: BasisGroup, kind: type[Exception], words: str) -> None:
    for link in (add_orthogonality_penalty(1.0, [group]), keep_orthonormal([group], optax.sgd(0.1))):
        with pytest.raises(kind, match=words):
            link.init(TREE)


def test_a_basis_belongs_to_one_group_of_a_reduction_group() -> None:
    twice = [BasisGroup("bases/body"), BasisGroup("bases/*")]
    with pytest.raises(ValueError, match="bases/body is named twice"):
        find_groups(TREE, twice)
    assert len(find_groups(TREE, [twice[0], dataclasses.replace(twice[1], reduction_group="apart")])) == 2


@pytest.mark.parametrize(("groups", "words"), [
    (BasisGroup("bases/body"), r"must be a list of them, \[BasisGroup\(…\)\]"),
    ("bases/body", "basis_groups='bases/body': must be a list"),
    (["bases/body"], "basis_groups holds 'bases/body': must be a list of BasisGroup"),
    (TREE, "basis_groups holds 'bases'"),
])
def test_groups_that_are_none_are_refused_at_once(groups: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        add_orthogonality_penalty(1.0, groups)
    with pytest.raises(TypeError, match=words):
        keep_orthonormal(groups, optax.sgd(0.1))


def test_a_basis_that_a_mask_leaves_out_is_explained() -> None:
    link = optax.masked(add_orthogonality_penalty(1.0, [BasisGroup("bases/body")]), {"bases": False, "other": True})
    with pytest.raises(KeyError, match=r"no basis at bases/body: a mask of optax.masked or .* excludes it"):
        link.init({"bases": {"body": jnp.ones((2, 2))}, "other": jnp.ones(2)})
