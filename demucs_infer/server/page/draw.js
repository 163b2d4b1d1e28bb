// Waveforms and spectrograms of stems. A `view` is the part of the song that is seen: { start, stop }.

import { PART_SECONDS } from "./transport.js";

export const PEAKS = 1200; // columns of a waveform, as the server has them

// The peaks of a part of a buffer, of all channels together.
export function computePeaks(buffer, start = 0, seconds = buffer.duration) {
  const first = start * buffer.sampleRate, step = (seconds * buffer.sampleRate) / PEAKS, peaks = new Float32Array(PEAKS);
  for (let c = 0; c < buffer.numberOfChannels; c++) {
    const data = buffer.getChannelData(c);
    for (let bar = 0; bar < PEAKS; bar++) {
      const stop = Math.min(data.length, Math.ceil(first + (bar + 1) * step));
      for (let i = Math.floor(first + bar * step); i < stop; i++) peaks[bar] = Math.max(peaks[bar], Math.abs(data[i]));
    }
  }
  return peaks;
}

// `peaks` are those of `view`, and `top` is the height of the canvas.
export function drawWaveform(canvas, peaks, { hue, top, view, position, section }) {
  const { context, width, height, ratio, isDark } = prepare(canvas);
  if (!width) return;
  const light = isDark ? 68 : 46, played = fractionOf(view, position);
  context.clearRect(0, 0, width, height);
  drawSection(canvas, { view, section, color: isDark ? "#fff" : "#1c1a28" });
  const bars = Math.max(1, Math.min(peaks.length, Math.floor(width / (3 * ratio))));
  const step = width / bars;
  for (let bar = 0; bar < bars; bar++) {
    let peak = 0;
    const stop = Math.ceil(((bar + 1) * peaks.length) / bars);
    for (let i = Math.floor((bar * peaks.length) / bars); i < stop; i++) peak = Math.max(peak, peaks[i]);
    const size = Math.max(2 * ratio, (peak / top) * height * 0.94);
    context.fillStyle = `hsl(${hue} 70% ${light}% / ${bar / bars < played ? 1 : 0.42})`;
    context.fillRect(bar * step, (height - size) / 2, Math.max(1, step - ratio), size);
  }
  drawPosition(canvas, { view, position, color: isDark ? "#fff" : "#1c1a28" });
}

export function drawSpectrogram(canvas, picture, { view, position, section }) {
  const { context, width, height } = prepare(canvas);
  if (!width) return;
  context.fillStyle = "#000";
  context.fillRect(0, 0, width, height);
  if (picture) context.drawImage(picture, 0, 0, width, height);
  drawSection(canvas, { view, section, color: "#fff" });
  drawPosition(canvas, { view, position, color: "#fff" });
}

function prepare(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
  if (width && (canvas.width !== width || canvas.height !== height)) { canvas.width = width; canvas.height = height; }
  return { context: canvas.getContext("2d"), width, height, ratio, isDark: matchMedia("(prefers-color-scheme: dark)").matches };
}

const fractionOf = ({ start, stop }, seconds) => (seconds - start) / (stop - start);

const lineWidth = () => 2 * (window.devicePixelRatio || 1);

function drawSection(canvas, { view, section, color }) {
  if (!section) return;
  const context = canvas.getContext("2d"), { width, height } = canvas, line = lineWidth();
  const left = fractionOf(view, section.start) * width, right = fractionOf(view, section.stop) * width;
  context.fillStyle = color;
  context.globalAlpha = 0.13;
  context.fillRect(left, 0, right - left, height);
  context.globalAlpha = 0.6;
  context.fillRect(left, 0, line, height);
  context.fillRect(right - line, 0, line, height);
  context.globalAlpha = 1;
}

function drawPosition(canvas, { view, position, color }) {
  const { width, height } = canvas, line = lineWidth(), fraction = fractionOf(view, position);
  if (position <= 0 || fraction < 0 || fraction > 1) return;
  const context = canvas.getContext("2d");
  context.fillStyle = color;
  context.fillRect(Math.min(fraction * width, width - line), 0, line, height);
}

const SIZE = 2048; // samples of a spectrum
const COLUMNS = 400, BANDS = 72, LOWEST = 40, RANGE = 80; // of a spectrogram: hertz, decibels

// Returns a canvas with one pixel per column and band, low frequencies at the bottom. The samples are
// read in parts, one at a time, so that a long view needs little memory. null: `isCurrent` became false.
export async function computeSpectrogram(read, { start, stop }, hue, isCurrent = () => true) {
  const levels = new Float32Array(COLUMNS * BANDS).fill(-90);
  const times = Array.from({ length: COLUMNS }, (_, column) => start + ((column + 0.5) / COLUMNS) * (stop - start));
  for (let column = 0; column < COLUMNS;) {
    const index = Math.floor(times[column] / PART_SECONDS);
    const buffer = await read(index * PART_SECONDS, PART_SECONDS);
    if (!isCurrent()) return null;
    for (; column < COLUMNS && times[column] < (index + 1) * PART_SECONDS; column++) {
      measureSpectrum(buffer, times[column] - index * PART_SECONDS, levels.subarray(column * BANDS, (column + 1) * BANDS));
    }
  }
  return paint(levels, hue);
}

function measureSpectrum(buffer, seconds, levels) {
  const re = new Float64Array(SIZE), im = new Float64Array(SIZE);
  const first = Math.max(0, Math.min(Math.round(seconds * buffer.sampleRate) - SIZE / 2, buffer.length - SIZE));
  for (let c = 0; c < buffer.numberOfChannels; c++) {
    const data = buffer.getChannelData(c);
    for (let i = 0; i < SIZE; i++) {
      re[i] += ((data[first + i] ?? 0) / buffer.numberOfChannels) * (0.5 - 0.5 * Math.cos((2 * Math.PI * i) / SIZE));
    }
  }
  transform(re, im);
  const edge = (band) => Math.round((LOWEST * (buffer.sampleRate / 2 / LOWEST) ** (band / BANDS) * SIZE) / buffer.sampleRate);
  for (let band = 0; band < BANDS; band++) {
    let power = 0;
    const low = edge(band), high = Math.max(low + 1, edge(band + 1));
    for (let i = low; i < high; i++) power += re[i] * re[i] + im[i] * im[i];
    levels[band] = 10 * Math.log10(power / (high - low) + 1e-9);
  }
}

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

function paint(levels, hue) {
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
