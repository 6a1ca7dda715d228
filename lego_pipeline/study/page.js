"use strict";
// The rater's page. Orders and digests are those of blinding.py; both files have to say the same.

const element = id => document.getElementById(id);
const holder = element("study");
const DIGEST = holder.dataset.digest;
const RATER = /^[a-z0-9_-]{1,32}$/;
const CHANGE_MS = 350;  // after an answer, before the next question: time to see it, and to correct a slip
const SETTLE_MS = 250;  // after a question is shown, before keys count: a double press is for the last one
const MODES = {
  frames: {
    ask: "Which picture shows the action best, in the scene of this frame?",
    instructions: `<p>You see a frame from a camera that a person wears, and an action that the person is about to do.
      Below or beside it are pictures of how the action might look. <b>Pick the picture that shows the action best in
      this scene</b>: the right action, with the right object and plausible hands, and the scene still the same.</p>`,
  },
  descriptions: {
    ask: "How well does this text describe the action in these frames?",
    instructions: `<p>You see frames from a camera that a person wears, an action, and a text that says how the action
      is done. <b>Say how well the text fits what the frames show.</b></p>`,
  },
};
const GRADES = {
  right: ["Right", "Everything it says fits the frames."],
  partly: ["Partly right", "It is this action, but a detail is wrong or left out."],
  wrong: ["Wrong", "Another action, object or hand than the frames show."],
  hallucinated: ["Hallucinated", "It tells of things or happenings that are not there."],
};

let study, rater, order, answers, place, shownAt, readyAt, timer;
let serverSaves = false, browserSaves = true, saves = 0;

// --- Digest and orders ------------------------------------------------------------------------------------------------

/** SHA-256 of a text in UTF-8 as hex digits (FIPS 180-4); crypto.subtle is missing on plain http. */
function sha256(text) {
  const rotate = (x, n) => (x >>> n) | (x << (32 - n));
  const bytes = new TextEncoder().encode(text);
  const words = new Uint32Array((((bytes.length + 8) >> 6) + 1) * 16);
  bytes.forEach((byte, i) => { words[i >> 2] |= byte << (24 - 8 * (i % 4)); });
  words[bytes.length >> 2] |= 0x80 << (24 - 8 * (bytes.length % 4));
  words[words.length - 2] = Math.floor(bytes.length / 2 ** 29);
  words[words.length - 1] = bytes.length << 3;
  const state = Uint32Array.from(sha256.start), w = new Uint32Array(64);
  for (let block = 0; block < words.length; block += 16) {
    w.set(words.subarray(block, block + 16));
    for (let i = 16; i < 64; i++) {
      const low = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >>> 3);
      const high = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >>> 10);
      w[i] = w[i - 16] + low + w[i - 7] + high;
    }
    let [a, b, c, d, e, f, g, h] = state;
    for (let i = 0; i < 64; i++) {
      const first = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + sha256.rounds[i] + w[i];
      const second = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + first) | 0, c, b, a, (first + second) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((x, i) => { state[i] += x; });
  }
  return Array.from(state, x => x.toString(16).padStart(8, "0")).join("");
}

/** The standard's constants: fractions of the roots of the first 64 primes. */
function fillConstants() {
  const primes = [], fraction = x => Math.floor((x % 1) * 2 ** 32) >>> 0;
  for (let n = 2; primes.length < 64; n++) if (primes.every(p => n % p)) primes.push(n);
  sha256.start = primes.slice(0, 8).map(p => fraction(Math.sqrt(p)));
  sha256.rounds = primes.map(p => fraction(Math.cbrt(p)));
}

function inOrder(where, tokens) {
  const keyed = tokens.map(token => [sha256([study.seed, rater, where, token].join("\n")), token]);
  return keyed.sort((x, y) => (x[0] < y[0] ? -1 : 1)).map(pair => pair[1]);
}

// --- Votes ------------------------------------------------------------------------------------------------------------

const keyOf = name => `lego-study/${DIGEST}/${name}`;

function stored(name) {
  try {
    return JSON.parse(localStorage.getItem(keyOf(name)));
  } catch {
    return null;
  }
}

function store(name, value) {
  try {
    localStorage.setItem(keyOf(name), JSON.stringify(value));
  } catch {
    browserSaves = false;
  }
}

/** Takes answers that are newer than what is here: of another window, or of the server. */
function merge(others) {
  const known = new Set(study.questions.map(question => question.id));
  for (const answer of Array.isArray(others) ? others : []) {
    const own = answers.get(answer.question);
    if (known.has(answer.question) && (!own || own.at < answer.at)) answers.set(answer.question, answer);
  }
}

function votesFile() {
  const votes = { format: "lego-votes/1", study: DIGEST, rater, answers: [...answers.values()] };
  const lines = votes.answers.map(a => `${a.question} ${a.order.join(",")} ${a.choice} ${a.ms} ${a.at}`);
  return { ...votes, digest: sha256([votes.format, votes.study, votes.rater, ...lines].join("\n")) };
}

async function pull() {
  if (!location.protocol.startsWith("http")) return;
  try {
    const answer = await fetch(`votes/${rater}`);
    const content = answer.ok ? await answer.json() : {};
    serverSaves = content.saves === true;
    merge(content.votes?.answers);
  } catch {
    serverSaves = false;
  }
}

const post = () => fetch("votes", {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(votesFile()),
});

async function save() {
  merge(stored(`votes/${rater}`));
  store(`votes/${rater}`, [...answers.values()]);
  const number = ++saves;
  let problem = "";
  advise(false);
  if (serverSaves) {
    try {
      let answer = await post();
      if (answer.status === 409) {  // another window has saved more
        await pull();
        answer = await post();
      }
      if (!answer.ok) problem = (await answer.json()).error;
    } catch {
      problem = "the study's computer does not answer";
    }
  }
  if (number !== saves) return;  // a later one is on its way, and says how it went
  advise(serverSaves && !problem);
  showSaved(problem);
}

function showSaved(problem) {
  const kept = browserSaves ? "Saved in this browser" : "This browser keeps nothing: download your answers before you leave";
  const sent = serverSaves ? (problem ? `, not on the study's computer (${problem})` : " and on the study's computer") : "";
  element("saved").textContent = `${kept}${sent}.`;
}

/** What to do at the end, by whether all answers are with the study's server. */
function advise(isSent) {
  element("doneadvice").textContent = isSent
    ? "Your answers are saved on the study's computer. You can close the page, and keep a copy if you like."
    : "Please download your answers and send the file to the person who asked you.";
}

function download() {
  const file = new Blob([JSON.stringify(votesFile())], { type: "application/json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = `votes-${rater}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// --- Views ------------------------------------------------------------------------------------------------------------

function show(view) {
  clearTimeout(timer);
  timer = undefined;
  for (const name of ["start", "question", "done"]) element(name).hidden = name !== view;
  const going = view !== "start";
  element("progress").hidden = element("footer").hidden = !going;
  if (going) {
    element("bar").max = order.length;
    element("bar").value = answers.size;
    element("count").textContent = `${answers.size} of ${order.length} answered`;
    element("who").textContent = `Code: ${rater}`;
  }
  element(view).querySelector("h2").focus({ preventScroll: true });
}

function showStart() {
  const given = new URLSearchParams(location.search).get("rater");
  const random = Array.from(crypto.getRandomValues(new Uint8Array(4)), x => x.toString(16).padStart(2, "0")).join("");
  element("rater").value = given || `r-${random}`;
  show("start");
}

async function enter(code) {
  rater = code;
  answers = new Map();
  order = inOrder("", study.questions.map(question => question.id));
  store("rater", rater);
  merge(stored(`votes/${rater}`));
  await pull();
  if (answers.size) await save();  // the server may lack answers that were given while it was away
  else { advise(false); showSaved(""); }
  const last = stored(`place/${rater}`);
  if (Number.isInteger(last) && last >= 0 && last < order.length) showQuestion(last);
  else goOn(-1);
}

/** To the next question without an answer, from after a place on; to the end if there is none. */
function goOn(from) {
  for (let step = 1; step <= order.length; step++) {
    const candidate = (from + step + order.length) % order.length;
    if (!answers.has(order[candidate])) return showQuestion(candidate);
  }
  showDone();
}

function showDone() {
  store(`place/${rater}`, null);
  show("done");
}

function picture(token, alt) {
  const image = new Image();
  image.src = `frames/${token}.png`;
  image.alt = alt;
  return image;
}

function figure(token, caption) {
  const holder = document.createElement("figure"), text = document.createElement("figcaption");
  text.textContent = caption;
  holder.append(picture(token, caption), text);
  return holder;
}

function choiceButton(choice, number) {
  const button = document.createElement("button"), key = document.createElement("span");
  button.className = "choice";
  button.dataset.choice = choice;
  key.className = "key";
  key.textContent = number;
  if (study.mode === "frames") {
    button.append(picture(choice, `Picture ${number}`), key);
  } else {
    const [name, meaning] = GRADES[choice].map(text => Object.assign(document.createElement("span"), { textContent: text }));
    name.className = "grade";
    meaning.className = "soft";
    button.append(key, name, meaning);
  }
  button.addEventListener("click", () => choose(number));
  return button;
}

const choicesOf = question => study.mode === "frames" ? inOrder(question.id, question.choices) : question.choices;
const current = () => study.questions.find(question => question.id === order[place]);

function showQuestion(number) {
  place = number;
  store(`place/${rater}`, place);
  const question = current(), choices = choicesOf(question);
  element("action").textContent = `Action: ${question.action}`;
  const given = [figure(question.input, "The frame before the action")];
  if (question.target) given.push(figure(question.target, "The frame that shows the action"));
  if (question.description !== undefined) {
    given.push(Object.assign(document.createElement("blockquote"), { textContent: question.description }));
  }
  element("given").replaceChildren(...given);
  const columns = study.mode === "frames" ? (choices.length === 4 ? 2 : Math.min(3, choices.length)) : 1;
  element("choices").style.setProperty("--columns", columns);
  element("choices").style.setProperty("--rows", Math.ceil(choices.length / columns));
  element("choices").replaceChildren(...choices.map((choice, i) => choiceButton(choice, i + 1)));
  element("back").disabled = place === 0;
  element("keys").innerHTML = `Keys: <kbd>1</kbd> to <kbd>${choices.length}</kbd> to answer, <kbd>&larr;</kbd> <kbd>&rarr;</kbd> to go back and on`;
  mark();
  show("question");
  window.scrollTo(0, 0);
  element("live").textContent = `Question ${place + 1} of ${order.length}`;
  waitForPictures(question);
}

/** Answers count once all pictures are seen. */
async function waitForPictures(question) {
  readyAt = Infinity;
  const images = [...element("stage").querySelectorAll("img")];
  try {
    await Promise.all(images.map(image => image.decode()));
  } catch {
    if (current() === question && element("problem").hidden) {
      problem("A picture of this question could not be loaded. Load the page again, or tell the person who asked you.");
    }
    return;
  }
  if (current() !== question || !images[0].isConnected) return;
  element("problem").hidden = true;
  shownAt = performance.now();
  readyAt = shownAt + SETTLE_MS;
  const after = study.questions.find(other => other.id === order[place + 1]);
  if (after) [after.input, after.target, ...(study.mode === "frames" ? after.choices : [])].filter(Boolean).forEach(token => picture(token, ""));
}

function mark() {
  const chosen = answers.get(order[place])?.choice;
  for (const button of element("choices").children) button.setAttribute("aria-pressed", button.dataset.choice === chosen);
}

function choose(number) {
  const question = current(), choices = choicesOf(question), choice = choices[number - 1];
  if (choice === undefined || performance.now() < readyAt) return;
  const isNew = !answers.has(question.id) || timer !== undefined;
  answers.set(question.id, {
    question: question.id, order: choices, choice, ms: Math.round(performance.now() - shownAt),
    at: Math.max(Date.now(), (answers.get(question.id)?.at ?? 0) + 1),  // later than the one it replaces, by any clock
  });
  mark();
  element("bar").value = answers.size;
  element("count").textContent = `${answers.size} of ${order.length} answered`;
  element("live").textContent = `Answer ${number} chosen`;
  save();
  clearTimeout(timer);
  if (isNew) {
    timer = setTimeout(() => { timer = undefined; goOn(place); }, CHANGE_MS);
  }
}

function step(by) {
  if (place + by >= order.length) goOn(place);
  else showQuestion(Math.max(0, place + by));
}

function problem(text) {
  element("problem").textContent = text;
  element("problem").hidden = false;
}

// --- Start ------------------------------------------------------------------------------------------------------------

document.addEventListener("keydown", event => {
  if (element("question").hidden || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key >= "1" && event.key <= "9") choose(Number(event.key));
  else if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "ArrowRight") step(1);
  else return;
  event.preventDefault();
});
element("enter").addEventListener("submit", event => {
  event.preventDefault();
  const code = element("rater").value.trim().toLowerCase(), isCode = RATER.test(code);
  element("codeproblem").hidden = isCode;
  element("codeproblem").textContent = "A code has 1 to 32 letters a to z, digits, - and _.";
  if (isCode) enter(code);
  else element("rater").focus();
});
element("back").addEventListener("click", () => step(-1));
element("next").addEventListener("click", () => step(1));
element("review").addEventListener("click", () => showQuestion(0));
element("download").addEventListener("click", download);
element("downloadend").addEventListener("click", download);
element("leave").addEventListener("click", () => { store("rater", null); showStart(); });

fillConstants();
if (sha256(holder.textContent) !== DIGEST) {
  problem("This study was changed after it was made, so it can't be used. Please ask for a fresh copy.");
} else {
  study = JSON.parse(holder.textContent);
  document.body.className = study.mode;
  element("instructions").innerHTML = MODES[study.mode].instructions;
  element("ask").textContent = MODES[study.mode].ask;
  const last = stored("rater");
  if (typeof last === "string" && RATER.test(last)) enter(last);
  else showStart();
}
