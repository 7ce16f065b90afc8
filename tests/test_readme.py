"""The README's commands and examples are true."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_leads_with_the_two_commands():
    commands = re.findall(r"<!-- (\w+) command -->\n```sh\n(.+)\n```", README)
    assert [name for name, _ in commands] == ["main", "test"]
    assert commands[0][1].endswith("-m pytest") is False
    assert commands[0][1].endswith("python main.py")
    assert commands[1][1].endswith("python -m pytest")


def test_example_from_python_runs():
    (example,) = [code for code in re.findall(r"```python\n(.+?)```", README, re.DOTALL) if "create_model" in code]
    scope: dict = {}
    exec(example.replace("resnet56", "resnet14"), scope)  # the same code on a shallower network, to be quick
    assert scope["logits"].shape == (8, 10)
    params = scope["variables"]["params"]
    assert params["bases"]["group1"]["first"].shape == (3, 3, 16, 16)
    updates, _ = scope["optimizer"].update(params, scope["optimizer"].init(params), params)
    assert set(updates) == set(params)


@pytest.mark.parametrize("flag", ["config", "mode", "workdir", "checkpoint", "json"])
def test_names_every_flag_of_main(flag):
    assert f"`--{flag}" in README


def test_names_no_flag_that_main_does_not_have():
    main = (pathlib.Path(__file__).parent.parent / "main.py").read_text()
    known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', main))
    assert set(re.findall(r"--(\w+)(?:[=.`]|$)", README)) <= known
