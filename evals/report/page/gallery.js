// The gallery: a sample that is chosen is shown large, beside its nearest neighbour and the way to the next one.
const samples = JSON.parse(document.getElementById("gallery-data").textContent);
const WALKED = 4; // samples that the walk of the page passes

const viewer = document.getElementById("viewer");
const within = (selector) => viewer.querySelector(selector);
const walk = new Film(within("#viewer-walk .film"), "The way to the next sample");
let place = 0; // of the sample that is shown
let turntable; // a film, of objects that are seen in views
let shape; // of shapes

function open(index) {
  place = (index + samples.length) % samples.length;
  const sample = samples[place];
  within("#viewer-title").textContent = `Sample ${sample.number}`;
  showSample(sample);
  const nearest = within("#viewer-nearest");
  nearest.hidden = !sample.nearest;
  if (sample.nearest) {
    const image = nearest.querySelector("img");
    image.src = sample.nearest;
    image.alt = `what the nearest training latent draws, ${sample.nearest_id}`;
    nearest.querySelector("figcaption").textContent = `Nearest training latent: ${sample.nearest_id}`;
  }
  walk.show([sample.walk]);
  if (!viewer.open) viewer.showModal();
  shape?.start();
}

/** A shape turns, an object is seen from all sides, a picture is a picture. */
function showSample(sample) {
  const stage = within("#viewer-sample .stage");
  const caption = within("#viewer-sample figcaption");
  if (sample.volume) {
    shape ??= new Shape();
    stage.replaceChildren(shape.canvas);
    caption.textContent = "Drag to turn it";
    shape.show(sample.volume).catch((error) => showPicture(stage, caption, sample, `Still, as ${error.message}`));
  } else if (sample.turntable) {
    turntable ??= new Film(stage, "The object from all sides");
    turntable.show([sample.turntable]);
    caption.textContent = "From all sides";
  } else {
    showPicture(stage, caption, sample, `${sample.width} × ${sample.height} pixels`);
  }
}

function showPicture(stage, caption, sample, words) {
  const image = new Image(sample.width, sample.height);
  image.src = sample.picture;
  image.alt = `sample ${sample.number}`;
  stage.replaceChildren(image);
  caption.textContent = words;
}

function pauseAll() {
  const playing = walk.playing || turntable?.playing || shape?.turning;
  walk.play(!playing);
  turntable?.play(!playing);
  if (shape) shape.turning = !playing;
}

for (const button of document.querySelectorAll("[data-sample]")) {
  button.addEventListener("click", () => open(Number(button.dataset.sample)));
}
within("#previous").addEventListener("click", () => open(place - 1));
within("#next").addEventListener("click", () => open(place + 1));
within("#close").addEventListener("click", () => viewer.close());
viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
viewer.addEventListener("close", () => {
  walk.play(false);
  turntable?.play(false);
  document.querySelector(`[data-sample="${place}"]`).focus();
});
viewer.addEventListener("keydown", (event) => {
  if (event.target.matches("input")) return;
  if (event.key === "ArrowLeft") open(place - 1);
  else if (event.key === "ArrowRight") open(place + 1);
  else if (event.key === " " && !event.target.matches("button")) pauseAll();
  else return;
  event.preventDefault();
});

const through = new Film(document.getElementById("walk"), "Walk through the samples");
const walks = samples.slice(0, WALKED).map((sample) => sample.walk);
through.show(walks).then(() => drawSteps(document.getElementById("steps"), through.frames, walks[0]));

/** All frames at once, a row for each walk. */
function drawSteps(canvas, frames, { frames: columns, width, height }) {
  const gap = Math.round(width / 32);
  canvas.width = columns * (width + gap) - gap;
  canvas.height = (frames.length / columns) * (height + gap) - gap;
  const context = canvas.getContext("2d");
  frames.forEach(({ sheet, left, top }, index) => {
    const [right, down] = [(index % columns) * (width + gap), Math.floor(index / columns) * (height + gap)];
    context.drawImage(sheet, left, top, width, height, right, down, width, height);
  });
}
