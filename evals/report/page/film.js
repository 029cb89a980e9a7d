// Animations: frames on a sheet, row by row, drawn onto a canvas one after another.
const STILL = matchMedia("(prefers-reduced-motion: reduce)").matches;

async function loadedImage(uri) {
  const image = new Image();
  image.src = uri;
  await image.decode();
  return image;
}

/** A canvas with a button and a slider that plays films, {sheet, columns, frames, width, height}, as one. */
class Film {
  constructor(place, label, framesPerSecond = 8) {
    this.interval = 1000 / framesPerSecond;
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", label);
    this.button = document.createElement("button");
    this.button.type = "button";
    this.slider = document.createElement("input");
    Object.assign(this.slider, { type: "range", min: 0, value: 0, step: 1 });
    this.slider.setAttribute("aria-label", `${label}: frame`);
    const controls = document.createElement("div");
    controls.className = "controls";
    controls.append(this.button, this.slider);
    place.classList.add("film");
    place.replaceChildren(this.canvas, controls);
    this.button.addEventListener("click", () => this.play(!this.playing));
    this.slider.addEventListener("input", () => {
      this.play(false);
      this.draw();
    });
    this.visible = true;
    new IntersectionObserver(([entry]) => (this.visible = entry.isIntersecting)).observe(place);
    this.play(false);
  }

  async show(films) {
    const wanted = (this.wanted = Symbol());
    const sheets = await Promise.all(films.map((film) => loadedImage(film.sheet)));
    if (this.wanted !== wanted) return; // another one was asked for meanwhile
    this.frames = films.flatMap((film, index) =>
      Array.from({ length: film.frames }, (_, frame) => ({
        sheet: sheets[index],
        left: (frame % film.columns) * film.width,
        top: Math.floor(frame / film.columns) * film.height,
      })),
    );
    [this.canvas.width, this.canvas.height] = [films[0].width, films[0].height];
    [this.slider.max, this.slider.value] = [this.frames.length - 1, 0];
    this.draw();
    this.play(!STILL);
  }

  draw() {
    const { width, height } = this.canvas;
    const { sheet, left, top } = this.frames[this.slider.valueAsNumber];
    this.canvas.getContext("2d").drawImage(sheet, left, top, width, height, 0, 0, width, height);
  }

  play(on) {
    this.playing = on;
    clearInterval(this.timer);
    if (on) this.timer = setInterval(() => this.advance(), this.interval);
    this.button.textContent = on ? "❚❚" : "▶";
    this.button.setAttribute("aria-label", on ? "Stop" : "Play");
  }

  advance() {
    if (!this.visible || document.hidden) return;
    this.slider.value = (this.slider.valueAsNumber + 1) % this.frames.length;
    this.draw();
  }
}
