(function () {
  "use strict";
  const { blanks, frames } = JSON.parse(document.getElementById("frames").textContent);
  const player = document.querySelector(".player");
  const [button, slider, caption, text] = ["button", "input", "output", ".text"].map((name) => player.querySelector(name));
  const spans = blanks.map(() => text.appendChild(document.createElement("span")));
  let timer = null;

  // White space before a word stands outside its block.
  function draw(span, words, tag) {
    const lead = words.trim() ? words.match(/^\s*/)[0] : "";
    const body = tag ? document.createElement(tag) : document.createTextNode("");
    body.textContent = words.slice(lead.length);
    if (tag === "i") body.setAttribute("aria-hidden", "true");
    span.replaceChildren(lead, body);
  }

  function show(step) {
    const pieces = blanks.map(() => null);
    frames.slice(0, step + 1).forEach((frame) => frame.set.forEach(([position, piece]) => { pieces[position] = piece; }));
    const fresh = new Set(step > 0 ? frames[step].set.map(([position]) => position) : []);
    pieces.forEach((piece, position) => {
      if (piece === null) draw(spans[position], blanks[position], "i");
      else draw(spans[position], piece, fresh.has(position) ? "mark" : null);
    });
    caption.textContent = frames[step].caption;
    slider.value = step;
    slider.setAttribute("aria-valuetext", frames[step].caption);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
  }

  function play() {
    const last = frames.length - 1;
    if (Number(slider.value) === last) show(0);
    button.textContent = "Pause";
    timer = setInterval(() => {
      show(Number(slider.value) + 1);
      if (Number(slider.value) === last) stop();
    }, Math.min(400, Math.max(60, 8000 / frames.length)));
  }

  button.addEventListener("click", () => (timer === null ? play() : stop()));
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  document.querySelector(".stills").hidden = true;
  player.hidden = false;
  show(Number(slider.value));
})();
