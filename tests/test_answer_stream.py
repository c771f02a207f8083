"""Answers that are followed while they are decoded."""

import math

import pytest
import torch

from llava import ForgeryDetector
from llava.abstention import AbstentionRule
from llava.model.answering import _Follower
from llava.systems.base import AnswerStream
from tests.trained import picture


class Recorder:
    """Remembers what it hears; leaves a row after so many pieces."""

    def __init__(self, leaves: dict[int, int] | None = None) -> None:
        self.pieces: dict[int, list[tuple[str, float, float]]] = {}
        self.leaves = leaves or {}

    def heard(self, row: int, piece: str, logprob: float, fake_probability: float) -> None:
        self.pieces.setdefault(row, []).append((piece, logprob, fake_probability))

    def is_gone(self, row: int) -> bool:
        return len(self.pieces.get(row, ())) >= self.leaves.get(row, math.inf)

    def text(self, row: int) -> str:
        return "".join(piece for piece, *_ in self.pieces[row]).strip()


@pytest.fixture(scope="module")
def detector(trained) -> ForgeryDetector:
    return ForgeryDetector.from_pretrained(trained, device="cpu")


@pytest.fixture(scope="module")
def prepared(detector):
    return [detector.prepare(picture(1000 + index)) for index in range(5)]


def test_the_pieces_of_each_answer_are_its_text_and_change_nothing(detector, prepared):
    assert isinstance(detector.system, AnswerStream) and detector.streams
    options = detector.options()
    plain = detector.analyze_prepared(prepared, options)
    recorder = Recorder()
    followed = detector.analyze_prepared(prepared, options, recorder)
    assert [report.to_dict() for report in followed] == [report.to_dict() for report in plain]
    for row, report in enumerate(followed):
        assert recorder.text(row) == report.text and len(recorder.pieces[row]) > 10
        assert all(logprob <= 0 for _, logprob, _ in recorder.pieces[row])
        at_verdict = [fake for piece, _, fake in recorder.pieces[row] if piece.strip() == report.label]
        assert any(abs(fake - report.fake_probability) < 1e-6 for fake in at_verdict)


def test_several_answers_of_one_image_are_followed_by_the_first(detector, prepared):
    options = detector.options(samples=3, temperature=1.0, max_new_tokens=60)
    recorder = Recorder()
    reports = detector.analyze_prepared(prepared[:2], options, recorder)
    assert [recorder.text(row) for row in (0, 1)] == [report.text for report in reports]


def test_an_answer_ends_when_nobody_waits_for_it_and_the_others_do_not(detector, prepared):
    options = detector.options()
    plain = detector.analyze_prepared(prepared, options)
    recorder = Recorder({1: 4, 3: 1})
    reports = detector.analyze_prepared(prepared, options, recorder)
    assert [len(recorder.pieces[row]) for row in (1, 3)] == [4, 1]
    assert [reports[row].text for row in (0, 2, 4)] == [plain[row].text for row in (0, 2, 4)]


def test_halves_of_a_batch_keep_their_rows(detector, prepared, monkeypatch):
    analyze = detector.system.analyze_batch

    def small(items, options):
        if len(items) > 2:
            raise torch.OutOfMemoryError("too many")
        return analyze(items, options)

    monkeypatch.setattr(detector.system, "analyze_batch", small)
    recorder = Recorder()
    reports = detector.analyze_prepared(prepared, detector.options(), recorder)
    assert [recorder.text(row) for row in range(5)] == [report.text for report in reports]


def test_nothing_is_heard_where_a_verdict_may_be_withheld(detector, prepared):
    rule = AbstentionRule(low=0.5, high=0.5, error_level=0.1, confidence=0.9)
    silent = ForgeryDetector(detector.system, rule)
    recorder = Recorder()
    assert silent.analyze_prepared(prepared, silent.options(), recorder)[0].text
    assert not silent.streams and recorder.pieces == {}


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", "replace")


def test_half_a_character_waits_for_its_other_half():
    recorder = Recorder()
    follower = _Follower(recorder, Bytes(), 1, frozenset([0]), 1.0)
    for number, byte in enumerate([*"aé🙂b".encode(), 0]):
        assert not follower(0, byte, -1.0, torch.tensor([0.0, float(number)]))
    assert [piece for piece, *_ in recorder.pieces[0]] == ["a", "é", "🙂", "b"]
    assert [logprob for _, logprob, _ in recorder.pieces[0]] == [-1.0, -2.0, -4.0, -1.0]
    assert recorder.pieces[0][1][2] == pytest.approx(1 / (1 + math.exp(-1)))
