// Accessibility: the sidebar's captions need a level, scrollable blocks must be reachable by Tab, and the lines of a long
// signature are not a definition list.
for (const caption of document.querySelectorAll("[role=heading]:not([aria-level])")) caption.setAttribute("aria-level", "2");
for (const list of document.querySelectorAll("dt dl, dt dl > dd")) list.setAttribute("role", "presentation");
const makeFocusable = () => {
  for (const block of document.querySelectorAll("pre, .table-wrapper"))
    if (block.scrollWidth > block.clientWidth) block.tabIndex = 0;
};
makeFocusable();
addEventListener("resize", makeFocusable);
