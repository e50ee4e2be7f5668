// The record as `report.py` embeds it, decoded; tables are Float32Array, layer by layer, NaN where nothing is known.
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const HEAT = bytes(DATA.heat);
const COLOURS = ["--a", "--b", "--c", "--d"],
  DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
// What the head grid can be coloured by, in the order of the selector. `root`: the square root is coloured, so that
// weak heads can still be told apart. `top` of values without a natural end is the largest of the record.
const VALUES = {
  contribution: { label: "contribution", unit: " contribution", root: true },
  shares: { label: "importance (share of the layer)", top: 3, unit: "× fair share", low: "0", high: "3× fair share" },
  entropy: { label: "attention entropy", top: 1, unit: " entropy", low: "one token", high: "uniform" },
  distance: { label: "attention distance", unit: " patches", low: "near" },
  similarity: { label: "similarity to the nearest head", top: 1, unit: " cosine", low: "0", high: "the same" },
  sink_mass: { label: "attention on one token", top: 1, unit: " of the attention", low: "0", high: "all" },
  sink_value_norm: { label: "value norm of that token", unit: "× the others" },
  logit_max: { label: "largest attention logit", unit: " before the softmax" },
  output_norm: { label: "output norm", unit: " output norm" },
  value_norm: { label: "value norm", unit: " value norm" },
  gradient_norm: { label: "gradient norm", unit: " gradient norm", root: true },
  output_rank: { label: "effective rank of the output", unit: " effective rank" },
  agreement: { label: "agreement of the images", top: 1, unit: " agreement", low: "they cancel", high: "they agree" },
  token_similarity: { label: "similarity of tokens (layer)", top: 1, unit: " cosine", low: "0", high: "all alike" },
};
const FORMS = {
  gradient: "gradient-gated rollout",
  paper: "GMAR as published",
  flow: "head-weighted rollout",
  rollout: "plain attention rollout",
  last_layer: "last layer alone",
};
// Kinds that end a flag: `recovered`, `woke`, and all that end so.
const GOOD_KINDS = { has: (kind) => kind === "recovered" || kind === "woke" || /_(end|restored)$/.test(kind) };
const state = {
  i: 0,
  run: 0,
  layer: 0,
  head: 0,
  value: "shares",
  form: null,
  opacity: 0.75,
  hover: null,
  minuend: 1,
  subtrahend: 0,
  sibling: null,
  divider: 0.5,
  left: null,
  right: null,
};

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function number(value, digits = 3) {
  if (value === null || !Number.isFinite(value)) return "–";
  return value !== 0 && Math.abs(value) < 1e-3
    ? value.toExponential(digits - 1)
    : Number(value.toPrecision(digits)).toString();
}
const known = (list) => list.filter((v) => v !== null && v !== undefined && Number.isFinite(v));
const mean = (list) => {
  const k = known(list);
  return k.length ? k.reduce((a, b) => a + b, 0) / k.length : null;
};
function median(list) {
  const sorted = known(list).sort((a, b) => a - b),
    m = sorted.length >> 1;
  if (!sorted.length) return null;
  return sorted.length % 2 ? sorted[m] : (sorted[m - 1] + sorted[m]) / 2;
}

const runs = DATA.runs.map((raw, index) => {
  const width = Math.max(0, ...raw.heads);
  const run = { ...raw, index, width, photos: {} };
  run.probes = raw.probes.map((probe) => decodedProbe(run, probe));
  return run;
});
function decodedProbe(run, probe) {
  const found = { ...probe, tables: {}, failed: !probe.shares, decoded: {} };
  if (!probe.shares) return found;
  const codes = new Uint16Array(bytes(probe.shares).buffer);
  const fair = (k) => run.heads[Math.floor(k / run.width)];
  found.tables.shares = Float32Array.from(codes, (c, k) => (c === 65535 ? NaN : (c / 65534) * fair(k)));
  for (const [name, text] of Object.entries(probe.signals || {})) {
    const { low, high, root } = run.signals[name];
    const unit = (c) => (root ? (c / 254) ** 2 : c / 254);
    found.tables[name] = Float32Array.from(bytes(text), (c) => (c === 255 ? NaN : low + unit(c) * (high - low)));
  }
  found.flags = new Set((probe.flagged || []).map(([l, h]) => l * run.width + h));
  found.effective = effectiveHeads(codes, run.heads, run.width);
  return found;
}
function effectiveHeads(codes, heads, width) {
  return heads.map((count, layer) => {
    let entropy = 0,
      seen = false,
      total = 0;
    for (let h = 0; h < count; h++) {
      const p = codes[layer * width + h] / 65534;
      if (p <= 1) {
        seen = true;
        total += p;
      }
      if (p > 0 && p <= 1) entropy -= p * Math.log(p);
    }
    return !seen ? null : total > 0 ? Math.exp(entropy) : 0; // a layer without gradient uses no head
  });
}
// The maps of a probe in one form, one byte per patch, 255 where the map is not finite; null where none are kept.
function heatOf(run, probe, form = state.form) {
  const text = probe && probe.maps && probe.maps.forms[form];
  if (!text) return null;
  if (!probe.decoded[form]) probe.decoded[form] = form === run.forms[0] ? bytes(text) : nibbles(bytes(text));
  return probe.decoded[form];
}
// Two values of 0 to 14 in each byte, the high half first; 15 stands for not finite.
function nibbles(packed) {
  const out = new Uint8Array(packed.length * 2),
    wide = (c) => (c === 15 ? 255 : Math.round((c / 14) * 254));
  packed.forEach((b, k) => {
    out[2 * k] = wide(b >> 4);
    out[2 * k + 1] = wide(b & 15);
  });
  return out;
}

const several = runs.length > 1;
const steps = [...new Set(runs.flatMap((run) => run.probes.map((p) => p.step)))].sort((a, b) => a - b);
const colourOf = (run) => css(COLOURS[run.index % 4]);
// the probe a run shows at a step: the latest one not after it
function probeAt(run, step = steps[state.i]) {
  let found = run.probes[0] ?? null;
  for (const probe of run.probes) {
    if (probe.step > step) break;
    found = probe;
  }
  return found;
}
const nearest = (step) =>
  steps.reduce((best, s, i) => (Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best), 0);
for (const [name, kind] of Object.entries(VALUES)) {
  if (kind.top === undefined) {
    kind.top = Math.max(1e-9, ...runs.map((run) => run.signals?.[name]?.high || 0));
    kind.low ??= "0";
    kind.high = number(kind.top) + (name === "distance" ? " patches" : kind.root ? ", square-root scale" : "");
  }
}
const unitOf = (kind, v) => (kind.root ? Math.sqrt(Math.max(0, v) / kind.top) : v / kind.top);
