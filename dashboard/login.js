/** Asking for a token. */

/** @import {Access} from './access.js' */

import { fill, h, setText } from './dom.js';

/**
 * Show the log-in in place of a page; resolves once a token holds.
 * @param {Access} access
 * @param {HTMLElement} place
 * @returns {Promise<void>}
 */
export function logIn(access, place) {
  const token = h('input', {
    id: 'token', type: 'password', autocomplete: 'off', required: true, spellcheck: false,
    'aria-describedby': 'token-help token-error',
  });
  const isRemembered = h('input', { type: 'checkbox', id: 'remember' });
  const problem = h('p', { class: 'field-error', id: 'token-error', role: 'alert' });
  const button = h('button', { class: 'button primary', type: 'submit' }, 'Continue');
  return new Promise((resolve) => {
    const form = h('form', { class: 'login card', on: { submit: async (event) => {
      event.preventDefault();
      setText(problem, '');
      button.disabled = true;
      try {
        await access.logIn(token.value.trim(), isRemembered.checked);
        resolve();
      } catch (error) {
        setText(problem, error instanceof Error ? error.message : String(error));
        token.select();
      }
      button.disabled = false;
    } } },
    h('h1', {}, 'This server wants a token'),
    h('div', { class: 'field' },
      h('label', { for: 'token' }, 'API token'), token, problem,
      h('p', { class: 'hint', id: 'token-help' },
        'Whoever runs the server makes one with ',
        h('code', {}, 'orchestrator.py token create'), '.')),
    h('label', { class: 'check' }, isRemembered, h('span', {}, 'Remember it in this tab, over reloads')),
    h('div', { class: 'actions' }, button));
    fill(place, form);
    document.title = 'Log in · Orchestrator';
    token.focus();
  });
}
