/** Files of the server on the user's disk. */

/** @import {App} from './main.js' */
/** @import {Query} from './api.js' */

import { isAbort } from './api.js';
import { h } from './dom.js';
import { bytes, quoted } from './format.js';
import { icon } from './icons.js';
import { ask, complain, copy, note } from './overlay.js';

const MAX_HELD_BYTES = 2 ** 30;

/**
 * Return the command that does what a button of the page does.
 * @param {App} app
 * @param {string} path
 * @param {string[]} [options]
 * @param {Query} [query]
 */
export function curl(app, path, options = [], query = {}) {
  const token = app.access.isTokenNeeded && app.api.token !== null
    ? ['-H', '"Authorization: Bearer $TOKEN"'] : [];
  return ['curl', '-f', ...token, ...options.map(quoted), quoted(app.api.address(path, query))].join(' ');
}

/**
 * Have the browser save a file. Without a token the browser fetches it by itself. With one the
 * page must, since only it can send the token, and holds the file while it comes; one too large
 * for that is written to the disk as it comes where the browser can, else curl is named.
 * @param {App} app
 * @param {string} path
 * @param {string} name
 * @param {Query} [query]
 */
export async function save(app, path, name, query = {}) {
  const address = app.api.address(path, query);
  if (app.api.token === null) {
    follow(address, name);
    return;
  }
  try {
    const response = await app.api.request(path, { query });
    const size = Number(response.headers.get('Content-Length') ?? 0);
    if (size > MAX_HELD_BYTES) {
      await saveLarge(app, response, path, name, size);
      return;
    }
    if (size > 2 ** 24) note(icon('download'), `Loading ${name}, ${bytes(size)} …`);
    const url = URL.createObjectURL(new Blob([await response.blob()], { type: 'application/octet-stream' }));
    follow(url, name);
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  } catch (error) {
    if (!isAbort(error)) complain(error);
  }
}

/**
 * @param {string} address
 * @param {string} name
 */
function follow(address, name) {
  const link = h('a', { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

/**
 * @param {App} app
 * @param {Response} response
 * @param {string} path
 * @param {string} name
 * @param {number} size
 */
async function saveLarge(app, response, path, name, size) {
  const picker = /** @type {any} */ (globalThis).showSaveFilePicker;
  if (typeof picker === 'function') {
    const handle = await picker({ suggestedName: name });
    await /** @type {ReadableStream} */ (response.body).pipeTo(await handle.createWritable());
    note(icon('check'), `Saved ${name}.`);
    return;
  }
  await response.body?.cancel();
  const command = curl(app, path, ['-o', name]);
  const button = h('button', { class: 'button', type: 'button', on: {
    click: () => void copy(button, command),
  } }, icon('copy'), 'Copy');
  await ask('Too large for this browser', [
    h('p', {}, `${name} has ${bytes(size)}. Use a terminal, with your token in TOKEN:`),
    h('pre', { class: 'code', tabIndex: 0 }, command), button,
  ], []);
}
