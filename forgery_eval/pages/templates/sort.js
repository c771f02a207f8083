"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[table.tBodies.length - 1];
  const number = (cell) => parseFloat(cell.dataset.order ?? cell.firstChild.textContent);
  const compare = (one, other) => {
    const [a, b] = [number(one), number(other)];
    if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b) || one.textContent.localeCompare(other.textContent);
    return a - b;
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      body.append(...[...body.rows].sort((one, other) => sign * compare(one.cells[column], other.cells[column])));
    });
  });
}
