// Plays stems in sync on one clock, each with its own gain: `Transport` plays, `mountPlayer` draws.

export const HUES = { drums: 345, bass: 38, other: 160, vocals: 232, guitar: 18, piano: 286 };
const OTHER_HUES = [200, 80, 310, 130, 260, 50, 0, 180];
const PEAKS = 1200; // columns of a waveform, as the server has them

export const hueOf = (name, index) => HUES[name] ?? OTHER_HUES[index % OTHER_HUES.length];
export const clock = (seconds) => {
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
};

const PART_SECONDS = 5;
const AHEAD_SECONDS = 8; // scheduled before they are heard
const KEPT_PARTS = 5; // of each stem, in memory

// Plays parts of all stems on one clock. `stems`: [{ name, read: (start, seconds) => Promise<AudioBuffer> }].
export class Transport extends EventTarget {
  constructor(stems, context, { duration, available = duration }) {
    super();
    Object.assign(this, { context, duration, available });
    this.loop = false;
    this.isPlaying = false;
    this.isWaiting = false; // for the network, or for stems that are still made
    this.isBypassed = false;
    this.offset = 0;
    this.segments = []; // what is scheduled: { at: seconds of the clock, position, length }
    this.tracks = stems.map((stem) => {
      const gain = context.createGain();
      gain.connect(context.destination);
      return { stem, gain, volume: 1, muted: false, solo: false, parts: new Map(), sources: new Set() };
    });
  }

  get position() {
    if (!this.isPlaying) return this.offset;
    const now = this.context.currentTime;
    while (this.segments.length > 1 && this.segments[1].at <= now) this.segments.shift();
    const segment = this.segments[0];
    if (!segment) return this.offset;
    return segment.position + Math.min(Math.max(now - segment.at, 0), segment.length);
  }

  async play() {
    if (this.isPlaying) return;
    if (this.offset >= this.duration) this.offset = 0;
    this.isPlaying = true;
    const run = this.run = {};
    this.changed();
    await this.context.resume();
    this.next = { at: 0, position: this.offset };
    try {
      while (run === this.run) {
        await this.schedule(run);
        await sleep(100);
      }
    } catch (error) {
      if (run !== this.run) return;
      this.pause();
      this.dispatchEvent(new ErrorEvent("error", { error }));
    }
  }

  // Schedules the next parts: every stem of a part starts at the same time, to the sample.
  async schedule(run) {
    const { context, next, duration } = this;
    while (next.at - context.currentTime < AHEAD_SECONDS && next.position < duration) {
      const index = Math.floor(next.position / PART_SECONDS + 1e-6);
      const stop = Math.min((index + 1) * PART_SECONDS, duration);
      const isThere = stop <= this.available + 1e-3;
      const buffers = isThere && await Promise.race([Promise.all(this.tracks.map((track) => this.load(track, index))), this.ended(next)]);
      if (run !== this.run) return;
      if (!buffers) {
        this.setWaiting(next.at <= context.currentTime);
        return;
      }
      this.setWaiting(false);
      const earliest = context.currentTime + 0.05;
      if (next.at < earliest) next.at = Math.ceil(earliest * context.sampleRate) / context.sampleRate;
      const length = stop - next.position;
      this.tracks.forEach((track, i) => this.start(track, buffers[i], next, next.position - index * PART_SECONDS, length));
      this.segments.push({ at: next.at, position: next.position, length });
      next.at += length;
      next.position = stop;
      if (this.loop && stop >= duration) next.position = 0;
    }
  }

  // Resolves to null when what is scheduled has been played and the next part has not arrived.
  async ended(next) {
    await sleep(Math.max(next.at - this.context.currentTime, 0) * 1000 + 250);
    return null;
  }

  start(track, buffer, { at, position }, offset, length) {
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(track.gain);
    source.start(at, offset, length);
    source.onended = () => track.sources.delete(source);
    track.sources.add(source);
    Object.assign(track, { source, startedAt: at, startedFrom: position });
  }

  load(track, index) {
    const { parts, stem } = track;
    if (!parts.has(index)) {
      const part = stem.read(index * PART_SECONDS, PART_SECONDS);
      part.catch(() => parts.delete(index));
      parts.set(index, part);
      if (parts.size > KEPT_PARTS) parts.delete(parts.keys().next().value);
    }
    return parts.get(index);
  }

  pause() {
    if (!this.isPlaying) return;
    this.offset = this.position;
    this.stop();
  }

  stop() {
    this.run = null;
    for (const track of this.tracks) {
      for (const source of track.sources) { source.stop(); source.disconnect(); }
      track.sources.clear();
    }
    this.segments = [];
    this.isPlaying = false;
    this.isWaiting = false;
    this.changed();
  }

  toggle() { return this.isPlaying ? this.pause() : this.play(); }

  seek(seconds) {
    const wasPlaying = this.isPlaying;
    if (wasPlaying) this.stop();
    this.offset = Math.min(Math.max(seconds, 0), this.duration);
    if (wasPlaying) this.play();
    else this.changed();
  }

  setLoop(loop) {
    const { position } = this;
    this.loop = loop;
    this.seek(position);
  }

  setWaiting(isWaiting) {
    if (isWaiting === this.isWaiting) return;
    this.isWaiting = isWaiting;
    this.changed();
  }

  // More of the stems is there; at the end they may differ by a gain.
  extend({ duration, available, isComplete }) {
    Object.assign(this, { duration, available });
    if (isComplete) for (const track of this.tracks) track.parts.clear();
    this.changed();
  }

  set(index, values) {
    Object.assign(this.tracks[index], values);
    this.applyLevels();
  }

  setBypassed(isBypassed) {
    this.isBypassed = isBypassed;
    this.applyLevels();
  }

  applyLevels() {
    for (const track of this.tracks) {
      track.gain.gain.setTargetAtTime(this.level(track), this.context.currentTime, 0.01);
    }
    this.changed();
  }

  level(track) {
    if (this.isBypassed) return 1;
    const anySolo = this.tracks.some((other) => other.solo);
    return track.muted || (anySolo && !track.solo) ? 0 : track.volume;
  }

  tick() {
    if (this.isPlaying && !this.loop && this.position >= this.duration - 1e-3) {
      this.stop();
      this.offset = 0;
      this.changed();
    }
  }

  // A wav file of what is heard: 16 bit, attenuated if it would clip. Part by part, in little memory.
  async mix() {
    const { peak } = await this.mixParts(1);
    return (await this.mixParts(1 / Math.max(peak, 1))).blob;
  }

  async mixParts(gain) {
    let peak = 0, frames = 0, blob = new Blob([]);
    const levels = this.tracks.map((track) => this.level(track));
    for (let start = 0; start < this.duration; start += PART_SECONDS) {
      const buffers = await Promise.all(this.tracks.map(
        (track, i) => (levels[i] ? track.stem.read(start, PART_SECONDS) : null)));
      const length = Math.max(0, ...buffers.map((buffer) => buffer?.length ?? 0))
        || Math.round(Math.min(PART_SECONDS, this.duration - start) * this.context.sampleRate);
      const samples = new Int16Array(2 * length);
      const sums = [new Float32Array(length), new Float32Array(length)];
      buffers.forEach((buffer, i) => {
        if (buffer) sums.forEach((sum, c) => {
          const data = buffer.getChannelData(Math.min(c, buffer.numberOfChannels - 1));
          for (let k = 0; k < data.length; k++) sum[k] += levels[i] * data[k];
        });
      });
      sums.forEach((sum, c) => {
        for (let k = 0; k < length; k++) {
          peak = Math.max(peak, Math.abs(sum[k]));
          samples[2 * k + c] = Math.max(-32768, Math.min(32767, Math.round(sum[k] * gain * 32767)));
        }
      });
      frames += length;
      blob = new Blob([blob, samples]); // the browser may keep it on disk
    }
    return { peak, blob: new Blob([wavHeader(frames, this.context.sampleRate), blob], { type: "audio/wav" }) };
  }

  close() {
    this.stop();
    return this.context.close();
  }

  changed() { this.dispatchEvent(new Event("change")); }
}

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

function wavHeader(frames, rate) {
  const view = new DataView(new ArrayBuffer(44));
  const text = (at, letters) => [...letters].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 4 * frames, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 2, true);
  view.setUint32(24, rate, true); view.setUint32(28, 4 * rate, true);
  view.setUint16(32, 4, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 4 * frames, true);
  return view;
}

export function makeContext(sampleRate) {
  try {
    return new AudioContext({ sampleRate }); // parts of this rate join without resampling
  } catch {
    return new AudioContext();
  }
}

// Stems that are files in memory: decoded as a whole, for pages without a server.
export async function decodeStems(stems) {
  const context = new AudioContext();
  const decoded = await Promise.all(stems.map(async (stem) => {
    const buffer = await context.decodeAudioData(await stem.bytes());
    return { ...stem, buffer, read: async (start, seconds) => cut(context, buffer, start, seconds), waveform: async () => computePeaks(buffer) };
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

function computePeaks(buffer) {
  const step = buffer.length / PEAKS, peaks = new Float32Array(PEAKS);
  for (let c = 0; c < buffer.numberOfChannels; c++) {
    const data = buffer.getChannelData(c);
    for (let bar = 0; bar < PEAKS; bar++) {
      const stop = Math.min(data.length, Math.ceil((bar + 1) * step));
      for (let i = Math.floor(bar * step); i < stop; i++) peaks[bar] = Math.max(peaks[bar], Math.abs(data[i]));
    }
  }
  return peaks;
}

const SIZE = 2048; // samples of a spectrum
const COLUMNS = 400, BANDS = 72, LOWEST = 40, RANGE = 80; // of a spectrogram: hertz, decibels

// In place; `re` and `im` have SIZE entries.
function transform(re, im) {
  for (let i = 1, j = 0; i < SIZE; i++) {
    let bit = SIZE >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [re[i], re[j], im[i], im[j]] = [re[j], re[i], im[j], im[i]];
  }
  for (let length = 2; length <= SIZE; length <<= 1) {
    const half = length >> 1;
    for (let k = 0; k < half; k++) {
      const c = Math.cos((2 * Math.PI * k) / length), s = -Math.sin((2 * Math.PI * k) / length);
      for (let i = k; i < SIZE; i += length) {
        const x = re[i + half] * c - im[i + half] * s, y = re[i + half] * s + im[i + half] * c;
        re[i + half] = re[i] - x; im[i + half] = im[i] - y;
        re[i] += x; im[i] += y;
      }
    }
  }
}

// A canvas with one pixel per column and band; low frequencies are at the bottom.
function computeSpectrogram(buffer, hue) {
  const data = buffer.getChannelData(0), levels = new Float32Array(COLUMNS * BANDS);
  const edges = Array.from({ length: BANDS + 1 }, (_, band) =>
    Math.round((LOWEST * (buffer.sampleRate / 2 / LOWEST) ** (band / BANDS) * SIZE) / buffer.sampleRate));
  const re = new Float64Array(SIZE), im = new Float64Array(SIZE);
  for (let column = 0; column < COLUMNS; column++) {
    const start = Math.floor((column * Math.max(0, data.length - SIZE)) / (COLUMNS - 1));
    for (let i = 0; i < SIZE; i++) {
      re[i] = (data[start + i] ?? 0) * (0.5 - 0.5 * Math.cos((2 * Math.PI * i) / SIZE));
      im[i] = 0;
    }
    transform(re, im);
    for (let band = 0; band < BANDS; band++) {
      let power = 0;
      const stop = Math.max(edges[band] + 1, edges[band + 1]);
      for (let i = edges[band]; i < stop; i++) power += re[i] * re[i] + im[i] * im[i];
      levels[column * BANDS + band] = 10 * Math.log10(power / (stop - edges[band]) + 1e-9);
    }
  }
  const canvas = Object.assign(document.createElement("canvas"), { width: COLUMNS, height: BANDS });
  const context = canvas.getContext("2d");
  const top = levels.reduce((most, level) => Math.max(most, level), -90);
  for (let column = 0; column < COLUMNS; column++) {
    for (let band = 0; band < BANDS; band++) {
      const light = Math.max(0, 1 + (levels[column * BANDS + band] - top) / RANGE);
      context.fillStyle = `hsl(${hue} 75% ${8 + 82 * light * light}%)`;
      context.fillRect(column, BANDS - 1 - band, 1, 1);
    }
  }
  return canvas;
}

function drawSpectrogram(canvas, picture, fraction) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
  if (!width) return;
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, width, height);
  context.fillStyle = "#fff";
  if (fraction > 0) context.fillRect(Math.min(fraction * width, width - 2 * ratio), 0, 2 * ratio, height);
}

function draw(canvas, peaks, hue, fraction, top) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
  if (!width) return;
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const context = canvas.getContext("2d");
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const light = isDark ? 68 : 46;
  context.clearRect(0, 0, width, height);
  const bars = Math.max(1, Math.min(peaks.length, Math.floor(width / (3 * ratio))));
  const step = width / bars;
  for (let bar = 0; bar < bars; bar++) {
    let peak = 0;
    const stop = Math.ceil(((bar + 1) * peaks.length) / bars);
    for (let i = Math.floor((bar * peaks.length) / bars); i < stop; i++) peak = Math.max(peak, peaks[i]);
    const size = Math.max(2 * ratio, (peak / top) * height * 0.94);
    context.fillStyle = `hsl(${hue} 70% ${light}% / ${bar / bars < fraction ? 1 : 0.42})`;
    context.fillRect(bar * step, (height - size) / 2, Math.max(1, step - ratio), size);
  }
  context.fillStyle = isDark ? "#fff" : "#1c1a28";
  if (fraction > 0) context.fillRect(Math.min(fraction * width, width - 2 * ratio), 0, 2 * ratio, height);
}

const ICONS = {
  play: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M8 5v14l11-7z"/></svg>',
  pause: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M7 5h4v14H7zM14 5h4v14h-4z"/></svg>',
  view: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M4 4h3v16H4zM9 9h3v11H9zM14 6h3v14h-3zM19 12h2v8h-2z"/></svg>',
  loop: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M7 7h10v3l4-4-4-4v3H5v6h2zm10 10H7v-3l-4 4 4 4v-3h12v-6h-2z"/></svg>',
  get: '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M12 4v11m0 0 4.5-4.5M12 15l-4.5-4.5M5 20h14"/></svg>',
};

function element(tag, properties = {}, ...children) {
  const { label, html, ...rest } = properties;
  const created = Object.assign(document.createElement(tag), rest);
  if (label) { created.setAttribute("aria-label", label); created.title = label; }
  if (html) created.innerHTML = html;
  created.append(...children);
  return created;
}

// `stems`: [{ name, file, url, read: (start, seconds) => Promise<AudioBuffer>, waveform: () => Promise<peaks> }].
// Returns { close, extend }; `extend` takes the state of stems that are still made.
export function mountPlayer(root, stems, {
  context, duration, available = duration, title = "track", zip = null, save = followLink, onError = () => {},
}) {
  const transport = new Transport(stems, context, { duration, available });
  const peaks = stems.map(() => new Float32Array(PEAKS));
  let top = 0.05;

  const play = element("button", { type: "button", className: "primary play" });
  const time = element("span", { className: "time" });
  const seek = element("input", {
    type: "range", className: "seek", min: 0, max: duration, step: 0.01, value: 0, label: "Position",
  });
  const loop = element("button", { type: "button", html: ICONS.loop, label: "Loop" });
  const bypass = element("button", { type: "button", textContent: "A/B", label: "Compare with the whole song" });
  const tools = element("div", { className: "tools" }, loop, bypass);
  const view = element("button", { type: "button", html: ICONS.view, label: "Spectrograms" });
  let pictures = null; // spectrograms, once they are asked for
  if (stems.every(({ buffer }) => buffer)) tools.prepend(view); // stems that are here as a whole
  const vocals = stems.findIndex(({ name }) => name === "vocals");
  const karaoke = element("button", { type: "button", textContent: "Karaoke", label: "Karaoke: mute the vocals" });
  if (vocals >= 0 && stems.length > 1) tools.append(karaoke);
  const bar = element("div", { className: "transport" }, play, time, seek, tools);
  const rows = stems.map((stem, index) => stemRow(stem, index, transport, save));
  const list = element("ul", { className: "stems" }, ...rows.map((row) => row.item));
  const mix = element("button", { type: "button", textContent: "Save this mix" });
  const downloads = element("div", { className: "downloads" });
  if (zip) downloads.append(makeSavable(element("a", { href: zip, download: `${title}.zip`, textContent: "Save all (zip)" }), save));
  downloads.append(mix);
  root.replaceChildren(bar, list, downloads);
  root.transport = transport;

  const isComplete = () => transport.available >= transport.duration - 1e-3;
  const drawWaveforms = () => Promise.all(stems.map(async (stem, i) => {
    peaks[i] = await stem.waveform();
    top = Math.max(0.05, ...peaks.map((values) => Math.max(...values)));
    show();
  })).catch((error) => { if (isComplete()) onError(error); });
  transport.addEventListener("error", (event) => onError(event.error));
  play.onclick = () => transport.toggle();
  loop.onclick = () => transport.setLoop(!transport.loop);
  view.onclick = () => {
    pictures = pictures ? null : stems.map(({ buffer }, i) => computeSpectrogram(buffer, rows[i].hue));
    view.setAttribute("aria-pressed", pictures !== null);
    show();
  };
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
    const position = transport.position;
    time.textContent = `${clock(position)} / ${clock(transport.duration)}`;
    seek.value = position;
    fill(seek);
    seek.setAttribute("aria-valuetext", `${clock(position)} of ${clock(transport.duration)}`);
    const fraction = position / transport.duration;
    rows.forEach((row, i) => (pictures ? drawSpectrogram(row.canvas, pictures[i], fraction)
      : draw(row.canvas, peaks[i], row.hue, fraction, top)));
  };
  const update = () => {
    const label = transport.isPlaying ? "Pause" : "Play";
    if (play.title !== label) {
      play.innerHTML = transport.isPlaying ? ICONS.pause : ICONS.play;
      play.title = label;
      play.setAttribute("aria-label", label);
    }
    loop.setAttribute("aria-pressed", transport.loop);
    bypass.setAttribute("aria-pressed", transport.isBypassed);
    if (vocals >= 0) karaoke.setAttribute("aria-pressed", transport.tracks[vocals].muted);
    play.classList.toggle("waiting", transport.isWaiting);
    seek.max = transport.duration;
    downloads.hidden = !isComplete();
    rows.forEach((row) => row.update());
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
  const onKey = (event) => handleKey(event, transport);
  transport.addEventListener("change", update);
  document.addEventListener("keydown", onKey);
  scheme.addEventListener("change", show);
  resizeObserver.observe(root);
  update();
  animate();
  drawWaveforms();

  const extend = (state) => {
    transport.extend(state);
    drawWaveforms();
  };
  const close = () => {
    cancelAnimationFrame(frame);
    document.removeEventListener("keydown", onKey);
    scheme.removeEventListener("change", show);
    resizeObserver.disconnect();
    transport.removeEventListener("change", update);
    root.replaceChildren();
    delete root.transport;
    return transport.close();
  };
  return { close, extend };
}

function stemRow(stem, index, transport, save) {
  const hue = hueOf(stem.name, index);
  const label = stem.name.replaceAll("_", " ");
  const mute = element("button", { type: "button", textContent: "M", label: `Mute ${label}` });
  const solo = element("button", { type: "button", textContent: "S", label: `Solo ${label}` });
  const volume = element("input", {
    type: "range", className: "volume", min: 0, max: 1.5, step: 0.01, value: 1, label: `Volume of ${label}`,
  });
  const canvas = element("canvas");
  canvas.setAttribute("aria-hidden", "true"); // the Position slider does the same
  const link = makeSavable(element("a", {
    className: "get", href: stem.url, download: stem.file, html: ICONS.get, label: `Save ${label}`,
  }), save);
  const head = element("div", { className: "head" },
    element("div", { className: "name", textContent: label }),
    element("div", { className: "knobs" }, mute, solo, volume));
  const item = element("li", { className: "stem" }, head, canvas, link);
  item.style.setProperty("--hue", hue);

  const track = transport.tracks[index];
  mute.onclick = () => transport.set(index, { muted: !track.muted });
  solo.onclick = () => transport.set(index, { solo: !track.solo });
  volume.oninput = () => transport.set(index, { volume: Number(volume.value) });
  canvas.onclick = (event) => transport.seek((event.offsetX / canvas.clientWidth) * transport.duration);
  const update = () => {
    mute.setAttribute("aria-pressed", track.muted);
    solo.setAttribute("aria-pressed", track.solo);
    fill(volume);
    volume.setAttribute("aria-valuetext", `${Math.round(100 * track.volume)} percent`);
    item.classList.toggle("silent", transport.level(track) === 0);
    link.hidden = transport.available < transport.duration - 1e-3;
  };
  return { item, canvas, hue, update };
}

function fill(range) {
  range.style.setProperty("--fill", `${(100 * range.value) / range.max}%`);
}

function handleKey(event, transport) {
  if (event.ctrlKey || event.altKey || event.metaKey || document.querySelector("dialog[open]")) return;
  const tag = event.target.tagName;
  if (tag === "SELECT" || tag === "TEXTAREA" || (tag === "INPUT" && event.target.type !== "checkbox")) {
    if (event.target.type !== "range" || !/^(Space|Digit\d|Key[BL])$/.test(event.code)) return;
  }
  if (event.code === "Space" && /^(BUTTON|A|SUMMARY|INPUT)$/.test(tag) && event.target.type !== "range") return;
  const digit = /^Digit([1-9])$/.exec(event.code);
  const track = digit && transport.tracks[digit[1] - 1];
  if (track && event.shiftKey) transport.set(digit[1] - 1, { solo: !track.solo });
  else if (track) transport.set(digit[1] - 1, { muted: !track.muted });
  else if (event.code === "Space") transport.toggle();
  else if (event.code === "ArrowLeft") transport.seek(transport.position - 5);
  else if (event.code === "ArrowRight") transport.seek(transport.position + 5);
  else if (event.code === "Home") transport.seek(0);
  else if (event.code === "KeyL") transport.setLoop(!transport.loop);
  else if (event.code === "KeyB") transport.setBypassed(!transport.isBypassed);
  else return;
  event.preventDefault();
}

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
