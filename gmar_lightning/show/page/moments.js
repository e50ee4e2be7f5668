// Two moments under one divider: any two probes of a run, or the same probe of two runs, photograph by photograph.
const NOW = "now";
const moments = { items: [], key: "" };
function momentOf(side) {
  const { run, step } = state[side];
  return { run: runs[run], probe: probeAt(runs[run], step === NOW ? undefined : step) };
}
const samePhotos = (a, b) => a.run.fingerprints[a.probe.segment] === b.run.fingerprints[b.probe.segment];
function titleOf({ run, probe }) {
  const start = run.probes[0] === probe ? (probe.step === 0 ? ", before training" : ", first probe") : "";
  return `${several ? run.name + ", " : ""}step ${probe.step}${start}`;
}
function buildMoments() {
  const first = (run) => (runs[run].probes.length ? runs[run].probes[0].step : NOW);
  const reset = () =>
    several
      ? { left: { run: 0, step: NOW }, right: { run: 1, step: NOW } }
      : { left: { run: 0, step: first(0) }, right: { run: 0, step: NOW } };
  Object.assign(state, reset());
  for (const side of ["left", "right"]) {
    $(`${side}run`).append(...runs.map((run, k) => el("option", { value: k }, run.name)));
    $(`${side}run`).hidden = !several;
    $(`${side}run`).addEventListener("change", (e) => {
      state[side] = { run: Number(e.target.value), step: NOW };
      showSteps(side);
      drawMoments();
    });
    $(`${side}step`).addEventListener("change", (e) => {
      state[side].step = e.target.value === NOW ? NOW : Number(e.target.value);
      drawMoments();
    });
    showSteps(side);
  }
  $("tofirst").addEventListener("click", () => {
    state.left = { run: state.right.run, step: first(state.right.run) };
    state.right.step = NOW;
    for (const side of ["left", "right"]) showSteps(side);
    drawMoments();
  });
  $("divider").addEventListener("input", (e) => setDivider(e.target.value / 100));
}
function showSteps(side) {
  const run = runs[state[side].run];
  const options = run.probes
    .filter((p) => p.maps)
    .map((p) => el("option", { value: p.step }, `step ${p.step}${p.step === 0 ? ", before training" : ""}`));
  $(`${side}run`).value = state[side].run;
  $(`${side}step`).replaceChildren(el("option", { value: NOW }, "the slider’s step"), ...options);
  $(`${side}step`).value = state[side].step;
}
function setDivider(part) {
  state.divider = Math.max(0, Math.min(1, part));
  $("divider").value = Math.round(100 * state.divider);
  moments.items.forEach(drawSwipe);
}
function drawSwipe({ canvas, left, right }) {
  const pen = canvas.getContext("2d"),
    cut = Math.round(state.divider * canvas.width);
  pen.putImageData(right, 0, 0);
  if (cut > 0) pen.putImageData(left, 0, 0, 0, 0, cut, canvas.height);
  pen.fillStyle = "#000";
  pen.fillRect(cut - 2, 0, 4, canvas.height);
  pen.fillStyle = "#fff";
  pen.fillRect(cut - 1, 0, 2, canvas.height);
  pen.beginPath();
  pen.arc(cut, canvas.height / 2, 7, 0, 7);
  pen.fill();
  pen.strokeStyle = "#000";
  pen.lineWidth = 1.5;
  pen.stroke();
  canvas.setAttribute("aria-valuenow", Math.round(100 * state.divider));
}
// The divider follows pointer and arrow keys on any of the pictures; all move together.
function steerSwipe(canvas) {
  const drag = (event) => {
    const box = canvas.getBoundingClientRect();
    setDivider((event.clientX - box.left) / box.width);
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    drag(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons) drag(event);
  });
  canvas.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: state.divider - 0.05, ArrowRight: state.divider + 0.05, Home: 0, End: 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    setDivider(to);
  });
}
function momentsProblem(a, b) {
  if (!a.probe || !b.probe) return "No probe was recorded.";
  for (const { run, probe } of [a, b])
    if (!heatOf(run, probe)) return `${titleOf({ run, probe })}: no map of this form was recorded.`;
  if (!(a.run.photos[a.probe.segment] || []).length) return "No photographs were recorded.";
  return samePhotos(a, b) ? "" : "The two probes saw different photographs; they cannot be compared image by image.";
}
function drawMoments() {
  const a = momentOf("left"),
    b = momentOf("right"),
    problem = momentsProblem(a, b);
  $("swipes").hidden = Boolean(problem);
  $("momentsnote").hidden = !problem;
  $("momentsnote").textContent = problem;
  $("momentsdrift").textContent = "";
  if (problem) {
    moments.items = [];
    moments.key = "";
    $("swipes").replaceChildren();
    return;
  }
  const key = JSON.stringify([a.run.index, a.probe.step, b.run.index, b.probe.step, state.form, state.opacity]);
  $("lefttitle").textContent = `left: ${titleOf(a)}`;
  $("righttitle").textContent = `right: ${titleOf(b)}`;
  if (key !== moments.key) {
    moments.key = key;
    fillSwipes(a, b);
  }
  const drift = median(moments.items.map((item) => item.rho));
  $("momentsdrift").textContent =
    drift === null ? "" : `rank correlation of left and right: ${drift.toFixed(2)} (median; 1 = no drift)`;
}
function fillSwipes(a, b) {
  const photos = a.run.photos[a.probe.segment],
    labels = a.run.labels[a.probe.segment];
  moments.items = photos.map((photo, k) => {
    const left = mapOf(a.run, a.probe, k),
      right = mapOf(b.run, b.probe, k),
      label = labels ? labels[k] : null;
    const rho = left.h === right.h && left.w === right.w ? spearman(left, right) : null;
    const name = label === null || label === undefined ? `image ${k + 1}` : className(a.run, label);
    const canvas = el("canvas", {
      class: "swipe",
      tabindex: 0,
      role: "slider",
      "aria-valuemin": 0,
      "aria-valuemax": 100,
      "aria-label": `Divider on ${name}: left of it ${titleOf(a)}, right of it ${titleOf(b)}`,
    });
    canvas.width = photo.w;
    canvas.height = photo.h;
    steerSwipe(canvas);
    const caption = el(
      "figcaption",
      {},
      el("span", { class: "name" }, name),
      el("span", { class: "soft" }, rho === null ? "" : ` ρ ${rho.toFixed(2)}`),
    );
    const item = {
      canvas,
      rho,
      left: overlayOf(photo, left),
      right: overlayOf(photo, right),
      figure: el("figure", {}, canvas, caption),
    };
    return item;
  });
  $("swipes").classList.toggle("few", photos.length < 5);
  const old = document.activeElement,
    place = [...$("swipes").querySelectorAll("canvas")].indexOf(old);
  $("swipes").replaceChildren(...moments.items.map((item) => item.figure));
  if (place >= 0) moments.items[place]?.canvas.focus();
  moments.items.forEach(drawSwipe);
}
// Spearman correlation of two maps; ties share their average rank, null where a map has no order.
function spearman(a, b) {
  const ranks = ({ heat, offset, h, w }) => {
    const values = Array.from(heat.subarray(offset, offset + h * w)),
      order = values.map((_, k) => k).sort((x, y) => values[x] - values[y]),
      out = [];
    if (values.includes(255)) return null;
    for (let k = 0; k < order.length;) {
      let end = k;
      while (end < order.length && values[order[end]] === values[order[k]]) end++;
      for (let j = k; j < end; j++) out[order[j]] = (k + end - 1) / 2 - (order.length - 1) / 2;
      k = end;
    }
    return out;
  };
  const x = ranks(a),
    y = ranks(b);
  if (!x || !y) return null;
  const dot = (p, q) => p.reduce((sum, v, k) => sum + v * q[k], 0),
    norm = Math.sqrt(dot(x, x) * dot(y, y));
  return norm > 0 ? dot(x, y) / norm : null;
}
