// Sorts a table by the column whose heading is pressed, and opens folded parts for printing. The page reads without it.
"use strict";

function sortKey(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
}

function sortBy(table, column, ascending) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const numeric = rows.some((row) => sortKey(row, column) !== null);
  const direction = ascending ? 1 : -1;
  rows.sort((a, b) => {
    if (!numeric) return direction * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
    const [x, y] = [sortKey(a, column), sortKey(b, column)];
    if (x === null || y === null) return (x === null) - (y === null); // cells without a number come last, either way
    return direction * (x - y);
  });
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = Array.from(table.tHead.rows[0].cells);
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sortBy(table, column, ascending);
    });
    heading.append(button);
  });
}

let opened = [];
addEventListener("beforeprint", () => {
  opened = Array.from(document.querySelectorAll("details:not([open])"));
  opened.forEach((details) => (details.open = true));
});
addEventListener("afterprint", () => opened.forEach((details) => (details.open = false)));
