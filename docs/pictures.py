"""Draws the pictures of the quick start and of the gallery anew: python -m docs.pictures [--runs=DIR]

It runs the commands of the quick start and a few others, some minutes on two cores, and copies what they draw. Runs are
kept in DIR, so that a second call continues where the first one stopped. Screenshots of the report are taken where a
Chromium is installed, and left as they are elsewhere.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
PHOTOS, DIGITS, PLAIN = (Path("runs") / name for name in (
    "photos-resnet20-s8u1-double", "digits_resnet-resnet20-s8u1-double", "digits_resnet-resnet20"))

COMMANDS = (
    ("--images=photos", "--config.train.epochs=20"),
    ("--config.train.record_gradients",),
    ("--config=configs/digits_resnet.py:resnet20",),
    ("--mode=report", f"--runs={DIGITS}", f"--runs={PLAIN}", "--output=comparison"),
    ("--mode=analyze", f"--workdir={DIGITS}"),
    ("--mode=compress", "--spectra", f"--source={PLAIN}"),
)
"""Arguments of main.py."""

COPIES = {
    "quickstart-curves.png": PHOTOS / "report" / "accuracy.png",
    **{f"gallery/{name}.png": DIGITS / "report" / f"{name}.png"
       for name in ("loss", "accuracy", "learning_rate", "penalty", "norms", "coherence", "confusion", "errors",
                    "parameters", "macs")},
    **{f"gallery/{name}.png": DIGITS / "analysis" / f"{name}.png"
       for name in ("products_group1", "singular_values", "effective_rank", "filters_group1", "stem",
                    "coefficients_group1", "similarity_group1_first", "gradient_flow", "gradient_training")},
    "gallery/comparison.png": Path("comparison") / "report" / "error_parameters.png",
    "gallery/spectra.png": PLAIN / "spectra.png",
}
"""By the file in docs/images, what is copied."""

SCREENS = {"gallery/report-light.png": (DIGITS, ""), "gallery/report-dark.png": (DIGITS, "--force-dark-mode")}
"""Screenshots of reports."""


def make_photos(directory: Path) -> None:
    """Makes the folder of images of the quick start, by the code that stands there."""
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- photos -->\n```python\n(.+?)```", page, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=directory, check=True)


def contact_sheet(photos: Path) -> Image.Image:
    """Returns four images of each class, side by side."""
    files = [photos / name / f"{number}.jpg" for name in ("temple", "flower") for number in range(4)]
    sheet = Image.new("RGB", (8 * 104 - 8, 96), "white")
    for place, file in enumerate(files):
        sheet.paste(Image.open(file).resize((96, 96)), (104 * place, 0))
    return sheet


def screenshot(page: Path, output: Path, *flags: str) -> None:
    """Takes a picture of the upper part of a page in Chromium, where there is one."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(f"no Chromium: {output.name} stays as it is")
        return
    subprocess.run([browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1200,1500",
                    f"--screenshot={output}", *filter(None, flags), page.resolve().as_uri()],
                   check=True, capture_output=True)
    Image.open(output).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(output, optimize=True)


def main() -> None:
    """Trains, draws and copies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "pictures", help="where the runs are kept")
    directory: Path = parser.parse_args().runs.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "configs").exists():
        (directory / "configs").symlink_to(ROOT / "configs")
        make_photos(directory)
    for arguments in COMMANDS:
        subprocess.run([sys.executable, str(ROOT / "main.py"), *arguments], cwd=directory, check=True)
    (IMAGES / "gallery").mkdir(parents=True, exist_ok=True)
    for name, source in COPIES.items():
        shutil.copyfile(directory / source, IMAGES / name)
    contact_sheet(directory / "photos").save(IMAGES / "quickstart-photos.jpg", quality=85)
    for name, (run, flag) in SCREENS.items():
        screenshot(directory / run / "report.html", IMAGES / name, flag)


if __name__ == "__main__":
    main()
