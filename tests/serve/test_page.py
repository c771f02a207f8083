"""The page in headless Chromium: what people do with it, and whether everybody can."""

import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from forgery_eval import inference
from llava import ForgeryDetector
from llava.abstention import AbstentionRule
from llava.assets import SAMPLES
from llava.calibration import Calibration
from tests.serve.running import StubSystem, png, running

sync_api = pytest.importorskip("playwright.sync_api")
EVIL = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
WAIT = 60_000


def executable() -> str | None:
    """A Chromium that is installed here; None for the one of playwright, if any."""
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        try:
            opened = playwright.chromium.launch(
                executable_path=executable(), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *camera]
            )
        except sync_api.Error as error:
            pytest.skip(f"no Chromium can be started (apt install chromium, or playwright install chromium): {error}")
        yield opened
        opened.close()


class Opened:
    """A page, with what went wrong in it and what it asked of other hosts."""

    def __init__(self, browser, url: str, **settings: object) -> None:
        self.page = browser.new_page(viewport={"width": 1300, "height": 900}, **settings)
        self.page.set_default_timeout(WAIT)
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        own = (url, "data:", "blob:", "file:")
        self.page.on("request", lambda made: None if made.url.startswith(own) else self.foreign.append(made.url))
        self.page.goto(url)

    def give(self, *files: Path) -> None:
        self.page.set_input_files("#files", [str(file) for file in files])

    def close(self) -> None:
        self.page.close()
        assert self.errors == [] and self.foreign == []


@pytest.fixture
def front(browser, embedded) -> Iterator[Opened]:
    opened = Opened(browser, embedded.url)
    yield opened
    opened.close()


class Speaking(StubSystem):
    """Answers with a text, a mask and attention of its own making."""

    has_attention = True
    answer = "It is so."

    def analyze_batch(self, prepared, options):
        mask = np.zeros((30, 40), bool)
        mask[:, :20] = True
        reports = super().analyze_batch(prepared, options)
        attention = np.linspace(0, 1, 1200).reshape(30, 40) if options.attention else None
        return [replace(r, text=self.answer, attention=attention, mask=mask, tag="landscape") for r in reports]


# --- one image


def test_an_image_is_answered_with_verdict_gauge_reasons_overlay_and_strip(front, detector):
    page, file = front.page, SAMPLES / "05_fake_inpainting.jpg"
    own = detector.analyze(file)
    front.give(file)
    page.wait_for_selector(".strip li:nth-child(3)")
    assert page.inner_text(".verdict").lower() == own.label
    meter = page.locator("[role=meter]")
    calibrated = detector.calibrated(own)
    score = own.fake_probability if calibrated is None else calibrated
    assert float(meter.get_attribute("aria-valuenow")) == pytest.approx(score, abs=2e-3)
    assert own.conclusion in page.inner_text(".card") and own.summary not in page.inner_text("dl")
    assert "nothing of its origin" in page.inner_text(".provenance")
    assert file.name in page.inner_text("#status")
    page.wait_for_selector("canvas[data-painted]")
    slider = page.locator(".slider input")
    slider.fill("0")
    assert page.locator("canvas").evaluate("canvas => canvas.style.opacity") == "0"
    slider.focus()
    page.keyboard.press("End")
    assert page.locator("canvas").evaluate("canvas => canvas.style.opacity") == "1"


def test_the_answer_is_shown_while_it_is_decoded(front):
    page = front.page
    page.evaluate(
        "() => { window.seen = []; new MutationObserver(() => window.seen.push("
        "document.getElementById('stream').textContent.length)).observe(document.getElementById('stream'),"
        " {childList: true, characterData: true, subtree: true}); }"
    )
    page.click("#examples button >> nth=3")
    page.wait_for_selector(".verdict")
    assert len(set(page.evaluate("() => window.seen"))) > 5


def test_history_stays_in_the_browser_and_can_be_cleared(front):
    page = front.page
    front.give(SAMPLES / "02_real_people.jpg")
    page.wait_for_selector("#history button")
    page.reload()
    page.click("#history button")
    assert "02_real_people.jpg" in page.inner_text(".card h3")
    page.click("#clear")
    page.wait_for_selector("#history button", state="detached")


def test_bad_files_are_explained(front, tmp_path):
    (tmp_path / "notes.jpg").write_text("no image")
    (tmp_path / "huge.png").write_bytes(bytes(33_000_000))
    front.give(tmp_path / "notes.jpg")
    front.page.wait_for_selector("text=no image in a known format")
    front.give(tmp_path / "huge.png")
    front.page.wait_for_selector("text=larger than this server takes")


def test_heic_is_shown_and_a_camera_can_be_used(front, tmp_path):
    Image.new("RGB", (64, 48), (200, 90, 10)).save(tmp_path / "photo.heic", "HEIF")
    front.give(tmp_path / "photo.heic")
    front.page.wait_for_selector(".card .layers img")
    image = front.page.locator(".card .layers img")
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    front.page.click("#photograph")
    front.page.wait_for_selector("#camera[open]")
    front.page.locator("#video").evaluate(
        "video => video.videoWidth || new Promise(done => video.addEventListener('loadeddata', done))"
    )
    front.page.click("#take")
    front.page.wait_for_selector("text=photograph.png >> nth=0")


def test_dropping_and_pasting_are_ways_in(front):
    make = (
        "kind => { const canvas = document.createElement('canvas'); canvas.width = canvas.height = 40;"
        "canvas.toBlob(blob => { const data = new DataTransfer(); data.items.add(new File([blob], kind + '.png'));"
        "const settings = {bubbles: true, cancelable: true};"
        "document.body.dispatchEvent(kind === 'drop' ? new DragEvent('drop', {...settings, dataTransfer: data})"
        ": new ClipboardEvent('paste', {...settings, clipboardData: data})); }); }"
    )
    for kind in ("drop", "paste"):
        front.page.evaluate(make, kind)
        front.page.wait_for_selector(f".card h3:has-text('{kind}.png')")


# --- no verdict, several images, texts from outside


def test_no_verdict_is_said_with_its_reason_and_without_a_gauge(browser, stub):
    silent = ForgeryDetector(stub, AbstentionRule(low=0.01, high=0.99, error_level=0.1, confidence=0.9))
    with running(silent) as server:
        opened = Opened(browser, server.url)
        opened.page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": png()})
        opened.page.wait_for_selector(".strip")
        text = opened.page.inner_text(".verdict")
        assert text.startswith("No verdict: inconclusive") and opened.page.locator("[role=meter]").count() == 0
        opened.close()


def test_several_images_are_a_table_that_sorts_and_opens(front, tmp_path):
    page = front.page
    (tmp_path / "notes.jpg").write_text("no image")
    front.give(SAMPLES / "02_real_people.jpg", SAMPLES / "05_fake_inpainting.jpg", tmp_path / "notes.jpg")
    page.wait_for_selector("tbody tr:nth-child(3)")
    page.wait_for_selector("#work[hidden]", state="attached")
    page.click("th button:has-text('P(fake)')")
    scores = [row for row in page.locator("tbody td:nth-child(4)").all_inner_texts() if row != "–"]
    page.click("th button:has-text('P(fake)')")
    assert page.locator("th[aria-sort=descending]").count() == 1
    assert [t for t in page.locator("tbody td:nth-child(4)").all_inner_texts() if t != "–"] == scores[::-1]
    page.click("tbody button:has-text('notes.jpg')")
    assert "no image in a known format" in page.inner_text(".card")
    page.click("tbody button:has-text('05_fake')")
    page.click("text=Check")
    page.wait_for_selector(".strip")
    with page.expect_download() as download:
        page.click("button:has-text('CSV')")
    rows = Path(download.value.path()).read_text().splitlines()
    assert rows[0].startswith("image,verdict,fake_probability") and len(rows) == 4
    with page.expect_download() as download:
        page.click("button:has-text('JSON')")
    assert '"preview"' not in Path(download.value.path()).read_text()


def evil_png() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", EVIL)
    exif = Image.Exif()
    exif[0x0131] = f"NovelAI {EVIL}"
    stream = io.BytesIO()
    Image.new("RGB", (40, 30)).save(stream, "PNG", pnginfo=info, exif=exif)
    return stream.getvalue()


def test_no_text_from_outside_becomes_html(browser):
    system = Speaking()
    system.answer = f"</script>{EVIL} <b>bold</b>"
    with running(ForgeryDetector(system)) as server:
        opened = Opened(browser, server.url)
        for count in (1, 2):
            file = {"name": f"{EVIL}=1.png", "mimeType": "image/png", "buffer": evil_png()}
            opened.page.set_input_files("#files", [file] * count)
            opened.page.wait_for_selector("#work[hidden]", state="attached")
            opened.page.wait_for_selector(".card" if count == 1 else "tbody tr:nth-child(2)")
            opened.page.reload()
            opened.page.click("#history button")
            text = opened.page.inner_text(".card")
            assert "onerror=" in text and "<b>bold</b>" in text and "NovelAI <img" in text
            assert opened.page.locator("#results script, #results b:has-text('bold'), img[src=x]").count() == 0
            assert opened.page.title() != "broken"
        opened.close()


def test_mask_attention_and_a_calibrated_score_are_shown(browser):
    with running(ForgeryDetector(Speaking(), calibration=Calibration(2.0, 0.0, "detector"))) as server:
        opened = Opened(browser, server.url)
        opened.page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": png()})
        opened.page.wait_for_selector("canvas[data-painted]")
        assert "P(fake) 0.170 calibrated" in " ".join(opened.page.inner_text(".gauge").split())  # 0.04 as it is given
        alpha = "canvas => canvas.getContext('2d').getImageData({x}, 5, 1, 1).data[3]"
        canvas = opened.page.locator("canvas")
        assert canvas.evaluate(alpha.format(x=5)) == 255 and canvas.evaluate(alpha.format(x=35)) == 0
        assert opened.page.inner_text("figcaption") == "What the model calls forged: 50.0 % of the image"
        opened.page.select_option("select", "attention")
        opened.page.wait_for_timeout(300)
        assert canvas.evaluate(alpha.format(x=5)) < 100 and "landscape" in opened.page.inner_text(".card")
        assert opened.page.inner_text("figcaption") == "Where the model looked"
        opened.close()


def test_a_key_is_asked_for_where_one_is_needed(browser, stub):
    with running(ForgeryDetector(stub), keys=("secret",)) as server:
        opened = Opened(browser, server.url)
        file = {"name": "a.png", "mimeType": "image/png", "buffer": png()}
        opened.page.set_input_files("#files", file)
        opened.page.wait_for_selector("text=Authorization: Bearer")
        opened.page.fill("#key", "secret")
        opened.page.set_input_files("#files", file)
        opened.page.wait_for_selector(".verdict.fake")
        opened.close()


# --- everybody


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, embedded, scheme, tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    opened = Opened(browser, embedded.url, bypass_csp=True, color_scheme=scheme)

    def serious() -> list[str]:
        found = axe.run(opened.page).response["violations"]
        return [
            f"{each['id']}: {each['nodes'][0]['html']}" for each in found if each["impact"] in ("serious", "critical")
        ]

    assert serious() == []
    opened.page.click("header summary")
    opened.give(SAMPLES / "05_fake_inpainting.jpg")
    opened.page.wait_for_selector(".strip")
    assert serious() == []
    (tmp_path / "bad.jpg").write_text("no image")
    opened.give(SAMPLES / "02_real_people.jpg", tmp_path / "bad.jpg")
    opened.page.wait_for_selector("#work[hidden]", state="attached")
    opened.page.click("tbody button >> nth=0")
    assert serious() == []
    opened.page.goto(f"{embedded.url}/docs")
    assert serious() == []
    opened.close()


def test_the_keyboard_reaches_everything(front):
    page = front.page
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "skip"
    seen = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("() => document.activeElement.id || document.activeElement.dataset.sample || ''"))
    assert {"choose", "photograph", "01_real_garden.png", "10_fake_channel_shift.jpg"} <= seen
    page.focus("#examples button >> nth=1")
    page.keyboard.press("Enter")
    page.wait_for_selector(".verdict")


# --- the report of forgery detect


def test_detect_writes_the_same_report(browser, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "evil.png").write_bytes(evil_png())
    shutil.copy(SAMPLES / "05_fake_inpainting.jpg", tmp_path / "images" / "b.jpg")
    (tmp_path / "images" / "c.jpg").write_text("no image")
    page = tmp_path / "report.html"
    given = ["--img_path", str(tmp_path / "images"), "--html", str(page), "--no-abstain", "--device", "cpu"]
    assert inference.run([*given, "--max_new_tokens", "80"]) == 3
    assert "provenance  The file says that it was made or changed by generative AI" in capsys.readouterr().out
    json_file = str(tmp_path / "out.jsonl")
    for said in (False, True):
        assert inference.run([*given, "--max_new_tokens", "5", "--json", json_file]) == 3
        assert ("3 images were analysed by an earlier run" in capsys.readouterr().err) is said
    assert inference.run([*given, "--max_new_tokens", "80"]) == 3
    opened = Opened(browser, page.as_uri())
    assert opened.page.locator("tbody tr").count() == 3 and opened.page.locator(".card").count() == 3
    assert opened.page.locator(".strip li").count() == 6 and opened.page.locator("canvas").count() == 2
    stages = [name.lower() for name in opened.page.locator(".card >> nth=0 >> dt").all_inner_texts()]
    assert stages == ["caption", "reasoning", "conclusion"]
    assert "onerror=" in opened.page.inner_text("main") and opened.page.title() != "broken"
    opened.page.wait_for_selector("canvas[data-painted]")
    opened.close()
