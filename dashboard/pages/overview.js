/** What goes on, how it went lately, and what needs somebody. */

/** @import {App} from '../main.js' */
/** @import {Address, Agent, JobSummary, Page, Service, State, Stats, Transition} from '../types.js' */

import { isAbort } from '../api.js';
import { Chart } from '../chart.js';
import { fill, h, keyed, setText } from '../dom.js';
import { ago, bytes, count, counted, duration, took } from '../format.js';
import { icon } from '../icons.js';
import { meter, setMeter } from '../meter.js';
import { failure } from '../overlay.js';
import { paced, repeat } from '../pace.js';
import { go, href } from '../router.js';
import { ACTIVE, remark, setState, stateBadge, titleOf } from '../states.js';
import { attention } from './attention.js';

const PERIODS = /** @type {const} */ ([['1h', '1 hour'], ['24h', '24 hours'], ['7d', '7 days']]);
const RECENT_JOBS = 10;
const SLOW_MS = 5_000;

/**
 * @param {App} app
 * @param {Address} address
 * @param {AbortSignal} signal
 * @returns {Page}
 */
export function open(app, address, signal) {
  const overview = new Overview(app, signal);
  overview.setPeriod(address.query.get('period') ?? '1h');
  overview.start();
  return {
    title: 'Overview',
    element: overview.element,
    update: (query) => overview.setPeriod(query.get('period') ?? '1h'),
  };
}

class Overview {
  /**
   * @param {App} app
   * @param {AbortSignal} signal
   */
  constructor(app, signal) {
    this._app = app;
    this._signal = signal;
    this._period = '1h';
    /** @type {Map<State, number>} */
    this._active = new Map();
    /** @type {Service[]} */
    this._services = [];
    /** @type {Agent[]} */
    this._agents = [];
    /** @type {Stats | null} */
    this._lastHour = null;
    this._drawSoon = paced(() => this._draw(), 250, signal);
    // what a token of one user is told of all users together is said to be that
    const ofAll = app.access.userId === null ? '' : ', all users together';
    this._tiles = new Tiles(ofAll);
    this._charts = new Charts();
    this._recent = new RecentJobs(app, signal);
    this._attention = h('ul', { class: 'attention' });
    this._agentRows = h('div', { class: 'load-list' });
    this._periods = h('div', { class: 'segments', role: 'group', 'aria-label': 'Period of the charts' });
    this._problem = h('div', {});
    this.element = h('div', { class: 'page overview' },
      h('header', { class: 'page-head' }, h('h1', {}, 'Overview'),
        h('div', { class: 'page-actions' },
          app.access.may('submit')
          && h('a', { class: 'button primary', href: href('submit') }, icon('submit'), 'Submit a job'))),
      this._problem,
      this._tiles.element,
      h('div', { class: 'section-head' }, h('h2', {}, `How it went${ofAll}`), this._periods),
      this._charts.element,
      h('div', { class: 'columns' },
        h('section', { class: 'card list-card' },
          h('header', {}, h('h2', {}, 'Needs attention')), this._attention),
        h('section', { class: 'card list-card' },
          h('header', {}, h('h2', {}, 'Agents'), h('a', { href: href('agents') }, 'All')),
          this._agentRows)),
      this._recent.element);
  }

  start() {
    const { live } = this._app;
    const recount = paced(() => this._count(), SLOW_MS, this._signal);
    repeat(() => void this._look(), SLOW_MS, this._signal);
    repeat(() => void this._loadStats(), 30_000, this._signal);
    recount();
    live.on('job', (transition) => {
      this._take(transition);
      recount();
    }, this._signal);
    live.on('agent', paced(() => this._look(), 1_000, this._signal), this._signal);
    live.on('again', () => {
      recount();
      void this._look();
      void this._loadStats();
    }, this._signal);
  }

  /** @param {string} period */
  setPeriod(period) {
    this._period = PERIODS.some(([name]) => name === period) ? period : '1h';
    fill(this._periods, ...PERIODS.map(([name, words]) => h('a', {
      href: href('', name === '1h' ? {} : { period: name }),
      'aria-current': name === this._period ? 'true' : null,
    }, words)));
    if (this._lastHour !== null) void this._loadStats();
  }

  /** @param {Transition} transition */
  _take(transition) {
    const { previous, status } = transition;
    if (previous !== null && ACTIVE.includes(previous)) {
      this._active.set(previous, Math.max(0, (this._active.get(previous) ?? 0) - 1));
    }
    if (ACTIVE.includes(status)) this._active.set(status, (this._active.get(status) ?? 0) + 1);
    const last = this._lastHour?.points.at(-1);
    if (last) {
      if (previous === null) last.submitted += 1;
      if (status === 'Completed') last.completed += 1;
      if (status === 'Failed') last.failed += 1;
      if (status === 'Killed') last.killed += 1;
      if (status === 'Invalid') last.invalid += 1;
    }
    this._drawSoon();
  }

  async _count() {
    await this._try(async () => {
      const counts = await this._app.api.get('jobs/counts', {
        query: { status: ACTIVE.join(',') }, signal: this._signal,
      });
      for (const state of ACTIVE) this._active.set(state, counts.states[state] ?? 0);
    });
  }

  async _look() {
    await this._try(async () => {
      const [services, agents] = await Promise.all([
        this._app.api.get('services', { signal: this._signal }),
        this._app.api.get('agents', { signal: this._signal }),
      ]);
      this._services = services.services;
      this._agents = agents.agents;
    });
  }

  async _loadStats() {
    await this._try(async () => {
      const period = this._period;
      const get = (/** @type {string} */ name) =>
        this._app.api.get('stats', { query: { period: name }, signal: this._signal });
      const [hour, shown] = period === '1h'
        ? [await get('1h'), null]
        : await Promise.all([get('1h'), get(period)]);
      if (period !== this._period) return;
      this._lastHour = hour;
      this._charts.show(shown ?? hour);
    });
  }

  /** @param {() => Promise<void>} work */
  async _try(work) {
    try {
      await work();
      this._problem.replaceChildren();
      this._draw();
    } catch (error) {
      if (isAbort(error) || !this._app.live.isConnected) return; // said by the banner
      fill(this._problem, failure(error, () => {
        void this._count();
        void this._look();
        void this._loadStats();
      }));
    }
  }

  _draw() {
    this._tiles.show(this._active, this._lastHour);
    const items = attention(this._agents, this._services, this._lastHour);
    keyed(this._attention, items, (item) => item.key + item.text, (item) =>
      h('li', { 'data-level': item.level },
        icon(item.level === 'good' ? 'check' : 'warning'),
        h('span', {}, item.text),
        item.href && h('a', { href: item.href }, item.action)));
    this._drawAgents();
  }

  _drawAgents() {
    if (this._agents.length === 0) {
      fill(this._agentRows, h('p', { class: 'quiet' }, 'No agent is connected.'));
      return;
    }
    if (this._agentRows.firstElementChild?.matches('.quiet')) this._agentRows.replaceChildren();
    keyed(this._agentRows, this._agents.slice(0, 8), (agent) => agent.id ?? agent.name, makeAgentRow, updateAgentRow);
  }
}

/** @param {Agent} agent */
function makeAgentRow(agent) {
  const row = h('a', { class: 'load-row', href: href('agents') },
    h('span', { class: 'load-name' }, agent.name),
    meter(`Slots of ${agent.name} in use`),
    h('span', { class: 'load-slots' }),
    h('span', { class: 'load-more' }));
  updateAgentRow(row, agent);
  return row;
}

/**
 * @param {HTMLElement} row
 * @param {Agent} agent
 */
function updateAgentRow(row, agent) {
  setMeter(/** @type {HTMLElement} */ (row.children[1]), agent.busy, agent.slots);
  setText(row.children[2], `${agent.busy} of ${agent.slots}`);
  const { total, free } = agent.resources ?? {};
  const words = [
    agent.is_connected ? '' : 'away',
    agent.is_drained ? 'drained' : '',
    agent.load === null ? '' : `load ${agent.load.toFixed(1)}`,
    total?.memory ? `${bytes(free?.memory ?? 0)} free` : '',
    total?.gpus ? `${free?.gpus ?? 0} of ${counted(total.gpus, 'GPU')} free` : '',
  ];
  setText(row.children[3], words.filter(Boolean).join(' · '));
}

/** The numbers on top. */
class Tiles {
  /** @param {string} ofAll */
  constructor(ofAll) {
    /** @type {Record<string, HTMLElement>} */
    this._numbers = {};
    const tile = (/** @type {string} */ name, /** @type {string} */ states, /** @type {string} */ hint) => {
      const number = h('span', { class: 'tile-number' }, '–');
      this._numbers[name] = number;
      return h('a', { class: 'tile card', href: href('jobs', { status: states }), title: hint,
        'data-tile': name }, h('span', { class: 'tile-name' }, name), number);
    };
    this._ended = h('span', { class: 'tile-number' }, '–');
    this._split = h('span', { class: 'tile-split' });
    this.element = h('section', { class: 'tiles', 'aria-label': 'Jobs' },
      tile('Queued', 'Queued', 'Jobs that wait for an agent'),
      tile('Starting', 'Processing,Submitted', 'Jobs on their way to an agent'),
      tile('Running', 'Running', 'Jobs that run'),
      h('div', { class: 'tile card wide', 'data-tile': 'Ended' },
        h('span', { class: 'tile-name' }, `Ended in the last hour${ofAll}`), this._ended, this._split));
  }

  /**
   * @param {Map<State, number>} active
   * @param {Stats | null} stats
   */
  show(active, stats) {
    const number = (/** @type {State} */ state) => active.get(state) ?? 0;
    if (active.size > 0) {
      setText(this._numbers.Queued, count(number('Queued')));
      setText(this._numbers.Starting, count(number('Processing') + number('Submitted')));
      setText(this._numbers.Running, count(number('Running')));
    }
    if (stats === null) return;
    const sums = /** @type {[State, number][]} */ ([
      ['Completed', sum(stats, 'completed')], ['Failed', sum(stats, 'failed')],
      ['Killed', sum(stats, 'killed')], ['Invalid', sum(stats, 'invalid')],
    ]);
    setText(this._ended, count(sums.reduce((all, [, one]) => all + one, 0)));
    keyed(this._split, sums, ([state]) => state,
      ([state, value]) => h('a', { class: 'state', 'data-state': state,
        href: href('jobs', { status: state, since: '1h' }) },
      icon(state), h('span', {}, `${count(value)} ${state}`)),
      (element, [state, value]) => setText(element.lastElementChild, `${count(value)} ${state}`));
  }
}

/**
 * @param {Stats} stats
 * @param {'submitted' | 'completed' | 'failed' | 'killed' | 'invalid'} name
 */
function sum(stats, name) {
  return stats.points.reduce((all, point) => all + point[name], 0);
}

/** Throughput, waits and run times. */
class Charts {
  constructor() {
    this._ended = new Chart({
      kind: 'bars', title: 'Jobs ended', names: ['completed', 'failed', 'terminated'],
      classes: ['mark-good', 'mark-bad', 'mark-other'], format: count,
    });
    this._wait = new Chart({
      kind: 'line', title: 'Wait', names: [''], classes: ['mark-wait'], format: duration,
    });
    this._run = new Chart({
      kind: 'line', title: 'Run time', names: [''], classes: ['mark-run'], format: duration,
    });
    this.element = h('div', { class: 'charts' },
      this._ended.element, this._wait.element, this._run.element);
  }

  /** @param {Stats} stats */
  show(stats) {
    const from = PERIODS.find(([name]) => name === stats.period)?.[1] ?? stats.period;
    const ended = stats.points.map((point) => ({
      time: point.time,
      values: [point.completed, point.failed + point.invalid, point.killed],
    }));
    const all = ended.reduce((total, { values }) => total + values[0] + values[1] + values[2], 0);
    this._ended.show(ended, counted(all, 'job'), `${from} ago`);
    for (const [chart, name] of /** @type {const} */ ([
      [this._wait, 'wait_seconds'], [this._run, 'run_seconds'],
    ])) {
      const points = stats.points.map((point) => ({ time: point.time, values: [point[name]] }));
      chart.show(points, meanOf(stats, name), `${from} ago`);
    }
  }
}

/**
 * @param {Stats} stats
 * @param {'wait_seconds' | 'run_seconds'} name
 */
function meanOf(stats, name) {
  let seconds = 0;
  let jobs = 0;
  for (const point of stats.points) {
    const value = point[name];
    const weight = point.completed + point.failed + point.killed;
    if (value === null || weight === 0) continue;
    seconds += value * weight;
    jobs += weight;
  }
  return jobs === 0 ? 'none yet' : `${duration(seconds / jobs)} on average`;
}

/** The newest jobs, as they come and go. */
class RecentJobs {
  /**
   * @param {App} app
   * @param {AbortSignal} signal
   */
  constructor(app, signal) {
    this._app = app;
    this._signal = signal;
    /** @type {JobSummary[]} */
    this._jobs = [];
    this._rows = h('div', { class: 'recent' });
    this.element = h('section', { class: 'card list-card' },
      h('header', {}, h('h2', {}, 'Newest jobs'), h('a', { href: href('jobs') }, 'All')), this._rows);
    const reload = paced(() => this._load(), 2_000, signal);
    const draw = paced(() => this._draw(), 250, signal);
    reload();
    app.live.on('again', reload, signal);
    app.live.on('job', (/** @type {Transition} */ transition) => {
      const job = this._jobs.find(({ id }) => id === transition.id);
      if (job) {
        Object.assign(job, { status: transition.status, message: transition.message });
        if (transition.status === 'Running') job.started_at = transition.at;
        if (!ACTIVE.includes(transition.status)) job.finished_at ??= transition.at;
        draw();
      } else if (transition.previous === null) reload();
    }, signal);
  }

  async _load() {
    try {
      const page = await this._app.api.get('jobs', {
        query: { limit: RECENT_JOBS }, signal: this._signal,
      });
      this._jobs = page.jobs;
      this._draw();
    } catch (error) {
      if (isAbort(error) || !this._app.live.isConnected) return;
      fill(this._rows, failure(error, () => void this._load()));
    }
  }

  _draw() {
    if (this._jobs.length === 0) {
      fill(this._rows, h('div', { class: 'empty' },
        h('h3', {}, 'No job yet'),
        h('p', {}, 'A job is a script, run.sh, and its input files.'),
        this._app.access.may('submit')
        && h('button', { class: 'button primary', type: 'button', on: {
          click: () => go(href('submit', { example: '1' })),
        } }, 'Try the example')));
      return;
    }
    if (this._rows.firstElementChild?.matches('.empty')) this._rows.replaceChildren();
    keyed(this._rows, this._jobs, (job) => job.id, makeRecent, updateRecent);
  }
}

/** @param {JobSummary} job */
function makeRecent(job) {
  const row = h('a', { class: 'recent-row', href: href(`jobs/${job.id}`) },
    stateBadge(job.status),
    h('span', { class: 'recent-id' }, `#${job.id}`),
    h('span', { class: 'recent-title' }, titleOf(job)),
    h('span', { class: 'recent-message' }),
    h('span', { class: 'recent-time' }));
  updateRecent(row, job);
  return row;
}

/**
 * @param {HTMLElement} row
 * @param {JobSummary} job
 */
function updateRecent(row, job) {
  setState(/** @type {HTMLElement} */ (row.children[0]), job.status);
  setText(row.children[3], remark(job));
  if (row.dataset.shown === job.status) return;
  row.dataset.shown = job.status;
  fill(row.children[4], ...(job.started_at && !ACTIVE.includes(job.status)
    ? [took(job.started_at, job.finished_at), ' · ', ago(job.created_at)]
    : job.status === 'Running' && job.started_at
      ? [took(job.started_at, null)]
      : [ago(job.created_at)]));
}
