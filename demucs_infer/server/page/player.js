// Plays stems in sync on one clock, each with its own gain: `Transport` plays, `mountPlayer` draws.

export const HUES = { drums: 345, bass: 38, other: 160, vocals: 232, guitar: 18, piano: 286 };
const OTHER_HUES = [200, 80, 310, 130, 260, 50, 0, 180];
const PEAKS = 600; // bars of a waveform

export const hueOf = (name, index) => HUES[name] ?? OTHER_HUES[index % OTHER_HUES.length];
export const clock = (seconds) => {
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
};

export class Transport extends EventTarget {
  constructor(buffers, context) {
    super();
    this.context = context;
    this.duration = Math.max(...buffers.map((buffer) => buffer.duration));
    this.loop = false;
    this.isPlaying = false;
    this.offset = 0;
    this.tracks = buffers.map((buffer) => {
      const gain = context.createGain();
      gain.connect(context.destination);
      return { buffer, gain, volume: 1, muted: false, solo: false, source: null };
    });
  }

  get position() {
    if (!this.isPlaying) return this.offset;
    const passed = Math.max(0, this.context.currentTime - this.startedAt) + this.offset;
    return this.loop ? passed % this.duration : Math.min(passed, this.duration);
  }

  async play() {
    if (this.isPlaying) return;
    await this.context.resume();
    if (this.offset >= this.duration) this.offset = 0;
    // One start time slightly ahead for all sources keeps them in sync to the sample.
    this.startedAt = this.context.currentTime + 0.05;
    for (const track of this.tracks) {
      track.source = new AudioBufferSourceNode(this.context, {
        buffer: track.buffer, loop: this.loop, loopEnd: this.duration,
      });
      track.source.connect(track.gain);
      track.source.start(this.startedAt, this.offset);
      track.startedAt = this.startedAt;
      track.startedFrom = this.offset;
    }
    this.isPlaying = true;
    this.changed();
  }

  pause() {
    if (!this.isPlaying) return;
    this.offset = this.position;
    this.stop();
  }

  stop() {
    for (const track of this.tracks) {
      track.source?.stop();
      track.source?.disconnect();
      track.source = null;
    }
    this.isPlaying = false;
    this.changed();
  }

  toggle() { return this.isPlaying ? this.pause() : this.play(); }

  async seek(seconds) {
    const wasPlaying = this.isPlaying;
    if (wasPlaying) this.stop();
    this.offset = Math.min(Math.max(seconds, 0), this.duration);
    if (wasPlaying) await this.play();
    else this.changed();
  }

  async setLoop(loop) {
    const { position } = this;
    this.loop = loop;
    await this.seek(position);
  }

  set(index, values) {
    Object.assign(this.tracks[index], values);
    for (const track of this.tracks) {
      track.gain.gain.setTargetAtTime(this.level(track), this.context.currentTime, 0.01);
    }
    this.changed();
  }

  level(track) {
    const anySolo = this.tracks.some((other) => other.solo);
    return track.muted || (anySolo && !track.solo) ? 0 : track.volume;
  }

  tick() {
    if (this.isPlaying && !this.loop && this.position >= this.duration) {
      this.stop();
      this.offset = 0;
      this.changed();
    }
  }

  async mix() {
    const { sampleRate } = this.context;
    const length = Math.ceil(this.duration * sampleRate);
    const offline = new OfflineAudioContext(2, length, sampleRate);
    for (const track of this.tracks) {
      const gain = new GainNode(offline, { gain: this.level(track) });
      const source = new AudioBufferSourceNode(offline, { buffer: track.buffer });
      source.connect(gain).connect(offline.destination);
      source.start();
    }
    return encodeWav(await offline.startRendering());
  }

  close() {
    this.stop();
    return this.context.close();
  }

  changed() { this.dispatchEvent(new Event("change")); }
}

// 16 bit, attenuated if it would clip.
function encodeWav(buffer) {
  const channels = [buffer.getChannelData(0), buffer.getChannelData(1)];
  let peak = 1;
  for (const channel of channels) for (const x of channel) peak = Math.max(peak, Math.abs(x));
  const view = new DataView(new ArrayBuffer(44 + 4 * buffer.length));
  const text = (at, letters) => [...letters].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 4 * buffer.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 2, true);
  view.setUint32(24, buffer.sampleRate, true); view.setUint32(28, 4 * buffer.sampleRate, true);
  view.setUint16(32, 4, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 4 * buffer.length, true);
  for (let i = 0, at = 44; i < buffer.length; i++) {
    for (const channel of channels) { view.setInt16(at, (channel[i] / peak) * 32767, true); at += 2; }
  }
  return new Blob([view], { type: "audio/wav" });
}

function computePeaks(buffer, bars) {
  const data = buffer.getChannelData(0);
  const step = data.length / bars;
  return Float32Array.from({ length: bars }, (_, bar) => {
    const stop = Math.min(data.length, Math.ceil((bar + 1) * step));
    let peak = 0;
    for (let i = Math.floor(bar * step); i < stop; i++) peak = Math.max(peak, Math.abs(data[i]));
    return peak;
  });
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

// `stems`: [{ name, file, url, bytes: () => Promise<ArrayBuffer> }]. Returns a function that closes the player.
export async function mountPlayer(root, stems, { title = "track", zip = null, save = followLink } = {}) {
  const context = new AudioContext();
  const buffers = await Promise.all(
    stems.map(async (stem) => context.decodeAudioData(await stem.bytes())),
  );
  const transport = new Transport(buffers, context);
  const peaks = buffers.map((buffer) => computePeaks(buffer, PEAKS));
  const top = Math.max(0.05, ...peaks.map((values) => Math.max(...values)));

  const play = element("button", { type: "button", className: "primary play" });
  const time = element("span", { className: "time" });
  const seek = element("input", {
    type: "range", className: "seek", min: 0, max: transport.duration, step: 0.01, value: 0, label: "Position",
  });
  const loop = element("button", { type: "button", html: ICONS.loop, label: "Loop" });
  const bar = element("div", { className: "transport" }, play, time, seek, element("div", { className: "tools" }, loop));
  const rows = stems.map((stem, index) => stemRow(stem, index, transport, save));
  const list = element("ul", { className: "stems" }, ...rows.map((row) => row.item));
  const mix = element("button", { type: "button", textContent: "Save this mix" });
  const downloads = element("div", { className: "downloads" });
  if (zip) downloads.append(makeSavable(element("a", { href: zip, download: `${title}.zip`, textContent: "Save all (zip)" }), save));
  downloads.append(mix);
  root.replaceChildren(bar, list, downloads);
  root.transport = transport;

  play.onclick = () => transport.toggle();
  loop.onclick = () => transport.setLoop(!transport.loop);
  seek.oninput = () => transport.seek(Number(seek.value));
  mix.onclick = async () => {
    mix.disabled = true;
    saveBlob(await transport.mix(), `${title} (mix).wav`);
    mix.disabled = false;
  };

  const show = () => {
    const position = transport.position;
    time.textContent = `${clock(position)} / ${clock(transport.duration)}`;
    seek.value = position;
    fill(seek);
    seek.setAttribute("aria-valuetext", `${clock(position)} of ${clock(transport.duration)}`);
    rows.forEach((row, i) => draw(row.canvas, peaks[i], row.hue, position / transport.duration, top));
  };
  const update = () => {
    const label = transport.isPlaying ? "Pause" : "Play";
    if (play.title !== label) {
      play.innerHTML = transport.isPlaying ? ICONS.pause : ICONS.play;
      play.title = label;
      play.setAttribute("aria-label", label);
    }
    loop.setAttribute("aria-pressed", transport.loop);
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

  return () => {
    cancelAnimationFrame(frame);
    document.removeEventListener("keydown", onKey);
    scheme.removeEventListener("change", show);
    resizeObserver.disconnect();
    transport.removeEventListener("change", update);
    root.replaceChildren();
    delete root.transport;
    return transport.close();
  };
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
    if (event.target.type !== "range" || !/^(Space|Digit\d|KeyL)$/.test(event.code)) return;
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
