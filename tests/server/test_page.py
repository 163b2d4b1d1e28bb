"""The page in a real browser: upload, progress, synchronized stems, saving, keyboard, phone."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import soundfile

from demucs_infer.cli.main import main
from demucs_infer.server.routes import STATIC
from tests.helpers.page import evaluate, file, levels, saved, separate
from tests.helpers.server_process import FAST, Server, run_server, song, wait_until

pytestmark = pytest.mark.browser


def test_uploaded_file_plays_as_synchronized_stems(page: Any) -> None:
    page.evaluate(
        """() => { window.seen = [];
        const bar = new MutationObserver(() => seen.push(document.querySelector('progress').value));
        bar.observe(document.querySelector('#songs'), {subtree: true, attributes: true}); }"""
    )
    separate(page, file(seconds=8))
    shares = [share for share in page.evaluate("seen") if 0 < share < 1]
    assert shares, "progress was seen on the way"
    assert "4 stems" in page.inner_text(".song .status")
    page.click(".play")
    wait_until(lambda: evaluate(page, "t.position") > 0.3)
    # One start time and one offset for all: synchronized to the sample.
    assert evaluate(page, "new Set(t.tracks.map(x => x.startedAt + ' ' + x.startedFrom)).size") == 1
    assert evaluate(page, "t.tracks.every(x => x.source.context === t.context)")
    page.click("[aria-label='Mute drums']")
    assert levels(page) == [0, 1, 1, 1]
    page.click("[aria-label='Solo vocals']")
    assert levels(page) == [0, 0, 0, 1]
    page.click("[aria-label='Solo vocals']")
    page.locator("[aria-label='Volume of bass']").fill("0.5")
    assert levels(page) == [0, 0.5, 1, 1]
    page.click(".stem canvas >> nth=2", position={"x": 5, "y": 20})
    assert evaluate(page, "t.position") < 1
    assert evaluate(page, "new Set(t.tracks.map(x => x.startedAt + ' ' + x.startedFrom)).size") == 1
    page.click("[aria-label='Loop']")
    assert evaluate(page, "t.loop && t.isPlaying")
    page.click(".play")
    assert not evaluate(page, "t.isPlaying")


def test_reloaded_page_has_its_songs(page: Any, page_server: Server) -> None:
    """Finished and running ones; removed ones are gone, deleted ones say so."""
    page.set_input_files("#files", [file(f"song {n}.wav", 1, 40 + n) for n in range(3)])
    wait_until(lambda: page.locator(".status:has-text('4 stems')").count() == 3)
    page.locator(".song:has-text('song 1') .cancel").click()
    wait_until(lambda: page.locator(".song").count() == 2)
    jobs = page.evaluate("[...document.querySelectorAll('.song')].map(x => x.dataset.job)")
    page.set_input_files("#files", file("long.wav", seconds=50, seed=43))
    page.wait_for_selector(".status:has-text('Separating')")
    assert page_server.call("DELETE", f"/v1/jobs/{jobs[1]}")[0] == 204
    page.reload()
    page.wait_for_selector(".song:has-text('long.wav') .status:has-text('Separating')")
    names = page.locator(".song h2").all_inner_texts()
    assert sorted(names) == ["long.wav", "song 0.wav", "song 2.wav"] and names[0] == "long.wav"
    page.wait_for_selector(".song.failed .status:has-text('deleted')")
    page.click(".song:has-text('long.wav') .cancel")
    page.locator(".song:not(.failed) .listen").click()
    page.wait_for_selector(".stems canvas")
    page.click(".play")
    wait_until(lambda: evaluate(page, "t.position") > 0.1)


def test_other_browser_does_not_see_songs(page: Any, browser: Any, page_server: Server) -> None:
    separate(page, file(seconds=1, seed=50))
    other = browser.new_context().new_page()
    other.goto(page_server.url)
    other.wait_for_selector("#model option", state="attached")
    other.wait_for_timeout(300)
    assert other.locator(".song").count() == 0
    other.context.close()


def test_stems_play_while_they_are_made(page: Any) -> None:
    page.route("**/v1/jobs?*", lambda route: route.continue_(url=f"{route.request.url}&shifts=3"))
    page.set_input_files("#files", file("long.wav", seconds=55, seed=51))
    page.wait_for_selector(".stems canvas")
    drawn = "document.querySelector('.player').view.overview[0].filter(x => x > 0).length"
    wait_until(lambda: page.evaluate(drawn) > 0)
    drawn_first = page.evaluate(drawn)
    page.click(".play")
    wait_until(lambda: evaluate(page, "t.position") > 0.3)
    assert "Separating" in page.inner_text(".song .status")
    assert not page.is_visible(".stem .get") and not page.is_visible("text=Save all (zip)")
    page.evaluate(
        """() => { window.positions = [];
        const { transport } = document.querySelector('.player');
        setInterval(() => positions.push(transport.position), 50); }"""
    )
    wait_until(lambda: page.evaluate(drawn) > drawn_first)
    page.wait_for_selector("[aria-label='Save vocals']")
    assert "4 stems" in page.inner_text(".song .status")
    assert evaluate(page, "t.isPlaying"), "it plays on, now from the files"
    positions = page.evaluate("positions")
    assert positions == sorted(positions) and positions[-1] > 0.3
    wait_until(lambda: page.evaluate(drawn) == 1200)
    page.evaluate("document.querySelector('.player').transport.seek(50)")
    wait_until(lambda: evaluate(page, "t.position") > 50.2)


MOUNT = """
const { mountPlayer } = await import('/static/player.js');
const answers = []; // to requests for the whole song, one by one
const pause = () => new Promise((resolve) => setTimeout(resolve, 250));
const waveform = (start, seconds) => new Promise((resolve) => {
    const answer = (count) => resolve(new Float32Array(1200).fill(1, 0, count));
    if (seconds === 10) answers.push(answer); else answer(1200);
});
const context = new AudioContext(), duration = 10;
let numParts = 0;
const read = async () => {
    numParts += 1;
    await pause();
    return context.createBuffer(2, 5 * 44100, 44100);
};
const root = document.createElement('div');
const stem = { name: 'vocals', file: 'vocals.wav', url: '#', waveform, read };
const player = mountPlayer(root, [stem], { context, duration, available: 5 });
const { view } = root;
const count = () => view.overview[0].filter((x) => x > 0).length;
const extend = (available) => player.extend({ duration, available, isComplete: available === 10 });
"""


@pytest.mark.parametrize(
    "steps, seen",
    [
        ("extend(10); answers[1](1200); await pause(); answers[0](600);", [1200]),
        (
            "extend(6); extend(7); answers[0](600); await pause(); drawn.push(count());"
            "answers[1](700); await pause(); drawn.push(count()); answers[2](800);",
            [600, 700, 800],
        ),
        (
            "answers[0](600); await pause(); view.show(2, 2); await pause(); extend(10);"
            "await pause(); answers[1](1200);",
            [1200],
        ),
    ],
    ids=["older one comes last", "each comes after the next request", "completed beside a detail"],
)
def test_newest_waveform_is_drawn_whenever_answers_come(
    steps: str, seen: list[int], page: Any
) -> None:
    drawn = page.evaluate(
        f"""async () => {{ {MOUNT}
        const drawn = [];
        {steps}
        await pause();
        drawn.push(count());
        await player.close();
        return drawn; }}"""
    )
    assert drawn == seen


def test_spectrogram_that_is_requested_twice_is_drawn_once(page: Any) -> None:
    is_drawn, num_parts = page.evaluate(
        f"""async () => {{ {MOUNT}
        answers[0](1200);
        await pause();
        view.setSpectrograms(true);
        await pause();
        answers.slice(1).forEach((answer) => answer(1200));
        await pause();
        view.read();
        await pause();
        answers.forEach((answer) => answer(1200));
        while (!view.pictures?.images.length) await pause();
        const found = [view.pictures.images[0] !== null, numParts];
        await player.close();
        return found; }}"""
    )
    assert is_drawn
    assert num_parts == 2  # of five seconds


def test_long_song_is_played_in_parts(page: Any) -> None:
    """Memory does not grow with the song: no stem is fetched or decoded as a whole."""
    paths: list[str] = []
    page.on("request", lambda one: paths.append(one.url.split("?")[0].rsplit("/", 1)[-1]))
    separate(page, file(seconds=58, seed=52))
    page.click(".play")
    for position in (0, 10, 20, 30, 40, 50, 57):
        page.evaluate(f"document.querySelector('.player').transport.seek({position})")
        wait_until(lambda at=position: evaluate(page, "t.position") > at + 0.05)  # type: ignore[misc]  # a default binds
    assert "part" in paths and not {"drums", "bass", "other", "vocals"} & set(paths)
    kept = evaluate(page, "Math.max(...t.tracks.map(x => x.parts.size))")
    assert 0 < kept <= 5
    longest = page.evaluate(
        """async () => Math.max(...(await Promise.all(
        document.querySelector('.player').transport.tracks.flatMap(x => [...x.parts.values()])
        )).map(x => x.duration))"""
    )
    assert longest <= 5


def test_parts_join_without_gap_or_overlap(page: Any) -> None:
    separate(page, file(seconds=12, seed=53))
    page.click(".play")
    wait_until(lambda: evaluate(page, "t.next.position") >= 10)
    segments = evaluate(page, "t.segments")
    for before, after in zip(segments, segments[1:]):
        assert abs(before["at"] + before["length"] - after["at"]) < 1e-9
        assert before["position"] + before["length"] == after["position"]
    assert evaluate(page, "t.context.sampleRate") == 8000


def test_karaoke_and_comparison_with_whole_song(page: Any) -> None:
    separate(page, file(seconds=12, seed=60))
    page.click("text=Karaoke")
    assert levels(page) == [1, 1, 1, 0]
    page.click(".play")
    wait_until(lambda: evaluate(page, "t.original.readyState") > 0)
    page.click("text=A/B")
    assert levels(page) == [0, 0, 0, 0], "the song itself is heard"
    wait_until(lambda: evaluate(page, "!t.original.paused && t.original.currentTime > 0.1"))
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("b")
    assert levels(page) == [1, 1, 1, 0]
    wait_until(lambda: evaluate(page, "t.original.paused"))
    page.reload()
    page.click(".listen")
    page.click("text=A/B")
    assert levels(page) == [1, 1, 1, 1], "the sum of the stems, as the file is not here"


def test_saving_one_stem_all_stems_and_mix(page: Any) -> None:
    page.select_option("#format", "wav")
    separate(page, file(seconds=2, seed=1))
    name, stem = saved(page, "[aria-label='Save vocals']")
    assert name == "my song (vocals).wav"
    name, archive = saved(page, "text=Save all (zip)")
    assert name == "my song.zip"
    with zipfile.ZipFile(io.BytesIO(archive)) as found:
        assert found.read("vocals.wav") == stem
    for other in ("drums", "bass", "other"):
        page.click(f"[aria-label='Mute {other}']")
    name, mix = saved(page, "text=Save this mix")
    assert name == "my song (mix).wav"
    wav, rate = soundfile.read(io.BytesIO(mix))
    alone, low = soundfile.read(io.BytesIO(stem))
    assert abs(len(wav) / rate - len(alone) / low) < 0.01
    assert 0.5 < abs(wav).mean() / abs(alone).mean() < 2  # the browser's own resampler


def test_keyboard_alone_operates_page(page: Any) -> None:
    separate(page, file(seconds=12, seed=2))
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    wait_until(lambda: evaluate(page, "t.isPlaying"))
    page.keyboard.press("2")
    page.keyboard.press("4")
    assert levels(page) == [1, 0, 1, 0]
    page.keyboard.press("4")
    page.keyboard.press("Shift+3")
    assert levels(page) == [0, 0, 1, 0]
    page.keyboard.press("ArrowRight")
    assert evaluate(page, "t.position") >= 5
    page.keyboard.press("ArrowLeft")
    assert evaluate(page, "t.position") < 5
    page.keyboard.press("l")
    assert evaluate(page, "t.loop")
    page.keyboard.press("Space")
    page.keyboard.press("Home")
    assert evaluate(page, "[t.isPlaying, t.position]") == [False, 0]
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                """() => { const e = document.activeElement;
                return e.id || e.getAttribute('aria-label') || e.textContent.trim(); }"""
            )
        )
    form = {"files", "model", "format", "Play", "Position", "Loop"}
    stem = {"Mute bass", "Solo other", "Volume of vocals", "Save drums"}
    assert form | stem | {"Save all (zip)", "Save this mix"} <= reached


def test_every_control_has_accessible_name(page: Any) -> None:
    separate(page, file(seconds=1, seed=3))
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, a, input, select, canvas, progress')]
        .filter(e => e.checkVisibility() && e.getAttribute('aria-hidden') !== 'true'
            && !(e.getAttribute('aria-label') || e.textContent.trim()
                 || [...(e.labels ?? [])].some(l => l.textContent.trim())))
        .map(e => e.outerHTML)"""
    )
    assert nameless == []
    assert page.get_attribute("html", "lang") == "en"


def test_choice_of_model_and_stems(page: Any) -> None:
    page.select_option("#model", FAST)
    # The stems of this model are unknown until it has run once.
    separate(page, file(seconds=1, seed=4))
    page.wait_for_selector(".chips label")
    for stem in ("drums", "bass", "other"):
        page.uncheck(f".chips input[value={stem}]")
    page.check("#rest")
    page.set_input_files("#files", file("karaoke.wav", 1, 5))
    page.wait_for_selector(".song:first-child .status:has-text('2 stems')")
    page.click(".song:first-child .listen")
    page.wait_for_selector("[aria-label='Mute no vocals']")
    assert page.locator(".player canvas").count() == 2  # the other player was closed
    page.uncheck(".chips input[value=vocals]")
    page.set_input_files("#files", file())
    assert "at least one stem" in page.inner_text("#notice")


def test_several_uploads_at_once(page: Any) -> None:
    page.set_input_files("#files", [file(f"song {n}.wav", 1, 20 + n) for n in range(3)])
    wait_until(lambda: page.locator(".status:has-text('4 stems')").count() == 3)
    page.locator(".song >> text=Remove").first.click()
    assert page.locator(".song").count() == 2


def test_error_shows_advice_and_allows_retry(page: Any, page_server: Server) -> None:
    bad = {"name": "<b>no song</b>.mp3", "mimeType": "audio/mpeg", "buffer": b"no music at all"}
    page.set_input_files("#files", bad)
    page.wait_for_selector(".song.failed")
    assert "Choose another file" in page.inner_text(".song .status")
    assert page.inner_text(".song h2") == "<b>no song</b>.mp3"
    page.click(".song .cancel")
    page.route("**/v1/jobs?*", lambda route: route.abort())
    page.set_input_files("#files", file(seconds=1, seed=6))
    page.wait_for_selector(".song.failed")
    page.unroute("**/v1/jobs?*")
    page.click("text=Try again")
    page.wait_for_selector(".stems canvas")
    assert page.locator(".song.failed").count() == 0


def test_running_song_is_cancelled(page: Any, page_server: Server) -> None:
    page.set_input_files("#files", file(seconds=50, seed=7))
    page.wait_for_selector(".status:has-text('Separating')")
    page.click(".song .cancel")
    assert page.locator(".song").count() == 0
    wait_until(lambda: b"demucs_jobs_running 0.0" in page_server.call("GET", "/metrics")[1])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_layout_and_contrast(page: Any, scheme: str) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme=scheme)
    separate(page, file("a song with a rather long name that has to go somewhere.wav", 1, 8))
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    small = page.evaluate(
        """() => [...document.querySelectorAll('button, select, a.get, .chips label')]
        .filter(e => e.checkVisibility()).map(e => e.getBoundingClientRect())
        .filter(r => r.height < 36 || r.width < 36).length"""
    )
    assert small == 0
    pairs = page.evaluate(
        """() => ['body', '.card', '.top p', '.status', '.plain', '.primary', '.stem .name']
        .map(s => document.querySelector(s)).map(e => {
            let under = e;
            const clear = c => /, 0\\)$|transparent|\\/ 0/.test(c);
            while (clear(getComputedStyle(under).backgroundColor)) under = under.parentElement;
            return [getComputedStyle(e).color, getComputedStyle(under).backgroundColor]; })"""
    )
    for ink, paper in pairs:
        if paper.startswith("rgb("):  # tints of stems are nearly the color of the card
            assert contrast(ink, paper) >= 4.5, (ink, paper)  # WCAG 2 AA


def contrast(one: str, two: str) -> float:
    def light(color: str) -> float:
        parts = [int(x) / 255 for x in color[4:-1].split(",")]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, bright = sorted((light(one), light(two)))
    return (bright + 0.05) / (dark + 0.05)


def test_sign_in_with_api_key(browser: Any, repo: Path, tmp_path: Path) -> None:
    words = ["--repo", repo, "--models", FAST, "--data-dir", tmp_path / "data"]
    with run_server(*words, "--api-key", "open sesame", "--base-path", "/here") as locked:
        page = browser.new_page()
        page.goto(f"{locked.url}/here")
        page.fill("#key", "a wrong one")
        page.click("text=Sign in")
        page.wait_for_selector("text=not valid")
        page.fill("#key", "open sesame")
        page.click("text=Sign in")
        page.wait_for_selector("#model option", state="attached")
        separate(page, file(seconds=1))
        name, stem = saved(page, "[aria-label='Save bass']")
        assert name == "my song (bass).flac" and stem[:4] == b"fLaC"
        page.close()


def test_written_page_plays_stems_without_server(browser: Any, repo: Path, tmp_path: Path) -> None:
    (tmp_path / "a & b.wav").write_bytes(song(1.99, 3))
    words = ["--repo", repo, "-n", FAST, "-d", "cpu", "-q", "-o", tmp_path, "--page"]
    assert main([*map(str, words), str(tmp_path / "a & b.wav")]) == 0
    folder = tmp_path / FAST / "a & b"
    assert sorted(path.suffix for path in folder.iterdir()) == [".html", ".json", *[".wav"] * 4]
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url))
    page.goto((folder / "stems.html").as_uri())
    page.wait_for_selector(".stems canvas")
    assert page.title() == "a & b"
    assert page.inner_text(".time") == "0:00 / 0:02"
    assert page.get_attribute(".seek", "aria-valuetext") == "0:00 of 0:02"
    page.locator(".seek").fill("0.97")
    assert page.inner_text(".time") == "0:01 / 0:02"
    page.locator(".seek").fill("0")
    page.click(".play")
    wait_until(lambda: evaluate(page, "t.position") > 0.1)
    page.click("[aria-label='Spectrograms']")
    row = "c => [...c.getContext('2d').getImageData(9, 0, 1, c.height).data]"
    canvas = page.locator(".stem canvas").first
    wait_until(lambda: len(set(canvas.evaluate(row)[::4])) > 8)
    assert set(canvas.evaluate(row)[3::4]) == {255}, "it covers the whole height"
    page.click("[aria-label='Spectrograms']")
    name, stem = saved(page, "[aria-label='Save bass']")
    assert name == "bass.opus" and stem[:4] == b"OggS", "uncompressed stems are encoded"
    wavs = sum(path.stat().st_size for path in folder.glob("*.wav"))
    code = sum(path.stat().st_size for path in STATIC.iterdir() if path.suffix in (".js", ".css"))
    assert (folder / "stems.html").stat().st_size < wavs + code
    assert all(url.startswith(("file:", "blob:")) for url in asked)
    page.close()


def test_docs_list_every_route(page: Any, page_server: Server) -> None:
    page.goto(f"{page_server.url}/docs")
    page.wait_for_selector(".route")
    paths = json.loads(page_server.call("GET", "/openapi.json")[1])["paths"]
    assert page.locator(".route").count() == sum(map(len, paths.values()))
    form = page.locator(".route:has(code:text-is('/v1/separate'))")
    form.locator("summary").click()
    assert "two_stems" in form.inner_text() and "required" in form.inner_text()
    commands = page.locator(".route pre").all_text_contents()
    upload = f"-F file=@song.mp3 -OJ '{page_server.url}/v1/separate'"
    assert any(command.endswith(upload) for command in commands), commands
    assert all("%7B" not in command for command in commands), "places to fill in are readable"
