"""The pages of a server: one to try the model, one about its API. Each loads nothing from elsewhere."""

import base64
import hashlib
import html
import json
import re
from typing import Any

from bigbatch.tools.serving.opening import Served

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f7f9; --card: #fff; --ink: #16191d; --soft: #5a6270; --line: #dfe3e8; --fill: #f0f2f5;
  --main: #0068a8; --on-main: #fff; --bad: #b3261e; --mark: #d6e9f7;
  --text: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif;
  --code: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #101317; --card: #181c22; --ink: #e8ebef; --soft: #9aa4b2; --line: #2b313a; --fill: #20262e;
    --main: #56aef0; --on-main: #0b1218; --bad: #ff8a80; --mark: #1d3a52; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 var(--text); overflow-wrap: anywhere; }
header, main { max-width: 800px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 48px; }
h1 { margin: 0; font-size: 32px; line-height: 1.2; letter-spacing: -.02em; }
h2 { margin: 0; font-size: 17px; } h3 { margin: 14px 0 6px; font-size: 14px; }
.facts { margin: 8px 0 0; display: flex; flex-wrap: wrap; gap: 6px 16px; color: var(--soft); font-size: 14px; }
.facts a { color: var(--main); text-decoration: none; } .facts a:hover { text-decoration: underline; }
main { padding-top: 28px; padding-bottom: 64px; display: grid; gap: 16px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; }
form { display: grid; gap: 14px; }
label { display: grid; gap: 5px; font-size: 13px; font-weight: 600; color: var(--soft); }
textarea, input { font: 15px/1.5 var(--text); color: var(--ink); background: var(--paper); width: 100%;
  border: 1px solid var(--line); border-radius: 8px; padding: 9px 12px; }
textarea { resize: vertical; min-height: 84px; }
textarea:focus, input:focus, button:focus-visible { outline: 2px solid var(--main); outline-offset: -1px; }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; }
.row { display: flex; align-items: center; gap: 14px; color: var(--soft); font-size: 13px; }
button { font: 600 15px var(--text); color: var(--on-main); background: var(--main); border: 0; border-radius: 8px;
  padding: 10px 20px; cursor: pointer; }
button:disabled { opacity: .5; cursor: default; }
button.plain { color: var(--ink); background: var(--fill); }
#answer:empty { display: none; }
#answer { display: grid; gap: 12px; } #list { display: grid; gap: 16px; }
.error { color: var(--bad); margin: 0; }
.written { margin: 0; white-space: pre-wrap; font: 15px/1.6 var(--text); } .written b { color: var(--soft);
  font-weight: 400; }
.big { margin: 0; font-size: 24px; font-weight: 600; letter-spacing: -.01em; }
.bar { display: grid; grid-template-columns: minmax(70px, 30%) 1fr 58px;
  gap: 12px; align-items: center; font-size: 14px; }
.bar i { height: 10px; border-radius: 5px; background: var(--fill); overflow: hidden; }
.bar i::before { content: ""; display: block; height: 100%; width: var(--share); background: var(--main); }
.bar span:last-child { text-align: right; font-variant-numeric: tabular-nums; color: var(--soft); }
mark { background: var(--mark); color: inherit; border-radius: 4px; padding: 1px 4px; }
mark small { color: var(--main); font-weight: 600; margin-left: 5px; }
.said { max-width: 85%; border-radius: 12px; padding: 9px 14px; white-space: pre-wrap; background: var(--fill); }
.said.user { justify-self: end; background: var(--main); color: var(--on-main); }
pre { margin: 0; font: 13px/1.5 var(--code); white-space: pre-wrap; background: var(--fill); border-radius: 8px;
  padding: 12px 14px; }
.method { font: 600 12px var(--code); color: var(--on-main); background: var(--main); border-radius: 5px;
  padding: 2px 7px; margin-right: 8px; }
code { font: 13px var(--code); } details summary { cursor: pointer; color: var(--soft); font-size: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
td { border-top: 1px solid var(--line); padding: 7px 10px 7px 0; vertical-align: top; } td + td { color: var(--soft); }
[hidden] { display: none !important; }
"""
COMMON_SCRIPT = """
const facts = JSON.parse(document.getElementById("facts").textContent);
const make = (name, look, text) => {
  const it = document.createElement(name);
  if (look) it.className = look;
  if (text !== undefined) it.textContent = text;
  return it;
};
const token = document.getElementById("token");
token.form.addEventListener("submit", event => event.preventDefault());
try { token.value = sessionStorage.getItem("token") || ""; } catch {}
const headers = () => {
  try { sessionStorage.setItem("token", token.value); } catch {}
  return { "Content-Type": "application/json", ...(token.value && { Authorization: `Bearer ${token.value}` }) };
};
"""
TRY_SCRIPT = """
const form = document.getElementById("ask"), answer = document.getElementById("answer");
const send = document.getElementById("send"), took = document.getElementById("took");
const said = [];
let running = null;
const value = name => document.getElementById(`in-${name}`)?.value ?? "";
const ask = async (path, body) => {
  running = new AbortController();
  const { signal } = running;
  const got = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (got.ok) return got;
  let message = `status ${got.status}`;
  try { message = (await got.json()).error.message; } catch {}
  throw new Error(message);
};
const percent = share => `${(100 * share).toFixed(1)} %`;
const bar = (name, share) => {
  const it = make("div", "bar"), i = make("i");
  i.style.setProperty("--share", `${100 * share}%`);
  it.append(make("span", "", name), i, make("span", "", percent(share)));
  return it;
};
const marked = (text, spans) => {
  const it = make("p", "written"), letters = Array.from(text);
  let begin = 0;
  for (const one of spans) {
    it.append(letters.slice(begin, one.start).join(""));
    const mark = make("mark", "", letters.slice(one.start, one.end).join(""));
    if (one.type) mark.append(make("small", "", one.type));
    it.append(mark);
    begin = one.end;
  }
  it.append(letters.slice(begin).join(""));
  return it;
};
const show = found => {
  const text = found.label ?? found.summary ?? found.translation ?? found.transcript ?? found.reply;
  if (text !== undefined) answer.append(make("p", "big", text));
  if (found.answer !== undefined) {
    answer.append(make("p", "big", found.answer || "no answer"));
    if (found.start !== null) answer.append(marked(value("context"), [found]));
  }
  for (const one of found.labels ?? []) answer.append(bar(one.label, one.probability));
  for (const one of found.words ?? []) answer.append(bar(one.word, one.probability));
  for (const one of found.candidates ?? []) answer.append(bar(one.answer, one.probability));
  if (found.entities) answer.append(marked(value("text"), found.entities));
  for (const name of ["score", "quality"])
    if (found[name] !== undefined) answer.append(make("p", "big", found[name].toFixed(3)));
  const details = make("details");
  details.append(make("summary", "", "JSON"), make("pre", "", JSON.stringify(found, null, 2)));
  answer.append(details);
};
const read = file => new Promise((done, failed) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
  reader.onerror = () => failed(new Error("the file cannot be read"));
  reader.readAsDataURL(file);
});
const predict = async () => {
  let input;
  if (facts.reads_files) {
    const file = document.getElementById("in-file").files[0];
    if (!file) throw new Error("choose a file first");
    input = { data: await read(file) };
  } else if (facts.fields.length) input = Object.fromEntries(facts.fields.map(name => [name, value(name)]));
  else input = value("text");
  const got = await ask("predict", { inputs: [input], ...(facts.top && { top: 5 }) });
  show((await got.json()).answers[0]);
};
const settings = () => {
  const found = { stream: true };
  for (const name of ["max_tokens", "temperature", "top_p", "seed"]) if (value(name)) found[name] = Number(value(name));
  return found;
};
const stream = async (path, body, take) => {
  const got = await ask(path, body), reader = got.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value: part } = await reader.read();
    if (done) return;
    const events = (rest + part).split("\\n\\n");
    rest = events.pop();
    for (const event of events.map(one => one.slice(6)).filter(one => one !== "[DONE]")) {
      const found = JSON.parse(event);
      if (found.error) throw new Error(found.error.message);
      for (const choice of found.choices) take(choice.delta ? choice.delta.content ?? "" : choice.text);
    }
  }
};
const write = async () => {
  if (facts.chat) {
    const text = value("text").trim();
    if (!text) throw new Error("say something first");
    answer.append(make("div", "said user", text));
    const reply = make("div", "said");
    answer.append(reply);
    document.getElementById("in-text").value = "";
    const messages = [...said, { role: "user", content: text }];
    await stream("v1/chat/completions", { messages, ...settings() }, part => reply.append(part));
    if (reply.textContent.trim()) said.push(messages.at(-1), { role: "assistant", content: reply.textContent });
    else reply.textContent = "(nothing)";
  } else {
    const it = make("p", "written");
    it.append(make("b", "", value("text")));
    answer.append(it);
    await stream("v1/completions", { prompt: value("text"), ...settings() }, part => it.append(part));
  }
};
form.addEventListener("submit", async event => {
  event.preventDefault();
  if (running) { running.abort(); return; }
  if (!facts.chat) answer.replaceChildren();
  answer.querySelectorAll(".error").forEach(one => one.remove());
  const begin = performance.now();
  running = new AbortController();
  send.textContent = "Stop";
  took.textContent = "";
  try { await (facts.generates ? write() : predict()); }
  catch (error) { if (error.name !== "AbortError") answer.append(make("p", "error", error.message)); }
  running = null;
  send.textContent = facts.send;
  took.textContent = `${Math.round(performance.now() - begin).toLocaleString("en")} ms`;
});
document.getElementById("again")?.addEventListener("click", () => { said.length = 0; answer.replaceChildren(); });
form.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey || (facts.chat && !event.shiftKey))) {
    event.preventDefault();
    form.requestSubmit();
  }
});
"""
DOCS_SCRIPT = """
const list = document.getElementById("list");
const kind = (schema, all) => {
  if (!schema) return "";
  if (schema.$ref) return kind(all[schema.$ref.split("/").pop()], all);
  if (schema.anyOf) return schema.anyOf.map(one => kind(one, all)).filter(one => one !== "null").join(" or ");
  if (schema.type === "array") return `list of ${kind(schema.items, all)}`;
  if (schema.const) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map(one => JSON.stringify(one)).join(" or ");
  if (schema.properties) return `{${Object.keys(schema.properties).join(", ")}}`;
  return schema.type ?? "any";
};
const table = (schema, all) => {
  const it = make("table"), found = schema?.$ref ? all[schema.$ref.split("/").pop()] : schema;
  for (const [name, one] of Object.entries(found?.properties ?? {})) {
    const row = make("tr"), own = make("td");
    own.append(make("code", "", name));
    const needed = (found.required ?? []).includes(name) ? "" : ", may be left out";
    row.append(own, make("td", "", kind(one, all) + needed + (one.description ? `: ${one.description}` : "")));
    it.append(row);
  }
  return it;
};
const draw = async () => {
  const got = await fetch("openapi.json", { headers: headers() });
  const document_ = await got.json();
  list.replaceChildren();
  if (!got.ok) { list.append(make("p", "error", document_.error.message)); return; }
  const all = document_.components?.schemas ?? {};
  const routes = Object.entries(document_.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, about]) => [path, method, about]));
  for (const [path, method, about] of routes) {
    const card = make("section", "card"), head = make("h2");
    head.append(make("span", "method", method.toUpperCase()), make("code", "", path));
    card.append(head, make("p", "", `${about.summary}. ${about.description ?? ""}`));
    const body = about.requestBody?.content["application/json"].schema;
    if (body) card.append(make("h3", "", "Request"), table(body, all));
    card.append(make("h3", "", "Answer"), table(about.responses["200"]?.content?.["application/json"]?.schema, all));
    list.append(card);
  }
};
token.addEventListener("change", draw);
draw();
"""
SETTINGS = {"max_tokens": "Tokens at most", "temperature": "Temperature", "top_p": "Top p", "seed": "Seed"}


def try_page(served: Served, needs_token: bool) -> str:
    """Return the page that tries a model out."""
    generating = served.generating
    chats = bool(generating and generating.chat)
    send = "Send" if chats else "Write" if generating else "Ask"
    facts = {
        "fields": served.fields,
        "reads_files": served.reads_files,
        "generates": bool(generating),
        "chat": chats,
        "send": send,
        "top": served.recipe_name in ("classify", "classify_images", "extract", "next_word", "question_answering"),
    }
    body = [_fields(served)]
    if generating:
        inner = "".join(_number(name, title, generating.sampling) for name, title in SETTINGS.items())
        body.append(f'<div class="settings">{inner}</div>')
    again = '<button type="button" class="plain" id="again">Begin anew</button>' if chats else ""
    body.append(f'<div class="row"><button id="send">{send}</button>{again}<span id="took"></span></div>')
    form = f'<form class="card" id="ask">{"".join(body)}</form>'
    answer = '<section class="card" id="answer" aria-live="polite"></section>'
    main = answer + form if chats else form + answer
    return _page(served, _token(needs_token) + main, facts, COMMON_SCRIPT + TRY_SCRIPT, '<a href="docs">API</a>')


def docs_page(served: Served, needs_token: bool) -> str:
    """Return the page about the API, which it draws from openapi.json."""
    body = f'{_token(needs_token)}<div id="list"></div>'
    link = '<a href="./">try it</a> <a href="openapi.json">openapi.json</a>'
    return _page(served, body, {}, COMMON_SCRIPT + DOCS_SCRIPT, link)


def page_headers(page: str) -> dict[str, str]:
    """Return the headers under which a browser runs this page's own script and nothing else."""
    script = re.findall("<script>(.*?)</script>", page, re.S)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'"
    policy += "; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


def _page(served: Served, body: str, facts: dict[str, Any], script: str, links: str) -> str:
    name = html.escape(served.name)
    told = json.dumps(facts).replace("<", "\\u003c")
    about = f"<span>{html.escape(served.recipe_name.replace('_', ' '))}</span><span>{html.escape(served.engine)}</span>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{name}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>'
        f'<header><h1>{name}</h1><p class="facts">{about}{links}</p></header><main>{body}</main>'
        f'<script type="application/json" id="facts">{told}</script><script>{script}</script></body></html>\n'
    )


def _token(is_needed: bool) -> str:
    hidden = "" if is_needed else " hidden"
    field = '<input id="token" type="password" autocomplete="off">'
    return f'<form class="card" id="access"{hidden}><label>Token{field}</label></form>'


def _fields(served: Served) -> str:
    if served.reads_files:
        return '<label>File<input id="in-file" type="file"></label>'
    if served.generating:
        title = "Message" if served.generating.chat else "Text to go on with"
        return f'<label>{title}<textarea id="in-text" autofocus></textarea></label>'
    names = served.fields or ("text",)
    titles = ((name, html.escape(name.replace("_", " ").capitalize())) for name in names)
    return "".join(f'<label>{title}<textarea id="in-{html.escape(name)}"></textarea></label>' for name, title in titles)


def _number(name: str, title: str, sampling: Any) -> str:
    given = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}
    value = given.get(name, "")
    step = 'step="any" ' if name in ("temperature", "top_p") else ""
    return f'<label>{title}<input id="in-{name}" type="number" min="0" {step}value="{value}"></label>'
