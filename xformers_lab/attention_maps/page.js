"use strict";
(() => {
  const MOST_SAID = 6; // weights of a token, in words
  const GROUND = 0.08; // the shade of what may be looked at
  const tip = document.getElementById("tip");
  const said = document.getElementById("said");
  const picked = { layer: null, head: null, way: "queries" };
  // The token that stands out: of which text, as a query or a key, and its place. Of each text one is chosen; one that
  // is pointed at comes before it.
  const chosen = new Map();
  let over = null;

  const panels = [...document.querySelectorAll(".panel")].map((element) => {
    const about = JSON.parse(element.dataset.about);
    const bytes = Uint8Array.from(atob(element.dataset.weights), (sign) => sign.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    const strips = {};
    for (const strip of element.querySelectorAll(".strip")) strips[strip.dataset.side] = strip;
    strips.keys ??= strips.queries;
    const spans = { queries: [...strips.queries.children], keys: [...strips.keys.children] };
    const texts = { queries: spans.queries.map((one) => one.textContent), keys: spans.keys.map((one) => one.textContent) };
    const T = spans.queries.length;
    const S = spans.keys.length;
    const canvas = element.querySelector("canvas");
    return { element, about, view, strips, spans, texts, T, S, canvas, name: element.querySelector("h3").textContent.trim() };
  });

  // The weight of a query and a key in the head that is chosen; NaN in a model that has no such head.
  function weight(panel, query, key) {
    const layer = panel.about.layers.indexOf(picked.layer);
    const head = panel.about.heads.indexOf(picked.head);
    if (layer < 0 || head < 0) return NaN;
    const at = ((layer * panel.about.heads.length + head) * panel.T + query) * panel.S + key;
    return panel.view.getInt16(2 * at, true) * panel.about.scale;
  }

  function sees(panel, query, key) {
    const { rows, columns, causal, documents } = panel.about;
    if (documents && documents[query] !== documents[key]) return false;
    return rows[query] && columns[key] && (!causal || key <= query);
  }

  function share(value) {
    const percent = Math.abs(value * 100);
    const text = percent > 0 && percent < 0.05 ? "< 0.1 %" : `${percent.toFixed(percent < 9.95 ? 1 : 0)} %`;
    return value < 0 && percent >= 0.05 ? `\u2212${text}` : text;
  }

  // What stands out in a panel: the token over or chosen, where the panel has its text on that side.
  function focusOf(panel) {
    for (const one of [over, chosen.get(panel.about.queries), chosen.get(panel.about.keys)]) {
      if (one && panel.about[one.side] === one.text) return one;
    }
    return null;
  }

  function numbers(panel, focus) {
    const others = focus.side === "queries" ? panel.S : panel.T;
    return Array.from({ length: others }, (_, other) => {
      const [query, key] = focus.side === "queries" ? [focus.at, other] : [other, focus.at];
      return { other, weight: weight(panel, query, key), seen: sees(panel, query, key) };
    });
  }

  function show(panel) {
    const focus = focusOf(panel);
    for (const span of new Set([...panel.spans.queries, ...panel.spans.keys])) {
      span.classList.remove("at", "unseen");
      span.style.removeProperty("background-color");
    }
    const list = panel.element.querySelector(".says ol");
    const who = panel.element.querySelector(".who");
    list.replaceChildren();
    who.textContent = "";
    draw(panel, focus);
    if (!focus) return;
    const all = numbers(panel, focus);
    if (Number.isNaN(all[0].weight)) {
      who.textContent = "has no such head";
      return;
    }
    const other = focus.side === "queries" ? "keys" : "queries";
    const most = Math.max(...all.map((one) => Math.abs(one.weight))) || 1;
    for (const one of all) {
      const span = panel.spans[other][one.other];
      span.classList.toggle("unseen", !one.seen);
      const part = Math.round((100 * 0.6 * Math.abs(one.weight)) / most);
      const colour = one.weight < 0 ? "var(--negative)" : "var(--chosen)";
      if (part > 0) span.style.setProperty("background-color", `color-mix(in srgb, ${colour} ${part}%, transparent)`);
    }
    const own = panel.spans[focus.side][focus.at];
    own.classList.remove("unseen");
    own.classList.add("at");
    const word = focus.side === "queries" ? "looks at" : "is looked at by";
    who.textContent = `${panel.texts[focus.side][focus.at]} (${focus.at + 1}) ${word}`;
    const ranked = all.filter((one) => one.weight !== 0).sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
    for (const one of ranked.slice(0, MOST_SAID)) {
      const line = document.createElement("li");
      const text = document.createElement("span");
      const bar = document.createElement("span");
      const name = document.createElement("code");
      text.textContent = share(one.weight);
      bar.className = one.weight < 0 ? "bar negative" : "bar";
      // A full bar is a weight of 1, or the strongest where effective weights are above that.
      bar.style.setProperty("width", `${(100 * Math.abs(one.weight)) / Math.max(1, Math.abs(ranked[0].weight))}%`);
      name.textContent = `${panel.texts[other][one.other]} (${one.other + 1})`;
      line.append(text, bar, name);
      list.append(line);
    }
    if (!ranked.length) who.textContent += " nothing";
  }

  // ---- the large map ------------------------------------------------------------------------------------------------

  function channels(element, name) {
    const probe = document.createElement("span");
    probe.style.setProperty("color", `var(${name})`);
    element.append(probe);
    const found = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
    probe.remove();
    return found;
  }

  // The head that is chosen as a picture of one pixel for each pair, and its greatest weight; kept until another is.
  function shaded(panel) {
    const { T, S } = panel;
    const ink = channels(panel.element, "--ink");
    const below = channels(panel.element, "--negative");
    const key = [picked.layer, picked.head, ...ink].join(" ");
    if (panel.shaded && panel.shaded.key === key) return panel.shaded;
    const image = document.createElement("canvas");
    [image.width, image.height] = [S, T];
    const pixels = new ImageData(S, T);
    let most = 0;
    for (let t = 0; t < T; t++) {
      const sights = Array.from({ length: S }, (_, s) => sees(panel, t, s)).filter(Boolean).length;
      if (sights < 2) continue; // who may look at one key alone gives it all
      for (let s = 0; s < S; s++) most = Math.max(most, Math.abs(weight(panel, t, s)) || 0);
    }
    for (let t = 0; t < T; t++) {
      for (let s = 0; s < S; s++) {
        const one = weight(panel, t, s) || 0;
        const shade = most ? Math.min(1, Math.sqrt(Math.abs(one) / most)) : 0;
        const ground = sees(panel, t, s) ? GROUND : 0;
        pixels.data.set([...(one < 0 ? below : ink), Math.round(255 * Math.max(ground, shade))], 4 * (t * S + s));
      }
    }
    image.getContext("2d").putImageData(pixels, 0, 0);
    panel.shaded = { key, image, most };
    return panel.shaded;
  }

  function draw(panel, focus) {
    const { canvas, T, S } = panel;
    const wide = canvas.clientWidth;
    if (!wide) return;
    const ratio = Math.max(1, devicePixelRatio);
    const high = Math.max(40, Math.min(wide * 1.6, (wide * T) / S));
    canvas.style.setProperty("height", `${high}px`);
    canvas.width = Math.round(wide * ratio);
    canvas.height = Math.round(high * ratio);
    const { image, most } = shaded(panel);
    const brush = canvas.getContext("2d");
    brush.imageSmoothingEnabled = false;
    brush.drawImage(image, 0, 0, canvas.width, canvas.height);
    panel.element.querySelector(".most").textContent = most ? `strongest shade: ${share(most)}` : "";
    if (!focus) return;
    const [x, y] = [canvas.width / S, canvas.height / T];
    brush.strokeStyle = `rgb(${channels(panel.element, "--chosen").join(" ")})`;
    brush.lineWidth = 2 * ratio;
    const box = focus.side === "queries" ? [0, focus.at * y, canvas.width, y] : [focus.at * x, 0, x, canvas.height];
    const edge = brush.lineWidth / 2;
    const [left, top] = [Math.max(edge, box[0]), Math.max(edge, box[1])];
    const right = Math.min(canvas.width - edge, box[0] + box[2]);
    const bottom = Math.min(canvas.height - edge, box[1] + box[3]);
    brush.strokeRect(left, top, right - left, bottom - top);
  }

  // ---- what is chosen -----------------------------------------------------------------------------------------------

  // On which side a token of a strip stands: of one text that looks at itself, as the reader has chosen.
  function sideOf(panel, strip) {
    return panel.about.crosses ? strip.dataset.side : picked.way;
  }

  function token(panel, side, at) {
    return { text: panel.about[side], side, at };
  }

  function choose(one) {
    chosen.set(one.text, one);
  }

  function update() {
    for (const panel of panels) show(panel);
    const { layer, head } = picked;
    for (const one of document.querySelectorAll(".maps [data-layer]")) {
      one.setAttribute("aria-pressed", String(Number(one.dataset.layer) === layer && Number(one.dataset.head) === head));
    }
    for (const row of document.querySelectorAll("#heads tbody tr")) {
      row.classList.toggle("lit", Number(row.dataset.layer) === layer && Number(row.dataset.head) === head);
    }
  }

  function speak() {
    const lines = panels.map((panel) => {
      const parts = [...panel.element.querySelectorAll(".says li")].slice(0, 3);
      const words = parts.map((line) => `${line.lastChild.textContent} ${line.firstChild.textContent}`);
      return `${panel.name}: ${panel.element.querySelector(".who").textContent} ${words.join(", ")}`;
    });
    said.textContent = lines.join(". ");
  }

  for (const panel of panels) {
    for (const strip of new Set(Object.values(panel.strips))) {
      strip.addEventListener("pointerover", (event) => {
        const span = event.target.closest("[data-at]");
        if (!span || event.pointerType === "touch") return;
        over = token(panel, sideOf(panel, strip), Number(span.dataset.at));
        update();
      });
      strip.addEventListener("pointerleave", () => { over = null; update(); });
      strip.addEventListener("click", (event) => {
        const span = event.target.closest("[data-at]");
        if (!span) return;
        choose(token(panel, sideOf(panel, strip), Number(span.dataset.at)));
        update();
      });
      strip.addEventListener("keydown", (event) => {
        const side = sideOf(panel, strip);
        const last = panel.spans[side].length - 1;
        const focus = focusOf(panel);
        const at = focus && focus.side === side ? focus.at : -1;
        const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        over = null;
        const next = token(panel, side, Math.min(last, Math.max(0, to)));
        choose(next);
        update();
        const box = panel.spans[side][next.at];
        if (strip.scrollHeight > strip.clientHeight) strip.scrollTop = box.offsetTop - strip.offsetTop - strip.clientHeight / 2;
        speak();
      });
    }
    const place = (event) => {
      const box = panel.canvas.getBoundingClientRect();
      const clamp = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
      const query = clamp((event.clientY - box.top) / box.height, panel.T);
      return [query, clamp((event.clientX - box.left) / box.width, panel.S)];
    };
    const tokenAt = (query, key) => token(panel, picked.way, picked.way === "queries" ? query : key);
    panel.canvas.addEventListener("pointermove", (event) => {
      const [query, key] = place(event);
      const one = tokenAt(query, key);
      if (!over || over.at !== one.at || over.side !== one.side) {
        over = one;
        update();
      }
      const words = sees(panel, query, key) ? share(weight(panel, query, key)) : "cannot look there";
      tip.replaceChildren();
      for (const text of [words, `query ${panel.texts.queries[query]} (${query + 1})`, `key ${panel.texts.keys[key]} (${key + 1})`]) {
        const line = document.createElement("div");
        line.textContent = text;
        tip.append(line);
      }
      tip.hidden = false;
      const size = tip.getBoundingClientRect();
      const above = event.clientY - size.height - 12;
      tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, document.documentElement.clientWidth - size.width - 8))}px`;
      tip.style.top = `${above > 8 ? above : event.clientY + 18}px`;
    });
    panel.canvas.addEventListener("pointerleave", () => { over = null; tip.hidden = true; update(); });
    panel.canvas.addEventListener("click", (event) => { choose(tokenAt(...place(event))); update(); });
  }

  function pick(name, value) {
    const input = document.querySelector(`input[name="${name}"][value="${CSS.escape(String(value))}"]`);
    if (input) input.checked = true;
    picked[name] = name === "way" ? value : Number(value);
  }

  for (const input of document.querySelectorAll(".controls input")) {
    if (input.checked) pick(input.name, input.value);
    input.addEventListener("change", () => {
      pick(input.name, input.value);
      // The same tokens, seen from the other side.
      if (input.name === "way") for (const one of [...chosen.values()]) choose({ ...one, side: picked.way });
      update();
    });
  }
  document.addEventListener("click", (event) => {
    const found = event.target.closest(".maps [data-layer], #heads tbody tr");
    if (!found) return;
    pick("layer", found.dataset.layer);
    pick("head", found.dataset.head);
    update();
    const name = panels[Number(found.dataset.of)].name;
    said.textContent = `${name}: layer ${picked.layer}, head ${picked.head}`;
    if (found.matches("button")) document.getElementById("look").scrollIntoView({ block: "start" });
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    chosen.clear();
    over = null;
    tip.hidden = true;
    update();
  });

  // A point of the chart says what it is; its words are text alone.
  for (const title of document.querySelectorAll(".plot title")) {
    const words = title.textContent;
    const point = title.parentElement;
    title.remove();
    point.addEventListener("pointermove", (event) => {
      tip.replaceChildren(...words.split("\n").map((text) => Object.assign(document.createElement("div"), { textContent: text })));
      tip.hidden = false;
      const size = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, document.documentElement.clientWidth - size.width - 8))}px`;
      tip.style.top = `${Math.max(8, event.clientY - size.height - 12)}px`;
    });
    point.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  document.getElementById("look").hidden = false;
  // At first a token in the middle of the text: the first ones have nothing to choose from.
  for (const panel of panels) {
    const real = panel.about.rows.flatMap((is, at) => (is ? [at] : []));
    if (!chosen.has(panel.about.queries) && real.length) choose(token(panel, "queries", real[Math.floor((2 * real.length) / 3)]));
  }
  update();
  let wide = innerWidth;
  addEventListener("resize", () => {
    if (wide === innerWidth) return; // a phone hides its bar of addresses
    wide = innerWidth;
    update();
  });
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", update);
  document.documentElement.setAttribute("data-ready", "yes");
})();
