// Bases open in the viewer, instances and samples are chosen, sliders move; everything stands in the page already.
const viewer = document.getElementById("viewer");
const articles = [...viewer.querySelectorAll("article")];
let place = 0; // of the basis that is shown
let opener; // what the focus goes back to

function show(index) {
  articles[place].hidden = true;
  place = (index + articles.length) % articles.length;
  articles[place].hidden = false;
  document.getElementById("viewer-title").textContent = articles[place].dataset.title;
  if (!viewer.open) {
    opener = document.activeElement;
    viewer.showModal();
  }
  viewer.scrollTop = 0;
}

for (const button of document.querySelectorAll("[data-basis]")) {
  button.addEventListener("click", () => show(Number(button.dataset.basis)));
}
document.getElementById("previous").addEventListener("click", () => show(place - 1));
document.getElementById("next").addEventListener("click", () => show(place + 1));
document.getElementById("close").addEventListener("click", () => viewer.close());
viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
viewer.addEventListener("close", () => opener?.focus());
viewer.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") show(place - 1);
  else if (event.key === "ArrowRight") show(place + 1);
  else return;
  event.preventDefault();
});

for (const button of document.querySelectorAll("[data-subject]")) {
  button.addEventListener("click", () => {
    for (const other of button.closest("section").querySelectorAll("[data-subject]")) {
      other.setAttribute("aria-pressed", String(other === button));
      document.getElementById(other.dataset.subject).hidden = other !== button;
    }
  });
}

for (const slider of document.querySelectorAll(".slider input")) {
  slider.addEventListener("input", () => {
    const words = slider.list.options[slider.valueAsNumber].label;
    slider.closest(slider.dataset.owner).style.setProperty(slider.dataset.property, slider.value);
    slider.setAttribute("aria-valuetext", words);
    slider.nextElementSibling.textContent = words;
  });
}
