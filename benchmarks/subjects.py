"""The subjects that are measured in a single process: training step, evaluation, whole trainer, penalty."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.cases import Case, Timed, beside_plain, make_step, random_images, repeated
from benchmarks.common import in_turns
from benchmarks.comparison import Comparison, torch_frameworks
from benchmarks.session import Part, Session, spread
from benchmarks.trainer import trainers
from shared_basis.models import create_model
from shared_basis.optim.basis_group import BasisGroup
from shared_basis.optim.find import find_groups, paths_of
from shared_basis.optim.orthonormal import retraction
from shared_basis.optim.penalty import orthogonality_penalty

PENALTY_ROUNDS = 3
"""Rounds of the penalty per round of other subjects: its share is small, and differences of steps are noisy."""


def step(session: Session, cases: Sequence[Case]) -> Part:
    """Measures the compiled training step, compared with PyTorch and the plain network."""
    found = Comparison(session, "step", beside_plain(cases), torch_frameworks(session, cases[0].dtype))
    found.measure(lambda case: Timed(make_step(case).run, session.seconds),
                  lambda trainer: Timed(trainer.run, session.seconds))
    return Part(found.tables("step"), found.notes)


def evaluation(session: Session, cases: Sequence[Case]) -> Part:
    """Measures the evaluator on one resident batch, compared with PyTorch and the plain network."""
    scored = [dataclasses.replace(case, batch=case.eval_batch) for case in cases]
    found = Comparison(session, "evaluation", beside_plain(scored), torch_frameworks(session, cases[0].dtype))
    found.measure(lambda case: Timed(_our_evaluation(case), session.seconds), lambda trainer: Timed(repeated(
        functools.partial(trainer.evaluate, trainer.images, trainer.labels)), session.seconds))
    return Part(found.tables("batch"), found.notes)


def _our_evaluation(case: Case) -> Callable[[int], float]:
    # The step of this program is compiled for a batch of 16 and not used.
    made = make_step(dataclasses.replace(case, batch=16), test=case.batch)
    state = made.state()
    variables = jax.block_until_ready({"params": state.params, "batch_stats": state.batch_stats})
    return repeated(functools.partial(made.program.evaluate["test"], variables))


def trainer(session: Session, cases: Sequence[Case]) -> Part:
    """Measures the images per second of the training loop relative to those of the compiled step."""
    table = [["trainer over bare step", "ratio", "trainer, images/s", "bare step, images/s"]]
    for case in cases:
        session.print_progress(f"trainer: compiling {case.network}")
        with tempfile.TemporaryDirectory() as root:
            found = in_turns(trainers(case.config(), functools.partial(_an_epoch, case, session.platform), ("device",),
                                      Path(root)), session.rounds)
        ratio = [whole / bare for whole, bare in zip(found["device"], found["bare"], strict=True)]
        table.append([f"{case.network}, batch {case.batch}",
                      session.add("trainer", case, "ratio: images/s over bare step", ratio),
                      session.add("trainer", case, "images/s", found["device"]),
                      session.add("trainer", case, "images/s of the bare step", found["bare"])])
    return Part([table])


def _an_epoch(case: Case, platform: str, config: Any, mesh: Any) -> Any:
    """Returns images for an epoch, with few steps on a CPU, where they are slow."""
    steps = 5 if platform == "cpu" else 20 if case.image_size > 64 else 100
    return random_images(case, steps * case.batch, case.batch, config)


def penalty(session: Session, cases: Sequence[Case]) -> Part:
    """Measures the share of the penalty in a step, in two ways, and that of exact orthogonality."""
    table = [["penalty", "its gradient alone over the step", "step with λ = 10 over step with λ = 0",
              "exact orthogonality alone over the step", "gradient alone, ms", "exact alone, ms", "step, ms"]]
    for case in cases:
        groups = create_model(case.network, num_classes=case.classes, stem=case.stem).basis_groups(case.elements)
        if not groups:
            continue
        session.print_progress(f"penalty: compiling {case.network}")
        made, without = make_step(case), make_step(case, orthogonality__weight=0.0)
        gradient, exact = _alone(made.state().params, groups)
        session.print_progress(f"penalty: {PENALTY_ROUNDS * session.rounds} rounds of {case.network}")
        found = in_turns({name: Timed(steps, session.seconds) for name, steps in (
            ("with", made.run), ("without", without.run), ("gradient", repeated(gradient)),
            ("exact", repeated(exact)))}, PENALTY_ROUNDS * session.rounds)

        def ratio(above: str, below: str, found: dict[str, list[float]] = found) -> list[float]:
            return [a / b for a, b in zip(found[above], found[below], strict=True)]
        table.append([f"{case.network}, batch {case.batch}",
                      session.add("penalty", case, "ratio: gradient alone over step", ratio("gradient", "with")),
                      session.add("penalty", case, "ratio: step over step without", ratio("with", "without")),
                      session.add("penalty", case, "ratio: exact orthogonality alone over step",
                                  ratio("exact", "with")),
                      *(spread(found[name], 1000) for name in ("gradient", "exact", "with"))])
        session.add("penalty", case, "seconds of the gradient alone", found["gradient"])
        session.add("penalty", case, "seconds per step", found["with"])
    return Part([table] if len(table) > 1 else [], [] if len(table) > 1 else ["No network here has a basis."])


def _alone(params: Any, groups: Sequence[BasisGroup]) -> tuple[Callable[[], object], Callable[[], object]]:
    """Returns two functions that only use the arrays of `groups` and wait for their results.

    The first computes the gradient of the penalty, the second the retraction of an update.
    """
    named: dict[str, Any] = {}
    for path in paths_of(find_groups(params, groups)):
        source, target = params, named
        for key in path[:-1]:
            source, target = source[key], target.setdefault(key, {})
        target[path[-1]] = source[path[-1]]
    gradient = jax.jit(jax.grad(lambda tree: orthogonality_penalty(tree, groups)))
    link = retraction(groups)
    retract = jax.jit(lambda tree: link.update(tree, link.init(tree), tree)[0])
    return (lambda: jax.block_until_ready(gradient(named))), (lambda: jax.block_until_ready(retract(named)))
