// Logs in with the token in the fragment of the link, which browsers send to no server.
const status = document.getElementById("status");
const form = document.getElementById("form");
const input = document.getElementById("link");

async function logIn(token) {
  status.textContent = "logging in …";
  form.hidden = true;
  try {
    const answer = await fetch("/login", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ token }),
    });
    if (answer.ok) {
      location.replace("/");
      return;
    }
    status.textContent = (await answer.json()).error;
  } catch {
    status.textContent = "the web server does not answer";
  }
  form.hidden = false;
  input.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  input.value = "";
  const token = text.includes("#") ? text.slice(text.indexOf("#") + 1) : text;
  if (token) logIn(token);
});

async function begin() {
  const token = location.hash.slice(1);
  if (token) {
    history.replaceState(null, "", "/login"); // so that the token is not in the history
    await logIn(token);
    return;
  }
  const answer = await fetch("/api/session");
  if (answer.ok) {
    location.replace("/");
    return;
  }
  status.textContent = "Open the link that larpixdaq-web has printed, or paste it here.";
  form.hidden = false;
  input.focus();
}

begin();
