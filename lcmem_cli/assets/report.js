(() => {
  "use strict";
  const BATCH = 60;
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("report-data").textContent);
  if (!data.pairs.length) return;

  const table = byId("pair-table");
  const rows = byId("rows");
  const controls = byId("controls");
  const more = byId("more");
  const viewer = byId("viewer");
  const collator = new Intl.Collator("en", { numeric: true });
  const haystacks = data.pairs.map((pair) => [pair.q, pair.m, pair.id].join("\n").toLowerCase());
  const FIRST_DIRECTION = { s: "descending", p: "ascending", q: "ascending", m: "ascending", id: "ascending" };

  let sort = { key: "s", direction: "descending" };
  let shown = [];
  let rendered = 0;
  let open = -1;

  const element = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const formatted = (value) => (value === 0 || Math.abs(value) >= 0.001 ? value.toPrecision(4) : value.toExponential(2));

  function picture(index, alt) {
    const source = data.pictures[index];
    if (!source) return element("span", "missing", "no picture");
    const image = element("img");
    image.src = source;
    image.alt = alt;
    image.decoding = "async";
    return image;
  }

  function difference(pair, frame) {
    if (!data.pictures[pair.a] || !data.pictures[pair.b]) {
      frame.append(element("span", "missing", "no picture"));
      return frame;
    }
    frame.classList.add("difference");
    frame.setAttribute("role", "img");
    frame.setAttribute("aria-label", "Absolute difference of the two images");
    frame.append(picture(pair.a, ""), picture(pair.b, ""));
    return frame;
  }

  function cell(label, ...children) {
    const node = element("td");
    node.dataset.label = label;
    node.append(...children);
    return node;
  }

  function named(name) {
    const node = element("span", "name", name);
    node.title = name;
    return node;
  }

  function opener(position, child, label) {
    const button = element("button", "thumb");
    button.type = "button";
    button.setAttribute("aria-label", label);
    button.append(child);
    button.addEventListener("click", () => view(position));
    return button;
  }

  function row(position) {
    const pair = data.pairs[shown[position]];
    const node = element("tr");
    const generated = cell("Generated",
      opener(position, picture(pair.a, ""), `Enlarge the pair of ${pair.q}`), named(pair.q));
    if (pair.x) generated.append(element("span", "tag", "identical"));
    const frame = element("div", "thumb frame");
    node.append(
      generated,
      cell("Training image", opener(position, picture(pair.b, ""), `Enlarge the pair of ${pair.m}`), named(pair.m)),
      cell("Difference", difference(pair, frame)),
      cell("Identity", named(pair.id)),
      cell("Score", formatted(pair.s)),
      cell("p-value", formatted(pair.p)),
    );
    return node;
  }

  function renderMore() {
    const end = Math.min(rendered + BATCH, shown.length);
    const part = document.createDocumentFragment();
    for (; rendered < end; rendered += 1) part.append(row(rendered));
    rows.append(part);
    more.hidden = rendered >= shown.length;
  }

  function compare(a, b) {
    const left = data.pairs[a], right = data.pairs[b];
    const x = left[sort.key], y = right[sort.key];
    const order = typeof x === "number" ? x - y : collator.compare(x, y);
    return (sort.direction === "ascending" ? order : -order) || a - b;
  }

  function update() {
    const text = byId("filter-text").value.trim().toLowerCase();
    const score = byId("filter-score").valueAsNumber;
    const p = byId("filter-p").valueAsNumber;
    const kind = byId("filter-kind").value;
    shown = [];
    data.pairs.forEach((pair, index) => {
      if (text && !haystacks[index].includes(text)) return;
      if (pair.s < score || pair.p > p) return;
      if (kind !== "all" && pair.x !== (kind === "exact")) return;
      shown.push(index);
    });
    shown.sort(compare);
    for (const heading of table.querySelectorAll("th[data-key]")) {
      if (heading.dataset.key === sort.key) heading.setAttribute("aria-sort", sort.direction);
      else heading.removeAttribute("aria-sort");
    }
    byId("sort-key").value = sort.key;
    rows.replaceChildren();
    rendered = 0;
    renderMore();
    const total = data.pairs.length.toLocaleString("en");
    byId("status").textContent = shown.length === data.pairs.length
      ? `${total} flagged pairs` : `${shown.length.toLocaleString("en")} of ${total} flagged pairs`;
  }

  function sortBy(key, toggle) {
    const other = sort.direction === "ascending" ? "descending" : "ascending";
    sort = { key, direction: toggle && key === sort.key ? other : FIRST_DIRECTION[key] };
    update();
  }

  function view(position) {
    open = position;
    const pair = data.pairs[shown[position]];
    const figures = [
      ["Generated", picture(pair.a, `Generated image ${pair.q}`)],
      ["Training image", picture(pair.b, `Training image ${pair.m}`)],
      ["Difference", null],
    ].map(([title, content]) => {
      const figure = element("figure");
      const frame = element("div", "frame");
      if (content) frame.append(content);
      else difference(pair, frame);
      figure.append(frame, element("figcaption", "", title));
      return figure;
    });
    byId("stage").dataset.gain = byId("gain").value;
    byId("stage").replaceChildren(...figures);
    byId("viewer-title").textContent = `Pair ${position + 1} of ${shown.length}`;
    const facts = [["Generated", pair.q], ["Training image", pair.m], ["Identity", pair.id],
      ["Score", String(pair.s)], ["p-value", String(pair.p)]];
    if (pair.x) facts.push(["Content", "identical to the training image"]);
    byId("facts").replaceChildren(...facts.map(([term, value]) => {
      const line = element("div");
      line.append(element("dt", "", term), element("dd", "", value));
      return line;
    }));
    byId("previous").disabled = position === 0;
    byId("next").disabled = position === shown.length - 1;
    if (!viewer.open) viewer.showModal();
  }

  const step = (by) => {
    if (open + by >= 0 && open + by < shown.length) view(open + by);
  };

  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("reset", () => setTimeout(() => { // after the fields are cleared
    table.dataset.gain = byId("gain").value;
    sortBy("s", false);
  }));
  for (const id of ["filter-text", "filter-score", "filter-p"]) byId(id).addEventListener("input", update);
  byId("filter-kind").addEventListener("change", update);
  byId("gain").addEventListener("change", () => { table.dataset.gain = byId("gain").value; });
  byId("sort-key").addEventListener("change", (event) => sortBy(event.target.value, false));
  for (const heading of table.querySelectorAll("th[data-key]")) {
    heading.firstElementChild.addEventListener("click", () => sortBy(heading.dataset.key, true));
  }
  more.addEventListener("click", renderMore);
  new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting) && !more.hidden) renderMore();
  }, { rootMargin: "800px" }).observe(more.parentElement);
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });

  controls.hidden = false;
  table.hidden = false;
  update();
})();
