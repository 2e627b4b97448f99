// The dialog of a cell: its numbers, its rows with their texts, and the latents that carry the probe.

const panel = document.getElementById("cell");
const title = document.getElementById("cell-title");
const content = document.getElementById("cell-content");
const MARKS = { lost: "▼", gained: "▲", both: "=", neither: "–" };
const MEANINGS = {
  lost: "the model's probe is right and the SAE's is wrong", gained: "the opposite",
  both: "both are right", neither: "neither is right",
};
const AT_ONCE = 100; // rows
let unpacking; // a promise of the rows of all cells

function rowsOf(number) {
  unpacking ??= unpacked("row-data").then((found) => found ?? { cells: {}, texts: [], latents: {} });
  return unpacking.then((found) => ({ cell: found.cells[number], texts: found.texts, latents: found.latents[number] }));
}

const fixed = (hundredths) => (hundredths / 100).toFixed(2).replace("-", "−");
const thousandths = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
const signed = (hundredths) => `${hundredths < 0 ? "−" : "+"}${Math.abs(hundredths / 100).toFixed(2)}`;

// Return a row's scores, label, outcome and text.
function asRow(cell, texts, place) {
  const [model, sae, transfer] = cell.scores.map((scores) => scores[place]);
  const label = cell.labels[place];
  const right = [model, sae].map((score) => (score > 0) === (label === 1));
  const outcome = right[0] ? (right[1] ? "both" : "lost") : (right[1] ? "gained" : "neither");
  const [before, name, after, person] = texts[cell.texts[place]];
  return { model, sae, transfer, label: cell.classes[label], outcome, before, name, after, person,
    lost: (label ? 1 : -1) * (model - sae) };
}

function entry(row) {
  const figures = [["lost", signed(row.lost)], ["model", signed(row.model)], ["SAE", signed(row.sae)]];
  if (row.transfer !== undefined) figures.push(["transfer", signed(row.transfer)]);
  const head = make("p", { className: "who" },
    make("b", { className: `outcome ${row.outcome}` }, `${MARKS[row.outcome]} ${row.outcome}`),
    make("bdi", {}, row.name || row.person), make("span", { className: "label" }, row.label),
    make("span", { className: "figures" }, figures.map(([name, value]) => `${name} ${value}`).join("  ")));
  const quoted = row.before || row.after
    ? [make("p", { className: "text", dir: "auto" }, row.before, make("mark", {}, row.name), row.after)] : [];
  return make("li", { title: `person: ${row.person}` }, head, ...quoted);
}

function countTable([by, groups], outcomes) {
  const tested = groups.some(([, , loss]) => loss);
  const more = tested ? ["delta_sel", "minus that of all others", "q"] : [];
  const head = make("tr", {}, ...[by, "rows", ...outcomes.map((name) => `${MARKS[name]} ${name}`), "lost share", ...more].map((name) => make("th", { scope: "col" }, name)));
  const ends = (value, low, high) => [thousandths(value), " ", make("small", {}, `${thousandths(low)} to ${thousandths(high)}`)];
  const lines = groups.map(([name, counts, loss]) => {
    const had = counts[0] + counts[2];
    const numbers = [counts.reduce((a, b) => a + b, 0), ...counts, had ? `${Math.round((100 * counts[0]) / had)} %` : "–"];
    if (loss) numbers.push(ends(...loss.slice(0, 3)), ends(...loss.slice(3, 6)), loss[6] < 0.001 ? "< 0.001" : loss[6].toFixed(3));
    else if (tested) numbers.push("", "", "");
    return make("tr", {}, make("th", { scope: "row" }, name), ...numbers.map((value) => make("td", {}, ...[value].flat().map((part) => (part instanceof Node ? part : String(part))))));
  });
  return make("div", { className: "scroll", tabindex: "0" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...lines)));
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Draw the scores of one class: the model's as a line, the SAE's as an area.
function histogram(name, [model, sae], end, largest) {
  const [width, height, foot] = [330, 110, 34];
  const step = width / model.length;
  const y = (count) => height - (count / largest) * (height - 6);
  const path = (bins) => `M0 ${height}` + bins.map((count, i) => `L${i * step} ${y(count)}H${(i + 1) * step}`).join("") + `V${height}`;
  const label = (x, anchor, words) => svg("text", { x, y: height + 14, "text-anchor": anchor }, words);
  const told = `Scores of the class ${name}: the model's probe as a line, the SAE's as an area, from ${-end} to ${end}`;
  return svg("svg", { viewBox: `0 0 ${width} ${height + foot}`, width, height: height + foot, role: "img", "aria-label": told },
    svg("path", { d: path(sae), class: "after" }), svg("path", { d: path(model), class: "before" }),
    svg("line", { x1: width / 2, x2: width / 2, y1: 0, y2: height, class: "middle" }),
    label(0, "start", fixed(-100 * end)), label(width / 2, "middle", "0"), label(width, "end", fixed(100 * end)),
    svg("text", { x: 0, y: height + 30 }, `${name}: line = model, area = SAE`));
}

const percent = (share) => `${share < 0 ? "−" : "+"}${Math.abs(100 * share).toFixed(1)} %`;

// Draw the shares of the difference between the classes as bars: each latent, all other latents, and the error.
function carriers({ latents, others, error }) {
  const largest = Math.max(0.01, ...latents.flatMap((one) => [Math.abs(one[1]), Math.abs(one[2])]), Math.abs(others), Math.abs(error));
  const bar = (share, kind) => make("span", { className: `bar-of ${kind}${share < 0 ? " negative" : ""}`, style: `width: ${(7 * Math.abs(share)) / largest}rem` });
  const part = (word, share, kind) => make("span", { className: "part" }, bar(share, kind), ` ${word} ${percent(share)}`);
  const line = (name, share, ...rest) => make("li", {}, make("p", { className: "who" }, make("b", {}, name), part("carries", share, "kept"), ...rest));
  const lines = latents.map(([latent, share, dropped, rate0, rate1, auc, examples, address]) => {
    const name = address ? make("a", { href: address, rel: "noreferrer" }, `latent ${latent}`) : `latent ${latent}`;
    const fires = `fires ${(100 * rate0).toFixed(1)} % / ${(100 * rate1).toFixed(1)} %, AUC ${auc.toFixed(3)}`;
    const item = line(name, share, part("dropped", dropped, "dropped"), make("span", { className: "figures" }, fires));
    const texts = examples.map(([before, mark, after]) => make("p", { className: "text", dir: "auto" }, before, make("mark", {}, mark), after));
    if (texts.length) item.append(make("details", {}, make("summary", {}, "fires most on"), ...texts));
    return item;
  });
  lines.push(line("other latents", others), line("error: no latent", error));
  return [make("h3", {}, "Which latents carry the probe"),
    make("p", {}, "carries: share of the difference between the classes' mean scores by the model's probe. dropped: share that lies in the error along the latent's direction; the reconstruction would include it if the latent had the right activation. "
      + "fires: share of the rows of class 0 / class 1 in which the latent is active. AUC: of the latent alone."),
    make("ol", { className: "rows carriers" }, ...lines)];
}

function quoted(value) {
  const plain = typeof value === "string" && /^[=+\-@＝＋－＠\t\r]/.test(value) ? `'${value}` : String(value ?? "");
  return /[",\n\r]/.test(plain) ? `"${plain.replaceAll('"', '""')}"` : plain;
}

function saveCsv(name, rows) {
  const head = ["text", "name", "person", "label", "outcome", "lost", "model", "sae", "transfer"];
  const lines = rows.map((row) => [row.before || row.after ? row.before + row.name + row.after : "", row.name, row.person, row.label, row.outcome,
    ...[row.lost, row.model, row.sae, row.transfer].map((score) => (score === undefined ? "" : score / 100))]);
  const blob = new Blob([[head, ...lines].map((values) => values.map(quoted).join(",")).join("\n"), "\n"], { type: "text/csv;charset=utf-8" });
  const link = make("a", { download: `${name}.csv`, href: URL.createObjectURL(blob) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// The searchable list of rows; its state is stored in the URL together with the cell.
function list(row, cell, texts, words, outcome) {
  const all = cell.texts.map((_, place) => asRow(cell, texts, place));
  const [sae, dataset, probe, layer] = [0, 1, 2, 3].map((column) => key(row[column]));
  const name = `${probe}_layer_${layer}_${sae}`.replace(/[^\p{L}\p{N}._-]+/gu, "_");
  const input = make("input", { type: "search", value: words });
  const choice = make("select", {}, make("option", { value: "" }, "all"), ...cell.outcomes.map((one) => make("option", { value: one }, one)));
  choice.value = outcome;
  const count = make("output", { ariaLive: "polite" });
  const entries = make("ol", { className: "rows" });
  const more = make("button", { type: "button" }, "more");
  const save = make("button", { type: "button" }, `CSV of ${all.length === cell.n ? `all ${cell.n}` : `these ${all.length}`} rows`);
  save.addEventListener("click", () => saveCsv(name, all));
  let limit = AT_ONCE;
  const show = () => {
    const asked = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = all.filter((one) => (!choice.value || one.outcome === choice.value)
      && asked.every((word) => `${one.before}${one.name}${one.after} ${one.person} ${one.label}`.toLowerCase().includes(word)));
    entries.replaceChildren(...fits.slice(0, limit).map(entry));
    count.textContent = `${fits.length} of ${cell.n} rows`;
    more.hidden = fits.length <= limit;
    remember({ cell: address(row), rows: input.value, outcome: choice.value });
  };
  for (const control of [input, choice]) control.addEventListener("input", () => { limit = AT_ONCE; show(); });
  more.addEventListener("click", () => { limit += AT_ONCE; show(); });
  const rest = all.length < cell.n
    ? [make("p", {}, `These are the ${all.length} of ${cell.n} rows with the largest losses or gains. For all rows: `,
      make("code", {}, `python report.py results --rows ${dataset.replace(/^wikidata_/, "")}/${probe} --layer ${layer} --sae ${sae} --csv rows.csv`))] : [];
  const controls = make("div", { className: "controls" }, make("label", {}, "search ", input), make("label", {}, "outcome ", choice), count, save);
  show();
  return [make("h3", {}, "Rows, largest losses first"), controls, entries, more, ...rest];
}

async function openCell(number, words = "", outcome = "") {
  const row = cells[number];
  const [sae, dataset, probe, layer] = [0, 1, 2, 3].map((column) => text(row[column]));
  title.textContent = `${probe}, layer ${layer}, ${sae}`;
  const facts = row.map((entry, column) => [heads[column].innerText, `${text(entry)}${small(entry) && ` (${small(entry)})`}`]).slice(4);
  const numbers = make("dl", {}, ...[["dataset", dataset], ...facts].map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  content.replaceChildren(numbers);
  remember({ cell: address(row), rows: words, outcome });
  if (!panel.open) panel.showModal();
  panel.scrollTop = 0;
  title.focus();
  const { cell, texts, latents } = await rowsOf(number);
  if (!panel.open || numbers.parentElement !== content) return; // closed, or showing another cell
  const known = latents ? carriers(latents) : [];
  if (!cell) {
    content.append(...known);
    content.append(make("p", {}, "The rows of this cell are not in the page: its scores were not stored, or the page would have been too large."));
    return;
  }
  const largest = Math.max(1, ...cell.histogram.flat(2));
  content.append(
    make("h3", {}, "Rows by outcome"),
    make("p", {}, Object.entries(MEANINGS).map(([name, meaning]) => `${MARKS[name]} ${name}: ${meaning}`).join("; ") + ". Scores are means over the partitions; a positive score predicts "
      + `${cell.classes[1]}. lost share: share of the rows that the model gets right. q: Benjamini-Hochberg over the groups of this cell, for the difference from all others.`),
    make("div", { className: "counts" }, ...cell.counts.map((group) => countTable(group, cell.outcomes))),
    make("div", { className: "plots" }, ...cell.histogram.map((views, label) => histogram(cell.classes[label], views, cell.end, largest))),
    ...known,
    ...list(row, cell, texts, words, outcome),
  );
}

document.getElementById("close").addEventListener("click", () => panel.close());
panel.addEventListener("close", () => remember());
panel.addEventListener("click", (event) => { if (event.target === panel) panel.close(); }); // beside it
document.addEventListener("click", (event) => {
  const cell = event.target.closest?.("figure [data-cell]");
  if (cell) openCell(Number(cell.dataset.cell));
});
window.addEventListener("hashchange", restore);
restore();
filter(); // browsers restore the controls after a reload
