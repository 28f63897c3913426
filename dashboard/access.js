/** Who asks: the token, and what its role may do. */

/** @import {Api} from './api.js' */
/** @import {Caller} from './types.js' */

import { ApiError } from './api.js';

const KEY = 'orchestrator.token';
const ROLES = ['read', 'submit', 'admin'];

export class Access {
  /** @param {Api} api */
  constructor(api) {
    this._api = api;
    /** @type {Caller | null} */
    this.caller = null;
    api.token = sessionStorage.getItem(KEY);
  }

  /** Ask the server who we are to it. Raises ApiError. */
  async learn() {
    this.caller = /** @type {Caller} */ (await this._api.get('token'));
  }

  /**
   * Try a token and keep it if it holds. Raises ApiError.
   * @param {string} token
   * @param {boolean} isRemembered until this tab is closed, over reloads
   */
  async logIn(token, isRemembered) {
    const before = this._api.token;
    this._api.token = token;
    try {
      await this.learn();
    } catch (error) {
      this._api.token = before;
      throw error;
    }
    if (isRemembered) sessionStorage.setItem(KEY, token);
    else sessionStorage.removeItem(KEY);
  }

  /** Forget the token. */
  logOut() {
    sessionStorage.removeItem(KEY);
    this._api.token = null;
    this.caller = null;
  }

  /** Whether the server wants a token from us. */
  get isTokenNeeded() {
    return this.caller === null || this.caller.is_token_needed;
  }

  /** The only user whose jobs we reach, null for all. */
  get userId() {
    return this.caller?.user_id ?? null;
  }

  /**
   * Whether a role is ours. What is not, the pages do not offer.
   * @param {'read' | 'submit' | 'admin'} role
   */
  may(role) {
    const ours = this.caller?.role ?? 'read';
    return ROLES.indexOf(ours) >= ROLES.indexOf(role);
  }
}

/**
 * Whether an error says that a token, or another one, is needed.
 * @param {unknown} error
 */
export function isUnauthorized(error) {
  return error instanceof ApiError && error.status === 401;
}
