/** Reads what a job prints into a buffer: what there is, then what comes, over broken connections. */

/** @import {Api} from '../api.js' */
/** @import {LogBuffer} from './buffer.js' */

import { ApiError, isAbort } from '../api.js';
import { bytes } from '../format.js';
import { breathe } from '../pace.js';

/** @typedef {'stdout' | 'stderr'} Stream */

const MAX_LOADED_BYTES = 16 * 2 ** 20; // of a stream that has ended more is not asked for
const LOADED_BYTES = 8 * 2 ** 20;
const STEP_BYTES = 2 ** 20;
const PAUSE_MS = 1_000;
// what the server puts where output is missing, or another attempt begins
const MARK = /\n\[\.\.\. (?:(\d+) bytes left out|attempt (\d+)) \.\.\.\]\n/g;

export class LogReader {
  /**
   * @param {Api} api
   * @param {number} jobId
   * @param {LogBuffer} buffer
   * @param {() => void} onChange
   * @param {AbortSignal} signal
   */
  constructor(api, jobId, buffer, onChange, signal) {
    this._api = api;
    this._path = `jobs/${jobId}/logs`;
    this._buffer = buffer;
    this._onChange = onChange;
    this._signal = signal;
    /** How many bytes of output there are that were not loaded. */
    this.skipped = 0;
  }

  /**
   * Read until the job has ended, or for good if it has. Raises ApiError if there is no output
   * to be had, and AbortError.
   * @param {readonly Stream[]} streams
   * @param {boolean} isOver
   */
  async read(streams, isOver) {
    /** @type {[Stream, number][]} */
    const reached = [];
    for (const stream of streams) {
      const start = await this._begin(stream);
      const before = this._buffer.end;
      if (isOver && reached.length > 0) this._buffer.note(`— ${stream} —`);
      reached.push([stream, await this._load(stream, start)]);
      if (isOver && reached.length > 1 && this._buffer.end === before + 1) this._buffer.drop();
    }
    this._onChange();
    if (isOver) return;
    await Promise.all(reached.map(([stream, offset]) => this._follow(stream, offset)));
  }

  /**
   * Find where to begin: of a very long output only the end is loaded.
   * @param {Stream} stream
   */
  async _begin(stream) {
    const size = await this._size(stream);
    if (size <= MAX_LOADED_BYTES) return 0;
    const start = size - LOADED_BYTES;
    this.skipped += start;
    this._buffer.note(`${bytes(start)} of ${stream} before this are not shown; Raw has all that is kept`);
    return start;
  }

  /**
   * How many bytes a stream has by now; 0 where there is no answer: the next request hears why.
   * @param {Stream} stream
   */
  async _size(stream) {
    try {
      const head = await this._api.request(this._path, {
        method: 'HEAD', query: { stream }, signal: this._signal,
      });
      return Number(head.headers.get('X-Next-Offset') ?? 0);
    } catch (error) {
      if (error instanceof ApiError) return 0;
      throw error;
    }
  }

  /**
   * Load what there is by now; returns the offset of what comes next.
   * @param {Stream} stream
   * @param {number} start
   */
  async _load(stream, start) {
    const response = await this._api.request(this._path, {
      query: { stream, offset: start }, signal: this._signal,
    });
    await this._take(stream, response, null, () => {});
    return Number(response.headers.get('X-Next-Offset') ?? 0);
  }

  /**
   * Take what comes until the job has ended; a broken connection is made anew.
   * @param {Stream} stream
   * @param {number} start
   */
  async _follow(stream, start) {
    let offset = start;
    for (;;) {
      try {
        const response = await this._api.request(this._path, {
          query: { stream, follow: 1, offset }, signal: this._signal,
        });
        await this._take(stream, response, Date.now, (text, size) => {
          offset = offsetAfter(offset, text, size);
        });
        return;
      } catch (error) {
        if (isAbort(error) || (error instanceof ApiError && !error.isPassing)) throw error;
        await new Promise((resolve) => { setTimeout(resolve, PAUSE_MS); });
        this._signal.throwIfAborted();
      }
    }
  }

  /**
   * @param {Stream} stream
   * @param {Response} response
   * @param {(() => number) | null} clock
   * @param {(text: string, size: number) => void} onPiece
   */
  async _take(stream, response, clock, onPiece) {
    if (response.body === null) return;
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    let taken = 0;
    for (;;) {
      const { done, value } = await reader.read();
      const text = done ? decoder.decode() : decoder.decode(value, { stream: true });
      if (text) this._buffer.add(stream, text, clock === null ? null : clock());
      if (done) break;
      onPiece(text, value.length);
      this._onChange();
      taken += value.length;
      if (taken >= STEP_BYTES) {
        taken = 0;
        await breathe();
        this._signal.throwIfAborted();
      }
    }
    this._onChange();
  }
}

/**
 * Return where a stream is after a piece, of which the marks are not bytes of the job.
 * @param {number} offset
 * @param {string} text
 * @param {number} size of the piece in bytes
 */
export function offsetAfter(offset, text, size) {
  let after = offset + size;
  for (const match of text.matchAll(MARK)) {
    const [mark, leftOut, attempt] = match;
    if (attempt === undefined) after += Number(leftOut) - mark.length;
    else after = new TextEncoder().encode(text.slice(match.index + mark.length)).length;
  }
  return after;
}
