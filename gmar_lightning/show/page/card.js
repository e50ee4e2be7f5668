// What is known of one head: where it attends now, before it was flagged, and beside a sibling; and in words.
const bad = (event) => !GOOD_KINDS.has(event.kind);
function eventsOf(run, layer, head) {
  return run.events.filter((e) => e.layer === layer && e.head === head);
}
// The flag the card is about: the last one up to the shown step, else the first one still to come.
function flagOf(run, layer, head) {
  const all = eventsOf(run, layer, head).filter(bad);
  return all.filter((e) => e.step <= steps[state.i]).pop() ?? all[0] ?? null;
}
// Kept maps of a head: the last ones up to a step, from the same photographs; null where none were kept.
function keptMaps(run, cell, segment, upTo) {
  let found = null;
  for (const entry of run.head_maps ? run.head_maps.entries : []) {
    if (entry.step > upTo || entry.segment !== segment) continue;
    const at = entry.cells ? entry.cells.indexOf(cell) : cell;
    if (at >= 0) found = { entry, at };
  }
  return found;
}
function headMap(run, kept, image) {
  const { h, w, images } = run.head_maps,
    { entry, at } = kept;
  entry.heat ??= nibbles(bytes(entry.data));
  entry.strength ??= bytes(entry.peaks);
  const cell = at * images + image,
    room = h * w + ((h * w) % 2),
    code = entry.strength[cell];
  // strengths are stored on a logarithmic scale over four powers of ten, as part of the layer's strongest head
  const strength = code === 255 || code === undefined ? NaN : code === 0 ? 0 : 10 ** (4 * (code / 254 - 1));
  return { map: { heat: entry.heat, offset: cell * room, h, w }, strength };
}
function siblingsOf(run, probe, layer, head) {
  const rank = (h) => valueAt(run, probe, layer, h, probe.tables.contribution ? "contribution" : "shares") || 0;
  const heads = Array.from({ length: run.heads[layer] }, (_, h) => h).filter((h) => h !== head);
  const healthy = heads.filter((h) => !probe.flags?.has(layer * run.width + h));
  return { heads, best: (healthy.length ? healthy : heads).sort((a, b) => rank(b) - rank(a))[0] ?? null };
}
let cardShown = "";
function drawCard() {
  const run = runs[state.run],
    { layer, head } = state,
    exists = layer < run.heads.length && head < run.heads[layer];
  $("card").hidden = !exists;
  if (!exists) return;
  let probe = probeAt(run);
  if (!probe || probe.failed) probe = run.probes.filter((p) => !p.failed && p.step <= steps[state.i]).pop() ?? probe;
  if (!probe || probe.failed) {
    $("card").hidden = true;
    return;
  }
  const { heads, best } = siblingsOf(run, probe, layer, head);
  const sibling = heads.includes(state.sibling) ? state.sibling : best;
  $("sibling").replaceChildren(
    ...heads.map((h) => el("option", { value: h }, `head ${h}${h === best ? " (healthy)" : ""}`)),
  );
  if (sibling !== null) $("sibling").value = sibling;
  for (const node of [$("sibling"), document.querySelector("label[for=sibling]")]) node.hidden = !heads.length;
  $("cardname").textContent = (several ? run.name + " · " : "") + `${run.layers[layer]} head ${head}`;
  $("cardtext").replaceChildren(
    ...cardWords(run, probe, layer, head).map((line) => el("li", { class: line.alarm ? "wrong" : null }, line.text)),
  );
  drawCardMaps(run, probe, layer, head, sibling);
}
function cardRows(run, probe, layer, head, sibling) {
  const cell = layer * run.width + head,
    flag = flagOf(run, layer, head),
    now = probe.step;
  const rows = [{ title: "now", head, kept: keptMaps(run, cell, probe.segment, now) }];
  if (flag) {
    const before = keptMaps(run, cell, probe.segment, flag.since_step - 1);
    rows.push({
      title: `before ${flag.kind === "collapsed" ? "it collapsed" : flag.kind.replaceAll("_", " ")} (last healthy picture)`,
      head,
      kept: before,
    });
  } else
    rows.push({ title: "at the first probe", head, kept: keptMaps(run, cell, probe.segment, run.probes[0].step) });
  if (sibling !== null)
    rows.push({
      title: `head ${sibling} of the same layer, now`,
      head: sibling,
      kept: keptMaps(run, layer * run.width + sibling, probe.segment, now),
    });
  return rows;
}
function drawCardMaps(run, probe, layer, head, sibling) {
  const rows = cardRows(run, probe, layer, head, sibling),
    photos = run.photos[probe.segment] || [];
  const key = JSON.stringify([
    run.index,
    layer,
    probe.segment,
    state.opacity,
    ...rows.map((r) => [r.title, r.kept && [r.kept.entry.step, r.kept.at]]),
  ]);
  if (key === cardShown) return;
  cardShown = key;
  if (!run.head_maps || !run.head_maps.entries.length || !photos.length) {
    $("cardmaps").replaceChildren(
      el("div", { class: "empty" }, "No maps of single heads were recorded in this run."),
    );
    return;
  }
  $("cardmaps").replaceChildren(
    ...rows.map((row) => {
      if (!row.kept)
        return el(
          "div",
          { class: "cardrow" },
          el("h3", {}, row.title),
          el("div", { class: "empty" }, "No map of this head was kept at that time."),
        );
      const maps = photos.slice(0, run.head_maps.images).map((_, k) => headMap(run, row.kept, k));
      const strongest = median(maps.map((m) => m.strength)),
        faint = strongest !== null && strongest < 0.01;
      const words =
        strongest === null
          ? ""
          : faint
            ? " · almost nothing: less than 1 % of the layer’s strongest head"
            : ` · peak ${number(100 * strongest, 2)} % of the layer’s strongest head`;
      return el(
        "div",
        { class: "cardrow" },
        el("h3", {}, row.title, el("span", { class: "small soft" }, ` step ${row.kept.entry.step}${words}`)),
        el(
          "div",
          { class: "strip" },
          ...maps.map((m, k) => {
            const canvas = el("canvas", {
              role: "img",
              "aria-label": `Image ${k + 1}: what head ${row.head} attends to, ${row.title}`,
            });
            drawOverlay(canvas, photos[k], m.map, Number.isFinite(m.strength) ? Math.min(1, m.strength / 0.02) : 0);
            return canvas;
          }),
        ),
      );
    }),
  );
}
function rankOf(values, at) {
  return 1 + values.filter((v) => v > values[at]).length;
}
function cardWords(run, probe, layer, head) {
  const at = layer * run.width + head,
    of = (name) => valueAt(run, probe, layer, head, name),
    has = (name) => Number.isFinite(of(name)),
    lines = [];
  const say = (text, alarm = false) => lines.push({ text, alarm });
  if (has("contribution")) {
    const all = Array.from(probe.tables.contribution),
      signed = of("contribution_signed");
    const sign = !Number.isFinite(signed)
      ? ""
      : signed > 0.1
        ? `, on balance for the class (${Math.round(100 * signed)} % of it)`
        : signed < -0.1
          ? `, on balance against the class (${Math.round(-100 * signed)} % of it)`
          : ", for the class in some images and against it in others";
    say(
      `Contribution ${number(of("contribution"))} to the explained score per image: number ${rankOf(all, at)} of ${all.filter(Number.isFinite).length} heads${sign}.`,
    );
  }
  if (has("shares")) say(`Importance: ${number(of("shares"), 2)}× a fair share of its layer.`);
  const attention = [];
  if (has("entropy")) attention.push(`entropy ${of("entropy").toFixed(2)} (0 one token, 1 uniform)`);
  if (has("distance")) attention.push(`mean distance ${number(of("distance"), 2)} patches`);
  if (has("sink_mass")) attention.push(`${Math.round(100 * of("sink_mass"))} % on its most attended token`);
  if (attention.length) say(`Attention: ${attention.join(", ")}.`);
  if (has("similarity")) say(`Most similar head of its layer: cosine ${of("similarity").toFixed(2)}.`);
  const flags = eventsOf(run, layer, head);
  if (!flags.length) say("Never flagged in this run.");
  for (const e of flags) {
    const since = e.since_step !== e.step ? ` (since step ${e.since_step})` : "";
    const cause = e.cause ? `; cause: ${e.cause.replaceAll("_", " ")}` : "",
      evidence = e.evidence ? ` (${e.evidence})` : "";
    say(`${e.kind.replaceAll("_", " ")} at step ${e.step}${since}${cause}${evidence}.${ablationWords(e)}`, bad(e));
  }
  return lines;
}
function ablationWords(e) {
  const said = (v) => v !== null && v !== undefined;
  if (!said(e.ablation_logit)) return "";
  const average = said(e.mean_ablation_logit) ? `, its mean in its place by ${number(e.mean_ablation_logit)}` : "";
  const control = said(e.control_logit)
    ? `; zeroing an unflagged head of its layer by ${number(e.control_logit)}`
    : "";
  const images = said(e.ablation_images) ? ` (${e.ablation_images} images)` : "";
  return ` Zeroing it changes the logit by ${number(e.ablation_logit)}${average}${control}${images}.`;
}
function buildCard() {
  $("sibling").addEventListener("change", (e) => {
    state.sibling = Number(e.target.value);
    drawCard();
  });
}
