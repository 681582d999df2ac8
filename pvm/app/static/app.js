// All that a visitor does is kept here, in the visitor's browser. docs: pvm/app/server.py

const $ = (selector, inside = document) => inside.querySelector(selector);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

function shape(tag, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const bytes = (number) => (number < 1e6 ? `${(number / 1e3).toFixed(1)} kB` : `${(number / 1e6).toFixed(1)} MB`);
// A token as text that can be seen.
const visible = (token) => token.replaceAll("\n", "↵").replace(/^ /, "·") || "∅";

const setup = await (await fetch("setup")).json();
const pictures = { image: null, memory: null }; // data: URIs
let asking = null; // an AbortController

// One model's answer

class Column {
  constructor(useBranches, model) {
    this.root = $("#column").content.cloneNode(true).firstElementChild;
    this.tokens = [];
    this.chosen = 0;
    setup.models.forEach(({ name }, k) => this.input("model").append(element("option", { value: k }, name)));
    this.input("model").value = model;
    this.input("use_pvm").checked = useBranches;
    this.input("gate_scale").max = setup.largest_gate_scale;
    this.input("model").addEventListener("change", () => this.describe());
    this.describe();
    const answer = $(".answer", this.root);
    answer.addEventListener("click", ({ target }) => {
      if (target.dataset.index) choose(Number(target.dataset.index));
    });
    answer.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step && this.tokens[this.chosen + step]) choose(this.chosen + step);
      if (step) event.preventDefault();
    });
    $("#columns").append(this.root);
  }

  input(name) {
    return this.root.querySelector(`[name=${name}]`);
  }

  describe() {
    const model = setup.models[this.input("model").value];
    $(".about", this.root).textContent = model.about;
    for (const label of this.root.querySelectorAll(".of-branches")) label.hidden = !model.has_branches;
    for (const label of this.root.querySelectorAll(".of-image")) label.hidden = !model.reads_image;
  }

  get question() {
    return {
      model: Number(this.input("model").value),
      text: $("#text").value,
      image: pictures.image ?? "",
      use_pvm: this.input("use_pvm").checked,
      image_kv_cache: this.input("image_kv_cache").value,
      memory: this.input("memory").value ? (pictures.memory ?? "") : null,
      gate_scale: this.input("gate_scale").valueAsNumber,
    };
  }

  async ask(signal) {
    this.question_asked = this.question;
    this.tokens = [];
    this.prompt = this.end = null;
    this.chosen = 0;
    for (const part of [".answer", ".facts", ".maps", ".chart svg", ".candidates tbody"]) {
      $(part, this.root).replaceChildren();
    }
    try {
      const response = await fetch("answer", { method: "POST", body: JSON.stringify(this.question_asked), signal });
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        const lines = (rest + part.value).split("\n");
        rest = lines.pop();
        for (const line of lines) await this.take(JSON.parse(line));
      }
      if (rest) await this.take(JSON.parse(rest));
      if (!this.end) this.fail("The server stopped answering.");
    } catch (error) {
      if (error.name !== "AbortError") this.fail(`The server cannot be reached (${error.message}).`);
    }
    this.root.dataset.state = "done";
  }

  async take(event) {
    if (event.error) {
      this.end = "error";
      this.fail(event.error);
    } else if (event.end) {
      this.end = event.end;
      if (event.end === "length") $(".answer", this.root).append(" … (cut here)");
      this.show();
    } else if (event.grid) {
      this.prompt = event;
      this.pictures = {};
      for (const name of ["image", "memory"]) {
        this.pictures[name] = Object.assign(new Image(), { src: event[name] });
        await this.pictures[name].decode();
      }
    } else {
      const index = this.tokens.push(event) - 1;
      const token = element("span", { role: "option", "data-index": index }, event.text || "\u200b");
      $(".answer", this.root).append(token);
      if (!choose.byHand) this.chosen = index;
      this.draw();
    }
  }

  fail(sentence) {
    $(".answer", this.root).append(element("span", { class: "error" }, sentence));
  }

  // Tokens may come faster than the screen is drawn.
  draw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.show();
    });
  }

  show() {
    if (!this.tokens.length) return;
    this.chosen = Math.min(this.chosen, this.tokens.length - 1);
    const token = this.tokens[this.chosen];
    $(".answer [aria-selected]", this.root)?.removeAttribute("aria-selected");
    $(`.answer [data-index="${this.chosen}"]`, this.root).setAttribute("aria-selected", true);
    const saved = token.bytes_saved ? `, ${bytes(token.bytes_saved)} saved (${this.prompt.visual_tokens} visual tokens)` : "";
    $(".facts", this.root).textContent =
      `Token ${this.chosen + 1} of ${this.tokens.length} · cache ${bytes(token.cache_bytes)}${saved}`;
    this.showMaps(token);
    this.showChart();
    this.showCandidates(token);
  }

  showMaps(token) {
    const maps = [["self", "Self-attention", this.pictures.image, token.self_attention, `${percent(token.share)} on it`]];
    for (const [layer, weights] of Object.entries(token.branches)) {
      maps.push(["branch", `Branch, layer ${layer}`, this.pictures.memory, weights, ""]);
    }
    $(".maps", this.root).replaceChildren(
      ...maps.map(([kind, title, picture, weights, share]) => {
        const says = weights.length ? share || `peak ${percent(Math.max(...weights))}` : "not in the cache";
        const caption = element("figcaption", {}, title, element("br"), says);
        return element("figure", { class: kind }, this.heatMap(picture, weights), caption);
      }),
    );
  }

  heatMap(picture, weights) {
    const [rows, columns] = this.prompt.grid;
    const scale = 320 / Math.max(picture.width, picture.height);
    const canvas = element("canvas", { width: picture.width * scale, height: picture.height * scale });
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = scale < 4;
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    if (!weights.length) {
      context.fillStyle = "rgb(0 0 0 / 75%)";
      context.fillRect(0, 0, canvas.width, canvas.height);
    }
    const [width, height] = [canvas.width / columns, canvas.height / rows];
    const peak = Math.max(...weights);
    context.fillStyle = getComputedStyle(this.root).getPropertyValue("--attention");
    weights.forEach((weight, k) => {
      context.globalAlpha = 0.85 * (weight / peak);
      context.fillRect((k % columns) * width, Math.floor(k / columns) * height, width, height);
    });
    return canvas;
  }

  showChart() {
    const asked = this.prompt.shares;
    // The last token of the question is where the first of the answer is written.
    const shares = [...asked.slice(0, -1), ...this.tokens.map(({ share }) => share)];
    const branches = Object.keys(this.tokens[0].branches).length;
    const [left, right, top, bottom] = [54, 470, 12, 160];
    const x = (k) => left + ((right - left) * k) / Math.max(shares.length - 1, 1);
    const y = (share) => bottom - (bottom - top) * share;
    const first = asked.length - 1;
    const line = (values) => values.map((value, k) => `${x(k).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    const parts = [shape("rect", { class: "written", x: x(first), y: top, width: right - x(first), height: bottom - top })];
    for (const share of [0, 0.5, 1]) {
      parts.push(shape("line", { class: "grid", x1: left, x2: right, y1: y(share), y2: y(share) }));
      parts.push(shape("text", { x: left - 4, y: y(share) + 4, "text-anchor": "end" }, `${Math.round(100 * share)} %`));
    }
    const chosen = x(first + this.chosen);
    parts.push(shape("line", { class: "chosen", x1: chosen, x2: chosen, y1: top, y2: bottom }));
    parts.push(shape("polyline", { class: "self", points: line(shares) }));
    if (branches) {
      const values = [...this.prompt.branch_shares.slice(0, -1), ...this.tokens.map((token) => mean(Object.values(token.branches).map(sum)))];
      parts.push(shape("polyline", { class: "branch", points: line(values) }));
    }
    parts.push(shape("text", { x: left, y: bottom + 16 }, "tokens after the image"));
    parts.push(shape("text", { x: right, y: bottom + 16, "text-anchor": "end" }, `${shares.length}`));
    if (right - x(first) > 50) parts.push(shape("text", { x: x(first) + 4, y: bottom - 5 }, "answer"));
    $(".chart .branch", this.root).hidden = !branches;
    $(".chart svg", this.root).replaceChildren(...parts);
  }

  showCandidates(token) {
    const [on, off] = this.question_asked.use_pvm
      ? [token.candidates, token.candidates_otherwise]
      : [token.candidates_otherwise, token.candidates];
    const lists = off && on ? [["With branches", on], ["Without branches", off]] : [["", token.candidates]];
    const head = element("tr", {}, ...lists.map(([title]) => element("th", {}, title)));
    const rows = lists[0][1].map((_, k) =>
      element("tr", {}, ...lists.map(([, list], column) => {
        const [text, probability] = list[k];
        const bar = element("i", { style: `width: ${34 * probability}%` });
        return element("td", { class: column ? "off" : "on" },
          element("div", { class: "bar" }, element("code", { title: text }, visible(text)), bar, percent(probability)));
      })),
    );
    $(".candidates tbody", this.root).replaceChildren(head, ...rows);
  }
}

const sum = (values) => values.reduce((a, b) => a + b, 0);
const mean = (values) => sum(values) / values.length;

function choose(index) {
  choose.byHand = true;
  for (const column of columns) {
    column.chosen = index;
    column.show();
  }
}

async function ask() {
  asking?.abort();
  const mine = (asking = new AbortController());
  choose.byHand = false;
  $("#stop").disabled = false;
  say("");
  columns.forEach((column) => (column.root.dataset.state = "writing"));
  await Promise.all(columns.map((column) => column.ask(mine.signal)));
  if (asking === mine) $("#stop").disabled = true;
}

function say(sentence, isError = false) {
  $("#message").textContent = sentence;
  $("#message").classList.toggle("error", isError);
}

function show(name, uri) {
  pictures[name] = uri;
  $(`#${name} img`).src = uri;
}

async function upload(name, file) {
  if (!file) return;
  say("");
  if (file.size > setup.largest_upload) return say(setup.too_large, true);
  try {
    const response = await fetch(`image?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
    const result = await response.json();
    if (result.error) say(result.error, true);
    else show(name, result.image);
  } catch (error) {
    say(`The image could not be sent (${error.message}).`, true);
  }
}

for (const name of ["image", "memory"]) {
  const label = $(`#${name}`);
  $("input", label).addEventListener("change", ({ target }) => upload(name, target.files[0]));
  // A board of digits has 32 pixels a side.
  $("img", label).addEventListener("load", ({ target }) => target.classList.toggle("tiny", target.naturalWidth < 100));
  label.addEventListener("dragover", (event) => event.preventDefault());
  label.addEventListener("drop", (event) => {
    event.preventDefault();
    upload(name, event.dataTransfer.files[0]);
  });
}
$("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("#stop").addEventListener("click", () => {
  asking.abort();
  $("#stop").disabled = true;
});

// Two checkpoints, or one with branches and without them.
const comparable = setup.models.length > 1 || setup.models[0].has_branches;
const columns = [new Column(true, 0)];
if (comparable) columns.push(new Column(setup.models.length > 1, setup.models.length > 1 ? 1 : 0));

setup.examples.forEach((example, k) => {
  const other = setup.examples[(k + 1) % setup.examples.length];
  const button = element("button", { type: "button" },
    element("img", { src: example.image, alt: "" }), example.title);
  button.addEventListener("click", () => {
    show("image", example.image);
    show("memory", other.image);
    $("#text").value = example.text;
    $("#text").scrollTop = $("#text").scrollHeight; // the question comes last
    ask();
    say(`The right answer: ${example.expected}`);
  });
  $("#examples").append(button);
});
$("#examples button")?.click();
document.body.dataset.ready = true;
