/** How much of something is in use, as a bar. */

import { h } from './dom.js';

/**
 * Make a bar; `setMeter` fills it.
 * @param {string} label
 */
export function meter(label) {
  return h('span', { class: 'meter', role: 'meter', 'aria-label': label, 'aria-valuemin': 0 },
    h('span', {}));
}

/**
 * Show a value in a bar.
 * @template {HTMLElement} T
 * @param {T} element
 * @param {number} value
 * @param {number} maximum
 * @returns {T}
 */
export function setMeter(element, value, maximum) {
  const top = maximum || 1;
  element.setAttribute('aria-valuemax', String(top));
  element.setAttribute('aria-valuenow', String(Math.min(value, top)));
  const fill = /** @type {HTMLElement} */ (element.firstElementChild);
  fill.style.width = `${Math.min(100, (value / top) * 100)}%`;
  return element;
}
