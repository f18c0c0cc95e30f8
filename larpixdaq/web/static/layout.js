// The positions of channels, from the pixel layout that the first producer has loaded.

import { known } from "./format.js";
import { inflate, splitFrame } from "./live.js";

let last = null; // [key, promise]

// The layout that `facts`, the section of the state, describe: {key, pitch, positions(chip)}, where positions() returns
// {x, y (mm, by channel_id, NaN without a pixel), tile}, or null for a chip that it does not have.
export function getLayout(facts) {
  const key = JSON.stringify([facts.name, facts.file, facts.chips, facts.pixels, facts.version, facts.loaded]);
  if (last?.[0] !== key) {
    last = [key, fetchLayout(key)];
    last[1].catch(() => {
      last = null;
    });
  }
  return last[1];
}

async function fetchLayout(key) {
  const response = await fetch("/api/layout", { credentials: "same-origin" });
  if (!response.ok) {
    const answer = await response.json().catch(() => ({}));
    throw new Error(`pixel layout: ${answer.error ?? `the web server answered ${response.status}`}`);
  }
  const { header, values } = splitFrame(await response.arrayBuffer());
  const places = new Float32Array((await inflate(header, values)).buffer);
  const channels = header.shape[1];
  const rows = new Map();
  header.chips.forEach((name, row) => {
    const x = new Float32Array(channels);
    const y = new Float32Array(channels);
    for (let channel = 0; channel < channels; channel += 1) {
      x[channel] = places[(row * channels + channel) * 2];
      y[channel] = places[(row * channels + channel) * 2 + 1];
    }
    rows.set(name, { x, y, tile: header.tiles_of[row] });
  });
  const pitch = known(header.pitch) ? header.pitch : smallestDistance(rows);
  return { key, pitch, positions: (chip) => rows.get(chip.join("-")) ?? rows.get(String(chip[2])) ?? null };
}

// The smallest distance of pixels along an axis, for files that do not say their pitch.
function smallestDistance(rows) {
  let pitch = Infinity;
  for (const axis of ["x", "y"]) {
    const places = [
      ...new Set(
        [...rows.values()].flatMap((chip) =>
          [...chip[axis]].filter(Number.isFinite).map((place) => Math.round(place * 100) / 100),
        ),
      ),
    ].sort((one, other) => one - other);
    for (let at = 1; at < places.length; at += 1)
      if (places[at] - places[at - 1] > 0.05) pitch = Math.min(pitch, places[at] - places[at - 1]);
  }
  return Number.isFinite(pitch) ? pitch : 1;
}
