"""The page in which a browser draws figures as PNG or SVG and sends them back to where the page came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...output.page import embedded

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'"
)
GAP = 12
"""Pixels between the panels of a layout."""

DRAW = """
const ids = %(ids)s, columns = %(columns)d, gap = %(gap)d, kind = "%(kind)s"
const send = (body, type) => fetch(location.pathname, {method: "POST", body, headers: {"Content-Type": type}})
const fail = error => send(String(error && error.stack || error), "text/plain")
addEventListener("error", event => fail(event.message))
addEventListener("unhandledrejection", event => fail(event.reason))
function placed() {
  const views = new Map([...Bokeh.index].map(view => [view.model.id, view]))
  const parts = ids.map(id => views.get(id)).map(view => ({view, width: view.bbox.width, height: view.bbox.height}))
  let y = 0, width = 0
  for (let row = 0; row < parts.length; row += columns) {
    let x = 0, height = 0
    for (const part of parts.slice(row, row + columns)) {
      Object.assign(part, {x, y})
      x += part.width + gap
      height = Math.max(height, part.height)
    }
    width = Math.max(width, x - gap)
    y += height + gap
  }
  return {parts, width, height: y - gap}
}
async function ramps(text) {
  const page = new DOMParser().parseFromString(text, "image/svg+xml")
  for (const [number, image] of [...page.querySelectorAll("image")].entries()) {
    const picture = new Image(), canvas = document.createElement("canvas")
    picture.src = image.getAttribute("href") || image.getAttribute("xlink:href")
    await picture.decode()
    Object.assign(canvas, {width: picture.width, height: picture.height})
    const ink = canvas.getContext("2d")
    ink.drawImage(picture, 0, 0)
    const wide = canvas.width > canvas.height, last = Math.max(canvas.width, canvas.height) - 1
    const colour = (along, across) => [...ink.getImageData(wide ? along : across, wide ? across : along, 1, 1).data]
    const even = [0, last >> 2, last >> 1, last].every(at => `${colour(at, 0)}` == `${colour(at, 1)}`)
    if (last < 9 || !even) continue
    const stops = [...Array(33).keys()].map(stop => {
      const [red, green, blue] = colour(Math.round(stop / 32 * last), 0)
      return `<stop offset="${stop / 32}" stop-color="rgb(${red},${green},${blue})"/>`
    })
    const end = wide ? 'x2="1" y2="0"' : 'x2="0" y2="1"'
    const name = `ramp${number}`, kept = ["width", "height", "transform", "x", "y"]
      .filter(key => image.hasAttribute(key)).map(key => `${key}="${image.getAttribute(key)}"`).join(" ")
    const drawn = new DOMParser().parseFromString(`<g xmlns="http://www.w3.org/2000/svg"><defs><linearGradient ` +
      `id="${name}" x1="0" y1="0" ${end}>${stops.join("")}</linearGradient></defs>` +
      `<rect ${kept} fill="url(#${name})"/></g>`, "image/svg+xml")
    image.replaceWith(page.importNode(drawn.documentElement, true))
  }
  return new XMLSerializer().serializeToString(page)
}
function svg({parts, width, height}) {
  const inner = parts.map(({view, x, y}) =>
    `<g transform="translate(${x},${y})">${view.export("svg", false).ctx.get_serialized_svg(true)}</g>`)
  return `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="${width}" ` +
    `height="${height}" viewBox="0 0 ${width} ${height}"><rect width="100%%" height="100%%" fill="#ffffff"/>` +
    inner.join("") + "</svg>"
}
function png({parts, width, height}) {
  const scale = devicePixelRatio, canvas = document.createElement("canvas")
  Object.assign(canvas, {width: Math.ceil(width * scale), height: Math.ceil(height * scale)})
  const ink = canvas.getContext("2d")
  ink.fillStyle = "#ffffff"
  ink.fillRect(0, 0, canvas.width, canvas.height)
  for (const {view, x, y} of parts) ink.drawImage(view.export("png", true).canvas, x * scale, y * scale)
  return new Promise(done => canvas.toBlob(done, "image/png"))
}
async function draw() {
  try {
    await document.fonts.ready
    const places = placed()
    if (!(places.width > 0 && places.height > 0)) throw new Error("the figure has no size")
    if (kind == "svg") await send(await ramps(svg(places)), "image/svg+xml")
    else await send(await png(places), "image/png")
  } catch (error) { fail(error) }
}
const ready = () => Bokeh.documents.length && Bokeh.documents.every(one => one.is_idle)
const wait = () => ready() ? requestAnimationFrame(() => setTimeout(draw, 0)) : setTimeout(wait, 20)
wait()
"""


def drawing(models: Mapping[str, Any], columns: int, kind: str) -> bytes:
    """The page that draws Bokeh figures, `columns` to a row, as one ``"png"`` or ``"svg"``, and posts it."""
    ids = json.dumps([model.id for model in models.values()])
    script = DRAW % {"ids": ids, "columns": columns, "gap": GAP, "kind": kind}
    inlined, start, divs = embedded(models)
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{POLICY}"><link rel="icon" href="data:,"><style>html {{ background: #fff; color-scheme: light }} '
        f"body > div {{ width: max-content }}</style>{inlined}</head><body>{''.join(divs.values())}\n{start}\n"
        f"<script>{script}</script></body></html>"
    )
    return page.encode()
