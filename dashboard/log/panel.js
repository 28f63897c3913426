/** The log of a job with what can be done to it: choose, search, follow, wrap, times, raw. */

/** @import {App} from '../main.js' */
/** @import {Stream} from './reader.js' */

import { isAbort } from '../api.js';
import { fill, h, setText } from '../dom.js';
import { save } from '../download.js';
import { count } from '../format.js';
import { icon } from '../icons.js';
import { empty, failure } from '../overlay.js';
import { LogBuffer } from './buffer.js';
import { LogReader } from './reader.js';
import { LogView } from './view.js';

const CHOICES = /** @type {const} */ ([['both', 'Both'], ['stdout', 'stdout'], ['stderr', 'stderr']]);
const HIDDEN_MS = 20_000;

export class LogPanel {
  _choices = h('div', { class: 'segments', role: 'group', 'aria-label': 'Stream' });
  _input = h('input', {
    type: 'search', 'aria-label': 'Search in the log', placeholder: 'Search', spellcheck: false,
    on: {
      input: () => this._view.search(this._input.value),
      keydown: (/** @type {KeyboardEvent} */ event) => {
        if (event.key !== 'Enter') return;
        event.preventDefault();
        this._view.step(event.shiftKey ? -1 : 1);
      },
    },
  });
  _found = h('span', { class: 'log-found', role: 'status' });
  _steps = h('span', { class: 'log-steps', hidden: true }, this._found,
    this._stepButton(-1, 'Previous find'), this._stepButton(1, 'Next find'));
  _find = h('div', { class: 'log-find' }, icon('search'), this._input, this._steps);
  _state = h('span', { class: 'log-state', role: 'status' });
  _followButton = this._button('follow', 'Follow', () => this._view.follow(!this._view.isFollowing));
  _wrapButton = this._button('wrap', 'Wrap', () => this._toggle('is-wrapped'));
  _timesButton = this._button('clock', 'Times', () => this._toggle('is-timed'));
  _rawButton = this._button('download', 'Raw', () => void this._saveRaw());

  /**
   * @param {App} app
   * @param {number} jobId
   * @param {AbortSignal} signal
   */
  constructor(app, jobId, signal) {
    this._app = app;
    this._jobId = jobId;
    this._signal = signal;
    this._choice = 'both';
    this._isOver = false;
    this._hasEnded = false;
    /** @type {AbortController | null} */
    this._reading = null;
    this._buffer = new LogBuffer();
    this._view = new LogView(this._buffer, () => this._draw());
    this._rawButton.removeAttribute('aria-pressed');
    this._timesButton.title = 'When each line arrived here, of those that came while you looked';
    this._place = h('div', { class: 'log-place' }, this._view.element);
    this.element = h('section', { class: 'log', 'aria-label': 'Log' },
      h('div', { class: 'log-tools' }, this._choices, this._find, h('span', { class: 'spring' }),
        this._state, this._followButton, this._wrapButton, this._timesButton, this._rawButton),
      this._place);
    this._watchVisibility();
  }

  /**
   * @param {-1 | 1} by
   * @param {string} label
   */
  _stepButton(by, label) {
    return h('button', {
      class: 'button ghost icon-only', type: 'button', 'aria-label': label, title: label,
      on: { click: () => this._view.step(by) },
    }, icon(by < 0 ? 'up' : 'down'));
  }

  /**
   * Show lines in another way, or not.
   * @param {string} name of the class that does it
   */
  _toggle(name) {
    this._view.element.classList.toggle(name);
    this._draw();
    if (this._view.isFollowing) this._view.follow(true);
  }

  /**
   * @param {import('../icons.js').Icon} sign
   * @param {string} label
   * @param {() => void} onClick
   */
  _button(sign, label, onClick) {
    return h('button', { class: 'button ghost small', type: 'button', title: label, 'aria-pressed': 'false',
      on: { click: onClick } }, icon(sign), h('span', {}, label));
  }

  /**
   * Show the output of a job.
   * @param {boolean} isOver whether the job has ended already
   */
  start(isOver) {
    this._isOver = isOver;
    this._hasEnded = isOver;
    void this._read();
  }

  /** The job has ended; what it printed last is on its way. */
  end() {
    this._hasEnded = true;
  }

  /** @param {KeyboardEvent} event */
  onKey(event) {
    if (event.key === '/') this._input.select();
    else if (event.key === 'f') this._view.follow(!this._view.isFollowing);
    else if (event.key === 'w') this._wrapButton.click();
    else if (event.key === 'n') this._view.step(1);
    else if (event.key === 'N') this._view.step(-1);
    else return false;
    return true;
  }

  /** @param {string} choice */
  _choose(choice) {
    this._choice = choice;
    void this._read();
  }

  async _read() {
    this._reading?.abort();
    const reading = new AbortController();
    this._reading = reading;
    const signal = AbortSignal.any([reading.signal, this._signal]);
    this._buffer.clear();
    this._view.reset();
    fill(this._place, this._view.element);
    this._draw();
    const reader = new LogReader(this._app.api, this._jobId, this._buffer, () => this._view.refresh(), signal);
    /** @type {Stream[]} */
    const streams = this._choice === 'both' ? ['stdout', 'stderr'] : [/** @type {Stream} */ (this._choice)];
    try {
      await reader.read(streams, this._isOver);
      this._isOver = true;
      this._reading = null;
      this._draw();
      if (this._buffer.end === 0) fill(this._place, empty('No output', h('p', {}, 'The job printed nothing here.')));
    } catch (error) {
      if (isAbort(error) || signal.aborted) return;
      fill(this._place, failure(error, () => void this._read()));
    }
  }

  _draw() {
    fill(this._choices, ...CHOICES.map(([value, label]) => h('button', {
      type: 'button', 'aria-pressed': String(this._choice === value),
      on: { click: () => this._choose(value) },
    }, label)));
    const { finds, find, isFollowing, element } = this._view;
    const isSearching = this._input.value !== '';
    this._steps.hidden = !isSearching;
    setText(this._found, finds.length === 0
      ? 'none' : `${find < 0 ? '–' : count(find + 1)} of ${count(finds.length)}`);
    this._followButton.setAttribute('aria-pressed', String(isFollowing));
    this._wrapButton.setAttribute('aria-pressed', String(element.classList.contains('is-wrapped')));
    this._timesButton.setAttribute('aria-pressed', String(element.classList.contains('is-timed')));
    this._followButton.hidden = this._isOver;
    setText(this._state, this._isOver || this._hasEnded ? '' : 'live');
  }

  async _saveRaw() {
    const streams = this._choice === 'both' ? ['stdout', 'stderr'] : [this._choice];
    for (const stream of streams) {
      await save(this._app, `jobs/${this._jobId}/logs`, `job-${this._jobId}-${stream}.log`, { stream });
    }
  }

  /** A tab that nobody sees gives its connections back, and reads anew when it is seen again. */
  _watchVisibility() {
    let timer = 0;
    let isAway = false;
    document.addEventListener('visibilitychange', () => {
      clearTimeout(timer);
      if (document.hidden && this._reading !== null) {
        timer = setTimeout(() => {
          isAway = true;
          this._reading?.abort();
        }, HIDDEN_MS);
      } else if (!document.hidden && isAway) {
        isAway = false;
        this._isOver = this._hasEnded;
        void this._read();
      }
    }, { signal: this._signal });
  }
}
