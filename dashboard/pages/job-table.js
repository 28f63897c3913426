/** A table of jobs that can be selected, walked through with keys, and kept true. */

/** @import {JobSummary, Transition} from '../types.js' */

import { fill, find, h, keyed, setText } from '../dom.js';
import { ago, took } from '../format.js';
import { go, href } from '../router.js';
import { hasEnded, remark, setState, stateBadge, titleOf } from '../states.js';

export class JobTable {
  /**
   * @param {boolean} isSelectable
   * @param {() => void} onSelection
   */
  constructor(isSelectable, onSelection) {
    this._isSelectable = isSelectable;
    this._onSelection = onSelection;
    /** @type {JobSummary[]} */
    this.jobs = [];
    /** @type {Set<number>} */
    this.selected = new Set();
    /** @type {number | null} */
    this._lastTouched = null;
    this._all = h('input', { type: 'checkbox', 'aria-label': 'Select all jobs of this page', on: {
      change: () => (this._all.checked ? this._selectAll() : this.selectNone()),
    } });
    this._body = h('tbody', {});
    this.element = h('table', { class: 'job-table' },
      h('caption', { class: 'unseen' }, 'Jobs, the newest first'),
      h('thead', {}, h('tr', {},
        isSelectable && h('th', { class: 'col-select', scope: 'col' }, this._all),
        h('th', { class: 'col-state', scope: 'col' }, 'State'),
        h('th', { class: 'col-job', scope: 'col' }, 'Job'),
        h('th', { class: 'col-service', scope: 'col' }, 'Service'),
        h('th', { class: 'col-user', scope: 'col' }, 'User'),
        h('th', { class: 'col-agent', scope: 'col' }, 'Agent'),
        h('th', { class: 'col-took', scope: 'col' }, 'Took'),
        h('th', { class: 'col-made', scope: 'col' }, 'Created'))),
      this._body);
  }

  /** @param {JobSummary[]} jobs */
  show(jobs) {
    this.jobs = jobs;
    const there = new Set(jobs.map(({ id }) => id));
    for (const id of this.selected) if (!there.has(id)) this.selected.delete(id);
    this._draw();
    this._onSelection();
  }

  /** Forget what is shown. */
  clear() {
    this.jobs = [];
    this.selected.clear();
    this._draw();
  }

  selectNone() {
    this.selected.clear();
    this._draw();
    this._onSelection();
  }

  _selectAll() {
    for (const { id } of this.jobs) this.selected.add(id);
    this._draw();
    this._onSelection();
  }

  /**
   * Show what happened to a job. False if it is not in the table.
   * @param {Transition} transition
   */
  take(transition) {
    const job = this.jobs.find(({ id }) => id === transition.id);
    if (job === undefined) return false;
    Object.assign(job, {
      status: transition.status, message: transition.message, changed_at: transition.at,
    });
    if (transition.status === 'Running') job.started_at = transition.at;
    if (hasEnded(transition.status)) job.finished_at ??= transition.at;
    const row = this._body.querySelector(`[data-key="${job.id}"]`);
    if (row) this._update(/** @type {HTMLElement} */ (row), job);
    return true;
  }

  /** @param {KeyboardEvent} event */
  onKey(event) {
    const links = [.../** @type {NodeListOf<HTMLElement>} */ (this._body.querySelectorAll('.job-link'))];
    const row = document.activeElement?.closest('tr') ?? null;
    const here = links.findIndex((link) => link.closest('tr') === row && row !== null);
    if (event.key === 'j') links[Math.min(here + 1, links.length - 1)]?.focus();
    else if (event.key === 'k') links[Math.max(here - 1, 0)]?.focus();
    else if (event.key === 'x' && here >= 0 && this._isSelectable) {
      const { id } = this.jobs[here];
      this._select(id, !this.selected.has(id));
    } else return false;
    return true;
  }

  // --- rows

  _draw() {
    keyed(this._body, this.jobs, ({ id }) => id, (job) => this._make(job),
      (row, job) => this._update(row, job));
    const { size } = this.selected;
    this._all.checked = size > 0 && size === this.jobs.length;
    this._all.indeterminate = size > 0 && size < this.jobs.length;
  }

  /** @param {JobSummary} job */
  _make(job) {
    const row = h('tr', { on: { click: (/** @type {MouseEvent} */ event) => {
      const target = /** @type {HTMLElement} */ (event.target);
      if (target.closest('a, input, label, .col-select') || getSelection()?.toString()) return;
      go(href(`jobs/${job.id}`));
    } } },
    this._isSelectable && h('td', { class: 'col-select' }, h('input', {
      type: 'checkbox', 'aria-label': `Select job ${job.id}`,
      on: { click: (/** @type {MouseEvent} */ event) => this._onBox(event, job.id) },
    })),
    h('td', { class: 'col-state' }, stateBadge(job.status)),
    h('td', { class: 'col-job' },
      h('a', { class: 'job-link', href: href(`jobs/${job.id}`) },
        h('span', { class: 'job-id' }, `#${job.id}`),
        h('span', { class: 'job-title' }, titleOf(job))),
      h('span', { class: 'job-tags' }, ...Object.entries(job.tags).slice(0, 4).map(([key, value]) =>
        h('a', { class: 'tag', href: href('jobs', { tag: `${key}:${value}` }) }, `${key}:${value}`))),
      h('span', { class: 'job-message' })),
    h('td', { class: 'col-service' },
      h('a', { href: href('jobs', { service: job.service }) }, job.service)),
    h('td', { class: 'col-user' },
      h('a', { href: href('jobs', { user: String(job.user_id) }) }, String(job.user_id))),
    h('td', { class: 'col-agent' }),
    h('td', { class: 'col-took' }),
    h('td', { class: 'col-made' }, ago(job.created_at)));
    this._update(row, job);
    return row;
  }

  /**
   * @param {HTMLElement} row
   * @param {JobSummary} job
   */
  _update(row, job) {
    const isSelected = this.selected.has(job.id);
    row.classList.toggle('is-selected', isSelected);
    if (this._isSelectable) {
      /** @type {HTMLInputElement} */ (find(row, 'input')).checked = isSelected;
    }
    setState(find(row, '.state'), job.status);
    setText(find(row, '.job-message'), remark(job));
    setText(find(row, '.col-agent'), job.agent ?? '');
    const shown = `${job.started_at} ${job.finished_at}`;
    if (row.dataset.shown === shown) return;
    row.dataset.shown = shown;
    const isOver = hasEnded(job.status);
    fill(find(row, '.col-took'), job.started_at && (!isOver || job.finished_at)
      ? took(job.started_at, isOver ? job.finished_at : null) : null);
  }

  // --- selecting

  /**
   * @param {MouseEvent} event
   * @param {number} id
   */
  _onBox(event, id) {
    const isChecked = /** @type {HTMLInputElement} */ (event.target).checked;
    if (event.shiftKey && this._lastTouched !== null) {
      const places = [id, this._lastTouched].map((one) => this.jobs.findIndex((job) => job.id === one));
      for (const job of this.jobs.slice(Math.min(...places), Math.max(...places) + 1)) {
        this._set(job.id, isChecked);
      }
    }
    this._lastTouched = id;
    this._select(id, isChecked);
  }

  /**
   * @param {number} id
   * @param {boolean} isWanted
   */
  _select(id, isWanted) {
    this._set(id, isWanted);
    this._draw();
    this._onSelection();
  }

  /**
   * @param {number} id
   * @param {boolean} isWanted
   */
  _set(id, isWanted) {
    if (isWanted) this.selected.add(id);
    else this.selected.delete(id);
  }
}
