// The settings of a request, and the theme.

const FIELDS = ["temperature", "top_p", "max_tokens", "seed"];

// Returns the settings, which change as the fields of the dialog do: system, and sampling as in a request. They are kept
// in the tab.
export function setUpSettings() {
  const dialog = document.getElementById("settings");
  const form = dialog.querySelector("form");
  const settings = { system: "", sampling: {} };

  const read = () => {
    settings.system = form.elements.system.value.trim();
    settings.sampling = {};
    for (const name of FIELDS) {
      const field = form.elements[name];
      if (field.value !== "" && field.validity.valid) settings.sampling[name] = field.valueAsNumber;
    }
    sessionStorage.setItem("jaxlm.settings", JSON.stringify(settings));
  };

  const stored = JSON.parse(sessionStorage.getItem("jaxlm.settings") ?? "null");
  if (stored) {
    form.elements.system.value = stored.system;
    for (const [name, value] of Object.entries(stored.sampling)) form.elements[name].value = value;
    Object.assign(settings, stored);
  }
  form.addEventListener("input", read);
  document.getElementById("open-settings").addEventListener("click", () => dialog.showModal());
  document.getElementById("reset-settings").addEventListener("click", () => {
    form.reset();
    read();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside the form
  });
  return settings;
}

// The theme is that of the system until the button chooses the other one.
export function setUpTheme() {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (localStorage.getItem("jaxlm.theme") ?? (system.matches ? "dark" : "light")) === "dark";

  const show = () => {
    document.documentElement.dataset.theme = isDark() ? "dark" : "light";
    button.setAttribute("aria-pressed", String(isDark()));
  };

  button.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    if ((theme === "dark") === system.matches) localStorage.removeItem("jaxlm.theme");
    else localStorage.setItem("jaxlm.theme", theme);
    show();
  });
  system.addEventListener("change", show);
  show();
}
