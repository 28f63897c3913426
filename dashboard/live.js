/** What happens on the server, as it happens: one stream for all that the page shows. */

/** @import {Api} from './api.js' */

import { ApiError } from './api.js';

const SILENCE_MS = 40_000; // the server says something every 15 s
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10_000;
const HIDDEN_MS = 20_000;

/**
 * Tells `job` and `agent` as the server does, `state` when the connection comes or goes, and
 * `again` when what happened meanwhile may have been missed.
 *
 * A page that nobody sees gives its connection back after a while: browsers have six for a
 * server, over all tabs.
 */
export class Live extends EventTarget {
  /** @param {Api} api */
  constructor(api) {
    super();
    this._api = api;
    this.isConnected = false;
    this._lastId = '';
    this._wasConnected = false;
    /** @type {AbortController | null} */
    this._attempt = null;
    /** @type {(() => void) | null} */
    this._wake = null;
    this._isWanted = true;
    this._heardAt = 0;
    this._hiding = 0;
    this._isHurried = false;
    document.addEventListener('visibilitychange', () => this._onVisibility());
    setInterval(() => this._checkSilence(), 5_000);
  }

  /** Listen for ever. */
  async run() {
    let pause = FIRST_PAUSE_MS;
    for (;;) {
      if (!this._isWanted) await new Promise((resolve) => { this._wake = () => resolve(null); });
      const since = Date.now();
      const mayTryAgain = await this._listen();
      this._setConnected(false);
      if (!mayTryAgain) this._isWanted = false;
      if (!this._isWanted) continue;
      if (this._isHurried) {
        this._isHurried = false;
        continue;
      }
      pause = Date.now() - since > 5_000 ? FIRST_PAUSE_MS : Math.min(pause * 2, LONGEST_PAUSE_MS);
      // spread, so that all the open pages do not come back in the same moment
      await this._sleep(pause * (0.75 + Math.random() / 2));
    }
  }

  /** Begin anew, as somebody else maybe, and at once. */
  restart() {
    this._lastId = '';
    this._isWanted = true;
    this._isHurried = true;
    this._attempt?.abort();
    this._wake?.();
  }

  /**
   * @param {'job' | 'agent' | 'state' | 'again'} kind
   * @param {(detail: any) => void} listener
   * @param {AbortSignal} [signal]
   */
  on(kind, listener, signal) {
    const handler = (/** @type {Event} */ event) =>
      listener(/** @type {CustomEvent} */ (event).detail);
    this.addEventListener(kind, handler, signal ? { signal } : {});
  }

  /** @returns {Promise<boolean>} whether it may help to come again */
  async _listen() {
    this._attempt = new AbortController();
    try {
      const response = await this._api.request('events', {
        signal: this._attempt.signal,
        headers: this._lastId ? { 'Last-Event-ID': this._lastId } : {},
      });
      this._heardAt = Date.now();
      await this._read(/** @type {ReadableStream<Uint8Array>} */ (response.body));
    } catch (error) {
      // 401 and 403 are answered by another token, not by asking again
      return !(error instanceof ApiError && (error.status === 401 || error.status === 403));
    }
    return true;
  }

  /** @param {ReadableStream<Uint8Array>} body */
  async _read(body) {
    const reader = body.getReader();
    const decoder = new TextDecoder();
    let rest = '';
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      this._heardAt = Date.now();
      const blocks = (rest + decoder.decode(value, { stream: true })).split('\n\n');
      rest = blocks.pop() ?? '';
      for (const block of blocks) this._take(block);
      this._setConnected(true);
    }
  }

  /** @param {string} block one event, without the empty line that ends it */
  _take(block) {
    let kind = '';
    let data = '';
    for (const line of block.split('\n')) {
      if (line.startsWith('id: ')) this._lastId = line.slice(4);
      else if (line.startsWith('event: ')) kind = line.slice(7);
      else if (line.startsWith('data: ')) data += line.slice(6);
    }
    if (data) this._tell(kind, JSON.parse(data));
  }

  /**
   * @param {string} kind
   * @param {unknown} [detail]
   */
  _tell(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }

  /** @param {boolean} isConnected */
  _setConnected(isConnected) {
    if (this.isConnected === isConnected) return;
    this.isConnected = isConnected;
    this._tell('state', isConnected);
    if (!isConnected) return;
    if (this._wasConnected) this._tell('again');
    this._wasConnected = true;
  }

  _checkSilence() {
    if (this.isConnected && Date.now() - this._heardAt > SILENCE_MS) this._attempt?.abort();
  }

  _onVisibility() {
    clearTimeout(this._hiding);
    if (document.hidden) {
      this._hiding = setTimeout(() => {
        this._isWanted = false;
        this._attempt?.abort();
      }, HIDDEN_MS);
    } else if (!this._isWanted) {
      this._isWanted = true;
      this._wake?.();
    }
  }

  /** @param {number} milliseconds */
  async _sleep(milliseconds) {
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, milliseconds);
      this._wake = () => {
        clearTimeout(timer);
        resolve(null);
      };
    });
    this._wake = null;
  }
}
