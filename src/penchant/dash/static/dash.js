// Keeps an open page up to date. The server makes each page whole, so this only asks for the page again, with the mark
// of the one that is shown, and puts the parts that differ into their places. Without it, reloading does the same.
(() => {
  "use strict";
  const BETWEEN_MS = { going: 2000, idle: 10000, catchingUp: 50, lost: 5000 };
  const parts = () => document.querySelectorAll("[data-live]");
  if (!parts().length) return;

  let mark = document.body.dataset.mark;
  let timer = null;
  const line = document.getElementById("line");
  const say = (words) => { if (line.textContent !== words) line.textContent = words; };

  const put = (place, fresh) => {
    if (place && fresh && place.innerHTML !== fresh.innerHTML) place.replaceChildren(...fresh.childNodes);
  };

  // Of a chart the drawing, the legend and the table change; what was opened stays open, what has the focus keeps it.
  const putFigure = (place, fresh) => {
    if (!fresh) return;
    for (const within of [".legend", "tbody", "details > p.quiet"]) {
      put(place.querySelector(within), fresh.querySelector(within));
    }
    const drawing = place.querySelector(":scope > svg"), anew = fresh.querySelector(":scope > svg");
    if (drawing && anew && drawing.outerHTML !== anew.outerHTML) drawing.replaceWith(anew);
  };

  const putFigures = (place, fresh) => {
    const shown = [...place.querySelectorAll("figure")].map((figure) => figure.id).join();
    const known = [...fresh.querySelectorAll("figure")].map((figure) => figure.id).join();
    if (shown !== known) return put(place, fresh);
    for (const figure of place.querySelectorAll("figure")) {
      putFigure(figure, fresh.querySelector("#" + CSS.escape(figure.id)));
    }
  };

  // Only what is new is added, so that a screen reader tells that alone.
  const putLog = (place, fresh) => {
    const old = [...place.children], now = [...fresh.children];
    const isGrown = old.every((item, i) => now[i] && now[i].textContent === item.textContent);
    if (isGrown) place.append(...now.slice(old.length));
    else put(place, fresh);
  };

  const ways = {
    swap: put, charts: putFigures, log: putLog,
    comparison: (place, fresh) => {
      for (const section of place.querySelectorAll(":scope > section")) {
        const anew = fresh.querySelector("#" + CSS.escape(section.id));
        if (!anew) return put(place, fresh);
        if (section.querySelector("figure:not(.forest)")) putFigures(section, anew);
        else put(section, anew);
      }
    },
  };

  const show = (html) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    for (const place of parts()) {
      const fresh = page.getElementById(place.id);
      if (!fresh) continue;
      for (const [name, value] of Object.entries(fresh.dataset)) place.dataset[name] = value;
      ways[place.dataset.live](place, fresh);
    }
  };

  const wait = () => {
    if (document.querySelector('[data-whole="0"]')) return BETWEEN_MS.catchingUp;
    return document.querySelector('[data-going="1"]') ? BETWEEN_MS.going : BETWEEN_MS.idle;
  };

  const look = async () => {
    timer = null;
    let next = BETWEEN_MS.lost;
    try {
      const answer = await fetch(location.href, { headers: { "If-None-Match": mark }, cache: "no-store" });
      if (answer.status === 200) {
        show(await answer.text());
        mark = answer.headers.get("ETag") || "";
      }
      if (answer.status === 200 || answer.status === 304) {
        say("");
        next = wait();
      } else {
        say(answer.status === 403 ? "Signed out: open the address that penchant dash printed." : "This page is not there any more.");
      }
    } catch {
      say("No answer: is penchant dash still running?");
    }
    plan(next);
  };

  const plan = (ms) => {
    clearTimeout(timer);
    if (!document.hidden) timer = setTimeout(look, ms);
  };
  document.addEventListener("visibilitychange", () => plan(0));
  plan(wait());
})();
