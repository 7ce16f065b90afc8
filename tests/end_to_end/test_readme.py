"""The README's commands and examples are true, and it is short."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from shared_basis.cli.app import define_flags

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]


def test_is_short():
    assert len(README.splitlines()) <= 150


def test_leads_with_the_two_commands():
    commands = re.findall(r"<!-- (\w+) command -->\n```sh\n(.+)\n```", README)
    assert [name for name, _ in commands] == ["main", "test"]
    assert commands[0][1].endswith("python main.py")
    assert commands[1][1].endswith("python -m pytest")


def example(word):
    """Returns the Python example of the README or of a page that holds `word`."""
    (code,) = [code for page in PAGES for code in re.findall(r"```python\n(.+?)```", page, re.DOTALL) if word in code]
    return code


@pytest.mark.slow
def test_example_of_a_published_network_runs():
    scope: dict = {}
    exec(example("create_model(\"resnet56").replace("resnet56", "resnet14"), scope)  # a shallower one, to be quick
    assert scope["logits"].shape == (8, 10)
    params = scope["variables"]["params"]
    assert params["bases"]["group1"]["first"].shape == (3, 3, 16, 16)
    updates, _ = scope["optimizer"].update(params, scope["optimizer"].init(params), params)
    assert set(updates) == set(params)


def test_example_of_an_own_model_trains_and_the_penalty_keeps_its_basis_orthonormal():
    scope: dict = {}
    exec(example("class MyModel"), scope)
    losses, unlike = train(scope["MyModel"](), scope["optimizer"])
    assert losses[-1] < losses[0] / 2
    _, unlike_without = train(scope["MyModel"](), optax.sgd(0.1, momentum=0.9))
    assert unlike < 0.7 * unlike_without


def train(model, optimizer):
    """Returns the losses of twelve steps, and how far the basis is from orthonormal after them."""
    images, labels = jax.random.normal(jax.random.key(0), (8, 6, 6, 3)), jnp.arange(8)
    variables = model.init(jax.random.key(1), images, train=False)
    params, state = variables["params"], optimizer.init(variables["params"])
    assert params["bases"]["body"].shape == (3, 3, 32, 16)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits, _ = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), labels])
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value
    losses = []
    for _ in range(12):
        params, state, value = step(params, state)
        losses.append(float(value))
    rows = params["bases"]["body"].reshape(-1, 16).T
    return losses, float(jnp.linalg.norm(rows @ rows.T - jnp.eye(16)))


FLAGS = set(define_flags(["main.py"])[0])
OTHERS = {"help", "noreport", "noname", "name", "append", "write", "subjects", "networks", "batch", "dtype", "rounds",
          "study", "tiny", "kill", "signal",
          "version"}
"""Flags that are negated, stand for others, or belong to other programs."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.splitlines()[0][:30])
def test_names_no_flag_that_main_does_not_have(page):
    assert set(re.findall(r"`--(\w+)", page)) <= FLAGS | OTHERS
