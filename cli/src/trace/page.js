"use strict";
// Rebuilds the memory at any token from the event log, draws it, and shows one token's read.
(() => {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const $ = (id) => document.getElementById(id);
  const { tokens: T, capacity: M, tau } = DATA;
  const events = bytes(DATA.events), weights = bytes(DATA.weights), text = bytes(DATA.text);
  const drift = new Float32Array(T);
  { const raw = bytes(DATA.drift); for (let t = 0; t < T; t++) drift[t] = (raw[2 * t] | raw[2 * t + 1] << 8) / 32768; }

  // The first token of every slot held after token t, oldest first: slots are stretches of time. Kept
  // every STRIDE tokens, replayed from there.
  const STRIDE = 256;
  const apply = (starts, t) => {
    const event = events[t];
    if (event >= 2) starts.splice(event - 1, 1);
    if (event !== 0) starts.push(t);
  };
  const kept = [];
  {
    const starts = [];
    for (let t = 0; t < T; t++) { if (t % STRIDE === 0) kept.push(starts.slice()); apply(starts, t); }
    kept.end = starts;
  }
  const startsAt = (t) => {
    const starts = kept[Math.floor(t / STRIDE)].slice();
    for (let s = t - t % STRIDE; s <= t; s++) apply(starts, s);
    return starts;
  };
  const final = kept.end;
  // Index of the stretch that holds token s.
  const slotOf = (starts, s) => {
    let low = 0, high = starts.length;
    while (high - low > 1) { const middle = (low + high) >> 1; if (starts[middle] <= s) low = middle; else high = middle; }
    return low;
  };
  const stretchEnd = (starts, i, end) => i + 1 < starts.length ? starts[i + 1] : end;

  // A golden-angle walk keeps neighbours apart in hue; every other slot is underlined as well.
  const hue = (slot) => (slot * 137.508 + 30) % 360;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const tint = (slot) => `oklch(var(--slot-l) var(--slot-c) ${hue(slot)})`;
  const band = (slot) => `oklch(${css("--band-l")} ${css("--band-c")} ${hue(slot)})`;

  // The text: one UTF-16 unit or pair a character, each belonging to its first byte's token.
  const units = [];
  const show = (byte) => byte === 9 || byte === 10 ? String.fromCharCode(byte) : byte === 13 ? "" :
    byte < 32 ? String.fromCharCode(0x2400 + byte) : byte === 127 ? "\u2421" : byte < 128 ? String.fromCharCode(byte) : null;
  const decoder = new TextDecoder("utf-8", { fatal: true });
  const character = (t) => {
    const plain = show(text[t]);
    if (plain !== null) return [plain, 1];
    const length = text[t] >= 0xf0 ? 4 : text[t] >= 0xe0 ? 3 : 2;
    try { return [decoder.decode(text.subarray(t, t + length)), length]; } catch { return ["\ufffd", 1]; }
  };
  const spans = [];
  const unitOf = new Int32Array(T);
  {
    const box = $("text");
    let piece = "", slot = -1, first = 0;
    const flush = () => {
      if (slot < 0) return;
      const span = document.createElement("span");
      span.style.background = tint(slot);
      if (slot % 2) span.className = "odd";
      span.textContent = piece;
      span.first = first;
      box.append(span);
      spans.push(span);
    };
    const put = (t, shown) => {
      const holder = slotOf(final, t);
      if (holder !== slot) { flush(); [piece, slot, first] = ["", holder, units.length]; }
      for (let i = 0; i < shown.length; i++) units.push(t);
      piece += shown;
    };
    if (text.length) {
      for (let t = 0; t < T;) {
        const [shown, length] = character(t);
        unitOf.fill(units.length, t, t + length);
        put(t, shown);
        t += length;
      }
    } else {
      // No text behind the tokens: every stretch by its numbers.
      final.forEach((start, i) => {
        const end = stretchEnd(final, i, T);
        unitOf.fill(units.length, start, end);
        put(start, `${start}\u2013${end - 1}  `);
      });
    }
    flush();
  }

  // Charts. A pixel column stands for one token or several.
  const canvases = ["drift", "slots", "read"].map($);
  const layers = new Map();
  const prepare = (canvas) => {
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = Number(canvas.getAttribute("height"));
    if (!canvas.dataset.height) { canvas.dataset.height = height; canvas.style.height = `${height}px`; }
    const tall = Number(canvas.dataset.height);
    canvas.width = Math.max(1, Math.round(width * ratio));
    canvas.height = Math.round(tall * ratio);
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    return { context, width, height: tall };
  };
  const x = (t, width) => t / T * width;
  const drawDrift = () => {
    const { context, width, height } = prepare(canvases[0]);
    const y = (value) => height - 3 - value / 2 * (height - 6);
    context.strokeStyle = css("--curve");
    context.globalAlpha = 0.8;
    context.beginPath();
    // The span of each column, so that no peak is lost.
    for (let column = 0; column < width; column++) {
      const from = Math.floor(column / width * T), to = Math.max(from + 1, Math.floor((column + 1) / width * T));
      let low = 2, high = 0;
      for (let t = from; t < to && t < T; t++) { low = Math.min(low, drift[t]); high = Math.max(high, drift[t]); }
      context.moveTo(column + 0.5, y(low) + 0.5);
      context.lineTo(column + 0.5, y(high) - 0.5);
    }
    context.stroke();
    context.globalAlpha = 1;
    context.strokeStyle = context.fillStyle = css("--accent");
    context.setLineDash([5, 4]);
    context.beginPath(); context.moveTo(0, y(tau)); context.lineTo(width, y(tau)); context.stroke();
    context.setLineDash([]);
    context.font = "11px system-ui, sans-serif";
    context.fillText(`tau ${tau}`, 4, y(tau) - 4);
  };
  const drawSlots = () => {
    const { context, width, height } = prepare(canvases[1]);
    const row = height / M;
    const starts = [];
    let next = 0;
    const colours = final.map((_, slot) => band(slot));
    for (let column = 0; column < width; column++) {
      const to = Math.min(T, Math.max(next, Math.floor((column + 1) / width * T)));
      const merged = [];
      for (; next < to; next++) { if (events[next] >= 2) merged.push(events[next] - 2); apply(starts, next); }
      if (column + 1 >= width) while (next < T) apply(starts, next++);
      for (let i = 0; i < starts.length; i++) {
        context.fillStyle = colours[slotOf(final, stretchEnd(starts, i, next) - 1)];
        context.fillRect(column, i * row, 1.05, Math.max(1, row - (row > 4 ? 1 : 0)));
      }
      context.fillStyle = css("--ink");
      for (const i of new Set(merged)) context.fillRect(column, (i + 1) * row - 1, Math.max(1.5, width / T * 0.6), 2);
    }
  };
  const drawRead = (t, starts) => {
    const { context, width, height } = prepare(canvases[2]);
    starts.forEach((start, i) => {
      const weight = weights[t * M + i] / 255, from = x(start, width), to = x(stretchEnd(starts, i, t + 1), width);
      context.globalAlpha = weight;
      context.fillStyle = css("--accent");
      context.fillRect(from, 0, Math.max(1, to - from), height);
    });
    context.globalAlpha = 1;
    context.strokeStyle = css("--rule");
    context.beginPath();
    for (const start of starts) { context.moveTo(x(start, width), 0); context.lineTo(x(start, width), height); }
    context.stroke();
  };
  const remember = () => { for (const canvas of canvases.slice(0, 2)) {
    const copy = document.createElement("canvas");
    [copy.width, copy.height] = [canvas.width, canvas.height];
    copy.getContext("2d").drawImage(canvas, 0, 0);
    layers.set(canvas, copy);
  } };
  const drawCursor = (t) => { for (const canvas of canvases.slice(0, 2)) {
    const context = canvas.getContext("2d"), ratio = window.devicePixelRatio || 1;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(layers.get(canvas), 0, 0);
    context.fillStyle = css("--accent");
    context.fillRect((t + 0.5) / T * canvas.width - ratio / 2, 0, Math.max(1, ratio), canvas.height);
  } };

  // One token's read.
  const excerpt = (from, to) => {
    if (!text.length) return `tokens ${from} to ${to - 1}`;
    let out = "";
    for (let t = from; t < to && out.length < 60;) { const [shown, length] = character(t); out += shown; t += length; }
    return out.replace(/\s+/g, " ");
  };
  let marked = null;
  const unmark = () => { if (marked) { const span = marked.span; span.textContent = span.textContent; marked = null; } };
  const mark = (t) => {
    unmark();
    const unit = unitOf[t], span = spans[slotOf(spans.map((span) => span.first), unit)];
    if (!span) return;
    const whole = span.textContent, at = unit - span.first;
    const length = whole.codePointAt(at) > 0xffff ? 2 : 1;
    const highlight = document.createElement("mark");
    highlight.textContent = whole.slice(at, at + length);
    span.replaceChildren(...[whole.slice(0, at), highlight, whole.slice(at + length)].filter((part) => part !== ""));
    spans.forEach((other) => other.classList.toggle("held", other === span));
    marked = { span };
  };
  let current = -1;
  const point = (t) => {
    t = Math.max(0, Math.min(T - 1, Math.round(t)));
    if (t === current) return;
    current = t;
    const starts = startsAt(t), own = starts.length - 1;
    $("token").value = t;
    $("at").textContent = t;
    const event = events[t];
    $("where").textContent = `Token ${t}` + (text.length ? ` “${excerpt(t, t + 1).replace(" ", "␣")}”` : "");
    $("what").textContent = `drift ${drift[t].toFixed(3)}: ` + (event === 0 ? "joins the open slot" :
      event === 1 ? "opens a slot" : `slots ${event - 2} and ${event - 1} merge, then it opens one`) + `; ${starts.length} held`;
    const list = $("weights");
    list.replaceChildren(...starts.map((start, i) => {
      const item = document.createElement("li"), end = stretchEnd(starts, i, t + 1);
      const weight = weights[t * M + i] / 255;
      if (i === own) item.className = "own";
      item.style.setProperty("--w", weight);
      item.style.setProperty("--band", band(slotOf(final, end - 1)));
      const [number, value, bar, words] = ["b", "b", "i", "code"].map((tag) => document.createElement(tag));
      number.textContent = i;
      value.textContent = weight.toFixed(2);
      words.textContent = excerpt(start, end);
      item.title = `slot ${i}: tokens ${start} to ${end - 1}, weight ${weight.toFixed(2)}`;
      item.append(number, value, bar, words);
      return item;
    }));
    mark(t);
    drawRead(t, starts);
    drawCursor(t);
    document.body.dataset.token = t;
  };

  const redraw = () => { drawDrift(); drawSlots(); remember(); const t = current; current = -1; point(Math.max(0, t)); };
  $("token").max = T - 1;
  $("token").addEventListener("input", (event) => point(Number(event.target.value)));
  for (const canvas of canvases) for (const kind of ["pointermove", "pointerdown"]) canvas.addEventListener(kind, (event) => {
    const box = canvas.getBoundingClientRect();
    point(Math.floor((event.clientX - box.left) / box.width * T));
  });
  const under = (event) => {
    const place = document.caretPositionFromPoint ? document.caretPositionFromPoint(event.clientX, event.clientY) : null;
    const range = place ? null : document.caretRangeFromPoint?.(event.clientX, event.clientY);
    let node = place ? place.offsetNode : range?.startContainer, offset = place ? place.offset : range?.startOffset;
    const span = node?.parentElement?.closest("#text span");
    if (!span) return;
    // A marked character splits its span's text into several nodes.
    for (let top = node.parentElement === span ? node : node.parentElement; top.previousSibling; top = top.previousSibling) offset += top.previousSibling.textContent.length;
    const unit = Math.min(span.first + offset, units.length - 1);
    if (unit >= 0) point(units[unit]);
  };
  for (const kind of ["pointermove", "pointerdown"]) $("text").addEventListener(kind, under);
  addEventListener("keydown", (event) => {
    if (event.target.id === "token" || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { event.preventDefault(); point(current + step); }
  });
  addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  const opened = events.reduce((sum, event) => sum + (event !== 0), 0);
  $("n-tokens").textContent = T.toLocaleString("en");
  $("n-open").textContent = `${opened.toLocaleString("en")} (${(100 * opened / T).toFixed(1)}%)`;
  $("n-merge").textContent = events.reduce((sum, event) => sum + (event >= 2), 0).toLocaleString("en");
  $("n-slots").textContent = final.length;
  current = T - 1;
  redraw();
  document.body.dataset.ready = "true";
})();
