/**
 * Elements made from data. Strings become text nodes and attributes, never markup, and
 * characters that would hide or turn around what stands there are shown as signs.
 */

/** @typedef {Node | string | number | null | undefined | false} Child */
/** @typedef {(event: any) => void} Handler */

/**
 * @typedef {object} Properties
 * @property {string} [class]
 * @property {Record<string, Handler>} [on] listeners by the name of their event
 */

const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g;
const DIRECTION = /[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;

/**
 * Return text in which every control character can be seen.
 * @param {string} text
 */
export function visible(text) {
  return text
    .replace(CONTROL, (sign) => {
      const code = sign.charCodeAt(0);
      return code < 0x20 ? String.fromCharCode(0x2400 + code) : code === 0x7f ? '\u2421' : '\ufffd';
    })
    .replace(DIRECTION, (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, '0')}`);
}

/**
 * Make an element. Known properties (`value`, `checked`, ...) are set, others are attributes.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Properties & Record<string, any>} [properties]
 * @param {...Child} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) setProperty(element, name, value);
  add(element, children);
  return element;
}

const PROPERTIES = new Set([
  'value', 'checked', 'disabled', 'hidden', 'indeterminate', 'open', 'multiple', 'readOnly',
  'required', 'spellcheck', 'tabIndex', 'selected',
]);

/**
 * @param {HTMLElement} element
 * @param {string} name
 * @param {any} value
 */
function setProperty(element, name, value) {
  if (name === 'on') {
    for (const [type, handler] of Object.entries(value)) {
      element.addEventListener(type, /** @type {Handler} */ (handler));
    }
  } else if (PROPERTIES.has(name)) {
    /** @type {any} */ (element)[name] = value;
  } else if (value !== null && value !== undefined && value !== false) {
    element.setAttribute(name, name === 'class' || name === 'href' ? value : visible(String(value)));
  }
}

/**
 * @param {Node} element
 * @param {readonly Child[]} children
 */
function add(element, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    element.appendChild(
      child instanceof Node ? child : document.createTextNode(visible(String(child))),
    );
  }
}

/**
 * Put new children in place of the old.
 * @param {Element} element
 * @param {...Child} children
 */
export function fill(element, ...children) {
  element.replaceChildren();
  add(element, children);
}

/**
 * Set an element's text, without touching the page if it is the same.
 * @param {Element} element
 * @param {string | number} text
 */
export function setText(element, text) {
  const wanted = visible(String(text));
  if (element.textContent !== wanted) element.textContent = wanted;
}

/**
 * Keep the children of `parent` as `items` say: made once for each key, then updated and moved.
 * @template T
 * @param {Element} parent
 * @param {readonly T[]} items
 * @param {(item: T) => string | number} keyOf
 * @param {(item: T) => HTMLElement | SVGElement} make
 * @param {(element: any, item: T) => void} [update]
 */
export function keyed(parent, items, keyOf, make, update) {
  /** @type {Map<string, Element>} */
  const there = new Map();
  for (const child of parent.children) {
    there.set(/** @type {HTMLElement} */ (child).dataset.key ?? '', child);
  }
  /** @type {Element | null} */
  let next = parent.firstElementChild;
  /** @type {Map<string, number>} */
  const used = new Map();
  for (const item of items) {
    const wanted = String(keyOf(item));
    const before = used.get(wanted) ?? 0;
    used.set(wanted, before + 1);
    // what has the same key as another is told apart by its order
    const key = before === 0 ? wanted : `${wanted} ${before}`;
    let element = there.get(key);
    there.delete(key);
    if (element === undefined) {
      element = make(item);
      /** @type {HTMLElement} */ (element).dataset.key = key;
    } else {
      update?.(element, item);
    }
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
  }
  for (const element of there.values()) element.remove();
}

/**
 * The first descendant that a selector finds; it must be there.
 * @template {HTMLElement} [T=HTMLElement]
 * @param {ParentNode} parent
 * @param {string} selector
 * @returns {T}
 */
export function find(parent, selector) {
  const element = parent.querySelector(selector);
  if (element === null) throw new Error(`no ${selector} here`);
  return /** @type {T} */ (element);
}
