"use strict";
for (const slider of document.querySelectorAll("input[data-moments]")) {
  const moments = [...document.getElementById(slider.dataset.moments).children];
  const [label, output] = ["label", "output"].map(part => slider.parentElement.querySelector(part));
  const show = () => {
    const chosen = moments[slider.valueAsNumber];
    for (const moment of moments) moment.hidden = moment !== chosen;
    output.textContent = chosen.dataset.label;
    slider.setAttribute("aria-valuetext", label.textContent.toLowerCase() + " " + chosen.dataset.label);
  };
  slider.addEventListener("input", show);
  slider.parentElement.hidden = false;
  show();
}
