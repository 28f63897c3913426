/** The machines: what each has, holds and can do, and whether it gets jobs. */

/** @import {App} from '../main.js' */
/** @import {Child} from '../dom.js' */
/** @import {Address, Agent, Page} from '../types.js' */

import { isAbort } from '../api.js';
import { fill, h } from '../dom.js';
import { ago, bytes, count, duration } from '../format.js';
import { icon } from '../icons.js';
import { meter, setMeter } from '../meter.js';
import { complain, empty, failure, note } from '../overlay.js';
import { paced, repeat } from '../pace.js';
import { href } from '../router.js';

const MAX_JOBS = 12;

/**
 * @param {App} app
 * @param {Address} _address
 * @param {AbortSignal} signal
 * @returns {Page}
 */
export function open(app, _address, signal) {
  const list = h('div', { class: 'agents' });
  const load = async () => {
    try {
      const { agents } = await app.api.get('agents', { signal });
      draw(app, list, agents, load);
    } catch (error) {
      if (isAbort(error) || !app.live.isConnected) return;
      fill(list, failure(error, load));
    }
  };
  repeat(load, 5_000, signal);
  app.live.on('agent', paced(load, 500, signal), signal);
  app.live.on('again', load, signal);
  return {
    title: 'Agents',
    element: h('div', { class: 'page' },
      h('header', { class: 'page-head' }, h('h1', {}, 'Agents')), list),
  };
}

/**
 * @param {App} app
 * @param {HTMLElement} list
 * @param {Agent[]} agents
 * @param {() => void} load
 */
function draw(app, list, agents, load) {
  const open = new Set([...list.querySelectorAll('details[open]')].map(cardName));
  const focused = document.activeElement?.getAttribute('data-focus');
  if (agents.length === 0) {
    fill(list, empty('No agent is connected',
      h('p', {}, 'Agents run the jobs. Start one on any machine that reaches this server:'),
      h('pre', { class: 'code', tabIndex: 0 }, `orchestrator-agent --server ${app.api.address('').replace(/\/$/, '')} --token-file token.txt`)));
    return;
  }
  fill(list, ...agents.map((agent) => card(app, agent, load)));
  for (const details of list.querySelectorAll('details')) details.open = open.has(cardName(details));
  if (!focused) return;
  /** @type {HTMLElement | null} */ (list.querySelector(`[data-focus="${CSS.escape(focused)}"]`))?.focus();
}

/** @param {Element} element */
function cardName(element) {
  return element.closest('article')?.getAttribute('aria-label');
}

/**
 * @param {App} app
 * @param {Agent} agent
 * @param {() => void} load
 */
function card(app, agent, load) {
  return h('article', { class: 'agent card', 'aria-label': agent.name },
    h('header', {}, h('h2', {}, agent.name), condition(agent), h('span', { class: 'spring' }),
      app.access.may('admin') && drainButton(app, agent, load)),
    ...warnings(agent),
    h('div', { class: 'gauges' },
      gauge('Slots', agent.busy, agent.slots, count),
      ...gaugesOf(agent)),
    h('dl', { class: 'facts' }, ...pairs([
      ['Load', agent.load === null ? null : [agent.load.toFixed(2)]],
      ['Services', [agent.services === null ? 'all' : agent.services.join(', ') || 'none']],
      ['Isolation', isolation(agent)],
      ['Version', agent.version === null ? null : [agent.version]],
      ['Address', agent.address === null ? null : [agent.address]],
      ['Connected', agent.connected_since === null ? null : [ago(agent.connected_since)]],
      ['Heard', agent.heartbeat_age === null ? null : [`${duration(agent.heartbeat_age)} ago`]],
      ['Jobs', jobs(agent)],
    ])),
    notes(agent));
}

/** @param {Agent} agent */
function condition(agent) {
  if (agent.set_aside) return h('span', { class: 'chip', 'data-level': 'bad' }, 'set aside');
  if (!agent.is_connected) {
    const left = agent.lease_left === null ? '' : `, ${duration(agent.lease_left)} left`;
    return h('span', { class: 'chip', 'data-level': 'bad' }, `away${left}`);
  }
  if (agent.is_drained) return h('span', { class: 'chip', 'data-level': 'warn' }, 'drained');
  return h('span', { class: 'chip', 'data-level': 'good' }, 'connected');
}

/**
 * @param {App} app
 * @param {Agent} agent
 * @param {() => void} load
 */
function drainButton(app, agent, load) {
  const action = agent.is_drained ? 'resume' : 'drain';
  return h('button', {
    class: 'button small', type: 'button', 'data-focus': `drain-${agent.id}`,
    title: agent.is_drained ? 'Give it jobs again' : 'It finishes what it holds and gets nothing new',
    on: { click: async () => {
      try {
        await app.api.post(`agents/${encodeURIComponent(agent.id ?? agent.name)}/${action}`);
        note(icon('check'), agent.is_drained ? `${agent.name} gets jobs again.` : `${agent.name} gets no new jobs.`);
        load();
      } catch (error) {
        complain(error);
      }
    } },
  }, agent.is_drained ? 'Resume' : 'Drain');
}

/** @param {Agent} agent */
function gaugesOf({ resources }) {
  if (!resources) return [];
  const { total, free } = resources;
  return [
    gauge('CPUs', total.cpus - free.cpus, total.cpus, (value) => String(Math.round(value * 10) / 10)),
    total.memory && gauge('Memory', total.memory - (free.memory ?? 0), total.memory, bytes),
    total.gpus > 0 && gauge('GPUs', total.gpus - free.gpus, total.gpus, count),
  ];
}

/**
 * @param {string} name
 * @param {number} used
 * @param {number} total
 * @param {(value: number) => string} format
 */
function gauge(name, used, total, format) {
  return h('div', { class: 'gauge' },
    h('span', { class: 'gauge-name' }, name),
    h('span', { class: 'gauge-value' }, `${format(used)} of ${format(total)}`),
    setMeter(meter(`${name} in use`), used, total));
}

/**
 * What keeps jobs from what is not theirs, and where that falls short.
 * @param {Agent} agent
 * @returns {Child[] | null}
 */
function isolation({ isolation: given }) {
  if (!given) return null;
  return [
    ...given.kinds.map(({ kind, is_given: isGiven }) => h('span', {
      class: 'chip', 'data-level': isGiven ? 'good' : 'none',
    }, isGiven ? kind : `no ${kind}`, kind === given.default && ', the default')),
    given.default === 'none' && h('span', { class: 'chip', 'data-level': 'warn' }, 'none by default'),
  ];
}

/** @param {Agent} agent */
function notes({ isolation: given }) {
  const words = (given?.kinds ?? []).flatMap(({ kind, notes: said }) =>
    said.map((note) => h('li', {}, h('strong', {}, kind), ` ${note}`)));
  if (words.length === 0) return null;
  return h('details', { class: 'agent-notes' },
    h('summary', {}, 'What isolation leaves open, or lacks'), h('ul', {}, ...words));
}

/** @param {Agent} agent */
function warnings(agent) {
  return [
    agent.set_aside ? `Set aside: ${agent.set_aside}` : '',
    agent.problem ?? '',
    ...(agent.services_set_aside ?? []).map(({ service, reason }) => `Set aside for ${service}: ${reason}`),
    ...(agent.isolation?.not_offered ?? []).map(({ service, reason }) =>
      `Does not offer ${service}: ${reason}`),
  ].filter(Boolean).map((text) => h('p', { class: 'agent-aside' }, icon('warning'), text));
}

/**
 * @param {Agent} agent
 * @returns {Child[] | null}
 */
function jobs(agent) {
  if (agent.jobs.length === 0) return null;
  const shown = agent.jobs.slice(0, MAX_JOBS)
    .map((id) => h('a', { class: 'tag', href: href(`jobs/${id}`) }, `#${id}`));
  if (agent.jobs.length <= MAX_JOBS) return shown;
  return [...shown, h('a', { href: href('jobs', {
    agent: agent.name, status: 'Processing,Submitted,Running',
  }) }, `all ${agent.jobs.length}`)];
}

/** @param {[string, Child[] | null][]} rows */
function pairs(rows) {
  return rows.flatMap(([name, value]) =>
    value === null ? [] : [h('dt', {}, name), h('dd', {}, ...value)]);
}
