const rasters = new Map();
function buildRasters() {
  for (const run of runs) {
    const canvas = el("canvas", {
      class: "wide pick",
      role: "img",
      "aria-label": `All heads of ${run.name} over the run`,
    });
    rasters.set(run, { canvas, picture: null });
    $("rasters").append(several ? el("div", { class: "runname", style: "margin-top:8px" }, run.name) : "", canvas);
    jumpOnClick(canvas);
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect(),
        tops = rasterTops(run),
        layer = tops.findLastIndex((t) => t <= event.clientY - box.top);
      if (layer < 0 || layer >= run.heads.length) return;
      state.run = run.index;
      state.sibling = null;
      state.layer = layer;
      state.head = Math.min(
        run.heads[layer] - 1,
        Math.floor((event.clientY - box.top - tops[layer]) / rowHeight(run)),
      );
      drawHeads();
    });
  }
}
function rowHeight(run) {
  return Math.max(
    2,
    Math.min(
      several ? 4 : 14,
      Math.floor(
        520 /
          Math.max(
            1,
            run.heads.reduce((a, b) => a + b, 0),
          ),
      ),
    ),
  );
}
function rasterTops(run) {
  const tops = [0];
  for (const count of run.heads) tops.push(tops[tops.length - 1] + count * rowHeight(run) + 3);
  return tops;
}
function paintRaster(run, width) {
  const tops = rasterTops(run),
    height = Math.max(20, tops[tops.length - 1] + 18),
    picture = el("canvas"),
    pen = fitted(picture, width, height),
    x = scaleX(width),
    tall = rowHeight(run);
  const ratio = window.devicePixelRatio || 1,
    snap = (v) => Math.round(v * ratio) / ratio;
  run.probes.forEach((probe, k) => {
    const from = snap(x(probe.step)),
      to =
        k + 1 < run.probes.length
          ? snap(x(run.probes[k + 1].step))
          : Math.min(
              width - RIGHT + 6,
              Math.max(from + 3, from + (k ? from - x(run.probes[k - 1].step) : width - LEFT - RIGHT)),
            );
    run.heads.forEach((count, layer) => {
      for (let head = 0; head < count; head++) {
        const v = valueAt(run, probe, layer, head);
        pen.fillStyle = Number.isFinite(v) ? heatColour(unitOf(VALUES[state.value], v)) : css("--missing");
        pen.fillRect(from, tops[layer] + head * tall, to - from, tall);
      }
    });
  });
  pen.fillStyle = css("--soft");
  pen.textAlign = "right";
  let last = -20;
  run.rows.forEach((name, layer) => {
    const middle = tops[layer] + (run.heads[layer] * tall) / 2;
    if (middle - last >= 12) {
      pen.fillText(name.slice(-6), LEFT - 9, Math.max(6, middle));
      last = middle;
    }
  });
  pen.textAlign = "left";
  pen.fillText(steps[0], LEFT, height - 7);
  pen.textAlign = "right";
  if (steps.length > 1) pen.fillText("step " + steps[steps.length - 1], width - RIGHT, height - 7);
  return { picture, width, height, theme: document.documentElement.dataset.theme, value: state.value };
}
function drawRasters() {
  $("rasternote").textContent = `${VALUES[state.value].label}; a head that collapses leaves a dark streak`;
  for (const run of runs) {
    const place = rasters.get(run),
      width = place.canvas.clientWidth;
    if (!width) continue;
    if (
      !place.picture ||
      place.picture.width !== width ||
      place.picture.theme !== document.documentElement.dataset.theme ||
      place.picture.value !== state.value
    )
      place.picture = paintRaster(run, width);
    const pen = fitted(place.canvas, width, place.picture.height),
      tops = rasterTops(run),
      tall = rowHeight(run),
      x = scaleX(width),
      at = x(steps[state.i]),
      chosen = state.hover ?? state;
    pen.drawImage(place.picture.picture, 0, 0, width, place.picture.height);
    for (const event of run.events)
      if (event.head !== null && event.head !== undefined && event.kind === "collapsed") {
        const ex = x(event.step),
          ey = tops[event.layer] + (event.head + 0.5) * tall;
        pen.beginPath();
        pen.moveTo(ex - 7, ey - 4);
        pen.lineTo(ex - 7, ey + 4);
        pen.lineTo(ex, ey);
        pen.closePath();
        pen.fillStyle = "#fff";
        pen.fill();
        pen.strokeStyle = "#000";
        pen.lineWidth = 1;
        pen.stroke();
      }
    pen.strokeStyle = "rgba(0,0,0,.75)";
    pen.lineWidth = 3;
    pen.beginPath();
    pen.moveTo(at, 0);
    pen.lineTo(at, tops[tops.length - 1] - 3);
    pen.stroke();
    pen.strokeStyle = "#fff";
    pen.lineWidth = 1.2;
    pen.stroke();
    if (chosen.layer < run.heads.length) {
      pen.fillStyle = css("--accent");
      const ey = tops[chosen.layer] + (chosen.head + 0.5) * tall;
      pen.beginPath();
      pen.moveTo(LEFT - 5, ey - 4);
      pen.lineTo(LEFT - 5, ey + 4);
      pen.lineTo(LEFT, ey);
      pen.fill();
    }
  }
}
