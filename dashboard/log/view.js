/**
 * Shows a buffer of lines. The page holds a window of a bounded number of them, in blocks,
 * which moves as one scrolls.
 */

/** @import {Line, LogBuffer} from './buffer.js' */

import { absolute } from '../format.js';
import { h } from '../dom.js';
import { pieces, plain, styled } from './ansi.js';

const BLOCK = 100;
const MAX_BLOCKS = 20;
const NEAR = 600; // pixels from an end of the window at which it moves
const STEP = 5;
const MAX_FINDS = 20_000;
const REST = 5; // how much longer than it draws the view lets others work
const HIDDEN_MS = 250;
const MAX_PAUSE_MS = 500;
const CLOCK = new Intl.DateTimeFormat('en-GB', {
  hour: '2-digit', minute: '2-digit', second: '2-digit', fractionalSecondDigits: 1,
});

export class LogView {
  /**
   * @param {LogBuffer} buffer
   * @param {() => void} onChange called when following, or what was found, changes
   */
  constructor(buffer, onChange) {
    this._buffer = buffer;
    this._onChange = onChange;
    this.isFollowing = true;
    this._query = '';
    /** @type {number[]} numbers of the lines that were found */
    this.finds = [];
    /** The find that is shown, an index. */
    this.find = -1;
    this._scannedTo = 0;
    /** @type {Map<number, HTMLElement>} */
    this._blocks = new Map();
    this._from = 0;
    this._to = 0;
    this._lastTop = 0;
    this._isDrawing = false;
    this._pause = 0;
    this.element = h('div', {
      class: 'log-lines', tabIndex: 0, role: 'log', 'aria-live': 'off', 'aria-label': 'Output of the job',
      on: { scroll: () => this._onScroll() },
    });
  }

  /**
   * Draw soon what has changed in the buffer. However fast lines come, drawing takes a small
   * part of the time.
   */
  refresh() {
    if (this._isDrawing) return;
    this._isDrawing = true;
    setTimeout(() => {
      this._isDrawing = false;
      const before = performance.now();
      this._refresh();
      this._pause = Math.min(Math.max(16, (performance.now() - before) * REST), MAX_PAUSE_MS);
    }, document.hidden ? HIDDEN_MS : this._pause);
  }

  /** Draw all anew, as after a change of what is shown of each line. */
  redraw() {
    this.element.replaceChildren();
    this._blocks.clear();
    this._draw(0);
  }

  /** Forget all that is shown. */
  reset() {
    this._from = 0;
    this._to = 0;
    this.isFollowing = true;
    this._scannedTo = 0;
    this.finds = [];
    this.find = -1;
    this.redraw();
  }

  /** @param {boolean} isWanted */
  follow(isWanted) {
    this.isFollowing = isWanted;
    this._refresh();
    this._onChange();
  }

  // --- the window

  get _lastBlock() {
    return Math.ceil(this._buffer.end / BLOCK);
  }

  get _firstBlock() {
    return Math.floor(this._buffer.first / BLOCK);
  }

  _refresh() {
    const changed = Math.floor(this._buffer.changedFrom / BLOCK);
    this._scan(this._buffer.changedFrom);
    this._buffer.changedFrom = this._buffer.end;
    if (this.isFollowing) {
      this._to = this._lastBlock;
      this._from = Math.max(this._firstBlock, this._to - MAX_BLOCKS);
    } else {
      this._from = Math.max(this._from, this._firstBlock);
      this._to = Math.max(Math.min(this._from + MAX_BLOCKS, this._lastBlock), this._to);
    }
    this._draw(changed);
    if (this.isFollowing) this._scrollTo(this.element.scrollHeight);
  }

  /**
   * Make the page hold the blocks of the window.
   * @param {number} changed the first block whose lines have changed
   */
  _draw(changed) {
    for (const [number, element] of this._blocks) {
      if (number >= this._from && number < this._to && number < changed) continue;
      if (number >= this._from && number < this._to) {
        this._fillBlock(element, number);
      } else {
        this._blocks.delete(number);
        element.remove();
      }
    }
    /** @type {Element | null} */
    let next = this.element.firstElementChild;
    for (let number = this._from; number < this._to; number += 1) {
      let element = this._blocks.get(number);
      if (element === undefined) {
        element = h('div', { class: 'log-block' });
        this._fillBlock(element, number);
        this._blocks.set(number, element);
        this.element.insertBefore(element, next);
      } else {
        next = element.nextElementSibling;
      }
    }
  }

  /**
   * @param {HTMLElement} element
   * @param {number} block
   */
  _fillBlock(element, block) {
    const from = Math.max(block * BLOCK, this._buffer.first);
    const to = Math.min((block + 1) * BLOCK, this._buffer.end);
    const lines = [];
    for (let number = from; number < to; number += 1) lines.push(this._line(number));
    element.replaceChildren(...lines);
  }

  _onScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.element;
    const below = scrollHeight - clientHeight - scrollTop;
    const isUp = scrollTop < this._lastTop - 2;
    this._lastTop = scrollTop;
    const wasFollowing = this.isFollowing;
    if (isUp && below > 8) this.isFollowing = false;
    else if (below < 4 && this._to === this._lastBlock) this.isFollowing = true;
    if (!this.isFollowing) {
      if (scrollTop < NEAR && this._from > this._firstBlock) this._move(-STEP);
      else if (below < NEAR && this._to < this._lastBlock) this._move(STEP);
    }
    if (wasFollowing !== this.isFollowing) this._onChange();
  }

  /**
   * Move the window by some blocks, and what is seen not at all.
   * @param {number} blocks
   */
  _move(blocks) {
    const from = Math.max(this._firstBlock, Math.min(this._from + blocks, this._lastBlock - MAX_BLOCKS));
    const kept = this._blocks.get(blocks < 0 ? this._from : this._to - 1);
    const before = kept?.offsetTop ?? 0;
    this._from = Math.max(from, 0);
    this._to = Math.min(this._from + MAX_BLOCKS, this._lastBlock);
    this._draw(Infinity);
    if (kept) this._scrollTo(this.element.scrollTop + kept.offsetTop - before);
  }

  /** @param {number} top */
  _scrollTo(top) {
    this.element.scrollTop = top;
    this._lastTop = this.element.scrollTop;
  }

  /**
   * Show a line in the middle.
   * @param {number} number
   */
  _reveal(number) {
    this.isFollowing = false;
    const block = Math.floor(number / BLOCK);
    if (block < this._from || block >= this._to) {
      this._from = Math.max(this._firstBlock, block - MAX_BLOCKS / 2);
      this._to = Math.min(this._from + MAX_BLOCKS, this._lastBlock);
      this._draw(Infinity);
    }
    const line = this.element.querySelector(`[data-line="${number}"]`);
    if (!(line instanceof HTMLElement)) return;
    // not scrollIntoView: that would move the page around the log, too
    const box = line.getBoundingClientRect();
    const place = this.element.getBoundingClientRect();
    this._scrollTo(this.element.scrollTop + box.top - place.top - (place.height - box.height) / 2);
  }

  // --- lines

  /** @param {number} number */
  _line(number) {
    const line = this._buffer.line(number);
    const text = h('span', { class: 'line-text' });
    for (const piece of this._pieces(line)) text.append(piece);
    return h('div', {
      class: 'line', 'data-source': line.source, 'data-line': number,
      ...(this.finds[this.find] === number ? { 'data-found': 'here' } : {}),
    },
    h('span', { class: 'line-number', 'data-number': number + 1 }),
    h('span', {
      class: 'line-time', 'data-time': line.at === null ? '' : CLOCK.format(line.at),
      title: line.at === null ? null : absolute(line.at),
    }), text);
  }

  /**
   * Cut a line where its look changes and where something was found.
   * @param {Line} line
   * @returns {Node[]}
   */
  _pieces(line) {
    const parts = pieces(line.text, line.style);
    const ranges = this._query === '' ? [] : rangesOf(plain(line.text).toLowerCase(), this._query);
    if (ranges.length === 0) return parts.map(({ text, style }) => styled(text, style));
    /** @type {Node[]} */
    const nodes = [];
    let start = 0;
    for (const { text, style } of parts) {
      let done = 0;
      for (const [from, to] of ranges) {
        const first = Math.max(from - start, done);
        const last = Math.min(to - start, text.length);
        if (first >= last) continue;
        if (first > done) nodes.push(styled(text.slice(done, first), style));
        const found = document.createElement('mark');
        found.append(styled(text.slice(first, last), style));
        nodes.push(found);
        done = last;
      }
      if (done < text.length) nodes.push(styled(text.slice(done), style));
      start += text.length;
    }
    return nodes;
  }

  // --- search

  /**
   * Find a text, in upper or lower case, in all lines that are kept.
   * @param {string} query
   */
  search(query) {
    this._query = query.toLowerCase();
    this.finds = [];
    this.find = -1;
    this._scannedTo = this._buffer.first;
    this._scan(this._buffer.first);
    this.redraw();
    if (this.finds.length > 0) this.step(-1);
    else this._onChange();
  }

  /**
   * Go to the next find, or (-1) the one before.
   * @param {number} step
   */
  step(step) {
    if (this.finds.length === 0) return;
    const { length } = this.finds;
    this.find = this.find < 0 && step < 0 ? length - 1 : (this.find + step + length) % length;
    this.element.querySelector('[data-found]')?.removeAttribute('data-found');
    this._reveal(this.finds[this.find]);
    this.element.querySelector(`[data-line="${this.finds[this.find]}"]`)
      ?.setAttribute('data-found', 'here');
    this._onChange();
  }

  /** @param {number} changedFrom */
  _scan(changedFrom) {
    if (this._query === '') return;
    const start = Math.max(Math.min(this._scannedTo, changedFrom), this._buffer.first);
    const current = this.finds[this.find];
    const before = this.finds.length;
    this.finds = this.finds.filter((number) => number >= this._buffer.first && number < start);
    for (let number = start; number < this._buffer.end && this.finds.length < MAX_FINDS; number += 1) {
      if (plain(this._buffer.line(number).text).toLowerCase().includes(this._query)) {
        this.finds.push(number);
      }
    }
    this._scannedTo = this._buffer.end;
    this.find = current === undefined ? -1 : this.finds.indexOf(current);
    if (this.finds.length !== before) this._onChange();
  }
}

/**
 * @param {string} text
 * @param {string} query
 * @returns {[number, number][]}
 */
function rangesOf(text, query) {
  /** @type {[number, number][]} */
  const found = [];
  for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + query.length)) {
    found.push([at, at + query.length]);
  }
  return found;
}
