"""The frame of the report page: style, script, and a policy that lets the browser load and run nothing else."""

import base64
import hashlib
import html

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #16191d; --soft: #5a6270; --line: #dfe3e8; --grid: #e9ecf0; --fill: #f0f2f5;
  --series-0: #0068a8; --series-1: #d55e00; --series-2: #00866a; --series-3: #b4508c; --series-4: #b07800;
  --series-5: #3a9bd6; --good: #00704f; --warn: #a34a00; --bad: #b3261e;
  --text: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif;
  --code: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #101317; --card: #181c22; --ink: #e8ebef; --soft: #9aa4b2; --line: #2b313a; --grid: #252b33;
    --fill: #20262e; --series-0: #56aef0; --series-1: #ff9152; --series-2: #35cfa3; --series-3: #e89bc8;
    --series-4: #f0b93c; --series-5: #9fd4f7; --good: #4fd1a5; --warn: #ffa366; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.5rem; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 var(--text);
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; overflow-wrap: break-word; }
header, main { max-width: 1140px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 44px; }
.eyebrow { margin: 0 0 6px; color: var(--soft); font-size: 13px; letter-spacing: .02em; }
h1 { margin: 0; font-size: 34px; line-height: 1.15; letter-spacing: -.02em; overflow-wrap: anywhere; }
header .purpose { margin: 10px 0 0; max-width: 46em; font-size: 17px; color: var(--soft); }
.state { margin: 18px 0 0; display: flex; flex-wrap: wrap; gap: 8px 22px; align-items: center; color: var(--soft);
  font-size: 14px; }
.state b { padding: 3px 11px; border-radius: 99px; font-weight: 600; color: var(--ink); background: var(--fill);
  border: 1px solid var(--line); }
.state b.good { color: var(--good); } .state b.warn { color: var(--warn); } .state b.bad { color: var(--bad); }
nav { position: sticky; top: 0; z-index: 3; margin-top: 26px; border-bottom: 1px solid var(--line);
  background: var(--paper); }
nav div { max-width: 1140px; margin: 0 auto; padding: 0 24px; display: flex; gap: 24px; overflow-x: auto;
  scrollbar-width: none; }
nav a { padding: 11px 0; color: var(--soft); text-decoration: none; font-size: 14px; white-space: nowrap; }
nav a:hover, nav a:focus-visible { color: var(--ink); box-shadow: inset 0 -2px 0 var(--series-0); }
main { padding-bottom: 64px; }
section { margin-top: 40px; }
h2 { margin: 0 0 14px; font-size: 20px; letter-spacing: -.01em; }
h3 { margin: 0; font-size: 15px; font-weight: 600; }
.unit { margin-left: 4px; font-weight: 400; font-size: 13px; color: var(--soft); }
.note { color: var(--soft); font-size: 13.5px; margin: 12px 0 0; max-width: 80em; }
.note code { font-size: 12.5px; }
code, pre { font-family: var(--code); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); margin: 0;
  overflow: hidden; border: 1px solid var(--line); border-radius: 12px; background: var(--card); }
.facts div { margin: 0 -1px -1px 0; padding: 16px 18px; border: solid var(--line); border-width: 0 1px 1px 0; }
.facts dt { color: var(--soft); font-size: 13px; }
.facts dd { margin: 2px 0 0; font-size: 26px; line-height: 1.2; font-weight: 600; letter-spacing: -.015em; }
.facts dd small { font-size: 15px; font-weight: 500; letter-spacing: 0; }
.facts dd + dd { font-size: 13px; font-weight: 400; letter-spacing: 0; line-height: 1.4; margin-top: 3px;
  color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
.chart { margin: 0; padding: 16px 18px 10px; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; min-width: 0; break-inside: avoid; }
.chart:first-child, .chart:last-child:nth-child(even) { grid-column: 1 / -1; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center; margin-bottom: 12px; }
.chart ul { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0; padding: 0; list-style: none; font-size: 13px;
  color: var(--soft); }
.chart li { display: flex; align-items: center; gap: 7px; overflow-wrap: anywhere; }
.chart li i { flex: none; width: 18px; border-top: 2.5px solid var(--c); border-radius: 2px; }
.chart li i.faint { border-top-width: 5px; opacity: .35; }
.chart li i.dotted, .chart li i.saved { width: 9px; height: 9px; border: 0; border-radius: 50%; background: var(--c); }
.chart li i.saved { --c: var(--soft); width: 7px; height: 7px; }
.chart li i.resumed { height: 2px; border: 0;
  background: repeating-linear-gradient(90deg, var(--soft) 0 4px, transparent 4px 7px); }
.chart > p { color: var(--soft); margin: 24px 0; }
.toggle { margin-left: auto; padding: 1px 10px; border: 1px solid var(--line); border-radius: 99px; font-size: 13px;
  color: var(--soft); cursor: pointer; user-select: none; }
.use-log { position: absolute; opacity: 0; }
.use-log:checked ~ figcaption .toggle { background: var(--series-0); color: var(--card); }
.use-log:focus-visible ~ figcaption .toggle { outline: 2px solid var(--series-0); outline-offset: 2px; }
.use-log:not(:checked) ~ .plot.log, .use-log:checked ~ .plot.linear { display: none; }
.plot { display: grid; grid-template-columns: 46px minmax(0, 1fr); font-size: 12px; color: var(--soft); }
.plot .y { position: relative; }
.plot .y span { position: absolute; right: 9px; transform: translateY(-50%); white-space: nowrap; }
.plot .area { position: relative; height: 210px; cursor: crosshair; touch-action: pan-y; }
.chart:first-child .area { height: 330px; }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke: var(--c); stroke-width: 2px;
  stroke-linejoin: round; stroke-linecap: round; }
.plot path.grid { stroke: var(--grid); stroke-width: 1px; }
.plot path.resumed { stroke: var(--soft); stroke-width: 1.3px; stroke-dasharray: 4 4; }
.plot path.saved { stroke: var(--soft); stroke-width: 7px; }
.plot path.faint { stroke-width: 1.4px; opacity: .38; }
.plot path.dotted { stroke-width: 1.6px; }
.plot path.dots { stroke-width: 7.5px; }
.plot .x { grid-column: 2; position: relative; height: 24px; margin-top: 7px; }
.plot .x span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.plot .x em { position: absolute; right: 0; top: 14px; font-style: normal; font-size: 11.5px; opacity: .85; }
.plot .x { height: 32px; }
.hair { position: absolute; top: 0; bottom: 0; border-left: 1px solid var(--soft); pointer-events: none; }
.dot { position: absolute; width: 9px; height: 9px; margin: -4.5px; border-radius: 50%; background: var(--c);
  box-shadow: 0 0 0 2px var(--card); pointer-events: none; }
.readout { position: absolute; z-index: 2; top: 6px; padding: 7px 11px; border-radius: 8px; background: var(--card);
  border: 1px solid var(--line); box-shadow: 0 4px 16px rgb(0 0 0 / .14); color: var(--ink); font-size: 12.5px;
  line-height: 1.55; white-space: nowrap; pointer-events: none; }
.readout b { display: block; font-weight: 600; }
.readout span { display: flex; gap: 7px; align-items: center; }
.readout i { width: 8px; height: 8px; border-radius: 50%; background: var(--c); }
.readout i.faint { opacity: .5; }
.readout u { margin-left: auto; padding-left: 14px; text-decoration: none; }
.c0 { --c: var(--series-0); } .c1 { --c: var(--series-1); } .c2 { --c: var(--series-2); }
.c3 { --c: var(--series-3); } .c4 { --c: var(--series-4); } .c5 { --c: var(--series-5); } .c6 { --c: var(--line); }
.panel { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px; }
.bar { display: flex; gap: 2px; height: 14px; border-radius: 7px; overflow: hidden; background: var(--fill); }
.bar i { background: var(--c); min-width: 1px; }
.shares { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 6px 30px; margin: 14px 0 0;
  padding: 0; list-style: none; font-size: 14px; }
.shares li { display: flex; align-items: baseline; gap: 8px; }
.shares i { flex: none; width: 9px; height: 9px; border-radius: 3px; background: var(--c); }
.shares b { margin-left: auto; font-weight: 500; }
.shares small { min-width: 4em; text-align: right; color: var(--soft); font-size: 13px; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 12px; break-inside: avoid-page; }
details + details { margin-top: 10px; }
summary { padding: 12px 18px; cursor: pointer; font-weight: 600; }
summary small { margin-left: 8px; color: var(--soft); font-weight: 400; font-size: 13px; }
summary:focus-visible { outline: 2px solid var(--series-0); border-radius: 12px; }
details > :not(summary) { margin: 0 18px 16px; }
details > .panel { border: 0; padding: 0; }
details > details { border-color: var(--grid); }
.text { padding: 12px 16px; border-radius: 8px; background: var(--fill); font: 13px/1.6 var(--code);
  white-space: pre-wrap; overflow-wrap: anywhere; }
.text b { color: var(--series-0); font-weight: 600; }
.text + .text { margin-top: 10px; }
.scroll { overflow: auto; max-height: 420px; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th, td { padding: 6px 22px 6px 0; border-bottom: 1px solid var(--grid); text-align: left; vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
thead th { position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 500; font-size: 13px;
  white-space: nowrap; box-shadow: inset 0 -1px 0 var(--line); border-bottom: 0; }
tbody th { font-weight: 500; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.time { white-space: nowrap; color: var(--soft); }
td { overflow-wrap: anywhere; }
.tree { columns: 2; column-gap: 40px; }
.tree details { border: 0; border-radius: 0; break-inside: avoid; padding-bottom: 14px; }
.tree details + details { margin-top: 0; }
.tree summary { padding: 6px 0; }
.tree details > table { margin: 0; }
.settings .unset { color: var(--soft); opacity: .75; }
.settings th { width: 42%; font: 13px/1.6 var(--code); font-weight: 400; color: var(--soft); overflow-wrap: anywhere; }
.settings td { font: 13px/1.6 var(--code); }
.compare :is(th, td) { padding-right: 15px; }
.compare tbody th { min-width: 11em; overflow-wrap: anywhere; }
.compare td { min-width: 4.5em; font-size: 13.5px; }
.compare td:nth-child(2) { min-width: 8em; }
.compare th i { display: inline-block; width: 10px; height: 10px; margin-right: 8px; border-radius: 50%;
  background: var(--c); }
footer { margin-top: 44px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--soft); font-size: 13px; }
@media screen and (max-width: 760px) {
  header, main, nav div { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 28px; }
  h1 { font-size: 27px; }
  .charts { grid-template-columns: minmax(0, 1fr); }
  .chart { padding: 14px 12px 8px; }
  .chart:first-child .area { height: 240px; }
  .tree { columns: 1; }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .facts div { padding: 13px 14px; }
  .facts dd { font-size: 21px; }
  .plot .x span:nth-of-type(even) { display: none; }
  th, td { padding-right: 14px; }
  tbody td.time { white-space: normal; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; --grid: #e5e5e5;
    --fill: #f5f5f5; --series-0: #0068a8; --series-1: #d55e00; --series-2: #00866a; --series-3: #b4508c;
    --series-4: #b07800; --series-5: #3a9bd6; --good: #00704f; --warn: #a34a00; --bad: #b3261e; }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  nav, .toggle { display: none; }
  header, main { max-width: none; padding-left: 0; padding-right: 0; }
  header { padding-top: 0; }
  section { margin-top: 22pt; }
  h2 { break-after: avoid; }
  .scroll { max-height: none; overflow: visible; }
  .facts { break-inside: avoid; }
}
"""

# The page is whole without it: it only adds the read-out under the pointer, and opens what is folded for printing.
SCRIPT = """
"use strict";
for (const figure of document.querySelectorAll("figure.chart")) {
  const source = figure.querySelector("script");
  if (!source) continue;
  const curves = JSON.parse(source.textContent);
  for (const area of figure.querySelectorAll(".area")) addReadout(area, curves);
}

function addReadout(area, curves) {
  const [x0, x1, logX, y0, y1, logY] = JSON.parse(area.dataset.axes);
  const place = (v, a, b, log) => log ? Math.log(v / a) / Math.log(b / a) : (v - a) / (b - a);
  let marks = [];
  const clear = () => { marks.forEach(mark => mark.remove()); marks = []; };
  const add = (parent, tag, className, text) => {
    const node = document.createElement(tag);
    node.className = className;
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };
  area.addEventListener("pointerleave", clear);
  area.addEventListener("pointermove", event => {
    clear();
    const box = area.getBoundingClientRect();
    const at = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    const wanted = logX ? x0 * Math.pow(x1 / x0, at) : x0 + at * (x1 - x0);
    const hits = curves.map(curve => [curve, nearest(curve[3], wanted)]).filter(hit => hit[1]);
    if (!hits.length) return;
    const step = nearest(hits.map(hit => hit[1]), wanted)[0];
    const left = place(step, x0, x1, logX) * 100;
    const hair = add(area, "div", "hair");
    hair.style.left = left + "%";
    const readout = add(area, "div", "readout");
    readout.style[left < 50 ? "left" : "right"] = "calc(" + (left < 50 ? left : 100 - left) + "% + 12px)";
    marks.push(hair, readout);
    add(readout, "b", "", "step " + step.toLocaleString("en"));
    for (const [[name, color, look], [x, y]] of hits) {
      if (Math.abs(place(x, x0, x1, logX) - left / 100) > 0.05) continue;
      const row = add(readout, "span", "c" + color % 6);
      add(row, "i", look);
      row.append(name || "value");
      add(row, "u", "", (x === step ? "" : "(step " + x.toLocaleString("en") + ") ") + Number(y.toPrecision(5)));
      const dot = add(area, "div", "dot c" + color % 6);
      dot.style.left = place(x, x0, x1, logX) * 100 + "%";
      dot.style.top = 100 - place(y, y0, y1, logY) * 100 + "%";
      marks.push(dot);
    }
  });
}

function nearest(points, wanted) {
  let best = null;
  for (const point of points) {
    if (point[1] !== null && (!best || Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted))) best = point;
  }
  return best;
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => part.open = true));
"""


def page(title: str, body: str) -> str:
    """Put a whole document around the body, which must be escaped already."""
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
