function draw() {
  const shown = runs.map((run) => probeAt(run)),
    epoch = shown.find((p) => p && p.epoch !== null && p.epoch !== undefined);
  $("slider").value = state.i;
  $("where").textContent =
    `step ${steps[state.i]}${epoch ? ` · epoch ${epoch.epoch}` : ""} · ${state.i + 1} of ${steps.length}`;
  $("slider").setAttribute("aria-valuetext", $("where").textContent);
  drawTimeline();
  drawPhotos();
  drawHeads();
  drawMoments();
  drawCharts();
}
function go(index) {
  state.i = Math.max(0, Math.min(steps.length - 1, index));
  draw();
}
let timer = null;
function play(on) {
  clearInterval(timer);
  timer = null;
  if (on) {
    if (state.i === steps.length - 1) go(0);
    timer = setInterval(
      () => {
        if (state.i >= steps.length - 1) play(false);
        else go(state.i + 1);
      },
      Math.max(80, Math.min(400, 12000 / steps.length)),
    );
  }
  $("play").textContent = on ? "Pause" : "Play";
  $("play").setAttribute("aria-pressed", String(on));
}
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Switch to ${theme === "dark" ? "light" : "dark"} colours`);
}
function steer() {
  const only = steps.length < 2;
  $("slider").max = steps.length - 1;
  for (const id of ["slider", "play", "prev", "next"]) $(id).disabled = only;
  $("slider").addEventListener("input", (e) => {
    play(false);
    go(Number(e.target.value));
  });
  $("play").addEventListener("click", () => play(timer === null));
  $("prev").addEventListener("click", () => go(state.i - 1));
  $("next").addEventListener("click", () => go(state.i + 1));
  $("opacity").addEventListener("input", (e) => {
    state.opacity = e.target.value / 100;
    drawPhotos();
    drawCard();
    drawMoments();
  });
  $("timeline").addEventListener("click", (event) => {
    const box = $("timeline").getBoundingClientRect(),
      x = scaleX(box.width),
      at = event.clientX - box.left,
      near = flags.filter((f) => Math.abs(x(f.event.step) - at) < 9);
    if (near.length)
      jump(near.reduce((a, b) => (Math.abs(x(a.event.step) - at) <= Math.abs(x(b.event.step) - at) ? a : b)));
    else {
      const low = steps[0],
        span = Math.max(1, steps[steps.length - 1] - low);
      go(nearest(low + ((at - LEFT) / (box.width - LEFT - RIGHT)) * span));
    }
  });
  jumpOnClick($("curve"));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || only) return;
    const tag = event.target.tagName,
      takes = tag === "SELECT" || (tag === "INPUT" && event.target.id !== "slider");
    if (takes || ((tag === "BUTTON" || tag === "SUMMARY") && event.key === " ")) return;
    const target = { ArrowLeft: state.i - 1, ArrowRight: state.i + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (target !== undefined) {
      event.preventDefault();
      play(false);
      go(target);
    } else if (event.key === " ") {
      event.preventDefault();
      play(timer === null);
    }
  });
  let frame = 0;
  new ResizeObserver(() => {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => {
      drawTimeline();
      drawHeads();
      drawCharts();
    });
  }).observe(document.body);
}
async function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", (e) => {
    setTheme(e.matches ? "dark" : "light");
    if (steps.length) draw();
  });
  $("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    if (steps.length) draw();
  });
  showVerdicts();
  if (!steps.length) {
    $("content").hidden = true;
    $("nothing").hidden = false;
    document.body.dataset.ready = "true";
    return;
  }
  await loadPhotos();
  buildPhotos();
  buildGrids();
  buildCard();
  buildMoments();
  buildDifference();
  buildCharts();
  buildRasters();
  showFlags();
  steer();
  const first = flags.find((f) => f.event.kind === "collapsed");
  if (first) Object.assign(state, { run: first.run.index, layer: first.event.layer, head: first.event.head });
  go(steps.length - 1);
  document.body.dataset.ready = "true";
}
start();
