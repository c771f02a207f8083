"""Reports of analysed images as one HTML file that needs nothing else. Imports no torch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import ImageReadError
from llava.files import atomic_write, make_folder
from llava.provenance import Provenance, read_file_provenance, read_provenance
from llava.report_page.content import STABILITY_STEPS, result, stability_rows
from llava.report_page.drawing import preview_jpeg
from llava.report_page.html import report_file
from llava.sources import EncodedSource, load_source

if TYPE_CHECKING:
    from llava import ForgeryDetector, ForgeryReport
    from llava.systems.base import AnalyzeOptions


def provenance_of(item: Path | EncodedSource) -> Provenance:
    """Returns what an analysed image says of its own origin; nothing if it could not be read."""
    if isinstance(item, Path):
        return read_file_provenance(item)
    content = item.content_if_read
    return Provenance() if content is None else read_provenance(content)


class HtmlReport:
    """Collects reports inside a ``with`` block and writes the page at its end.

    Args:
        path: The page.
        detector: The model, which is also asked about each image after common steps.
        options: How images are analysed.
        constant_stages: Stages of the answer that are the same for every image.

    Raises:
        FileError: Nothing may be written where the page goes.
    """

    def __init__(
        self, path: Path, detector: "ForgeryDetector", options: "AnalyzeOptions", constant_stages: Sequence[str]
    ) -> None:
        make_folder(path.parent, "--html")
        self._path = path
        self._detector = detector
        self._options = options
        self._constant_stages = constant_stages
        self._results: list[dict[str, Any]] = []

    def add(self, file: Path | EncodedSource, report: "ForgeryReport") -> None:
        """Adds an image and its report."""
        self._results.append(self._result(file, report))

    def _result(self, file: Path | EncodedSource, report: "ForgeryReport") -> dict[str, Any]:
        if report.error:
            return {"name": str(file), "error": {"message": report.error}}
        try:
            image = load_source(file)
        except ImageReadError as error:  # it changed after it was analysed
            return {"name": str(file), "error": {"message": str(error)}}
        found = result(
            str(file),
            report,
            self._detector.calibrated(report),
            provenance_of(file),
            constant_stages=self._constant_stages,
            preview=preview_jpeg(image),
            attention=True,
            mask=True,
        )
        delivered = self._detector.analyze_many(
            [step(image) for step in STABILITY_STEPS.values()], **vars(replace(self._options, attention=False))
        )
        return {**found, "stability": stability_rows(report, list(delivered))}

    def __enter__(self) -> "HtmlReport":
        return self

    def __exit__(self, *error: object) -> None:
        """Writes the page, atomically, also with what there is when the work was interrupted.

        Raises:
            FileError: It cannot be written.
        """
        about = {"system": self._detector.system.name, "model": "", "notice": self._detector.notice}
        atomic_write(self._path, report_file(self._results, about))
