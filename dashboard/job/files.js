/** The files of a job: a tree, and beside it what is in one of them. */

/** @import {App} from '../main.js' */
/** @import {FileEntry, FileList} from '../types.js' */

import { ApiError, isAbort } from '../api.js';
import { fill, h } from '../dom.js';
import { save } from '../download.js';
import { bytes, counted } from '../format.js';
import { icon } from '../icons.js';
import { empty, failure } from '../overlay.js';
import { href } from '../router.js';
import { Preview } from './preview.js';

const MAX_LISTED = 10_000;
const SHOWN_AT_ONCE = 200;

/** @typedef {{ name: string, path: string, entry: FileEntry | null, children: Map<string, Node> }} Node */

export class Files {
  /**
   * @param {App} app
   * @param {number} jobId
   * @param {AbortSignal} signal
   */
  constructor(app, jobId, signal) {
    this._app = app;
    this._jobId = jobId;
    this._signal = signal;
    /** @type {Node} */
    this._root = { name: '', path: '', entry: null, children: new Map() };
    /** @type {Map<string, FileEntry>} */
    this._entries = new Map();
    /** @type {Set<string>} directories that are open */
    this._open = new Set();
    /** @type {string | null} */
    this._path = null;
    this._isLoaded = false;
    this._tree = h('div', { class: 'tree' });
    this._head = h('p', { class: 'tree-head quiet' });
    this._preview = new Preview(app, jobId, signal);
    this.element = h('section', { class: 'files', 'aria-label': 'Files' },
      h('div', { class: 'files-list' }, this._head, this._tree), this._preview.element);
    void this.reload();
  }

  /** Look again, as after the job has ended. */
  async reload() {
    try {
      await this._load();
      this._isLoaded = true;
      this._drawTree();
      this._showFile();
    } catch (error) {
      if (isAbort(error)) return;
      this._head.replaceChildren();
      this._preview.clear();
      fill(this._tree, error instanceof ApiError && error.status === 409
        ? empty('No files', h('p', {}, error.message))
        : failure(error, () => void this.reload()));
    }
  }

  /**
   * Show what is in a file, null for none.
   * @param {string | null} path
   */
  show(path) {
    this._path = path;
    if (!this._isLoaded) return;
    this._drawTree();
    this._showFile();
  }

  async _load() {
    const root = /** @type {Node} */ ({ name: '', path: '', entry: null, children: new Map() });
    const entries = new Map();
    let source = 'input';
    let size = 0;
    /** @type {string | null} */
    let cursor = null;
    do {
      const page = /** @type {FileList} */ (await this._app.api.get(`jobs/${this._jobId}/files`, {
        query: { cursor }, signal: this._signal,
      }));
      source = page.source;
      for (const entry of page.files) {
        entries.set(entry.path, entry);
        size += entry.size;
        plant(root, entry);
      }
      cursor = page.next_cursor;
    } while (cursor !== null && entries.size < MAX_LISTED);
    this._root = root;
    this._entries = entries;
    const what = source === 'input' ? 'Uploaded' : 'Left by the job';
    const more = cursor === null ? '' : `; the first ${counted(entries.size, 'file')} only`;
    fill(this._head, `${what}: ${counted(entries.size, 'file')}, ${bytes(size)}${more}`);
    // where there is little, it is shown at once
    if (entries.size <= 60) for (const path of root.children.keys()) this._open.add(path);
  }

  _showFile() {
    const entry = this._path === null ? undefined : this._entries.get(this._path);
    if (this._path !== null && entry === undefined) this._preview.missing(this._path);
    else if (entry === undefined) this._preview.clear();
    else void this._preview.show(entry);
  }

  // --- the tree

  _drawTree() {
    if (this._path !== null) {
      const parts = this._path.split('/');
      for (let depth = 1; depth < parts.length; depth += 1) this._open.add(parts.slice(0, depth).join('/'));
    }
    fill(this._tree, this._entries.size === 0
      ? empty('No files') : this._level(this._root, SHOWN_AT_ONCE));
  }

  /**
   * @param {Node} node
   * @param {number} limit
   * @returns {HTMLElement}
   */
  _level(node, limit) {
    const children = [...node.children.values()].sort(byKindAndName);
    const list = h('ul', {}, ...children.slice(0, limit).map((child) => this._item(child)));
    if (children.length > limit) {
      const more = h('button', { class: 'button ghost small', type: 'button' },
        `${counted(children.length - limit, 'more file', 'more files')} …`);
      more.addEventListener('click', () => list.replaceWith(this._level(node, limit * 5)));
      list.append(h('li', {}, more));
    }
    return list;
  }

  /** @param {Node} node */
  _item(node) {
    return isDirectory(node) ? this._directory(node) : this._file(node);
  }

  /** @param {Node} node */
  _directory(node) {
    const isOpen = this._open.has(node.path);
    const item = h('li', {}, h('button', {
      class: 'tree-row', type: 'button', 'aria-expanded': String(isOpen), on: { click: () => {
        if (isOpen) this._open.delete(node.path);
        else this._open.add(node.path);
        const again = this._item(node);
        item.replaceWith(again);
        /** @type {HTMLElement | null} */ (again.firstElementChild)?.focus();
      } },
    }, icon(isOpen ? 'down' : 'right'), icon('folder'), h('span', { class: 'tree-name' }, node.name),
    h('span', { class: 'tree-size' }, counted(node.children.size, 'item'))));
    if (isOpen) item.append(this._level(node, SHOWN_AT_ONCE));
    return item;
  }

  /** @param {Node} node */
  _file(node) {
    const entry = /** @type {FileEntry} */ (node.entry);
    const isHere = node.path === this._path;
    return h('li', { class: 'tree-file' },
      h('a', {
        class: 'tree-row', 'aria-current': isHere ? 'true' : null,
        href: href(`jobs/${this._jobId}`, { tab: 'files', path: node.path }),
      }, icon(entry.type === 'link' ? 'link' : 'file'), h('span', { class: 'tree-name' }, node.name),
      h('span', { class: 'tree-size' }, entry.type === 'link' ? 'link' : bytes(entry.size))),
      entry.type === 'file' && h('button', {
        class: 'button ghost icon-only', type: 'button', 'aria-label': `Download ${node.name}`,
        on: { click: () => void save(this._app, filePath(this._jobId, node.path), node.name) },
      }, icon('download')));
  }
}

/**
 * The path of the API for a file.
 * @param {number} jobId
 * @param {string} path
 */
export function filePath(jobId, path) {
  return `jobs/${jobId}/files/${path.split('/').map(encodeURIComponent).join('/')}`;
}

/**
 * @param {Node} root
 * @param {FileEntry} entry
 */
function plant(root, entry) {
  const parts = entry.path.split('/').filter(Boolean);
  let node = root;
  parts.forEach((name, index) => {
    let child = node.children.get(name);
    if (child === undefined) {
      child = { name, path: parts.slice(0, index + 1).join('/'), entry: null, children: new Map() };
      node.children.set(name, child);
    }
    node = child;
  });
  node.entry = entry;
}

/** @param {Node} node */
function isDirectory(node) {
  return node.children.size > 0 || node.entry === null || node.entry.type === 'directory';
}

/**
 * @param {Node} one
 * @param {Node} other
 */
function byKindAndName(one, other) {
  return Number(isDirectory(other)) - Number(isDirectory(one))
    || one.name.localeCompare(other.name, 'en', { numeric: true });
}
