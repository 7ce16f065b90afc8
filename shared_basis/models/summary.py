"""Counts of a network compared with its plain counterpart, without data or training."""

from __future__ import annotations

from typing import Any

from shared_basis.config import ModelConfig
from shared_basis.models import create_model, plain_counterpart
from shared_basis.models.check import check_declarations, check_program
from shared_basis.models.parameters import abstract_variables, macs_of, trace, tree_size
from shared_basis.runtime.files import align


def count_network(config: ModelConfig, num_classes: int, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Counts the network of `config` by abstract evaluation.

    Returns:
      `model`, `parameters` (trainable), `macs` (multiply-accumulates for one image `[H, W, C]`) and `groups`: the same
      by top-level module, with `shared_parameters`, those in shared bases. Bases of a group that is not such a module
      are listed as `bases/<group>`, products of the network's own method under the name of its class.

    Raises:
      UserError: see `create_model` and `check_network`.
    """
    model = create_model(config.name, num_classes=num_classes, stem=config.stem)
    check_declarations(model)
    variables = abstract_variables(model, image_shape)
    program = trace(model, variables, image_shape)
    check_program(model, variables, program)
    macs = macs_of(model, program)
    params = dict(variables["params"])
    bases = params.pop("bases", {})
    groups: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys((*macs, *params)):  # in order of computation
        owner = name.removesuffix("_norm")
        row = groups.setdefault(owner if owner in macs else name, {"parameters": 0, "shared_parameters": 0, "macs": 0})
        shared = tree_size(bases.get(name, {})) if name in params else 0
        row["parameters"] += tree_size(params.get(name, {})) + shared
        row["shared_parameters"] += shared
        row["macs"] += macs.get(name, 0)
    for name in bases.keys() - params.keys():
        size = tree_size(bases[name])
        groups[f"bases/{name}"] = {"parameters": size, "shared_parameters": size, "macs": 0}
    return {"model": config.name, **{key: sum(row[key] for row in groups.values()) for key in ("parameters", "macs")},
            "groups": groups}


def compare_with_plain(config: ModelConfig, num_classes: int, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns `count_network`, with the plain counterpart's counts as `plain` and the relative saving as `saving`.

    The counterpart's `groups` include all groups of the network; those that it lacks have zero parameters and MACs.
    """
    counts = count_network(config, num_classes, image_shape)
    plain_config = ModelConfig(name=plain_counterpart(config.name), stem=config.stem)
    plain = count_network(plain_config, num_classes, image_shape)
    absent = {name: {"parameters": 0, "shared_parameters": 0, "macs": 0} for name in counts["groups"]}
    plain["groups"] = absent | plain["groups"]
    saving = {key: 1 - counts[key] / plain[key] for key in ("parameters", "macs")}
    return {**counts, "image_shape": list(image_shape), "num_classes": num_classes, "plain": plain, "saving": saving}


def render(comparison: dict[str, Any]) -> str:
    """Returns the comparison as a plain-text table."""
    plain = comparison["plain"]
    rows: list[tuple[str, ...]] = [("", "parameters", "of these shared", "MACs", "plain parameters", "plain MACs")]
    for name, row in comparison["groups"].items():
        other = plain["groups"][name]
        rows.append((name, *(f"{value:,}" for value in (
            row["parameters"], row["shared_parameters"], row["macs"], other["parameters"], other["macs"]))))
    shared = sum(row["shared_parameters"] for row in comparison["groups"].values())
    rows.append(("total", *(f"{value:,}" for value in (
        comparison["parameters"], shared, comparison["macs"], plain["parameters"], plain["macs"]))))
    height, width, channels = comparison["image_shape"]
    title = (f"{comparison['model']}, images {height}×{width}×{channels}, {comparison['num_classes']} classes; "
             "MACs: multiply-accumulates of one image")
    return "\n".join([title, *align(rows, right=True), render_saving(comparison)])


def render_saving(comparison: dict[str, Any]) -> str:
    """Returns one line with the counts compared with the plain counterpart."""
    plain = comparison["plain"]

    def change(key: str) -> str:
        saved = 100 * comparison["saving"][key]
        return f"{abs(saved):.1f} % {'fewer' if saved > 0 else 'more'} than" if saved else "as many as"

    if comparison["model"] == plain["model"]:
        return f"{comparison['parameters']:,} parameters, {comparison['macs']:,} MACs; this is the plain network"
    return (f"{comparison['parameters']:,} parameters ({change('parameters')} the {plain['parameters']:,} of "
            f"plain {plain['model']}), {comparison['macs']:,} MACs ({change('macs')} {plain['macs']:,})")
