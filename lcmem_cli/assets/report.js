(() => {
  "use strict";
  const BATCH = 60;
  const TIERS = ["identical file", "same pixels", "same picture, altered", "alike"];
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("report-data").textContent);
  if (!data.pairs.length) return;

  const table = byId("pair-table");
  const rows = byId("rows");
  const controls = byId("controls");
  const more = byId("more");
  const viewer = byId("viewer");
  const SVG = document.querySelector("svg").namespaceURI;
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

  function drawing(name, box) {
    const node = document.createElementNS(SVG, "svg");
    node.setAttribute("class", name);
    node.setAttribute("viewBox", box.join(" "));
    node.setAttribute("aria-hidden", "true");
    node.append(document.createElementNS(SVG, "path"));
    return node;
  }

  function path(pair, width, height) {
    const steps = [];
    for (let i = 0; i < pair.o.length; i += 2) steps.push(`${pair.o[i] * width},${pair.o[i + 1] * height}`);
    return `M${steps.join("L")}Z`;
  }

  function original(pair, alt) {
    const image = picture(pair.b, alt);
    if (pair.w === null || image.tagName !== "IMG") return [image];
    const outline = drawing("outline", [0, 0, 1, 1]);
    image.addEventListener("load", () => { // it lies within its frame as the picture does
      const width = image.naturalWidth, height = image.naturalHeight;
      outline.setAttribute("viewBox", `0 0 ${width} ${height}`);
      outline.firstChild.setAttribute("d", path(pair, width, height));
    });
    return [image, outline];
  }

  function laidOver(pair, alt) {
    return pair.w === null ? element("span", "missing", "–") : picture(pair.w, alt);
  }

  function difference(pair, frame) {
    const first = pair.w === null ? pair.a : pair.w;
    if (!data.pictures[first] || !data.pictures[pair.b]) {
      frame.append(element("span", "missing", "no picture"));
      return frame;
    }
    frame.classList.add("difference");
    frame.setAttribute("role", "img");
    frame.setAttribute("aria-label", "Absolute difference of the two images");
    frame.append(picture(first, ""), picture(pair.b, ""));
    if (pair.w !== null) {
      const beyond = drawing("cover", [0, 0, 1, 1]);
      beyond.setAttribute("preserveAspectRatio", "none");
      beyond.firstChild.setAttribute("d", `M0,0H1V1H0Z${path(pair, 1, 1)}`);
      frame.append(beyond);
    }
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

  function opener(position, label, ...children) {
    const button = element("button", "thumb");
    button.type = "button";
    button.setAttribute("aria-label", label);
    button.append(...children);
    button.addEventListener("click", () => view(position));
    return button;
  }

  function row(position) {
    const pair = data.pairs[shown[position]];
    const node = element("tr");
    const generated = cell(data.word,
      opener(position, `Enlarge the pair of ${pair.q}`, picture(pair.a, "")), named(pair.q));
    if (pair.k !== "alike") generated.append(element("span", "tag", pair.k));
    if (pair.e) generated.append(element("span", "edit", pair.e));
    const frame = element("div", "thumb frame");
    node.append(
      generated,
      cell("Training image", opener(position, `Enlarge the pair of ${pair.m}`, ...original(pair, "")), named(pair.m)),
      cell("Laid over", laidOver(pair, `${pair.q} laid over ${pair.m}`)),
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

  window.addEventListener("beforeprint", () => { // paper has no button for more
    while (rendered < shown.length) renderMore();
  });

  function compare(a, b) {
    const left = data.pairs[a], right = data.pairs[b];
    const known = TIERS.indexOf(left.k) - TIERS.indexOf(right.k);
    if (known && (sort.key === "s" || sort.key === "p")) return known; // chance hits never come first
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
      if (kind !== "all" && pair.k !== kind) return;
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
      [data.word, [picture(pair.a, `${data.word} image ${pair.q}`)]],
      ["Training image", original(pair, `Training image ${pair.m}`)],
      ...(pair.w === null ? [] : [[`${data.word}, laid over`, [laidOver(pair, `${pair.q} laid over ${pair.m}`)]]]),
      [pair.w === null ? "Difference" : "Difference after alignment", null],
    ].map(([title, content]) => {
      const figure = element("figure");
      const frame = element("div", "frame");
      if (content) frame.append(...content);
      else difference(pair, frame);
      figure.append(frame, element("figcaption", "", title));
      return figure;
    });
    byId("stage").dataset.gain = byId("gain").value;
    byId("stage").replaceChildren(...figures);
    byId("viewer-title").textContent = `Pair ${position + 1} of ${shown.length}`;
    const facts = [[data.word, pair.q], ["Training image", pair.m], ["Identity", pair.id],
      ["Score", String(pair.s)], ["p-value", String(pair.p)]];
    facts.push(["What is known", pair.k]);
    if (pair.e) facts.push(["Edit", pair.e]);
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
