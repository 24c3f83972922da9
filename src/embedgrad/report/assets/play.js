// The page of `embedgrad play`: asks for both answers, shows them as they come, compares, keeps judgements.
const SIDES = ["text", "refined"], BEFORE = 80;
const byId = (id) => document.getElementById(id);
const runs = JSON.parse(byId("runs").textContent);
const state = { run: 0, place: 1, columns: {}, asked: false, ...JSON.parse(sessionStorage.getItem(location.pathname) || "{}") };
if (!runs[state.run]) state.run = 0;
const sides = Object.fromEntries(SIDES.map((name) => {
  const root = document.querySelector(`.side.${name}`);
  const find = (selector) => root.querySelector(selector);
  return [name, { root, find, box: find(".answer"), thumbs: [...root.querySelectorAll(".thumb")], text: null }];
}));
let asking = null;   // the controller of the request under way
let answer = null;   // the number of the answers on the page
let note = "";       // about the query
let sample = -1;

const run = () => runs[state.run];
const plural = (n, what) => `${n.toLocaleString("en")} ${n === 1 ? what : `${what}s`.replace("querys", "queries")}`;
const remember = () => sessionStorage.setItem(location.pathname, JSON.stringify(state));

async function post(path, body, signal) {
  const response = await fetch(path, { method: "POST", body: JSON.stringify(body), signal });
  if (response.ok) return response;
  const text = await response.text();
  let told = text;
  try { told = JSON.parse(text).error; } catch { /* no JSON: as it is */ }
  throw new Error(told);
}

async function* events(response) {
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

// -- asking ---------------------------------------------------------------------------------------

async function ask() {
  asking?.abort();
  const own = asking = new AbortController();
  const columns = Object.fromEntries(run().columns.map((name) => [name, state.columns[name] ?? ""]));
  state.asked = true;
  remember();
  clear();
  busy(true);
  try {
    const response = await post("answer", { run: state.run, columns, place: state.place }, own.signal);
    for await (const event of events(response)) {
      if (own !== asking) return;
      if (event.error) throw new Error(event.error);
      show(event);
    }
    if (answer === null) throw new Error("the answer broke off; see the terminal");
  } catch (error) {
    const told = error instanceof TypeError ? "embedgrad play does not answer; see its terminal" : error.message;
    if (own === asking) say(own.signal.aborted ? "stopped" : told, !own.signal.aborted);
  } finally {
    if (own === asking) { asking = null; busy(false); }
  }
}

function clear() {
  answer = null;
  note = "";
  byId("refined-title").textContent = byId("refined-label").textContent = state.place === 1 ? "Refined prompt" : `Rows at ${state.place.toFixed(2)}`;
  for (const side of Object.values(sides)) {
    side.text = null;
    side.box.replaceChildren();
    side.find(".chances").replaceChildren();
    side.find(".cut").hidden = true;
    side.find(".say").hidden = true;
    side.find(".kept").textContent = "";
    side.find(".judge").reset();
    for (const thumb of side.thumbs) { thumb.disabled = true; thumb.setAttribute("aria-pressed", "false"); }
  }
  for (const id of ["next", "take", "copied"]) byId(id).hidden = true;
}

function busy(is) {
  byId("stop").hidden = !is;
  for (const side of Object.values(sides)) side.root.classList.toggle("busy", is);
  if (is) say("");
}

function say(text, wrong = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("failed", wrong);
}

function show(event) {
  const side = sides[event.side];
  if (event.piece !== undefined) side.box.append(event.piece);
  else if (side) {
    side.text = event.text;
    side.root.classList.remove("busy");
    side.find(".cut").hidden = !event.cut;
    if (!event.text) side.box.append(element("span", "rest", "(nothing)"));
    side.find(".chances").replaceChildren(...bars(event.probabilities));
    if (SIDES.every((name) => sides[name].text !== null)) compare();
  } else if (event.next) showNext(event.next);
  else if (event.copies) showCopies(event.copies);
  else if (event.note) note = `${event.note}; `;
  else if (event.answer !== undefined) {
    answer = event.answer;
    for (const { thumbs } of Object.values(sides)) for (const thumb of thumbs) thumb.disabled = false;
  }
}

function compare() {
  const texts = SIDES.map((name) => sides[name].text);
  say(note + (texts[0] === texts[1] ? "both answers are alike" : "the answers differ"));
  differences(...texts).forEach((parts, i) => {
    if (!texts[i]) return;
    sides[SIDES[i]].box.replaceChildren();
    showParts(sides[SIDES[i]].box, parts);
  });
}

function bars(pairs) {
  const best = Math.max(...pairs.map(([, share]) => share));
  return pairs.map(([name, share]) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    for (const [key, value] of Object.entries({ viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": true })) svg.setAttribute(key, value);
    for (const [kind, width] of [["all", 100], ["share", 100 * share]]) {
      const rect = document.createElementNS(svg.namespaceURI, "rect");
      for (const [key, value] of Object.entries({ class: kind, width, height: 8 })) rect.setAttribute(key, value);
      svg.append(rect);
    }
    const classes = share === best ? "bar-row best" : "bar-row";
    return element("div", classes, element("bdi", "", name), svg, element("span", "number", `${(100 * share).toFixed(1)} %`));
  });
}

function showNext(next) {
  const before = next.before.length > BEFORE ? `\u2026${next.before.slice(-BEFORE)}` : next.before;
  byId("where").textContent = run().choices.length ? "What the model would write first if nothing held it to the choices."
    : !next.differ ? "The answers are alike; these are the likeliest first tokens."
    : before ? `Where the answers part, after \u201c${before}\u201d.` : "The answers part at their first token.";
  for (const name of SIDES) document.querySelector(`#next .${name} .bars`).replaceChildren(...bars(next[name]));
  byId("next").hidden = false;
}

function showCopies(copies) {
  byId("take").hidden = false;
  byId("copies").replaceChildren(...Object.entries(copies).map(([name, text]) => {
    const button = element("button", "", `Copy as ${name}`);
    button.type = "button";
    button.addEventListener("click", async () => {
      const shown = byId("copied");
      shown.hidden = false;
      shown.textContent = text;
      getSelection().selectAllChildren(shown);  // for who has to copy by hand
      try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { return; }
      setTimeout(() => { button.textContent = `Copy as ${name}`; }, 1500);
    });
    return button;
  }));
}

// -- judgements -----------------------------------------------------------------------------------

for (const [name, side] of Object.entries(sides)) {
  const form = side.find(".judge");
  const verdict = () => side.thumbs.find((thumb) => thumb.getAttribute("aria-pressed") === "true")?.dataset.verdict;
  const keep = async () => {
    const told = new FormData(form);
    const right = verdict() === "down" ? told.get("right") : "";
    try {
      const response = await post("feedback", { answer, side: name, verdict: verdict(), note: told.get("note"), right });
      run().feedback = await response.json();
      side.find(".kept").textContent = "kept";
      count();
    } catch (error) { side.find(".kept").textContent = error.message; }
  };
  for (const thumb of side.thumbs)
    thumb.addEventListener("click", () => {
      for (const other of side.thumbs) other.setAttribute("aria-pressed", String(other === thumb));
      side.find(".say").hidden = false;
      side.find(".correct").hidden = thumb.dataset.verdict === "up";
      keep();
    });
  form.addEventListener("submit", (event) => { event.preventDefault(); keep(); });
}

function count() {
  const { judged, rows } = run().feedback;
  byId("counts").textContent = judged
    ? `${plural(judged, "answer")} judged. The right answer is known for ${plural(rows, "query")}.`
    : "Judge answers with the thumbs. Where you say what is right, the query becomes a training row.";
  byId("rows").hidden = !rows;
}

byId("rows").addEventListener("click", async () => {
  try {
    const { file, rows } = await (await post("rows", { run: state.run })).json();
    byId("written").textContent = `${plural(rows, "row")} in ${file}; data.train of a recipe reads it.`;
  } catch (error) { byId("written").textContent = error.message; }
});

// -- the query ------------------------------------------------------------------------------------

function choose(number) {
  const before = run();
  state.run = number;
  const [one, ...others] = run().columns;
  if (one !== undefined && !others.length && before.columns.length === 1) state.columns[one] = state.columns[before.columns[0]] ?? "";
  byId("name").textContent = run().name;
  byId("model").textContent = run().model;
  byId("prompt").textContent = run().prompt.join(" \u2026 ");
  byId("same").hidden = !run().same;
  document.title = `${run().name} - embedgrad play`;
  [...byId("tabs").children].forEach((tab, i) => tab.setAttribute("aria-pressed", String(i === number)));
  byId("columns").replaceChildren(...run().columns.map((name) => {
    const area = element("textarea", "");
    area.rows = run().columns.length > 1 ? 2 : 4;
    area.dir = "auto";
    area.value = state.columns[name] ?? "";
    area.addEventListener("input", () => { state.columns[name] = area.value; remember(); });
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); }
    });
    return element("label", "column", element("span", "name", name), area);
  }));
  for (const side of Object.values(sides)) {
    const field = element(run().choices.length ? "select" : "textarea", "");
    field.name = "right";
    if (run().choices.length) field.append(...["", ...run().choices].map((choice) => element("option", "", choice)));
    side.find(".field").replaceChildren(field);
  }
  sample = -1;
  byId("sample").hidden = !run().samples.length;
  byId("sampled").textContent = byId("written").textContent = "";
  count();
  clear();
  remember();
}

function showPlace() {
  byId("place").value = state.place;
  byId("at").textContent = state.place.toFixed(2);
}

byId("query").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
byId("stop").addEventListener("click", () => asking?.abort());
byId("sample").addEventListener("click", () => {
  sample = (sample + 1) % run().samples.length;
  const { columns, answer: right } = run().samples[sample];
  Object.assign(state.columns, columns);
  choose(state.run);
  byId("sampled").textContent = `right answer: ${right}`;
  ask();
});
byId("place").addEventListener("input", (event) => { state.place = Number(event.target.value); showPlace(); });
byId("place").addEventListener("change", () => { remember(); if (state.asked) ask(); });

byId("tabs").hidden = runs.length < 2;
byId("tabs").append(...runs.map(({ name }, i) => {
  const tab = element("button", "", name);
  tab.type = "button";
  tab.addEventListener("click", () => { choose(i); if (state.asked) ask(); });
  return tab;
}));
choose(state.run);
showPlace();
if (state.asked) ask();
