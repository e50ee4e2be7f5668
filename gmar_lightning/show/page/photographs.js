async function loadPhotos() {
  for (const run of runs)
    for (const [segment, list] of Object.entries(run.images)) {
      run.photos[segment] = await Promise.all(
        list.map(async (photo) => {
          const image = new Image();
          image.src = "data:image/jpeg;base64," + photo.data;
          await image.decode();
          const canvas = el("canvas");
          canvas.width = photo.w;
          canvas.height = photo.h;
          const pen = canvas.getContext("2d", { willReadFrequently: true });
          pen.drawImage(image, 0, 0);
          return { ...photo, pixels: pen.getImageData(0, 0, photo.w, photo.h).data };
        }),
      );
    }
}
function className(run, index) {
  if (index === null || index === undefined) return "?";
  return run.classes && run.classes[index] !== undefined ? String(run.classes[index]) : "class " + index;
}
// Catmull-Rom weights of four neighbouring cells for each pixel; straight interpolation would draw stars
function taps(size, cells) {
  return Array.from({ length: size }, (_, p) => {
    const at = ((p + 0.5) / size) * cells - 0.5,
      low = Math.floor(at),
      t = at - low;
    const weights = [
      (t * (t * (2 - t) - 1)) / 2,
      (t * t * (3 * t - 5) + 2) / 2,
      (t * (t * (4 - 3 * t) + 1)) / 2,
      (t * t * (t - 1)) / 2,
    ];
    return weights.map((w, k) => [Math.max(0, Math.min(cells - 1, low - 1 + k)), w]);
  });
}
function enlarged(heat, offset, h, w, height, width) {
  const value = (y, x) => {
    const c = heat[offset + y * w + x];
    return c === 255 ? 0 : c / 254;
  };
  const across = taps(width, w),
    down = taps(height, h);
  const rows = new Float32Array(h * width),
    out = new Float32Array(height * width);
  for (let y = 0; y < h; y++)
    for (let x = 0; x < width; x++)
      for (const [cell, weight] of across[x]) rows[y * width + x] += weight * value(y, cell);
  for (let y = 0; y < height; y++)
    for (const [cell, weight] of down[y])
      for (let x = 0; x < width; x++) out[y * width + x] += weight * rows[cell * width + x];
  return out.map((t) => Math.max(0, Math.min(1, t)));
}
/* One photograph with its heat as ImageData. `map` is {heat, offset, h, w} or null (then the picture is striped);
   `strength` below 1 takes colour away from a map that is much weaker than its neighbours. */
function overlayOf(photo, map, strength = 1) {
  const picture = new ImageData(photo.w, photo.h),
    out = picture.data,
    from = photo.pixels;
  const whole = map && map.heat.length >= map.offset + map.h * map.w;
  const warm = whole ? enlarged(map.heat, map.offset, map.h, map.w, photo.h, photo.w) : null;
  const mix = Math.min(1, state.opacity / 0.3);
  for (let y = 0, k = 0; y < photo.h; y++)
    for (let x = 0; x < photo.w; x++, k += 4) {
      const grey = 0.299 * from[k] + 0.587 * from[k + 1] + 0.114 * from[k + 2],
        cold = 0.72 * grey + 54;
      const striped = (((x + y) / 6) | 0) % 2;
      out[k + 3] = 255;
      if (!whole) {
        for (let ch = 0; ch < 3; ch++) out[k + ch] = 0.6 * grey + (striped ? 86 : 62);
        continue;
      }
      const cell = map.offset + Math.floor((y / photo.h) * map.h) * map.w + Math.floor((x / photo.w) * map.w);
      if (map.heat[cell] === 255) {
        for (let ch = 0; ch < 3; ch++) out[k + ch] = striped ? [196, 70, 140][ch] : 0.5 * grey + 110;
        continue;
      }
      const t = warm[k / 4] * strength,
        keep = Math.min(1, 2 * t),
        c = 3 * Math.floor(t * 255);
      const a = state.opacity * t ** 0.8;
      for (let ch = 0; ch < 3; ch++) {
        const value = from[k + ch];
        let base = cold + (value - cold) * keep;
        base = value + (base - value) * mix;
        out[k + ch] = base + (HEAT[c + ch] - base) * a;
      }
    }
  return picture;
}
function drawOverlay(canvas, photo, map, strength = 1) {
  canvas.width = photo.w;
  canvas.height = photo.h;
  canvas.getContext("2d").putImageData(overlayOf(photo, map, strength), 0, 0);
}
function mapOf(run, probe, image, form = state.form) {
  const heat = heatOf(run, probe, form);
  return heat && { heat, offset: image * probe.maps.h * probe.maps.w, h: probe.maps.h, w: probe.maps.w };
}
const figures = new Map();
function drawPhotos() {
  for (const run of runs) {
    const probe = probeAt(run),
      place = figures.get(run);
    if (!probe) continue;
    const photos = run.photos[probe.segment] || [];
    if (place.segment !== probe.segment) {
      place.segment = probe.segment;
      place.items = photos.map(() => ({ canvas: el("canvas", { role: "img" }), caption: el("figcaption") }));
      place.box.classList.toggle("few", photos.length < 5);
      place.box.replaceChildren(...place.items.map(({ canvas, caption }) => el("figure", {}, canvas, caption)));
      if (!photos.length) place.box.replaceChildren(el("div", { class: "empty" }, "No photographs were recorded."));
    }
    place.note.textContent = photoNote(run, probe);
    place.items.forEach(({ canvas, caption }, k) => {
      drawOverlay(canvas, photos[k], mapOf(run, probe, k));
      caption.replaceChildren(...captionOf(run, probe, k));
      canvas.setAttribute("aria-label", `Image ${k + 1}, ${caption.textContent}`);
    });
  }
}
function photoNote(run, probe) {
  if (probe.failed) return `The probe at step ${probe.step} failed${probe.failure ? ": " + probe.failure : "."}`;
  if (!probe.maps) return "No heatmaps were recorded at this step.";
  return heatOf(run, probe)
    ? ""
    : `No map of the form “${FORMS[state.form] ?? state.form}” was recorded at this step.`;
}
function captionOf(run, probe, k) {
  const labels = run.labels[probe.segment],
    label = labels ? labels[k] : null,
    parts = [];
  const guess = probe.predictions ? probe.predictions[k] : undefined,
    chance = probe.probabilities?.[k] ?? null;
  if (label !== null && label !== undefined) parts.push(el("span", { class: "name" }, className(run, label)));
  if (guess !== undefined && guess !== null) {
    const right = label === null || label === guess;
    const said = label === null ? className(run, guess) : right ? " ✓" : " ✗ " + className(run, guess);
    const score = probe.scores?.[k] ?? null;
    const percent = chance !== null ? ` ${Math.round(chance * 100)} %` : score !== null ? ` score ${score}` : "";
    parts.push(el("span", { class: right ? "soft" : "wrong" }, said + percent));
  }
  const rho = probe.correlation?.[k] ?? null,
    overlap = probe.overlap?.[k] ?? null;
  if (rho !== null && state.form === run.forms[0]) {
    const top = overlap === null ? "" : ` · top ${overlap.toFixed(2)}`;
    parts.push(el("span", { class: "soft" }, el("br"), `vs first ${rho.toFixed(2)}` + top));
  }
  return parts;
}
function buildPhotos() {
  for (const run of runs) {
    const box = el("div", { class: "photos" }),
      note = el("div", { class: "small soft", style: "min-height:0" });
    figures.set(run, { box, note, items: [], segment: null });
    $("photos").append(several ? el("div", { class: "runname" }, run.name) : "", note, box);
    if (several && run !== runs[runs.length - 1]) box.style.marginBottom = "16px";
  }
  const forms = [...new Set(runs.flatMap((run) => run.forms))];
  state.form = forms[0] ?? null;
  $("form").append(...forms.map((form) => el("option", { value: form }, FORMS[form] ?? form)));
  $("form").addEventListener("change", (e) => {
    state.form = e.target.value;
    drawPhotos();
    drawMoments();
  });
  for (const node of [$("form"), document.querySelector("label[for=form]")]) node.hidden = forms.length < 2;
}
