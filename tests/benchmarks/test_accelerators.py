"""What compilers say of accelerators that are not there: programs are read right, and rows become tables."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, TINY, assert_refused_in_one_line, mesh_of, tiny_network, user_error

from benchmarks import accelerator_kernels, accelerators, hlo, records
from benchmarks.accelerator_kernels import KernelsRow, purpose
from benchmarks.accelerator_rows import AcceleratorRow, newest, tables
from benchmarks.accelerator_targets import EVALUATION, STEP, STOCK, TARGETS, Figures, Program, count_flops, trace
from benchmarks.cases import Case
from benchmarks.common import PAGE, section_of, versions
from benchmarks.session import OURS
from benchmarks.stock_networks import has_stock, make_stock
from shared_basis.models import create_model

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (param_0: f32[8,4]) -> f32[8,4] {
  %param_0 = f32[8,4]{1,0} parameter(0)
  ROOT %unseen = f32[8,4]{1,0} add(%param_0, %param_0)
}

%body (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %arg = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%arg), index=1
  %in_loop = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i, %in_loop)
}

%called (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %in_call = f32[8,4]{1,0} copy(%p)
}

ENTRY %main.1 (a: f32[8,4], b: u8[10], n: s32[]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = u8[10]{0} parameter(1)
  %n = s32[] parameter(2), metadata={op_name="state[\\'n\\']"}
  %one = f32[] constant(1)
  %flat = f32[32]{0} bitcast(%a)
  %twice = (bf16[8,4]{1,0}, /*index=1*/f32[4]{0}) fusion(%a, %flat, %b, %one), kind=kInput, calls=%fused, metadata={op_name="jit(step)/net/first/(x)/add" stack_frame_id=3}
  %half = bf16[8,4]{1,0} get-tuple-element(%twice), index=0
  %same = bf16[8,4]{1,0} get-tuple-element(%twice), index=0
  %sums = f32[4]{0} get-tuple-element(%twice), index=1
  %conv = (bf16[8,2]{1,0}, u8[1000]{0}) custom-call(%half, %same, %sums), custom_call_target="__cudnn$convForward", backend_config={"a":"(b"}
  %start = ((f32[4]{0}), f32[4]{0}) all-reduce-start(%sums), to_apply=%called
  %done = f32[4]{0} all-reduce-done(%start)
  %carry = (s32[], f32[8,4]{1,0}) tuple(%n, %a)
  %loop = (s32[], f32[8,4]{1,0}) while(%carry), condition=%called, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %end = f32[8,4]{1,0} call(%a), to_apply=%called
}
"""  # noqa: E501

TPU_PROGRAM = """
ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %near = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%a), kind=kLoop, calls=%f
  %start = ((bf16[8,128]{1,0:T(8,128)(2,1)}), bf16[2,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:2], [0:128]}
  %part = bf16[2,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%start)
  ROOT %far = bf16[8,128]{1,0:T(8,128)(2,1)} add(%near, %near)
}
"""  # noqa: E501


def test_every_instruction_of_the_program_is_a_kernel_unless_it_only_names_something() -> None:
    found = {kernel.name: kernel for kernel in hlo.kernels(PROGRAM)}
    assert {name: (kernel.kind, kernel.times) for name, kernel in found.items()} == {
        "twice": ("kInput", 1), "conv": ("__cudnn$convForward", 1), "start": ("all-reduce-start", 1),
        "in_loop": ("kLoop", 5), "in_call": ("copy", 1)}
    assert found["twice"].source == "jit(step)/net/first/(x)/add"
    assert [str(array) for array in found["conv"].writes] == ["bf16[8,2]{1,0}"]


def test_each_array_is_read_once_and_workspaces_not_at_all() -> None:
    found = {kernel.name: kernel.bytes for kernel in hlo.kernels(PROGRAM)}
    assert found == {"twice": 8 * 4 * 4 + 10 + 4 + 8 * 4 * 2 + 4 * 4, "conv": 8 * 4 * 2 + 4 * 4 + 8 * 2 * 2,
                     "start": 2 * 4 * 4, "in_loop": 5 * 2 * 8 * 4 * 4, "in_call": 2 * 8 * 4 * 4}


def test_what_a_tpu_keeps_in_its_own_memory_is_not_in_the_main_memory() -> None:
    found = {kernel.name: kernel.bytes for kernel in hlo.kernels(TPU_PROGRAM)}
    assert found == {"near": 8 * 128 * 2, "start": 2 * 128 * 2, "far": 8 * 128 * 2}


def test_sizes_of_arrays() -> None:
    sizes = {"pred": 6, "s4": 3, "f8e4m3fn": 6, "bf16": 12, "s64": 48, "c64": 48, "token": 0}
    assert {dtype: hlo.Array(dtype, (2, 3)).bytes for dtype in sizes} == sizes


def test_collectives_are_found_once_each_with_what_is_exchanged() -> None:
    more = PROGRAM.replace("%p = f32[8,4]{1,0} parameter(0)", "%p = f32[8,4]{1,0} parameter(0)\n"
                           "  %g = f32[16,4]{1,0:T(8,128)S(1)} all-gather(%p, %p), dimensions={0}")
    assert [(one.operation, one.bytes, one.beside, one.is_reduce) for one in hlo.collectives(more)] == [
        ("all-gather", 2 * 8 * 4 * 4, 0, False), ("all-reduce", 4 * 4, 0, True)]


def test_a_collective_is_hidden_by_the_kernels_between_its_beginning_and_its_end() -> None:
    start = "  %start = ((f32[4]{0}), f32[4]{0}) all-reduce-start(%sums), to_apply=%called\n"
    later = PROGRAM.replace(start, "").replace("  %same =", f"{start}  %same =").replace(
        "  %half =", "  %sums = f32[4]{0} get-tuple-element(%twice), index=1\n  %half =", 1)
    assert [one.beside for one in hlo.collectives(PROGRAM)] == [0]
    assert [one.beside for one in hlo.collectives(later)] == [1], "the convolution; the rest only names something"


def test_a_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.kernels("module @jit_step {}")


def test_the_list_has_a_line_for_each_kernel() -> None:
    head, *lines = hlo.render(hlo.kernels(PROGRAM)).splitlines()
    assert head.split("\t") == ["name", "kind", "MB", "times", "reads", "writes", "source"]
    assert lines[0].split("\t") == ["twice", "kInput", "0.000", "1", "f32[8,4]{1,0} u8[10]{0} f32[]",
                                    "bf16[8,4]{1,0} f32[4]{0}", "jit(step)/net/first/(x)/add"]
    assert len(lines) == 5


def test_a_program_of_this_jax_can_be_read() -> None:
    """Of CPU, whose text has the same form; nothing is run."""
    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y) @ x, x)
    text = jax.jit(loop).lower(jax.ShapeDtypeStruct((16, 16), jnp.float32)).compile().as_text()
    assert max(kernel.bytes for kernel in hlo.kernels(text)) >= 2 * 16 * 16 * 4


def flops_of(function: Any, *shapes: tuple[int, ...]) -> int:
    return count_flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr)


def test_flops_are_those_of_products_and_convolutions() -> None:
    def convolve(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                            feature_group_count=groups)
    forward = 2 * (5 * 4 * 4 * 6) * (3 * 3 * 2)
    assert flops_of(lambda x, y: jnp.sin(x) @ y, (3, 4), (4, 5)) == 2 * 3 * 4 * 5
    assert flops_of(convolve, (5, 8, 8, 2), (3, 3, 2, 6)) == forward
    assert flops_of(lambda x, k: convolve(x, k, 2), (5, 8, 8, 2), (3, 3, 1, 6)) == forward // 2
    assert flops_of(jax.grad(lambda x, k: convolve(x, k).sum(), (0, 1)), (5, 8, 8, 2), (3, 3, 2, 6)) == 3 * forward
    assert flops_of(lambda x: jax.lax.scan(lambda y, _: (jax.jit(jnp.matmul)(y, y), None), x, length=7)[0],
                    (2, 2)) == 7 * 2 * 2 * 2 * 2


@pytest.mark.parametrize("changes", [
    {}, pytest.param({"project": True, "stem": "imagenet"}, marks=pytest.mark.slow)])
def test_stock_networks_compute_the_same(changes: dict[str, Any]) -> None:
    ours, random = tiny_network(3, blocks=(1, 2), widths=(4, 8), scan_blocks=False, **changes), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: ours.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False))
    variables = jax.tree.map(lambda leaf: jnp.asarray(random.uniform(0.5, 1, leaf.shape), jnp.float32), shapes)
    images = jnp.asarray(random.normal(0, 0.1, (4, 8, 8, 3)), jnp.float32)
    stock = make_stock(ours)
    assert stock.basis_groups("shared+unique") == ours.basis_groups("shared+unique")
    (logits, updated), (found, moved) = jax.jit(lambda: tuple(
        network.apply(variables, images, train=True, mutable=["batch_stats"]) for network in (ours, stock)))()
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), moved, updated)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_both_programs_of_a_run_are_lowered_for_accelerators(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    """Without their compilers: on devices of this machine, in the forms for theirs."""
    for module in ("training.program", "evaluation.evaluator"):
        monkeypatch.setattr(f"shared_basis.{module}.platform_of", lambda mesh: platform)
    case, mesh = Case(TINY, 8, 8, "bfloat16", eval_batch=10), mesh_of(4)
    for program, size in ((STEP, 8), (EVALUATION, 12)):
        traced, batch = trace(program, case, mesh)
        assert batch == size
        text = traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,)).as_text()
        assert f"tensor<{size}x8x8x3xui8>" in text
        assert "mhlo.num_partitions = 4" in text
        assert "bf16" in text


def test_which_networks_are_written_in_stock_modules() -> None:
    assert [has_stock(name) for name in ("resnet32", "resnet34-s32u1", "resnet20-s0u4")] == [True] * 3
    assert [has_stock(name) for name in ("resnet50", "resnet20-tied", "densenet121", "mobilenetv2",
                                         "resnext50_32x4d")] == [False] * 5
    with pytest.raises(ValueError, match="has_stock"):
        make_stock(create_model("resnet50"))


def make_row(**changes: Any) -> AcceleratorRow:
    return dataclasses.replace(AcceleratorRow(
        "2026-11-26", "abc1234", "0.10.2", "0.12.8", "jax-cuda12-pjrt 0.10.2", "h100x1", "resnet14-s4u1", "resnet14",
        OURS, STEP, 256, 32, "bfloat16", 300, 4e9, 4e9, 2e9, 0, 0, 2**20 * 100.0, 2**20 * 8.0, 5e6, 3.0, 9.5,
        "python …"), **changes)


def test_ratios_are_to_the_plain_network_and_to_stock_modules_of_the_same_step() -> None:
    row, plain = make_row(), make_row(network="resnet14", kernels=200, bytes=2e9, flops=1e9, temporary_bytes=2**20 * 50)
    others = [make_row(network="resnet14", bytes=1.0, **change) for change in (
        {"batch": 8}, {"dtype": "float32"}, {"image_size": 224}, {"target": "h100x8"}, {"modules": STOCK},
        {"program": EVALUATION})]
    stock = make_row(modules=STOCK, kernels=150, bytes=5e9)
    text = tables([row], [plain, stock, row, *others])
    head, _, line = text.splitlines()[-3:]
    names, values = ([cell.strip() for cell in part.split("|")] for part in (head, line))
    cells = dict(zip(names, values, strict=True))
    assert cells.pop("") == ""
    assert cells == {
        "network, images per step": "resnet14-s4u1, bfloat16, 256 of 32²", "bytes over plain": "2.00",
        "kernels over plain": "1.50", "temporary over plain": "2.00", "FLOPs over plain": "2.00",
        "bytes over stock": "0.80", "kernels over stock": "2.00", "kernels": "300", "MB": "4,000",
        "MB in main memory": "4,000", "GFLOP": "2", "all-reduces": "0", "other collectives": "0",
        "exchanged, MB": "5.00", "collectives beside kernels": "3", "arguments, MiB": "8", "temporary, MiB": "100",
        "compiled in s": "10", "commit": "abc1234"}
    assert text.startswith("**h100x1**, one NVIDIA H100 (jax 0.10.2, flax 0.12.8, compiled by jax-cuda12-pjrt 0.10.2):")
    assert "| – | – | – | – |" in tables([plain], [plain])


def test_an_older_row_shows_what_it_has() -> None:
    old = make_row(argument_bytes=float("nan"), exchanged_bytes=float("nan"), hidden_collectives=float("nan"))
    assert "| 0 | 0 | – | – | – | 100 |" in tables([old], [old])
    assert "| resnet14-s4u1, evaluation, bfloat16, 256 of 32² |" in tables([make_row(program=EVALUATION)], [])


def test_the_newest_row_of_a_step_counts() -> None:
    old, other, new = make_row(kernels=1), make_row(target="v5e:2x2"), make_row(kernels=2)
    assert newest([other, old, new]) == [new, other]


def test_rows_come_back(tmp_path: Path) -> None:
    records.append(tmp_path / "x.csv", [make_row()])
    assert records.read(tmp_path / "x.csv", AcceleratorRow) == [make_row()]


def test_a_row_says_what_was_compiled_and_how_to_do_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "versions", lambda packages: dict.fromkeys(packages, "1.2"))
    figures = Figures(kernels=3, bytes=2.0, main_memory_bytes=1.0, flops=4.0, all_reduces=5, other_collectives=6,
                      temporary_bytes=7.0, argument_bytes=9.0, exchanged_bytes=10.0, hidden_collectives=11.0,
                      compile_seconds=8.0)
    case = Case("resnet34-s32u1", 64, 224, "bfloat16")
    row = accelerators.row_of("v5e:2x2", case, OURS, 0, STEP, Program(64, figures, ""))
    assert (row.network, row.plain, row.compiler) == ("resnet34-s32u1", "resnet34", "libtpu 1.2")
    assert {name: getattr(row, name) for name in vars(figures)} == vars(figures)
    again = accelerators.parse(row.command.split()[3:])
    assert list(accelerators.cases_of(again)) == [("v5e:2x2", case, OURS, STEP)]
    scored = accelerators.row_of("v5e:2x2", case, OURS, 0, EVALUATION, Program(1000, figures, ""))
    assert (scored.program, scored.batch) == (EVALUATION, 1000)
    assert list(accelerators.cases_of(accelerators.parse(scored.command.split()[3:]))) == [
        ("v5e:2x2", case, OURS, EVALUATION)]


def test_statistics_of_groups_of_images_are_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "versions", lambda packages: dict.fromkeys(packages, "1.2"))
    figures = Figures(1, 1.0, 1.0, 1.0, 1, 0, 1.0, 1.0, 1.0, 1.0, 1.0)
    row = accelerators.row_of("v5e:2x2", Case("resnet34", 64), OURS, 16, STEP, Program(64, figures, ""))
    assert row.modules == f"{OURS}, norm_images=16"
    assert accelerators.parse(row.command.split()[3:]).norm_images == 16
    stock = dataclasses.replace(row, modules="stock, norm_images=16", bytes=4.0)
    table = tables([row], [row, stock, dataclasses.replace(row, modules=STOCK, bytes=100.0)])
    assert "| resnet34, norm_images=16, float32, 64 of 32² | – | – | – | – | 0.25 |" in table


def kernel(kind: str, source: str, size: int = 10**6) -> hlo.Kernel:
    """Returns a kernel that reads so many numbers of four bytes."""
    return hlo.Kernel("k", kind, (hlo.Array("f32", (size,)),), (), source)


@pytest.mark.parametrize(("kind", "source", "size", "what"), [
    ("__cudnn$convForward", "jit(step)/jvp(Net)/conv", 1, "convolutions"),
    ("__cudnn$convBiasActivationForward", "jit(step)/jvp(Net)/conv", 10**6, "convolutions"),
    ("__cudnn$convBackwardFilter", "jit(step)/transpose(jvp(N))/conv", 10**6, "convolutions, gradient of the filters"),
    ("kCustom", "jit(step)/jvp(Net)/layer/dot_general", 10**6, "products, forward"),
    ("kInput", "jit(step)/transpose(jvp(Net))/layer/dot_general", 10**6, "products, backward"),
    ("kInput", "jit(step)/jvp(Net)/norm/reduce_sum", 10**6, "sums over batch and pixels, forward"),
    ("kLoop", "jit(step)/transpose(jvp(Net))/add_any", 10**6, "arrays, element by element, backward"),
    ("kLoop", "jit(step)/transpose(jvp(Net))/add_any", 10**5, "small: backward"),
    ("kLoop", "jit(step)/transpose(jvp())/dot", 10**6, "update, penalty, metrics"),
    ("kLoop", "jit(step)/add", 1, "small: update, penalty, metrics"), ("copy", "", 1, "small: copies")])
def test_the_purpose_of_a_kernel(kind: str, source: str, size: int, what: str) -> None:
    assert purpose(kernel(kind, source, size), "cuda") == what
    assert what in accelerator_kernels.PURPOSES


NEAR, FAR = "{1,0:T(8,128)(2,1)S(1)}", "{1,0:T(8,128)(2,1)}"


@pytest.mark.parametrize(("kind", "source", "dtype", "layouts", "what"), [
    ("copy-start", "", "bf16", (NEAR, FAR), "copies between memories: activations, to main memory"),
    ("slice-start", "", "bf16", (FAR, NEAR), "copies between memories: activations, from main memory"),
    ("copy-start", "", "f32", (FAR, NEAR), "copies between memories: float32 (parameters, momentum, sums)"),
    ("copy", "jit(step)/jvp(Net)/transpose", "bf16", (NEAR, NEAR), "copies within a memory"),
    ("all-reduce", "jit(step)/jvp(Net)/norm/reduce_sum", "f32", (NEAR, NEAR), "exchanges between devices"),
    ("kOutput", "jit(step)/jvp(Net)/conv_general_dilated", "bf16", (NEAR, NEAR), "convolutions and products, forward"),
    ("kLoop", "jit(s)/transpose(jvp(N))/dot_general", "bf16", (NEAR, NEAR), "convolutions and products, backward"),
    ("kLoop", "jit(step)/jvp(Net)/norm/sub", "bf16", (NEAR, NEAR), "arrays, element by element, forward"),
    ("kLoop", "jit(step)/add", "f32", (NEAR, NEAR), "update, penalty, metrics")])
def test_the_purpose_of_a_kernel_on_a_tpu(kind: str, source: str, dtype: str, layouts: tuple[str, str],
                                          what: str) -> None:
    read, written = (hlo.Array(dtype, (8, 128), layout) for layout in layouts)
    assert purpose(hlo.Kernel("k", kind, (read,), (written,), source), "tpu") == what
    assert what in accelerator_kernels.PURPOSES


def test_kernels_are_shown_beside_the_plain_network_s_newest() -> None:
    products, sums = kernel("kCustom", "jvp(Net)/dot_general"), kernel("kInput", "jvp(Net)/reduce_sum", 2 * 10**6)
    plain, shared = make_row(network="resnet34", plain="resnet34"), make_row(network="resnet34-s32u1", plain="resnet34")
    old = dataclasses.replace(shared, commit="old")
    of = functools.partial(accelerator_kernels.rows_of, platform="cuda")
    text = accelerator_kernels.tables([*of(plain, [sums, sums]), *of(old, [sums]), *of(shared, [products, products])])
    assert "resnet34-s32u1 beside resnet34" in text
    assert "| products, forward | 2 | – | 8 | 0 | +8 |" in text
    assert "| sums over batch and pixels, forward | – | 2 | 0 | 16 | -16 |" in text
    assert "| all | 2 | 2 | 8 | 16 | -8 |" in text


def test_batches_grow_with_the_devices() -> None:
    found = {(target, size): TARGETS[target].batch(size) for target in TARGETS for size in (32, 224)}
    assert found == {("h100x1", 32): 256, ("h100x1", 224): 64, ("h100x8", 32): 2048, ("h100x8", 224): 512,
                     ("v5e:2x2", 32): 1024, ("v5e:2x2", 224): 256, ("v5e:4x4", 32): 4096, ("v5e:4x4", 224): 1024,
                     ("v5e:16x16", 32): 4096, ("v5e:16x16", 224): 4096}


def test_stock_networks_are_compiled_where_they_are_written() -> None:
    options = accelerators.parse(["--targets=h100x1", "--dtypes=bfloat16", "--networks=resnet20,resnet50,resnet34@224"])
    assert [(case.network, case.image_size, case.batch, modules)
            for _, case, modules, _ in accelerators.cases_of(options)] == [
        ("resnet20", 32, 256, OURS), ("resnet20", 32, 256, STOCK), ("resnet50", 224, 64, OURS),
        ("resnet34", 224, 64, OURS), ("resnet34", 224, 64, STOCK)]


@pytest.mark.parametrize(("arguments", "parts"), [
    (["--targets=a100"], ["'a100'", "h100x1"]), (["--dtypes=int8"], ["'int8'", "bfloat16"]),
    (["--modules=torch"], ["'torch'", "stock"]), (["--batch=0"], ["'0'"])])
def test_an_invalid_option_ends_in_one_line(arguments: list[str], parts: list[str],
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused_in_one_line(accelerators.main, arguments, parts, capsys)


def test_invalid_networks_and_missing_compilers_are_refused_before_anything_is_compiled(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with user_error("unknown network 'resnet15'"):
        accelerators.main(["--networks=resnet15@224"], tmp_path)
    with user_error("'resnet34@big'", "resnet34@224"):
        accelerators.main(["--networks=resnet34@big"], tmp_path)
    monkeypatch.setattr("benchmarks.accelerator_targets.versions", lambda packages: {})
    with user_error("jax-cuda12-pjrt", "pip install -e '.[accelerators]'"):
        accelerators.main(["--targets=h100x1", "--networks=resnet14"], tmp_path)


def test_the_page_shows_the_newest_rows_and_names_every_option() -> None:
    rows = newest(records.read(ROOT / accelerators.FILE, AcceleratorRow))
    assert section_of(ROOT / PAGE, "accelerators") == tables(rows, rows)
    assert rows
    kernels = records.read(ROOT / accelerators.KERNELS, KernelsRow)
    assert section_of(ROOT / PAGE, "accelerator kernels") == accelerator_kernels.of_the_page(kernels)
    for target in ("h100x1", "v5e:2x2"):
        said = f"resnet34-s32u1 beside resnet34, 224×224, bfloat16, {target} "
        assert said in accelerator_kernels.of_the_page(kernels)
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    described = text[text.index("## Accelerators"):text.index("<!-- accelerators -->\n")]
    for option in ("targets", "networks", "dtypes", "modules", "programs", "batch", "norm-images", "kernels", "append",
                   "write"):
        assert f"`--{option}" in described
    assert "no clock" in described


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100x8", "v5e:2x2"])
def test_a_step_is_compiled_from_the_command_line(target: str, tmp_path: Path) -> None:
    """In a process of its own: compilers are found when JAX is imported."""
    if not versions([TARGETS[target].compiler]):
        pytest.skip(f"{TARGETS[target].compiler} is not installed; the extra 'accelerators' brings it")
    page = tmp_path / PAGE
    page.parent.mkdir()
    page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in (
        "accelerators", "accelerator kernels")))
    code = ("import os, pathlib; os.environ.update(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1')\n"
            "from helpers import register_tiny\n"
            "from benchmarks import accelerators\n"
            "register_tiny()\n"
            f"accelerators.main(['--targets={target}', '--networks=tiny,tiny-s2u1-double', '--dtypes=bfloat16',"
            f" '--batch=64', '--programs=step,evaluation', '--kernels=kernels', '--append', '--write'],"
            " pathlib.Path('.'))\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stderr[-3000:]
    rows = records.read(tmp_path / accelerators.FILE, AcceleratorRow)
    assert [(row.network, row.modules, row.program) for row in rows] == [
        (network, modules, program) for network in ("tiny", "tiny-s2u1-double") for modules in (OURS, STOCK)
        for program in (STEP, EVALUATION)]
    for row in rows:
        assert row.all_reduces > 0
        assert min(row.kernels, row.bytes, row.main_memory_bytes, row.flops, row.argument_bytes) > 0
        parameters = {"tiny": 774, "tiny-s2u1-double": 738}[row.network]
        assert row.exchanged_bytes > (4 * parameters if row.program == STEP else 0)  # their gradients and statistics
        assert row.batch == (64 if row.program == STEP else 1000)
    assert rows[0].flops != rows[4].flops
    assert section_of(page, "accelerators") in done.stdout
    steps = [row for row in rows if row.program == STEP]
    kernels = records.read(tmp_path / accelerators.KERNELS, KernelsRow)
    for step in steps:
        of = [row for row in kernels if (row.network, row.modules) == (step.network, step.modules)]
        assert (sum(row.kernels for row in of), sum(row.bytes for row in of)) == (step.kernels, step.main_memory_bytes)
    assert len(list((tmp_path / "kernels").glob("*.tsv"))) == len(list((tmp_path / "kernels").glob("*.hlo"))) == 8
