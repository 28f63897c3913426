/** The API tokens that there are. They are made and revoked on the server's own machine. */

/** @import {App} from '../main.js' */
/** @import {Address, Page, Token} from '../types.js' */

import { h } from '../dom.js';
import { ago } from '../format.js';
import { empty } from '../overlay.js';

const ROLES = /** @type {Record<string, string>} */ ({
  read: 'sees jobs and results',
  submit: 'also submits, terminates, deletes and runs again',
  admin: 'also steers agents and sees tokens',
});

/**
 * @param {App} app
 * @param {Address} _address
 * @param {AbortSignal} signal
 * @returns {Promise<Page>}
 */
export async function open(app, _address, signal) {
  const { tokens } = /** @type {{ tokens: Token[] }} */ (await app.api.get('tokens', { signal }));
  return {
    title: 'Tokens',
    element: h('div', { class: 'page' },
      h('header', { class: 'page-head' }, h('h1', {}, 'Tokens')),
      tokens.length === 0
        ? empty('There are no tokens',
          h('p', {}, 'So everybody who reaches this server may use it. Make the first on the server’s machine:'),
          h('pre', { class: 'code', tabIndex: 0 }, 'python orchestrator.py token create --name web --user any --role submit'))
        : table(app, tokens),
      tokens.length > 0 && h('p', { class: 'quiet' },
        'Tokens are made and revoked on the server’s machine: ',
        h('code', {}, 'orchestrator.py token create'), ', ', h('code', {}, 'token revoke NAME'), '.')),
  };
}

/**
 * @param {App} app
 * @param {Token[]} tokens
 */
function table(app, tokens) {
  return h('div', { class: 'table-scroll', tabIndex: 0, role: 'region', 'aria-label': 'Tokens' },
    h('table', { class: 'data-table' },
      h('thead', {}, h('tr', {}, ...['Name', 'Role', 'Reaches', 'Created'].map((name) => h('th', { scope: 'col' }, name)))),
      h('tbody', {}, ...tokens.map((token) => h('tr', {},
        h('th', { scope: 'row' }, token.name,
          token.name === app.access.caller?.name && h('span', { class: 'chip', 'data-level': 'good' }, 'this one')),
        h('td', {}, token.role, h('span', { class: 'quiet' }, ` ${ROLES[token.role] ?? ''}`)),
        h('td', {}, token.user_id === null ? 'all users’ jobs' : `jobs of user ${token.user_id}`),
        h('td', {}, ago(token.created_at)))))));
}
