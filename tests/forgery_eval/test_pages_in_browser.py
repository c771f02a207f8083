"""Pages as a browser shows them: their own script sorts, nothing is loaded, and a phone is wide enough."""

import json
import shutil

import pytest

from forgery_eval.compare import run as compare
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


def test_a_comparison_is_sorted_by_a_click_and_fits_a_phone(browser, results):  # noqa: F811
    lines = [json.loads(line) for line in (results.parent / "p.jsonl").read_text().splitlines()]
    runs = [str(results)]
    for number in (1, 2):
        changed = [
            {**line, "fake_probability": abs(line["fake_probability"] - 0.4 * (k % (number + 2) == 0)), "verdict": None}
            for k, line in enumerate(lines)
        ]
        file = results.parent / f"changed-{number}.jsonl"
        file.write_text("".join(json.dumps({k: v for k, v in line.items() if v}) + "\n" for line in changed))
        runs.append(str(results.parent / f"a-run-with-a-name-that-is-far-too-long-for-a-phone-{number}"))
        given = ["--dataset_path", str(results.parent / "data"), "--result_folder", runs[-1], "--rescore", str(file)]
        assert evaluate(given) == 0
    shown = results.parent / "comparison.html"
    assert compare([*runs, "--html", str(shown)]) == 0
    opened = Opened(browser, shown.as_uri())
    page = opened.page
    refused: list[str] = []
    page.on("console", lambda said: refused.append(said.text))
    page.reload()
    assert page.locator("svg").count() == 2 and page.locator("svg").last.is_visible()
    # The first screen has the runs and the pairs.
    assert page.locator("h2", has_text="Pairs").bounding_box()["y"] < 900
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    table = "h2:has-text('Pairs') + .scroll table"
    heading = page.locator(f"{table} th button", has_text="AUROC")
    column = 1 + page.locator(f"{table} th").all_inner_texts().index(heading.inner_text())
    heading.click()
    cells = page.locator(f"{table} tbody tr td:nth-child({column})")
    values = [float(cell.get_attribute("data-order")) for cell in cells.all()]
    assert len(values) == 3 and values == sorted(values)
    assert page.locator(".card img").count() > 0
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert refused == []
    opened.close()
