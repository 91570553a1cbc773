"use strict";

// Sorting: a button in each heading; `data-value` of a cell, where there is one, is a number.
function valueOf(row, column) {
  const cell = row.cells[column];
  return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
}

function compare(a, b) {
  if (typeof a !== "number") return a.localeCompare(b, "en", { numeric: true });
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
  return a === b ? 0 : a < b ? -1 : 1;
}

function sortBy(heading) {
  const table = heading.closest("table");
  const column = heading.cellIndex;
  const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => ({ row, value: valueOf(row, column) }));
  rows.sort((a, b) => sign * compare(a.value, b.value));
  body.append(...rows.map(({ row }) => row));
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("th button");
  if (button) sortBy(button.closest("th"));
});

// Robust accuracy by class: a table is made when its part is first opened, so that a page on many
// classes opens quickly. Numbers are tenths of a percent.
function addCell(row, text, value) {
  const cell = row.insertCell();
  cell.textContent = text;
  if (value !== undefined) cell.dataset.value = value;
}

function addHeading(row, text, isNumber) {
  const heading = document.createElement("th");
  heading.scope = "col";
  heading.setAttribute("aria-sort", "none");
  if (isNumber) heading.className = "number";
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  heading.append(button);
  row.append(heading);
}

const percent = (tenths) => (tenths / 10).toFixed(1);

function drawClasses(details, data) {
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  addHeading(head, "class", false);
  for (const text of ["n", "clean %", ...data.eps.map((eps) => `eps ${eps}`)]) addHeading(head, text, true);
  const body = table.createTBody();
  for (const [name, n, clean, ...rest] of data.rows) {
    const row = body.insertRow();
    addCell(row, name);
    addCell(row, n, n);
    addCell(row, percent(clean), clean);
    for (let at = 0; at < rest.length; at += 3) {
      const [robust, low, high] = rest.slice(at, at + 3);
      addCell(row, `${percent(robust)} (${percent(low)}-${percent(high)})`, robust);
    }
  }
  details.querySelector(".scroll").replaceChildren(table);
}

const perClass = JSON.parse(document.getElementById("per-class").textContent);
for (const details of document.querySelectorAll("details[data-classes]")) {
  details.addEventListener("toggle", () => drawClasses(details, perClass[details.dataset.classes]), { once: true });
}

// Paper has nothing to click on: what is folded is shown, by-class tables excepted.
const folded = [];
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open], [data-classes])")) {
    folded.push(details);
    details.open = true;
  }
});
window.addEventListener("afterprint", () => {
  for (const details of folded.splice(0)) details.open = false;
});
