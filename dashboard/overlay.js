/** What lies over a page for a moment: questions, and notes of what was done. */

import { fill, h } from './dom.js';
import { icon } from './icons.js';

/** @import {Child} from './dom.js' */

const NOTE_MS = 5_000;
const ERROR_MS = 12_000;

/**
 * Show a dialog; resolves with the value of the button that closed it, '' for Escape.
 * @param {string} title
 * @param {Child[]} content
 * @param {{ value: string, label: string, kind?: string }[]} buttons the last is the main one
 * @param {string} [size]
 * @returns {Promise<string>}
 */
export function ask(title, content, buttons, size = '') {
  const row = buttons.map(({ value, label, kind }) =>
    h('button', { class: `button ${kind ?? ''}`, value, type: 'submit' }, label));
  const dialog = h('dialog', { class: `dialog ${size}`, 'aria-labelledby': 'dialog-title' },
    h('form', { method: 'dialog' },
      h('header', {},
        h('h2', { id: 'dialog-title' }, title),
        h('button', { class: 'button ghost icon-only', value: '', 'aria-label': 'Close' },
          icon('close'))),
      h('div', { class: 'dialog-body' }, ...content),
      row.length > 0 && h('footer', {}, ...row)));
  document.body.append(dialog);
  dialog.addEventListener('click', (event) => {
    if (event.target === dialog) dialog.close('');
  });
  dialog.showModal();
  row.at(-1)?.focus();
  return new Promise((resolve) => {
    dialog.addEventListener('close', () => {
      resolve(dialog.returnValue);
      dialog.remove();
    });
  });
}

/**
 * Ask before something is done that can't be undone.
 * @param {string} title
 * @param {string} text
 * @param {string} action what the button says
 */
export async function confirmed(title, text, action) {
  const answer = await ask(title, [h('p', {}, text)], [
    { value: 'no', label: 'Cancel' },
    { value: 'yes', label: action, kind: 'danger' },
  ], 'narrow');
  return answer === 'yes';
}

/** @returns {HTMLElement} */
function stack() {
  const there = document.querySelector('.notes');
  if (there instanceof HTMLElement) return there;
  const made = h('div', { class: 'notes', role: 'status', 'aria-live': 'polite' });
  document.body.append(made);
  return made;
}

/**
 * Say what was done.
 * @param {...Child} content
 */
export function note(...content) {
  show('note', content, NOTE_MS);
}

/**
 * Say what went wrong, in the server's words.
 * @param {unknown} error
 */
export function complain(error) {
  const text = error instanceof Error ? error.message : String(error);
  show('note bad', [icon('warning'), h('span', {}, text)], ERROR_MS);
}

/**
 * @param {string} kind
 * @param {Child[]} content
 * @param {number} milliseconds
 */
function show(kind, content, milliseconds) {
  const close = h('button', { class: 'button ghost icon-only', 'aria-label': 'Dismiss' },
    icon('close'));
  const element = h('div', { class: kind }, h('div', { class: 'note-text' }, ...content), close);
  close.addEventListener('click', () => element.remove());
  stack().append(element);
  setTimeout(() => element.remove(), milliseconds);
}

/**
 * Put a text on the clipboard and say so on the button for a moment.
 * @param {HTMLButtonElement} button
 * @param {string} text
 */
export async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
    const before = [...button.childNodes];
    fill(button, icon('check'), 'Copied');
    setTimeout(() => button.replaceChildren(...before), 1_500);
  } catch {
    // without TLS browsers give no clipboard: the text is shown, selected, to be copied by hand
    const area = h('textarea', { class: 'code', rows: 4, readOnly: true, value: text,
      'aria-label': 'Text to copy' });
    const answer = ask('Copy this', [area], [{ value: '', label: 'Done' }]);
    area.select();
    await answer;
  }
}

/**
 * What stands in a page in place of something that could not be had.
 * @param {unknown} error
 * @param {() => void} retry
 */
export function failure(error, retry) {
  const text = error instanceof Error ? error.message : String(error);
  return h('div', { class: 'empty bad', role: 'alert' },
    icon('warning'),
    h('p', {}, text),
    h('button', { class: 'button', type: 'button', on: { click: retry } }, 'Try again'));
}

/**
 * What stands where there is nothing yet: what it would be, and what to do for it.
 * @param {string} title
 * @param {...Child} content
 */
export function empty(title, ...content) {
  return h('div', { class: 'empty' }, h('h2', {}, title), ...content);
}
