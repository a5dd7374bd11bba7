"use strict";

// A header's button sorts its table's rows by that column, first ascending, then descending.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const column = head.cellIndex;
    const body = head.closest("table").tBodies[0];
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => ({ row, value: valueOf(row.cells[column]) }));
    rows.sort((a, b) => compared(a.value, b.value, descending));
    body.append(...rows.map(({ row }) => row));
  });
}

function valueOf(cell) {
  if (!("sort" in cell.dataset)) return cell.textContent;
  return cell.dataset.sort === "" ? null : Number(cell.dataset.sort);
}

// What is undefined goes last in either order.
function compared(a, b, descending) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  return descending ? -order : order;
}

// A table that is wider than its box is shown as records, a block a row: nothing is cut off.
const widths = new WeakMap();
const observer = new ResizeObserver((entries) => {
  for (const { target } of entries) fit(target);
});
for (const box of document.querySelectorAll(".scroll")) observer.observe(box);

function fit(box) {
  const table = box.querySelector("table");
  const width = box.offsetWidth;
  if (!table.tHead || width === 0 || widths.get(box) === width) return;
  widths.set(box, width);
  table.classList.remove("records");
  if (table.scrollWidth <= box.clientWidth) return;
  if (!table.dataset.labelled) label(table);
  table.classList.add("records");
}

// Each cell is told its column's title; the roles are those that a table without its layout loses.
function label(table) {
  table.dataset.labelled = "yes";
  const titles = [...table.tHead.rows[0].cells].map((head) => head.textContent);
  table.setAttribute("role", "table");
  for (const row of table.rows) {
    row.setAttribute("role", "row");
    for (const cell of row.cells) {
      const head = cell.closest("thead") ? "columnheader" : "rowheader";
      cell.setAttribute("role", cell.tagName === "TH" ? head : "cell");
      cell.dataset.label = titles[cell.cellIndex];
    }
  }
}
