"""The page in a real browser: sections, zoom, spectrograms, tempo, count-in, help, languages."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.page import evaluate, file, saved, separate
from tests.helpers.server_process import FAST, Server, run_server, wait_until

pytestmark = pytest.mark.browser


def view(page: Any, question: str) -> Any:
    """Evaluate an expression on the view `v` of the open player."""
    return page.evaluate(f"(v => {question})(document.querySelector('.player').view)")


def drag(page: Any, start: float, stop: float) -> None:
    """Drag over the first waveform, from and to fractions of its width."""
    box = page.locator(".stem canvas").first.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + start * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + stop * box["width"], y, steps=3)
    page.mouse.up()


def test_dragged_section_is_looped_and_zoomed(page: Any) -> None:
    separate(page, file(seconds=12, seed=60))
    drag(page, 0.75, 0.5)
    section = evaluate(page, "t.section")
    assert abs(section["start"] - 6) < 0.1 and abs(section["stop"] - 9) < 0.1
    assert evaluate(page, "t.loop") and evaluate(page, "t.position") == section["start"]
    assert page.get_attribute("[aria-label='Loop']", "aria-pressed") == "true"
    page.click("summary:has-text('Practice')")
    assert page.inner_text(".section").startswith("Section 0:0")
    page.click(".play")
    wait_until(lambda: evaluate(page, "t.segments.length") >= 3)
    for segment in evaluate(page, "t.segments"):  # also over the seam
        assert section["start"] <= segment["position"]
        assert segment["position"] + segment["length"] <= section["stop"] + 1e-6
    times = evaluate(page, "t.segments.map(x => [x.at, x.at + x.length])")
    for (_, end), (start, _) in zip(times, times[1:]):
        assert abs(end - start) < 1e-6
    page.click(".play")
    page.click("text=Whole song")
    assert evaluate(page, "t.section") is None
    canvas = page.locator(".stem canvas").first
    canvas.hover(position={"x": 300, "y": 20})
    page.keyboard.down("Control")
    page.mouse.wheel(0, -500)
    page.keyboard.up("Control")
    wait_until(lambda: view(page, "v.length") < 6)
    start, stop = view(page, "v.start"), view(page, "v.stop")
    wait_until(lambda: view(page, "v.detail?.start === v.start && v.detail?.stop === v.stop"))
    canvas.click(position={"x": 1, "y": 20})
    assert abs(evaluate(page, "t.position") - start) < 0.1, "a click is a place in what is seen"
    page.keyboard.down("Shift")
    canvas.hover(position={"x": 300, "y": 20})
    page.mouse.wheel(0, 200)
    page.keyboard.up("Shift")
    wait_until(lambda: view(page, "v.start") > start)
    assert abs(view(page, "v.length") - (stop - start)) < 1e-6
    page.click("[aria-label='Zoom out']")
    page.click("[aria-label='Zoom out']")
    assert view(page, "v.isWhole") and page.is_disabled("[aria-label='Zoom out']")


def test_keyboard_alone_practices(page: Any) -> None:
    separate(page, file(seconds=12, seed=60))
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("i")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("o")
    assert evaluate(page, "[t.section, t.loop]") == [{"start": 5, "stop": 10}, True]
    page.keyboard.press("+")
    assert view(page, "v.length") == 6
    page.keyboard.press("-")
    assert view(page, "v.isWhole")
    page.keyboard.press("+")
    page.keyboard.press("+")
    page.keyboard.press("0")
    assert view(page, "v.isWhole")
    page.keyboard.press(",")
    page.keyboard.press(",")
    page.keyboard.press(".")
    assert evaluate(page, "t.tempo") == 0.95
    page.keyboard.press("c")
    assert evaluate(page, "t.countIn") == {"bpm": 120, "beats": 4}
    page.keyboard.press("c")
    assert evaluate(page, "t.countIn") is None
    page.keyboard.press("g")
    assert page.get_attribute("[aria-label='Spectrograms']", "aria-pressed") == "true"
    wait_until(lambda: view(page, "v.pictures?.images.length") == 4)
    page.keyboard.press("Escape")
    assert evaluate(page, "t.section") is None
    page.keyboard.press("?")
    assert page.is_visible("dialog h2:has-text('Keyboard shortcuts')")
    page.keyboard.press("m")
    page.keyboard.press("1")
    assert evaluate(page, "t.tracks.some(x => x.muted)") is False, "the dialog is modal"
    page.keyboard.press("Escape")
    wait_until(lambda: page.locator("dialog.help").count() == 0)
    page.click("button:has-text('Keyboard shortcuts')")
    page.click("dialog >> text=Close")
    wait_until(lambda: page.locator("dialog.help").count() == 0)


def test_spectrograms_are_drawn_of_what_is_seen(page: Any) -> None:
    separate(page, file(seconds=55, seed=52))
    page.click("[aria-label='Spectrograms']")
    assert view(page, "v.length") == 30, "of a long song, a part"
    wait_until(lambda: view(page, "v.pictures?.images.length") == 4)
    pixels = "c => [...c.getContext('2d').getImageData(9, 0, 1, c.height).data]"
    wait_until(lambda: len(set(page.locator(".stem canvas").first.evaluate(pixels)[::4])) > 8)
    page.click("[aria-label='Zoom in']")
    wait_until(lambda: view(page, "v.pictures?.stop === v.stop && v.pictures.images.length === 4"))
    assert view(page, "v.length") == 15


STRETCH = """async ([tempo, hertz]) => {
    const { Stretcher } = await import('/static/stretch.js');
    const rate = 8000, parts = [], stretcher = new Stretcher(tempo, rate);
    const tones = hertz.map(h => Float32Array.from({length: 4 * rate},
        (_, i) => Math.sin(2 * Math.PI * h * i / rate) * (i % 4000 < 2000 ? 1 : 0.3)));
    const mix = tones[0].map((x, i) => x + tones[1][i]);
    for (let at = 0; at < 4 * rate; at += 5000) {
        const pieces = [...tones, mix].map(x => x.slice(at, at + 5000));
        parts.push(stretcher.process(pieces, at + 5000 >= 4 * rate));
    }
    const joined = [0, 1, 2].map(c => parts.flatMap(part => [...part[c]]));
    const crossings = joined.map(x => x.filter((_, i) => i && x[i - 1] < 0 && x[i] >= 0).length);
    const error = joined[2].map((x, i) => Math.abs(x - joined[0][i] - joined[1][i]));
    return [joined[0].length / rate, crossings.map(n => n / joined[0].length * rate),
            error.reduce((a, b) => Math.max(a, b), 0)];
}"""


@pytest.mark.parametrize("tempo", [0.5, 0.8, 1.25])
def test_tempo_changes_without_pitch_and_stems_in_step(page: Any, tempo: float) -> None:
    seconds, hertz, error = page.evaluate(STRETCH, [tempo, [220, 550]])
    assert abs(seconds - 4 / tempo) < 0.06
    assert abs(hertz[0] - 220) < 5 and abs(hertz[1] - 550) < 10
    assert error < 1e-5, "the stems add up to the stretched song"


def test_tempo_slider_plays_slower(page: Any) -> None:
    separate(page, file(seconds=12, seed=60))
    page.click("summary:has-text('Practice')")
    page.locator("[aria-label='Tempo']").fill("0.5")
    assert evaluate(page, "t.tempo") == 0.5 and "50" in page.inner_text(".practice output")
    page.click(".play")
    wait_until(lambda: evaluate(page, "t.position") > 0.2)
    segment = evaluate(page, "t.segments[0]")
    assert 9.5 < segment["length"] < 10, "5 seconds take 10, less what the next part continues"
    assert evaluate(page, "new Set(t.tracks.map(x => x.startedAt + ' ' + x.startedFrom)).size") == 1
    lengths = evaluate(page, "t.tracks.map(x => x.source.buffer.length)")
    assert len(set(lengths)) == 1
    page.locator("[aria-label='Tempo']").fill("1")
    wait_until(lambda: evaluate(page, "t.segments[0]?.length") is not None)
    assert evaluate(page, "t.segments[0].tempo") == 1


def test_bar_of_clicks_comes_before_the_music(page: Any) -> None:
    separate(page, file(seconds=12, seed=60))
    page.click("summary:has-text('Practice')")
    page.check("text=Count-in")
    page.get_by_label("Beats per minute").fill("240")
    page.get_by_label("Beats per bar").fill("3")
    page.keyboard.press("Tab")
    page.click(".play")
    wait_until(lambda: evaluate(page, "t.segments.length") > 0)
    clicks = evaluate(page, "t.clicks.map(x => x.at)")
    assert len(clicks) == 3
    assert all(abs(b - a - 0.25) < 1e-6 for a, b in zip(clicks, clicks[1:]))
    first = evaluate(page, "t.tracks[0].startedAt")
    assert first >= clicks[-1] + 0.25 - 1e-6
    wait_until(lambda: evaluate(page, "t.position") > 0.1)
    page.click(".play")
    page.get_by_label("Beats per minute").fill("0")
    page.keyboard.press("Tab")
    assert evaluate(page, "t.countIn") is None, "not a tempo"
    page.evaluate("let now = 1e6; performance.now = () => (now += 500); 0")
    for _ in range(4):
        page.click("text=Tap the tempo")
    assert page.get_by_label("Beats per minute").input_value() == "120"
    assert evaluate(page, "t.countIn") == {"bpm": 120, "beats": 3}


# ── languages ──


def test_all_languages_have_the_same_texts(page: Any) -> None:
    texts = page.evaluate("import('/static/texts.js').then(m => m.TEXTS)")
    assert list(texts) == ["en", "de", "es", "ja"]
    for name, language in texts.items():
        assert list(language) == list(texts["en"]), name
        for key, text in language.items():
            assert text and find_fields(text) == find_fields(texts["en"][key]), (name, key)


def find_fields(text: object) -> list[str]:
    return sorted(re.findall(r"\{\w+\}", str(text)))


MARK = """async () => {
    const { TEXTS, setLanguage } = await import('/static/texts.js');
    const mark = text => typeof text === 'string' ? `⟦${text}⟧`
        : Object.fromEntries(Object.entries(text).map(([k, v]) => [k, mark(v)]));
    for (const key of Object.keys(TEXTS.de)) TEXTS.de[key] = mark(TEXTS.de[key]);
    setLanguage('de');
}"""
UNMARKED = """() => {
    const found = [];
    const check = (text, node) => {
        const rest = text.replace(/⟦[^⟦⟧]*(⟦[^⟦⟧]*⟧[^⟦⟧]*)*⟧/g, '');
        if (/\\p{L}/u.test(rest)) found.push(`${node.tagName}: ${text}`);
    };
    for (const node of document.querySelectorAll('body *')) {
        if (node.closest('script, kbd, #language, #model, #version, .song h2')) continue;
        for (const child of node.childNodes) if (child.nodeType === 3) check(child.data, node);
        for (const name of ['aria-label', 'title', 'alt', 'placeholder', 'aria-valuetext'])
            if (node.hasAttribute(name)) check(node.getAttribute(name), node);
    }
    return found;
}"""


def test_page_has_no_text_outside_of_the_file(page: Any) -> None:
    """Every text and label, in all states, changes with the language; nothing is lost by it."""
    page.set_input_files(
        "#files", {"name": "x.mp3", "mimeType": "audio/mpeg", "buffer": b"no music"}
    )
    page.wait_for_selector(".song.failed")
    separate(page, file(seconds=12, seed=60))
    page.click("summary:has-text('Practice')")
    drag(page, 0.2, 0.5)
    page.evaluate("document.querySelectorAll('[hidden]').forEach(x => x.hidden = false)")
    page.evaluate(MARK)
    assert page.get_attribute("html", "lang") == "de"
    assert page.evaluate(UNMARKED) == []
    assert page.locator(".song").count() == 2 and page.locator(".stem canvas").count() == 4
    page.keyboard.press("?")
    page.wait_for_selector("dialog.help")
    assert page.evaluate(UNMARKED) == []


def test_language_of_the_browser_and_choice(browser: Any, page_server: Server) -> None:
    context = browser.new_context(locale="de-AT")
    page = context.new_page()
    page.goto(page_server.url)
    page.wait_for_selector("#model option", state="attached")
    assert page.get_attribute("html", "lang") == "de"
    assert page.inner_text("#drop strong") == "Songs hierher ziehen oder Dateien auswählen"
    assert page.inner_text("#kept").endswith("nach 60 Minuten gelöscht.")
    separate(page, file(seconds=1, seed=3))
    assert page.is_visible("[aria-label='Gesang stummschalten']")
    assert page.inner_text(".song .status").startswith("4 Spuren")
    page.select_option("#language", label="日本語")
    assert page.get_attribute("html", "lang") == "ja"
    assert page.is_visible("[aria-label='ボーカルをミュート']") and page.is_visible("text=削除")
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    assert page.get_attribute("html", "lang") == "ja" and page.input_value("#language") == "ja"
    page.set_input_files("#files", {"name": "x.mp3", "mimeType": "audio/mpeg", "buffer": b"no"})
    page.wait_for_selector(".failed .status:has-text('音声として読み込めません')")
    context.close()
    other = browser.new_context(locale="fr-FR").new_page()
    other.goto(page_server.url)
    other.wait_for_selector("#model option", state="attached")
    assert other.get_attribute("html", "lang") == "en"
    other.context.close()


def test_link_opens_song_without_key(browser: Any, repo: Path, tmp_path: Path) -> None:
    words = ["--repo", repo, "--models", FAST, "--data-dir", tmp_path / "data"]
    with run_server(*words, "--api-key", "open sesame", "--share-links") as server:
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.goto(server.url)
        page.fill("#key", "open sesame")
        page.click("text=Sign in")
        page.wait_for_selector("#model option", state="attached")
        separate(page, file(seconds=1))
        page.click("text=Copy link")
        page.wait_for_selector("text=Link copied")
        link = page.evaluate("navigator.clipboard.readText()")
        context.close()
        assert link.startswith(f"{server.url}/#song=shared-")
        guest = browser.new_context().new_page()
        guest.goto(link)
        guest.wait_for_selector(".stems canvas")
        assert guest.inner_text(".song h2") == "my song.wav"
        assert not guest.is_visible("#request") and not guest.is_visible("#sign-in")
        assert not guest.is_visible("text=Copy link")
        guest.click(".play")
        wait_until(lambda: evaluate(guest, "t.position") > 0.1)
        assert saved(guest, "[aria-label='Save bass']")[1][:4] == b"fLaC"
        guest.click("text=Remove")
        guest.reload()
        guest.wait_for_selector(".stems canvas")
        guest.goto(f"{server.url}/#song=shared-0")
        guest.wait_for_selector("#notice:has-text('no such song')")
        guest.context.close()


def test_page_offers_no_link_by_default(page: Any) -> None:
    separate(page, file(seconds=1, seed=3))
    assert page.locator(".share").is_hidden()
