// Numbers, times and sizes as text for people. An unknown value (null, undefined, NaN) is a dash, never 0.

export const UNKNOWN = "–";

const PREFIXES = [
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];
const SIZES = [
  [2 ** 40, "TiB"],
  [2 ** 30, "GiB"],
  [2 ** 20, "MiB"],
  [2 ** 10, "KiB"],
];

export const known = (value) => typeof value === "number" && Number.isFinite(value);

// Whole numbers with commas. Integers above 2^53 come as texts.
export function count(value, unit = "") {
  if (typeof value === "string" && /^-?\d+$/.test(value)) value = BigInt(value);
  else if (!known(value)) return UNKNOWN;
  return unit ? `${value.toLocaleString("en")} ${unit}` : value.toLocaleString("en");
}

// Three significant digits and a unit: "0.0123 Hz", "1,234 Hz", "56.7 kHz"; "1.23 M packets/s" for units with a slash.
export function quantity(value, unit) {
  if (!known(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size >= 1e4) {
    const [factor, prefix] = PREFIXES.find(([factor]) => size >= factor * 0.9995);
    const number = digits(value / factor, 3);
    return unit.includes("/") ? `${number} ${prefix} ${unit}` : `${number} ${prefix}${unit}`;
  }
  return `${size >= 1000 ? Math.round(value).toLocaleString("en") : digits(value, 3)} ${unit}`;
}

export const rate = (value) => quantity(value, "packets/s");

// Significant digits without an exponent for everyday values.
export function digits(value, significant) {
  if (!known(value)) return UNKNOWN;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e7) return value.toExponential(significant - 1);
  const places = Math.max(0, significant - 1 - Math.floor(Math.log10(size)));
  return value.toLocaleString("en", { maximumFractionDigits: Math.min(places, 12) });
}

// A fraction as percent. Only 0 is "0 %" and only 1 is "100 %": a small loss never rounds to none.
export function percent(fraction) {
  if (!known(fraction)) return UNKNOWN;
  if (fraction === 0 || fraction === 1) return `${fraction * 100} %`;
  if (fraction > 0 && fraction < 1e-5) return "< 0.001 %";
  if (fraction > 0.9995 && fraction < 1) return "99.9 %";
  return `${digits(fraction * 100, fraction < 0.1 ? 2 : 3)} %`;
}

// How much of the rows the monitor has counted, beside every figure that is a sample.
export function seen(fraction) {
  if (!known(fraction)) return "seen fraction unknown";
  return fraction === 1 ? "all rows seen" : `seen ${percent(fraction)}`;
}

export function bytes(value) {
  if (!known(value)) return UNKNOWN;
  const [factor, unit] = SIZES.find(([factor]) => Math.abs(value) >= factor) ?? [1, "bytes"];
  return `${digits(value / factor, 3)} ${unit}`;
}

// "0:12:33", with days "2 d 3:12:33".
export function duration(seconds) {
  if (!known(seconds) || seconds < 0) return UNKNOWN;
  const whole = Math.floor(seconds);
  const two = (value) => String(value).padStart(2, "0");
  const text = `${Math.floor(whole / 3600) % 24}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
  return whole >= 86400 ? `${Math.floor(whole / 86400)} d ${text}` : text;
}

// One unit, as for the age of a number: "0.3 s", "12 s", "4 min", "5 h", "2 d".
export function age(seconds) {
  if (!known(seconds)) return UNKNOWN;
  const size = Math.max(0, seconds);
  if (size < 9.95) return `${size.toFixed(1)} s`;
  if (size < 120) return `${Math.round(size)} s`;
  if (size < 7200) return `${Math.floor(size / 60)} min`;
  return size < 172800 ? `${Math.floor(size / 3600)} h` : `${Math.floor(size / 86400)} d`;
}

// Unix seconds as date and time, and as time of day. All times of the page are UTC, as in files and log.
export function utc(seconds) {
  if (!known(seconds) || seconds <= 0 || seconds > 8.64e12) return UNKNOWN;
  return `${new Date(seconds * 1000).toISOString().slice(0, 19).replace("T", " ")} UTC`;
}

export const clock = (seconds) => (utc(seconds) === UNKNOWN ? UNKNOWN : utc(seconds).slice(11, 19));

// Seconds as ms, us or ns where that reads better.
export function seconds(value) {
  if (!known(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size === 0) return "0 s";
  if (size >= 1) return `${digits(value, 4)} s`;
  const [factor, unit] = size >= 1e-3 ? [1e3, "ms"] : size >= 1e-6 ? [1e6, "µs"] : [1e9, "ns"];
  return `${digits(value * factor, 3)} ${unit}`;
}

export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

// Some texts, each in a line of its own, and how many more there are.
export function brief(texts, most = 4) {
  const more = texts.length - most;
  return more > 0 ? [...texts.slice(0, most), `and ${more} more`].join("\n") : texts.join("\n");
}

// The beginning of a long text.
export const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

// A channel or a part of one: "1-3-25-7" is io_group-io_channel-chip_id-channel_id.
export const channelName = (row) =>
  [row.io_group, row.io_channel, row.chip_id, row.channel_id]
    .filter((part) => part !== undefined && part !== null)
    .join("-");

// Any value of a result as one line.
export function inline(value) {
  if (value === null || value === undefined || value === "") return UNKNOWN;
  if (typeof value === "number") return Number.isInteger(value) ? count(value) : digits(value, 5);
  if (Array.isArray(value)) return value.length ? value.map(inline).join(", ") : UNKNOWN;
  if (typeof value === "object")
    return (
      Object.entries(value)
        .map(([name, part]) => `${name} ${inline(part)}`)
        .join(", ") || UNKNOWN
    );
  return String(value);
}
