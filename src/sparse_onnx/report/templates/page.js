
// Sorts a table by the column whose head is pressed, and filters its rows by words. Without scripts, tables are whole.
"use strict";
const element = (name, properties) => Object.assign(document.createElement(name), properties);

for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = element("button", { type: "button", textContent: head.textContent });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const cell = row => row.cells[column];
      const number = row => { const value = parseFloat(cell(row).dataset.sort); return isNaN(value) ? -Infinity : value; };
      const word = row => cell(row).textContent.trim();
      const rows = [...table.tBodies[0].rows];
      const compare = "sort" in cell(rows[0]).dataset
        ? (a, b) => number(a) === number(b) ? 0 : number(a) - number(b)
        : (a, b) => word(a).localeCompare(word(b), "en", { numeric: true });
      table.tBodies[0].append(...rows.sort((a, b) => down ? compare(b, a) : compare(a, b)));
    });
  });
}

for (const table of document.querySelectorAll("table.filterable")) {
  const rows = [...table.tBodies[0].rows];
  const field = element("input", { type: "search", placeholder: "words, such as: attention dense" });
  const label = element("label", { textContent: "Show layers with " });
  const count = element("span", { className: "note" });
  count.setAttribute("role", "status");
  label.append(field);
  const controls = element("div", { className: "controls" });
  controls.append(label, count);
  table.before(controls);
  const show = () => {
    const words = field.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length}`;
  };
  field.addEventListener("input", show);
  show();
}
