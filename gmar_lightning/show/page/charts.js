function drawChart(canvas, series, { height = 130, floor = null, least = null, rule = null, band = null } = {}) {
  const width = canvas.clientWidth;
  if (!width) return;
  const pen = fitted(canvas, width, height),
    x = scaleX(width),
    values = series.flatMap((s) => s.points.map((p) => p[1])).filter((v) => v !== null && Number.isFinite(v));
  if (band) values.push(...band.flatMap((p) => [p[1], p[2]]).filter((v) => v !== null && Number.isFinite(v)));
  if (!values.length) {
    pen.fillStyle = css("--soft");
    pen.fillText("nothing recorded", LEFT, height / 2);
    return;
  }
  let low = floor ?? Math.min(...values),
    high = Math.max(...values, least ?? -Infinity);
  if (high - low < 1e-9) {
    high += 0.5;
    low -= floor === null ? 0.5 : 0;
  }
  const y = (v) => 8 + ((high - v) / (high - low)) * (height - 30);
  pen.textAlign = "right";
  pen.lineWidth = 1;
  for (const mark of ticks(low, high)) {
    pen.strokeStyle = css("--grid");
    pen.beginPath();
    pen.moveTo(LEFT, y(mark));
    pen.lineTo(width - RIGHT, y(mark));
    pen.stroke();
    pen.fillStyle = css("--soft");
    pen.fillText(number(mark), LEFT - 6, y(mark));
  }
  if (rule !== null) {
    pen.strokeStyle = css("--stripe");
    pen.setLineDash([2, 3]);
    pen.beginPath();
    pen.moveTo(LEFT, y(rule));
    pen.lineTo(width - RIGHT, y(rule));
    pen.stroke();
    pen.setLineDash([]);
  }
  pen.fillStyle = css("--soft");
  pen.textAlign = "left";
  pen.fillText(steps[0], LEFT, height - 8);
  pen.textAlign = "right";
  if (steps.length > 1) pen.fillText("step " + steps[steps.length - 1], width - RIGHT, height - 8);
  if (band) {
    pen.fillStyle = css("--a");
    pen.globalAlpha = 0.16;
    for (const piece of pieces(band)) {
      pen.beginPath();
      piece.forEach((p) => pen.lineTo(x(p[0]), y(p[1])));
      [...piece].reverse().forEach((p) => pen.lineTo(x(p[0]), y(p[2])));
      pen.fill();
    }
    pen.globalAlpha = 1;
  }
  for (const s of series) {
    pen.strokeStyle = s.faint ? css("--stripe") : colourOf(s.run);
    pen.fillStyle = pen.strokeStyle;
    pen.globalAlpha = s.faint ? 0.55 : 1;
    pen.lineWidth = s.faint ? 1 : 2;
    pen.setLineDash(s.faint ? [] : DASHES[s.run.index % 4]);
    pen.lineJoin = "round";
    for (const piece of pieces(s.points)) {
      pen.beginPath();
      if (piece.length === 1) {
        pen.arc(x(piece[0][0]), y(piece[0][1]), s.faint ? 1.5 : 3, 0, 7);
        pen.fill();
      } else {
        piece.forEach((p) => pen.lineTo(x(p[0]), y(p[1])));
        pen.stroke();
      }
    }
  }
  pen.globalAlpha = 1;
  pen.setLineDash([]);
  cursor(pen, x(steps[state.i]), 6, height - 20);
}
// runs of neighbouring points with a value: a failed probe leaves a gap
function pieces(points) {
  const found = [];
  let open = null;
  for (const p of points) {
    if (p[1] === null || !Number.isFinite(p[1])) {
      open = null;
      continue;
    }
    if (!open) found.push((open = []));
    open.push(p);
  }
  return found;
}
function ticks(low, high) {
  const raw = (high - low) / 4,
    power = 10 ** Math.floor(Math.log10(raw)),
    unit = [1, 2, 2.5, 5, 10].find((m) => m * power >= raw) * power,
    found = [];
  for (let v = Math.ceil(low / unit) * unit; v <= high + unit * 1e-6; v += unit)
    found.push(Math.abs(v) < unit * 1e-9 ? 0 : v);
  return found;
}
const logged = (kind) => (probe) => (probe.metrics && probe.metrics[kind] !== undefined ? probe.metrics[kind] : null);
const checked = (name) => (probe) => probe.faithfulness?.[name] ?? null;
const CHARTS = [
  { title: "Accuracy", named: "accuracy", value: logged("accuracy"), sparse: true },
  { title: "Loss", named: "loss", value: logged("loss"), sparse: true },
  {
    title: "Heatmap drift",
    note: "vs first",
    faint: (p) => p.previous ?? null,
    digits: 2,
    value: (p) => (p.correlation && p.correlation.length ? median(p.correlation) : null),
    band: (p) => {
      const v = (p.correlation || []).filter((c) => c !== null);
      return v.length ? [p.step, Math.min(...v), Math.max(...v)] : [p.step, null, null];
    },
    least: 1,
  },
  { title: "Effective heads", note: "mean", value: (p) => (p.failed ? null : mean(p.effective)) },
  {
    title: "Class sensitivity",
    note: "1 = class-blind",
    value: checked("class_sensitivity"),
    sparse: true,
    least: 1,
  },
  {
    title: "Randomisation",
    note: "1 = weights do not matter",
    value: checked("randomisation"),
    sparse: true,
    least: 1,
  },
  { title: "Insertion − deletion", note: "of the map", value: checked("insertion_minus_deletion"), sparse: true },
  { title: "Flagged heads", value: (p) => (p.failed ? null : p.flags.size), floor: 0, least: 1 },
];
const shownCharts = [];
function buildCharts() {
  for (const chart of CHARTS) {
    if (!runs.some((run) => run.probes.some((p) => chart.value(p) !== null))) continue;
    const canvas = el("canvas", { class: "wide pick", role: "img" }),
      value = el("span", { class: "value soft push" }),
      name = chart.named ? [...new Set(runs.map((run) => run[chart.named]).filter(Boolean))].join(", ") : "";
    $("charts").append(
      el(
        "div",
        { class: "chart" },
        el(
          "div",
          { class: "head" },
          el("h3", {}, chart.title),
          el("span", { class: "small soft" }, name || chart.note || ""),
          value,
        ),
        canvas,
      ),
    );
    shownCharts.push({ ...chart, canvas, text: value });
    jumpOnClick(canvas);
  }
}
function drawCharts() {
  for (const chart of shownCharts) {
    const series = runs.map((run) => {
      const points = run.probes.map((p) => [p.step, chart.value(p)]);
      return { run, points: chart.sparse ? points.filter((p) => p[1] !== null) : points };
    });
    if (!several && chart.faint)
      series.unshift({ faint: true, points: runs[0].probes.map((p) => [p.step, chart.faint(p)]) });
    drawChart(chart.canvas, series, {
      floor: chart.floor ?? null,
      least: chart.least ?? null,
      band: !several && chart.band ? runs[0].probes.map(chart.band) : null,
    });
    const now = runs.map((run) => {
      const p = probeAt(run);
      return p ? number(chart.value(p), chart.digits) : "–";
    });
    chart.text.replaceChildren(
      ...now.flatMap((v, k) => [
        k ? " / " : "",
        el("span", several ? { style: `color: var(${COLOURS[k % 4]})` } : {}, v),
      ]),
    );
    chart.canvas.setAttribute("aria-label", `${chart.title} over the run, now ${now.join(" / ")}`);
  }
}
