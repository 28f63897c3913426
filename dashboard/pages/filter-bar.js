/** Where filters are typed, picked and explained. */

/** @import {App} from '../main.js' */
/** @import {Term} from '../filter.js' */

import { fill, h, setText } from '../dom.js';
import * as filter from '../filter.js';
import { icon } from '../icons.js';
import { href } from '../router.js';
import { ALL } from '../states.js';

const QUICK = /** @type {const} */ ([
  ['All', ''],
  ['Waiting', 'Queued'],
  ['Running', 'Processing,Submitted,Running'],
  ['Completed', 'Completed'],
  ['Failed', 'Failed,Invalid'],
  ['Terminated', 'Killed'],
]);

export class FilterBar {
  /**
   * @param {App} app
   * @param {(terms: readonly Term[]) => void} onChange
   * @param {AbortSignal} signal
   */
  constructor(app, onChange, signal) {
    this._app = app;
    this._onChange = onChange;
    this._signal = signal;
    /** @type {readonly Term[]} */
    this._terms = [];
    /** @type {Record<string, string[]>} values that a filter may have */
    this._values = { status: [...ALL], since: ['1h', '24h', '7d'] };
    this._input = h('input', {
      type: 'search', id: 'filter', spellcheck: false, autocomplete: 'off', role: 'combobox',
      placeholder: 'Filter: status:Failed  service:docking  user:7  tag:project:x  words of the message',
      'aria-label': 'Filter jobs', 'aria-expanded': 'false', 'aria-controls': 'filter-help',
      'aria-autocomplete': 'list', 'aria-describedby': 'filter-error',
      on: {
        focus: () => this._suggest(), input: () => this._suggest(),
        blur: () => setTimeout(() => this._close(), 150),
        keydown: (/** @type {KeyboardEvent} */ event) => this._onKey(event),
        search: () => this._submit(),
      },
    });
    this._help = h('ul', { class: 'filter-help', id: 'filter-help', role: 'listbox',
      'aria-label': 'Filters', hidden: true });
    this._error = h('p', { class: 'field-error', id: 'filter-error', role: 'alert' });
    this._quick = h('div', { class: 'segments', role: 'group', 'aria-label': 'State' });
    this.element = h('div', { class: 'filter-bar' },
      h('form', { class: 'filter-field', role: 'search', on: { submit: (/** @type {Event} */ event) => {
        event.preventDefault();
        this._submit();
      } } }, icon('search'), this._input, h('kbd', { class: 'filter-key', 'aria-hidden': 'true' }, '/'), this._help),
      this._quick, this._error);
    void this._learn();
  }

  focus() {
    this._input.focus();
    this._input.select();
  }

  /** @param {readonly Term[]} terms */
  show(terms) {
    this._terms = terms;
    this._input.value = filter.write(terms);
    setText(this._error, '');
    const status = terms.filter(({ key }) => key === 'status').map(({ value }) => value).join(',');
    fill(this._quick, ...QUICK.map(([name, states]) => h('a', {
      href: href('jobs', filter.toAddress(filter.replaced(terms, 'status', states))),
      'aria-current': states === status ? 'true' : null,
    }, name)));
  }

  async _learn() {
    try {
      const [services, agents] = await Promise.all([
        this._app.api.get('services', { signal: this._signal }),
        this._app.api.get('agents', { signal: this._signal }),
      ]);
      this._values.service = services.services.map((/** @type {{name: string}} */ one) => one.name);
      this._values.agent = agents.agents.map((/** @type {{name: string}} */ one) => one.name);
      if (document.activeElement === this._input) this._suggest();
    } catch {
      // without these names nothing is proposed; the list itself says what is wrong
    }
  }

  _submit() {
    this._close();
    try {
      const terms = filter.parse(this._input.value);
      setText(this._error, '');
      this._onChange(terms);
    } catch (error) {
      if (!(error instanceof filter.FilterError)) throw error;
      setText(this._error, error.message);
    }
  }

  // --- proposals

  /** The word at the end of what is typed, which a proposal completes. */
  get _word() {
    return /\S*$/.exec(this._input.value)?.[0] ?? '';
  }

  /** @returns {[string, string][]} what may stand for the word, and what it means */
  get _proposals() {
    const word = this._word;
    const [, key, begun = ''] = /^([a-z]+):(.*)$/i.exec(word) ?? [];
    if (key !== undefined) {
      return (this._values[key.toLowerCase()] ?? [])
        .filter((value) => value.toLowerCase().startsWith(begun.toLowerCase()) && value !== begun)
        .slice(0, 9)
        .map((value) => [`${key}:${value}`, '']);
    }
    return /** @type {[string, string][]} */ (
      filter.HELP.filter(([example]) => example.startsWith(word)));
  }

  _suggest() {
    const proposals = this._proposals;
    fill(this._help, ...proposals.map(([text, meaning], index) => h('li', {
      role: 'option', id: `filter-${index}`, 'aria-selected': 'false',
      on: { mousedown: (/** @type {Event} */ event) => {
        event.preventDefault();
        this._accept(text);
      } },
    }, h('code', {}, text), h('span', {}, meaning))));
    this._help.hidden = proposals.length === 0;
    this._input.setAttribute('aria-expanded', String(!this._help.hidden));
    this._input.removeAttribute('aria-activedescendant');
  }

  _close() {
    this._help.hidden = true;
    this._input.setAttribute('aria-expanded', 'false');
    this._input.removeAttribute('aria-activedescendant');
  }

  /** @param {string} text */
  _accept(text) {
    const isExample = this._word === '' || !this._word.includes(':');
    const added = isExample && text.includes(':') ? text.slice(0, text.indexOf(':') + 1) : text;
    const begin = this._input.value.slice(0, this._input.value.length - this._word.length);
    this._input.value = begin + (isExample ? added : `${added} `);
    this._input.focus();
    this._suggest();
  }

  /** @param {KeyboardEvent} event */
  _onKey(event) {
    const options = [.../** @type {HTMLCollectionOf<HTMLElement>} */ (this._help.children)];
    const active = options.findIndex((one) => one.getAttribute('aria-selected') === 'true');
    if (event.key === 'Escape') this._close();
    else if (event.key === 'Enter' && active >= 0 && !this._help.hidden) {
      this._accept(this._proposals[active][0]);
    } else if ((event.key === 'ArrowDown' || event.key === 'ArrowUp') && options.length > 0) {
      const step = event.key === 'ArrowDown' ? 1 : -1;
      const next = active < 0 && step < 0 ? options.length - 1 : (active + step + options.length) % options.length;
      options.forEach((one, index) => one.setAttribute('aria-selected', String(index === next)));
      this._input.setAttribute('aria-activedescendant', options[next].id);
    } else return;
    event.preventDefault();
  }
}
