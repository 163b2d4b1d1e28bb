// The player: `mountPlayer` draws stems and lets them be heard.

import { computePeaks, computeSpectrogram, drawSpectrogram, drawWaveform, PEAKS } from "./draw.js";
import { formatPercent, languageEvents, setText, t } from "./texts.js";
import { Transport } from "./transport.js";

export const HUES = { drums: 345, bass: 38, other: 160, vocals: 232, guitar: 18, piano: 286 };
const OTHER_HUES = [200, 80, 310, 130, 260, 50, 0, 180];
const SHORTEST_VIEW = 1, LONGEST_DETAIL = 600, LONGEST_SPECTROGRAM = 30; // seconds
const MILLISECONDS_TO_SETTLE = 150; // before a new view is read in detail
const TAPS = 8, PAUSE_MILLISECONDS = 2000; // taps of the tempo; a longer pause begins anew

export const hueOf = (name, index) => HUES[name] ?? OTHER_HUES[index % OTHER_HUES.length];
export const clock = (seconds) => {
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
};

const exactClock = (seconds) => `${clock(seconds)}.${Math.floor((10 * seconds) % 10)}`;

// Stems that are files in memory: decoded as a whole, for pages without a server.
export async function decodeStems(stems) {
  const context = new AudioContext();
  const decoded = await Promise.all(stems.map(async (stem) => {
    const buffer = await context.decodeAudioData(await stem.bytes());
    return {
      ...stem, buffer,
      read: async (start, seconds) => cut(context, buffer, start, seconds),
      waveform: async (start, seconds) => computePeaks(buffer, start, seconds),
    };
  }));
  return { context, stems: decoded, duration: Math.max(...decoded.map(({ buffer }) => buffer.duration)) };
}

function cut(context, buffer, start, seconds) {
  const first = Math.min(Math.round(start * buffer.sampleRate), buffer.length - 1);
  const length = Math.min(Math.round(seconds * buffer.sampleRate), buffer.length - first);
  const part = context.createBuffer(buffer.numberOfChannels, length, buffer.sampleRate);
  for (let c = 0; c < buffer.numberOfChannels; c++) {
    part.copyToChannel(buffer.getChannelData(c).subarray(first, first + length), c);
  }
  return part;
}

const ICONS = {
  play: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M8 5v14l11-7z"/></svg>',
  pause: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M7 5h4v14H7zM14 5h4v14h-4z"/></svg>',
  view: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M4 4h3v16H4zM9 9h3v11H9zM14 6h3v14h-3zM19 12h2v8h-2z"/></svg>',
  loop: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M7 7h10v3l4-4-4-4v3H5v6h2zm10 10H7v-3l-4 4 4 4v-3h12v-6h-2z"/></svg>',
  zoomIn: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M11 5h2v6h6v2h-6v6h-2v-6H5v-2h6z"/></svg>',
  zoomOut: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M5 11h14v2H5z"/></svg>',
  get: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M12 4v11m0 0 4.5-4.5M12 15l-4.5-4.5M5 20h14"/></svg>',
};

// `text` and `label` are keys of texts, `values` what they need.
function element(tag, properties = {}, ...children) {
  const { text, label, values, html, ...rest } = properties;
  const created = Object.assign(document.createElement(tag), rest);
  if (html) created.innerHTML = html;
  if (text) setText(created, text, values);
  if (label) setText(created, label, values, "label");
  created.append(...children);
  return created;
}

const button = (properties) => element("button", { type: "button", ...properties });

// `stems`: [{ name, file, url, read: (start, seconds) => Promise<AudioBuffer>,
// waveform: (start, seconds) => Promise<peaks> }]. Returns { close, extend }; `extend` takes the state of
// stems that are still made.
export function mountPlayer(root, stems, {
  context, duration, available = duration, title = "track", zip = null, original = null, canCompare = true,
  save = followLink, onError = () => {},
}) {
  const transport = new Transport(stems, context, { duration, available, original, canCompare });
  const view = new View(transport, stems);

  const play = button({ className: "primary play" });
  const time = element("span", { className: "time" });
  const seek = element("input", {
    type: "range", className: "seek", min: 0, max: duration, step: 0.01, value: 0, label: "position",
  });
  const loop = button({ html: ICONS.loop, label: "loop" });
  const bypass = button({ text: "compareShort", label: "compare", hidden: !canCompare });
  const spectrograms = button({ html: ICONS.view, label: "spectrograms" });
  const zoomOut = button({ html: ICONS.zoomOut, label: "zoomOut" });
  const zoomIn = button({ html: ICONS.zoomIn, label: "zoomIn" });
  const tools = element("div", { className: "tools" }, loop, zoomOut, zoomIn, spectrograms, bypass);
  const vocals = stems.findIndex(({ name }) => name === "vocals");
  const karaoke = button({ text: "karaoke", label: "muteVocals" });
  if (vocals >= 0 && stems.length > 1) tools.append(karaoke);
  const bar = element("div", { className: "transport" }, play, time, seek, tools);
  const rows = stems.map((stem, index) => stemRow(stem, index, transport, view, save));
  const list = element("ul", { className: "stems" }, ...rows.map((row) => row.item));
  const practice = practicePanel(transport);
  const mix = button({ text: "saveMix" });
  const downloads = element("div", { className: "downloads" });
  if (zip) downloads.append(makeSavable(element("a", { href: zip, download: `${title}.zip`, text: "saveAll" }), save));
  downloads.append(mix);
  root.replaceChildren(bar, list, practice.panel, downloads);
  root.transport = transport;
  root.view = view;

  const isComplete = () => transport.available >= transport.duration - 1e-3;
  transport.addEventListener("error", (event) => onError(event.error));
  view.addEventListener("error", (event) => { if (isComplete()) onError(event.error); });
  play.onclick = () => transport.toggle();
  loop.onclick = () => transport.setLoop(!transport.loop);
  zoomIn.onclick = () => view.zoom(0.5);
  zoomOut.onclick = () => view.zoom(2);
  spectrograms.onclick = () => view.setSpectrograms(!view.hasSpectrograms);
  bypass.onclick = () => transport.setBypassed(!transport.isBypassed);
  karaoke.onclick = () => transport.set(vocals, { muted: !transport.tracks[vocals].muted });
  seek.oninput = () => transport.seek(Number(seek.value));
  mix.onclick = async () => {
    mix.disabled = true;
    try {
      saveBlob(await transport.mix(), `${title} (mix).wav`);
    } catch (error) {
      onError(error);
    }
    mix.disabled = false;
  };

  const show = () => {
    const { position } = transport;
    view.follow(position);
    // Rounded: a compressed song of 20 seconds may have 19.99.
    const [now, end] = [clock(position + 0.05), clock(Math.round(transport.duration))];
    time.textContent = `${now} / ${end}`;
    seek.value = position;
    fill(seek);
    seek.setAttribute("aria-valuetext", t("positionOf", { position: now, duration: end }));
    rows.forEach((row, i) => view.draw(i, row.canvas, row.hue, position));
  };
  const update = () => {
    const label = transport.isPlaying ? "pause" : "play";
    if (play.dataset.label !== label) {
      play.innerHTML = ICONS[label];
      setText(play, label, null, "label");
    }
    loop.setAttribute("aria-pressed", transport.loop);
    bypass.setAttribute("aria-pressed", transport.isBypassed);
    spectrograms.setAttribute("aria-pressed", view.hasSpectrograms);
    zoomIn.disabled = view.length <= SHORTEST_VIEW;
    zoomOut.disabled = view.length >= view.longest;
    if (vocals >= 0) karaoke.setAttribute("aria-pressed", transport.tracks[vocals].muted);
    play.classList.toggle("waiting", transport.isWaiting);
    seek.max = transport.duration;
    downloads.hidden = !isComplete();
    rows.forEach((row) => row.update());
    practice.update();
    show();
  };
  let frame = 0;
  const animate = () => {
    transport.tick();
    if (transport.isPlaying) show();
    frame = requestAnimationFrame(animate);
  };
  const resizeObserver = new ResizeObserver(show);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const onKey = (event) => handleKey(event, transport, view, practice);
  transport.addEventListener("change", update);
  view.addEventListener("change", update);
  languageEvents.addEventListener("change", update);
  document.addEventListener("keydown", onKey);
  scheme.addEventListener("change", show);
  resizeObserver.observe(root);
  update();
  animate();
  view.read();

  const extend = (state) => {
    const wasWhole = view.isWhole;
    transport.extend(state);
    if (wasWhole) view.showAll();
    if (state.isComplete) view.forget();
    view.read();
  };
  const close = () => {
    cancelAnimationFrame(frame);
    document.removeEventListener("keydown", onKey);
    languageEvents.removeEventListener("change", update);
    scheme.removeEventListener("change", show);
    resizeObserver.disconnect();
    transport.removeEventListener("change", update);
    view.close();
    root.replaceChildren();
    delete root.transport;
    delete root.view;
    return transport.close();
  };
  return { close, extend };
}

// The part of the song that is seen, and what is drawn of it.
class View extends EventTarget {
  constructor(transport, stems) {
    super();
    Object.assign(this, { transport, stems, start: 0, stop: transport.duration, hasSpectrograms: false });
    this.isLocal = stems.every(({ buffer }) => buffer); // stems that are here as a whole
    this.overview = stems.map(() => new Float32Array(PEAKS));
    this.numReads = 0;
    this.overviewNumber = 0; // of the read that it comes from
    this.detail = null; // { start, stop, peaks } of the view, once they are read
    this.pictures = null; // the same of spectrograms
    this.top = 0.05;
    this.lastPosition = 0;
    this.draft = null; // a section while it is dragged
  }

  get length() { return this.stop - this.start; }
  get isWhole() { return this.start === 0 && this.stop >= this.transport.duration - 1e-6; }
  get longest() {
    const { duration } = this.transport;
    return this.hasSpectrograms && !this.isLocal ? Math.min(LONGEST_SPECTROGRAM, duration) : duration;
  }

  zoom(factor, center = this.transport.position) {
    const { duration } = this.transport;
    const length = Math.min(Math.max(this.length * factor, Math.min(SHORTEST_VIEW, duration)), this.longest);
    const middle = Math.min(Math.max(center, this.start), this.stop);
    this.show(middle - (middle - this.start) * (length / this.length), length);
  }

  showAll() { this.show(0, this.longest); }
  move(seconds) { this.show(this.start + seconds, this.length); }

  show(start, length) {
    this.start = Math.min(Math.max(start, 0), this.transport.duration - length);
    this.stop = this.start + length;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.read(), MILLISECONDS_TO_SETTLE);
    this.dispatchEvent(new Event("change"));
  }

  // Turns the page when the music leaves it.
  follow(position) {
    if (position === this.lastPosition) return;
    this.lastPosition = position;
    if (position < this.start || position > this.stop) this.show(position - 0.05 * this.length, this.length);
  }

  setSpectrograms(hasSpectrograms) {
    this.hasSpectrograms = hasSpectrograms;
    this.pictures = null;
    this.zoom(1);
  }

  // What was read of stems that were still made.
  forget() {
    this.hasOverview = false;
    this.pictures = null;
  }

  async read() {
    clearTimeout(this.timer);
    const { stems, start, stop, isWhole, hasSpectrograms } = this;
    const number = this.numReads += 1;
    const isCurrent = () => number === this.numReads;
    try {
      if (isWhole || !this.hasOverview) {
        this.setOverview(await Promise.all(stems.map((stem) => stem.waveform(0, this.transport.duration))), number);
      }
      if (isCurrent() && !isWhole && stop - start <= LONGEST_DETAIL) {
        const peaks = await Promise.all(stems.map((stem) => stem.waveform(start, stop - start)));
        if (isCurrent()) this.detail = { start, stop, peaks };
      }
      const hasPictures = this.pictures?.start === start && this.pictures.stop === stop; // of stems that are made
      if (isCurrent() && hasSpectrograms && !hasPictures) await this.readSpectrograms({ start, stop });
      if (isCurrent()) this.dispatchEvent(new Event("change"));
    } catch (error) {
      if (isCurrent()) this.dispatchEvent(new ErrorEvent("error", { error }));
    }
  }

  // `number` is that of the read. Answers may be slower than the next read, and overtake each other.
  setOverview(overview, number) {
    if (number <= this.overviewNumber) return;
    Object.assign(this, { overview, overviewNumber: number, hasOverview: true });
    this.top = Math.max(0.05, ...overview.map((values) => Math.max(...values)));
    this.dispatchEvent(new Event("change"));
  }

  async readSpectrograms({ start, stop }) {
    const images = [], pictures = this.pictures = { start, stop, images };
    const isWanted = () => pictures === this.pictures;
    try {
      for (const [i, stem] of this.stems.entries()) {
        images.push(await computeSpectrogram(stem.read, { start, stop }, hueOf(stem.name, i), isWanted));
        if (!isWanted()) return;
        this.dispatchEvent(new Event("change"));
      }
    } catch (error) {
      if (isWanted()) this.pictures = null; // the next read tries again
      throw error;
    }
  }

  draw(i, canvas, hue, position) {
    const { start, stop, transport } = this;
    const isOf = (read) => read?.start === start && read?.stop === stop;
    const marks = { view: { start, stop }, position, section: this.draft ?? transport.section };
    if (this.hasSpectrograms) drawSpectrogram(canvas, isOf(this.pictures) ? this.pictures.images[i] : null, marks);
    else drawWaveform(canvas, isOf(this.detail) ? this.detail.peaks[i] : this.cutOverview(i), { ...marks, hue, top: this.top });
  }

  cutOverview(i) {
    const peaks = this.overview[i], scale = peaks.length / this.transport.duration;
    return peaks.slice(Math.floor(this.start * scale), Math.max(Math.ceil(this.stop * scale), 1));
  }

  close() {
    clearTimeout(this.timer);
    Object.assign(this, { numReads: NaN, overviewNumber: Infinity, pictures: null }); // late answers change nothing
  }
}

function stemRow(stem, index, transport, view, save) {
  const hue = hueOf(stem.name, index), values = { stem: stem.name };
  const mute = button({ text: "muteShort", label: "mute", values });
  const solo = button({ text: "soloShort", label: "solo", values });
  const volume = element("input", {
    type: "range", className: "volume", min: 0, max: 1.5, step: 0.01, value: 1, label: "volume", values,
  });
  const canvas = element("canvas");
  canvas.setAttribute("aria-hidden", "true"); // the Position slider and the Practice panel do the same
  const link = makeSavable(element("a", {
    className: "get", href: stem.url, download: stem.file, html: ICONS.get, label: "saveStem", values,
  }), save);
  const head = element("div", { className: "head" },
    element("div", { className: "name", text: "stem", values }),
    element("div", { className: "knobs" }, mute, solo, volume));
  const item = element("li", { className: "stem" }, head, canvas, link);
  item.style.setProperty("--hue", hue);

  const track = transport.tracks[index];
  mute.onclick = () => transport.set(index, { muted: !track.muted });
  solo.onclick = () => transport.set(index, { solo: !track.solo });
  volume.oninput = () => transport.set(index, { volume: Number(volume.value) });
  makeSelectable(canvas, transport, view);
  const update = () => {
    mute.setAttribute("aria-pressed", track.muted);
    solo.setAttribute("aria-pressed", track.solo);
    fill(volume);
    volume.setAttribute("aria-valuetext", formatPercent(track.volume));
    item.classList.toggle("silent", transport.level(track) === 0);
    link.hidden = transport.available < transport.duration - 1e-3;
  };
  return { item, canvas, hue, update };
}

const CLICK_PIXELS = 4; // a shorter drag is a click

// A click seeks, a drag chooses a section, the wheel zooms with Ctrl and moves with Shift.
function makeSelectable(canvas, transport, view) {
  const timeAt = (event) => {
    const { left, width } = canvas.getBoundingClientRect();
    const fraction = Math.min(Math.max((event.clientX - left) / width, 0), 1);
    return view.start + fraction * view.length;
  };
  let from = null; // where the pointer went down
  canvas.onpointerdown = (event) => {
    if (event.button) return;
    from = { x: event.clientX, time: timeAt(event) };
    canvas.setPointerCapture(event.pointerId);
  };
  canvas.onpointermove = (event) => {
    if (!from || (!view.draft && Math.abs(event.clientX - from.x) < CLICK_PIXELS)) return;
    const time = timeAt(event);
    view.draft = { start: Math.min(from.time, time), stop: Math.max(from.time, time) };
    view.dispatchEvent(new Event("change"));
  };
  canvas.onpointerup = (event) => {
    if (!from) return;
    const { draft } = view;
    from = view.draft = null;
    if (draft) transport.setSection(draft);
    else transport.seek(timeAt(event));
  };
  canvas.onpointercancel = () => { // the page is scrolled instead
    from = view.draft = null;
    view.dispatchEvent(new Event("change"));
  };
  canvas.addEventListener("wheel", (event) => {
    const isZoom = event.ctrlKey || event.metaKey;
    const distance = event.deltaX || (event.shiftKey ? event.deltaY : 0);
    if (!isZoom && (!distance || view.isWhole)) return;
    event.preventDefault();
    if (isZoom) view.zoom(1.002 ** event.deltaY, timeAt(event));
    else view.move((distance / canvas.clientWidth) * view.length);
  }, { passive: false });
}

// What helps to practice: a section, the tempo, and a bar of clicks before the music.
function practicePanel(transport) {
  const section = element("p", { className: "section" });
  const first = button({ text: "sectionStart" });
  const last = button({ text: "sectionEnd" });
  const clear = button({ text: "sectionClear" });
  const tempo = element("input", { type: "range", className: "tempo", min: 0.5, max: 1.5, step: 0.05, value: 1, label: "tempo" });
  const percent = element("output");
  const countIn = element("input", { type: "checkbox" });
  const bpm = element("input", { type: "number", min: 30, max: 300, step: 0.1, value: 120 });
  const beats = element("input", { type: "number", min: 1, max: 12, value: 4 });
  const tap = button({ text: "tap" });
  const labeled = (text, input, className = "") => element("label", { className }, element("span", { text }), input);
  const panel = element("details", { className: "practice" }, element("summary", { text: "practice" }),
    section,
    element("div", { className: "line" }, first, last, clear),
    element("div", { className: "line" }, labeled("tempo", tempo, "wide"), percent),
    element("div", { className: "line" }, element("label", { className: "check" }, countIn, element("span", { text: "countIn" })),
      labeled("bpm", bpm), labeled("beats", beats), tap));

  const applyCountIn = () => {
    const isValid = bpm.checkValidity() && beats.checkValidity();
    transport.setCountIn(countIn.checked && isValid ? { bpm: Number(bpm.value), beats: Number(beats.value) } : null);
  };
  const markStart = () => {
    const { position, section: old, duration } = transport;
    transport.setSection({ start: position, stop: old && old.stop > position ? old.stop : duration });
  };
  const markEnd = () => {
    const { position, section: old } = transport;
    transport.setSection({ start: old && old.start < position ? old.start : 0, stop: position });
  };
  const changeTempo = (step) => transport.setTempo(Math.round((transport.tempo + step) * 100) / 100);
  let taps = [];
  const tapTempo = () => {
    const now = performance.now();
    if (now - (taps.at(-1) ?? 0) > PAUSE_MILLISECONDS) taps = [];
    taps = [...taps, now].slice(-TAPS);
    if (taps.length < 2) return;
    // What is heard is tapped; the tempo is that of the song.
    const measured = (60000 * (taps.length - 1)) / (now - taps[0]) / transport.tempo;
    bpm.value = Math.round(Math.min(Math.max(measured, 30), 300));
    applyCountIn();
  };
  first.onclick = markStart;
  last.onclick = markEnd;
  clear.onclick = () => transport.setSection(null);
  tempo.oninput = () => { percent.textContent = formatPercent(tempo.value); fillTempo(); };
  tempo.onchange = () => transport.setTempo(Number(tempo.value));
  countIn.onchange = bpm.onchange = beats.onchange = applyCountIn;
  tap.onclick = tapTempo;
  const fillTempo = () => tempo.style.setProperty("--fill", `${100 * (tempo.value - 0.5)}%`);
  const toggleCountIn = () => { countIn.checked = !countIn.checked; applyCountIn(); };
  const update = () => {
    const { section: now } = transport;
    if (now) setText(section, "section", { start: exactClock(now.start), stop: exactClock(now.stop) });
    else setText(section, "noSection");
    clear.disabled = !now;
    tempo.value = transport.tempo;
    percent.textContent = formatPercent(transport.tempo);
    tempo.setAttribute("aria-valuetext", formatPercent(transport.tempo));
    fillTempo();
  };
  return { panel, update, markStart, markEnd, changeTempo, tapTempo, toggleCountIn };
}

function fill(range) {
  range.style.setProperty("--fill", `${(100 * range.value) / range.max}%`);
}

// Keys by their place on the keyboard, or by what they write.
function handleKey(event, transport, view, practice) {
  if (!isShortcut(event)) return;
  const tag = event.target.tagName;
  if (event.code === "Space" && /^(BUTTON|A|SUMMARY|INPUT)$/.test(tag) && event.target.type !== "range") return;
  const digit = /^Digit([1-9])$/.exec(event.code);
  const track = digit && transport.tracks[digit[1] - 1];
  if (track && event.shiftKey) transport.set(digit[1] - 1, { solo: !track.solo });
  else if (track) transport.set(digit[1] - 1, { muted: !track.muted });
  else if (event.key === "+" || event.key === "=") view.zoom(0.5);
  else if (event.key === "-") view.zoom(2);
  else if (event.key === "0") view.showAll();
  else if (event.key === ",") practice.changeTempo(-0.05);
  else if (event.key === ".") practice.changeTempo(0.05);
  else if (event.code === "Space") transport.toggle();
  else if (event.code === "ArrowLeft") transport.seek(transport.position - 5);
  else if (event.code === "ArrowRight") transport.seek(transport.position + 5);
  else if (event.code === "Home") transport.seek(0);
  else if (event.code === "Escape") transport.setSection(null);
  else if (event.code === "KeyL") transport.setLoop(!transport.loop);
  else if (event.code === "KeyI") practice.markStart();
  else if (event.code === "KeyO") practice.markEnd();
  else if (event.code === "KeyC") practice.toggleCountIn();
  else if (event.code === "KeyT") practice.tapTempo();
  else if (event.code === "KeyG") view.setSpectrograms(!view.hasSpectrograms);
  else if (event.code === "KeyB" && transport.canCompare) transport.setBypassed(!transport.isBypassed);
  else return;
  event.preventDefault();
}

// Whether a key is meant for the page, and not for a field or a dialog.
function isShortcut(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || document.querySelector("dialog[open]")) return false;
  const { tagName, type } = event.target;
  if (tagName === "INPUT" && type === "range") return !/^(Arrow|Home|End|Page)/.test(event.code);
  return tagName !== "SELECT" && tagName !== "TEXTAREA" && (tagName !== "INPUT" || type === "checkbox");
}

// ── help ──

const SHORTCUTS = [ // `key.…` is a text, anything else is on the key itself
  [["key.space"], "help.play"], [["1", "9"], "help.mute"], [["key.shift", "1"], "help.solo"],
  [["←", "→"], "help.seek"], [["key.home"], "help.start"], [["L"], "help.loop"],
  [["I", "O"], "help.section"], [["key.drag"], "help.drag"], [["key.escape"], "help.clear"],
  [["+", "-", "0"], "help.zoom"], [["key.control", "key.wheel"], "help.wheel"], [["G"], "help.spectrograms"],
  [[",", "."], "help.tempo"], [["C"], "help.countIn"], [["T"], "help.tap"],
  [["B"], "help.compare"], [["?"], "help.help"],
];

export function showHelp() {
  const title = element("h2", { id: "help-title", text: "help", tabIndex: -1, autofocus: true });
  const rows = SHORTCUTS.map(([keys, text]) => element("div", {},
    element("dt", {}, ...keys.flatMap((key, i) => [
      ...(keys[1] === "9" && i ? ["–"] : []), key.startsWith("key.") ? element("kbd", { text: key }) : element("kbd", { textContent: key }),
    ])),
    element("dd", { text })));
  const close = button({ className: "primary", text: "close" });
  const dialog = element("dialog", { className: "help" }, title, element("dl", {}, ...rows), close);
  dialog.setAttribute("aria-labelledby", title.id);
  close.onclick = () => dialog.close();
  dialog.onclose = () => dialog.remove();
  document.body.append(dialog);
  dialog.showModal();
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "?" || !isShortcut(event)) return;
  event.preventDefault();
  showHelp();
});

// ── files ──

function makeSavable(link, save) {
  link.addEventListener("click", (event) => save(event, link));
  return link;
}

function followLink() {} // the browser saves the file

export function saveBlob(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
