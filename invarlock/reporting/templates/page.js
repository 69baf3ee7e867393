"use strict";
// A table is sorted by the button in a column's heading: numbers by size, anything else by the alphabet.
for (const button of document.querySelectorAll("th > button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    const body = heading.closest("table").tBodies[0];
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const key = (row) => row.cells[heading.cellIndex].textContent.trim();
    const compare = (a, b) => {
      const numbers = [a, b].map((text) => parseFloat(text.replaceAll(",", "")));
      const known = numbers.map(Number.isFinite);
      if (known[0] !== known[1]) return known[0] ? -1 : 1;
      const order = known[0] ? numbers[0] - numbers[1] : a.localeCompare(b);
      return ascending ? order : -order;
    };
    body.append(...[...body.rows].sort((one, other) => compare(key(one), key(other))));
  });
}
// What is folded is printed too.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of folded) details.open = false;
});
