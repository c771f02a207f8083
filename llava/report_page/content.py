"""What a page draws of one analysed image, as plain JSON values. Imports no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava.image_operations import Step
from llava.provenance import Provenance
from llava.report_page.drawing import attention_png, data_url, mask_png

if TYPE_CHECKING:
    from llava.report import ForgeryReport

STABILITY_STEPS: dict[str, Step] = {
    "jpeg": Step("jpeg", {"quality": 75}),
    "resize": Step("resize", {"factor": 0.7, "kernel": "bicubic"}),
    "crop": Step("crop", {"left": 0.05, "top": 0.05, "right": 0.05, "bottom": 0.05}),
}
"""What an image commonly meets on its way; a verdict that these change is not to be leaned on."""


def result(
    name: str,
    report: "ForgeryReport",
    calibrated: float | None,
    provenance: Provenance,
    *,
    constant_stages: Sequence[str] = (),
    preview: bytes | None = None,
    attention: bool = False,
    mask: bool = False,
) -> dict[str, Any]:
    """Returns an analysed image as JSON values.

    Args:
        name: Of the image, as its sender gave it.
        report: On the image.
        calibrated: Calibrated P(fake), if any.
        provenance: What the file says of itself; it is no part of the report.
        constant_stages: Stages of the answer that are the same for every image.
        preview: The image as a small JPEG, where that is wanted.
        attention: Whether the map of attention is wanted.
        mask: Whether the mask is wanted.
    """
    found: dict[str, Any] = {
        "name": name,
        "report": report.to_dict(),
        "calibrated_probability": calibrated,
        "constant_stages": [stage for stage in constant_stages if stage in report.stages],
        "provenance": provenance.to_dict(),
    }
    if preview is not None:
        found["preview"] = data_url(preview, "jpeg")
    if attention and report.attention is not None:
        found["attention"] = data_url(attention_png(report.attention), "png")
    if mask and report.mask is not None:
        found["mask"] = data_url(mask_png(report.mask), "png")
        found["marked"] = report.marked
    return found


def stability_rows(original: "ForgeryReport", reports: "Sequence[ForgeryReport]") -> list[dict[str, Any]]:
    """Returns a row for each of ``STABILITY_STEPS``: its report and whether the verdict holds."""
    return [
        {
            "step": name,
            "label": report.label,
            "fake_probability": report.fake_probability,
            "abstained": report.abstained,
            "error": report.error,
            "holds": not report.error and (report.label, report.abstained) == (original.label, original.abstained),
        }
        for name, report in zip(STABILITY_STEPS, reports, strict=True)
    ]
