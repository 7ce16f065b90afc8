"""What pyproject.toml cannot say: the recipes of configs/ are installed within the package."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["shared_basis", "shared_basis.*"]), "shared_basis.configs"],
      package_dir={"shared_basis.configs": "configs"})
