"""Pages as a browser shows them: their own script sorts, nothing is loaded, and a phone is wide enough."""

import json
import shutil

import pytest

from forgery_eval.eval import run as evaluate
from tests.serve.test_page import Opened, browser  # noqa: F401 - a fixture
from tests.trained import picture


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """An evaluation of 24 images in two sets, whose answers are another program's."""
    root = tmp_path_factory.mktemp("pages")
    lines = []
    for number in range(24):
        name = f"{'first' if number < 12 else 'second'}/{('real', 'fake')[number % 2]}/{number:02}.png"
        (root / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(root / "data" / name)
        score = (0.2 + 0.6 * (number % 2)) if number < 12 else number / 24
        lines.append(
            {"id": str(root / "data" / name), "fake_probability": score, "verdict": ("real", "fake")[score > 0.5]}
        )
    (root / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [
        "--dataset_path",
        str(root / "data"),
        "--result_folder",
        str(root / "r"),
        "--rescore",
        str(root / "p.jsonl"),
    ]
    assert evaluate(given) == 0
    yield root / "r"
    shutil.rmtree(root)


def names(page, table: str) -> list[str]:
    rows = page.locator(f"{table} tbody:last-of-type td:first-child")
    return [text.strip() for text in rows.all_inner_texts()]


def test_a_report_is_sorted_by_a_click_and_fits_a_phone(browser, results):  # noqa: F811
    opened = Opened(browser, (results / "report.html").as_uri())
    page = opened.page
    refused: list[str] = []
    page.on("console", lambda said: refused.append(said.text))
    page.reload()
    assert page.locator(".tile").first.is_visible() and page.locator("svg").count() == 5
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    table = "details:has(summary:text-is('Sets')) table"
    assert names(page, table) == ["second", "first"]  # the worst first
    heading = page.locator(f"{table} th button", has_text="AUROC")
    for order, expected in (("ascending", ["second", "first"]), ("descending", ["first", "second"])):
        heading.click()
        assert names(page, table) == expected
        assert page.locator(f"{table} th[aria-sort={order}]").count() == 1
    assert [text.strip() for text in page.locator(f"{table} tbody:first-of-type td:first-child").all_inner_texts()] == [
        "macro",
        "all",
    ]
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert refused == []
    opened.close()
