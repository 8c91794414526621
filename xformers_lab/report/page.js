"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const tip = document.getElementById("tip");
  const views = new Map();
  let focus = null;

  // Names are written with textContent only: none of them is ever read as markup.
  function showTip(_handler, event, _item, value) {
    if (value === null || value === undefined || value === "" || !event) {
      tip.hidden = true;
      return;
    }
    tip.replaceChildren();
    for (const [key, text] of Object.entries(value)) {
      const line = document.createElement("div");
      line.textContent = key === "length" ? `at ${text} tokens` : text;
      tip.append(line);
    }
    tip.hidden = false;
    const point = event.touches && event.touches.length ? event.touches[0] : event;
    const box = tip.getBoundingClientRect();
    const left = Math.min(point.clientX + 14, document.documentElement.clientWidth - box.width - 8);
    const above = point.clientY - box.height - 12;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 8 ? above : point.clientY + 18}px`;
  }

  // Vega may ask for nothing from outside; the policy of the page forbids it as well.
  const loader = { load: refuse, sanitize: refuse, http: refuse, file: refuse };
  function refuse() {
    return Promise.reject(new Error("this page loads nothing"));
  }

  async function draw(place) {
    const number = Number(place.dataset.chart);
    const options = { mode: "vega-lite", ast: true, actions: false, renderer: "svg", defaultStyle: false, tooltip: showTip, loader };
    const { view } = await window.vegaEmbed(place, specs[number], options);
    views.set(number, view);
  }

  function signal(view, name, value) {
    view.signal(name, value).runAsync();
  }

  for (const choice of document.querySelectorAll("select[data-chart]")) {
    choice.addEventListener("change", () => signal(views.get(Number(choice.dataset.chart)), "at", Number(choice.value)));
  }

  const legend = [...document.querySelectorAll(".legend button")];
  for (const button of legend) {
    button.addEventListener("click", () => {
      const series = Number(button.dataset.series);
      focus = focus === series ? null : series;
      for (const other of legend) other.setAttribute("aria-pressed", String(Number(other.dataset.series) === focus));
      for (const view of views.values()) signal(view, "focus", focus);
    });
  }

  const heads = [...document.querySelectorAll("th")];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => sort(head, column)));

  function sort(head, column) {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = document.querySelector("tbody");
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

  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  Promise.all([...document.querySelectorAll("div.chart")].map(draw)).then(
    () => document.documentElement.setAttribute("data-charts", "drawn"),
    (error) => console.error(error),
  );
})();
