document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
// The theme adds frames of wide tables and buttons of code after loading: tables scroll with the
// keyboard, too, and each code has a label of its own.
new MutationObserver(() => {
  for (const frame of document.querySelectorAll(".md-typeset__scrollwrap")) frame.tabIndex = 0;
  document.querySelectorAll(".md-code__nav").forEach((bar, index) => {
    bar.setAttribute("aria-label", `Code ${index + 1}`);
  });
}).observe(document.body, { childList: true, subtree: true });
