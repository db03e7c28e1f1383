// The page: log in, then the studio.

import { ask } from "./api.js";
import { loadModels, reuse, setUpComposer } from "./composer.js";
import { $, announce, complain } from "./dom.js";
import { setUpGallery } from "./gallery.js";
import { jobs } from "./jobs.js";
import { closeViewer, openViewer, setUpViewer } from "./viewer.js";

const login = $("login");

function showLogin(problem = null) {
  closeViewer();
  jobs.clear();
  $("studio").hidden = $("who").hidden = true;
  login.hidden = false;
  complain($("login-problem"), problem);
  login.elements.key.value = "";
  login.elements.key.focus();
}

async function enter({ tenant, scopes }) {
  login.hidden = true;
  $("tenant").textContent = tenant;
  $("who").hidden = $("studio").hidden = false;
  try {
    await Promise.all([loadModels(scopes.includes("write")), load()]);
  } catch (problem) {
    complain($("problem"), problem);
  }
  $("prompt").focus();
}

login.addEventListener("submit", async (event) => {
  event.preventDefault();
  complain($("login-problem"), null);
  try {
    await enter(await ask("POST", "/session", { key: login.elements.key.value.trim() }));
  } catch (problem) {
    showLogin(problem);
  }
});
$("log-out").addEventListener("click", async () => {
  try {
    await ask("DELETE", "/session");
    showLogin();
    announce("Logged out.");
  } catch (problem) {
    complain($("problem"), problem);
  }
});
window.addEventListener("logged-out", () => showLogin({ message: "The session has ended. Log in again." }));
document.addEventListener("visibilitychange", () => jobs.look());

setUpComposer();
setUpViewer({ reuse });
const load = setUpGallery({ open: openViewer, reuse });

try {
  const session = await ask("GET", "/session");
  if (session.tenant === null) showLogin();
  else await enter(session);
} catch (problem) {
  showLogin(problem);
}
