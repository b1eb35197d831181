// Filters, search and keys for the table "Which rows?", and links that open it. The page reads completely without it.
(() => {
  "use strict";
  const part = document.getElementById("rows");
  const controls = document.getElementById("rows-controls");
  if (!controls) return;
  const groups = [...part.querySelectorAll("tbody")];
  const rows = groups.flatMap((group) => [...group.querySelectorAll("tr.row")]);
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const search = document.getElementById("rows-search");
  const status = document.getElementById("rows-status");
  const buttons = [...controls.querySelectorAll("button[data-kind]")];
  let kind = "";
  let current = null;
  let begun = false; // whether someone has stood on `current`: the first step goes to it, the next ones from it

  const seen = () => rows.filter((row) => !row.hidden && !row.parentNode.hidden);

  function show() {
    const wanted = search.value.trim().toLowerCase();
    for (const group of groups) {
      let found = 0;
      for (const row of group.querySelectorAll("tr.row")) {
        row.hidden = !texts.get(row).includes(wanted);
        found += !row.hidden;
      }
      group.hidden = (kind && group.dataset.kind !== kind) || (wanted && !found);
    }
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
    const left = seen();
    status.textContent = `${left.length} of ${rows.length} listed rows`;
    if (!left.includes(current)) { mark(left[0] || null); begun = false; }
  }

  function mark(row) {
    if (current) { current.tabIndex = -1; current.removeAttribute("aria-current"); }
    current = row;
    if (current) { current.tabIndex = 0; current.setAttribute("aria-current", "true"); }
  }

  function step(by) {
    const left = seen();
    if (!left.length) return;
    const next = left.indexOf(current) + (begun ? by : 0);
    go(left[Math.max(0, Math.min(left.length - 1, next))]);
  }

  function go(row) {
    mark(row);
    begun = true;
    row.focus({ preventScroll: true });
    row.scrollIntoView({ block: "nearest" });
  }

  function open(target) {
    const group = groups.find((one) => `#${one.id}` === target);
    if (!group) return;
    part.open = true;
    search.value = "";
    kind = group.dataset.kind;
    show();
    part.scrollIntoView();
    if (seen().length) { mark(seen()[0]); current.focus({ preventScroll: true }); }
  }

  for (const row of rows) row.tabIndex = -1;
  for (const button of buttons) button.addEventListener("click", () => { kind = button.dataset.kind; show(); });
  for (const button of controls.querySelectorAll("button[data-step]")) {
    button.addEventListener("click", () => { step(Number(button.dataset.step)); });
  }
  search.addEventListener("input", show);
  part.addEventListener("focusin", (event) => {
    const row = event.target.closest("tr.row");
    if (row) { mark(row); begun = true; }
  });
  part.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === search) {
      if (event.key === "Escape") { search.value = ""; show(); if (current) current.focus(); }
      return;
    }
    if (event.key === "j") step(1);
    else if (event.key === "k") step(-1);
    else if (event.key === "/") search.focus();
    else if (event.key === "Enter" && event.target === current) {
      for (const more of current.querySelectorAll("details")) more.open = !more.open;
    } else return;
    event.preventDefault();
  });
  for (const link of document.querySelectorAll('a[href^="#rows-"]')) {
    link.addEventListener("click", (event) => { event.preventDefault(); open(link.getAttribute("href")); });
  }
  controls.hidden = false;
  show();
  open(location.hash);
})();
