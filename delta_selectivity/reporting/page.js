"use strict";
// Sorting and filtering of the table of cells, its state in the URL, and PNG files rendered from the plots.

const table = document.getElementById("cells");
const filters = document.getElementById("filters");
const heads = [...table.tHead.rows[0].cells];
const body = table.tBodies[0];
const box = table.parentElement;
const search = document.getElementById("search");
const cells = JSON.parse(document.getElementById("cell-data").content.textContent);
const FEW = 300; // maximum number of lines that are all drawn; of longer tables, only the visible lines are drawn
let order = cells.map((_, number) => number);
let shown = order;
let drawn = ""; // which lines are in the table
let height = 30; // of a line, pixels

const text = (entry) => (Array.isArray(entry) ? entry[0] : entry);
const key = (entry) => (Array.isArray(entry) ? entry[1] : entry);
const small = (entry) => (Array.isArray(entry) && entry[2]) || "";

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// Compare numbers by value and everything else as text. Missing values come last in both directions.
function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * String(a).localeCompare(String(b), "en", { numeric: true });
}

function line(number, place) {
  const row = make("tr", { "aria-rowindex": place + 2 });
  const opens = cells[number].findIndex(small); // delta_sel: the first with an interval
  cells[number].forEach((entry, column) => {
    const cell = make("td", { className: heads[column].className });
    cell.dataset.v = key(entry) === null ? "" : key(entry);
    if (column === opens) {
      cell.append(make("button", { type: "button", className: "open", title: "show the rows of this cell" }, text(entry)),
        " ", make("small", {}, small(entry)));
      cell.firstChild.addEventListener("click", () => openCell(number));
    } else {
      cell.append(text(entry), ...(small(entry) ? [" ", make("small", {}, small(entry))] : []));
    }
    row.append(cell);
  });
  return row;
}

const filler = (lines) => make("tr", { ariaHidden: "true" }, make("td", { style: `height: ${lines * height}px`, className: "filler" }));

// Draw the visible lines and some around them; the others are blank space of the same height.
function draw(all = false) {
  const many = shown.length > FEW && !all;
  const around = 15;
  const first = many ? Math.max(Math.floor(box.scrollTop / height) - around, 0) : 0;
  const last = many ? Math.min(first + Math.ceil(box.clientHeight / height) + 2 * around, shown.length) : shown.length;
  const state = `${first} ${last} ${shown.slice(first, last).join()}`;
  if (state === drawn) return;
  drawn = state;
  table.classList.toggle("many", shown.length > FEW);
  const lines = shown.slice(first, last).map((number, i) => line(number, first + i));
  body.replaceChildren(...(first ? [filler(first)] : []), ...lines, ...(last < shown.length ? [filler(shown.length - last)] : []));
  if (many && lines.length) height = lines[0].getBoundingClientRect().height || height;
}

function sort(column, direction) {
  heads.forEach((head, i) => { head.ariaSort = i === column ? direction : "none"; });
  const sign = direction === "ascending" ? 1 : -1;
  order = cells.map((_, number) => number);
  order.sort((a, b) => compare(key(cells[a][column]), key(cells[b][column]), sign));
}

let words; // searchable text of each line; computed at the first search
function filter() {
  const wanted = [...filters.querySelectorAll("select")].filter((select) => select.value !== "");
  const asked = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  if (asked.length && !words) words = cells.map((row) => row.map((entry) => `${text(entry)} ${small(entry)}`).join(" ").toLowerCase());
  shown = order.filter((number) => wanted.every((select) => String(key(cells[number][select.dataset.column])) === select.value)
    && asked.every((word) => words[number].includes(word)));
  document.getElementById("count").textContent = `${shown.length} of ${cells.length}`;
  drawn = "";
  draw();
}

// The state is part of the URL, so that it can be shared: #probe=gender&sort=4.descending&cell=...
function chosen() {
  const found = new URLSearchParams();
  for (const select of filters.querySelectorAll("select")) if (select.value) found.set(heads[select.dataset.column].innerText, select.value);
  if (search.value) found.set("search", search.value);
  const column = heads.findIndex((head) => head.ariaSort !== "none");
  if (column >= 0) found.set("sort", `${heads[column].innerText}.${heads[column].ariaSort}`);
  return found;
}

function remember(more = {}) {
  const found = chosen();
  for (const [name, value] of Object.entries(more)) if (value) found.set(name, value);
  const address = found.toString();
  if (location.protocol === "about:") return; // a frame in a notebook has no address
  if (address !== location.hash.slice(1)) history.replaceState(null, "", address ? `#${address}` : location.pathname + location.search);
}

function restore() {
  const found = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
  if (location.hash && !found.size) return; // a section of the page
  const named = (name) => heads.findIndex((head) => head.innerText === name);
  for (const select of filters.querySelectorAll("select")) select.value = found.get(heads[select.dataset.column].innerText) ?? "";
  search.value = found.get("search") ?? "";
  const [, column, direction] = (found.get("sort") ?? "").match(/^(.*)\.(ascending|descending)$/) ?? [];
  if (named(column) >= 0) sort(named(column), direction);
  filter();
  const cell = found.get("cell");
  if (cell) {
    const number = cells.findIndex((row) => address(row) === cell);
    if (number >= 0) openCell(number, found.get("rows") ?? "", found.get("outcome") ?? "");
  }
}

// Read JSON from a template that holds base64 of gzip.
async function unpacked(id) {
  const packed = document.getElementById(id).content.textContent;
  if (!packed) return null;
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

// Insert compressed plots when they scroll into view.
async function drawPlots() {
  const places = document.querySelectorAll("[data-plot]");
  if (!places.length) return;
  const plots = await unpacked("plot-data");
  const fill = (place) => {
    if (!place.firstChild) place.innerHTML = plots[place.dataset.plot];
  };
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      fill(entry.target);
      seen.unobserve(entry.target);
    }
  }, { rootMargin: "1000px" });
  places.forEach((place) => seen.observe(place));
  window.addEventListener("beforeprint", () => places.forEach(fill));
}

const address = (row) => [0, 1, 2, 3].map((column) => key(row[column])).join("|");

function savePng(name) {
  const source = document.querySelector(`a[download="${CSS.escape(name)}.svg"]`);
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas");
    const scale = 3;
    canvas.width = image.width * scale;
    canvas.height = image.height * scale;
    const paper = canvas.getContext("2d");
    paper.fillStyle = "white";
    paper.fillRect(0, 0, canvas.width, canvas.height);
    paper.drawImage(image, 0, 0, canvas.width, canvas.height);
    make("a", { download: `${name}.png`, href: canvas.toDataURL("image/png") }).click();
  };
  image.src = source.href;
}

heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
  const first = head.querySelector("button").dataset.first;
  const other = first === "ascending" ? "descending" : "ascending";
  sort(column, head.ariaSort === first ? other : first);
  filter();
  remember();
}));
for (const button of document.querySelectorAll("[data-png]")) {
  button.addEventListener("click", () => savePng(button.dataset.png));
}
filters.addEventListener("input", () => { filter(); box.scrollTop = 0; remember(); });
filters.addEventListener("submit", (event) => event.preventDefault());
box.addEventListener("scroll", () => draw(), { passive: true });
window.addEventListener("resize", () => draw());
window.addEventListener("beforeprint", () => draw(true));
window.addEventListener("afterprint", () => draw());
drawPlots();
