/** Requests to the server, with the token if there is one, and its errors in its words. */

/** Where the API is: one level above these files, also behind a proxy with a prefix. */
export const ROOT = new URL('..', import.meta.url);

/** What the server, or the way to it, answered instead of what was asked for. */
export class ApiError extends Error {
  /**
   * @param {number} status 0 if there was no answer at all
   * @param {string} message
   */
  constructor(status, message) {
    super(message);
    this.status = status;
  }

  /** Whether it may help to ask again a moment later. */
  get isPassing() {
    return this.status === 0 || this.status === 502 || this.status === 503 || this.status === 504;
  }
}

/** @typedef {URLSearchParams | Record<string, string | number | null | undefined>} Query */

/**
 * @typedef {object} Options
 * @property {string} [method]
 * @property {Query} [query]
 * @property {Record<string, string>} [headers]
 * @property {AbortSignal} [signal]
 */

export class Api {
  constructor() {
    /** @type {string | null} */
    this.token = null;
    /** Called when the server wants a token, or another one. */
    this.onUnauthorized = () => {};
  }

  /** @returns {Record<string, string>} what proves who asks */
  get credentials() {
    return this.token === null ? {} : { Authorization: `Bearer ${this.token}` };
  }

  /**
   * Return the full address of a path of the API.
   * @param {string} path without the first slash
   * @param {Query} [query]
   */
  address(path, query) {
    const url = new URL(path, ROOT);
    if (query instanceof URLSearchParams) url.search = query.toString();
    else {
      for (const [name, value] of Object.entries(query ?? {})) {
        if (value !== null && value !== undefined) url.searchParams.set(name, String(value));
      }
    }
    return url.href;
  }

  /**
   * Ask, and return the answer if it is a good one. Raises ApiError.
   * @param {string} path
   * @param {Options} [options]
   */
  async request(path, { method = 'GET', query, headers = {}, signal } = {}) {
    let response;
    try {
      response = await fetch(this.address(path, query), {
        method,
        headers: { ...this.credentials, ...headers },
        signal: signal ?? null,
        credentials: 'omit',
        cache: 'no-store',
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ApiError(0, 'The server can’t be reached.');
    }
    if (response.ok) return response;
    if (response.status === 401) this.onUnauthorized();
    throw new ApiError(response.status, await wordsOf(response));
  }

  /**
   * Ask for JSON.
   * @param {string} path
   * @param {Options} [options]
   * @returns {Promise<any>}
   */
  async get(path, options) {
    return (await this.request(path, options)).json();
  }

  /**
   * Have something done.
   * @param {string} path
   * @param {Options} [options]
   * @returns {Promise<any>}
   */
  async post(path, options) {
    return (await this.request(path, { method: 'POST', ...options })).json();
  }

  /**
   * @param {string} path
   * @param {Options} [options]
   * @returns {Promise<any>}
   */
  async delete(path, options) {
    return (await this.request(path, { method: 'DELETE', ...options })).json();
  }
}

/**
 * @param {Response} response
 * @returns {Promise<string>}
 */
async function wordsOf(response) {
  try {
    const body = await response.json();
    if (typeof body.message === 'string' && body.message) return body.message;
  } catch {
    // not our server's answer, but that of something in between
  }
  return `The server answered ${response.status} ${response.statusText}`.trim();
}

/**
 * Whether something ended only because the page that started it was left.
 * @param {unknown} error
 */
export function isAbort(error) {
  return error instanceof DOMException && error.name === 'AbortError';
}
