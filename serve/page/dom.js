// Small helpers for the document. What comes from outside is only ever set as text.

export const $ = (id) => document.getElementById(id);
export const part = (root, name) => root.querySelector(`[data-part="${name}"]`);
export const isStill = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export function fill(select, choices) {
  select.replaceChildren(...choices.map(([value, text]) => new Option(text, value)));
}

// Choose a value, which becomes a choice of the list where it is none yet.
export function choose(select, value, text = value) {
  if (![...select.options].some((option) => option.value === value)) select.add(new Option(text, value));
  select.value = value;
}

// Read out by screen readers; seen by nobody.
export const announce = (text) => ($("announcer").textContent = text);

export function complain(place, problem) {
  place.textContent = problem ? problem.message : "";
  place.hidden = !problem;
}

// What cannot be undone is asked for twice: the first press changes the button into the question.
export function pressTwice(button, question, act) {
  const label = button.querySelector("span");
  const calm = label.textContent;
  const reset = () => {
    button.classList.remove("armed");
    label.textContent = calm;
  };
  button.addEventListener("blur", reset);
  button.addEventListener("click", () => {
    if (button.classList.contains("armed")) {
      reset();
      act();
    } else {
      button.classList.add("armed");
      label.textContent = question;
    }
  });
}
