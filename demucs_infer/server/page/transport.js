// Plays stems in sync on one clock, part by part, each with its own gain.

import { Stretcher } from "./stretch.js";

export const PART_SECONDS = 5;
const AHEAD_SECONDS = 8; // scheduled before they are heard
const KEPT_PARTS = 5; // of each stem, in memory
const SHORTEST_SECTION = 0.25; // seconds
const LARGEST_DRIFT = 0.1; // seconds, between the stems and the original

// `stems`: [{ name, read: (start, seconds) => Promise<AudioBuffer> }]. `original`: the URL of the song
// itself, for comparison; without it, that is the sum of the stems. `canCompare`: whether they are all there.
export class Transport extends EventTarget {
  constructor(stems, context, { duration, available = duration, original = null, canCompare = true }) {
    super();
    Object.assign(this, { context, duration, available, canCompare });
    this.original = original && Object.assign(new Audio(original), { onloadedmetadata: () => this.applyLevels() });
    this.loop = false;
    this.section = null; // { start, stop }: what is looped, if not all
    this.tempo = 1;
    this.countIn = null; // { bpm, beats } of a bar of clicks before the music
    this.isPlaying = false;
    this.isWaiting = false; // for the network, or for stems that are still made
    this.isBypassed = false;
    this.offset = 0;
    this.segments = []; // what is scheduled: { at: seconds of the clock, position, length, tempo }
    this.clicks = [];
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
    return segment.position + Math.min(Math.max(now - segment.at, 0), segment.length) * segment.tempo;
  }

  async play({ countIn = this.countIn } = {}) {
    if (this.isPlaying) return;
    if (this.offset >= this.duration) this.offset = 0;
    this.isPlaying = true;
    const run = this.run = {};
    this.changed();
    await this.context.resume();
    this.next = { at: 0, position: this.offset };
    this.stretcher = this.tempo === 1 ? null : new Stretcher(this.tempo, this.context.sampleRate);
    try {
      if (countIn) await this.scheduleClicks(run, countIn);
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

  // One bar at the tempo that is heard; the music begins on the next beat, if it is there by then.
  async scheduleClicks(run, { bpm, beats }) {
    const { context, next } = this;
    const index = Math.floor(next.position / PART_SECONDS + 1e-6);
    await Promise.all(this.tracks.map((track) => this.load(track, index)));
    if (run !== this.run) return;
    const beat = 60 / (bpm * this.tempo), start = context.currentTime + 0.1;
    for (let i = 0; i < beats; i++) {
      const at = start + i * beat;
      const click = new OscillatorNode(context, { frequency: i ? 1000 : 1500 });
      const gain = new GainNode(context, { gain: 0 });
      gain.gain.setValueAtTime(0.5, at);
      gain.gain.exponentialRampToValueAtTime(1e-3, at + 0.06);
      click.connect(gain).connect(context.destination);
      click.start(at);
      click.stop(at + 0.07);
      this.clicks.push({ at, click });
    }
    next.at = Math.ceil((start + beats * beat) * context.sampleRate) / context.sampleRate;
  }

  // Schedules the next parts: every stem of a part starts at the same time, to the sample.
  async schedule(run) {
    const { context, next, tempo } = this;
    const section = this.section ?? { start: 0, stop: this.duration };
    while (next.at - context.currentTime < AHEAD_SECONDS && next.position < this.duration) {
      const end = this.loop && next.position < section.stop ? section.stop : this.duration;
      const index = Math.floor(next.position / PART_SECONDS + 1e-6);
      const stop = Math.min((index + 1) * PART_SECONDS, end);
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
      const offset = Math.max(0, next.position - index * PART_SECONDS);
      const length = tempo === 1 ? this.startPart(buffers, offset, stop - next.position)
        : this.startStretched(buffers, offset, stop - next.position, !this.loop && stop >= end);
      if (length) this.segments.push({ at: next.at, position: next.position, length, tempo });
      next.at += length;
      next.position = this.loop && stop >= end ? section.start : stop;
    }
  }

  // Resolves to null when what is scheduled has been played and the next part has not arrived.
  async ended(next) {
    await sleep(Math.max(next.at - this.context.currentTime, 0) * 1000 + 250);
    return null;
  }

  startPart(buffers, offset, length) {
    this.tracks.forEach((track, i) => this.start(track, buffers[i], offset, length));
    return length;
  }

  // Returns the seconds that are heard, which are known only after stretching.
  startStretched(buffers, offset, length, isLast) {
    const { sampleRate } = this.context;
    const first = Math.round(offset * sampleRate), count = Math.round(length * sampleRate);
    const places = buffers.flatMap((buffer, i) => Array.from({ length: buffer.numberOfChannels }, (_, c) => ({ buffer, i, c })));
    const outputs = this.stretcher.process(places.map(({ buffer, c }) => {
      const data = new Float32Array(count);
      data.set(buffer.getChannelData(c).subarray(first, first + count));
      return data;
    }), isLast);
    const frames = outputs[0].length;
    if (!frames) return 0;
    const stretched = buffers.map((buffer) => this.context.createBuffer(buffer.numberOfChannels, frames, sampleRate));
    places.forEach(({ i, c }, k) => stretched[i].copyToChannel(outputs[k], c));
    return this.startPart(stretched, 0, frames / sampleRate);
  }

  start(track, buffer, offset, length) {
    const { at, position } = this.next;
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
    for (const { click } of this.clicks.splice(0)) click.disconnect();
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
    if (wasPlaying) this.play({ countIn: null });
    else this.changed();
  }

  // What is scheduled for other settings is not played.
  reschedule(settings) {
    const { position } = this;
    Object.assign(this, settings);
    const { loop, section } = this;
    this.seek(loop && section && (position < section.start || position >= section.stop) ? section.start : position);
  }

  setLoop(loop) { this.reschedule({ loop }); }
  setTempo(tempo) { this.reschedule({ tempo: Math.min(Math.max(tempo, 0.5), 1.5) }); }

  // A section is looped at once; null stands for the whole song.
  setSection(section) {
    if (!section) return this.reschedule({ section: null });
    const [low, high] = [section.start, section.stop].sort((a, b) => a - b);
    const start = Math.max(0, Math.min(low, this.duration - SHORTEST_SECTION));
    const stop = Math.min(Math.max(high, start + SHORTEST_SECTION), this.duration);
    this.reschedule({ section: { start, stop }, loop: true });
  }

  setCountIn(countIn) {
    this.countIn = countIn;
    this.changed();
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
    if (this.isBypassed) return this.isOriginalHeard ? 0 : 1;
    const anySolo = this.tracks.some((other) => other.solo);
    return track.muted || (anySolo && !track.solo) ? 0 : track.volume;
  }

  get isOriginalHeard() { return this.isBypassed && this.original?.readyState >= HTMLMediaElement.HAVE_METADATA; }

  // Keeps the original at the place of the stems while it is heard.
  followOriginal() {
    const { original, position, segments } = this;
    if (!original || original.seeking) return;
    const isHeard = this.isOriginalHeard && !this.isWaiting && segments[0]?.at <= this.context.currentTime;
    if (!isHeard) return original.pause();
    original.playbackRate = this.tempo;
    const hasDrifted = Math.abs(original.currentTime - position) > LARGEST_DRIFT * this.tempo;
    if (hasDrifted) original.currentTime = position;
    if (original.paused) original.play().catch(() => {}); // it was paused meanwhile
  }

  tick() {
    this.followOriginal();
    if (this.isPlaying && !this.loop && this.hasEnded) {
      this.stop();
      this.offset = 0;
      this.changed();
    }
  }

  get hasEnded() {
    const last = this.segments.at(-1);
    return Boolean(last) && this.next.position >= this.duration && this.context.currentTime >= last.at + last.length - 1e-3;
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
    this.original?.pause();
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
