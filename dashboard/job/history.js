/** What happened to a job, and how long each part took. */

/** @import {Attempt, JobDetails, State, Transition} from '../types.js' */

import { h } from '../dom.js';
import { absolute, ago, duration, secondsBetween, took } from '../format.js';
import { href } from '../router.js';
import { hasEnded, stateBadge } from '../states.js';

/** @typedef {'waiting' | 'sending' | 'starting' | 'running' | 'returning'} Phase */
/** @typedef {{ phase: Phase, seconds: number, since: string, isOpen: boolean, attempt: number }} Part */

/** @type {Partial<Record<State, Phase>>} */
const PHASES = { Queued: 'waiting', Processing: 'sending', Submitted: 'starting', Running: 'running' };
const WORDS = {
  waiting: 'Waiting', sending: 'Sending', starting: 'Starting', running: 'Running',
  returning: 'Returning the result',
};

/**
 * Cut a job's life into its parts, oldest first.
 * @param {JobDetails} job
 * @param {readonly Transition[]} history
 * @returns {Part[]}
 */
export function partsOf(job, history) {
  return history.flatMap((transition, index) => {
    const phase = PHASES[transition.status];
    if (phase === undefined) return [];
    const next = history[index + 1];
    const seconds = Math.max(0, secondsBetween(transition.at, next?.at ?? null));
    const { attempt } = transition;
    /** @type {Part} */
    const part = { phase, seconds, since: transition.at, isOpen: next === undefined, attempt };
    const wall = job.attempts.find(({ number }) => number === attempt)?.usage?.wall_seconds
      ?? (attempt === job.attempts.at(-1)?.number ? job.usage?.wall_seconds : null);
    if (phase !== 'running' || part.isOpen || !wall || wall >= seconds) return [part];
    return [{ ...part, seconds: wall }, { ...part, phase: 'returning', seconds: seconds - wall }];
  });
}

/**
 * A job's life as a bar.
 * @param {JobDetails} job
 * @param {readonly Transition[]} history
 */
export function timeline(job, history) {
  const parts = partsOf(job, history);
  const bar = h('div', { class: 'timeline-bar', 'aria-hidden': 'true' }, ...parts.map((part) => {
    const element = h('span', {
      class: 'timeline-part', 'data-phase': part.phase, ...(part.isOpen ? { 'data-open': '1' } : {}),
      title: `${WORDS[part.phase]}: ${duration(part.seconds)}`,
    });
    // the square root, so that short parts can be seen beside long ones
    element.style.flexGrow = String(1 + 1000 * Math.sqrt(part.seconds));
    return element;
  }));
  const isLong = parts.length > 9;
  const shown = isLong ? parts.slice(-5) : parts;
  return h('section', { class: 'timeline', 'aria-label': 'Timeline' }, bar,
    h('ol', { class: 'timeline-words' },
      isLong && h('li', { class: 'quiet' }, `${parts.length - shown.length} parts before`),
      ...shown.map((part) => h('li', { 'data-phase': part.phase },
        h('span', { class: 'timeline-dot', 'aria-hidden': 'true' }),
        h('span', {}, WORDS[part.phase]),
        h('strong', {}, part.isOpen ? took(part.since, null) : duration(part.seconds)))),
      hasEnded(job.status) && parts.length > 0 && h('li', { class: 'timeline-sum' },
        h('span', {}, 'In all'),
        h('strong', {}, duration(parts.reduce((sum, { seconds }) => sum + seconds, 0))))));
}

/** @param {JobDetails} job */
export function attemptTable(job) {
  return h('div', { class: 'table-scroll', tabIndex: 0, role: 'region', 'aria-label': 'Attempts' },
    h('table', { class: 'data-table' },
      h('thead', {}, h('tr', {}, ...['Attempt', 'Outcome', 'Agent', 'Started', 'Ran', 'Exit code', 'Why it ended']
        .map((name) => h('th', { scope: 'col' }, name)))),
      h('tbody', {}, ...[...job.attempts].reverse().map((attempt) => attemptRow(attempt)))));
}

/** @param {Attempt} attempt */
function attemptRow(attempt) {
  const { outcome, started_at: started, ended_at: ended } = attempt;
  return h('tr', {},
    h('td', {}, attempt.number, h('span', { class: 'quiet' }, ` id ${attempt.id}`)),
    h('td', {}, outcome ? stateBadge(outcome) : 'goes on'),
    h('td', {}, h('a', { href: href('jobs', { agent: attempt.agent }) }, attempt.agent)),
    h('td', {}, started ? ago(started) : '–'),
    h('td', {}, started ? took(started, ended) : '–'),
    h('td', {}, attempt.exit_code ?? '–'),
    h('td', { class: 'wide' }, attempt.message));
}

/** @param {readonly Transition[]} history */
export function historyTable(history) {
  return h('div', { class: 'table-scroll', tabIndex: 0, role: 'region', 'aria-label': 'History' },
    h('table', { class: 'data-table' },
      h('thead', {}, h('tr', {}, ...['Time', 'After', 'State', 'Attempt', 'Why']
        .map((name) => h('th', { scope: 'col' }, name)))),
      h('tbody', {}, ...history.map((transition, index) => h('tr', {},
        h('td', { class: 'nowrap' }, absolute(transition.at)),
        h('td', { class: 'nowrap' }, index === 0
          ? '' : `+ ${duration(Math.max(0, secondsBetween(history[index - 1].at, transition.at)))}`),
        h('td', {}, stateBadge(transition.status)),
        h('td', {}, transition.attempt || '–'),
        h('td', { class: 'wide' }, transition.message))))));
}
