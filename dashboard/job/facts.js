/** What is known of a job, beside its state: a list of names and values. */

/** @import {App} from '../main.js' */
/** @import {Child} from '../dom.js' */
/** @import {JobDetails} from '../types.js' */

import { h } from '../dom.js';
import { absolute, ago, bytes, counted, duration } from '../format.js';
import { href } from '../router.js';

/**
 * @param {App} app
 * @param {JobDetails} job
 */
export function facts(app, job) {
  const attempt = job.attempts.at(-1);
  const tags = Object.entries(job.tags);
  /** @type {[string, Child[] | null][]} */
  const rows = [
    ['Service', [h('a', { href: href('jobs', { service: job.service }) }, job.service)]],
    ['User', [h('a', { href: href('jobs', { user: String(job.user_id) }) }, job.user_id)]],
    ['Agent', job.agent ? [h('a', { href: href('jobs', { agent: job.agent }) }, job.agent)] : null],
    ['Tags', tags.length > 0 ? tags.map(([key, value]) =>
      h('a', { class: 'tag', href: href('jobs', { tag: `${key}:${value}` }) }, `${key}:${value}`)) : null],
    ['Priority', job.priority === 0 ? null : [job.priority]],
    ['Time limit', job.timeout === null ? null : [duration(job.timeout)]],
    ['Created', [ago(job.created_at)]],
    ['Started', job.started_at ? [ago(job.started_at)] : null],
    ['Ended', job.finished_at ? [ago(job.finished_at)] : null],
    ['Exit code', attempt?.exit_code === null || attempt === undefined ? null : [attempt.exit_code]],
    ['Attempt', job.attempts.length > 1 ? [`${attempt?.number} (id ${job.dest_id})`] : null],
    ['Input', [`${counted(job.files.length, 'file')}, ${bytes(job.files.reduce((sum, { size }) => sum + size, 0))}`]],
    ['Result', job.result ? [bytes(job.result.size)] : null],
  ];
  return h('div', {}, list(rows), resources(job),
    h('details', { class: 'more-facts' }, h('summary', {}, 'Exact times'), list([
      ['Created', [absolute(job.created_at)]],
      ['Started', job.started_at ? [absolute(job.started_at)] : null],
      ['Ended', job.finished_at ? [absolute(job.finished_at)] : null],
      ['Changed', [absolute(job.changed_at)]],
    ])));
}

/** @param {[string, Child[] | null][]} rows */
function list(rows) {
  return h('dl', { class: 'facts' }, ...rows.flatMap(([name, value]) =>
    value === null ? [] : [h('dt', {}, name), h('dd', {}, ...value)]));
}

/**
 * What the job asked for and what it used, as far as that is known.
 * @param {JobDetails} job
 */
function resources({ resources: asked, usage: used }) {
  if (!asked) return null;
  const wall = used?.wall_seconds;
  const cpu = used?.cpu_seconds ?? null;
  const memory = used?.peak_memory ?? null;
  /** @type {[string, string | null, string | null][]} */
  const rows = [
    ['CPUs', String(asked.cpus), cpu !== null && wall ? `${(cpu / wall).toFixed(1)} on average` : null],
    ['Memory', asked.memory === null ? null : bytes(asked.memory),
      memory === null ? null : `${bytes(memory)} at most`],
    ['GPUs', asked.gpus > 0 ? String(asked.gpus) : null, null],
    ['CPU time', null, cpu === null ? null : duration(cpu)],
  ];
  const shown = rows.filter(([, one, other]) => one !== null || other !== null);
  return h('table', { class: 'resources' },
    h('caption', {}, 'Resources'),
    h('thead', {}, h('tr', {}, h('td', {}),
      h('th', { scope: 'col' }, 'asked'), h('th', { scope: 'col' }, 'used'))),
    h('tbody', {}, ...shown.map(([name, one, other]) => h('tr', {},
      h('th', { scope: 'row' }, name), h('td', {}, one ?? '–'), h('td', {}, other ?? '–')))));
}
