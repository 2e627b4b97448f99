"use strict";
// Sorting and filtering of the table of cells, and PNG files drawn from the plots. Without it all else works.

const table = document.getElementById("cells");
const filters = document.getElementById("filters");
const rows = [...table.tBodies[0].rows];
const keys = new Map(rows.map((row) => [row, [...row.cells].map((cell) => cell.dataset.v)]));
const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

// Numbers by size, everything else by letter; what is missing comes last in both orders.
function compare(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const difference = Number(a) - Number(b);
  return sign * (Number.isNaN(difference) ? a.localeCompare(b, "en", { numeric: true }) : difference);
}

function sort(head) {
  const first = head.querySelector("button").dataset.first;
  const other = first === "ascending" ? "descending" : "ascending";
  const order = head.ariaSort === first ? other : first;
  for (const each of head.parentElement.cells) each.ariaSort = "none";
  head.ariaSort = order;
  const sign = order === "ascending" ? 1 : -1;
  const column = head.cellIndex;
  rows.sort((a, b) => compare(keys.get(a)[column], keys.get(b)[column], sign));
  table.tBodies[0].append(...rows);
}

function filter() {
  const wanted = [...filters.querySelectorAll("select")].filter((select) => select.value !== "");
  const words = document.getElementById("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const fits = wanted.every((select) => keys.get(row)[select.dataset.column] === select.value)
      && words.every((word) => texts.get(row).includes(word));
    row.hidden = !fits;
    shown += fits;
  }
  document.getElementById("count").textContent = `${shown} of ${rows.length}`;
}

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
    const link = document.createElement("a");
    link.download = `${name}.png`;
    link.href = canvas.toDataURL("image/png");
    link.click();
  };
  image.src = source.href;
}

for (const head of table.tHead.rows[0].cells) head.querySelector("button").addEventListener("click", () => sort(head));
for (const button of document.querySelectorAll("[data-png]")) {
  button.addEventListener("click", () => savePng(button.dataset.png));
}
filters.addEventListener("input", filter);
filters.addEventListener("submit", (event) => event.preventDefault());
filter(); // a browser keeps what was chosen before a reload
