// Runs inside the page: uses it as a person would and tells the parent what came of it.
addEventListener("load", () => setTimeout(() => {
  const result = { errors: window.pageErrors, checks: {} };
  const check = (name, passed, seen) => { result.checks[name] = passed ? true : `failed: ${seen}`; };
  try {
    const $ = (id) => document.getElementById(id), body = document.body;
    const spans = [...document.querySelectorAll("#text > span")];
    result.text = $("text").textContent;
    result.spans = spans.length;
    result.slots = Number($("n-slots").textContent);
    result.open = $("n-open").textContent;
    result.last = Number(body.dataset.token);
    result.width = innerWidth;
    result.dark = matchMedia("(prefers-color-scheme: dark)").matches;
    check("ready", body.dataset.ready === "true", body.dataset.ready);
    check("stretches are tinted apart", new Set(spans.map((span) => getComputedStyle(span).backgroundColor)).size === spans.length, spans.length);
    const scroll = document.documentElement.scrollWidth;
    check("nothing overflows sideways", scroll <= innerWidth, `${scroll} > ${innerWidth}`);

    // Contrast by the rules of WCAG, of the colours as they are painted.
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const luminance = (colour) => {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((x) => x / 255).map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((a, b) => b - a); return (x + 0.05) / (y + 0.05); };
    const least = Math.min(...spans.map((span) => contrast(getComputedStyle(span).color, getComputedStyle(span).backgroundColor)));
    check("text on its tint has contrast", least >= 4.5, least);
    const paper = getComputedStyle(body).backgroundColor;
    for (const name of ["h1", "header p", "figcaption", "dt"]) {
      const ratio = contrast(getComputedStyle(document.querySelector(name)).color, paper);
      check(`${name} has contrast`, ratio >= 4.5, ratio);
    }
    check("the scheme is followed", (luminance(paper) < 0.2) === result.dark, paper);

    for (const id of ["drift", "slots"]) {
      const { width, height } = $(id), pixels = $(id).getContext("2d").getImageData(0, 0, width, height).data;
      const seen = new Set();
      for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] > 0) seen.add(pixels[i] << 16 | pixels[i + 1] << 8 | pixels[i + 2]);
      check(`${id} is drawn`, seen.size >= 3, seen.size);
    }

    // A pointer on a chart, on the text, the slider and the arrow keys.
    const slots = $("slots"), box = slots.getBoundingClientRect();
    slots.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 5, bubbles: true }));
    const middle = Number(body.dataset.token);
    check("a chart points at its token", Math.abs(middle - (result.last + 1) / 2) <= 2, middle);
    check("as many weights as slots held", document.querySelectorAll("#weights li").length === Number($("what").textContent.match(/(\d+) held/)[1]), $("what").textContent);
    const slider = $("token");
    const slide = (t) => { slider.value = t; slider.dispatchEvent(new Event("input", { bubbles: true })); };
    slide(0);
    const span = spans[Math.floor(spans.length / 2)];
    const range = document.createRange();
    // A marked character stands in an element of its own.
    const first = document.createTreeWalker(span, NodeFilter.SHOW_TEXT).nextNode();
    range.setStart(first, 0);
    range.setEnd(first, 1);
    // Clear of what stays at the top and, on a narrow page, at the bottom.
    const rects = () => [...range.getClientRects()];
    scrollBy(0, rects()[0].top - 0.5 * innerHeight);
    const letter = rects().find((rect) => rect.width > 0);
    const before = body.dataset.token;
    if (letter) {
      span.dispatchEvent(new PointerEvent("pointermove", { clientX: letter.left + letter.width / 4, clientY: letter.top + letter.height / 2, bubbles: true }));
      result.pointed = Number(body.dataset.token);
      check("the text points at its token", body.dataset.token !== before && span.classList.contains("held"), `${before} ${body.dataset.token} ${letter.left},${letter.top}`);
    } else {
      result.pointed = null;
    }
    slide(3);
    check("the slider points", body.dataset.token === "3" && $("where").textContent.includes("3"), body.dataset.token);
    body.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    check("arrow keys move on", body.dataset.token === "4", body.dataset.token);
    const bars = [...document.querySelectorAll("#weights li")].map((item) => Number(item.style.getPropertyValue("--w")));
    check("weights are shares", bars.length > 0 && bars.every((w) => w >= 0 && w <= 1) && Math.max(...bars) > 0, bars);
    result.own = bars[bars.length - 1];
  } catch (error) {
    result.errors.push(String(error.stack));
  }
  parent.postMessage(JSON.stringify(result), "*");
}, 50));
