/** The services: their limits, what waits and runs, how long it takes, what failed. */

/** @import {App} from '../main.js' */
/** @import {Address, JobSummary, Page, Service} from '../types.js' */

import { isAbort } from '../api.js';
import { fill, h } from '../dom.js';
import { ago, bytes, count, duration } from '../format.js';
import { meter, setMeter } from '../meter.js';
import { empty, failure } from '../overlay.js';
import { paced, repeat } from '../pace.js';
import { href } from '../router.js';
import { stateBadge } from '../states.js';

const FAILURES = 5;

/**
 * @param {App} app
 * @param {Address} _address
 * @param {AbortSignal} signal
 * @returns {Page}
 */
export function open(app, _address, signal) {
  const table = h('div', { class: 'table-place' });
  const failures = h('div', { class: 'recent' });
  const load = async () => {
    try {
      const { services } = await app.api.get('services', { signal });
      fill(table, services.length === 0 ? empty('No service is configured') : tableOf(services));
    } catch (error) {
      if (isAbort(error) || !app.live.isConnected) return;
      fill(table, failure(error, load));
    }
  };
  const loadFailures = async () => {
    try {
      const { jobs } = await app.api.get('jobs', {
        query: { status: 'Failed,Invalid', limit: FAILURES }, signal,
      });
      fill(failures, ...(jobs.length === 0 ? [h('p', { class: 'quiet' }, 'None.')] : jobs.map(failed)));
    } catch (error) {
      if (isAbort(error) || !app.live.isConnected) return;
      fill(failures, failure(error, loadFailures));
    }
  };
  repeat(load, 5_000, signal);
  const soon = paced(loadFailures, 3_000, signal);
  soon();
  app.live.on('job', ({ status }) => {
    if (status === 'Failed' || status === 'Invalid') soon();
  }, signal);
  app.live.on('again', () => {
    void load();
    soon();
  }, signal);
  return {
    title: 'Services',
    element: h('div', { class: 'page' },
      h('header', { class: 'page-head' }, h('h1', {}, 'Services')), table,
      h('section', { class: 'card list-card' },
        h('header', {}, h('h2', {}, 'Failed last'), h('a', { href: href('jobs', { status: 'Failed,Invalid' }) }, 'All')),
        failures)),
  };
}

/** @param {Service[]} services */
function tableOf(services) {
  const names = ['Service', 'Running', 'Queued', 'Limit for a user', 'Time limit', 'Median wait', 'Median run', 'Agents'];
  return h('div', { class: 'table-scroll', tabIndex: 0, role: 'region', 'aria-label': 'Services' },
    h('table', { class: 'data-table services-table' },
      h('thead', {}, h('tr', {}, ...names.map((name) => h('th', { scope: 'col' }, name)))),
      h('tbody', {}, ...services.map(row))));
}

/** @param {Service} service */
function row(service) {
  const { name, active, queued, max_runs: limit } = service;
  return h('tr', {},
    h('th', { scope: 'row' },
      h('a', { href: href('jobs', { service: name }) }, name),
      !service.is_configured && h('span', { class: 'chip', 'data-level': 'warn' }, 'not configured'),
      service.isolation && h('span', { class: 'quiet' }, ` ${service.isolation}`),
      service.resources && h('span', { class: 'quiet service-needs' }, needs(service.resources))),
    h('td', {},
      h('a', { href: href('jobs', { service: name, status: 'Processing,Submitted,Running' }) },
        limit === null ? count(active) : `${count(active)} of ${count(limit)}`),
      limit !== null && setMeter(meter(`Runs of ${name}`), active, limit)),
    h('td', {}, h('a', { href: href('jobs', { service: name, status: 'Queued' }) }, count(queued))),
    h('td', {}, service.runs_per_user === null ? '–' : `${count(service.runs_per_user)} at a time`),
    h('td', {}, service.timeout === null ? 'none' : duration(service.timeout)),
    h('td', {}, service.median_wait === null ? '–' : duration(service.median_wait)),
    h('td', {}, service.median_run === null ? '–' : duration(service.median_run)),
    h('td', {}, service.agents.length === 0
      ? h('span', { class: 'chip', 'data-level': 'bad' }, 'none')
      : service.agents.length > 4 ? `${count(service.agents.length)} agents` : service.agents.join(', ')));
}

/** @param {NonNullable<Service['resources']>} resources */
function needs({ cpus, memory, gpus }) {
  return [`${cpus} CPU`, memory ? bytes(memory) : '', gpus ? `${gpus} GPU` : '']
    .filter(Boolean).join(', ');
}

/** @param {JobSummary} job */
function failed(job) {
  return h('a', { class: 'recent-row', href: href(`jobs/${job.id}`) },
    stateBadge(job.status),
    h('span', { class: 'recent-id' }, `#${job.id}`),
    h('span', { class: 'recent-title' }, job.service),
    h('span', { class: 'recent-message' }, job.message),
    h('span', { class: 'recent-time' }, ago(job.changed_at)));
}
