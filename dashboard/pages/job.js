/** One job: its state and why, its log, its files, its history, and what can be done to it. */

/** @import {App} from '../main.js' */
/** @import {Address, JobDetails, Page, Transition} from '../types.js' */

import { ApiError, isAbort } from '../api.js';
import { fill, h } from '../dom.js';
import { curl, save } from '../download.js';
import { bytes, counted } from '../format.js';
import { icon } from '../icons.js';
import { Files } from '../job/files.js';
import { facts } from '../job/facts.js';
import { attemptTable, historyTable, timeline } from '../job/history.js';
import { LogPanel } from '../log/panel.js';
import { complain, confirmed, copy, note } from '../overlay.js';
import { paced } from '../pace.js';
import { go, href } from '../router.js';
import { hasEnded, stateBadge, titleOf } from '../states.js';

const TABS = /** @type {const} */ ([['log', 'Log'], ['files', 'Files'], ['history', 'History']]);

/**
 * @param {App} app
 * @param {Address} address
 * @param {AbortSignal} signal
 * @returns {Promise<Page>}
 */
export async function open(app, address, signal) {
  const id = Number(address.path[1]);
  if (!Number.isSafeInteger(id) || id < 0) throw new Error('This is not the number of a job.');
  const page = new JobPage(app, id, signal);
  await page.load();
  page.show(address.query);
  return {
    title: page.title,
    element: page.element,
    update: (query) => page.show(query),
    onKey: (event) => page.onKey(event),
  };
}

class JobPage {
  /**
   * @param {App} app
   * @param {number} id
   * @param {AbortSignal} signal
   */
  constructor(app, id, signal) {
    this._app = app;
    this._id = id;
    this._signal = signal;
    /** @type {JobDetails | null} */
    this._job = null;
    /** @type {Transition[]} */
    this._history = [];
    this._tab = '';
    this._head = h('header', { class: 'job-head' });
    this._timeline = h('div', {});
    this._tabs = h('nav', { class: 'tabs', 'aria-label': 'Parts of the job' });
    this._panel = h('div', { class: 'job-panel' });
    this._facts = h('aside', { class: 'job-facts', 'aria-label': 'Facts' });
    this.element = h('div', { class: 'page job' }, this._head, this._timeline,
      h('div', { class: 'job-columns' },
        h('div', { class: 'job-main' }, this._tabs, this._panel), this._facts));
    /** @type {LogPanel | null} */
    this._log = null;
    /** @type {Files | null} */
    this._files = null;
    const reload = paced(() => this._reload(), 400, signal);
    app.live.on('job', (/** @type {Transition} */ transition) => {
      if (transition.id !== this._id) return;
      if (hasEnded(transition.status)) this._log?.end();
      reload();
    }, signal);
    app.live.on('again', reload, signal);
    // why it waits changes with the jobs of others
    const wait = setInterval(() => {
      if (this._job?.status === 'Queued' && !document.hidden) reload();
    }, 5_000);
    signal.addEventListener('abort', () => clearInterval(wait));
  }

  get title() {
    return this._job === null ? `Job ${this._id}` : `#${this._id} ${titleOf(this._job)}`;
  }

  /** Get all about the job. Raises ApiError. */
  async load() {
    const [job, history] = await Promise.all([
      this._app.api.get(`jobs/${this._id}`, { signal: this._signal }),
      this._app.api.get(`jobs/${this._id}/history`, { signal: this._signal }),
    ]);
    const before = this._job;
    this._job = /** @type {JobDetails} */ (job);
    this._history = history.history;
    this._draw(this._job);
    if (before !== null && before.status !== job.status) this._files?.reload();
  }

  async _reload() {
    try {
      await this.load();
    } catch (error) {
      if (isAbort(error) || (error instanceof ApiError && error.isPassing)) return;
      complain(error);
    }
  }

  /** @param {URLSearchParams} query */
  show(query) {
    const wanted = query.get('tab') ?? 'log';
    const tab = TABS.some(([name]) => name === wanted) ? wanted : 'log';
    const isNew = tab !== this._tab;
    this._tab = tab;
    this._drawTabs();
    if (isNew) this._open();
    if (tab === 'files') this._files?.show(query.get('path'));
  }

  /** @param {KeyboardEvent} event */
  onKey(event) {
    const tab = TABS[Number(event.key) - 1];
    if (tab) go(this._tabAddress(tab[0]));
    else if (this._tab === 'log') return this._log?.onKey(event) ?? false;
    else return false;
    return true;
  }

  _open() {
    if (this._job === null) return;
    if (this._tab === 'log') {
      if (this._log === null) {
        this._log = new LogPanel(this._app, this._id, this._signal);
        this._log.start(hasEnded(this._job.status));
      }
      fill(this._panel, this._log.element);
    } else if (this._tab === 'files') {
      this._files ??= new Files(this._app, this._id, this._signal);
      fill(this._panel, this._files.element);
    } else {
      this._drawHistory(this._job);
    }
  }

  // --- drawing

  /** @param {JobDetails} job */
  _draw(job) {
    fill(this._head,
      h('nav', { class: 'crumbs', 'aria-label': 'Where this is' },
        h('a', { href: href('jobs') }, 'Jobs'), h('span', { 'aria-hidden': 'true' }, '/'),
        h('span', {}, `#${job.id}`)),
      h('div', { class: 'job-title-row' },
        h('h1', {}, titleOf(job), h('span', { class: 'job-number' }, ` #${job.id}`)),
        h('div', { class: 'page-actions' }, ...this._actions(job))),
      h('p', { class: 'job-state' }, stateBadge(job.status), h('span', {}, inWords(job))));
    fill(this._timeline, timeline(job, this._history));
    fill(this._facts, facts(this._app, job));
    this._drawTabs();
    if (this._tab === 'history') this._drawHistory(job);
  }

  /** @param {string} tab */
  _tabAddress(tab) {
    return href(`jobs/${this._id}`, tab === 'log' ? {} : { tab });
  }

  _drawTabs() {
    const attempts = this._job?.attempts.length ?? 0;
    fill(this._tabs, ...TABS.map(([name, label]) => h('a', {
      href: this._tabAddress(name), 'aria-current': name === this._tab ? 'page' : null,
    }, label, name === 'history' && attempts > 1
      && h('span', { class: 'tab-count', title: counted(attempts, 'attempt') }, attempts))));
  }

  /** @param {JobDetails} job */
  _drawHistory(job) {
    fill(this._panel, h('div', { class: 'history' },
      job.attempts.length > 0 && h('section', {}, h('h2', {}, 'Attempts'), attemptTable(job)),
      h('section', {}, h('h2', {}, 'What happened'), historyTable(this._history))));
  }

  /** @param {JobDetails} job */
  _actions(job) {
    const { access } = this._app;
    const isOver = hasEnded(job.status);
    const path = job.status === 'Completed' ? `download/${job.id}` : `download_partial/${job.id}`;
    const name = job.status === 'Completed' ? `job-${job.id}.zip` : `job-${job.id}-partial.zip`;
    const button = (/** @type {import('../icons.js').Icon} */ sign, /** @type {string} */ label,
      /** @type {string} */ kind, /** @type {(button: HTMLButtonElement) => void} */ act) => {
      const element = h('button', { class: `button ${kind}`, type: 'button' }, icon(sign), label);
      element.addEventListener('click', () => act(element));
      return element;
    };
    const size = job.result && job.status === 'Completed' ? ` · ${bytes(job.result.size)}` : '';
    return [
      job.status !== 'Cleaned' && button('copy', 'Copy as curl', 'ghost', (element) =>
        void copy(element, curl(this._app, path, ['-o', name]))),
      access.may('submit') && job.status !== 'Cleaned' && button('rerun', 'Run again', '', () => void this._rerun()),
      access.may('submit') && !isOver && button('stop', 'Terminate', 'danger-text', () => void this._terminate()),
      access.may('submit') && isOver && job.status !== 'Cleaned'
        && button('trash', 'Delete', 'danger-text', () => void this._delete()),
      job.status !== 'Cleaned' && job.status !== 'Invalid' && button('download',
        job.status === 'Completed' ? `Download result${size}` : 'Download files as they are',
        job.status === 'Completed' ? 'primary' : '', () => void save(this._app, path, name)),
    ];
  }

  // --- acting

  async _rerun() {
    await this._try(async () => {
      const job = await this._app.api.post(`jobs/${this._id}/rerun`);
      note(icon('check'), `Job ${job.id} has the same input.`);
      go(href(`jobs/${job.id}`));
    });
  }

  async _terminate() {
    await this._try(async () => {
      const isMeant = await confirmed(`Terminate job ${this._id}?`,
        'It ends at once and keeps only what it has printed and left so far.', 'Terminate');
      if (!isMeant) return;
      await this._app.api.post(`terminate/${this._id}`);
      note(icon('check'), `Job ${this._id} is terminated.`);
      await this.load();
    });
  }

  async _delete() {
    await this._try(async () => {
      const isMeant = await confirmed(`Delete job ${this._id}?`,
        'Its input, result and log are removed for good. How it ended stays known.', 'Delete');
      if (!isMeant) return;
      await this._app.api.delete(`jobs/${this._id}`);
      note(icon('check'), `The files of job ${this._id} are deleted.`);
      this._log = null;
      await this.load();
      this._open();
    });
  }

  /** @param {() => Promise<void>} work */
  async _try(work) {
    try {
      await work();
    } catch (error) {
      if (!isAbort(error)) complain(error);
    }
  }
}

/**
 * What a job's state means for it, as a sentence.
 * @param {JobDetails} job
 */
function inWords(job) {
  switch (job.status) {
    case 'Queued': {
      if (job.queue === null) return job.message;
      const place = job.queue.position > 1 ? `; number ${job.queue.position} of this user’s jobs here` : '';
      return `Waits: ${job.queue.reason}${place}.`;
    }
    case 'Processing': return `Is being sent to ${job.agent ?? 'an agent'}.`;
    case 'Submitted': return `${job.agent ?? 'The agent'} has all of it and starts it.`;
    case 'Running': return `Runs on ${job.agent ?? 'an agent'}.`;
    case 'Completed': return `Ended well${job.agent ? ` on ${job.agent}` : ''}.`;
    case 'Cleaned':
      return `Its files have been removed.${job.outcome ? ` It had ended as ${job.outcome}.` : ''} ${job.message}`;
    default: return job.message;
  }
}
