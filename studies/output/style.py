"""How a page looks, in the light, in the dark, on paper and on a narrow screen. Text only; imports nothing."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6168; --page: #fbfbfa; --card: #ffffff; --line: #dcdfe3;
  --accent: #0b5fa5; --mark: #f1f4f7; --edge: #d9731a; --shade: #8a93a0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7e9; --soft: #a2a9b1; --page: #15171a; --card: #1b1e22;
  --line: #353a40; --accent: #7db8ec; --mark: #1f2328; --edge: #f0a35e; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: break-word; }
main, header, footer { max-width: 74rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 2.2rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 3rem 0 .8rem; padding-top: 1rem; border-top: 1px solid var(--line);
  }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p, ul, ol, dl, blockquote { max-width: 46rem; }
.said { columns: 2 30rem; column-gap: 2.5rem; }
.said > * { break-inside: avoid; }
.said > :first-child { margin-top: 0; }
p { margin: .6rem 0; overflow-wrap: anywhere; }
li { margin: .3rem 0; overflow-wrap: anywhere; }
a { color: var(--accent); }
main:focus { outline: none; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
.skip { position: absolute; left: -100vw; padding: .5rem 1rem; background: var(--card); color: var(--accent); }
.skip:focus { left: .5rem; top: .5rem; z-index: 10; }
.question { font-size: 1.15rem; font-weight: 600; }
.lead { font-size: 1.08rem; color: var(--soft); }
nav { margin: 1.2rem 0 0; padding: .8rem 1.2rem; background: var(--mark); border-radius: 8px; }
nav ol { columns: 2 22rem; max-width: none; margin: 0; padding-left: 1.3rem; }
nav li { margin: 0; padding: .15rem 0; break-inside: avoid; }
.short { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 2.5rem;
  align-items: start; }
.summary { font-size: 1.08rem; }
.topic { display: grid; grid-template-columns: 11rem minmax(0, 46rem); gap: 0 1.2rem; border-top: 1px solid
  var(--line);
  padding: .5rem 0; }
.topic:first-of-type { border-top: 0; }
.topic h3 { margin: .3rem 0; } .topic ul { margin: 0; padding-left: 1.1rem; }
.not { border-left: 4px solid var(--edge); padding: .2rem 0 .2rem 1rem; margin: .6rem 0; }
.not h3 { margin-top: .2rem; } .not ul { padding-left: 1.2rem; }
figure { display: flex; flex-wrap: wrap; align-items: flex-start; gap: .5rem 1.5rem; margin: 1.4rem 0 2rem; }
.plots { display: flex; flex-wrap: wrap; flex: 0 1 auto; max-width: 100%; gap: 4px 12px; background: #ffffff;
  border: 1px solid var(--line); border-radius: 8px; padding: 10px; overflow-x: auto; color: #1c1e21;
  color-scheme: light; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.plots.dark { background: #1b1d20; color: #e6e7e9; color-scheme: dark; }
.plots:has(> :nth-child(4):last-child) { max-width: min(100%, 50rem); }
.plots > div { flex: 0 0 auto; }
.plots > div.wide { flex: 0 1 auto; min-width: 0; }
.frames label { display: flex; gap: .6rem; align-items: center; font-size: .93rem; padding: 0 0 .4rem; }
.frames input { flex: 1 1 8rem; max-width: 20rem; } .frames output { min-width: 4rem; }
figcaption { flex: 1 1 15rem; color: var(--soft); font-size: .93rem; max-width: 46rem; }
.beside { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 0 2rem; }
.beside > * { max-width: 100%; } .beside figure { flex-direction: column; }
.beside figcaption { flex: none; width: 0; min-width: 100%; }
.beside .note { width: 0; min-width: 100%; } .beside .note:first-child { margin-top: 1.4rem; }
.scroll { width: fit-content; max-width: 100%; border: 1px solid var(--line); margin: 1rem 0; }
.scroll, pre { --base: var(--page); overflow-x: auto; border-radius: 8px; background-color: var(--base);
  background-image: linear-gradient(90deg, var(--base) 50%, transparent), linear-gradient(270deg, var(--base) 50%,
  transparent), linear-gradient(90deg, var(--shade), transparent), linear-gradient(270deg, var(--shade), transparent);
  background-position: left -2px top, right -2px top, left top, right top; background-repeat: no-repeat;
  background-size: 2.4rem 100%, 2.4rem 100%, 1rem 100%, 1rem 100%;
  background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; font-size: .92rem; width: 100%; font-variant-numeric: tabular-nums; }
.note { color: var(--soft); font-size: .93rem; margin: 1.2rem 0 .4rem; }
.note + .scroll { margin-top: 0; }
.scroll + .note { margin-top: -.6rem; }
th, td { text-align: left; padding: .35rem .7rem; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; border-bottom: 2px solid var(--line); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; }
td, th, .arrow { white-space: nowrap; }
td.n, th.n { text-align: right; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
pre { --base: var(--mark); padding: .8rem 1rem; font-size: .88rem; line-height: 1.5; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--accent); }
footer { color: var(--soft); font-size: .9rem; padding: 1rem 1rem 3rem; margin-top: 3rem; border-top: 1px solid
  var(--line); }
@media (max-width: 600px) { .topic { display: block; } h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; } nav {
  padding: .6rem .8rem; }
  .plots { padding: 6px; } tbody th { white-space: normal; min-width: 6rem; } }
@page { margin: 12mm 10mm; }
@media print {
  body { font-size: 10.5pt; background: none; }
  main, header, footer { max-width: none; padding-left: 0; padding-right: 0; }
  nav, .skip, noscript { display: none; }
  h2 { margin-top: 1.6rem; } h2, h3, .note { break-after: avoid; }
  figure { display: block; } .said { columns: auto; } .short { display: block; }
  figure, tr, .not, .topic { break-inside: avoid; }
  .plots { overflow: visible; border: 0; padding: 0; zoom: .65; max-width: none; }
  .plots > div { break-inside: avoid; }
  .scroll { overflow: visible; width: auto; border: 0; } .scroll, pre { background-image: none; }
  thead { display: table-header-group; }
  td, th { white-space: normal; padding: .2rem .45rem; }
  table { font-size: 8.5pt; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); }
  details > summary { color: inherit; list-style: none; font-weight: 600; }
  details::details-content { content-visibility: visible; block-size: auto; display: block; }
  a { color: inherit; text-decoration: none; }
}
"""

SCRIPT = """
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)"), kept = new Map();
  const names = ["line_color", "fill_color", "text_color", "background_fill_color", "border_fill_color", "nan_color",
    "axis_line_color", "major_tick_line_color", "minor_tick_line_color", "axis_label_text_color", "outline_line_color",
    "major_label_text_color", "grid_line_color", "title_text_color", "label_text_color", "group_text_color",
    "border_line_color", "bar_line_color", "hatch_color"];
  const turned = colour => {
    const hex = typeof colour == "string" && /^#?(white|black|[0-9a-f]{6})$/i.exec(colour);
    if (!hex) return colour;
    const text = {white: "ffffff", black: "000000"}[hex[1].toLowerCase()] || hex[1];
    const [r, g, b] = [0, 2, 4].map(at => parseInt(text.slice(at, at + 2), 16));
    if (Math.max(r, g, b) - Math.min(r, g, b) > 24) return colour;
    const grey = Math.round(27 + (255 - (r + g + b) / 3) * 203 / 255);
    return "#" + [grey, Math.min(255, grey + 2), Math.min(255, grey + 5)].map(
      one => one.toString(16).padStart(2, "0")).join("");
  };
  const wipe = node => {
    if (node.tagName == "CANVAS") node.width = node.width;
    for (const child of [...(node.shadowRoot ? node.shadowRoot.children : []), ...node.children]) wipe(child);
  };
  let shown = false;
  const paint = () => {
    if (dark.matches == shown) return;
    shown = dark.matches;
    for (const plots of document.querySelectorAll(".plots")) {
      plots.classList.toggle("dark", shown);
      wipe(plots);
    }
    for (const doc of Bokeh.documents) {
      const mappers = new Set(), inside = new Set();
      for (const {renderers} of [...doc._all_models.values()].filter(one => one.type == "Figure")) {
        const cells = renderers.some(({glyph}) => glyph && ["Quad", "Rect"].includes(glyph.type) &&
          glyph.fill_color && glyph.fill_color.field);
        for (const one of cells ? renderers : [])
          for (const kind of ["glyph", "selection_glyph", "nonselection_glyph", "muted_glyph", "hover_glyph"])
            if (one[kind] && one[kind].type == "Text") inside.add(one[kind]);
      }
      for (const model of doc._all_models.values()) {
        if (["MultiLine", "Segment"].includes(model.type) && model.line_color && model.line_color.transform)
          mappers.add(model.line_color.transform);
        for (const name of names) {
          if (!(name in model.properties) || inside.has(model)) continue;
          const key = model.id + name, now = model[name];
          if (!kept.has(key)) kept.set(key, now);
          const was = kept.get(key), colour = was && was.value !== undefined ? was.value : was;
          if (typeof colour != "string") continue;
          const next = shown ? turned(colour) : colour;
          if (next === colour && now === was) continue;
          model[name] = colour === was ? next : {...was, value: next};
        }
      }
      for (const mapper of mappers) mapper.palette = [...mapper.palette].reverse();
    }
  };
  const sizes = new Map();
  const fit = () => {
    for (const root of Bokeh.documents.flatMap(doc => doc.roots())) {
      const place = root.frame_width && document.querySelector(`[data-root-id="${root.id}"]`);
      const plots = place && place.closest(".plots"), drawn = place && place.firstElementChild;
      if (!plots || !drawn || !drawn.offsetWidth) continue;
      if (!sizes.has(root))
        sizes.set(root, [root.frame_width, root.frame_height, drawn.offsetWidth - root.frame_width]);
      const [width, height, around] = sizes.get(root), {paddingLeft, borderLeftWidth} = getComputedStyle(plots);
      const room = plots.parentElement.clientWidth - 2 * (parseFloat(paddingLeft) + parseFloat(borderLeftWidth));
      const now = Math.min(width, Math.max(Math.ceil(0.7 * width), Math.floor(room - around) - 2));
      if (now == root.frame_width) continue;
      root.frame_width = now;
      root.frame_height = Math.round(height * now / width);
      if (root.title) root.title.text_font_size = `${Math.round(13 * now / width)}px`;
    }
  };
  const when = (holds, act) => window.Bokeh && holds() ? act() : setTimeout(() => when(holds, act), 20);
  for (const frames of document.querySelectorAll(".frames")) {
    const slider = frames.querySelector("input"), every = [...frames.querySelectorAll(".frame")];
    slider.addEventListener("input", () => {
      every.forEach((frame, at) => { frame.hidden = at != slider.value; });
      frames.querySelector("output").textContent = every[slider.value].dataset.at;
      dispatchEvent(new Event("resize"));
    });
  }
  const started = () => {
    when(() => Bokeh.documents.length, paint);
    when(() => Bokeh.documents.length && Bokeh.documents.every(one => one.is_idle), fit);
    dark.addEventListener("change", paint);
    addEventListener("resize", fit);
  };
  document.readyState == "complete" ? started() : addEventListener("load", started);
})();
"""
"""Redraws the figures for a dark page: greys change their lightness, colours that mean something stay, as does
text on coloured cells, and coloured lines are brighter where there is more instead of darker. A figure whose frame is
fixed and wider than the page is drawn smaller, down to 0.7 of its size; beyond that its box scrolls. A slider shows one
of several figures."""

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
THEME = {
    "attrs": {
        "Axis": {
            "axis_label_text_font": FONT,
            "axis_label_text_font_size": "12px",
            "axis_label_text_font_style": "normal",
            "axis_line_color": "#8a8a8a",
            "major_label_text_font": FONT,
            "major_label_text_font_size": "12px",
            "major_tick_line_color": "#8a8a8a",
            "minor_tick_line_color": None,
        },
        "ColorBar": {
            "title_text_font": FONT,
            "title_text_font_size": "12px",
            "major_label_text_font": FONT,
            "major_label_text_font_size": "11px",
        },
        "Legend": {"label_text_font": FONT},
        "Title": {"text_font": FONT, "text_font_size": "13px"},
        "Toolbar": {"logo": None, "autohide": True},
    }
}
