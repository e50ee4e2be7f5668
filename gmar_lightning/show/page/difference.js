const comparable = (a, b) =>
  a !== b && a.heads.length === b.heads.length && a.heads.every((count, k) => count === b.heads[k]);
let differenceCanvas = null;
function buildDifference() {
  if (!several) return;
  $("difference").hidden = false;
  for (const [id, other] of [
    ["minuend", 1],
    ["subtrahend", 0],
  ]) {
    $(id).append(...runs.map((run, k) => el("option", { value: k }, run.name)));
    $(id).value = other;
    $(id).addEventListener("change", (e) => {
      state[id] = Number(e.target.value);
      drawHeads();
    });
  }
  differenceCanvas = el("canvas", {
    class: "pick",
    tabindex: 0,
    role: "application",
    "aria-label": "Difference grid; arrow keys choose a head",
  });
  $("dgrid").append(el("div", {}, differenceCanvas));
  pickHeads(differenceCanvas, runs[0], differenceRoom);
}
const differenceRoom = () => Math.min(420, $("dgrid").clientWidth);
function drawDifference() {
  if (!several) return;
  const a = runs[state.minuend],
    b = runs[state.subtrahend],
    ok = comparable(a, b);
  differenceCanvas.hidden = !ok;
  bar($("dscale"), (t) => differenceColour(4 * t - 2));
  $("dlist").hidden = !ok;
  if (!ok) {
    $("dtext").textContent =
      a === b
        ? "Choose two different runs."
        : "These runs have different layers or heads; there is no difference grid.";
    return;
  }
  const pa = probeAt(a),
    pb = probeAt(b),
    delta = (layer, head) => valueAt(a, pa, layer, head, "shares") - valueAt(b, pb, layer, head, "shares");
  drawGrid(
    differenceCanvas,
    a,
    differenceRoom(),
    (layer, head) => {
      const v = delta(layer, head);
      return Number.isFinite(v) ? differenceColour(v) : null;
    },
    () => false,
    true,
  );
  const chosen = state.hover ?? state,
    v = chosen.layer < a.heads.length && chosen.head < a.heads[chosen.layer] ? delta(chosen.layer, chosen.head) : NaN;
  const all = [];
  a.heads.forEach((count, layer) => {
    for (let head = 0; head < count; head++) {
      const d = delta(layer, head);
      if (Number.isFinite(d)) all.push({ layer, head, d });
    }
  });
  const sign = (d) => (d >= 0 ? "+" : "−") + Math.abs(d).toFixed(2);
  $("dtext").textContent = Number.isFinite(v)
    ? `${a.layers[chosen.layer]} head ${chosen.head}: ${sign(v)} fair shares. The heads that differ most:`
    : "Nothing was measured at this step.";
  $("dlist").replaceChildren(
    ...all
      .sort((p, q) => Math.abs(q.d) - Math.abs(p.d))
      .slice(0, 6)
      .map((most) =>
        el(
          "li",
          {},
          el(
            "button",
            {
              type: "button",
              onclick: () => {
                state.layer = most.layer;
                state.head = most.head;
                drawHeads();
              },
            },
            el("span", { class: "value" }, sign(most.d)),
            el("span", { class: "kind" }, "head " + most.head),
            el("span", { class: "text soft" }, a.layers[most.layer]),
          ),
        ),
      ),
  );
}
