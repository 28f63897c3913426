/** Addresses: what stands after the # names a page, and survives reload and back. */

/** @import {Address} from './types.js' */

/** @returns {Address} */
export function currentAddress() {
  const [path, query = ''] = location.hash.replace(/^#\/?/, '').split(/\?(.*)/s);
  return {
    path: path.split('/').filter(Boolean).map(decoded),
    query: new URLSearchParams(query),
  };
}

/** @param {string} part */
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/**
 * Return the address of a page, for a link.
 * @param {string} path such as `jobs/7`
 * @param {URLSearchParams | Record<string, string>} [query]
 */
export function href(path, query) {
  const text = new URLSearchParams(query ?? {}).toString();
  return `#/${path}${text ? `?${text}` : ''}`;
}

/**
 * Go to a page.
 * @param {string} address as `href` gives it
 * @param {boolean} [isReplaced] whether Back leads past where we are now
 */
export function go(address, isReplaced = false) {
  if (isReplaced) {
    history.replaceState(null, '', address);
    dispatchEvent(new HashChangeEvent('hashchange'));
  } else {
    location.hash = address;
  }
}
