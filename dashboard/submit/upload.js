/** An upload that tells how far it is and can be given up; `fetch` tells nothing of that. */

/** @import {Api} from '../api.js' */

import { ApiError } from '../api.js';

/**
 * @param {Api} api
 * @param {FormData} form
 * @param {string} key names this upload, so that sending it again makes no second job
 * @param {(sent: number, total: number) => void} onProgress
 * @param {AbortSignal} signal
 * @returns {Promise<{ id: number }>} Raises ApiError, and AbortError.
 */
export function upload(api, form, key, onProgress, signal) {
  const request = new XMLHttpRequest();
  request.open('POST', api.address('upload'));
  for (const [name, value] of Object.entries(api.credentials)) request.setRequestHeader(name, value);
  request.setRequestHeader('Idempotency-Key', key);
  request.responseType = 'text';
  return new Promise((resolve, reject) => {
    signal.addEventListener('abort', () => request.abort());
    request.upload.addEventListener('progress', ({ loaded, total }) => onProgress(loaded, total));
    request.addEventListener('abort', () => reject(new DOMException('given up', 'AbortError')));
    request.addEventListener('error', () => reject(new ApiError(0,
      'The connection broke. Nothing was submitted, or the same job will be found when you try again.')));
    request.addEventListener('load', () => {
      const body = parsed(request.responseText);
      if (request.status === 201 || request.status === 200) resolve(body);
      else {
        if (request.status === 401) api.onUnauthorized();
        reject(new ApiError(request.status, body.message ?? `The server answered ${request.status}`));
      }
    });
    request.send(form);
  });
}

/**
 * @param {string} text
 * @returns {any}
 */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return {};
  }
}
