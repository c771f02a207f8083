"""Tables and the first screen of a report."""

import numpy as np
import pytest
from scipy.stats import binomtest

from forgery_eval.metrics.detection import wilson
from forgery_eval.pages.charts import figure, score_charts
from forgery_eval.pages.summary import tiles, worst_parts
from forgery_eval.pages.tables import HEATS, Cell, Table, heat, metrics_table, number


def part(**metrics) -> dict:
    return {"metrics": {"images": 4, **metrics}, "intervals": {"auroc": [0.25, 0.75]}, "undefined": {"f1": "none"}}


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_a_metric_that_no_part_has_gets_no_column():
    parts = {
        "a": {"metrics": {"auroc": None, "f1": 0.5, "ap": None}, "undefined": {"auroc": "one class"}, "intervals": {}},
        "b": {"metrics": {"auroc": None, "f1": None, "ap": None}, "undefined": {"f1": "none"}, "intervals": {}},
    }
    table = metrics_table(parts, {"auroc": "AUROC", "f1": "F1", "ap": "AP"})
    assert list(table.head) == ["", "F1"]
    assert texts(table) == [["a", "0.500"], ["b", "–"]] and table.rows[1][1].reason == "none"
    assert table.left_out == "Without AUROC: one class. Without AP: not defined here"


def test_any_table_loses_its_columns_of_dashes_and_says_why():
    rows = [[Cell("–"), Cell("–", reason="no text"), Cell("1")], [Cell("b"), Cell("–", reason="no text"), Cell("–")]]
    table = Table(["", "words", "count"], rows, "Before.").without_dashes()
    assert list(table.head) == ["", "count"] and texts(table) == [["–", "1"], ["b", "–"]]
    assert table.left_out == "Before. Without words: no text"


def test_rows_are_the_worst_first_below_those_that_are_pinned():
    parts = {"good": part(auroc=0.9), "bad": part(auroc=0.2), "none": part(auroc=None), "all": part(auroc=0.6)}
    table = metrics_table(parts, {"auroc": "AUROC"}, {"bad": {"auroc": 0.30004}}, worst="auroc", pinned=("all",))
    assert [row[0].text for row in table.rows] == ["all", "bad", "good", "none"] and table.pinned == 1
    assert table.rows[1][2].notes == ("0.250–0.750", "published 0.300") and table.rows[1][2].order == 0.2
    assert [number(value) for value in (None, 3, 0.12345)] == ["–", "3", "0.123"]


@pytest.mark.parametrize(
    ("metric", "value", "found"),
    [
        ("auroc", 1.0, 0),
        ("auroc", 0.5, HEATS),
        ("auroc", 0.1, HEATS),
        ("text_balanced_accuracy", 0.75, HEATS // 2),
        ("ece", 0.0, 0),
        ("ece", 0.15, HEATS // 2),
        ("reals_called_fake", 0.5, HEATS),
        ("words", 0.0, 0),
        ("missing", 3, 0),
    ],
)
def test_heat_is_how_bad_a_value_is(metric, value, found):
    assert heat(metric, value) == found


@pytest.mark.parametrize(("count", "of"), [(0, 7), (3, 7), (7, 7), (500, 1000)])
def test_an_interval_of_a_share_is_wilsons(count, of):
    expected = binomtest(count, of).proportion_ci(0.95, method="wilson")
    assert wilson(count, of) == pytest.approx((expected.low, expected.high), abs=1e-6)


def detection(**accuracies) -> dict:
    """Groups with these balanced accuracies; those below zero have one class, and it is right so often."""

    def one(value: float) -> dict:
        balanced = None if value < 0 else value
        metrics = {"text_accuracy": abs(value), "text_balanced_accuracy": balanced, "auroc": None, "images": 4}
        return {"metrics": metrics, "intervals": {}, "undefined": {}}

    return {"sets": {"one": one(0.5)}, "all": one(0.5), "groups": {"kind": {k: one(v) for k, v in accuracies.items()}}}


def test_the_worst_groups_come_first():
    table = worst_parts(detection(a=0.9, b=-0.25, c=0.75, d=1.0), most=3)
    assert [row[0].text for row in table.rows] == ["kind b", "kind c", "kind a"]
    assert table.rows[0][2].text == "0.250" and list(table.head)[-1] != "AUROC"
    assert worst_parts(detection(only=0.4)) is None and worst_parts(detection()) is None


def test_a_group_that_is_a_set_again_is_named_once():
    found = detection(one=0.5, two=0.7)
    found["sets"]["two"] = found["groups"]["kind"]["two"]
    assert [row[0].text for row in worst_parts(found).rows] == ["set one", "set two"]


def test_the_first_numbers_are_of_verdicts_or_else_of_scores():
    found = {
        "text_accuracy": None,
        "score_accuracy": 0.7,
        "score_balanced_accuracy": None,
        "score_real_accuracy": 0.7,
        "score_fake_accuracy": None,
        "auroc": None,
    }
    metrics = {"detection": {"all": {"metrics": found, "intervals": {"score_accuracy": [0.6, 0.8]}}}}
    by, shown = tiles(metrics)
    assert "P(fake)" in by
    assert [(tile.title, tile.value, tile.interval) for tile in shown] == [
        ("accuracy", "0.700", "0.600–0.800"),
        ("real images right", "0.700", ""),
    ]
    given = {"images": 100, "given": 50, "coverage": 0.5, "error_among_given": 0.02}
    coverage, error = tiles({**metrics, "abstention": {"all": given}})[1][-2:]
    assert (coverage.value, coverage.interval) == ("0.500", "0.404–0.596")
    assert (error.value, error.interval) == ("0.020", "0.004–0.105")


def test_drawings_take_the_colours_of_the_page_and_are_equal_to_the_byte():
    labels, scores = np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.6, 0.4])
    drawn = score_charts(labels, scores)
    assert list(drawn) == ["roc", "precision_recall", "reliability", "histogram"] and drawn == score_charts(
        labels, scores
    )
    assert all("currentColor" in chart and "#010203" not in chart and 'role="img"' in chart for chart in drawn.values())
    assert list(score_charts(labels[:1], scores[:1])) == ["reliability", "histogram"] and not score_charts([], [])
    hostile = figure(lambda axes: axes.set_title("<script>x</script>"), 'a"><script>')
    assert "<script>" not in hostile
