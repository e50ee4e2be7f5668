function cellSize(layers, heads, room) {
  return Math.max(
    9,
    Math.min(80, Math.floor((room - 48) / Math.max(heads, 1)), Math.floor(440 / Math.max(layers, 1))),
  );
}
function gridShape(run, room) {
  const cell = cellSize(run.heads.length, run.width, room);
  return { cell, width: 46 + run.width * cell + 2, height: run.heads.length * cell + 20 };
}
function drawGrid(canvas, run, room, colour, crossed, gone) {
  const { cell, width, height } = gridShape(run, room),
    pen = fitted(canvas, width, height);
  run.heads.forEach((count, layer) => {
    pen.fillStyle = css("--soft");
    pen.textAlign = "right";
    if (cell >= 11 || layer % 2 === 0) pen.fillText(run.rows[layer].slice(-6), 40, layer * cell + cell / 2);
    for (let head = 0; head < run.width; head++) {
      const x = 46 + head * cell,
        y = layer * cell,
        fill = head < count ? colour(layer, head) : null;
      if (fill === null) {
        if (head < count || gone) hatch(pen, x, y, cell - 2, cell - 2);
        else {
          pen.fillStyle = css("--grid");
          pen.fillRect(x, y, cell - 2, cell - 2);
        }
        continue;
      }
      pen.fillStyle = fill;
      pen.fillRect(x, y, cell - 2, cell - 2);
      if (crossed(layer, head)) {
        for (const [style, line] of [
          ["#000", 3.5],
          ["#fff", 1.6],
        ]) {
          pen.strokeStyle = style;
          pen.lineWidth = line;
          pen.beginPath();
          pen.moveTo(x + 3, y + 3);
          pen.lineTo(x + cell - 5, y + cell - 5);
          pen.moveTo(x + cell - 5, y + 3);
          pen.lineTo(x + 3, y + cell - 5);
          pen.stroke();
        }
      }
    }
  });
  pen.textAlign = "center";
  pen.fillStyle = css("--soft");
  for (let head = 0; head < run.width; head += cell >= 16 ? 1 : 2)
    pen.fillText(head, 46 + head * cell + cell / 2 - 1, run.heads.length * cell + 9);
  const chosen = state.hover ?? state;
  if (chosen.layer < run.heads.length && chosen.head < run.heads[chosen.layer]) {
    const x = 46 + chosen.head * cell,
      y = chosen.layer * cell;
    pen.strokeStyle = css("--card");
    pen.lineWidth = 4;
    pen.strokeRect(x - 1, y - 1 + (y ? 0 : 2), cell, cell - (y ? 0 : 2));
    pen.strokeStyle = css("--accent");
    pen.lineWidth = 2;
    pen.strokeRect(x - 1, y - 1 + (y ? 0 : 2), cell, cell - (y ? 0 : 2));
  }
}
function pickHeads(canvas, run, space) {
  const at = (event) => {
    const box = canvas.getBoundingClientRect(),
      { cell, width } = gridShape(run, space()),
      zoom = width / box.width;
    const head = Math.floor(((event.clientX - box.left) * zoom - 46) / cell),
      layer = Math.floor(((event.clientY - box.top) * zoom) / cell);
    return layer >= 0 && layer < run.heads.length && head >= 0 && head < run.heads[layer] ? { layer, head } : null;
  };
  canvas.addEventListener("pointermove", (event) => {
    const cell = at(event),
      old = state.hover;
    if (event.pointerType === "mouse" && (cell?.layer !== old?.layer || cell?.head !== old?.head)) {
      state.hover = cell;
      drawHeads();
    }
  });
  canvas.addEventListener("pointerleave", () => {
    if (state.hover) {
      state.hover = null;
      drawHeads();
    }
  });
  canvas.addEventListener("click", (event) => {
    const cell = at(event);
    if (cell) {
      Object.assign(state, cell, { run: run.index, sibling: null, hover: null });
      drawHeads();
    }
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    state.hover = state.sibling = null;
    state.run = run.index;
    state.layer = Math.max(0, Math.min(run.heads.length - 1, state.layer + move[0]));
    state.head = Math.max(0, Math.min(run.heads[state.layer] - 1, state.head + move[1]));
    drawHeads();
  });
}
const gridCanvases = new Map();
function buildGrids() {
  for (const run of runs) {
    const canvas = el("canvas", { class: "pick", tabindex: 0, role: "application" }),
      box = el("div", {}, several ? el("div", { class: "runname" }, run.name) : "", canvas);
    gridCanvases.set(run, canvas);
    $("grids").append(box);
    pickHeads(canvas, run, room);
  }
  const keys = Object.keys(VALUES).filter((key) => runs.some((run) => run.probes.some((p) => p.tables[key])));
  $("value").append(...keys.map((key) => el("option", { value: key }, VALUES[key].label)));
  $("value").addEventListener("change", (e) => {
    state.value = e.target.value;
    drawHeads();
  });
  state.value = keys[0] ?? "shares";
  $("value").value = state.value;
  if (keys.length < 2) {
    $("value").hidden = true;
    document.querySelector("label[for=value]").hidden = true;
  }
}
function valueAt(run, probe, layer, head, key = state.value) {
  const table = probe && probe.tables[key];
  const v = table ? table[layer * run.width + head] : NaN;
  return v;
}
function room() {
  const full = $("grids").clientWidth;
  return several && full > 520 ? (full - 18) / 2 : full;
}
function drawHeads() {
  const kind = VALUES[state.value];
  bar($("scale"), heatColour);
  $("low").textContent = kind.low;
  $("high").textContent = kind.high;
  for (const run of runs) {
    const probe = probeAt(run),
      flagged = (layer, head) => probe && probe.flags && probe.flags.has(layer * run.width + head);
    drawGrid(
      gridCanvases.get(run),
      run,
      room(),
      (layer, head) => {
        const v = valueAt(run, probe, layer, head);
        return Number.isFinite(v) ? heatColour(unitOf(kind, v)) : null;
      },
      flagged,
      !probe || probe.failed,
    );
    gridCanvases
      .get(run)
      .setAttribute("aria-label", `Heads of ${run.name}, ${run.heads.length} layers; arrow keys choose a head`);
  }
  drawDetail();
  drawDifference();
  drawRasters();
  drawCard();
}
function layerNote(run, probe, layer) {
  if (!probe || probe.failed || several) return "";
  const begin = run.probes.find((p) => !p.failed),
    kept = probe.totals[layer] / begin.totals[layer];
  return el(
    "div",
    { class: "small soft" },
    `This layer uses ${number(probe.effective[layer])} of ${run.heads[layer]} heads` +
      (Number.isFinite(kept) ? `; its gradient is ${number(kept, 2)}× that of the first probe.` : "."),
  );
}
function drawDetail() {
  const chosen = state.hover ?? state,
    lines = [];
  for (const run of runs) {
    const probe = probeAt(run);
    if (!(chosen.layer < run.heads.length && chosen.head < run.heads[chosen.layer])) continue;
    const v = valueAt(run, probe, chosen.layer, chosen.head),
      last = run.events
        .filter((e) => e.layer === chosen.layer && e.head === chosen.head && e.step <= steps[state.i])
        .pop();
    const words = !Number.isFinite(v)
      ? "not measured"
      : (state.value === "shares" ? v.toFixed(2) : number(v)) + VALUES[state.value].unit;
    lines.push(
      el(
        "div",
        {},
        several ? el("span", { class: "swatch", style: `border-top-color: var(${COLOURS[run.index % 4]})` }) : "",
        el(
          "span",
          { class: "name" },
          `${several ? run.name + " · " : ""}${run.layers[chosen.layer]} head ${chosen.head}`,
        ),
        ` · ${words}`,
        last
          ? el(
              "span",
              { class: GOOD_KINDS.has(last.kind) ? "soft" : "wrong" },
              ` · ${last.kind.replaceAll("_", " ")} at step ${last.step}`,
            )
          : "",
        layerNote(run, probe, chosen.layer),
      ),
    );
  }
  $("detail").replaceChildren(...lines);
  const series = [];
  for (const run of runs) {
    if (!(chosen.layer < run.heads.length)) continue;
    if (!several)
      for (let head = 0; head < run.heads[chosen.layer]; head++)
        if (head !== chosen.head)
          series.push({ faint: true, points: run.probes.map((p) => [p.step, valueAt(run, p, chosen.layer, head)]) });
    if (chosen.head < run.heads[chosen.layer])
      series.push({ run, points: run.probes.map((p) => [p.step, valueAt(run, p, chosen.layer, chosen.head)]) });
  }
  drawChart($("curve"), series, {
    height: several ? 220 : 320,
    floor: 0,
    least: state.value === "shares" ? 1.5 : VALUES[state.value].top === 1 ? 1 : null,
    rule: state.value === "shares" ? 1 : null,
  });
  $("curve").setAttribute("aria-label", "Curve over the run: " + $("detail").textContent);
}
