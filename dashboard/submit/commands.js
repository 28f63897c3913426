/** The commands that do what the form does. */

/** @import {App} from '../main.js' */

import { quoted } from '../format.js';

const MAX_NAMED = 8;

/** @typedef {[string, string][]} Fields */

/**
 * @param {readonly string[]} paths
 * @param {(path: string) => string} word
 */
function named(paths, word) {
  const words = paths.slice(0, MAX_NAMED).map(word);
  return paths.length > MAX_NAMED ? [...words, `… ${paths.length - MAX_NAMED} more files`] : words;
}

/**
 * The upload as curl does it.
 * @param {App} app
 * @param {readonly string[]} paths
 * @param {Fields} fields
 */
export function curlCommand(app, paths, fields) {
  const token = app.access.isTokenNeeded && app.api.token !== null
    ? ['-H "Authorization: Bearer $TOKEN"'] : [];
  return [
    `curl -X POST ${quoted(app.api.address('upload'))}`,
    ...token,
    ...named(paths, (path) => {
      const place = path.includes('/') ? `;filename=${path}` : '';
      return `-F ${quoted(`file=@${path}${place}`)}`;
    }),
    ...fields.map(([name, value]) => `-F ${quoted(`${name}=${value}`)}`),
  ].join(' \\\n  ');
}

/** What the command line calls the fields of the form. */
const OPTIONS = /** @type {Record<string, string>} */ ({
  user_id: '--user', service: '--service', name: '--name', priority: '--priority',
  timeout: '--timeout', tag: '--tag', cpus: '--cpus', memory: '--memory', gpus: '--gpus',
});

/**
 * The upload as the project's own command line does it.
 * @param {readonly string[]} paths
 * @param {Fields} fields
 */
export function lineCommand(paths, fields) {
  return [
    'orchestrator submit',
    ...fields.map(([name, value]) => `${OPTIONS[name]} ${quoted(value)}`),
    ...named(paths, quoted),
  ].join(' \\\n  ');
}
