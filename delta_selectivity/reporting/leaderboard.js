"use strict";
// Show the selected board, and those of its SAEs that the filters accept.

const form = document.getElementById("filters");
const boards = [...document.querySelectorAll("[data-board]")];
const value = (id) => document.getElementById(id).value;

function filter() {
  const low = value("l0-low") === "" ? -Infinity : Number(value("l0-low"));
  const high = value("l0-high") === "" ? Infinity : Number(value("l0-high"));
  const anyL0 = low === -Infinity && high === Infinity;
  for (const board of boards) {
    board.hidden = board.dataset.board !== value("board");
    if (board.hidden) continue;
    const rows = [...board.querySelectorAll("tbody tr")];
    for (const row of rows) {
      const l0 = "l0" in row.dataset ? Number(row.dataset.l0) : NaN;
      const fits = (anyL0 || (l0 >= low && l0 <= high)) && (value("width") === "" || row.dataset.width === value("width"));
      row.hidden = !fits;
    }
    const n = rows.filter((row) => !row.hidden).length;
    document.getElementById("count").textContent = `${n} of ${rows.length} SAEs`;
  }
}

form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(() => { filter(); }));
filter();
