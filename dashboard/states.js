/** The states of jobs, as people are told of them. */

/** @import {State} from './types.js' */

import { h } from './dom.js';
import { icon } from './icons.js';

/** @type {readonly State[]} */
export const ACTIVE = ['Queued', 'Processing', 'Submitted', 'Running'];
/** @type {readonly State[]} */
export const ENDED = ['Completed', 'Failed', 'Invalid', 'Killed', 'Cleaned'];
/** @type {readonly State[]} */
export const ALL = [...ACTIVE, ...ENDED];

/** What each state means, for a title and for screen readers. */
const MEANING = {
  Queued: 'waits for an agent',
  Processing: 'is being sent to an agent',
  Submitted: 'an agent has all of it and is about to start it',
  Running: 'runs',
  Completed: 'ended well; its result can be downloaded',
  Failed: 'ended with an error',
  Invalid: 'could not be run',
  Killed: 'was terminated',
  Cleaned: 'ended; its files have been removed',
  Lost: 'the agent lost it, and it was queued again',
};

/** @param {State} state */
export function hasEnded(state) {
  return ENDED.includes(state);
}

/**
 * A state as a sign and a word.
 * @param {State | 'Lost'} state
 */
export function stateBadge(state) {
  return h(
    'span',
    { class: 'state', 'data-state': state, title: `${state}: ${MEANING[state]}` },
    icon(state),
    h('span', {}, state),
  );
}

/**
 * Show a state in a badge that is there.
 * @param {HTMLElement} badge
 * @param {State | 'Lost'} state
 */
export function setState(badge, state) {
  if (badge.dataset.state !== state) badge.replaceWith(stateBadge(state));
}

/**
 * What there is to tell of a job in a list: why it ended or waits, nothing of what its state says.
 * @param {{ status: State, message: string }} job
 */
export function remark({ status, message }) {
  if (status === 'Completed') return '';
  return status === 'Queued' && /successfully/.test(message) ? '' : message;
}

/**
 * What a job is called: its name, else its files' purpose by its service.
 * @param {{ id: number, name: string, service: string }} job
 */
export function titleOf(job) {
  return job.name || `${job.service} job`;
}
