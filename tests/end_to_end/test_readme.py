"""The README's commands, examples and table are true."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from shared_basis.cli.app import define_flags
from studies.published import table

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_leads_with_the_two_commands():
    commands = re.findall(r"<!-- (\w+) command -->\n```sh\n(.+)\n```", README)
    assert [name for name, _ in commands] == ["main", "test"]
    assert commands[0][1].endswith("python main.py")
    assert commands[1][1].endswith("python -m pytest")


def example(word):
    """Returns the Python example that holds `word`."""
    (code,) = [code for code in re.findall(r"```python\n(.+?)```", README, re.DOTALL) if word in code]
    return code


@pytest.mark.slow
def test_example_from_python_runs():
    scope: dict = {}
    exec(example("create_model").replace("resnet56", "resnet14"), scope)  # the same on a shallower network, to be quick
    assert scope["logits"].shape == (8, 10)
    params = scope["variables"]["params"]
    assert params["bases"]["group1"]["first"].shape == (3, 3, 16, 16)
    updates, _ = scope["optimizer"].update(params, scope["optimizer"].init(params), params)
    assert set(updates) == set(params)


def test_example_of_an_own_model_trains_and_the_penalty_holds_its_basis_together():
    scope: dict = {}
    exec(example("class MyModel"), scope)
    losses, unlike = train(scope["MyModel"](), scope["optimizer"])
    assert losses[-1] < losses[0] / 2
    _, unlike_without = train(scope["MyModel"](), optax.sgd(0.1, momentum=0.9))
    assert unlike < 0.7 * unlike_without


def train(model, optimizer):
    """Returns the losses of five steps, and how far the basis is from orthonormal after them."""
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


@pytest.mark.slow
def test_table_of_networks_is_current():
    """If not: paste the output of python -m studies.published between the marks."""
    (block,) = re.findall(r"<!-- networks -->\n(.+?)\n<!-- end of networks -->", README, re.DOTALL)
    assert block == table()


FLAGS = set(define_flags(["main.py"])[0]) - {"help", "version"}
OTHERS = {"zone", "worker", "command", "nodes", "signal", "kills", "seed", "write", "noreport", "study"}
"""Flags of gcloud, srun and the torture script, and one of main.py by its negative."""


def test_names_every_flag_of_main():
    assert [flag for flag in sorted(FLAGS) if f"`--{flag}" not in README and f" --{flag}=" not in README] == []


def test_names_no_flag_that_main_does_not_have():
    assert {"config", "mode", "workdir", "distributed"} <= FLAGS
    assert set(re.findall(r"--(\w+)(?:[=.`]|$)", README)) <= FLAGS | OTHERS
