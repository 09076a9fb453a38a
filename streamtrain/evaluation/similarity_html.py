"""A web page that shows the similarity of a clicked patch to all others: one file, for a browser without a network."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from shards.errors import printable
from streamtrain.evaluation.figures import COLOURS
from streamtrain.evaluation.maps import similarity_maps
from streamtrain.evaluation.matching import Matches
from streamtrain.evaluation.pages import position_colours

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e26; --soft: #646874; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ee; --soft: #9aa0ae; --paper: #14161b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 32px 24px 64px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; line-height: 1.25; margin: 0; } p { margin: 8px 0 0; color: var(--soft); font-size: 14px; }
form { display: flex; flex-wrap: wrap; gap: 8px 24px; align-items: center; margin: 20px 0; font-size: 14px; }
label { display: flex; gap: 8px; align-items: center; } .scale { display: flex; gap: 8px; align-items: center; }
#bar { width: 160px; height: 12px; border-radius: 3px; image-rendering: auto; }
#images { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; } figcaption { color: var(--soft); font-size: 14px; margin-top: 6px; }
canvas.image { display: block; width: 100%; height: auto; border-radius: 6px; cursor: crosshair;
  touch-action: manipulation; }
canvas.image:focus-visible { outline: 3px solid #0072b2; outline-offset: 2px; }
@media (max-width: 560px) { body { padding: 20px 16px 48px; } }
"""

# the page's data are JSON with base64, so nothing of them is parsed as HTML or as a program
_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const images = data.images.map((image) => {
  const values = new Int8Array(bytes(image.features).buffer), features = new Float32Array(values.length);
  for (let start = 0; start < values.length; start += data.dim) {
    let sum = 0;
    for (let i = start; i < start + data.dim; i++) sum += values[i] * values[i];
    for (let i = start; i < start + data.dim; i++) features[i] = values[i] / Math.sqrt(sum || 1);
  }
  const figure = document.createElement("figure"), canvas = document.createElement("canvas");
  const caption = document.createElement("figcaption"), picture = new Image();
  canvas.className = "image"; canvas.tabIndex = 0; canvas.setAttribute("role", "img");
  caption.textContent = image.name;
  figure.append(canvas, caption);
  document.getElementById("images").append(figure);
  picture.src = "data:image/jpeg;base64," + image.picture;
  return {...image, features, canvas, picture};
});
let chosen = {image: 0, row: data.patch[0], column: data.patch[1]};
const opacity = document.getElementById("opacity"), dots = document.getElementById("dots");
const radius = (canvas) => Math.max(5, Math.min(canvas.width, canvas.height) / 60);

function similarities(image) {
  const query = images[chosen.image], start = (chosen.row * query.columns + chosen.column) * data.dim;
  const found = new Float32Array(image.rows * image.columns);
  for (let patch = 0; patch < found.length; patch++) {
    let sum = 0;
    for (let i = 0; i < data.dim; i++) sum += query.features[start + i] * image.features[patch * data.dim + i];
    found[patch] = sum;
  }
  return found;
}

function draw() {
  const maps = images.map(similarities);
  const low = Math.min(...maps.map((map) => map.reduce((a, b) => Math.min(a, b), 1)), 0.99);
  images.forEach((image, index) => {
    const {canvas, picture, rows, columns} = image, map = maps[index];
    canvas.width = picture.naturalWidth; canvas.height = picture.naturalHeight;
    const context = canvas.getContext("2d"), heat = new ImageData(columns, rows);
    let best = 0;
    map.forEach((value, patch) => {
      const level = Math.max(0, Math.min(255, Math.round(255 * (value - low) / (1 - low))));
      heat.data.set([...data.colours[level], 255], 4 * patch);
      if (value > map[best]) best = patch;
    });
    const small = document.createElement("canvas");
    small.width = columns; small.height = rows;
    small.getContext("2d").putImageData(heat, 0, 0);
    context.drawImage(picture, 0, 0);
    context.globalAlpha = opacity.value / 100;
    context.imageSmoothingEnabled = document.getElementById("smooth").checked;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
    const width = canvas.width / columns, height = canvas.height / rows;
    const frame = (row, column, colour) => {
      for (const [line, paint] of [[5, "#000"], [3, colour]]) {
        context.lineWidth = line; context.strokeStyle = paint;
        context.strokeRect(column * width, row * height, width, height);
      }
    };
    if (dots && dots.checked) for (const [cells, colour] of data.matches) {
      context.beginPath();
      context.arc((cells[index][1] + 0.5) * width, (cells[index][0] + 0.5) * height, radius(canvas), 0, 7);
      context.fillStyle = colour; context.fill();
      context.lineWidth = 2; context.strokeStyle = "#000"; context.stroke();
    }
    const isChosen = index === chosen.image;
    if (isChosen) frame(chosen.row, chosen.column, "#ff4040");
    else frame(Math.floor(best / columns), best % columns, "#ffffff");
    const text = isChosen ? `patch ${chosen.row},${chosen.column}`
      : `most similar: patch ${Math.floor(best / columns)},${best % columns}, ${map[best].toFixed(2)}`;
    canvas.setAttribute("aria-label", `${image.name}, ${text}`);
    canvas.nextElementSibling.textContent = `${image.name} · ${text}`;
  });
  document.getElementById("low").textContent = low.toFixed(2);
}

function choose(image, row, column) {
  const inside = (value, count) => Math.max(0, Math.min(count - 1, value));
  chosen = {image, row: inside(row, images[image].rows), column: inside(column, images[image].columns)};
  draw();
}

images.forEach((image, index) => {
  image.canvas.addEventListener("click", (event) => {
    const box = image.canvas.getBoundingClientRect();
    choose(index, Math.floor((event.clientY - box.top) / box.height * image.rows),
      Math.floor((event.clientX - box.left) / box.width * image.columns));
  });
  image.canvas.addEventListener("keydown", (event) => {
    const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    if (!move) return;
    event.preventDefault();
    if (chosen.image === index) choose(index, chosen.row + move[0], chosen.column + move[1]);
    else choose(index, Math.floor(image.rows / 2), Math.floor(image.columns / 2));
  });
});
for (const name of ["opacity", "smooth", "dots"]) document.getElementById(name)?.addEventListener("input", draw);
const bar = document.getElementById("bar");
bar.width = 256; bar.height = 1;
const scale = new ImageData(256, 1);
data.colours.forEach((colour, level) => scale.data.set([...colour, 255], 4 * level));
bar.getContext("2d").putImageData(scale, 0, 0);
Promise.all(images.map((image) => image.picture.decode())).then(draw);
"""


def similarity_html(
    images: Sequence[Image.Image], names: Sequence[str], features: Sequence[Tensor], patch: tuple[int, int],
    subtitle: str, smooth: bool = False, matches: Matches | None = None,
) -> bytes:  # fmt: skip
    """Return the page as UTF-8.

    Features are stored with 8 bits per value, which changes a similarity by about 0.01 at most.

    Args:
        images: as shown.
        features: normalised patch features, fp32 [h_i, w_i, D] for each image.
        patch: (row, column) in the first image that is chosen at first.
        smooth: interpolate between patches at first.
        matches: of two images, marked by dots whose colours agree.

    Raises:
        StreamtrainError: if the patch is outside the first image.
    """
    similarity_maps(features[:1], patch)  # checks the patch
    entries: list[dict[str, Any]] = []
    for image, name, feature in zip(images, names, features, strict=True):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        rows, columns, _ = feature.shape
        scaled = feature / feature.abs().amax(-1, keepdim=True).clamp_min(1e-12) * 127
        entries.append(
            {
                "name": printable(name), "rows": rows, "columns": columns,
                "picture": base64.b64encode(buffer.getvalue()).decode(),
                "features": base64.b64encode(scaled.round().numpy().astype(np.int8).tobytes()).decode(),
            }
        )  # fmt: skip
    colours = np.rint(matplotlib.colormaps[COLOURS](np.arange(256))[:, :3] * 255).astype(int).tolist()
    content: dict[str, Any] = {"dim": features[0].shape[-1], "colours": colours, "patch": patch, "images": entries}
    if matches is not None:
        colours_of = position_colours(matches.first, (entries[0]["rows"], entries[0]["columns"]))
        content["matches"] = [
            [[first.tolist(), second.tolist()], to_hex(colour)]
            for first, second, colour in zip(matches.first, matches.second, colours_of, strict=True)
        ]
    data = json.dumps(content).replace("<", "\\u003c")
    title = "Cosine similarity to a patch" if matches is None else "Mutual nearest patches"
    hint = "" if matches is None else " Dots of the same colour mark a match."
    dots = "" if matches is None else '<label><input id="dots" type="checkbox" checked> Matches</label>\n'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{_STYLE}</style></head>
<body>
<h1>{title}</h1>
<p>Click a patch, or move it with the arrow keys.{hint} {html.escape(printable(subtitle))}</p>
<form>
<label>Map <input id="opacity" type="range" min="0" max="100" value="70" aria-label="opacity of the map"></label>
<label><input id="smooth" type="checkbox"{" checked" if smooth else ""}> Smooth</label>
{dots}<span class="scale"><span id="low"></span><canvas id="bar"></canvas><span>1.00</span></span>
</form>
<div id="images"></div>
<script id="data" type="application/json">{data}</script>
<script>{_SCRIPT}</script>
</body></html>
""".encode()
