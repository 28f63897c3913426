/** The lines of a log, a bounded number of them: of more than that the oldest go. */

/** @import {Style} from './ansi.js' */

import { PLAIN, styleAfter } from './ansi.js';

/** @typedef {'stdout' | 'stderr' | 'note'} Source */

/**
 * One line. `at` is when it arrived, in milliseconds; null for what was there before we came.
 * @typedef {object} Line
 * @property {string} text
 * @property {Source} source
 * @property {Readonly<Style>} style at its start
 * @property {number | null} at
 */

const MAX_LINES = 200_000;
const MAX_CHARACTERS = 24 * 2 ** 20;
const MAX_LINE = 8_192; // a longer one is shown as several
const DROPPED_AT_ONCE = 0.1;

export class LogBuffer {
  constructor() {
    /** @type {Line[]} those that are kept */
    this._lines = [];
    this._characters = 0;
    /** How many lines were dropped before the first that is kept. */
    this.first = 0;
    /** @type {Map<Source, Readonly<Style>>} */
    this._styles = new Map();
    /** @type {Map<Source, Line>} lines that have not ended yet */
    this._open = new Map();
    /** The smallest number of a line that has changed since this was last set. */
    this.changedFrom = 0;
  }

  /** The number of the line after the last. Numbers are those of all lines that ever came. */
  get end() {
    return this.first + this._lines.length;
  }

  /**
   * Return a line by its number; it must be one that is kept.
   * @param {number} number
   */
  line(number) {
    return this._lines[number - this.first];
  }

  /**
   * Add what has arrived of a stream.
   * @param {Source} source
   * @param {string} text
   * @param {number | null} at
   */
  add(source, text, at) {
    let start = 0;
    for (;;) {
      const end = text.indexOf('\n', start);
      if (end < 0) break;
      this._extend(source, text.slice(start, end), at);
      this._finish(source);
      start = end + 1;
    }
    if (start < text.length) this._extend(source, text.slice(start), at);
    this._bound();
  }

  /**
   * Add a line of our own.
   * @param {string} text
   */
  note(text) {
    for (const source of [...this._open.keys()]) this._finish(source);
    this._append({ text, source: 'note', style: PLAIN, at: null });
  }

  /** Take the last line back. */
  drop() {
    this._lines.pop();
    this.changedFrom = Math.min(this.changedFrom, this.end);
  }

  /** Forget all lines. */
  clear() {
    this._lines = [];
    this._characters = 0;
    this.first = 0;
    this._open.clear();
    this._styles.clear();
    this.changedFrom = 0;
  }

  /**
   * @param {Source} source
   * @param {string} text
   * @param {number | null} at
   */
  _extend(source, text, at) {
    let rest = text;
    while (rest) {
      let line = this._open.get(source);
      if (line === undefined) {
        line = { text: '', source, style: this._styles.get(source) ?? PLAIN, at };
        this._append(line);
        this._open.set(source, line);
      } else {
        this._touch(line);
      }
      const part = rest.slice(0, MAX_LINE - line.text.length);
      rest = rest.slice(part.length);
      this._characters += part.length;
      line.text = overwritten(line.text + part);
      if (rest) this._finish(source);
    }
    if (!text && !this._open.has(source)) {
      const line = { text: '', source, style: this._styles.get(source) ?? PLAIN, at };
      this._append(line);
      this._open.set(source, line);
    }
  }

  /** @param {Source} source */
  _finish(source) {
    const line = this._open.get(source);
    this._open.delete(source);
    if (line === undefined) return;
    if (line.text.endsWith('\r')) line.text = line.text.slice(0, -1);
    const after = styleAfter(line.text, line.style);
    if (after !== line.style) this._styles.set(source, after);
  }

  /** @param {Line} line */
  _append(line) {
    this._lines.push(line);
    this._characters += 1;
    this.changedFrom = Math.min(this.changedFrom, this.end - 1);
  }

  /** @param {Line} line */
  _touch(line) {
    // an open line is among the last: at most one for each stream is open
    for (let index = this._lines.length - 1; index >= 0; index -= 1) {
      if (this._lines[index] === line) {
        this.changedFrom = Math.min(this.changedFrom, this.first + index);
        return;
      }
    }
  }

  _bound() {
    if (this._lines.length <= MAX_LINES && this._characters <= MAX_CHARACTERS) return;
    let number = Math.ceil(this._lines.length * DROPPED_AT_ONCE);
    let characters = 0;
    for (let index = 0; index < number; index += 1) characters += this._lines[index].text.length + 1;
    while (this._characters - characters > MAX_CHARACTERS && number < this._lines.length) {
      characters += this._lines[number].text.length + 1;
      number += 1;
    }
    this._lines.splice(0, number);
    this.first += number;
    this._characters = Math.max(0, this._characters - characters);
  }
}

/**
 * What a terminal shows of a line in which the cursor went back to its start.
 * @param {string} text
 */
function overwritten(text) {
  const last = text.endsWith('\r') ? text.length - 1 : text.length;
  const start = text.lastIndexOf('\r', last - 1);
  return start < 0 ? text : text.slice(start + 1);
}
