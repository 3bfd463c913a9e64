"use strict";
for (const slider of document.querySelectorAll("input[data-moments]")) {
  const moments = [...document.getElementById(slider.dataset.moments).children];
  const output = slider.parentElement.querySelector("output");
  const show = () => {
    const chosen = moments[slider.valueAsNumber];
    for (const moment of moments) moment.hidden = moment !== chosen;
    output.textContent = chosen.dataset.label;
    slider.setAttribute("aria-valuetext", "epoch " + chosen.dataset.label);
  };
  slider.addEventListener("input", show);
  slider.parentElement.hidden = false;
  show();
}
