/** The list of jobs: filtered, a page at a time, live, and with what can be done to many. */

/** @import {App} from '../main.js' */
/** @import {Term} from '../filter.js' */
/** @import {Address, JobPage, JobSummary, Page, Transition} from '../types.js' */

import { isAbort } from '../api.js';
import { fill, h } from '../dom.js';
import { count, counted } from '../format.js';
import * as filter from '../filter.js';
import { icon } from '../icons.js';
import { complain, confirmed, empty, failure, note } from '../overlay.js';
import { paced } from '../pace.js';
import { go, href } from '../router.js';
import { hasEnded } from '../states.js';
import { FilterBar } from './filter-bar.js';
import { JobTable } from './job-table.js';

const PAGE_JOBS = 50;
const MAX_LOOKS = 40; // the server looks at some 10,000 jobs at a time
const RELOAD_MS = 2_000;

/**
 * @param {App} app
 * @param {Address} address
 * @param {AbortSignal} signal
 * @returns {Page}
 */
export function open(app, address, signal) {
  const list = new JobList(app, signal);
  list.show(address.query);
  return {
    title: 'Jobs',
    element: list.element,
    update: (query) => list.show(query),
    onKey: (event) => list.onKey(event),
  };
}

/** What can be done to many jobs. `states` are those of jobs to which it can be done. */
const ACTIONS = /** @type {const} */ ([
  { name: 'terminate', label: 'Terminate', done: 'Terminated', sign: 'stop', isEnd: false,
    title: (/** @type {string} */ jobs) => `Terminate ${jobs}`,
    text: 'They end at once and keep only what they have printed and left so far.' },
  { name: 'rerun', label: 'Run again', done: 'Submitted again', sign: 'rerun', isEnd: null,
    title: (/** @type {string} */ jobs) => `Run ${jobs} again`,
    text: 'Each becomes a new job with the same input.' },
  { name: 'delete', label: 'Delete', done: 'Deleted the files of', sign: 'trash', isEnd: true,
    title: (/** @type {string} */ jobs) => `Delete ${jobs}`,
    text: 'Their inputs, results and logs are removed for good. How they ended stays known.' },
]);

class JobList {
  /**
   * @param {App} app
   * @param {AbortSignal} signal
   */
  constructor(app, signal) {
    this._app = app;
    this._signal = signal;
    /** @type {readonly Term[]} */
    this._terms = [];
    /** @type {string | null} */
    this._cursor = null;
    /** @type {(string | null)[]} the pages on the way here */
    this._way = [];
    /** @type {string | null} */
    this._next = null;
    /** @type {AbortController | null} */
    this._loading = null;
    this._areAllMeant = false;
    this._bar = new FilterBar(app, (terms) => go(href('jobs', filter.toAddress(terms))), signal);
    this._table = new JobTable(app.access.may('submit'), () => this._drawSelection());
    this._place = h('div', { class: 'table-place' });
    this._pager = h('nav', { class: 'pager', 'aria-label': 'Pages of the list' });
    this._selection = h('div', { class: 'selection', role: 'toolbar', 'aria-label': 'Selected jobs', hidden: true });
    this._news = h('button', { class: 'news', type: 'button', hidden: true,
      on: { click: () => void this._load() } }, 'New jobs · show');
    this.element = h('div', { class: 'page jobs' },
      h('header', { class: 'page-head' }, h('h1', {}, 'Jobs'), h('div', { class: 'page-actions' },
        app.access.may('submit')
        && h('a', { class: 'button primary', href: href('submit') }, icon('submit'), 'Submit a job'))),
      this._bar.element, this._news, this._place, this._pager, this._selection);
    this._reload = paced(() => this._load(), RELOAD_MS, signal);
    app.live.on('job', (transition) => this._take(transition), signal);
    app.live.on('again', this._reload, signal);
  }

  /** @param {URLSearchParams} query */
  show(query) {
    this._terms = filter.fromAddress(query);
    const cursor = query.get('cursor');
    if (cursor === null) this._way = [];
    // by the browser's Back one comes to a page on the way
    const place = this._way.indexOf(cursor);
    if (place >= 0) this._way.length = place;
    if (cursor !== this._cursor) scrollTo(0, 0);
    this._cursor = cursor;
    this._bar.show(this._terms);
    this._table.clear();
    this._drawSelection();
    if (query.get('focus')) {
      query.delete('focus');
      history.replaceState(null, '', href('jobs', query));
      setTimeout(() => this._bar.focus(), 0);
    }
    void this._load();
  }

  /** @param {KeyboardEvent} event */
  onKey(event) {
    if (event.key === '/') this._bar.focus();
    else if (event.key === 'Escape' && this._table.selected.size > 0) this._table.selectNone();
    else return this._table.onKey(event);
    return true;
  }

  // --- loading

  async _load() {
    this._loading?.abort();
    const loading = new AbortController();
    this._loading = loading;
    const signal = AbortSignal.any([loading.signal, this._signal]);
    this._place.classList.add('is-waiting');
    try {
      const jobs = await this._fetch(signal);
      this._news.hidden = true;
      this._table.show(jobs);
      this._draw();
    } catch (error) {
      if (isAbort(error)) return;
      this._pager.replaceChildren();
      fill(this._place, failure(error, () => void this._load()));
    } finally {
      if (this._loading === loading) this._place.classList.remove('is-waiting');
    }
  }

  /**
   * Gather a page; the server may look far back and yet find little.
   * @param {AbortSignal} signal
   */
  async _fetch(signal) {
    const query = filter.toRequest(this._terms);
    /** @type {JobSummary[]} */
    const jobs = [];
    this._next = this._cursor;
    for (let look = 0; look < MAX_LOOKS; look += 1) {
      query.set('limit', String(PAGE_JOBS - jobs.length));
      if (this._next !== null) query.set('cursor', this._next);
      const page = /** @type {JobPage} */ (await this._app.api.get('jobs', { query, signal }));
      jobs.push(...page.jobs);
      this._next = page.next_cursor;
      if (this._next === null || jobs.length >= PAGE_JOBS) break;
      if (look > 0) {
        fill(this._pager, h('span', { class: 'quiet', role: 'status' },
          `Looking further back; ${counted(jobs.length, 'job')} found so far …`));
      }
    }
    return jobs;
  }

  _draw() {
    if (this._table.jobs.length > 0) {
      if (this._place.firstElementChild !== this._table.element) fill(this._place, this._table.element);
    } else if (this._terms.length > 0) {
      fill(this._place, empty('No job matches', h('p', {},
        this._next === null ? 'Take a filter out, or ' : 'Not among the jobs looked at so far. ',
        h('a', { href: href('jobs') }, 'see all jobs'), '.')));
    } else {
      fill(this._place, empty('No job yet',
        h('p', {}, 'A job is a script, run.sh, and its input files.'),
        this._app.access.may('submit') && h('div', { class: 'actions' },
          h('a', { class: 'button primary', href: href('submit', { example: '1' }) }, 'Try the example'),
          h('a', { class: 'button', href: href('submit') }, 'Submit your own'))));
    }
    this._drawPager();
  }

  _drawPager() {
    const to = (/** @type {string | null} */ cursor) => {
      const query = filter.toAddress(this._terms);
      if (cursor !== null) query.set('cursor', cursor);
      return href('jobs', query);
    };
    const { jobs } = this._table;
    const before = this._way.at(-1);
    fill(this._pager,
      h('span', { class: 'quiet' }, jobs.length === 0 ? '' : `#${jobs[0].id} – #${jobs[jobs.length - 1].id}`),
      this._cursor !== null && h('a', { class: 'button', href: to(null) }, 'Newest'),
      before !== undefined && h('a', { class: 'button', href: to(before), on: {
        click: () => this._way.pop(),
      } }, icon('left'), 'Newer'),
      this._next !== null && h('a', { class: 'button', href: to(this._next), rel: 'next', on: {
        click: () => this._way.push(this._cursor),
      } }, 'Older', icon('right')));
  }

  /** @param {Transition} transition */
  _take(transition) {
    if (this._table.take(transition)) return;
    if (this._cursor !== null || !this._mayMatch(transition)) return;
    const isInUse = this._table.selected.size > 0
      || this._table.element.contains(document.activeElement) || scrollY > 200;
    if (isInUse) this._news.hidden = false;
    else this._reload();
  }

  /** @param {Transition} transition */
  _mayMatch(transition) {
    return filter.statesOf(this._terms).includes(transition.status)
      && this._terms.every(({ key, value }) => {
        if (key === 'service') return transition.service === value;
        if (key === 'user') return String(transition.user_id) === value;
        if (key === 'id') return false;
        return true;
      });
  }

  // --- many at a time

  _drawSelection() {
    const { selected, jobs } = this._table;
    this._areAllMeant = this._areAllMeant && selected.size === jobs.length && jobs.length > 0;
    this._selection.hidden = selected.size === 0;
    if (selected.size === 0) return;
    const isMore = selected.size === jobs.length && (this._next !== null || this._cursor !== null);
    fill(this._selection,
      h('strong', {}, this._areAllMeant ? 'All jobs that match' : `${count(selected.size)} selected`),
      isMore && !this._areAllMeant && h('button', { class: 'button ghost', type: 'button', on: {
        click: () => {
          this._areAllMeant = true;
          this._drawSelection();
        },
      } }, this._terms.length > 0 ? 'Select all that match' : 'Select all jobs'),
      h('span', { class: 'spring' }),
      ...ACTIONS.map((action) => h('button', {
        class: `button ${action.name === 'rerun' ? '' : 'danger-text'}`, type: 'button',
        'data-action': action.name, on: { click: () => void this._act(action) },
      }, icon(action.sign), action.label)),
      h('button', { class: 'button ghost icon-only', type: 'button', 'aria-label': 'Select none',
        on: { click: () => this._table.selectNone() } }, icon('close')));
  }

  /** @param {typeof ACTIONS[number]} action */
  async _act(action) {
    try {
      const query = this._meant(action);
      const number = this._areAllMeant ? await this._number(query) : query.getAll('id').length;
      if (number === 0) {
        note(action.isEnd ? 'None of them has ended.' : 'None of them is left to be terminated.');
        return;
      }
      const jobs = counted(number, 'job');
      const title = action.title(jobs);
      if (!await confirmed(`${title}?`, action.text, title)) return;
      const answer = await this._app.api.post(`jobs/${action.name}`, { query });
      const skipped = answer.skipped > 0 ? `; ${counted(answer.skipped, 'job')} skipped` : '';
      note(icon('check'), `${action.done} ${counted(answer.done, 'job')}${skipped}.`);
      this._table.selectNone();
      void this._load();
    } catch (error) {
      if (!isAbort(error)) complain(error);
    }
  }

  /**
   * The query that names the jobs to which an action is to be done.
   * @param {typeof ACTIONS[number]} action
   */
  _meant(action) {
    const fits = (/** @type {import('../types.js').State} */ state) =>
      action.isEnd === null || (hasEnded(state) === action.isEnd && state !== 'Cleaned');
    if (this._areAllMeant) {
      const query = filter.toRequest(this._terms);
      query.set('status', filter.statesOf(this._terms).filter(fits).join(','));
      return query;
    }
    const jobs = this._table.jobs.filter((job) => this._table.selected.has(job.id) && fits(job.status));
    return new URLSearchParams(jobs.map(({ id }) => ['id', String(id)]));
  }

  /** @param {URLSearchParams} query */
  async _number(query) {
    if (!query.get('status')) return 0;
    const counts = await this._app.api.get('jobs/counts', { query, signal: this._signal });
    return counts.total;
  }
}
