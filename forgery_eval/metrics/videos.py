"""Metrics by video, where images are frames: a video's score is the mean of its frames'."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn import metrics as sk

from forgery_eval.metrics.scoring import Scored, Scoring
from llava.labels import LABELS


def video_metrics(rows: Sequence[Scored], scoring: Scoring) -> dict[str, Any]:
    """Returns the detection metrics over videos, each by the mean score of its frames, and equal error rates.

    A video's verdict is that of its score; a frame without a score does not count.

    Args:
        rows: The frames; single images are left out.
        scoring: Of the evaluation.
    """
    videos: dict[tuple[str, str], list[Scored]] = {}
    for row in rows:
        if row.sample.video:
            videos.setdefault((row.sample.set, row.sample.video), []).append(row)
    joined = [_joined(frames) for frames in videos.values()]
    found = scoring.overall(joined)
    found["metrics"] |= {
        "frames": sum(map(len, videos.values())),
        "eer": equal_error_rate(joined),
        "frame_eer": equal_error_rate([row for row in rows if row.sample.video]),
    }
    return found


def _joined(frames: Sequence[Scored]) -> Scored:
    """One video as a row; its ranks are means too, so that calibration keeps what it kept of frames."""
    first, scores = frames[0], np.array([row.score for row in frames])
    known = ~np.isnan(scores)
    score = float(scores[known].mean()) if known.any() else np.nan
    before = np.array([row.uncalibrated for row in frames])
    verdict = None if np.isnan(score) else LABELS[int(score >= 0.5)]
    sample = replace(first.sample, id=first.sample.video)
    prediction = replace(first.prediction, id=first.sample.video, verdict=verdict, text="")
    own = float(before[known].mean()) if known.any() else np.nan
    return replace(first, sample=sample, prediction=prediction, score=score, uncalibrated=own)


def equal_error_rate(rows: Sequence[Scored]) -> float | None:
    """Returns the rate at which false alarms and misses are equally many, between two thresholds by a line.

    None where a class is missing.
    """
    scored = [row for row in rows if not np.isnan(row.score)]
    labels = np.array([row.sample.label for row in scored])
    if len(set(labels.tolist())) < 2:
        return None
    false_rate, true_rate, _ = sk.roc_curve(labels, [row.uncalibrated for row in scored], drop_intermediate=False)
    gap = false_rate - (1 - true_rate)
    at = int(np.argmax(gap >= 0))
    if at == 0 or gap[at] == gap[at - 1]:
        return float(false_rate[at])
    share = -gap[at - 1] / (gap[at] - gap[at - 1])
    return float(false_rate[at - 1] + share * (false_rate[at] - false_rate[at - 1]))
