// Shows the rows, a few at a time. All text comes in by textContent: no row is ever parsed as HTML.
(() => {
  const data = document.getElementById("rows");
  if (!data) return;
  const rows = JSON.parse(data.textContent);
  const PAGE = 20, LONG = 900;
  const list = document.getElementById("list");
  const more = document.getElementById("more");
  const search = document.getElementById("search");
  const status = document.getElementById("status");
  const buttons = [...document.querySelectorAll("[data-kind]")];
  const inKind = (row, kind) => kind === "all" || row.kinds.includes(kind);
  let kind = "all", chosen = rows, shown = 0;

  // A text is a string, or [its beginning, how many characters are left out].
  const head = (text) => (typeof text === "string" ? text : text[0]);
  const leftOut = (text) => (typeof text === "string" ? 0 : text[1]);

  function rest(text, line) {
    const count = leftOut(text);
    if (!count) return null;
    const rest = ` \u2026 ${count.toLocaleString("en")} more characters in line ${line} of ${list.dataset.file}`;
    return element("span", "rest", rest);
  }

  // Foreign text; a long one is shown in full on demand.
  function foreign(text, line) {
    const box = element("div", "foreign");
    box.dir = "auto";
    const whole = head(text);
    if (whole.length <= LONG) {
      box.append(whole);
    } else {
      // Never half of a surrogate pair.
      const first = [...whole.slice(0, LONG)].slice(0, -1).join("");
      const button = element("button", "link", `show ${(whole.length - first.length).toLocaleString("en")} more characters`);
      button.type = "button";
      const dots = element("span", "rest", " \u2026 ", button);
      button.addEventListener("click", () => dots.replaceWith(whole.slice(first.length)));
      box.append(first, dots);
    }
    const left = rest(text, line);
    if (left) box.append(left);
    return box;
  }

  function reply(name, answered, parts, line) {
    const box = element("div", "foreign");
    box.dir = "auto";
    showParts(box, parts);
    if (!head(answered.said)) box.append(element("span", "rest", "(nothing)"));
    const left = rest(answered.said, line);
    if (left) box.append(left);
    const how = [];
    if (answered.sure !== undefined) how.push(`${(100 * answered.sure).toFixed(0)} % sure`);
    if (answered.loss !== undefined) how.push(`log-loss ${answered.loss.toFixed(2)}`);
    if (answered.cut) how.push("cut");
    const [kind, words] = answered.score !== undefined ? ["partly", answered.score]
      : answered.right ? ["right", "\u2713 right"] : ["wrong", "\u2717 wrong"];
    const label = element("div", "label", element("span", "", `${name}${list.dataset.suffix}: `, element("span", "judged", words)), element("span", "how", how.join(", ")));
    return element("div", "reply " + kind, label, box);
  }

  function card(row) {
    const source = element("bdi", "foreign", head(row.source));
    const answer = element("bdi", "foreign answer", head(row.answer));
    const header = element("header", "",
      element("span", "badge " + row.badge[0], row.badge[1]), element("span", "", source),
      head(row.answer) ? element("span", "", `${list.dataset.answer}: `, answer, rest(row.answer, row.n)) : null);
    const made = element("article", "row", header);
    const main = row.main || row.columns.length;
    const column = ([name, text], i) => {
      const title = element("div", "name foreign", head(name));
      title.dir = "auto";
      return element("div", "column", main === 1 && i === 0 ? null : title, foreign(text, row.n));
    };
    made.append(...row.columns.slice(0, main).map(column));
    const others = row.columns.slice(main);
    if (others.length) {
      const summary = element("summary", "", `other columns (${others.length})`);
      made.append(element("details", "", summary, ...others.map((pair) => column(pair, 1))));
    }
    if (row.more) made.append(element("p", "rest", `${row.more} more columns in line ${row.n} of ${list.dataset.file}`));
    const answers = Object.entries(row.answers);
    const texts = answers.map(([, answered]) => head(answered.said));
    const parts = texts.length === 2 ? differences(...texts) : texts.map((text) => [[false, text]]);
    made.append(element("div", "replies", ...answers.map(([name, answered], i) => reply(name, answered, parts[i], row.n))));
    return made;
  }

  const textOf = (row) => [row.source, row.answer, ...Object.values(row.answers).map((answered) => answered.said), ...row.columns.flat()].map(head).join("\n").toLowerCase();

  function showMore() {
    const next = chosen.slice(shown, shown + PAGE);
    list.append(...next.map(card));
    shown += next.length;
    more.hidden = shown >= chosen.length;
    const number = (value) => value.toLocaleString("en");
    status.textContent = chosen.length
      ? `${number(shown)} of ${number(chosen.length)} ${chosen.length === 1 ? "row" : "rows"} shown`
      : "no such rows";
  }

  function choose() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    chosen = rows.filter((row) => inKind(row, kind));
    if (words.length)
      chosen = chosen.filter((row) => { const text = textOf(row); return words.every((word) => text.includes(word)); });
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
    list.replaceChildren();
    shown = 0;
    showMore();
  }

  for (const button of buttons)
    button.addEventListener("click", () => { kind = button.dataset.kind; choose(); });
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(choose, 120); });
  more.addEventListener("click", () => {
    const first = list.childElementCount;
    showMore();
    // The reader continues where the new rows begin, with the keyboard too.
    const next = list.children[first];
    if (next) { next.tabIndex = -1; next.focus({ preventScroll: true }); }
  });
  if (rows.some((row) => inKind(row, list.dataset.first))) kind = list.dataset.first;
  document.getElementById("controls").hidden = false;
  choose();
  performance.mark("rows shown");
})();
