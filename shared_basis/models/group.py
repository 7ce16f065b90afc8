"""A residual group of a network: its blocks, one after another or in a loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from shared_basis.nn.ops import scan_with_remat, unstack
from shared_basis.nn.types import Array


class Group(nn.Module):
    """A residual group (or stage): a plain first block, with its own stride and input width, then blocks that share."""

    make_block: Callable[[bool, str], nn.Module]
    """Creates a block, given whether it is the first one and its name."""
    blocks: int
    scan_blocks: bool = False
    """Whether blocks after the first one are computed in a loop."""

    @nn.compact
    def __call__(self, x: Array, shared: Mapping[str, Array], *, train: bool) -> Array:
        """Applies the blocks to `x [N, H, W, C]`; `shared` contains the shared array of each layer that uses one."""
        x = self.make_block(True, "block1")(x, {}, train=train)
        names = [f"block{index}" for index in range(2, self.blocks + 1)]
        blocks = [self.make_block(False, name) for name in names]
        if len(names) > 1:
            alike = blocks[0].clone(parent=None, name=None)
            if self.is_initializing():
                self._initialise(alike, names, x, shared)
            if self.scan_blocks:
                return self._loop(alike, names, x, shared, train)
        for block in blocks:
            x = block(x, shared, train=train)
        return x

    def _initialise(self, block: nn.Module, names: list[str], x: Array, shared: Mapping[str, Array]) -> None:
        """Initialises all blocks `names` at once; one by one, deep networks would take long to compile."""
        made = jax.lax.map(lambda key: block.init(key, x, shared, train=False),
                           jax.random.split(self.make_rng("params"), len(names)))
        for name, variables in zip(names, unstack(made, len(names)), strict=True):
            for kind, values in variables.items():
                self.put_variable(kind, name, values)

    def _loop(self, block: nn.Module, names: list[str], x: Array, shared: Mapping[str, Array], train: bool) -> Array:
        """Applies the blocks `names` to `x` in a loop; variables are stored under each block's name as usual."""
        # Each block draws its own numbers; while initialising, Flax draws from 'params' if there is no 'dropout'.
        keys = {stream: self.make_rng(stream) for stream in ("params", "dropout") if self.has_rng(stream)}

        def body(x: Array, inputs: tuple[Array, Mapping[str, Any]]) -> tuple[Array, Mapping[str, Any]]:
            index, variables = inputs
            return block.apply(variables, x, shared, train=train, mutable=["batch_stats"] if train else [],
                               rngs={stream: jax.random.fold_in(key, index) for stream, key in keys.items()})

        variables = [{kind: named[name] for kind, named in self.variables.items()} for name in names]
        x, updated = scan_with_remat(body, x, list(enumerate(variables)))
        if train:
            for name, changed in zip(names, updated, strict=True):
                for kind, values in changed.items():
                    self.put_variable(kind, name, values)
        return x
