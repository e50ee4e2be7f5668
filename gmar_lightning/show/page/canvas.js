function fitted(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = height + "px";
  if (!canvas.classList.contains("wide")) canvas.style.width = width + "px";
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  pen.textBaseline = "middle";
  return pen;
}
function heatColour(unit) {
  const k = 3 * Math.max(0, Math.min(255, Math.floor(unit * 255)));
  return `rgb(${HEAT[k]},${HEAT[k + 1]},${HEAT[k + 2]})`;
}
function differenceColour(value) {
  const t = Math.max(-1, Math.min(1, value / 2)),
    dark = document.documentElement.dataset.theme === "dark";
  const middle = dark ? [44, 51, 61] : [238, 240, 244],
    end = t < 0 ? (dark ? [96, 176, 255] : [16, 84, 168]) : dark ? [255, 163, 84] : [190, 84, 8];
  return `rgb(${middle.map((m, c) => Math.round(m + (end[c] - m) * Math.abs(t) ** 0.8)).join(",")})`;
}
function bar(canvas, colour) {
  const pen = fitted(canvas, 120, 10);
  for (let x = 0; x < 120; x++) {
    pen.fillStyle = colour(x / 119);
    pen.fillRect(x, 0, 1.5, 10);
  }
}
function hatch(pen, x, y, w, h) {
  pen.fillStyle = css("--missing");
  pen.fillRect(x, y, w, h);
  pen.save();
  pen.beginPath();
  pen.rect(x, y, w, h);
  pen.clip();
  pen.strokeStyle = css("--stripe");
  pen.lineWidth = 1;
  pen.beginPath();
  for (let d = -h; d < w; d += 6) {
    pen.moveTo(x + d, y + h);
    pen.lineTo(x + d + h, y);
  }
  pen.stroke();
  pen.restore();
}
const LEFT = 44,
  RIGHT = 12;
function scaleX(width) {
  const low = steps[0],
    span = Math.max(1, steps[steps.length - 1] - low);
  return (step) => LEFT + ((step - low) / span) * (width - LEFT - RIGHT);
}
function jumpOnClick(canvas) {
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect(),
      low = steps[0],
      span = Math.max(1, steps[steps.length - 1] - low);
    go(nearest(low + ((event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT)) * span));
  });
}
