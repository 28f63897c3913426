/** The filters of a list of jobs: as people write them, as addresses and requests have them. */

/** @import {State} from './types.js' */

import { ALL } from './states.js';

/** @typedef {{ key: string, value: string }} Term */

const KEYS = ['status', 'service', 'user', 'agent', 'tag', 'since', 'id', 'text'];
const REPEATABLE = new Set(['status', 'tag', 'id']);
const AGES = /** @type {Record<string, number>} */ ({ m: 60, h: 3600, d: 86400, w: 604800 });

export const HELP = [
  ['status:Failed,Killed', 'in one of these states'],
  ['service:docking', 'of a service'],
  ['user:7', 'of a user'],
  ['agent:node7', 'that an agent had'],
  ['tag:project:kinase', 'with a tag'],
  ['since:24h', 'made in the last 24 h, or since:2026-01-31'],
  ['id:7', 'with this number; just 7 does it, too'],
  ['"out of memory"', 'with these words in the message'],
];

/** What is wrong with a filter, in words. */
export class FilterError extends Error {}

/**
 * Parse what somebody typed: words `key:value`, anything else is looked for in messages.
 * @param {string} text
 * @returns {Term[]} Raises FilterError.
 */
export function parse(text) {
  /** @type {Term[]} */
  const terms = [];
  /** @type {string[]} */
  const words = [];
  for (const [, key, quotedValue, value, quotedWord, word] of text.matchAll(
    /(?:([a-z_]+):(?:"([^"]*)"?|(\S+)))|"([^"]*)"?|(\S+)/gi,
  )) {
    const name = key?.toLowerCase().replace(/^user_id$/, 'user').replace(/^state$/, 'status');
    if (name === undefined) {
      const said = quotedWord ?? word ?? '';
      if (/^#?\d+$/.test(said) && quotedWord === undefined) {
        terms.push({ key: 'id', value: said.replace('#', '') });
      } else words.push(said);
    } else if (KEYS.includes(name)) {
      terms.push(checked(name, quotedValue ?? value ?? ''));
    } else {
      throw new FilterError(`There is no filter “${key}”. There are ${KEYS.join(', ')}.`);
    }
  }
  if (words.length > 0) terms.push({ key: 'text', value: words.join(' ') });
  return terms.filter((term, index) =>
    REPEATABLE.has(term.key) || !terms.slice(index + 1).some(({ key }) => key === term.key));
}

/**
 * @param {string} key
 * @param {string} value
 * @returns {Term}
 */
function checked(key, value) {
  if (key === 'status') return { key, value: value.split(',').map(stateOf).join(',') };
  if (key === 'user' && !/^-?\d+$/.test(value)) throw new FilterError('user: must be a number.');
  if (key === 'id' && !/^\d+$/.test(value)) throw new FilterError('id: must be a number.');
  if (key === 'tag' && !/^[^:]+:/.test(value)) throw new FilterError('tag: must be tag:KEY:VALUE.');
  if (key === 'since') since(value);
  return { key, value };
}

/**
 * @param {string} text
 * @returns {string}
 */
function stateOf(text) {
  const state = ALL.find((name) => name.toLowerCase() === text.trim().toLowerCase());
  if (state === undefined) throw new FilterError(`There is no state “${text}”: ${ALL.join(', ')}.`);
  return state;
}

/**
 * Return the time that `since` names as the API takes it.
 * @param {string} value `24h`, or a date, or Unix seconds
 */
export function since(value) {
  const age = /^(\d{1,6})([mhdw])$/.exec(value);
  if (age) return String(Math.floor(Date.now() / 1000) - Number(age[1]) * AGES[age[2]]);
  const time = /^\d{9,}(\.\d+)?$/.test(value) ? Number(value) * 1000 : Date.parse(value);
  if (Number.isNaN(time)) {
    throw new FilterError('since: must be like 30m, 24h, 7d, or a date like 2026-01-31.');
  }
  return new Date(time).toISOString();
}

/**
 * Write terms as somebody would type them.
 * @param {readonly Term[]} terms
 */
export function write(terms) {
  return terms.map(({ key, value }) => {
    const text = /[\s"]/.test(value) || value === '' ? `"${value.replaceAll('"', '')}"` : value;
    return key === 'text' ? writeText(value) : `${key}:${text}`;
  }).join(' ');
}

/** @param {string} value */
function writeText(value) {
  return /(^|\s)#?\d+(\s|$)|:|"/.test(value) ? `"${value.replaceAll('"', '')}"` : value;
}

/**
 * Read terms from the query of an address. What is not a filter is left alone.
 * @param {URLSearchParams} query
 * @returns {Term[]}
 */
export function fromAddress(query) {
  return [...query].filter(([key]) => KEYS.includes(key)).map(([key, value]) => ({ key, value }));
}

/**
 * Write terms as the query of an address.
 * @param {readonly Term[]} terms
 */
export function toAddress(terms) {
  return new URLSearchParams(terms.map(({ key, value }) => [key, value]));
}

/**
 * Write terms as the query of a request. Raises FilterError.
 * @param {readonly Term[]} terms
 */
export function toRequest(terms) {
  const query = new URLSearchParams();
  for (const { key, value } of terms) {
    if (key === 'user') query.set('user_id', value);
    else if (key === 'since') query.set('since', since(value));
    else query.append(key, value);
  }
  return query;
}

/**
 * The states that the terms let through, all if they do not say.
 * @param {readonly Term[]} terms
 * @returns {readonly State[]}
 */
export function statesOf(terms) {
  const names = terms.filter(({ key }) => key === 'status').flatMap(({ value }) => value.split(','));
  return names.length === 0 ? ALL : ALL.filter((state) => names.includes(state));
}

/**
 * Put one filter in place of all of its kind; an empty value takes it out.
 * @param {readonly Term[]} terms
 * @param {string} key
 * @param {string} value
 */
export function replaced(terms, key, value) {
  const others = terms.filter((term) => term.key !== key);
  return value === '' ? others : [...others, { key, value }];
}
