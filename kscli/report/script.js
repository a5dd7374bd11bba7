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
