"""Times of kernels on a GPU: kept by purpose. No test needs a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import pytest
from helpers import ROOT, assert_refused_in_one_line, register_tiny, user_error

from benchmarks import accelerator_kernels, gpu, gpu_kernels, records
from benchmarks.cases import Case
from benchmarks.common import PAGE, section_of
from benchmarks.comparison import TIMES_AS_FAST
from benchmarks.gpu_kernels import Step, TimedRow, rows_of, tables
from benchmarks.session import SpeedRow

STEP = Step("2026-11-27", "abc", "A GPU", "0.11.2", "resnet14-s4u1", "resnet14", 8, 32, "bfloat16")
PROGRAM = """HloModule jit_step

ENTRY %main (p: f32[8,32]) -> f32[8,32] {
  %p = f32[8,32]{1,0} parameter(0)
  %loop_add_fusion.1 = f32[8,32]{1,0} fusion(%p), kind=kLoop, calls=%f, metadata={op_name="jit(step)/jvp(ResNet)/add"}
  %cudnn-conv.2 = (f32[8,32]{1,0}, u8[0]{0}) custom-call(%p), custom_call_target="__cudnn$convForward"
  ROOT %gemm_fusion_dot.3 = f32[8,32]{1,0} fusion(%p), kind=kCustom, calls=%g, metadata={op_name="jit(step)/update/dot"}
}
"""
EVENTS = [("loop_add_fusion_1", 2000.0), ("loop_add_fusion_1", 4000.0), ("sm90_xmma_fprop_implicit_gemm_bf16", 9000.0),
          ("void nhwcAddPaddingKernel<float>", 1000.0), ("Memset 3", 500.0), ("MemcpyD2D", 600.0), ("gemmSN_TN", 300.0),
          ("gemm_fusion_dot_3", 100.0), ("void cudnn::nchwToNhwcKernel", 200.0), ("sort", 80.0),
          ("_ZN_cutlass_x_cudnn_conv_kernel_ImplicitGemmConvolution_cutlass4gemm9GemmShape", 1000.0),
          ("sm90_xmma_gemm_bf16", 700.0), ("nvjet_tst_128x64", 100.0)]


def test_kernels_of_the_program_and_of_libraries_are_sorted_by_purpose_per_step() -> None:
    rows = {row.purpose: (row.kernels, row.microseconds) for row in rows_of(STEP, EVENTS, PROGRAM, steps=2)}
    assert rows == {
        "small: forward": (1.0, 3.0), gpu_kernels.CONVOLUTIONS: (1.0, 5.0), gpu_kernels.PADDING: (0.5, 0.5),
        gpu_kernels.LAYOUTS: (0.5, 0.1), gpu_kernels.CLEARING: (0.5, 0.25), gpu_kernels.COPYING: (0.5, 0.3),
        gpu_kernels.PRODUCTS: (1.5, 0.55), gpu_kernels.OTHERS: (0.5, 0.04),
        "small: update, penalty, metrics": (0.5, 0.05)}
    assert set(rows) <= {*accelerator_kernels.PURPOSES, *gpu_kernels.LIBRARIES}


def test_a_table_stands_beside_the_plain_network_and_begins_with_what_takes_longer() -> None:
    plain = dataclasses.replace(STEP, network="resnet14")
    shared, alone = rows_of(STEP, EVENTS, PROGRAM, 2), rows_of(plain, EVENTS[2:], PROGRAM, 2)
    old = rows_of(dataclasses.replace(plain, commit="old"), EVENTS * 9, PROGRAM, 2)
    text = tables([*old, *shared, *alone])
    assert text.splitlines()[0] == ("resnet14-s4u1 beside resnet14, 8 images of 32×32, bfloat16, A GPU, 2026-11-27, "
                                    "JAX 0.11.2, commit abc:")
    assert text.splitlines()[4] == "| small: forward | 1 | – | 3 | 0 | +3 |"
    assert text.splitlines()[-1] == "| all | 6 | 6 | 10 | 7 | +3 |"
    assert not tables(shared)


def test_the_page_has_the_steps_that_were_timed_on_gpus_and_no_others() -> None:
    text = section_of(ROOT / PAGE, "gpu steps")
    made = gpu.sections()
    assert text == made["gpu steps"]
    assert section_of(ROOT / PAGE, "gpu kernels") == made["gpu kernels"]
    speeds = records.read(ROOT / gpu.speed.FILE, SpeedRow)
    one = next(row for row in speeds if row.device == "NVIDIA H200" and row.quantity == "ratio: time over plain")
    assert f"| {one.median:.2f} ({one.minimum:.2f} – {one.maximum:.2f}) | 1.15 |" in text
    assert "cpu" not in text
    assert gpu.timed([row for row in speeds if row.device.startswith("cpu")]).count("\n") == 3


def test_ratios_are_of_the_rows_own_command() -> None:
    one = next(row for row in records.read(ROOT / gpu.speed.FILE, SpeedRow) if row.device == "NVIDIA H200")
    steps = [dataclasses.replace(one, quantity=quantity, framework=framework, median=median, dtype=dtype,
                                 command=command)
             for command, ours, speed_up in (("A", "float32", 9.0), ("B", "bfloat16", 4.0))
             for quantity, framework, dtype, median in (
                 ("seconds per step", "shared_basis", ours, 0.5),
                 (TIMES_AS_FAST, "pytorch channels_last bf16", "bfloat16", speed_up))]
    lines = gpu.timed(steps).splitlines()
    assert [(line.split(", ")[1], line.split(" | ")[5].split()[0]) for line in lines[2:4]] == [
        ("float32", "9.00"), ("bfloat16", "4.00")]
    assert [line.rpartition(": ")[2] for line in lines[5:]] == ["`A`", "`B`"]


def test_only_what_ran_on_gpus_is_read_from_a_profile(tmp_path: Path) -> None:
    planes = "".join(f"""planes {{ name: "{name}" event_metadata {{ key: 1 value {{ id: 1 name: "{event}" }} }}
        lines {{ name: "Stream" events {{ metadata_id: 1 duration_ps: {time} }} }} }}""" for name, event, time in (
            ("/device:GPU:0", "loop_add_fusion_1", 2_000_000), ("/host:CPU", "python", 9_000_000)))
    path = tmp_path / "a.xplane.pb"
    path.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(planes))
    assert gpu.events(path) == [("loop_add_fusion_1", 2000.0)]


def test_several_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with user_error("4 GPUs", "CUDA_VISIBLE_DEVICES=0"):
        gpu.main(["--networks=resnet14"])


@pytest.mark.parametrize(("arguments", "parts"), [
    ([], ["--networks", "--write"]), (["--networks=resnet20", "--dtype=int8"], ["int8"]),
    (["--networks=resnet20", "--steps=0"], ["'0'", "positive"])])
def test_an_invalid_option_ends_in_one_line(arguments: Sequence[str], parts: Sequence[str],
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused_in_one_line(gpu.main, arguments, parts, capsys)


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    with user_error("no GPU here", "benchmarks.accelerators"):
        gpu.main(["--networks=resnet14", "--append"], tmp_path)
    with user_error("unknown network 'resnet15'"):
        gpu.main(["--networks=resnet15"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_trainers_step_is_profiled_and_what_runs_on_no_gpu_is_left_out() -> None:
    found, text = gpu.profile(Case(register_tiny(), 4, image_size=8), steps=1)
    assert found == []
    assert "ENTRY" in text
    assert "jvp(" in text


def test_the_page_names_every_option() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    described = text[text.index("### Timed on a GPU"):text.index("### Counted by compilers")]
    assert all(f"`--{option}`" in described for option in ("networks", "dtype", "batch", "steps", "append", "write"))


def test_rows_are_of_known_purposes() -> None:
    rows = records.read(ROOT / gpu.FILE, TimedRow)
    assert {row.purpose for row in rows} <= {*accelerator_kernels.PURPOSES, *gpu_kernels.LIBRARIES}
