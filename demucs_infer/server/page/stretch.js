// Changes the tempo of music without its pitch (WSOLA): frames are taken at another pace than they
// are played, each from where it continues the one before it best. All stems share the places, which
// are found in their sum, so that they stay in step and add up to the stretched song.

const HOP_SECONDS = 0.025, SEARCH_SECONDS = 0.012;

export class Stretcher {
  constructor(tempo, sampleRate) {
    this.hop = Math.round(HOP_SECONDS * sampleRate);
    this.search = Math.round(SEARCH_SECONDS * sampleRate);
    this.step = this.hop * tempo;
    this.wanted = 0; // where the next frame would begin at an even pace, in `input`
    this.natural = null; // where the last frame continues
    this.input = null; // channels that are not used up
    this.rise = Float32Array.from({ length: this.hop }, (_, i) => 0.5 - 0.5 * Math.cos((Math.PI * (i + 0.5)) / this.hop));
  }

  // Takes more of all channels, and returns what can be played of them: hops of all channels.
  process(channels, isLast = false) {
    const { hop, search } = this;
    const padding = isLast ? 2 * hop + search : 0;
    this.input = channels.map((data, c) => concatenate(this.input?.[c] ?? [], data, padding));
    this.guide = this.input[0].map((_, i) => this.input.reduce((sum, data) => sum + data[i], 0));
    const stop = this.guide.length - 2 * hop - search;
    const count = Math.max(0, Math.ceil((stop - this.wanted) / this.step));
    const outputs = channels.map(() => new Float32Array(count * hop));
    for (let frame = 0; frame < count; frame++) {
      const start = this.findStart();
      outputs.forEach((output, c) => this.crossfade(output.subarray(frame * hop, (frame + 1) * hop), this.input[c], start));
      this.natural = start + hop;
      this.wanted += this.step;
    }
    this.drop(Math.floor(Math.min(this.natural ?? 0, this.wanted - search)));
    return outputs;
  }

  crossfade(output, data, start) {
    const natural = this.natural ?? start;
    for (let i = 0; i < output.length; i++) {
      output[i] = data[natural + i] + this.rise[i] * (data[start + i] - data[natural + i]);
    }
  }

  // The start near the wanted one whose samples resemble the continuation of the last frame most.
  findStart() {
    const wanted = Math.round(this.wanted);
    if (this.natural === null) return wanted;
    const low = Math.max(0, wanted - this.search), high = wanted + this.search;
    const rough = this.findBest(wanted, low, high, 4);
    return this.findBest(rough, Math.max(low, rough - 3), Math.min(high, rough + 3), 1);
  }

  findBest(best, low, high, stride) {
    let top = this.compare(best, stride);
    for (let start = low; start <= high; start += stride) {
      const score = this.compare(start, stride);
      if (score > top + 1e-9) [top, best] = [score, start];
    }
    return best;
  }

  compare(start, stride) {
    const { guide, natural, hop } = this;
    let product = 0, power = 1e-9;
    for (let i = 0; i < hop; i += stride) {
      product += guide[natural + i] * guide[start + i];
      power += guide[start + i] ** 2;
    }
    return product / Math.sqrt(power);
  }

  drop(count) {
    if (count <= 0) return;
    this.input = this.input.map((data) => data.slice(count));
    this.wanted -= count;
    if (this.natural !== null) this.natural -= count;
  }
}

function concatenate(first, second, padding) {
  const joined = new Float32Array(first.length + second.length + padding);
  joined.set(first);
  joined.set(second, first.length);
  return joined;
}
