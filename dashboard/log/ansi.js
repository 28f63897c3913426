/** Colours of terminals (ECMA-48, SGR), as classes and colours of elements. */

import { visible } from '../dom.js';

/**
 * How text looks from some point on. `foreground` and `background` are 0 to 15, or a colour.
 * @typedef {object} Style
 * @property {number | string | null} foreground
 * @property {number | string | null} background
 * @property {boolean} isBold
 * @property {boolean} isDim
 * @property {boolean} isItalic
 * @property {boolean} isUnderlined
 * @property {boolean} isInverse
 */

/** @type {Readonly<Style>} */
export const PLAIN = Object.freeze({
  foreground: null, background: null, isBold: false, isDim: false, isItalic: false,
  isUnderlined: false, isInverse: false,
});

// CSI sequences, OSC sequences (titles, links), and other escapes of two characters
const ESCAPE = /\x1b(?:\[([0-9;:]*)([ -/]*[@-~])|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])/g;

/**
 * Return how text looks after a piece of output.
 * @param {string} text
 * @param {Readonly<Style>} style before it
 */
export function styleAfter(text, style) {
  if (!text.includes('\x1b')) return style;
  let now = style;
  for (const [, numbers, end] of text.matchAll(ESCAPE)) if (end === 'm') now = applied(now, numbers);
  return now;
}

/**
 * Return text without its escapes.
 * @param {string} text
 */
export function plain(text) {
  return text.includes('\x1b') ? text.replace(ESCAPE, '') : text;
}

/**
 * Cut a line into pieces that look alike.
 * @param {string} text
 * @param {Readonly<Style>} style at its start
 * @returns {{ text: string, style: Readonly<Style> }[]}
 */
export function pieces(text, style) {
  if (!text.includes('\x1b')) return [{ text, style }];
  const found = [];
  let now = style;
  let start = 0;
  for (const match of text.matchAll(ESCAPE)) {
    if (match.index > start) found.push({ text: text.slice(start, match.index), style: now });
    start = match.index + match[0].length;
    if (match[2] === 'm') now = applied(now, match[1]);
  }
  if (start < text.length) found.push({ text: text.slice(start), style: now });
  return found;
}

/**
 * @param {Readonly<Style>} style
 * @param {string} numbers as they stand in the sequence
 * @returns {Readonly<Style>}
 */
function applied(style, numbers) {
  /** @type {Style} */
  const now = { ...style };
  const codes = numbers.split(/[;:]/).map(Number);
  for (let index = 0; index < codes.length; index += 1) {
    const code = codes[index];
    if (code === 0) Object.assign(now, PLAIN);
    else if (code === 1) now.isBold = true;
    else if (code === 2) now.isDim = true;
    else if (code === 3) now.isItalic = true;
    else if (code === 4) now.isUnderlined = true;
    else if (code === 7) now.isInverse = true;
    else if (code === 22) Object.assign(now, { isBold: false, isDim: false });
    else if (code === 23) now.isItalic = false;
    else if (code === 24) now.isUnderlined = false;
    else if (code === 27) now.isInverse = false;
    else if (code >= 30 && code <= 37) now.foreground = code - 30;
    else if (code === 39) now.foreground = null;
    else if (code >= 40 && code <= 47) now.background = code - 40;
    else if (code === 49) now.background = null;
    else if (code >= 90 && code <= 97) now.foreground = code - 90 + 8;
    else if (code >= 100 && code <= 107) now.background = code - 100 + 8;
    else if (code === 38 || code === 48) {
      const [colour, used] = extended(codes.slice(index + 1));
      if (code === 38) now.foreground = colour;
      else now.background = colour;
      index += used;
    }
  }
  return now;
}

/**
 * Read a colour out of 256, or of three bytes.
 * @param {number[]} codes after 38 or 48
 * @returns {[number | string | null, number]} the colour, and how many codes it took
 */
function extended([kind, ...rest]) {
  if (kind === 2) return [`rgb(${rest.slice(0, 3).map((part) => clamped(part)).join(' ')})`, 4];
  if (kind !== 5) return [null, 1];
  const number = clamped(rest[0]);
  if (number < 16) return [number, 2];
  if (number >= 232) {
    const grey = 8 + (number - 232) * 10;
    return [`rgb(${grey} ${grey} ${grey})`, 2];
  }
  const level = (/** @type {number} */ part) => (part === 0 ? 0 : 55 + part * 40);
  const place = number - 16;
  const parts = [Math.floor(place / 36), Math.floor(place / 6) % 6, place % 6];
  return [`rgb(${parts.map(level).join(' ')})`, 2];
}

/** @param {number | undefined} value */
function clamped(value) {
  return Math.min(255, Math.max(0, Math.trunc(value || 0)));
}

/**
 * Make the element of a piece, a text node if it looks like any other.
 * @param {string} text
 * @param {Readonly<Style>} style
 */
export function styled(text, style) {
  if (style === PLAIN) return document.createTextNode(visible(text));
  const element = document.createElement('span');
  element.textContent = visible(text);
  const [front, back] = style.isInverse
    ? [style.background ?? 'inverse', style.foreground ?? 'inverse']
    : [style.foreground, style.background];
  if (typeof front === 'number') element.classList.add(`ansi-${front}`);
  else if (front === 'inverse') element.classList.add('ansi-inverse');
  else if (front !== null) element.style.color = front;
  if (typeof back === 'number') element.classList.add(`ansi-on-${back}`);
  else if (back === 'inverse') element.classList.add('ansi-on-inverse');
  else if (back !== null) element.style.backgroundColor = back;
  if (style.isBold) element.classList.add('ansi-bold');
  if (style.isDim) element.classList.add('ansi-dim');
  if (style.isItalic) element.classList.add('ansi-italic');
  if (style.isUnderlined) element.classList.add('ansi-underline');
  return element;
}
