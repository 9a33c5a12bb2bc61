"use strict";
// Comfort only: without this script everything is on the page. Nothing is fetched and nothing is stored.
const all = (selector, within = document) => Array.from(within.querySelectorAll(selector));
const press = (button, on) => button.setAttribute("aria-pressed", String(on));

function short(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toPrecision(4)}M`;
  if (size >= 1e4) return `${(value / 1e3).toPrecision(4)}k`;
  return String(Number(value.toPrecision(4)));
}

function nearest(xs, x) {
  let best = 0;
  for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
  return best;
}

// Values under the pointer, in words below the chart.
for (const figure of all("figure[data-chart]")) {
  const { series, frame, unit, x: name } = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector('svg[role="img"]');
  const cursor = figure.querySelector(".cursor");
  const output = figure.querySelector("output");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const share = Math.min(1, Math.max(0, (at - frame.left) / (frame.right - frame.left)));
    const x = frame.log ? frame.low * (frame.high / frame.low) ** share : frame.low + share * (frame.high - frame.low);
    const place = frame.left + share * (frame.right - frame.left);
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.classList.add("on");
    const values = series.map((one) => {
      const i = nearest(one.x, x);
      return `${one.name} ${short(one.y[i])} (at ${short(one.x[i])})`;
    });
    output.textContent = `${values.join(", ")} ${unit ? `[${unit}]` : ""} ${name}`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.classList.remove("on");
    output.textContent = "\u00a0";
  });
}

// Light, dark, or what the system says.
const theme = document.getElementById("theme");
const themes = ["auto", "light", "dark"];
theme.addEventListener("click", () => {
  const next = themes[(themes.indexOf(theme.dataset.now) + 1) % themes.length];
  theme.dataset.now = next;
  theme.textContent = `theme: ${next}`;
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
});

// One run at a time in the sections that are about single runs.
const choices = all("button[data-show-run]");
function showRun(number) {
  for (const block of all("[data-run]")) block.classList.toggle("hide", block.dataset.run !== number);
  for (const choice of choices) press(choice, choice.dataset.showRun === number);
}
for (const choice of choices) choice.addEventListener("click", () => showRun(choice.dataset.showRun));
if (choices.length) showRun(choices[0].dataset.showRun);

// The map: which components, which classes, and what a point is.
for (const look of all("[data-look]")) {
  const maps = all(".map", look);
  const views = all("button[data-map]", look);
  const showMap = (number) => {
    maps.forEach((map, i) => map.classList.toggle("hide", String(i) !== number));
    views.forEach((view) => press(view, view.dataset.map === number));
  };
  views.forEach((view) => view.addEventListener("click", () => showMap(view.dataset.map)));
  if (views.length) showMap("0");
  const names = JSON.parse(look.dataset.look);
  const circles = all("circle[data-i]", look);
  for (const button of all("button[data-class]", look)) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      press(button, on);
      for (const circle of circles) {
        if (names.classes[circle.dataset.i] === Number(button.dataset.class)) circle.classList.toggle("off", !on);
      }
    });
  }
  const canvas = look.querySelector("canvas");
  const sprite = look.querySelector("img.sprite");
  const words = look.querySelector(".inspect p");
  for (const circle of circles) {
    circle.addEventListener("click", () => {
      const i = Number(circle.dataset.i);
      for (const other of circles) other.classList.toggle("chosen", other.dataset.i === circle.dataset.i);
      words.textContent = names.words[i];
      if (!canvas || !sprite) return;
      const { cell, columns } = names;
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = false;
      context.drawImage(sprite, (i % columns) * cell, Math.floor(i / columns) * cell, cell, cell,
        0, 0, canvas.width, canvas.height);
    });
  }
}

// Rejected images: by reason and by words.
for (const block of all("[data-quarantine]")) {
  const rows = all("tbody tr[data-reason]", block);
  const search = block.querySelector('input[type="search"]');
  const reasons = all("button[data-reason]", block);
  let chosen = "";
  const filter = () => {
    const words = search.value.toLowerCase();
    for (const row of rows) {
      const fits = (!chosen || row.dataset.reason === chosen) && row.textContent.toLowerCase().includes(words);
      row.classList.toggle("hide", !fits);
    }
  };
  search.addEventListener("input", filter);
  for (const button of reasons) {
    button.addEventListener("click", () => {
      chosen = chosen === button.dataset.reason ? "" : button.dataset.reason;
      reasons.forEach((other) => press(other, other.dataset.reason === chosen));
      filter();
    });
  }
}

// A larger picture.
const large = document.getElementById("large");
for (const image of all("img.pixels")) {
  image.addEventListener("click", () => {
    const shown = large.querySelector("img");
    shown.src = image.src;
    shown.alt = image.alt;
    shown.classList.toggle("small", image.classList.contains("small"));
    large.querySelector("p").textContent = image.alt;
    large.showModal();
  });
}
large.addEventListener("click", () => large.close());
