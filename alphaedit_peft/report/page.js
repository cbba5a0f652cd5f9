"use strict";
for (const box of document.querySelectorAll(".searched")) {
  const search = box.querySelector(".search");
  const input = box.querySelector("input");
  const output = box.querySelector("output");
  const rows = Array.from(box.querySelectorAll("tbody tr"));
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let seen = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      seen += row.hidden ? 0 : 1;
    });
    output.textContent = words.length ? seen + " of " + rows.length : rows.length + " in all";
  };
  const preset = () => {
    const found = /^#search=(.*)$/.exec(location.hash);
    if (!found) return;
    try {
      input.value = decodeURIComponent(found[1]);
    } catch {
      input.value = found[1];
    }
  };
  input.addEventListener("input", filter);
  window.addEventListener("hashchange", () => { preset(); filter(); });
  search.hidden = false;
  preset();
  filter();
}
