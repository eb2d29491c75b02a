import base64
import dataclasses
import io
import shutil
import subprocess

import numpy as np
import pytest
from audit_images import SmallCorrelation, altered, picture, save_all
from PIL import Image

from lcmem_cli.engine.evaluation.audit.run import audit
from lcmem_cli.engine.report.html import Distribution, Pictures, render_report

pytestmark = pytest.mark.browser
HOSTILE = '"><img src=x onerror=window.hacked=1><script>window.hacked=1<∕script>.png'


@pytest.fixture(scope="module")
def browser():
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """Five flagged images: an exact copy with a hostile name and four altered copies."""
    root = tmp_path_factory.mktemp("browser")
    for seed in range(12):
        folder = root / "train" / f"person{seed % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(seed).save(folder / f"{seed:05d}.png")
    save_all(root / "held-out", range(1000, 1200))
    (root / "generated").mkdir()
    for seed in range(1, 5):
        altered(picture(seed)).save(root / "generated" / f"copy{seed}.png")
    shutil.copy(root / "train" / "person1" / "00009.png", root / "generated" / HOSTILE)
    result = audit(
        root / "generated",
        root / "train",
        held_out=root / "held-out",
        fpr=0.01,
        detector=SmallCorrelation(),
        output=root / "out",
    )
    assert result.num_flagged == 5
    return root, result


@pytest.fixture
def page(browser, audited):
    """The page, opened from disk; at the end nothing may have gone wrong in it."""
    root, _ = audited
    context = browser.new_context(viewport={"width": 1200, "height": 900}, offline=True)
    page = context.new_page()
    problems = []
    page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(f"request: {request.url[:80]}"))
    page.goto((root / "out" / "report.html").as_uri())
    yield page
    assert problems == []
    context.close()


def column(page, number):
    return page.locator(f"#rows td:nth-child({number})").all_inner_texts()


def names(page):
    return [text.split("\n")[0] for text in column(page, 1)]


def test_it_renders_the_statement_and_every_flagged_pair(page, audited):
    _, result = audited
    heading = page.locator("h1").inner_text().replace("\u00a0", " ")
    assert heading == result.statement
    assert page.locator("#rows tr").count() == 5
    assert page.locator("#status").inner_text() == "5 flagged pairs"
    assert page.locator("svg path").count() == 2
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_sorting_by_heading_and_by_list(page):
    scores = [float(text) for text in column(page, 6)]
    assert scores == sorted(scores, reverse=True)
    heading = page.locator('th[data-key="s"]')
    assert heading.get_attribute("aria-sort") == "descending"
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert [float(text) for text in column(page, 6)] == sorted(scores)
    page.locator('th[data-key="q"] button').press("Enter")
    assert heading.get_attribute("aria-sort") is None
    assert names(page) == sorted(names(page), key=lambda name: (name[0].isalpha(), name))
    page.select_option("#sort-key", "id")
    assert column(page, 5) == sorted(column(page, 5))
    assert page.locator('th[data-key="id"]').get_attribute("aria-sort") == "ascending"


def test_filtering_by_name_identity_score_and_kind(page):
    page.fill("#filter-text", "COPY3")
    assert names(page) == ["copy3.png"]
    assert page.locator("#status").inner_text() == "1 of 5 flagged pairs"
    page.fill("#filter-text", "person1")
    assert page.locator("#rows tr").count() == 2
    page.fill("#filter-text", "no such name")
    assert page.locator("#rows tr").count() == 0
    page.click("button[type=reset]")
    page.locator("#rows tr").nth(4).wait_for()
    scores = sorted((float(text) for text in column(page, 6)), reverse=True)
    page.fill("#filter-score", str(scores[2] - 1e-3))
    assert 3 <= page.locator("#rows tr").count() < 5 or scores[2] - scores[-1] < 2e-3
    page.fill("#filter-score", "")
    page.fill("#filter-p", "0.000001")
    assert page.locator("#rows tr").count() == 0
    page.fill("#filter-p", "")
    page.select_option("#filter-kind", "identical file")
    assert page.locator("#rows tr").count() == 1 and "onerror" in names(page)[0]


def decoded(page, locator):
    """Return the pixels of an ``<img>`` as the browser decodes them."""
    data = locator.evaluate(
        """image => {
            const canvas = document.createElement("canvas");
            canvas.width = image.naturalWidth;
            canvas.height = image.naturalHeight;
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL("image/png");
        }"""
    )
    image = Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))
    return np.asarray(image.convert("RGB"), dtype=int)


def test_pairs_show_the_right_pictures_and_their_difference(page):
    page.set_viewport_size({"width": 1200, "height": 4000})  # no heading over a scrolled row
    page.select_option("#gain", "1")
    for seed in range(1, 5):
        row = page.locator("#rows tr", has_text=f"copy{seed}.png")
        generated, original = altered(picture(seed)), picture(seed)
        images = row.locator("img")
        assert images.count() == 4
        for index, expected in enumerate([generated, original, generated, original]):
            difference = np.abs(decoded(page, images.nth(index)) - np.asarray(expected, int))
            assert difference.mean() < 6
        shot = row.locator(".difference").screenshot()
        shown = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"), int)[12:-12, 12:-12]
        true = np.abs(np.asarray(generated, int) - np.asarray(original, int))
        assert abs(shown.mean() - true.mean()) < 6


def test_the_viewer_opens_and_steps_with_the_keyboard(page):
    order = names(page)
    first = page.locator("#rows .thumb").first
    first.focus()
    page.keyboard.press("Enter")
    viewer = page.locator("#viewer")
    assert viewer.is_visible()
    assert page.locator("#viewer-title").inner_text() == "Pair 1 of 5"
    assert page.locator("#facts dd").first.inner_text() == order[0]
    assert page.locator("#stage img").count() == 4
    page.keyboard.press("ArrowRight")
    assert page.locator("#facts dd").first.inner_text() == order[1]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#viewer-title").inner_text() == "Pair 1 of 5"
    page.keyboard.press("Escape")
    assert not viewer.is_visible()
    assert first.evaluate("button => button === document.activeElement")


def test_hostile_names_are_shown_and_not_run(page):
    assert any("onerror=window.hacked=1" in name for name in names(page))
    page.locator("#rows tr", has_text="onerror").locator(".thumb").first.click()
    assert "<script>" in page.locator("#facts").inner_text()
    assert page.evaluate("window.hacked === undefined")


def test_the_page_has_landmarks_labels_and_a_skip_link(page):
    assert page.locator("main").count() == page.locator("h1").count() == 1
    unlabelled = page.evaluate(
        """[...document.querySelectorAll("input, select, button:not([hidden])")].filter(
            node => !node.labels?.length && !node.textContent.trim()
                && !node.getAttribute("aria-label")).length"""
    )
    assert unlabelled == 0
    assert page.evaluate("[...document.images].every(image => image.hasAttribute('alt'))")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#pairs"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 380])
def test_text_is_readable_and_nothing_overflows(page, scheme, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    contrast = page.evaluate(
        """() => {
            const channels = text => text.match(/[\\d.]+/g).slice(0, 3).map(value => {
                const part = value / 255;
                return part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            });
            const light = text => {
                const [r, g, b] = channels(text);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const card = light(getComputedStyle(document.querySelector("section")).backgroundColor);
            return [...document.querySelectorAll("h1, .columns li, .lead, .tiles dt, td")].map(
                node => {
                    const ink = light(getComputedStyle(node).color);
                    const [low, high] = [Math.min(ink, card), Math.max(ink, card)];
                    return (high + 0.05) / (low + 0.05);
                }
            );
        }"""
    )
    assert min(contrast) >= 4.5


def test_two_thousand_pairs_stay_usable(browser, audited, tmp_path):
    _, result = audited
    names = [f"generated/{number:05d}.png" for number in range(2000)]
    matches = tuple(
        dataclasses.replace(
            result.flagged[1],
            query=name,
            match=f"train/{number % 300:05d}.png",
            match_id=str(number % 300),
            score=1 - number / 4000,
        )
        for number, name in enumerate(names)
    )
    scores = np.linspace(0, 1, 50)
    text = render_report(
        dataclasses.replace(
            result,
            num_flagged=2000,
            matches=matches,
            exposed_images=(),
            null=dataclasses.replace(result.null, closest=()),
        ),
        Pictures(
            uris=[None],
            generated=dict.fromkeys(names, 0),
            training={match.match: 0 for match in matches},
            laid_over={},
            real={},
        ),
        Distribution(generated=scores, null=scores, threshold=0.9, as_logit=False),
    )
    (tmp_path / "many.html").write_text(text, encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "many.html").as_uri())
    assert page.locator("#rows tr").count() < 300  # drawn as one scrolls, not all at once
    before = page.locator("#rows tr").count()
    page.locator("#more").scroll_into_view_if_needed()
    page.locator("#rows tr").nth(before).wait_for(state="attached")
    page.fill("#filter-text", "01999")
    assert page.locator("#rows tr").count() == 1
    assert page.locator("#status").inner_text() == "1 of 2,000 flagged pairs"
    page.close()


def test_forty_pairs_print_on_six_sheets_the_first_complete_in_itself(browser, tmp_path):
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext on this machine")
    save_all(tmp_path / "train", range(60))
    save_all(tmp_path / "held-out", range(1000, 1200))
    (tmp_path / "generated").mkdir()
    for seed in range(40):
        altered(picture(seed)).save(tmp_path / "generated" / f"copy{seed}.png")
    result = audit(
        tmp_path / "generated", tmp_path / "train", held_out=tmp_path / "held-out", fpr=0.01,
        detector=SmallCorrelation(), output=tmp_path / "out",
    )  # fmt: skip
    assert result.num_flagged == 40
    page = browser.new_page()
    page.goto((tmp_path / "out" / "report.html").as_uri())
    page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    page.close()
    text = subprocess.check_output(
        ["pdftotext", "-layout", tmp_path / "report.pdf", "-"], text=True
    )
    sheets = text.split("\f")[:-1]
    assert 3 <= len(sheets) <= 6
    first = " ".join(sheets[0].split())
    for part in (result.verdict[:20], "What this shows", "What it does not show"):
        assert part in first
    assert "Flagged pairs" not in first
    for number, sheet in enumerate(sheets, 1):
        head = sheet.strip().splitlines()[0]
        assert result.times.started[:10] in head and "false-positive rate 1 %" in head
        assert f"{number}/{len(sheets)}" in sheet.replace(" / ", "/")
    assert all(f"copy{seed}.png" in text for seed in range(40))
