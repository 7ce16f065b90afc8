"""The benchmark of data: it measures what it says, on few images."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import data
from benchmarks.common import PAGE, section_of


@pytest.mark.slow
def test_streaming_and_training_are_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / PAGE).parent.mkdir()
    (tmp_path / PAGE).write_text("<!-- data -->\n<!-- end of data -->\n")
    data.main(["--rounds=1", "--write"], tmp_path)
    text = section_of(tmp_path / PAGE, "data")
    assert text.strip() == capsys.readouterr().out.strip()
    assert text.startswith("`python -m benchmarks.data --write`, ")
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")]
                                              for line in text.splitlines() if line.startswith("| "))}
    assert float(rows["1 process"][0].replace(",", "")) > 0
    assert int(rows["1 process"][2].removesuffix(" MiB").replace(",", "")) > 40  # its interpreter
    assert rows["digits, ResNet-20 S8U1*, batch 64"][1].endswith(" %")
