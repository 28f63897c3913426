/** Numbers, sizes and times in words; the units are always said. */

import { h, setText } from './dom.js';

const NUMBER = new Intl.NumberFormat('en');
const ABSOLUTE = new Intl.DateTimeFormat('en-GB', {
  dateStyle: 'medium', timeStyle: 'medium',
});

/**
 * 12,345
 * @param {number} value
 */
export function count(value) {
  return NUMBER.format(value);
}

/**
 * "1 job", "2,000 jobs"
 * @param {number} value
 * @param {string} one
 * @param {string} [many]
 */
export function counted(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

const SIZES = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];

/**
 * A number of bytes: "12.4 MiB".
 * @param {number} value
 */
export function bytes(value) {
  let unit = 0;
  let rest = value;
  while (rest >= 1023.95 && unit < SIZES.length - 1) {
    rest /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || rest >= 99.95 ? 0 : 1;
  return `${rest.toFixed(digits)} ${SIZES[unit]}`;
}

/**
 * A number of seconds: "340 ms", "4.2 s", "3 h 5 m".
 * @param {number} seconds
 */
export function duration(seconds) {
  if (seconds < 0.9995) return `${Math.round(Math.max(0, seconds) * 1000)} ms`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const parts = /** @type {const} */ ([['d', 86400], ['h', 3600], ['m', 60], ['s', 1]]);
  const first = parts.findIndex(([, size]) => whole >= size);
  return parts
    .slice(first, first + 2)
    .map(([unit, size], index) => {
      const larger = index === 0 ? Infinity : parts[first][1];
      return [Math.floor((whole % larger) / size), unit];
    })
    .filter(([value], index) => index === 0 || value !== 0)
    .map(([value, unit]) => `${value} ${unit}`)
    .join(' ');
}

/**
 * Seconds from one time to another; to now if there is no other.
 * @param {string} from
 * @param {string | null} [to]
 */
export function secondsBetween(from, to) {
  return ((to ? Date.parse(to) : Date.now()) - Date.parse(from)) / 1000;
}

/**
 * "just now", "5 min ago", "3 Feb"
 * @param {number} time in milliseconds
 */
export function relative(time) {
  const seconds = (Date.now() - time) / 1000;
  if (seconds < 5) return 'just now';
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  if (seconds < 30 * 86400) return `${Math.floor(seconds / 86400)} d ago`;
  const date = new Date(time);
  const sameYear = date.getFullYear() === new Date().getFullYear();
  return date.toLocaleDateString('en-GB', {
    day: 'numeric', month: 'short', ...(sameYear ? {} : { year: 'numeric' }),
  });
}

/**
 * A time as people write it, with its zone's own clock.
 * @param {string | number} time RFC 3339, or milliseconds
 */
export function absolute(time) {
  return ABSOLUTE.format(new Date(time));
}

/**
 * An element that says how long ago something was, and goes on saying it.
 * @param {string} time RFC 3339
 */
export function ago(time) {
  return h('time', { datetime: time, title: absolute(time) }, relative(Date.parse(time)));
}

/**
 * An element that says how long something took, or how long it has taken so far.
 * @param {string} from
 * @param {string | null} to
 */
export function took(from, to) {
  const text = duration(Math.max(0, secondsBetween(from, to)));
  return to ? h('span', {}, text) : h('span', { 'data-since': from }, text);
}

/** Keep the times in the page true, once a second. */
export function keepTimes() {
  setInterval(() => {
    if (document.hidden) return;
    for (const element of document.querySelectorAll('time[datetime]')) {
      setText(element, relative(Date.parse(element.getAttribute('datetime') ?? '')));
    }
    for (const element of document.querySelectorAll('[data-since]')) {
      const since = element.getAttribute('data-since') ?? '';
      setText(element, duration(Math.max(0, secondsBetween(since))));
    }
  }, 1000);
}

/**
 * A word of a shell, quoted if it needs to be.
 * @param {string} word
 */
export function quoted(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}
