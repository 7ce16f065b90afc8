"""The files of a report: `report.html`, and `report/` with plots and their data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shared_basis.errors import UserError
from shared_basis.plotting import Picture
from shared_basis.runtime.files import Place, open_files

PAGE = "report.html"
FOLDER = "report"


def picture_files(pictures: Iterable[Picture]) -> dict[str, bytes]:
    """Returns the PNG files of pictures, keyed by file name."""
    return {f"{each.name}.png": each.png for each in pictures}


def write_report(directory: Place, page: bytes, files: Mapping[str, bytes], known: Iterable[str]) -> list[str]:
    """Writes a report to `directory`; files are renamed into place once all are complete.

    Args:
      page: the contents of the page.
      files: the other files, by name.
      known: all names that reports may write; files of an earlier report with these names are removed.

    Returns:
      The names of removed files.

    Raises:
      UserError: `directory` cannot be written.
    """
    written = open_files(directory)
    try:
        written.make(FOLDER)
        written.write({**{f"{FOLDER}/{name}": content for name, content in files.items()}, PAGE: page})
        removed = sorted((set(known) - set(files)) & set(written.names(FOLDER)))
        for name in removed:
            written.remove(f"{FOLDER}/{name}")
    except OSError as error:
        raise UserError(f"{written.path / PAGE} and {written.path / FOLDER} cannot be written: "
                        f"{error.strerror}; choose another place with --output=DIR.") from error
    return removed
