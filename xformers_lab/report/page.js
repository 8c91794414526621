"use strict";
(() => {
  const tip = document.getElementById("tip");
  const said = document.getElementById("said");
  const series = [...document.querySelectorAll("[data-s]")];
  const buttons = [...document.querySelectorAll("[data-pick]")];
  let focus = null;

  // A series that is chosen anywhere stands out everywhere; null lets it go.
  function choose(number) {
    focus = number;
    for (const element of series) {
      const mine = element.dataset.s === number;
      element.classList.toggle("dim", number !== null && !mine);
      element.classList.toggle("lit", number !== null && mine);
    }
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.pick === number));
  }

  function toggle(number) {
    choose(focus === number ? null : number);
    const button = buttons.find((one) => one.dataset.pick === number);
    const name = button ? button.textContent.trim() : "";
    said.textContent = focus === null ? "No series is chosen" : `Chosen: ${name}`;
  }

  for (const button of buttons) button.addEventListener("click", () => toggle(button.dataset.pick));
  document.addEventListener("click", (event) => {
    const found = event.target.closest("[data-s]");
    if (!found || event.target.closest("button, summary, details, a, input, label")) return;
    if (found.closest(".plot, #cells, .summary")) toggle(found.dataset.s);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    tip.hidden = true;
    if (focus !== null) toggle(focus);
  });

  // The words of a point are its <title>, which a page without a script shows as well. They are written with
  // textContent alone: none of them is ever read as markup.
  const words = new Map();
  for (const title of document.querySelectorAll(".plot title")) {
    words.set(title.parentElement, title.textContent);
    title.remove();
  }

  function show(text, x, y) {
    tip.replaceChildren();
    for (const part of text.split("\n")) {
      const line = document.createElement("div");
      line.textContent = part;
      tip.append(line);
    }
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(x + 14, document.documentElement.clientWidth - box.width - 8);
    const above = y - box.height - 12;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 8 ? above : y + 18}px`;
  }

  document.addEventListener("pointermove", (event) => {
    const point = event.target.closest(".point");
    if (point && words.has(point)) show(words.get(point), event.clientX, event.clientY);
    else tip.hidden = true;
  });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // In a chart the arrow keys go from point to point, and choose the series of each.
  for (const chart of document.querySelectorAll(".chart")) {
    const points = [...chart.querySelectorAll(".point[data-s]")].filter((point) => words.has(point));
    let at = -1;
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step || !points.length) return;
      event.preventDefault();
      at = at < 0 ? (step > 0 ? 0 : points.length - 1) : (at + step + points.length) % points.length;
      const box = points[at].getBoundingClientRect();
      choose(points[at].dataset.s);
      show(words.get(points[at]), box.x + box.width / 2, box.y);
      said.textContent = words.get(points[at]).replaceAll("\n", ", ");
    });
    chart.addEventListener("blur", () => { tip.hidden = true; });
  }

  const heads = [...document.querySelectorAll("#cells thead th")];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => sort(head, column)));

  function sort(head, column) {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = document.querySelector("#cells tbody");
    const keyed = [...body.rows].map((row) => {
      const cell = row.cells[column];
      return { row, key: cell.dataset.sort ?? cell.textContent, number: cell.classList.contains("number") };
    });
    keyed.sort((a, b) => {
      // What was not measured comes last, whichever way the column is sorted.
      if (a.key === "" || b.key === "") return (a.key === "") - (b.key === "");
      const order = a.number && b.number ? a.key - b.key : a.key.localeCompare(b.key, "en", { numeric: true });
      return down ? -order : order;
    });
    body.append(...keyed.map((item) => item.row));
  }

  // Paper has no way to open what is closed; the configurations of every cell would be a book.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open]):not(.unprinted, .unprinted *)")];
    for (const one of closed) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of closed) one.open = false;
  });
  document.documentElement.setAttribute("data-ready", "yes");
})();
