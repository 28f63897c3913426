/**
 * What is in a file: text, a table, an image. Nothing of a file is ever run: text is shown as
 * text, images are decoded by the browser from bytes, and for the rest there is the download.
 */

/** @import {App} from '../main.js' */
/** @import {FileEntry} from '../types.js' */

import { isAbort } from '../api.js';
import { fill, h } from '../dom.js';
import { save } from '../download.js';
import { absolute, bytes, counted } from '../format.js';
import { icon } from '../icons.js';
import { empty, failure } from '../overlay.js';
import { filePath } from './files.js';
import { parseTable } from './table.js';

const MAX_TEXT_BYTES = 256 * 1024;
const MAX_IMAGE_BYTES = 32 * 2 ** 20;
const MAX_ROWS = 500;
const MAX_COLUMNS = 60;

// raster images, and SVG: an <img> never runs what is in it, nor loads anything for it
/** @type {Record<string, string>} */
const IMAGES = {
  png: 'image/png', jpg: 'image/jpeg', jpeg: 'image/jpeg', gif: 'image/gif', webp: 'image/webp',
  bmp: 'image/bmp', svg: 'image/svg+xml',
};
/** @type {Record<string, string>} */
const TABLES = { csv: ',', tsv: '\t' };

export class Preview {
  /**
   * @param {App} app
   * @param {number} jobId
   * @param {AbortSignal} signal
   */
  constructor(app, jobId, signal) {
    this._app = app;
    this._jobId = jobId;
    this._signal = signal;
    /** @type {AbortController | null} */
    this._loading = null;
    this._url = '';
    this.element = h('div', { class: 'preview' });
    signal.addEventListener('abort', () => URL.revokeObjectURL(this._url));
    this.clear();
  }

  /** Show no file. */
  clear() {
    this._loading?.abort();
    fill(this.element, empty('No file chosen', h('p', {}, 'Choose one to see what is in it.')));
  }

  /** @param {string} path */
  missing(path) {
    this._loading?.abort();
    fill(this.element, empty('No such file', h('p', {}, path)));
  }

  /** @param {FileEntry} entry */
  async show(entry) {
    this._loading?.abort();
    const loading = new AbortController();
    this._loading = loading;
    const body = h('div', { class: 'preview-body is-waiting' });
    const name = entry.path.split('/').at(-1) ?? entry.path;
    fill(this.element, h('header', {},
      h('h2', {}, entry.path),
      h('span', { class: 'quiet' }, [bytes(entry.size), entry.modified ? absolute(entry.modified) : '']
        .filter(Boolean).join(' · ')),
      entry.type === 'file' && h('button', { class: 'button small', type: 'button', on: {
        click: () => void save(this._app, filePath(this._jobId, entry.path), name),
      } }, icon('download'), 'Download')), body);
    try {
      const content = await this._content(entry, AbortSignal.any([loading.signal, this._signal]));
      if (this._loading === loading) fill(body, content);
    } catch (error) {
      if (!isAbort(error)) fill(body, failure(error, () => void this.show(entry)));
    }
    body.classList.remove('is-waiting');
  }

  /**
   * @param {FileEntry} entry
   * @param {AbortSignal} signal
   * @returns {Promise<HTMLElement>}
   */
  async _content(entry, signal) {
    const extension = /\.([a-z0-9]+)$/i.exec(entry.path)?.[1].toLowerCase() ?? '';
    if (entry.type === 'link') return empty('A link', h('p', {}, 'It is kept as a link, and is not followed.'));
    if (entry.size === 0) return empty('Empty file');
    if (extension in IMAGES && entry.size <= MAX_IMAGE_BYTES) {
      return this._image(entry, IMAGES[extension], signal);
    }
    if (extension === 'pdf') return empty('A PDF', h('p', {}, 'Download it to read it.'));
    const response = await this._app.api.request(filePath(this._jobId, entry.path), {
      headers: { Range: `bytes=0-${MAX_TEXT_BYTES - 1}` }, signal,
    });
    const content = new Uint8Array(await response.arrayBuffer()).subarray(0, MAX_TEXT_BYTES);
    if (content.subarray(0, 8192).includes(0)) {
      return empty('Not a text', h('p', {}, 'Its bytes say nothing here; download it.'));
    }
    const text = new TextDecoder().decode(content);
    const isCut = content.length < entry.size;
    if (extension in TABLES) return table(text, TABLES[extension], isCut, entry.size);
    return h('div', {}, isCut && cutNote(entry.size),
      h('pre', { class: 'preview-text', tabIndex: 0, 'aria-label': `Content of ${entry.path}` }, text));
  }

  /**
   * @param {FileEntry} entry
   * @param {string} type
   * @param {AbortSignal} signal
   */
  async _image(entry, type, signal) {
    const response = await this._app.api.request(filePath(this._jobId, entry.path), { signal });
    URL.revokeObjectURL(this._url);
    this._url = URL.createObjectURL(new Blob([await response.arrayBuffer()], { type }));
    const image = h('img', { src: this._url, alt: entry.path });
    const place = h('div', { class: 'preview-image' }, image);
    image.addEventListener('error', () => fill(place, empty('Not an image', h('p', {},
      'The browser can’t show it; download it.'))));
    return place;
  }
}

/** @param {number} size */
function cutNote(size) {
  return h('p', { class: 'cut' }, `The first ${bytes(MAX_TEXT_BYTES)} of ${bytes(size)}.`);
}

/**
 * @param {string} text
 * @param {string} separator
 * @param {boolean} isCut
 * @param {number} size
 */
function table(text, separator, isCut, size) {
  const { rows, isMore } = parseTable(text, separator, MAX_ROWS + 1);
  const [names = [], ...values] = rows.map((row) => row.slice(0, MAX_COLUMNS));
  return h('div', {},
    (isCut || isMore) && h('p', { class: 'cut' },
      `The first ${counted(values.length, 'row')} of a file of ${bytes(size)}.`),
    h('div', { class: 'table-scroll', tabIndex: 0, role: 'region', 'aria-label': 'Table' },
      h('table', { class: 'data-table grid' },
        h('thead', {}, h('tr', {}, ...names.map((name) => h('th', { scope: 'col' }, name)))),
        h('tbody', {}, ...values.map((row) => h('tr', {}, ...row.map((cell) =>
          h('td', { class: /^-?[\d.,]+(e[-+]?\d+)?$/i.test(cell) ? 'number' : '' }, cell))))))));
}
