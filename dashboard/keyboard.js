/** Keys that work everywhere, and the list of them. */

import { h } from './dom.js';
import { ask } from './overlay.js';
import { go, href } from './router.js';

/** @type {Record<string, [string, string]>} the second key after g: its page and what it is */
const PLACES = {
  o: ['', 'Overview'],
  j: ['jobs', 'Jobs'],
  s: ['submit', 'Submit'],
  a: ['agents', 'Agents'],
  v: ['services', 'Services'],
  t: ['tokens', 'Tokens'],
};

const SEQUENCE_MS = 1_500;

const HELP = /** @type {const} */ ([
  ['Everywhere', [
    ...Object.entries(PLACES).map(([key, [, name]]) => /** @type {const} */ ([`g ${key}`, name])),
    ['/', 'Search: jobs, or in the log of a job'],
    ['?', 'These keys'],
  ]],
  ['In a list of jobs', [
    ['j  k', 'Next, previous job'],
    ['Enter', 'Open it'],
    ['x', 'Select it'],
    ['Esc', 'Select none'],
  ]],
  ['In a job', [
    ['f', 'Follow the log'],
    ['w', 'Wrap long lines'],
    ['n  N', 'Next, previous find'],
    ['1  2  3', 'Log, files, history'],
  ]],
]);

/**
 * Whether a key is typed into a field, so that it is not for us.
 * @param {KeyboardEvent} event
 */
function isTyping(event) {
  const target = event.target;
  return target instanceof HTMLElement
    && (target.isContentEditable || target.matches('input:not([type=checkbox]), textarea, select'));
}

/**
 * Hand keys to the page, and know the way to others.
 * @param {(event: KeyboardEvent) => boolean} onPageKey
 */
export function listenToKeys(onPageKey) {
  let goingSince = 0;
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (document.querySelector('dialog[open]')) return;
    if (isTyping(event)) {
      if (event.key === 'Escape') /** @type {HTMLElement} */ (event.target).blur();
      return;
    }
    const isGoing = Date.now() - goingSince < SEQUENCE_MS;
    goingSince = 0;
    const place = PLACES[event.key];
    if (isGoing && place) go(href(place[0]));
    else if (event.key === 'g') goingSince = Date.now();
    else if (event.key === '?') void showKeys();
    else if (onPageKey(event)) { /* it was for the page */ }
    else if (event.key === '/') go(href('jobs', { focus: '1' }));
    else return;
    event.preventDefault();
  });
}

/** Show all keys. */
export function showKeys() {
  const groups = HELP.map(([title, keys]) =>
    h('section', {},
      h('h3', {}, title),
      h('dl', { class: 'keys' }, ...keys.flatMap(([key, meaning]) => [
        h('dt', {}, ...key.split(' ').filter(Boolean).map((one) => h('kbd', {}, one))),
        h('dd', {}, meaning),
      ]))));
  return ask('Keyboard', [h('div', { class: 'key-groups' }, ...groups)], []);
}
