/** Light, dark, or as the system has it; remembered by this browser. */

const KEY = 'orchestrator.theme';

/** @typedef {'system' | 'light' | 'dark'} Theme */

/** @returns {Theme} */
export function theme() {
  const kept = localStorage.getItem(KEY);
  return kept === 'light' || kept === 'dark' ? kept : 'system';
}

/** @param {Theme} wanted */
export function setTheme(wanted) {
  if (wanted === 'system') localStorage.removeItem(KEY);
  else localStorage.setItem(KEY, wanted);
  applyTheme();
}

/** Show the page in the theme that is set. */
export function applyTheme() {
  const wanted = theme();
  if (wanted === 'system') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = wanted;
}
