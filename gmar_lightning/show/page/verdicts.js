function showVerdicts() {
  $("version").textContent = "gmar-lightning " + DATA.version;
  for (const run of runs) {
    const gained = ["accuracy", "loss"].flatMap((kind) => {
      const found = run.probes.map(logged(kind)).filter((v) => v !== null);
      return found.length ? [`${run[kind]} ${number(found[0])} → ${number(found[found.length - 1])}`] : [];
    });
    const list = el(
      "ul",
      {},
      ...run.verdict.findings.map((f) => el("li", { class: f.alarm ? "alarm" : "soft" }, f.text)),
    );
    const swatch = several
      ? el("span", {
          class: "swatch",
          style: `border-top-color: var(${COLOURS[run.index % 4]}); border-top-style: ${["solid", "dashed", "dotted", "double"][run.index % 4]}`,
        })
      : null;
    const facts = [
      `${run.total} ${run.total === 1 ? "probe" : "probes"}`,
      `${run.heads.length} ${run.heads.length === 1 ? "layer" : "layers"}`,
      ...Object.entries(run.settings)
        .filter(([, v]) => v !== "None")
        .map(([k, v]) => `${k} ${v}`),
    ];
    $("verdicts").append(
      el(
        "div",
        { class: "card verdict" },
        el(
          "div",
          { class: "head", style: "margin-bottom:2px" },
          el("span", { class: "name" }, swatch ?? "", run.name),
          el(
            "span",
            { class: "badge" + (!run.verdict.healthy ? " bad" : run.verdict.headline === "healthy" ? "" : " plain") },
            run.verdict.headline,
          ),
        ),
        el("div", { class: "small soft" }, facts.join(" · ")),
        gained.length ? el("div", { class: "small" }, gained.join(" · ")) : "",
        run.evidence.length
          ? el("ul", { class: "evidence small" }, ...run.evidence.map((line) => el("li", {}, line)))
          : "",
        run.verdict.findings.length
          ? list
          : el("p", { class: "soft", style: "margin:8px 0 0" }, "No rule found anything to report."),
      ),
    );
  }
  const thin = runs.filter((run) => run.total > run.probes.length);
  $("thinned").textContent = thin
    .map(
      (run) =>
        `${several ? run.name + ": " : ""}${run.probes.length} of ${run.total} probes are in this file, evenly chosen to keep it small; flags keep their exact steps.`,
    )
    .join(" ");
}
const flags = runs
  .flatMap((run) => run.events.map((event) => ({ run, event })))
  .sort((a, b) => a.event.step - b.event.step);
function place(event) {
  return event.layer === null || event.layer === undefined
    ? ""
    : (event.layer_name || "layer " + event.layer) +
        (event.head === null || event.head === undefined ? "" : " head " + event.head);
}
function jump({ run, event }, toCard = false) {
  const known = event.layer !== null && event.layer !== undefined,
    head = known && event.head !== null && event.head !== undefined;
  if (known) Object.assign(state, { run: run.index, layer: event.layer, sibling: null });
  if (head) state.head = event.head;
  go(nearest(event.step));
  if (head && toCard) $("card").scrollIntoView({ block: "center" });
}
function showFlags() {
  if (!flags.length) {
    $("flags").append(
      el("div", { class: "empty" }, "No flags in this run: no head collapsed, no layer vanished, no head took over."),
    );
    return;
  }
  $("flags").append(
    el(
      "ol",
      { class: "flags" },
      ...flags.map((flag) => {
        const e = flag.event;
        const cause =
          e.cause && !(e.message || "").includes(e.cause) ? ` Cause: ${e.cause.replaceAll("_", " ")}.` : "";
        const text = (e.message || place(e)) + cause + (/zero|ablat/i.test(e.message || "") ? "" : ablationWords(e));
        return el(
          "li",
          {},
          el(
            "button",
            { type: "button", onclick: () => jump(flag, true) },
            el("span", { class: "value" }, "step " + e.step),
            el("span", { class: "kind" }, (GOOD_KINDS.has(e.kind) ? "△ " : "▼ ") + e.kind.replaceAll("_", " ")),
            el("span", { class: "text soft" }, (several ? flag.run.name + ": " : "") + text),
          ),
        );
      }),
    ),
  );
}
function drawTimeline() {
  const canvas = $("timeline"),
    width = canvas.clientWidth,
    pen = fitted(canvas, width, 20),
    x = scaleX(width);
  pen.strokeStyle = css("--line");
  pen.beginPath();
  pen.moveTo(LEFT, 10);
  pen.lineTo(width - RIGHT, 10);
  pen.stroke();
  pen.fillStyle = css("--soft");
  pen.fillText("flags", 2, 10);
  for (const { run, event } of flags) {
    const at = x(event.step),
      up = GOOD_KINDS.has(event.kind) ? -1 : 1;
    pen.beginPath();
    pen.moveTo(at - 5, 10 - 5 * up);
    pen.lineTo(at + 5, 10 - 5 * up);
    pen.lineTo(at, 10 + 5 * up);
    pen.closePath();
    pen.strokeStyle = several ? colourOf(run) : css("--bad");
    pen.fillStyle = up > 0 ? pen.strokeStyle : css("--card");
    pen.lineWidth = 1.5;
    pen.fill();
    pen.stroke();
  }
  cursor(pen, x(steps[state.i]), 1, 19);
  canvas.setAttribute("aria-label", flags.length + " flags over the run; the list below jumps to each");
}
function cursor(pen, x, top, bottom) {
  pen.strokeStyle = css("--ink");
  pen.lineWidth = 1;
  pen.setLineDash([]);
  pen.beginPath();
  pen.moveTo(Math.round(x) + 0.5, top);
  pen.lineTo(Math.round(x) + 0.5, bottom);
  pen.stroke();
}
